"""Convolution kernels against the reference in float64: interpreted on the CPU, and on the card with `-m gpu`."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import pytest
import torch
from sparse_batches import random_pyramid

from trellis.modules.sparse.conv import functional, reference

triton = pytest.importorskip("triton", reason="Triton is not installed")

from trellis.modules.sparse.conv.triton_tiles import CHILDREN, PAIRS, PLAIN, Tile  # noqa: E402
from trellis.modules.sparse.conv.triton_wgrad import add_pair, gather_wgrad, partial_sums, sum_partial  # noqa: E402

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without CUDA")

SIZES = [([2, 0, 3], 3, 5), ([1], 1, 2), ([], 4, 4), ([2], 16, 33)]
GPU_SIZES = [
    ([50, 0, 61], 32, 64), ([64], 64, 64), ([30, 33], 128, 512), ([1], 512, 128), ([], 64, 64), ([40], 24, 40),
    ([50, 14], 32, 32), ([63], 64, 32), ([40, 0, 9], 64, 128), ([45], 128, 128), ([51], 128, 64), ([20], 512, 512),
]  # fmt: skip
"""All widths of the published network, whose tiles are tuned one by one, and odd ones."""
TOLERANCE = {"ieee": 5e-6, "tf32": 2e-3, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Of ||out - reference|| / ||reference||, inputs rounded to the dtype first: rounding of the output and of float32 sums
(ieee), of the products' operands (tf32: 10 bits), or of gradients in between (16 bit)."""


def move(pyramid, device):
    from trellis.modules.sparse.levels import build_pyramid

    coords, values = pyramid.topology.coords.to(device), pyramid.values.to(device)
    active = pyramid.grids[0].occupancy.to(device)
    return build_pyramid(coords, values, active, num_samples=pyramid.topology.num_samples)


def relative(out, expected):
    out, expected = out.detach(), expected.detach()
    assert out.shape == expected.shape
    assert torch.isfinite(out).all()
    scale = expected.double().norm()
    return float((out.double() - expected.double().to(out.device)).norm() / scale) if scale > 0 else float(out.norm())


def compare(kernel, oracle, shapes, device, dtype, tolerance):
    """Values and gradients of all arguments, in `dtype` on `device`, against float64.

    Weights keep values near 1: a saturated tanh has a gradient that no rounding of its input leaves alone. The
    gradient of the last stage's output bias, one number, is a sum of terms of both signs that nearly cancel: its error
    counts relative to the norm of the terms, which rounding of each of them gives and which a sum of wrong terms has.
    """
    generator = torch.Generator().manual_seed(1)
    scales = [1.0, (27 * shapes[1][1]) ** -0.5, 0.3, shapes[1][2] ** -0.5, 0.3]
    start = [torch.randn(s, generator=generator) * scale for s, scale in zip(shapes, scales)]
    fast = [t.to(device, dtype).requires_grad_() for t in start]
    exact = [t.detach().double().requires_grad_() for t in fast]
    out, expected = kernel(*fast), oracle(*exact)
    assert relative(out, expected) <= tolerance
    handed = torch.randn(out.shape, generator=generator).to(device, out.dtype)
    out.backward(handed)
    expected.backward(handed.double())
    for a, b, shape in zip(fast, exact, shapes):
        if shape == (1,):
            terms = handed.double() * (1 - expected.detach().double() ** 2)
            error = (a.grad.double() - b.grad).abs().item() / max(terms.norm().item(), 1e-300)
        else:
            error = relative(a.grad, b.grad)
        assert error <= 2 * tolerance, f"gradient of the argument of shape {shape}"


