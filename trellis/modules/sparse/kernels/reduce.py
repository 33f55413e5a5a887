"""Row tiles of each sample, and sums over them in a fixed order: moments and plain sums."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trellis.modules.sparse.kernels.support import cdiv, power_of_2
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
        grid = (samples, cdiv(columns, COLUMNS))
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
        grid = (samples, cdiv(columns, COLUMNS))
        tile_moments_kernel[grid](counts, means, squares, first, total, mean, square, columns, BT=TILES, BC=COLUMNS)
    return total, mean, square


@triton.jit
def group_moments_kernel(
    spans, means, squares, first, weight, eps, mean_out, rstd_out, scale_out,
    C: tl.constexpr, WIDTH: tl.constexpr, BW: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / sqrt(variance + eps) of a sample and group from its tiles' moments, on all its channels."""
    sample = tl.program_id(0).to(tl.int64)
    local = tl.arange(0, BW)
    channel = tl.program_id(1) * WIDTH + local
    known = local < WIDTH
    begin = tl.load(first + sample)
    end = tl.load(first + sample + 1)
    acc = tl.zeros([BT, BW], tl.float32)
    rows = tl.zeros([BT], tl.float32)
    for start in range(begin, end, BT):
        tile = start + tl.arange(0, BT)
        live = tile < end
        n = (tl.load(spans + tile * 3 + 2, mask=live, other=0) - tl.load(spans + tile * 3 + 1, mask=live, other=0)).to(
            tl.float32
        )
        inside = live[:, None] & known[None, :]
        acc += tl.load(means + tile[:, None] * C + channel[None, :], mask=inside, other=0.0) * n[:, None]
        rows += n
    elements = tl.maximum(tl.sum(rows, 0), 1.0) * WIDTH
    mean = tl.sum(tl.sum(acc, 1), 0) / elements
    acc = tl.zeros([BT, BW], tl.float32)
    for start in range(begin, end, BT):
        tile = start + tl.arange(0, BT)
        live = tile < end
        n = (tl.load(spans + tile * 3 + 2, mask=live, other=0) - tl.load(spans + tile * 3 + 1, mask=live, other=0)).to(
            tl.float32
        )
        inside = live[:, None] & known[None, :]
        place = tile[:, None] * C + channel[None, :]
        delta = tl.where(inside, tl.load(means + place, mask=inside, other=0.0) - mean, 0.0)
        acc += tl.load(squares + place, mask=inside, other=0.0) + delta * delta * n[:, None]
    rstd = 1.0 / tl.sqrt(tl.sum(tl.sum(acc, 1), 0) / elements + eps)
    place = sample * C + channel
    w = tl.load(weight + channel, mask=known, other=0.0).to(tl.float32)
    tl.store(mean_out + place, tl.zeros([BW], tl.float32) + mean, mask=known)
    tl.store(rstd_out + place, tl.zeros([BW], tl.float32) + rstd, mask=known)
    tl.store(scale_out + place, w * rstd, mask=known)


