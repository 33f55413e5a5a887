"""Multi-head self-attention inside shifted windows of the latent grid; variable-length, nothing to compile."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from trellis.modules.sparse.levels import Topology, WindowPlan
from trellis.modules.sparse.linear import SparseLinear

LENGTH_STEP = 32
"""Windows are padded to a multiple of this, so that little is computed for nothing."""
MAX_PADDED_ROWS = 1 << 15
"""Rows of one padded batch of windows: bounds the memory of the scores."""


class Permute(torch.autograd.Function):
    """x[order], whose gradient gathers by the inverse permutation: no atomic additions, the same bits on every run."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.inverse = inverse
        return x.index_select(0, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.inverse), None, None


def windowed_attention(q: Tensor, k: Tensor, v: Tensor, plan: WindowPlan) -> Tensor:
    """Attention of every row to the rows of its window.

    Args:
        q, k, v: [M, heads, dim], rows in the order of the topology.

    Returns:
        [M, heads, dim] = softmax(q k^T / sqrt(dim)) v within each window.
    """
    order, inverse = plan.order, plan.inverse
    q, k, v = (Permute.apply(x, order, inverse) for x in (q, k, v))
    return Permute.apply(sorted_attention(q, k, v, plan), inverse, order)


def sorted_attention(q: Tensor, k: Tensor, v: Tensor, plan: WindowPlan) -> Tensor:
    """`windowed_attention` for rows that are sorted by window already (`plan.order`)."""
    if q.shape[0] == 0:
        return torch.zeros_like(q)
    return varlen_attention(q, k, v, plan) if takes_varlen(q) else padded_attention(q, k, v, plan)


def takes_varlen(x: Tensor) -> bool:
    """Whether queries of this device and dtype go through `varlen_attention`, not `padded_attention`."""
    return x.device.type == "cuda" and x.dtype in (torch.float16, torch.bfloat16) and has_varlen()


@cache
def has_varlen() -> bool:
    """Whether this PyTorch has attention over rows of variable length; looked up once."""
    return importlib.util.find_spec("torch.nn.attention.varlen") is not None


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, plan: WindowPlan) -> Tensor:
    """[M, heads, dim] sorted by window -> the same, with PyTorch's variable-length kernel (CUDA, 16 bit)."""
    from torch.nn.attention.varlen import varlen_attn

    cu = plan.cu_seqlens
    return varlen_attn(q, k, v, cu, cu, plan.max_length, plan.max_length)


def padded_attention(q: Tensor, k: Tensor, v: Tensor, plan: WindowPlan) -> Tensor:
    """[M, heads, dim] sorted by window -> the same, through SDPA on windows padded to similar lengths."""
    m, heads, dim = q.shape
    starts = plan.cu_seqlens[:-1].long()
    lengths = plan.cu_seqlens[1:].long() - starts
    padded = torch.div(lengths + LENGTH_STEP - 1, LENGTH_STEP, rounding_mode="floor") * LENGTH_STEP
    zero = q.new_zeros(1, heads, dim)
    q, k, v = (torch.cat([x, zero]) for x in (q, k, v))
    pieces: list[Tensor] = []
    positions: list[Tensor] = []
    for length in torch.unique(padded).tolist():
        if length == 0:  # a plan that bounds the number of windows ends with empty ones
            continue
        windows = torch.nonzero(padded == length)[:, 0]
        for group in windows.split(max(1, MAX_PADDED_ROWS // length)):
            step = torch.arange(length, device=q.device)
            exists = step[None] < lengths[group][:, None]
            rows = torch.where(exists, starts[group][:, None] + step, m)
            part = [x[rows].transpose(1, 2) for x in (q, k, v)]
            mask = None if bool(exists.all()) else exists[:, None, None, :]
            out = F.scaled_dot_product_attention(*part, attn_mask=mask)
            pieces.append(out.transpose(1, 2)[exists])
            positions.append(rows[exists])
    # every row stands in just one piece: a permutation, not a sum
    place = torch.empty(m, dtype=torch.long, device=q.device)
    place[torch.cat(positions)] = torch.arange(m, device=q.device)
    return torch.cat(pieces)[place]


class MultiHeadRMSNorm(nn.Module):
    """RMS norm of each head's vector with a learned scale per head and channel."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(heads, dim))

    def forward(self, x: Tensor) -> Tensor:
        """[M, heads, dim] -> the same."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return (F.normalize(x.to(wide), dim=-1) * self.gamma.to(wide) * x.shape[-1] ** 0.5).to(x.dtype)


class WindowAttention(nn.Module):
    """Self-attention with one fused projection, laid out [row, 3, heads, dim]."""

    def __init__(
        self, channels: int, heads: int, window_size: int, shift: int, qk_rms_norm: bool = False
    ) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"channels must be a multiple of the number of heads, got {channels} and {heads}")
        self.heads = heads
        self.window_size = window_size
        self.shift = shift
        self.to_qkv = SparseLinear(channels, 3 * channels)
        self.to_out = SparseLinear(channels, channels)
        self.q_rms_norm = MultiHeadRMSNorm(channels // heads, heads) if qk_rms_norm else None
        self.k_rms_norm = MultiHeadRMSNorm(channels // heads, heads) if qk_rms_norm else None

    def forward(self, feats: Tensor, topology: Topology) -> Tensor:
        """[M, C] on the latent grid -> [M, C]."""
        m, channels = feats.shape
        plan = topology.windows(self.window_size, self.shift)
        # sorted by window before the projection and back after the other: a third of moving queries, keys and values
        sorted_feats = Permute.apply(feats, plan.order, plan.inverse)
        q, k, v = self.to_qkv(sorted_feats).view(m, 3, self.heads, channels // self.heads).unbind(1)
        if self.q_rms_norm is not None and self.k_rms_norm is not None:
            q, k = self.q_rms_norm(q), self.k_rms_norm(k)
        out = self.to_out(sorted_attention(q, k, v, plan).reshape(m, channels))
        return Permute.apply(out, plan.inverse, plan.order)
