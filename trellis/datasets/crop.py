"""Crops of a shape to an axis-aligned box of whole blocks, so that a large shape fits a voxel budget."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Crop:
    """A box of whole blocks cut out of a shape.

    Attributes:
        keep: [M] bool, the blocks inside the box.
        loss: [M] bool, False on kept blocks that lie on a side of the box where the shape goes on (the rim of the cut,
            one block wide), True elsewhere.
        low, high: [3] int64, the box's first and last block per axis (both inside).
    """

    keep: np.ndarray
    loss: np.ndarray
    low: np.ndarray
    high: np.ndarray


def crop_generator(seed: int, epoch: int, name: str) -> np.random.Generator:
    """The random stream of one shape in one epoch: a function of its arguments alone, the same in every worker."""
    digest = hashlib.sha256(f"{seed}:{epoch}:{name}".encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))


def draw_crop(block_index: np.ndarray, counts: np.ndarray, max_points: int, rng: np.random.Generator) -> Crop:
    """Draw a box of whole blocks that holds at most `max_points` active voxels and at least one block with loss.

    The box grows from a block drawn uniformly among those that fit the budget together with their neighbours: first as
    a cube, which holds these neighbours, then side by side as long as the budget allows. The drawn block is beside no
    removed one, so it has loss; a block that does not fit with its neighbours could not have any in any box.

    Args:
        block_index: [M, 3] integers, M >= 1; counts: [M] active voxels of each block.

    Raises:
        ValueError: no block, or none that fits the budget with its neighbours (27 whole blocks hold 13,824 voxels).
    """
    index = np.asarray(block_index, dtype=np.int64)
    counts = np.asarray(counts, dtype=np.int64)
    if len(index) == 0:
        raise ValueError("a shape without blocks cannot be cropped")
    seeds = np.arange(len(index))
    if max_points < 27 * int(counts.max()):
        needed = _counts_with_neighbours(index, counts)
        seeds = np.flatnonzero(needed <= max_points)
        if len(seeds) == 0:
            raise ValueError(
                f"max_points must be at least {needed.min()}, the active voxels of a block with its neighbours where "
                f"they are fewest, since blocks beside a cut have no loss; got {max_points}"
            )
    low, high = _grow_box(index, counts, max_points, int(rng.choice(seeds)), rng)
    keep = _inside(index, low, high)
    return Crop(keep, _loss_mask(index, keep, low, high), low, high)


def _counts_with_neighbours(index: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """[M] int64, active voxels of each block and its neighbours at faces, edges and corners."""
    place = index - index.min(axis=0) + 1
    side = place.max(axis=0) + 2
    keys = (place[:, 0] * side[1] + place[:, 1]) * side[2] + place[:, 2]
    order = np.argsort(keys)
    ordered, before = keys[order], np.concatenate([[0], np.cumsum(counts[order])])
    total = np.zeros(len(index), dtype=np.int64)
    for x in (-1, 0, 1):
        for y in (-1, 0, 1):
            middle = ordered + (x * side[1] + y) * side[2]  # the three neighbours along z are a run of keys
            total += before[np.searchsorted(ordered, middle + 1, "right")]
            total -= before[np.searchsorted(ordered, middle - 1, "left")]
    by_row = np.empty_like(total)
    by_row[order] = total
    return by_row


def _inside(index: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return ((index >= low) & (index <= high)).all(axis=1)


def _grow_box(
    index: np.ndarray, counts: np.ndarray, max_points: int, seed_block: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The largest cube around the block within the budget, then its sides pushed out in turn; bounds inclusive."""
    centre = index[seed_block]
    radius_of_block = np.abs(index - centre).max(axis=1)
    within = np.cumsum(np.bincount(radius_of_block, weights=counts))
    radius = int(np.searchsorted(within, max_points, side="right")) - 1
    first, last = index.min(axis=0), index.max(axis=0)
    low, high = np.maximum(centre - radius, first), np.minimum(centre + radius, last)
    sides = [(axis, end) for axis in range(3) for end in (0, 1)]
    sides = [sides[i] for i in rng.permutation(len(sides))]
    while sides:
        open_sides = []
        for axis, end in sides:
            new_low, new_high = low.copy(), high.copy()
            if end:
                new_high[axis] += 1
            else:
                new_low[axis] -= 1
            if new_low[axis] < first[axis] or new_high[axis] > last[axis]:
                continue
            if int(counts[_inside(index, new_low, new_high)].sum()) <= max_points:
                low, high = new_low, new_high
                open_sides.append((axis, end))
        sides = open_sides
    return low, high


def _loss_mask(index: np.ndarray, keep: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """[M] bool: False on the box's outermost layer at each side that a removed block touches."""
    loss = np.ones(len(index), dtype=bool)
    touching = ~keep & _inside(index, low - 1, high + 1)
    for axis in range(3):
        if (touching & (index[:, axis] < low[axis])).any():
            loss[keep & (index[:, axis] == low[axis])] = False
        if (touching & (index[:, axis] > high[axis])).any():
            loss[keep & (index[:, axis] == high[axis])] = False
    return loss
