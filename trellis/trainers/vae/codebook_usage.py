"""How much of a codebook is used: per step, per epoch, and the alarm when it collapses."""

from __future__ import annotations

import logging
from typing import Any

import torch

logger = logging.getLogger(__name__)

COLLAPSE_SHARE = 0.02
"""An epoch whose perplexity is below this share of what its rows could reach counts as collapsed."""
COLLAPSE_EPOCHS = 2
"""Collapsed epochs in a row before the alarm, so that the first epoch alone raises none."""


def perplexity(counts: torch.Tensor) -> torch.Tensor:
    """exp of the entropy of how rows fall on codes: a scalar float64 from counts [K]; 0 without rows."""
    counts = counts.double()
    total = counts.sum()
    p = counts / total.clamp(min=1)
    return torch.where(total > 0, torch.exp(-torch.xlogy(p, p).sum()), 0.0)


class CodebookUsage:
    """Counts of rows per code over an epoch, all ranks together.

    Attributes:
        counts: [K] int64.
        low_epochs: collapsed epochs in a row.
    """

    def __init__(self, num_codes: int, device: torch.device) -> None:
        self.counts = torch.zeros(num_codes, dtype=torch.int64, device=device)
        self.low_epochs = 0

    def add(self, counts: torch.Tensor) -> None:
        self.counts += counts

    def finish_epoch(self) -> dict[str, float]:
        """Figures of the epoch that ends, and a fresh start; a collapse is announced."""
        codes = self.counts.numel()
        figures = [self.counts.sum().double(), (self.counts > 0).sum().double(), perplexity(self.counts)]
        rows, used, value = torch.stack(figures).tolist()  # one wait for the device
        rows, used = int(rows), int(used)
        self.counts.zero_()
        # An epoch of few rows cannot use more codes than it has rows.
        reachable = min(codes, rows)
        low = reachable > 2 and value < max(2.0, COLLAPSE_SHARE * reachable)
        self.low_epochs = self.low_epochs + 1 if low else 0
        # Again after twice as many epochs, not after each: the epochs of small datasets are a few steps.
        if self.low_epochs >= COLLAPSE_EPOCHS and self.low_epochs & (self.low_epochs - 1) == 0:
            bar = "!" * 100
            logger.warning(
                "\n%s\nCODEBOOK COLLAPSE: perplexity %.1f with %d codes, %d epochs in a row; %d rows used %d codes.\n"
                "Try a lower learning rate, use_ema_update, quantizer_gradient rotation, fewer codes, or pretrained "
                "weights.\n%s",
                bar, value, codes, self.low_epochs, rows, used, bar,
            )
        return {
            "epoch_perplexity": value,
            "epoch_codes_used": used,
            "epoch_share_used": used / codes,
            "epoch_dead_codes": codes - used,
        }

    def state_dict(self) -> dict[str, Any]:
        return {"counts": self.counts.cpu(), "low_epochs": self.low_epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts.copy_(state["counts"])
        self.low_epochs = int(state["low_epochs"])
