"""Centres of quads, the choice of triangles and the volumes of components."""

import numpy as np
import pytest

from trellis.geometry.label_smoothing import sheets_of
from trellis.geometry.label_triangles import quad_centres, triangulate
from trellis.geometry.label_volumes import components_beside, restore_volumes


def sheet(n: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """A flat sheet of n^2 vertices at z = 0.5, x and y at half integers, and its quads."""
    i, j = np.meshgrid(np.arange(n), np.arange(n), indexing="ij")
    points = np.stack([i + 0.5, j + 0.5, np.full(i.shape, 0.5)], axis=-1).reshape(-1, 3)
    at = i * n + j
    quads = np.stack([at[:-1, :-1], at[1:, :-1], at[1:, 1:], at[:-1, 1:]], axis=-1).reshape(-1, 4)
    return points, quads


def test_centres_lie_on_the_quadric_through_the_corners():
    points, quads = sheet()
    sheets = sheets_of(quads, len(points))

    def height(p: np.ndarray) -> np.ndarray:
        x, y = p[:, 0] - 5.7, p[:, 1] - 6.4
        return 0.012 * x * x - 0.007 * y * y + 0.009 * x * y + 0.01 * x

    moved = np.zeros_like(points, dtype=np.float32)
    moved[:, 2] = height(points)
    centres = quad_centres(moved, points, quads, sheets, reach=0.499)
    inner = ((points[quads] > 1).all(axis=(1, 2), where=[True, True, False])) & (
        (points[quads] < 11).all(axis=(1, 2), where=[True, True, False])
    )
    assert inner.sum() > 50
    np.testing.assert_allclose(centres[inner, 2] - 0.5, height(centres[inner]), atol=1e-5)
    assert np.abs((points + moved)[quads].mean(axis=1)[inner, 2] - centres[inner, 2]).max() > 1e-3  # the mean is off
    assert (np.abs(quad_centres(moved, points, quads, sheets, reach=0.1)[:, 2] - 0.5) <= 0.1).all()


def test_quads_get_a_centre_where_the_surface_bends_and_none_where_that_would_fold_it():
    points, quads = sheet(60)  # 3481 quads: the label is not a small one
    sheets = sheets_of(quads, len(points))
    sides = np.tile([0, 1], (len(quads), 1))
    flat = (points[quads[:, 0]] + points[quads[:, 2]]) / 2
    vertices, faces, _ = triangulate(points, quads, sides, sheets, flat)
    assert len(vertices) == len(points) and len(faces) == 2 * len(quads)

    folded = points.copy()
    folded[:, 2] += 0.45 * np.maximum(points[:, 0] - 29.5, 0)  # a fold of 24 degrees
    centres = folded[quads].mean(axis=1)
    vertices, faces, face_sides = triangulate(folded, quads, sides, sheets, centres)
    added = vertices[len(points) :]
    assert len(added) == 2 * 59 and (np.abs(added[:, 0] - 29.5) < 0.6).all()
    assert len(faces) == 2 * len(quads) + 2 * len(added) and (face_sides == [0, 1]).all()
    a, b, c = np.moveaxis(vertices[faces], 1, 0)
    assert (np.cross(b - a, c - a)[:, 2] > 0).all()  # oriented as the quads
    assert np.cross(b - a, c - a)[:, 2].sum() / 2 == pytest.approx(59 * 59)  # and covering them once

    centres[:, 0] += 0.8  # outside its quad
    vertices, faces, _ = triangulate(folded, quads, sides, sheets, centres)
    assert len(vertices) == len(points) and len(faces) == 2 * len(quads)


def test_volumes_go_to_the_components_that_lost_them_and_shared_boundaries_stay_one():
    """Two boxes side by side, and a third one apart; squeezed, each gets its own volume back."""
    from trellis.geometry.label_surfaces import _surface_nets

    data = np.zeros((16, 10, 10), np.uint8)
    data[1:6, 2:8, 2:8], data[6:9, 2:8, 2:8], data[11:14, 3:6, 3:6] = 1, 2, 2
    points, quads, sides = _surface_nets(data, 2)
    beside, voxels = components_beside(data, points, quads, sides)
    np.testing.assert_array_equal(voxels[1:], [5 * 36, 3 * 36, 27])
    assert (sides[beside[:, 0] == 1, 0] == 1).all() and (sides[beside[:, 0] > 1, 0] == 2).all()
    assert (sides[beside[:, 1] > 1, 1] == 2).all() and ((beside == 0) == (sides == 0)).all()
    sheets = sheets_of(quads, len(points))
    moved = np.random.default_rng(0).uniform(-0.3, 0.1, points.shape).astype(np.float32)

    def volumes(moved: np.ndarray) -> np.ndarray:
        centres = quad_centres(moved, points, quads, sheets, reach=0.499)
        at, ring = points + moved, quads
        total = np.zeros(len(voxels))
        for i in range(4):
            a, b = at[ring[:, i]], at[ring[:, (i + 1) % 4]]
            cone = np.einsum("qi,qi->q", a, np.cross(b, centres)) / 6
            total += np.bincount(beside[:, 0], cone, len(voxels)) - np.bincount(beside[:, 1], cone, len(voxels))
        return total[1:]

    assert np.abs(volumes(moved) / voxels[1:] - 1).max() > 0.02
    restored = restore_volumes(moved, points, quads, beside, voxels, sheets, reach=0.499)
    np.testing.assert_allclose(volumes(restored), voxels[1:], rtol=3e-3)
    assert np.abs(restored).max() <= 0.499
