"""Running many tasks: in this process, on local worker processes, or on a Dask cluster."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

logger = logging.getLogger(__name__)

BYTES_PER_WORKER = 3 << 30
"""Memory that a worker process is planned with: 1024 cubed of a large shape stays below it."""
_ALLOWED_DEATHS = 3

Result = Any
Runner = Callable[[Callable[[Any], Result], Sequence[Any], Callable[[Any, str], Result]], Iterator[tuple[Any, Result]]]
"""run(function, tasks, lost) yields (task, result) as they finish; lost(task, reason) makes the result of a task whose
worker died."""


def default_workers() -> int:
    """One worker a usable CPU core, fewer where memory allows fewer."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, memory_bytes() // BYTES_PER_WORKER))


def memory_bytes() -> int:
    """Memory that this process may use: the machine's, or its control group's limit."""
    from distributed.system import memory_limit

    return int(memory_limit())


@contextmanager
def open_runner(workers: int | None = None, scheduler: str | None = None, name: str = "tasks") -> Iterator[Runner]:
    """A runner of tasks, closed at the end.

    Args:
        workers: local processes; None for `default_workers()`; 0 runs everything in this process.
        scheduler: address of a running Dask scheduler ("tcp://host:port"); its workers must see the same files.

    Raises:
        ValueError: a negative number of workers, or a scheduler that does not answer.
    """
    if workers is not None and workers < 0:
        raise ValueError(f"workers must be at least 0, got {workers}")
    if scheduler is None and workers == 0:
        yield _run_here
        return
    with ExitStack() as stack:
        client = stack.enter_context(_cluster_client(scheduler) if scheduler else _local_client(workers))

        def run(
            function: Callable[[Any], Result], tasks: Sequence[Any], lost: Callable[[Any, str], Result]
        ) -> Iterator[tuple[Any, Result]]:
            return _run_on_client(client, function, tasks, lost)

        yield run


def _run_here(
    function: Callable[[Any], Result], tasks: Sequence[Any], lost: Callable[[Any, str], Result]
) -> Iterator[tuple[Any, Result]]:
    for task in tasks:
        yield task, function(task)


@contextmanager
def _local_client(workers: int | None) -> Iterator[Any]:
    """Client of a local cluster of single-threaded processes, each restarted if it dies or outgrows its memory."""
    import dask
    from distributed import Client, LocalCluster

    workers = default_workers() if workers is None else workers
    limit = max(memory_bytes() // workers, 1 << 30)
    with (
        tempfile.TemporaryDirectory(prefix="trellis-prepare-") as scratch,
        dask.config.set(_dask_settings(scratch)),
        _quiet_dask(),
        LocalCluster(
            n_workers=workers, threads_per_worker=1, processes=True, host="127.0.0.1", memory_limit=limit,
            local_directory=scratch, dashboard_address="127.0.0.1:0", scheduler_kwargs={"dashboard": False},
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster) as client,
    ):  # fmt: skip
        logger.info("%d local workers, each limited to %.1f GiB", workers, limit / (1 << 30))
        yield client


@contextmanager
def _quiet_dask() -> Iterator[None]:
    """Keep the scheduler's diary out of this program's log; what matters comes back as results."""
    loggers = [logging.getLogger(name) for name in ("distributed", "distributed.client")]
    levels = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for log, level in zip(loggers, levels):
            log.setLevel(level)


def _dask_settings(scratch: str) -> dict[str, Any]:
    return {
        "temporary-directory": scratch,
        "distributed.scheduler.allowed-failures": _ALLOWED_DEATHS,
        "distributed.scheduler.worker-saturation": 1.0,  # a dying worker takes only the task that it runs along
        "distributed.worker.memory.spill": False,
        "distributed.worker.memory.target": False,
        "distributed.nanny.pre-spawn-environ": {
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "MALLOC_TRIM_THRESHOLD_": "65536",  # give memory back to the system between tasks
            "DASK_LOGGING__DISTRIBUTED": "critical",
        },
    }


@contextmanager
def _cluster_client(scheduler: str) -> Iterator[Any]:
    from distributed import Client

    try:
        client = Client(scheduler, timeout="30s")
    except (OSError, ValueError, TimeoutError) as error:
        raise ValueError(f"scheduler must be a running Dask scheduler's address, got {scheduler!r}: {error}") from None
    with client:
        yield client


def _run_on_client(
    client: Any, function: Callable[[Any], Result], tasks: Sequence[Any], lost: Callable[[Any, str], Result]
) -> Iterator[tuple[Any, Result]]:
    """Tasks as their results come. One whose worker died several times is tried once more alone, then given up."""
    from distributed import as_completed
    from distributed.scheduler import KilledWorker

    futures = {client.submit(function, task, pure=False): task for task in tasks}
    suspects = []
    for future in as_completed(list(futures)):
        task = futures.pop(future)
        error = future.exception() if future.status == "error" else None
        if isinstance(error, KilledWorker):
            suspects.append(task)
        elif error is not None:
            yield task, lost(task, f"{type(error).__name__}: {error}")
        else:
            yield task, future.result()
        future.release()
    for task in suspects:
        future = client.submit(function, task, pure=False)
        try:
            yield task, future.result()
        except KilledWorker:
            deaths = 2 * (_ALLOWED_DEATHS + 1)
            yield task, lost(task, f"its worker process died {deaths} times (out of memory, killed, or a crash)")
