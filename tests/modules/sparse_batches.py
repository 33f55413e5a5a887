"""Random sparse batches for tests of layers."""

from __future__ import annotations

import torch

from trellis.modules.sparse.levels import Pyramid, build_pyramid
from trellis.modules.sparse.morton import packed_keys


def random_pyramid(blocks: list[int], extent: int = 4, density: float = 0.3, seed: int = 0) -> Pyramid:
    """Blocks at random places of each sample, with random occupancy (at least one voxel each) and values."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for sample, count in enumerate(blocks):
        cells = torch.randperm(extent**3, generator=generator)[:count]
        xyz = torch.stack([cells // extent**2, cells // extent % extent, cells % extent], 1)
        rows.append(torch.cat([torch.full((count, 1), sample), xyz], 1))
    coords = torch.cat(rows) if rows else torch.zeros(0, 4, dtype=torch.long)
    coords = coords[torch.argsort(packed_keys(coords))].int()
    m = coords.shape[0]
    active = torch.rand(m, 512, generator=generator) < density
    active[torch.arange(m), torch.randint(512, (m,), generator=generator)] = True
    values = torch.rand(m, 512, generator=generator, dtype=torch.float64) * 2 - 1
    return build_pyramid(coords, values, active, num_samples=len(blocks))
