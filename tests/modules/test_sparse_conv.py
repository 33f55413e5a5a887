"""Convolutions: the reference against a dense convolution, the production path against the reference."""

from __future__ import annotations

import pytest
import torch
from sparse_batches import random_pyramid
from torch.nn import functional as F

from trellis.modules.sparse.conv import cpu, dense, functional, reference
from trellis.modules.sparse.conv.collapse import collapse_weight

SIZES = [([5, 0, 9], 3, 5), ([1], 1, 2), ([], 4, 4), ([27], 7, 1)]


def dense_oracle(feats, coords, weight, extent):
    """torch's dense cross-correlation on the full grid, read off at the voxels that exist."""
    samples = int(coords[:, 0].max()) + 1
    grid = torch.zeros(samples, feats.shape[1], extent, extent, extent, dtype=feats.dtype)
    b, x, y, z = coords.long().unbind(1)
    grid[b, :, x, y, z] = feats
    # tap k reads (dx, dy, dz) with dx fastest: [dz, dy, dx, in, out] -> [out, in, dx, dy, dz]
    kernel = weight.view(3, 3, 3, *weight.shape[1:]).permute(4, 3, 2, 1, 0)
    return F.conv3d(grid, kernel, padding=1)[b, :, x, y, z]


@pytest.mark.parametrize("level", [1, 2, 3])
def test_reference_equals_dense_convolution(level):
    pyramid = random_pyramid([20, 7], density=0.05)
    grid = pyramid.grids[level]
    feats = torch.randn(grid.num_rows, 3, dtype=torch.float64)
    weight = torch.randn(27, 3, 4, dtype=torch.float64)
    out = reference.submanifold_conv3d(feats, weight, None, grid.neighbours)
    expected = dense_oracle(feats, grid.coords, weight, 4 * grid.side)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_impulse_moves_to_the_right_voxel():
    """Only the tap at offset (+1, 0, -1) is set: voxel v receives what lies at v + (1, 0, -1)."""
    pyramid = random_pyramid([64], density=1.0)
    grid = pyramid.grids[2]
    feats = torch.randn(grid.num_rows, 1, dtype=torch.float64)
    weight = torch.zeros(27, 1, 1, dtype=torch.float64)
    weight[9 * 0 + 3 * 1 + 2] = 1
    out = functional.submanifold_conv3d(feats, weight, None, grid)
    where = {tuple(c): i for i, c in enumerate(grid.coords.tolist())}
    for (b, x, y, z), i in where.items():
        source = where.get((b, x + 1, y, z - 1))
        assert out[i] == (feats[source] if source is not None else 0)


@pytest.mark.parametrize("backend", ["cpu", "dense"])
@pytest.mark.parametrize("blocks, c_in, c_out", SIZES)
@pytest.mark.parametrize("level", [1, 2, 3])
def test_convolution_and_gradients_against_reference(blocks, c_in, c_out, level, backend, monkeypatch):
    monkeypatch.setattr(cpu, "CHUNK_BYTES", 1)  # many chunks
    grid = random_pyramid(blocks, seed=level).grids[level]
    check_gradients(
        lambda x, w, b: functional.submanifold_conv3d(x, w, b, grid, backend=backend),
        lambda x, w, b: reference.submanifold_conv3d(x, w, b, grid.neighbours),
        [(grid.num_rows, c_in), (27, c_in, c_out), (c_out,)],
    )


@pytest.mark.parametrize("backend", ["cpu", "dense"])
@pytest.mark.parametrize("blocks, c_in, c_out", SIZES)
@pytest.mark.parametrize("side", [1, 2])
def test_subdivide_convolution_and_gradients_against_reference(blocks, c_in, c_out, side, backend):
    grid = random_pyramid(blocks).topology.dense_grid(side)
    check_gradients(
        lambda x, w, b: functional.subdivide_conv3d(x, w, b, grid, backend=backend),
        lambda x, w, b: reference.subdivide_conv3d(x, w, b, grid.neighbours),
        [(grid.num_rows, c_in), (27, c_in, c_out), (c_out,)],
    )


