"""Levels, pooling, norms, attention and the fused first stage, against plain independent computations."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from sparse_batches import random_pyramid
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from trellis.datasets.sparse_sdf import joined_window_sizes, window_sizes
from trellis.modules.sparse import attention
from trellis.modules.sparse.conv import reference
from trellis.modules.sparse.levels import Topology, blocks_from_rows, build_pyramid
from trellis.modules.sparse.norm import SparseGroupNorm
from trellis.modules.sparse.plans import WindowPlan
from trellis.modules.sparse.pool import children_of, first_stage, pool
from trellis.modules.sparse.tensor import SparseTensor
from trellis.modules.sparse.transformer import position_embedding


def test_levels_hold_the_distinct_coordinates_of_each_stride():
    pyramid = random_pyramid([13, 4], density=0.02)
    finest = pyramid.grids[0].coords
    for level, grid in enumerate(pyramid.grids):
        halved = torch.cat([finest[:, :1], finest[:, 1:] >> level], 1)
        assert {tuple(c) for c in grid.coords.tolist()} == {tuple(c) for c in halved.tolist()}
        assert grid.num_rows == len(torch.unique(halved, dim=0))


def test_neighbour_table_equals_a_dictionary():
    grid = random_pyramid([9, 5], density=0.1).grids[1]
    where = {tuple(c): i for i, c in enumerate(grid.coords.tolist())}
    table = grid.neighbours
    for i, (b, x, y, z) in enumerate(grid.coords.tolist()):
        for k in range(27):
            target = (b, x + k % 3 - 1, y + k // 3 % 3 - 1, z + k // 9 - 1)
            assert table[i, k] == where.get(target, -1)


def test_flat_rows_become_the_same_blocks():
    pyramid = random_pyramid([6, 2], density=0.2)
    grid = pyramid.grids[0]
    rows = pyramid.values.reshape(-1)[grid.slots]
    shuffle = torch.randperm(grid.num_rows)
    coords = grid.coords[shuffle]
    got, values, listed = blocks_from_rows(coords[:, 1:], coords[:, 0], rows[shuffle][:, None])
    assert torch.equal(got, pyramid.topology.coords)
    assert torch.equal(listed, grid.occupancy)
    assert torch.equal(values, torch.where(listed, pyramid.values, 0))


def test_bad_rows_are_refused():
    index = torch.tensor([[1, 2, 3], [1, 2, 3]])
    with pytest.raises(ValueError, match="listed twice"):
        blocks_from_rows(index, torch.zeros(2, dtype=torch.long), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="negative"):
        blocks_from_rows(-index, torch.tensor([0, 1]), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="must agree"):
        blocks_from_rows(index, torch.tensor([0, 1]), torch.zeros(3, 1))
    with pytest.raises(ValueError, match="active voxel"):
        build_pyramid(torch.zeros(1, 4), torch.zeros(1, 512), torch.zeros(1, 512, dtype=torch.bool))
    with pytest.raises(ValueError, match="feats must be"):
        SparseTensor(torch.zeros(2, 3), random_pyramid([1]).grids[3])


@pytest.mark.parametrize("level", [0, 1, 2])
def test_pool_and_gradient_against_reference(level):
    pyramid = random_pyramid([7, 3], density=0.1)
    fine, coarse = pyramid.grids[level], pyramid.grids[level + 1]
    a = torch.randn(fine.num_rows, 5, dtype=torch.float64, requires_grad=True)
    b = a.detach().clone().requires_grad_()
    weights = torch.randn(coarse.num_rows, 5, dtype=torch.float64)
    out, expected = pool(a, fine, coarse), reference.pool(b, children_of(fine, coarse))
    torch.testing.assert_close(out, expected)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(a.grad, b.grad)


def test_pool_divides_by_one_more_than_the_children():
    pyramid = random_pyramid([5], density=0.1)
    fine, coarse = pyramid.grids[0], pyramid.grids[1]
    out = pool(torch.ones(fine.num_rows, 1, dtype=torch.float64), fine, coarse)
    counts = (children_of(fine, coarse) >= 0).sum(1)
    torch.testing.assert_close(out[:, 0], (counts / (counts + 1.0)).double())


def test_group_norm_runs_over_voxels_and_channels_of_one_sample():
    grid = random_pyramid([6, 0, 11], density=0.1).grids[1]
    norm = SparseGroupNorm(64).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(grid.num_rows, 64, dtype=torch.float64) * 3 + 5
    out = norm(x, grid)
    for sample in (0, 2):
        rows = grid.coords[:, 0] == sample
        grouped = x[rows].view(-1, 32, 2)
        mean, var = grouped.mean((0, 2), keepdim=True), grouped.var((0, 2), correction=0, keepdim=True)
        expected = ((grouped - mean) / (var + 1e-5).sqrt()).view(-1, 64) * norm.weight + norm.bias
        torch.testing.assert_close(out[rows], expected)


def test_group_norm_of_one_voxel_and_of_none():
    one = random_pyramid([1], density=0).grids[0]
    assert one.num_rows == 1
    assert torch.isfinite(SparseGroupNorm(32)(torch.ones(1, 32), one)).all()
    empty = random_pyramid([]).grids[0]
    assert SparseGroupNorm(32)(torch.ones(0, 32), empty).shape == (0, 32)


@pytest.mark.parametrize("blocks", [[6, 3], [1], []])
def test_first_stage_equals_the_plain_path(blocks):
    """Linear, GroupNorm, SiLU and pool written out on all voxels, against the fused form; values and gradients."""
    pyramid = random_pyramid(blocks, density=0.2, seed=5)
    fine, coarse = pyramid.grids[:2]
    channels, groups = 32, 32
    torch.manual_seed(0)
    inputs = [torch.randn(channels, dtype=torch.float64) for _ in range(4)]
    norm = SparseGroupNorm(channels).double()
    results = []
    for fused in (True, False):
        leaves = [x.clone().requires_grad_() for x in inputs]
        if fused:
            hidden, skip = first_stage(pyramid.values, fine, coarse, *leaves, groups, 1e-5)
        else:
            rows = pyramid.values.reshape(-1)[fine.slots][:, None]
            x = rows * leaves[0] + leaves[1]
            norm.weight, norm.bias = (torch.nn.Parameter(p.detach()) for p in leaves[2:])
            del norm.weight, norm.bias
            norm.weight, norm.bias = leaves[2], leaves[3]
            hidden = reference.pool(F.silu(norm(x, fine)), children_of(fine, coarse))
            skip = reference.pool(x, children_of(fine, coarse))
        weights = torch.linspace(-1, 1, max(1, hidden.numel()), dtype=torch.float64)[: hidden.numel()]
        total = (hidden * weights.view(hidden.shape)).sum() + (skip**2).sum()
        if total.requires_grad:
            total.backward()
        results.append([hidden.detach(), skip.detach(), *(leaf.grad for leaf in leaves)])
    for got, expected in zip(*results):
        if expected is None:  # the plain path of an empty batch touches no parameter
            expected = torch.zeros_like(got)
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)


def test_first_stage_keeps_digits_of_a_nearly_constant_field():
    """Values that differ in the fifth digit: raw moments in float32 would lose the variance."""
    pyramid = random_pyramid([8], density=0.5)
    values = 0.9 + 1e-5 * pyramid.values
    weight, bias, gamma, beta = (torch.ones(32) for _ in range(4))
    args = (pyramid.grids[0], pyramid.grids[1])
    # eps far below the variance, so that the variance decides
    parameters = (weight, bias, gamma, beta)
    single, _ = first_stage(values.float(), *args, *parameters, 32, 1e-14)
    double, _ = first_stage(values.float().double(), *args, *(t.double() for t in parameters), 32, 1e-14)
    assert (single - double).abs().max() < 2e-2


@pytest.mark.parametrize("shift", [0, 4])
def test_attention_stays_inside_its_window(shift, monkeypatch):
    monkeypatch.setattr(attention, "LENGTH_STEP", 4)
    monkeypatch.setattr(attention, "MAX_PADDED_ROWS", 64)
    coords = torch.stack(torch.meshgrid(*[torch.arange(0, 20, 3)] * 3, indexing="ij"), -1).view(-1, 3)
    coords = torch.cat([torch.cat([torch.full((len(coords), 1), b), coords], 1) for b in (0, 1)])
    coords = coords[torch.randperm(len(coords))[:301]]
    topology = Topology(coords)
    q, k, v = (torch.randn(301, 2, 8, dtype=torch.float64) for _ in range(3))
    out = attention.windowed_attention(q, k, v, topology.windows(8, shift))
    window = torch.cat([coords[:, :1], (coords[:, 1:] + shift) // 8], 1)
    same = (window[:, None] == window[None]).all(-1)
    scores = torch.einsum("ihd,jhd->hij", q, k) / 8**0.5
    scores = scores.masked_fill(~same, float("-inf"))
    torch.testing.assert_close(out, torch.einsum("hij,jhd->ihd", scores.softmax(-1), v))


class NoQuestions(TorchDispatchMode):
    """Fails on operations whose result the host waits for on a GPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert "unique" not in name and name not in ("_local_scalar_dense", "nonzero", "item", "masked_select"), name
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("empty", [0, 2])
@pytest.mark.parametrize("shift", [0, 2])
def test_evenly_padded_attention_asks_nothing(shift, empty, monkeypatch):
    """The values and gradients of the windows by their lengths, without their lengths; several groups of windows."""
    monkeypatch.setattr(attention, "LENGTH_STEP", 4)
    monkeypatch.setattr(attention, "MAX_PADDED_ROWS", 128)
    plan = random_pyramid([40, 0, 27], extent=8).topology.windows(4, shift)
    bounds = torch.cat([plan.cu_seqlens, plan.cu_seqlens[-1:].expand(empty)])
    results = []
    for function in (attention.padded_attention, attention.evenly_padded_attention):
        torch.manual_seed(0)
        q, k, v = (torch.randn(67, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
        handed = torch.randn(67, 2, 8, dtype=torch.float64)
        mode = NoQuestions() if function is attention.evenly_padded_attention else nullcontext()
        with mode:
            out = function(q, k, v, WindowPlan(plan.order, plan.inverse, bounds, plan.max_length))
            results.append([out.detach(), *torch.autograd.grad(out, (q, k, v), handed)])
    for good, got in zip(*results):
        torch.testing.assert_close(got, good, rtol=1e-12, atol=1e-12)


def test_flash_takes_what_its_kernels_take(monkeypatch):
    capability = [(8, 0)]
    monkeypatch.setattr(attention, "_capability", lambda device: capability[0])
    card = torch.device("cuda", 0)
    widths = [8, 64, 68, 192, 200, 256, 264]

    def taken():
        return [width for width in widths if attention.flash_takes(card, torch.float16, width)]

    assert taken() == [8, 64, 192, 200, 256]
    capability[0] = (8, 9)  # no backward pass of wider heads there
    assert taken() == [8, 64, 192]
    capability[0] = (7, 5)
    assert taken() == []
    assert not attention.flash_takes(card, torch.float32, 64)
    assert not attention.flash_takes(torch.device("cpu"), torch.float16, 64)


def test_attention_of_more_windows_than_a_launch_takes(monkeypatch):
    """Where flash would take the rows, but not so many windows, the padded form runs."""
    plan = random_pyramid([40], extent=8).topology.windows(4, 0)
    q, k, v = torch.randn(3, 40, 2, 8)
    asked = []
    monkeypatch.setattr(attention, "has_varlen", lambda: True)
    monkeypatch.setattr(attention, "flash_takes", lambda device, dtype, dim: dim == 8)
    monkeypatch.setattr(attention, "varlen_attention", lambda q, k, v, plan: asked.append(plan))
    monkeypatch.setattr(attention, "MAX_WINDOWS", plan.num_windows)
    attention.sorted_attention(q, k, v, plan)
    assert asked == [plan]
    monkeypatch.setattr(attention, "MAX_WINDOWS", plan.num_windows - 1)
    torch.testing.assert_close(
        attention.sorted_attention(q, k, v, plan), attention.padded_attention(q, k, v, plan), rtol=0, atol=0
    )


@pytest.mark.parametrize("shift", [0, 4])
def test_known_windows_are_counted_ones(shift):
    """What a batch says of its windows is what the blocks say; and a bound past a launch's windows is not taken."""
    parts = [random_pyramid([n], extent=20, seed=n).topology.coords for n in (300, 1, 512)]
    coords = torch.cat([torch.cat([torch.full((len(p), 1), i), p[:, 1:]], 1) for i, p in enumerate(parts)]).int()
    told = joined_window_sizes([window_sizes(p[:, 1:].numpy().astype(np.int16)) for p in parts])
    exact = Topology(coords).windows(8, shift)
    assert told[8, shift] == (exact.num_windows, exact.max_length)
    assert Topology(coords, 3, 20, told)._known_windows(8, shift) == told[8, shift]
    assert Topology(coords, 3, 20)._known_windows(8, shift) == (min(813, 3 * 3**3), 512)
    assert Topology(coords, 3)._known_windows(8, shift) is None
    blocks = torch.zeros(70_000, 4)
    assert Topology(blocks, 1, 312)._known_windows(8, 0) == (39**3, 512)
    assert Topology(blocks, 1, 512)._known_windows(8, 0) is None
    assert window_sizes(np.zeros((0, 3), np.int16)) == {(8, 0): (0, 0), (8, 4): (0, 0)}


def test_attention_with_empty_windows_at_the_end():
    q, k, v = torch.randn(3, 7, 2, 4, dtype=torch.float64)
    bounds = torch.tensor([0, 3, 7], dtype=torch.int32)
    longer = torch.cat([bounds, bounds[-1:], bounds[-1:]])
    rows = torch.arange(7)
    plans = (WindowPlan(rows, rows, b, 4) for b in (bounds, longer))
    assert torch.equal(*(attention.padded_attention(q, k, v, plan) for plan in plans))


def test_attention_of_no_rows():
    topology = Topology(torch.zeros(0, 4, dtype=torch.int32))
    x = torch.zeros(0, 2, 8)
    assert attention.windowed_attention(x, x, x, topology.windows(8, 0)).shape == (0, 2, 8)


def test_position_embedding_formula():
    coords = torch.tensor([[3, 0, 7]])
    out = position_embedding(coords, 64)[0]
    count = 64 // 3 // 2
    for axis in range(3):
        for i in range(count):
            angle = coords[0, axis].double() * 10000 ** (-i / count)
            assert abs(out[axis * 2 * count + i] - angle.sin()) < 1e-6
            assert abs(out[axis * 2 * count + count + i] - angle.cos()) < 1e-6
    assert (out[6 * count :] == 0).all()
    torch.testing.assert_close(position_embedding(coords * 2, 64), position_embedding(coords, 64, factor=2))


def test_tables_are_freed_with_their_batch():
    """By reference counting alone: on a GPU they would otherwise stay until Python looks for circles."""
    pyramid = random_pyramid([5, 3])
    topology = pyramid.topology
    table = topology.dense_grid(2).neighbours
    assert topology.dense_grid(2).neighbours is table
    kept = [weakref.ref(x) for x in (topology, table, pyramid.grids[1].neighbours)]
    gc.disable()
    try:
        del pyramid, topology, table
        assert [x() for x in kept] == [None] * 3
    finally:
        gc.enable()
