"""GroupNorm + SiLU (+ pool) over the voxels of each sample: statistics in float32, no loop over samples on the host.

Once its statistics are known the norm is affine per sample and channel: scale (x - mean) + bias. Forward: a pass for
centred moments, one that applies. Backward: a pass for two sums per channel, one that applies. Only x and [B, C]
tables are kept for it. With POOL a row of the output is the sum over a voxel's n children / (n + 1), and the pooled
input comes out beside it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trellis.modules.sparse.kernels.reduce import group_gradients, group_moments
from trellis.modules.sparse.kernels.support import cdiv, power_of_2
from trellis.modules.sparse.levels import Grid
from trellis.modules.sparse.plans import RowTiles

TILE_ROWS, POOLED_ROWS = 1024, 128
"""Most rows of a tile of one sample, plain and with 8 children each: a tile leaves one row of partial sums."""
PROGRAMS = 132 * 4
"""Programs below which tiles become smaller, so that small levels fill the card too."""
CHANNELS = 64
"""Most channels of a program."""
MOMENT_ELEMENTS, STEP_ELEMENTS, POOLED_ELEMENTS = 4096, 1024, 2048
"""Elements that a program holds at a time: more loads in flight, but more registers."""


@triton.jit
def moments_kernel(x, spans, means, squares, C: tl.constexpr, BC: tl.constexpr, RB: tl.constexpr):
    tile = tl.program_id(0).to(tl.int64)
    begin = tl.load(spans + tile * 3 + 1)
    end = tl.load(spans + tile * 3 + 2)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    known = channel < C
    # moments about the mean of the first rows: near enough for float32, and no sums across threads in the loop
    rows = begin + tl.arange(0, RB)
    inside = (rows < end)[:, None] & known[None, :]
    v = tl.load(x + rows[:, None] * C + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    k = tl.minimum(tl.maximum(end - begin, 1), RB).to(tl.float32)
    origin = tl.sum(v, 0) / k
    plain = tl.zeros([RB, BC], tl.float32)
    square = tl.zeros([RB, BC], tl.float32)
    for r in range(begin, end, RB):
        rows = r + tl.arange(0, RB)
        inside = (rows < end)[:, None] & known[None, :]
        v = tl.load(x + rows[:, None] * C + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        d = tl.where(inside, v - origin[None, :], 0.0)
        plain += d
        square += d * d
    n = tl.maximum(end - begin, 1).to(tl.float32)
    total = tl.sum(plain, 0)
    tl.store(means + tile * C + channel, origin + total / n, mask=known)
    tl.store(squares + tile * C + channel, tl.maximum(tl.sum(square, 0) - total * total / n, 0.0), mask=known)


@triton.jit
def forward_kernel(
    x, starts, spans, mean, scale, bias, out, pooled, C: tl.constexpr, BC: tl.constexpr, RB: tl.constexpr,
    POOL: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    sample = tl.load(spans + tile * 3)
    begin = tl.load(spans + tile * 3 + 1)
    end = tl.load(spans + tile * 3 + 2)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    known = channel < C
    centre = tl.load(mean + sample * C + channel, mask=known, other=0.0)[None, :]
    a = tl.load(scale + sample * C + channel, mask=known, other=0.0)[None, :]
    b = tl.load(bias + channel, mask=known, other=0.0)[None, :]
    for r in range(begin, end, RB):
        rows = r + tl.arange(0, RB)
        live = rows < end
        inside = live[:, None] & known[None, :]
        place = rows[:, None] * C + channel[None, :]
        if POOL:
            first = tl.load(starts + rows, mask=live, other=0).to(tl.int64)
            n = tl.load(starts + rows + 1, mask=live, other=0) - first
            total = tl.zeros([RB, BC], tl.float32)
            plain = tl.zeros([RB, BC], tl.float32)
            for child in tl.static_range(0, 8):
                ok = (child < n)[:, None] & inside
                v = tl.load(x + (first + child)[:, None] * C + channel[None, :], mask=ok, other=0.0).to(tl.float32)
                y = (v - centre) * a + b
                total += tl.where(ok, y / (1.0 + tl.exp(-y)), 0.0)
                plain += v
            weight = (1.0 / (n + 1).to(tl.float32))[:, None]
            tl.store(pooled + place, (plain * weight).to(pooled.dtype.element_ty), mask=inside)
            y = total * weight
        else:
            v = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
            y = (v - centre) * a + b
            if SILU:
                y = y / (1.0 + tl.exp(-y))
        tl.store(out + place, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def normed_grad(x, grad, place, ok, centre, a, b, SILU: tl.constexpr):
    """x - mean in float32 and the gradient of the norm's output."""
    v = tl.load(x + place, mask=ok, other=0.0).to(tl.float32) - centre
    if SILU:
        y = v * a + b
        gate = 1.0 / (1.0 + tl.exp(-y))
        grad = grad * gate * (1.0 + y * (1.0 - gate))
    return v, tl.where(ok, grad, 0.0)


