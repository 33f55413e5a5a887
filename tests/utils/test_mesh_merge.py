"""Merging equal vertices against a dictionary, with signed zeros, NaN, nothing at all, and hashes that collide."""

from __future__ import annotations

import numpy as np
import pytest

from trellis.utils import mesh_merge
from trellis.utils.mesh_merge import merge_by_group, merge_identical_vertices


def by_dictionary(vertices, faces):
    places, number, kept = {}, [], []
    for row in vertices:
        key = tuple(float(x) + 0.0 for x in row)
        if any(np.isnan(key)) or key not in places:
            places[key] = len(kept)
            kept.append(row)
            number.append(len(kept) - 1)
        else:
            number.append(places[key])
    return np.array(kept), np.array(number)[faces]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("collide", [False, True])
def test_against_a_dictionary(dtype, collide, monkeypatch):
    if collide:
        monkeypatch.setattr(mesh_merge, "_ODD", np.array([1, 1, 1], dtype=np.uint64))  # (a, b, c) as (c, a, b)
    rng = np.random.default_rng(0)
    vertices = rng.integers(-2, 3, (300, 3)).astype(dtype)
    vertices[7] = [0.0, -0.0, 0.0]
    vertices[[11, 40]] = np.nan
    vertices = np.where(rng.random(vertices.shape) < 0.5, vertices, -vertices[::-1] * dtype(0.1))
    faces = rng.integers(0, 300, (99, 3))
    expected = by_dictionary(vertices, faces)
    merged, renumbered = merge_identical_vertices(vertices, faces)
    assert merged.dtype == dtype and renumbered.dtype == np.int64 and 30 < len(merged) < 300
    np.testing.assert_array_equal(merged, expected[0])
    np.testing.assert_array_equal(renumbered, expected[1])


def test_nothing_and_whole_numbers():
    merged, faces = merge_identical_vertices(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.int64))
    assert merged.shape == (0, 3) and faces.shape == (0, 3)
    merged, faces = merge_identical_vertices([[1, 2, 3], [1, 2, 3], [0, 2, 3]], np.array([[0, 1, 2]]))
    assert merged.dtype == np.float64 and faces.tolist() == [[0, 0, 1]]


def test_groups_keep_the_first_in_order_of_appearance():
    vertices = np.arange(12.0).reshape(4, 3)
    merged, faces = merge_by_group(vertices, np.array([[0, 1, 2], [3, 2, 1]]), np.array([5, 2, 5, 0]))
    np.testing.assert_array_equal(merged, vertices[[0, 1, 3]])
    assert faces.tolist() == [[0, 1, 0], [2, 0, 1]]
