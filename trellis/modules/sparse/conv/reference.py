"""Slow oracles of the sparse convolutions; plain differentiable torch, no other import, any float dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def submanifold_conv3d(feats: Tensor, weight: Tensor, bias: Tensor | None, neighbours: Tensor) -> Tensor:
    """3x3x3 convolution with outputs only where there are inputs.

    Args:
        feats: [N, in]; weight: [27, in, out]; bias: [out] or None; neighbours: [N, 27] int, -1 where there is none.

    Returns:
        [N, out]: out[n] = bias + sum_k feats[neighbours[n, k]] weight[k].
    """
    out = feats.new_zeros(feats.shape[0], weight.shape[2])
    for k in range(weight.shape[0]):
        rows = neighbours[:, k].long()
        taken = feats[rows.clamp_min(0)] if feats.shape[0] else feats
        out = out + torch.where((rows >= 0)[:, None], taken, 0.0) @ weight[k]
    return out if bias is None else out + bias


def subdivide_neighbours(neighbours: Tensor) -> Tensor:
    """Neighbour table [8 N, 27] of the children of all voxels; child 4 px + 2 py + pz of row n is row 8 n + child."""
    n = neighbours.shape[0]
    table = torch.empty(8 * n, 27, dtype=neighbours.dtype, device=neighbours.device)
    for child in range(8):
        parity = (child >> 2, (child >> 1) & 1, child & 1)
        for k in range(27):
            target = [parity[a] + d for a, d in enumerate((k % 3 - 1, k // 3 % 3 - 1, k // 9 - 1))]
            step = [t // 2 for t in target]
            parent = neighbours[:, 9 * (step[2] + 1) + 3 * (step[1] + 1) + step[0] + 1]
            inside = 4 * (target[0] % 2) + 2 * (target[1] % 2) + target[2] % 2
            table[child::8, k] = torch.where(parent >= 0, parent * 8 + inside, -1)
    return table


def subdivide_conv3d(feats: Tensor, weight: Tensor, bias: Tensor | None, neighbours: Tensor) -> Tensor:
    """Every voxel becomes 8 children with its features, then a 3x3x3 convolution on them.

    Args:
        feats: [N, in] on the parents; neighbours: [N, 27] of the parents; weight, bias as in `submanifold_conv3d`.

    Returns:
        [8 N, out]
    """
    return submanifold_conv3d(feats.repeat_interleave(8, dim=0), weight, bias, subdivide_neighbours(neighbours))


def subdivide_conv_to_scalar(
    feats: Tensor, weight: Tensor, bias: Tensor, out_weight: Tensor, out_bias: Tensor, neighbours: Tensor
) -> Tensor:
    """tanh(Linear(SiLU(subdivide_conv3d(x)))): [N, in] -> [8 N, 1]; out_weight [1, out], out_bias [1]."""
    hidden = torch.nn.functional.silu(subdivide_conv3d(feats, weight, bias, neighbours))
    return torch.tanh(hidden @ out_weight.t() + out_bias)


def pool(feats: Tensor, children: Tensor) -> Tensor:
    """Sum over the n children that exist, divided by n + 1.

    The published network's scatter-mean counts its zero start as one more child.

    Args:
        feats: [N, C]; children: [P, 8] int rows, -1 where there is none.

    Returns:
        [P, C]
    """
    exists = (children >= 0)[..., None]
    taken = feats[children.long().clamp_min(0)] if feats.shape[0] else feats.new_zeros(*children.shape, feats.shape[1])
    return torch.where(exists, taken, 0.0).sum(1) / (exists.sum(1) + 1)
