"""The training command in processes: exact resume after a kill, two ranks, signals, restarts, exit codes, imports."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from training_cases import ROOT, Training, read_log, tiny_config, train, write_config, write_dataset

from trellis.trainers.checkpoint import find_checkpoint, load_misc, load_weights
from trellis.trainers.launch import parser
from trellis.utils.mesh_utils import read_mesh


def assert_same(a, b, where: str = "") -> None:
    """Equal to the bit, containers and tensors alike."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


@pytest.mark.parametrize("use_ema_update", [False, True])
def test_killed_and_resumed_is_bit_identical(tmp_path: Path, prepared: Path, use_ema_update: bool):
    """40 steps against 20, kill -9 and 20 more."""
    config = tiny_config(
        max_steps=40, i_save=20, i_ddpcheck=None, num_workers=int(use_ema_update), batch_split=2, ema_rate=[0.9, 0.99],
        lr_scheduler={"name": "WarmupCosineLRScheduler", "args": {"warmup_steps": 3, "total_steps": 50}},
        grad_clip={"name": "AdaptiveGradClipper", "args": {"max_norm": 1.0, "clip_percentile": 60, "buffer_size": 5}},
    )
    config["models"]["vqvae"]["args"] |= {"use_ema_update": use_ema_update, "reseed_after": 2}
    path = write_config(tmp_path / "c.json", config)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    together = Training(path, prepared, whole)
    killed = Training(path, prepared, parts)
    killed.wait_for_step(22)  # the checkpoint of step 20 is there, and work after it gets lost
    killed.signal(signal.SIGKILL, group=True)
    killed.wait()
    stopped = find_checkpoint(parts)
    assert stopped is not None and stopped.step == 20
    code, output = train(path, prepared, parts)
    assert code == 0 and "going on from step 20" in output
    assert together.wait() == 0
    a, b = find_checkpoint(whole), find_checkpoint(parts)
    assert a is not None and b is not None and a.step == b.step == 40
    assert a.model.read_bytes() == b.model.read_bytes()
    for rate in ("0.9", "0.99"):
        assert a.ema[rate].read_bytes() == b.ema[rate].read_bytes()
    assert_same(load_misc(a), load_misc(b))
    timeless = [[{k: v for k, v in r.items() if k not in ("step_s", "data_s")} for r in read_log(run)]
                for run in (whole, parts)]
    assert timeless[0] == timeless[1] and [r["step"] for r in timeless[0]] == list(range(1, 41))


