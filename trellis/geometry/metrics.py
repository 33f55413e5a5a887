"""How well one mesh reproduces another: overlap of voxels, surface distances, normals, volume and topology.

Definitions, since tools differ:

- Dice and IoU count voxel centres of a grid (MedPy and MONAI count given masks; the meshes are scan-converted here).
- `hd95` is the larger of the two directed 95th percentiles, over area (MONAI and DeepMind's surface-distance do so;
  MedPy pools both directions first, which is never larger). `hd` is the same for the maximum, over the samples and
  every vertex: exact where a vertex lies farthest, else short of the true one by less than the way to a sample.
- `assd` is the mean over both surfaces together, by area (MedPy's is the mean of the two directed means, which is
  `chamfer` here; DeepMind's gives the two directions).
- `chamfer` is the mean of the two directed means of the distance, in mm. Works on generative models often add squared
  distances of normalised shapes: `chamfer_squared_grid` is that, the sum of the two directed means of the squared
  distance in units of the grid's side, not multiplied by anything.
- `nsd` at a tolerance is the share of both surfaces' area within it of the other one (Nikolov et al. 2021, on voxels).
- `f_score` is the harmonic mean of precision (share of the prediction's area within one voxel of the truth) and recall.
- `normal_consistency` is the mean of the two directed means of |cos| between a sample's normal and that of the closest
  triangle (Mescheder et al. 2019).
- `volume_error` is signed, prediction less truth.

An empty prediction counts as the worst: overlaps and shares 0, distances the diagonal of the grid's cube. So does a
prediction where the truth is empty. Where both are empty all is perfect. Where neither is, and no voxel centre lies
inside either (shapes thinner than a voxel), there is no Dice or IoU: None. No value is ever NaN. Distances of a
prediction that is not empty are measured, never cut off; only one that leaves the cube can exceed the diagonal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from trellis.geometry.block_complement import PaddedBlocks, inside_mask
from trellis.geometry.rasterize import dice_and_iou, inside_runs, overlap, run_length
from trellis.geometry.surface_distance import ClosestTriangle, face_normals, sample_surface
from trellis.geometry.transforms import check_to_world, normalising_transform, world_to_grid
from trellis.utils.blocks import STORAGE_BLOCK, SparseSDFBlocks, check_resolution, morton_encode
from trellis.utils.mesh_merge import merge_identical_vertices

Mesh = tuple[np.ndarray, np.ndarray]
DEFAULT_SAMPLES = 100_000
DISTANCES = ("hd", "hd95", "assd", "chamfer")
"""Metrics that are given in mm and in voxels."""
_CHUNK_POINTS = 1 << 17


def evaluate_pair(
    pred: Mesh | None,
    truth: Mesh | None,
    resolution: int,
    *,
    to_world: np.ndarray | None = None,
    tolerances_mm: Sequence[float] = (1.0, 2.0),
    num_samples: int = DEFAULT_SAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Metrics of a predicted mesh against the true one, as this module defines them.

    Args:
        pred, truth: (vertices [V, 3] world mm, faces [F, 3]), closed and outward; None or no faces for an empty shape.
        resolution: voxels per side of the cube on which Dice and IoU are counted.
        to_world: [4, 4] frame of that cube; default: the truth's normalising frame (the prediction's if the truth is
            empty, 1 mm if both are).
        tolerances_mm: of the normalised surface Dice.
        num_samples: area-uniform samples of each surface; for `hd` all its vertices count too.
        seed: of the samples; the same seed gives the same figures.

    Returns:
        A flat dict of plain numbers and bools: dice, iou (None where there is no voxel to count), hd_mm, hd95_mm,
        assd_mm, chamfer_mm (and the four in voxels), chamfer_squared_grid, nsd_{t}mm, f_score_1voxel,
        precision_1voxel, recall_1voxel, normal_consistency,
        volume_pred_ml, volume_truth_ml, volume_error_ml, volume_error_fraction (of the truth; 1 where only the truth is
        empty), euler_pred, euler_truth, euler_match, pred_is_empty, truth_is_empty.

    Raises:
        ValueError: a mesh that is malformed, not closed or not finite; names which of the two.
    """
    resolution = check_resolution(resolution)
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    tolerances = [float(t) for t in tolerances_mm]
    if any(not t > 0 for t in tolerances):
        raise ValueError(f"tolerances_mm must be positive, got {list(tolerances_mm)}")
    pred, truth = _check_mesh(pred, "pred"), _check_mesh(truth, "truth")
    frame = _frame(pred, truth, to_world)
    side_mm = float(frame[0, 0])
    voxel_mm = side_mm / resolution
    topology = _volume_and_topology(pred, truth)
    row = _overlap_metrics(pred, truth, frame, resolution)
    if pred is None or truth is None:
        row |= _empty_distances(pred is None and truth is None, side_mm, tolerances)
    else:
        row |= _distance_metrics(pred, truth, side_mm, voxel_mm, tolerances, num_samples, seed)
    return row | _in_voxels(row, voxel_mm) | topology


