"""Scores of one shape, in this process or in several; imports no torch, so that a process for it starts quickly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from trellis.utils.blocks import SparseSDFBlocks

TSDF_SUFFIX = "_tsdf"
"""Marks the columns of the TSDF itself, the ceiling of every model at its resolution."""
TOLERANCES_MM = (1.0, 2.0)
"""Of the normalised surface Dice, unless others are given."""
OF_TRUTH = ("volume_truth_ml", "euler_truth", "truth_is_empty")
"""Figures of the truth alone; the TSDF has a column of every other."""


@dataclass(frozen=True)
class Pair:
    """One shape to score, small enough to hand to another process.

    Attributes:
        sha256, label, patient_id: which shape. blocks: the true TSDF. decoded: the reconstruction's, None to score the
            TSDF alone. truth: the true surface's file; None: the TSDF's own surface is the truth.
        token_figures: size of the tokens (`bits_per_shape`) and use of the codes; empty without tokens.
        mask: file of the label on the volume that the shape came from, None if it came from a mesh.
        failed: there is no reconstruction, because the shape could not be encoded or decoded.
    """

    sha256: str
    label: str
    patient_id: str
    blocks: SparseSDFBlocks
    decoded: SparseSDFBlocks | None
    truth: Path | None
    token_figures: dict[str, float]
    mask: Path | None = None
    failed: bool = False


def score_pairs(
    pairs: Iterator[Pair], workers: int, num_samples: int, tolerances_mm: Sequence[float] = TOLERANCES_MM
) -> Iterator[tuple[Pair, Callable[[], dict[str, Any]]]]:
    """Each pair with a function that gives its row or raises; in processes of their own when there are several."""
    if workers <= 1:
        for pair in pairs:
            yield pair, lambda pair=pair: score_pair(pair, num_samples, tolerances_mm)
        return
    pool = _pool(workers)
    try:
        waiting: list[tuple[Pair, Callable[[], dict[str, Any]]]] = []
        for pair in pairs:
            given = (pair, num_samples, tolerances_mm)
            try:
                future = pool.submit(score_pair, *given)
            except BrokenProcessPool:  # one of its processes was ended; those that wait will be scored alone
                pool.shutdown(wait=False)
                pool = _pool(workers)
                future = pool.submit(score_pair, *given)
            waiting.append((pair, partial(_result, future, *given)))
            if len(waiting) > 2 * workers:  # bounds the shapes that are in memory at once
                yield waiting.pop(0)
        yield from waiting
    finally:
        pool.shutdown(cancel_futures=True)


def _pool(workers: int) -> ProcessPoolExecutor:
    # spawn: a forked child would share the parent's CUDA context and thread pools
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"))


def _result(future: Future, pair: Pair, *given: Any) -> dict[str, Any]:
    """The row of a pair; once more in a process of its own where one that scored pairs was ended.

    Raises:
        RuntimeError: that one was ended too. Else as `score_pair`.
    """
    try:
        return future.result()
    except BrokenProcessPool:
        with _pool(1) as alone:
            try:
                return alone.submit(score_pair, pair, *given).result()
            except BrokenProcessPool:
                raise RuntimeError("the process that scored it was ended, for want of memory perhaps") from None


def score_pair(
    pair: Pair, num_samples: int = 100_000, tolerances_mm: Sequence[float] = TOLERANCES_MM
) -> dict[str, Any]:
    """The row of one shape: metrics of the reconstruction, and those of the TSDF with `_tsdf` behind the name.

    A shape that failed has an empty reconstruction, and counts as the worst even where the truth is empty too. Figures
    in mm and ml are None for one without `to_world`, and overlaps where there is no voxel to count.
    """
    from trellis.geometry.isosurface import extract_mesh
    from trellis.geometry.metrics import dice_blocks, evaluate_pair, worst_metrics
    from trellis.geometry.source_grid import load_source_mask, metrics_on_source_grid

    blocks = pair.blocks
    tsdf = extract_mesh(blocks)
    truth = tsdf if pair.truth is None else true_surface(pair)
    frame = np.eye(4) if blocks.to_world is None else blocks.to_world
    options = {"to_world": frame, "num_samples": num_samples, "tolerances_mm": tolerances_mm}
    source = None if pair.mask is None else load_source_mask(pair.mask)

    def scores(mesh: tuple[np.ndarray, np.ndarray], in_blocks: float | None) -> dict[str, Any]:
        row = evaluate_pair(mesh, truth, blocks.resolution, **options)
        row["dice_blocks"] = 0.0 if row["pred_is_empty"] and not row["truth_is_empty"] else in_blocks
        return row if source is None else row | metrics_on_source_grid(mesh, source)

    ceiling = scores(tsdf, 1.0 if (blocks.block_sdf < 0).any() else None)  # what `dice_blocks` has for equal shapes
    row: dict[str, Any] = {"truth": "tsdf" if pair.truth is None else "mesh", "num_blocks": blocks.num_blocks}
    row |= pair.token_figures
    if pair.failed:
        row |= scores((np.zeros((0, 3)), np.zeros((0, 3), dtype=np.int64)), 0.0)
        row |= worst_metrics(blocks.resolution, float(frame[0, 0]), tolerances_mm)
    elif pair.decoded is None:
        row |= ceiling
    else:
        row |= scores(extract_mesh(pair.decoded), dice_blocks(pair.decoded, blocks))
    row |= {f"{name}{TSDF_SUFFIX}": value for name, value in ceiling.items() if name not in OF_TRUTH}
    return _as_placed(row, blocks)


def worst_row(pair: Pair, tolerances_mm: Sequence[float] = TOLERANCES_MM) -> dict[str, Any]:
    """The row of a shape that cannot be scored: what an empty reconstruction gets, as far as it is known."""
    from trellis.geometry.metrics import worst_metrics

    blocks = pair.blocks
    side = 1.0 if blocks.to_world is None else float(blocks.to_world[0, 0])
    row = {"num_blocks": blocks.num_blocks, **pair.token_figures, "dice_blocks": 0.0}
    row |= worst_metrics(blocks.resolution, side, tolerances_mm)
    if pair.mask is not None:
        row |= {"dice_source": 0.0, "iou_source": 0.0, "volume_error_source_fraction": -1.0}
    return _as_placed(row, blocks)


def _as_placed(row: dict[str, Any], blocks: SparseSDFBlocks) -> dict[str, Any]:
    """The row without figures in mm where the shape has no place in the world: grid units are no millimetres."""
    if blocks.to_world is not None:
        return row
    return {name: None if "_mm" in name or "_ml" in name or "nsd_" in name else v for name, v in row.items()}


def true_surface(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """The surface that the shape was made from: vertices [V, 3] RAS mm, faces [F, 3]; else that of its TSDF."""
    from trellis.geometry.isosurface import extract_mesh
    from trellis.utils.mesh_utils import read_mesh

    if pair.truth is None:
        return extract_mesh(pair.blocks)
    mesh = read_mesh(pair.truth, mesh_space="RAS")
    return mesh.vertices, mesh.faces
