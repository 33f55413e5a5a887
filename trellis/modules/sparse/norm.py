"""Norms on voxel rows: GroupNorm over all voxels of a sample, LayerNorm over channels; statistics in float32."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trellis.modules.sparse.levels import Grid


def num_groups(channels: int) -> int:
    """gcd(32, channels): 32 at the published size."""
    return math.gcd(32, channels)


class SparseGroupNorm(nn.Module):
    """GroupNorm whose statistics run over all voxels of one sample and the group's channels (eps 1e-5)."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups = num_groups(channels)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, feats: Tensor, grid: Grid) -> Tensor:
        """[N, C] -> [N, C]; rows of a sample are contiguous."""
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
    wide = torch.promote_types(feats.dtype, torch.float32)
    return F.layer_norm(feats.to(wide), feats.shape[-1:], eps=eps).to(feats.dtype)
