"""The 8-tap form of a 3x3x3 convolution that follows a subdivision.

All 8 children of a voxel are copies of it. Child parity p and tap offset d read the parent at floor((p + d) / 2): per
axis p = 0 reads parents -1, 0, 0 and p = 1 reads 0, 0, +1. So each child sees 2x2x2 parents, with summed weights.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from trellis.modules.sparse.morton import tap_index, tap_offsets


@cache
def collapse_rule() -> tuple[Tensor, Tensor]:
    """Which parents the children read and which taps fall on them.

    Returns:
        parent_tap [8, 8] int64: for child c and reduced tap t the parent's tap number among the 27 around;
        assignment [8, 8, 27] float64 of 0 and 1: assignment[c, t, k] = 1 where tap k of child c reads that parent.
    """
    offsets = tap_offsets()
    parent_tap = torch.empty(8, 8, dtype=torch.long)
    assignment = torch.zeros(8, 8, 27, dtype=torch.float64)
    for child in range(8):
        parity = torch.tensor([child >> 2, (child >> 1) & 1, child & 1])
        steps = torch.div(parity + offsets, 2, rounding_mode="floor")
        for t in range(8):
            wanted = torch.tensor([t >> 2, (t >> 1) & 1, t & 1]) + parity - 1
            parent_tap[child, t] = tap_index(wanted)
            assignment[child, t] = (steps == wanted).all(1).double()
    return parent_tap, assignment


@cache
def _assignment(device: torch.device, dtype: torch.dtype) -> Tensor:
    """[64, 27] on the device, copied there once: a copy in every step would wait for the GPU."""
    return collapse_rule()[1].view(64, 27).to(device, dtype)


def collapse_weight(weight: Tensor) -> Tensor:
    """[27, in, out] -> [8, 8, in, out] (child, reduced tap); differentiable, summed in float32 or wider."""
    if weight.device.type == "cuda":
        # one product, whose sums are in float32
        flat = _assignment(weight.device, weight.dtype) @ weight.reshape(27, -1)
        return flat.view(8, 8, *weight.shape[1:])
    wide = weight if weight.dtype == torch.float64 else weight.float()
    assignment = collapse_rule()[1].to(weight.device, wide.dtype)
    return torch.einsum("ctk,kio->ctio", assignment, wide).to(weight.dtype)


def collapse_grad(grad: Tensor) -> Tensor:
    """Gradient [27, in, out] of a weight from that [8, 8, in, out] of its collapsed form."""
    return torch.einsum("ctk,ctio->kio", collapse_rule()[1].to(grad.device, grad.dtype), grad)
