"""Float64 brute force for distances and winding numbers, and the comparison of stored values with it. NumPy alone."""

from __future__ import annotations

import numpy as np

from trellis.utils.blocks import block_voxel_offsets

IN_BAND_TOLERANCE = 0.01  # voxels; float16 alone takes up to 0.001
SIGN_TOLERANCE = 0.001  # voxels


def oracle_distance(points, vertices, faces, chunk=2_000_000):
    """Unsigned distance [N] of points to all triangles, float64: plane where the foot is inside, else the edges."""
    a, b, c = (vertices[faces[:, i]] for i in range(3))
    normal = np.cross(b - a, c - a)
    area2 = (normal**2).sum(-1)
    out = np.empty(len(points))
    step = max(1, chunk // len(faces))

    def to_segment(p, u, w):
        d = w - u
        t = np.clip(((p - u) * d).sum(-1) / np.maximum((d * d).sum(-1), 1e-300), 0, 1)
        return ((p - u - t[..., None] * d) ** 2).sum(-1)

    for start in range(0, len(points), step):
        p = points[start : start + step, None, :]
        best = np.minimum(np.minimum(to_segment(p, a, b), to_segment(p, b, c)), to_segment(p, c, a))
        inside = np.ones(best.shape, dtype=bool)
        for u, w in ((a, b), (b, c), (c, a)):
            inside &= (np.cross(w - u, p - u) * normal).sum(-1) >= 0
        height = ((p - a) * normal).sum(-1) ** 2 / np.maximum(area2, 1e-300)
        best = np.where(inside & (area2 > 0), height, best)
        out[start : start + step] = np.sqrt(best.min(axis=1))
    return out


def oracle_winding(points, vertices, faces, chunk=2_000_000):
    """Generalised winding number [N], float64, the sum of signed solid angles (Van Oosterom and Strackee 1983)."""
    out = np.empty(len(points))
    step = max(1, chunk // len(faces))
    for start in range(0, len(points), step):
        a, b, c = (vertices[faces[:, i]] - points[start : start + step, None, :] for i in range(3))
        la, lb, lc = (np.sqrt((x**2).sum(-1)) for x in (a, b, c))
        top = (a * np.cross(b, c)).sum(-1)
        bottom = la * lb * lc + (a * b).sum(-1) * lc + (b * c).sum(-1) * la + (c * a).sum(-1) * lb
        out[start : start + step] = np.arctan2(top, bottom).sum(axis=1) / (2 * np.pi)
    return out


def block_voxels(blocks):
    """Integer coordinates [M * 512, 3] and stored values [M * 512] of all voxels of all blocks."""
    coords = (blocks.block_index.astype(np.int64)[:, None, :] * 8 + block_voxel_offsets()).reshape(-1, 3)
    return coords, blocks.block_sdf.reshape(-1).astype(np.float64)


def assert_matches(coords, values, distance_voxels, inside, band=4):
    """Stored values against true distances (voxels, unsigned) and insides."""
    signed = np.where(inside, -distance_voxels, distance_voxels)
    expected = np.clip(signed, -band, band)
    clear = distance_voxels > SIGN_TOLERANCE
    wrong = clear & ((values < 0) != inside)
    assert not wrong.any(), f"{wrong.sum()} wrong signs, first at {coords[wrong][:3]}, d = {signed[wrong][:3]}"
    assert np.abs(values * band - expected).max() < IN_BAND_TOLERANCE
    with np.errstate(over="ignore"):
        expected_active = np.abs((distance_voxels / band).clip(max=2).astype(np.float16)) < 1
    borderline = np.abs(distance_voxels - band * (1 - 2**-12)) < 1e-6
    assert ((np.abs(values) < 1) == expected_active)[~borderline].all()
