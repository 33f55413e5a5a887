"""Gradient clipping: a fixed norm, or one that follows the norms seen lately."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor

from trellis.config import InputError, Named
from trellis.utils.typed_json import check_call


class FixedGradClipper:
    """Clips at a fixed norm; `max_norm` None never clips."""

    def __init__(self, max_norm: float | None = None) -> None:
        self.max_norm = max_norm

    def limit(self) -> float:
        """The norm to clip the next gradient at."""
        return math.inf if self.max_norm is None else self.max_norm

    def add(self, norm: Tensor, counts: Tensor) -> None:
        """Take in a gradient's norm, unclipped, unless its step does not count; both are scalars on the device."""
        del norm, counts

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        del state


class AdaptiveGradClipper:
    """Clips at a percentile of the norms of the last `buffer_size` steps, and never above `max_norm`.

    The norms stay on the device: the host need not know one before the next step starts.

    Args:
        max_norm: upper limit, the only one until the buffer is full; None for none.
        clip_percentile: in (0, 100].
        buffer_size: steps that are remembered.
    """

    def __init__(self, max_norm: float | None = None, clip_percentile: float = 95.0, buffer_size: int = 1000) -> None:
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm must be null or above 0, got {max_norm}")
        if not 0 < clip_percentile <= 100:
            raise ValueError(f"clip_percentile must be in (0, 100], got {clip_percentile}")
        if buffer_size < 1:
            raise ValueError(f"buffer_size must be at least 1, got {buffer_size}")
        self.max_norm = max_norm
        self.clip_percentile = clip_percentile
        self.buffer_size = buffer_size
        self._norms = torch.full((buffer_size,), math.nan, dtype=torch.float64)  # oldest first

    def limit(self) -> Tensor:
        """The norm to clip the next gradient at: a float64 scalar, inf for any."""
        # as numpy.percentile; torch.quantile starts fifteen more operations
        place = self.clip_percentile / 100 * (self.buffer_size - 1)
        norms = self._norms.sort().values  # NaN last
        below, above = norms[math.floor(place)], norms[math.ceil(place)]
        most = math.inf if self.max_norm is None else self.max_norm
        limit = below.lerp(above, place - math.floor(place)).clamp(max=most)
        return torch.where(norms[-1].isnan(), most, limit)  # no percentile until the buffer is full

    def add(self, norm: Tensor, counts: Tensor) -> None:
        """Take in a gradient's norm, unclipped, unless its step does not count; both are scalars on the device."""
        norms = self._norms.to(norm.device)
        self._norms = torch.where(counts, torch.cat([norms[1:], norm.double()[None]]), norms)

    def state_dict(self) -> dict[str, Any]:
        return {"norms": [norm for norm in self._norms.tolist() if not math.isnan(norm)]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        norms = [float(norm) for norm in state.get("norms", [])][-self.buffer_size :]
        missing = [math.nan] * (self.buffer_size - len(norms))
        self._norms = torch.tensor([*missing, *norms], dtype=torch.float64)


def build_grad_clipper(spec: float | Named | None) -> FixedGradClipper | AdaptiveGradClipper:
    """A clipper from the config's `grad_clip`: null, a number, or {name: AdaptiveGradClipper, args}."""
    if not isinstance(spec, Named):
        return FixedGradClipper(spec)
    problems: list[str] = []
    if spec.name != "AdaptiveGradClipper":
        problems.append(f"name must be AdaptiveGradClipper, got {spec.name!r}")
    else:
        check_call(AdaptiveGradClipper, spec.args, "args", problems)
    if not problems:
        try:
            return AdaptiveGradClipper(**spec.args)
        except ValueError as error:
            problems.append(str(error))
    valid = ", ".join(p for p in inspect.signature(AdaptiveGradClipper).parameters)
    raise InputError(f"trainer.args.grad_clip: {'; '.join(problems)} (arguments: {valid})")
