"""Sample pictures and meshes: inputs beside their reconstructions."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from trellis.datasets.sparse_sdf import collate
from trellis.geometry.isosurface import extract_mesh
from trellis.utils.blocks import STORAGE_BLOCK, SparseSDFBlocks, c_to_morton_permutation
from trellis.utils.mesh_utils import write_mesh

logger = logging.getLogger(__name__)


def blocks_from_rows(
    coords: torch.Tensor, rows: torch.Tensor, resolution: int, to_world: torch.Tensor
) -> SparseSDFBlocks:
    """A shape from block coordinates [M, 3] and TSDF rows [M, 512] in Morton order; a NaN `to_world` means none."""
    inverse = np.argsort(c_to_morton_permutation())
    sdf = rows.detach().float().clamp(-1, 1).cpu().numpy().astype(np.float16)[:, inverse]
    matrix = to_world.cpu().numpy()
    return SparseSDFBlocks(
        coords.cpu().numpy().astype(np.int16),
        sdf.reshape(-1, *(STORAGE_BLOCK,) * 3),
        None if np.isnan(matrix).any() else matrix,
        resolution,
    )


@torch.no_grad()
def write_samples(model: nn.Module, samples: list[dict[str, Any]], folder: Path) -> bytes | None:
    """Write `{i}_input.ply` and `{i}_reconstruction.ply` of each sample, and samples.png with one row per sample.

    Returns:
        The picture's bytes; None where Warp, which draws it, is not installed (said once).
    """
    folder.mkdir(parents=True, exist_ok=True)
    training = model.training
    model.eval()
    pairs = []
    try:
        for i, sample in enumerate(samples):
            batch = collate([sample])
            predicted = model(batch)["sdf"]
            pair = []
            for name, rows in (("input", batch["block_sdf"]), ("reconstruction", predicted)):
                blocks = blocks_from_rows(sample["block_coords"], rows, sample["resolution"], sample["to_world"])
                mesh = extract_mesh(blocks)
                write_mesh(folder / f"{i}_{name}.ply", *mesh)
                pair.append(mesh)
            pairs.append(pair)
    finally:
        model.train(training)
    return _draw(pairs, folder / "samples.png")


@functools.cache
def _say_once(text: str) -> None:
    logger.info(text)


def _draw(pairs: list[list[Any]], path: Path) -> bytes | None:
    try:
        from trellis.geometry.render import render_grid, write_png

        image = render_grid(pairs)
    except ImportError as error:
        _say_once(f"sample meshes are written, pictures are not: {error}")
        return None
    write_png(path, image)
    return path.read_bytes()
