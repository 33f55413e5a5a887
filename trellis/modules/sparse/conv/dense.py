"""Sparse convolutions as dense ones on the batch's bounding box: exact, and faster on a CPU where blocks fill the box.

Voxels that do not exist are zeros going in and are not read coming out, so a dense convolution at the voxels that exist
is the submanifold one. At 64 cubed an organ's blocks fill a third of their box, and few channels make gathering rows
dearer than computing some voxels for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from trellis.modules.sparse.conv.collapse import collapse_weight
from trellis.modules.sparse.levels import Grid

MAX_VOLUME_PER_ROW = {True: 4.0, False: 1.5}
"""Dense voxels per row up to which the dense form wins on a CPU: for few channels (True), and for many."""
FEW_CHANNELS = 32
MAX_VOLUME_ELEMENTS = 1 << 26
"""Elements of a dense feature volume (256 MB in float32): beyond it the gathering path is leaner."""


@dataclass(frozen=True)
class DensePlan:
    """Where a grid's rows lie in the dense volume of the batch's bounding box.

    Attributes:
        shape: (samples, x, y, z) voxels. index: [N] int64 flat position of each row.
        child_index: [8 N] int64 position of each row's children in the output of `subdivide_conv3d`'s convolution.
    """

    shape: tuple[int, int, int, int]
    index: Tensor
    child_index: Tensor


def box_shape(grid: Grid) -> tuple[int, int, int, int]:
    """(samples, x, y, z) of the batch's bounding box in voxels of this level."""
    low, high = grid.topology.box
    return grid.topology.num_samples, *((h - l + 1) * grid.side for l, h in zip(low, high))


def is_worthwhile(feats: Tensor, c_out: int, grid: Grid) -> bool:
    """Whether the dense form is the faster one: float32 or float64 on a CPU, and a well filled, small box."""
    if feats.device.type != "cpu" or feats.dtype not in (torch.float32, torch.float64) or grid.num_rows == 0:
        return False
    samples, x, y, z = box_shape(grid)
    volume, channels = samples * x * y * z, max(feats.shape[1], c_out)
    limit = MAX_VOLUME_PER_ROW[channels <= FEW_CHANNELS]
    return volume <= limit * grid.num_rows and volume * channels <= MAX_VOLUME_ELEMENTS


def dense_plan(grid: Grid) -> DensePlan:
    """The plan of a grid, kept with it."""
    if grid.dense_plan is None:
        low = torch.tensor(grid.topology.box[0]) * grid.side
        shape = box_shape(grid)
        batch, x, y, z = (grid.coords - torch.tensor([0, *low])).long().unbind(1)
        index = ((batch * shape[1] + x) * shape[2] + y) * shape[3] + z
        child = torch.arange(8)
        cx, cy, cz = (a[:, None] + p for a, p in zip((x, y, z), (child >> 2, child >> 1 & 1, child & 1)))
        corner = ((batch[:, None] * (shape[1] + 1) + cx) * (shape[2] + 1) + cy) * (shape[3] + 1) + cz
        grid.dense_plan = DensePlan(shape, index, (corner * 8 + child).reshape(-1))
    return grid.dense_plan


class _Scatter(torch.autograd.Function):
    """Rows [N, C] into a zero volume [rows, C]; positions are distinct."""

    @staticmethod
    def forward(ctx: Any, feats: Tensor, index: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(index)
        return feats.new_zeros(rows, feats.shape[1]).index_copy_(0, index, feats)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad.index_select(0, *ctx.saved_tensors), None, None


class _Gather(torch.autograd.Function):
    """Rows [N, C] of a volume [rows, C]; positions are distinct."""

    @staticmethod
    def forward(ctx: Any, volume: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = volume.shape[0]
        return volume.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.rows, grad.shape[1]).index_copy_(0, index, grad.contiguous()), None


def _to_volume(feats: Tensor, plan: DensePlan) -> Tensor:
    """[N, C] -> [samples, C, x, y, z], channels last in memory."""
    samples, x, y, z = plan.shape
    dense = _Scatter.apply(feats, plan.index, samples * x * y * z)
    return dense.view(samples, x, y, z, feats.shape[1]).permute(0, 4, 1, 2, 3)


def _to_rows(volume: Tensor, index: Tensor) -> Tensor:
    """[samples, C, x, y, z] -> [N, C]."""
    return _Gather.apply(volume.permute(0, 2, 3, 4, 1).reshape(-1, volume.shape[1]), index)


def submanifold_conv3d(feats: Tensor, weight: Tensor, bias: Tensor | None, grid: Grid) -> Tensor:
    """As `functional.submanifold_conv3d`: [N, in] -> [N, out]."""
    plan = dense_plan(grid)
    # tap k = 9 (dz+1) + 3 (dy+1) + (dx+1): [dz, dy, dx, in, out] -> [out, in, dx, dy, dz]
    kernel = weight.view(3, 3, 3, *weight.shape[1:]).permute(4, 3, 2, 1, 0)
    return _to_rows(F.conv3d(_to_volume(feats, plan), kernel, bias, padding=1), plan.index)


def subdivide_conv3d(feats: Tensor, weight: Tensor, bias: Tensor | None, grid: Grid) -> Tensor:
    """As `functional.subdivide_conv3d`, as one 2x2x2 convolution with 8 times the channels: [N, in] -> [8 N, out].

    On the volume padded by 1, output corner q reads parents q - 1 and q per axis, and the child of parity p of parent P
    reads P + p - 1 and P + p: corner P + p holds it.
    """
    plan = dense_plan(grid)
    c_in, c_out = weight.shape[1:]
    # [child, tx, ty, tz, in, out] -> [child * out, in, tx, ty, tz]
    kernel = collapse_weight(weight).view(8, 2, 2, 2, c_in, c_out).permute(0, 5, 4, 1, 2, 3).reshape(-1, c_in, 2, 2, 2)
    corners = F.conv3d(_to_volume(feats, plan), kernel, None if bias is None else bias.repeat(8), padding=1)
    rows = corners.permute(0, 2, 3, 4, 1).reshape(-1, c_out)
    return _Gather.apply(rows, plan.child_index)


def subdivide_conv_to_scalar(
    feats: Tensor, weight: Tensor, bias: Tensor, out_weight: Tensor, out_bias: Tensor, grid: Grid
) -> Tensor:
    """As `functional.subdivide_conv_to_scalar`: [N, in] -> [N, 8]."""
    hidden = F.silu(subdivide_conv3d(feats, weight, bias, grid))
    return torch.tanh(F.linear(hidden, out_weight, out_bias)).view(-1, 8)
