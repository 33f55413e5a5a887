"""Two reconstructions without a network, which any tokenizer must beat: nearest training shape, and block k-means.

Both are given every advantage. The nearest shape is chosen by looking at the answer; k-means sees every block of the
training shapes, keeps the test shape's true block list, and runs until it converges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from trellis.utils.blocks import STORAGE_BLOCK, SparseSDFBlocks

BLOCK_VOXELS = STORAGE_BLOCK**3
_CHUNK_VALUES = 1 << 24
"""Distances held at once; bounds the memory of a k-means step."""


def dense_inside(blocks: SparseSDFBlocks) -> np.ndarray:
    """[R, R, R] bool: voxel centres inside the shape, those outside the blocks included.

    A block that is not stored has one sign, and so has every face-connected set of such blocks: outside if it touches
    the border of the cube, otherwise the sign of the stored voxels that face it. Meant for small R: it is dense.
    """
    from scipy import ndimage

    side = blocks.resolution // STORAGE_BLOCK
    inside = np.zeros((side, STORAGE_BLOCK) * 3, dtype=bool)
    x, y, z = blocks.block_index.astype(np.int64).T
    inside[x, :, y, :, z, :] = blocks.block_sdf < 0
    stored = np.zeros((side,) * 3, dtype=bool)
    stored[x, y, z] = True
    components, count = ndimage.label(~stored)
    votes = np.zeros(count + 1)
    for axis in range(3):
        for step, face in ((1, STORAGE_BLOCK - 1), (-1, 0)):
            # blocks are [X, 8, Y, 8, Z, 8]; the face of a stored block that looks at its neighbour in `step`
            sign = np.where(np.take(inside, face, axis=2 * axis + 1), 1.0, -1.0)
            other = tuple(a for a in range(sign.ndim) if a not in _block_axes(axis))
            mean = sign.mean(axis=other)
            source = [slice(None)] * 3
            target = [slice(None)] * 3
            source[axis] = slice(None, -1) if step == 1 else slice(1, None)
            target[axis] = slice(1, None) if step == 1 else slice(None, -1)
            pair = stored[tuple(source)] & ~stored[tuple(target)]
            np.add.at(votes, components[tuple(target)][pair], mean[tuple(source)][pair])
    for axis in range(3):
        for index in (0, -1):
            votes[np.unique(np.take(components, index, axis=axis))] = -np.inf
    fill = (votes > 0)[components] & ~stored
    inside |= fill[:, None, :, None, :, None]
    return inside.reshape((blocks.resolution,) * 3)


def _block_axes(axis: int) -> tuple[int, ...]:
    """Positions of the three block axes after the voxel axis of `axis` was taken out of [X, 8, Y, 8, Z, 8]."""
    return tuple(2 * a - (1 if a > axis else 0) for a in range(3))


def overlap_dice(a: np.ndarray, b: np.ndarray) -> float:
    """Dice of two boolean arrays; 1 when both are empty."""
    total = np.count_nonzero(a) + np.count_nonzero(b)
    return 2.0 * np.count_nonzero(a & b) / total if total else 1.0


def nearest_training_shape(test_inside: np.ndarray, train_inside: Sequence[np.ndarray]) -> tuple[int, float]:
    """Index and Dice, in grid space, of the training occupancy that overlaps a test occupancy best.

    Raises:
        ValueError: there is no training shape.
    """
    if not len(train_inside):
        raise ValueError("a nearest training shape needs at least one training shape, got none")
    scores = [overlap_dice(test_inside, inside) for inside in train_inside]
    best = int(np.argmax(scores))
    return best, scores[best]


@dataclass(frozen=True)
class BlockKMeans:
    """Centres of a k-means on TSDF blocks.

    Attributes:
        centres: [K, 512] float32, C order inside the block.
        inertia: mean squared distance of a training block to its centre, after every iteration.
        converged: whether the last iteration changed the inertia by less than the tolerance.
        init: how the centres were first chosen.
    """

    centres: torch.Tensor
    inertia: tuple[float, ...]
    converged: bool
    init: str


def block_rows(shapes: Sequence[SparseSDFBlocks]) -> torch.Tensor:
    """[n, 512] float32 rows of all blocks of all shapes, C order inside the block."""
    if not shapes:
        return torch.zeros(0, BLOCK_VOXELS)
    return torch.from_numpy(np.concatenate([s.block_sdf.reshape(-1, BLOCK_VOXELS) for s in shapes])).float()


def nearest_centres(rows: torch.Tensor, centres: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For rows [n, C] the nearest of centres [K, C]: indices [n] int64 and squared distances [n], in chunks."""
    ids, distances = [], []
    norms = centres.square().sum(dim=1)
    for part in rows.split(max(1, _CHUNK_VALUES // max(1, len(centres)))):
        score = torch.addmm(norms, part, centres.t(), alpha=-2)
        best, index = score.min(dim=1)
        ids.append(index)
        distances.append((best + part.square().sum(dim=1)).clamp_min_(0))
    if not ids:
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    return torch.cat(ids), torch.cat(distances)


def _plus_plus(rows: torch.Tensor, codes: int, generator: torch.Generator) -> torch.Tensor:
    """k-means++ seeding (Arthur and Vassilvitskii 2007): each centre drawn in proportion to the squared distance."""
    chosen = [int(torch.randint(len(rows), (1,), generator=generator))]
    norms = rows.square().sum(dim=1)
    distance = torch.full((len(rows),), float("inf"))
    for _ in range(codes - 1):
        centre = rows[chosen[-1]]
        torch.minimum(distance, norms + centre.square().sum() - 2 * (rows @ centre), out=distance)
        weights = distance.clamp_min_(0).double()
        if float(weights.sum()) <= 0:  # fewer distinct rows than codes: any row will do
            weights = torch.ones_like(weights)
        target = torch.rand(1, generator=generator, dtype=torch.float64) * weights.sum()
        chosen.append(min(int(torch.searchsorted(weights.cumsum(0), target)), len(rows) - 1))
    return rows[chosen].clone()


def _lloyd(rows: torch.Tensor, centres: torch.Tensor, max_iterations: int, tolerance: float, init: str) -> BlockKMeans:
    history: list[float] = []
    converged = False
    for _ in range(max_iterations):
        ids, distance = nearest_centres(rows, centres)
        history.append(float(distance.double().mean()))
        if len(history) > 1 and history[-2] - history[-1] <= tolerance * history[-2]:
            converged = True
            break
        counts = torch.bincount(ids, minlength=len(centres))
        centres = torch.zeros_like(centres).index_add_(0, ids, rows) / counts.clamp_min(1)[:, None]
        empty = torch.nonzero(counts == 0)[:, 0]
        if len(empty):  # an unused centre takes over one of the worst-served rows
            centres[empty] = rows[distance.topk(len(empty)).indices]
    return BlockKMeans(centres, tuple(history), converged, init)


def fit_block_kmeans(
    rows: torch.Tensor, codes: int, *, seed: int = 0, max_iterations: int = 200, tolerance: float = 1e-4
) -> BlockKMeans:
    """k-means on rows [n, C] float32 by Lloyd's iterations to convergence; the better of two seedings is kept.

    The seedings are k-means++ and a random subset of the rows. On TSDF blocks either may win.

    Raises:
        ValueError: fewer rows than codes.
    """
    if codes < 1 or len(rows) < codes:
        raise ValueError(f"k-means with {codes} codes needs at least as many training blocks, got {len(rows)}")
    generator = torch.Generator().manual_seed(seed)
    subset = rows[torch.randperm(len(rows), generator=generator)[:codes]].clone()
    fits = [
        _lloyd(rows, centres, max_iterations, tolerance, init)
        for init, centres in (("random subset", subset), ("k-means++", _plus_plus(rows, codes, generator)))
    ]
    return min(fits, key=lambda fit: fit.inertia[-1])


def quantize_blocks(blocks: SparseSDFBlocks, model: BlockKMeans) -> SparseSDFBlocks:
    """The shape with every block replaced by its nearest centre; block list and `to_world` stay the true ones."""
    ids, _ = nearest_centres(block_rows([blocks]), model.centres)
    values = model.centres[ids].clamp(-1, 1).numpy().astype(np.float16)
    return replace(blocks, block_sdf=values.reshape(-1, *(STORAGE_BLOCK,) * 3))


def transplant(shape: SparseSDFBlocks, target: SparseSDFBlocks) -> SparseSDFBlocks:
    """`shape` placed where `target` is: its blocks with the other's `to_world`."""
    return replace(shape, to_world=target.to_world)
