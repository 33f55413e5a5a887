"""Dask workers, local and elsewhere: killed ones and a killed run lose nothing."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from preparation_shapes import make_patients

from trellis.preparation.execution import LOST_WORKER, _run_on_client, open_runner
from trellis.preparation.local_cluster import open_local_cluster
from trellis.preparation.prepare import prepare_dataset
from trellis.utils.io_utils import load_sparse_sdf


def double(x):
    return 2 * x


def die_on_three(x):
    if x == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.05)
    return 2 * x


def fail_on_two(x):
    if x == 2:
        raise RuntimeError("a bug")
    return x


def lost(task, reason):
    return reason


def test_a_task_that_kills_its_worker_is_given_up_and_the_rest_is_done():
    with open_runner(workers=2) as run:
        results = dict(run(die_on_three, list(range(8)), lost))
        assert results.pop(3) == LOST_WORKER
        assert results == {x: 2 * x for x in range(8) if x != 3}
        results = dict(run(fail_on_two, list(range(4)), lost))
        assert results == {0: 0, 1: 1, 2: "RuntimeError: a bug", 3: 3}
        assert dict(run(double, [], lost)) == {}


def take_memory(x):
    held = bytearray(x << 20)
    held[::4096] = b"x" * len(held[::4096])  # resident, not only reserved
    time.sleep(5 if x > 100 else 0)
    return len(held) >> 20


def test_a_task_that_takes_too_much_memory_is_ended():
    with open_local_cluster(1, memory_bytes=400 << 20) as client:
        results = dict(_run_on_client(client, take_memory, [600, 1], lost))
    assert "more memory than its share" in results[600] and results[1] == 1


@pytest.mark.parametrize(("threads", "of_a_worker"), [(None, "1"), ("2", "2")])
def test_workers_print_to_stderr_and_dask_says_nothing(capfd, monkeypatch, threads, of_a_worker):
    if threads is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    with open_runner(workers=2) as run:
        assert dict(run(speak, [1, 2], lost)) == {1: of_a_worker, 2: of_a_worker}
        dict(run(die_on_three, [3], lost))
    assert os.environ.get("OMP_NUM_THREADS") == threads
    out, error = capfd.readouterr()
    assert out == "" and sorted(error.split()) == ["spoken", "spoken"]


def speak(_):
    os.write(1, b"spoken\n")
    return os.environ["OMP_NUM_THREADS"]


def test_a_script_without_a_main_guard_starts_workers(tmp_path):
    make_patients(tmp_path / "in", 2)
    script = (
        "from trellis.preparation.prepare import prepare_dataset\n"
        "print(prepare_dataset('in', 'out', resolutions=(32,), workers=1, progress=False).exit_code, __file__)\n"
    )
    (tmp_path / "script.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[0] == "0" and done.stdout.split()[1].endswith("script.py")


def test_workers_are_gone_afterwards_however_it_ends():
    with pytest.raises(RuntimeError), open_runner(workers=2) as run:
        pids = set(dict(run(pid_of_worker, list(range(6)), lost)).values())
        assert 1 <= len(pids) <= 2 and os.getpid() not in pids
        raise RuntimeError("stop")
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def pid_of_worker(_):
    time.sleep(0.05)
    return os.getpid()


@pytest.mark.filterwarnings("ignore")
def test_no_scheduler_there():
    with pytest.raises(ValueError, match="scheduler"), open_runner(scheduler="not an address"):
        pass


def test_a_dask_scheduler_whose_workers_are_killed(tmp_path):
    """In a process of its own: Dask gives its event loop ten seconds to start, which a busy test process may need."""
    script = Path(__file__).with_name("dask_case.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_a_killed_run_continues(tmp_path):
    root, out = make_patients(tmp_path / "in", 12), tmp_path / "out"
    command = [sys.executable, "-m", "dataset_toolkits.compute_sparse_sdf", root, out, "--resolutions", "32", "64",
               "--workers", "2", "--quiet"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(list(map(str, command)), env=environment)
    finished = out / "records" / "sdf"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not finished.is_dir() or len(list(finished.glob("*.json"))) < 3):
        assert run.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)
    run.kill()
    run.wait()
    done = len(list(finished.glob("*.json")))
    assert 3 <= done < 24 and not (out / "metadata.csv").exists()
    for path in (out / "sparse_sdf").glob("*.npz"):
        load_sparse_sdf(path)  # whole, or not there at all
    time.sleep(1.0)  # workers notice that their run is gone, and end
    options = {"resolutions": (32, 64), "workers": 0, "progress": False}
    summary = prepare_dataset(root, out, **options)
    assert 0 < summary.n_computed <= 24 - done + 12 and summary.exit_code == 0
    clean = tmp_path / "clean"
    prepare_dataset(root, clean, **options)
    assert not list(out.rglob("*.tmp"))
    names = sorted(path.name for path in (clean / "sparse_sdf").iterdir())
    assert sorted(path.name for path in (out / "sparse_sdf").iterdir()) == names
    for name in names:
        one, two = load_sparse_sdf(out / "sparse_sdf" / name), load_sparse_sdf(clean / "sparse_sdf" / name)
        np.testing.assert_array_equal(one.block_index, two.block_index)
        np.testing.assert_array_equal(one.block_sdf, two.block_sdf)
    with open(out / "metadata.csv", newline="") as stream:
        rows = [row["sha256"] for row in csv.DictReader(stream)]
    assert len(rows) == 12 == len(set(rows))
