"""Recording work of the GPU as CUDA graphs, all in one region of memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class CudaRecorder:
    """Records on the current CUDA device, all into one region of memory."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.bytes = 0
        self._pool: Any = None
        self._keeper: Any = None
        self._last: torch.cuda.Stream | None = None

    def follow(self) -> None:
        """What the current stream does next comes after all that streams did that used the recordings before."""
        current = torch.cuda.current_stream()
        if self._last is not None and self._last != current:
            current.wait_stream(self._last)
        self._last = current

    def rehearse(self, function: Callable[[], None]) -> int:
        """Run unrecorded, which compiles kernels and makes handles and buffers, and again.

        Returns the bytes that the second run took. PyTorch's peak of allocated memory starts anew here: what an
        earlier, larger pass took is forgotten.
        """
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # memory of the stream that ran before is of no use to this one
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            function()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def reserve(self, size: int) -> bool:
        """One free segment of `size` bytes for the recordings to come; False where the card has no room.

        One segment, since each recording starts with all of it free: however their sizes differ, it does not grow.
        There is room where as much again is left, for the batches that run as they are.
        """
        self.release()
        free, _ = torch.cuda.mem_get_info()
        if free < 2.1 * size:
            return False
        self._pool = torch.cuda.graph_pool_handle()

        def fill() -> None:
            torch.empty(size, dtype=torch.uint8, device="cuda")[:1].zero_()

        self._keeper = self._capture(fill)
        return True

    def free_bytes(self) -> int:
        """What a pass outside the recordings can have."""
        kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated() - self.bytes
        return torch.cuda.mem_get_info()[0] + max(0, kept)

    def release(self) -> None:
        """Give the memory back; no recording may be left."""
        self._pool = self._keeper = None
        self.bytes = 0
        torch.cuda.empty_cache()

    def _capture(self, function: Callable[[], None]) -> torch.cuda.CUDAGraph:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        graph = torch.cuda.CUDAGraph()
        # other threads (data loading, NCCL's) may go on calling CUDA
        with torch.cuda.graph(graph, pool=self._pool, stream=self.stream, capture_error_mode="thread_local"):
            function()
        self.bytes += torch.cuda.memory_reserved() - before  # the segment, or what did not fit into it
        return graph

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """A callable that runs the kernels of `function` again."""
        return self._capture(function).replay
