"""Which voxel centres lie inside a closed mesh, by exact scan conversion: runs along z, never a dense grid.

Vertices' x and y are snapped to a fixed-point grid (2^-16 voxel for coordinates below 8192 voxels), where all decisions
are made in integers: a voxel column that meets an edge or a vertex is taken to lie an infinitesimal step (e, e^2)
beside it, so it crosses exactly one of the triangles there and the winding number of every voxel centre is exact.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_CHUNK_FACES = 1 << 18
_CHUNK_CROSSINGS = 1 << 22
_COORDINATE_BITS = 29  # products of two coordinates and their sum stay below 2^60


def inside_runs(vertices: np.ndarray, faces: np.ndarray, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Runs of voxels whose centres have winding number >= 1.

    Args:
        vertices: [V, 3] floats in voxel coordinates: voxel (i, j, k) has its centre at (i, j, k).
        faces: [F, 3] integers, outward normals right-handed, closed.
        shape: voxels (X, Y, Z) of the grid.

    Returns:
        start, stop: [N] int64, ascending and disjoint: voxels (i, j, k) with start <= (i * Y + j) * (Z + 1) + k < stop.
        (Lines are one longer than Z, so that a run never goes on in the next line.)

    Raises:
        ValueError: the mesh is not closed (its crossings along some column do not cancel), or not finite.
    """
    vertices = np.asarray(vertices, dtype=np.float64)
    if not np.isfinite(vertices).all():
        raise ValueError("vertices must be finite, got inf or NaN")
    keys, signs = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int8)]
    for key, sign in _crossings(vertices, np.asarray(faces), shape):
        keys.append(key)
        signs.append(sign)
    key = np.concatenate(keys)
    order = np.argsort(key, kind="stable")
    key, step = key[order], np.concatenate(signs)[order].astype(np.int64)
    last = np.flatnonzero(np.diff(key, append=-1) != 0)  # crossings below one voxel count together
    winding = np.cumsum(step)[last]
    key = key[last]
    line_end = np.diff(key // (shape[2] + 1), append=-1) != 0
    if (winding[line_end] != 0).any():
        bad = int((winding[line_end] != 0).sum())
        raise ValueError(f"the mesh must be closed: along {bad} of {int(line_end.sum())} voxel columns it is not")
    inside = winding >= 1
    before = np.concatenate([[False], inside[:-1]])
    return key[inside & ~before], key[~inside & before]


def run_length(start: np.ndarray, stop: np.ndarray) -> int:
    """Voxels in runs."""
    return int((stop - start).sum())


def overlap(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> int:
    """Voxels that are in both of two sets of runs on the same grid."""
    key = np.concatenate([a[0], b[0], a[1], b[1]])
    step = np.repeat([1, -1], [len(a[0]) + len(b[0]), len(a[1]) + len(b[1])])
    order = np.argsort(key, kind="stable")
    depth = np.cumsum(step[order])[:-1]
    return int(np.diff(key[order])[depth == 2].sum())


def dice_and_iou(a: int, b: int, both: int, *, empty: tuple[bool, bool]) -> tuple[float | None, float | None]:
    """Dice and IoU of two shapes that hold `a` and `b` voxels, and `both` in common.

    Args:
        empty: whether each of the shapes is empty. Two empty shapes agree (1), one alone does not (0). Two that are
            not, and pass between the voxel centres, have no figure: None.
    """
    if a + b:
        return 2 * both / (a + b), both / (a + b - both)
    figure = None if not any(empty) else float(all(empty))
    return figure, figure


def runs_to_mask(start: np.ndarray, stop: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """[X, Y, Z] bool of runs; for grids that a caller holds densely anyway."""
    line = shape[2] + 1
    step = np.zeros(shape[0] * shape[1] * line + 1, dtype=np.int8)
    step[start] = 1  # runs neither touch nor overlap
    step[stop] = -1
    return np.cumsum(step[:-1], dtype=np.int8).reshape(shape[0], shape[1], line)[:, :, :-1].astype(bool)


def _crossings(
    vertices: np.ndarray, faces: np.ndarray, shape: tuple[int, int, int]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Keys of the first voxel above each crossing of a column with a face, and +1 where it goes in, -1 out."""
    reach = max(float(np.abs(vertices[:, :2]).max(initial=0)), *shape[:2], 1.0)
    bits = min(16, _COORDINATE_BITS - int(np.ceil(np.log2(reach + 1))))
    if bits < 4:
        raise ValueError(f"vertices must lie within 2^24 voxels of the grid, got {reach:.3g} voxels")
    scale = 1 << bits
    fixed = np.rint(vertices[:, :2] * scale).astype(np.int64)
    for first in range(0, len(faces), _CHUNK_FACES):
        face = faces[first : first + _CHUNK_FACES]
        x = fixed[face, 0]
        low, high = -(-x.min(axis=1) // scale), -(-x.max(axis=1) // scale)
        low, high = np.maximum(low, 0), np.minimum(high, shape[0])
        keep = high > low
        face, x, low, high = face[keep], x[keep], low[keep], high[keep]
        order = np.argsort(x, axis=1, kind="stable")
        odd = (order[:, 0] > order[:, 1]) ^ (order[:, 1] > order[:, 2]) ^ (order[:, 0] > order[:, 2])
        face = np.take_along_axis(face, order, axis=1)
        rows = high - low
        ends = np.cumsum(rows)
        for part in _pieces(rows, _CHUNK_CROSSINGS // 8):
            owner = np.repeat(np.arange(part.start, part.stop), rows[part])
            column_x = low[owner] + np.arange(len(owner)) + (ends[part.start] - rows[part.start])
            column_x -= ends[owner] - rows[owner]
            yield from _row_crossings(vertices, fixed, face[owner], odd[owner], column_x, scale, shape)


def _pieces(counts: np.ndarray, limit: int) -> Iterator[slice]:
    """Slices of items whose counts add up to about `limit` at most (one item may have more)."""
    if not len(counts):
        return
    group = np.cumsum(counts) // limit
    borders = np.flatnonzero(np.diff(group)) + 1
    for a, b in zip([0, *borders.tolist()], [*borders.tolist(), len(counts)]):
        yield slice(a, b)


def _row_crossings(
    vertices: np.ndarray,
    fixed: np.ndarray,
    face: np.ndarray,
    odd: np.ndarray,
    column_x: np.ndarray,
    scale: int,
    shape: tuple[int, int, int],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Crossings of pairs (face with corners sorted by x, row of columns at column_x)."""
    a, b, c = (fixed[face[:, k]] for k in range(3))
    px = column_x * scale
    left = (px < b[:, 0])[:, None]
    long_side = _first_column_above(a, c, px, scale)
    short_side = _first_column_above(np.where(left, a, b), np.where(left, b, c), px, scale)
    low = np.clip(np.minimum(long_side, short_side), 0, shape[1])
    count = np.clip(np.maximum(long_side, short_side), 0, shape[1]) - low
    twice_area = (b[:, 0] - a[:, 0]) * (c[:, 1] - a[:, 1]) - (b[:, 1] - a[:, 1]) * (c[:, 0] - a[:, 0])
    hit = np.flatnonzero(count)
    face, low, count, column_x, px = face[hit], low[hit], count[hit], column_x[hit], px[hit]
    a, b, c, twice_area = a[hit], b[hit], c[hit], twice_area[hit]
    # the plane of the triangle in float64; clamped to its own range, because slivers extrapolate badly
    z = vertices[:, 2][face]
    zb, zc = z[:, 1] - z[:, 0], z[:, 2] - z[:, 0]
    area = twice_area.astype(np.float64)
    slope_x = (zb * (c[:, 1] - a[:, 1]) - zc * (b[:, 1] - a[:, 1])) / area
    slope_y = (zc * (b[:, 0] - a[:, 0]) - zb * (c[:, 0] - a[:, 0])) / area
    z_low, z_high = z.min(axis=1), z.max(axis=1)
    sign = np.where((twice_area > 0) ^ odd[hit], -1, 1).astype(np.int8)  # a normal that points up: the column goes out
    ends = np.cumsum(count)
    for part in _pieces(count, _CHUNK_CROSSINGS):
        owner = np.repeat(np.arange(part.start, part.stop), count[part])
        column_y = low[owner] + np.arange(len(owner)) + (ends[part.start] - count[part.start])
        column_y -= ends[owner] - count[owner]
        height = z[owner, 0] + slope_x[owner] * (px[owner] - a[owner, 0])
        height += slope_y[owner] * (column_y * scale - a[owner, 1])
        height = np.clip(height, z_low[owner], z_high[owner])
        first_voxel = np.clip(np.ceil(height), 0, shape[2]).astype(np.int64)
        yield (column_x[owner] * shape[1] + column_y) * (shape[2] + 1) + first_voxel, sign[owner]


def _first_column_above(p: np.ndarray, q: np.ndarray, px: np.ndarray, scale: int) -> np.ndarray:
    """First column index above the line through p and q (p left of q) at px; a column on it is moved by (e, e^2)."""
    run, rise = q[:, 0] - p[:, 0], q[:, 1] - p[:, 1]
    numerator = rise * (px - p[:, 0]) + p[:, 1] * run
    denominator = run * scale
    floor = numerator // denominator
    on_line = floor * denominator == numerator
    return floor + np.where(on_line & (rise <= 0), 0, 1)
