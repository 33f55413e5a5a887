"""Tiles of the convolution kernels: a table of measured widths, a rule for the others. Nothing is tuned at run time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch

from trellis.modules.sparse.kernels.support import SharedMemory, power_of_2

PLAIN, CHILDREN, PARENTS, PAIRS = 0, 1, 2, 3
"""Which rows a tap reads: of the same grid; a child's 2x2x2 parents; the children that read a parent; the 2x2x3 parents
of two children that differ in z (weight gradients only)."""


@dataclass(frozen=True)
class Tile:
    """Rows, columns and depth of a program's tile, and launch options.

    For weight gradients: `taps` of one program (1 to 4, a divisor of 27, 8 or 12), `swap` for the transposed product.
    `cache` ".ca" keeps gathered rows in the L1 cache, which neighbouring rows of a tile then share.
    """

    rows: int
    columns: int
    depth: int
    taps: int = 1
    warps: int = 4
    stages: int = 3
    swap: bool = False
    cache: str = ""


TUNED: dict[tuple[str, int, int, int], Tile] = {
    ("gemm", PLAIN, 32, 64): Tile(128, 64, 32, 1, 4, 5),
    ("gemm", PLAIN, 64, 64): Tile(128, 64, 64, 1, 4, 5),
    ("gemm", PLAIN, 64, 32): Tile(256, 32, 64, 1, 8, 5),
    ("gemm", PLAIN, 64, 128): Tile(128, 128, 64, 1, 8, 5, cache=".ca"),
    ("gemm", PLAIN, 128, 128): Tile(128, 128, 64, 1, 8, 5, cache=".ca"),
    ("gemm", PLAIN, 128, 64): Tile(128, 64, 64, 1, 4, 5),
    ("gemm", PLAIN, 128, 512): Tile(128, 256, 64, 1, 8, 5, cache=".ca"),
    ("gemm", PLAIN, 512, 512): Tile(128, 256, 64, 1, 8, 7),
    ("gemm", PLAIN, 512, 128): Tile(128, 128, 64, 1, 4, 5),
    ("gemm", CHILDREN, 128, 128): Tile(128, 128, 64, 1, 4, 5, cache=".ca"),
    ("gemm", CHILDREN, 64, 64): Tile(128, 64, 64, 1, 4, 5),
    ("gemm", PARENTS, 128, 128): Tile(128, 128, 64, 1, 4, 5),
    ("gemm", PARENTS, 64, 64): Tile(128, 64, 64, 1, 4, 5),
    ("gemm", PARENTS, 32, 32): Tile(128, 32, 32, 1, 4, 5),
    ("wgrad", PLAIN, 32, 64): Tile(32, 64, 64, 3, 4, 4, swap=True, cache=".ca"),
    ("wgrad", PLAIN, 64, 64): Tile(64, 64, 64, 3, 4, 3, cache=".ca"),
    ("wgrad", PLAIN, 64, 128): Tile(64, 128, 64, 1, 4, 3, cache=".ca"),
    ("wgrad", PLAIN, 128, 128): Tile(128, 128, 64, 1, 8, 5),
    ("wgrad", PLAIN, 128, 512): Tile(128, 256, 64, 1, 8, 5),
    ("wgrad", PLAIN, 512, 512): Tile(128, 256, 64, 1, 8, 5),
    ("wgrad", PLAIN, 512, 128): Tile(128, 128, 64, 1, 8, 4, cache=".ca"),
    ("wgrad", PLAIN, 128, 64): Tile(128, 64, 64, 1, 4, 4, cache=".ca"),
    ("wgrad", PLAIN, 64, 32): Tile(64, 32, 64, 1, 4, 3, cache=".ca"),
    ("wgrad", CHILDREN, 128, 128): Tile(128, 128, 64, 1, 4, 4, cache=".ca"),
    ("wgrad", CHILDREN, 64, 64): Tile(64, 64, 64, 2, 4, 3),
    ("wgrad", PAIRS, 32, 64): Tile(32, 64, 64, 4, 4, 3, swap=True, cache=".ca"),
    ("scalar", CHILDREN, 32, 32): Tile(128, 32, 32, 1, 4, 5),
}
"""(kernel, mode, in, out) in 16 bit: the fastest of 7 to 15 tries each on the published network's grids, on an H100."""


