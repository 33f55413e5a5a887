"""A Dask cluster on this machine alone, set up so that killed workers cost nothing but their time."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_STARTS = 4
"""How often the processes are started before it is given up; as often as a task may lose its worker."""

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@contextmanager
def open_local_cluster(workers: int, memory_bytes: int) -> Iterator[Any]:
    """A client of `workers` processes with one task each at a time; they are gone when the block is left.

    Args:
        workers: at least 1. memory_bytes: resident memory of a worker near which (95 %) it is ended.

    Raises:
        ConnectionError: the processes cannot start.
    """
    import dask
    from distributed import Client

    ours = {name: os.environ.get(name) for name in _worker_environment()}
    with dask.config.set(_settings()), silent_dask(), _nameless_main():
        try:
            with _start(workers, memory_bytes) as cluster, Client(cluster) as client:
                client.register_plugin(_stdout_to_stderr_plugin())
                yield client
        finally:
            for name, value in ours.items():  # Dask sets them here for its workers to inherit
                os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


def _start(workers: int, memory_bytes: int) -> Any:
    """A Dask cluster. Dask gives up where one process dies while it starts: then all are started again."""
    from distributed import LocalCluster
    from distributed.security import Security

    for _ in range(_STARTS):
        try:
            return LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                processes=True,
                host="127.0.0.1",
                security=Security.temporary(),  # a port is open to every user of the machine
                dashboard_address="127.0.0.1:0",
                scheduler_kwargs={"dashboard": False},
                memory_limit=memory_bytes,
                silence_logs=logging.CRITICAL,
            )
        except RuntimeError as error:
            reason = error
    raise ConnectionError(f"{workers} local workers cannot be started: {reason}") from reason


def _settings() -> dict[str, Any]:
    return {
        # a worker never holds more than the task that it runs, so that its death is the fault of a known task
        "distributed.scheduler.worker-saturation": 1.0,
        "distributed.scheduler.work-stealing": False,
        "distributed.scheduler.allowed-failures": 1,
        # by default a worker that is just restarting, 15 s after an earlier death, is given up for good; when that
        # has happened to all of them, a run would wait for ever
        "distributed.deploy.lost-worker-timeout": "10000 hours",
        # results are a few hundred bytes: nothing to spill, and pausing would only hide what a task takes
        "distributed.worker.memory.target": False,
        "distributed.worker.memory.spill": False,
        "distributed.worker.memory.pause": False,
        "distributed.worker.memory.terminate": 0.95,
        "distributed.comm.timeouts.connect": "60s",  # of a machine that is busy with the work itself
        "distributed.comm.timeouts.tcp": "120s",
        "distributed.scheduler.http.routes": [],
        "distributed.worker.http.routes": [],
        "distributed.nanny.pre-spawn-environ": _worker_environment(),
    }


def _worker_environment() -> dict[str, str]:
    """One core a worker, no log of Dask's, and not Dask's MALLOC_TRIM_THRESHOLD_: giving memory back at once costs a
    quarter of the time, and saves a sixth of the memory at 1024."""
    threads = {name: os.environ.get(name, "1") for name in _THREADS}
    return {**threads, "DASK_LOGGING__DISTRIBUTED": "critical"}


@contextmanager
def silent_dask() -> Iterator[None]:
    """What Dask says of dying workers stays unsaid: a task that is lost is reported as such."""
    loggers = [logging.getLogger(name) for name in ("distributed", "distributed.client", "tornado")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


@contextmanager
def _nameless_main() -> Iterator[None]:
    """Workers do not import the caller's program, as if it were typed in: one without a `__main__` guard, or read from
    stdin, could not start any. Tasks are functions of importable modules."""
    main = sys.modules["__main__"]
    names = {name: getattr(main, name) for name in ("__file__", "__spec__") if hasattr(main, name)}
    main.__spec__ = None
    main.__dict__.pop("__file__", None)
    try:
        yield
    finally:
        main.__dict__.update(names)


def _stdout_to_stderr_plugin() -> Any:
    from distributed import WorkerPlugin

    class StdoutToStderr(WorkerPlugin):
        """What a library prints in a worker must not mix into what the command prints."""

        name = "stdout-to-stderr"

        def setup(self, worker: Any) -> None:
            os.dup2(2, 1)

    return StdoutToStderr()
