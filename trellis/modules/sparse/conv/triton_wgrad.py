"""Weight gradient of the sparse convolutions: sums over rows of gathered inputs times output gradients.

Rows are split over programs; each writes float32 partial sums, which are added in a fixed order: no atomics, the same
bits on every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trellis.modules.sparse.conv.triton_gemm import CHILDREN, PLAIN, Tile, child_tap, gather_rows
from trellis.modules.sparse.kernels.support import dot_precision

MAX_PARTIAL_BYTES = 96 << 20
"""Bound of the partial sums of one launch."""
PROGRAMS = 132 * 6
"""Programs that fill a large card a few times over."""


@triton.jit
def wgrad_step(feats, table, grad, acc, tap, child, rows, live, channels, count,
               C_IN: tl.constexpr, MODE: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    if MODE == 1:
        column = child_tap(child, tap % 8)
        near = tl.load(table + column.to(tl.int64) * count + rows, mask=live, other=-1)
    else:
        near = tl.load(table + tap.to(tl.int64) * count + rows, mask=live, other=-1)
    a = gather_rows(feats, near, channels, C_IN, EXACT)
    return tl.dot(tl.trans(a), grad, acc, input_precision=PRECISION)


@triton.jit
def wgrad_store(partial, acc, split, tap, channels, columns,
                TAPS: tl.constexpr, C_IN: tl.constexpr, C_OUT: tl.constexpr):  # fmt: skip
    base = (split.to(tl.int64) * TAPS + tap) * C_IN
    inside = (channels < C_IN)[:, None] & (columns < C_OUT)[None, :]
    tl.store(partial + (base + channels)[:, None] * C_OUT + columns[None, :], acc, mask=inside)


@triton.jit(do_not_specialize=["count", "share", "first_child"])
def gather_wgrad_kernel(
    feats, grad, partial, table, count, share, first_child,
    C_IN: tl.constexpr, C_OUT: tl.constexpr, TAPS: tl.constexpr, MODE: tl.constexpr, GROUP: tl.constexpr,
    NT: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    TILES_M: tl.constexpr = (C_IN + BM - 1) // BM
    TILES_N: tl.constexpr = (C_OUT + BN - 1) // BN
    EXACT: tl.constexpr = C_IN % BM == 0
    pid = tl.program_id(0)
    split = tl.program_id(1)
    channels = (pid % TILES_M) * BM + tl.arange(0, BM)
    pid = pid // TILES_M
    columns = (pid % TILES_N) * BN + tl.arange(0, BN)
    tap = (pid // TILES_N) * NT
    child = first_child + tap // 8
    acc0 = tl.zeros([BM, BN], tl.float32)
    acc1 = acc0
    acc2 = acc0
    acc3 = acc0
    first = split.to(tl.int64) * share
    last = tl.minimum(first + share, count)
    for start in range(first, last, BK):
        rows = start + tl.arange(0, BK)
        live = rows < last
        source = rows
        if MODE == 1:
            source = rows * GROUP + tap // 8
        pointers = grad + source[:, None] * C_OUT + columns[None, :]
        if C_OUT % BN == 0:
            g = tl.load(pointers, mask=live[:, None], other=0.0)
        else:
            g = tl.load(pointers, mask=live[:, None] & (columns < C_OUT)[None, :], other=0.0)
        acc0 = wgrad_step(feats, table, g, acc0, tap, child, rows, live, channels, count, C_IN, MODE, EXACT, PRECISION)
        if NT > 1:
            acc1 = wgrad_step(
                feats, table, g, acc1, tap + 1, child, rows, live, channels, count, C_IN, MODE, EXACT, PRECISION
            )
        if NT > 2:
            acc2 = wgrad_step(
                feats, table, g, acc2, tap + 2, child, rows, live, channels, count, C_IN, MODE, EXACT, PRECISION
            )
        if NT > 3:
            acc3 = wgrad_step(
                feats, table, g, acc3, tap + 3, child, rows, live, channels, count, C_IN, MODE, EXACT, PRECISION
            )
    wgrad_store(partial, acc0, split, tap, channels, columns, TAPS, C_IN, C_OUT)
    if NT > 1:
        wgrad_store(partial, acc1, split, tap + 1, channels, columns, TAPS, C_IN, C_OUT)
    if NT > 2:
        wgrad_store(partial, acc2, split, tap + 2, channels, columns, TAPS, C_IN, C_OUT)
    if NT > 3:
        wgrad_store(partial, acc3, split, tap + 3, channels, columns, TAPS, C_IN, C_OUT)


def choose_tile(c_in: int, c_out: int, mode: int, dtype: torch.dtype) -> tuple[Tile, int]:
    """Tile (rows = input channels, columns = output channels, depth = voxel rows) and taps per program."""
    rows = max(16, min(128, triton.next_power_of_2(c_in)))
    columns = max(16, min(128, triton.next_power_of_2(c_out)))
    if dtype == torch.float32:
        return Tile(min(rows, 64), min(columns, 64), 32, 4, 2), 1
    if rows * columns <= 64 * 64:
        return Tile(rows, columns, 64, 4, 3), 3 if mode == PLAIN else 4
    return Tile(rows, columns, 64, 8 if rows * columns > 64 * 128 else 4, 3), 1


def gather_wgrad(
    feats: Tensor,
    grad: Tensor,
    table: Tensor,
    *,
    mode: int = PLAIN,
    first_child: int = 0,
    group: int = 8,
    tile: Tile | None = None,
    taps_per_program: int | None = None,
    programs: int = PROGRAMS,
) -> Tensor:
    """Sums over rows r of feats[row(r, t)]^T grad[r]: float32 [27, in, out], or [8 * group, in, out] for CHILDREN.

    Args:
        feats: [N, in]; grad: [N, out], or [N * group, out] for CHILDREN; table: [27, N] int32.
        first_child, group: the children that `grad` holds.
    """
    count = table.shape[1]
    c_in, c_out = feats.shape[1], grad.shape[1]
    taps = 27 if mode == PLAIN else 8 * group
    if count == 0:
        return torch.zeros(taps, c_in, c_out, device=feats.device)
    chosen, several = choose_tile(c_in, c_out, mode, feats.dtype)
    tile = tile or chosen
    several = taps_per_program or several
    width = triton.cdiv(taps, several) * triton.cdiv(c_in, tile.rows) * triton.cdiv(c_out, tile.columns)
    splits = min(
        max(1, triton.cdiv(programs, width)),
        max(1, MAX_PARTIAL_BYTES // (4 * taps * c_in * c_out)),
        triton.cdiv(count, 4 * tile.depth),
    )
    share = triton.cdiv(triton.cdiv(count, splits), tile.depth) * tile.depth
    splits = triton.cdiv(count, share)
    partial = torch.empty(splits, taps, c_in, c_out, dtype=torch.float32, device=feats.device)
    gather_wgrad_kernel[(width, splits)](
        feats, grad, partial, table, count, share, first_child,
        C_IN=c_in, C_OUT=c_out, TAPS=taps, MODE=CHILDREN if mode == CHILDREN else PLAIN, GROUP=group, NT=several,
        PRECISION=dot_precision(feats.dtype), BM=tile.rows, BN=tile.columns, BK=tile.depth,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return partial[0] if splits == 1 else partial.sum(0)
