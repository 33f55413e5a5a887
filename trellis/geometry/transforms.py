"""Uniform scale + translation between a shape's grid space [-0.5, 0.5]^3 and its world space in millimetres."""

from __future__ import annotations

import numpy as np

FILL = 0.95
"""Longest side of a normalised shape's bounding box, in grid space."""


def normalising_transform(vertices: np.ndarray) -> np.ndarray:
    """The `to_world` that centres the bounding box of `vertices` and makes its longest side 0.95 in grid space.

    Args:
        vertices: [V, 3] floats, world mm.

    Returns:
        [4, 4] float64, grid space to world mm.

    Raises:
        ValueError: no vertices, coordinates that are not finite, or a bounding box without extent.
    """
    v = np.asarray(vertices, dtype=np.float64)
    if v.ndim != 2 or v.shape[1] != 3 or len(v) == 0:
        raise ValueError(f"vertices must be [V, 3] with V >= 1, got shape {list(v.shape)}")
    if not np.isfinite(v).all():
        bad = int((~np.isfinite(v)).any(axis=1).sum())
        raise ValueError(f"vertices must be finite, got {bad} of {len(v)} with NaN or infinite coordinates")
    low, high = v.min(axis=0), v.max(axis=0)
    with np.errstate(over="ignore"):
        longest = float((high - low).max())
    if not np.finfo(np.float64).tiny * 1e3 < longest < 1e300:
        raise ValueError(f"the bounding box must have an extent that can be scaled, got longest side {longest:.6g}")
    to_world = np.eye(4)
    to_world[:3, :3] *= longest / FILL
    to_world[:3, 3] = low + (high - low) / 2
    return to_world


def check_to_world(to_world: np.ndarray) -> np.ndarray:
    """Return `to_world` as float64 [4, 4]; ValueError unless it is a uniform positive scale and a translation."""
    m = np.asarray(to_world, dtype=np.float64)
    if m.shape != (4, 4) or not np.isfinite(m).all():
        raise ValueError(f"to_world must be a finite [4, 4] matrix, got shape {list(m.shape)}: {m.tolist()}")
    scale = m[0, 0]
    expected = np.eye(4)
    expected[:3, :3] *= scale
    expected[:3, 3] = m[:3, 3]
    if scale <= 0 or not np.allclose(m, expected, rtol=1e-12, atol=1e-12 * abs(scale)):
        raise ValueError(f"to_world must be a uniform positive scale and a translation, got {m.tolist()}")
    return m


def grid_to_world(points: np.ndarray, to_world: np.ndarray) -> np.ndarray:
    """Points [N, 3] from grid space to world mm, float64."""
    return np.asarray(points, dtype=np.float64) * to_world[0, 0] + to_world[:3, 3]


def world_to_grid(points: np.ndarray, to_world: np.ndarray) -> np.ndarray:
    """Points [N, 3] from world mm to grid space, float64."""
    return (np.asarray(points, dtype=np.float64) - to_world[:3, 3]) / to_world[0, 0]


def voxel_centres(index: np.ndarray, resolution: int) -> np.ndarray:
    """Centres [N, 3] float64 in grid space of voxels with integer index [N, 3]: (i + 0.5) / resolution - 0.5."""
    return (np.asarray(index, dtype=np.float64) + 0.5) / resolution - 0.5