def worst_metrics(resolution: int, side_mm: float, tolerances_mm: Sequence[float]) -> dict[str, Any]:
    """What `evaluate_pair` gives an empty prediction, as far as that is known without the truth.

    Args:
        resolution: voxels per side of the cube; side_mm: its side. tolerances_mm: as in `evaluate_pair`.
    """
    distances = _empty_distances(False, side_mm, [float(t) for t in tolerances_mm])
    row = {"dice": 0.0, "iou": 0.0, **distances, **_in_voxels(distances, side_mm / resolution)}
    return row | {"volume_error_fraction": -1.0, "euler_match": False, "pred_is_empty": True}


def _in_voxels(row: dict[str, Any], voxel_mm: float) -> dict[str, float]:
    return {f"{name}_voxels": row[f"{name}_mm"] / voxel_mm for name in DISTANCES}


def _check_mesh(mesh: Mesh | None, name: str) -> Mesh | None:
    """Float64 vertices and int64 faces of used vertices; None if there are no faces."""
    if mesh is None:
        return None
    vertices, faces = np.asarray(mesh[0], dtype=np.float64), np.asarray(mesh[1])
    if len(faces) == 0:
        return None
    if vertices.ndim != 2 or vertices.shape[1] != 3 or faces.ndim != 2 or faces.shape[1] != 3:
        raise ValueError(f"{name}: vertices [V, 3] and faces [F, 3] are needed, got {vertices.shape} and {faces.shape}")
    if not np.issubdtype(faces.dtype, np.integer) or faces.min() < 0 or faces.max() >= len(vertices):
        raise ValueError(f"{name}: faces must be integers in [0, {len(vertices)}), got {faces.dtype}")
    faces = faces.astype(np.int64, copy=False)
    used = np.zeros(len(vertices), dtype=bool)
    used[faces] = True
    if not used.all():
        faces, vertices = (np.cumsum(used) - 1)[faces], vertices[used]
    if not np.isfinite(vertices).all():
        raise ValueError(f"{name}: vertices must be finite, got inf or NaN")
    if not face_normals(vertices, faces)[1].any():
        return None  # faces without any area enclose nothing
    return vertices, faces


def _frame(pred: Mesh | None, truth: Mesh | None, to_world: np.ndarray | None) -> np.ndarray:
    if to_world is not None:
        return check_to_world(to_world)
    mesh = truth or pred
    return np.eye(4) if mesh is None else normalising_transform(mesh[0])


