"""Sparse TSDF blocks -> closed triangle mesh in world mm: marching cubes on blocks, with roots of higher order."""

from __future__ import annotations

import logging

import numpy as np

from trellis.geometry.block_complement import OFFSETS_27, PaddedBlocks, inside_mask
from trellis.geometry.mc_table import CORNERS, EDGES, case_table
from trellis.geometry.sharp_features import sharpen
from trellis.utils.blocks import STORAGE_BLOCK, SparseSDFBlocks

logger = logging.getLogger(__name__)

NOTHING_INSIDE = "the field has no negative value, so its mesh is empty: the shape may lie between voxel centres"
_CHUNK_BLOCKS = 2048
_CHUNK_FACES = 1 << 20
EDGE_MARGIN = 1e-3
"""Vertices keep this distance (voxels) from voxel centres, so that no two of them coincide."""
KINK_RATIO = 2.0
"""A second difference may be so many times its neighbour's before it is taken for a kink and cut down to that."""
MAX_CORRECTION_VOXELS = 0.06
"""Bound of the correction for chords: what a radius of about 3 voxels needs."""
GOOD_GRADIENT, KINKED_GRADIENT = 0.05, 0.1
"""| |g| - 1 | of central differences that are taken as a tangent plane's normal, and of ones across a kink."""
_PAD = 11  # voxels -1..9 of a block along each axis
_CELL = 9  # voxels 0..8


def extract_mesh(blocks: SparseSDFBlocks) -> tuple[np.ndarray, np.ndarray]:
    """Surface v = 0 of a sparse TSDF, always closed and edge-manifold, whatever the values.

    Missing blocks are inside or outside as `block_complement` says; beyond the cube is outside. Inside is v < 0.
    Vertices lie on the grid's edges, at the root of the cubic through four samples where all are inside the band
    (linear between two otherwise), then move by at most 0.06 voxel along the normal, so that the chords of a curved
    surface lie as far inside as outside of it. Sharp edges and corners get vertices of their own (`sharp_features`).

    Args:
        blocks: M blocks, block_sdf float16 [M, 8, 8, 8].

    Returns:
        vertices: [V, 3] float64, world mm, or the grid space [-0.5, 0.5]^3 if `to_world` is None.
        faces: [F, 3] int64, right-handed normals pointing outward. Empty arrays, and a warning in
            the log, when nothing is inside.

    Raises:
        ValueError: values that are not finite, a block listed twice or outside the grid.
    """
    _check(blocks)
    if not blocks.num_blocks:
        return np.zeros((0, 3)), np.zeros((0, 3), dtype=np.int64)
    padded = PaddedBlocks(blocks)
    rows = _rows_with_surface(blocks, padded)
    neighbours = padded.neighbours(rows)
    vertices, normals, reliable, edge_vertex, cells, cases = _vertices(blocks, padded, rows, neighbours)
    faces, table_rows = _faces(rows, neighbours, len(padded.coords), edge_vertex, cells, cases)
    del edge_vertex, cells, cases
    vertices, normals, faces = sharpen(vertices, normals, reliable, faces, table_rows)
    if not len(faces):
        logger.warning(NOTHING_INSIDE)
    vertices = _balance_chords(vertices, normals, faces)
    vertices = (vertices + 0.5) / blocks.resolution - 0.5
    if blocks.to_world is not None:
        linear, shift = blocks.to_world[:3, :3], blocks.to_world[:3, 3]
        vertices = vertices @ linear.T + shift
        if np.linalg.det(linear) < 0:
            faces = faces[:, ::-1]
    return vertices, np.ascontiguousarray(faces, dtype=np.int64)


