"""The sparse convolutions on Triton kernels: the functions of `cpu.py`, for CUDA tensors (or the interpreter)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import silu

from trellis.modules.sparse.conv.triton_gemm import gather_gemm
from trellis.modules.sparse.conv.triton_scalar import PROGRAMS, scalar_backward, scalar_forward
from trellis.modules.sparse.conv.triton_tiles import CHILDREN, PAIRS, PARENTS, PLAIN, scalar_tile
from trellis.modules.sparse.conv.triton_wgrad import add_pair, gather_wgrad, partial_sums, sum_partial
from trellis.modules.sparse.kernels.support import cdiv, shared_memory
from trellis.modules.sparse.levels import Grid

SCALAR_GROUP = 2
"""Children of the last stage whose hidden gradient is in memory at once: two that differ in z."""


def conv_forward(feats: Tensor, weight: Tensor, bias: Tensor | None, grid: Grid) -> Tensor:
    """[N, in] -> [N, out]; weight [27, in, out]."""
    return gather_gemm(feats.contiguous(), weight.contiguous(), bias, grid.tap_table)


def conv_backward(
    grad: Tensor, feats: Tensor, weight: Tensor, grid: Grid, needs: Sequence[bool], activate: bool = False
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `conv_forward` that `needs` asks for: feats [N, in], weight [27, in, out], bias [out]; with
    `activate` it read SiLU(feats).
    """
    feats = feats.contiguous()
    of_parameters = _parameter_grads(grad, feats, weight, grid, needs, activate, PLAIN)
    if not needs[0]:
        return None, *of_parameters
    # m = neighbours[n, k]  <=>  n = neighbours[m, 26 - k]
    gate = feats if activate else None
    return gather_gemm(grad, weight.contiguous(), None, grid.tap_table, gradient=True, gate=gate), *of_parameters


def _parameter_grads(
    grad: Tensor, feats: Tensor, weight: Tensor, grid: Grid, needs: Sequence[bool], activate: bool, mode: int
) -> tuple[Tensor | None, Tensor | None]:
    """Those of weight and bias. Comes before that of feats, so that SiLU(feats) is gone by then."""
    if not (needs[1] or needs[2]):
        return None, None
    c_in, c_out = weight.shape[-2:]
    read, table = silu(feats) if activate else feats, grid.tap_table
    partial, share = partial_sums(read, c_out, table, mode=mode)
    gather_wgrad(partial, share, read, grad, table, mode=mode)
    grad_weight, grad_bias = sum_partial(partial, c_in, c_out, weight.dtype, mode=mode)
    return grad_weight if needs[1] else None, grad_bias if needs[2] else None


def subdivide_conv_forward(feats: Tensor, collapsed: Tensor, bias: Tensor | None, grid: Grid) -> Tensor:
    """[N, in] on the parents -> [8 N, out]; collapsed weights [8, 8, in, out]."""
    return gather_gemm(feats.contiguous(), collapsed.contiguous(), bias, grid.tap_table, mode=CHILDREN)


def subdivide_conv_backward(
    grad: Tensor, feats: Tensor, collapsed: Tensor, grid: Grid, needs: Sequence[bool], activate: bool = False
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `subdivide_conv_forward` that `needs` asks for: feats [N, in], weight [27, in, out], bias [out];
    with `activate` it read SiLU(feats).
    """
    feats = feats.contiguous()
    of_parameters = _parameter_grads(grad, feats, collapsed, grid, needs, activate, CHILDREN)
    if not needs[0]:
        return None, *of_parameters
    weights, gate = collapsed.contiguous(), feats if activate else None
    grad_input = gather_gemm(grad, weights, None, grid.tap_table, mode=PARENTS, gradient=True, gate=gate)
    return grad_input, *of_parameters


def to_scalar_forward(
    feats: Tensor, collapsed: Tensor, bias: Tensor, out_weight: Tensor, out_bias: Tensor, grid: Grid
) -> Tensor:
    """tanh(Linear(SiLU(subdivide conv))) without the [8 N, out] tensor: [N, in] -> float32 [N, 8]."""
    return scalar_forward(feats.contiguous(), collapsed.contiguous(), bias, out_weight, out_bias, grid.tap_table)


def to_scalar_backward(
    grad: Tensor,
    values: Tensor,
    feats: Tensor,
    collapsed: Tensor,
    bias: Tensor,
    out_weight: Tensor,
    grid: Grid,
    activate: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `to_scalar_forward` for feats, weight [27, in, out], bias, out_weight, out_bias.

    Args:
        grad: [N, 8] gradient of the output; values: [N, 8] the output itself.
        activate: it read SiLU(feats).
    """
    grad, feats, table = grad.float().contiguous(), feats.contiguous(), grid.tap_table
    read, collapsed = silu(feats) if activate else feats, collapsed.contiguous()
    count = table.shape[1]
    c_in, c_out = collapsed.shape[-2:]
    grad_input = torch.empty_like(feats)
    hidden = torch.empty(count * SCALAR_GROUP, c_out, dtype=feats.dtype, device=feats.device)
    partial, share = partial_sums(read, 2 * c_out, table, mode=PAIRS)
    summed = torch.zeros(27 * c_in * c_out + c_out, dtype=torch.float32, device=feats.device)
    launches = 8 // SCALAR_GROUP if count else 0
    tiles = cdiv(count, scalar_tile(c_in, c_out, feats.dtype, shared_memory(feats.device)).rows)
    # a multiple of four rows a launch: each launch's then start at 16 bytes, and one compiled kernel serves all
    programs = SCALAR_GROUP * min(2 * cdiv(tiles, 2), PROGRAMS // SCALAR_GROUP)
    sums = torch.empty(launches, programs, c_out + 1, dtype=torch.float32, device=feats.device)
    for i in range(launches):
        where = {"first_child": i * SCALAR_GROUP, "group": SCALAR_GROUP}
        scalar_backward(grad, values, read, collapsed, bias, out_weight, table, hidden=hidden, sums=sums[i], **where)
        pairs = hidden.view(count, SCALAR_GROUP * c_out)
        gather_wgrad(partial, share, read, pairs, table, mode=PAIRS, first_child=i * SCALAR_GROUP)
        add_pair(partial, summed, i * SCALAR_GROUP, c_in, c_out)
        last = feats if activate and i == launches - 1 else None
        add = {"out": grad_input, "accumulate": i > 0, "gate": last}
        gather_gemm(hidden, collapsed, None, table, mode=PARENTS, gradient=True, **where, **add)
    grad_weight, grad_bias = summed.to(collapsed.dtype).split([27 * c_in * c_out, c_out])
    total = sums.sum((0, 1)).to(out_weight.dtype)
    return grad_input, grad_weight.view(27, c_in, c_out), grad_bias, total[None, :c_out], total[c_out:]