def two_nodes(config: Path, data: Path, run: Path) -> str:
    """A supervisor for each of two machines, both here; their output."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = ("--num_nodes", "2", "--num_gpus", "1", "--master_addr", "127.0.0.1", "--master_port", port)
    nodes = [Training(config, data, run, *shared, "--node_rank", rank) for rank in ("0", "1")]
    codes = [node.wait() for node in nodes]
    assert codes == [0, 0], [node.output for node in nodes]
    return "".join(node.output for node in nodes)


def torchrun(config: Path, data: Path, run: Path) -> str:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(ROOT / "train.py")]
    done = subprocess.run(
        [sys.executable, *command, "--config", config, "--data_dir", data, "--output_dir", run, "--device", "cpu"],
        capture_output=True, text=True, timeout=100, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize(("use_ema_update", "launch"), [(False, two_nodes), (True, torchrun)])
def test_two_ranks_are_one_with_the_joint_batch(tmp_path: Path, prepared: Path, use_ema_update: bool, launch):
    """Codebook initialisation, losses, checks of equal weights and the end result, for both kinds of codebook.

    Shapes are shared out by size, which moves some between the ranks, and unused codes move to the same rows.
    """
    config = tiny_config(max_steps=4, batch_size=4, batch_size_per_gpu=None, i_ddpcheck=1, codebook_init_samples=None)
    config["models"]["vqvae"]["args"] |= {"use_ema_update": use_ema_update, "reseed_after": 2}
    path = write_config(tmp_path / "c.json", config)
    one, two = tmp_path / "one", tmp_path / "two"
    alone = Training(path, prepared, one)
    output = launch(path, prepared, two)
    assert alone.wait() == 0 and output.count("saved the checkpoint") == 1  # only the first rank writes
    for a, b in zip(read_log(one), read_log(two), strict=True):
        for key in ("loss", "mse_band", "mse_extra", "vq", "commitment", "grad_norm", "perplexity", "codes_used", "lr"):
            assert b[key] == pytest.approx(a[key], rel=1e-4), (a["step"], key)
        assert (a["vq"] == 0) == use_ema_update
    found = [find_checkpoint(run) for run in (one, two)]
    books = [load_weights(f.model)["quantizer.codebook"] for f in found]
    torch.testing.assert_close(books[0], books[1], rtol=1e-3, atol=1e-4)
    assert len(load_misc(found[1])["generators"]) == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_a_failing_rank_ends_the_other(tmp_path: Path, workers):
    """One rank meets a broken file: both end, and the code says that the input is wrong, which is not retried."""
    data = write_dataset(tmp_path / "data", 4)
    config = tiny_config(batch_size_per_gpu=1, max_steps=500, i_print=None, num_workers=workers)
    path = write_config(tmp_path / "c.json", config)
    (data / "sparse_sdf" / "shape02_r64.npz").write_bytes(b"broken")
    code, output = train(path, data, tmp_path / "run", "--num_gpus", "2", "--auto_retry", "3")
    assert code == 2
    assert "shape02_r64.npz" in output and "restart" not in output and "Traceback" not in output


def test_ctrl_c_saves_and_exits(tmp_path: Path, prepared: Path):
    path = write_config(tmp_path / "c.json", tiny_config(max_steps=100_000, batch_size_per_gpu=1, num_workers=1))
    training = Training(path, prepared, tmp_path / "run")
    training.wait_for_step(2)
    training.signal(signal.SIGINT, group=True)  # as a terminal does: the loader's processes get it too
    assert training.wait() == 130, training.output
    assert_saved_at_the_last_step(tmp_path / "run")


def test_a_sigterm_for_all_processes_saves_and_exits(tmp_path: Path, prepared: Path):
    """As schedulers send it: loader processes get it too, and ranks twice, from the supervisor as well."""
    config = tiny_config(max_steps=100_000, batch_size_per_gpu=1, num_workers=1)
    path = write_config(tmp_path / "c.json", config)
    training = Training(path, prepared, tmp_path / "run", "--num_gpus", "2")
    training.wait_for_step(2)
    ranks = rank_processes(training.process.pid)
    assert len(ranks) == 2
    loaders = [pid for rank in ranks for pid in children_of(rank)]
    assert len(loaders) >= 2
    for pid in (training.process.pid, *ranks, *loaders):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    assert training.wait() == 143, training.output
    assert_saved_at_the_last_step(tmp_path / "run")
    assert not [pid for pid in loaders if Path(f"/proc/{pid}/cmdline").exists()]


def test_ctrl_c_while_ranks_start(tmp_path: Path, prepared: Path):
    path = write_config(tmp_path / "c.json", tiny_config(max_steps=100_000, batch_size_per_gpu=1))
    training = Training(path, prepared, tmp_path / "run", "--num_gpus", "2")
    deadline = time.monotonic() + 60
    while len(rank_processes(training.process.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.5)
    training.signal(signal.SIGINT)
    assert training.wait(60) == 130, training.output
    assert not (tmp_path / "run" / "ckpts").exists()


def test_sigterm_reaches_all_ranks(tmp_path: Path, prepared: Path):
    path = write_config(tmp_path / "c.json", tiny_config(max_steps=100_000, batch_size_per_gpu=1))
    training = Training(path, prepared, tmp_path / "run", "--num_gpus", "2", "--auto_retry", "2")
    training.wait_for_step(2)
    training.signal(signal.SIGTERM)
    assert training.wait() == 143, training.output
    assert_saved_at_the_last_step(tmp_path / "run")


def assert_saved_at_the_last_step(run: Path) -> None:
    found = find_checkpoint(run)
    assert found is not None and found.step == read_log(run)[-1]["step"] >= 2


def children_of(pid: int) -> list[int]:
    """Processes that the main thread of a process started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def rank_processes(supervisor: int) -> list[int]:
    """Processes that a supervisor started for its ranks."""
    return [pid for pid in children_of(supervisor) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_auto_retry_goes_on_from_the_checkpoint(tmp_path: Path, prepared: Path):
    path = write_config(tmp_path / "c.json", tiny_config(max_steps=40, i_save=2, batch_size_per_gpu=1))
    training = Training(path, prepared, tmp_path / "run", "--auto_retry", "1")
    training.wait_for_step(5)
    for pid in rank_processes(training.process.pid):
        os.kill(pid, signal.SIGKILL)
    assert training.wait() == 0, training.output
    assert "exit code 137: restart 1 of 1" in training.output and "going on from step" in training.output
    assert [r["step"] for r in read_log(tmp_path / "run")] == list(range(1, 41))


SHRINK = [
    "models.vqvae.args.model_channels=64", "models.vqvae.args.num_blocks=1", "models.vqvae.args.num_embeddings=16",
    "models.vqvae.args.latent_channels=4", "trainer.args.max_steps=1", "trainer.args.codebook_init_samples=1",
]
SHRINK_OPTIONS = [x for s in SHRINK for x in ("--set", s)]

TRAINING_NEEDS = ("torch", "numpy", "safetensors", "tensorboard")


def packages_that_training_must_not_need() -> list[str]:
    """Top-level names that are installed, but neither by what training needs nor by Triton, which torch may bring."""
    allowed, waiting = set(), [*TRAINING_NEEDS, "triton", "trellis-vqvae"]
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name in allowed:
            continue
        allowed.add(name)
        try:
            requirements = [] if name == "trellis-vqvae" else importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        parsed = [Requirement(text) for text in requirements]
        waiting += [r.name for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})]
    installed = importlib.metadata.packages_distributions()
    owners = {top: {name.lower().replace("_", "-") for name in names} for top, names in installed.items()}
    return sorted(top for top, names in owners.items() if not names & allowed)


