"""Kernels of norms, the first stage and the nearest code against plain float64 paths."""

from __future__ import annotations

import pytest
import torch
from sparse_batches import random_pyramid
from test_triton_conv import TOLERANCE, move, relative

from trellis.modules.quantizers import nearest_code
from trellis.modules.sparse import norm as norms
from trellis.modules.sparse import pool as pools

triton = pytest.importorskip("triton", reason="Triton is not installed")

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without CUDA")
LEVELS = [1, 2, 3]
BLOCKS = [[3, 0, 5], [1], []]


def linked(blocks, device):
    pyramid = random_pyramid(blocks, density=0.1, seed=5)
    moved = move(pyramid, device)
    for fine, coarse in zip(moved.grids, moved.grids[1:]):
        coarse.link_children(fine)
    return pyramid, moved


def close(out, expected, tolerance):
    assert relative(out, expected) <= tolerance


def check_norm(blocks, channels, level, device, dtype, tolerance, pooled, offset=0.0):
    pyramid, moved = linked(blocks, device)
    fine, coarse = moved.grids[level - 1], moved.grids[level]
    plain_fine, plain_coarse = pyramid.grids[level - 1], pyramid.grids[level]
    generator = torch.Generator().manual_seed(2)
    x = (torch.randn(fine.num_rows, channels, generator=generator) + offset).to(device, dtype)
    module = norms.SparseGroupNorm(channels)
    torch.nn.init.normal_(module.weight, generator=generator)
    torch.nn.init.normal_(module.bias, generator=generator)
    exact = norms.SparseGroupNorm(channels).double()
    exact.load_state_dict(module.state_dict())
    module = module.to(device)
    x.requires_grad_()
    y = x.detach().cpu().double().requires_grad_()
    arguments = (module.weight, module.bias, module.groups, module.eps, fine, coarse if pooled else None, True)
    outs = norms.FusedGroupNorm.apply(x, *arguments)
    if pooled:
        expected = exact.silu_pool(y, plain_fine, plain_coarse, fused=False)
    else:
        outs, expected = outs[:1], [exact(y, plain_fine, silu=True, fused=False)]
    for out, good in zip(outs, expected):
        close(out, good, tolerance)
    handed = [torch.randn(o.shape, generator=generator).to(device, dtype) for o in outs]
    torch.autograd.backward(outs, handed)
    torch.autograd.backward(list(expected), [h.cpu().double() for h in handed])
    close(x.grad, y.grad, 2 * tolerance)
    if fine.num_rows:
        close(module.weight.grad, exact.weight.grad, 2 * tolerance)
        close(module.bias.grad, exact.bias.grad, 2 * tolerance)


def check_first_stage(blocks, channels, device, value_dtype, dtype, tolerance):
    pyramid, moved = linked(blocks, device)
    generator = torch.Generator().manual_seed(2)
    values = moved.values.to(value_dtype)
    parameters = [torch.randn(channels, generator=generator) for _ in range(4)]
    fast = [p.to(device).clone().requires_grad_() for p in parameters]
    exact = [p.double().requires_grad_() for p in parameters]
    groups = norms.num_groups(channels)
    outs = pools.first_stage(values, moved.grids[0], moved.grids[1], *fast, groups, 1e-5, dtype=dtype)
    good = pools.first_stage(
        values.cpu().double(), pyramid.grids[0], pyramid.grids[1], *exact, groups, 1e-5, dtype=torch.float64
    )
    for out, expected in zip(outs, good):
        close(out, expected, tolerance)
    handed = [torch.randn(o.shape, generator=generator).to(device, dtype) for o in outs]
    torch.autograd.backward(outs, handed)
    torch.autograd.backward(good, [h.cpu().double() for h in handed])
    for a, b in zip(fast, exact):
        if values.shape[0]:
            # sums over all rows cancel: gradients are held a little less tightly than values
            close(a.grad, b.grad, 20 * tolerance)


def check_nearest(device, rows, codes, width):
    from trellis.modules.sparse.kernels import nearest

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=generator)
    book = torch.randn(codes, width, generator=generator)
    got = nearest.nearest_code(x.to(device), book.to(device)).cpu()
    assert torch.equal(got, nearest_code(x, book))


@interpreted
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("blocks", BLOCKS)
def test_norm_interpreted(blocks, pooled):
    check_norm(blocks, 12, 2, "cpu", torch.float32, TOLERANCE["ieee"], pooled)


@interpreted
def test_norm_of_far_off_values_keeps_its_digits():
    check_norm([3, 4], 8, 2, "cpu", torch.float32, 2e-4, False, offset=1000.0)


