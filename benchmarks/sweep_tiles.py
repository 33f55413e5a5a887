"""Tiles of the convolution kernels on the network's own grids: the measurements behind `triton_tiles.TUNED`.

python benchmarks/sweep_tiles.py [--resolution 512] [--dtype float16] [--only gemm] [--table] [--json FILE]
python benchmarks/sweep_tiles.py --compile I/N      # only compile every N-th candidate from the I-th on, into the cache

Prints for each launch of a training step the candidates' median milliseconds, the fastest first, and the tile of the
table. Compile with several processes first: timing alone takes seconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from shell_batch import machine, shell_batch, timed
from torch import Tensor

from trellis.modules.sparse.conv.triton_gemm import gather_gemm
from trellis.modules.sparse.conv.triton_scalar import PROGRAMS, scalar_backward, scalar_forward
from trellis.modules.sparse.conv.triton_tiles import (
    CHILDREN,
    PAIRS,
    PARENTS,
    PLAIN,
    Tile,
    gemm_tile,
    scalar_tile,
    wgrad_tile,
)
from trellis.modules.sparse.conv.triton_wgrad import gather_wgrad, partial_sums
from trellis.modules.sparse.kernels.support import shared_memory
from trellis.modules.sparse.levels import build_pyramid

PLAIN_LAYERS = [
    ("E1", 32, 64), ("E1", 64, 64), ("E2", 64, 128), ("E2", 128, 128), ("E3", 128, 512), ("E3", 512, 512),
    ("D0", 512, 128), ("D1", 128, 64), ("D2", 64, 32),
]  # fmt: skip
"""Grid and channels of each submanifold convolution; the subdivided ones follow on D0 and D1."""
CHILD_LAYERS = [("D0", 128), ("D1", 64)]
LAST_LAYER = ("D2", 32)

Job = tuple[str, Tile, list[Tile], Callable[..., object]]


def candidates(base: Tile, shapes: list[Tile], stages: tuple[int, ...] = (3, 4, 5)) -> list[Tile]:
    """The table's tile, the same through L1 with some depths of the pipeline, and other shapes; without repeats."""
    found = [replace(base, stages=n, cache=".ca") for n in stages]
    found += [replace(s, stages=n, cache=c) for s in shapes for c in ("", ".ca") for n in (3, 4)]
    return list(dict.fromkeys([base, *found]))


def gemm_shapes(base: Tile) -> list[Tile]:
    if base.columns == 128:
        return [replace(base, rows=256, warps=8)]
    if base.columns > 128:
        return []
    return [replace(base, rows=256, warps=8) if base.rows == 128 else replace(base, rows=128, warps=4)]


def wgrad_shapes(base: Tile, taps: tuple[int, ...]) -> list[Tile]:
    """Several taps a program, where their sums fit into registers."""
    out = [replace(base, taps=t, depth=64) for t in taps if t * base.rows * base.columns <= 2 * 128 * 128]
    return [replace(s, warps=8) if s.taps * s.rows * s.columns > 128 * 128 else s for s in out]


def rows(count: int, channels: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(count, channels, device="cuda") * scale).to(dtype)


