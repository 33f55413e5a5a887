"""The encoder's first stage in one pass over the TSDF values: affine, SiLU, pool; gradients by recomputation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trellis.modules.sparse.kernels.reduce import plan_tiles, sum_moments, sum_tiles
from trellis.modules.sparse.kernels.support import cdiv, power_of_2
from trellis.modules.sparse.levels import Grid

BLOCK_TILE, BLOCKS = 32, 8
"""Blocks of 512 values that a program of the statistics reads, and how many of them at a time."""
TILE_ROWS = 256
STEP_ELEMENTS, BACKWARD_ELEMENTS = 1024, 512
"""Elements that a program holds at a time."""


@triton.jit
def value_moments_kernel(values, exists, spans, counts, means, squares, CELLS: tl.constexpr, BB: tl.constexpr):
    """Count, mean and centred second moment of the values that exist in a tile of one sample's blocks."""
    tile = tl.program_id(0).to(tl.int64)
    begin = tl.load(spans + tile * 3 + 1)
    end = tl.load(spans + tile * 3 + 2)
    cell = tl.arange(0, CELLS)
    count = tl.zeros([BB, CELLS], tl.float32)
    plain = tl.zeros([BB, CELLS], tl.float32)
    for first in range(begin, end, BB):
        block = first + tl.arange(0, BB)
        live = (block < end)[:, None]
        place = block[:, None] * CELLS + cell[None, :]
        ok = live & (tl.load(exists + place, mask=live, other=0) != 0)
        count += tl.where(ok, 1.0, 0.0)
        plain += tl.load(values + place, mask=ok, other=0.0).to(tl.float32)
    n = tl.sum(tl.sum(count, 1), 0)
    mean = tl.sum(tl.sum(plain, 1), 0) / tl.maximum(n, 1.0)
    square = tl.zeros([BB, CELLS], tl.float32)
    for first in range(begin, end, BB):
        block = first + tl.arange(0, BB)
        live = (block < end)[:, None]
        place = block[:, None] * CELLS + cell[None, :]
        ok = live & (tl.load(exists + place, mask=live, other=0) != 0)
        d = tl.where(ok, tl.load(values + place, mask=ok, other=0.0).to(tl.float32) - mean, 0.0)
        square += d * d
    tl.store(counts + tile, n)
    tl.store(means + tile, mean)
    tl.store(squares + tile, tl.sum(tl.sum(square, 1), 0))


@triton.jit
def first_forward_kernel(
    values, exists, slots, spans, scale, shift, weight, bias, out, pooled,
    C: tl.constexpr, BC: tl.constexpr, RB: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    sample = tl.load(spans + tile * 3)
    begin = tl.load(spans + tile * 3 + 1)
    end = tl.load(spans + tile * 3 + 2)
    channel = tl.arange(0, BC)
    known = channel < C
    a = tl.load(scale + sample * C + channel, mask=known, other=0.0)[None, :]
    b = tl.load(shift + sample * C + channel, mask=known, other=0.0)[None, :]
    w = tl.load(weight + channel, mask=known, other=0.0)[None, :]
    w0 = tl.load(bias + channel, mask=known, other=0.0)[None, :]
    for r in range(begin, end, RB):
        rows = r + tl.arange(0, RB)
        live = rows < end
        slot = tl.load(slots + rows, mask=live, other=0) * 8
        total = tl.zeros([RB, BC], tl.float32)
        n = tl.zeros([RB], tl.float32)
        plain = tl.zeros([RB], tl.float32)
        for child in tl.static_range(0, 8):
            ok = live & (tl.load(exists + slot + child, mask=live, other=0) != 0)
            s = tl.load(values + slot + child, mask=ok, other=0.0).to(tl.float32)
            y = s[:, None] * a + b
            total += tl.where(ok[:, None], y / (1.0 + tl.exp(-y)), 0.0)
            n += tl.where(ok, 1.0, 0.0)
            plain += s
        share = 1.0 / (n + 1.0)
        inside = live[:, None] & known[None, :]
        place = rows[:, None] * C + channel[None, :]
        tl.store(out + place, (total * share[:, None]).to(out.dtype.element_ty), mask=inside)
        skip = (plain * share)[:, None] * w + (n * share)[:, None] * w0
        tl.store(pooled + place, skip.to(pooled.dtype.element_ty), mask=inside)


@triton.jit
def first_backward_kernel(
    values, exists, slots, spans, scale, shift, grad, grad_pooled, sums,
    C: tl.constexpr, BC: tl.constexpr, RB: tl.constexpr,
):  # fmt: skip
    """Four sums per tile and channel: the gradients of scale, shift, weight and bias."""
    tile = tl.program_id(0).to(tl.int64)
    sample = tl.load(spans + tile * 3)
    begin = tl.load(spans + tile * 3 + 1)
    end = tl.load(spans + tile * 3 + 2)
    channel = tl.arange(0, BC)
    known = channel < C
    a = tl.load(scale + sample * C + channel, mask=known, other=0.0)[None, :]
    b = tl.load(shift + sample * C + channel, mask=known, other=0.0)[None, :]
    sum_scale = tl.zeros([BC], tl.float32)
    sum_shift = tl.zeros([BC], tl.float32)
    sum_weight = tl.zeros([BC], tl.float32)
    sum_bias = tl.zeros([BC], tl.float32)
    for r in range(begin, end, RB):
        rows = r + tl.arange(0, RB)
        live = rows < end
        inside = live[:, None] & known[None, :]
        place = rows[:, None] * C + channel[None, :]
        slot = tl.load(slots + rows, mask=live, other=0) * 8
        by_scale = tl.zeros([RB, BC], tl.float32)
        by_shift = tl.zeros([RB, BC], tl.float32)
        n = tl.zeros([RB], tl.float32)
        plain = tl.zeros([RB], tl.float32)
        for child in tl.static_range(0, 8):
            ok = live & (tl.load(exists + slot + child, mask=live, other=0) != 0)
            s = tl.load(values + slot + child, mask=ok, other=0.0).to(tl.float32)
            y = s[:, None] * a + b
            gate = 1.0 / (1.0 + tl.exp(-y))
            d = tl.where(ok[:, None], gate * (1.0 + y * (1.0 - gate)), 0.0)
            by_shift += d
            by_scale += d * s[:, None]
            n += tl.where(ok, 1.0, 0.0)
            plain += s
        share = (1.0 / (n + 1.0))[:, None]
        handed = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32) * share
        sum_scale += tl.sum(by_scale * handed, 0)
        sum_shift += tl.sum(by_shift * handed, 0)
        skip = tl.load(grad_pooled + place, mask=inside, other=0.0).to(tl.float32) * share
        sum_weight += tl.sum(skip * plain[:, None], 0)
        sum_bias += tl.sum(skip * n[:, None], 0)
    base = sums + tile * 4 * C + channel
    tl.store(base, sum_scale, mask=known)
    tl.store(base + C, sum_shift, mask=known)
    tl.store(base + 2 * C, sum_weight, mask=known)
    tl.store(base + 3 * C, sum_bias, mask=known)


