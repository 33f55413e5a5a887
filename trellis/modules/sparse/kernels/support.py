"""Where Triton kernels can run; does not import Triton."""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@cache
def triton_installed() -> bool:
    """Whether the triton package is there; looked up without importing it."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether TRITON_INTERPRET asks for the interpreter, which runs kernels on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def has_kernels(device: torch.device, dtype: torch.dtype = torch.float32) -> bool:
    """Whether tensors of `dtype` on `device` take the kernels by default: CUDA, 16 or 32 bit, Triton installed."""
    return device.type == "cuda" and dtype in KERNEL_DTYPES and triton_installed()


def dot_precision(dtype: torch.dtype) -> str:
    """ "tf32" where PyTorch's own float32 products may use it (`torch.backends.cuda.matmul`), else "ieee"."""
    if dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32:
        return "ieee"
    return "tf32"


def cdiv(a: int, b: int) -> int:
    """ceil(a / b). In plain Python: Triton's own takes ten times as long, and a step asks hundreds of times."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length() if n > 1 else 1