def jobs(resolution: int, dtype: torch.dtype) -> Iterator[Job]:
    """Name, tile of the table, candidates, and a launch with a given tile."""
    batch, memory = shell_batch(resolution, "cuda"), shared_memory(torch.device("cuda"))
    values = (batch[key] for key in ("block_coords", "block_sdf", "active", "level_sizes"))
    pyramid = build_pyramid(*values, num_samples=1, extent=resolution // 8)
    grids = {f"E{i}": pyramid.grids[i] for i in (1, 2, 3)}
    grids |= {f"D{i}": pyramid.topology.dense_grid(1 << i) for i in (0, 1, 2)}
    for name, a, b in PLAIN_LAYERS:
        table, count = grids[name].tap_table, grids[name].num_rows
        x, g = rows(count, a, dtype), rows(count, b, dtype)
        w = rows(27 * a, b, dtype, (27 * a) ** -0.5).view(27, a, b)
        base = gemm_tile(a, b, PLAIN, dtype, memory)
        launch = partial(gather_gemm, x, w, None, table)
        yield f"gemm {name} {a} -> {b}", base, candidates(base, gemm_shapes(base)), launch
        if (name, a) != ("E1", 32):
            base = gemm_tile(b, a, PLAIN, dtype, memory)
            launch = partial(gather_gemm, g, w, None, table, gradient=True)
            yield f"gemm {name} {b} -> {a} gradient", base, candidates(base, [], (3, 4)), launch
        base = wgrad_tile(a, b, PLAIN, dtype, memory)
        yield from wgrad_jobs(f"wgrad {name} {a} -> {b}", x, g, table, PLAIN, base, (1, 3))
    for name, c in CHILD_LAYERS:
        table, count = grids[name].tap_table, grids[name].num_rows
        x, g = rows(count, c, dtype), rows(8 * count, c, dtype)
        w = rows(64 * c, c, dtype, (27 * c) ** -0.5).view(64, c, c)
        base = gemm_tile(c, c, CHILDREN, dtype, memory)
        launch = partial(gather_gemm, x, w, None, table, mode=CHILDREN)
        yield f"gemm {name} {c} -> {c} children", base, candidates(base, gemm_shapes(base)), launch
        base = gemm_tile(c, c, PARENTS, dtype, memory)
        launch = partial(gather_gemm, g, w, None, table, mode=PARENTS, gradient=True)
        yield f"gemm {name} {c} -> {c} parents", base, candidates(base, [], (3, 4)), launch
        base = wgrad_tile(c, c, CHILDREN, dtype, memory)
        yield from wgrad_jobs(f"wgrad {name} {c} -> {c} children", x, g, table, CHILDREN, base, (2, 4))
    name, c = LAST_LAYER
    table, count = grids[name].tap_table, grids[name].num_rows
    x, hidden = rows(count, c, dtype), rows(2 * count, c, dtype)
    w = rows(64 * c, c, dtype, 0.03).view(64, c, c)
    bias, out_weight, out_bias = rows(1, c, dtype)[0], rows(1, c, dtype), rows(1, 1, dtype)[0]
    values, grad = (torch.randn(count, 8, device="cuda") for _ in range(2))
    sums = torch.empty(PROGRAMS, c + 1, device="cuda")
    base = scalar_tile(c, c, dtype, memory)
    tiles = candidates(base, gemm_shapes(base))
    yield "scalar forward", base, tiles, partial(scalar_forward, x, w, bias, out_weight, out_bias, table)

    where = {"first_child": 2, "group": 2, "hidden": hidden, "sums": sums}
    launch = partial(scalar_backward, grad, values, x, w, bias, out_weight, table, **where)
    yield "scalar backward, 2 children", base, tiles, launch
    base = gemm_tile(c, c, PARENTS, dtype, memory)
    launch = partial(gather_gemm, hidden, w, None, table, mode=PARENTS, gradient=True, group=2)
    yield "gemm D2 32 -> 32 parents, 2 children", base, candidates(base, gemm_shapes(base)), launch
    base = wgrad_tile(c, 2 * c, PAIRS, dtype, memory)
    yield from wgrad_jobs("wgrad D2 32 -> 2 x 32 pairs", x, hidden.view(count, -1), table, PAIRS, base, (2, 3, 4))


def wgrad_jobs(
    name: str, x: Tensor, g: Tensor, table: Tensor, mode: int, base: Tile, taps: tuple[int, ...]
) -> Iterator[Job]:
    def launch(tile: Tile) -> None:
        sums, share = partial_sums(x, g.shape[1], table, mode=mode, tile=tile)
        gather_wgrad(sums, share, x, g, table, mode=mode, tile=tile)

    yield name, base, candidates(base, wgrad_shapes(base, taps), (3, 4)), launch


def main() -> None:
    from triton.runtime.errors import OutOfResources

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16"])
    parser.add_argument("--only", default="", help="launches whose name contains this")
    parser.add_argument("--compile", metavar="I/N")
    parser.add_argument("--table", action="store_true", help="only the table's own tiles")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    share, number = (int(x) for x in (args.compile or "0/1").split("/"))
    resolution = 64 if args.compile else args.resolution
    results, place = [], 0
    for name, base, tiles, launch in jobs(resolution, getattr(torch, args.dtype)):
        if args.only not in name:
            continue
        found = []
        for tile in [base] if args.table else tiles:
            place += 1
            if args.compile and place % number != share:
                continue
            try:
                launch(tile=tile)
            except OutOfResources:
                continue
            if not args.compile:
                found.append((statistics.median(timed(partial(launch, tile=tile), 7)), tile))
        for time, tile in sorted(found, key=lambda f: f[0]):
            results.append({"launch": name, "ms": round(time, 4), "table": tile == base, **vars(tile)})
        if found:
            best = min(found, key=lambda f: f[0])
            own = next((f[0] for f in found if f[1] == base), float("nan"))
            print(f"{name}: {best[0]:.3f} {best[1]}, table {own:.3f}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({**machine(), "rows": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
