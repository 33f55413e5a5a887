"""Implicit-GEMM kernel of the sparse convolutions: rows gathered through a tap table times stacked weights.

One kernel serves the submanifold convolution, its input gradient (mirrored taps, transposed weights), the collapsed
convolution after a subdivision, and that one's input gradient. Accumulation in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trellis.modules.sparse.conv.triton_gather import gather
from trellis.modules.sparse.conv.triton_tiles import CHILDREN, PLAIN, Tile, gemm_tile
from trellis.modules.sparse.kernels.support import cdiv, dot_precision, shared_memory

COPIED = 128 * 128
"""Channels in times out beyond which transposing the weights first is faster than reading them transposed."""


@triton.jit(do_not_specialize=["count", "first_child"])
def gather_gemm_kernel(
    feats, weights, bias, out, gate, table, count, first_child,
    C_IN: tl.constexpr, C_OUT: tl.constexpr, TAPS: tl.constexpr, MODE: tl.constexpr, GROUP: tl.constexpr,
    MIRRORED: tl.constexpr, TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr, ACCUMULATE: tl.constexpr,
    HAS_GATE: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    TILES_N: tl.constexpr = (C_OUT + BN - 1) // BN
    STEPS: tl.constexpr = (C_IN + BK - 1) // BK
    pid = tl.program_id(0)
    tile_n = pid % TILES_N
    pid = pid // TILES_N
    local = 0
    if MODE == 1:
        local = pid % GROUP
        pid = pid // GROUP
    child = first_child + local
    rows = pid.to(tl.int64) * BM + tl.arange(0, BM)
    live = rows < count
    columns = tile_n * BN + tl.arange(0, BN)
    stack = 0
    if MODE != 0:
        stack = child * 8
    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, TAPS * STEPS):
        tap = k // STEPS
        channels = (k % STEPS) * BK + tl.arange(0, BK)
        a = gather(feats, table, count, rows, live, tap, channels, child, C_IN, MODE, GROUP, BK, CACHE)
        of_tap = stack + tap
        if MIRRORED:
            of_tap = 26 - tap
        if TRANSPOSED:
            pointers = weights + (of_tap * C_OUT + columns[None, :]) * C_IN + channels[:, None]
        else:
            pointers = weights + (of_tap * C_IN + channels[:, None]) * C_OUT + columns[None, :]
        if C_IN % BK == 0 and C_OUT % BN == 0:
            b = tl.load(pointers)
        else:
            b = tl.load(pointers, mask=(channels < C_IN)[:, None] & (columns < C_OUT)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    inside = live[:, None] & (columns < C_OUT)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + columns, mask=columns < C_OUT, other=0.0).to(tl.float32)[None, :]
    if MODE == 1:
        rows = rows * GROUP + local
    place = rows[:, None] * C_OUT + columns[None, :]
    if ACCUMULATE:
        acc += tl.load(out + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_GATE:
        # the derivative of SiLU at the tensor whose SiLU the convolution read
        x = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
        s = 1.0 / (1.0 + tl.exp(-x))
        acc *= s * (1.0 + x * (1.0 - s))
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=inside)


def gather_gemm(
    feats: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    table: Tensor,
    *,
    mode: int = PLAIN,
    first_child: int = 0,
    group: int = 8,
    gradient: bool = False,
    gate: Tensor | None = None,
    out: Tensor | None = None,
    accumulate: bool = False,
    tile: Tile | None = None,
) -> Tensor:
    """out[r] = bias + sum over taps t of feats[row(r, t)] @ weights[t], float32 sums.

    Args:
        feats: [N, in] (PLAIN, CHILDREN) or [N * group, in] (PARENTS). table: [27, N] int32, see `Grid.tap_table`.
        weights: [27, in, out] for PLAIN; [64, in, out] (child * 8 + reduced tap) for the others.
        first_child, group: CHILDREN and PARENTS handle the children first_child to first_child + group - 1.
        gradient: multiply by weights[26 - t]^T (PLAIN) or weights[t]^T instead, weights [taps, out, in].
        gate: [N, out]; the result is multiplied by the derivative of SiLU there.
        out: written, and with `accumulate` added to (before the gate); else a new tensor [N, out]
            ([N * group, out] for CHILDREN).
    """
    count = table.shape[1]
    c_in, c_out = weights.shape[-2:]
    transposed = gradient and c_in * c_out <= COPIED
    if gradient:
        if not transposed:
            weights = weights.transpose(-1, -2).contiguous()
        c_in, c_out = c_out, c_in
    if out is None:
        out = torch.empty(count * group if mode == CHILDREN else count, c_out, dtype=feats.dtype, device=feats.device)
    if count == 0:
        return out
    tile = tile or gemm_tile(c_in, c_out, mode, feats.dtype, shared_memory(feats.device))
    programs = cdiv(count, tile.rows) * cdiv(c_out, tile.columns) * (group if mode == CHILDREN else 1)
    gather_gemm_kernel[(programs,)](
        feats, weights, weights if bias is None else bias, out, out if gate is None else gate, table, count,
        first_child, C_IN=c_in, C_OUT=c_out, TAPS=(27, 8, 8 * group)[mode], MODE=mode, GROUP=group,
        MIRRORED=gradient and mode == PLAIN, TRANSPOSED=transposed, HAS_BIAS=bias is not None,
        ACCUMULATE=accumulate, HAS_GATE=gate is not None,
        PRECISION=dot_precision(feats.dtype), BM=tile.rows, BN=tile.columns, BK=tile.depth, CACHE=tile.cache,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out
