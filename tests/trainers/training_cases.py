"""A small prepared dataset of analytic shapes at 64 cubed, and a config whose model trains on it in seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from trellis.utils.blocks import SparseSDFBlocks, morton_order
from trellis.utils.io_utils import save_sparse_sdf

ROOT = Path(__file__).resolve().parents[2]
RESOLUTION = 64


def ellipsoid_blocks(radii: tuple[float, float, float], resolution: int = RESOLUTION) -> SparseSDFBlocks:
    """TSDF blocks of an axis-aligned ellipsoid about the centre (first-order distance, exact for a sphere).

    Args:
        radii: in voxels. Only the blocks around the shape are computed, at any resolution.
    """
    reach = int(np.ceil(max(radii) + 5)) // 8 + 1
    first = resolution // 16 - reach
    centres = np.arange(8 * first, 8 * (first + 2 * reach)) + 0.5 - resolution / 2
    p = np.stack(np.meshgrid(centres, centres, centres, indexing="ij"), -1)
    k0 = np.linalg.norm(p / radii, axis=-1)
    k1 = np.linalg.norm(p / np.square(radii), axis=-1)
    distance = np.where(k1 > 1e-9, k0 * (k0 - 1) / np.maximum(k1, 1e-9), -min(radii))
    tsdf = np.clip(distance / 4, -1, 1).astype(np.float16)
    side = 2 * reach
    blocks = tsdf.reshape(side, 8, side, 8, side, 8).transpose(0, 2, 4, 1, 3, 5).reshape(-1, 8, 8, 8)
    index = (np.stack(np.unravel_index(np.arange(side**3), (side,) * 3), -1) + first).astype(np.int16)
    keep = (np.abs(blocks) < 1).any(axis=(1, 2, 3))
    index, blocks = index[keep], blocks[keep]
    order = morton_order(index)
    to_world = np.diag([120.0, 120.0, 120.0, 1.0])
    return SparseSDFBlocks(index[order], np.ascontiguousarray(blocks[order]), to_world, resolution, label="ellipsoid")


def write_dataset(folder: Path, count: int, ball_voxels: dict[int, float] | None = None) -> Path:
    """A prepared folder of `count` ellipsoids, each of its own shape; `ball_voxels` gives their size per resolution."""
    sizes = ball_voxels or {RESOLUTION: 5.5}
    folder.mkdir(parents=True)
    columns = [f"r{r}_num_{kind}" for r in sizes for kind in ("voxels", "blocks")]
    rows = [",".join(["sha256", "label", "patient_id", "split", *columns])]
    for i in range(count):
        counts = []
        for resolution, size in sizes.items():
            radii = (size * (0.8 + 0.1 * (i % 5)), size * (1.2 - 0.1 * (i % 3)), size * (0.9 + 0.05 * i))
            blocks = ellipsoid_blocks(radii, resolution)
            save_sparse_sdf(folder / "sparse_sdf" / f"shape{i:02d}_r{resolution}.npz", blocks)
            counts += [int(blocks.active.sum()), blocks.num_blocks]
        rows.append(",".join([f"shape{i:02d}", "ellipsoid", f"p{i}", "train", *map(str, counts)]))
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def tiny_config(**trainer_args) -> dict:
    """A config of one block and 64 channels; keyword arguments replace trainer arguments."""
    model = {
        "model_channels": 64, "latent_channels": 8, "num_blocks": 1, "num_embeddings": 32, "num_head_channels": 32,
        "reseed_after": 5,
    }
    trainer = {
        "max_steps": 6, "batch_size_per_gpu": 2, "optimizer": {"name": "AdamW", "args": {"lr": 1e-3}},
        "ema_rate": [0.99], "i_print": 1, "i_log": 2, "i_sample": None, "i_save": None, "i_ddpcheck": 2,
        "codebook_init_samples": 2, "num_samples": 1, **trainer_args,
    }
    return {
        "models": {"vqvae": {"name": "SparseSDFVQVAE", "args": model}},
        "dataset": {"name": "SparseSDF", "args": {"resolution": RESOLUTION}},
        "trainer": {"name": "SparseSDF_VQVAETrainer", "args": trainer},
    }


def write_config(path: Path, config: dict) -> Path:
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


def train_command(config: Path, data: Path, output: Path, *options: str) -> list[str]:
    return [
        sys.executable, str(ROOT / "train.py"), "--config", str(config), "--data_dir", str(data),
        "--output_dir", str(output), "--device", "cpu", *options,
    ]


def training_environment() -> dict[str, str]:
    keep = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**keep, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def train(config: Path, data: Path, output: Path, *options: str, timeout: float = 120) -> subprocess.CompletedProcess:
    """Run train.py in a process of its own."""
    return subprocess.run(
        train_command(config, data, output, *options), capture_output=True, text=True, timeout=timeout,
        env=training_environment(), check=False,
    )


def read_log(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "log.txt").read_text(encoding="utf-8").splitlines()]
