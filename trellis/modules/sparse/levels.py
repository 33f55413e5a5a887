"""The pyramid of one batch: which voxels exist at each stride, and who neighbours whom.

Built once per batch and shared by every layer of a level. Blocks are the latent voxels (stride 8). A level keeps, for
each block, the slots of its side^3 voxels that exist, in Morton order, so that siblings are adjacent; a neighbour is
found through one [M, 27] table of blocks plus arithmetic, without a hash table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trellis.modules.sparse.morton import (
    TAPS,
    neighbour_rule,
    packed_keys,
    slot_numbers,
    slot_positions,
    tap_offsets,
)
from trellis.utils.blocks import LATENT_STRIDE

TABLE_ROWS = 1 << 21
"""Levels up to this many rows keep their neighbour table (226 MB); larger ones compute the rows that are asked for."""


@dataclass(frozen=True)
class WindowPlan:
    """Rows of the latent grid grouped by attention window.

    Attributes:
        order: [M] int64 rows sorted by window. inverse: [M] int64, its inverse permutation.
        cu_seqlens: [W + 1] int32, where each window starts in `order`. max_length: rows of the largest window.
    """

    order: Tensor
    inverse: Tensor
    cu_seqlens: Tensor
    max_length: int


class Topology:
    """Blocks of one batch and the tables derived from them.

    Args:
        coords: [M, 4] integers (batch, x, y, z) of the latent grid; no row twice. Order is free, but norms need the
            rows of a sample to be contiguous and samples in ascending order.
        num_samples: batch size; read off the coordinates when None.
    """

    def __init__(self, coords: Tensor, num_samples: int | None = None) -> None:
        if coords.ndim != 2 or coords.shape[1] != 4:
            raise ValueError(f"coords must be [M, 4] (batch, x, y, z), got {list(coords.shape)}")
        self.coords = coords.int()
        self.num_blocks = coords.shape[0]
        if num_samples is None:
            num_samples = int(coords[:, 0].max()) + 1 if self.num_blocks else 0
        self.num_samples = num_samples
        self._neighbours: Tensor | None = None
        self._windows: dict[tuple[int, int], WindowPlan] = {}
        self._grids: dict[int, Grid] = {}

    @property
    def device(self) -> torch.device:
        return self.coords.device

    @property
    def block_neighbours(self) -> Tensor:
        """[M, 27] int32 row of the neighbouring block at each tap, -1 where there is none."""
        if self._neighbours is None:
            self._neighbours = _find_block_neighbours(self.coords)
        return self._neighbours

    def dense_grid(self, side: int) -> Grid:
        """The level on which all side^3 voxels below every block exist."""
        if side not in self._grids:
            self._grids[side] = Grid(self, side, None, self.num_blocks * side**3)
        return self._grids[side]

    def windows(self, size: int, shift: int) -> WindowPlan:
        """Attention windows: floor((coord + shift) / size) per axis and sample."""
        if (size, shift) not in self._windows:
            window = torch.div(self.coords[:, 1:] + shift, size, rounding_mode="floor")
            keys = packed_keys(torch.cat([self.coords[:, :1], window], dim=1))
            keys, order = torch.sort(keys, stable=True)
            _, lengths = torch.unique_consecutive(keys, return_counts=True)
            cu_seqlens = torch.zeros(lengths.numel() + 1, dtype=torch.int32, device=self.device)
            cu_seqlens[1:] = lengths.cumsum(0)
            inverse = torch.empty_like(order)
            inverse[order] = torch.arange(order.numel(), device=self.device)
            longest = int(lengths.max()) if lengths.numel() else 0
            self._windows[size, shift] = WindowPlan(order, inverse, cu_seqlens, longest)
        return self._windows[size, shift]


class Grid:
    """The voxels of one level.

    Attributes:
        side: voxels per block and axis (8 at stride 1, 1 at the latent grid).
        occupancy: [M, side^3] bool in Morton order, or None when all exist.
        num_rows: rows of a feature matrix on this level.
    """

    def __init__(self, topology: Topology, side: int, occupancy: Tensor | None, num_rows: int) -> None:
        self.topology = topology
        self.side = side
        self.occupancy = occupancy
        self.num_rows = num_rows
        self._neighbours: Tensor | None = None
        self._row_of: Tensor | None = None
        self._slots: Tensor | None = None
        self._offsets: Tensor | None = None

    @property
    def is_dense(self) -> bool:
        return self.occupancy is None

    @property
    def slots(self) -> Tensor:
        """[num_rows] int64: block * side^3 + slot of each row."""
        if self._slots is None:
            if self.occupancy is None:
                self._slots = torch.arange(self.num_rows, device=self.topology.device)
            else:
                flat = self.occupancy.reshape(-1)
                # nonzero_static does not stall the GPU: the size was counted when the batch was collated
                self._slots = torch.nonzero_static(flat, size=self.num_rows)[:, 0]
        return self._slots

    @property
    def row_of(self) -> Tensor:
        """[M, side^3] int32 row of each slot, -1 where the voxel does not exist."""
        if self._row_of is None:
            cells = self.side**3
            if self.occupancy is None:
                rows = torch.arange(self.num_rows, dtype=torch.int32, device=self.topology.device)
                self._row_of = rows.view(-1, cells)
            else:
                flat = self.occupancy.reshape(-1)
                rows = flat.cumsum(0, dtype=torch.int32) - 1
                self._row_of = torch.where(flat, rows, -1).view(-1, cells)
        return self._row_of

    @property
    def neighbours(self) -> Tensor:
        """[num_rows, 27] int32 row of the neighbour at each tap, -1 where there is none."""
        if self._neighbours is None:
            self._neighbours = self.neighbour_rows(0, self.num_rows)
        return self._neighbours

    def neighbour_rows(self, start: int, stop: int) -> Tensor:
        """`neighbours[start:stop]`; a large table is never built whole."""
        if self._neighbours is None and (start, stop) != (0, self.num_rows) and self.num_rows <= TABLE_ROWS:
            self._neighbours = self.neighbour_rows(0, self.num_rows)
        if self._neighbours is not None:
            return self._neighbours[start:stop]
        if self.side == 1:
            return self.topology.block_neighbours[start:stop]
        cells = self.side**3
        device = self.topology.device
        block_tap, target = (table.to(device) for table in neighbour_rule(self.side))
        slots = self.slots[start:stop]
        block, slot = torch.div(slots, cells, rounding_mode="floor"), slots % cells
        blocks = self.topology.block_neighbours[block[:, None], block_tap[slot]].long()
        flat = blocks.clamp_min(0) * cells + target[slot]
        rows = flat.int() if self.occupancy is None else self.row_of.view(-1)[flat]
        return torch.where(blocks >= 0, rows, -1)

    @property
    def sample_offsets(self) -> Tensor:
        """[B + 1] int64 on the CPU: where each sample's rows start."""
        if self._offsets is None:
            topology = self.topology
            if self.occupancy is None:
                per_block = torch.full((topology.num_blocks,), self.side**3, device=topology.device)
            else:
                per_block = self.occupancy.sum(1)
            counts = torch.zeros(topology.num_samples, dtype=torch.long, device=topology.device)
            counts.index_add_(0, topology.coords[:, 0].long(), per_block)
            self._offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).cpu()
        return self._offsets

    @property
    def coords(self) -> Tensor:
        """[num_rows, 4] int32 (batch, x, y, z) of this level's voxels."""
        cells = self.side**3
        block, slot = torch.div(self.slots, cells, rounding_mode="floor"), self.slots % cells
        base = self.topology.coords[block]
        position = base[:, 1:] * self.side + slot_positions(self.side).to(base.device)[slot].int()
        return torch.cat([base[:, :1], position], dim=1)