@triton.jit
def backward_kernel(
    x, starts, spans, grad, grad_pooled, mean, rstd, scale, bias, offset, slope, sums, out,
    C: tl.constexpr, BC: tl.constexpr, RB: tl.constexpr, POOL: tl.constexpr, SILU: tl.constexpr, APPLY: tl.constexpr,
):  # fmt: skip
    """Sums of g and g x_hat per tile; with APPLY the gradient scale g - offset - slope x_hat of x instead."""
    tile = tl.program_id(0).to(tl.int64)
    sample = tl.load(spans + tile * 3)
    begin = tl.load(spans + tile * 3 + 1)
    end = tl.load(spans + tile * 3 + 2)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    known = channel < C
    table = sample * C + channel
    a = tl.load(scale + table, mask=known, other=0.0)[None, :]
    b = tl.load(bias + channel, mask=known, other=0.0)[None, :]
    centre = tl.load(mean + table, mask=known, other=0.0)[None, :]
    inverse = tl.load(rstd + table, mask=known, other=0.0)[None, :]
    if APPLY:
        c0 = tl.load(offset + table, mask=known, other=0.0)[None, :]
        c1 = tl.load(slope + table, mask=known, other=0.0)[None, :]
    sum_g = tl.zeros([RB, BC], tl.float32)
    sum_gx = tl.zeros([RB, BC], tl.float32)
    for r in range(begin, end, RB):
        rows = r + tl.arange(0, RB)
        live = rows < end
        inside = live[:, None] & known[None, :]
        place = rows[:, None] * C + channel[None, :]
        handed = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        if POOL:
            first = tl.load(starts + rows, mask=live, other=0).to(tl.int64)
            n = tl.load(starts + rows + 1, mask=live, other=0) - first
            weight = (1.0 / (n + 1).to(tl.float32))[:, None]
            handed *= weight
            if APPLY:
                plain = tl.load(grad_pooled + place, mask=inside, other=0.0).to(tl.float32) * weight
            for child in tl.static_range(0, 8):
                ok = (child < n)[:, None] & inside
                fine = (first + child)[:, None] * C + channel[None, :]
                v, g = normed_grad(x, handed, fine, ok, centre, a, b, SILU)
                hat = v * inverse
                if APPLY:
                    d = a * g - c0 - c1 * hat + plain
                    tl.store(out + fine, d.to(out.dtype.element_ty), mask=ok)
                else:
                    sum_g += g
                    sum_gx += g * hat
        else:
            v, g = normed_grad(x, handed, place, inside, centre, a, b, SILU)
            hat = v * inverse
            if APPLY:
                tl.store(out + place, (a * g - c0 - c1 * hat).to(out.dtype.element_ty), mask=inside)
            else:
                sum_g += g
                sum_gx += g * hat
    if not APPLY:
        tl.store(sums + tile * 2 * C + channel, tl.sum(sum_g, 0), mask=known)
        tl.store(sums + (tile * 2 + 1) * C + channel, tl.sum(sum_gx, 0), mask=known)