def run_all(blocks, c_in, c_out, device, dtype, tolerance, density=0.3):
    pyramid = random_pyramid(blocks, density=density, seed=3)
    moved = move(pyramid, device)
    for level in (1, 2, 3):
        grid, near = moved.grids[level], pyramid.grids[level].neighbours.to(device)
        compare(
            lambda x, w, b, g=grid: functional.submanifold_conv3d(x, w, b, g, backend="triton"),
            lambda x, w, b, n=near: reference.submanifold_conv3d(x, w, b, n),
            [(grid.num_rows, c_in), (27, c_in, c_out), (c_out,)], device, dtype, tolerance,
        )  # fmt: skip
    for side in (1, 2):
        grid, near = moved.topology.dense_grid(side), pyramid.topology.dense_grid(side).neighbours.to(device)
        compare(
            lambda x, w, b, g=grid: functional.subdivide_conv3d(x, w, b, g, backend="triton"),
            lambda x, w, b, n=near: reference.subdivide_conv3d(x, w, b, n),
            [(grid.num_rows, c_in), (27, c_in, c_out), (c_out,)], device, dtype, tolerance,
        )  # fmt: skip
        if c_out > 64:
            continue  # the last stage is for few channels
        compare(
            lambda *a, g=grid: functional.subdivide_conv_to_scalar(*a, g, backend="triton"),
            lambda *a, n=near: reference.subdivide_conv_to_scalar(*a, n).view(-1, 8),
            [(grid.num_rows, c_in), (27, c_in, c_out), (c_out,), (1, c_out), (1,)], device, dtype, 2 * tolerance,
        )  # fmt: skip


@pytest.mark.parametrize("blocks, c_in, c_out", SIZES)
def test_kernels_interpreted(blocks, c_in, c_out):
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a CUDA device")
    run_all(blocks, c_in, c_out, "cpu", torch.float32, TOLERANCE["ieee"], density=0.05)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (1, 2)])