def _overlap_metrics(pred: Mesh | None, truth: Mesh | None, frame: np.ndarray, resolution: int) -> dict[str, Any]:
    empty = np.zeros(0, dtype=np.int64)
    runs = []
    for name, mesh in (("pred", pred), ("truth", truth)):
        if mesh is None:
            runs.append((empty, empty))
            continue
        voxels = (world_to_grid(mesh[0], frame) + 0.5) * resolution - 0.5
        try:
            runs.append(inside_runs(voxels, mesh[1], (resolution,) * 3))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    a, b, both = run_length(*runs[0]), run_length(*runs[1]), overlap(*runs)
    return dict(zip(("dice", "iou"), dice_and_iou(a, b, both, empty=(pred is None, truth is None))))


def _empty_distances(both: bool, side_mm: float, tolerances: list[float]) -> dict[str, Any]:
    worst = 0.0 if both else float(np.sqrt(3)) * side_mm
    share = float(both)
    row: dict[str, Any] = {f"{name}_mm": worst for name in DISTANCES}
    row["chamfer_squared_grid"] = 2 * (worst / side_mm) ** 2
    row |= {f"nsd_{t:g}mm": share for t in tolerances}
    return row | dict.fromkeys(("f_score_1voxel", "precision_1voxel", "recall_1voxel", "normal_consistency"), share)


def _distance_metrics(
    pred: Mesh, truth: Mesh, side_mm: float, voxel_mm: float, tolerances: list[float], num_samples: int, seed: int
) -> dict[str, Any]:
    distances, areas, farthest, cosines = [], [], [], []
    targets = ClosestTriangle(*truth), ClosestTriangle(*pred)
    for (vertices, faces), own, other in ((pred, targets[1], targets[0]), (truth, targets[0], targets[1])):
        points, face = sample_surface(vertices, faces, num_samples, seed, areas=own.areas)
        distance, closest = other.query(points)
        cosines.append(np.abs((own.normals[face] * other.normals[closest]).sum(axis=1)).mean())
        farthest.append(max(distance.max(), _farthest(vertices, other)))
        distances.append(distance)
        areas.append(own.areas.sum())
    means = [d.mean() for d in distances]
    weights = np.array(areas) / sum(areas)

    def share_within(limit: float) -> list[float]:
        return [float((d <= limit).mean()) for d in distances]

    precision, recall = share_within(voxel_mm)
    row = {
        "hd_mm": max(farthest),
        "hd95_mm": max(np.quantile(d, 0.95, method="inverted_cdf") for d in distances),
        "assd_mm": weights @ means,
        "chamfer_mm": sum(means) / 2,
        "chamfer_squared_grid": sum((d**2).mean() for d in distances) / side_mm**2,
        "f_score_1voxel": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "precision_1voxel": precision,
        "recall_1voxel": recall,
        "normal_consistency": sum(cosines) / 2,
    }
    row |= {f"nsd_{t:g}mm": weights @ share_within(t) for t in tolerances}
    return {name: float(value) for name, value in row.items()}


def _farthest(points: np.ndarray, surface: ClosestTriangle) -> float:
    """The largest distance from points [N, 3] to a surface; in parts, because meshes have millions of vertices."""
    parts = (points[start : start + _CHUNK_POINTS] for start in range(0, len(points), _CHUNK_POINTS))
    return max(float(surface.query(part)[0].max()) for part in parts)


def _volume_and_topology(pred: Mesh | None, truth: Mesh | None) -> dict[str, Any]:
    volumes = [mesh_volume_mm3(*mesh) / 1000 if mesh else 0.0 for mesh in (pred, truth)]
    euler = []
    for name, mesh in (("pred", pred), ("truth", truth)):
        number, open_edges = euler_and_open_edges(*mesh) if mesh else (0, 0)
        if open_edges:
            raise ValueError(f"{name}: the mesh must be closed and consistently oriented, got {open_edges} open edges")
        euler.append(number)
    error = volumes[0] - volumes[1]
    if truth is None:
        fraction = 0.0 if pred is None else 1.0
    else:
        fraction = error / volumes[1] if volumes[1] else float(np.sign(error))
    return {
        "volume_pred_ml": volumes[0],
        "volume_truth_ml": volumes[1],
        "volume_error_ml": error,
        "volume_error_fraction": fraction,
        "euler_pred": euler[0],
        "euler_truth": euler[1],
        "euler_match": euler[0] == euler[1] and (pred is None) == (truth is None),
        "pred_is_empty": pred is None,
        "truth_is_empty": truth is None,
    }


