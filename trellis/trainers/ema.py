"""Exponential moving averages of a model's weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class EMA:
    """An average of a flat tensor of weights.

    The rate of update number n (from 0) is min(rate, (1 + n) / (10 + n)), so that early weights fade quickly.

    Args:
        rate: share of the average that stays at each update, after the warm-up.
        weights: float32, to start from.

    Attributes:
        average: of the shape of `weights`. updates: float64 scalar on the same device, how many it has seen.
    """

    def __init__(self, rate: float, weights: Tensor) -> None:
        self.rate = rate
        self.average = weights.detach().clone()
        self.updates = torch.zeros((), dtype=torch.float64, device=weights.device)

    @torch.no_grad()
    def update(self, weights: Tensor, counts: Tensor) -> None:
        """Take in the weights after an optimizer step; `counts`: bool scalar on the device, false for a skipped one."""
        rate = ((1 + self.updates) / (10 + self.updates)).clamp(max=self.rate)
        self.average.lerp_(weights, ((1 - rate) * counts).float())
        self.updates += counts

    def state_dict(self) -> dict[str, Any]:
        """What the weights file does not hold."""
        return {"rate": self.rate, "updates": int(self.updates)}
