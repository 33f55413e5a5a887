"""Convolution modules: they own the weights, in one layout, under the published names."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from trellis.modules.sparse.conv.functional import subdivide_conv3d, submanifold_conv3d
from trellis.modules.sparse.levels import Grid


class ConvWeights(nn.Module):
    """`kernel` [27, in, out] (or [in, out] for a 1x1x1 kernel) and `bias` [out]."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        shape = (in_channels, out_channels) if kernel_size == 1 else (kernel_size**3, in_channels, out_channels)
        self.kernel = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        # A 3x3x3 convolution reads what a SiLU left, whose mean square is 0.356 of a unit normal's: keep the scale.
        gain = 1.0 if kernel_size == 1 else 1.68
        bound = gain * math.sqrt(3 / (in_channels * kernel_size**3))
        nn.init.uniform_(self.kernel, -bound, bound)


class SparseConv3d(nn.Module):
    """Submanifold convolution, kernel size 3 or 1, optionally after a subdivision of the grid."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        if kernel_size not in (1, 3):
            raise ValueError(f"kernel_size must be 1 or 3, got {kernel_size}")
        self.kernel_size = kernel_size
        self.conv = ConvWeights(in_channels, out_channels, kernel_size)

    def cast(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Kernel and bias in the dtype of the activations."""
        return self.conv.kernel.to(dtype), self.conv.bias.to(dtype)

    def forward(
        self, feats: Tensor, grid: Grid, *, subdivide: bool = False, activate: bool = False, backend: str = "auto"
    ) -> Tensor:
        """[N, in] -> [N, out], or [8 N, out] on the children with `subdivide`; of SiLU(feats) with `activate`."""
        kernel, bias = self.cast(feats.dtype)
        if self.kernel_size == 1:
            return torch.addmm(bias, torch.nn.functional.silu(feats) if activate else feats, kernel)
        function = subdivide_conv3d if subdivide else submanifold_conv3d
        return function(feats, kernel, bias, grid, activate=activate, backend=backend)
