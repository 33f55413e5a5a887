"""The step loop in this process: splitting changes nothing, skipped steps leave no trace, averages follow."""

from __future__ import annotations

import json
import logging
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_cases import read_log, tiny_config, write_config, write_dataset

from trellis.config import InputError
from trellis.trainers import base
from trellis.trainers import build as build_module
from trellis.trainers.base import Trainer
from trellis.trainers.build import RunOptions, build_trainer, differing_keys
from trellis.trainers.checkpoint import CheckpointError, find_checkpoint, load_misc, load_weights
from trellis.trainers.memory import OutOfDeviceMemory
from trellis.utils.dist_utils import Ranks


def build(tmp_path: Path, data: Path, config: dict, name: str = "run", **options) -> Trainer:
    path = write_config(tmp_path / f"{name}.json", config)
    run = RunOptions(config=str(path), output_dir=str(tmp_path / name), data_dir=str(data), device="cpu", **options)
    return build_trainer(run, Ranks(), torch.device("cpu"))


def test_batch_split_changes_only_rounding(tmp_path: Path, prepared: Path, caplog: pytest.LogCaptureFixture):
    logs = {}
    for split in (1, 2, 9):
        config = tiny_config(
            batch_size_per_gpu=3, batch_split=split, max_steps=3, optimizer={"name": "SGD", "args": {"lr": 0.05}}
        )
        trainer = build(tmp_path, prepared, config, f"split{split}")
        assert trainer.run() == 0
        logs[split] = read_log(tmp_path / f"split{split}")
    assert "batch_split 9 exceeds the 3 shapes" in caplog.text
    for split in (2, 9):
        for a, b in zip(logs[1], logs[split], strict=True):
            for key in ("loss", "mse_band", "mse_extra", "vq", "commitment", "perplexity", "grad_norm"):
                assert b[key] == pytest.approx(a[key], rel=2e-5), (split, key)


def test_log_has_the_promised_keys_and_files_the_promised_names(tmp_path: Path, prepared: Path):
    trainer = build(tmp_path, prepared, tiny_config(max_steps=3, i_save=2, log_param_stats=True))
    assert trainer.run() == 0
    run = tmp_path / "run"
    records = read_log(run)
    assert [r["step"] for r in records] == [1, 2, 3]
    keys = {"step", "loss", "mse_band", "mse_extra", "vq", "commitment", "perplexity", "codes_used", "lr", "grad_norm",
            "step_s"}
    assert all(keys <= set(r) for r in records)
    assert "epoch_perplexity" in records[2] and records[2]["epoch"] == 1  # 6 shapes of 5
    for name in ("config.json", "vqvae_model_summary.txt", "ckpts/step0000002.json", "ckpts/step0000003.json",
                 "ckpts/vqvae_ema0.99_step0000003.safetensors"):
        assert (run / name).is_file(), name
    total = records[0]["loss"]
    parts = (records[0]["mse_band"], records[0]["mse_extra"])
    rest = records[0]["vq"] + 0.25 * records[0]["commitment"]
    assert min(parts) <= total - rest <= max(parts)


def test_training_reduces_the_loss(tmp_path: Path, prepared: Path):
    trainer = build(tmp_path, prepared, tiny_config(max_steps=25, i_ddpcheck=None))
    trainer.run()
    losses = [r["mse_band"] for r in read_log(tmp_path / "run")]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


def poison(trainer: Trainer, steps: set[int]) -> None:
    """Make the loss of some steps infinite."""
    real = trainer.objective.losses

    def losses(model, batch):
        loss, logged = real(model, batch)
        factor = float("inf") if trainer.step + 1 in steps else 1.0
        return loss * factor, logged * factor

    trainer.objective.losses = losses


