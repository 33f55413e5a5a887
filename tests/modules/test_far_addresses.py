"""Tensors of more than 2^31 elements on the card: the last rows of every kind of kernel against plain sums in float64.

The same checks run interpreted at tiny sizes, so that they are known to be right before a card sees them.
"""

from __future__ import annotations

import pytest
import torch
from test_triton_conv import TOLERANCE, relative
from torch.nn import functional as F

from trellis.modules.sparse import norm as norms
from trellis.modules.sparse import pool as pools
from trellis.modules.sparse.conv import functional
from trellis.modules.sparse.conv.collapse import collapse_grad, collapse_rule, collapse_weight
from trellis.modules.sparse.levels import Topology, build_pyramid

pytest.importorskip("triton", reason="Triton is not installed")

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without CUDA")
FAR = 1 << 31


def cube(axis, device):
    """Coordinates int32 [axis^3, 4] of all blocks of a cube, one sample."""
    steps = torch.arange(axis, device=device)
    return F.pad(torch.cartesian_prod(steps, steps, steps), (1, 0)).int()


def of_last(shape, rows, dtype, device):
    """Zeros but for random numbers in the last rows, and those."""
    out = torch.zeros(shape, dtype=dtype, device=device)
    out[-rows:] = torch.randn(rows, *shape[1:], device=device)
    return out, out[-rows:].double()


def leaf(*shape, scale=1.0, dtype, device):
    return (torch.randn(*shape, device=device, dtype=torch.float32) * scale).to(dtype).requires_grad_()


def taken(values, rows):
    """values[rows] in float64, zeros where there is no row."""
    return torch.where((rows >= 0)[..., None], values[rows.clamp_min(0).long()].double(), 0.0)


def close(got, good, dtype, factor=1):
    assert relative(got, good) <= factor * TOLERANCE.get(dtype, TOLERANCE["ieee"])


def check_convolution(device, dtype, axis, side, c_in, c_out, rows):
    grid = Topology(cube(axis, device), 1, axis).dense_grid(side)
    given = {"dtype": dtype, "device": device}
    feats, weight = leaf(grid.num_rows, c_in, **given), leaf(27, c_in, c_out, scale=0.1, **given)
    out = functional.submanifold_conv3d(feats, weight, None, grid, backend="triton")
    whole, handed = of_last(out.shape, rows, dtype, device)
    out.backward(whole)
    near = grid.tap_table[:, -rows:].t()
    gathered = taken(feats.detach(), near)
    close(out[-rows:], torch.einsum("ntc,tcd->nd", gathered, weight.double()), dtype)
    close(weight.grad, torch.einsum("ntc,nd->tcd", gathered, handed), dtype, 2)
    close(feats.grad[-rows:], torch.einsum("ntd,tcd->nc", taken(whole, near), weight.double().flip(0)), dtype)
    return feats.numel()


def children_of_last(feats, collapsed, near):
    """Convolution [n, 8, out] of the children of some rows, and the parents [n, 8, 8, in] that each reads."""
    gathered = taken(feats, near[:, collapse_rule()[0].to(near.device)])
    return torch.einsum("nktc,ktcd->nkd", gathered, collapsed), gathered


def check_gradients_of_children(feats, weight, handed, gathered, collapsed, near, dtype):
    """Gradients of feats' last rows and of the weight, from that [n, 8, out] of the last rows' children."""
    rows = len(handed)
    close(weight.grad, collapse_grad(torch.einsum("nktc,nkd->ktcd", gathered, handed)), dtype, 2)
    # parent P is read through tap offset o by the child of P - o: the mirrored tap
    source = near[:, 26 - collapse_rule()[0].to(near.device)] - (feats.shape[0] - rows)
    child = torch.arange(8, device=near.device)[:, None]
    read = torch.where((source >= 0)[..., None], handed[source.clamp_min(0).long(), child], 0.0)
    close(feats.grad[-rows:], torch.einsum("nktd,ktcd->nc", read, collapsed), dtype, 2)


