"""The decoder's last stage in one kernel each way: subdivide, convolution, SiLU, Linear to a scalar, tanh.

The forward pass goes from parents to one value per child. The backward pass recomputes the hidden features and makes
their gradient for a few children at a time; the kernels of the other convolutions take it from there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trellis.modules.sparse.conv.triton_gather import gather
from trellis.modules.sparse.conv.triton_tiles import Tile, scalar_tile
from trellis.modules.sparse.kernels.support import cdiv, dot_precision, shared_memory

PROGRAMS = 132 * 3
"""Programs of the backward kernel; each keeps its sums over many rows."""


@triton.jit
def child_hidden(
    feats, weights, bias, table, count, rows, live, child,
    C_IN: tl.constexpr, C_OUT: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """[BM, BN] float32: the convolution of one child of each row, before the activation."""
    STEPS: tl.constexpr = (C_IN + BK - 1) // BK
    columns = tl.arange(0, BN)
    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, 8 * STEPS):
        tap = k // STEPS
        channels = (k % STEPS) * BK + tl.arange(0, BK)
        a = gather(feats, table, count, rows, live, tap, channels, child, C_IN, 1, 8, BK, CACHE)
        pointers = weights + ((child * 8 + tap) * C_IN + channels)[:, None] * C_OUT + columns[None, :]
        if C_IN % BK == 0 and C_OUT % BN == 0:
            b = tl.load(pointers)
        else:
            b = tl.load(pointers, mask=(channels < C_IN)[:, None] & (columns < C_OUT)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc + tl.load(bias + columns, mask=columns < C_OUT, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["count"])
def scalar_forward_kernel(
    feats, weights, bias, out_weight, out_bias, values, table, count,
    C_IN: tl.constexpr, C_OUT: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    child = pid % 8
    rows = (pid // 8).to(tl.int64) * BM + tl.arange(0, BM)
    live = rows < count
    columns = tl.arange(0, BN)
    hidden = child_hidden(
        feats, weights, bias, table, count, rows, live, child, C_IN, C_OUT, PRECISION, BM, BN, BK, CACHE
    )
    readout = tl.load(out_weight + columns, mask=columns < C_OUT, other=0.0).to(tl.float32)[None, :]
    x = tl.sum(hidden / (1.0 + tl.exp(-hidden)) * readout, 1) + tl.load(out_bias).to(tl.float32)
    e = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - e) / (1.0 + e)
    tl.store(values + rows * 8 + child, tl.where(x < 0, -size, size), mask=live)


@triton.jit(do_not_specialize=["count", "first_child", "tiles", "shares"])
def scalar_backward_kernel(
    feats, weights, bias, out_weight, values, grad_values, grad_hidden, sums, table,
    count, first_child, tiles, shares,
    C_IN: tl.constexpr, C_OUT: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    local = pid % GROUP
    share = pid // GROUP
    child = first_child + local
    columns = tl.arange(0, BN)
    known = columns < C_OUT
    readout = tl.load(out_weight + columns, mask=known, other=0.0).to(tl.float32)[None, :]
    sum_readout = tl.zeros([BN], tl.float32)
    sum_outer = tl.zeros([BM], tl.float32)
    for tile in range(share, tiles, shares):
        rows = tile * BM + tl.arange(0, BM).to(tl.int64)
        live = rows < count
        hidden = child_hidden(
            feats, weights, bias, table, count, rows, live, child, C_IN, C_OUT, PRECISION, BM, BN, BK, CACHE
        )
        gate = 1.0 / (1.0 + tl.exp(-hidden))
        value = tl.load(values + rows * 8 + child, mask=live, other=0.0)
        outer = tl.load(grad_values + rows * 8 + child, mask=live, other=0.0) * (1.0 - value * value)
        handed = outer[:, None] * readout * gate * (1.0 + hidden * (1.0 - gate))
        sum_outer += outer
        sum_readout += tl.sum(outer[:, None] * hidden * gate, 0)
        narrow = handed.to(grad_hidden.dtype.element_ty)
        target = grad_hidden + (rows * GROUP + local)[:, None] * C_OUT + columns[None, :]
        tl.store(target, narrow, mask=live[:, None] & known[None, :])
    tl.store(sums + pid * (C_OUT + 1) + columns, sum_readout, mask=known)
    tl.store(sums + pid * (C_OUT + 1) + C_OUT, tl.sum(sum_outer, 0))


def scalar_forward(
    feats: Tensor, collapsed: Tensor, bias: Tensor, out_weight: Tensor, out_bias: Tensor, table: Tensor,
    *, tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """float32 [N, 8] = tanh(SiLU(conv) . out_weight + out_bias) of every child; collapsed [64, in, out]."""
    count = table.shape[1]
    c_in, c_out = collapsed.shape[-2:]
    values = torch.empty(count, 8, dtype=torch.float32, device=feats.device)
    tile = tile or scalar_tile(c_in, c_out, feats.dtype, shared_memory(feats.device))
    if count:
        scalar_forward_kernel[(cdiv(count, tile.rows) * 8,)](
            feats, collapsed, bias, out_weight, out_bias, values, table, count,
            C_IN=c_in, C_OUT=c_out, PRECISION=dot_precision(feats.dtype),
            BM=tile.rows, BN=tile.columns, BK=tile.depth, CACHE=tile.cache,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return values


def scalar_backward(
    grad: Tensor, values: Tensor, feats: Tensor, collapsed: Tensor, bias: Tensor, out_weight: Tensor, table: Tensor,
    *, first_child: int, group: int, hidden: Tensor, sums: Tensor, tile: Tile | None = None,
) -> None:  # fmt: skip
    """Gradient of some children's hidden features before the activation, which are recomputed from the parents.

    Args:
        grad, values: float32 [N, 8], of the output. first_child, group: which children.
        hidden: [N * group, out], written: the gradient. sums: float32 [programs, out + 1], written: partial sums of
            the gradients of out_weight and out_bias; a program for each of its rows.
    """
    count = table.shape[1]
    if count == 0:
        return
    c_in, c_out = collapsed.shape[-2:]
    tile = tile or scalar_tile(c_in, c_out, feats.dtype, shared_memory(feats.device))
    scalar_backward_kernel[(sums.shape[0],)](
        feats, collapsed, bias, out_weight, values, grad, hidden, sums, table,
        count, first_child, cdiv(count, tile.rows), sums.shape[0] // group,
        C_IN=c_in, C_OUT=c_out, GROUP=group, PRECISION=dot_precision(feats.dtype),
        BM=tile.rows, BN=tile.columns, BK=tile.depth, CACHE=tile.cache, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
