"""Sparse convolutions with gradients: validation, the choice of a backend, and autograd.

Backends: "reference" (slow oracle), "cpu" (gather + GEMM in chunks, plain torch), "dense" (the batch's bounding box,
plain torch), "triton" (CUDA kernels). "auto" takes "triton" for CUDA tensors where Triton works; otherwise
"dense" on a CPU where blocks fill their box well enough, and else "cpu". A backend asked for by name that
cannot run is an error, never a fallback.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from trellis.modules.sparse.conv import cpu, dense, reference
from trellis.modules.sparse.conv.collapse import collapse_weight
from trellis.modules.sparse.kernels.support import KERNEL_DTYPES, has_kernels, interpreted, triton_installed
from trellis.modules.sparse.levels import Grid

BACKENDS = ("auto", "reference", "cpu", "dense", "triton")


def resolve_backend(backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """The backend that will run for tensors of `dtype` on `device`; ValueError for an unknown or unusable one."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto":
        return "triton" if has_kernels(device, dtype) else "cpu"
    if backend == "triton":
        if not triton_installed():
            raise ValueError("backend 'triton' needs the package triton, which is not installed; use 'auto' or 'cpu'")
        if device.type != "cuda" and not interpreted():
            raise ValueError(f"backend 'triton' needs CUDA tensors (or TRITON_INTERPRET=1), got {device.type} tensors")
        if dtype not in KERNEL_DTYPES:
            raise ValueError(f"backend 'triton' takes float16, bfloat16 and float32, got {dtype}")
    return backend


def _choose(backend: str, feats: Tensor, weight: Tensor, grid: Grid) -> str:
    resolved = resolve_backend(backend, feats.device, feats.dtype)
    if backend == "auto" and resolved == "cpu" and dense.is_worthwhile(feats, weight.shape[2], grid):
        return "dense"
    return resolved


def _implementation(backend: str) -> ModuleType:
    """The module with the functions of `cpu.py` for a resolved backend."""
    if backend == "triton":
        from trellis.modules.sparse.conv import triton

        return triton
    return cpu


def _check(feats: Tensor, weight: Tensor, bias: Tensor | None, grid: Grid) -> None:
    if feats.ndim != 2 or feats.shape[0] != grid.num_rows:
        raise ValueError(f"feats must be [{grid.num_rows}, in] on this grid, got {list(feats.shape)}")
    if weight.ndim != 3 or weight.shape[0] != 27 or weight.shape[1] != feats.shape[1]:
        raise ValueError(f"weight must be [27, {feats.shape[1]}, out], got {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[2:]:
        raise ValueError(f"bias must be [{weight.shape[2]}], got {list(bias.shape)}")


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, feats: Tensor, weight: Tensor, bias: Tensor | None, grid: Grid, code: ModuleType, activate: bool
    ) -> Tensor:
        ctx.save_for_backward(feats, weight)
        ctx.arguments = (grid, code, activate)
        return code.conv_forward(F.silu(feats) if activate else feats, weight, bias, grid)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        feats, weight = ctx.saved_tensors
        grid, code, activate = ctx.arguments
        grads = code.conv_backward(grad.contiguous(), feats, weight, grid, ctx.needs_input_grad[:3], activate)
        return *grads, None, None, None


class _SubdivideConvolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, feats: Tensor, weight: Tensor, bias: Tensor | None, grid: Grid, code: ModuleType, activate: bool
    ) -> Tensor:
        collapsed = collapse_weight(weight)
        ctx.save_for_backward(feats, collapsed)
        ctx.arguments = (grid, code, activate)
        return code.subdivide_conv_forward(F.silu(feats) if activate else feats, collapsed, bias, grid)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        feats, collapsed = ctx.saved_tensors
        grid, code, activate = ctx.arguments
        needs = ctx.needs_input_grad[:3]
        grads = code.subdivide_conv_backward(grad.contiguous(), feats, collapsed, grid, needs, activate)
        return *grads, None, None, None


