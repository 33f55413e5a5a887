"""SparseSDFVQVAE: the fused paths, both batch forms, checkpointing, arguments."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from trellis.models.autoencoders.ss_vqvae import SparseSDFVQVAE
from trellis.modules.sparse.morton import packed_keys, slot_positions


def small_model(**changes):
    torch.manual_seed(0)
    arguments = {"model_channels": 64, "latent_channels": 4, "num_blocks": 2, "num_embeddings": 16}
    return SparseSDFVQVAE(**{**arguments, **changes})


def sphere_batch(resolution=32, radii=(0.3, 0.4)):
    """Analytic spheres in block form, computed here."""
    side = resolution // 8
    offsets = slot_positions(8)
    coords, values = [], []
    for sample, radius in enumerate(radii):
        cells = torch.stack(torch.meshgrid(*[torch.arange(side)] * 3, indexing="ij"), -1).view(-1, 3)
        centre = (cells[:, None] * 8 + offsets + 0.5) / resolution - 0.5
        sdf = ((centre.norm(dim=-1) - radius) * resolution / 4).clamp(-1, 1).half()
        keep = (sdf.abs() < 1).any(1)
        coords.append(torch.cat([torch.full((int(keep.sum()), 1), sample), cells[keep]], 1))
        values.append(sdf[keep])
    coords, values = torch.cat(coords), torch.cat(values)
    order = torch.argsort(packed_keys(coords))
    coords, values = coords[order].int(), values[order]
    return {"block_coords": coords, "block_sdf": values, "active": values.abs() < 1}


def by_coordinate(coords, values):
    order = np.lexsort(np.asarray(coords, np.int64).T[::-1])
    return np.asarray(coords, np.int64)[order], np.asarray(values)[order]


def test_quantizer_keys_are_pinned():
    plain = {k for k in small_model().state_dict() if k.startswith("quantizer.")}
    assert plain == {"quantizer.codebook", "quantizer.initialized", "quantizer.unused_steps"}
    ema = {k for k in small_model(use_ema_update=True).state_dict() if k.startswith("quantizer.")}
    assert ema == plain | {"quantizer.ema_count", "quantizer.ema_sum"}
    assert small_model().state_dict()["quantizer.codebook"].shape == (16, 4)


def test_fused_and_plain_paths_agree_in_values_and_all_gradients():
    model = small_model().double()
    batch = sphere_batch()
    batch["block_sdf"] = batch["block_sdf"].double()
    gradients = []
    for fused in (True, False):
        model.fused = fused
        model.zero_grad()
        out = model(batch)
        loss = F.mse_loss(out["sdf"], batch["block_sdf"]) + out["commitment_rows"].mean() + out["codebook_rows"].mean()
        loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()} | {"sdf": out["sdf"].detach()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[0].items():
        torch.testing.assert_close(value, gradients[1][name], rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    silent = [n for n, g in gradients[0].items() if not g.any()]
    assert silent == []


def test_samples_of_a_batch_do_not_touch_each_other():
    model = small_model().eval()
    both, first = sphere_batch(radii=(0.3, 0.4)), sphere_batch(radii=(0.3,))
    n = first["block_coords"].shape[0]
    with torch.no_grad():
        together, alone = model(both), model(first)
    torch.testing.assert_close(together["latent"][:n], alone["latent"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together["sdf"][:n], alone["sdf"], rtol=1e-4, atol=1e-5)


def test_flat_and_block_form_encode_alike():
    model = small_model().eval()
    batch = sphere_batch()
    pyramid = model.build_pyramid(batch)
    grid = pyramid.grids[0]
    rows = {
        "sparse_index": grid.coords[:, 1:],
        "batch_idx": grid.coords[:, 0],
        "sparse_sdf": batch["block_sdf"].reshape(-1)[grid.slots].float()[:, None],
    }
    with torch.no_grad():
        a, b = model.encode(batch), model.encode(rows)
    assert torch.equal(a["coords"], b["coords"])
    torch.testing.assert_close(a["mean"], b["mean"])
    with pytest.raises(ValueError, match="missing: \\['batch_idx'\\]"):
        model.encode({k: rows[k] for k in ("sparse_index", "sparse_sdf")})


def test_decode_ids_equals_the_forward_pass():
    model = small_model().eval()
    batch = sphere_batch()
    with torch.no_grad():
        out = model(batch)
        sdf, coords = model.decode_ids(out["ids"], batch["block_coords"])
        torch.testing.assert_close(sdf.view(-1, 512), out["sdf"])
        shuffle = torch.randperm(len(out["ids"]))
        other, other_coords = model.decode_ids(out["ids"][shuffle], batch["block_coords"][shuffle])
    assert len(torch.unique(coords, dim=0)) == len(coords) == 512 * len(shuffle)
    got = by_coordinate(other_coords, other)
    expected = by_coordinate(coords, sdf)
    assert np.array_equal(got[0], expected[0])
    np.testing.assert_allclose(got[1], expected[1], atol=1e-5)


def test_checkpointing_changes_nothing_but_what_is_kept_and_counts_statistics_once():
    batch = sphere_batch()
    results, kept = [], []
    for use_checkpoint in (False, True):
        model = small_model(use_checkpoint=use_checkpoint)
        sizes = []

        def keep(tensor, sizes=sizes):
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = model(batch)
        out["sdf"].square().mean().backward()
        counts = model.quantizer.commit(1).counts
        results.append((out["sdf"].detach(), model.encoder.input_layer.weight.grad, counts))
        kept.append(sum(sizes))
    for got, expected in zip(*results):
        torch.testing.assert_close(got, expected)
    assert counts.sum() == batch["block_coords"].shape[0]
    rows, channels = batch["block_coords"].shape[0], 64
    # a block keeps at least queries, keys, values and the MLP before and after its GELU (3 + 4 + 4 times its input,
    # float32), and with the flag only its input; two blocks in each of encoder and decoder
    assert kept[0] - kept[1] > 4 * (3 + 4 + 4) * rows * channels * 4


def test_encoder_does_not_start_on_one_code():
    model = small_model(num_embeddings=64)
    batch = sphere_batch()
    model.initialize_codebook([batch], seed=0)
    assert model.quantizer.initialized
    assert len(torch.unique(model(batch)["ids"])) > 16


def test_half_precision_stays_near_float32():
    model = small_model().eval()
    batch = sphere_batch()
    with torch.no_grad():
        expected = model.encode(batch)["mean"]
        model.set_compute_dtype(torch.bfloat16)
        rough = model.encode(batch)["mean"]
    assert rough.dtype == torch.float32
    assert (rough - expected).norm() / expected.norm() < 0.05
    assert not torch.equal(rough, expected)


def test_arguments_of_both_spellings():
    model = small_model(latent_channels=None, embed_dim=6, num_blocks_encoder=1, num_blocks_decoder=3)
    assert model.latent_channels == 6
    assert (len(model.encoder.blocks), len(model.decoder.blocks)) == (1, 3)
    assert SparseSDFVQVAE(**model.config).latent_channels == 6


def heads(module):
    return [block.attn.heads for block in module.blocks]


def test_encoder_and_decoder_of_their_own_sizes():
    """All spellings of Direct3D-S2's constructor; a part's own argument comes before the common ones."""
    sizes = {
        "model_channels_encoder": 64, "num_blocks_encoder": 1, "num_heads_encoder": 4, "num_head_channels_encoder": 64,
        "model_channels_decoder": 128, "num_blocks_decoder": 2, "num_head_channels_decoder": 32,
    }
    model = small_model(model_channels=192, num_blocks=5, num_heads=3, **sizes)
    assert (model.encoder.input_layer.out_features, model.decoder.input_layer.out_features) == (64, 128)
    assert (heads(model.encoder), heads(model.decoder)) == ([4], [4, 4])
    out = model(sphere_batch())
    (out["sdf"].square().mean() + out["codebook_rows"].mean()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    twin = SparseSDFVQVAE(**model.config)
    assert [v.shape for v in twin.state_dict().values()] == [v.shape for v in model.state_dict().values()]
    assert heads(small_model(model_channels=128, num_heads=8, num_head_channels_encoder=64).encoder) == [2, 2]
    assert heads(small_model(model_channels=128, num_head_channels=64, num_heads_decoder=8).decoder) == [8, 8]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_channels": 96}, "model_channels must be"),
        ({"attn_mode": "full"}, "attn_mode must be"),
        ({"pe_mode": "rope"}, "pe_mode must be"),
        ({"representation_config": {}}, "representation_config must be null"),
        ({"embed_dim": 5}, "name one value"),
        ({"latent_channels": 0}, "latent_channels must be at least 1, got 0"),
        ({"latent_channels": None, "embed_dim": -3}, "embed_dim must be at least 1, got -3"),
        ({"mlp_ratio": -1.0}, "mlp_ratio must give the MLP over 64 channels a hidden width of at least 1, got -1.0"),
        ({"mlp_ratio": 0.01}, "mlp_ratio must give"),
        ({"reseed_after": -1}, "reseed_after must be at least 0"),
        ({"window_size": 3}, "window_size must be"),
        ({"num_heads": 3}, "num_heads must divide the 64 channels of the encoder, which 3 heads do not"),
        ({"num_heads_decoder": 0}, "num_heads_decoder must divide the 64 channels of the decoder, which 0 heads"),
        ({"num_head_channels": 0}, "num_head_channels must be at least 1, got 0"),
        ({"model_channels_decoder": 100}, "model_channels_decoder must be a positive multiple of 64, got 100"),
        ({"num_blocks_encoder": -1}, "num_blocks_encoder must be at least 0, got -1"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        small_model(**changes)
