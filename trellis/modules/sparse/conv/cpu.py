"""Gather + GEMM in chunks: the CPU's production path, plain torch, so that it also runs (slower) on any other device.

Gradients gather too, with the mirrored taps, so that results do not depend on the order of atomic additions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import silu

from trellis.modules.sparse.conv.collapse import collapse_grad, collapse_rule
from trellis.modules.sparse.levels import Grid

CHUNK_BYTES = 24 << 20
"""Upper bound of a gathered chunk: large enough for full GEMM speed, small enough to stay near the cache."""


def _chunk_rows(columns: int, element_size: int) -> int:
    return max(256, CHUNK_BYTES // max(1, columns * element_size))


def _padded(feats: Tensor) -> Tensor:
    """[N + 1, C]: one zero row at the end, which index N (for a missing neighbour) reads."""
    return torch.cat([feats, feats.new_zeros(1, feats.shape[1])])


def _gather(padded: Tensor, rows: Tensor) -> Tensor:
    """[n, T] rows, -1 where there is none -> [n, T * C]."""
    missing = padded.shape[0] - 1
    index = torch.where(rows < 0, missing, rows).reshape(-1)
    return padded.index_select(0, index).view(rows.shape[0], rows.shape[1] * padded.shape[1])


def conv_forward(feats: Tensor, weight: Tensor, bias: Tensor | None, grid: Grid) -> Tensor:
    """[N, in] -> [N, out]; weight [27, in, out]."""
    taps, c_in, c_out = weight.shape
    flat = weight.reshape(taps * c_in, c_out)
    padded = _padded(feats)
    out = feats.new_empty(grid.num_rows, c_out)
    step = _chunk_rows(taps * c_in, feats.element_size())
    for start in range(0, grid.num_rows, step):
        stop = min(start + step, grid.num_rows)
        gathered = _gather(padded, grid.neighbour_rows(start, stop))
        torch.mm(gathered, flat, out=out[start:stop])
    if bias is not None:
        out += bias
    return out


def _read(feats: Tensor, activate: bool) -> Tensor:
    """What a convolution reads of feats: themselves, or their SiLU."""
    return silu(feats) if activate else feats


def _before_silu(grad: Tensor, feats: Tensor, activate: bool) -> Tensor:
    """The gradient of feats from that of what `_read` gave."""
    return torch.ops.aten.silu_backward(grad, feats) if activate else grad


def conv_backward(
    grad: Tensor, feats: Tensor, weight: Tensor, grid: Grid, needs: Sequence[bool], activate: bool = False
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `conv_forward` that `needs` asks for: feats [N, in], weight [27, in, out] (summed in float32 or
    wider) and bias [out]; with `activate` it read SiLU(feats).
    """
    need_input, need_weight, need_bias = needs
    taps, c_in, c_out = weight.shape
    grad_input = grad_weight = None
    if need_weight:
        wide = torch.promote_types(weight.dtype, torch.float32)
        grad_weight = torch.zeros(taps * c_in, c_out, dtype=wide, device=weight.device)
        padded = _padded(_read(feats, activate))
        step = _chunk_rows(taps * c_in, feats.element_size())
        for start in range(0, grid.num_rows, step):
            stop = min(start + step, grid.num_rows)
            gathered = _gather(padded, grid.neighbour_rows(start, stop))
            product = gathered.t() @ grad[start:stop]
            grad_weight += product
        grad_weight = grad_weight.view(taps, c_in, c_out).to(weight.dtype)
        del padded
    if need_input:
        # m = neighbours[n, k]  <=>  n = neighbours[m, 26 - k]
        mirrored = weight.flip(0).transpose(1, 2).contiguous()
        grad_input = _before_silu(conv_forward(grad, mirrored, None, grid), feats, activate)
    return grad_input, grad_weight, grad.sum(0) if need_bias else None


def _child_conv(padded: Tensor, weights: Tensor, child: int, grid: Grid, out: Tensor) -> None:
    """Rows of one child of every voxel: out [N, c_out] = gather of its 2x2x2 parents times weights[child]."""
    taps = collapse_rule()[0][child].to(padded.device)
    flat = weights[child].reshape(-1, weights.shape[-1])
    step = _chunk_rows(flat.shape[0], padded.element_size())
    for start in range(0, grid.num_rows, step):
        stop = min(start + step, grid.num_rows)
        rows = grid.neighbour_rows(start, stop)[:, taps]
        torch.mm(_gather(padded, rows), flat, out=out[start:stop])


def subdivide_conv_forward(feats: Tensor, collapsed: Tensor, bias: Tensor | None, grid: Grid) -> Tensor:
    """[N, in] on the parents -> [8 N, out]; collapsed weights [8, 8, in, out]."""
    n, c_out = grid.num_rows, collapsed.shape[-1]
    padded = _padded(feats)
    out = feats.new_empty(n, 8, c_out)
    part = feats.new_empty(n, c_out)
    for child in range(8):
        _child_conv(padded, collapsed, child, grid, part)
        out[:, child] = part if bias is None else part + bias
    return out.view(8 * n, c_out)