class _ToScalar(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        feats: Tensor,
        weight: Tensor,
        bias: Tensor,
        out_weight: Tensor,
        out_bias: Tensor,
        grid: Grid,
        code: ModuleType,
        activate: bool,
    ) -> Tensor:
        collapsed = collapse_weight(weight)
        read = F.silu(feats) if activate else feats
        values = code.to_scalar_forward(read, collapsed, bias, out_weight, out_bias, grid)
        ctx.save_for_backward(feats, collapsed, bias, out_weight, values)
        ctx.arguments = (grid, code, activate)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        feats, collapsed, bias, out_weight, values = ctx.saved_tensors
        grid, code, activate = ctx.arguments
        grads = code.to_scalar_backward(grad, values, feats, collapsed, bias, out_weight, grid, activate)
        return *grads, None, None, None


def submanifold_conv3d(
    feats: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: Grid,
    *,
    activate: bool = False,
    backend: str = "auto",
) -> Tensor:
    """3x3x3 convolution with outputs only where there are inputs.

    Args:
        feats: [N, in] on `grid`; weight: [27, in, out], tap k reads offset (dx, dy, dz) with
            k = 9 (dz+1) + 3 (dy+1) + (dx+1); bias: [out] or None. One dtype.
        activate: take SiLU(feats); only feats is kept for the backward pass.

    Returns:
        [N, out]

    Raises:
        ValueError: shapes that do not fit, or a backend that cannot run.
    """
    _check(feats, weight, bias, grid)
    backend = _choose(backend, feats, weight, grid)
    if activate and backend in ("reference", "dense"):
        feats, activate = F.silu(feats), False
    if backend == "reference":
        return reference.submanifold_conv3d(feats, weight, bias, grid.neighbours)
    if backend == "dense":
        return dense.submanifold_conv3d(feats, weight, bias, grid)
    return _Convolution.apply(feats, weight, bias, grid, _implementation(backend), activate)


def subdivide_conv3d(
    feats: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: Grid,
    *,
    activate: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Subdivide every voxel of `grid` into 8 copies, then a 3x3x3 convolution on the children, as 2x2x2 parents each.

    Args:
        feats: [N, in] on the dense parent grid; weight: [27, in, out]; bias: [out] or None.
        activate: take SiLU(feats); only feats is kept for the backward pass.

    Returns:
        [8 N, out], row 8 n + 4 px + 2 py + pz for the child of parity (px, py, pz).

    Raises:
        ValueError: shapes that do not fit, a grid with missing voxels, or a backend that cannot run.
    """
    _check(feats, weight, bias, grid)
    backend = _choose(backend, feats, weight, grid)
    if activate and backend in ("reference", "dense"):
        feats, activate = F.silu(feats), False
    if backend == "reference":
        return reference.subdivide_conv3d(feats, weight, bias, grid.neighbours)
    if backend == "dense":
        return dense.subdivide_conv3d(feats, weight, bias, grid)
    return _SubdivideConvolution.apply(feats, weight, bias, grid, _implementation(backend), activate)


def subdivide_conv_to_scalar(
    feats: Tensor,
    weight: Tensor,
    bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    grid: Grid,
    *,
    activate: bool = False,
    backend: str = "auto",
) -> Tensor:
    """tanh(Linear(SiLU(subdivide_conv3d(x)))), straight from parents to one value per child; the backward recomputes.

    Args:
        feats: [N, in]; weight: [27, in, out]; bias: [out]; out_weight: [1, out]; out_bias: [1].
        activate: take SiLU(feats); only feats is kept for the backward pass.

    Returns:
        [N, 8] float32 (float64 for float64 input), children in the order of `subdivide_conv3d`.
    """
    _check(feats, weight, bias, grid)
    backend = _choose(backend, feats, weight, grid)
    if activate and backend in ("reference", "dense"):
        feats, activate = F.silu(feats), False
    if backend == "dense":
        return dense.subdivide_conv_to_scalar(feats, weight, bias, out_weight, out_bias, grid)
    if backend == "reference":
        values = reference.subdivide_conv_to_scalar(feats, weight, bias, out_weight, out_bias, grid.neighbours)
        return values.view(-1, 8).to(torch.promote_types(feats.dtype, torch.float32))
    code = _implementation(backend)
    return _ToScalar.apply(feats, weight, bias, out_weight, out_bias, grid, code, activate)
