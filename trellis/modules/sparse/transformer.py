"""Transformer blocks on the latent grid and the absolute position embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trellis.modules.sparse.attention import WindowAttention
from trellis.modules.sparse.fused_block import FusedBlock, can_fuse
from trellis.modules.sparse.levels import Topology
from trellis.modules.sparse.linear import SparseLinear
from trellis.modules.sparse.norm import layer_norm


def position_embedding(coords: Tensor, channels: int, factor: float | None = None) -> Tensor:
    """Absolute embedding of integer coordinates.

    f_i = 10000^(-i/F) with F = floor(floor(channels / 3) / 2); per axis [sin(x f), cos(x f)], the three axes
    concatenated and zero-padded to `channels`.

    Args:
        coords: [M, 3] integers; factor: multiplies the coordinates first.

    Returns:
        [M, channels] float32.
    """
    count = channels // 3 // 2
    frequencies = 1.0 / 10000 ** (torch.arange(count, dtype=torch.float32, device=coords.device) / count)
    position = coords.float() if factor is None else coords.float() * factor
    angle = position[..., None] * frequencies
    out = torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(1)
    return torch.nn.functional.pad(out, (0, channels - out.shape[1]))


def embed_positions(feats: Tensor, topology: Topology, factor: float | None = None) -> Tensor:
    """feats [M, C] plus the embedding of the blocks' coordinates, which is kept with the topology."""
    key = (feats.shape[1], factor, feats.dtype)
    if key not in topology.embeddings:
        topology.embeddings[key] = position_embedding(topology.coords[:, 1:], feats.shape[1], factor).to(feats.dtype)
    return feats + topology.embeddings[key]


class FeedForward(nn.Module):
    """Linear, tanh-approximated GELU, Linear."""

    def __init__(self, channels: int, mlp_ratio: float) -> None:
        super().__init__()
        hidden = int(channels * mlp_ratio)
        self.mlp = nn.Sequential(
            SparseLinear(channels, hidden), nn.GELU(approximate="tanh"), SparseLinear(hidden, channels)
        )

    def forward(self, feats: Tensor) -> Tensor:
        """[M, C] -> [M, C]."""
        return self.mlp(feats)


class TransformerBlock(nn.Module):
    """x + attn(LN(x)), then x + mlp(LN(x)); LN without affine, eps 1e-6."""

    def __init__(
        self,
        channels: int,
        heads: int,
        *,
        mlp_ratio: float = 4.0,
        window_size: int = 8,
        shift: int = 0,
        qk_rms_norm: bool = False,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.use_checkpoint = use_checkpoint
        self.attn = WindowAttention(channels, heads, window_size, shift, qk_rms_norm)
        self.mlp = FeedForward(channels, mlp_ratio)

    def _forward(self, feats: Tensor, topology: Topology, fused: bool) -> Tensor:
        attn = self.attn
        plan = topology.windows(attn.window_size, attn.shift)
        if fused and attn.q_rms_norm is None and can_fuse(feats, attn.heads, plan):
            layers = (attn.to_qkv, attn.to_out, self.mlp.mlp[0], self.mlp.mlp[2])
            parameters = [p for layer in layers for p in (layer.weight, layer.bias)]
            return FusedBlock.apply(feats, plan, attn.heads, torch.is_grad_enabled(), *parameters)
        feats = feats + self.attn(layer_norm(feats, 1e-6), topology)
        return feats + self.mlp(layer_norm(feats, 1e-6))

    def forward(self, feats: Tensor, topology: Topology, fused: bool = True) -> Tensor:
        """[M, C] on the latent grid -> [M, C]."""
        if self.use_checkpoint and torch.is_grad_enabled():
            # nothing is drawn at random, and asking the generator for its state waits for the GPU
            return checkpoint(
                self._forward, feats, topology, fused, use_reentrant=False, preserve_rng_state=False
            )
        return self._forward(feats, topology, fused)
