"""Loading weights: every container and prefix, misfits, damage, and no unpickling."""

from __future__ import annotations

import pickle

import pytest
import torch
from safetensors.torch import save_file

from trellis.models.autoencoders.ss_vqvae import SparseSDFVQVAE
from trellis.models.pretrained import (
    PretrainedMismatch,
    from_pretrained,
    load_direct3d,
    read_state_dict,
    save_pretrained,
)


def model(seed=0, **changes):
    torch.manual_seed(seed)
    arguments = {"model_channels": 64, "latent_channels": 4, "num_blocks": 2, "num_embeddings": 8}
    return SparseSDFVQVAE(**{**arguments, **changes})


def published(seed=7, **changes):
    return {k: v.clone() for k, v in model(seed, **changes).state_dict().items() if not k.startswith("quantizer.")}


@pytest.mark.parametrize("suffix", [".ckpt", ".pth", ".safetensors"])
@pytest.mark.parametrize("prefix", ["", "vae.", "module.", "module.vae."])
def test_every_container_and_prefix_loads(tmp_path, suffix, prefix):
    weights = published()
    named = {prefix + k: v for k, v in weights.items()}
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(named, path)
    else:
        torch.save({"vae": named, "dit": {"other": torch.zeros(2)}} if suffix == ".ckpt" else named, path)
    target = model()
    codebook = target.quantizer.codebook.clone()
    report = load_direct3d(target, path)
    assert sorted(report.loaded) == sorted(weights) and not report.mismatched
    assert set(report.new) == {"quantizer.codebook", "quantizer.initialized", "quantizer.unused_steps"}
    for name, value in weights.items():
        assert torch.equal(target.state_dict()[name], value)
    assert torch.equal(target.quantizer.codebook, codebook)
    assert "new: quantizer.codebook" in report.text()


def test_a_misfit_changes_nothing_and_names_what_would_fit(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(published(latent_channels=6, num_blocks=3), path)
    target = model()
    before = {k: v.clone() for k, v in target.state_dict().items()}
    with pytest.raises(PretrainedMismatch) as caught:
        load_direct3d(target, path)
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())
    assert caught.value.report.refused and "nothing was loaded (pretrained_partial" in str(caught.value)
    assert f"{len(caught.value.report.loaded)} tensors would fit" in str(caught.value)
    assert "tensors loaded" not in str(caught.value)
    config = caught.value.report.fitting_config
    assert config == {"model_channels": 64, "latent_channels": 6, "num_blocks": 3}
    message = str(caught.value)
    assert "encoder.blocks.2.attn.to_out.bias" in message and "decoder.input_layer.weight" in message
    report = load_direct3d(target, path, partial=True)
    assert "encoder.input_layer.weight" in report.loaded and report.mismatched
    assert not report.refused and f"{len(report.loaded)} tensors loaded" in report.text()


def test_encoder_and_decoder_of_their_own_sizes_are_read_off_the_file(tmp_path):
    sizes = {"model_channels_encoder": 64, "model_channels_decoder": 128, "num_blocks_encoder": 1}
    save_file(published(num_blocks_decoder=2, **sizes), tmp_path / "w.safetensors")
    with pytest.raises(PretrainedMismatch) as caught:
        load_direct3d(model(), tmp_path / "w.safetensors")
    assert caught.value.report.fitting_config == {**sizes, "num_blocks_decoder": 2, "latent_channels": 4}
    assert not load_direct3d(model(**caught.value.report.fitting_config), tmp_path / "w.safetensors").mismatched


def test_a_foreign_file_is_a_misfit_even_when_all_may_be_left_out(tmp_path):
    odd = {"encoder.blocks.x": torch.zeros(2), "decoder.input_layer.weight": torch.zeros(()), "a": torch.zeros(3)}
    save_file(odd, tmp_path / "w.safetensors")
    for partial in (False, True):
        with pytest.raises(PretrainedMismatch, match="0 tensors would fit") as caught:
            load_direct3d(model(), tmp_path / "w.safetensors", partial=partial)
        assert "pretrained_partial" not in str(caught.value) and caught.value.report.fitting_config == {}


def trained(**changes):
    """A VQ-VAE whose codebook is no longer random, and its state."""
    source = model(7, **changes)
    source.quantizer.initialize(torch.randn(50, source.latent_channels))
    source.quantizer.unused_steps += 3
    return source, {name: value.clone() for name, value in source.state_dict().items()}


