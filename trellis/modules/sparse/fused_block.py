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

from trellis.modules.sparse.attention import flash_takes
from trellis.modules.sparse.kernels.support import has_kernels
from trellis.modules.sparse.plans import MAX_WINDOWS, WindowPlan

EPS = 1e-6
aten = torch.ops.aten


def can_fuse(feats: Tensor, heads: int, plan: WindowPlan) -> bool:
    """Rows in 16 bit on CUDA that PyTorch's variable-length attention kernels take, windows that one launch takes."""
    return (
        flash_takes(feats.device, feats.dtype, feats.shape[1] // heads)
        and feats.shape[0] > 0
        and plan.num_windows <= MAX_WINDOWS
        and hasattr(aten, "_flash_attention_forward")
        and hasattr(aten, "_flash_attention_backward")
    )


def _cast(parameters: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [p if p.dtype == dtype else p.to(dtype) for p in parameters]


class _Plain:
    """The functions of `kernels/block.py` for tensors without kernels."""

    @staticmethod
    def norm_rows(x: Tensor, order: Tensor | None = None) -> Tensor:
        out = F.layer_norm(x, x.shape[1:], eps=EPS)
        return out if order is None else out.index_select(0, order)

    @staticmethod
    def add_norm(x: Tensor, order: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x.index_select(0, order).add_(residual)
        return total, F.layer_norm(total, total.shape[1:], eps=EPS)

    @staticmethod
    def norm_backward(grad: Tensor, order: Tensor | None, x: Tensor, residual: Tensor) -> Tensor:
        grad = grad if order is None else grad.index_select(0, order)
        _, mean, rstd = aten.native_layer_norm.default(x, [x.shape[1]], None, None, EPS)
        wanted = [True, False, False]
        out = aten.native_layer_norm_backward.default(grad, x, [x.shape[1]], mean, rstd, None, None, wanted)[0]
        return out.add_(residual)

    @staticmethod
    def column_sums(grad: Tensor, dtype: torch.dtype) -> Tensor:
        return grad.sum(0).to(dtype)

    @staticmethod
    def gelu_backward(grad: Tensor, hidden: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        out = aten.gelu_backward.default(grad, hidden, approximate="tanh")
        return F.gelu(hidden, approximate="tanh"), out, out.sum(0).to(dtype)


def gelu_product(bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """GELU(x weight^T + bias); on CUDA while the product is still in registers."""
    if x.device.type == "cuda":
        return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)
    return F.gelu(torch.addmm(bias, x, weight.t()), approximate="tanh")


def _row_kernels(x: Tensor) -> Any:
    if has_kernels(x.device, x.dtype):
        from trellis.modules.sparse.kernels import block

        return block
    return _Plain


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


class FusedBlock(torch.autograd.Function):
    """x + attn(LN(x)), then x + mlp(LN(x)); weights may be float32 and are cast to the dtype of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: WindowPlan, heads: int, keep: bool, *parameters: Tensor) -> Tensor:
        """`keep`: whether a backward pass may come, which PyTorch does not tell here (`needs_input_grad` is true of
        parameters without one too). `parameters`: weight and bias of to_qkv, to_out, and the MLP's two Linears."""
        x = x.contiguous()
        rows, channels = x.shape
        wq, bq, wo, bo, w1, b1, w2, b2 = _cast(parameters, x.dtype)
        rows_of = _row_kernels(x)
        by_window = rows_of.norm_rows(x, plan.order)
        qkv = torch.addmm(bq, by_window, wq.t()).view(rows, 3, heads, channels // heads)
        out, lse, *states = attention_forward(qkv, plan)
        handed = torch.addmm(bo, out.view(rows, channels), wo.t())
        middle, normed = rows_of.add_norm(handed, plan.inverse, x)
        if not keep:
            return torch.addmm(b2, gelu_product(b1, normed, w1), w2.t()).add_(middle)
        hidden = torch.addmm(b1, normed, w1.t())
        result = torch.addmm(b2, F.gelu(hidden, approximate="tanh"), w2.t()).add_(middle)
        ctx.plan, ctx.heads = plan, heads
        ctx.save_for_backward(x, qkv, out, lse, *states, middle, hidden, *parameters)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        x, qkv, out, lse, state0, state1, middle, hidden = saved[:8]
        parameters, plan = saved[8:], ctx.plan
        types = [p.dtype for p in parameters]
        wq, _, wo, _, w1, _, w2, _ = _cast(parameters, x.dtype)
        rows_of = _row_kernels(x)
        grad = grad.contiguous()
        d_b2 = rows_of.column_sums(grad, types[7])
        activated, handed, d_b1 = rows_of.gelu_backward(grad @ w2, hidden, types[5])
        d_w2 = (grad.t() @ activated).to(types[6])
        d_w1 = (handed.t() @ rows_of.norm_rows(middle)).to(types[4])
        grad = rows_of.norm_backward(handed @ w1, None, middle, grad)
        handed = grad.index_select(0, plan.order)
        d_bo, d_wo = rows_of.column_sums(handed, types[3]), (handed.t() @ out.view_as(x)).to(types[2])
        handed = attention_backward((handed @ wo).view_as(out), qkv, out, lse, (state0, state1), plan)
        by_window = rows_of.norm_rows(x, plan.order)
        d_bq, d_wq = rows_of.column_sums(handed, types[1]), (handed.t() @ by_window).to(types[0])
        grad = rows_of.norm_backward(handed @ wq, plan.inverse, x, grad)
        return grad, None, None, None, d_wq, d_bq, d_wo, d_bo, d_w1, d_b1, d_w2, d_b2
