"""Implicit-GEMM kernel of the sparse convolutions: rows gathered through a tap table times stacked weights.

One kernel serves the submanifold convolution, its input gradient (mirrored taps, transposed weights), the collapsed
convolution after a subdivision, and that one's input gradient. Accumulation in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from trellis.modules.sparse.kernels.support import dot_precision

PLAIN, CHILDREN, PARENTS = 0, 1, 2
"""Which rows a tap reads: of the same grid; a child's 2x2x2 parents; the children that read a parent."""


@dataclass(frozen=True)
class Tile:
    """Rows, columns and depth of a program's tile, and its launch options."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


@triton.jit
def child_tap(child, reduced):
    """The tap number among the 27 around the parent that reduced tap `reduced` of child `child` reads."""
    x = (reduced >> 2) + (child >> 2)
    y = ((reduced >> 1) & 1) + ((child >> 1) & 1)
    z = (reduced & 1) + (child & 1)
    return 9 * z + 3 * y + x


@triton.jit
def gather_rows(feats, near, channels, C: tl.constexpr, EXACT: tl.constexpr):
    """[rows, depth] of feats [N, C] at rows `near` (-1 reads zeros); EXACT where no channel is past the last."""
    ok = (near >= 0)[:, None]
    if not EXACT:
        ok = ok & (channels < C)[None, :]
    return tl.load(feats + near.to(tl.int64)[:, None] * C + channels[None, :], mask=ok, other=0.0)


@triton.jit(do_not_specialize=["count", "first_child"])
def gather_gemm_kernel(
    feats, weights, bias, out, table, count, first_child,
    C_IN: tl.constexpr, C_OUT: tl.constexpr, TAPS: tl.constexpr, MODE: tl.constexpr, GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    TILES_N: tl.constexpr = (C_OUT + BN - 1) // BN
    STEPS: tl.constexpr = (C_IN + BK - 1) // BK
    pid = tl.program_id(0)
    tile_n = pid % TILES_N
    pid = pid // TILES_N
    child = 0
    if MODE == 1:
        child = first_child + pid % GROUP
        pid = pid // GROUP
    rows = pid.to(tl.int64) * BM + tl.arange(0, BM)
    live = rows < count
    columns = tile_n * BN + tl.arange(0, BN)
    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, TAPS * STEPS):
        tap = k // STEPS
        channels = (k % STEPS) * BK + tl.arange(0, BK)
        stacked = tap
        if MODE == 1:
            stacked = child * 8 + tap
            column = child_tap(child, tap)
        elif MODE == 2:
            stacked = first_child * 8 + tap
            column = 26 - child_tap(first_child + tap // 8, tap % 8)
        else:
            column = tap
        near = tl.load(table + column.to(tl.int64) * count + rows, mask=live, other=-1)
        if MODE == 2:
            near = tl.where(near >= 0, near.to(tl.int64) * GROUP + tap // 8, -1)
        a = gather_rows(feats, near, channels, C_IN, C_IN % BK == 0)
        pointers = weights + (stacked * C_IN + channels)[:, None] * C_OUT + columns[None, :]
        if C_IN % BK == 0 and C_OUT % BN == 0:
            b = tl.load(pointers)
        else:
            b = tl.load(pointers, mask=(channels < C_IN)[:, None] & (columns < C_OUT)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    inside = live[:, None] & (columns < C_OUT)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + columns, mask=columns < C_OUT, other=0.0).to(tl.float32)[None, :]
    if MODE == 1:
        rows = rows * GROUP + (child - first_child)
    target = out + rows[:, None] * C_OUT + columns[None, :]
    if ACCUMULATE:
        acc += tl.load(target, mask=inside, other=0.0).to(tl.float32)
    tl.store(target, acc.to(out.dtype.element_ty), mask=inside)


def choose_tile(c_in: int, c_out: int, dtype: torch.dtype) -> Tile:
    """The tile for a width pair, from measurements on one card; nothing is tuned at run time."""
    depth = max(16, min(64, triton.next_power_of_2(c_in)))
    columns = max(16, min(128, triton.next_power_of_2(c_out)))
    if dtype == torch.float32:
        return Tile(64, min(columns, 64), min(depth, 32), 4, 2)
    return Tile(128, columns, depth, 4 if columns <= 64 else 8, 3)


def gather_gemm(
    feats: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    table: Tensor,
    *,
    mode: int = PLAIN,
    first_child: int = 0,
    group: int = 8,
    out: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """out[r] = bias + sum over taps t of feats[row(r, t)] @ weights[t], float32 sums.

    Args:
        feats: [N, in] (PLAIN, CHILDREN) or [N * group, in] (PARENTS). table: [27, N] int32, see `Grid.tap_table`.
        weights: [27, in, out] for PLAIN; [64, in, out] (child * 8 + reduced tap) for the others.
        first_child, group: CHILDREN and PARENTS handle the children first_child to first_child + group - 1.
        out: PARENTS adds to it when given; else a new tensor [N, out] ([N * group, out] for CHILDREN).
    """
    count = table.shape[1]
    c_in, c_out = weights.shape[-2:]
    accumulate = out is not None
    if out is None:
        out = torch.empty(count * group if mode == CHILDREN else count, c_out, dtype=feats.dtype, device=feats.device)
    if count == 0:
        return out
    tile = tile or choose_tile(c_in, c_out, feats.dtype)
    programs = triton.cdiv(count, tile.rows) * triton.cdiv(c_out, tile.columns) * (group if mode == CHILDREN else 1)
    gather_gemm_kernel[(programs,)](
        feats, weights, weights if bias is None else bias, out, table, count, first_child,
        C_IN=c_in, C_OUT=c_out, TAPS=(27, 8, 8 * group)[mode], MODE=mode, GROUP=group,
        HAS_BIAS=bias is not None, ACCUMULATE=accumulate, PRECISION=dot_precision(feats.dtype),
        BM=tile.rows, BN=tile.columns, BK=tile.depth, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out
