"""An estimate of the device memory that training on a shape takes, from its number of blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trellis.models.autoencoders.part_arguments import part_arguments

# Fitted to the peaks of forward and backward passes on an H100 (PyTorch 2.11, C = 512), which grow in proportion to the
# blocks: 249 kB a block with 8 + 8 layers in half precision on real shapes, 173 kB with 4 + 4 and a plain mean of
# squares. Numbers of the activations' type for each channel of each latent voxel:
LAYER = 9.5
"""One transformer block: what its backward pass needs."""
CHECKPOINTED_LAYER = 1.0
"""One transformer block that is recomputed: its input."""
CONVOLUTIONS = 67.0
"""All of the encoder's and the decoder's levels, tables included, with the share of voxels of surfaces."""
OUTPUT = 24_000
"""Bytes of a block's 512 values and what the loss makes of them, in float32."""
MARGIN = 1.1


def bytes_per_block(config: Mapping[str, Any], mode: str | None) -> float:
    """Bytes of activations, gradients and tables for each latent voxel (a block of 8 cubed) of a micro-batch.

    Nearly all of it is proportional to the latent voxels: the transformer works on them, and the decoder makes all 512
    voxels of each.

    Args:
        config: arguments of the model. mode: `fp16_mode` of the trainer.
    """
    number = 4 if mode is None else 2
    parts = [part_arguments(config, part) for part in ("encoder", "decoder")]
    widest = max(part["model_channels"] for part in parts)
    layers = sum(part["model_channels"] * part["num_blocks"] for part in parts)
    kept = LAYER * widest + CHECKPOINTED_LAYER * layers if config["use_checkpoint"] else LAYER * layers
    return MARGIN * (number * (kept + CONVOLUTIONS * widest) + OUTPUT)


def sample_bytes(sample: Mapping[str, Any], *, bytes_per_block: float) -> int:
    """Bytes that a sample adds to its micro-batch."""
    return int(len(sample["block_coords"]) * bytes_per_block)
