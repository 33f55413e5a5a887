"""Training on a GPU: every number format trains, resumes, and agrees with float32."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from training_cases import RESOLUTION, ROOT, read_log, tiny_config, write_config, write_dataset

from trellis.trainers.build import RunOptions, build_trainer
from trellis.trainers.checkpoint import find_checkpoint, load_weights
from trellis.trainers.memory import OutOfDeviceMemory
from trellis.utils import dist_utils
from trellis.utils.dist_utils import Ranks, stop_process_group


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [None, "inflat_all", "amp", "bf16"])
def test_formats_train_on_cuda(tmp_path: Path, prepared: Path, cuda_device: str, mode: str | None):
    device = torch.device(cuda_device, 0)
    config = tiny_config(max_steps=60, fp16_mode=mode, num_workers=2, batch_split=2, i_save=30)
    path = write_config(tmp_path / "c.json", config)
    options = RunOptions(config=str(path), output_dir=str(tmp_path / "run"), data_dir=str(prepared), device="cuda")
    trainer = build_trainer(options, Ranks(), device)
    assert trainer.run() == 0
    records = read_log(tmp_path / "run")
    skipped = sum(r["grad_norm"] is None for r in records)
    assert skipped <= (20 if mode in ("inflat_all", "amp") else 0)
    bands = [r["mse_band"] for r in records]
    assert sum(bands[-5:]) < 0.6 * sum(bands[:5])
    again = build_trainer(options, Ranks(), device)
    weights = trainer.precision.weights()
    assert again.step == 60 and all(torch.equal(t, weights[name]) for name, t in again.precision.weights().items())


@pytest.mark.gpu
@pytest.mark.timeout(150)
def test_memory_does_not_creep(tmp_path: Path, cuda_device: str):
    """500 steps of crops that differ every epoch: what is held between steps, and what the allocator keeps, stay."""
    prepared = write_dataset(tmp_path / "large", 5, {RESOLUTION: 14})
    config = tiny_config(max_steps=1000, fp16_mode="bf16", i_ddpcheck=None, num_workers=2)
    config["dataset"]["args"]["max_points"] = 5000
    path = write_config(tmp_path / "c.json", config)
    options = RunOptions(config=str(path), output_dir=str(tmp_path / "run"), data_dir=str(prepared), device="cuda")
    trainer = build_trainer(options, Ranks(), torch.device(cuda_device, 0))
    held, kept = [], []

    def remember(step: int) -> None:
        held.append(torch.cuda.memory_allocated())
        kept.append(torch.cuda.memory_reserved())

    trainer.run(max_steps=500, after_step=remember)
    shares = {r["cropped"] for r in read_log(tmp_path / "run")}
    assert max(shares) > 0  # the crops did happen
    assert min(held[-100:]) <= min(held[50:150]) * 1.005 and max(held[-100:]) <= max(held[50:150]) * 1.02
    assert kept[-1] <= max(kept[:150]) * 1.1


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["inflat_all", "amp", "bf16"])
def test_a_step_does_not_wait_for_the_device(tmp_path: Path, prepared: Path, cuda_device: str, mode: str):
    """Its figures are read through an event, one step later; so are those of an epoch and of a period of 50 steps."""
    clipper = {"name": "AdaptiveGradClipper", "args": {"max_norm": 1.0, "buffer_size": 5}}
    config = tiny_config(
        max_steps=80, fp16_mode=mode, num_workers=1, i_ddpcheck=None, i_log=None, i_print=None, grad_clip=clipper
    )
    # recording a graph waits, and may fall on any step; that a replay does not is tested with the graphs
    config["models"]["vqvae"]["args"] |= {"reseed_after": 5, "num_embeddings": 500, "cuda_graphs": False}
    path = write_config(tmp_path / "c.json", config)
    options = RunOptions(config=str(path), output_dir=str(tmp_path / "run"), data_dir=str(prepared), device="cuda")
    trainer = build_trainer(options, Ranks(), torch.device(cuda_device, 0))

    def count(step: int) -> None:
        torch.cuda.set_sync_debug_mode("warn" if 11 <= step < 70 else "default")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.run(max_steps=72, after_step=count)
    assert [r["step"] for r in read_log(tmp_path / "run")] == list(range(1, 73))
    assert [f"{w.filename}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message)] == []


@pytest.mark.gpu
def test_the_host_starts_a_step_while_the_device_is_at_work_on_the_last(tmp_path, prepared, cuda_device):
    config = tiny_config(max_steps=40, batch_size_per_gpu=1, fp16_mode="inflat_all", i_log=None, i_ddpcheck=None)
    config["models"]["vqvae"]["args"] |= {"reseed_after": 1000, "cuda_graphs": False}
    path = write_config(tmp_path / "c.json", config)
    options = RunOptions(config=str(path), output_dir=str(tmp_path / "run"), data_dir=str(prepared), device="cuda")
    trainer = build_trainer(options, Ranks(), torch.device(cuda_device, 0))
    real, unfinished = trainer._update, []

    def slow_update(*args):
        real(*args)
        torch.cuda._sleep(200_000_000)  # 0.1 s or more of the device's time
        done = torch.cuda.Event()
        done.record()
        unfinished.append(done)

    trainer._update = slow_update
    ahead = []
    losses = trainer.objective.losses

    def watched(*args):
        ahead.append(bool(unfinished) and not unfinished[-1].query())
        return losses(*args)

    trainer.objective.losses = watched
    trainer.run(max_steps=4)  # the fifth ends an epoch, whose figures are waited for
    assert ahead == [False, True, True, True]


@pytest.mark.gpu
def test_nccl_with_one_rank_changes_nothing(tmp_path: Path, prepared: Path, cuda_device: str, monkeypatch):
    """All collectives through NCCL in a group of one: the same losses as without a group."""
    device = torch.device(cuda_device, 0)
    path = write_config(tmp_path / "c.json", tiny_config(max_steps=5, i_ddpcheck=2, i_save=5))

    def losses(name: str) -> list[float]:
        options = RunOptions(config=str(path), output_dir=str(tmp_path / name), data_dir=str(prepared), device="cuda")
        assert build_trainer(options, Ranks(), device).run() == 0
        return [r["loss"] for r in read_log(tmp_path / name)]

    alone = losses("alone")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=device)
    try:
        monkeypatch.setattr(dist_utils, "in_group", lambda: True)
        together = losses("together")
    finally:
        stop_process_group()
    assert together == pytest.approx(alone, rel=1e-4)


@pytest.mark.gpu
@pytest.mark.timeout(280)
def test_two_gpus_are_one_with_the_joint_batch(tmp_path: Path, prepared: Path, cuda_device: str):
    if torch.cuda.device_count() < 2:
        pytest.fail(f"this test needs two GPUs, there are {torch.cuda.device_count()} (-k 'not two_gpus' skips it)")
    losses, norms, books = {}, {}, []
    for gpus in (1, 2):
        # i_ddpcheck: after each step the two hold the same weights and codebook to the bit, or the run fails
        config = tiny_config(max_steps=5, batch_size=4, batch_size_per_gpu=None, i_ddpcheck=1)
        path = write_config(tmp_path / f"{gpus}.json", config)
        arguments = ["--config", str(path), "--data_dir", str(prepared), "--output_dir", str(tmp_path / str(gpus))]
        command = [sys.executable, str(ROOT / "train.py"), *arguments, "--num_gpus", str(gpus)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        records = read_log(tmp_path / str(gpus))
        losses[gpus], norms[gpus] = [r["loss"] for r in records], [r["grad_norm"] for r in records]
        books.append(load_weights(find_checkpoint(tmp_path / str(gpus)).model)["quantizer.codebook"])
    assert losses[2] == pytest.approx(losses[1], rel=1e-3)
    assert norms[2] == pytest.approx(norms[1], rel=1e-2)
    # Adam moves a code by at most the learning rate, 1e-3, a step, whichever way rounding turns a gradient near 0.
    torch.testing.assert_close(*books, rtol=0, atol=5e-3)


@pytest.mark.gpu
def test_a_step_that_runs_out_of_memory_names_its_shapes(tmp_path: Path, prepared: Path, cuda_device: str):
    path = write_config(tmp_path / "c.json", tiny_config(max_steps=3, max_memory_gb=100.0))
    options = RunOptions(config=str(path), output_dir=str(tmp_path / "run"), data_dir=str(prepared), device="cuda")
    trainer = build_trainer(options, Ranks(), torch.device(cuda_device, 0))
    real = trainer.objective.losses

    def losses(model, batch):
        torch.empty(10**15, dtype=torch.uint8, device=cuda_device)
        return real(model, batch)

    trainer.objective.losses = losses
    with pytest.raises(OutOfDeviceMemory, match=r"step 1: the device ran out of memory.*shape0\d \(\d+ blocks\)"):
        trainer.run()
