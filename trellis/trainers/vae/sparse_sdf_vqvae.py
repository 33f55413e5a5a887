"""What the step loop does not know of the sparse SDF VQ-VAE: its loss, its codebook, its sample pictures."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trellis.config import TrainerArgs
from trellis.datasets.sparse_sdf import collate, count_true
from trellis.models.autoencoders.pass_head import Head
from trellis.modules.quantizers import JointRows
from trellis.trainers.loader import read_batches
from trellis.trainers.memory import MemoryLimit, too_large
from trellis.trainers.sampler import ResumableSampler
from trellis.trainers.vae.codebook_usage import CodebookUsage, perplexity
from trellis.trainers.vae.memory import bytes_per_block, sample_bytes
from trellis.utils.blocks import STORAGE_BLOCK

logger = logging.getLogger(__name__)

Batch = dict[str, Any]

ROWS_PER_CODE = 16
"""Rows per code that k-means starts from where `codebook_init_samples` is null."""
MAX_INIT_SAMPLES = 1024
MAX_BLOCKS = (2**31 - 1) // STORAGE_BLOCK**3
"""Rows of the finest grid, 512 a block, are numbered in int32."""

POINTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "mse": torch.square,
    "l1": torch.abs,
    "l1_l2": lambda error: error.abs() + error.square(),
}


def collate_with_weights(samples: Sequence[dict[str, Any]], *, lambda_extra: float) -> Batch:
    """`collate`, and `row_weights` of the batch; runs where samples are loaded, so that the device need not count."""
    batch = collate(samples)
    sizes = batch["blocks_per_sample"].numpy()
    return batch | {"row_weights": row_weights(batch["active"], batch["loss_blocks"], sizes, lambda_extra)}


def row_weights(active: Tensor, loss_blocks: Tensor, sizes: np.ndarray, lambda_extra: float) -> Tensor:
    """By what a block's sums are multiplied, so that those of a shape's blocks add up to its means.

    Args:
        active: bool [M, 512]; loss_blocks: bool [M]; both on the host. sizes: blocks of each shape.
        lambda_extra: weight of voxels outside the band.

    Returns:
        float32 [M, 4]: 1 / sum of weights, 1 / voxels inside the band and 1 / voxels outside it of the shape's
        `loss_blocks`, which are 0 for other blocks; and 1 / blocks of the shape.
    """
    counted = loss_blocks.numpy()
    inside = np.where(counted, count_true(active.numpy()), 0)
    outside = np.where(counted, active.shape[1], 0) - inside
    starts = np.cumsum(sizes) - sizes
    band, extra = (np.add.reduceat(n, starts, dtype=np.float64) for n in (inside, outside))
    total = np.maximum(band + lambda_extra * extra, np.finfo(np.float32).tiny)
    of_shapes = np.stack([total, np.maximum(band, 1), np.maximum(extra, 1), sizes], 1)
    weights = np.repeat(1 / of_shapes, sizes, axis=0)
    weights[~counted, :3] = 0
    return torch.from_numpy(weights.astype(np.float32))


def reconstruction_rows(
    predicted: Tensor, batch: Batch, *, loss_type: str, lambda_extra: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What each block adds to its shape's reconstruction loss and squared errors.

    The loss of a shape is sum(w f(e)) / sum(w) over all voxels of the blocks in its `loss_blocks`; w = 1 where the
    target is inside the band, `lambda_extra` elsewhere.

    Args:
        predicted: [M, 512] float32.
        batch: `block_sdf`, `active` [M, 512] and `row_weights` [M, 4] on the same device.
        loss_type: f is e^2 ("mse"), |e| ("l1") or their sum ("l1_l2").

    Returns:
        Loss, mean squared error inside the band, and outside it (0 where a shape has no such voxel): each [M], and the
        rows of a shape add up to its value. The first has a gradient.
    """
    active = batch["active"]
    loss_weight, inside_weight, outside_weight, _ = batch["row_weights"].unbind(1)
    error = predicted - batch["block_sdf"].to(predicted.dtype)
    value = POINTWISE[loss_type](error)
    with torch.no_grad():
        weight = torch.where(active, 1.0, lambda_extra).to(predicted.dtype).mul_(loss_weight[:, None])
        square = value if loss_type == "mse" else error.square()
        inside = (square * active).sum(1) * inside_weight
        outside = (square * ~active).sum(1) * outside_weight
    return (value * weight).sum(1), inside, outside


