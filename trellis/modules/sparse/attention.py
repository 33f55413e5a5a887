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
from trellis.modules.sparse.plans import MAX_WINDOWS

LENGTH_STEP = 32
"""Windows are padded to a multiple of this, so that little is computed for nothing."""
MAX_PADDED_ROWS = 1 << 15
"""Rows of one padded batch of windows: bounds the memory of the scores."""
MAX_PADDING = 4
"""Padded rows for each row up to which all windows are padded to one length, on a GPU."""


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
    rows, _, dim = q.shape
    if rows == 0:
        return torch.zeros_like(q)
    if takes_varlen(q.device, q.dtype, dim) and plan.num_windows <= MAX_WINDOWS:
        return varlen_attention(q, k, v, plan)
    if q.device.type != "cpu" and plan.num_windows * padded_length(plan.max_length) <= MAX_PADDING * rows:
        return evenly_padded_attention(q, k, v, plan)
    return padded_attention(q, k, v, plan)


def takes_varlen(device: torch.device, dtype: torch.dtype, dim: int) -> bool:
    """Whether rows of `dim` channels a head go through `varlen_attention`, windows permitting, not padded."""
    return has_varlen() and flash_takes(device, dtype, dim)


def flash_takes(device: torch.device, dtype: torch.dtype, dim: int) -> bool:
    """Whether PyTorch's flash kernels take rows of `dim` channels a head: CUDA of capability 8.0 or later, 16 bit, a
    multiple of 8 up to 256, or for their backward pass on cards other than 8.0 and 9.0 up to 192."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    capability = _capability(device)
    return capability >= (8, 0) and dim % 8 == 0 and dim <= (256 if capability in ((8, 0), (9, 0)) else 192)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def has_varlen() -> bool:
    """Whether this PyTorch has attention over rows of variable length; looked up once."""
    return importlib.util.find_spec("torch.nn.attention.varlen") is not None


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, plan: WindowPlan) -> Tensor:
    """[M, heads, dim] sorted by window -> the same, with PyTorch's variable-length kernel (CUDA, 16 bit)."""
    from torch.nn.attention.varlen import varlen_attn

    cu = plan.cu_seqlens
    return varlen_attn(q, k, v, cu, cu, plan.max_length, plan.max_length)


def padded_length(longest: int) -> int:
    """Rows that a window of up to `longest` rows is padded to."""
    return -(-longest // LENGTH_STEP) * LENGTH_STEP


def evenly_padded_attention(q: Tensor, k: Tensor, v: Tensor, plan: WindowPlan) -> Tensor:
    """[M, heads, dim] sorted by window -> the same, through SDPA on windows padded to one length.

    Some more is computed for nothing than in `padded_attention`, but the host need not wait for the windows' lengths.
    """
    m, heads, dim = q.shape
    length = padded_length(plan.max_length)
    starts, step = plan.cu_seqlens[:-1], torch.arange(length, device=q.device)
    exists = step < (plan.cu_seqlens[1:] - starts)[:, None]
    # past a window's end any row does: no query asks for its key, and nobody reads what it asks for
    rows = (starts[:, None] + step).clamp_max(m - 1).view(-1)
    own = torch.arange(m, dtype=torch.int32, device=q.device)
    window = torch.searchsorted(plan.cu_seqlens[1:], own, right=True)
    place = window * length + own - starts[window]
    q, k, v = (Permute.apply(x, rows, place).view(-1, length, heads, dim).transpose(1, 2) for x in (q, k, v))
    mask = (exists | (step == 0))[:, None, None, :]  # an empty window reads one row: no softmax of nothing
    parts = zip(*(x.split(max(1, MAX_PADDED_ROWS // length)) for x in (q, k, v, mask)))
    out = [F.scaled_dot_product_attention(a, b, c, attn_mask=d).transpose(1, 2) for a, b, c, d in parts]
    return torch.cat(out).reshape(-1, heads, dim).index_select(0, place)


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
