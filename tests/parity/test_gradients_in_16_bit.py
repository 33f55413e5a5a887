"""Gradients of the published network in 16 bit on CUDA, against PyTorch's own rounding."""

from __future__ import annotations

import pytest
import torch
from published_network import COMPACT, HERE, published_network, read_fixture

from trellis.models.autoencoders.ss_vqvae import SparseSDFVQVAE


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
def test_gradients_on_the_card(dtype, cuda_device):
    """Of all parameters of the published network, at all its widths."""
    fixture = read_fixture(HERE / f"{COMPACT}.npz")
    batch = {key: torch.from_numpy(fixture[key]) for key in ("sparse_sdf", "sparse_index", "batch_idx")}
    models = [published_network(**options).to(cuda_device) for options in ({}, {"fused": False, "backend": "cpu"})]
    compare_gradients(*models, batch, dtype)
