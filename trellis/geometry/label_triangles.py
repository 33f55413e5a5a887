"""Triangles from the quads of a SurfaceNets mesh: cut along a diagonal, or around a centre where the surface bends."""

from __future__ import annotations

import numpy as np

from trellis.geometry.label_smoothing import Sheets

SPLIT_ABOVE_DEG = 20.0
"""A quad gets a centre where two triangles would make a larger angle with each other or across an edge."""
SMALL_LABEL_QUADS = 3000
"""Labels of fewer quads get a centre in each: creases along junctions are a large share of their edges, and at a given
resolution of the SDF their voxels come out largest."""
LEAST_COSINE = 0.5
"""Between the normals of a split quad and of its triangles; below, a centre would fold the surface."""


def quad_centres(
    moved: np.ndarray, points: np.ndarray, quads: np.ndarray, sheets: Sheets, *, reach: float
) -> np.ndarray:
    """A point in the middle of each quad, on the smooth surface through the vertices around it.

    The mean of the corners lies below a bent surface by half of what a corner's Laplacian is, to second order; that is
    added. Corners on a junction, where the surface ends, add nothing. A centre needs no cell of its own: the triangles
    of a quad stay between the voxel layers on its two sides as long as all its points are within `reach` of the middle
    between them, and along the layers it stays above the quad.

    Args:
        moved: [V, 3] float32, displacements from the cell centres `points` [V, 3] float64; quads: [Q, 4] int64.
        reach: largest displacement along each axis from the middle of the edge between the quad's two voxels.

    Returns:
        [Q, 3] float64.
    """
    at = points + moved
    bend = sheets.laplacian @ at
    bend[sheets.junction] = 0
    centre = sheets.corners @ (at + bend / 2) / 4
    middle = (points[quads[:, 0]] + points[quads[:, 2]]) / 2
    return np.clip(centre, middle - reach, middle + reach)


