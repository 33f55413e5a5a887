"""Local thickness of closed surfaces, by rays into the inside."""

from __future__ import annotations

import numpy as np

SAMPLES = 1000
PERCENTILE = 5.0


def thin_thickness_mm(
    vertices: np.ndarray, faces: np.ndarray, *, samples: int = SAMPLES, percentile: float = PERCENTILE, seed: int = 0
) -> float:
    """How thin the thin parts of a shape are: the 5th percentile of its local thickness over the surface.

    The local thickness at a surface point is the distance that a ray against the outward normal travels inside before
    it leaves. Points are drawn uniformly by area. The percentile keeps sharp edges, where the thickness goes to 0, from
    deciding; a sheet thinner than a twentieth of the surface goes unseen.

    Args:
        vertices: [V, 3] floats, mm; faces: [F, 3] integers, closed and outward.

    Returns:
        mm; NaN where no ray meets the surface again.
    """
    from trellis.geometry.thickness_kernels import ray_lengths

    vertices = np.asarray(vertices, dtype=np.float64)
    corners = vertices[faces]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    doubled_areas = np.linalg.norm(normals, axis=1)
    if not doubled_areas.sum() > 0:
        return float("nan")
    rng = np.random.default_rng(seed)
    face = rng.choice(len(faces), size=samples, p=doubled_areas / doubled_areas.sum())
    u, v = rng.random(samples), rng.random(samples)
    fold = u + v > 1
    u[fold], v[fold] = 1 - u[fold], 1 - v[fold]
    picked = corners[face]
    origins = picked[:, 0] + u[:, None] * (picked[:, 1] - picked[:, 0]) + v[:, None] * (picked[:, 2] - picked[:, 0])
    directions = -normals[face] / doubled_areas[face, None]
    # Rays run in float32: in a frame of unit size, and started a little inside so that they miss their own face.
    low = vertices.min(axis=0)
    size = float((vertices.max(axis=0) - low).max())
    step = 1e-5
    lengths = ray_lengths((vertices - low) / size, faces, (origins - low) / size + step * directions, directions) + step
    lengths = lengths[np.isfinite(lengths)]
    return float(np.percentile(lengths, percentile) * size) if lengths.size else float("nan")
