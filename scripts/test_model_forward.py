"""Check the network of an installation in under a minute: python scripts/test_model_forward.py [--device cpu|cuda]."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from trellis.datasets.sparse_sdf import collate, sample_from_blocks
from trellis.models.autoencoders.ss_vqvae import SparseSDFVQVAE
from trellis.models.pretrained import from_pretrained, save_pretrained
from trellis.pipelines.token_files import load_tokens, save_tokens
from trellis.pipelines.tokenizer import SparseSDFTokenizer, move_batch
from trellis.utils.blocks import SparseSDFBlocks, block_voxel_offsets, morton_order

RESOLUTION = 64


def blocks_of(distance: Callable[[np.ndarray], np.ndarray]) -> SparseSDFBlocks:
    """The sparse TSDF of an analytic signed distance, given on points [..., 3] of grid space."""
    index = np.stack(np.meshgrid(*[np.arange(RESOLUTION // 8)] * 3, indexing="ij"), -1).reshape(-1, 3)
    points = (index[:, None] * 8 + block_voxel_offsets() + 0.5) / RESOLUTION - 0.5
    values = np.clip(distance(points) * RESOLUTION / 4, -1, 1).astype(np.float16)
    keep = (np.abs(values) < 1).any(axis=1)
    order = morton_order(index[keep])
    to_world = np.diag([100.0, 100.0, 100.0, 1.0])
    return SparseSDFBlocks(
        index[keep][order].astype(np.int16), values[keep][order].reshape(-1, 8, 8, 8), to_world, RESOLUTION
    )


def sphere(points: np.ndarray) -> np.ndarray:
    """Signed distance to a sphere of radius 0.3 off the centre."""
    return np.linalg.norm(points - [0.05, -0.1, 0.02], axis=-1) - 0.3


def torus(points: np.ndarray) -> np.ndarray:
    """Signed distance to a torus of radii 0.32 and 0.12."""
    ring = np.hypot(points[..., 0], points[..., 1]) - 0.32
    return np.hypot(ring, points[..., 2]) - 0.12


class Checks:
    """Prints each check as it is made and counts those that failed."""

    def __init__(self) -> None:
        self.failed = 0

    def __call__(self, what: str, ok: bool) -> None:
        self.failed += not ok
        print(f"{'ok  ' if ok else 'FAIL'} {what}", flush=True)


def check_training(check: Checks, model: SparseSDFVQVAE, batch: dict) -> None:
    """Forward, backward and one optimizer step with its quantizer statistics."""
    m = len(batch["block_coords"])
    latent = model.latent_channels
    model.eval()  # in training mode the quantizer would count these rows
    with torch.no_grad():
        found = model.encode(batch)
    check(
        f"encode: {batch['level_sizes'][0]} voxels -> {m} latent voxels of {latent} channels, same blocks, same order",
        found["mean"].shape == found["logvar"].shape == (m, latent)
        and torch.equal(found["coords"].cpu(), batch["block_coords"].cpu()),
    )
    model.initialize_codebook([batch], seed=0)
    model.train()
    out = model(batch)
    codes = len(out["ids"].unique())
    check(f"quantizer: {codes} of {model.quantizer.num_embeddings} codes used", codes > 1)
    sdf = out["sdf"]
    inside_range = sdf.shape == (m, 512) and sdf.dtype == torch.float32 and bool((sdf.abs() < 1).all())
    check(f"decode: {sdf.numel()} voxels, float32, in (-1, 1)", inside_range)
    target, weight = batch["block_sdf"].float(), torch.where(batch["active"], 1.0, 0.1)

    def errors_of(result: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """The error of the values, and the whole loss."""
        error = (weight * (result["sdf"] - target).square()).sum() / weight.sum()
        return error, error + result["codebook_rows"].mean() + 0.25 * result["commitment_rows"].mean()

    error, loss = errors_of(out)
    loss.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.isfinite().all())]
    count = sum(p.numel() for p in model.parameters())
    but = f", but {missing[0]}" if missing else ""
    check(f"backward: finite gradients for all {count} parameters{but}", not missing)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    errors = [error.item()]
    for step in range(8):
        optimizer.step()
        report = model.quantizer.commit(step)
        if step == 0:
            check("commit: statistics count each row once", int(report.counts.sum()) == m)
        optimizer.zero_grad()
        error, loss = errors_of(model(batch))
        loss.backward()
        errors.append(error.item())
    model.quantizer.discard()
    check(f"8 steps of training lower the error: {errors[0]:.4f} -> {errors[-1]:.4f}", errors[-1] < errors[0])


def check_files(check: Checks, model: SparseSDFVQVAE, shape: SparseSDFBlocks, device: str) -> None:
    """Save and load the model and its tokens."""
    tokenizer = SparseSDFTokenizer(model, resolution=RESOLUTION, device=device, compute_dtype=torch.float32)
    tokens = tokenizer.encode(shape, label="sphere")
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder)
        again = SparseSDFTokenizer(from_pretrained(folder), device=device, compute_dtype=torch.float32)
        same = np.array_equal(again.encode(shape).ids, tokens.ids)
        check("model: saved, loaded, and it gives the same tokens", same and again.model_hash == tokenizer.model_hash)
        path = Path(folder) / "tokens.safetensors"
        save_tokens(path, tokens)
        decoded, from_file = tokenizer.decode(tokens), again.decode(load_tokens(path))
        same = np.array_equal(decoded.block_sdf, from_file.block_sdf)
        check(f"tokens: {tokens.num_tokens} ids saved, loaded, and they decode to the same values", same)


def main() -> int:
    """Run all checks; exit status 1 when one fails."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = options.parse_args().device
    start = time.perf_counter()
    check = Checks()
    torch.manual_seed(0)
    shapes = [blocks_of(sphere), blocks_of(torus)]
    batch = move_batch(collate([sample_from_blocks(shape) for shape in shapes]), torch.device(device))
    model = SparseSDFVQVAE(model_channels=64, latent_channels=8, num_blocks=2, num_embeddings=64, mlp_ratio=2.0)
    model.to(device)
    model.set_compute_dtype(torch.float32)
    print(f"a sphere and a torus at {RESOLUTION} cubed, PyTorch {torch.__version__}, device {device}")
    check_training(check, model, batch)
    check_files(check, model, shapes[0], device)
    print(f"{check.failed} checks failed, {time.perf_counter() - start:.1f} s")
    return 1 if check.failed else 0


if __name__ == "__main__":
    sys.exit(main())