@pytest.mark.parametrize("function", [functional.submanifold_conv3d, functional.subdivide_conv3d])
def test_gradients_of_some_arguments(function, wanted):
    """Arguments that need no gradient, no bias at all, and the SiLU before the convolution."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a CUDA device")
    grid = move(random_pyramid([2], density=0.05), "cpu").topology.dense_grid(1)
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(s, generator=generator) for s in [(grid.num_rows, 5), (27, 5, 3), (3,)]]
    results = []
    for backend in ("triton", "reference"):
        arguments = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(start)]
        if 2 not in wanted:
            arguments[2] = None
        out = function(*arguments, grid, activate=True, backend=backend)
        results.append(torch.autograd.grad(out.square().sum(), [arguments[i] for i in wanted]))
    for fast, good in zip(*results):
        assert relative(fast, good) <= 1e-5


@interpreted
@pytest.mark.parametrize(
    "mode, taps, swap",
    [(PLAIN, 3, True), (CHILDREN, 2, True), (CHILDREN, 4, False), (PAIRS, 3, False), (PAIRS, 4, True)],
)
def test_weight_gradient_of_several_taps_a_program(mode, taps, swap):
    """Tiles as the tuned ones are, which no small width gets by itself; sums split over two programs. 2 s each."""
    topology = random_pyramid([70], extent=5, density=0.01).topology
    near, table = topology.block_neighbours, topology.block_neighbours.t().contiguous()
    c_in, c_out, tile = 5, 3, Tile(16, 16, 16, taps, swap=swap)
    generator = torch.Generator().manual_seed(0)
    feats = torch.randn(70, c_in, generator=generator)
    handed = torch.randn(70, 1 if mode == PLAIN else 8, c_out, generator=generator)
    if mode == PAIRS:
        got = torch.zeros(27 * c_in * c_out + c_out)
        partial, share = partial_sums(feats, 2 * c_out, table, mode=mode, tile=tile)
        for first in range(0, 8, 2):
            pair = handed[:, first : first + 2].reshape(70, -1).contiguous()
            gather_wgrad(partial, share, feats, pair, table, mode=mode, first_child=first, tile=tile)
            add_pair(partial, got, first, c_in, c_out)
        got = [got[:-c_out].view(27, c_in, c_out), got[-c_out:]]
    else:
        partial, share = partial_sums(feats, c_out, table, mode=mode, tile=tile)
        gather_wgrad(partial, share, feats, handed.view(-1, c_out), table, mode=mode, tile=tile)
        got = sum_partial(partial, c_in, c_out, torch.float32, mode=mode)
    assert partial.shape[0] == 2
    oracle = reference.submanifold_conv3d if mode == PLAIN else reference.subdivide_conv3d
    leaves = [torch.zeros(s, dtype=torch.float64, requires_grad=True) for s in [(27, c_in, c_out), (c_out,)]]
    out = oracle(feats.double(), *leaves, near)
    good = torch.autograd.grad(out, leaves, handed.view(-1, c_out).double())
    assert all(relative(a, b) <= TOLERANCE["ieee"] for a, b in zip(got, good))


@interpreted
@pytest.mark.parametrize("function", ["conv_backward", "subdivide_conv_backward"])
def test_activation_is_gone_before_the_input_gradient(function, monkeypatch):
    from trellis.modules.sparse.conv import triton as code

    grid = move(random_pyramid([2], density=0.05), "cpu").topology.dense_grid(1)
    feats = torch.randn(grid.num_rows, 5)
    weight, rows = (torch.randn(27, 5, 3), 1) if function == "conv_backward" else (torch.randn(8, 8, 5, 3), 8)
    made, alive = [], []

    def silu(x):
        made.append(torch.nn.functional.silu(x))
        return made[-1]

    def gather_wgrad(partial, share, read, *rest, **options):
        made[0] = weakref.ref(read)
        return partial.zero_()

    def gather_gemm(*arguments, **options):
        alive.append(made[0]())
        assert options["gate"].data_ptr() == feats.data_ptr()

    for name, stub in {"silu": silu, "gather_wgrad": gather_wgrad, "gather_gemm": gather_gemm}.items():
        monkeypatch.setattr(code, name, stub)
    getattr(code, function)(torch.randn(rows * grid.num_rows, 3), feats, weight, grid, (True, True, True), True)
    assert alive == [None]


@interpreted
@pytest.mark.parametrize("rows", [1, 150, 300])
def test_last_stage_keeps_the_partial_sums_of_one_launch(rows, monkeypatch):
    """Two children's 12 taps, not all 48; and every launch's other sums start at 16 bytes (1, 3 and 5 tiles)."""
    from trellis.modules.sparse.conv import triton as code

    widths, starts = set(), []

    def scalar_backward(*arguments, hidden, sums, **options):
        starts.append(sums.data_ptr() % 16)
        sums.zero_()

    def gather_wgrad(partial, *arguments, **options):
        widths.add(partial.shape[1])

    stubs = {"scalar_backward": scalar_backward, "gather_wgrad": gather_wgrad}
    stubs |= dict.fromkeys(("add_pair", "gather_gemm"), lambda *arguments, **options: None)
    for name, stub in stubs.items():
        monkeypatch.setattr(code, name, stub)
    grid = SimpleNamespace(tap_table=torch.full((27, rows), -1, dtype=torch.int32))
    per_child, feats, collapsed = torch.zeros(rows, 8), torch.zeros(rows, 5), torch.zeros(8, 8, 5, 2)
    code.to_scalar_backward(per_child, per_child, feats, collapsed, torch.zeros(2), torch.zeros(1, 2), grid)
    assert widths == {12 * 5 * 2 * 2 + 2 * 2} and starts == [0] * 4


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_tables_equal_the_plain_ones(level):
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a CUDA device")
    check_tables(random_pyramid([2, 0, 5], extent=2, density=0.05), "cpu", level)


def check_tables(pyramid, device, level):
    from trellis.modules.sparse.kernels import tables

    moved = move(pyramid, device)
    torch.testing.assert_close(
        tables.block_neighbours(moved.topology.coords).cpu(), pyramid.topology.block_neighbours, rtol=0, atol=0
    )
    for grid, plain in [
        (moved.grids[level], pyramid.grids[level]),
        (moved.topology.dense_grid(8 >> level), pyramid.topology.dense_grid(8 >> level)),
    ]:
        torch.testing.assert_close(grid.tap_table.t().cpu(), plain.neighbours, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["ieee", "tf32", torch.float16, torch.bfloat16])
@pytest.mark.parametrize("blocks, c_in, c_out", GPU_SIZES)
@pytest.mark.gpu
def test_kernels_on_the_card(blocks, c_in, c_out, kind, cuda_device, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", kind == "tf32")
    dtype = torch.float32 if isinstance(kind, str) else kind
    run_all(blocks, c_in, c_out, cuda_device, dtype, TOLERANCE[kind])


@pytest.mark.gpu
@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_tables_on_the_card(level, cuda_device):
    check_tables(random_pyramid([9, 0, 30], density=0.05), cuda_device, level)


def test_backend_that_cannot_run_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="CUDA tensors"):
        functional.resolve_backend("triton", torch.device("cpu"))
    with pytest.raises(ValueError, match="float64"):
        functional.resolve_backend("triton", torch.device("cuda"), torch.float64)
    assert functional.resolve_backend("auto", torch.device("cuda"), torch.float64) == "cpu"