@dataclass(frozen=True)
class Pyramid:
    """The encoder's levels of one batch, finest first, and the input on them.

    Attributes:
        topology: the blocks.
        grids: strides 1, 2, 4, 8; the last one is dense with side 1.
        values: [M, 512] float, the TSDF of every slot at stride 1.
    """

    topology: Topology
    grids: tuple[Grid, Grid, Grid, Grid]
    values: Tensor


def build_pyramid(
    coords: Tensor,
    values: Tensor,
    active: Tensor,
    level_sizes: list[int] | None = None,
    num_samples: int | None = None,
) -> Pyramid:
    """Levels of a batch from its blocks.

    Args:
        coords: [M, 4] int (batch, x, y, z) of the blocks, ordered by sample.
        values: [M, 512] TSDF values, slots in Morton order; active: [M, 512] bool, the voxels that the encoder reads.
        level_sizes: rows at strides 1, 2, 4, 8; counted (a stall on a GPU) when None.
        num_samples: batch size; read off the coordinates when None.

    Raises:
        ValueError: shapes that do not fit, or a block without an active voxel.
    """
    m = coords.shape[0]
    if values.shape != (m, LATENT_STRIDE**3) or active.shape != values.shape:
        raise ValueError(
            f"values and active must be [{m}, 512] for {m} blocks, got {list(values.shape)} and {list(active.shape)}"
        )
    topology = Topology(coords, num_samples)
    occupancy = [active, active.view(m, 64, 8).any(-1)]
    occupancy.append(occupancy[1].view(m, 8, 8).any(-1))
    if level_sizes is None:
        level_sizes = [int(o.sum()) for o in occupancy] + [int(occupancy[2].any(-1).sum())]
        if level_sizes[3] != m:
            raise ValueError(f"every block needs an active voxel; {m - level_sizes[3]} of {m} have none")
    grids = [Grid(topology, 8 >> i, occupancy[i], level_sizes[i]) for i in range(3)]
    return Pyramid(topology, (*grids, topology.dense_grid(1)), values)  # type: ignore[arg-type]


