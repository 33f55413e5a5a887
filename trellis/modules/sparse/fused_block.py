"""A transformer block as one autograd function for 16 bit on CUDA: the same values, fewer kept tensors and launches.

Kept for the backward pass: the two residual inputs, queries, keys and values, the attention's output, and the MLP
before its GELU. LayerNorms and GELU are recomputed. Rows are moved into window order before the first projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from trellis.modules.sparse.plans import WindowPlan

EPS = 1e-6
aten = torch.ops.aten


def can_fuse(feats: Tensor) -> bool:
    """16 bit on CUDA with PyTorch's variable-length attention kernels."""
    return (
        feats.device.type == "cuda"
        and feats.dtype in (torch.float16, torch.bfloat16)
        and feats.shape[0] > 0
        and hasattr(aten, "_flash_attention_forward")
        and hasattr(aten, "_flash_attention_backward")
    )


def _cast(parameters: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [p if p.dtype == dtype else p.to(dtype) for p in parameters]


def _norm(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return aten.native_layer_norm.default(x, [x.shape[1]], None, None, EPS)


def _norm_backward(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    wanted = [True, False, False]
    return aten.native_layer_norm_backward.default(grad, x, [x.shape[1]], mean, rstd, None, None, wanted)[0]


def attention_forward(qkv: Tensor, plan: WindowPlan) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[M, 3, heads, dim] by window -> output [M, heads, dim], log-sum-exp, and the two states of its kernel."""
    q, k, v = qkv.unbind(1)
    cu, longest = plan.cu_seqlens, plan.max_length
    return aten._flash_attention_forward.default(q, k, v, cu, cu, longest, longest, 0.0, False, False)[:4]


def attention_backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, states: tuple[Tensor, Tensor], plan: WindowPlan
) -> Tensor:
    """Gradient [M, 3 * heads * dim] of the queries, keys and values."""
    q, k, v = qkv.unbind(1)
    cu, longest = plan.cu_seqlens, plan.max_length
    grads = aten._flash_attention_backward.default(
        grad, q, k, v, out, lse, cu, cu, longest, longest, 0.0, False, states[0], states[1]
    )
    return torch.stack(grads[:3], 1).view(qkv.shape[0], -1)


def _linear_backward(
    grad: Tensor, read: Tensor, weight: Tensor, types: tuple[torch.dtype, torch.dtype]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `read`, weight and bias; the last two in their own dtypes."""
    return grad @ weight, (grad.t() @ read).to(types[0]), grad.sum(0).to(types[1])


class FusedBlock(torch.autograd.Function):
    """x + attn(LN(x)), then x + mlp(LN(x)); weights may be float32 and are cast to the dtype of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: WindowPlan, heads: int, *parameters: Tensor) -> Tensor:
        """`parameters`: weight and bias of to_qkv, to_out, and the MLP's two Linears."""
        x = x.contiguous()
        rows, channels = x.shape
        wq, bq, wo, bo, w1, b1, w2, b2 = _cast(parameters, x.dtype)
        normed, *norm1 = _norm(x)
        by_window = normed.index_select(0, plan.order)
        qkv = torch.addmm(bq, by_window, wq.t()).view(rows, 3, heads, channels // heads)
        out, lse, *states = attention_forward(qkv, plan)
        handed = torch.addmm(bo, out.view(rows, channels), wo.t())
        middle = handed.index_select(0, plan.inverse).add_(x)
        normed, *norm2 = _norm(middle)
        hidden = torch.addmm(b1, normed, w1.t())
        result = torch.addmm(b2, F.gelu(hidden, approximate="tanh"), w2.t()).add_(middle)
        ctx.plan, ctx.heads = plan, heads
        ctx.save_for_backward(x, *norm1, qkv, out, lse, *states, middle, *norm2, hidden, *parameters)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        x, mean1, rstd1, qkv, out, lse, state0, state1, middle, mean2, rstd2, hidden = saved[:12]
        parameters, plan = saved[12:], ctx.plan
        types = [p.dtype for p in parameters]
        wq, _, wo, _, w1, _, w2, _ = _cast(parameters, x.dtype)
        grad = grad.contiguous()
        handed, d_w2, d_b2 = _linear_backward(grad, F.gelu(hidden, approximate="tanh"), w2, (types[6], types[7]))
        handed = aten.gelu_backward.default(handed, hidden, approximate="tanh")
        handed, d_w1, d_b1 = _linear_backward(handed, _norm(middle)[0], w1, (types[4], types[5]))
        grad = _norm_backward(handed, middle, mean2, rstd2).add_(grad)
        handed = grad.index_select(0, plan.order)
        handed, d_wo, d_bo = _linear_backward(handed, out.view_as(x), wo, (types[2], types[3]))
        handed = attention_backward(handed.view_as(out), qkv, out, lse, (state0, state1), plan)
        by_window = _norm(x)[0].index_select(0, plan.order)
        handed, d_wq, d_bq = _linear_backward(handed, by_window, wq, (types[0], types[1]))
        grad = _norm_backward(handed.index_select(0, plan.inverse), x, mean1, rstd1).add_(grad)
        return grad, None, None, d_wq, d_bq, d_wo, d_bo, d_w1, d_b1, d_w2, d_b2
