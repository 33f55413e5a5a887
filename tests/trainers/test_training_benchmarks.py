"""The benchmarks of training run through at tiny sizes on a CPU, so that time on a GPU is not lost to trivialities."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
from training_cases import ROOT, tiny_config, write_config

from trellis.trainers import base
from trellis.trainers.loader import DeviceBatches


@pytest.fixture
def run(monkeypatch, capsys):
    """A function that runs a benchmark of that name; returns what it printed as JSON, line by line."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))

    def run_benchmark(name: str, *arguments: object) -> list[dict]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        importlib.import_module(name).main()
        return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]

    return run_benchmark


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path / "c.json", tiny_config(i_ddpcheck=None, i_print=None))


def test_bench_training(run, config: Path, prepared: Path, tmp_path: Path, monkeypatch):
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("TRITON_HOME", str(tmp_path))
    (tmp_path / ".triton" / "cache" / "one").mkdir(parents=True)
    common = (prepared, "--config", config, "--device", "cpu", "--json", tmp_path / "r.json", "--warm-up", 1)
    common += ("--steps", 2)
    (warm,) = run("bench_training", *common)
    monkeypatch.setenv("TRITON_CACHE_DIR", "")  # undone with the test, whatever --cold puts there
    (cold,) = run("bench_training", *common, "--cold")
    assert (warm["start"], warm["cached_kernels"], cold["start"]) == ("kernels cached", 1, "cold")
    for row in (warm, cold):
        assert row["start_s"] == pytest.approx(row["build_s"] + row["first_step_s"], abs=0.02)
        assert row["step_ms"] > 0 and row["arithmetic_floor_ms"] >= 0 and row["gpu"] is None
    assert json.loads((tmp_path / "r.json").read_text()) == [warm, cold]
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    over = importlib.import_module("bench_training").over_one_rank
    two = {**warm, "ranks": 2, "shapes_per_s": 1.9 * cold["shapes_per_s"]}
    assert over(two, [warm, cold]) == {"over_one_rank": pytest.approx(1.9, abs=1e-3), "aim_over_one_rank": 1.85}
    assert over(two, [{**warm, "overrides": ["else"]}]) == over(warm, [warm]) == {}


def test_bench_formats(run, config: Path, prepared: Path, tmp_path: Path):
    out = tmp_path / "f.json"
    *rows, means = run("bench_formats", prepared, "--config", config, "--device", "cpu", "--steps", 2, "--json", out)
    modes = ["inflat_all", "amp", "bf16", "null"]
    assert [(row["mode"], row["seed"]) for row in rows] == [(mode, seed) for mode in modes for seed in (0, 1)]
    assert list(means) == modes and json.loads(out.read_text())["rows"] == rows
    losses = [row["last_loss"] for row in rows[:2]]
    assert means["inflat_all"]["last_loss"] == pytest.approx([sum(losses) / 2, abs(losses[0] - losses[1])], abs=1e-4)


def test_a_step_starts_few_operations_around_its_passes(run, prepared: Path, monkeypatch):
    """The shipped network's 181 tensors are handled in lists, and flat: the host can keep ahead of a GPU."""
    monkeypatch.setattr(base, "mode_on_device", base.mode_on_device)  # undone with the test
    (row,) = run("bench_training_host", prepared, "--set", "dataset.args.resolution=64")
    assert row["fp16_mode"] == "inflat_all" and row["trained_tensors"] == 181
    assert row["operations"] <= 160 and row["operations_of_loss"] <= 60
    assert row["tensors_in_lists"] <= 2 * 181 + 60


def test_bench_training_parts(run, config: Path, prepared: Path, tmp_path: Path, monkeypatch):
    before = DeviceBatches.__next__, DeviceBatches.prefetch
    out = tmp_path / "p.json"
    common = (prepared, "--config", config, "--device", "cpu", "--warm-up", 1, "--steps", 3, "--json", out)
    (row,) = run("bench_training_parts", *common)
    assert (DeviceBatches.__next__, DeviceBatches.prefetch) == before and json.loads(out.read_text()) == row
    host = row["host_ms"]
    assert host["trainer._launch_step"] >= host["trainer._passes"] >= host["objective.losses"] > 0
    assert host["trainer._launch_step"] < row["mean_step_ms"] and host["precision.backward"] > 0
    # a trace: work from 0 to 100 and from 180 to 200 us, launched in the inner of two parts
    trace = [
        {"cat": "kernel", "ts": 0, "dur": 100, "args": {"correlation": 1}},
        {"cat": "kernel", "ts": 50, "dur": 20, "args": {"correlation": 2}},
        {"cat": "kernel", "ts": 180, "dur": 20, "args": {"correlation": 3}},
        {"cat": "gpu_memcpy", "ts": 210, "dur": 1, "args": {"correlation": 4}},
        {"cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": 170, "dur": 5, "args": {"correlation": 3}},
        {"cat": "user_annotation", "name": "part: outer", "ts": 0, "dur": 300},
        {"cat": "user_annotation", "name": "part: inner", "ts": 160, "dur": 30},
    ]
    (tmp_path / "t.json").write_text(json.dumps({"traceEvents": trace}))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    assert importlib.import_module("bench_training_parts").idle_ms(tmp_path / "t.json") == {"inner": 0.08}


def test_bench_rank_balance(run, prepared: Path):
    first, *rows = run("bench_rank_balance", prepared, "--resolution", 64, "--ranks", 2, "--each", 1, 2)
    assert first["shapes"] == 5 and [row["each"] for row in rows] == [1, 2]
    assert all(1 <= row["slices"] <= row["by_size"] <= 2 for row in rows)
