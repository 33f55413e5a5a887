"""Sparse TSDF blocks back onto a volume's voxels: which voxel centres lie inside the shape."""

from __future__ import annotations

import numpy as np

from trellis.geometry.block_complement import PaddedBlocks
from trellis.utils.blocks import STORAGE_BLOCK, SparseSDFBlocks

_POINTS_AT_ONCE = 1 << 20
_OUTSIDE, _INSIDE = -1, -2
_CORNERS = np.stack(np.meshgrid([0, 1], [0, 1], [0, 1], indexing="ij"), -1).reshape(-1, 3)


class InsideTest:
    """Whether points lie inside the surface of blocks: the sign of the trilinear interpolation of the TSDF.

    Blocks that are missing count as inside or outside as `extract_mesh` takes them. Memory is that of a table of the
    blocks (not voxels) in the bounding box of the shape.
    """

    def __init__(self, blocks: SparseSDFBlocks) -> None:
        index = blocks.block_index.astype(np.int64)
        self.values = blocks.block_sdf.reshape(-1)
        self.low = index.min(axis=0) - 1 if len(index) else np.zeros(3, dtype=np.int64)
        high = index.max(axis=0) + 1 if len(index) else self.low
        self.table = np.full(high - self.low + 1, _OUTSIDE, dtype=np.int32)
        if len(index) == 0:
            return
        self.table[tuple((index - self.low).T)] = np.arange(len(index))
        missing = np.argwhere(self.table < 0) + self.low
        grid = blocks.resolution // STORAGE_BLOCK
        missing = missing[((missing >= 0) & (missing < grid)).all(axis=1)]
        inside = missing[PaddedBlocks(blocks).missing_inside(missing)]
        self.table[tuple((inside - self.low).T)] = _INSIDE

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """First and last voxel coordinate [3] of the box outside of which nothing is inside."""
        return (self.low + 1.0) * STORAGE_BLOCK - 1, (self.low + np.array(self.table.shape) - 1.0) * STORAGE_BLOCK

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """[N] bool for points [N, 3] in voxel coordinates of the shape's grid (voxel i has its centre at i)."""
        base = np.floor(points).astype(np.int64)
        first, last = self._lookup(base), self._lookup(base + 1)
        same_block = (base // STORAGE_BLOCK == (base + 1) // STORAGE_BLOCK).all(axis=1)
        result = np.where(same_block, first == _INSIDE, False)
        todo = np.flatnonzero(~same_block | (first >= 0) | (last >= 0))
        base, fraction = base[todo], (points[todo] - base[todo]).astype(np.float32)
        total = np.zeros(len(todo), dtype=np.float32)
        for corner in _CORNERS:
            weight = np.prod(np.where(corner, fraction, 1 - fraction), axis=1)
            total += weight * self._value(base + corner)
        result[todo] = total < 0
        return result

    def _lookup(self, voxels: np.ndarray) -> np.ndarray:
        """Row of the block of each voxel, or what its missing block counts as."""
        cell = voxels // STORAGE_BLOCK - self.low
        known = ((cell >= 0) & (cell < self.table.shape)).all(axis=1)
        cell = np.where(known[:, None], cell, 0)
        return np.where(known, self.table[tuple(cell.T)], _OUTSIDE)

    def _value(self, voxels: np.ndarray) -> np.ndarray:
        """TSDF [N] float32 of voxels [N, 3]."""
        row = self._lookup(voxels).astype(np.int64)
        local = voxels % STORAGE_BLOCK
        flat = row * STORAGE_BLOCK**3 + (local[:, 0] * STORAGE_BLOCK + local[:, 1]) * STORAGE_BLOCK + local[:, 2]
        if len(self.values) == 0:
            return np.ones(len(voxels), dtype=np.float32)
        stored = self.values[np.where(row >= 0, flat, 0)].astype(np.float32)
        return np.where(row >= 0, stored, np.where(row == _INSIDE, np.float32(-1), np.float32(1)))


def voxelize(blocks: SparseSDFBlocks, affine: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Voxels of a volume whose centres lie inside the shape.

    Args:
        blocks: with `to_world`.
        affine: [4, 4] voxel index of the volume to RAS mm, any invertible one.
        shape: voxels along each axis of the volume.

    Returns:
        bool of `shape`.

    Raises:
        ValueError: blocks without `to_world`.
    """
    if blocks.to_world is None:
        raise ValueError("a shape without to_world has no place in a volume")
    result = np.zeros(shape, dtype=bool)
    if blocks.num_blocks == 0:
        return result
    to_voxel = np.eye(4)
    to_voxel[:3, :3] *= blocks.resolution
    to_voxel[:3, 3] = blocks.resolution / 2 - 0.5
    matrix = to_voxel @ np.linalg.inv(blocks.to_world) @ np.asarray(affine, dtype=np.float64)
    test = InsideTest(blocks)
    low, high = _index_box(test.bounds(), np.linalg.inv(matrix), shape)
    if (high <= low).any():
        return result
    axes = [np.arange(a, b) for a, b in zip(low, high)]
    plane = len(axes[1]) * len(axes[2])
    step = max(1, _POINTS_AT_ONCE // plane)
    for start in range(0, len(axes[0]), step):
        x = axes[0][start : start + step]
        index = np.stack(np.meshgrid(x, axes[1], axes[2], indexing="ij"), -1).reshape(-1, 3)
        inside = test(index @ matrix[:3, :3].T + matrix[:3, 3])
        result[x[0] : x[-1] + 1, low[1] : high[1], low[2] : high[2]] = inside.reshape(len(x), len(axes[1]), -1)
    return result


def _index_box(
    bounds: tuple[np.ndarray, np.ndarray], to_index: np.ndarray, shape: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """First and one-past-last index [3] of the volume that the box between `bounds` can reach."""
    corners = np.where(_CORNERS, bounds[1], bounds[0]) @ to_index[:3, :3].T + to_index[:3, 3]
    low = np.clip(np.floor(corners.min(axis=0)), 0, shape).astype(np.int64)
    high = np.clip(np.ceil(corners.max(axis=0)) + 1, 0, shape).astype(np.int64)
    return low, high


def grid_around(blocks: SparseSDFBlocks, spacing_mm: float) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Affine [4, 4] (along the RAS axes) and shape of a volume of cubic voxels that holds the whole shape.

    Raises:
        ValueError: blocks without `to_world`, a spacing that is not positive, or more than 2^31 voxels.
    """
    if blocks.to_world is None:
        raise ValueError("a shape without to_world has no place in a volume")
    if not (np.isfinite(spacing_mm) and spacing_mm > 0):
        raise ValueError(f"spacing_mm must be above 0, got {spacing_mm}")
    scale = blocks.to_world[0, 0] / blocks.resolution
    corner = blocks.to_world[:3, 3] - blocks.to_world[0, 0] / 2
    index = blocks.block_index.astype(np.int64) if blocks.num_blocks else np.zeros((1, 3), dtype=np.int64)
    low = corner + index.min(axis=0) * STORAGE_BLOCK * scale
    high = corner + (index.max(axis=0) + 1) * STORAGE_BLOCK * scale
    counts = np.ceil((high - low) / spacing_mm)
    if counts.prod() > 2**31:
        raise ValueError(f"spacing_mm {spacing_mm} needs {counts.prod():.3g} voxels for a shape of {high - low} mm")
    affine = np.diag([spacing_mm, spacing_mm, spacing_mm, 1.0])
    affine[:3, 3] = low + spacing_mm / 2
    return affine, tuple(int(n) for n in counts)
