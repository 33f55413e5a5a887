"""Sizes of encoder and decoder, from the arguments that both share and those of one part alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def part_arguments(config: Mapping[str, Any], part: str) -> dict[str, int]:
    """`model_channels`, `num_blocks` and `num_heads` of the "encoder" or "decoder" from the arguments of the model.

    Raises:
        ValueError: a value outside its rule, by the name that it was given under.
    """

    def given(name: str) -> tuple[str, Any]:
        own = f"{name}_{part}"
        return (name, config[name]) if config[own] is None else (own, config[own])

    name, channels = given("model_channels")
    if channels <= 0 or channels % 64:
        raise ValueError(f"{name} must be a positive multiple of 64, got {channels}")
    name, blocks = given("num_blocks")
    if blocks < 0:
        raise ValueError(f"{name} must be at least 0, got {blocks}")
    name, heads = _heads(config, part, channels)
    if heads < 1 or channels % heads:
        raise ValueError(f"{name} must divide the {channels} channels of the {part}, which {heads} heads do not")
    return {"model_channels": channels, "num_blocks": blocks, "num_heads": heads}


def _heads(config: Mapping[str, Any], part: str, channels: int) -> tuple[str, int]:
    """The argument that counts and its heads: a part's own before the common ones, heads before their width."""
    for suffix in (f"_{part}", ""):
        heads, width = config[f"num_heads{suffix}"], config[f"num_head_channels{suffix}"]
        if heads is not None:
            return f"num_heads{suffix}", heads
        if width is not None and width < 1:
            raise ValueError(f"num_head_channels{suffix} must be at least 1, got {width}")
        if width is not None:
            return f"num_head_channels{suffix}", max(1, channels // width)
    raise ValueError("num_head_channels must be a number where num_heads is null, got null")
