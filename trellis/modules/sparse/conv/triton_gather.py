"""What the convolution kernels share: which row a tap reads, and gathering rows of several taps as one wide tile."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def child_tap(child, reduced):
    """The tap number among the 27 around the parent that reduced tap `reduced` of child `child` reads."""
    x = (reduced >> 2) + (child >> 2)
    y = ((reduced >> 1) & 1) + ((child >> 1) & 1)
    z = (reduced & 1) + (child & 1)
    return 9 * z + 3 * y + x


@triton.jit
def source_column(tap, first_child, MODE: tl.constexpr):
    """Column of the tap table for tap number `tap` of a launch; children count from `first_child`."""
    if MODE == 0:
        return tap
    child = first_child + tap // 8
    column = child_tap(child, tap % 8)
    if MODE == 2:
        # parent P is read through tap offset o by the child of P - o
        column = 26 - column
    return column


@triton.jit
def gather(
    feats, table, count, rows, live, tap, channels, first_child,
    C: tl.constexpr, TAPS: tl.constexpr, MODE: tl.constexpr, GROUP: tl.constexpr, TPS: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """[rows, TPS * BK]: the rows that taps tap .. tap + TPS - 1 read, side by side; zeros where there is none."""
    if TPS == 1:
        column = source_column(tap, first_child, MODE)
        near = tl.load(table + column.to(tl.int64) * count + rows, mask=live, other=-1)
        source = near.to(tl.int64)
        if MODE == 2:
            source = source * GROUP + tap // 8
        ok = (near >= 0)[:, None]
        if C % BK != 0:
            ok = ok & (channels < C)[None, :]
        return tl.load(feats + source[:, None] * C + channels[None, :], mask=ok, other=0.0)
    taps = tap + tl.arange(0, TPS)
    column = source_column(taps, first_child, MODE)
    known = live[:, None]
    if TAPS % TPS != 0:
        known = known & (taps < TAPS)[None, :]
    near = tl.load(table + column.to(tl.int64)[None, :] * count + rows[:, None], mask=known, other=-1)
    source = near.to(tl.int64)
    if MODE == 2:
        source = source * GROUP + (taps // 8)[None, :]
    ok = (near >= 0)[:, :, None]
    if C % BK != 0:
        ok = ok & (channels < C)[None, None, :]
    wide = tl.load(feats + source[:, :, None] * C + channels[None, None, :], mask=ok, other=0.0)
    return tl.reshape(wide, [rows.shape[0], TPS * BK])
