"""Weights that lie side by side: passes can take a few flat tensors in place of hundreds of parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Place = tuple[str, int, torch.Size]
"""Name of a parameter, its first element in the flat tensor, and its shape."""


class FlatWeights:
    """Parameters of a model that lie in flat tensors.

    A recorded pass that is given these hands the gradient of each flat tensor over as one, to the tensor's own `grad`:
    that of the parameters stays as it is.

    Args:
        leaves: flat leaf tensors, which share their memory with the parameters.
        layout: of each, the parameters by ascending first element; there may be gaps.

    Attributes:
        names: of the parameters, in that order.
    """

    def __init__(self, leaves: Sequence[Tensor], layout: Sequence[Sequence[Place]]) -> None:
        self.leaves, self.layout = list(leaves), [list(places) for places in layout]
        self.names = [name for places in self.layout for name, _, _ in places]
        self._sizes: list[list[int]] = []
        for leaf, places in zip(self.leaves, self.layout):
            sizes, end = [], 0
            for _, start, shape in places:
                sizes += [start - end, shape.numel()]
                end = start + shape.numel()
            self._sizes.append([*sizes, len(leaf) - end])

    def views(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        """Of tensors laid out as `leaves`: views in the order of `names` and in the parameters' shapes."""
        out = []
        for leaf, places, sizes in zip(leaves, self.layout, self._sizes):
            parts = leaf.split_with_sizes(sizes)[1::2]  # gaps stand at even places
            out += [part.view(shape) for part, (_, _, shape) in zip(parts, places)]
        return out


class Structure:
    """What a model consisted of at one time, to see quickly whether it still does.

    Modules and parameters are compared by identity, parameters by their address and whether they are trained too:
    whoever moves, converts, freezes or replaces one ends it.
    """

    def __init__(self, model: nn.Module) -> None:
        links: list[tuple[Mapping[str, Any], str, Any]] = []
        self._dicts: list[tuple[Mapping[str, Any], int]] = []
        for module in model.modules():
            for held in (module._modules, module._parameters):
                links += [(held, key, value) for key, value in held.items()]
                self._dicts.append((held, len(held)))
        self._links = links
        self._lie = [(p, p.data_ptr(), p.requires_grad) for p in model.parameters()]

    def holds(self) -> bool:
        """Whether nothing has changed."""
        return (
            all(held.get(key) is value for held, key, value in self._links)
            and all(len(held) == count for held, count in self._dicts)
            and all(p.data_ptr() == here and p.requires_grad is trained for p, here, trained in self._lie)
        )


class FlatModel:
    """A model whose parameters lie in flat weights, for as long as `holds` says so.

    Attributes:
        flat: these. names: of the parameters in the order in which `split` gives them.
    """

    def __init__(self, model: nn.Module, flat: FlatWeights) -> None:
        self.flat, self._structure = flat, Structure(model)
        lie_there = set(flat.names)
        self._apart = [name for name, _ in model.named_parameters() if name not in lie_there]
        self.names = [*flat.names, *self._apart]

    def holds(self) -> bool:
        """Whether the model is what it was."""
        return self._structure.holds()

    def weights(self, model: nn.Module) -> list[Tensor]:
        """The flat leaves, and the parameters of the model that lie elsewhere."""
        return [*self.flat.leaves, *(model.get_parameter(name) for name in self._apart)]

    def split(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Tensors laid out as `weights`, and any more after them: one for each of `names`, and these."""
        count = len(self.flat.leaves)
        return [*self.flat.views(tensors[:count]), *tensors[count:]]
