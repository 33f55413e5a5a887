"""Preparation on a Dask scheduler, as test_workers.py runs it: python dask_case.py FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path

from distributed import LocalCluster
from preparation_shapes import make_patients

from trellis.preparation.execution import open_runner
from trellis.preparation.prepare import prepare_dataset


def fail_on_two(x):
    if x == 2:
        raise RuntimeError("a bug")
    return x


def lost(task, reason):
    return reason


def main(folder: Path) -> None:
    cluster = LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, protocol="tcp", host="127.0.0.1", dashboard_address=None,
        silence_logs=50, local_directory=str(folder / "dask"),
    )  # fmt: skip
    with cluster:
        with open_runner(scheduler=cluster.scheduler_address) as run:
            assert dict(run(fail_on_two, list(range(4)), lost)) == {0: 0, 1: 1, 2: "RuntimeError: a bug", 3: 3}
        root, out = make_patients(folder / "in", 3), folder / "out"
        options = {"resolutions": (32,), "progress": False, "scheduler": cluster.scheduler_address}
        assert prepare_dataset(root, out, **options).exit_code == 0
    assert prepare_dataset(root, out, resolutions=(32,), progress=False).n_computed == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