def check_subdivision(device, dtype, axis, side, c_in, c_out, rows):
    grid = Topology(cube(axis, device), 1, axis).dense_grid(side)
    given = {"dtype": dtype, "device": device}
    feats, weight = leaf(grid.num_rows, c_in, **given), leaf(27, c_in, c_out, scale=0.05, **given)
    out = functional.subdivide_conv3d(feats, weight, None, grid, backend="triton")
    whole, handed = of_last(out.shape, 8 * rows, dtype, device)
    out.backward(whole)
    collapsed, near = collapse_weight(weight.detach()).double(), grid.tap_table[:, -rows:].t()
    good, gathered = children_of_last(feats.detach(), collapsed, near)
    close(out[-8 * rows :], good.flatten(0, 1), dtype)
    check_gradients_of_children(feats, weight, handed.view(rows, 8, -1), gathered, collapsed, near, dtype)
    return out.numel()


def check_last_stage(device, dtype, axis, side, channels, rows):
    grid = Topology(cube(axis, device), 1, axis).dense_grid(side)
    given = {"dtype": dtype, "device": device}
    feats, weight = leaf(grid.num_rows, channels, **given), leaf(27, channels, channels, scale=0.03, **given)
    bias, out_weight, out_bias = (leaf(*shape, scale=0.3, **given) for shape in [(channels,), (1, channels), (1,)])
    values = functional.subdivide_conv_to_scalar(feats, weight, bias, out_weight, out_bias, grid, backend="triton")
    whole, handed = of_last(values.shape, rows, torch.float32, device)
    values.backward(whole)
    collapsed, near = collapse_weight(weight.detach()).double(), grid.tap_table[:, -rows:].t()
    hidden, gathered = children_of_last(feats.detach(), collapsed, near)
    hidden = (hidden + bias.detach().double()).requires_grad_()
    readout = out_weight.detach().double().requires_grad_()
    good = torch.tanh((F.silu(hidden) * readout[0]).sum(-1) + out_bias.detach().double())
    close(values[-rows:], good, dtype, 2)
    of_hidden, of_readout = torch.autograd.grad(good, [hidden, readout], handed)
    close(out_weight.grad, of_readout, dtype, 2)
    close(bias.grad, of_hidden.sum((0, 1)), dtype, 2)
    check_gradients_of_children(feats, weight, of_hidden, gathered, collapsed, near, dtype)
    return feats.numel()


