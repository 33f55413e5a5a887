"""Numbers from the device without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


class OnTheWay:
    """Numbers that are being copied to the host: those that `values` [n] holds now, whatever happens to it."""

    def __init__(self, values: Tensor) -> None:
        self._there: torch.cuda.Event | None = None
        if not values.is_cuda:
            self._copy = values.clone()
            return
        self._copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        self._copy.copy_(values, non_blocking=True)
        self._there = torch.cuda.Event()
        self._there.record()

    def arrived(self) -> bool:
        """Whether `read` would not have to wait."""
        return self._there is None or self._there.query()

    def read(self) -> list[float]:
        """The numbers; waits for the device to come to them."""
        if self._there is not None:
            self._there.synchronize()
        return self._copy.tolist()
