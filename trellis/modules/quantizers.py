"""Quantizers on rows [N, L]; they know nothing of voxels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from trellis.modules.sparse.kernels.support import has_kernels

SCORE_BYTES = 64 << 20
"""Bound of one chunk of the row-to-code scores: never [N, K] at once."""
MAX_POOL_ROWS = 1 << 16
"""Rows of a step that are kept as seeds for unused codes."""
GRADIENTS = ("straight_through", "rotation")
LEAST_EMA_COUNT = 1e-6
"""Below this averaged number of rows a step a code keeps its place: its averages' quotient means nothing any more."""


@dataclass(frozen=True)
class Quantized:
    """What a quantizer returns for rows [N, L].

    Attributes:
        values: [N, L] float32, the codes, with the gradient handed to the rows.
        ids: [N] int64.
        codebook_rows: [N] float32, mean over channels of (code - sg(row))^2; None where moving averages train it.
        commitment_rows: [N] float32, mean over channels of (row - sg(code))^2.
    """

    values: Tensor
    ids: Tensor
    codebook_rows: Tensor | None
    commitment_rows: Tensor


@dataclass(frozen=True)
class CommitReport:
    """One optimizer step: `counts` int64 [K], rows of all ranks per code; `reseeded` bool [K], codes moved to data."""

    counts: Tensor
    reseeded: Tensor


