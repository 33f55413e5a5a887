"""The dynamic scale of a loss in half precision, decided on the device."""

from __future__ import annotations

import torch
from torch import Tensor


class LossScale:
    """The factor that a loss is multiplied by, so that gradients in half precision do not vanish.

    Its log2 rises by `growth` after every `interval` finite steps in a row and falls by 1 with each step whose gradient
    is not finite (Micikevicius et al., 2018, arXiv:1710.03740, section 3.2). It lives on the device: nothing waits for
    the answer whether a step was finite. `torch.amp.GradScaler` has the rule for amp alone, and its own answer, for the
    optimizer alone; here one answer counts for optimizer, averages, clipping and codebook.

    Args:
        start: of log2.

    Attributes:
        log2: float64 scalar. finite_steps: int64 scalar, in a row, since the last rise.
    """

    def __init__(self, start: float, *, growth: float, interval: int, device: torch.device) -> None:
        self.growth, self.interval = growth, interval
        self.log2 = torch.tensor(start, dtype=torch.float64, device=device)
        self.finite_steps = torch.zeros((), dtype=torch.int64, device=device)

    def factor(self) -> Tensor:
        """float32 scalar on the device."""
        return self.log2.exp2().float()

    def update(self, finite: Tensor) -> None:
        """After a step; `finite`: bool scalar, whether its gradient was."""
        run = (self.finite_steps + 1) * finite
        rises = run == self.interval
        self.log2 += torch.where(finite, self.growth * rises.double(), -1.0)
        self.finite_steps.copy_(run.masked_fill_(rises, 0))

    def state_dict(self) -> dict[str, float]:
        return {"log_scale": float(self.log2), "finite_steps": int(self.finite_steps)}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.log2.fill_(state["log_scale"])
        self.finite_steps.fill_(int(state["finite_steps"]))
