"""Small real runs that `trellis.doctor` starts in processes of their own (-m trellis.doctor_probes PROBE DEVICE)."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

CUDA_TOLERANCE = {"float32": 1e-3, "float16": 2e-2}
"""Largest relative RMS error on CUDA, where float32 products may run in TF32; on a CPU float32 has to reach 1e-5."""


def devices(_: str) -> dict[str, Any]:
    """PyTorch's and Warp's view of the machine."""
    import torch

    gpus = []
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        capability = f"{facts.major}.{facts.minor}"
        gpus.append({"name": facts.name, "memory_gib": facts.total_memory / 2**30, "capability": capability})
    return {
        "torch": torch.__version__,
        "cuda_build": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "warp_cuda": bool(gpus) and _warp_sees_cuda(),
    }


def _warp_sees_cuda() -> bool:
    try:
        from trellis.utils.warp_utils import get_warp

        return bool(get_warp().is_cuda_available())
    except ImportError:
        return False


def convolution(device: str) -> dict[str, Any]:
    """Submanifold 3x3x3 convolution, forward and both gradients, against the oracle in float64."""
    import torch

    from trellis.modules.sparse.conv import functional, reference
    from trellis.modules.sparse.levels import Topology

    generator = torch.Generator().manual_seed(0)
    cells = torch.randperm(5**3, generator=generator)[:60].sort().values
    coords = torch.stack([cells * 0, cells // 25, cells // 5 % 5, cells % 5], dim=1)
    grid = Topology(coords).dense_grid(2)
    feats = torch.randn(grid.num_rows, 32, generator=generator, dtype=torch.float64)
    weight = torch.randn(27, 32, 64, generator=generator, dtype=torch.float64) / 30
    cotangent = torch.randn(grid.num_rows, 64, generator=generator, dtype=torch.float64)

    def run(function: Callable[..., Any], table: Any, dtype: Any, where: str) -> list[Any]:
        x = feats.to(where, dtype, copy=True).requires_grad_()
        w = weight.to(where, dtype, copy=True).requires_grad_()
        out = function(x, w, None, table)
        out.backward(cotangent.to(where, out.dtype))
        return [value.detach().cpu().double() for value in (out, x.grad, w.grad)]

    expected = run(reference.submanifold_conv3d, grid.neighbours, torch.float64, "cpu")
    moved = Topology(coords.to(device)).dense_grid(2)
    backend = functional.resolve_backend("auto", torch.device(device))
    worst = {}
    for dtype in _dtypes(device):
        got = run(functional.submanifold_conv3d, moved, dtype, device)
        worst[_name(dtype)] = max(_relative_error(a, b) for a, b in zip(got, expected))
    return {"detail": f"backend {backend}; {_judge(worst, device)}"}


def attention(device: str) -> dict[str, Any]:
    """The window attention layer against a softmax over each window in float64."""
    import torch

    from trellis.modules.sparse.attention import WindowAttention, takes_varlen
    from trellis.modules.sparse.levels import Topology

    generator = torch.Generator().manual_seed(0)
    cells = torch.randperm(12**3, generator=generator)[:300].sort().values
    coords = torch.stack([cells * 0, cells // 144, cells // 12 % 12, cells % 12], dim=1)
    heads, channels = 4, 256
    feats = torch.randn(300, channels, generator=generator, dtype=torch.float64)
    torch.manual_seed(0)
    layer = WindowAttention(channels, heads, window_size=8, shift=4)
    with torch.no_grad():
        qkv = feats @ layer.to_qkv.weight.double().T + layer.to_qkv.bias.double()
        q, k, v = qkv.view(300, 3, heads, -1).unbind(1)
        window = (coords[:, 1:] + 4) // 8
        same = (window[:, None] == window[None]).all(-1)
        scores = torch.einsum("ihd,jhd->hij", q, k) / (channels // heads) ** 0.5
        weights = torch.where(same, scores, -torch.inf).softmax(-1)
        mixed = torch.einsum("hij,jhd->ihd", weights, v).reshape(300, channels)
        expected = mixed @ layer.to_out.weight.double().T + layer.to_out.bias.double()
        layer.to(device)  # its weights stay float32 and are cast to the dtype of the activations
        worst, backends = {}, []
        for dtype in _dtypes(device):
            x = feats.to(device, dtype)
            worst[_name(dtype)] = _relative_error(layer(x, Topology(coords.to(device))).cpu().double(), expected)
            varlen = takes_varlen(x.device, dtype, channels // heads)
            backends.append(f"{'varlen' if varlen else 'padded SDPA'} in {_name(dtype)}")
    return {"detail": f"backend {', '.join(backends)}; {_judge(worst, device)}"}


def tsdf(device: str) -> dict[str, Any]:
    """A box of 60 x 40 x 20 mm at 64 cubed, each voxel against the exact distance."""
    import numpy as np

    from trellis.geometry.sdf import mesh_to_sparse_sdf
    from trellis.geometry.transforms import voxel_centres
    from trellis.utils.blocks import BAND_VOXELS

    resolution, half = 64, np.array([30.0, 20.0, 10.0])
    corners = np.stack(np.meshgrid([0, 1], [0, 1], [0, 1], indexing="ij"), -1).reshape(-1, 3)
    vertices = (2.0 * corners - 1) * half
    quads = np.array([[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]])
    faces = np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]])
    blocks = mesh_to_sparse_sdf(vertices, faces, resolution, device=device)
    coords, values = blocks.to_voxels()
    outside = np.abs(voxel_centres(coords, resolution)) - half / 60 * 0.95
    distance = np.linalg.norm(np.maximum(outside, 0), axis=1) + np.minimum(outside.max(axis=1), 0)
    error = float(np.abs(values[:, 0] * BAND_VOXELS - distance * resolution).max())
    if len(values) < 10_000 or error > 0.01:
        raise RuntimeError(f"{len(values)} voxels, largest error {error:.2g} voxel (0.01 allowed)")
    return {"detail": f"{len(values)} voxels, largest error {error:.1e} voxel"}


def _dtypes(device: str) -> list[Any]:
    import torch

    return [torch.float32] if device == "cpu" else [torch.float32, torch.float16]


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _relative_error(got: Any, expected: Any) -> float:
    return float((got - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def _judge(worst: dict[str, float], device: str) -> str:
    for name, error in worst.items():
        allowed = 1e-5 if device == "cpu" else CUDA_TOLERANCE[name]
        if not error <= allowed:
            raise RuntimeError(f"relative error {error:.2g} in {name}, {allowed:g} allowed")
    return ", ".join(f"relative error {error:.1e} in {name}" for name, error in worst.items())


PROBES: dict[str, Callable[[str], dict[str, Any]]] = {
    "devices": devices,
    "convolution": convolution,
    "attention": attention,
    "tsdf": tsdf,
}


def main(arguments: list[str]) -> int:
    """Run one probe and write its answer as one line of JSON."""
    probe, device = arguments
    answer = PROBES[probe](device)
    sys.stdout.write("\n" + json.dumps(answer) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
