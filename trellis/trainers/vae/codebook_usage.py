"""How much of a codebook is used: per step, per epoch, and the alarm when it collapses."""

from __future__ import annotations

import logging
from typing import Any

import torch

logger = logging.getLogger(__name__)

COLLAPSE_SHARE = 0.02
"""A period whose perplexity is below this share of what its rows could reach counts as collapsed."""
PERIOD_STEPS = 50
"""A period ends after so many steps, or where an epoch does: within one no shape comes twice, so its rows are distinct
and their number bounds the codes that they can reach."""
MIN_ROWS = 16
"""A period of fewer rows says nothing."""
MIN_PATIENCE_STEPS = 100


def perplexity(counts: torch.Tensor) -> torch.Tensor:
    """exp of the entropy of how rows fall on codes: a scalar float64 from counts [K]; 0 without rows."""
    counts = counts.double()
    total = counts.sum()
    entropy = torch.special.entr(counts / total.clamp(min=1)).sum()
    return entropy.exp() * total.clamp(max=1)


class CodebookUsage:
    """Counts of rows per code, all ranks together: the figures of an epoch, and a watch for collapse.

    A collapse is announced once all periods of `patience_steps` in a row are collapsed, and again only after a period
    that is not. The patience is what re-seeding of unused codes needs to mend it, twice, and at least
    `MIN_PATIENCE_STEPS`: the first steps of a training raise no alarm, nor does a dip that passes.

    Args:
        reseed_after: steps until an unused code moves to data; 0 for never.
        speaks: whether this process is the one that announces.

    Attributes:
        counts: [K] int64, of the epoch without its last period; recent: [K] int64, of that period.
        collapsed_steps: steps of the collapsed periods in a row.
    """

    def __init__(self, num_codes: int, device: torch.device, *, reseed_after: int, speaks: bool = True) -> None:
        self.counts, self.recent = (torch.zeros(num_codes, dtype=torch.int64, device=device) for _ in range(2))
        self.patience_steps = max(MIN_PATIENCE_STEPS, 2 * reseed_after)
        self.speaks = speaks
        self.recent_steps = 0
        self.collapsed_steps = 0
        self.announced = False

    def add(self, counts: torch.Tensor) -> None:
        """Take in one step, with no rows if it was skipped; every `PERIOD_STEPS` this waits for the device."""
        self.recent += counts
        self.recent_steps += 1
        if self.recent_steps == PERIOD_STEPS:
            self._finish_period(*torch.stack(_figures(self.recent)).tolist())

    def finish_epoch(self) -> dict[str, float]:
        """Figures of the epoch that ends, and a fresh start."""
        whole = self.counts + self.recent
        *period, _, used, value = torch.stack([*_figures(self.recent), *_figures(whole)]).tolist()  # one wait
        if self.recent_steps:
            self._finish_period(*period)
        self.counts.zero_()
        codes = whole.numel()
        return {
            "epoch_perplexity": value,
            "epoch_codes_used": int(used),
            "epoch_share_used": used / codes,
            "epoch_dead_codes": codes - int(used),
        }

    def _finish_period(self, rows: float, used: float, value: float) -> None:
        steps, self.recent_steps = self.recent_steps, 0
        self.counts += self.recent
        self.recent.zero_()
        codes = self.counts.numel()
        if rows < MIN_ROWS:
            return
        if value >= max(2.0, COLLAPSE_SHARE * min(codes, rows)):
            self.collapsed_steps, self.announced = 0, False
            return
        self.collapsed_steps += steps
        if self.collapsed_steps < self.patience_steps or self.announced:
            return
        self.announced = True
        if self.speaks:
            bar = "!" * 100
            logger.warning(
                "\n%s\nCODEBOOK COLLAPSE: perplexity %.1f with %d codes, for %d steps now; %d rows used %d codes.\n"
                "Try a lower learning rate, use_ema_update, quantizer_gradient rotation, fewer codes, or pretrained "
                "weights.\n%s",
                bar, value, codes, self.collapsed_steps, rows, used, bar,
            )

    def state_dict(self) -> dict[str, Any]:
        return {
            "counts": self.counts.cpu(), "recent": self.recent.cpu(), "recent_steps": self.recent_steps,
            "collapsed_steps": self.collapsed_steps, "announced": self.announced,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts.copy_(state["counts"])
        self.recent.copy_(state["recent"])
        self.recent_steps, self.collapsed_steps = int(state["recent_steps"]), int(state["collapsed_steps"])
        self.announced = bool(state["announced"])


def _figures(counts: torch.Tensor) -> list[torch.Tensor]:
    """Rows, codes used and perplexity of counts [K], float64 scalars on the device."""
    return [counts.sum().double(), (counts > 0).sum().double(), perplexity(counts)]