@triton.jit
def group_gradients_kernel(
    sums, first, starts, scale, grad_bias, grad_weight, offset_out, slope_out,
    C: tl.constexpr, WIDTH: tl.constexpr, BW: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Sums of g and g x_hat over a sample's tiles, and their means over the group weighted by `scale`."""
    sample = tl.program_id(0).to(tl.int64)
    local = tl.arange(0, BW)
    channel = tl.program_id(1) * WIDTH + local
    known = local < WIDTH
    begin = tl.load(first + sample)
    end = tl.load(first + sample + 1)
    acc0 = tl.zeros([BT, BW], tl.float32)
    acc1 = tl.zeros([BT, BW], tl.float32)
    for start in range(begin, end, BT):
        tile = start + tl.arange(0, BT)
        inside = (tile < end)[:, None] & known[None, :]
        place = tile[:, None] * 2 * C + channel[None, :]
        acc0 += tl.load(sums + place, mask=inside, other=0.0)
        acc1 += tl.load(sums + place + C, mask=inside, other=0.0)
    g = tl.sum(acc0, 0)
    gx = tl.sum(acc1, 0)
    rows = tl.maximum(tl.load(starts + sample + 1) - tl.load(starts + sample), 1).to(tl.float32)
    place = sample * C + channel
    a = tl.load(scale + place, mask=known, other=0.0)
    tl.store(grad_bias + place, g, mask=known)
    tl.store(grad_weight + place, gx, mask=known)
    tl.store(offset_out + place, tl.zeros([BW], tl.float32) + tl.sum(g * a, 0) / (rows * WIDTH), mask=known)
    tl.store(slope_out + place, tl.zeros([BW], tl.float32) + tl.sum(gx * a, 0) / (rows * WIDTH), mask=known)


@triton.jit(do_not_specialize=["samples", "tiles", "rows"])
def spans_kernel(starts, spans, first, samples, tiles, rows, BT: tl.constexpr):
    tile = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    sample = tl.zeros([BT], tl.int64) + tl.maximum(samples - 1, 0)
    begin = tl.zeros([BT], tl.int64) + tl.load(starts + samples)
    end = begin
    done = tl.load(starts) * 0
    tl.store(first, done)
    for b in range(0, samples):
        low = tl.load(starts + b)
        high = tl.load(starts + b + 1)
        following = done + (high - low + rows - 1) // rows
        mine = (tile >= done) & (tile < following)
        at = low + (tile - done) * rows
        sample = tl.where(mine, b, sample)
        begin = tl.where(mine, at, begin)
        end = tl.where(mine, tl.minimum(at + rows, high), end)
        done = following
        tl.store(first + b + 1, done)
    live = tile < tiles
    tl.store(spans + tile * 3, sample, mask=live)
    tl.store(spans + tile * 3 + 1, begin, mask=live)
    tl.store(spans + tile * 3 + 2, end, mask=live)


def plan_tiles(starts: Tensor, num_rows: int, rows: int) -> RowTiles:
    """`trellis.modules.sparse.plans.plan_tiles` in one launch."""
    samples = starts.numel() - 1
    tiles = cdiv(num_rows, rows) + samples
    spans = torch.empty(tiles, 3, dtype=torch.int64, device=starts.device)
    first = torch.empty(samples + 1, dtype=torch.int64, device=starts.device)
    spans_kernel[(cdiv(max(tiles, 1), TILES),)](starts, spans, first, samples, tiles, rows, BT=TILES)
    return RowTiles(spans, first, rows)


def group_moments(
    tiles: RowTiles, means: Tensor, squares: Tensor, weight: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, 1 / sqrt(variance + eps) and weight times it, each float32 [B, C], of GroupNorm.

    Args:
        means, squares: float32 [T, C], mean and centred second moment of each tile and channel.
    """
    samples, channels = tiles.first.numel() - 1, means.shape[1]
    out = torch.empty(3, samples, channels, dtype=torch.float32, device=means.device)
    mean, rstd, scale = out.unbind(0)
    if samples:
        width = channels // groups
        group_moments_kernel[(samples, groups)](
            tiles.spans, means, squares, tiles.first, weight, eps, mean, rstd, scale,
            C=channels, WIDTH=width, BW=power_of_2(width), BT=TILES,
        )  # fmt: skip
    return mean, rstd, scale


def group_gradients(
    tiles: RowTiles, sums: Tensor, starts: Tensor, scale: Tensor, groups: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums of g and of g x_hat, and the groups' weighted means of both, each float32 [B, C]; sums: [T, 2 C]."""
    samples, channels = scale.shape
    out = torch.empty(4, samples, channels, dtype=torch.float32, device=scale.device)
    grad_bias, grad_weight, offset, slope = out.unbind(0)
    if samples:
        width = channels // groups
        group_gradients_kernel[(samples, groups)](
            sums, tiles.first, starts, scale, grad_bias, grad_weight, offset, slope,
            C=channels, WIDTH=width, BW=power_of_2(width), BT=TILES,
        )  # fmt: skip
    return grad_bias, grad_weight, offset, slope
