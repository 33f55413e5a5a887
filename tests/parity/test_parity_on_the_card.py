"""The published network on CUDA: float32 within the CPU tolerances, 16 bit within PyTorch's own rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from published_network import COMPACT, HERE, errors_of, published_network, read_fixture

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", [COMPACT, "r64_batch2", "r128"])
def test_float32(name, cuda_device, request):
    folder = HERE if name == COMPACT else request.getfixturevalue("parity_dir")
    errors = errors_of(published_network().to(cuda_device), read_fixture(folder / f"{name}.npz"))
    assert np.abs(errors["latent_mean"]).max() < 1e-5
    assert np.abs(errors["decoded_sdf"]).max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_rounds_as_the_plain_path_does(dtype, cuda_device):
    fixture, errors = read_fixture(HERE / f"{COMPACT}.npz"), []
    for model in (published_network(), published_network(fused=False, backend="cpu")):
        model.to(cuda_device).set_compute_dtype(dtype)
        errors.append(errors_of(model, fixture))
    for name in ("latent_mean", "decoded_sdf"):
        ours, plain = (float(np.sqrt(np.mean(e[name].astype(np.float64) ** 2))) for e in errors)
        assert ours <= 1.5 * plain