def gemm_bytes(tile: Tile, dtype: torch.dtype, memory: SharedMemory) -> int:
    """Shared memory of `gather_gemm`, `scalar_forward` and `scalar_backward`, at most: rows and weights of a step."""
    return _pipeline_bytes(tile, (tile.rows + tile.columns) * tile.depth * dtype.itemsize, tile.rows, memory)


def wgrad_bytes(tile: Tile, dtype: torch.dtype, memory: SharedMemory) -> int:
    """Shared memory of `gather_wgrad`, at most: rows for each tap and gradients of a step, or half of the sums."""
    step = (tile.taps * tile.rows + tile.columns) * tile.depth * dtype.itemsize
    return max(_pipeline_bytes(tile, step, tile.taps * tile.depth, memory), 2 * tile.rows * tile.columns)


def _pipeline_bytes(tile: Tile, step: int, gathered: int, memory: SharedMemory) -> int:
    """Buffers between loads and products for a step's bytes, and for its gathered rows' numbers in every stage.

    A gather waits for its row numbers, so that the stages are shared between the numbers' way and the rows'
    (`benchmarks/check_shared_memory.py` compares with what Triton's compiler takes).
    """
    ahead = max(1, (tile.stages - 1) // 2)
    return (ahead + memory.reads_ahead) * step + tile.stages * 4 * gathered


def _fitted(tile: Tile, kernel_bytes: Callable[..., int], dtype: torch.dtype, memory: SharedMemory) -> Tile:
    """The tile with as many stages as shared memory holds, and if none are left, with half the depth."""
    while kernel_bytes(tile, dtype, memory) > memory.limit and (tile.stages > 2 or tile.depth > 16):
        tile = replace(tile, stages=tile.stages - 1) if tile.stages > 2 else replace(tile, depth=tile.depth // 2)
    return tile


@cache
def gemm_tile(c_in: int, c_out: int, mode: int, dtype: torch.dtype, memory: SharedMemory) -> Tile:
    """Of `gather_gemm`: rows, output channels, input channels."""
    depth = max(16, min(64, power_of_2(c_in)))
    columns = max(16, min(128, power_of_2(c_out)))
    if dtype == torch.float32:
        return Tile(64, min(columns, 64), min(depth, 32), 1, 4, 2)
    rule = Tile(128, columns, depth, 1, 4 if columns <= 64 else 8, 5 if depth == 64 else 3)
    return _fitted(TUNED.get(("gemm", mode, c_in, c_out), rule), gemm_bytes, dtype, memory)


@cache
def wgrad_tile(c_in: int, c_out: int, mode: int, dtype: torch.dtype, memory: SharedMemory) -> Tile:
    """Of `gather_wgrad`: input channels, output channels, rows of a step."""
    rows = max(16, min(128, power_of_2(c_in)))
    columns = max(16, min(128, power_of_2(c_out)))
    if dtype == torch.float32:
        return Tile(min(rows, 64), min(columns, 64), 32, 1, 4, 2)
    rule = Tile(rows, columns, 64, 1, 8 if rows * columns > 64 * 128 else 4, 3, swap=rows < 64 <= columns)
    return _fitted(TUNED.get(("wgrad", mode, c_in, c_out), rule), wgrad_bytes, dtype, memory)


@cache
def scalar_tile(c_in: int, c_out: int, dtype: torch.dtype, memory: SharedMemory) -> Tile:
    """Of `scalar_forward` and `scalar_backward`: parents, all output channels, input channels."""
    depth = max(16, min(64, power_of_2(c_in)))
    columns = max(16, power_of_2(c_out))
    if columns > 64:
        # all output channels in one tile: fewer rows
        rule = Tile(max(16, 4096 // columns), columns, min(depth, 16 if columns > 256 else 32), 1, 8, 2)
    elif dtype == torch.float32:
        rule = Tile(64, columns, min(depth, 32), 1, 4, 2)
    else:
        rule = TUNED.get(("scalar", 1, c_in, c_out), Tile(128, columns, depth, 1, 4, 3))
    return _fitted(rule, gemm_bytes, dtype, memory)
