"""Volume correction of smoothed label surfaces: every component gets back the volume of its voxels."""

from __future__ import annotations

import numpy as np

from trellis.geometry.label_smoothing import Sheets
from trellis.geometry.label_triangles import quad_centres

MOST_STEPS = 10
"""Of Newton's method; a volume of many components of a voxel or two takes eight, others two to four."""
GOOD_ENOUGH = 1e-3
"""Mean relative error of the components' volumes at which the steps end."""
CHUNK_VOXELS = 1 << 20
"""Voxels that are looked at together where that takes a copy of them in a larger type."""


def components_beside(
    data: np.ndarray, points: np.ndarray, quads: np.ndarray, sides: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The component of its label that each side of a quad belongs to; voxels of one label hang together by faces.

    Args:
        data: [X, Y, Z] integers, 0 for background; points: [V, 3] float64, cell centres in its index space;
        quads: [Q, 4] int64; sides: [Q, 2] int64, the labels on both sides of a quad.

    Returns:
        [Q, 2] int32, 0 for background and components from 1, and the voxels of each component, [n + 1] int64.
    """
    from scipy import ndimage

    component = np.zeros(data.shape, dtype=np.int32)
    count = 0
    for label, box in enumerate(ndimage.find_objects(data), start=1):
        if box is None:
            continue
        mask = data[box] == label
        found, here = ndimage.label(mask)
        found += count
        np.copyto(component[box], found, where=mask)
        count += here
    # opposite corners: their middle is the middle of the edge between the two voxels that the quad parts
    middle = (points[quads[:, 0]] + points[quads[:, 2]]) / 2
    low = tuple(np.floor(middle + 0.25).astype(np.int64).T)
    high = tuple(np.ceil(middle - 0.25).astype(np.int64).T)
    one, other = component[low], component[high]
    first = data[low] == sides[:, 0]
    beside = np.stack([np.where(first, one, other), np.where(first, other, one)], axis=1)
    return beside, count_values(component, count + 1)


def count_values(data: np.ndarray, length: int) -> np.ndarray:
    """[length] int64: how often each of 0 to length - 1 occurs; as np.bincount, which works on a copy in int64."""
    flat, counts = data.ravel(order="K"), np.zeros(length, dtype=np.int64)
    for start in range(0, flat.size, CHUNK_VOXELS):
        counts += np.bincount(flat[start : start + CHUNK_VOXELS], minlength=length)
    return counts


def restore_volumes(
    moved: np.ndarray,
    points: np.ndarray,
    quads: np.ndarray,
    beside: np.ndarray,
    voxels: np.ndarray,
    sheets: Sheets,
    *,
    reach: float,
) -> np.ndarray:
    """Displacements of vertices after which each component encloses as much as its voxels, as far as cells allow.

    Each component gets a pressure, background has none, and each quad moves along its normal by the difference of the
    pressures on its two sides: of all shifts that give the volumes back it is the smallest in the mean square over
    the area. A boundary between two labels so stays one boundary. Newton's method: the volumes of the curved, clamped
    surface are measured after each step.

    Args:
        moved: [V, 3] float32, displacements from the cell centres `points` [V, 3] float64; quads: [Q, 4] int64.
        beside, voxels: from `components_beside`.
        sheets: from `sheets_of`.
        reach: bound of displacements along each axis.

    Returns:
        [V, 3] float32.
    """
    from scipy import sparse
    from scipy.sparse.linalg import cg

    count = len(voxels)
    pairs, pair = np.unique(beside[:, 0].astype(np.int64) * count + beside[:, 1], return_inverse=True)
    one, other = np.divmod(pairs, count)
    around = sheets.corners.T.tocsr()
    boost, before = np.ones(count), np.zeros(count)
    for step in range(MOST_STEPS):
        at = points + moved
        normal = np.cross(at[quads[:, 2]] - at[quads[:, 0]], at[quads[:, 3]] - at[quads[:, 1]])  # twice the area
        # the cone from the origin over a quad's four triangles around its centre
        cone = np.einsum("qi,qi->q", quad_centres(moved, points, quads, sheets, reach=reach), normal) / 6
        of_pair = np.bincount(pair, weights=cone, minlength=len(pairs))
        missing = voxels - np.bincount(one, of_pair, count) + np.bincount(other, of_pair, count)
        missing[0] = 0
        if np.abs(missing[1:] / voxels[1:]).mean() < GOOD_ENOUGH:
            break
        if step:
            # corners and clamped vertices give less than area times shift: what the last step gave tells how much less
            given = np.where(np.abs(before - missing) > 0.1 * np.abs(before), before - missing, before)
            boost = np.clip(boost * np.clip(before / np.where(given == 0, 1, given), 0.5, 4), 0.5, 10)
        before = missing
        size = np.linalg.norm(normal, axis=1)
        area = np.bincount(pair, weights=size, minlength=len(pairs)) / 2
        stiffness = sparse.coo_matrix(
            (np.concatenate([area, area, -area, -area]),
             (np.concatenate([one, other, one, other]), np.concatenate([one, other, other, one]))),
            shape=(count, count),
        ).tocsr()[1:, 1:]  # fmt: skip
        inverse = 1 / np.maximum(stiffness.diagonal(), 1e-6)
        pressure = np.zeros(count)
        pressure[1:], _ = cg(stiffness, (boost * missing)[1:], rtol=1e-3, maxiter=50, M=sparse.diags(inverse))
        push = ((pressure[one] - pressure[other])[pair, None] * normal).astype(np.float32)
        shift = (around @ push) / np.maximum(around @ size.astype(np.float32), 1e-6)[:, None]
        moved = np.clip(moved + shift, -reach, reach)
    return moved