@dataclass(frozen=True)
class JointRows:
    """Where a rank's rows of a step stand among those of all ranks: in pieces, such as the shapes of a batch.

    Attributes:
        places: int64 [p] on the host, ascending: numbers of this rank's pieces among all. rows: int64 [p] on the host,
            how many rows each has. num_places: pieces of all ranks together.
    """

    places: Tensor
    rows: Tensor
    num_places: int

    def numbers(self, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Numbers among all rows of this rank's first `count` rows, int64 [count] ascending, and how many all are.

        Collective over ranks; on the device, without a wait.
        """
        rows = _to_device(torch.zeros(self.num_places, dtype=torch.int64).index_add_(0, self.places, self.rows), device)
        if _world_size() > 1:
            dist.all_reduce(rows)
        before = rows.cumsum(0) - rows
        place = torch.repeat_interleave(self.places, self.rows)
        within = torch.arange(len(place)) - torch.repeat_interleave(self.rows.cumsum(0) - self.rows, self.rows)
        place, within = (_to_device(values[:count], device) for values in (place, within))
        return before[place] + within, rows.sum()


def _to_device(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device, without a wait."""
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


@dataclass
class _Pending:
    counts: Tensor
    sums: Tensor | None
    rows: list[Tensor] = field(default_factory=list)
    num_rows: int = 0
    reduced: bool = False


def nearest_code(rows: Tensor, codebook: Tensor) -> Tensor:
    """Index [N] int64 of the nearest code (Euclidean) of rows [N, L] among [K, L], in float32, never [N, K] at once."""
    rows, codebook = rows.detach().float(), codebook.detach().float()
    if has_kernels(rows.device):
        from trellis.modules.sparse.kernels import nearest

        return nearest.nearest_code(rows, codebook)
    half_norm = 0.5 * codebook.square().sum(1)
    step = max(1, SCORE_BYTES // (4 * codebook.shape[0]))
    out = torch.empty(rows.shape[0], dtype=torch.long, device=rows.device)
    for start in range(0, rows.shape[0], step):
        out[start : start + step] = torch.addmm(half_norm, rows[start : start + step], codebook.t(), alpha=-1).argmin(1)
    return out


def rotate(rows: Tensor, codes: Tensor) -> Tensor:
    """Codes whose gradient to the rows is the rotation and rescaling that takes each row to its code.

    The rotation trick (Fifty et al., 2024, arXiv:2410.06424): with unit vectors e of the row and q of the code and
    r = (e + q) / |e + q|, the output is |code| / |row| (row - 2 (row . r) r + 2 (row . e) q), all but `row` constant.

    Args:
        rows, codes: [N, L].
    """
    with torch.no_grad():
        e, q = F.normalize(rows, dim=1, eps=1e-6), F.normalize(codes, dim=1, eps=1e-6)
        r = F.normalize(e + q, dim=1, eps=1e-6)
        scale = codes.norm(dim=1, keepdim=True) / rows.norm(dim=1, keepdim=True).clamp_min(1e-6)
    turned = rows - 2 * (rows * r).sum(1, keepdim=True) * r + 2 * (rows * e).sum(1, keepdim=True) * q
    return turned * scale


def kmeans(rows: Tensor, num_codes: int, *, seed: int, iterations: int = 20) -> Tensor:
    """Lloyd's k-means after k-means++ seeding; a centre that loses all rows moves to a far row.

    Args:
        rows: [N, L]. With fewer rows than codes, rows are repeated with noise of 1 % of their spread.

    Returns:
        [num_codes, L] float32.

    Raises:
        ValueError: no rows, or rows that are not finite.
    """
    rows = rows.detach().float()
    if rows.shape[0] == 0 or not bool(torch.isfinite(rows).all()):
        raise ValueError(f"k-means needs at least one row and finite values, got {rows.shape[0]} rows")
    generator = torch.Generator().manual_seed(seed)
    n = rows.shape[0]
    if n < num_codes:
        order = torch.randperm(n, generator=generator).to(rows.device)
        copies = order.repeat(-(-num_codes // n))[:num_codes]
        noise = torch.randn(num_codes, rows.shape[1], generator=generator).to(rows.device)
        noise[:n] = 0
        return rows[copies] + 0.01 * rows.std(0, correction=0) * noise
    centres = _spread_seeds(rows, num_codes, generator)
    for _ in range(iterations):
        ids = nearest_code(rows, centres)
        counts = torch.bincount(ids, minlength=num_codes)
        sums = torch.zeros_like(centres).index_add_(0, ids, rows)
        used = counts > 0
        centres = torch.where(used[:, None], sums / counts.clamp_min(1)[:, None], centres)
        empty = torch.nonzero(~used)[:, 0]
        if empty.numel():
            error = (rows - centres[ids]).square().sum(1)
            centres[empty] = rows[error.topk(empty.numel()).indices]
    return centres


def _spread_seeds(rows: Tensor, num_codes: int, generator: torch.Generator) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii, 2007): each next seed is drawn by squared distance to the seeds so far."""
    first = torch.randint(rows.shape[0], (1,), generator=generator).to(rows.device)
    draws = [torch.rand(1, generator=generator, dtype=torch.float64) for _ in range(num_codes - 1)]
    chosen = [first]
    distance = (rows - rows[first]).square().sum(1)
    for draw in torch.cat([torch.empty(0, dtype=torch.float64), *draws]).to(rows.device).split(1):
        total = distance.cumsum(0, dtype=torch.float64)
        seed = torch.searchsorted(total, draw * total[-1], right=True).clamp_max(rows.shape[0] - 1)
        chosen.append(seed)
        distance = torch.minimum(distance, (rows - rows[seed]).square().sum(1))
    return rows[torch.cat(chosen)]


class VectorQuantizer(nn.Module):
    """Nearest-code quantizer with a codebook trained by gradient or by moving averages.

    Statistics of a step (which rows fell on which code) collect over its micro-batches and take effect in `commit`,
    once per optimizer step and reduced over ranks, so that all ranks hold bit-identical codebooks; `discard` drops
    those of a skipped step.

    Args:
        num_embeddings: K. dim: L.
        use_ema_update: moving averages instead of a gradient (van den Oord et al., 2017, appendix A.1).
        ema_decay: per committed step.
        gradient: "straight_through" or "rotation".
        reseed_after: a code that no row chose for this many steps moves to a row of the current step; 0 for never.
        seed: of the draw of those rows.

    Attributes:
        reseed_every: steps at whose multiples training should let codes move, a tenth of `reseed_after`: with many
            codes some reach their limit in almost every step, and ranks that move them wait for each other.
    """

    codebook: Tensor
    initialized: Tensor
    ema_count: Tensor
    ema_sum: Tensor
    unused_steps: Tensor

    def __init__(
        self,
        num_embeddings: int,
        dim: int,
        *,
        use_ema_update: bool = False,
        ema_decay: float = 0.99,
        gradient: str = "straight_through",
        reseed_after: int = 200,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if num_embeddings < 2 or dim < 1:
            raise ValueError(f"num_embeddings must be at least 2 and dim at least 1, got {num_embeddings} and {dim}")
        if gradient not in GRADIENTS:
            raise ValueError(f"gradient must be one of {', '.join(GRADIENTS)}, got {gradient!r}")
        if not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {ema_decay}")
        if reseed_after < 0:
            raise ValueError(f"reseed_after must be at least 0 (0: never), got {reseed_after}")
        self.num_embeddings, self.dim = num_embeddings, dim
        self.use_ema_update, self.ema_decay = use_ema_update, ema_decay
        self.gradient, self.reseed_after, self.seed = gradient, reseed_after, seed
        self.reseed_every = max(1, reseed_after // 10)
        codebook = torch.randn(num_embeddings, dim) / dim**0.5
        if use_ema_update:
            self.register_buffer("codebook", codebook)
            self.register_buffer("ema_count", torch.ones(num_embeddings))
            self.register_buffer("ema_sum", codebook.clone())
        else:
            self.codebook = nn.Parameter(codebook)
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))
        self.register_buffer("unused_steps", torch.zeros(num_embeddings, dtype=torch.long))
        self._pending: _Pending | None = None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """As any module, and a codebook that comes without the rest of its state starts that anew."""
        super()._load_from_state_dict(state_dict, prefix, *args)
        if f"{prefix}codebook" not in state_dict:
            return
        absent = {name for name, _ in self.named_buffers() if prefix + name not in state_dict}
        with torch.no_grad():
            if absent & {"ema_count", "ema_sum"}:
                self._start_averages()
            if "unused_steps" in absent:
                self.unused_steps.zero_()
            if "initialized" in absent:
                self.initialized.fill_(True)

    def _start_averages(self) -> None:
        """Moving averages whose quotient is the codebook: each code as one row that fell on it."""
        self.ema_count.fill_(1)
        self.ema_sum.copy_(self.codebook)

    def lookup(self, ids: Tensor) -> Tensor:
        """Codes [N, L] float32 of ids [N]; ValueError for an id outside [0, K)."""
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= self.num_embeddings):
            raise ValueError(
                f"ids must lie in [0, {self.num_embeddings}), got [{int(ids.min())}, {int(ids.max())}]"
            )
        return F.embedding(ids.long(), self.codebook)

    def forward(self, rows: Tensor) -> Quantized:
        """Quantize rows [N, L]; in training mode also collect the step's statistics."""
        out = self.quantize(rows)
        if self.training:
            self.collect(rows.detach().float(), out.ids)
        return out

    def quantize(self, rows: Tensor) -> Quantized:
        """Quantize rows [N, L] and remember nothing."""
        if rows.ndim != 2 or rows.shape[1] != self.dim:
            raise ValueError(f"rows must be [N, {self.dim}], got {list(rows.shape)}")
        rows = rows.float()
        ids = nearest_code(rows, self.codebook)
        codes = F.embedding(ids, self.codebook)
        fixed = codes.detach()
        if not rows.requires_grad:
            values = fixed
        elif self.gradient == "rotation":
            values = rotate(rows, fixed)
        else:
            values = rows + (fixed - rows).detach()
        codebook_rows = None if self.use_ema_update else (codes - rows.detach()).square().mean(1)
        return Quantized(values, ids, codebook_rows, (rows - fixed).square().mean(1))

    def collect(self, rows: Tensor, ids: Tensor) -> None:
        """Add rows float32 [N, L], which are kept, and their codes' ids [N] to the step's statistics."""
        if self._pending is None:
            zeros = torch.zeros(self.num_embeddings, dtype=torch.long, device=rows.device)
            sums = torch.zeros(self.codebook.shape, device=rows.device) if self.use_ema_update else None
            self._pending = _Pending(zeros, sums)
        pending = self._pending
        # bincount would wait for the GPU to learn the largest id
        pending.counts.scatter_add_(0, ids, torch.ones_like(ids))
        if pending.sums is not None:
            pending.sums.index_add_(0, ids, rows)
        pending.num_rows += rows.shape[0]
        kept = sum(r.shape[0] for r in pending.rows)
        if self.reseed_after and kept < MAX_POOL_ROWS:
            pending.rows.append(rows[: MAX_POOL_ROWS - kept])

    def discard(self) -> None:
        """Forget the statistics since the last `commit`."""
        self._pending = None

    def reduce(self) -> Tensor:
        """Sum the step's statistics over ranks (collective).

        Returns:
            int64 [K], rows of all ranks per code.

        Raises:
            RuntimeError: no forward in training mode came before.
        """
        pending = self._pending
        if pending is None:
            raise RuntimeError("commit needs a forward pass in training mode since the last commit or discard")
        if not pending.reduced and _world_size() > 1:
            dist.all_reduce(pending.counts)
            if pending.sums is not None:
                dist.all_reduce(pending.sums)
        pending.reduced = True
        return pending.counts

    @torch.no_grad()
    def commit(
        self, step: int, *, reseed: bool = True, joint: JointRows | None = None, counts_if: Tensor | None = None
    ) -> CommitReport:
        """Apply the statistics of one optimizer step; collective over ranks, each of which has had at least one row.

        Nothing waits for the device.

        Args:
            step: number of the optimizer step; seeds the choice of rows for unused codes.
            reseed: whether unused codes move now.
            joint: where this rank's rows of the step stand among those of all ranks. Unused codes then move to the rows
                that one rank with all of them would draw. None: rank after rank.
            counts_if: bool scalar on the device, false where the step was skipped: then nothing changes, and the
                report counts no row. None: the step counts.

        Raises:
            RuntimeError: no forward in training mode came before.
        """
        if self._pending is None or not self._pending.reduced:
            self.reduce()
        pending, self._pending = self._pending, None
        counts = pending.counts
        after = {"unused_steps": (self.unused_steps + 1).masked_fill_(counts > 0, 0)}
        if pending.sums is not None:
            count = self.ema_decay * self.ema_count + (1 - self.ema_decay) * counts
            total = self.ema_decay * self.ema_sum + (1 - self.ema_decay) * pending.sums
            means = total / count.clamp_min(LEAST_EMA_COUNT)[:, None]
            codebook = torch.where((count < LEAST_EMA_COUNT)[:, None], self.codebook, means)
            after |= {"ema_count": count, "ema_sum": total, "codebook": codebook}
        for name, value in after.items():
            before = getattr(self, name)
            before.copy_(value if counts_if is None else torch.where(counts_if, value, before))
        dead = self.unused_steps >= self.reseed_after
        if counts_if is not None:
            counts, dead = counts * counts_if, dead & counts_if
        if not (reseed and self.reseed_after):
            return CommitReport(counts, torch.zeros_like(dead))
        return CommitReport(counts, self._reseed(dead, pending, step, joint))

    def _reseed(self, dead: Tensor, pending: _Pending, step: int, joint: JointRows | None) -> Tensor:
        """Move codes of a mask [K] to rows of the step; returns those that had a row to move to, likewise.

        The first `MAX_POOL_ROWS` of the rows of all ranks are drawn from, without putting back. Each rank keeps its
        first rows, which are among them, and hands over those that were drawn.
        """
        own, device = torch.cat(pending.rows), dead.device
        if joint is None:
            rank = dist.get_rank() if _world_size() > 1 else 0
            joint = JointRows(torch.tensor([rank]), torch.tensor([pending.num_rows]), _world_size())
        number, total = joint.numbers(len(own), device)
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) % (1 << 62))
        drawn = _to_device(torch.randperm(MAX_POOL_ROWS, generator=generator), device)
        exist_first = (drawn >= total).int().argsort(stable=True)[: self.num_embeddings]
        drawn = drawn[exist_first]
        at = torch.searchsorted(number, drawn).clamp_(max=len(own) - 1)
        seeds = torch.where((number[at] == drawn)[:, None], own[at], 0)
        if _world_size() > 1:
            dist.all_reduce(seeds)  # one rank's row and zeros
        place = dead.cumsum(0) - 1  # of a code among those that are to move
        moved = dead & (place < total.clamp(max=MAX_POOL_ROWS)) & (place < len(seeds))
        seeds = seeds[place.clamp(0, len(seeds) - 1)]
        self.codebook.copy_(torch.where(moved[:, None], seeds, self.codebook))
        self.unused_steps.masked_fill_(moved, 0)
        if self.use_ema_update:
            self.ema_count.masked_fill_(moved, 1)
            self.ema_sum.copy_(torch.where(moved[:, None], seeds, self.ema_sum))
        return moved

    @torch.no_grad()
    def initialize(self, rows: Tensor, seed: int = 0) -> None:
        """k-means over the rows [n, L] of all ranks; every rank ends with rank 0's codebook."""
        centres = kmeans(gather_rows(rows.detach().float()), self.num_embeddings, seed=seed)
        if _world_size() > 1:
            dist.broadcast(centres, src=0)
        self.codebook.copy_(centres)
        if self.use_ema_update:
            self._start_averages()
        self.unused_steps.zero_()
        self.initialized.fill_(True)


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_rows(rows: Tensor) -> Tensor:
    """Rows [n, L] of all ranks, rank after rank; the ranks' n may differ."""
    if _world_size() == 1:
        return rows
    length = torch.tensor([rows.shape[0]], device=rows.device)
    lengths = [torch.empty_like(length) for _ in range(_world_size())]
    dist.all_gather(lengths, length)
    longest = max(int(n) for n in lengths)
    padded = torch.cat([rows, rows.new_zeros(longest - rows.shape[0], rows.shape[1])])
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(n)] for part, n in zip(parts, lengths)])
