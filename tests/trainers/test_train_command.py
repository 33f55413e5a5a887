"""train.py in processes of its own: exact resume after a kill, two ranks, signals, restarts, exit codes, imports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from training_cases import (
    ROOT,
    read_log,
    tiny_config,
    train,
    train_command,
    training_environment,
    write_config,
    write_dataset,
)

from trellis.trainers.checkpoint import find_checkpoint, load_misc, load_weights


def start(*command: str) -> subprocess.Popen:
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=training_environment(),
        start_new_session=True,
    )


def wait_for_step(output: Path, step: int, process: subprocess.Popen, timeout: float = 90) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        log = output / "log.txt"
        if log.exists() and len(log.read_text().splitlines()) >= step:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached in {timeout} s")


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
    config = tiny_config(
        max_steps=14, i_save=4, i_ddpcheck=None, num_workers=int(use_ema_update), batch_split=2, ema_rate=[0.9, 0.99],
        lr_scheduler={"name": "WarmupCosineLRScheduler", "args": {"warmup_steps": 3, "total_steps": 20}},
        grad_clip={"name": "AdaptiveGradClipper", "args": {"max_norm": 1.0, "clip_percentile": 60, "buffer_size": 5}},
    )
    config["models"]["vqvae"]["args"] |= {"use_ema_update": use_ema_update, "reseed_after": 2}
    path = write_config(tmp_path / "c.json", config)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(path, prepared, whole).returncode == 0
    process = start(*train_command(path, prepared, parts))
    wait_for_step(parts, 6, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    stopped = find_checkpoint(parts)
    assert stopped is not None and stopped.step in (4, 8)
    done = train(path, prepared, parts)
    assert done.returncode == 0 and f"going on from step {stopped.step}" in done.stderr
    a, b = find_checkpoint(whole), find_checkpoint(parts)
    assert a is not None and b is not None and a.step == b.step == 14
    assert_same(load_weights(a.model), load_weights(b.model))
    for rate in ("0.9", "0.99"):
        assert_same(load_weights(a.ema[rate]), load_weights(b.ema[rate]))
    assert_same(load_misc(a), load_misc(b))
    timeless = [[{k: v for k, v in r.items() if k not in ("step_s", "data_s")} for r in read_log(run)]
                for run in (whole, parts)]
    assert timeless[0] == timeless[1] and [r["step"] for r in timeless[0]] == list(range(1, 15))


def test_two_ranks_are_one_with_the_joint_batch(tmp_path: Path, prepared: Path):
    """Codebook initialisation, losses, checks of equal weights and the end result."""
    config = tiny_config(max_steps=4, batch_size=4, batch_size_per_gpu=None, i_ddpcheck=1, codebook_init_samples=None)
    config["models"]["vqvae"]["args"]["use_ema_update"] = True
    path = write_config(tmp_path / "c.json", config)
    one, two = tmp_path / "one", tmp_path / "two"
    assert train(path, prepared, one).returncode == 0
    done = train(path, prepared, two, "--num_gpus", "2")
    assert done.returncode == 0, done.stderr
    for a, b in zip(read_log(one), read_log(two), strict=True):
        for key in ("loss", "mse_band", "mse_extra", "commitment", "perplexity", "codes_used", "lr"):
            assert b[key] == pytest.approx(a[key], rel=1e-4), (a["step"], key)
    found = [find_checkpoint(run) for run in (one, two)]
    books = [load_weights(f.model)["quantizer.codebook"] for f in found]
    torch.testing.assert_close(books[0], books[1], rtol=1e-3, atol=1e-4)
    assert len(load_misc(found[1])["generators"]) == 2


def test_a_failing_rank_ends_the_other(tmp_path: Path):
    """One rank meets a broken file: both end, and the code says that the input is wrong."""
    data = write_dataset(tmp_path / "data", 4)
    config = write_config(tmp_path / "c.json", tiny_config(batch_size_per_gpu=1, max_steps=500, i_print=None))
    (data / "sparse_sdf" / "shape02_r64.npz").write_bytes(b"broken")
    started = time.monotonic()
    done = train(config, data, tmp_path / "run", "--num_gpus", "2", "--auto_retry", "3")
    assert done.returncode == 2 and time.monotonic() - started < 60
    assert "shape02_r64.npz" in done.stderr and "restart" not in done.stderr


@pytest.mark.parametrize(("number", "code", "ranks"), [(signal.SIGINT, 130, "1"), (signal.SIGTERM, 143, "2")])
def test_signals_save_and_exit(tmp_path: Path, prepared: Path, number: int, code: int, ranks: str):
    config = write_config(tmp_path / "c.json", tiny_config(max_steps=100_000, batch_size_per_gpu=1, num_workers=1))
    process = start(*train_command(config, prepared, tmp_path / "run", "--num_gpus", ranks))
    wait_for_step(tmp_path / "run", 2, process)
    os.kill(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    found = find_checkpoint(tmp_path / "run")
    assert found is not None and found.step == read_log(tmp_path / "run")[-1]["step"] >= 2


CRASH = """
import os
from trellis.trainers import base
real = base.Trainer._train_step
def step(self, *args):
    if self.step == 3 and not os.path.exists(marker):
        open(marker, "w").close()
        os.kill(os.getpid(), 9)
    return real(self, *args)