def _check(blocks: SparseSDFBlocks) -> None:
    # the bits of float16: an exponent of all ones is inf or NaN
    if ((blocks.block_sdf.view(np.int16) & 0x7C00) == 0x7C00).any():
        raise ValueError("block_sdf must be finite, got inf or NaN")
    index, side = blocks.block_index, blocks.resolution // STORAGE_BLOCK
    if len(index) and (index.min() < 0 or index.max() >= side):
        raise ValueError(f"block_index must lie in [0, {side}), got [{index.min()}, {index.max()}]")


def _rows_with_surface(blocks: SparseSDFBlocks, padded: PaddedBlocks) -> np.ndarray:
    """Rows, in ascending order, of the blocks whose 9-cubed voxels 0..8 may hold both signs."""
    m = padded.num_blocks
    has_inside = np.empty(len(padded.coords) + 1, dtype=bool)
    has_outside = np.empty_like(has_inside)
    for start in range(0, m, _CHUNK_BLOCKS):
        part = slice(start, min(start + _CHUNK_BLOCKS, m))
        inside = inside_mask(blocks.block_sdf[part]).reshape(-1, STORAGE_BLOCK**3)
        has_inside[part], has_outside[part] = inside.any(axis=1), ~inside.all(axis=1)
    has_inside[m:-1], has_outside[m:-1] = padded.shell_inside, ~padded.shell_inside
    has_inside[-1] = has_outside[-1] = False  # row -1: beyond the shell, where nothing can differ
    mixed = []
    for start in range(0, len(padded.coords), 8 * _CHUNK_BLOCKS):
        rows = np.arange(start, min(start + 8 * _CHUNK_BLOCKS, len(padded.coords)))
        around = padded.find(padded.coords[rows][:, None, :] + CORNERS)
        mixed.append(rows[has_inside[around].any(axis=1) & has_outside[around].any(axis=1)])
    return np.concatenate(mixed)


def _padded_values(blocks: SparseSDFBlocks, padded: PaddedBlocks, neighbours: np.ndarray) -> np.ndarray:
    """[C, 11, 11, 11] float32 values of voxels -1..9 of blocks, from their neighbour rows [C, 27]."""
    m = padded.num_blocks
    out = np.empty((len(neighbours), _PAD, _PAD, _PAD), dtype=np.float32)
    target = {-1: slice(0, 1), 0: slice(1, 9), 1: slice(9, 11)}
    source = {-1: slice(7, 8), 0: slice(0, 8), 1: slice(0, 2)}
    for k, offset in enumerate(OFFSETS_27.tolist()):
        row = neighbours[:, k]
        to = (slice(None), *(target[o] for o in offset))
        exists = (row >= 0) & (row < m)
        if exists.all():
            out[to] = blocks.block_sdf[(row, *(source[o] for o in offset))]
            continue
        inside = np.zeros(len(row), dtype=bool)
        shell = row >= m
        inside[shell] = padded.shell_inside[row[shell] - m]
        out[to] = np.where(inside, np.float32(-1), np.float32(1))[:, None, None, None]
        out[(exists, *to[1:])] = blocks.block_sdf[(row[exists], *(source[o] for o in offset))]
    return out


