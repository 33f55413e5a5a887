"""How far the sizes of shapes let training scale over ranks, with the shapes of a step shared out by size and without.

python benchmarks/bench_rank_balance.py DATA --resolution 512 [--split train] [--ranks 2 4 8] [--each 1 2 4]

DATA is a prepared folder; only its metadata.csv is read, and nothing is trained. A step takes as long as the blocks of
its slowest rank, so the figures are bounds: all blocks over those of the slowest ranks, of `--ranks` ranks with
`--each` shapes a step. What the sum of the gradients takes comes on top.
"""

from __future__ import annotations

import argparse
import itertools
import json

import numpy as np

from trellis.datasets.sparse_sdf import SparseSDF
from trellis.trainers.sampler import ResumableSampler


def bound(sizes: list[int], ranks: int, each: int, steps: int, *, shared_out: bool) -> float:
    """Throughput over that of one rank."""
    samplers = [
        ResumableSampler(
            len(sizes), each, seed=0, rank=rank, world_size=ranks, sizes=sizes if shared_out else None
        )
        for rank in range(ranks)
    ]
    total = slowest = 0
    for parts in itertools.islice(zip(*samplers), steps):
        sums = [sum(sizes[index] for _, index in part) for part in parts]
        total, slowest = total + sum(sums), slowest + max(sums)
    return total / slowest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--resolution", type=int, required=True)
    parser.add_argument("--split", default="train")
    parser.add_argument("--max-points", type=int, help="as dataset.args.max_points")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--each", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=5000)
    args = parser.parse_args()
    data = SparseSDF(args.data, resolution=args.resolution, split=args.split, max_points=args.max_points)
    sizes = data.expected_blocks()
    if sizes is None:
        parser.error(f"{args.data}: metadata.csv has no counts of voxels and blocks at {args.resolution}")
    low, middle, high = np.percentile(sizes, [0, 50, 100]).astype(int).tolist()
    print(json.dumps({"shapes": len(sizes), "blocks_least": low, "blocks_median": middle, "blocks_most": high}))
    for ranks, each in itertools.product(args.ranks, args.each):
        figures = {
            name: round(bound(sizes, ranks, each, args.steps, shared_out=shared_out), 3)
            for name, shared_out in (("slices", False), ("by_size", True))
        }
        print(json.dumps({"ranks": ranks, "each": each, **figures}))


if __name__ == "__main__":
    main()
