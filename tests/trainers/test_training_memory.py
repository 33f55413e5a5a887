"""Batches that would not fit: divided, or refused with the shape's name, before the device sees them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from training_cases import ellipsoid_blocks, read_log, tiny_config, write_config, write_dataset

from trellis.config import InputError
from trellis.datasets.sparse_sdf import collate, sample_from_blocks
from trellis.models.autoencoders.ss_vqvae import SparseSDFVQVAE
from trellis.trainers.build import RunOptions, build_trainer
from trellis.trainers.loader import split_and_collate
from trellis.trainers.memory import MemoryLimit, OutOfDeviceMemory, out_of_memory
from trellis.trainers.run import train_rank
from trellis.trainers.vae import sparse_sdf_vqvae
from trellis.trainers.vae.memory import bytes_per_block, sample_bytes
from trellis.utils.dist_utils import Ranks


def build(tmp_path: Path, data: Path, name: str, **trainer_args):
    path = write_config(tmp_path / f"{name}.json", tiny_config(**trainer_args))
    options = RunOptions(config=str(path), output_dir=str(tmp_path / name), data_dir=str(data), device="cpu")
    return build_trainer(options, Ranks(), torch.device("cpu"))


def samples(count: int) -> list[dict]:
    return [sample_from_blocks(ellipsoid_blocks((5.0 + i, 6.0, 6.0)), sha256=f"s{i}") for i in range(count)]


def test_a_batch_is_divided_within_the_limit_and_order_stays():
    batch = samples(5)
    costs = [sample_bytes(sample, bytes_per_block=10) for sample in batch]
    limit = MemoryLimit(lambda sample: sample_bytes(sample, bytes_per_block=10), costs[0] + costs[1])
    for parts in (1, 2):
        pieces = split_and_collate(batch, parts=parts, collate=collate, limit=limit)
        assert [name for piece in pieces for name in piece["sha256"]] == [f"s{i}" for i in range(5)]
        assert len(pieces) >= 3
        assert all(10 * len(piece["block_coords"]) <= limit.limit_bytes for piece in pieces)
    unlimited = MemoryLimit(limit.cost, None)
    assert len(split_and_collate(batch, parts=2, collate=collate, limit=unlimited)) == 2


def test_dividing_changes_only_rounding(tmp_path: Path, prepared: Path):
    sgd = {"name": "SGD", "args": {"lr": 0.05}}
    common = {"batch_size_per_gpu": 4, "max_steps": 2, "optimizer": sgd}
    whole = build(tmp_path, prepared, "whole", **common)
    largest = max(whole.memory_limit().cost(whole.dataset[0, i]) for i in range(5))
    split = build(tmp_path, prepared, "split", **common, max_memory_gb=1.01 * largest / 1e9)
    for trainer in (whole, split):
        assert trainer.run() == 0
    for a, b in zip(read_log(tmp_path / "whole"), read_log(tmp_path / "split"), strict=True):
        for key in ("loss", "vq", "grad_norm", "perplexity"):
            assert b[key] == pytest.approx(a[key], rel=2e-5), key


def test_shapes_that_cannot_fit_are_refused_before_the_first_step(tmp_path: Path, prepared: Path):
    trainer = build(tmp_path, prepared, "small", max_memory_gb=1e-4)
    with pytest.raises(InputError, match=r"shape shape0\d needs about .* GB .*max_points.*4 more shapes are too large"):
        trainer.run()
    assert read_log(tmp_path / "small") == []


def test_a_shape_of_unknown_size_is_refused_when_it_is_read(tmp_path: Path):
    data = write_dataset(tmp_path / "data", 2)
    (data / "metadata.csv").unlink()
    trainer = build(tmp_path, data, "flat", max_memory_gb=1e-4)
    with pytest.raises(InputError, match=r"shape shape0\d needs about"):
        trainer.run()


def test_more_voxels_than_int32_counts_are_refused_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path, prepared):
    assert sparse_sdf_vqvae.MAX_BLOCKS * 512 < 2**31 <= (sparse_sdf_vqvae.MAX_BLOCKS + 1) * 512
    objective = build(tmp_path, prepared, "run").objective
    batch = collate(samples(2))
    objective.check_batch(batch)
    monkeypatch.setattr(sparse_sdf_vqvae, "MAX_BLOCKS", int(batch["blocks_per_sample"].sum()) - 1)
    with pytest.raises(ValueError, match=r"shape s\d: a micro-batch must have at most .* int32"):
        objective.check_batch(batch)


def test_the_estimate_grows_with_what_is_kept():
    base = {**SparseSDFVQVAE(model_channels=64, num_blocks=4, num_embeddings=8).config, "model_channels": 512}
    half = bytes_per_block(base, "bf16")
    assert bytes_per_block(base, None) > 1.5 * half
    assert bytes_per_block({**base, "use_checkpoint": True}, "bf16") < 0.8 * half
    assert bytes_per_block({**base, "num_blocks_encoder": 8}, "bf16") > 1.2 * half
    assert bytes_per_block({**base, "model_channels_decoder": 1024}, "bf16") > 1.5 * half
    assert bytes_per_block({**base, "model_channels_encoder": 512, "num_blocks_decoder": 4}, "bf16") == half


def test_running_out_of_memory_is_one_message(tmp_path: Path, prepared: Path, monkeypatch, caplog):
    path = write_config(tmp_path / "c.json", tiny_config())
    options = RunOptions(config=str(path), output_dir=str(tmp_path / "r"), data_dir=str(prepared), device="cpu")

    def losses(self, model, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has ...")

    monkeypatch.setattr(sparse_sdf_vqvae.SparseSDFVQVAEObjective, "losses", losses)
    assert train_rank(options) == 1
    assert "step 1: the device ran out of memory" in caplog.text and "max_points" in caplog.text
    assert "shape0" in caplog.text and "Traceback" not in caplog.text
    assert "Tried" not in str(out_of_memory(1, [], torch.device("cpu"), "CUDA out of memory. Tried"))


def out_of_memory_once(trainer, at_call: int, recorded: list[int], monkeypatch) -> None:
    """Let a backward pass run out of memory when its gradients are there; `recorded` holds the bytes of graphs."""
    backward, calls = trainer.precision.backward, []

    def failing(loss):
        backward(loss)
        calls.append(1)
        if len(calls) == at_call:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(trainer.precision, "backward", failing)
    monkeypatch.setattr(SparseSDFVQVAE, "graph_bytes", property(lambda model: sum(recorded)))
    monkeypatch.setattr(SparseSDFVQVAE, "release_graphs", lambda model: recorded.clear())


@pytest.mark.parametrize("use_ema_update", [False, True])
def test_recorded_passes_give_way_to_a_backward_pass(tmp_path, prepared, use_ema_update, monkeypatch, caplog):
    """The step is repeated without a trace: the same bits as one that had the memory."""
    weights, logs = [], []
    for name in ("roomy", "tight"):
        config = tiny_config(batch_size_per_gpu=4, batch_split=2, max_steps=3)
        config["models"]["vqvae"]["args"]["use_ema_update"] = use_ema_update
        path = write_config(tmp_path / f"{name}.json", config)
        options = RunOptions(config=str(path), output_dir=str(tmp_path / name), data_dir=str(prepared), device="cpu")
        trainer = build_trainer(options, Ranks(), torch.device("cpu"))
        recorded = [10**9]
        if name == "tight":
            out_of_memory_once(trainer, at_call=4, recorded=recorded, monkeypatch=monkeypatch)  # step 2, its second
        assert trainer.run() == 0
        weights.append(trainer.precision.weights())
        timed = ("step_s", "data_s")
        logs.append([{k: v for k, v in r.items() if k not in timed} for r in read_log(tmp_path / name)])
    assert logs[0] == logs[1]
    assert all(torch.equal(t, weights[1][name]) for name, t in weights[0].items())
    assert recorded == [] and not trainer.model.cuda_graphs
    assert caplog.text.count("no CUDA graphs from here on: a step ran out of memory beside their 1.0 GB") == 1


def test_without_recorded_passes_nothing_is_repeated(tmp_path, prepared, monkeypatch):
    trainer = build(tmp_path, prepared, "full")
    out_of_memory_once(trainer, at_call=1, recorded=[], monkeypatch=monkeypatch)
    with pytest.raises(OutOfDeviceMemory, match="step 1: the device ran out of memory"):
        trainer.run()
