"""Float64 brute force for distances and winding numbers, and the comparison of stored values with it. NumPy alone."""

from __future__ import annotations

import numpy as np

from trellis.utils.blocks import block_voxel_offsets

IN_BAND_TOLERANCE = 0.01  # voxels; float16 alone takes up to 0.001
SIGN_TOLERANCE = 0.001  # voxels


def _dot(u, w):
    return u[0] * w[0] + u[1] * w[1] + u[2] * w[2]


def _cross(u, w):
    return np.stack([u[1] * w[2] - u[2] * w[1], u[2] * w[0] - u[0] * w[2], u[0] * w[1] - u[1] * w[0]])


def oracle_distance(points, vertices, faces, chunk=1 << 14):
    """Unsigned distance [N] of points to all triangles, float64: plane where the foot is inside, else the edges."""
    a, b, c = (vertices[faces[:, i]].T[:, None] for i in range(3))  # each [3, 1, F]
    normal = _cross(b - a, c - a)
    area2 = _dot(normal, normal)
    edges = [(u, w - u, _cross(normal, w - u)) for u, w in ((a, b), (b, c), (c, a))]
    out = np.empty(len(points))
    step = max(1, chunk // len(faces))
    for start in range(0, len(points), step):
        p = points[start : start + step].T[:, :, None]
        best, above = np.inf, area2 > 0
        for u, d, inward in edges:
            to_p = p - u
            rest = to_p - np.clip(_dot(to_p, d) / np.maximum(_dot(d, d), 1e-300), 0, 1) * d
            best = np.minimum(best, _dot(rest, rest))
            above = above & (_dot(to_p, inward) >= 0)
        height = _dot(p - a, normal) ** 2 / np.maximum(area2, 1e-300)
        out[start : start + step] = np.sqrt(np.where(above, height, best).min(axis=1))
    return out


def oracle_winding(points, vertices, faces, chunk=1 << 14):
    """Generalised winding number [N], float64, the sum of signed solid angles (Van Oosterom and Strackee 1983)."""
    corners = [vertices[faces[:, i]].T[:, None] for i in range(3)]
    out = np.empty(len(points))
    step = max(1, chunk // len(faces))
    for start in range(0, len(points), step):
        a, b, c = (corner - points[start : start + step].T[:, :, None] for corner in corners)
        la, lb, lc = (np.sqrt(_dot(x, x)) for x in (a, b, c))
        bottom = la * lb * lc + _dot(a, b) * lc + _dot(b, c) * la + _dot(c, a) * lb
        out[start : start + step] = np.arctan2(_dot(a, _cross(b, c)), bottom).sum(axis=1) / (2 * np.pi)
    return out


def block_voxels(blocks, rows=None):
    """Integer coordinates [N, 3] and stored values [N] of all voxels of all blocks, or of the rows [N] of these."""
    rows = np.arange(blocks.num_blocks * 512) if rows is None else rows
    coords = blocks.block_index[rows // 512].astype(np.int64) * 8 + block_voxel_offsets()[rows % 512]
    return coords, blocks.block_sdf.reshape(-1)[rows].astype(np.float64)


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
