"""An estimate of the device memory that training on a shape takes, from its number of blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LAYER = 18.0
TRUNK = 40.0
OUTPUT = 24_000.0
CHECKPOINTED_LAYER = 1.0


def bytes_per_block(config: Mapping[str, Any], mode: str | None) -> float:
    """Bytes of activations, gradients and tables for each latent voxel (a block of 8 cubed) of a micro-batch.

    Nearly all of it is proportional to the latent voxels: the transformer works on them, and the decoder makes all 512
    voxels of each. The encoder's levels are partial, which the constants, fitted to real shapes, have in them.

    Args:
        config: arguments of the model. mode: `fp16_mode` of the trainer.
    """
    number = 4 if mode is None else 2
    blocks = config["num_blocks"]
    layers = sum(blocks if config[key] is None else config[key] for key in ("num_blocks_encoder", "num_blocks_decoder"))
    kept = layers * CHECKPOINTED_LAYER + LAYER if config["use_checkpoint"] else layers * LAYER
    return config["model_channels"] * number * (kept + TRUNK) + OUTPUT


def sample_bytes(sample: Mapping[str, Any], *, bytes_per_block: float) -> int:
    """Bytes that a sample adds to its micro-batch."""
    return int(len(sample["block_coords"]) * bytes_per_block)
