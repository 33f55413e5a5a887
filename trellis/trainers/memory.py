"""How much device memory training has for a micro-batch, and what to say when it did not suffice."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

logger = logging.getLogger(__name__)

USABLE_SHARE = 0.92
"""Share of the free memory that is planned with: the allocator's pieces do not fit without gaps."""

WORKSPACE_BYTES = 200_000_000
"""What a step takes whatever its size: workspaces of matrix products, partial sums."""


class OutOfDeviceMemory(RuntimeError):
    """The device's memory did not suffice for a step; the message names the shapes and what to change."""


@dataclass(frozen=True)
class MemoryLimit:
    """What a micro-batch may take.

    Attributes:
        cost: estimated bytes of a sample's activations, their gradients and its tables; checks the sample, too.
        limit_bytes: the most that the samples of a micro-batch may cost together; None for no limit.
    """

    cost: Callable[[Any], int]
    limit_bytes: int | None = None


def available_bytes(device: torch.device, *, still_to_come: int) -> int | None:
    """Bytes that a micro-batch may take on a CUDA device; None on a CPU.

    Args:
        still_to_come: bytes that training will hold all along and has not allocated yet.
    """
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(0, int(USABLE_SHARE * (free + unused)) - still_to_come)


def split_by_cost(samples: Sequence[Any], limit: MemoryLimit) -> list[Sequence[Any]]:
    """Consecutive parts of `samples`, each within the limit.

    Raises:
        ValueError: a sample that exceeds it alone; the message names it.
    """
    parts: list[list[Any]] = [[]]
    total = 0
    for sample in samples:
        cost = limit.cost(sample)
        if limit.limit_bytes is not None:
            if cost > limit.limit_bytes:
                raise ValueError(too_large(sample["sha256"], cost, limit.limit_bytes))
            if parts[-1] and total + cost > limit.limit_bytes:
                parts.append([])
                total = 0
        parts[-1].append(sample)
        total += cost
    return list(parts)


def too_large(name: str, cost: int, limit_bytes: int) -> str:
    """What is wrong with a shape that does not fit."""
    return (
        f"shape {name} needs about {cost / 1e9:.3g} GB to train on, {limit_bytes / 1e9:.3g} GB are there for it: "
        "crop it with dataset.args.max_points, set use_checkpoint, train in half precision (fp16_mode), or raise "
        "trainer.args.max_memory_gb if the estimate is wrong"
    )


def out_of_memory(step: int, batches: Sequence[Any], device: torch.device, reason: str) -> OutOfDeviceMemory:
    """The error for a step that ran out of memory.

    Args:
        batches: its micro-batches. reason: PyTorch's message, whose first sentence is kept.
    """
    shapes = [
        " + ".join(f"{name} ({blocks} blocks)" for name, blocks in zip(b["sha256"], b["blocks_per_sample"].tolist()))
        for b in batches
    ]
    held = ""
    if device.type == "cuda":
        _, total = torch.cuda.mem_get_info(device)
        held = f", of {total / 1e9:.3g} GB at most {torch.cuda.max_memory_allocated(device) / 1e9:.3g} were used here"
    return OutOfDeviceMemory(
        f"step {step}: the device ran out of memory{held}; micro-batches: {'; '.join(shapes)}. Lower "
        "dataset.args.max_points, raise trainer.args.batch_split, set the model's use_checkpoint, or give "
        f"trainer.args.max_memory_gb. {reason.split('. ')[0]}"
    )
