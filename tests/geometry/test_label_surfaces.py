"""Surfaces of labels: where they lie, closed, outward, sharing their boundaries, smooth, and true to the voxels."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from volume_cases import SHEARED, blob_labels

from trellis.geometry.volume import LabelVolume, label_surfaces, read_volume

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "bench_label_surfaces.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("bench_label_surfaces", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def touching_labels() -> np.ndarray:
    """[60, 56, 52] uint8: an ellipsoid that 30 labels fill, each where its own smooth noise is the largest."""
    from scipy import ndimage

    shape, rng = (60, 56, 52), np.random.default_rng(2)
    noise = np.stack([ndimage.gaussian_filter(rng.standard_normal(shape), 6) for _ in range(30)])
    data = (noise.argmax(axis=0) + 1).astype(np.uint8)
    grid = np.ogrid[tuple(slice(n) for n in shape)]
    data[sum(((at - (n - 1) / 2) / (n / 2 - 2)) ** 2 for at, n in zip(grid, shape)) > 1] = 0
    return data


@pytest.fixture(scope="module")
def touching() -> tuple[np.ndarray, dict[int, tuple[np.ndarray, np.ndarray]]]:
    data = touching_labels()
    surfaces = label_surfaces(LabelVolume(data, np.eye(4)))
    assert list(surfaces) == list(range(1, 31))
    return data, surfaces


def signed_volume(vertices: np.ndarray, faces: np.ndarray) -> float:
    a, b, c = np.moveaxis(vertices[faces], 1, 0)
    return float(np.einsum("ij,ij->", a, np.cross(b, c)) / 6)


def directed_edges(faces: np.ndarray) -> np.ndarray:
    return np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])


def assert_closed_and_consistent(faces: np.ndarray) -> None:
    edges = directed_edges(faces)
    there = np.unique(edges, axis=0, return_counts=True)
    back = np.unique(edges[:, ::-1], axis=0, return_counts=True)
    np.testing.assert_array_equal(there[0], back[0])
    np.testing.assert_array_equal(there[1], back[1])


@pytest.mark.parametrize("iterations", [0, 16])
def test_surfaces_are_closed_outward_and_in_place(iterations: int):
    data = blob_labels()
    for affine in (np.eye(4), SHEARED, SHEARED @ np.diag([1, -1, 1, 1.0])):
        volume = LabelVolume(data, affine)
        surfaces = label_surfaces(volume, smoothing_iterations=iterations)
        assert list(surfaces) == [3, 7]
        for label, (vertices, faces) in surfaces.items():
            assert vertices.dtype == np.float64 and faces.dtype == np.int64
            assert_closed_and_consistent(faces)
            voxels = np.count_nonzero(data == label)
            assert signed_volume(vertices, faces) == pytest.approx(voxels * volume.voxel_volume_mm3, rel=0.04)
            index = np.argwhere(data == label)
            centre = index.mean(axis=0) @ affine[:3, :3].T + affine[:3, 3]
            a, b, c = np.moveaxis(vertices[faces], 1, 0)
            weight = np.einsum("ij,ij->i", a - centre, np.cross(b - centre, c - centre))
            middle = ((a + b + c + centre) * weight[:, None]).sum(axis=0) / (4 * weight.sum())
            np.testing.assert_allclose(middle, centre, atol=0.1)


def test_raw_stairs_are_exact():
    data = blob_labels()
    for label, (vertices, faces) in label_surfaces(LabelVolume(data, np.eye(4)), smoothing_iterations=0).items():
        assert signed_volume(vertices, faces) == pytest.approx(np.count_nonzero(data == label), abs=1e-6)
        index = np.argwhere(data == label)
        np.testing.assert_array_equal(vertices.min(axis=0), index.min(axis=0) - 0.5)
        np.testing.assert_array_equal(vertices.max(axis=0), index.max(axis=0) + 0.5)


def test_picking_labels_changes_nothing_but_the_choice():
    volume = LabelVolume(blob_labels().astype(np.int32) * 1000, SHEARED)
    everything = label_surfaces(volume)
    assert list(everything) == [3000, 7000]
    picked = label_surfaces(volume, [7000])
    assert list(picked) == [7000]
    np.testing.assert_allclose(
        np.sort(picked[7000][0], axis=0), np.sort(everything[7000][0], axis=0), atol=2e-5
    )
    assert label_surfaces(volume, []) == {}
    with pytest.raises(ValueError, match=r"labels \[5\] do not occur.*\[3000, 7000\]"):
        label_surfaces(volume, [5, 7000])
    with pytest.raises(ValueError, match="smoothing_iterations"):
        label_surfaces(volume, smoothing_iterations=-1)


def test_neighbours_share_their_boundary_without_gap_or_overlap(benchmark, touching):
    """Each triangle belongs to one label, or to two that see it from opposite sides: nothing lies between them."""
    data, surfaces = touching
    everything = np.concatenate([vertices for vertices, _ in surfaces.values()])
    points, same = np.unique(everything, axis=0, return_inverse=True)
    starts = np.cumsum([0] + [len(vertices) for vertices, _ in surfaces.values()])
    faces = np.concatenate([same.reshape(-1)[f + start] for (_, f), start in zip(surfaces.values(), starts)])
    owner = np.repeat(list(surfaces), [len(f) for _, f in surfaces.values()])

    first = np.argmin(faces, axis=1)
    turned = np.stack([faces[np.arange(len(faces)), (first + k) % 3] for k in range(3)], axis=1)  # smallest first
    flipped = turned[:, 1] > turned[:, 2]
    key = np.where(flipped[:, None], turned[:, [0, 2, 1]], turned)
    _, triangle, uses = np.unique(key, axis=0, return_inverse=True, return_counts=True)
    triangle = triangle.reshape(-1)
    assert set(uses.tolist()) == {1, 2}
    order = np.argsort(triangle, kind="stable")
    pairs = order[uses[triangle[order]] == 2].reshape(-1, 2)
    assert len(pairs) > 50_000
    assert (flipped[pairs[:, 0]] != flipped[pairs[:, 1]]).all() and (owner[pairs[:, 0]] != owner[pairs[:, 1]]).all()

    outside = faces[uses[triangle] == 1]  # the surface of all labels together
    assert_closed_and_consistent(outside)
    parts = sum(signed_volume(vertices, f) for vertices, f in surfaces.values())
    assert signed_volume(points, outside) == pytest.approx(parts, rel=1e-12)
    np.testing.assert_array_equal(benchmark.voxelise(points, outside, data.shape), data > 0)


def test_touching_labels_are_smooth_and_keep_voxels_and_volumes(benchmark, touching):
    data, surfaces = touching
    figures = benchmark.faithfulness(surfaces, data)
    np.testing.assert_array_equal(figures["dice"], 1.0)
    assert np.median(np.abs(figures["volume_error"])) <= 0.001 and np.abs(figures["volume_error"]).max() <= 0.01
    # junctions are 8 % of the edges here and must turn, whatever the smoothing; stairs: 90 degrees, on and off them
    assert np.median(figures["angle_p95_deg"]) <= 56
    off_junctions = [np.percentile(a, 95) for a in benchmark.angles_off_junctions_deg(surfaces).values()]
    assert max(off_junctions) <= 32 and np.median(off_junctions) <= 21
    signed = benchmark.signed_medians(surfaces, data)
    assert abs(np.median(signed)) < 0.01 and np.abs(signed).max() < 0.05


def test_labels_that_fill_the_volume_or_touch_themselves_are_closed():
    full = LabelVolume(np.ones((3, 4, 5), np.uint8), np.eye(4))
    vertices, faces = label_surfaces(full, smoothing_iterations=0)[1]
    assert_closed_and_consistent(faces)
    assert signed_volume(vertices, faces) == pytest.approx(60)
    data = np.zeros((6, 6, 6), np.uint8)
    data[1, 1, 1] = data[2, 2, 1] = 1  # along an edge
    data[3, 3, 2] = 1  # at a corner
    data[5, 5, 5] = 2  # one voxel at the volume's border
    surfaces = label_surfaces(LabelVolume(data, np.eye(4)))
    for label, voxels in ((1, 3), (2, 1)):
        vertices, faces = surfaces[label]
        assert_closed_and_consistent(faces)
        assert signed_volume(vertices, faces) == pytest.approx(voxels, rel=2e-3)


def test_thin_and_tiny_structures_survive():
    for where in (np.s_[5:6, 5:6, 5:6], np.s_[3:12, 5:6, 5:6], np.s_[3:12, 3:12, 5:6], np.s_[5:7, 5:7, 5:7]):
        data = np.zeros((14, 14, 12), np.uint8)
        data[where] = 1
        vertices, faces = label_surfaces(LabelVolume(data, np.eye(4)))[1]
        assert_closed_and_consistent(faces)
        assert signed_volume(vertices, faces) == pytest.approx(data.sum(), rel=2e-3)


@pytest.mark.parametrize("labels", [1, 2, 3, 7])
def test_every_configuration_of_labels_is_closed_and_keeps_its_voxels(benchmark, labels: int):
    """Noise holds every way in which labels can touch; VTK alone leaves gaps in some."""
    data = np.random.default_rng(labels).integers(0, labels + 1, size=(17, 16, 15)).astype(np.uint8)
    for iterations in (0, 30):
        surfaces = label_surfaces(LabelVolume(data, np.eye(4)), smoothing_iterations=iterations)
        assert list(surfaces) == list(range(1, labels + 1))
        for label, (vertices, faces) in surfaces.items():
            assert_closed_and_consistent(faces)
            again = benchmark.voxelise(vertices + 2, faces, (21, 20, 19))[2:-2, 2:-2, 2:-2]
            overlap = 2 * np.count_nonzero(again & (data == label)) / (again.sum() + np.count_nonzero(data == label))
            assert overlap > 0.999


def test_a_tilted_plane_and_a_ball_come_out_without_stairs():
    index = np.stack(np.meshgrid(*[np.arange(24)] * 3, indexing="ij"), axis=-1).astype(float)
    normal = np.array([0.35, 0.2, 1.0]) / np.linalg.norm([0.35, 0.2, 1.0])
    half = (index - 11.3) @ normal < 0
    vertices, faces = label_surfaces(LabelVolume(half.astype(np.uint8), np.eye(4)))[1]
    inner = ((vertices > 5) & (vertices < 18)).all(axis=1)
    off = (vertices[inner] - 11.3) @ normal
    assert off.std() < 0.02 and abs(off.mean()) < 0.02  # raw stairs: about 0.35
    ball = np.linalg.norm(index - [11.2, 11.6, 11.9], axis=-1) < 8.5
    vertices, faces = label_surfaces(LabelVolume(ball.astype(np.uint8), np.eye(4)))[1]
    radius = np.linalg.norm(vertices - [11.2, 11.6, 11.9], axis=1)
    assert radius.std() < 0.07 and abs(radius.mean() - 8.5) < 0.05
    assert signed_volume(vertices, faces) == pytest.approx(ball.sum(), rel=1e-3)


def test_quality_on_real_anatomy(anatomy_dir: Path, benchmark):
    """All 116 regions of the AAL atlas at 1 mm."""
    volume = LabelVolume(read_volume(anatomy_dir / "aal.nii.gz").data, np.eye(4))
    surfaces = label_surfaces(volume)
    assert len(surfaces) == 116
    figures = benchmark.faithfulness(surfaces, volume.data)
    assert figures["dice"].min() >= 0.999
    assert np.median(np.abs(figures["volume_error"])) <= 0.001 and np.abs(figures["volume_error"]).max() <= 0.01
    assert figures["angle_p95_deg"].max() <= 32 and np.median(figures["angle_p95_deg"]) <= 24
