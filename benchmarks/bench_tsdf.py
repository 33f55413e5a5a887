"""Mesh in memory -> sparse TSDF npz on disk: time by stage, peak memory, and a check against brute force.

    OMP_NUM_THREADS=1 python benchmarks/bench_tsdf.py [--resolutions 64 512 1024] [--device cpu] [--check 200]

The mesh is fsaverage5's left pial surface with every triangle divided once (81,920 triangles), or `--mesh FILE`. Each
resolution runs in a process of its own; kernels are loaded by a run at 32 before the clock starts ("start-up").
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


def load_mesh(path: str | None) -> tuple[np.ndarray, np.ndarray]:
    if path:
        from trellis.utils.mesh_utils import read_mesh

        mesh = read_mesh(path)
        return mesh.vertices, mesh.faces
    import nibabel
    import trimesh
    from nilearn.datasets import fetch_surf_fsaverage

    surface = nibabel.load(fetch_surf_fsaverage("fsaverage5")["pial_left"])
    vertices, faces = surface.agg_data("pointset").astype(np.float64), surface.agg_data("triangle").astype(np.int64)
    return trimesh.remesh.subdivide(vertices, faces)


def brute_force_error(vertices: np.ndarray, faces: np.ndarray, blocks: object, count: int) -> dict[str, float]:
    """Largest distance error in voxels and number of wrong signs over `count` random voxels of the blocks."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "geometry"))
    from test_sdf import block_voxels, oracle_distance, oracle_winding

    from trellis.geometry.transforms import voxel_centres, world_to_grid

    coords, values = block_voxels(blocks)
    pick = np.random.default_rng(0).choice(len(coords), count, replace=False)
    points = voxel_centres(coords[pick], blocks.resolution)
    grid = world_to_grid(vertices, blocks.to_world)
    distance = oracle_distance(points, grid, faces) * blocks.resolution
    inside = oracle_winding(points, grid, faces) > 0.5
    band = blocks.band_voxels
    expected = np.clip(np.where(inside, -distance, distance), -band, band)
    wrong = ((values[pick] < 0) != inside) & (distance > 1e-3)
    return {"error_voxels": float(np.abs(values[pick] * band - expected).max()), "wrong_signs": int(wrong.sum())}


def measure(options: argparse.Namespace, resolution: int) -> dict[str, object]:
    """One resolution, in this process."""
    vertices, faces = load_mesh(options.mesh)
    from trellis.geometry.sdf import StageTimes, mesh_to_sparse_sdf
    from trellis.utils.io_utils import save_sparse_sdf

    begin = time.perf_counter()
    mesh_to_sparse_sdf(vertices, faces, 32, device=options.device, sign_method=options.sign_method)
    start_up = time.perf_counter() - begin
    times = StageTimes()
    cpu, wall = time.process_time(), time.perf_counter()
    blocks = mesh_to_sparse_sdf(
        vertices, faces, resolution, device=options.device, sign_method=options.sign_method, times=times
    )
    field_cpu, field_wall = time.process_time() - cpu, time.perf_counter() - wall
    with tempfile.TemporaryDirectory() as folder:
        save_sparse_sdf(Path(folder) / "shape.npz", blocks)
        times.lap("npz")
        size = (Path(folder) / "shape.npz").stat().st_size
    result = {
        "resolution": resolution,
        "triangles": len(faces),
        "blocks": blocks.num_blocks,
        "active": int(((blocks.block_sdf.view(np.uint16) & 0x7FFF) < 0x3C00).sum()),
        "npz_mb": size / 1e6,
        "start_up_s": start_up,
        "field_cpu_s": field_cpu,
        "field_wall_s": field_wall,
        "total_cpu_s": time.process_time() - cpu,
        "total_wall_s": time.perf_counter() - wall,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "stages_cpu_s": times.cpu,
        "stages_wall_s": times.wall,
    }
    if options.check:
        result |= brute_force_error(vertices, faces, blocks, options.check)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolutions", type=int, nargs="+", default=[64, 512, 1024])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sign-method", default="auto")
    parser.add_argument("--mesh", help="a mesh file instead of the pial surface")
    parser.add_argument("--check", type=int, default=0, help="voxels to compare with brute force")
    parser.add_argument("--json", help="also write the figures there")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options, options.child)))
        return
    arguments = [a for a in sys.argv[1:] if a]
    rows = []
    for resolution in options.resolutions:
        child = [sys.executable, __file__, *arguments, "--child", str(resolution)]
        output = subprocess.run(child, stdout=subprocess.PIPE, text=True, check=True).stdout
        rows.append(json.loads(output.splitlines()[-1]))
    print(f"{platform.processor() or platform.machine()}, {options.device}, {rows[0]['triangles']} triangles, signs "
          f"{options.sign_method}\n")
    print("| resolution | blocks | active voxels | field, CPU s (wall) | to npz, CPU s (wall) | peak MB | npz MB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for r in rows:
        print(
            f"| {r['resolution']} | {r['blocks']} | {r['active']} | {r['field_cpu_s']:.2f} ({r['field_wall_s']:.2f}) | "
            f"{r['total_cpu_s']:.2f} ({r['total_wall_s']:.2f}) | {r['peak_rss_mb']:.0f} | {r['npz_mb']:.1f} |"
        )
    key = "stages_cpu_s" if options.device == "cpu" else "stages_wall_s"
    stages = list(dict.fromkeys(stage for r in rows for stage in r[key]))
    print(f"\n| stage, s | {' | '.join(str(r['resolution']) for r in rows)} |\n| --- |{' --- |' * len(rows)}")
    for stage in stages:
        print(f"| {stage} | {' | '.join(format(r[key].get(stage, 0), '.3f') for r in rows)} |")
    if options.check:
        print()
        for r in rows:
            print(f"{r['resolution']}: of {options.check} voxels {r['wrong_signs']} wrong signs, "
                  f"largest error {r['error_voxels']:.4f} voxels")
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