class SparseSDFVQVAEObjective:
    """Loss, codebook and samples of a `SparseSDFVQVAE`, as `trellis.trainers.base.Trainer` calls them."""

    terms = ("loss", "mse_band", "mse_extra", "vq", "commitment", "cropped")
    """What `losses` sums; the first is what is minimised."""

    def __init__(self, model: nn.Module, args: TrainerArgs, *, device: torch.device, speaks: bool = True) -> None:
        self.args = args
        self.collate = partial(collate_with_weights, lambda_extra=args.lambda_extra)
        self.head = Head(self._loss_rows, ("row_weights",))
        self.quantizer: Any = model.quantizer
        self.model_config: dict[str, Any] = model.config
        self.usage = CodebookUsage(
            self.quantizer.codebook.shape[0], device, reseed_after=self.quantizer.reseed_after, speaks=speaks
        )
        if self.quantizer.use_ema_update and args.lambda_vq:
            logger.info("the codebook follows moving averages (use_ema_update): lambda_vq has no effect")

    @staticmethod
    def holds_current_value(name: str) -> bool:
        """Names whose averaged copy is the current value: the whole quantizer."""
        return name.startswith("quantizer.")

    def cost(self, mode: str | None) -> Callable[[Any], int]:
        """Estimated bytes of training on a sample, as a function that other processes can be given."""
        return partial(sample_bytes, bytes_per_block=bytes_per_block(self.model_config, mode))

    def check_sizes(self, dataset: Any, limit: MemoryLimit) -> None:
        """Before the first step: ValueError for shapes that will not fit; others are judged when they are read."""
        if limit.limit_bytes is None:
            return
        cost = {name: limit.cost({"block_coords": range(blocks)}) for name, blocks in dataset.known_sizes()}
        large = sorted((name for name in cost if cost[name] > limit.limit_bytes), key=cost.__getitem__, reverse=True)
        if large:
            more = f" ({len(large) - 1} more shapes are too large, the least {large[-1]})" if len(large) > 1 else ""
            raise ValueError(too_large(large[0], cost[large[0]], limit.limit_bytes) + more)

    def check_batch(self, batch: Batch) -> None:
        """Refuse a micro-batch whose voxels int32 cannot count."""
        sizes = batch["blocks_per_sample"].tolist()
        if sum(sizes) > MAX_BLOCKS:
            largest = batch["sha256"][sizes.index(max(sizes))]
            raise ValueError(
                f"shape {largest}: a micro-batch must have at most {MAX_BLOCKS} blocks, whose voxels int32 can count, "
                f"got {sum(sizes)}, {max(sizes)} of them in this shape; crop it with max_points, or raise batch_split"
            )

    def losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sums over the shapes of a batch: the loss, with its gradient, and `terms` [6] float32, without."""
        out = model(batch, self.head)
        loss = out["loss_rows"].sum()
        logged, cropped = out["logged_rows"].sum(0), batch["cropped"].sum(0, keepdim=True, dtype=loss.dtype)
        return loss, torch.cat([loss.detach()[None], logged, cropped])

    def _loss_rows(self, out: Batch, batch: Batch) -> Batch:
        """What each block adds to the loss, [M], and to the logged terms after it, [M, 4], of the model's outputs."""
        loss_rows, *errors = reconstruction_rows(
            out["sdf"], batch, loss_type=self.args.loss_type, lambda_extra=self.args.lambda_extra
        )
        share = batch["row_weights"][:, 3]  # the codebook's errors are means over a shape's blocks
        commitment = out["commitment_rows"] * share
        rows = loss_rows + self.args.lambda_commitment * commitment
        vq = torch.zeros_like(share)
        if "codebook_rows" in out:
            vq = out["codebook_rows"] * share
            rows = rows + self.args.lambda_vq * vq
        return {"loss_rows": rows, "logged_rows": torch.stack([*errors, vq, commitment], 1).detach()}

    def prepare(self, model: Any, dataset: Any, sampler: ResumableSampler, workers: int) -> None:
        """Before the first step: a fresh codebook starts from k-means over the first shapes of the stream.

        Ranks take consecutive parts of the stream, so that the rows and the codebook are those of a single rank. Up to
        `workers` processes read the shapes.
        """
        if bool(self.quantizer.initialized):
            return
        count = self._init_samples(dataset, sampler)
        bounds = [count * r // sampler.world_size for r in (sampler.rank, sampler.rank + 1)]
        items = sampler.stream(*bounds)
        logger.info("initialising the codebook of %d codes from %d shapes", self.usage.counts.numel(), count)
        batches = read_batches(dataset, [[item] for item in items], collate, min(workers, len(items)))
        model.initialize_codebook(batches, self.args.seed)

    def _init_samples(self, dataset: Any, sampler: ResumableSampler) -> int:
        most = min(len(dataset), MAX_INIT_SAMPLES)
        wanted = self.args.codebook_init_samples
        if wanted is None:
            # Every rank reads the same first shapes and comes to the same number.
            probe = sampler.stream(0, min(4, most))
            rows = sum(len(dataset[item]["block_coords"]) for item in probe) / len(probe)
            wanted = math.ceil(ROWS_PER_CODE * self.usage.counts.numel() / rows)
        # Each rank needs a shape, even where there are more ranks than shapes (the stream goes on).
        return max(min(wanted, most), sampler.global_batch)

    def statistics(self) -> dict[str, Tensor]:
        """Before the optimizer step: figures to log, over all ranks; scalars on the device, nothing waits for it."""
        counts = self.quantizer.reduce()
        return {"perplexity": perplexity(counts), "codes_used": (counts > 0).sum()}

    def commit(
        self,
        step: int,
        counts_if: Tensor,
        *,
        batches: Sequence[Batch],
        places: Callable[[], Sequence[int]],
        num_places: int,
    ) -> dict[str, Tensor]:
        """After an optimizer step: the codebook takes in the step's statistics.

        Args:
            counts_if: bool scalar on the device, false where the step was skipped.
            batches: this rank's micro-batches. places: of their shapes among the `num_places` of all ranks, ascending.

        Returns:
            {parameter name: mask of its rows that were overwritten}, whose moments the optimizer must forget.
        """
        reseed = self.quantizer.reseed_after > 0 and step % self.quantizer.reseed_every == 0
        joint = None
        if reseed:
            rows = torch.cat([batch["blocks_per_sample"] for batch in batches])
            joint = JointRows(torch.tensor(places()), rows, num_places)
        report = self.quantizer.commit(step, reseed=reseed, joint=joint, counts_if=counts_if)
        self.usage.add(report.counts)
        return {"quantizer.codebook": report.reseeded} if reseed else {}

    def discard(self) -> None:
        """Before passes that are repeated: their statistics never happened."""
        self.quantizer.discard()

    def spare_bytes(self, model: Any) -> int:
        """Memory that the model holds for speed alone: recorded passes."""
        return model.graph_bytes

    def release_spare(self, model: Any) -> None:
        """Give that memory back for good; no pass may be under way."""
        held = model.graph_bytes / 1e9
        logger.warning("no CUDA graphs from here on: a step ran out of memory beside their %.1f GB", held)
        model.cuda_graphs = False
        model.release_graphs()

    def finish_epoch(self) -> Callable[[], dict[str, float]]:
        return self.usage.finish_epoch()

    def write_samples(self, model: nn.Module, dataset: Any, folder: Path) -> bytes | None:
        """Pictures and meshes of the first shapes; returns the picture as PNG, None without a renderer."""
        from trellis.trainers.vae.snapshot import write_samples  # geometry: not needed to train

        count = min(self.args.num_samples, len(dataset))
        return write_samples(model, [dataset[0, i] for i in range(count)], folder)

    def state_dict(self) -> dict[str, Any]:
        return {"usage": self.usage.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.usage.load_state_dict(state["usage"])
