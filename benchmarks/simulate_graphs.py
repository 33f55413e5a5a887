"""How often steps of varying sizes would run through CUDA graphs: the sizes alone, on a CPU, nothing is computed.

python benchmarks/simulate_graphs.py --resolution 256 --shapes 40 --steps 1000

The shapes are the ellipsoids of bench_varying_sizes.py, in random order. Prints the blocks of the smallest and largest,
graphs at the end, recordings, the share of steps through a graph by quarters of the run, and how far batches were
filled up on average: for the sizes as collate counts them, and without the attention windows, which are then bounded.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace

import torch
from bench_varying_sizes import ellipsoid_batch

from trellis.models.autoencoders.pass_graphs import PassGraphs
from trellis.models.autoencoders.pass_sizes import Sizes


class Recorder:
    """Stands in for the card: runs the function again, and counts."""

    bytes = 0

    def __init__(self) -> None:
        self.recordings = 0

    def follow(self) -> None:
        pass

    def release(self) -> None:
        pass

    def free_bytes(self) -> int:
        return 1 << 60

    def rehearse(self, function: Callable[[], None]) -> int:
        function()
        return 0

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        self.recordings += 1
        function()
        return function


def sizes_of(resolution: int, half_axes: torch.Tensor) -> Sizes:
    batch = ellipsoid_batch(resolution, half_axes, "cpu")
    _, rows2, rows4, blocks = batch["level_sizes"]
    return Sizes(blocks, rows2, rows4, batch["window_sizes"])


def simulate(sizes: list[Sizes], order: list[int], extent: int) -> dict:
    recorder = Recorder()
    graphs, weight = PassGraphs(lambda: recorder), torch.zeros(1, requires_grad=True)
    hits, filled = [], []

    def work(inputs: dict, size: Sizes, weights: list) -> dict:
        filled.append(size.blocks)
        return {"out": inputs["coords"][:, :1] * weights[0]}

    for number in order:
        size, before = sizes[number], graphs.hits
        filled.clear()
        coords = torch.zeros(size.blocks, 4, dtype=torch.int32)
        graphs.run("step", size, {"coords": coords}, work, [weight], samples=1, extent=extent, train=True)
        hits.append(filled[-1] / size.blocks - 1 if graphs.hits > before else None)
    quarter = len(order) // 4
    through = [h for h in hits if h is not None]
    return {
        "graphs": len(graphs._recordings),
        "recorded": recorder.recordings // 2,
        "through_graphs": [
            round(1 - hits[i * quarter : (i + 1) * quarter].count(None) / quarter, 3) for i in range(4)
        ],
        "filled_up": round(sum(through) / max(1, len(through)), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--shapes", type=int, default=40)
    parser.add_argument("--steps", type=int, default=1000)
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    sizes = []
    for _ in range(args.shapes):
        axes = 0.4 + 0.6 * torch.rand(3, generator=generator)
        sizes.append(sizes_of(args.resolution, 0.475 * axes / axes.max()))
    order = torch.randint(args.shapes, (args.steps,), generator=generator).tolist()
    blocks = sorted(s.blocks for s in sizes)
    print(json.dumps({**vars(args), "blocks": [blocks[0], blocks[-1]]}))
    for name, given in (("counted", sizes), ("bounded", [replace(s, windows={}) for s in sizes])):
        print(json.dumps({"windows": name, **simulate(given, order, args.resolution // 8)}), flush=True)


if __name__ == "__main__":
    main()
