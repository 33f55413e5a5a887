"""Quality of surfaces made from a label volume: Dice and volume when voxelised again, smoothness, signed distance.

python benchmarks/bench_label_surfaces.py VOLUME... [--reach 0.499] [--iterations 30] [--json OUT]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from trellis.geometry.label_surfaces import SMOOTHING_ITERATIONS, SMOOTHING_REACH_VOXELS
from trellis.geometry.source_grid import label_boxes
from trellis.geometry.volume import LabelVolume, label_surfaces, read_volume
from trellis.utils.mesh_repair import count_self_intersections


def voxelise(points: np.ndarray, faces: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Voxel centres inside a closed mesh in index space: signed crossings of rays along the last axis, in float64.

    Made for triangles of about a voxel: every triangle tests each column in its bounding rectangle.
    """
    tiny = np.array([3.1e-7, 5.3e-7])  # moves the columns off vertices and edges
    crossings = np.zeros((*shape[:2], shape[2] + 1), dtype=np.int32)
    a, b, c = np.moveaxis(points[faces], 1, 0)
    low = np.ceil(np.minimum(np.minimum(a, b), c)[:, :2] - tiny).astype(int)
    high = np.floor(np.maximum(np.maximum(a, b), c)[:, :2] - tiny).astype(int)
    area = (b[:, 0] - a[:, 0]) * (c[:, 1] - a[:, 1]) - (b[:, 1] - a[:, 1]) * (c[:, 0] - a[:, 0])
    extent = np.maximum(high - low + 1, 0).max(axis=0, initial=0)
    for dx in range(extent[0]):
        for dy in range(extent[1]):
            column = low + [dx, dy]
            use = np.flatnonzero((column <= high).all(axis=1) & (area != 0))
            q = column[use] + tiny
            weights = []
            for u, v in ((b, c), (c, a), (a, b)):
                edge = v[use, :2] - u[use, :2]
                away = q - u[use, :2]
                weights.append((edge[:, 0] * away[:, 1] - edge[:, 1] * away[:, 0]) / area[use])
            w = np.stack(weights, axis=1)
            hit = (w > 0).all(axis=1)
            at, w = use[hit], w[hit]
            z = w[:, 0] * a[at, 2] + w[:, 1] * b[at, 2] + w[:, 2] * c[at, 2]
            first = np.clip(np.ceil(z).astype(int), 0, shape[2])
            x, y = column[at].T
            # an outward face seen from below is an exit, from above an entry
            np.add.at(crossings, (x, y, first), np.where(area[at] < 0, 1, -1))
    return np.cumsum(crossings, axis=2)[..., :-1] > 0


def neighbour_angles_deg(points: np.ndarray, faces: np.ndarray, skip: np.ndarray | None = None) -> np.ndarray:
    """Angle between the normals of the two faces at each edge that has two, in degrees.

    Edges between two vertices of `skip` ([V] bool) are left out.
    """
    a, b, c = np.moveaxis(points[faces], 1, 0)
    normals = np.cross(b - a, c - a)
    length = np.linalg.norm(normals, axis=1, keepdims=True)
    normals = normals / np.maximum(length, 1e-30)
    edges = np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), axis=1)
    face = np.tile(np.arange(len(faces)), 3)
    key = edges[:, 0] * (faces.max() + 1) + edges[:, 1]
    _, inverse, count = np.unique(key, return_inverse=True, return_counts=True)
    order = np.argsort(inverse, kind="stable")
    order = order[count[inverse[order]] == 2].reshape(-1, 2)
    if skip is not None:
        order = order[~skip[edges[order[:, 0]]].all(axis=1)]
    cosine = np.einsum("ij,ij->i", normals[face[order[:, 0]]], normals[face[order[:, 1]]])
    return np.degrees(np.arccos(np.clip(cosine, -1, 1)))


def junction_vertices(surfaces: dict[int, tuple[np.ndarray, np.ndarray]]) -> dict[int, np.ndarray]:
    """Per label [V] bool: vertices of edges where more than two different triangles of all labels meet."""
    everything = np.concatenate([points for points, _ in surfaces.values()])
    _, same = np.unique(everything, axis=0, return_inverse=True)
    same = same.reshape(-1)
    starts = np.cumsum([0] + [len(points) for points, _ in surfaces.values()])
    faces = np.concatenate([same[f + start] for (_, f), start in zip(surfaces.values(), starts)])
    faces = np.unique(np.sort(faces, axis=1), axis=0)
    edges, uses = np.unique(
        np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [0, 2]]]), axis=0, return_counts=True
    )
    marked = np.zeros(len(everything), dtype=bool)
    marked[edges[uses > 2]] = True
    marked = marked[same]
    return {label: marked[start:end] for label, start, end in zip(surfaces, starts, starts[1:])}


