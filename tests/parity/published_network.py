"""Weights and fixtures that stand for the published network, and how the fixture beside this file was made.

    python tests/parity/published_network.py FOLDER    # FOLDER holds r64_batch2.npz, the full fixture
"""

from __future__ import annotations

import argparse
import json
import zlib
from math import prod, sqrt
from pathlib import Path

import numpy as np
import torch

from trellis.models.autoencoders.ss_vqvae import SparseSDFVQVAE

HERE = Path(__file__).resolve().parent
COMPACT = "r64_batch2_compact"
NUM_VOXELS, SEED = 4096, 0
"""Decoded voxels that the compact fixture keeps, and the seed of their choice."""

Fixture = dict[str, np.ndarray]


def published_shapes() -> dict[str, list[int]]:
    """Names and shapes of the network's 116 tensors at its published size (512 channels, 4 + 4 blocks, latent 16)."""
    return json.loads((HERE / "state_dict.json").read_text(encoding="utf-8"))


def draw_weight(name: str, shape: list[int]) -> np.ndarray:
    """Float32 values that follow from the tensor's name alone, of a size that keeps activations near 1.

    Standard normal numbers, seeded with the CRC-32 of the name, times fan-in^-1/2; vectors (biases) times 0.02 instead,
    and scales of norms 1 + 0.1 times.
    """
    normal = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, dtype=np.float32)
    if name.endswith(("act_layers.0.weight", "out_layers.1.weight")) and normal.ndim == 1:
        return 1 + 0.1 * normal
    if normal.ndim == 1:
        return 0.02 * normal
    # kernels are [taps, in, out] or [in, out], Linears [out, in]
    fan_in = prod(shape[:-1]) if name.endswith("conv.kernel") else shape[1]
    return normal / sqrt(fan_in)


def published_network(**arguments: object) -> SparseSDFVQVAE:
    """The published size with the drawn weights, in evaluation mode on the CPU; the codebook is of no account."""
    model = SparseSDFVQVAE(model_channels=512, latent_channels=16, num_blocks=4, num_embeddings=16, **arguments)
    weights = {name: torch.from_numpy(draw_weight(name, shape)) for name, shape in published_shapes().items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.startswith("quantizer.") for name in missing)
    return model.eval()


def read_fixture(path: Path) -> Fixture:
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def keys_of(coords: np.ndarray) -> np.ndarray:
    """One int64 per (batch, x, y, z), in their lexicographic order."""
    batch, x, y, z = np.asarray(coords, np.int64).T
    return ((batch << 12 | x) << 12 | y) << 12 | z


def compact(full: Fixture) -> Fixture:
    """All inputs and latents of a fixture, rows in the order of their coordinates, and some of its decoded voxels."""
    rows = np.argsort(keys_of(np.column_stack([full["batch_idx"], full["sparse_index"]])))
    latents = np.argsort(keys_of(full["latent_coords"]))
    voxels = np.argsort(keys_of(full["decoded_coords"]))
    voxels = voxels[np.sort(np.random.default_rng(SEED).choice(len(voxels), NUM_VOXELS, replace=False))]
    order = {"sparse_sdf": rows, "sparse_index": rows, "batch_idx": rows, "latent_coords": latents,
             "latent_mean": latents, "latent_logvar": latents, "decoded_coords": voxels, "decoded_sdf": voxels}
    return {name: full[name][chosen] for name, chosen in order.items()}


def errors_of(model: SparseSDFVQVAE, fixture: Fixture) -> dict[str, np.ndarray]:
    """Differences of latent mean and log-variance from the fixture's, and of what its mean decodes to.

    The latents' coordinates have to be the fixture's, the decoded voxels all 512 below each of them, once.
    """
    batch = {name: torch.from_numpy(fixture[name]) for name in ("sparse_sdf", "sparse_index", "batch_idx")}
    with torch.no_grad():
        encoded = model.encode(batch)
        coords = torch.from_numpy(fixture["latent_coords"]).int()
        sdf, sdf_coords = model.decode_latent(torch.from_numpy(fixture["latent_mean"]), coords)
    found = {"latent": keys_of(encoded["coords"].cpu().numpy()), "decoded": keys_of(sdf_coords.cpu().numpy())}
    order = {part: np.argsort(keys) for part, keys in found.items()}
    expected = {part: keys_of(fixture[f"{part}_coords"]) for part in found}
    assert np.array_equal(found["latent"][order["latent"]], np.sort(expected["latent"]))
    assert len(np.unique(found["decoded"])) == len(found["decoded"]) == 512 * len(coords)
    errors = {}
    for name, part, values in (
        ("latent_mean", "latent", encoded["mean"]),
        ("latent_logvar", "latent", encoded["logvar"]),
        ("decoded_sdf", "decoded", sdf),
    ):
        place = order[part][np.searchsorted(found[part], expected[part], sorter=order[part])]
        assert np.array_equal(found[part][place], expected[part])
        errors[name] = values.cpu().numpy()[place] - fixture[name]
    return errors


def main() -> None:
    """Write the compact fixture from the full one."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path, help="folder with r64_batch2.npz")
    full = read_fixture(parser.parse_args().folder / "r64_batch2.npz")
    np.savez_compressed(HERE / f"{COMPACT}.npz", **compact(full))


if __name__ == "__main__":
    main()
