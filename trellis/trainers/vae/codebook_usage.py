"""How much of a codebook is used: per step, per epoch, and the alarm when it collapses."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from trellis.trainers.transfer import OnTheWay

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

    Nothing waits for the device: the figures of a period are read, and judged, with the next step or when the state is
    asked for.

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
        self._unjudged: tuple[int, OnTheWay] | None = None  # steps of a period, and its figures

    def add(self, counts: torch.Tensor) -> None:
        """Take in one step, with no rows if it was skipped."""
        self._judge()
        self.recent += counts
        self.recent_steps += 1
        if self.recent_steps == PERIOD_STEPS:
            self._end_period()

    def finish_epoch(self) -> Callable[[], dict[str, float]]:
        """A fresh start; the function that is returned waits for the figures of the epoch that ends."""
        if self.recent_steps:
            self._end_period()
        whole = OnTheWay(torch.stack(_figures(self.counts)))
        codes = self.counts.numel()
        self.counts.zero_()

        def figures() -> dict[str, float]:
            _, used, value = whole.read()
            return {
                "epoch_perplexity": value,
                "epoch_codes_used": int(used),
                "epoch_share_used": used / codes,
                "epoch_dead_codes": codes - int(used),
            }

        return figures

    def _end_period(self) -> None:
        self._judge()
        self._unjudged = self.recent_steps, OnTheWay(torch.stack(_figures(self.recent)))
        self.counts += self.recent
        self.recent.zero_()
        self.recent_steps = 0

    def _judge(self) -> None:
        """Whether the period that ended last is collapsed, and what follows."""
        if self._unjudged is None:
            return
        (steps, figures), self._unjudged = self._unjudged, None
        rows, used, value = figures.read()
        if rows < MIN_ROWS:
            return
        codes = self.counts.numel()
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
        self._judge()
        return {
            "counts": self.counts.cpu(), "recent": self.recent.cpu(), "recent_steps": self.recent_steps,
            "collapsed_steps": self.collapsed_steps, "announced": self.announced,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._unjudged = None
        self.counts.copy_(state["counts"])
        self.recent.copy_(state["recent"])
        self.recent_steps, self.collapsed_steps = int(state["recent_steps"]), int(state["collapsed_steps"])
        self.announced = bool(state["announced"])


def _figures(counts: torch.Tensor) -> list[torch.Tensor]:
    """Rows, codes used and perplexity of counts [K], float64 scalars on the device."""
    return [counts.sum().double(), (counts > 0).sum().double(), perplexity(counts)]