def signed_distance_to_voxels(points: np.ndarray, faces: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Signed distance in voxels of face centres to the voxel stairs, negative inside; [F] float64.

    Index space: the nearest point of the stairs lies on a voxel's face, so boxes of the neighbourhood are enough.
    """
    centres = points[faces].mean(axis=1)
    base = np.rint(centres).astype(int)
    padded = np.pad(mask, 3)
    inside = padded[tuple((base + 3).T)]
    best = np.full(len(centres), np.inf)
    for offset in np.array(np.meshgrid(*[np.arange(-2, 3)] * 3, indexing="ij")).reshape(3, -1).T:
        other = base + offset
        opposite = padded[tuple((other + 3).T)] != inside
        gap = np.maximum(np.abs(centres - other) - 0.5, 0)
        best = np.where(opposite, np.minimum(best, np.linalg.norm(gap, axis=1)), best)
    return np.where(inside, -best, best)


Surfaces = dict[int, tuple[np.ndarray, np.ndarray]]


def windows(surfaces: Surfaces, data: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """label, its voxels [x, y, z] bool around its surface, and the surface in the index space of these voxels."""
    for label, box in label_boxes(data, list(surfaces)).items():
        points, faces = surfaces[label]
        origin = np.array([max(part.start - 2, 0) for part in box])
        end = np.ceil(points.max(axis=0)).astype(int) + 2
        yield label, data[tuple(slice(*ends) for ends in zip(origin, end))] == label, points - origin, faces


def faithfulness(surfaces: Surfaces, data: np.ndarray) -> dict[str, np.ndarray]:
    """[labels] float64 each: Dice and relative volume error when voxelised again, 95th percentile of the angles."""
    dice, volume_error, angle = [], [], []
    for _, mask, points, faces in windows(surfaces, data):
        again, voxels = voxelise(points, faces, mask.shape), np.count_nonzero(mask)
        dice.append(2 * np.count_nonzero(again & mask) / (np.count_nonzero(again) + voxels))
        a, b, c = np.moveaxis(points[faces], 1, 0)
        volume_error.append(np.einsum("ij,ij->", a, np.cross(b, c)) / 6 / voxels - 1)
        angle.append(np.percentile(neighbour_angles_deg(points, faces), 95))
    return {"dice": np.array(dice), "volume_error": np.array(volume_error), "angle_p95_deg": np.array(angle)}


def angles_off_junctions_deg(surfaces: Surfaces) -> dict[int, np.ndarray]:
    """Per label the angles at edges on which no third surface ends."""
    junctions = junction_vertices(surfaces)
    return {label: neighbour_angles_deg(*surface, junctions[label]) for label, surface in surfaces.items()}


def signed_medians(surfaces: Surfaces, data: np.ndarray) -> np.ndarray:
    """[labels] float64, median signed distance in voxels to the voxel stairs."""
    parts = windows(surfaces, data)
    return np.array([np.median(signed_distance_to_voxels(points, faces, mask)) for _, mask, points, faces in parts])


def measure(
    volume: LabelVolume, *, reach: float = SMOOTHING_REACH_VOXELS, iterations: int = SMOOTHING_ITERATIONS
) -> dict:
    """Figures over all labels of a volume; everything in index space, so that voxels are unit cubes."""
    plain = LabelVolume(volume.data, np.eye(4))
    start = time.process_time()
    surfaces = label_surfaces(plain, smoothing_reach_voxels=reach, smoothing_iterations=iterations)
    seconds = time.process_time() - start
    figures = faithfulness(surfaces, volume.data)
    angles = np.concatenate([neighbour_angles_deg(*surface) for surface in surfaces.values()])
    smooth = angles_off_junctions_deg(surfaces)
    smooth95 = [float(np.percentile(a, 95)) for a in smooth.values()]
    signed = signed_medians(surfaces, volume.data)
    return {
        "labels": len(surfaces),
        "reach_voxels": reach,
        "iterations": iterations,
        "cpu_s": round(seconds, 3),
        "faces": sum(len(faces) for _, faces in surfaces.values()),
        "dice_min": float(figures["dice"].min()),
        "volume_error_median": float(np.median(np.abs(figures["volume_error"]))),
        "volume_error_worst": float(np.max(np.abs(figures["volume_error"]))),
        "angle_p95_deg_all_faces": float(np.percentile(angles, 95)),
        "angle_p95_deg_median": float(np.median(figures["angle_p95_deg"])),
        "angle_p95_deg_worst": float(figures["angle_p95_deg"].max()),
        "angle_p95_deg_off_junctions_median": float(np.median(smooth95)),
        "angle_p95_deg_off_junctions_worst": max(smooth95),
        "edges_on_junctions": 1 - sum(map(len, smooth.values())) / len(angles),
        "self_intersecting_faces": sum(count_self_intersections(*surface) for surface in surfaces.values()),
        "labels_above_32_deg": int(np.count_nonzero(figures["angle_p95_deg"] > 32)),
        "signed_distance_median_voxels": float(np.median(signed)),
        "signed_distance_worst_voxels": float(np.max(np.abs(signed))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("volume", type=Path, nargs="+")
    parser.add_argument("--reach", type=float, nargs="+", default=[SMOOTHING_REACH_VOXELS])
    parser.add_argument("--iterations", type=int, nargs="+", default=[SMOOTHING_ITERATIONS])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for path in args.volume:
        volume = read_volume(path)
        for reach in args.reach:
            for iterations in args.iterations:
                figures = measure(volume, reach=reach, iterations=iterations)
                rows.append({"volume": path.name, "date": time.strftime("%Y-%m-%d"), **figures})
                print(json.dumps(rows[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
