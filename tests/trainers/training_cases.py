"""A small prepared dataset of analytic shapes at 64 cubed, and a config whose model trains on it in seconds."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
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


def _run_training(arguments: list[str], output: str) -> None:
    os.setsid()
    with open(output, "w") as stream:
        for number in (1, 2):
            os.dup2(stream.fileno(), number)
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    from trellis.trainers.launch import main

    torch.set_num_threads(1)
    sys.exit(main(arguments))


class Training:
    """The training command in a process of its own, forked from one that has imported everything already."""

    def __init__(self, config: Path, data: Path, run: Path, *options: str) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["trellis.trainers.run", "trellis.trainers.event_file", "torch._dynamo"])
        self.run = run
        run.parent.mkdir(parents=True, exist_ok=True)
        self._output = run.parent / f"{run.name}_output{time.monotonic_ns()}.txt"
        arguments = [
            "--config", str(config), "--data_dir", str(data), "--output_dir", str(run), "--device", "cpu", *options
        ]
        self.process = context.Process(target=_run_training, args=(arguments, str(self._output)))
        self.process.start()

    @property
    def output(self) -> str:
        return self._output.read_text(encoding="utf-8", errors="replace") if self._output.exists() else ""

    def wait(self, timeout: float = 120) -> int:
        """The exit code."""
        self.process.join(timeout)
        if self.process.is_alive():
            os.killpg(self.process.pid, signal.SIGKILL)
            raise AssertionError(f"still running after {timeout} s: {self.output}")
        return self.process.exitcode

    def wait_for_step(self, step: int, timeout: float = 120) -> None:
        deadline = time.monotonic() + timeout
        while not (self.run / "log.txt").exists() or len(read_log(self.run)) < step:
            assert self.process.is_alive() and time.monotonic() < deadline, self.output
            time.sleep(0.02)

    def signal(self, number: int, *, group: bool = False) -> None:
        (os.killpg if group else os.kill)(self.process.pid, number)


def train(config: Path, data: Path, run: Path, *options: str) -> tuple[int, str]:
    """Exit code and output of a whole training."""
    training = Training(config, data, run, *options)
    return training.wait(), training.output


def read_log(output: Path) -> list[dict]:
    lines = (output / "log.txt").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]