@pytest.mark.parametrize("use_ema_update", [False, True])
def test_a_step_that_overflows_leaves_no_trace(tmp_path: Path, prepared: Path, use_ema_update: bool):
    config = tiny_config(max_steps=3)
    config["models"]["vqvae"]["args"]["use_ema_update"] = use_ema_update
    trainer = build(tmp_path, prepared, config)
    poison(trainer, {2})
    seen = {}

    def remember(step: int) -> None:
        seen[step] = {name: t.clone() for name, t in trainer.model.state_dict().items()}
        averages = trainer.precision.weights(trainer.ema[0.99].average)
        seen[step, "ema"] = {name: t.clone() for name, t in averages.items()}
        seen[step, "usage"] = trainer.objective.usage.recent.clone()
        seen[step, "moments"] = [s["exp_avg"].clone() for s in trainer.optimizer.state.values()]

    trainer.run(max_steps=3, after_step=remember)
    for key in (1, (1, "ema")):
        other = 2 if key == 1 else (2, "ema")
        assert all(torch.equal(t, seen[other][name]) for name, t in seen[key].items())
    assert torch.equal(seen[1, "usage"], seen[2, "usage"])
    assert all(torch.equal(a, b) for a, b in zip(seen[1, "moments"], seen[2, "moments"]))
    assert not torch.equal(seen[2]["quantizer.codebook"], seen[3]["quantizer.codebook"])
    records = read_log(tmp_path / "run")
    assert records[1]["grad_norm"] is None and "perplexity" not in records[1] and "perplexity" in records[2]


@pytest.mark.parametrize("fused", [False, True])
def test_reading_a_step_while_the_next_is_at_work_changes_nothing(tmp_path: Path, prepared: Path, caplog, fused: bool):
    """As on a GPU: the same bits, with skipped steps, saving, and a run that goes on."""
    outcome = {}
    for late in (False, True):
        clipper = {"name": "AdaptiveGradClipper", "args": {"max_norm": 1.0, "buffer_size": 3, "clip_percentile": 60}}
        config = tiny_config(max_steps=14, i_save=4, i_log=3, i_ddpcheck=7, i_print=None, grad_clip=clipper)
        config["trainer"]["args"]["optimizer"]["args"]["fused"] = fused
        name = f"late_{late}"
        for stops in (9, None):  # the first is cut off after a step that was not saved, and goes on from step 8
            trainer = build(tmp_path, prepared, config, name)
            trainer.reads_late = late
            poison(trainer, {2, 3, 11})

            def stop(step: int, at=stops) -> None:
                if step == at:
                    raise KeyboardInterrupt

            if stops is None:
                assert trainer.step == 8 and trainer.run(after_step=stop) == 0
            else:
                with pytest.raises(KeyboardInterrupt):
                    trainer.run(after_step=stop)
        timed = ("step_s", "data_s")
        log = [{k: v for k, v in r.items() if k not in timed} for r in read_log(tmp_path / name)]
        outcome[late] = log, trainer.precision.weights(), trainer.ema[0.99].average
    assert [r["step"] for r in outcome[True][0]] == list(range(1, 15))
    assert [r["step"] for r in outcome[True][0] if r["grad_norm"] is None] == [2, 3, 11]
    assert outcome[False][0] == outcome[True][0]
    assert all(torch.equal(t, outcome[True][1][name]) for name, t in outcome[False][1].items())
    assert torch.equal(outcome[False][2], outcome[True][2])
    assert caplog.text.count("step 3: the gradient is not finite") == 2


