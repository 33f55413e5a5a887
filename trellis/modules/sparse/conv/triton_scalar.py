"""The decoder's last stage in one kernel each way: subdivide, convolution, SiLU, Linear to a scalar, tanh.

The forward pass goes from parents to one value per child. The backward pass recomputes the hidden features for a few
children at a time and hands their gradient to the kernels of the other convolutions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trellis.modules.sparse.conv.triton_gemm import Tile, child_tap, gather_rows
from trellis.modules.sparse.kernels.support import dot_precision


@triton.jit(do_not_specialize=["count", "first_child"])
def scalar_kernel(
    feats, weights, bias, out_weight, out_bias, values, grad_values, grad_hidden, sums, table, count, first_child,
    C_IN: tl.constexpr, C_OUT: tl.constexpr, GROUP: tl.constexpr, BACKWARD: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    STEPS: tl.constexpr = (C_IN + BK - 1) // BK
    pid = tl.program_id(0)
    local = pid % GROUP
    child = first_child + local
    rows = (pid // GROUP).to(tl.int64) * BM + tl.arange(0, BM)
    live = rows < count
    columns = tl.arange(0, BN)
    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, 8 * STEPS):
        tap = k // STEPS
        channels = (k % STEPS) * BK + tl.arange(0, BK)
        column = child_tap(child, tap)
        near = tl.load(table + column.to(tl.int64) * count + rows, mask=live, other=-1)
        a = gather_rows(feats, near, channels, C_IN, C_IN % BK == 0)
        pointers = weights + ((child * 8 + tap) * C_IN + channels)[:, None] * C_OUT + columns[None, :]
        if C_IN % BK == 0 and C_OUT % BN == 0:
            b = tl.load(pointers)
        else:
            b = tl.load(pointers, mask=(channels < C_IN)[:, None] & (columns < C_OUT)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    known = columns < C_OUT
    hidden = acc + tl.load(bias + columns, mask=known, other=0.0).to(tl.float32)[None, :]
    readout = tl.load(out_weight + columns, mask=known, other=0.0).to(tl.float32)[None, :]
    gate = 1.0 / (1.0 + tl.exp(-hidden))
    place = rows * 8 + child
    if not BACKWARD:
        x = tl.sum(hidden * gate * readout, 1) + tl.load(out_bias).to(tl.float32)
        e = tl.exp(-2.0 * tl.abs(x))
        size = (1.0 - e) / (1.0 + e)
        tl.store(values + place, tl.where(x < 0, -size, size), mask=live)
    else:
        value = tl.load(values + place, mask=live, other=0.0)
        outer = tl.load(grad_values + place, mask=live, other=0.0) * (1.0 - value * value)
        handed = outer[:, None] * readout * gate * (1.0 + hidden * (1.0 - gate))
        target = grad_hidden + (rows * GROUP + local)[:, None] * C_OUT + columns[None, :]
        tl.store(target, handed.to(grad_hidden.dtype.element_ty), mask=live[:, None] & known[None, :])
        tl.store(sums + pid.to(tl.int64) * 2 * BN + columns, tl.sum(handed, 0))
        tl.store(sums + (pid.to(tl.int64) * 2 + 1) * BN + columns, tl.sum(outer[:, None] * hidden * gate, 0))


def choose_tile(c_in: int, c_out: int, dtype: torch.dtype) -> Tile:
    """Rows of parents, all output channels, depth in input channels."""
    depth = max(16, min(64, triton.next_power_of_2(c_in)))
    columns = max(16, triton.next_power_of_2(c_out))
    if dtype == torch.float32:
        return Tile(64, columns, min(depth, 32), 4, 2)
    return Tile(128, columns, depth, 4, 3)


def scalar_forward(
    feats: Tensor, collapsed: Tensor, bias: Tensor, out_weight: Tensor, out_bias: Tensor, table: Tensor,
    *, tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """float32 [N, 8] = tanh(SiLU(conv) . out_weight + out_bias) of every child; collapsed [64, in, out]."""
    count = table.shape[1]
    values = torch.empty(count, 8, dtype=torch.float32, device=feats.device)
    if count:
        _launch(feats, collapsed, bias, out_weight, out_bias, values, None, None, None, table, 0, 8, tile)
    return values


def scalar_backward(
    grad: Tensor, values: Tensor, feats: Tensor, collapsed: Tensor, bias: Tensor, out_weight: Tensor, table: Tensor,
    *, first_child: int, group: int, tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradient of the hidden features of some children, recomputed from the parents.

    Args:
        grad, values: float32 [N, 8], of the output. first_child, group: which children.

    Returns:
        [N * group, out] in the dtype of feats; float32 [out] sums of it; float32 [out] gradient of out_weight.
    """
    count, c_out = table.shape[1], collapsed.shape[-1]
    tile = tile or choose_tile(feats.shape[1], c_out, feats.dtype)
    hidden = torch.empty(count * group, c_out, dtype=feats.dtype, device=feats.device)
    programs = triton.cdiv(count, tile.rows) * group
    sums = torch.empty(programs, 2, tile.columns, dtype=torch.float32, device=feats.device)
    if count:
        _launch(
            feats, collapsed, bias, out_weight, bias, values, grad, hidden, sums, table, first_child, group, tile
        )
    total = sums.sum(0)[:, :c_out]
    return hidden, total[0], total[1]


def _launch(
    feats: Tensor, collapsed: Tensor, bias: Tensor, out_weight: Tensor, out_bias: Tensor, values: Tensor,
    grad: Tensor | None, hidden: Tensor | None, sums: Tensor | None, table: Tensor, first_child: int, group: int,
    tile: Tile | None,
) -> None:  # fmt: skip
    count = table.shape[1]
    c_in, c_out = collapsed.shape[-2:]
    tile = tile or choose_tile(c_in, c_out, feats.dtype)
    backward = grad is not None
    scalar_kernel[(triton.cdiv(count, tile.rows) * group,)](
        feats, collapsed, bias, out_weight, out_bias, values,
        grad if backward else values, hidden if backward else values, sums if backward else values,
        table, count, first_child,
        C_IN=c_in, C_OUT=c_out, GROUP=group, BACKWARD=backward, PRECISION=dot_precision(feats.dtype),
        BM=tile.rows, BN=tile.columns, BK=tile.depth, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