@interpreted
@pytest.mark.parametrize("blocks", BLOCKS)
def test_first_stage_interpreted(blocks, monkeypatch):
    monkeypatch.setattr(pools, "has_kernels", lambda device, dtype: dtype == torch.float32)
    check_first_stage(blocks, 12, "cpu", torch.float32, torch.float32, TOLERANCE["ieee"])


@interpreted
@pytest.mark.parametrize("blocks", [1, 33, 70, 100])
def test_moments_start_at_16_bytes(blocks, monkeypatch):
    """Whatever the number of tiles (2 to 5 here): Triton compiles a kernel for each alignment that it meets."""
    from trellis.modules.sparse.kernels import first_stage

    kernel, seen = first_stage.value_moments_kernel, []

    class Spy:
        def __getitem__(self, grid):
            def launch(*tensors, **options):
                seen.extend(t.data_ptr() % 16 for t in tensors)
                kernel[grid](*tensors, **options)

            return launch

    monkeypatch.setattr(first_stage, "value_moments_kernel", Spy())
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(blocks, 512, generator=generator)
    mean, variance = first_stage.value_moments(values, values > 0.3, torch.tensor([0, blocks]))
    kept = values[values > 0.3].double()
    close(mean, kept.mean()[None], 1e-6)
    close(variance, kept.var(correction=0)[None], 1e-5)
    assert len(seen) == 6 and not any(seen)


@interpreted
def test_nearest_code_interpreted():
    check_nearest("cpu", 70, 130, 5)


@pytest.mark.gpu
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("blocks, channels", [([60, 0, 31], 64), ([64], 512), ([1], 24), ([], 32)])
def test_norm_on_the_card(blocks, channels, dtype, pooled, cuda_device):
    check_norm(blocks, channels, 2, cuda_device, dtype, TOLERANCE.get(dtype, 5e-6), pooled)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("blocks", [[60, 0, 31], [1], []])
def test_first_stage_on_the_card(blocks, dtype, cuda_device):
    check_first_stage(blocks, 32, cuda_device, torch.float16, dtype, TOLERANCE.get(dtype, 5e-6))


@pytest.mark.gpu
def test_nearest_code_on_the_card(cuda_device):
    check_nearest(cuda_device, 1000, 8192, 16)
    check_nearest(cuda_device, 3, 65, 32)


def check_windows(device, blocks, shift, size=8, extent=16):
    """Windows by their bound, and by their true sizes as a batch tells them, against counted ones."""
    from trellis.modules.sparse.levels import Topology
    from trellis.modules.sparse.plans import bounded_windows, counted_windows

    coords = random_pyramid(blocks, extent=extent).topology.coords.to(device)
    exact = counted_windows(coords, size, shift)
    plan = bounded_windows(coords, size, shift, min(len(coords), 3 * (extent // size + 1) ** 3), size**3)
    assert torch.equal(plan.order, exact.order) and torch.equal(plan.inverse, exact.inverse)
    assert torch.equal(plan.cu_seqlens[: exact.cu_seqlens.numel()], exact.cu_seqlens)
    assert (plan.cu_seqlens[exact.cu_seqlens.numel() :] == coords.shape[0]).all()
    known = {(size, shift): (exact.num_windows, exact.max_length)}
    plan = Topology(coords, len(blocks), extent, known).windows(size, shift)
    assert torch.equal(plan.cu_seqlens, exact.cu_seqlens) and plan.max_length == exact.max_length


@interpreted
@pytest.mark.parametrize("shift", [0, 2])
def test_bounded_windows_interpreted(shift, monkeypatch):
    from trellis.modules.sparse import levels

    monkeypatch.setattr(levels, "has_kernels", lambda device: True)
    check_windows("cpu", [30, 0, 51], shift, 4, 8)


@pytest.mark.gpu
@pytest.mark.parametrize("shift", [0, 4])
def test_bounded_windows_on_the_card(shift, cuda_device):
    check_windows(cuda_device, [300, 0, 512], shift)


@interpreted
@pytest.mark.parametrize("starts", [[0, 5, 5, 300, 513], [0, 0], [0], [0, 7]])
def test_tiles_equal_the_plain_ones(starts):
    from trellis.modules.sparse import plans
    from trellis.modules.sparse.kernels import reduce

    starts = torch.tensor(starts)
    tiles, plain = (f(starts, int(starts[-1]), 4) for f in (reduce.plan_tiles, plans.plan_tiles))
    assert torch.equal(tiles.first, plain.first)
    counted = int(plain.first[-1])
    assert torch.equal(tiles.spans[:counted], plain.spans[:counted])
    for spans in (tiles.spans, plain.spans):
        assert (spans[counted:, 1] == spans[counted:, 2]).all()
