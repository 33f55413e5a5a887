"""Training through recorded passes, with a stand-in for the card: flat weights, and the loss within the pass."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from training_cases import ROOT, read_log, tiny_config, write_config

from trellis.datasets.sparse_sdf import window_sizes
from trellis.models.autoencoders import pass_graphs
from trellis.models.autoencoders.flat_weights import FlatWeights
from trellis.models.autoencoders.pass_graphs import PassGraphs
from trellis.models.autoencoders.pass_head import Head
from trellis.models.autoencoders.ss_vqvae import SparseSDFVQVAE
from trellis.trainers import base
from trellis.trainers.build import RunOptions, build_trainer
from trellis.trainers.precision import Precision
from trellis.utils.dist_utils import Ranks

sys.path.append(str(ROOT / "tests" / "models"))
from pass_cases import Repeater, loss_of, model_of, spheres


@pytest.mark.parametrize("mode", [None, "inflat_all", "bf16"])
@pytest.mark.parametrize("use_ema_update", [False, True])
def test_training_through_recorded_passes_is_training(tmp_path: Path, prepared, monkeypatch, mode, use_ema_update):
    """The same losses as without, with batches of sizes that have no recording among them, in micro-batches."""
    monkeypatch.setattr(base, "mode_on_device", lambda mode, device: mode)
    monkeypatch.setattr(pass_graphs, "SIGHTINGS", {True: 2, False: 2})
    config = tiny_config(max_steps=12, fp16_mode=mode, batch_size_per_gpu=3, batch_split=2, i_ddpcheck=None)
    config["models"]["vqvae"]["args"] |= {"use_ema_update": use_ema_update, "backend": "cpu"}
    config["trainer"]["args"]["optimizer"]["args"]["lr"] = 1e-4
    logs = {}
    for recorded in (False, True):
        monkeypatch.setattr(SparseSDFVQVAE, "_may_graph", lambda self, recorded=recorded: recorded)
        path = write_config(tmp_path / "c.json", config)
        run = tmp_path / str(recorded)
        options = RunOptions(config=str(path), output_dir=str(run), data_dir=str(prepared), device="cpu")
        trainer = build_trainer(options, Ranks(), torch.device("cpu"))
        trainer.model._graphs = PassGraphs(Repeater)
        if trainer.precision.scale is not None:
            trainer.precision.scale.log2.fill_(8.0)
        assert trainer.run() == 0
        logs[recorded] = read_log(run)
        hits, misses = trainer.model._graphs.hits, trainer.model._graphs.misses
        assert hits >= 10 and misses > 0 if recorded else hits == misses == 0
        assert trainer.model._flat.flat is trainer.precision.flat_weights
        assert all(p.grad is None for p in trainer.model.parameters())
    exact = mode is None
    for a, b in zip(logs[False], logs[True], strict=True):
        for key in ("loss", "mse_band", "mse_extra", "vq", "commitment", "grad_norm", "codes_used"):
            assert b[key] == pytest.approx(a[key], rel=1e-4 if exact else 0.05), (a["step"], key)


def rows_of(out: dict, batch: dict) -> dict:
    """A loss by blocks."""
    error = (out["sdf"] - batch["block_sdf"].float()).square().mean(1)
    return {"rows": error + out["commitment_rows"] + out["codebook_rows"]}


def flat_model() -> tuple[SparseSDFVQVAE, Precision]:
    model = model_of(backend="cpu")
    precision = Precision(model, None, apart=lambda name: name.startswith("quantizer."))
    model.use_flat_weights(precision.flat_weights)
    return model, precision


def recorded_model(monkeypatch) -> tuple[SparseSDFVQVAE, Precision]:
    """One with flat weights, which records every pass at its first batch."""
    monkeypatch.setattr(pass_graphs, "SIGHTINGS", {True: 1, False: 1})
    monkeypatch.setattr(SparseSDFVQVAE, "_may_graph", lambda self: True)
    model, precision = flat_model()
    model._graphs = PassGraphs(Repeater)
    return model.train(), precision


def test_flat_gradients_are_those_of_the_parameters(monkeypatch):
    plain, batch = model_of(backend="cpu").train(), spheres([0.42])
    rows_of(plain(batch), batch)["rows"].sum().backward()
    model, precision = recorded_model(monkeypatch)
    precision.gradient.fill_(float("nan"))  # of a step before
    head = Head(rows_of)
    for first in (True, False):
        model(batch, head)["rows"].sum().backward()
        assert all(p.grad is None for p in model.parameters())
        assert all(leaf.grad is not None for leaf in precision.flat_weights.leaves)
        precision.collect(first=first)
    assert all(leaf.grad is None for leaf in precision.flat_weights.leaves)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(precision.gradients[name], 2 * parameter.grad, rtol=1e-4, atol=1e-5)
    total = sum(float(g.square().sum()) for g in precision.gradients.values())
    assert float(precision.gradient.square().sum()) == pytest.approx(total, rel=1e-5)  # nothing in the gaps


def test_flat_weights_are_views_of_the_parameters_until_the_model_changes():
    model, precision = flat_model()
    flat = precision.flat_weights
    views = dict(zip(flat.names, flat.views(flat.leaves), strict=True))
    assert set(views) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert views[name].data_ptr() == parameter.data_ptr() and torch.equal(views[name], parameter)
    copied = copy.deepcopy(model)
    assert copied._flat is None and len(copied._weights()[0]) == len(list(copied.parameters())) + 2
    assert len(model._weights()[0]) == 2 + 2
    names = [name for name, _ in model.named_parameters()]
    middle = names[len(names) // 2]
    changes = {
        "moved": lambda m: m.double(),
        "converted and back": lambda m: m.encoder.blocks.double().float(),
        "a part replaced": lambda m: m.encoder.blocks.__setitem__(0, copy.deepcopy(m.encoder.blocks[0])),
        "assigned": lambda m: m.load_state_dict({middle: m.state_dict()[middle] + 1}, strict=False, assign=True),
        "frozen": lambda m: m.get_parameter(middle).requires_grad_(False),
        "wrapped": lambda m: setattr(m.decoder, "out_layer", torch.nn.Sequential(m.decoder.out_layer)),
        "added": lambda m: m.encoder.register_parameter("more", torch.nn.Parameter(torch.zeros(1))),
    }
    for what, change in changes.items():
        model, _ = flat_model()
        assert model._flat.holds()
        change(model)
        assert len(model._weights()[0]) > 10 and model._flat is None, what


def test_a_model_with_flat_weights_trains_in_another_loop_too(monkeypatch):
    model, precision = recorded_model(monkeypatch)
    plain, batch = model_of(backend="cpu", cuda_graphs=False).train(), spheres([0.42])
    for _ in range(2):
        loss_of(model(batch)).backward()
        loss_of(model._train_pyramid(model.build_pyramid(batch)))
        loss_of(plain._train_pyramid(plain.build_pyramid(batch))).backward()
        with torch.no_grad():
            model.encode(batch)
    assert model._graphs.hits >= 2 and model._flat is None
    assert all(leaf.grad is None for leaf in precision.flat_weights.leaves)
    for a, b in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def test_a_head_needs_blocks():
    with pytest.raises(ValueError, match="got sparse_sdf, sparse_index"):
        model_of(backend="cpu")({"sparse_sdf": None, "sparse_index": None}, Head(rows_of))


def test_a_batch_that_is_not_finite_spoils_no_other(monkeypatch):
    """What it left in the rows that fill a smaller batch up is not read."""
    model, precision = recorded_model(monkeypatch)
    head = Head(rows_of)
    large = spheres([0.42], 64)
    small = {key: large[key][:-9] for key in ("block_coords", "block_sdf", "active")}
    levels = [small["active"].view(len(small["active"]), -1, n).any(2) for n in (1, 8, 64, 512)]
    small |= {
        "blocks_per_sample": large["blocks_per_sample"] - 9, "resolution": 64,
        "level_sizes": [int(level.sum()) for level in levels],
        "window_sizes": window_sizes(small["block_coords"][:, 1:].numpy()),
    }
    model(large, head)["rows"].sum().backward()
    precision.drop()
    bad = {**large, "block_sdf": large["block_sdf"].clone()}
    bad["block_sdf"][-1] = float("nan")
    model(bad, head)["rows"].sum().backward()
    precision.collect(first=True)
    assert not precision.gradient.isfinite().all()
    hits = model._graphs.hits
    model(small, head)["rows"].sum().backward()
    precision.collect(first=True)
    assert model._graphs.hits > hits and precision.gradient.isfinite().all()


def test_a_layout_with_gaps():
    leaf = torch.arange(12.0).requires_grad_()
    flat = FlatWeights([leaf], [[("a", 1, torch.Size([2, 2])), ("b", 5, torch.Size([])), ("c", 8, torch.Size([3]))]])
    a, b, c = flat.views([leaf])
    assert flat.names == ["a", "b", "c"] and a.tolist() == [[1, 2], [3, 4]] and b == 5 and c.tolist() == [8, 9, 10]


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["inflat_all", "amp", "bf16"])
def test_training_through_graphs_on_the_card_is_training(tmp_path: Path, prepared, monkeypatch, cuda_device, mode):
    monkeypatch.setattr(pass_graphs, "SIGHTINGS", {True: 2, False: 2})
    config = tiny_config(max_steps=12, fp16_mode=mode, batch_size_per_gpu=3, batch_split=2, i_ddpcheck=None)
    config["models"]["vqvae"]["args"]["model_channels"] = 128
    config["trainer"]["args"]["optimizer"]["args"]["lr"] = 1e-4
    logs = {}
    for recorded in (False, True):
        config["models"]["vqvae"]["args"]["cuda_graphs"] = recorded
        path = write_config(tmp_path / "c.json", config)
        run = tmp_path / str(recorded)
        options = RunOptions(config=str(path), output_dir=str(run), data_dir=str(prepared), device="cuda")
        trainer = build_trainer(options, Ranks(), torch.device(cuda_device, 0))
        if trainer.precision.scale is not None:
            trainer.precision.scale.log2.fill_(8.0)
        assert trainer.run() == 0
        logs[recorded] = read_log(run)
        assert (trainer.model._graphs.hits >= 10) is recorded
        assert trainer.model._flat.flat is trainer.precision.flat_weights
    for a, b in zip(logs[False], logs[True], strict=True):
        for key in ("loss", "mse_band", "mse_extra", "vq", "commitment", "grad_norm"):
            assert b[key] == pytest.approx(a[key], rel=0.05), (a["step"], key)
