"""Pooling of a level onto the next coarser one, and the encoder's first stage fused with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from trellis.modules.sparse.kernels.support import has_kernels
from trellis.modules.sparse.levels import Grid, Topology

CHUNK_ELEMENTS = 1 << 22


def children_of(fine: Grid, coarse: Grid) -> Tensor:
    """[P, 8] int32 rows on `fine` of the children of each row of `coarse`, -1 where there is none."""
    return fine.row_of.view(-1, 8)[coarse.slots]


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, feats: Tensor, children: Tensor) -> Tensor:
        rows, channels = children.shape[0], feats.shape[1]
        padded = torch.cat([feats, feats.new_zeros(1, channels)])
        index = torch.where(children < 0, feats.shape[0], children)
        wide = torch.promote_types(feats.dtype, torch.float32)
        out = torch.zeros(rows, channels, dtype=wide, device=feats.device)
        for child in range(8):
            out += padded.index_select(0, index[:, child])
        scale = 1 / ((children >= 0).sum(1, keepdim=True).to(wide) + 1)
        ctx.save_for_backward(children, scale)
        ctx.num_fine = feats.shape[0]
        return (out * scale).to(feats.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        children, scale = ctx.saved_tensors
        handed = (grad * scale).to(grad.dtype)
        exists = children >= 0
        # every fine voxel is the child of just one coarse one, and children stand in the order of their rows
        parent = torch.arange(children.shape[0], device=grad.device)[:, None].expand_as(children)[exists]
        handed = handed.index_select(0, parent)
        # the rows that fill a padded level up come last and have no parent
        return F.pad(handed, (0, 0, 0, ctx.num_fine - handed.shape[0])), None


def pool(feats: Tensor, fine: Grid, coarse: Grid) -> Tensor:
    """Sum over the n children that exist / (n + 1), accumulated in float32: [N, C] on `fine` -> [P, C] on `coarse`."""
    return _Pool.apply(feats, children_of(fine, coarse))


class _FirstStage(torch.autograd.Function):
    """sum over children of silu(scale s + shift) / (n + 1), recomputed in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, exists: Tensor, scale: Tensor, shift: Tensor, offsets: list[int]
    ) -> Tensor:
        ctx.save_for_backward(values, exists, scale, shift)
        ctx.offsets = offsets
        out = values.new_empty(values.shape[0], scale.shape[1])
        for sample, start, stop in _chunks(offsets, 8 * scale.shape[1]):
            s, m = values[start:stop, :, None], exists[start:stop, :, None]
            h = F.silu(s * scale[sample] + shift[sample])
            h.mul_(m)
            out[start:stop] = h.sum(1) / (m.sum(1) + 1)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, exists, scale, shift = ctx.saved_tensors
        grad_scale, grad_shift = torch.zeros_like(scale), torch.zeros_like(shift)
        for sample, start, stop in _chunks(ctx.offsets, 8 * scale.shape[1]):
            s, m = values[start:stop, :, None], exists[start:stop, :, None]
            x = s * scale[sample] + shift[sample]
            gate = torch.sigmoid(x)
            handed = (grad[start:stop] / (m.sum(1) + 1))[:, None, :]
            part = gate.mul(1 + x * (1 - gate)).mul_(m).mul_(handed)
            grad_shift[sample] += part.sum((0, 1))
            grad_scale[sample] += (part * s).sum((0, 1))
        return None, None, grad_scale, grad_shift, None


