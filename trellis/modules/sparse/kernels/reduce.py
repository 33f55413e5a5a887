"""Sums over the row tiles of each sample, in a fixed order: moments and plain sums."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trellis.modules.sparse.plans import RowTiles

COLUMNS = 16
TILES = 256


@triton.jit(do_not_specialize=["columns"])
def tile_sums_kernel(partial, first, out, columns, BT: tl.constexpr, BC: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    known = column < columns
    begin = tl.load(first + sample)
    end = tl.load(first + sample + 1)
    acc = tl.zeros([BC], tl.float32)
    for start in range(begin, end, BT):
        tile = start + tl.arange(0, BT)
        inside = (tile < end)[:, None] & known[None, :]
        acc += tl.sum(tl.load(partial + tile[:, None] * columns + column[None, :], mask=inside, other=0.0), 0)
    tl.store(out + sample * columns + column, acc, mask=known)


@triton.jit(do_not_specialize=["columns"])
def tile_moments_kernel(
    counts, means, squares, first, total, mean_out, square_out, columns, BT: tl.constexpr, BC: tl.constexpr
):
    sample = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    known = column < columns
    begin = tl.load(first + sample)
    end = tl.load(first + sample + 1)
    acc = tl.zeros([BC], tl.float32)
    rows = 0.0
    for start in range(begin, end, BT):
        tile = start + tl.arange(0, BT)
        n = tl.load(counts + tile, mask=tile < end, other=0.0)
        inside = (tile < end)[:, None] & known[None, :]
        mean = tl.load(means + tile[:, None] * columns + column[None, :], mask=inside, other=0.0)
        acc += tl.sum(mean * n[:, None], 0)
        rows += tl.sum(n, 0)
    mean = acc / tl.maximum(rows, 1.0)
    acc = tl.zeros([BC], tl.float32)
    for start in range(begin, end, BT):
        tile = start + tl.arange(0, BT)
        n = tl.load(counts + tile, mask=tile < end, other=0.0)
        inside = (tile < end)[:, None] & known[None, :]
        place = tile[:, None] * columns + column[None, :]
        delta = tl.load(means + place, mask=inside, other=0.0) - mean[None, :]
        square = tl.load(squares + place, mask=inside, other=0.0)
        acc += tl.sum(square + tl.where(inside, delta * delta * n[:, None], 0.0), 0)
    tl.store(mean_out + sample * columns + column, mean, mask=known)
    tl.store(square_out + sample * columns + column, acc, mask=known)
    tl.store(total + sample, rows)


def sum_tiles(partial: Tensor, first: Tensor) -> Tensor:
    """[B, C] float32 sums of partial [T, C] over the tiles first[b] .. first[b + 1] - 1 of each sample."""
    samples, columns = first.numel() - 1, partial.shape[1]
    out = torch.empty(samples, columns, dtype=torch.float32, device=partial.device)
    if samples:
        grid = (samples, triton.cdiv(columns, COLUMNS))
        tile_sums_kernel[grid](partial, first, out, columns, BT=TILES, BC=COLUMNS)
    return out


def sum_moments(counts: Tensor, means: Tensor, squares: Tensor, first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [B], means [B, C] and centred second moments [B, C] of samples from those of their tiles.

    Two passes: the means, then sum(squares) + sum(n (mean_t - mean)^2) (Chan, Golub and LeVeque, 1983).

    Args:
        counts: float32 [T] rows of each tile; means, squares: float32 [T, C]; first: [B + 1] int64.
    """
    samples, columns = first.numel() - 1, means.shape[1]
    total = torch.empty(samples, dtype=torch.float32, device=means.device)
    mean, square = (torch.empty(samples, columns, dtype=torch.float32, device=means.device) for _ in range(2))
    if samples:
        grid = (samples, triton.cdiv(columns, COLUMNS))
        tile_moments_kernel[grid](
            counts, means, squares, first, total, mean, square, columns, BT=TILES, BC=COLUMNS
        )
    return total, mean, square


def tile_counts(tiles: RowTiles) -> Tensor:
    """float32 [T] rows of each tile."""
    return (tiles.spans[:, 2] - tiles.spans[:, 1]).float()
