"""Crops of a shape to an axis-aligned box of whole blocks, so that a large shape fits a voxel budget."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

_DRAWS = 8


@dataclass(frozen=True)
class Crop:
    """A box of whole blocks cut out of a shape.

    Attributes:
        keep: [M] bool, the blocks inside the box.
        loss: [M] bool, False on kept blocks that lie on a side of the box where the shape goes on, True elsewhere.
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
    """Draw a box of whole blocks that holds at most `max_points` active voxels.

    The box grows from a block drawn uniformly: first as a cube, then side by side as long as the budget allows. Boxes
    with no block left for the loss are drawn again, up to 8 times; then the loss counts on the first drawn block alone.

    Args:
        block_index: [M, 3] integers, M >= 1; counts: [M] active voxels of each block.
        max_points: at least the count of any one block.

    Raises:
        ValueError: no block, or a block with more than `max_points` active voxels.
    """
    index = np.asarray(block_index, dtype=np.int64)
    counts = np.asarray(counts, dtype=np.int64)
    if len(index) == 0:
        raise ValueError("a shape without blocks cannot be cropped")
    largest = int(counts.max())
    if largest > max_points:
        raise ValueError(f"max_points must be at least {largest}, one block's active voxels, got {max_points}")
    crop = None
    for _ in range(_DRAWS):
        seed_block = int(rng.integers(len(index)))
        low, high = _grow_box(index, counts, max_points, seed_block, rng)
        keep = _inside(index, low, high)
        crop = Crop(keep, _loss_mask(index, keep, low, high), low, high)
        if crop.loss[crop.keep].any():
            return crop
    crop.loss[seed_block] = True
    return crop


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
