"""A step between the launch of its work and the arrival of its figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trellis.trainers.stop import NUM_FLAGS
from trellis.trainers.transfer import OnTheWay


@dataclass
class LaunchedStep:
    """A step that the device may still be at work on.

    Attributes:
        record: what the host knows of its line in the log.
        names: of the objective's figures and those of the loop.
        figures: the device's part: sums of the objective's terms, reasons to stop, the figures of those names, and the
            gradient's norm.
        epoch_figures: waits for those of the epoch that the step ends; nothing where it ends none.
        shapes: of this rank, for messages.
    """

    record: dict[str, Any]
    names: list[str]
    figures: OnTheWay
    epoch_figures: Callable[[], dict[str, float]]
    shapes: list[str]

    def read(self, terms: Sequence[str], num_shapes: int) -> tuple[dict[str, Any], list[float]]:
        """Wait for `figures`: the record with them, and the reasons to stop, summed over ranks.

        Figures of a skipped step are left out but for its loss scale.

        Args:
            terms: names of the sums, which become means over `num_shapes`.
        """
        values = self.figures.read()
        sums, flags, own = values[: len(terms)], values[len(terms) :][:NUM_FLAGS], values[len(terms) + NUM_FLAGS :]
        *own, grad_norm = own
        record = {**self.record, **{name: value / num_shapes for name, value in zip(terms, sums)}}
        known = dict(zip(self.names, own, strict=True))
        if not math.isfinite(grad_norm):
            known = {name: value for name, value in known.items() if name == "loss_scale"}
        return {**record, "grad_norm": grad_norm, **known}, flags
