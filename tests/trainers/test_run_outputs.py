"""What a run leaves beside its checkpoints: TensorBoard's figures to the last step, samples, and a full disk's end."""

from __future__ import annotations

import logging
import os
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_cases import ellipsoid_blocks, read_log, tiny_config, write_config

from trellis.trainers import run as run_module
from trellis.trainers import stop as stop_module
from trellis.trainers.base import Trainer
from trellis.trainers.build import RunOptions, build_trainer
from trellis.trainers.checkpoint import find_checkpoint
from trellis.trainers.run import train_rank
from trellis.trainers.stop import StopSignals, agreed_exit_code
from trellis.utils.dist_utils import Ranks
from trellis.utils.mesh_utils import read_mesh


def options(tmp_path: Path, data: Path, **trainer_args) -> RunOptions:
    path = write_config(tmp_path / "c.json", tiny_config(**trainer_args))
    return RunOptions(config=str(path), output_dir=str(tmp_path / "run"), data_dir=str(data), device="cpu")


def build(tmp_path: Path, data: Path, **trainer_args) -> Trainer:
    return build_trainer(options(tmp_path, data, **trainer_args), Ranks(), torch.device("cpu"))


def board(run: Path) -> EventAccumulator:
    read = EventAccumulator(str(run / "tb_logs"), size_guidance={"scalars": 0, "images": 0})
    return read.Reload()


LOGGED = {
    "loss/loss", "loss/mse_band", "loss/mse_extra", "loss/vq", "loss/commitment", "codebook/perplexity",
    "codebook/codes_used", "train/lr", "train/grad_norm", "train/cropped", "speed/step_s", "speed/data_s",
}
PER_EPOCH = {f"codebook/epoch_{name}" for name in ("perplexity", "codes_used", "share_used", "dead_codes")}


def test_tb_logs_hold_all_figures_to_the_last_step_and_samples_are_readable(tmp_path: Path, prepared: Path):
    trainer = build(tmp_path, prepared, max_steps=7, i_log=3, i_sample=6, lr_scheduler={
        "name": "LinearWarmupLRScheduler", "args": {"warmup_steps": 10}})
    trainer.run()
    run = tmp_path / "run"
    records, read = read_log(run), board(run)
    scalars = {tag: {event.step: event.value for event in read.Scalars(tag)} for tag in read.Tags()["scalars"]}
    assert LOGGED | PER_EPOCH | {"speed/samples_per_s", "speed/host_memory_gib"} <= set(scalars)
    windows = {3: records[:3], 6: records[3:6], 7: records[6:]}  # the last one is cut short by the end of training
    for tag in LOGGED:
        key = tag.split("/")[1]
        wanted = {step: np.mean([record[key] for record in window]) for step, window in windows.items()}
        assert scalars[tag] == pytest.approx(wanted, rel=1e-6), tag
    for tag in PER_EPOCH:  # 5 shapes, 2 a step: epochs end at steps 3 and 5
        key = tag.split("/")[1]
        assert scalars[tag] == pytest.approx({3: records[2][key], 6: records[4][key]}, rel=1e-6), tag
    for step, rate in scalars["speed/samples_per_s"].items():
        assert rate == pytest.approx(2 / scalars["speed/step_s"][step], rel=1e-5)
    assert all(0.05 < value < 64 for value in scalars["speed/host_memory_gib"].values())

    folders = [run / "samples" / f"step000000{step}" for step in (6, 7)]
    assert sorted((run / "samples").iterdir()) == folders
    images = read.Images("samples")
    assert [image.step for image in images] == [6, 7]
    radii_mm = (ellipsoid_blocks((4.4, 6.6, 4.95)).to_world[0, 0] / 64) * np.array([4.4, 6.6, 4.95])
    for folder, image in zip(folders, images):
        png = (folder / "samples.png").read_bytes()
        assert image.encoded_image_string == png
        picture = np.asarray(Image.open(folder / "samples.png").convert("RGB"))
        assert picture.shape[:2] == (image.height, image.width) and picture.std() > 5
        mesh = read_mesh(folder / "0_input.ply")
        assert mesh.space_is_tagged
        np.testing.assert_allclose(np.abs(mesh.vertices).max(axis=0), radii_mm, atol=0.3)
        reconstruction = read_mesh(folder / "0_reconstruction.ply")
        assert len(reconstruction.faces) > 0 and np.abs(reconstruction.vertices).max() < 60


def test_a_run_shorter_than_i_log_has_its_figures(tmp_path: Path, prepared: Path):
    build(tmp_path, prepared, max_steps=2, i_log=500).run()
    (event,) = board(tmp_path / "run").Scalars("loss/loss")
    assert event.step == 2
    assert event.value == pytest.approx(np.mean([r["loss"] for r in read_log(tmp_path / "run")]), rel=1e-6)