def test_a_gradient_codebook_starts_the_averages_of_a_model_that_keeps_some(tmp_path):
    source, state = trained()
    save_file(state, tmp_path / "w.safetensors")
    target = model(use_ema_update=True, reseed_after=0)
    report = load_direct3d(target, tmp_path / "w.safetensors")
    assert report.new == ["quantizer.ema_count", "quantizer.ema_sum"] and not report.mismatched
    before = source.quantizer.codebook.detach()
    rows = before[:1] + 0.1 * torch.randn(5, 4)
    nearest = target.quantizer(rows).ids
    counts = target.quantizer.commit(1).counts
    sums = torch.zeros(8, 4).index_add_(0, nearest, rows)
    expected = (0.99 * before + 0.01 * sums) / (0.99 + 0.01 * counts)[:, None]
    torch.testing.assert_close(target.quantizer.codebook, expected)
    moved = (target.quantizer.codebook - before).norm(dim=1)
    assert counts.sum() == 5 and (moved[counts > 0] > 1e-5).all() and (moved[counts == 0] < 1e-6).all()


def test_averages_in_a_file_are_a_misfit_for_a_model_that_keeps_none(tmp_path):
    source, state = trained(use_ema_update=True)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(PretrainedMismatch, match="quantizer.ema_sum: the model has no such tensor"):
        load_direct3d(model(), tmp_path / "w.safetensors")
    target = model()
    load_direct3d(target, tmp_path / "w.safetensors", partial=True)
    assert torch.equal(target.quantizer.codebook, source.quantizer.codebook) and target.quantizer.initialized
    assert (target.quantizer.unused_steps == 3).all()


@pytest.mark.parametrize("changes", [{"num_embeddings": 9}, {"latent_channels": 6}])
def test_nothing_of_a_codebook_that_does_not_fit_is_taken(tmp_path, changes):
    """Above all not that it is initialised: k-means is still to come."""
    save_file(trained(use_ema_update=True)[1], tmp_path / "w.safetensors")
    target = model(use_ema_update=True, **changes)
    before = {k: v.clone() for k, v in target.state_dict().items() if k.startswith("quantizer.")}
    report = load_direct3d(target, tmp_path / "w.safetensors", partial=True)
    assert not [name for name in report.loaded if name.startswith("quantizer.")]
    assert "quantizer.initialized: the state of a codebook that is not loaded" in report.mismatched
    assert all(torch.equal(target.state_dict()[name], value) for name, value in before.items())
    assert not target.quantizer.initialized


def test_two_names_for_a_tensor_are_refused(tmp_path):
    torch.save({"vae.x": torch.zeros(2), "x": torch.ones(2)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w.pth: a tensor must have one name, got 'vae.x' and 'x' for 'x'"):
        read_state_dict(tmp_path / "w.pth")


def test_a_missing_tensor_is_a_misfit(tmp_path):
    weights = published()
    del weights["decoder.out_layer.bias"]
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(PretrainedMismatch, match="decoder.out_layer.bias: not in the file"):
        load_direct3d(model(), tmp_path / "w.safetensors")


def test_values_that_are_not_finite_are_a_misfit(tmp_path):
    weights = published()
    weights["decoder.out_layer.bias"] += float("nan")
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(PretrainedMismatch, match="not finite"):
        load_direct3d(model(), tmp_path / "w.safetensors")


class Evil:
    def __reduce__(self):
        return (print, ("unpickled",))


def test_damaged_and_foreign_files_are_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="no such file"):
        read_state_dict(tmp_path / "none.pth")
    for name in ("w.pth", "w.safetensors"):
        whole = tmp_path / f"whole_{name}"
        save_file(published(), whole) if name.endswith("safetensors") else torch.save(published(), whole)
        (tmp_path / name).write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        with pytest.raises(ValueError, match="not a readable weights file"):
            read_state_dict(tmp_path / name)
    with open(tmp_path / "evil.pth", "wb") as stream:
        pickle.dump({"vae": Evil()}, stream)
    with pytest.raises(ValueError, match="not a readable weights file"):
        read_state_dict(tmp_path / "evil.pth")
    assert "unpickled" not in capsys.readouterr().out
    (tmp_path / "w.txt").write_text("x")
    with pytest.raises(ValueError, match="weights must be"):
        read_state_dict(tmp_path / "w.txt")
    torch.save({"step": 3}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match="holds no tensors"):
        read_state_dict(tmp_path / "empty.pth")


def test_published_folder_round_trip(tmp_path):
    source = model(use_ema_update=True)
    save_pretrained(source, tmp_path / "m")
    again = from_pretrained(tmp_path / "m")
    assert not again.training
    for name, value in source.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    (tmp_path / "m" / "config.json").write_text('{"name": "SparseSDFVQVAE", "args": {"chanels": 3}}')
    with pytest.raises(ValueError, match="chanels"):
        from_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="config.json"):
        from_pretrained(tmp_path)