def shape_of(channels: int, elements: int) -> dict[str, int]:
    """Constants of a launch: channels, those of a program, and rows of a step."""
    wide = min(CHANNELS, power_of_2(channels))
    return {"C": channels, "BC": wide, "RB": elements // wide}


def tiles_of(grid: Grid, channels: int, most: int) -> RowTiles:
    """Row tiles that give the card enough programs."""
    chunks = cdiv(channels, CHANNELS)
    rows = most
    while rows > most // 16 and cdiv(grid.num_rows, rows) * chunks < PROGRAMS:
        rows //= 2
    return grid.row_tiles(rows)


def norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, grid: Grid, coarse: Grid | None, silu: bool
) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, ...]]:
    """SiLU(GN(x)), pooled onto `coarse` when given, and the pooled x; and what the backward pass needs beside x.

    Args:
        x: [N, C] contiguous on `grid`; weight, bias: [C].
    """
    count, channels = x.shape
    tiles = tiles_of(grid, channels, TILE_ROWS)
    number, chunks = tiles.spans.shape[0], cdiv(channels, CHANNELS)
    means, squares = torch.empty(2, number, channels, dtype=torch.float32, device=x.device).unbind(0)
    if number:
        moments_kernel[(number, chunks)](x, tiles.spans, means, squares, **shape_of(channels, MOMENT_ELEMENTS))
    mean, rstd, scale = group_moments(tiles, means, squares, weight, groups, eps)
    shift = bias.float().contiguous()
    target = coarse or grid
    out = torch.empty(target.num_rows, channels, dtype=x.dtype, device=x.device)
    pooled = torch.empty_like(out) if coarse is not None else None
    tiles = tiles_of(target, channels, TILE_ROWS if coarse is None else POOLED_ROWS)
    starts = tiles.spans if coarse is None else coarse.child_starts
    shape = shape_of(channels, STEP_ELEMENTS if coarse is None else POOLED_ELEMENTS)
    if tiles.spans.shape[0]:
        forward_kernel[(tiles.spans.shape[0], chunks)](
            x, starts, tiles.spans, mean, scale, shift, out, out if pooled is None else pooled,
            POOL=coarse is not None, SILU=silu, **shape,
        )  # fmt: skip
    return (out, pooled), (mean, rstd, scale, shift)


def norm_backward(
    grad: Tensor, grad_pooled: Tensor | None, x: Tensor, tables: tuple[Tensor, ...], groups: int, grid: Grid,
    coarse: Grid | None, silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `norm_forward` for x, weight and bias (float32)."""
    mean, rstd, scale, bias = tables
    channels = x.shape[1]
    target = coarse or grid
    tiles = tiles_of(target, channels, TILE_ROWS if coarse is None else POOLED_ROWS)
    number, chunks = tiles.spans.shape[0], cdiv(channels, CHANNELS)
    starts = tiles.spans if coarse is None else coarse.child_starts
    shape = shape_of(channels, STEP_ELEMENTS if coarse is None else POOLED_ELEMENTS)
    partial = torch.empty(number, 2 * channels, dtype=torch.float32, device=x.device)
    # the rows that fill a padded level up have no parent: nobody else writes their gradient
    out = torch.zeros_like(x) if grid.padded and coarse is not None else torch.empty_like(x)
    other = grad if grad_pooled is None else grad_pooled
    flags = {"POOL": coarse is not None, "SILU": silu}
    if number:
        backward_kernel[(number, chunks)](
            x, starts, tiles.spans, grad, other, mean, rstd, scale, bias, scale, scale, partial, out,
            APPLY=False, **flags, **shape,
        )  # fmt: skip
    # over a group: d = rstd (w g - mean(w g) - x_hat mean(w g x_hat))
    grad_bias, grad_weight, offset, slope = group_gradients(tiles, partial, grid.sample_starts, scale, groups)
    if number:
        backward_kernel[(number, chunks)](
            x, starts, tiles.spans, grad, other, mean, rstd, scale, bias, offset, slope, partial, out,
            APPLY=True, **flags, **shape,
        )  # fmt: skip
    if grad_weight.shape[0] == 1:
        return out, grad_weight[0], grad_bias[0]
    return out, grad_weight.sum(0), grad_bias.sum(0)