class FusedFirstStage(torch.autograd.Function):
    """The same and the pooled input on the kernels, without gathered values or an [P, 8, C] tensor."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        occupancy: Tensor,
        scale: Tensor,
        shift: Tensor,
        weight: Tensor,
        bias: Tensor,
        coarse: Grid,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        from trellis.modules.sparse.kernels.first_stage import first_forward

        tables = tuple(t.detach().contiguous() for t in (scale, shift, weight, bias))
        ctx.save_for_backward(values, occupancy, *tables[:2])
        ctx.coarse = coarse
        return first_forward(values, occupancy, coarse, tables, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_pooled: Tensor) -> tuple[Tensor | None, ...]:
        from trellis.modules.sparse.kernels.first_stage import first_backward

        values, occupancy, scale, shift = ctx.saved_tensors
        grads = first_backward(
            grad.contiguous(), grad_pooled.contiguous(), values, occupancy, ctx.coarse, scale, shift
        )
        return None, None, *grads, None, None


def _chunks(offsets: list[int], columns: int) -> list[tuple[int, int, int]]:
    """(sample, start, stop) pieces of contiguous rows of one sample."""
    step = max(1, CHUNK_ELEMENTS // columns)
    return [
        (sample, start, min(start + step, stop))
        for sample, (first, stop) in enumerate(zip(offsets, offsets[1:]))
        for start in range(first, stop, step)
    ]


def first_stage(
    values: Tensor,
    fine: Grid,
    coarse: Grid,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    groups: int,
    eps: float,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Linear 1 -> C, then GroupNorm, SiLU and pool, without a full-resolution feature tensor.

    GroupNorm over w_c s + b_c is affine in s: per sample, a group has mean mean(w) s̄ + mean(b) and variance
    mean(w^2) var(s) + var_c(w_c s̄ + b_c), with the centred second moment of s (raw moments lose digits in float32).

    Args:
        values: [M, 512] TSDF; fine: grid at stride 1; coarse: at stride 2; weight, bias: [C] of the Linear;
        norm_weight, norm_bias: [C]; dtype: of the result, float32 when None (float64 for float64 values).

    Returns:
        pooled SiLU(GN(x)) and pooled x, each [P, C].
    """
    topology = fine.topology
    wide = torch.promote_types(values.dtype, torch.float32)
    weight, bias, norm_weight, norm_bias = (t.to(wide) for t in (weight, bias, norm_weight, norm_bias))
    occupancy = fine.occupancy
    if occupancy is None:
        occupancy = torch.ones_like(values, dtype=torch.bool)
    dtype = dtype or wide
    kernels = has_kernels(values.device, values.dtype)
    if kernels:
        from trellis.modules.sparse.kernels.first_stage import value_moments

        occupancy = occupancy.contiguous()
        values = values.contiguous()
        mean, variance = (t[:, None] for t in value_moments(values, occupancy, topology.sample_starts))
    else:
        mean, variance = _value_moments(values, occupancy, topology)

    channel_mean = mean * weight + bias
    grouped = channel_mean.view(len(mean), groups, weight.shape[0] // groups)
    group_mean = grouped.mean(-1, keepdim=True)
    power = weight.square().view(groups, -1).mean(-1)
    group_variance = power * variance + (grouped - group_mean).square().mean(-1)
    rstd = torch.rsqrt(group_variance + eps)[..., None].expand_as(grouped).reshape(channel_mean.shape)
    group_mean = group_mean.expand_as(grouped).reshape(channel_mean.shape)
    scale = norm_weight * weight * rstd
    shift = norm_weight * (bias - group_mean) * rstd + norm_bias

    if kernels:
        return FusedFirstStage.apply(values, occupancy, scale, shift, weight, bias, coarse, dtype)
    slots = coarse.slots
    exists = occupancy.reshape(-1, 8)[slots]
    s = torch.where(exists, values.reshape(-1, 8)[slots].to(wide), 0)
    hidden = _FirstStage.apply(s, exists, scale, shift, coarse.sample_offsets.tolist())
    n = exists.sum(1, keepdim=True).to(wide)
    skip = (s.sum(1, keepdim=True) / (n + 1)) * weight + (n / (n + 1)) * bias
    return hidden.to(dtype), skip.to(dtype)


def _value_moments(values: Tensor, occupancy: Tensor, topology: Topology) -> tuple[Tensor, Tensor]:
    """Mean and centred variance [B, 1] of the values that exist, per sample; summed in float64."""
    wide = torch.promote_types(values.dtype, torch.float32)
    sample = topology.coords[:, 0].long()
    exact = torch.where(occupancy, values, 0).double()
    zeros = torch.zeros(topology.num_samples, dtype=torch.float64, device=values.device)
    count = zeros.index_add(0, sample, occupancy.sum(1).double()).clamp_min(1)
    mean = zeros.index_add(0, sample, exact.sum(1)) / count
    centred = torch.where(occupancy, exact - mean[sample][:, None], 0).square().sum(1)
    variance = zeros.index_add(0, sample, centred) / count
    return mean.to(wide)[:, None], variance.to(wide)[:, None]
