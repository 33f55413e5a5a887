"""Training through recorded passes, with a stand-in for the card: flat weights, and the loss within the pass."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from training_cases import ROOT, read_log, tiny_config, write_config

from trellis.models.autoencoders import pass_graphs
from trellis.models.autoencoders.flat_weights import FlatWeights
from trellis.models.autoencoders.pass_graphs import PassGraphs
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
        assert trainer.model._flat is trainer.precision.flat_weights
        assert all(p.grad is None for p in trainer.model.parameters())
    exact = mode is None
    for a, b in zip(logs[False], logs[True], strict=True):
        for key in ("loss", "mse_band", "mse_extra", "vq", "commitment", "grad_norm", "codes_used"):
            assert b[key] == pytest.approx(a[key], rel=1e-4 if exact else 0.05), (a["step"], key)


def flat_model() -> tuple[SparseSDFVQVAE, Precision]:
    model = model_of(backend="cpu")
    precision = Precision(model, None, apart=lambda name: name.startswith("quantizer."))
    model.use_flat_weights(precision.flat_weights)
    return model, precision


def test_flat_gradients_are_those_of_the_parameters(monkeypatch):
    monkeypatch.setattr(pass_graphs, "SIGHTINGS", {True: 1, False: 1})
    plain, batch = model_of(backend="cpu").train(), spheres([0.42])
    loss_of(plain(batch)).backward()
    model, precision = flat_model()
    monkeypatch.setattr(SparseSDFVQVAE, "_may_graph", lambda self: True)
    model._graphs = PassGraphs(Repeater)
    model.train()
    precision.gradient.fill_(float("nan"))  # of a step before
    for first in (True, False):
        loss_of(model(batch)).backward()
        assert all(p.grad is None for p in model.parameters())
        assert all(leaf.grad is not None for leaf in precision.flat_weights.leaves)
        precision.collect(first=first)
    assert all(leaf.grad is None for leaf in precision.flat_weights.leaves)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(precision.gradients[name], 2 * parameter.grad, rtol=1e-4, atol=1e-5)
    total = sum(float(g.square().sum()) for g in precision.gradients.values())
    assert float(precision.gradient.square().sum()) == pytest.approx(total, rel=1e-5)  # nothing in the gaps


def test_flat_weights_are_views_of_the_parameters_until_the_model_moves():
    model, precision = flat_model()
    flat = precision.flat_weights
    assert flat.hold(model) and model._flat is flat
    views = flat.by_name(flat.leaves)
    assert set(views) == flat.names == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert views[name].data_ptr() == parameter.data_ptr() and torch.equal(views[name], parameter)
    copied = copy.deepcopy(model)
    assert copied._flat is None and len(copied._weights()) == len(list(copied.parameters())) + 2
    assert len(model._weights()) == 2 + 2
    model.double()
    assert not flat.hold(model) and len(model._weights()) > 10 and model._flat is None


def test_a_layout_with_gaps():
    leaf = torch.arange(12.0).requires_grad_()
    flat = FlatWeights([leaf], [[("a", 1, torch.Size([2, 2])), ("b", 5, torch.Size([])), ("c", 8, torch.Size([3]))]])
    views = flat.by_name([leaf])
    assert views["a"].tolist() == [[1, 2], [3, 4]] and views["b"] == 5 and views["c"].tolist() == [8, 9, 10]
    (grad,) = torch.autograd.grad(views["a"].sum() + 2 * views["c"].sum(), leaf)
    assert grad.tolist() == [0, 1, 1, 1, 1, 0, 0, 0, 2, 2, 2, 0]


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
        assert trainer.model._flat is trainer.precision.flat_weights
    for a, b in zip(logs[False], logs[True], strict=True):
        for key in ("loss", "mse_band", "mse_extra", "vq", "commitment", "grad_norm"):
            assert b[key] == pytest.approx(a[key], rel=0.05), (a["step"], key)
