"""Where Triton kernels can run; imports Triton only once a CUDA tensor asks."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, TypeVar

import torch

logger = logging.getLogger(__name__)

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

Method = TypeVar("Method", bound=Callable[..., Any])


@cache
def triton_installed() -> bool:
    """Whether the triton package is there; looked up without importing it."""
    return importlib.util.find_spec("triton") is not None


@cache
def triton_works() -> bool:
    """Whether Triton can launch on this machine's GPUs: at first it builds a small launcher, with a C compiler.

    Where it is installed and cannot, that is said once.
    """
    if not triton_installed():
        return False
    from triton.runtime import driver

    try:
        return driver.active.utils is not None
    except Exception as error:  # whatever the compiler, the loader or the driver has to say
        reason = str(error).strip().splitlines()
        logger.warning(
            "Triton cannot start, plain PyTorch runs in its place, several times slower: %s "
            "(it builds a launcher once, with gcc or clang and Python's headers: install these, or set CC)",
            reason[0] if reason else type(error).__name__,
        )
        return False


def interpreted() -> bool:
    """Whether TRITON_INTERPRET asks for the interpreter, which runs kernels on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def has_kernels(device: torch.device, dtype: torch.dtype = torch.float32) -> bool:
    """Whether tensors of `dtype` on `device` take the kernels by default: CUDA, 16 or 32 bit, Triton works."""
    return device.type == "cuda" and dtype in KERNEL_DTYPES and triton_works()


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a CUDA device the current one: Triton launches there, whatever device its tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def on_own_device(method: Method) -> Method:
    """A method that runs with its object's `device` as the current one."""

    @wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with on_device(self.device):
            return method(self, *args, **kwargs)

    return run  # type: ignore[return-value]


@dataclass(frozen=True)
class SharedMemory:
    """What one program may take of a card's shared memory; an H100's by default.

    Attributes:
        limit: bytes. reads_ahead: whether products are still reading operands there when the next ones are due (Hopper
            and the large Blackwell cards), which takes one buffer more.
    """

    limit: int = 227 << 10
    reads_ahead: bool = True


@cache
def shared_memory(device: torch.device) -> SharedMemory:
    """That of the card of a CUDA device, by the number that Triton holds a kernel's demand against; asked once."""
    if device.type != "cuda":
        return SharedMemory()
    from triton.runtime import driver

    index = torch.cuda.current_device() if device.index is None else device.index
    limit = driver.active.utils.get_device_properties(index)["max_shared_mem"]
    return SharedMemory(limit, torch.cuda.get_device_capability(index)[0] in (9, 10))


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
