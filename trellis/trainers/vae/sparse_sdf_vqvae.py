"""What the step loop does not know of the sparse SDF VQ-VAE: its loss, its codebook, its sample pictures."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trellis.config import TrainerArgs
from trellis.datasets.sparse_sdf import collate
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


def reconstruction_terms(
    predicted: Tensor, batch: Batch, *, loss_type: str, lambda_extra: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Reconstruction loss and squared errors per shape.

    The loss of a shape is sum(w f(e)) / sum(w) over all voxels of the blocks in its `loss_blocks`; w = 1 where the
    target is inside the band, `lambda_extra` elsewhere.

    Args:
        predicted: [M, 512] float32.
        batch: `block_sdf`, `active` [M, 512], `loss_blocks` [M] on the same device; `blocks_per_sample` [B].
        loss_type: f is e^2 ("mse"), |e| ("l1") or their sum ("l1_l2").

    Returns:
        loss, mean squared error inside the band, and outside it (0 where a shape has no such voxel), each [B].
    """
    active = batch["active"]
    error = predicted - batch["block_sdf"].to(predicted.dtype)
    value = POINTWISE[loss_type](error)
    weighted = (value * torch.where(active, 1.0, lambda_extra).to(predicted.dtype)).sum(1)
    with torch.no_grad():
        square = value if loss_type == "mse" else error.square()
        in_band = active.sum(1).to(predicted.dtype)
        rows = [(square * active).sum(1), (square * ~active).sum(1), in_band, active.shape[1] - in_band]
    columns = torch.where(batch["loss_blocks"][:, None], torch.stack([weighted, *rows], 1), 0)
    # One sum per shape rather than a scatter: the same bits on every run, on every device.
    sums = torch.stack([part.sum(0) for part in columns.split(batch["blocks_per_sample"].tolist())])
    loss, band, extra, in_band, outside = sums.unbind(1)
    weight = (in_band + lambda_extra * outside).clamp(min=torch.finfo(predicted.dtype).tiny)
    return loss / weight, band / in_band.clamp(min=1), extra / outside.clamp(min=1)


def mean_rows(rows: Tensor, batch: Batch) -> Tensor:
    """Mean over the rows of each shape: [M] -> [B]."""
    return torch.stack([part.mean() for part in rows.split(batch["blocks_per_sample"].tolist())])


class SparseSDFVQVAEObjective:
    """Loss, codebook and samples of a `SparseSDFVQVAE`, as `trellis.trainers.base.Trainer` calls them."""

    terms = ("loss", "mse_band", "mse_extra", "vq", "commitment", "cropped")
    """What `losses` sums; the first is what is minimised."""
    collate = staticmethod(collate)

    def __init__(self, model: nn.Module, args: TrainerArgs, *, device: torch.device, speaks: bool = True) -> None:
        self.args = args
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

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Sums over the shapes of a batch of `terms`: [6], the first with gradient."""
        out = model(batch)
        recon, mse_band, mse_extra = reconstruction_terms(
            out["sdf"], batch, loss_type=self.args.loss_type, lambda_extra=self.args.lambda_extra
        )
        commitment = mean_rows(out["commitment_rows"], batch)
        total = recon + self.args.lambda_commitment * commitment
        vq = torch.zeros_like(recon)
        if out["codebook_rows"] is not None:
            vq = mean_rows(out["codebook_rows"], batch)
            total = total + self.args.lambda_vq * vq
        cropped = batch["cropped"].to(recon)
        return torch.stack([t.sum() for t in (total, mse_band, mse_extra, vq, commitment, cropped)])

    def prepare(self, model: Any, dataset: Any, sampler: ResumableSampler) -> None:
        """Before the first step: a fresh codebook starts from k-means over the first shapes of the stream.

        Ranks take consecutive parts of the stream, so that the rows and the codebook are those of a single rank.
        """
        if bool(self.quantizer.initialized):
            return
        count = self._init_samples(dataset, sampler)
        bounds = [count * r // sampler.world_size for r in (sampler.rank, sampler.rank + 1)]
        items = sampler.stream(*bounds)
        logger.info("initialising the codebook of %d codes from %d shapes", self.usage.counts.numel(), count)

        def batches() -> Iterator[Batch]:
            for item in items:
                yield collate([dataset[item]])

        model.initialize_codebook(batches(), self.args.seed)

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

    def statistics(self) -> tuple[dict[str, Tensor], Tensor]:
        """Before the optimizer step: figures to log, over all ranks, and how many rows `commit` would overwrite.

        All are scalars on the device; nothing waits for it.
        """
        counts, unused = self.quantizer.reduce()
        return {"perplexity": perplexity(counts), "codes_used": (counts > 0).sum()}, unused

    def commit(
        self, step: int, *, overwrite: bool, batches: Sequence[Batch], places: Sequence[int]
    ) -> dict[str, Tensor]:
        """After an optimizer step: the codebook takes in the step's statistics.

        Args:
            overwrite: whether `statistics` found rows to overwrite; only then are the next two read, and only in
                steps at which the quantizer lets codes move.
            batches: this rank's micro-batches. places: of their shapes among those of all ranks, ascending.

        Returns:
            {parameter name: rows that were overwritten}, whose moments the optimizer must forget.
        """
        order = None
        overwrite = overwrite and step % self.quantizer.reseed_every == 0
        if overwrite:
            rows = torch.cat([batch["blocks_per_sample"] for batch in batches])
            order = torch.repeat_interleave(torch.tensor(places), rows)
        report = self.quantizer.commit(step, reseed=overwrite, order=order)
        self.usage.add(report.counts)
        return {"quantizer.codebook": report.reseeded}

    def discard(self) -> None:
        """After a step that is skipped, or passes that are repeated: its statistics never happened."""
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

    def finish_epoch(self) -> dict[str, float]:
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
