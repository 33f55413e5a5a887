"""The order of shapes: endless, shuffled by epoch, the same for every number of ranks, resumable at any step; and which
rank gets which shapes of a step."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Sampler

logger = logging.getLogger(__name__)


def share_out(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Numbers of the shapes that each rank gets: equally many, of nearly equal total size, ascending.

    Largest first, each to the rank with the least so far that has room left (the first of equals): the same on every
    rank. len(sizes) must be a multiple of `ranks`.
    """
    room = len(sizes) // ranks
    parts: list[list[int]] = [[] for _ in range(ranks)]
    totals = [0] * ranks
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        rank = min((r for r in range(ranks) if len(parts[r]) < room), key=totals.__getitem__)
        parts[rank].append(number)
        totals[rank] += sizes[number]
    return [sorted(part) for part in parts]


class ResumableSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) for one rank, drawn from one endless stream that all ranks share.

    The stream is a permutation of the shapes per epoch, one after the other; a batch may reach over the end of an
    epoch, so nothing is dropped. Step t takes the `batch_size * world_size` positions from there on: two ranks of 2 see
    together what one rank of 4 sees. They are shared out by `sizes`, since the slowest rank sets the pace of a step;
    without sizes rank r gets the r-th part.

    `position` counts the shapes, over all ranks, that training has *consumed* (`advance`), not those that loader
    processes have fetched ahead: prefetching does not enter a checkpoint.

    Args:
        sizes: of each shape, in any unit; None where they are not known.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        sizes: Sequence[int] | None = None,
    ) -> None:
        if num_samples < 1 or batch_size < 1:
            raise ValueError(f"at least one shape and a batch of one are needed, got {num_samples} and {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
        if sizes is not None and len(sizes) != num_samples:
            raise ValueError(f"sizes must have one number for each of the {num_samples} shapes, got {len(sizes)}")
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.sizes = sizes
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.position = 0

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.world_size

    @property
    def epoch(self) -> int:
        """Epochs that are wholly consumed."""
        return self.position // self.num_samples

    def advance(self) -> None:
        """Count one step's shapes as consumed."""
        self.position += self.global_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        start = self.position
        while True:
            items = self.stream(start, start + self.global_batch)
            yield [items[place] for place in self._places(items)]
            start += self.global_batch

    def places(self) -> list[int]:
        """Places in the next step to be counted, from 0, of the shapes that this rank has in it; ascending."""
        return self._places(self.stream(self.position, self.position + self.global_batch))

    def _places(self, items: Sequence[tuple[int, int]]) -> list[int]:
        if self.sizes is None or self.world_size == 1:
            return list(range(self.rank * self.batch_size, (self.rank + 1) * self.batch_size))
        return share_out([self.sizes[index] for _, index in items], self.world_size)[self.rank]

    def stream(self, start: int, stop: int) -> list[tuple[int, int]]:
        """(epoch, index) at positions [start, stop) of the shared stream."""
        items = []
        for position in range(start, stop):
            epoch, offset = divmod(position, self.num_samples)
            items.append((epoch, int(self._permutation(epoch)[offset])))
        return items

    def _permutation(self, epoch: int) -> np.ndarray:
        cached = getattr(self, "_cached", None)
        if cached is None or cached[0] != epoch:
            order = np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(self.num_samples)
            cached = self._cached = (epoch, order)
        return cached[1]

    def state_dict(self) -> dict[str, Any]:
        epoch, offset = divmod(self.position, self.num_samples)
        return {"seed": self.seed, "num_samples": self.num_samples, "epoch": epoch, "offset": offset}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a checkpoint stopped; with another number of shapes, at the start of the next epoch."""
        epoch, offset = int(state["epoch"]), int(state["offset"])
        if state["seed"] != self.seed:
            logger.warning("the seed was %s and is %s: the order of shapes changes here", state["seed"], self.seed)
        if state["num_samples"] != self.num_samples:
            logger.warning("there were %d shapes and are %d: training goes on at the start of an epoch",
                           state["num_samples"], self.num_samples)
            epoch, offset = epoch + (offset > 0), 0
        self.position = epoch * self.num_samples + offset