def group_moments(x, groups):
    """Mean and variance [C] in float64 of the groups of all rows' channels, a part of the rows at a time."""
    rows, channels = x.shape
    count = rows * channels // groups
    mean = sum(part.double().sum(0) for part in x.split(1 << 20)).view(groups, -1).sum(1) / count
    mean = mean.repeat_interleave(channels // groups)
    square = sum((part.double() - mean).square().sum(0) for part in x.split(1 << 20)).view(groups, -1).sum(1) / count
    return mean, square.repeat_interleave(channels // groups)


def check_norm(device, dtype, axis, side, channels, rows, pooled):
    """GroupNorm and SiLU, also with the pool onto the next level, of one sample."""
    topology = Topology(cube(axis, device), 1, axis)
    fine, coarse = topology.dense_grid(side), topology.dense_grid(side // 2)
    coarse.link_children(fine)
    x = (2 * torch.randn(fine.num_rows, channels, device=device, dtype=dtype) + 1).requires_grad_()
    module = norms.SparseGroupNorm(channels).to(device)
    torch.nn.init.normal_(module.weight)
    torch.nn.init.normal_(module.bias)
    arguments = (module.weight, module.bias, module.groups, module.eps, fine, coarse if pooled else None, True)
    out = norms.FusedGroupNorm.apply(x, *arguments)[0]
    whole, handed = of_last(out.shape, rows, dtype, device)
    out.backward(whole)
    mean, variance = group_moments(x.detach(), module.groups)
    rstd = (variance + module.eps).rsqrt()
    weight, bias = (p.detach().double().requires_grad_() for p in (module.weight, module.bias))
    number = 8 * rows if pooled else rows
    hat = ((x[-number:].detach().double() - mean) * rstd).requires_grad_()
    good = F.silu(hat * weight + bias)
    good = good.view(rows, 8, channels).sum(1) / 9 if pooled else good
    close(out[-rows:], good, dtype)
    of_hat, of_weight, of_bias = torch.autograd.grad(good, [hat, weight, bias], handed)
    close(module.weight.grad, of_weight, dtype, 2)
    close(module.bias.grad, of_bias, dtype, 2)
    # dx = rstd (g - mean(g) - x_hat mean(g x_hat)) over all rows of the group: g is zero in the others
    share = module.groups / (fine.num_rows * channels)
    means = [t.sum(0).view(module.groups, -1).sum(1).repeat_interleave(channels // module.groups) * share
             for t in (of_hat, of_hat * hat.detach())]  # fmt: skip
    close(x.grad[-number:], rstd * (of_hat - means[0] - hat.detach() * means[1]), dtype, 2)
    return x.numel()


def check_first_stage(device, dtype, axis, channels, rows):
    """One voxel a block, its last: the values of the other 511 are NaN, which nobody may read."""
    coords = cube(axis, device)
    m = len(coords)
    values = torch.full((m, 512), float("nan"), dtype=dtype, device=device)
    values[:, 511] = torch.rand(m, device=device) * 2 - 1
    active = torch.zeros(m, 512, dtype=torch.bool, device=device)
    active[:, 511] = True
    pyramid = build_pyramid(coords, values, active, [m] * 4, 1, axis)
    fast = [leaf(channels, dtype=torch.float32, device=device) for _ in range(4)]
    exact = [p.detach().double().requires_grad_() for p in fast]
    groups, eps = norms.num_groups(channels), 1e-5
    outs = pools.first_stage(values, pyramid.grids[0], pyramid.grids[1], *fast, groups, eps, dtype=dtype)
    handed = [of_last(out.shape, rows, dtype, device) for out in outs]
    torch.autograd.backward(outs, [whole for whole, _ in handed])
    s = values[:, 511].double()
    weight, bias, norm_weight, norm_bias = exact
    by_channel = s.mean() * weight + bias
    grouped = by_channel.view(groups, -1)
    mean = grouped.mean(1, keepdim=True)
    variance = weight.square().view(groups, -1).mean(1) * s.var(correction=0) + (grouped - mean).square().mean(1)
    rstd = (variance + eps).rsqrt().repeat_interleave(channels // groups)
    x = s[-rows:, None] * weight + bias
    hat = (x - mean.expand_as(grouped).reshape(-1)) * rstd
    good = [F.silu(hat * norm_weight + norm_bias) / 2, x / 2]
    for out, expected in zip(outs, good):
        close(out[-rows:], expected, dtype)
    torch.autograd.backward(good, [last for _, last in handed])
    for a, b in zip(fast, exact):
        close(a.grad, b.grad, dtype, 20)
    return values.numel()


@interpreted
def test_checks_interpreted(monkeypatch):
    """About 5 s."""
    monkeypatch.setattr(pools, "has_kernels", lambda device, dtype: dtype == torch.float32)
    torch.manual_seed(0)
    check_convolution("cpu", torch.float32, 2, 2, 6, 3, 20)
    check_subdivision("cpu", torch.float32, 2, 2, 6, 3, 20)
    check_last_stage("cpu", torch.float32, 2, 2, 6, 20)
    for pooled in (False, True):
        check_norm("cpu", torch.float32, 2, 4, 12, 9, pooled)
    check_first_stage("cpu", torch.float32, 3, 12, 9)


@pytest.mark.gpu
def test_convolution_past_31_bits(cuda_device):
    assert check_convolution(cuda_device, torch.float16, 41, 8, 64, 16, 300) > FAR


@pytest.mark.gpu
def test_subdivision_past_31_bits(cuda_device):
    """4.4 million parents to 35 million children of 64 channels."""
    assert check_subdivision(cuda_device, torch.float16, 41, 4, 64, 64, 300) > FAR


@pytest.mark.gpu
def test_last_stage_past_31_bits(cuda_device):
    """68 million parents of 32 channels; about 35 GB."""
    assert check_last_stage(cuda_device, torch.float16, 51, 8, 32, 300) > FAR


@pytest.mark.gpu
@pytest.mark.parametrize("pooled", [False, True])
def test_norm_past_31_bits(pooled, cuda_device):
    assert check_norm(cuda_device, torch.float16, 41, 8, 64, 300, pooled) > FAR


@pytest.mark.gpu
def test_first_stage_past_31_bits(cuda_device):
    """4.3 million blocks of 512 values."""
    assert check_first_stage(cuda_device, torch.float16, 162, 32, 300) > FAR