THREE = """
import json, sys
from importlib.machinery import PathFinder
root, data, out, options, blocked = sys.argv[1:]
blocked = set(json.loads(blocked))

class WithoutThose(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in blocked else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutThose
from trellis.trainers.launch import main
codes = []
for resolution in (64, 512, 1024):
    codes.append(main([
        "--config", f"{root}/configs/vae/sparse_sdf_vqvae_{resolution}.json", "--data_dir", data, "--device", "cpu",
        "--output_dir", f"{out}/{resolution}", "--set", "trainer.args.i_sample=1", *json.loads(options),
    ]))
print(json.dumps(codes))
"""


def test_shipped_configs_train_a_step_with_four_packages_alone(tmp_path: Path):
    """Each config with a small network; the data are small balls, since the grid's size is not the point here.

    Samples are meshes then, and one line says why there are no pictures.
    """
    blocked = packages_that_training_must_not_need()
    assert {"scipy", "warp", "trimesh", "pyvista", "nibabel", "SimpleITK", "dask", "typer", "rich"} <= set(blocked)
    assert not {"torch", "numpy", "safetensors", "tensorboard", "google"} & set(blocked)
    data = write_dataset(tmp_path / "data", 4, ball_voxels={64: 9.0, 512: 10.0, 1024: 12.0})
    done = subprocess.run(
        [sys.executable, "-c", THREE, str(ROOT), str(data), str(tmp_path), json.dumps(SHRINK_OPTIONS),
         json.dumps(blocked)],
        capture_output=True, text=True, timeout=200, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [0, 0, 0], done.stderr
    for resolution in (64, 512, 1024):
        run = tmp_path / str(resolution)
        assert find_checkpoint(run) is not None
        assert (run / "command.txt").read_text().startswith("python train.py --config ")
        assert list((run / "tb_logs").iterdir())
        samples = run / "samples" / "step0000001"
        assert {f"{i}_{kind}.ply" for i in range(4) for kind in ("input", "reconstruction")} == {
            path.name for path in samples.iterdir()
        }
        assert len(read_mesh(samples / "0_input.ply").faces) > 100
    (said,) = [line for line in done.stderr.splitlines() if "pictures" in line]
    assert "sample meshes are written, pictures are not: " in said and "warp" in said
    assert "Traceback" not in done.stderr


def test_wrong_input_exits_with_2_and_is_not_retried(tmp_path: Path, prepared: Path):
    config = tiny_config()
    config["trainer"]["args"]["max_stepz"] = 1
    code, output = train(write_config(tmp_path / "c.json", config), prepared, tmp_path / "run", "--auto_retry", "2")
    assert code == 2 and "did you mean 'max_steps'?" in output and "Traceback" not in output
    assert not (tmp_path / "run").exists()
    path = write_config(tmp_path / "d.json", tiny_config(batch_size=3, batch_size_per_gpu=None))
    for options, message in [
        (("--num_gpus", "0"), "--num_gpus must be at least 1, got 0"),
        (("--num_nodes", "2", "--node_rank", "2"), r"--node_rank must be in [0, 2), got 2"),
        (("--ckpt", "newest"), "--ckpt must be latest, none or a step, got 'newest'"),
        (("--ckpt", "7"), "no such checkpoint"),
        (("--set", "dataset.args.resolution=500"), "resolution must be a multiple of 8"),
        (("--set", "models.vqvae.args.model_channels=100"), "must be a positive multiple of 64, got 100"),
        (("--set", "models.vqvae.args.mlp_ratio=-1"), "mlp_ratio must give the MLP over 64 channels"),
        (("--set", "models.vqvae.args.latent_channels=0"), "latent_channels must be at least 1, got 0"),
        (("--set", "trainer.args.optimizer.name=Lion"), "trainer.args.optimizer.name: must be one of"),
    ]:
        code, output = train(path, prepared, tmp_path / "run", *options)
        assert code == 2 and message in output and "Traceback" not in output, output
    code, output = train(path, tmp_path / "nowhere", tmp_path / "run")
    assert code == 2 and "--data_dir: no such folder" in output


def test_tryrun_builds_and_profile_traces(tmp_path: Path, prepared: Path):
    path = write_config(tmp_path / "c.json", tiny_config(max_steps=50, batch_size_per_gpu=1))
    code, output = train(path, prepared, tmp_path / "try", "--tryrun")
    assert code == 0 and "nothing is run" in output
    assert (tmp_path / "try" / "vqvae_model_summary.txt").is_file() and not (tmp_path / "try" / "ckpts").exists()
    code, output = train(path, prepared, tmp_path / "profile", "--profile")
    assert code == 0, output
    trace = json.loads((tmp_path / "profile" / "profile" / "trace_rank0.json").read_text())
    assert trace["traceEvents"] and not (tmp_path / "profile" / "ckpts").exists()
    assert len(read_log(tmp_path / "profile")) == 10


def test_help_is_fast_because_it_imports_no_torch():
    code = "import sys; from trellis.trainers.launch import main\ntry: main(['--help'])\n"
    code += "except SystemExit as end: sys.exit(10 if 'torch' in sys.modules else end.code)"
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0 and time.monotonic() - started < 5
    for option in ("--config", "--output_dir", "--load_dir", "--ckpt", "--data_dir", "--auto_retry", "--tryrun",
                   "--profile", "--num_nodes", "--node_rank", "--num_gpus", "--master_addr", "--master_port", "--set",
                   "--device"):
        assert option in done.stdout


@pytest.mark.parametrize(("prog", "other"), [("python train.py", "trellis-vqvae"), ("trellis-vqvae train", "train.py")])
def test_help_calls_the_program_by_its_name(prog: str, other: str):
    text = " ".join(parser(prog).format_help().split())
    assert text.startswith(f"usage: {prog} ") and f"example: {prog} --config " in text and other not in text


def test_script_picks_the_config(tmp_path: Path, prepared: Path):
    command = ["bash", str(ROOT / "scripts" / "train_vqvae.sh")]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(
        [*command, "64", str(prepared), str(tmp_path / "run"), "--tryrun", "--device", "cpu", *SHRINK_OPTIONS],
        capture_output=True, text=True, timeout=100, env=environment, check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text())["dataset"]["args"]["resolution"] == 64
    done = subprocess.run([*command, "65", "a", "b"], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2 and "usage" in done.stderr


@pytest.mark.parametrize("installed", [["bin/python3"], ["bin/python3", "bin/python"],
                                       ["bin/python3", "bin/python", ".venv/bin/python"]])
def test_script_finds_a_python(tmp_path: Path, installed: list[str]):
    """The last of the list: that of the checkout's environment, then python, then python3 on the path."""
    for name in installed:
        python = tmp_path / name
        python.parent.mkdir(parents=True, exist_ok=True)
        python.write_text(f'#!/bin/sh\necho {name} "$@"\n')
        python.chmod(0o755)
    for tool in ("bash", "dirname"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    script = tmp_path / "scripts" / "train_vqvae.sh"
    script.parent.mkdir()
    script.write_bytes((ROOT / "scripts" / "train_vqvae.sh").read_bytes())
    done = subprocess.run(
        ["bash", str(script), "512", "DATA", "OUT", "--tryrun"], capture_output=True, text=True, timeout=30,
        env={"PATH": str(tmp_path / "bin")}, check=True,
    )
    config = tmp_path / "configs" / "vae" / "sparse_sdf_vqvae_512.json"
    assert done.stdout.split() == [
        installed[-1], str(tmp_path / "train.py"), "--config", str(config), "--data_dir", "DATA", "--output_dir", "OUT",
        "--tryrun",
    ]
