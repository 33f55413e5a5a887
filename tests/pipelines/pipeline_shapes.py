"""Analytic shapes, a small model and a run folder for the tests of the pipelines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from trellis.models.autoencoders.ss_vqvae import SparseSDFVQVAE
from trellis.trainers.checkpoint import save_checkpoint
from trellis.utils.blocks import SparseSDFBlocks, block_voxel_offsets, morton_order
from trellis.utils.io_utils import write_json

MODEL_ARGS = {
    "model_channels": 64, "latent_channels": 8, "num_blocks": 1, "num_embeddings": 32, "mlp_ratio": 2.0,
    "resolution": 64,
}  # fmt: skip


def ellipsoid_blocks(resolution: int = 32, *, axes=(0.475, 0.3, 0.22), label: str = "organ") -> SparseSDFBlocks:
    """An ellipsoid whose three half-axes (in grid space) differ, off the world's origin; 100 mm per cube side."""
    to_world = np.diag([100.0, 100.0, 100.0, 1.0])
    to_world[:3, 3] = [10.0, -20.0, 30.0]
    side = resolution // 8
    index = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), -1).reshape(-1, 3)
    points = (index[:, None] * 8 + block_voxel_offsets() + 0.5) / resolution - 0.5
    scaled = np.linalg.norm(points / axes, axis=-1)
    gradient = np.linalg.norm(points / np.square(axes), axis=-1) / np.maximum(scaled, 1e-9)
    values = np.clip((scaled - 1) / np.maximum(gradient, 1e-9) * resolution / 4, -1, 1).astype(np.float16)
    keep = (np.abs(values) < 1).any(axis=1)
    index, values = index[keep], values[keep]
    order = morton_order(index)
    return SparseSDFBlocks(
        index[order].astype(np.int16), values[order].reshape(-1, 8, 8, 8), to_world, resolution, label=label
    )


def small_model(seed: int = 0, **changes) -> SparseSDFVQVAE:
    """Random weights; the codebook is made of latents, so that several codes are used."""
    torch.manual_seed(seed)
    return SparseSDFVQVAE(**{**MODEL_ARGS, **changes})


def write_run(folder: Path, model: SparseSDFVQVAE, steps=(20, 40), rate: float = 0.99) -> Path:
    """A run folder as training leaves it; the averaged weights of a step have a decoder bias of their own."""
    write_json(
        folder / "config.json",
        {
            "models": {"vqvae": {"name": "SparseSDFVQVAE", "args": MODEL_ARGS}},
            "dataset": {"name": "SparseSDF", "args": {"resolution": 32}},
            "trainer": {"name": "SparseSDF_VQVAETrainer", "args": {}},
        },
    )
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for step in steps:
        weights["decoder.out_layer.bias"] = torch.full((1,), 0.001 * step)
        averaged = {**weights, "decoder.out_layer.bias": torch.full((1,), -0.001 * step)}
        save_checkpoint(folder / "ckpts", "vqvae", step, weights, {rate: averaged}, {"step": step}, {})
    return folder
