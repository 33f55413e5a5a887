"""Time, memory and error of mesh -> TSDF -> mesh, and time and memory of the metrics, on one core.

    OMP_NUM_THREADS=1 python benchmarks/bench_isosurface.py [--mesh MESH] [--resolutions 64 128 512 1024] [--metrics]

Without --mesh: the fsaverage5 pial surface that nilearn brings along, each triangle cut in four (81,920 triangles).
Errors are in voxels, from area-uniform samples, exact point to triangle.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import numpy as np

from trellis.geometry.isosurface import extract_mesh
from trellis.geometry.metrics import euler_and_open_edges, evaluate_pair
from trellis.geometry.sdf import mesh_to_sparse_sdf
from trellis.geometry.surface_distance import ClosestTriangle, sample_surface


def pial_surface() -> tuple[np.ndarray, np.ndarray]:
    import nibabel
    import nilearn
    import trimesh

    folder = Path(nilearn.__file__).parent / "datasets" / "data" / "fsaverage5"
    points, triangles = (array.data for array in nibabel.load(folder / "pial_left.gii.gz").darrays)
    mesh = trimesh.Trimesh(points, triangles, process=False).subdivide()
    return np.array(mesh.vertices), np.array(mesh.faces)


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(truth: tuple[np.ndarray, np.ndarray], resolution: int, samples: int, metrics: bool) -> dict[str, float]:
    blocks = mesh_to_sparse_sdf(*truth, resolution)
    extract_mesh(blocks.__class__(blocks.block_index[:1], blocks.block_sdf[:1], blocks.to_world, resolution))  # tables
    row: dict[str, float] = {"resolution": resolution, "blocks": blocks.num_blocks, "peak_gib_before": peak_gib()}
    start = time.process_time()
    vertices, faces = extract_mesh(blocks)
    row |= {"extract_cpu_s": time.process_time() - start, "peak_gib": peak_gib()}
    row |= {"vertices": len(vertices), "faces": len(faces), "open_edges": euler_and_open_edges(vertices, faces)[1]}
    surface = ClosestTriangle(*truth)
    points, _ = sample_surface(vertices, faces, samples, seed=0)
    distance, face = surface.query(points)
    side = np.sign(((points - truth[0][truth[1][face, 0]]) * surface.normals[face]).sum(axis=1))
    voxel = blocks.voxel_size_mm
    row |= {
        "mean": distance.mean() / voxel,
        "p99": np.quantile(distance, 0.99) / voxel,
        "max": distance.max() / voxel,
        "signed_mean": (side * distance).mean() / voxel,
    }
    if metrics:
        start = time.process_time()
        scores = evaluate_pair((vertices, faces), truth, resolution, to_world=blocks.to_world)
        row |= {"metrics_cpu_s": time.process_time() - start, "peak_gib_metrics": peak_gib()}
        row |= {name: scores[name] for name in ("dice", "hd95_mm", "assd_mm")}
    return {name: round(float(value), 5) for name, value in row.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mesh", type=Path)
    parser.add_argument("--resolutions", type=int, nargs="+", default=[64, 128, 512, 1024])
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--metrics", action="store_true", help="also time evaluate_pair")
    options = parser.parse_args()
    if options.mesh:
        from trellis.utils.mesh_utils import read_mesh

        mesh = read_mesh(options.mesh)
        truth = mesh.vertices, mesh.faces
    else:
        truth = pial_surface()
    print(json.dumps({"numpy": np.__version__, "vertices": len(truth[0]), "faces": len(truth[1])}))
    for resolution in options.resolutions:
        print(json.dumps(measure(truth, resolution, options.samples, options.metrics)), flush=True)


if __name__ == "__main__":
    main()
