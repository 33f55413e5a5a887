"""Preparation on a Dask scheduler, as test_workers.py runs it: python dask_case.py FOLDER."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

from distributed import Client, LocalCluster
from preparation_shapes import make_patients

from trellis.preparation.execution import open_runner
from trellis.preparation.prepare import prepare_dataset


def fail_on_two(x):
    if x == 2:
        raise RuntimeError("a bug")
    return x


def lost(task, reason):
    return reason


def kill_a_worker_when_busy(client: Client, records: Path) -> None:
    """Kill one of the cluster's workers once a first file is done."""
    while not (records.is_dir() and any(records.glob("*.json"))):
        time.sleep(0.01)
    os.kill(next(iter(client.run(os.getpid).values())), signal.SIGKILL)


def main(folder: Path) -> None:
    cluster = LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, protocol="tcp", host="127.0.0.1", dashboard_address=None,
        silence_logs=50, local_directory=str(folder / "dask"),
    )  # fmt: skip
    with cluster, Client(cluster) as client:
        with open_runner(scheduler=cluster.scheduler_address) as run:
            assert dict(run(fail_on_two, list(range(4)), lost)) == {0: 0, 1: 1, 2: "RuntimeError: a bug", 3: 3}
        root, out = make_patients(folder / "in", 8), folder / "out"
        killer = threading.Thread(target=kill_a_worker_when_busy, args=(client, out / "records" / "sdf"))
        killer.start()
        options = {"resolutions": (32, 64), "progress": False, "scheduler": cluster.scheduler_address}
        summary = prepare_dataset(root, out, **options)
        killer.join()
        assert (summary.exit_code, summary.n_shapes) == (0, 8)
        assert len(list((out / "sparse_sdf").glob("*.npz"))) == 16 and not list(out.rglob("*.tmp"))
    assert prepare_dataset(root, out, resolutions=(32, 64), progress=False).n_computed == 0
    lose_the_scheduler(folder)


def lose_the_scheduler(folder: Path) -> None:
    """A run whose scheduler goes away ends with an error that says so."""
    cluster = LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, protocol="tcp", host="127.0.0.1", dashboard_address=None,
        silence_logs=50, local_directory=str(folder / "dask"),
    )  # fmt: skip
    with open_runner(scheduler=cluster.scheduler_address) as run:
        threading.Timer(1.0, cluster.close).start()
        try:
            list(run(time.sleep, [0.3] * 20, lost))
        except ConnectionError as error:
            assert "scheduler" in str(error)
        else:
            raise AssertionError("twenty tasks of 0.3 s were done in a second")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
