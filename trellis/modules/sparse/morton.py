"""Morton keys and constant tables of the voxels inside a block, as torch tensors."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from trellis.utils.blocks import block_voxel_offsets, morton_order

TAPS = 27
CENTRE_TAP = 13


def tap_offsets() -> Tensor:
    """[27, 3] int64 offsets (dx, dy, dz) of the taps of a 3x3x3 kernel; tap k = 9 (dz+1) + 3 (dy+1) + (dx+1)."""
    k = torch.arange(TAPS)
    return torch.stack([k % 3 - 1, k // 3 % 3 - 1, k // 9 - 1], dim=1)


def tap_index(offsets: Tensor) -> Tensor:
    """Tap numbers [...] int64 of offsets [..., 3] in {-1, 0, 1} (the inverse of `tap_offsets`)."""
    return 9 * (offsets[..., 2] + 1) + 3 * (offsets[..., 1] + 1) + (offsets[..., 0] + 1)


@cache
def slot_positions(side: int) -> Tensor:
    """[side^3, 3] int64: the position inside a block of each slot, slots in Morton order (x is the high bit)."""
    offsets = block_voxel_offsets(side)
    return torch.from_numpy(offsets[morton_order(offsets)]).long()


@cache
def slot_numbers(side: int) -> Tensor:
    """[side, side, side] int64: the slot (Morton) of each position (x, y, z) inside a block."""
    positions = slot_positions(side)
    numbers = torch.empty(side, side, side, dtype=torch.long)
    numbers[positions[:, 0], positions[:, 1], positions[:, 2]] = torch.arange(side**3)
    return numbers


@cache
def neighbour_rule(side: int) -> tuple[Tensor, Tensor]:
    """For a slot and a tap: in which block the neighbour lies, and at which slot there.

    Returns:
        block_tap [side^3, 27] int64: the block, as a tap number among the 27 blocks around; slot [side^3, 27] int64.
    """
    target = slot_positions(side)[:, None, :] + tap_offsets()[None]
    block = torch.div(target, side, rounding_mode="floor")
    local = target - block * side
    return tap_index(block), slot_numbers(side)[local[..., 0], local[..., 1], local[..., 2]]


def _spread_bits(values: Tensor) -> Tensor:
    x = values.long() & 0x1FFFFF
    for shift, mask in (
        (32, 0x1F00000000FFFF),
        (16, 0x1F0000FF0000FF),
        (8, 0x100F00F00F00F00F),
        (4, 0x10C30C30C30C30C3),
        (2, 0x1249249249249249),
    ):
        x = (x | (x << shift)) & mask
    return x


def packed_keys(coords: Tensor) -> Tensor:
    """int64 keys [N] that order rows (batch, x, y, z) by sample, then Morton.

    Axes up to 2^15 and a batch below 2^15 (15 * 3 + 15 = 60 bits).
    """
    morton = (_spread_bits(coords[:, 1]) << 2) | (_spread_bits(coords[:, 2]) << 1) | _spread_bits(coords[:, 3])
    return (coords[:, 0].long() << 45) | morton
