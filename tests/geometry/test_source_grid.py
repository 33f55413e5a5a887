"""Labels on their own voxels: cut out, stored, read, and compared with meshes, against closed forms and an oracle."""

from __future__ import annotations

import numpy as np
import pytest
import trimesh

from trellis.geometry.source_grid import (
    SourceMask,
    cut_out,
    label_boxes,
    load_source_mask,
    metrics_on_source_grid,
    save_source_mask,
)

AFFINE = np.array([[-1.5, 0, 0, 40], [0, 1, 0, -30], [0, 0, 2, 20], [0, 0, 0, 1.0]])
"""Mirrored and anisotropic: voxels of 3 mm3."""


def box_mesh(low, high, affine):
    """The box from voxel corner to voxel corner, in mm, outward."""
    mesh = trimesh.creation.box(bounds=[low, high])
    faces = np.array(mesh.faces)
    return mesh.vertices @ affine[:3, :3].T + affine[:3, 3], faces if np.linalg.det(affine) > 0 else faces[:, ::-1]


def volume():
    data = np.zeros((14, 12, 10), dtype=np.uint8)
    data[2:8, 2:9, 2:8] = 2
    data[8:12, 3:7, 3:8] = 7
    return data


def source_of(data, number, affine=AFFINE) -> SourceMask:
    return cut_out(data, number, label_boxes(data, [number])[number], affine)


def test_boxes_of_labels_small_and_huge():
    data = volume()
    assert label_boxes(data, [2, 7, 9]) == {
        2: (slice(2, 8), slice(2, 9), slice(2, 8)), 7: (slice(8, 12), slice(3, 7), slice(3, 8)),
    }  # fmt: skip
    huge = data.astype(np.int32)
    huge[data == 7] = 2_000_000_000
    assert label_boxes(huge, [2, 2_000_000_000]) == dict(zip((2, 2_000_000_000), label_boxes(data, [2, 7]).values()))
    assert label_boxes(data, []) == {}


def test_closed_forms_of_shifted_and_scaled_boxes():
    source = source_of(volume(), 2)
    assert source.mask.all() and source.mask.shape == (6, 7, 6) and source.voxel_ml == pytest.approx(0.003)
    low, high = np.array([1.5, 1.5, 1.5]), np.array([7.5, 8.5, 7.5])
    same = metrics_on_source_grid(box_mesh(low, high, AFFINE), source)
    assert same == {
        "dice_source": 1.0, "iou_source": 1.0, "volume_error_source_ml": 0.0, "volume_error_source_fraction": 0.0,
    }  # fmt: skip
    shifted = metrics_on_source_grid(box_mesh(low + (2, 0, 0), high + (2, 0, 0), AFFINE), source)
    assert shifted["dice_source"] == pytest.approx(4 / 6) and shifted["iou_source"] == pytest.approx(4 / 8)
    assert shifted["volume_error_source_ml"] == 0
    taller = metrics_on_source_grid(box_mesh(low, high + (0, 0, 2), AFFINE), source)
    assert taller["dice_source"] == pytest.approx(2 * 6 / (6 + 8))
    assert taller["volume_error_source_ml"] == pytest.approx(6 * 7 * 2 * 0.003)
    assert taller["volume_error_source_fraction"] == pytest.approx(2 / 6)
    # a mesh that leaves the volume counts only in it; one that is elsewhere does not overlap
    beyond = metrics_on_source_grid(box_mesh(low, high + (0, 0, 99), AFFINE), source)
    assert beyond["volume_error_source_fraction"] == pytest.approx(8 / 6 - 1)
    away = metrics_on_source_grid(box_mesh(low + 500, high + 500, AFFINE), source)
    assert away["dice_source"] == 0 and away["volume_error_source_fraction"] == -1


