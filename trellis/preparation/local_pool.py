"""Local worker processes that may die: each task is tried again elsewhere, and given up when it kills its workers.

Workers are started as programs of their own (no fork, which Warp does not survive, and no `__main__` guard in the
caller). Each has one task at a time, so that a death is the fault of a known task.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

MAX_DEATHS = 3
_WATCH_SECONDS = 1.0
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass
class _Worker:
    process: subprocess.Popen
    connection: Connection


class LocalPool:
    """A fixed number of worker processes, replaced when they die.

    Args:
        workers: at least 1. memory_bytes: resident memory from which on a worker is ended (Linux; elsewhere no limit).
    """

    def __init__(self, workers: int, memory_bytes: int) -> None:
        self.memory_bytes = memory_bytes
        self._workers = [_start_worker() for _ in range(workers)]

    def close(self) -> None:
        """End all workers, busy ones too."""
        for worker in self._workers:
            _stop_worker(worker)
        self._workers = []

    def run(
        self, function: Callable[[Any], Any], tasks: Sequence[Any], lost: Callable[[Any, str], Any]
    ) -> Iterator[tuple[Any, Any]]:
        """(task, result) as they finish; `lost(task, reason)` is the result of a task that failed or killed workers."""
        waiting = deque((task, 0) for task in tasks)
        idle, busy = list(self._workers), {}
        while waiting or busy:
            while waiting and idle:
                worker = idle.pop()
                task, deaths = waiting.popleft()
                with suppress(OSError):  # it died while idle: the closed pipe is noticed below, like any death
                    worker.connection.send((function, task))
                busy[worker.connection] = (worker, task, deaths)
            ready = wait(list(busy), timeout=_WATCH_SECONDS)
            for connection in ready:
                worker, task, deaths = busy.pop(connection)
                try:
                    state, result = connection.recv()
                except (EOFError, OSError):
                    idle.append(self._replace(worker))
                    if deaths + 1 < MAX_DEATHS:
                        waiting.append((task, deaths + 1))
                    else:
                        yield task, lost(task, f"its worker process died {MAX_DEATHS} times")
                    continue
                idle.append(worker)
                yield task, result if state == "done" else lost(task, result)
            for connection, (worker, task, _) in list(busy.items()):
                if _resident_bytes(worker.process.pid) > self.memory_bytes:
                    del busy[connection]
                    idle.append(self._replace(worker))
                    limit = self.memory_bytes / (1 << 30)
                    yield task, lost(task, f"it needs more than {limit:.1f} GiB of memory; try it with fewer workers")

    def _replace(self, worker: _Worker) -> _Worker:
        _stop_worker(worker)
        self._workers.remove(worker)
        self._workers.append(_start_worker())
        return self._workers[-1]


@contextmanager
def open_pool(workers: int, memory_bytes: int) -> Iterator[LocalPool]:
    """A pool whose workers are gone when the block is left, however that happens."""
    pool = LocalPool(workers, memory_bytes)
    try:
        yield pool
    finally:
        pool.close()


def _start_worker() -> _Worker:
    ours, theirs = Pipe()
    environment = {**os.environ, **{name: os.environ.get(name, "1") for name in _THREADS}}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-m", "trellis.preparation.worker", str(theirs.fileno())]
    stderr = 2  # what a library prints in a worker must not mix into what the command prints
    process = subprocess.Popen(
        command, pass_fds=(theirs.fileno(),), env=environment, stdin=subprocess.DEVNULL, stdout=stderr
    )
    theirs.close()
    return _Worker(process, ours)


def _stop_worker(worker: _Worker) -> None:
    worker.connection.close()
    if worker.process.poll() is None:
        worker.process.kill()
    worker.process.wait()


def _resident_bytes(pid: int) -> int:
    try:
        pages = Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1]
    except (OSError, IndexError):
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
