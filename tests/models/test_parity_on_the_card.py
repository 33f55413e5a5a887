"""The published network on CUDA: float32 within the CPU tolerances, 16 bit within PyTorch's own rounding."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from trellis.models.autoencoders.ss_vqvae import SparseSDFVQVAE

pytestmark = pytest.mark.gpu


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


@pytest.mark.parametrize("name", ["r64_batch2", "r128"])
def test_float32(parity_dir, name, cuda_device):
    with np.load(parity_dir / f"{name}.npz") as archive:
        mean, sdf = errors(network(parity_dir), archive)
    assert np.abs(mean).max() < 1e-5
    assert np.abs(sdf).max() < 1e-6


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