def test_one_sided_and_both_empty():
    source, nothing = source_of(volume(), 7), (np.zeros((0, 3)), np.zeros((0, 3), dtype=np.int64))
    row = metrics_on_source_grid(nothing, source)
    assert (row["dice_source"], row["iou_source"], row["volume_error_source_fraction"]) == (0, 0, -1)
    assert row["volume_error_source_ml"] == pytest.approx(-4 * 4 * 5 * 0.003)
    empty = SourceMask(np.zeros((0, 0, 0), dtype=bool), np.zeros(3, dtype=int), (14, 12, 10), AFFINE)
    assert metrics_on_source_grid(nothing, empty)["dice_source"] == 1
    row = metrics_on_source_grid(box_mesh((0.5,) * 3, (3.5,) * 3, AFFINE), empty)
    assert row["dice_source"] == 0 and row["volume_error_source_fraction"] == 1
    between = box_mesh((0.2,) * 3, (0.4,) * 3, AFFINE)  # no voxel centre is inside
    assert metrics_on_source_grid(between, empty)["dice_source"] == 0
    assert metrics_on_source_grid(between, source)["dice_source"] == 0


@pytest.mark.parametrize("seed", [0, 1])
def test_agrees_with_an_independent_implementation_on_an_oblique_sheared_grid(seed):
    """VTK's implicit distance (sign by pseudonormals) says which voxel centres lie inside."""
    pyvista = pytest.importorskip("pyvista")
    rng = np.random.default_rng(seed)
    affine = np.eye(4)
    affine[:3, :3] = trimesh.transformations.random_rotation_matrix(rng.random(3))[:3, :3] @ np.diag([-1.1, 1.7, 2.9])
    affine[:3, 1] += 0.2 * affine[:3, 0]
    shape = (40, 30, 20)
    affine[:3, 3] = -affine[:3, :3] @ (np.array(shape) / 2)
    ball = trimesh.creation.icosphere(subdivisions=2, radius=14)
    ball.vertices *= 1 + 0.2 * np.sin(ball.vertices @ rng.normal(0, 0.15, (3, 1)))
    centres = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1).reshape(-1, 3)
    points = pyvista.PolyData(centres @ affine[:3, :3].T + affine[:3, 3])
    distance = points.compute_implicit_distance(pyvista.wrap(ball))["implicit_distance"]
    inside = (distance < 0).reshape(shape)
    data = inside.astype(np.uint8)
    data[:18] = 0
    row = metrics_on_source_grid((np.array(ball.vertices), np.array(ball.faces)), source_of(data, 1, affine))
    a, b = int(inside.sum()), int(data.sum())
    assert a > 1000 and b < a
    assert row["dice_source"] == 2 * b / (a + b) and row["iou_source"] == b / a
    assert row["volume_error_source_ml"] == pytest.approx((a - b) * abs(np.linalg.det(affine)) / 1000)


def test_file_comes_back_and_broken_ones_are_refused(tmp_path):
    data = np.random.default_rng(0).integers(0, 3, (7, 5, 3)).astype(np.uint8)
    source = source_of(data, 2)
    save_source_mask(tmp_path / "a.npz", source)
    again = load_source_mask(tmp_path / "a.npz")
    np.testing.assert_array_equal(again.mask, source.mask)
    np.testing.assert_array_equal(again.affine, AFFINE)
    assert tuple(again.start) == tuple(source.start) and again.shape == (7, 5, 3)
    np.savez(
        tmp_path / "b.npz", bits=np.zeros(3, np.uint8), box=[9, 9, 9], start=[0, 0, 0], shape=[9] * 3, affine=AFFINE
    )
    np.savez(
        tmp_path / "c.npz", bits=np.zeros(1, np.uint8), box=[2, 2, 2], start=[8, 0, 0], shape=[9] * 3, affine=AFFINE
    )
    np.savez(
        tmp_path / "d.npz", bits=np.zeros(1, np.uint8), box=[2, 2, 2], start=[0] * 3, shape=[9] * 3, affine=0 * AFFINE
    )
    (tmp_path / "e.npz").write_bytes(b"PK\x03\x04 nothing")
    for name in ("b.npz", "c.npz", "d.npz", "e.npz", "none.npz"):
        with pytest.raises(ValueError, match=name):
            load_source_mask(tmp_path / name)