@pytest.mark.parametrize("backend", ["cpu", "dense"])
@pytest.mark.parametrize("blocks, c_in, c_out", SIZES)
def test_last_stage_and_gradients_against_reference(blocks, c_in, c_out, backend):
    grid = random_pyramid(blocks).topology.dense_grid(2)
    check_gradients(
        lambda *a: functional.subdivide_conv_to_scalar(*a, grid, backend=backend),
        lambda *a: reference.subdivide_conv_to_scalar(*a, grid.neighbours).view(-1, 8),
        [(grid.num_rows, c_in), (27, c_in, c_out), (c_out,), (1, c_out), (1,)],
    )


def check_gradients(fast, slow, shapes):
    """Forward and every gradient in float64, to rounding."""
    torch.manual_seed(1)
    inputs = [torch.randn(s, dtype=torch.float64) * 0.3 for s in shapes]
    results = []
    for function in (fast, slow):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = function(*leaves)
        weights = torch.linspace(-1, 2, max(1, out.numel()), dtype=out.dtype)[: out.numel()].view(out.shape)
        (out * weights).sum().backward()
        results.append([out.detach()] + [leaf.grad for leaf in leaves])
    for got, expected in zip(*results):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_subdivided_rows_are_the_finer_grid_in_morton_order():
    """Row 8 n + child of the subdivision is the row of the finer dense grid at that coordinate."""
    topology = random_pyramid([6, 3]).topology
    parents, children = topology.dense_grid(2), topology.dense_grid(4)
    table = reference.subdivide_neighbours(parents.neighbours)
    assert torch.equal(table, children.neighbours)
    assert torch.equal(children.coords[:, 1:] // 2, parents.coords.repeat_interleave(8, 0)[:, 1:])


def test_collapsed_weight_keeps_the_sum_of_all_taps():
    weight = torch.randn(27, 2, 3, dtype=torch.float64)
    for child in collapse_weight(weight):
        torch.testing.assert_close(child.sum(0), weight.sum(0))


def test_auto_takes_the_dense_form_only_where_blocks_fill_their_box():
    full = random_pyramid([60], density=0.5).grids[1]
    scattered = random_pyramid([60], extent=16, density=0.5).grids[1]
    feats = torch.zeros(full.num_rows, 4), torch.zeros(scattered.num_rows, 4)
    assert dense.is_worthwhile(feats[0], 4, full) and not dense.is_worthwhile(feats[1], 4, scattered)
    assert not dense.is_worthwhile(feats[0].bfloat16(), 4, full)


def test_large_levels_compute_their_table_in_parts(monkeypatch):
    from trellis.modules.sparse import levels

    whole = random_pyramid([9], seed=3).grids[1]
    parts = random_pyramid([9], seed=3).grids[1]
    monkeypatch.setattr(levels, "TABLE_ROWS", 0)
    n = parts.num_rows
    got = torch.cat([parts.neighbour_rows(0, n // 3), parts.neighbour_rows(n // 3, n)])
    assert torch.equal(got, whole.neighbours)


def test_bad_arguments_are_named():
    grid = random_pyramid([3]).grids[2]
    feats, weight = torch.zeros(grid.num_rows, 4), torch.zeros(27, 4, 2)
    with pytest.raises(ValueError, match="feats must be"):
        functional.submanifold_conv3d(feats[1:], weight, None, grid)
    with pytest.raises(ValueError, match="weight must be"):
        functional.submanifold_conv3d(feats, weight[:, :3], None, grid)
    with pytest.raises(ValueError, match="bias must be"):
        functional.submanifold_conv3d(feats, weight, torch.zeros(3), grid)
    with pytest.raises(ValueError, match="backend must be one of"):
        functional.submanifold_conv3d(feats, weight, None, grid, backend="cudnn")
    with pytest.raises(ValueError, match="triton"):
        functional.submanifold_conv3d(feats.double(), weight.double(), None, grid, backend="triton")
