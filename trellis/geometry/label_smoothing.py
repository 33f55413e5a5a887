"""Fairing of a SurfaceNets mesh under constraints: the smoothest surface that keeps every voxel centre on its side."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

SHRINKAGE_AVERAGES = 60
"""Rounds of averaging over neighbours that tell shrinkage of a whole neighbourhood from the smoothing of stairs."""
ALLOWED_SHRINKAGE_VOXELS = 0.1
"""What a neighbourhood may move as a whole; more is taken back, and what is left over by `label_volumes`."""


class Sheets(NamedTuple):
    """How the vertices of a SurfaceNets mesh hang together.

    Attributes:
        laplacian: the umbrella Laplacian (identity minus mean of neighbours) as CSR [V, V] float32. Rows of vertices on
            a junction see their neighbours along the junction only.
        transposed: its transpose, CSR. junction: [V] bool, vertices on an edge of more than two quads.
        corners: CSR [Q, V] float32, 1 at the four vertices of a quad.
    """

    laplacian: Any
    transposed: Any
    junction: np.ndarray
    corners: Any


def fair_displacements(
    points: np.ndarray, quads: np.ndarray, sides: np.ndarray, sheets: Sheets, *, iterations: int, reach: float
) -> np.ndarray:
    """Where vertices move inside their cells for the smallest bending energy.

    Minimises the sum of |L x|^2 (thin plate, umbrella Laplacian L) and then of |L x|^3, by reweighting, subject to
    |x - cell centre| <= reach along each axis, by accelerated projected gradient (Beck and Teboulle 2009, with the
    restart of O'Donoghue and Candes 2015).
    Tension (a Laplacian energy) would shrink the shape and fold it along the constraints; bending does not.

    Where three or more sheets meet, a vertex is faired along the curve of the junction only, and the sheets end
    there freely: a crease that labels must have then stays on the junction and does not bend the sheets beside it.

    Bending energy too is least for a shape of no size, so thin and tiny structures would vanish within the boxes. The
    local mean of the displacement along the normal is therefore limited at the end: stairs move to and fro around
    their surface and keep their smoothing, while what moved inward as a whole grows back.

    Args:
        points: [V, 3] float64, cell centres in voxel index space; quads: [Q, 4] int64; sides: [Q, 2] int64, the labels
            on both sides of a quad; sheets: from `sheets_of`.
        iterations: gradient steps, and two thirds as many again after reweighting; 30 are close to the minimum.
        reach: half the side of a vertex's box in voxels; below 0.5 no voxel centre changes sides.

    Returns:
        [V, 3] float32, displacements from `points`.
    """
    laplacian, transposed, junction, _ = sheets
    # offsets from the cell centres, and their Laplacian by itself: float32 has digits to spare in a volume of any size
    of_centres = laplacian @ points.astype(np.float32)
    step = 1 / (1.15 * _largest_eigenvalue(laplacian, transposed))
    x = np.zeros(points.shape, dtype=np.float32)
    weight = np.ones((len(points), 1), dtype=np.float32)
    for steps in (iterations, (2 * iterations) // 3):
        y, momentum, rate = x, 1.0, np.float32(step / weight.max())
        for _ in range(steps):
            following = np.clip(y - rate * (transposed @ (weight * (laplacian @ y + of_centres))), -reach, reach)
            change = following - x
            if np.vdot(y - following, change) > 0:
                momentum = 1.0
            faster = (1 + np.sqrt(1 + 4 * momentum * momentum)) / 2
            y = following + np.float32((momentum - 1) / faster) * change
            x, momentum = following, faster
        bending = np.linalg.norm(laplacian @ x + of_centres, axis=1, keepdims=True)
        typical = np.sqrt(np.mean(bending**2, dtype=np.float64)) + 1e-12
        weight = np.clip(bending / np.float32(typical), 0.3, 3)  # |L x|^3 in the second round: sharp bends count more
    return np.clip(x - _shrinkage(x, points, quads, sides, laplacian, junction), -reach, reach)


def _shrinkage(
    moved: np.ndarray, points: np.ndarray, quads: np.ndarray, sides: np.ndarray, laplacian: Any, junction: np.ndarray
) -> np.ndarray:
    """What to take back of displacements `moved` [V, 3]: their local mean along the stairs' normals, so far as it is
    above ALLOWED_SHRINKAGE_VOXELS; [V, 3] float32."""
    a, b, c, d = (points[quads[:, i]].astype(np.float32) for i in range(4))
    normal = np.cross(c - a, d - b)
    normal[sides[:, 0] > sides[:, 1]] *= -1  # one orientation per sheet
    at_vertex = np.stack(
        [np.bincount(quads.reshape(-1), weights=np.repeat(normal[:, i], 4), minlength=len(points)) for i in range(3)],
        axis=1,
    ).astype(np.float32)
    length = np.linalg.norm(at_vertex, axis=1)
    known = ((length > 1e-3) & ~junction).astype(np.float32)
    at_vertex *= (known / np.maximum(length, 1e-3))[:, None]
    known = known[:, None]
    sums = np.concatenate([np.einsum("vi,vi->v", moved, at_vertex)[:, None], known], axis=1)
    for _ in range(SHRINKAGE_AVERAGES):
        # half the vertex, half the mean of its neighbours; vertices without a normal have no say
        sums = known * (sums - 0.5 * (laplacian @ sums))
    mean = sums[:, 0] / np.maximum(sums[:, 1], 1e-6)
    excess = np.sign(mean) * np.maximum(np.abs(mean) - ALLOWED_SHRINKAGE_VOXELS, 0)
    return excess[:, None] * at_vertex


def sheets_of(quads: np.ndarray, count: int) -> Sheets:
    """The neighbourhoods of `count` vertices of quads [Q, 4] int64."""
    from scipy import sparse

    sides = [(0, 1), (1, 2), (2, 3), (3, 0)]
    keys = np.concatenate(
        [np.minimum(quads[:, a], quads[:, b]) * count + np.maximum(quads[:, a], quads[:, b]) for a, b in sides]
    )
    keys.sort()
    first = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]])
    uses = np.diff(np.r_[first, len(keys)])
    a, b = np.divmod(keys[first], count)
    on_junction = uses > 2
    junction = np.zeros(count, dtype=bool)
    junction[a[on_junction]] = True
    junction[b[on_junction]] = True
    row, column = np.concatenate([a, b]), np.concatenate([b, a])
    keep = ~junction[row] | np.tile(on_junction, 2)
    row, column = row[keep], column[keep]
    degree = np.bincount(row, minlength=count)
    weight = (-1.0 / degree[row]).astype(np.float32)
    diagonal = np.flatnonzero(degree)
    laplacian = sparse.csr_matrix(
        (
            np.concatenate([weight, np.ones(len(diagonal), np.float32)]),
            (np.concatenate([row, diagonal]), np.concatenate([column, diagonal])),
        ),
        shape=(count, count),
    )
    corners = sparse.csr_matrix(
        (np.ones(quads.size, np.float32), quads.reshape(-1), np.arange(0, quads.size + 1, 4)),
        shape=(len(quads), count),
    )
    return Sheets(laplacian, laplacian.T.tocsr(), junction, corners)


def _largest_eigenvalue(laplacian: Any, transposed: Any) -> float:
    """Of L^T L, by power iteration from a fixed start."""
    vector = np.random.default_rng(0).standard_normal((laplacian.shape[1], 1)).astype(np.float32)
    size = 1.0
    for _ in range(20):
        vector = transposed @ (laplacian @ vector)
        size = float(np.linalg.norm(vector))
        vector /= max(size, 1e-30)
    return max(size, 1e-6)
