"""SparseTensor: features on the voxels of one level."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trellis.modules.sparse.levels import Grid


@dataclass(frozen=True)
class SparseTensor:
    """Features [N, C] on the N voxels of a grid; rows by sample, then Morton."""

    feats: Tensor
    grid: Grid

    def __post_init__(self) -> None:
        if self.feats.ndim != 2 or self.feats.shape[0] != self.grid.num_rows:
            raise ValueError(f"feats must be [{self.grid.num_rows}, C] on this grid, got {list(self.feats.shape)}")

    def replace(self, feats: Tensor) -> SparseTensor:
        """The same grid with other features."""
        return SparseTensor(feats, self.grid)