def triangulate(
    points: np.ndarray, quads: np.ndarray, sides: np.ndarray, sheets: Sheets, centres: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Triangles of all quads: four around a centre at junctions, in small labels and where the surface bends, else two.

    Args:
        points: [V, 3] float64; quads: [Q, 4] int64; sides: [Q, 2] int64, 0 for background;
        centres: [Q, 3] float64, see `quad_centres`.

    Returns:
        points [V + C, 3] float64 with the centres that are used behind the vertices; faces [F, 3] int64, oriented as
        their quads; sides of the faces [F, 2] int64.
    """
    cut, cosine = cut_quads(points, quads)
    quads_of = np.bincount(sides.reshape(-1))
    quads_of[0] = SMALL_LABEL_QUADS
    split = cosine < np.cos(np.radians(SPLIT_ABOVE_DEG))
    split |= sheets.junction[quads].any(axis=1) | (quads_of[sides].min(axis=1) < SMALL_LABEL_QUADS)
    chosen = np.flatnonzero(split)
    chosen = chosen[_star_shaped(points, quads[chosen], centres[chosen])]
    split[:] = False
    split[chosen] = True
    centre = len(points) + np.arange(len(chosen))
    ring = quads[chosen]
    around = np.stack([np.stack([ring[:, i], ring[:, (i + 1) % 4], centre], axis=1) for i in range(4)], axis=1)
    faces = np.concatenate([cut[~split].reshape(-1, 3), around.reshape(-1, 3)])
    sides = np.concatenate([np.repeat(sides[~split], 2, axis=0), np.repeat(sides[chosen], 4, axis=0)])
    return np.concatenate([points, centres[chosen]]), faces, sides


def _star_shaped(points: np.ndarray, quads: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """[Q] bool: all four triangles around the centre look to the side to which the quad looks."""
    ring = [points[quads[:, i]] - centres for i in range(4)]
    whole = np.cross(ring[2] - ring[0], ring[3] - ring[1])
    length = np.linalg.norm(whole, axis=1)
    good = length > 0
    for i in range(4):
        normal = np.cross(ring[i], ring[(i + 1) % 4])
        along = np.einsum("qi,qi->q", normal, whole)
        good &= along > LEAST_COSINE * length * np.linalg.norm(normal, axis=1)
    return good


def cut_quads(points: np.ndarray, quads: np.ndarray, *, sweeps: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Each quad cut along the diagonal that folds the surface least, its neighbours taken into account.

    Args:
        points: [V, 3] float64; quads: [Q, 4] int64.
        sweeps: how often the choices are revised; in each, a fixed random half of the quads may change.

    Returns:
        [Q, 2, 3] int64, the two triangles of a quad, oriented as the quad; and the cosine of the largest angle between
        normals across one of their edges, [Q] float32, edges of more or fewer than two triangles left out.
    """
    cuts = (((0, 1, 2), (0, 2, 3)), ((0, 1, 3), (1, 2, 3)))
    beside = ((0, 0, 1, 1), (0, 1, 1, 0))  # which triangle of each cut holds the quad's side 0-1, 1-2, 2-3, 3-0
    p = points.astype(np.float32)[quads]
    p = p - p[:, :1]  # float32 normals need small numbers
    normals = np.empty((len(quads), 2, 2, 3), dtype=np.float32)
    for cut, triangles in enumerate(cuts):
        for i, (a, b, c) in enumerate(triangles):
            n = np.cross(p[:, b] - p[:, a], p[:, c] - p[:, a])
            normals[:, cut, i] = n / np.maximum(np.linalg.norm(n, axis=1, keepdims=True), 1e-12)
    at_side = np.stack([normals[:, cut, list(beside[cut])] for cut in (0, 1)], axis=1)  # [Q, cut, side, 3]
    own_fold = _fold(normals[:, :, 0], normals[:, :, 1])
    choice = own_fold[:, 1] < own_fold[:, 0]
    quad, side = _neighbours(quads, len(points))
    has_neighbour = quad >= 0
    everyone = np.arange(len(quads))
    random = np.random.default_rng(0)
    for _ in range(sweeps):
        current = at_side[everyone, choice.astype(np.int64)]
        across = current[quad, side]
        cost = [own_fold[:, cut] + (_fold(at_side[:, cut], across) * has_neighbour).sum(axis=1) for cut in (0, 1)]
        better = cost[1] < cost[0]
        choice = np.where(random.random(len(quads)) < 0.5, better, choice)
    table = np.array(cuts)[choice.astype(np.int64)]  # [Q, 2, 3]
    current = at_side[everyone, choice.astype(np.int64)]
    folds = (_fold(current, current[quad, side]) * has_neighbour).max(axis=1)
    own = np.where(choice, own_fold[:, 1], own_fold[:, 0])
    cosine = 1 - np.sqrt(np.maximum(folds, own))
    return np.take_along_axis(quads, table.reshape(len(quads), 6), axis=1).reshape(-1, 2, 3), cosine


def _fold(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Cost of the angle between unit normals, growing as its fourth power: a few sharp edges are what is seen."""
    return (1 - np.einsum("...i,...i->...", first, second)) ** 2


def _neighbours(quads: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Across each side of each quad: the other quad [Q, 4] and its side [Q, 4]; -1 where there is not exactly one."""
    n = len(quads)
    a = np.concatenate([quads[:, i] for i in range(4)])
    b = np.concatenate([quads[:, (i + 1) % 4] for i in range(4)])
    keys = np.minimum(a, b) * count + np.maximum(a, b)
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    first = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    uses = np.diff(np.r_[first, len(ordered)])
    pairs = first[uses == 2]
    one, two = order[pairs], order[pairs + 1]
    quad = np.full(4 * n, -1, dtype=np.int64)
    side = np.full(4 * n, -1, dtype=np.int64)
    quad[one], quad[two] = two % n, one % n
    side[one], side[two] = two // n, one // n
    return quad.reshape(4, n).T, side.reshape(4, n).T
