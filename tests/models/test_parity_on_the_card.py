"""The published network on CUDA: float32 within the CPU tolerances, 16 bit within PyTorch's own rounding."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from trellis.models.autoencoders.ss_vqvae import SparseSDFVQVAE


def network(parity_dir, **arguments):
    spec = importlib.util.spec_from_file_location("weights", parity_dir / "weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = SparseSDFVQVAE(model_channels=512, latent_channels=16, num_blocks=4, num_embeddings=64, **arguments)
    state = {name: torch.from_numpy(np.asarray(value, dtype=np.float32)) for name, value in module.state_dict().items()}
    model.load_state_dict(state, strict=False)
    return model.cuda().eval()


def errors(model, archive):
    """Largest error of the latent mean and of the decoded values, after sorting by coordinate."""

    def order(coords):
        return np.lexsort(coords.T[::-1])

    batch = {key: torch.from_numpy(archive[key]) for key in ("sparse_sdf", "sparse_index", "batch_idx")}
    with torch.no_grad():
        encoded = model.encode(batch)
        sdf, coords = model.decode_latent(
            torch.from_numpy(archive["latent_mean"]), torch.from_numpy(archive["latent_coords"]).int()
        )
    out = []
    for got, got_at, name, at in (
        (encoded["mean"], encoded["coords"], "latent_mean", "latent_coords"),
        (sdf, coords, "decoded_sdf", "decoded_coords"),
    ):
        mine, theirs = order(got_at.cpu().numpy()), order(archive[at].astype(np.int64))
        assert np.array_equal(got_at.cpu().numpy()[mine], archive[at][theirs])
        out.append(got.cpu().numpy()[mine] - archive[name][theirs])
    return out


def gradients(model, batch, dtype):
    """{name: float64 gradient} of the same weighted sum of latents and decoded values; no quantizer in between."""
    model.set_compute_dtype(dtype)
    model.zero_grad()
    pyramid = model.build_pyramid(batch)
    latent, _ = model._encode(pyramid)
    values = model._decode(latent, pyramid.topology)
    generator = torch.Generator().manual_seed(0)
    weights = (torch.randn(t.shape, generator=generator).to(t.device) for t in (values, latent))
    sum((t.float() * w).sum() for t, w in zip((values, latent), weights)).backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def compare_gradients(fast, plain, batch, dtype):
    """Errors of 16 bit against the plain path in float32, by each parameter's own size: ours at most PyTorch's own."""
    exact = gradients(plain, batch, torch.float32)
    ours, theirs = gradients(fast, batch, dtype), gradients(plain, batch, dtype)
    assert ours.keys() == theirs.keys() == exact.keys()
    whole = torch.stack([g.norm() for g in exact.values()]).norm()
    errors = {}
    for name, good in exact.items():
        size = good.norm() + 1e-2 * whole  # a bias before a norm has no gradient but rounding
        errors[name] = [float((g[name] - good).norm() / size) for g in (ours, theirs)]
    worst = max(errors, key=lambda name: errors[name][0] / (errors[name][1] + torch.finfo(dtype).eps))
    print(worst, errors[worst])
    assert errors[worst][0] <= 3 * errors[worst][1] + 3 * torch.finfo(dtype).eps, (worst, errors[worst])
    total = [sum(e[i] ** 2 for e in errors.values()) ** 0.5 for i in (0, 1)]
    assert total[0] <= 1.5 * total[1]


def test_comparison_of_gradients():
    """The comparison below, on a CPU and a small network, in about 3 s."""
    generator = torch.Generator().manual_seed(0)
    index = torch.unique(torch.randint(32, (2000, 3), generator=generator), dim=0)
    values = torch.rand(len(index), 1, generator=generator) * 2 - 1
    batch = {"sparse_sdf": values, "sparse_index": index, "batch_idx": torch.zeros(len(index), dtype=torch.int64)}
    models = []
    for options in ({"backend": "cpu"}, {"fused": False, "backend": "cpu"}):
        torch.manual_seed(0)
        models.append(SparseSDFVQVAE(model_channels=64, latent_channels=4, num_blocks=1, num_embeddings=16, **options))
    compare_gradients(*models, batch, torch.bfloat16)
    with torch.no_grad():
        models[0].decoder.upsample[0].out_layers[0].conv.kernel.mul_(1.2)
    with pytest.raises(AssertionError):
        compare_gradients(*models, batch, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_gradients(parity_dir, dtype, cuda_device):
    """Of all parameters of the published network, at all its widths."""
    fast, plain = network(parity_dir), network(parity_dir, fused=False, backend="cpu")
    with np.load(parity_dir / "r64_batch2.npz") as archive:
        batch = {key: torch.from_numpy(archive[key]) for key in ("sparse_sdf", "sparse_index", "batch_idx")}
    compare_gradients(fast, plain, batch, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["r64_batch2", "r128"])
def test_float32(parity_dir, name, cuda_device):
    with np.load(parity_dir / f"{name}.npz") as archive:
        mean, sdf = errors(network(parity_dir), archive)
    assert np.abs(mean).max() < 1e-5
    assert np.abs(sdf).max() < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_rounds_as_the_plain_path_does(parity_dir, dtype, cuda_device):
    fast, plain = network(parity_dir), network(parity_dir, fused=False, backend="cpu")
    with np.load(parity_dir / "r64_batch2.npz") as archive:
        for model in (fast, plain):
            model.set_compute_dtype(dtype)
        ours, theirs = errors(fast, archive), errors(plain, archive)
    for a, b in zip(ours, theirs):
        rms = [float(np.sqrt(np.mean(e.astype(np.float64) ** 2))) for e in (a, b)]
        assert rms[0] <= 1.5 * rms[1]
