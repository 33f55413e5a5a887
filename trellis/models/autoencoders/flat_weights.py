"""Weights that lie side by side: passes can take a few flat tensors in place of hundreds of parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Place = tuple[str, int, torch.Size]
"""Name of a parameter, its first element in the flat tensor, and its shape."""


@dataclass(frozen=True)
class FlatWeights:
    """Parameters of a model that lie in flat tensors.

    A recorded pass hands the gradient of each flat tensor over as one, to the tensor's own `grad`: that of the
    parameters stays as it is.

    Attributes:
        leaves: flat leaf tensors, which share their memory with the parameters.
        layout: of each, the parameters by ascending first element; there may be gaps.
    """

    leaves: Sequence[Tensor]
    layout: Sequence[Sequence[Place]]

    @property
    def names(self) -> set[str]:
        return {name for places in self.layout for name, _, _ in places}

    def hold(self, model: nn.Module) -> bool:
        """Whether the model's parameters still lie there, which ends when it is moved or converted."""
        for leaf, places in zip(self.leaves, self.layout):
            for name, start, _ in (places[0], places[-1]):
                parameter = model.get_parameter(name)
                here = leaf.data_ptr() + start * leaf.element_size()
                if parameter.dtype != leaf.dtype or parameter.data_ptr() != here:
                    return False
        return True

    def by_name(self, leaves: Sequence[Tensor]) -> dict[str, Tensor]:
        """Views, in the parameters' shapes, of tensors laid out as `leaves`.

        They come of one split, whose backward pass puts their gradients side by side at once.
        """
        out = {}
        for leaf, places in zip(leaves, self.layout):
            sizes, names, end = [], [], 0
            for name, start, shape in places:
                sizes += [start - end, shape.numel()]
                names += ["", name]
                end = start + shape.numel()
            parts = leaf.split_with_sizes([*sizes, len(leaf) - end])
            shapes = {name: shape for name, _, shape in places}
            out |= {name: part.view(shapes[name]) for name, part in zip(names, parts) if name}
        return out

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of the model has its own parameters, which do not lie here."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()
