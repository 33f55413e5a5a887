"""Closed meshes onto a volume's voxels: which voxel centres lie inside."""

from __future__ import annotations

import numpy as np

from trellis.geometry.rasterize import inside_runs, runs_to_mask

MAX_VOXELS = 1 << 31


def voxelize(vertices: np.ndarray, faces: np.ndarray, affine: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Voxels of a volume whose centres lie inside a mesh.

    Args:
        vertices: [V, 3] floats, world mm; faces: [F, 3] integers, closed and outward. They may reach beyond the volume.
        affine: [4, 4] voxel index of the volume to world mm, any invertible one; where it mirrors, faces are turned.
        shape: voxels along each axis of the volume.

    Returns:
        bool of `shape`.

    Raises:
        ValueError: a mesh that is not closed, or an affine without an inverse.
    """
    affine = np.asarray(affine, dtype=np.float64)
    determinant = np.linalg.det(affine[:3, :3]) if affine.shape == (4, 4) else 0.0
    if not np.isfinite(determinant) or determinant == 0:
        raise ValueError(f"affine must be an invertible [4, 4] matrix, got {affine.tolist()}")
    if len(faces) == 0:
        return np.zeros(shape, dtype=bool)
    voxels = np.linalg.solve(affine[:3, :3], (np.asarray(vertices, dtype=np.float64) - affine[:3, 3]).T).T
    return runs_to_mask(*inside_runs(voxels, faces if determinant > 0 else faces[:, ::-1], shape), shape)


def grid_around(vertices: np.ndarray, spacing_mm: float) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Affine [4, 4] along the world's axes and shape of a volume of cubic voxels that holds all of the vertices.

    Raises:
        ValueError: a spacing that is not positive, no vertices, or more than 2^31 voxels.
    """
    if not (np.isfinite(spacing_mm) and spacing_mm > 0):
        raise ValueError(f"spacing_mm must be above 0, got {spacing_mm}")
    if len(vertices) == 0:
        raise ValueError("a grid around nothing: there are no vertices")
    low, high = vertices.min(axis=0), vertices.max(axis=0)
    counts = np.ceil((high - low) / spacing_mm) + 1
    if counts.prod() > MAX_VOXELS:
        raise ValueError(f"spacing_mm {spacing_mm} needs {counts.prod():.3g} voxels, {MAX_VOXELS} are allowed")
    affine = np.diag([spacing_mm, spacing_mm, spacing_mm, 1.0])
    affine[:3, 3] = (low + high) / 2 - (counts - 1) / 2 * spacing_mm
    return affine, tuple(int(n) for n in counts)
