"""Plans over the rows of one batch: attention windows, and tiles that do not straddle samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trellis.modules.sparse.morton import packed_keys

WindowSizes = Mapping[tuple[int, int], Sequence[int]]
"""By side and shift of the attention windows: how many hold a block, and the most blocks of one; or bounds of both."""
MAX_WINDOWS = 65_535
"""Windows of one call of the variable-length kernels, the y dimension of their launch."""


@dataclass(frozen=True)
class WindowPlan:
    """Rows of the latent grid grouped by attention window.

    Attributes:
        order: [M] int64 rows sorted by window. inverse: [M] int64, its inverse permutation.
        cu_seqlens: [W + 1] int32, where each window starts in `order`; windows past the last one are empty.
        max_length: rows of the largest window, or a bound of it.
    """

    order: Tensor
    inverse: Tensor
    cu_seqlens: Tensor
    max_length: int

    @property
    def num_windows(self) -> int:
        """W, the empty ones included."""
        return self.cu_seqlens.shape[0] - 1


@dataclass(frozen=True)
class RowTiles:
    """Rows of a level cut into tiles that do not straddle samples; made on the device, without a stall.

    Attributes:
        spans: [T, 3] int64 (sample, first row, last row + 1); tiles past the last one are empty.
        first: [B + 1] int64, first tile of each sample. rows: the most rows of a tile.
    """

    spans: Tensor
    first: Tensor
    rows: int


def plan_tiles(starts: Tensor, num_rows: int, rows: int) -> RowTiles:
    """Tiles of at most `rows` rows from the samples' first rows [B + 1]; T = ceil(num_rows / rows) + B."""
    samples = starts.numel() - 1
    counts = torch.div(starts[1:] - starts[:-1] + rows - 1, rows, rounding_mode="floor")
    first = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    tile = torch.arange(-(-num_rows // rows) + samples, device=starts.device)
    sample = (torch.searchsorted(first, tile, right=True) - 1).clamp_max(max(samples - 1, 0))
    if samples == 0:
        return RowTiles(torch.zeros(0, 3, dtype=torch.long, device=starts.device), first, rows)
    begin = starts[sample] + (tile - first[sample]) * rows
    end = starts[sample + 1]
    begin = torch.minimum(begin, end)
    return RowTiles(torch.stack([sample, begin, torch.minimum(begin + rows, end)], dim=1), first, rows)


def counted_windows(coords: Tensor, size: int, shift: int) -> WindowPlan:
    """The windows that exist, counted on the host."""
    window = torch.div(coords[:, 1:] + shift, size, rounding_mode="floor")
    keys = packed_keys(torch.cat([coords[:, :1], window], dim=1))
    keys, order = torch.sort(keys, stable=True)
    _, lengths = torch.unique_consecutive(keys, return_counts=True)
    cu_seqlens = torch.zeros(lengths.numel() + 1, dtype=torch.int32, device=coords.device)
    cu_seqlens[1:] = lengths.cumsum(0)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=coords.device)
    return WindowPlan(order, inverse, cu_seqlens, int(lengths.max()) if lengths.numel() else 0)


def bounded_windows(coords: Tensor, size: int, shift: int, number: int, longest: int) -> WindowPlan:
    """The same by what is known of them, so that the host need not wait for the GPU.

    Args:
        number: of the windows, or a bound: the plan has as many. longest: rows of the largest, or a bound. Rows past
            numbers that are too small get no attention.
    """
    from trellis.modules.sparse.kernels import tables

    m, device = coords.shape[0], coords.device
    keys, order = torch.sort(tables.cell_keys(coords, size, shift), stable=True)
    rows = torch.arange(m, device=device)
    opens = torch.nn.functional.pad(keys[1:] != keys[:-1], (1, 0), value=True)
    window = opens.cumsum(0) - 1
    # rows that open no window write into one extra place at the end, which is cut off
    cu_seqlens = torch.full((number + 2,), m, dtype=torch.int32, device=device)
    cu_seqlens.scatter_(0, torch.where(opens, window, number + 1), rows.int())
    inverse = torch.empty_like(order)
    inverse[order] = rows
    return WindowPlan(order, inverse, cu_seqlens[: number + 1], longest)
