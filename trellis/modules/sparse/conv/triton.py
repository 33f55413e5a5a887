"""The sparse convolutions on Triton kernels: the functions of `cpu.py`, for CUDA tensors (or the interpreter)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trellis.modules.sparse.conv.triton_gemm import gather_gemm
from trellis.modules.sparse.conv.triton_scalar import scalar_backward, scalar_forward
from trellis.modules.sparse.conv.triton_tiles import CHILDREN, PARENTS
from trellis.modules.sparse.conv.triton_wgrad import gather_wgrad
from trellis.modules.sparse.levels import Grid

SCALAR_GROUP = 2
"""Children of the last stage whose hidden gradient is in memory at once."""


def conv_forward(feats: Tensor, weight: Tensor, bias: Tensor | None, grid: Grid) -> Tensor:
    """[N, in] -> [N, out]; weight [27, in, out]."""
    return gather_gemm(feats.contiguous(), weight.contiguous(), bias, grid.tap_table)


def conv_backward(
    grad: Tensor, feats: Tensor, weight: Tensor, grid: Grid, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `conv_forward` that `needs` asks for: feats [N, in], weight [27, in, out], bias [out]."""
    grad, feats = grad.contiguous(), feats.contiguous()
    grad_input = grad_weight = grad_bias = None
    if needs[0]:
        # m = neighbours[n, k]  <=>  n = neighbours[m, 26 - k]
        grad_input = gather_gemm(grad, weight.transpose(1, 2).contiguous(), None, grid.tap_table, mirrored=True)
    if needs[1] or needs[2]:
        grad_weight, grad_bias = gather_wgrad(feats, grad, grid.tap_table, dtype=weight.dtype)
    return grad_input, grad_weight, grad_bias


def subdivide_conv_forward(feats: Tensor, collapsed: Tensor, bias: Tensor | None, grid: Grid) -> Tensor:
    """[N, in] on the parents -> [8 N, out]; collapsed weights [8, 8, in, out]."""
    return gather_gemm(feats.contiguous(), _stacked(collapsed), bias, grid.tap_table, mode=CHILDREN)


def subdivide_conv_backward(
    grad: Tensor, feats: Tensor, collapsed: Tensor, grid: Grid, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `subdivide_conv_forward` that `needs` asks for: feats [N, in], collapsed [8, 8, in, out], bias."""
    grad, feats = grad.contiguous(), feats.contiguous()
    grad_input = grad_weight = grad_bias = None
    if needs[0]:
        grad_input = gather_gemm(grad, _transposed(collapsed), None, grid.tap_table, mode=PARENTS)
    if needs[1] or needs[2]:
        grad_weight, grad_bias = gather_wgrad(feats, grad, grid.tap_table, mode=CHILDREN, dtype=collapsed.dtype)
        grad_weight = grad_weight.view(collapsed.shape)
    return grad_input, grad_weight, grad_bias


def to_scalar_forward(
    feats: Tensor, collapsed: Tensor, bias: Tensor, out_weight: Tensor, out_bias: Tensor, grid: Grid
) -> Tensor:
    """tanh(Linear(SiLU(subdivide conv))) without the [8 N, out] tensor: [N, in] -> float32 [N, 8]."""
    return scalar_forward(feats.contiguous(), _stacked(collapsed), bias, out_weight, out_bias, grid.tap_table)


def to_scalar_backward(
    grad: Tensor,
    values: Tensor,
    feats: Tensor,
    collapsed: Tensor,
    bias: Tensor,
    out_weight: Tensor,
    grid: Grid,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `to_scalar_forward` for feats, collapsed, bias, out_weight, out_bias.

    Args:
        grad: [N, 8] gradient of the output; values: [N, 8] the output itself.
    """
    grad, feats, table = grad.float().contiguous(), feats.contiguous(), grid.tap_table
    stacked, transposed = _stacked(collapsed), _transposed(collapsed)
    grad_input = None
    weights, biases, readouts = [], [], []
    for child in range(0, 8, SCALAR_GROUP):
        where = {"first_child": child, "group": SCALAR_GROUP}
        hidden, grad_weight, grad_bias, grad_out = scalar_backward(
            grad, values, feats, stacked, bias, out_weight, table, **where
        )
        weights.append(grad_weight)
        grad_input = gather_gemm(hidden, transposed, None, table, mode=PARENTS, out=grad_input, **where)
        biases.append(grad_bias)
        readouts.append(grad_out)
    assert grad_input is not None
    # sum of grad (1 - v^2) without a tensor of the terms in between
    grad_out_bias = grad.sum() - torch.dot(grad.view(-1), values.square().view(-1))
    return (
        grad_input,
        torch.cat(weights).view(collapsed.shape).to(collapsed.dtype),
        torch.stack(biases).sum(0).to(bias.dtype),
        torch.stack(readouts).sum(0)[None].to(out_weight.dtype),
        grad_out_bias.view(1).to(out_weight.dtype),
    )


def _stacked(collapsed: Tensor) -> Tensor:
    """[8, 8, in, out] -> [64, in, out]."""
    return collapsed.reshape(64, *collapsed.shape[2:]).contiguous()


def _transposed(collapsed: Tensor) -> Tensor:
    """[8, 8, in, out] -> [64, out, in]."""
    return _stacked(collapsed).transpose(1, 2).contiguous()
