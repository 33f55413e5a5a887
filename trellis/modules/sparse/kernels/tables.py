"""Neighbour tables and window keys, built on the GPU from block coordinates without a host synchronisation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trellis.modules.sparse.kernels.support import cdiv

ROWS = 256


@triton.jit
def spread_bits(value):
    """int64 with two zero bits between the low 16 bits of `value`."""
    x = value.to(tl.int64) & 0xFFFF
    x = (x | (x << 16)) & 0xFF0000FF
    x = (x | (x << 8)) & 0xF00F00F00F
    x = (x | (x << 4)) & 0xC30C30C30C3
    x = (x | (x << 2)) & 0x249249249249
    return x


@triton.jit
def packed_key(batch, x, y, z):
    """The order by sample, then Morton, of `trellis.modules.sparse.morton.packed_keys`."""
    return (batch.to(tl.int64) << 45) | (spread_bits(x) << 2) | (spread_bits(y) << 1) | spread_bits(z)


@triton.jit(do_not_specialize=["count", "shift"])
def keys_kernel(coords, keys, count, shift, SIZE: tl.constexpr, ROWS: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    ok = rows < count
    batch = tl.load(coords + rows * 4, mask=ok, other=0)
    x = (tl.load(coords + rows * 4 + 1, mask=ok, other=0) + shift) // SIZE
    y = (tl.load(coords + rows * 4 + 2, mask=ok, other=0) + shift) // SIZE
    z = (tl.load(coords + rows * 4 + 3, mask=ok, other=0) + shift) // SIZE
    tl.store(keys + rows, packed_key(batch, x, y, z), mask=ok)


@triton.jit(do_not_specialize=["count", "steps"])
def block_neighbours_kernel(coords, keys, order, out, count, steps, ROWS: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tap = tl.program_id(1)
    ok = rows < count
    batch = tl.load(coords + rows * 4, mask=ok, other=0)
    x = tl.load(coords + rows * 4 + 1, mask=ok, other=0) + tap % 3 - 1
    y = tl.load(coords + rows * 4 + 2, mask=ok, other=0) + (tap // 3) % 3 - 1
    z = tl.load(coords + rows * 4 + 3, mask=ok, other=0) + tap // 9 - 1
    inside = ok & (x >= 0) & (y >= 0) & (z >= 0)
    query = packed_key(batch, tl.maximum(x, 0), tl.maximum(y, 0), tl.maximum(z, 0))
    low = tl.zeros([ROWS], tl.int64)
    high = low + count
    for _ in range(0, steps):
        open_ = low < high
        middle = (low + high) >> 1
        less = tl.load(keys + middle, mask=open_, other=0) < query
        low = tl.where(open_ & less, middle + 1, low)
        high = tl.where(open_ & (less == 0), middle, high)
    inside = inside & (low < count)
    found = inside & (tl.load(keys + low, mask=inside, other=-1) == query)
    row = tl.load(order + low, mask=found, other=-1)
    tl.store(out + rows * 27 + tap, row.to(tl.int32), mask=ok)


@triton.jit(do_not_specialize=["count"])
def tap_table_kernel(blocks, slots, row_of, out, count, DENSE: tl.constexpr, LOG: tl.constexpr, ROWS: tl.constexpr):
    SIDE: tl.constexpr = 1 << LOG
    CELLS: tl.constexpr = 1 << (3 * LOG)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tap = tl.program_id(1)
    ok = rows < count
    slot = rows if DENSE else tl.load(slots + rows, mask=ok, other=0)
    block = slot // CELLS
    cell = (slot % CELLS).to(tl.int32)
    x = tl.zeros([ROWS], tl.int32) + tap % 3 - 1
    y = tl.zeros([ROWS], tl.int32) + (tap // 3) % 3 - 1
    z = tl.zeros([ROWS], tl.int32) + tap // 9 - 1
    for i in tl.static_range(LOG):
        x += ((cell >> (3 * i + 2)) & 1) << i
        y += ((cell >> (3 * i + 1)) & 1) << i
        z += ((cell >> (3 * i)) & 1) << i
    block_tap = 9 * ((z >> LOG) + 1) + 3 * ((y >> LOG) + 1) + (x >> LOG) + 1
    x, y, z = x & (SIDE - 1), y & (SIDE - 1), z & (SIDE - 1)
    target = tl.zeros([ROWS], tl.int32)
    for i in tl.static_range(LOG):
        target |= ((x >> i) & 1) << (3 * i + 2)
        target |= ((y >> i) & 1) << (3 * i + 1)
        target |= ((z >> i) & 1) << (3 * i)
    near = tl.load(blocks + block * 27 + block_tap, mask=ok, other=-1)
    found = ok & (near >= 0)
    row = near.to(tl.int64) * CELLS + target
    if not DENSE:
        row = tl.load(row_of + row, mask=found, other=-1).to(tl.int64)
    row = tl.where(found, row, -1)
    tl.store(out + tap.to(tl.int64) * count + rows, row.to(tl.int32), mask=ok)


def cell_keys(coords: Tensor, size: int = 1, shift: int = 0) -> Tensor:
    """int64 [M] keys of floor((coord + shift) / size) per axis; coords int32 [M, 4], not negative."""
    count = coords.shape[0]
    keys = torch.empty(count, dtype=torch.int64, device=coords.device)
    if count:
        keys_kernel[(cdiv(count, ROWS),)](coords.contiguous(), keys, count, shift, SIZE=size, ROWS=ROWS)
    return keys


def block_neighbours(coords: Tensor) -> Tensor:
    """[M, 27] int32 row of the block at each tap, -1 where there is none; coords int32 [M, 4]."""
    count = coords.shape[0]
    out = torch.empty(count, 27, dtype=torch.int32, device=coords.device)
    if count:
        coords = coords.contiguous()
        keys, order = torch.sort(cell_keys(coords))
        grid = (cdiv(count, ROWS), 27)
        block_neighbours_kernel[grid](coords, keys, order, out, count, count.bit_length(), ROWS=ROWS)
    return out


def tap_table(blocks: Tensor, side: int, count: int, slots: Tensor | None, row_of: Tensor | None) -> Tensor:
    """[27, N] int32 row of the neighbour at each tap, -1 where there is none: one contiguous column per tap.

    Args:
        blocks: [M, 27] int32 block neighbours. side: voxels per block and axis, a power of two. count: N.
        slots: [N] int64 block * side^3 + slot of each row, and row_of: [M, side^3] int32; both None where all exist.
    """
    out = torch.empty(27, count, dtype=torch.int32, device=blocks.device)
    if count:
        dense = slots is None
        grid = (cdiv(count, ROWS), 27)
        tap_table_kernel[grid](
            blocks, blocks if dense else slots, blocks if dense else row_of, out, count,
            DENSE=dense, LOG=side.bit_length() - 1, ROWS=ROWS,
        )  # fmt: skip
    return out
