"""Sharp edges and corners put back into a marching-cubes mesh, which cuts them off by up to a voxel.

After Kobbelt, Botsch, Schwanecke & Seidel, Feature sensitive surface extraction from volume data, SIGGRAPH 2001: in a
cell whose normals differ much, the loop of its surface is filled by a fan around the point closest to all tangent
planes, and an edge between two such fans is turned so that it runs along the feature.
"""

from __future__ import annotations

import numpy as np

from trellis.geometry.mc_table import case_table

_SHARP_COSINE = 0.85
"""Normals of one cell differ by more than 32 degrees: a smooth surface needs a radius below 3 voxels for that."""
_RANK_LIMIT = 0.1
"""Eigenvalues below this share of the largest are directions along the feature, where the planes say nothing."""
_MAX_OUTSIDE = 1.0
"""A feature point farther outside its cell (voxels) is not believed; tips without a voxel centre lie outside a bit."""
_PULL = 2e-3
"""Feature points go this share of the way to the middle of their loop, so that no two vertices come to lie together."""
_CHUNK_FACES = 1 << 20


def sharpen(
    vertices: np.ndarray, normals: np.ndarray, reliable: np.ndarray, faces: np.ndarray, table_rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Replace the triangles of loops around a feature by fans, and turn the edges between the fans.

    The mesh stays closed and manifold: a fan has the border of the loop that it replaces, and turning the edge between
    two fans keeps theirs. Fans that share two edges are left alone, since both turned would be one edge twice.

    Args:
        vertices: [V, 3] float64 in voxels, on grid edges.
        normals: [V, 3] float32; reliable: [V] bool, whether the normal is known well.
        faces: [F, 3] int64, the triangles of a loop in consecutive rows in the order of the table.
        table_rows: [F] row of each triangle in the case table.

    Returns:
        vertices, normals and faces; the normals of new vertices are zero.
    """
    loops, first_rows = _sharp_loops(normals, reliable, faces, table_rows)
    if not len(loops):
        return vertices, normals, faces
    table = case_table()
    corner = table.loop_corner[loops].astype(np.int64)
    used = corner >= 0
    ring = faces.reshape(-1)[first_rows[:, None] * 3 + np.maximum(corner, 0)]
    centre, believed = _feature_points(vertices, normals, reliable, ring, used)
    believed &= ~_folds_over(vertices, normals, ring, used, centre)
    loops, first_rows, ring, used, centre = (x[believed] for x in (loops, first_rows, ring, used, centre))
    if not len(loops):
        return vertices, normals, faces
    length = used.sum(axis=1)
    rows = np.repeat(first_rows, length - 2)
    rows += np.arange(len(rows)) - np.repeat(np.cumsum(length - 2) - (length - 2), length - 2)
    keep = np.ones(len(faces), dtype=bool)
    keep[rows] = False
    owner, place = np.nonzero(used)
    start, end = ring[owner, place], ring[owner, (place + 1) % length[owner]]
    fans = np.stack([start, end, len(vertices) + owner], axis=-1)
    vertices = np.concatenate([vertices, centre])
    fans = _turn_edges(vertices, normals, fans)
    normals = np.concatenate([normals, np.zeros_like(centre, dtype=normals.dtype)])
    return vertices, normals, np.concatenate([faces[keep], fans])


def _sharp_loops(
    normals: np.ndarray, reliable: np.ndarray, faces: np.ndarray, table_rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Loops (of the table) that hold a triangle with two well-known normals far apart, and their first faces."""
    table = case_table()
    found = []
    for start in range(0, len(faces), _CHUNK_FACES):
        part = faces[start : start + _CHUNK_FACES]
        normal = [normals[part[:, k]] for k in range(3)]
        known = [reliable[part[:, k]] for k in range(3)]
        sharp = np.zeros(len(part), dtype=bool)
        for i, j in ((0, 1), (1, 2), (2, 0)):
            sharp |= known[i] & known[j] & (np.einsum("ij,ij->i", normal[i], normal[j]) < _SHARP_COSINE)
        found.append(np.flatnonzero(sharp) + start)
    rows = np.concatenate(found) if found else np.zeros(0, dtype=np.int64)
    loop = table.loop_of_triangle[table_rows[rows]]
    first = rows - (table_rows[rows] - table.loop_triangle[loop])
    first, index = np.unique(first, return_index=True)
    return loop[index], first


def _feature_points(
    vertices: np.ndarray, normals: np.ndarray, reliable: np.ndarray, ring: np.ndarray, used: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Points [L, 3] closest to the tangent planes at rings [L, 7] of vertices; whether they can be used."""
    position = vertices[ring]
    weight = used.astype(np.float64)
    middle = (position * weight[:, :, None]).sum(axis=1) / weight.sum(axis=1)[:, None]
    normal = normals[ring].astype(np.float64) * (used & reliable[ring])[:, :, None]
    height = (normal * (position - middle[:, None])).sum(axis=2)
    values, vectors = np.linalg.eigh(np.einsum("lki,lkj->lij", normal, normal))
    solid = values > _RANK_LIMIT * values[:, -1:]
    along = np.einsum("lij,li->lj", vectors, np.einsum("lki,lk->li", normal, height))
    along = np.where(solid, along / np.where(solid, values, 1), 0)
    point = middle + np.einsum("lij,lj->li", vectors, along)
    low = np.floor(np.where(used[:, :, None], position, np.inf).min(axis=1))
    near = np.abs(point - np.clip(point, low, low + 1)).max(axis=1) < _MAX_OUTSIDE
    point += _PULL * (middle - point)
    _, number, count = np.unique(np.round(point, 6), axis=0, return_inverse=True, return_counts=True)
    return point, near & (count[number.reshape(-1)] == 1)


def _folds_over(
    vertices: np.ndarray, normals: np.ndarray, ring: np.ndarray, used: np.ndarray, centre: np.ndarray
) -> np.ndarray:
    """[L] bool, whether a triangle of the fan around a centre faces away from the normals of its other two corners."""
    length = used.sum(axis=1)
    folds = np.zeros(len(ring), dtype=bool)
    for k in range(ring.shape[1]):
        a, b = ring[:, k], ring[np.arange(len(ring)), (k + 1) % length]
        facing = np.cross(vertices[b] - vertices[a], centre - vertices[a])
        folds |= used[:, k] & ((facing * (normals[a] + normals[b])).sum(axis=1) < 0)
    return folds


def _turn_edges(vertices: np.ndarray, normals: np.ndarray, fans: np.ndarray) -> np.ndarray:
    """Fan triangles (a, b, c1) and (b, a, c2) become (c1, a, c2) and (c2, b, c1) wherever that does not fold over."""
    low, high = fans[:, :2].min(axis=1), fans[:, :2].max(axis=1)
    order = np.lexsort((high, low))
    same = (low[order[1:]] == low[order[:-1]]) & (high[order[1:]] == high[order[:-1]])
    one, two = order[:-1][same], order[1:][same]
    a, b, c1, c2 = fans[one, 0], fans[one, 1], fans[one, 2], fans[two, 2]
    pair = np.stack([np.minimum(c1, c2), np.maximum(c1, c2)], axis=-1)
    _, number, count = np.unique(pair, axis=0, return_inverse=True, return_counts=True)
    turn = count[number.reshape(-1)] == 1
    # each new triangle keeps one vertex of the old edge, and must face as the surface does there
    for at, p, q in ((a, c1, c2), (b, c2, c1)):
        facing = np.cross(vertices[at] - vertices[p], vertices[q] - vertices[p])
        turn &= (facing * normals[at]).sum(axis=1) > 0
    fans = fans.copy()
    fans[one[turn]] = np.stack([c1, a, c2], axis=-1)[turn]
    fans[two[turn]] = np.stack([c2, b, c1], axis=-1)[turn]
    return fans