def _vertices(
    blocks: SparseSDFBlocks, padded: PaddedBlocks, rows: np.ndarray, neighbours: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """One vertex on each grid edge between an inside and an outside voxel, and the cells that hold any.

    Returns:
        vertices [V, 3] float64 in voxels; normals [V, 3] float32 (zero where not known); reliable [V] bool, whether
        they are those of a distance function; edge_vertex [C + 1, 512, 3] int32, the vertex of edge (row, voxel, axis),
        its last row unused; cells [N] int64, 512 * row + voxel; cases [N] uint8.
    """
    edge_vertex = np.full((len(rows) + 1, STORAGE_BLOCK**3, 3), -1, dtype=np.int32)
    flat_edges = edge_vertex.reshape(-1)
    vertices, normals, reliable, cells, cases = [], [], [], [], []
    count = 0
    for start in range(0, len(rows), _CHUNK_BLOCKS):
        part = slice(start, min(start + _CHUNK_BLOCKS, len(rows)))
        values = _padded_values(blocks, padded, neighbours[part])
        inside = values[:, 1:10, 1:10, 1:10] < 0
        case = np.zeros((len(values), *(STORAGE_BLOCK,) * 3), dtype=np.uint8)
        for bit, (x, y, z) in enumerate(CORNERS.tolist()):
            case |= inside[:, x : x + 8, y : y + 8, z : z + 8].view(np.uint8) << np.uint8(bit)
        case = case.reshape(-1)
        active = np.flatnonzero((case != 0) & (case != 255))
        cells.append(active + start * STORAGE_BLOCK**3)
        cases.append(case[active])
        here = inside[:, :8, :8, :8]
        crossing = np.stack(
            [here != inside[:, 1:, :8, :8], here != inside[:, :8, 1:, :8], here != inside[:, :8, :8, 1:]], axis=-1
        )
        edges = np.flatnonzero(crossing)
        flat_edges[edges + start * STORAGE_BLOCK**3 * 3] = np.arange(count, count + len(edges), dtype=np.int32)
        count += len(edges)
        position, normal, known = _edge_roots(values, edges, blocks.band_voxels)
        block, voxel, axis = edges // 1536, edges // 3 % 512, edges % 3
        base = padded.coords[rows[part]][block] * STORAGE_BLOCK
        base = (base + np.stack([voxel >> 6, voxel >> 3 & 7, voxel & 7], axis=-1)).astype(np.float64)
        base[np.arange(len(axis)), axis] += position
        vertices.append(base)
        normals.append(normal)
        reliable.append(known)
    return (
        np.concatenate([np.zeros((0, 3)), *vertices]),
        np.concatenate([np.zeros((0, 3), dtype=np.float32), *normals]),
        np.concatenate([np.zeros(0, dtype=bool), *reliable]),
        edge_vertex,
        np.concatenate([np.zeros(0, dtype=np.int64), *cells]),
        np.concatenate([np.zeros(0, dtype=np.uint8), *cases]),
    )


def _edge_roots(
    values: np.ndarray, edges: np.ndarray, band_voxels: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Roots along edges (flat indices into [C, 8, 8, 8, 3]) of padded values, in (0, 1); unit gradients [N, 3] float32
    there, zero where a sample is outside the band; whether these are well known."""
    block, voxel, axis = edges // 1536, edges // 3 % 512, edges % 3
    strides = np.array([_PAD * _PAD, _PAD, 1])
    base = block * _PAD**3 + (voxel >> 6) * _PAD * _PAD + (voxel >> 3 & 7) * _PAD + (voxel & 7) + strides.sum()
    step = strides[axis]
    flat = values.reshape(-1)
    f0, f1, f2, f3 = (flat[base + k * step].astype(np.float64) for k in (-1, 0, 1, 2))
    usable = (np.abs(f0) < 1) & (np.abs(f1) < 1) & (np.abs(f2) < 1) & (np.abs(f3) < 1)
    # Lagrange's cubic through four samples is the chord less t (1 - t) / 6 times a mix of the two second differences;
    # near a kink one of them is large: limiting it by the other keeps the cubic from overshooting (as in ENO schemes)
    d1, d2 = f0 - 2 * f1 + f2, f1 - 2 * f2 + f3
    usable &= d1 * d2 > 0
    limit = np.where(usable, KINK_RATIO * np.minimum(np.abs(d1), np.abs(d2)), 0.0)
    d1, d2 = np.clip(d1, -limit, limit), np.clip(d2, -limit, limit)
    t = f1 / (f1 - f2)
    for _ in range(4):
        bend = (2 - t) * d1 + (1 + t) * d2
        value = (1 - t) * f1 + t * f2 - t * (1 - t) / 6 * bend
        slope = f2 - f1 - (1 - 2 * t) / 6 * bend - t * (1 - t) / 6 * (d2 - d1)
        safe = slope * (f2 - f1) > 0
        t = np.clip(np.where(safe, t - value / np.where(safe, slope, 1), t), 0, 1)
    first, first_error = _gradient(flat, base, strides, band_voxels)
    second, second_error = _gradient(flat, base + step, strides, band_voxels)
    known = (first_error < np.inf) & (second_error < np.inf)
    reliable = np.maximum(first_error, second_error) < GOOD_GRADIENT
    normal = (1 - t)[:, None] * first + t[:, None] * second
    # A distance function has gradients of length 1, but not where a kink of it (the medial axis, or the rim of a sharp
    # edge) lies between the samples. There differences to one side find the tangent plane on either side of the kink,
    # and the vertex is where the edge meets the plane that it is steepest against.
    kinked = np.flatnonzero(known & (np.maximum(first_error, second_error) > KINKED_GRADIENT))
    steepest = np.zeros(len(kinked))
    for origin, at in ((0, base[kinked]), (1, (base + step)[kinked])):
        gradient, error = _one_sided_gradient(flat, at, strides, band_voxels)
        rise = gradient[np.arange(len(at)), axis[kinked]] * np.sign(f2 - f1)[kinked]
        meet = origin - flat[at] * band_voxels / np.where(rise > 0, rise * np.sign(f2 - f1)[kinked], 1)
        good = (error < GOOD_GRADIENT) & (rise > steepest) & (meet > -EDGE_MARGIN) & (meet < 1 + EDGE_MARGIN)
        steepest[good] = rise[good]
        t[kinked[good]], normal[kinked[good]], reliable[kinked[good]] = meet[good], gradient[good], True
    t = np.clip(t, EDGE_MARGIN, 1 - EDGE_MARGIN)
    length = np.linalg.norm(normal, axis=1)
    known &= length > 0
    normal *= np.where(known, 1 / np.where(known, length, 1), 0)[:, None]
    return t, normal.astype(np.float32), reliable & known


def _gradient(
    flat: np.ndarray, at: np.ndarray, strides: np.ndarray, band_voxels: int
) -> tuple[np.ndarray, np.ndarray]:
    """Central differences [N, 3] of the distance in voxels; | |g| - 1 |, inf where a sample is outside the band."""
    gradient = np.empty((len(at), 3), dtype=np.float32)
    known = np.ones(len(at), dtype=bool)
    for k, stride in enumerate(strides.tolist()):
        after, before = flat[at + stride], flat[at - stride]
        gradient[:, k] = (after - before) * np.float32(band_voxels / 2)
        known &= (np.abs(after) < 1) & (np.abs(before) < 1)
    error = np.abs(np.sqrt((gradient * gradient).sum(axis=1)) - 1)
    return gradient, np.where(known, error, np.inf)


def _one_sided_gradient(
    flat: np.ndarray, at: np.ndarray, strides: np.ndarray, band_voxels: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of the eight gradients [N, 3] from differences to one side, the one whose length is closest to 1; | |g| - 1 |."""
    sides = np.empty((2, len(at), 3), dtype=np.float64)
    for k, stride in enumerate(strides.tolist()):
        sides[0, :, k] = flat[at] - flat[at - stride]
        sides[1, :, k] = flat[at + stride] - flat[at]
    sides *= band_voxels
    best, best_error = np.zeros((len(at), 3)), np.full(len(at), np.inf)
    for choice in CORNERS:
        gradient = sides[choice, :, np.arange(3)].T
        error = np.abs(np.linalg.norm(gradient, axis=1) - 1)
        better = error < best_error
        best[better], best_error[better] = gradient[better], error[better]
    return best, best_error


def _faces(
    rows: np.ndarray,
    neighbours: np.ndarray,
    num_rows: int,
    edge_vertex: np.ndarray,
    cells: np.ndarray,
    cases: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """[F, 3] int64 faces of the active cells, and the row of each in the table, [F] int16."""
    table = case_table()
    # row -> its place in `rows`; others go to the unused row
    compact = np.full(num_rows + 1, len(rows), dtype=np.int64)
    compact[rows] = np.arange(len(rows))
    corner_neighbours = compact[neighbours[:, [9 * x + 3 * y + z for x, y, z in (CORNERS + 1).tolist()]]]
    edge_offset = (EDGES[:, 1] * _CELL + EDGES[:, 2]) * _CELL + EDGES[:, 3]
    edge_offset = edge_offset * 3 + EDGES[:, 0]
    edge_grid = edge_vertex.reshape(-1, 8, 8, 8, 3)
    counts = np.diff(table.triangle_start)[cases]
    faces = np.empty((int(counts.sum()), 3), dtype=np.int64)
    table_rows = np.empty(len(faces), dtype=np.int16)
    done = 0
    for start in range(0, len(rows), _CHUNK_BLOCKS):
        stop = min(start + _CHUNK_BLOCKS, len(rows))
        first, last = np.searchsorted(cells, (start * 512, stop * 512))
        window = np.empty((stop - start, _CELL, _CELL, _CELL, 3), dtype=np.int32)
        for k, (x, y, z) in enumerate(CORNERS.tolist()):
            to = tuple(slice(8, 9) if o else slice(0, 8) for o in (x, y, z))
            source = tuple(slice(0, 1) if o else slice(0, 8) for o in (x, y, z))
            window[(slice(None), *to)] = edge_grid[(corner_neighbours[start:stop, k], *source)]
        cell, number = cells[first:last], counts[first:last]
        block, voxel = cell // 512 - start, cell % 512
        base = (((block * _CELL + (voxel >> 6)) * _CELL + (voxel >> 3 & 7)) * _CELL + (voxel & 7)) * 3
        ends = np.cumsum(number)
        within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - number, number)
        table_row = np.repeat(table.triangle_start[cases[first:last]], number) + within
        table_rows[done : done + len(table_row)] = table_row
        index = np.repeat(base, number)[:, None] + edge_offset[table.triangles[table_row]]
        faces[done : done + len(index)] = window.reshape(-1)[index]
        done += len(index)
    assert done == len(faces) and (done == 0 or faces.min() >= 0), "every edge of a case has its vertex"
    return faces, table_rows


def _balance_chords(vertices: np.ndarray, normals: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Move vertices along their normals so that the mean signed distance to the smooth surface vanishes.

    A triangle with its corners on a surface of second fundamental form II lies off it by sum(II(e, e)) / 24 on average,
    over its three sides e (linear interpolation of a quadratic); II(e, e) is e . (difference of the normals at its
    ends). Each vertex takes the area-weighted mean of its triangles' values, which keeps the total.
    """
    weight = np.zeros(len(vertices))
    total = np.zeros(len(vertices))
    for start in range(0, len(faces), _CHUNK_FACES):
        part = faces[start : start + _CHUNK_FACES]
        corner, normal = vertices[part], normals[part].astype(np.float64)
        side = np.roll(corner, -1, axis=1) - corner
        area = np.linalg.norm(np.cross(side[:, 0], side[:, 1]), axis=1)
        offset = (side * (np.roll(normal, -1, axis=1) - normal)).sum(axis=(1, 2)) / 24
        offset[(normal == 0).all(axis=2).any(axis=1)] = 0
        low, high = int(part.min()), int(part.max()) + 1  # faces are ordered like their vertices, nearly
        local = (part - low).reshape(-1)
        weight[low:high] += np.bincount(local, np.repeat(area, 3), high - low)
        total[low:high] += np.bincount(local, np.repeat(area * offset, 3), high - low)
    shift = np.clip(total / np.maximum(weight, 1e-30), -MAX_CORRECTION_VOXELS, MAX_CORRECTION_VOXELS)
    return vertices + shift[:, None] * normals