def test_a_run_that_breaks_off_logs_the_steps_that_are_done(tmp_path: Path, prepared: Path, monkeypatch):
    """Bad data, and memory that runs out, in the fifth step, while the fourth has not been read."""
    def bad_data(trainer):
        raise InputError("shape x: broken")

    def no_memory(trainer):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    for name, failure, error in (("data", bad_data, "shape x"), ("memory", no_memory, "step 5: the device ran out")):
        trainer = build(tmp_path, prepared, tiny_config(i_log=None, i_ddpcheck=None), name)
        trainer.reads_late = True
        real = trainer.objective.losses

        def losses(*args, trainer=trainer, real=real, failure=failure):
            if trainer.step == 4:
                failure(trainer)
            return real(*args)

        trainer.objective.losses = losses
        with pytest.raises((InputError, OutOfDeviceMemory), match=error):
            trainer.run()
        assert [r["step"] for r in read_log(tmp_path / name)] == [1, 2, 3, 4]
    # figures that do not come are not waited for
    monkeypatch.setattr(base, "LAST_STEPS_S", 0.05)
    monkeypatch.setattr(base.OnTheWay, "arrived", lambda figures: False)
    trainer = build(tmp_path, prepared, tiny_config(i_log=None, i_ddpcheck=None), "stuck")
    trainer.reads_late = True
    with pytest.raises(ZeroDivisionError):
        trainer.run(after_step=lambda step: 1 // (3 - step))
    assert [r["step"] for r in read_log(tmp_path / "stuck")] == [1, 2]


def test_a_reason_to_stop_comes_before_giving_up(tmp_path: Path, prepared: Path):
    """SIGTERM while step after step is skipped: the tenth, launched meanwhile, does not keep it from saving."""
    trainer = build(tmp_path, prepared, tiny_config(max_steps=30, batch_size_per_gpu=1, i_log=None, i_ddpcheck=None))
    trainer.reads_late = True
    poison(trainer, set(range(3, 30)))

    def interrupt(step: int) -> None:
        if step == 10:
            signal.raise_signal(signal.SIGTERM)

    assert trainer.run(after_step=interrupt) == 143 and find_checkpoint(tmp_path / "run").step == 12


def test_a_signal_in_the_last_step_before_giving_up_saves(tmp_path: Path, prepared: Path):
    trainer = build(tmp_path, prepared, tiny_config(max_steps=30, batch_size_per_gpu=1))
    poison(trainer, set(range(3, 30)))

    def interrupt(step: int) -> None:
        if step == 11:
            signal.raise_signal(signal.SIGTERM)

    assert trainer.run(after_step=interrupt) == 143 and find_checkpoint(tmp_path / "run").step == 12


def test_a_signal_while_the_last_figures_are_waited_for_does_not_hide_the_error(tmp_path: Path, prepared, monkeypatch):
    trainer = build(tmp_path, prepared, tiny_config(i_log=2, i_ddpcheck=None))
    trainer.reads_late = True
    closed = []
    real = base.RunLog.close
    monkeypatch.setattr(base.RunLog, "close", lambda log: (closed.append(1), real(log)))

    def broken(step: int) -> None:
        if step == 3:
            monkeypatch.setattr(base.OnTheWay, "arrived", lambda figures: signal.raise_signal(signal.SIGINT) or True)
            raise InputError("shape x: broken")

    with pytest.raises(InputError, match="shape x"):
        trainer.run(after_step=broken)
    assert closed and [r["step"] for r in read_log(tmp_path / "run")] == [1, 2, 3]


def test_a_signal_is_heard_one_step_late_and_everything_is_saved(tmp_path: Path, prepared: Path):
    trainer = build(tmp_path, prepared, tiny_config(max_steps=30, i_log=None, i_ddpcheck=None))
    trainer.reads_late = True
    before = []

    def interrupt(step: int) -> None:
        before.append(len(read_log(tmp_path / "run")))
        if step == 5:
            signal.raise_signal(signal.SIGTERM)

    assert trainer.run(after_step=interrupt) == 143
    assert before == [0, 1, 2, 3, 4, 5, 6]  # lines in the log: each step's once the next has been launched
    assert [r["step"] for r in read_log(tmp_path / "run")] == list(range(1, 8))
    assert find_checkpoint(tmp_path / "run").step == 7


def test_float32_names_the_shapes_and_gives_up(tmp_path: Path, prepared: Path, caplog: pytest.LogCaptureFixture):
    trainer = build(tmp_path, prepared, tiny_config(max_steps=30, batch_size_per_gpu=1))
    poison(trainer, set(range(1, 100)))
    with pytest.raises(FloatingPointError, match="in 10 steps in a row"):
        trainer.run()
    assert "the gradient is not finite, no update; shapes ['shape" in caplog.text
    assert [r["step"] for r in read_log(tmp_path / "run")] == list(range(1, 11))


def test_giving_up_late_leaves_no_hole_in_the_log(tmp_path: Path, prepared: Path):
    trainer = build(tmp_path, prepared, tiny_config(max_steps=30, batch_size_per_gpu=1, i_log=None, i_ddpcheck=None))
    trainer.reads_late = True
    poison(trainer, set(range(3, 100)))
    with pytest.raises(FloatingPointError, match="step 12: no finite gradient in 10 steps in a row"):
        trainer.run()
    records = read_log(tmp_path / "run")
    assert [r["step"] for r in records] == list(range(1, 14))
    assert all({"step_s", "data_s", "lr", "grad_norm"} <= set(r) for r in records)


def test_reseeded_codes_lose_their_moments_and_averages_hold_the_codebook(tmp_path: Path, prepared: Path):
    config = tiny_config(max_steps=3)
    config["models"]["vqvae"]["args"]["reseed_after"] = 1000
    trainer = build(tmp_path, prepared, config)
    codebook = trainer.precision.parameters["quantizer.codebook"]
    real, rows = trainer.objective.commit, torch.tensor([3, 17])

    def commit(step: int, *given, **named):
        overwritten = real(step, *given, **named)
        if step == 3:
            with torch.no_grad():
                codebook[rows] = 7.0
            overwritten = {"quantizer.codebook": torch.zeros(32, dtype=torch.bool).index_fill(0, rows, True)}
        return overwritten

    trainer.objective.commit = commit
    trainer.run(max_steps=3)
    state = trainer.optimizer.state[trainer.precision.flat["apart"]]
    for key in ("exp_avg", "exp_avg_sq"):
        moments = trainer.precision.view("quantizer.codebook", state[key])
        assert moments.shape == codebook.shape and (moments[rows] == 0).all()
        assert (moments[[i for i in range(32) if i not in (3, 17)]] != 0).any()
    trainer.save()
    averages = load_weights(find_checkpoint(tmp_path / "run").ema["0.99"])
    assert torch.equal(averages["quantizer.codebook"], codebook) and (codebook[rows] == 7).all()
    name = "decoder.out_layer.weight"
    assert not torch.equal(averages[name], trainer.model.state_dict()[name])


def test_codes_move_at_every_tenth_of_their_patience(tmp_path: Path, prepared: Path):
    config = tiny_config(max_steps=60)
    config["models"]["vqvae"]["args"] |= {"reseed_after": 30, "num_embeddings": 500}
    trainer = build(tmp_path, prepared, config)
    real, moved = trainer.objective.commit, {}

    def commit(step: int, *given, **named):
        overwritten = real(step, *given, **named)
        moved[step] = int(overwritten["quantizer.codebook"].sum()) if overwritten else 0
        return overwritten

    trainer.objective.commit = commit
    trainer.run(max_steps=60)
    assert moved[30] and moved[33] and {step for step, codes in moved.items() if codes} <= set(range(30, 61, 3))


def test_resume_in_process_and_other_ema_rates(tmp_path: Path, prepared: Path, caplog: pytest.LogCaptureFixture):
    build(tmp_path, prepared, tiny_config(max_steps=2)).run()
    trainer = build(tmp_path, prepared, tiny_config(max_steps=3, ema_rate=[0.99, 0.5]))
    assert trainer.step == 2 and trainer.ema[0.99].updates == 2
    assert "ema_rate 0.5 is new" in caplog.text
    assert "trainer.args.max_steps, trainer.args.ema_rate" in caplog.text  # the config differs, and that is said
    assert trainer.run() == 0
    found = find_checkpoint(tmp_path / "run")
    assert found is not None and found.step == 3 and set(found.ema) == {"0.99", "0.5"}
    assert load_weights(found.ema["0.99"]).keys() == load_weights(found.model).keys()
    misc = load_misc(found)
    assert misc["sampler"] == {"seed": 0, "num_samples": 5, "epoch": 1, "offset": 1}


def test_choosing_checkpoints(tmp_path: Path, prepared: Path):
    config = tiny_config(max_steps=2, i_save=1)
    build(tmp_path, prepared, config).run()
    with pytest.raises(InputError, match=r"holds checkpoints of later steps \[1, 2\]"):
        build(tmp_path, prepared, config, ckpt="none")
    with pytest.raises(InputError, match=r"later steps \[2\]"):
        build(tmp_path, prepared, config, ckpt="1")
    elsewhere = build(tmp_path, prepared, config, "other", ckpt="1", load_dir=str(tmp_path / "run"))
    assert elsewhere.step == 1
    elsewhere.run()  # to step 2: going on from an older one of another folder would mix two histories
    for options in ({}, {"ckpt": "latest"}, {"ckpt": "1"}):
        (tmp_path / "run" / "ckpts" / "step0000002.json").unlink(missing_ok=True)
        with pytest.raises(InputError, match=r"--load_dir .* checkpoints of later steps \[2\].*drop both options"):
            build(tmp_path, prepared, config, "other", load_dir=str(tmp_path / "run"), **options)
    build(tmp_path, prepared, config).run()
    with pytest.raises(InputError, match="there is no valid checkpoint"):
        build(tmp_path, prepared, config, "third", load_dir=str(tmp_path / "nowhere"))
    config["models"]["vqvae"]["args"]["num_embeddings"] = 64
    with pytest.raises(InputError, match=r"quantizer.codebook is \[32, 8\], the model has \[64, 8\]"):
        build(tmp_path, prepared, config)


def test_settings_of_the_optimizer_are_the_configs(tmp_path: Path, prepared: Path, caplog: pytest.LogCaptureFixture):
    def config(**changes):
        args = {"lr": 1e-3, "weight_decay": 0.01, **changes}
        schedule = {"name": "StepLR", "args": {"step_size": 2, "gamma": 0.5}}
        optimizer = {"name": "AdamW", "args": args}
        return tiny_config(max_steps=4, optimizer=optimizer, lr_scheduler=schedule, i_save=3)

    build(tmp_path, prepared, config()).run(max_steps=None)
    (tmp_path / "run" / "ckpts" / "step0000004.json").unlink()
    same = build(tmp_path, prepared, config())
    assert same.step == 3 and same.optimizer.param_groups[0]["lr"] == 5e-4 and "settings that change" not in caplog.text
    other = build(tmp_path, prepared, config(lr=1e-6, weight_decay=0.5))
    group = other.optimizer.param_groups[0]
    assert group["lr"] == pytest.approx(5e-7) and group["weight_decay"] == 0.5
    assert "settings that change from this step on: lr: 0.001 -> 1e-06, weight_decay: 0.01 -> 0.5" in caplog.text
    other.run()
    assert read_log(tmp_path / "run")[-1]["lr"] == pytest.approx(5e-7)
    assert other.optimizer.param_groups[0]["lr"] == pytest.approx(2.5e-7)
    steps = config()
    steps["trainer"]["args"]["lr_scheduler"]["args"]["gamma"] = 0.1
    assert build(tmp_path, prepared, steps).scheduler.gamma == 0.1


def test_another_kind_of_optimizer_is_refused_and_another_clipper_is_not(tmp_path: Path, prepared: Path):
    build(tmp_path, prepared, tiny_config(max_steps=2, grad_clip=1.0)).run()
    clipper = {"name": "AdaptiveGradClipper", "args": {"max_norm": 1.0}}
    assert build(tmp_path, prepared, tiny_config(max_steps=3, grad_clip=clipper)).run() == 0
    assert build(tmp_path, prepared, tiny_config(max_steps=4)).run() == 0
    for name in ("SGD", "RMSprop", "Adagrad", "NAdam"):
        config = tiny_config(max_steps=5, optimizer={"name": name, "args": {"lr": 1e-3}})
        with pytest.raises(InputError, match=f"trained with optimizer AdamW, and trainer.args.optimizer is {name}"):
            build(tmp_path, prepared, config)
    config = tiny_config(max_steps=5, lr_scheduler={"name": "StepLR", "args": {"step_size": 2}})
    with pytest.raises(InputError, match="trained with lr_scheduler none, and trainer.args.lr_scheduler is StepLR"):
        build(tmp_path, prepared, config)


def test_a_try_leaves_a_run_as_it_was_trained(tmp_path: Path, prepared: Path):
    config = tiny_config(max_steps=2)
    build(tmp_path, prepared, config).run()
    before = (tmp_path / "run" / "config.json").read_bytes()
    config["trainer"]["args"]["seed"] = 5
    build(tmp_path, prepared, config, tryrun=True)
    assert (tmp_path / "run" / "config.json").read_bytes() == before
    config["models"]["vqvae"]["args"]["window_size"] = 2  # the weights fit, and would compute something else
    for options in ({}, {"tryrun": True}):
        with pytest.raises(InputError, match=r"models.vqvae.args.window_size must stay 8, with which .*, got 2"):
            build(tmp_path, prepared, config, **options)
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_ranks_that_found_different_steps_end(tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(build_module, "gather_objects", lambda step: [4, step])
    with pytest.raises(InputError, match=r"rank 0: 4, rank 1: none\); it must be one folder that all see"):
        build(tmp_path, prepared, tiny_config(max_steps=2))


def test_a_run_without_a_valid_checkpoint_is_not_started_anew(tmp_path: Path, prepared: Path):
    config = tiny_config(max_steps=2, i_save=1)
    build(tmp_path, prepared, config).run()
    run = tmp_path / "run"
    (run / "ckpts" / "vqvae_step0000001.safetensors").unlink()
    (run / "ckpts" / "misc_step0000002.pt").write_bytes(b"cut")
    before = (run / "log.txt").read_bytes()
    words = r"--ckpt latest: .*step0000002.json: misc_step0000002.pt has 3 bytes.*step0000001.json: vqvae_.* is missing"
    with pytest.raises(InputError, match=words + ".*another --output_dir"):
        build(tmp_path, prepared, config)
    with pytest.raises(InputError, match=words):
        build(tmp_path, prepared, config, "other", load_dir=str(run))
    with pytest.raises(InputError, match=r"later steps \[1, 2\].*another --output_dir"):
        build(tmp_path, prepared, config, ckpt="none")
    assert (run / "log.txt").read_bytes() == before
    assert build(tmp_path, prepared, config, "other", load_dir=str(run), ckpt="none").step == 0


def test_weights_to_start_from(tmp_path: Path, prepared: Path):
    build(tmp_path, prepared, tiny_config(max_steps=1)).run()
    found = find_checkpoint(tmp_path / "run")
    assert found is not None
    saved = load_weights(found.model)
    for i, spec in enumerate((str(found.model), {"vqvae": str(found.model)})):
        trainer = build(tmp_path, prepared, tiny_config(finetune_ckpt=spec), f"tune{i}")
        assert trainer.step == 0
        assert all(torch.equal(t, saved[name]) for name, t in trainer.model.state_dict().items())
    trainer = build(tmp_path, prepared, tiny_config(pretrained_vae_path=str(found.model)), "pretrained")
    assert bool(trainer.model.quantizer.initialized)
    averages = trainer.precision.weights(trainer.ema[0.99].average)
    assert all(torch.equal(t, saved[name]) for name, t in averages.items())
    config = tiny_config(pretrained_vae_path=str(found.model))
    config["models"]["vqvae"]["args"]["num_blocks"] = 2
    with pytest.raises(InputError, match='(?s)does not fit.*fits a config with .*"num_blocks": 1'):
        build(tmp_path, prepared, config, "bad")
    config["trainer"]["args"]["pretrained_partial"] = True
    partly = build(tmp_path, prepared, config, "partly").model.state_dict()
    assert torch.equal(partly["encoder.blocks.0.attn.to_qkv.weight"], saved["encoder.blocks.0.attn.to_qkv.weight"])
    for args, message in [
        ({"finetune_ckpt": str(tmp_path / "no.pt")}, "no such weights file"),
        ({"finetune_ckpt": {"vae": "x"}}, "must name 'vqvae'"),
        ({"pretrained_vae_path": str(tmp_path / "no.pth")}, "pretrained_vae_path: .*no.pth: no such file"),
        ({"finetune_ckpt": "a", "pretrained_vae_path": "b"}, "two sources"),
    ]:
        with pytest.raises(InputError, match=message):
            build(tmp_path, prepared, tiny_config(**args), "bad")
    config = tiny_config(finetune_ckpt=str(found.model))
    config["models"]["vqvae"]["args"]["latent_channels"] = 4
    with pytest.raises(InputError, match="size mismatch"):
        build(tmp_path, prepared, config, "bad")


def test_bad_data_is_named(tmp_path: Path):
    data = write_dataset(tmp_path / "data", 2)
    (data / "sparse_sdf" / "shape01_r64.npz").write_bytes(b"PK not a zip")
    trainer = build(tmp_path, data, tiny_config(codebook_init_samples=1, batch_size_per_gpu=2))
    with pytest.raises(InputError, match="shape01_r64.npz"):
        trainer.run()


def test_loader_processes_change_nothing(tmp_path: Path, prepared: Path):
    """Neither the codebook that training starts from, which they read shapes for, nor a step."""
    weights = []
    for workers in (0, 2):
        trainer = build(tmp_path, prepared, tiny_config(max_steps=2, num_workers=workers), f"workers{workers}")
        trainer.run()
        weights.append(trainer.model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_failed_save_ends_the_run_and_keeps_the_older(tmp_path: Path, prepared: Path, monkeypatch):
    trainer = build(tmp_path, prepared, tiny_config(max_steps=2, i_save=1))
    from trellis.trainers import checkpoint

    def fill_disk(step: int) -> None:
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))

    with pytest.raises(CheckpointError, match="step 2 was not written"):
        trainer.run(after_step=fill_disk)
    found = find_checkpoint(tmp_path / "run")
    assert found is not None and found.step == 1


def test_samples_do_not_move_training(tmp_path: Path, prepared: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.ERROR)
    weights, states = [], []
    for name, every in (("with", 1), ("without", None)):
        trainer = build(tmp_path, prepared, tiny_config(max_steps=2, i_sample=every), name)
        if every:
            def broken(model, dataset, folder):
                torch.rand(3)
                raise RuntimeError("no picture today")

            trainer.objective.write_samples = broken
        trainer.run()
        weights.append(trainer.precision.weights())
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    assert all(torch.equal(t, weights[1][name]) for name, t in weights[0].items())
    assert "no picture today" in caplog.text and "training goes on" in caplog.text


def test_epochs_end_training(tmp_path: Path, prepared: Path):
    trainer = build(tmp_path, prepared, tiny_config(max_steps=None, max_epoch=1))
    assert trainer.total_steps == 3
    assert build(tmp_path, prepared, tiny_config(max_steps=2, max_epoch=1), "b").total_steps == 2
    with pytest.raises(InputError, match="multiple of the 2 ranks"):
        args = replace(trainer.args, batch_size_per_gpu=None, batch_size=3)
        Trainer(args, trainer.objective, "vqvae", trainer.model, trainer.dataset, tmp_path, ranks=Ranks(0, 2),
                device=torch.device("cpu"), metadata={})


def test_summary_and_differences(tmp_path: Path, prepared: Path):
    build(tmp_path, prepared, tiny_config())
    text = (tmp_path / "run" / "vqvae_model_summary.txt").read_text()
    assert "quantizer.codebook" in text and "trained parameters" in text
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == tiny_config()
    assert differing_keys({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": None}) == ["a.c"]


@pytest.mark.parametrize("mode", ["inflat_all", "amp", "bf16"])
def test_number_formats_train_the_real_model(tmp_path: Path, prepared: Path, mode: str, monkeypatch):
    """What these modes do on CUDA, on a CPU: the losses are those of float32 within the format's precision."""
    monkeypatch.setattr(base, "mode_on_device", lambda mode, device: mode)
    losses = {}
    for fp16_mode in (None, mode):
        config = tiny_config(max_steps=4, fp16_mode=fp16_mode, optimizer={"name": "AdamW", "args": {"lr": 1e-4}})
        trainer = build(tmp_path, prepared, config, f"run_{fp16_mode}")
        if trainer.precision.scales_loss:  # below the first overflow: a skipped step would put the runs out of step
            trainer.precision.scale.log2.fill_(10.0)
        assert trainer.run() == 0
        losses[fp16_mode] = [r["mse_band"] for r in read_log(tmp_path / f"run_{fp16_mode}")]
        scales = [r.get("loss_scale") for r in read_log(tmp_path / f"run_{fp16_mode}")]
    assert losses[mode] == pytest.approx(losses[None], rel=0.03)
    assert scales[0] == (None if mode == "bf16" else 1024.0)
    weights = trainer.precision.weights()
    assert all(t.dtype == torch.float32 for t in weights.values() if t.is_floating_point())
    again = build(tmp_path, prepared, config, f"run_{mode}")
    assert again.step == 4 and all(torch.equal(t, weights[name]) for name, t in again.precision.weights().items())
    assert again.precision.state_dict() == trainer.precision.state_dict()
