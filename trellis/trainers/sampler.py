"""The order of shapes: endless, shuffled by epoch, the same for every number of ranks, resumable at any step."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import Sampler

logger = logging.getLogger(__name__)


class ResumableSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) for one rank, drawn from one endless stream that all ranks share.

    The stream is a permutation of the shapes per epoch, one after the other; a batch may reach over the end of an
    epoch, so nothing is dropped. Step t takes the `batch_size * world_size` positions from t on, rank r their r-th
    part: two ranks of 2 see what one rank of 4 sees.

    `position` counts the shapes, over all ranks, that training has *consumed* (`advance`), not those that loader
    processes have fetched ahead: prefetching does not enter a checkpoint.
    """

    def __init__(self, num_samples: int, batch_size: int, *, seed: int, rank: int = 0, world_size: int = 1) -> None:
        if num_samples < 1 or batch_size < 1:
            raise ValueError(f"at least one shape and a batch of one are needed, got {num_samples} and {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
        self.num_samples = num_samples
        self.batch_size = batch_size
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
        start = self.position + self.rank * self.batch_size
        while True:
            yield self.stream(start, start + self.batch_size)
            start += self.global_batch

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
