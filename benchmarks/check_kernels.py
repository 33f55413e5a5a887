"""Every Triton kernel once, forward and both gradients, at tiny odd sizes: what to run under compute-sanitizer.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python benchmarks/check_kernels.py
PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool racecheck python benchmarks/check_kernels.py

Two samples of 5 and 3 blocks; channels 24 -> 40 (masked) and the published widths (the table's tiles), float16.
Values are the test suite's business; here every result is only asked to be finite.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from trellis.modules.sparse import norm as norms
from trellis.modules.sparse.conv.functional import subdivide_conv3d, subdivide_conv_to_scalar, submanifold_conv3d
from trellis.modules.sparse.kernels import block, nearest
from trellis.modules.sparse.levels import Pyramid, build_pyramid
from trellis.modules.sparse.plans import bounded_windows
from trellis.modules.sparse.pool import first_stage

WIDTHS = [
    (24, 40), (32, 64), (64, 64), (128, 512), (32, 32), (64, 32), (64, 128), (128, 128), (128, 64),
    (512, 128), (512, 512),
]  # fmt: skip


def tiny_pyramid(device: str) -> Pyramid:
    generator = torch.Generator().manual_seed(0)
    rows = [[0, x, y, 1] for x in range(2) for y in range(2)] + [[0, 3, 3, 3], [1, 0, 0, 0], [1, 0, 0, 1], [1, 2, 0, 0]]
    coords = torch.tensor(rows, dtype=torch.int32)
    active = torch.rand(len(rows), 512, generator=generator) < 0.1
    active[:, 7] = True
    values = (torch.rand(len(rows), 512, generator=generator) * 2 - 1).half()
    return build_pyramid(coords.to(device), values.to(device), active.to(device), num_samples=2, extent=4)


def backward(out: Tensor) -> None:
    assert torch.isfinite(out).all()
    out.backward(torch.randn_like(out))


def convolutions(pyramid: Pyramid, device: str, dtype: torch.dtype, widths: list[tuple[int, int]]) -> None:
    def leaf(*shape: int) -> Tensor:
        return (0.1 * torch.randn(*shape, device=device)).to(dtype).requires_grad_()

    for a, b in widths:
        grid, dense = pyramid.grids[2], pyramid.topology.dense_grid(2)
        for activate in (False, True):
            options = {"activate": activate, "backend": "triton"}
            backward(submanifold_conv3d(leaf(grid.num_rows, a), leaf(27, a, b), leaf(b), grid, **options))
            backward(subdivide_conv3d(leaf(dense.num_rows, a), leaf(27, a, b), leaf(b), dense, **options))
            if b <= 64:
                arguments = (leaf(dense.num_rows, a), leaf(27, a, b), leaf(b), leaf(1, b), leaf(1))
                backward(subdivide_conv_to_scalar(*arguments, dense, **options))


def the_rest(pyramid: Pyramid, device: str, dtype: torch.dtype) -> None:
    fine, coarse = pyramid.grids[1], pyramid.grids[2]
    for channels in (24, 128):
        x = torch.randn(fine.num_rows, channels, device=device, dtype=dtype).requires_grad_()
        module = norms.SparseGroupNorm(channels).to(device)
        parameters = (module.weight, module.bias, module.groups, module.eps)
        for pooled in (None, coarse):
            out, skip = norms.FusedGroupNorm.apply(x, *parameters, fine, pooled, True)
            outs = [t for t in (out, skip) if t is not None]
            torch.autograd.backward(outs, [torch.ones_like(t) for t in outs])
    four = [torch.randn(32, device=device).requires_grad_() for _ in range(4)]
    outs = first_stage(pyramid.values, *pyramid.grids[:2], *four, 32, 1e-5, dtype=dtype)
    torch.autograd.backward(outs, [torch.ones_like(o) for o in outs])
    nearest.nearest_code(torch.randn(70, 5, device=device), torch.randn(130, 5, device=device))
    rows, width = 70, 65
    x, y = (torch.randn(rows, width, device=device).to(dtype) for _ in range(2))
    order = torch.randperm(rows, device=device)
    block.norm_rows(x), block.norm_rows(x, order), block.add_norm(x, order, y), block.norm_backward(x, order, y, x)
    block.column_sums(x, dtype), block.gelu_backward(x, y, dtype)
    if torch.device(device).type == "cuda":
        bounded_windows(pyramid.topology.coords, 2, 1, 8, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--widths", type=int, default=len(WIDTHS), help="how many of the pairs of channels")
    args = parser.parse_args()
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    pyramid = tiny_pyramid(args.device)
    for fine, coarse in zip(pyramid.grids, pyramid.grids[1:]):
        coarse.link_children(fine)
    convolutions(pyramid, args.device, dtype, WIDTHS[: args.widths])
    the_rest(pyramid, args.device, dtype)
    if args.device == "cuda":
        torch.cuda.synchronize()
    print("every kernel ran", flush=True)


if __name__ == "__main__":
    main()
