"""Null models against constructions whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trellis.pipelines.null_models import (
    block_rows,
    dense_inside,
    fit_block_kmeans,
    nearest_centres,
    nearest_training_shape,
    overlap_dice,
    quantize_blocks,
    transplant,
)
from trellis.utils.blocks import SparseSDFBlocks, block_voxel_offsets, morton_order


def blocks_of(distance, resolution: int) -> SparseSDFBlocks:
    """Blocks of a distance function in voxel units, from its dense evaluation."""
    axis = np.arange(resolution) + 0.5
    grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1)
    tsdf = np.clip(distance(grid) / 4, -1, 1).astype(np.float16)
    side = resolution // 8
    cells = tsdf.reshape(side, 8, side, 8, side, 8).transpose(0, 2, 4, 1, 3, 5)
    index = np.argwhere((np.abs(cells) < 1).any(axis=(3, 4, 5)))
    index = index[morton_order(index)]
    return SparseSDFBlocks(
        index.astype(np.int16), np.ascontiguousarray(cells[tuple(index.T)]), np.diag([100.0, 100, 100, 1]), resolution
    )


def ball(centre, radius):
    return lambda grid: np.linalg.norm(grid - np.asarray(centre), axis=-1) - radius


def test_inside_of_a_ball_reaches_blocks_that_are_not_stored():
    distance = ball((47.3, 52.1, 45.9), 38)
    blocks = blocks_of(distance, 104)
    axis = np.arange(104) + 0.5
    truth = distance(np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1)) < 0
    inside = dense_inside(blocks)
    assert blocks.num_blocks < 13**3 - 100, "the test needs blocks that are not stored inside the ball"
    np.testing.assert_array_equal(inside, truth)


def test_inside_of_a_shell_keeps_its_cavity():
    outer, inner = ball((48, 50, 52), 43), ball((48, 50, 52), 26)
    blocks = blocks_of(lambda g: np.maximum(outer(g), -inner(g)), 104)
    axis = np.arange(104) + 0.5
    grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1)
    np.testing.assert_array_equal(dense_inside(blocks), np.maximum(outer(grid), -inner(grid)) < 0)


def test_inside_of_no_block_is_empty():
    empty = SparseSDFBlocks(np.zeros((0, 3), np.int16), np.zeros((0, 8, 8, 8), np.float16), np.eye(4), 32)
    assert dense_inside(empty).shape == (32, 32, 32)
    assert not dense_inside(empty).any()


def test_dice_closed_form():
    a = np.array([1, 1, 1, 0, 0], bool)
    b = np.array([0, 1, 1, 1, 1], bool)
    assert overlap_dice(a, b) == pytest.approx(2 * 2 / 7)
    assert overlap_dice(a, ~a) == 0
    assert overlap_dice(a & False, a & False) == 1


def test_nearest_training_shape_is_the_closest_radius_and_keeps_its_place():
    train = [blocks_of(ball((32, 32, 32), r), 64) for r in (12, 17, 22)]
    test = blocks_of(ball((32, 32, 32), 18.5), 64)
    index, dice = nearest_training_shape(dense_inside(test), [dense_inside(t) for t in train])
    assert index == 1
    assert dice == pytest.approx(2 * 17**3 / (17**3 + 18.5**3), abs=0.01)
    moved = transplant(train[1], blocks_of(ball((32, 32, 32), 18.5), 64))
    np.testing.assert_array_equal(moved.to_world, test.to_world)
    with pytest.raises(ValueError, match="at least one training shape"):
        nearest_training_shape(dense_inside(test), [])


def test_kmeans_finds_separated_clusters_and_its_inertia_falls():
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(12, 512, generator=generator)
    rows = (centres[:, None] + 0.01 * torch.randn(12, 30, 512, generator=generator)).reshape(-1, 512)
    fit = fit_block_kmeans(rows, 12, seed=3)
    assert fit.converged
    assert all(b <= a for a, b in zip(fit.inertia, fit.inertia[1:]))
    ids, distance = nearest_centres(rows, fit.centres)
    assert len(ids.reshape(12, 30).unique(dim=1)[0]) and all(len(set(row.tolist())) == 1 for row in ids.reshape(12, 30))
    assert float(distance.mean()) == pytest.approx(0.01**2 * 512 * 29 / 30, rel=0.02)


def test_kmeans_beats_a_random_codebook_and_is_deterministic():
    rows = block_rows([blocks_of(ball((30 + i, 33, 31), 18 + i), 64) for i in range(4)])
    fit = fit_block_kmeans(rows, 32, seed=0)
    again = fit_block_kmeans(rows, 32, seed=0)
    assert torch.equal(fit.centres, again.centres)
    random = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(5))[:32]]
    assert fit.inertia[-1] < 0.9 * float(nearest_centres(rows, random)[1].mean())


def test_nearest_centres_agree_with_distances_in_float64():
    generator = torch.Generator().manual_seed(2)
    rows, centres = torch.randn(203, 7, generator=generator), torch.randn(31, 7, generator=generator)
    ids, distance = nearest_centres(rows, centres)
    exact = torch.cdist(rows.double(), centres.double()).square()
    assert torch.equal(ids, exact.argmin(dim=1))
    assert torch.allclose(distance.double(), exact.min(dim=1).values, atol=1e-5)
    assert nearest_centres(rows[:0], centres)[0].shape == (0,)


def test_quantized_blocks_are_exact_when_every_block_is_a_code():
    shape = blocks_of(ball((31, 29, 35), 15), 64)
    rows = block_rows([shape])
    fit = fit_block_kmeans(rows, len(rows))
    out = quantize_blocks(shape, fit)
    np.testing.assert_allclose(out.block_sdf.astype(np.float32), shape.block_sdf.astype(np.float32), atol=1e-3)
    np.testing.assert_array_equal(out.block_index, shape.block_index)


def test_too_few_blocks_are_refused():
    with pytest.raises(ValueError, match="at least as many training blocks, got 3"):
        fit_block_kmeans(torch.zeros(3, 512), 4)


def test_rows_are_in_c_order():
    shape = blocks_of(ball((31, 29, 35), 15), 64)
    offset = block_voxel_offsets()[137]
    assert float(block_rows([shape])[2, 137]) == float(shape.block_sdf[2][tuple(offset)])
