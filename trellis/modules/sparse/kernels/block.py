"""Row-wise kernels of the transformer block: LayerNorm with moved rows and residuals, and the backward of GELU.

Each reads and writes every row once. Statistics and sums are float32. LayerNorm is without affine (eps 1e-6), GELU the
tanh approximation: x s(2 k (x + a x^3)) with the logistic function s, 2 k = 2 sqrt(2 / pi) =
1.5957691, a = 0.044715.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trellis.modules.sparse.kernels.support import cdiv, power_of_2

EPS = 1e-6
ELEMENTS = 2048
"""Elements that a program of the row kernels holds."""
TILE_ROWS, STEP_ROWS, COLUMNS = 256, 32, 64
"""Tile of a program of the column sums, and the rows that it holds at a time."""


@triton.jit
def normed(v, known, C: tl.constexpr, EPS: tl.constexpr):
    """(v - mean) / std and 1 / std of each row."""
    d = tl.where(known[None, :], v - (tl.sum(v, 1) / C)[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(d * d, 1) / C + EPS)
    return d * rstd[:, None], rstd


@triton.jit(do_not_specialize=["count"])
def norm_rows_kernel(
    x, order, residual, total, out, count,
    C: tl.constexpr, BC: tl.constexpr, RB: tl.constexpr, ORDER: tl.constexpr, ADD: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * RB + tl.arange(0, RB)
    live = rows < count
    channel = tl.arange(0, BC)
    known = channel < C
    inside = live[:, None] & known[None, :]
    place = rows[:, None] * C + channel[None, :]
    source = rows
    if ORDER:
        source = tl.load(order + rows, mask=live, other=0)
    v = tl.load(x + source[:, None] * C + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    if ADD:
        v += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
        narrow = v.to(total.dtype.element_ty)
        tl.store(total + place, narrow, mask=inside)
        # of what was stored, as the backward pass reads it
        v = narrow.to(tl.float32)
    y, _ = normed(v, known, C, EPS)
    tl.store(out + place, y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count"])
def norm_backward_kernel(
    grad, order, x, residual, out, count,
    C: tl.constexpr, BC: tl.constexpr, RB: tl.constexpr, ORDER: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * RB + tl.arange(0, RB)
    live = rows < count
    channel = tl.arange(0, BC)
    known = channel < C
    inside = live[:, None] & known[None, :]
    place = rows[:, None] * C + channel[None, :]
    source = rows
    if ORDER:
        source = tl.load(order + rows, mask=live, other=0)
    g = tl.load(grad + source[:, None] * C + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    hat, rstd = normed(tl.load(x + place, mask=inside, other=0.0).to(tl.float32), known, C, EPS)
    d = g - (tl.sum(g, 1) / C)[:, None] - hat * (tl.sum(g * hat, 1) / C)[:, None]
    d = d * rstd[:, None] + tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, d.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count"])
def column_sums_kernel(
    grad, hidden, activated, out, sums, count,
    C: tl.constexpr, TILE: tl.constexpr, RB: tl.constexpr, BC: tl.constexpr, GELU: tl.constexpr,
):  # fmt: skip
    """Sums of a tile's rows; with GELU of grad times its derivative at `hidden`, which goes to `out`."""
    first = tl.program_id(0).to(tl.int64) * TILE
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    known = channel < C
    total = tl.zeros([RB, BC], tl.float32)
    for r in range(0, TILE, RB):
        rows = first + r + tl.arange(0, RB)
        inside = (rows < count)[:, None] & known[None, :]
        place = rows[:, None] * C + channel[None, :]
        g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        if GELU:
            x = tl.load(hidden + place, mask=inside, other=0.0).to(tl.float32)
            s = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
            y = x * s
            tl.store(activated + place, y.to(activated.dtype.element_ty), mask=inside)
            g *= s + y * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
            tl.store(out + place, g.to(out.dtype.element_ty), mask=inside)
        total += g
    tl.store(sums + tl.program_id(0) * C + channel, tl.sum(total, 0), mask=known)


def _rows(channels: int) -> dict[str, int | float]:
    wide = power_of_2(channels)
    return {"C": channels, "BC": wide, "RB": max(1, ELEMENTS // wide), "EPS": EPS}


def norm_rows(x: Tensor, order: Tensor | None = None) -> Tensor:
    """LayerNorm of x[order], or of x; [M, C] contiguous."""
    out = torch.empty_like(x)
    if x.shape[0]:
        shape = _rows(x.shape[1])
        norm_rows_kernel[(cdiv(x.shape[0], shape["RB"]),)](
            x, x if order is None else order, x, x, out, x.shape[0], ORDER=order is not None, ADD=False, **shape
        )
    return out


def add_norm(x: Tensor, order: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """x[order] + residual, and its LayerNorm; [M, C] contiguous."""
    total, out = torch.empty_like(x), torch.empty_like(x)
    if x.shape[0]:
        shape = _rows(x.shape[1])
        norm_rows_kernel[(cdiv(x.shape[0], shape["RB"]),)](
            x, order, residual, total, out, x.shape[0], ORDER=True, ADD=True, **shape
        )
    return total, out


def norm_backward(grad: Tensor, order: Tensor | None, x: Tensor, residual: Tensor) -> Tensor:
    """residual plus the gradient of x, whose LayerNorm has the gradient grad[order]; [M, C] contiguous."""
    out = torch.empty_like(x)
    if x.shape[0]:
        shape = _rows(x.shape[1])
        norm_backward_kernel[(cdiv(x.shape[0], shape["RB"]),)](
            grad, x if order is None else order, x, residual, out, x.shape[0], ORDER=order is not None, **shape
        )
    return out


def column_sums(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """[C] sums over the rows of grad [M, C] contiguous."""
    return _sums(grad, None, None, None).to(dtype)


def gelu_backward(grad: Tensor, hidden: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """GELU(hidden), the gradient of hidden, and its column sums in `dtype`; grad, hidden: [M, C] contiguous."""
    activated, out = torch.empty_like(hidden), torch.empty_like(hidden)
    return activated, out, _sums(grad, hidden, activated, out).to(dtype)


def _sums(grad: Tensor, hidden: Tensor | None, activated: Tensor | None, out: Tensor | None) -> Tensor:
    count, channels = grad.shape
    sums = torch.empty(cdiv(count, TILE_ROWS), channels, dtype=torch.float32, device=grad.device)
    if count:
        column_sums_kernel[(sums.shape[0], cdiv(channels, COLUMNS))](
            grad, *(grad if t is None else t for t in (hidden, activated, out)), sums, count,
            C=channels, TILE=TILE_ROWS, RB=STEP_ROWS, BC=COLUMNS, GELU=hidden is not None,
        )  # fmt: skip
    return sums.sum(0)
