"""Metrics against closed forms and against independent implementations (EDT, brute force, solid angles)."""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.ndimage
import trimesh

from trellis.geometry import metrics
from trellis.geometry.metrics import (
    dice_blocks,
    euler_and_open_edges,
    evaluate_pair,
    mesh_volume_mm3,
)
from trellis.geometry.metrics_summary import bits_per_shape, summarise, summarise_by
from trellis.geometry.rasterize import inside_runs, overlap, run_length, runs_to_mask
from trellis.geometry.surface_distance import ClosestTriangle, sample_surface
from trellis.utils.blocks import SparseSDFBlocks


def box(low, high) -> tuple[np.ndarray, np.ndarray]:
    mesh = trimesh.creation.box(bounds=[low, high])
    return np.array(mesh.vertices, dtype=float), np.array(mesh.faces)


def ball(radius, centre=(0.0, 0.0, 0.0), subdivisions=4) -> tuple[np.ndarray, np.ndarray]:
    mesh = trimesh.creation.icosphere(subdivisions=subdivisions, radius=radius)
    return np.array(mesh.vertices) + centre, np.array(mesh.faces)


def blob(seed: int, subdivisions: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """A star-shaped random surface: asymmetric, with concavities."""
    mesh = trimesh.creation.icosphere(subdivisions=subdivisions)
    rng = np.random.default_rng(seed)
    radius = 20 + sum(3 * np.sin(mesh.vertices @ rng.normal(0, 2, 3) + rng.uniform(0, 6)) for _ in range(3))
    return mesh.vertices * radius[:, None] + (3.0, -2.0, 5.0), np.array(mesh.faces)


def frame(side_mm: float, centre=(0.0, 0.0, 0.0)) -> np.ndarray:
    to_world = np.diag([side_mm, side_mm, side_mm, 1.0])
    to_world[:3, 3] = centre
    return to_world


def winding_numbers(points: np.ndarray, vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Oracle: sum of solid angles / 4 pi (van Oosterom & Strackee 1983)."""
    a, b, c = (vertices[faces[:, k]][None] - points[:, None] for k in range(3))
    la, lb, lc = (np.linalg.norm(v, axis=-1) for v in (a, b, c))
    over = (a * np.cross(b, c)).sum(axis=-1)
    under = la * lb * lc + (a * b).sum(-1) * lc + (b * c).sum(-1) * la + (c * a).sum(-1) * lb
    return np.arctan2(over, under).sum(axis=1) / (2 * np.pi)


def lattice(shape) -> np.ndarray:
    return np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), -1).reshape(-1, 3)


# --- scan conversion


@pytest.mark.parametrize("seed", [0, 1])
def test_runs_agree_with_solid_angles(seed):
    vertices, faces = blob(seed, 1)
    shape = (23, 31, 28)
    voxels = (vertices - vertices.min(axis=0)) * 0.5 + (-2.3, 1.7, 4.1)  # partly outside of the grid
    mask = runs_to_mask(*inside_runs(voxels, faces, shape), shape)
    want = winding_numbers(lattice(shape).astype(float), voxels, faces) > 0.5
    assert 1000 < want.sum() < want.size / 2
    assert np.array_equal(mask.reshape(-1), want)


def test_ties_on_vertices_edges_and_faces_count_each_column_once():
    shape = (13, 14, 15)
    corner = np.array([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]], dtype=float)
    hull = trimesh.convex.convex_hull(corner * 5 + 6)  # all vertices and edges on voxel columns
    mask = runs_to_mask(*inside_runs(hull.vertices, hull.faces, shape), shape)
    distance = np.abs(lattice(shape) - 6).sum(axis=1).reshape(shape)
    assert mask[distance < 5].all() and not mask[distance > 5].any()
    mask = runs_to_mask(*inside_runs(*box((2, 3, 4), (5, 9, 6)), shape), shape)
    assert mask.sum() == 3 * 6 * 2  # half-open: as many centres as the volume


def test_runs_of_nested_shapes_and_overlaps():
    outer, inner = box((1.5, 1.5, 1.5), (9.5, 9.5, 9.5)), box((3.5, 3.5, 3.5), (6.5, 6.5, 6.5))
    vertices = np.concatenate([outer[0], inner[0]])
    hollow = vertices, np.concatenate([outer[1], inner[1][:, ::-1] + 8])
    twice = vertices, np.concatenate([outer[1], inner[1] + 8])
    shape = (12, 12, 12)
    runs = [inside_runs(*mesh, shape) for mesh in (outer, inner, hollow, twice)]
    assert [run_length(*r) for r in runs] == [512, 27, 485, 512]
    assert overlap(runs[0], runs[1]) == 27 and overlap(runs[2], runs[1]) == 0 and overlap(runs[3], runs[2]) == 485


@pytest.mark.parametrize("left_out", range(12))
def test_open_mesh_is_refused(left_out):
    vertices, faces = box((2, 2, 2), (9, 9, 9))
    broken = np.delete(faces, left_out, axis=0)
    with pytest.raises(ValueError, match="pred: the mesh must be closed"):
        evaluate_pair((vertices, broken), (vertices, faces), 32)
    with pytest.raises(ValueError, match="truth: the mesh must be closed"):
        evaluate_pair((vertices, faces), (vertices, broken), 32)
    normal = np.cross(*(vertices[faces[left_out, k]] - vertices[faces[left_out, 0]] for k in (1, 2)))
    if normal[2]:  # a hole that columns pass through
        with pytest.raises(ValueError, match="closed"):
            inside_runs(vertices, broken, (12, 12, 12))


# --- distances


def test_distances_agree_with_brute_force():
    vertices, faces = blob(3)
    faces = np.concatenate([faces, [[0, 0, 5]], faces[:1, [0, 1, 1]]])  # degenerate faces are no obstacle
    rng = np.random.default_rng(0)
    points = rng.uniform(-40, 40, (300, 3))
    distance, face = ClosestTriangle(vertices, faces).query(points)
    _, want, _ = trimesh.proximity.closest_point_naive(trimesh.Trimesh(vertices, faces[:-2], process=False), points)
    assert np.abs(distance - want).max() < 1e-5
    assert face.max() < len(faces) - 2


def test_samples_are_uniform_by_area_and_on_the_surface():
    vertices, faces = box((0, 0, 0), (1, 2, 30))
    points, face = sample_surface(vertices, faces, 20_000, seed=1)
    assert ClosestTriangle(vertices, faces).query(points)[0].max() < 1e-9
    share = np.bincount(face, minlength=len(faces)) / len(face)
    area = np.linalg.norm(np.cross(*(vertices[faces[:, k]] - vertices[faces[:, 0]] for k in (1, 2))), axis=1)
    assert np.abs(share - area / area.sum()).max() < 2e-4
    centroid = np.array([points[face == f].mean(axis=0) for f in np.flatnonzero(area == area.max())])
    assert np.abs(centroid - vertices[faces[area == area.max()]].mean(axis=1)).max() < 0.3


# --- evaluate_pair


def test_identical_meshes_are_perfect():
    mesh = blob(5)
    row = evaluate_pair(mesh, mesh, 64, num_samples=5000)
    assert row["dice"] == row["iou"] == row["nsd_1mm"] == row["f_score_1voxel"] == 1
    assert row["hd_mm"] < 1e-5 and row["assd_mm"] < 1e-5 and row["chamfer_squared_grid"] < 1e-12
    assert row["normal_consistency"] > 0.999
    assert row["volume_error_ml"] == row["volume_error_fraction"] == 0 and row["euler_match"]


def test_concentric_spheres_closed_form():
    big, small = 30.0, 27.0
    row = evaluate_pair(ball(small), ball(big), 128, tolerances_mm=(2.5, 3.5), num_samples=20_000)
    ratio = (small / big) ** 3
    assert row["dice"] == pytest.approx(2 * ratio / (1 + ratio), abs=1e-3)
    assert row["iou"] == pytest.approx(ratio, abs=1e-3)
    for name in ("hd", "hd95", "assd", "chamfer"):
        assert row[f"{name}_mm"] == pytest.approx(3, abs=0.08)
        assert row[f"{name}_voxels"] == pytest.approx(3 / (60 / 0.95 / 128), rel=0.03)
    assert row["chamfer_squared_grid"] == pytest.approx(2 * (3 / (60 / 0.95)) ** 2, rel=0.03)
    assert row["nsd_2.5mm"] == 0 and row["nsd_3.5mm"] == 1 and row["f_score_1voxel"] == 0
    assert row["normal_consistency"] > 0.995
    assert row["volume_error_ml"] == pytest.approx(4 / 3 * np.pi * (small**3 - big**3) / 1000, rel=0.01)
    assert row["volume_error_fraction"] == pytest.approx(ratio - 1, rel=1e-6)


def test_shifted_anisotropic_box_closed_form():
    """A box moved by 3 mm along z: two faces 3 mm apart; on the four sides, strips stick out of the other box."""
    low, high, shift = np.array([-10.0, -16, -32]), np.array([10.0, 16, 32]), 3.0
    truth, pred = box(low, high), box(low + (0, 0, shift), high + (0, 0, shift))
    row = evaluate_pair(pred, truth, 256, to_world=frame(128), tolerances_mm=(1.0, 4.0), num_samples=100_000)
    assert row["dice"] == pytest.approx(1 - shift / 64, abs=1e-9)  # faces lie midway between centres
    assert row["hd_mm"] == pytest.approx(shift, abs=1e-6)
    x, y, z = high - low
    area = 2 * (x * y + y * z + x * z)
    # of each surface: the end that sticks out lies 3 mm off, its strips 0..3 mm; the end inside is nearer to a side
    # wall where that is closer than 3 mm, and so a frustum's worth less than 3 mm on average
    u, v = x - 2 * shift, y - 2 * shift
    inner_end = shift * u * v + 2 * (shift**2 / 2 * (u + v)) + 4 * shift**3 / 3
    integral = shift * x * y + 2 * (x + y) * shift**2 / 2 + inner_end
    assert row["assd_mm"] == pytest.approx(integral / area, rel=2e-3)
    assert row["chamfer_mm"] == pytest.approx(row["assd_mm"], rel=1e-6)
    within = (area - 2 * x * y - 2 * (x + y) * (shift - 1) + (x * y - (x - 2) * (y - 2))) / area
    assert row["nsd_1mm"] == pytest.approx(within, abs=1e-3)
    assert row["nsd_4mm"] == 1
    # more than 5 % of the area is 3 mm off
    assert row["hd95_mm"] == pytest.approx(shift, abs=1e-6)
    assert row["volume_error_ml"] == pytest.approx(0, abs=1e-9)


def test_directions_differ_and_the_worse_one_counts():
    """A spike on the prediction: 4 % of its area, farther than everything else, seen from one side alone."""
    truth = box((0, 0, 0), (20, 20, 20))
    far = box((40, 9, 9), (44, 11, 11))
    pred = np.concatenate([truth[0], far[0]]), np.concatenate([truth[1], far[1] + 8])
    row = evaluate_pair(pred, truth, 64, num_samples=50_000)
    share = 40 / (2400 + 40)
    assert row["hd_mm"] == pytest.approx(24, abs=1e-6)
    assert row["hd95_mm"] < 1e-4
    assert row["assd_mm"] == pytest.approx(40 * 22 / (4800 + 40), rel=0.02)
    assert row["chamfer_mm"] == pytest.approx(share * 22 / 2, rel=0.02)
    assert row["recall_1voxel"] == 1 and row["precision_1voxel"] == pytest.approx(1 - share, abs=1e-3)
    assert not row["euler_match"] and row["euler_pred"] == 4 and row["euler_truth"] == 2
    swapped = evaluate_pair(truth, pred, 64, num_samples=50_000, to_world=frame(50, (20, 10, 10)))
    assert swapped["hd_mm"] == row["hd_mm"] and swapped["dice"] < 1


@pytest.mark.parametrize("chunk", [1 << 17, 1000])
def test_one_vertex_of_many_is_the_farthest(chunk, monkeypatch):
    """A needle of one vertex among 10,242, on either surface: samples and a choice of vertices would miss it."""
    monkeypatch.setattr(metrics, "_CHUNK_POINTS", chunk)
    plain = ball(20.0, subdivisions=5)
    needle = (plain[0].copy(), plain[1])
    needle[0][7777] *= 1.25
    for pred, truth in ((needle, plain), (plain, needle)):
        row = evaluate_pair(pred, truth, 32, num_samples=50)
        assert row["hd_mm"] == pytest.approx(5, abs=1e-6) and row["assd_mm"] < 0.1


def test_agrees_with_voxels_and_a_euclidean_distance_transform():
    """Independent implementation: dense masks from solid angles, surface distances from scipy's EDT."""
    truth, pred = blob(7, 1), blob(8, 1)
    size, side = 40, 70.0
    to_world = frame(side, (3, -2, 5))
    row = evaluate_pair(pred, truth, size, to_world=to_world, num_samples=20_000)
    points = ((lattice((size,) * 3) + 0.5) / size - 0.5) * side + (3, -2, 5)
    masks = []
    for vertices, faces in (pred, truth):
        inside = np.concatenate([winding_numbers(p, vertices, faces) > 0.5 for p in np.array_split(points, 64)])
        masks.append(inside.reshape((size,) * 3))
    both = (masks[0] & masks[1]).sum()
    assert row["dice"] == 2 * both / (masks[0].sum() + masks[1].sum())
    assert row["iou"] == both / (masks[0] | masks[1]).sum()
    voxel = side / size
    shells = [m ^ scipy.ndimage.binary_erosion(m) for m in masks]
    to = [scipy.ndimage.distance_transform_edt(~s, sampling=voxel) for s in shells]
    directed = [to[1][shells[0]], to[0][shells[1]]]
    assert row["hd_mm"] == pytest.approx(max(d.max() for d in directed), abs=1.5 * voxel)
    assert row["hd95_mm"] == pytest.approx(max(np.quantile(d, 0.95) for d in directed), abs=voxel)
    assert row["assd_mm"] == pytest.approx(np.concatenate(directed).mean(), abs=0.3 * voxel)


def brute_force(pred, truth, voxel_mm, tolerance):
    """Every surface metric by trimesh's own samples and closest points, all triangles against all points."""
    meshes = [trimesh.Trimesh(*mesh, process=False) for mesh in (pred, truth)]
    distances, cosines = [], []
    for own, other in (meshes, meshes[::-1]):
        points, face = trimesh.sample.sample_surface(own, 6000, seed=7)
        _, distance, closest = trimesh.proximity.closest_point_naive(other, points)
        distances.append(distance)
        cosines.append(np.abs((own.face_normals[face] * other.face_normals[closest]).sum(axis=1)).mean())
    areas = [mesh.area for mesh in meshes]
    precision, recall = ((d <= voxel_mm).mean() for d in distances)
    return {
        "hd95_mm": max(np.quantile(d, 0.95) for d in distances),
        "assd_mm": np.average([d.mean() for d in distances], weights=areas),
        "chamfer_mm": np.mean([d.mean() for d in distances]),
        f"nsd_{tolerance:g}mm": np.average([(d <= tolerance).mean() for d in distances], weights=areas),
        "f_score_1voxel": 2 * precision * recall / (precision + recall),
        "normal_consistency": np.mean(cosines),
        "volume_error_ml": (meshes[0].volume - meshes[1].volume) / 1000,
        "euler_match": meshes[0].euler_number == meshes[1].euler_number,
    }


@pytest.mark.parametrize("stretch", [(1.0, 1.0, 1.0), (1.0, 1.0, 2.5)])
def test_surface_metrics_agree_with_brute_force(stretch):
    truth, pred = ((vertices * stretch, faces) for vertices, faces in (blob(11, 1), blob(12, 1)))
    voxel_mm = 4.0
    row = evaluate_pair(pred, truth, 32, to_world=frame(32 * voxel_mm), tolerances_mm=(2.0,), num_samples=20_000)
    for name, want in brute_force(pred, truth, voxel_mm, 2.0).items():
        # 6000 samples: standard errors below 1 % in a share and a mean, and of 1.3 % in the 95th percentile
        assert row[name] == pytest.approx(want, rel=0.03, abs=0.02), name


def test_percentiles_go_by_area_not_by_vertices():
    """The top of a box is 2 mm too high: a sixth of the area; nearly all vertices are at the bottom."""
    truth, (vertices, faces) = box((0, 0, 0), (20, 20, 20)), box((0, 0, 0), (20, 20, 22))
    rng = np.random.default_rng(0)
    for _ in range(400):  # a triangle of the bottom becomes three around its centre
        i = rng.choice(np.flatnonzero((vertices[faces][:, :, 2] == 0).all(axis=1)))
        a, b, c = faces[i]
        new, vertices = len(vertices), np.concatenate([vertices, vertices[faces[i]].mean(axis=0)[None]])
        faces = np.concatenate([np.delete(faces, i, axis=0), [[a, b, new], [b, c, new], [c, a, new]]])
    row = evaluate_pair((vertices, faces), truth, 64, num_samples=20_000)
    assert (vertices[:, 2] > 0).mean() < 0.01
    assert row["hd95_mm"] == pytest.approx(2, abs=1e-6)


def test_another_genus_is_no_match():
    ring = trimesh.creation.torus(20, 6)
    row = evaluate_pair((np.array(ring.vertices), np.array(ring.faces)), ball(20.0), 32, num_samples=500)
    assert (row["euler_pred"], row["euler_truth"], row["euler_match"]) == (0, 2, False)


def test_empty_prediction_counts_as_the_worst():
    truth = ball(10.0, (5, 5, 5))
    nothing = (np.zeros((0, 3)), np.zeros((0, 3), dtype=np.int64))
    row = evaluate_pair(nothing, truth, 64)
    worst = np.sqrt(3) * 20 / 0.95
    assert row["pred_is_empty"] and not row["truth_is_empty"] and not row["euler_match"]
    for name in ("hd", "hd95", "assd", "chamfer"):
        assert row[f"{name}_mm"] == pytest.approx(worst)
        assert row[f"{name}_voxels"] == pytest.approx(np.sqrt(3) * 64)
    for name in ("dice", "iou", "nsd_1mm", "nsd_2mm", "f_score_1voxel", "normal_consistency"):
        assert row[name] == 0
    assert row["volume_error_fraction"] == -1
    assert row.keys() == evaluate_pair(truth, truth, 64, num_samples=100).keys()
    assert evaluate_pair(None, truth, 64) == row

    row = evaluate_pair(truth, None, 64, to_world=frame(100))
    assert row["dice"] == 0 and row["hd_mm"] == pytest.approx(np.sqrt(3) * 100) and row["volume_error_fraction"] == 1
    assert not row["euler_match"]

    row = evaluate_pair(None, nothing, 64)
    assert row["dice"] == row["iou"] == row["nsd_1mm"] == 1 and row["hd_mm"] == row["assd_voxels"] == 0
    assert row["euler_match"] and row["volume_error_ml"] == 0


def test_shapes_between_voxel_centres_have_no_overlap_to_count():
    """A plate and a speck that no voxel centre is inside of: nothing is perfect that was not measured."""
    plate, speck, solid = box((0, 0, 0), (10, 10, 0.05)), ball(0.01, (3, 3, 1), 1), ball(3.0, (5, 5, 0), 2)
    for pred, want in ((None, 0), (solid, 0), (plate, None), (speck, None)):
        row = evaluate_pair(pred, plate, 64, num_samples=100)
        assert (row["dice"], row["iou"]) == (want, want), "0 where one is empty or has voxels, else no figure"
        assert row["hd_mm"] > 0 or pred is plate
    assert evaluate_pair(plate, None, 64, to_world=frame(20.0))["dice"] == 0
    assert evaluate_pair(None, None, 64)["dice"] == 1
    rows = [evaluate_pair(pred, truth, 64, num_samples=100) for pred, truth in ((plate, plate), (None, plate))]
    summary = summarise(rows)
    assert summary["dice"]["n"] == 1 and summary["dice"]["mean"] == 0 and summary["hd_mm"]["n"] == 2


def test_rows_are_plain_seeded_and_never_nan():
    pred, truth = ball(9.0, subdivisions=2), ball(10.0, subdivisions=2)
    row = evaluate_pair(pred, truth, 32, num_samples=1000, seed=3)
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert row == evaluate_pair(pred, truth, 32, num_samples=1000, seed=3)
    assert row["assd_mm"] != evaluate_pair(pred, truth, 32, num_samples=1000, seed=4)["assd_mm"]
    disjoint = evaluate_pair(ball(9.0, (100, 0, 0), 2), truth, 32, num_samples=1000)
    assert disjoint["dice"] == 0 and disjoint["f_score_1voxel"] == 0
    json.dumps(disjoint, allow_nan=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resolution": 500}, "resolution"),
        ({"num_samples": 0}, "num_samples"),
        ({"tolerances_mm": (0.0,)}, "tolerances_mm"),
        ({"to_world": np.diag([1.0, 2.0, 1.0, 1.0])}, "uniform"),
        ({"pred": (np.full((3, 3), np.nan), np.array([[0, 1, 2]]))}, "pred: vertices must be finite"),
        ({"truth": (np.zeros((3, 3)), np.array([[0, 1, 3]]))}, "truth: faces"),
        ({"truth": (np.zeros((3, 2)), np.array([[0, 1, 2]]))}, "truth: vertices"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"pred": ball(5.0), "truth": ball(5.0), "resolution": 64} | change
    with pytest.raises(ValueError, match=message):
        evaluate_pair(**arguments)


def test_volume_and_topology_of_unmerged_meshes():
    mesh = trimesh.creation.torus(20, 6)
    vertices, faces = np.array(mesh.vertices) + 1000, np.array(mesh.faces)
    assert mesh_volume_mm3(vertices, faces) == pytest.approx(2 * np.pi**2 * 20 * 36, rel=0.02)
    soup = vertices[faces].reshape(-1, 3), np.arange(faces.size).reshape(-1, 3)  # as STL stores it
    assert euler_and_open_edges(vertices, faces) == euler_and_open_edges(*soup) == (0, 0)


def test_dice_blocks_counts_the_union_and_enclosed_blocks():
    index = np.array([[x, y, z] for x in (0, 1, 2) for y in (0, 1, 2) for z in (0, 1, 2)], dtype=np.int16)
    full = np.full((27, 8, 8, 8), -1, dtype=np.float16)
    keep = np.arange(27) != 13
    solid = SparseSDFBlocks(index, full, None, 32)
    ring = SparseSDFBlocks(index[keep], full[keep], None, 32)  # the middle is enclosed by inside voxels
    assert dice_blocks(ring, solid) == dice_blocks(solid, ring) == 1
    corner = SparseSDFBlocks(index[1:], full[1:], None, 32)  # the first block touches the border: outside
    assert dice_blocks(corner, solid) == pytest.approx(2 * 26 / 53)
    outside = SparseSDFBlocks(index[:1], -full[:1], None, 32)
    assert dice_blocks(outside, solid) == 0
    assert dice_blocks(outside, outside) is None, "blocks without an inside: a shape between the voxel centres"
    nothing = SparseSDFBlocks(index[:0], full[:0], None, 32)
    assert dice_blocks(nothing, outside) == dice_blocks(outside, nothing) == dice_blocks(nothing, solid) == 0
    assert dice_blocks(nothing, nothing) == 1
    with pytest.raises(ValueError, match="resolution"):
        dice_blocks(solid, SparseSDFBlocks(index, full, None, 64))


# --- summaries


def test_summary_bootstraps_over_patients():
    rng = np.random.default_rng(0)
    level = rng.normal(0, 1, 40)
    rows = [
        {"patient_id": f"p{p}", "label": "ab"[k % 2], "dice": level[p] + 0.01 * rng.normal(), "ok": k > 4, "note": "x"}
        for p in range(40)
        for k in range(10)
    ]
    summary = summarise(rows)
    values = np.array([r["dice"] for r in rows])
    dice = summary["dice"]
    assert summary["n"] == 400 and summary["n_patients"] == 40 and "note" not in summary and "label" not in summary
    assert dice["mean"] == pytest.approx(values.mean()) and dice["median"] == pytest.approx(np.median(values))
    assert (dice["p05"], dice["p95"]) == pytest.approx(tuple(np.quantile(values, (0.05, 0.95))))
    error = level.std(ddof=1) / np.sqrt(40)  # of patients; over rows it would be three times less
    assert (dice["ci_high"] - dice["ci_low"]) / 2 == pytest.approx(1.96 * error, rel=0.12)
    assert summary["ok"]["mean"] == 0.5
    assert summary == summarise(rows) and json.dumps(summary, allow_nan=False)
    by_label = summarise_by(rows, "label")
    assert list(by_label) == ["a", "b"] and by_label["a"]["n"] == 200


def test_summary_of_missing_and_bad_values():
    rows = [{"dice": 0.5, "hd_mm": None}, {"dice": 0.7, "hd_mm": 2.0}]
    summary = summarise(rows)
    assert summary["n_patients"] == 2 and summary["hd_mm"]["n"] == 1 and summary["hd_mm"]["mean"] == 2
    assert summary["dice"]["ci_low"] == 0.5 and summary["dice"]["ci_high"] == 0.7
    assert summarise([]) == {"n": 0, "n_patients": 0}
    with pytest.raises(ValueError, match="row 1: dice must be finite"):
        summarise([{"dice": 0.5}, {"dice": float("nan")}])


def test_one_patient_alone_has_no_interval():
    rows = [{"patient_id": "p", "dice": 0.5}, {"patient_id": "p", "dice": 0.7}]
    other = {"patient_id": "q", "dice": 0.9, "hd_mm": 3.0}
    found = summarise([*rows, other])
    assert found["dice"]["ci_low"] < found["dice"]["mean"] < found["dice"]["ci_high"]
    for figures in (summarise(rows)["dice"], found["hd_mm"]):
        assert figures["ci_low"] is None and figures["ci_high"] is None and figures["p05"] <= figures["p95"]


def test_bits_count_codes_and_octree():
    index = np.array([[0, 0, 0], [0, 0, 1], [7, 7, 7]])
    bits = bits_per_shape(np.array([5, 0, 1023]), 1024, index)
    assert bits["bits_ids"] == 30
    assert bits["bits_positions"] == 8 + 8 * (2 + 2 + 1)  # depth; two nodes on each lower level, one root
    assert bits["bits"] == 78 and bits["bits_per_block"] == 26
    assert bits_per_shape(np.zeros((3, 4), dtype=int), 2, index)["bits_ids"] == 12
    assert bits_per_shape(np.zeros(0, dtype=int), 2, np.zeros((0, 3), dtype=int))["bits_per_block"] == 0
    for ids, codes, where in (([0, 1], 2, index), ([0, 1, 2], 2, index), ([0, 1, 1], 2, index[[0, 0, 1]])):
        with pytest.raises(ValueError, match="ids|block_index"):
            bits_per_shape(np.array(ids), codes, where)
