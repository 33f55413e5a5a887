"""Linear layer on voxel rows that follows the dtype of its input."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class SparseLinear(nn.Linear):
    """nn.Linear whose weights are cast to the activations' dtype, so that float32 weights serve every precision."""

    def forward(self, feats: Tensor) -> Tensor:
        """[N, in] -> [N, out]."""
        bias = None if self.bias is None else self.bias.to(feats.dtype)
        return F.linear(feats, self.weight.to(feats.dtype), bias)
