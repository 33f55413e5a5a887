"""Exponential moving averages of a model's weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch


def warm_rate(rate: float, updates: int) -> float:
    """Rate of update number `updates` (from 0): min(rate, (1 + n) / (10 + n)), so that early weights fade quickly."""
    return min(rate, (1 + updates) / (10 + updates))


class EMA:
    """One averaged copy in float32 of named tensors.

    Args:
        rate: share of the average that stays at each update, after the warm-up.
        tensors: the model's state, {name: tensor}.
        current: whether the copy of a name holds the current value instead of an average: the codebook, of which a
            blend over a re-seeded code would be no code at all, and all that is not floating point.
    """

    def __init__(
        self, rate: float, tensors: Mapping[str, torch.Tensor], current: Callable[[str], bool] = lambda name: False
    ) -> None:
        self.rate = rate
        self.updates = 0
        self._current = {name for name, t in tensors.items() if current(name) or not t.is_floating_point()}
        self.shadow = {name: self._copy(name, t) for name, t in tensors.items()}

    def _copy(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach()
        return tensor.clone() if name in self._current else tensor.to(torch.float32, copy=True)

    @torch.no_grad()
    def update(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take in the weights after an optimizer step."""
        keep = warm_rate(self.rate, self.updates)
        averaged = [name for name in self.shadow if name not in self._current]
        if averaged:
            torch._foreach_lerp_(
                [self.shadow[name] for name in averaged],
                [t if (t := tensors[name]).dtype == torch.float32 else t.float() for name in averaged],
                1 - keep,
            )
        for name in self._current:
            self.shadow[name].copy_(tensors[name])
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        """What the weights file does not hold."""
        return {"rate": self.rate, "updates": self.updates}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor], updates: int) -> None:
        """Take over saved averages."""
        if set(tensors) != set(self.shadow):
            differing = sorted(set(tensors) ^ set(self.shadow))
            raise ValueError(f"averaged weights must have the names of the model, these differ: {differing}")
        for name, tensor in tensors.items():
            self.shadow[name].copy_(tensor)
        self.updates = updates
