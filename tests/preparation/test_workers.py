"""Dask workers, local and elsewhere: killed ones and a killed run lose nothing."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import distributed
import pytest
from preparation_shapes import make_patients

from trellis.preparation.execution import LOST_WORKER, _run_on_client, open_runner
from trellis.preparation.local_cluster import open_local_cluster
from trellis.preparation.prepare import prepare_dataset

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "bench_preparation_kills.py"


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


@pytest.mark.slow
def test_killing_workers_and_runs_loses_nothing_and_repeats_nothing(tmp_path):
    """100 shapes, killed ten times over all phases of a run (start, reading, computing, end); about 20 s."""
    spec = importlib.util.spec_from_file_location("bench_preparation_kills", BENCHMARK)
    kills = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = kills  # its dataclass looks itself up there
    spec.loader.exec_module(kills)
    root, out, clean = tmp_path / "in", tmp_path / "out", tmp_path / "clean"
    sources = kills.make_sources(root, 100, detail=2)
    for folder in (out, clean):
        folder.mkdir()
        (folder / ".patient_key").write_text("ab" * 32)
    options = {"resolutions": (32,), "workers": 0, "progress": False}
    prepare_dataset(root, clean, **options)
    outcome = kills.run_with_kills(
        root, out, clean, sources=sources, shapes=100, kills=10, workers=(2, 0, 0), seed=6, resolutions=(32,)
    )
    assert outcome.is_clean, f"exit code {outcome.exit_code}: {outcome.as_line()}\n" + "\n".join(outcome.kills)
    assert {"start", "reading", "computing"} <= outcome.phases and len(outcome.kills) == 10
    assert prepare_dataset(root, out, **options).n_computed == 0


def test_a_worker_that_is_killed_while_it_starts_is_started_again(monkeypatch):
    real, attempts = distributed.LocalCluster, []

    def fails_twice(**options):
        attempts.append(options)
        if len(attempts) < 3:
            raise RuntimeError("Nanny failed to start.")
        return real(**options)

    monkeypatch.setattr(distributed, "LocalCluster", fails_twice)
    with open_runner(workers=1) as run:
        assert dict(run(double, [1, 2], lost)) == {1: 2, 2: 4}
    monkeypatch.setattr(distributed, "LocalCluster", lambda **options: fails_twice(**attempts.clear() or options))
    with pytest.raises(ConnectionError, match="2 local workers cannot be started: Nanny"), open_runner(workers=2):
        pass


@pytest.mark.parametrize("shape_fails", [False, True])
def test_a_task_that_was_done_before_its_worker_died_is_not_done_again(tmp_path, monkeypatch, shape_fails):
    """Dask runs a task again when its worker dies before the result has arrived: then its record is there."""
    root, out = make_patients(tmp_path / "in", 1), tmp_path / "out"
    if shape_fails:
        (root / "patient_00" / "liver.stl").write_bytes(b"solid nothing")
    module, tasks = prepare_dataset.__globals__, []
    for name in ("read_source", "compute_sdf"):
        real = module[name]
        monkeypatch.setitem(module, name, lambda task, real=real: tasks.append((real, task)) or real(task))
    prepare_dataset(root, out, resolutions=(32,), workers=0, progress=False)
    assert len(tasks) == 1 if shape_fails else 2
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    results = [function(task) for function, task in tasks]
    again = {path for path, time_ns in before.items() if path.stat().st_mtime_ns != time_ns}
    assert bool(again) is shape_fails, "a failure is tried again"
    assert results[-1]["prep_hash"]
