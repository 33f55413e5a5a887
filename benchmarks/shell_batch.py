"""The benchmarks' input: a spherical shell of radius 0.475 R with every voxel within 4 voxels of it active."""

from __future__ import annotations

import torch

from trellis.datasets.sparse_sdf import window_sizes
from trellis.modules.sparse.morton import packed_keys, slot_positions

RADIUS, BAND = 0.475, 4


def shell_batch(resolution: int, device: str) -> dict:
    """The batch that collate makes of one such shell, on `device`."""
    side = resolution // 8
    axis = torch.arange(side, device=device)
    blocks = torch.cartesian_prod(axis, axis, axis)
    centre = (blocks * 8 + 4) / resolution - 0.5
    near = (centre.norm(dim=1) - RADIUS).abs() * resolution < BAND + 7
    blocks = blocks[near]
    coords = torch.cat([torch.zeros_like(blocks[:, :1]), blocks], 1)
    coords = coords[torch.argsort(packed_keys(coords))].int()
    offsets = slot_positions(8).to(device)
    sdf = torch.empty(len(coords), 512, dtype=torch.float16, device=device)
    for start in range(0, len(coords), 4096):
        voxels = coords[start : start + 4096, None, 1:] * 8 + offsets
        distance = ((voxels + 0.5) / resolution - 0.5).norm(dim=2) - RADIUS
        sdf[start : start + 4096] = (distance * resolution / BAND).clamp(-1, 1).half()
    active = sdf.abs() < 1
    kept = active.any(1)
    coords, sdf, active = coords[kept], sdf[kept], active[kept]
    sizes = [active, active.view(-1, 64, 8).any(2), active.view(-1, 8, 64).any(2)]
    return {
        "block_coords": coords,
        "block_sdf": sdf,
        "active": active,
        "blocks_per_sample": torch.tensor([len(coords)]),
        "level_sizes": [int(s.sum()) for s in sizes] + [len(coords)],
        "window_sizes": window_sizes(coords[:, 1:].cpu().numpy()),
        "resolution": resolution,
    }


def timed(function, repeats: int, warmup: int = 2) -> list[float]:
    """Milliseconds of `repeats` calls after `warmup`, each from an idle card, by device events."""
    times = []
    for i in range(warmup + repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        function()
        stop.record()
        stop.synchronize()
        if i >= warmup:
            times.append(start.elapsed_time(stop))
    return sorted(times)


def machine() -> dict[str, str | None]:
    """Card (None without one) and versions."""
    import triton

    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": None if torch.version.cuda is None else str(torch.version.cuda),
    }
