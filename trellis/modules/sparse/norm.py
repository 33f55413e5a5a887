"""Norms on voxel rows: GroupNorm over all voxels of a sample, LayerNorm over channels; statistics in float32."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from trellis.modules.sparse.kernels.support import has_kernels
from trellis.modules.sparse.levels import Grid
from trellis.modules.sparse.pool import pool


def num_groups(channels: int) -> int:
    """gcd(32, channels): 32 at the published size."""
    return math.gcd(32, channels)


class FusedGroupNorm(torch.autograd.Function):
    """GroupNorm, SiLU and pool on the kernels; keeps the input and [B, C] tables, and recomputes the rest."""

    @staticmethod
    def forward(
        ctx: Any,
        feats: Tensor,
        weight: Tensor,
        bias: Tensor,
        groups: int,
        eps: float,
        grid: Grid,
        coarse: Grid | None,
        silu: bool,
    ) -> tuple[Tensor, Tensor | None]:
        from trellis.modules.sparse.kernels.norm import norm_forward

        feats = feats.contiguous()
        out, tables = norm_forward(feats, weight, bias, groups, eps, grid, coarse, silu)
        ctx.save_for_backward(feats, *tables)
        ctx.arguments = (groups, grid, coarse, silu)
        ctx.parameter_dtypes = (weight.dtype, bias.dtype)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_pooled: Tensor | None) -> tuple[Tensor | None, ...]:
        from trellis.modules.sparse.kernels.norm import norm_backward

        feats, *tables = ctx.saved_tensors
        grad_pooled = None if grad_pooled is None else grad_pooled.contiguous()
        out, weight, bias = norm_backward(grad.contiguous(), grad_pooled, feats, tuple(tables), *ctx.arguments)
        types = ctx.parameter_dtypes
        return out, weight.to(types[0]), bias.to(types[1]), None, None, None, None, None


class SparseGroupNorm(nn.Module):
    """GroupNorm whose statistics run over all voxels of one sample and the group's channels (eps 1e-5)."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups = num_groups(channels)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, feats: Tensor, grid: Grid, *, silu: bool = False, fused: bool = True) -> Tensor:
        """[N, C] -> [N, C], SiLU applied on request; rows of a sample are contiguous."""
        if fused and has_kernels(feats.device, feats.dtype):
            arguments = (self.weight, self.bias, self.groups, self.eps, grid, None, silu)
            return FusedGroupNorm.apply(feats, *arguments)[0]
        out = self._plain(feats, grid)
        return F.silu(out) if silu else out

    def silu_pool(self, feats: Tensor, fine: Grid, coarse: Grid, *, fused: bool = True) -> tuple[Tensor, Tensor]:
        """Pooled SiLU(GN(x)) and pooled x: [N, C] on `fine` -> [P, C] on `coarse`, twice."""
        if fused and has_kernels(feats.device, feats.dtype):
            arguments = (self.weight, self.bias, self.groups, self.eps, fine, coarse, True)
            return FusedGroupNorm.apply(feats, *arguments)
        return pool(F.silu(self._plain(feats, fine)), fine, coarse), pool(feats, fine, coarse)

    def _plain(self, feats: Tensor, grid: Grid) -> Tensor:
        offsets = grid.sample_offsets.tolist()
        wide = torch.promote_types(feats.dtype, torch.float32)
        parts = []
        for start, stop in zip(offsets, offsets[1:]):
            if start == stop:
                continue
            # [1, C, n]: torch's own GroupNorm over the sample; the functional form refuses a single voxel
            part = feats[start:stop].to(wide).t()[None]
            normed = torch.group_norm(part, self.groups, self.weight.to(wide), self.bias.to(wide), self.eps)
            parts.append(normed[0].t().to(feats.dtype))
        if not parts:
            return feats
        return torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()


def layer_norm(feats: Tensor, eps: float) -> Tensor:
    """LayerNorm over channels without affine, in float32, in the dtype of the input."""
    if feats.device.type == "cuda":
        # the CUDA kernel takes 16 bit and computes in float32 itself
        return F.layer_norm(feats, feats.shape[-1:], eps=eps)
    wide = torch.promote_types(feats.dtype, torch.float32)
    return F.layer_norm(feats.to(wide), feats.shape[-1:], eps=eps).to(feats.dtype)
