"""One rank fails while the others wait for it: the whole run ends soon, and says why."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from training_cases import tiny_config, write_config

from trellis.trainers import base, run
from trellis.trainers.build import RunOptions

GRACE_S = 1.0
FAILS_AT = 3
real_child = run._child


def wait_for_ever(*args, **kwargs):
    time.sleep(1000)


def failing_child(options: RunOptions, environment: dict[str, str], *rest) -> None:
    """Rank 0 raises in step 3; to leave the group in order would last for ever, as with NCCL."""
    if environment["RANK"] == "0":
        real = base.Trainer._launch_step

        def step(trainer, *args):
            if trainer.step + 1 == FAILS_AT:
                raise RuntimeError("broken on purpose")
            return real(trainer, *args)

        base.Trainer._launch_step = step
        torch.distributed.destroy_process_group = wait_for_ever
    real_child(options, environment, *rest)


def stuck_child(options: RunOptions, environment: dict[str, str], *rest) -> None:
    """And rank 1 never comes back from the collective of that step, as with NCCL."""
    if environment["RANK"] == "1":
        real = base.sum_over_ranks_
        steps = []

        def sum_over_ranks_(tensor):
            steps.append(tensor.numel())
            return wait_for_ever() if steps.count(steps[0]) == FAILS_AT else real(tensor)

        base.sum_over_ranks_ = sum_over_ranks_
    failing_child(options, environment, *rest)


def run_two(tmp_path: Path, prepared: Path, child, device: str, monkeypatch, **trainer_args) -> tuple[int, float]:
    """Exit code of a run of two ranks, and seconds from the failure (the third step) to its end."""
    monkeypatch.setattr(run, "_child", child)
    monkeypatch.setattr(run, "GRACE_S", GRACE_S)
    path = write_config(tmp_path / "c.json", tiny_config(i_ddpcheck=None, **trainer_args))
    options = RunOptions(config=str(path), output_dir=str(tmp_path / "run"), data_dir=str(prepared), device=device)
    code = run.supervise(options, processes=2)
    return code, time.time() - (tmp_path / "run" / "log.txt").stat().st_mtime


@pytest.mark.parametrize("child", [failing_child, stuck_child])
def test_a_rank_that_fails_ends_a_run_that_waits_for_it(tmp_path, prepared, child, monkeypatch, capfd):
    code, seconds = run_two(tmp_path, prepared, child, "cpu", monkeypatch)
    said = capfd.readouterr().err
    assert code == 1 and seconds < GRACE_S + 5
    assert said.count("Traceback") == 1 and "rank 0 failed" in said and "RuntimeError: broken on purpose" in said
    assert said.count("rank 1 ends, since another one did") == (child is failing_child)


@pytest.mark.gpu
@pytest.mark.timeout(150)
def test_a_rank_that_fails_on_two_gpus_ends_a_run_that_waits_for_it(tmp_path, prepared, cuda_device, monkeypatch):
    """Rank 1 is in NCCL's sum of the gradients, for which rank 0 never comes."""
    if torch.cuda.device_count() < 2:
        pytest.fail(f"this test needs two GPUs, there are {torch.cuda.device_count()} (-k 'not two_gpus' skips it)")
    code, seconds = run_two(tmp_path, prepared, failing_child, cuda_device, monkeypatch, num_workers=1)
    assert code == 1 and seconds < GRACE_S + 10
