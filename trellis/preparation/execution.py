"""Running many tasks: in this process, on local Dask workers, or on a Dask cluster elsewhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trellis.preparation.local_cluster import open_local_cluster, silent_dask

BYTES_PER_WORKER = 3 << 30
"""Memory that a worker process is planned with: 1024 cubed of a large shape stays below it."""

LOST_WORKER = "its worker process died each time (killed, a crash, or more memory than its share: try fewer workers)"

Runner = Callable[[Callable[[Any], Any], Sequence[Any], Callable[[Any, str], Any]], Iterator[tuple[Any, Any]]]
"""run(function, tasks, lost) yields (task, result) as they finish; lost(task, reason) makes the result of a task whose
worker died."""


def default_workers() -> int:
    """One worker a usable CPU core, fewer where memory allows fewer."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, memory_bytes() // BYTES_PER_WORKER))


def memory_bytes(proc: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that this process may use: the machine's, or the smallest limit of its control group and those above it.

    Args:
        proc: which groups the process is in (cgroups(7)); without it the topmost. mount: where their files are.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in _memory_limit_files(proc, mount):
        try:
            limits.append(int(path.read_text(encoding="utf-8")))
        except (OSError, ValueError):  # not there (a container sees its own group as the topmost), or "max"
            continue
    return min(limits)


def _memory_limit_files(proc: Path, mount: Path) -> Iterator[Path]:
    """Where limits may stand, of version 2 ("0::/path") and of version 1's memory controller ("4:memory:/path")."""
    groups = {mount: "/", mount / "memory": "/"}
    try:
        lines = proc.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for number, controllers, group in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if number == "0" and not controllers:
            groups[mount] = group
        elif "memory" in controllers.split(","):
            groups[mount / "memory"] = group
    for (top, group), name in zip(groups.items(), ("memory.max", "memory.limit_in_bytes")):
        parts = [part for part in group.split("/") if part not in ("", "..")]
        for depth in range(len(parts) + 1):
            yield top.joinpath(*parts[:depth], name)


@contextmanager
def open_runner(workers: int | None = None, scheduler: str | None = None) -> Iterator[Runner]:
    """A runner of tasks, closed at the end.

    Args:
        workers: local processes; None for `default_workers()`; 0 runs everything in this process. They share the
            machine's memory evenly, and one that takes more than its share is ended.
        scheduler: address of a running Dask scheduler ("tcp://host:port"); its workers must see the same files under
            the same paths, and have this package.

    Raises:
        ValueError: a negative number of workers, or a scheduler that does not answer.
    """
    if workers is not None and workers < 0:
        raise ValueError(f"workers must be at least 0, got {workers}")
    if scheduler is not None:
        with _cluster_client(scheduler) as client:
            yield lambda function, tasks, lost: _run_on_client(client, function, tasks, lost)
    elif workers == 0:
        yield _run_here
    else:
        workers = default_workers() if workers is None else workers
        with open_local_cluster(workers, max(memory_bytes() // workers, 1 << 30)) as client:
            yield lambda function, tasks, lost: _run_on_client(client, function, tasks, lost)


def _run_here(
    function: Callable[[Any], Any], tasks: Sequence[Any], lost: Callable[[Any, str], Any]
) -> Iterator[tuple[Any, Any]]:
    for task in tasks:
        yield task, function(task)


@contextmanager
def _cluster_client(scheduler: str) -> Iterator[Any]:
    from distributed import Client

    with silent_dask():
        try:
            client = Client(scheduler, timeout="30s")
        except (OSError, ValueError, TimeoutError) as error:
            raise ValueError(
                f"scheduler must be a running Dask scheduler's address, got {scheduler!r}: {error}"
            ) from None
        with client:
            yield client


def _run_on_client(
    client: Any, function: Callable[[Any], Any], tasks: Sequence[Any], lost: Callable[[Any, str], Any]
) -> Iterator[tuple[Any, Any]]:
    """Tasks as their results come. One whose workers died is tried once more alone: it may have died of others.

    Raises:
        ConnectionError: the scheduler is gone.
    """
    from distributed import CancelledError, as_completed
    from distributed.scheduler import KilledWorker

    futures = {client.submit(_answer, function, task, pure=False): task for task in tasks}
    suspects = []
    try:
        for future in as_completed(list(futures)):
            task = futures.pop(future)
            try:
                result, error = future.result()
            except KilledWorker:
                suspects.append(task)
                continue
            future.release()
            yield task, result if error is None else lost(task, error)
        for task in suspects:
            try:
                result, error = client.submit(_answer, function, task, pure=False).result()
            except KilledWorker:
                result, error = None, LOST_WORKER
            yield task, result if error is None else lost(task, error)
    except CancelledError:
        raise ConnectionError("the connection to the Dask scheduler is lost") from None


def _answer(function: Callable[[Any], Any], task: Any) -> tuple[Any, str | None]:
    """(result, None), or (None, what was raised): an exception of its own may not travel, and hides whose it was."""
    try:
        return function(task), None
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"