def child_grad_input(grad: Tensor, collapsed: Tensor, child: int, grid: Grid, out: Tensor) -> None:
    """Add to out [N, in] what child `child`'s gradient [N, c_out] hands to the parents."""
    # parent P is read through tap offset o by the child of P - o: the mirrored tap 26 - k
    taps = 26 - collapse_rule()[0][child].to(grad.device)
    flat = collapsed[child].transpose(1, 2).reshape(-1, collapsed.shape[2])
    padded = _padded(grad)
    step = _chunk_rows(flat.shape[0], grad.element_size())
    for start in range(0, grid.num_rows, step):
        stop = min(start + step, grid.num_rows)
        rows = grid.neighbour_rows(start, stop)[:, taps]
        out[start:stop].addmm_(_gather(padded, rows), flat)


def child_grad_weight(grad: Tensor, padded: Tensor, child: int, grid: Grid, out: Tensor) -> None:
    """Add to out [8 * in, c_out] the gradient of collapsed[child] for the child's gradient [N, c_out]."""
    taps = collapse_rule()[0][child].to(grad.device)
    step = _chunk_rows(out.shape[0], grad.element_size())
    for start in range(0, grid.num_rows, step):
        stop = min(start + step, grid.num_rows)
        rows = grid.neighbour_rows(start, stop)[:, taps]
        out += _gather(padded, rows).t() @ grad[start:stop]


def subdivide_conv_backward(
    grad: Tensor, feats: Tensor, collapsed: Tensor, grid: Grid, needs: Sequence[bool], activate: bool = False
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `subdivide_conv_forward` that `needs` asks for: feats [N, in], weight [27, in, out], bias [out];
    with `activate` it read SiLU(feats).
    """
    need_input, need_weight, need_bias = needs
    children = grad.view(grid.num_rows, 8, collapsed.shape[3])
    c_in, c_out = collapsed.shape[2:]
    grad_input = torch.zeros_like(feats) if need_input else None
    wide = torch.promote_types(collapsed.dtype, torch.float32)
    grad_weight = torch.zeros(8, 8 * c_in, c_out, dtype=wide, device=feats.device) if need_weight else None
    padded = _padded(_read(feats, activate))
    for child in range(8):
        part = children[:, child].contiguous()
        if grad_input is not None:
            child_grad_input(part, collapsed, child, grid, grad_input)
        if grad_weight is not None:
            child_grad_weight(part, padded, child, grid, grad_weight[child])
    if grad_weight is not None:
        grad_weight = collapse_grad(grad_weight.view(8, 8, c_in, c_out)).to(collapsed.dtype)
    if grad_input is not None:
        grad_input = _before_silu(grad_input, feats, activate)
    return grad_input, grad_weight, grad.sum(0) if need_bias else None


def to_scalar_forward(
    feats: Tensor, collapsed: Tensor, bias: Tensor, out_weight: Tensor, out_bias: Tensor, grid: Grid
) -> Tensor:
    """tanh(Linear(SiLU(subdivide conv))) without the [8 N, out] tensor: [N, in] -> float32 [N, 8]."""
    n, c_out = grid.num_rows, collapsed.shape[-1]
    padded = _padded(feats)
    hidden = feats.new_empty(n, c_out)
    wide = torch.promote_types(feats.dtype, torch.float32)
    out = feats.new_empty(n, 8, dtype=wide)
    for child in range(8):
        _child_conv(padded, collapsed, child, grid, hidden)
        hidden += bias
        silu(hidden, inplace=True)
        out[:, child] = torch.tanh((hidden @ out_weight[0]).to(wide) + out_bias.to(wide))
    return out


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
    """Gradients of `to_scalar_forward` for feats, weight, bias, out_weight, out_bias; one child in memory at a time.

    Args:
        grad: [N, 8] gradient of the output; values: [N, 8] the output itself.
        activate: it read SiLU(feats).
    """
    n = grid.num_rows
    c_in, c_out = collapsed.shape[2:]
    wide = torch.promote_types(feats.dtype, torch.float32)
    before_tanh = grad.to(wide) * (1 - values.to(wide) ** 2)
    padded = _padded(_read(feats, activate))
    grad_input = torch.zeros_like(feats)
    grad_collapsed = torch.zeros(8, 8 * c_in, c_out, dtype=wide, device=feats.device)
    grad_bias = torch.zeros(c_out, dtype=wide, device=feats.device)
    grad_out_weight = torch.zeros(c_out, dtype=wide, device=feats.device)
    hidden = feats.new_empty(n, c_out)
    for child in range(8):
        _child_conv(padded, collapsed, child, grid, hidden)
        hidden += bias
        outer = before_tanh[:, child].to(feats.dtype)
        share = torch.sigmoid(hidden)
        grad_out_weight += (hidden * share).t() @ outer
        part = share * (1 + hidden * (1 - share)) * (outer[:, None] * out_weight)
        grad_bias += part.sum(0)
        child_grad_input(part, collapsed, child, grid, grad_input)
        child_grad_weight(part, padded, child, grid, grad_collapsed[child])
    return (
        _before_silu(grad_input, feats, activate),
        collapse_grad(grad_collapsed.view(8, 8, c_in, c_out)).to(collapsed.dtype),
        grad_bias.to(bias.dtype),
        grad_out_weight[None].to(out_weight.dtype),
        before_tanh.sum().view(1).to(out_weight.dtype),
    )