base.Trainer._train_step = step
"""


def test_auto_retry_goes_on_from_the_checkpoint(tmp_path: Path, prepared: Path):
    config = write_config(tmp_path / "c.json", tiny_config(max_steps=4, i_save=2))
    site = tmp_path / "site"
    site.mkdir()
    in_ranks = "\n".join("    " + line for line in CRASH.splitlines())
    (site / "sitecustomize.py").write_text(
        f"import sys\nmarker = {str(tmp_path / 'crashed')!r}\nif 'spawn_main' in ' '.join(sys.orig_argv):\n{in_ranks}\n"
    )
    done = subprocess.run(
        train_command(config, prepared, tmp_path / "run", "--auto_retry", "1"), capture_output=True, text=True,
        timeout=120, env={**training_environment(), "PYTHONPATH": str(site)}, check=False,
    )
    assert (tmp_path / "crashed").exists()
    assert done.returncode == 0, done.stderr
    assert "exit code 137: restart 1 of 1" in done.stderr and "going on from step 2" in done.stderr
    assert [r["step"] for r in read_log(tmp_path / "run")] == [1, 2, 3, 4]


SHRINK = [
    "models.vqvae.args.model_channels=64", "models.vqvae.args.num_blocks=1", "models.vqvae.args.num_embeddings=16",
    "models.vqvae.args.latent_channels=4", "trainer.args.max_steps=1", "trainer.args.codebook_init_samples=1",
]

THREE = """
import json, logging, sys
from pathlib import Path
from trellis.trainers.launch import main
logging.basicConfig = lambda **kw: None
root, data, out, shrink = sys.argv[1:]
codes = []
for resolution in (64, 512, 1024):
    options = [x for s in json.loads(shrink) for x in ("--set", s)]
    codes.append(main([
        "--config", f"{root}/configs/vae/sparse_sdf_vqvae_{resolution}.json", "--data_dir", data, "--device", "cpu",
        "--output_dir", f"{out}/{resolution}", *options,
    ]))
print(json.dumps({"codes": codes, "modules": sorted({name.split(".")[0] for name in sys.modules})}))
"""


def test_shipped_configs_train_a_step_and_import_little(tmp_path: Path):
    """Each config with a small network; the data are small balls, since the grid's size is not the point here."""
    data = write_dataset(tmp_path / "data", 4, ball_voxels={64: 9.0, 512: 10.0, 1024: 12.0})
    done = subprocess.run(
        [sys.executable, "-c", THREE, str(ROOT), str(data), str(tmp_path), json.dumps(SHRINK)], capture_output=True,
        text=True, timeout=200, env=training_environment(), check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["codes"] == [0, 0, 0], done.stderr
    for resolution in (64, 512, 1024):
        assert find_checkpoint(tmp_path / str(resolution)) is not None
        assert (tmp_path / str(resolution) / "command.txt").is_file()
    heavy = {"warp", "trimesh", "pyvista", "vtk", "nibabel", "SimpleITK", "dask", "scipy", "skimage", "rich", "typer",
             "huggingface_hub", "nilearn", "manifold3d", "triton", "tensorflow", "matplotlib", "pandas"}
    assert not heavy & set(report["modules"])


def test_wrong_input_exits_with_2_and_is_not_retried(tmp_path: Path, prepared: Path):
    config = tiny_config()
    config["trainer"]["args"]["max_stepz"] = 1
    done = train(write_config(tmp_path / "c.json", config), prepared, tmp_path / "run", "--auto_retry", "2")
    assert done.returncode == 2 and "did you mean 'max_steps'?" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_tryrun_builds_and_profile_traces(tmp_path: Path, prepared: Path):
    path = write_config(tmp_path / "c.json", tiny_config(max_steps=50, batch_size_per_gpu=1))
    done = train(path, prepared, tmp_path / "try", "--tryrun")
    assert done.returncode == 0 and "nothing is run" in done.stderr
    assert (tmp_path / "try" / "vqvae_model_summary.txt").is_file() and not (tmp_path / "try" / "ckpts").exists()
    done = train(path, prepared, tmp_path / "profile", "--profile")
    assert done.returncode == 0, done.stderr
    trace = json.loads((tmp_path / "profile" / "profile" / "trace_rank0.json").read_text())
    assert trace["traceEvents"] and not (tmp_path / "profile" / "ckpts").exists()
    assert len(read_log(tmp_path / "profile")) == 10


def test_help_is_fast_because_it_imports_no_torch():
    code = "import sys; from trellis.trainers.launch import main\ntry: main(['--help'])\n"
    code += "except SystemExit as end: sys.exit(10 if 'torch' in sys.modules else end.code)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0
    for option in ("--config", "--output_dir", "--load_dir", "--ckpt", "--data_dir", "--auto_retry", "--tryrun",
                   "--profile", "--num_nodes", "--node_rank", "--num_gpus", "--master_addr", "--master_port", "--set",
                   "--device"):
        assert option in done.stdout


def test_script_picks_the_config(tmp_path: Path, prepared: Path):
    script = str(ROOT / "scripts" / "train_vqvae.sh")
    shrink = [x for s in SHRINK for x in ("--set", s)]
    done = subprocess.run(
        ["bash", script, "64", str(prepared), str(tmp_path / "run"), "--tryrun", "--device", "cpu", *shrink],
        capture_output=True, text=True, timeout=60, env={**training_environment(), "PYTHON": sys.executable},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text())["dataset"]["args"]["resolution"] == 64
    done = subprocess.run(["bash", script, "65", "a", "b"], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2 and "usage" in done.stderr
