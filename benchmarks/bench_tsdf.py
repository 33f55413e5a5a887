"""Mesh in memory -> sparse TSDF npz on disk: time by stage, peak memory, and a check against brute force.

    OMP_NUM_THREADS=1 python benchmarks/bench_tsdf.py [--resolutions 64 512 1024] [--device cpu] [--check 200]

The mesh is fsaverage5's left pial surface with every triangle divided once (81,920 triangles), or `--mesh FILE`: a
mesh, or an npz with `vertices` and `faces`. Each resolution runs in a process of its own; kernels are loaded by a run
at 32 before the clock starts ("start-up"). With `--repeats N` the field's time is the median of N runs after one more;
with `--compare-cpu` the result is also held against the CPU's.
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
    if path and path.endswith(".npz"):
        with np.load(path, allow_pickle=False) as file:
            return file["vertices"].astype(np.float64), file["faces"].astype(np.int64)
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
    from sdf_oracle import block_voxels, oracle_distance, oracle_winding

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


def difference_from_cpu(vertices: np.ndarray, faces: np.ndarray, blocks: object, sign_method: str) -> dict[str, object]:
    """Whether the block lists agree, and the largest difference of stored values (voxels) and of their signs."""
    from trellis.geometry.sdf import mesh_to_sparse_sdf

    other = mesh_to_sparse_sdf(vertices, faces, blocks.resolution, device="cpu", sign_method=sign_method)
    if not np.array_equal(blocks.block_index, other.block_index):
        return {"same_blocks_as_cpu": False}
    values = [b.block_sdf.astype(np.float32) * b.band_voxels for b in (blocks, other)]
    return {
        "same_blocks_as_cpu": True,
        "values_unlike_cpu": int((values[0] != values[1]).sum()),
        "difference_from_cpu_voxels": float(np.abs(values[0] - values[1]).max()),
        "signs_unlike_cpu": int((np.signbit(values[0]) != np.signbit(values[1])).sum()),
    }


def measure(options: argparse.Namespace, resolution: int) -> dict[str, object]:
    """One resolution, in this process."""
    vertices, faces = load_mesh(options.mesh)
    from trellis.geometry.sdf import StageTimes, mesh_to_sparse_sdf
    from trellis.utils.io_utils import save_sparse_sdf
    from trellis.utils.warp_utils import get_warp

    on_cuda = options.device != "cpu"
    begin = time.perf_counter()
    mesh_to_sparse_sdf(vertices, faces, 32, device=options.device, sign_method=options.sign_method)
    start_up = time.perf_counter() - begin
    runs = []
    for _ in range(options.repeats + 1 if options.repeats > 1 else 1):
        cpu, wall = time.process_time(), time.perf_counter()
        blocks = mesh_to_sparse_sdf(vertices, faces, resolution, device=options.device, sign_method=options.sign_method)
        runs.append((time.process_time() - cpu, time.perf_counter() - wall))
    field_cpu, field_wall = np.median(runs[-options.repeats :], axis=0).tolist()
    times = StageTimes(device=options.device)
    mesh_to_sparse_sdf(vertices, faces, resolution, device=options.device, sign_method=options.sign_method, times=times)
    cpu, wall = time.process_time(), time.perf_counter()
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
        "field_wall_runs_s": [run[1] for run in runs],
        "total_cpu_s": field_cpu + time.process_time() - cpu,
        "total_wall_s": field_wall + time.perf_counter() - wall,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "stages_cpu_s": times.cpu,
        "stages_wall_s": times.wall,
    }
    if on_cuda:
        warp = get_warp()
        device = warp.get_device(options.device)
        result |= {
            "device": device.name,
            "warp": warp.__version__,
            "peak_device_mb": warp.get_mempool_used_mem_high(device) / 2**20,
            "device_in_use_mb": (device.total_memory - device.free_memory) / 2**20,
        }
    if options.compare_cpu:
        result |= difference_from_cpu(vertices, faces, blocks, options.sign_method)
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
    parser.add_argument("--repeats", type=int, default=1, help="timed runs; above 1 a first one is not counted")
    parser.add_argument("--compare-cpu", action="store_true", help="compute the field on the CPU too and compare")
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
    card = rows[0].get("device", options.device)
    print(
        f"{platform.processor() or platform.machine()}, {card}, {rows[0]['triangles']} triangles, signs "
        f"{options.sign_method}\n"
    )
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
    if options.device != "cpu":
        print()
        for r in rows:
            print(f"{r['resolution']}: {r['peak_device_mb']:.0f} MiB of arrays at most on the device")
    if options.compare_cpu:
        print()
        for r in rows:
            same = ", ".join(f"{key} {r[key]}" for key in r if "cpu" in key and "_s" not in key)
            print(f"{r['resolution']}: {512 * r['blocks']} values: {same}")
    if options.check:
        print()
        for r in rows:
            print(
                f"{r['resolution']}: of {options.check} voxels {r['wrong_signs']} wrong signs, "
                f"largest error {r['error_voxels']:.4f} voxels"
            )
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
