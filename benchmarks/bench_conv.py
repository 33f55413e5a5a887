"""Convolutions on the network's own grids, forward + backward, neighbour tables included.

python benchmarks/bench_conv.py [--dtype float16] [--graph] [--only D1] [--json FILE]

Grids of the spherical shell at R = 512: E1, E2, E3 (encoder) and D1, D2 (decoder, full below each block). Four
submanifold 3x3x3 convolutions in a row, C -> C; the same number after a subdivision each (the collapsed form, on the
parents), side by side, since each makes a finer grid; and the last stage (subdivide, 32 -> 32, to the scalar). One
backward pass over all four, and the tables that the grid needs. Prints milliseconds (median, fastest, slowest), peak
memory of PyTorch's allocator, and the floor at 790 TFLOP/s with every one of 27 (or 8) taps counted. Everything is
launched from the host; with --graph it is then recorded as one CUDA graph, as the network's passes are, and timed again
("graph_ms", median, and its spread): the difference is the host's.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from shell_batch import machine, shell_batch, timed
from torch import Tensor

from trellis.models.autoencoders.cuda_recorder import CudaRecorder
from trellis.modules.sparse.conv.functional import subdivide_conv3d, subdivide_conv_to_scalar, submanifold_conv3d
from trellis.modules.sparse.levels import Grid, Pyramid, Topology, build_pyramid

RATE = 790e12
LAYERS = 4


def grids(batch: dict) -> dict[str, Callable[[], Grid]]:
    """Makers of the grids, each from the blocks anew."""

    def pyramid() -> Pyramid:
        values = (batch[key] for key in ("block_coords", "block_sdf", "active", "level_sizes"))
        return build_pyramid(*values, num_samples=1, extent=batch["resolution"] // 8)

    def full(side: int) -> Grid:
        return Topology(batch["block_coords"], num_samples=1, extent=batch["resolution"] // 8).dense_grid(side)

    makers: dict[str, Callable[[], Grid]] = {f"E{i}": lambda i=i: pyramid().grids[i] for i in (1, 2, 3)}
    return makers | {f"D{i}": lambda i=i: full(1 << i) for i in (0, 1, 2)}


def recorded(function: Callable[[], None]) -> Callable[[], None]:
    """The kernels of a function as one CUDA graph."""
    recorder = CudaRecorder()
    recorder.rehearse(function)
    return recorder.record(function)


def measure(what: str, function: Callable[[], None], rows: int, floor_ms: float, args: argparse.Namespace) -> dict:
    function()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    times = timed(function, args.repeats)
    peak = torch.cuda.max_memory_allocated() / 1e9
    of_graph = {}
    if args.graph:
        again = timed(recorded(function), args.repeats)
        of_graph = {"graph_ms": round(statistics.median(again), 3)}
        of_graph |= {"graph_spread_ms": [round(t, 3) for t in (again[0], again[-1])]}
    return {
        "what": what,
        "voxels": rows,
        "median_ms": round(statistics.median(times), 3),
        "fastest_ms": round(times[0], 3),
        "slowest_ms": round(times[-1], 3),
        "peak_gb": round(peak, 2),
        "floor_ms": round(floor_ms, 2),
        **of_graph,
    }


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device="cuda") * scale).to(dtype).requires_grad_()


def four_convolutions(make: Callable[[], Grid], c: int, args: argparse.Namespace, name: str) -> dict:
    dtype = getattr(torch, args.dtype)
    rows = make().num_rows
    x = random(rows, c, dtype=dtype)
    weights = [random(27, c, c, dtype=dtype, scale=(27 * c) ** -0.5) for _ in range(LAYERS)]
    biases = [random(c, dtype=dtype) for _ in range(LAYERS)]
    handed = torch.randn(rows, c, device="cuda").to(dtype)

    def run() -> None:
        grid, y = make(), x
        for weight, bias in zip(weights, biases):
            y = submanifold_conv3d(y, weight, bias, grid)
        torch.autograd.grad(y, [x, *weights, *biases], handed)

    floor = 3 * LAYERS * 27 * 2e3 * rows * c * c / RATE
    return measure(f"{name}: {LAYERS} convolutions {c} -> {c}", run, rows, floor, args)


def four_after_subdivide(make: Callable[[], Grid], c: int, args: argparse.Namespace, name: str) -> dict:
    dtype = getattr(torch, args.dtype)
    parents = make().num_rows
    x = random(parents, c, dtype=dtype)
    weights = [random(27, c, c, dtype=dtype, scale=(27 * c) ** -0.5) for _ in range(LAYERS)]
    biases = [random(c, dtype=dtype) for _ in range(LAYERS)]
    handed = torch.randn(8 * parents, c, device="cuda").to(dtype)

    def run() -> None:
        grid = make()
        outputs = [subdivide_conv3d(x, weight, bias, grid) for weight, bias in zip(weights, biases)]
        torch.autograd.grad(outputs, [x, *weights, *biases], [handed] * LAYERS)

    floor = 3 * LAYERS * 8 * 2e3 * 8 * parents * c * c / RATE
    return measure(f"{name}: {LAYERS} x subdivide, convolution {c} -> {c}", run, 8 * parents, floor, args)


def last_stage(make: Callable[[], Grid], c: int, args: argparse.Namespace, name: str) -> dict:
    dtype = getattr(torch, args.dtype)
    parents = make().num_rows
    x = random(parents, c, dtype=dtype)
    parameters = [random(27, c, c, dtype=dtype, scale=0.03), random(c, dtype=dtype), random(1, c, dtype=dtype)]
    parameters.append(random(1, dtype=dtype))
    handed = torch.randn(parents, 8, device="cuda")

    def run() -> None:
        y = subdivide_conv_to_scalar(x, *parameters, make())
        torch.autograd.grad(y, [x, *parameters], handed)

    floor = 3 * 8 * 2e3 * 8 * parents * c * c / RATE
    return measure(f"{name}: subdivide, convolution {c} -> {c}, SiLU, to the scalar", run, 8 * parents, floor, args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--graph", action="store_true", help="time the recorded launches too")
    parser.add_argument("--only", default="", help="rows of a grid that begins with this, D3 the last stage")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    make = grids(shell_batch(args.resolution, "cuda"))
    results = {"date": date.today().isoformat(), **machine(), "dtype": args.dtype, "rows": []}
    jobs = [
        *((n, four_convolutions, make[n], c) for n, c in zip(("E1", "E2", "E3", "D1", "D2"), (64, 128, 512, 128, 64))),
        ("D1", four_after_subdivide, make["D0"], 128),
        ("D2", four_after_subdivide, make["D1"], 64),
        ("D3", last_stage, make["D2"], 32),
    ]
    for name, function, grid, channels in jobs:
        if not name.startswith(args.only):
            continue
        results["rows"].append(function(grid, channels, args, name))
        print(json.dumps(results["rows"][-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