def value_moments(values: Tensor, exists: Tensor, block_starts: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance [B] float32 of the values [M, 512] that exist, per sample."""
    blocks, cells = values.shape
    tiles = plan_tiles(block_starts, blocks, BLOCK_TILE)
    number = tiles.spans.shape[0]
    # each starts at a multiple of 16 bytes, so that no number of tiles asks for a kernel of its own
    shape = (3, 4 * cdiv(number, 4))
    counts, means, squares = torch.empty(shape, dtype=torch.float32, device=values.device).unbind(0)
    if number:
        exists = exists.view(torch.uint8)
        value_moments_kernel[(number,)](values, exists, tiles.spans, counts, means, squares, CELLS=cells, BB=BLOCKS)
    rows, mean, square = sum_moments(counts, means[:, None], squares[:, None], tiles.first)
    return mean[:, 0], square[:, 0] / rows.clamp_min(1)


def _shape(channels: int, elements: int) -> dict[str, int]:
    wide = power_of_2(channels)
    return {"C": channels, "BC": wide, "RB": max(4, min(TILE_ROWS, elements // wide))}


def first_forward(
    values: Tensor, exists: Tensor, coarse: Grid, tables: tuple[Tensor, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """sum over children of SiLU(scale s + shift) / (n + 1), and of weight s + bias, each [P, C] in `dtype`.

    Args:
        values, exists: [M, 512]; tables: scale, shift [B, C], weight, bias [C], float32.
    """
    channels = tables[0].shape[1]
    out, pooled = (torch.empty(coarse.num_rows, channels, dtype=dtype, device=values.device) for _ in range(2))
    tiles = coarse.row_tiles(TILE_ROWS)
    if tiles.spans.shape[0]:
        first_forward_kernel[(tiles.spans.shape[0],)](
            values,
            exists.view(torch.uint8),
            coarse.slots,
            tiles.spans,
            *tables,
            out,
            pooled,
            **_shape(channels, STEP_ELEMENTS),
        )
    return out, pooled


def first_backward(
    grad: Tensor, grad_pooled: Tensor, values: Tensor, exists: Tensor, coarse: Grid, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `first_forward` for scale, shift [B, C], weight and bias [C], float32."""
    channels = scale.shape[1]
    tiles = coarse.row_tiles(TILE_ROWS)
    number = tiles.spans.shape[0]
    sums = torch.empty(number, 4 * channels, dtype=torch.float32, device=values.device)
    if number:
        first_backward_kernel[(number,)](
            values,
            exists.view(torch.uint8),
            coarse.slots,
            tiles.spans,
            scale,
            shift,
            grad,
            grad_pooled,
            sums,
            **_shape(channels, BACKWARD_ELEMENTS),
        )
    total = sum_tiles(sums, tiles.first).view(-1, 4, channels)
    return total[:, 0], total[:, 1], total[:, 2].sum(0), total[:, 3].sum(0)
