"""What the convolution kernels share: which row a tap reads, and gathering the rows that a tap reads."""

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
    column = tap
    if MODE == 3:
        # two children, which differ in z: z - 1 to z + 1, and per other axis the two that both read
        column = 9 * (tap // 4) + 3 * ((first_child >> 1) % 2 + (tap >> 1) % 2) + (first_child >> 2) + tap % 2
    elif MODE != 0:
        column = child_tap(first_child + tap // 8, tap % 8)
        if MODE == 2:
            # parent P is read through tap offset o by the child of P - o
            column = 26 - column
    return column


@triton.jit
def gather(
    feats, table, count, rows, live, tap, channels, first_child,
    C: tl.constexpr, MODE: tl.constexpr, GROUP: tl.constexpr, BK: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """[rows, BK]: the rows that the tap reads; zeros where there is none. CACHE: "" or ".ca", to keep them in L1."""
    column = source_column(tap, first_child, MODE)
    near = tl.load(table + column.to(tl.int64) * count + rows, mask=live, other=-1)
    source = near.to(tl.int64)
    if MODE == 2:
        source = source * GROUP + tap // 8
    ok = (near >= 0)[:, None]
    if C % BK != 0:
        ok = ok & (channels < C)[None, :]
    return tl.load(feats + source[:, None] * C + channels[None, :], mask=ok, other=0.0, cache_modifier=CACHE)
