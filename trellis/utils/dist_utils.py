"""Which rank this process is, and the few collectives that training uses; all of them do nothing with one rank."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """Place of this process among those that train together.

    Attributes:
        rank, world_size: over all nodes; local_rank, local_world_size: on this node.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files and speaks."""
        return self.rank == 0


def ranks_from_environment() -> Ranks:
    """The place that torchrun (or our own launcher) put into the environment; one rank without it."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Ranks()
    world = int(os.environ["WORLD_SIZE"])
    return Ranks(
        rank=int(os.environ["RANK"]),
        world_size=world,
        local_rank=int(os.environ.get("LOCAL_RANK", os.environ["RANK"])),
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", world)),
    )


def start_process_group(ranks: Ranks, device: torch.device, *, timeout_s: float = 1800) -> None:
    """Join the other ranks: NCCL on CUDA, gloo on CPU. Nothing with one rank."""
    if ranks.world_size == 1:
        return
    cuda = device.type == "cuda"
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timedelta(seconds=timeout_s),
        device_id=device if cuda else None,
    )


def stop_process_group() -> None:
    """Leave the process group if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def in_group() -> bool:
    """Whether this process trains with others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_ranks_(tensor: torch.Tensor) -> torch.Tensor:
    """Replace `tensor` by its sum over ranks; every rank ends with the same bits."""
    if in_group():
        dist.all_reduce(tensor)
    return tensor


def broadcast_from_first_(tensor: torch.Tensor) -> torch.Tensor:
    """Replace `tensor` by that of rank 0."""
    if in_group():
        dist.broadcast(tensor, src=0)
    return tensor


def gather_objects(value: Any) -> list[Any]:
    """`value` of every rank, in order of rank; small plain containers only."""
    if not in_group():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait for the other ranks."""
    if in_group():
        dist.barrier()