def test_going_on_replaces_later_steps_and_null_means_no_figures(tmp_path: Path, prepared: Path):
    trainer = build(tmp_path, prepared, max_steps=4, i_log=1, i_save=2, log_param_stats=True)
    with pytest.raises(ZeroDivisionError):  # as a crash at step 3, after the checkpoint of step 2
        trainer.run(after_step=lambda step: 1 // (3 - step))
    read = board(tmp_path / "run")
    assert [event.step for event in read.Scalars("loss/loss")] == [1, 2, 3]
    assert {f"{what}_rms/decoder.out_layer.weight" for what in ("weight", "grad")} <= set(read.Tags()["scalars"])
    build(tmp_path, prepared, max_steps=4, i_log=1).run()
    assert [event.step for event in board(tmp_path / "run").Scalars("loss/loss")] == [1, 2, 3, 4]
    (tmp_path / "other").mkdir()
    build(tmp_path / "other", prepared, max_steps=2, i_log=None).run()
    assert board(tmp_path / "other" / "run").Tags()["scalars"] == []


# -- a disk that takes no more ----------------------------------------------------------------------------------------


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """What a full disk does, to every file that grows beyond `size` bytes: the write is refused."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def largest_checkpoint_file(run: Path) -> int:
    return max(path.stat().st_size for path in (run / "ckpts").iterdir())


def end_of_a_failed_log(run: Path, caplog: pytest.LogCaptureFixture) -> tuple[str, int]:
    """The one line that says it, and the step of the checkpoint that was saved all the same."""
    (line,) = [record.message for record in caplog.records if record.levelno >= logging.ERROR]
    assert line.endswith("File too large; training ends")
    assert not any(record.exc_info for record in caplog.records)
    found = find_checkpoint(run)
    assert found is not None
    return line, found.step


def test_a_full_disk_under_log_txt_saves_and_ends(tmp_path: Path, prepared: Path, caplog):
    assert train_rank(options(tmp_path, prepared, max_steps=2)) == 0
    run = tmp_path / "run"
    limit = largest_checkpoint_file(run) + 50_000
    with (run / "log.txt").open("a") as stream:
        padding = limit - 1000 - stream.tell()
        stream.write('{"step": 2, "note": "' + "x" * padding + '"}\n')
    caplog.clear()
    with files_of_at_most(limit):
        assert train_rank(options(tmp_path, prepared, max_steps=40)) == 1
    line, saved = end_of_a_failed_log(run, caplog)
    assert line.startswith(f"{run / 'log.txt'}: could not be written")
    last_logged = read_log(run)[-1]["step"]
    assert 3 <= last_logged < 40 and saved == last_logged + 1  # the refused step
    assert train_rank(options(tmp_path, prepared, max_steps=saved + 1)) == 0
    assert [r["step"] for r in read_log(run)][-2:] == [last_logged, saved + 1]


def test_a_full_disk_under_tb_logs_saves_and_ends(tmp_path: Path, prepared: Path, caplog, monkeypatch):
    trainer = build(tmp_path, prepared, max_steps=40, i_sample=3, i_save=1)
    header = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + (8).to_bytes(4, "big") * 2

    def huge_picture(model, dataset, folder) -> bytes:
        return header + bytes(largest_checkpoint_file(tmp_path / "run") + 50_000)

    monkeypatch.setattr(trainer.objective, "write_samples", huge_picture)
    monkeypatch.setattr(run_module, "build_trainer", lambda *arguments: trainer)
    trainer.run(max_steps=1)
    trainer.save()
    with files_of_at_most(largest_checkpoint_file(tmp_path / "run") + 20_000):
        assert train_rank(options(tmp_path, prepared)) == 1
    line, saved = end_of_a_failed_log(tmp_path / "run", caplog)
    assert line.startswith(f"{tmp_path / 'run' / 'tb_logs'}: could not be written") and saved == 4
    assert read_log(tmp_path / "run")[-1]["step"] == 3


def test_a_log_that_cannot_be_opened_is_one_line(tmp_path: Path, prepared: Path, caplog):
    (tmp_path / "run" / "log.txt").mkdir(parents=True)
    assert train_rank(options(tmp_path, prepared)) == 1
    (line,) = [record.message for record in caplog.records if record.levelno >= logging.ERROR]
    assert "log.txt: could not be written: " in line and not any(record.exc_info for record in caplog.records)


def test_a_signal_that_comes_twice_at_once_is_one_request(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(stop_module.time, "monotonic", lambda: now[0])
    with StopSignals() as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM and agreed_exit_code(stop.flags()) == 143
        now[0] += 1.5
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)


def test_all_ranks_stop_for_the_log_of_one():
    stop = StopSignals()
    assert agreed_exit_code(stop.flags()) is None
    stop.log_failed = True
    assert agreed_exit_code(stop.flags()) == 1
