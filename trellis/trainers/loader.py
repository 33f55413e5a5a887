"""From dataset and sampler to checked micro-batches."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from trellis.config import InputError, TrainerArgs, wrong_input
from trellis.trainers.memory import MemoryLimit, split_by_cost
from trellis.trainers.sampler import ResumableSampler

Batch = dict[str, Any]

GRACE_S = 60
"""How long a loader process goes on after SIGTERM."""


def batch_size_per_rank(args: TrainerArgs, world_size: int) -> int:
    """Shapes per rank and step; InputError where a global `batch_size` does not divide."""
    if args.batch_size_per_gpu is not None:
        return args.batch_size_per_gpu
    assert args.batch_size is not None
    if args.batch_size % world_size:
        raise InputError(f"trainer.args.batch_size must be a multiple of the {world_size} ranks, got {args.batch_size}")
    return args.batch_size // world_size


def endless_batches(
    dataset: Any,
    sampler: ResumableSampler,
    objective: Any,
    parts: int,
    workers: int,
    device: torch.device,
    limit: MemoryLimit | None = None,
) -> Iterator[list[Batch]]:
    """Micro-batches of one step after another, from the sampler's position on, in host memory.

    Raises:
        InputError: a shape cannot be read or used; the message names it.
    """
    collate = partial(split_and_collate, parts=parts, collate=objective.collate, limit=limit)
    loaded = read_batches(dataset, sampler, collate, workers, pin_memory=device.type == "cuda")
    while True:
        with wrong_input("data"):
            batches = next(loaded)
            for batch in batches:
                objective.check_batch(batch)
        yield batches


def read_batches(
    dataset: Any,
    keys: Iterable[Sequence[Any]],
    collate: Callable[[Sequence[Any]], Any],
    workers: int,
    *,
    pin_memory: bool = False,
) -> Iterator[Any]:
    """What `collate` makes of the samples of one batch after another, read ahead by loader processes.

    Args:
        keys: of the samples of each batch, in order.

    Raises:
        ValueError: of the dataset or `collate`, with its own words whichever process it happened in.
    """
    loader = DataLoader(
        _Answering(dataset),
        batch_sampler=keys,
        num_workers=workers,
        collate_fn=partial(_collated, collate=collate),
        pin_memory=pin_memory,
        worker_init_fn=_ignore_signals,
        generator=torch.Generator(),  # its own: drawing the workers' seeds must not move the global one
        prefetch_factor=2 if workers else None,
    )
    for batch in loader:
        if isinstance(batch, _Failure):
            raise ValueError(batch.message)
        yield batch


@dataclass(frozen=True)
class _Failure:
    """A ValueError on its way from a loader process, which PyTorch would hand over as a traceback, at times in another
    type."""

    message: str


class _Answering(Dataset):
    """A dataset that answers with a `_Failure` where it would raise ValueError."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __getitem__(self, key: Any) -> Any:
        try:
            return self._dataset[key]
        except ValueError as error:
            return _Failure(str(error))


def _collated(samples: Sequence[Any], *, collate: Callable[[Sequence[Any]], Any]) -> Any:
    for sample in samples:
        if isinstance(sample, _Failure):
            return sample
    try:
        return collate(samples)
    except ValueError as error:
        return _Failure(str(error))


def _ignore_signals(worker: int) -> None:
    """Loader processes: Ctrl-C is the main process's business, and SIGTERM ends them late and in order.

    A scheduler sends it to all of a job's processes. The main one then ends its step, which may need another batch, and
    saves; a loader that a signal ended would end it too.
    """
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, lambda number, frame: os._exit(0))
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE_S))


def split_and_collate(
    samples: Sequence[Any],
    *,
    parts: int,
    collate: Callable[[Sequence[Any]], Batch],
    limit: MemoryLimit | None = None,
) -> list[Batch]:
    """Micro-batches of a rank's samples: consecutive, sizes that differ by at most one; divided further by `limit`.

    Raises:
        ValueError: a sample exceeds the limit alone; the message names it.
    """
    bounds = np.linspace(0, len(samples), parts + 1).round().astype(int)
    pieces = [samples[a:b] for a, b in zip(bounds, bounds[1:])]
    if limit is not None:
        pieces = [part for piece in pieces for part in split_by_cost(piece, limit)]
    return [collate(piece) for piece in pieces]


class DeviceBatches:
    """The same micro-batches on `device`.

    On CUDA, `prefetch` takes the next step's from the loader and starts their copies, from page-locked memory on a
    stream of their own, while the device works on this step's. What is wrong with them is raised when they are asked
    for.

    Attributes:
        waited_s: seconds spent waiting for the loader so far.
    """

    def __init__(self, batches: Iterator[list[Batch]], device: torch.device) -> None:
        self._batches, self._device = batches, device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: tuple[list[Batch], torch.cuda.Event | None] | InputError | None = None
        self.waited_s = 0.0

    def _start(self) -> tuple[list[Batch], torch.cuda.Event | None]:
        started = time.perf_counter()
        parts = next(self._batches)
        self.waited_s += time.perf_counter() - started
        if self._copies is None:
            return [to_device(part, self._device) for part in parts], None
        with torch.cuda.stream(self._copies):
            return [to_device(part, self._device) for part in parts], self._copies.record_event()

    def prefetch(self) -> None:
        """Start on the next step's micro-batches; nothing on a CPU."""
        if self._copies is None or self._ahead is not None:
            return
        try:
            self._ahead = self._start()
        except InputError as error:
            self._ahead = error

    def __next__(self) -> list[Batch]:
        ahead, self._ahead = self._ahead, None
        if isinstance(ahead, InputError):
            raise ahead
        moved, copied = ahead or self._start()
        if copied is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(copied)
            for part in moved:
                for value in part.values():
                    if isinstance(value, Tensor) and value.is_cuda:
                        value.record_stream(current)  # not to be reused by the copies while this step reads it
        return moved


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`, but for `blocks_per_sample`, which sizes are read from on the host."""
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) and key != "blocks_per_sample" else value
        for key, value in batch.items()
    }