def mesh_volume_mm3(vertices: np.ndarray, faces: np.ndarray) -> float:
    """Signed volume of a closed mesh by the divergence theorem, in the cube of the vertices' unit."""
    local = vertices - vertices.mean(axis=0)  # far from the origin the sum would lose digits
    total = 0.0
    for start in range(0, len(faces), 1 << 18):
        a, b, c = (local[faces[start : start + (1 << 18), k]].T for k in range(3))
        total += float(
            (a[0] * (b[1] * c[2] - b[2] * c[1]) + a[1] * (b[2] * c[0] - b[0] * c[2])).sum()
            + (a[2] * (b[0] * c[1] - b[1] * c[0])).sum()
        )
    return total / 6


def euler_and_open_edges(vertices: np.ndarray, faces: np.ndarray) -> tuple[int, int]:
    """V - E + F of a mesh, and how many edges run more often one way than the other.

    A mesh that is open as it is indexed is counted with vertices of equal coordinates made one (STL repeats them), and
    without the faces that have two such.
    """
    euler, open_edges = _chain(faces, len(vertices))
    if open_edges:
        merged, faces = merge_identical_vertices(vertices, faces)
        euler, open_edges = _chain(faces[(faces != np.roll(faces, 1, axis=1)).all(axis=1)], len(merged))
    return euler, open_edges


def _chain(faces: np.ndarray, num_vertices: int) -> tuple[int, int]:
    """V - E + F of the vertices in use, and the number of edges that are not matched by their reverses."""
    start, end = faces.reshape(-1), np.roll(faces, -1, axis=1).reshape(-1)
    keys = (np.minimum(start, end) * num_vertices + np.maximum(start, end)) << 1 | (start > end)
    keys.sort()
    edges = keys >> 1
    first = np.flatnonzero(np.diff(edges, prepend=-1))
    balance = np.add.reduceat(1 - 2 * (keys & 1), first) if len(first) else np.zeros(0)
    used = np.zeros(num_vertices, dtype=bool)
    used[faces] = True
    return int(used.sum()) - len(first) + len(faces), int(np.count_nonzero(balance))


def dice_blocks(pred: SparseSDFBlocks, truth: SparseSDFBlocks) -> float | None:
    """Dice of inside voxels over the voxels of the blocks that either shape has.

    A block that one of them lacks takes the sign that `extract_mesh` gives it. Where neither has an inside there it is
    1 if neither has a block, 0 if one has none, and None if both have blocks: shapes between the voxel centres.
    """
    if pred.resolution != truth.resolution:
        raise ValueError(f"pred and truth must have one resolution, got {pred.resolution} and {truth.resolution}")
    insides = []
    keys = [morton_encode(shape.block_index.astype(np.int64)) for shape in (pred, truth)]
    union, first = np.unique(np.concatenate(keys), return_index=True)
    coords = np.concatenate([pred.block_index, truth.block_index])[first].astype(np.int64)
    for shape, key in zip((pred, truth), keys):
        inside = np.zeros((len(union), STORAGE_BLOCK**3), dtype=bool)
        at = np.searchsorted(union, key)
        inside[at] = inside_mask(shape.block_sdf).reshape(len(key), STORAGE_BLOCK**3)
        missing = np.ones(len(union), dtype=bool)
        missing[at] = False
        inside[missing] = PaddedBlocks(shape).missing_inside(coords[missing])[:, None]
        insides.append(inside)
    a, b, both = int(insides[0].sum()), int(insides[1].sum()), int((insides[0] & insides[1]).sum())
    return dice_and_iou(a, b, both, empty=(pred.num_blocks == 0, truth.num_blocks == 0))[0]
