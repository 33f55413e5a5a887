"""Exponential moving averages of a model's weights."""

from __future__ import annotations

from typing import Any

import torch


def warm_rate(rate: float, updates: int) -> float:
    """Rate of update number `updates` (from 0): min(rate, (1 + n) / (10 + n)), so that early weights fade quickly."""
    return min(rate, (1 + updates) / (10 + updates))


class EMA:
    """An average of a flat tensor of weights.

    Args:
        rate: share of the average that stays at each update, after the warm-up.
        weights: float32, to start from.

    Attributes:
        average: of the shape of `weights`. updates: how many it has seen.
    """

    def __init__(self, rate: float, weights: torch.Tensor) -> None:
        self.rate = rate
        self.updates = 0
        self.average = weights.detach().clone()

    @torch.no_grad()
    def update(self, weights: torch.Tensor) -> None:
        """Take in the weights after an optimizer step."""
        self.average.lerp_(weights, 1 - warm_rate(self.rate, self.updates))
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        """What the weights file does not hold."""
        return {"rate": self.rate, "updates": self.updates}
