"""Training on a GPU: every number format trains, resumes, and agrees with float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from training_cases import read_log, tiny_config, write_config

from trellis.trainers.build import RunOptions, build_trainer
from trellis.utils.dist_utils import Ranks


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
def test_memory_does_not_creep(tmp_path: Path, prepared: Path, cuda_device: str):
    path = write_config(tmp_path / "c.json", tiny_config(max_steps=120, fp16_mode="bf16", i_ddpcheck=None))
    options = RunOptions(config=str(path), output_dir=str(tmp_path / "run"), data_dir=str(prepared), device="cuda")
    trainer = build_trainer(options, Ranks(), torch.device(cuda_device, 0))
    seen = {}

    def remember(step: int) -> None:
        if step % 10 == 0:  # the same shapes: 5 of them, 2 a step
            seen[step] = torch.cuda.memory_allocated()

    trainer.run(after_step=remember)
    assert seen[120] <= seen[20] * 1.01
