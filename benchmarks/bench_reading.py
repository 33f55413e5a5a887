"""Time to read a prepared shape into training tensors, active mask and level sizes included, from page cache.

    OMP_NUM_THREADS=1 python benchmarks/bench_reading.py [--resolution 512] [--repeats 21] [--max-points 500000]

The shape is a sphere of radius 0.475: at 512 it has 26,888 blocks, 27.7 MB.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from pathlib import Path

import numpy as np

from trellis.datasets.sparse_sdf import SparseSDF
from trellis.utils.blocks import SparseSDFBlocks, block_voxel_offsets, morton_order
from trellis.utils.io_utils import save_sparse_sdf


def sphere(resolution: int) -> SparseSDFBlocks:
    n = resolution // 8
    blocks = np.stack(np.meshgrid(*[np.arange(n)] * 3, indexing="ij"), -1).reshape(-1, 3)
    near = np.abs(np.linalg.norm((blocks + 0.5) / n - 0.5, axis=1) - 0.475) < 12 / resolution
    blocks = blocks[near]
    voxels = blocks[:, None] * 8 + block_voxel_offsets()[None]
    distance = np.linalg.norm((voxels + 0.5) / resolution - 0.5, axis=-1) - 0.475
    sdf = np.clip(distance * resolution / 4, -1, 1).astype(np.float16)
    keep = (np.abs(sdf) < 1).any(axis=1)
    blocks, sdf = blocks[keep], sdf[keep]
    order = morton_order(blocks)
    return SparseSDFBlocks(blocks[order].astype(np.int16), sdf[order].reshape(-1, 8, 8, 8), np.eye(4), resolution)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--max-points", type=int, default=500_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"sphere_r{args.resolution}.npz"
        save_sparse_sdf(path, sphere(args.resolution))
        print(f"{platform.machine()}, numpy {np.__version__}, {path.stat().st_size / 1e6:.1f} MB")
        for name, options in (("whole", {}), (f"cropped to {args.max_points}", {"max_points": args.max_points})):
            dataset = SparseSDF(folder, resolution=args.resolution, **options)
            dataset[0]
            wall, user = [], []
            for _ in range(args.repeats):
                start, start_user = time.perf_counter(), time.process_time()
                sample = dataset[0]
                wall.append(time.perf_counter() - start)
                user.append(time.process_time() - start_user)
            print(
                f"{name}: median {np.median(wall) * 1e3:.1f} ms (CPU {np.median(user) * 1e3:.1f}), fastest "
                f"{min(wall) * 1e3:.1f}, slowest {max(wall) * 1e3:.1f}; {len(sample['block_coords'])} blocks"
            )


if __name__ == "__main__":
    main()