def blocks_from_rows(sparse_index: Tensor, batch_idx: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A voxel list as blocks.

    Args:
        sparse_index: [N, 3] int voxel coordinates; batch_idx: [N] int; values: [N, 1] or [N] float.

    Returns:
        coords [M, 4] int32 by sample, then Morton; values [M, 512] (0 where no voxel is listed); listed [M, 512] bool.

    Raises:
        ValueError: lengths that differ, negative coordinates, or a voxel listed twice.
    """
    n = sparse_index.shape[0]
    if batch_idx.shape != (n,) or values.numel() != n:
        raise ValueError(
            f"sparse_index [N, 3], batch_idx [N] and sparse_sdf [N, 1] must agree, got {list(sparse_index.shape)}, "
            f"{list(batch_idx.shape)}, {list(values.shape)}"
        )
    voxels = torch.cat([batch_idx[:, None].long(), sparse_index.long()], dim=1)
    if n and int(voxels.min()) < 0:
        raise ValueError(f"coordinates must not be negative, got {int(voxels.min())}")
    blocks = torch.cat([voxels[:, :1], torch.div(voxels[:, 1:], LATENT_STRIDE, rounding_mode="floor")], dim=1)
    keys, inverse = torch.unique(packed_keys(blocks), return_inverse=True)
    m = keys.numel()
    coords = torch.zeros(m, 4, dtype=torch.long, device=voxels.device)
    coords[inverse] = blocks
    local = voxels[:, 1:] % LATENT_STRIDE
    slot = slot_numbers(LATENT_STRIDE).to(voxels.device)[local[:, 0], local[:, 1], local[:, 2]]
    flat = inverse * LATENT_STRIDE**3 + slot
    listed = torch.zeros(m * LATENT_STRIDE**3, dtype=torch.bool, device=voxels.device)
    listed[flat] = True
    if int(listed.sum()) != n:
        raise ValueError(f"a voxel is listed twice: {n} rows, {int(listed.sum())} distinct voxels")
    dense = torch.zeros(m * LATENT_STRIDE**3, dtype=values.dtype, device=voxels.device)
    dense[flat] = values.reshape(-1)
    return coords.int(), dense.view(m, -1), listed.view(m, -1)


def _find_block_neighbours(coords: Tensor) -> Tensor:
    """[M, 27] int32 rows of the 27 blocks around each block, by binary search in the sorted keys."""
    m = coords.shape[0]
    if m == 0:
        return torch.empty(0, TAPS, dtype=torch.int32, device=coords.device)
    keys, order = torch.sort(packed_keys(coords))
    target = coords[:, None, 1:] + tap_offsets().to(coords.device, torch.int32)[None]
    valid = (target >= 0).all(-1)
    batch = coords[:, None, :1].expand(m, TAPS, 1)
    query = packed_keys(torch.cat([batch, target.clamp_min(0)], dim=-1).view(-1, 4)).view(m, TAPS)
    position = torch.searchsorted(keys, query).clamp_max(m - 1)
    found = (keys[position] == query) & valid
    return torch.where(found, order[position], -1).int()
