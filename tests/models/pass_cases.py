"""Batches, a small model and a stand-in for the card, for tests of CUDA graphs of whole passes."""

from __future__ import annotations

import torch

from trellis.datasets.sparse_sdf import joined_window_sizes, window_sizes
from trellis.models.autoencoders.ss_vqvae import SparseSDFVQVAE
from trellis.modules.sparse.morton import slot_positions


def spheres(radii, resolution=32, device="cpu"):
    """Spheres in block form, as collate makes them."""
    side = resolution // 8
    cells = slot_positions(side)
    centre = (cells[:, None] * 8 + slot_positions(8) + 0.5) / resolution - 0.5
    coords, values = [], []
    for sample, radius in enumerate(radii):
        sdf = ((centre.norm(dim=-1) - radius) * resolution / 4).clamp(-1, 1).half()
        keep = (sdf.abs() < 1).any(1)
        coords.append(torch.cat([torch.full((int(keep.sum()), 1), sample), cells[keep]], 1).int())
        values.append(sdf[keep])
    counts = torch.tensor([len(c) for c in coords])
    coords, values = torch.cat(coords), torch.cat(values)
    active = values.abs() < 1
    levels = [active, active.view(-1, 64, 8).any(2), active.view(-1, 8, 64).any(2)]
    windows = [window_sizes(part[:, 1:].numpy()) for part in coords.split(counts.tolist())]
    return {
        "block_coords": coords.to(device),
        "block_sdf": values.to(device),
        "active": active.to(device),
        "blocks_per_sample": counts,
        "level_sizes": [int(x.sum()) for x in levels] + [len(coords)],
        "window_sizes": joined_window_sizes(windows),
        "resolution": resolution,
    }


def model_of(**changes):
    torch.manual_seed(0)
    arguments = {"model_channels": 64, "latent_channels": 4, "num_blocks": 2, "num_embeddings": 16}
    return SparseSDFVQVAE(**{**arguments, **changes})


class Repeater:
    """Stands in for the card: calls the function again where a graph would replay its kernels."""

    bytes, free = 0, 1 << 40

    def __init__(self):
        self.calls = []

    def follow(self):
        self.calls.append("follow")

    def free_bytes(self):
        return self.free

    def release(self):
        self.bytes = 0

    def rehearse(self, function):
        function()
        return 0

    def record(self, function):
        function()
        return function


def loss_of(out):
    return out["sdf"].square().sum() + out["commitment_rows"].sum() + 0.5 * out["codebook_rows"].sum()
