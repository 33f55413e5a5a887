"""The pyramid of one batch: which voxels exist at each stride, and who neighbours whom.

Built once per batch and shared by every layer of a level. Blocks are the latent voxels (stride 8). A level keeps, for
each block, the slots of its side^3 voxels that exist, in Morton order, so that siblings are adjacent; a neighbour is
found through one [M, 27] table of blocks plus arithmetic, without a hash table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trellis.modules.sparse.kernels.support import has_kernels
from trellis.modules.sparse.morton import (
    TAPS,
    neighbour_rule,
    packed_keys,
    slot_numbers,
    slot_positions,
    tap_offsets,
)
from trellis.modules.sparse.plans import (
    MAX_WINDOWS,
    RowTiles,
    WindowPlan,
    WindowSizes,
    bounded_windows,
    counted_windows,
    plan_tiles,
)
from trellis.utils.blocks import LATENT_STRIDE

TABLE_ROWS = 1 << 21
"""Levels up to this many rows keep their neighbour table (226 MB); larger ones compute the rows that are asked for."""


class Topology:
    """Blocks of one batch and the tables derived from them.

    Args:
        coords: [M, 4] integers (batch, x, y, z) of the latent grid; no row twice. Order is free, but norms need the
            rows of a sample to be contiguous and samples in ascending order.
        num_samples: batch size; read off the coordinates when None (a stall on a GPU).
        extent: a bound of the spatial coordinates (resolution / 8), which bounds the number of attention windows
            without asking the GPU; counted (a stall on a GPU) when None.
        window_sizes: of the attention windows, where they are known: closer than that bound.
    """

    def __init__(
        self,
        coords: Tensor,
        num_samples: int | None = None,
        extent: int | None = None,
        window_sizes: WindowSizes | None = None,
    ) -> None:
        if coords.ndim != 2 or coords.shape[1] != 4:
            raise ValueError(f"coords must be [M, 4] (batch, x, y, z), got {list(coords.shape)}")
        self.coords = coords.int()
        self.num_blocks = coords.shape[0]
        if num_samples is None:
            num_samples = int(coords[:, 0].max()) + 1 if self.num_blocks else 0
        self.num_samples = num_samples
        self.extent = extent
        self.window_sizes = window_sizes or {}
        self._neighbours: Tensor | None = None
        self._starts: Tensor | None = None
        self._windows: dict[tuple[int, int], WindowPlan] = {}
        self.embeddings: dict[tuple[int, float | None, torch.dtype], Tensor] = {}
        self._dense_grids: dict[int, _Kept] = {}
        self._box: tuple[list[int], list[int]] | None = None

    @property
    def device(self) -> torch.device:
        return self.coords.device

    @property
    def block_neighbours(self) -> Tensor:
        """[M, 27] int32 row of the neighbouring block at each tap, -1 where there is none."""
        if self._neighbours is None:
            if has_kernels(self.device):
                from trellis.modules.sparse.kernels import tables

                self._neighbours = tables.block_neighbours(self.coords)
            else:
                self._neighbours = _find_block_neighbours(self.coords)
        return self._neighbours

    @property
    def sample_starts(self) -> Tensor:
        """[B + 1] int64 on the device: first block of each sample."""
        if self._starts is None:
            samples = torch.arange(self.num_samples + 1, dtype=torch.int32, device=self.device)
            self._starts = torch.searchsorted(self.coords[:, 0].contiguous(), samples)
        return self._starts

    @property
    def box(self) -> tuple[list[int], list[int]]:
        """Lowest and highest block coordinates (x, y, z) of the batch; zeros without any block."""
        if self._box is None:
            xyz = self.coords[:, 1:] if self.num_blocks else self.coords.new_zeros(1, 3)
            self._box = xyz.amin(0).tolist(), xyz.amax(0).tolist()
        return self._box

    def dense_grid(self, side: int) -> Grid:
        """The level on which all side^3 voxels below every block exist."""
        kept = self._dense_grids.setdefault(side, _Kept())
        return Grid(self, side, None, self.num_blocks * side**3, kept)

    def windows(self, size: int, shift: int) -> WindowPlan:
        """Attention windows: floor((coord + shift) / size) per axis and sample."""
        if (size, shift) not in self._windows:
            known = self._known_windows(size, shift)
            if has_kernels(self.device) and known is not None and self.num_blocks:
                plan = bounded_windows(self.coords, size, shift, *known)
            else:
                plan = counted_windows(self.coords, size, shift)
            self._windows[size, shift] = plan
        return self._windows[size, shift]

    def _known_windows(self, size: int, shift: int) -> Sequence[int] | None:
        """Number of windows and rows of the largest, or bounds of them; None where the blocks must be asked."""
        if (size, shift) in self.window_sizes:
            return self.window_sizes[size, shift]
        if self.extent is None:
            return None
        cells = self.num_samples * ((self.extent + shift + size - 1) // size) ** 3
        number = min(self.num_blocks, cells)
        return (number, min(self.num_blocks, size**3)) if number <= MAX_WINDOWS else None


class _Kept:
    """Tables of a grid, made when first asked for.

    Apart from the grid, so that a topology keeps those of its dense grids without a circle of references: what lives
    on the GPU is freed with the batch, not when Python next looks for circles.
    """

    def __init__(self) -> None:
        self.neighbours: Tensor | None = None
        self.row_of: Tensor | None = None
        self.slots: Tensor | None = None
        self.offsets: Tensor | None = None
        self.starts: Tensor | None = None
        self.tap_table: Tensor | None = None
        self.child_starts: Tensor | None = None
        self.tiles: dict[int, RowTiles] = {}
        self.dense_plan: Any = None


class Grid:
    """The voxels of one level.

    Attributes:
        side: voxels per block and axis (8 at stride 1, 1 at the latent grid).
        occupancy: [M, side^3] bool in Morton order, or None when all exist.
        num_rows: rows of a feature matrix on this level.
        padded: rows past the voxels that exist belong to the last sample, have no neighbours, parents or children, and
            stand at the last slot of the last block, which must not exist (see `build_pyramid`).
    """

    def __init__(
        self,
        topology: Topology,
        side: int,
        occupancy: Tensor | None,
        num_rows: int,
        kept: _Kept | None = None,
        padded: bool = False,
    ) -> None:
        self.topology = topology
        self.side = side
        self.occupancy = occupancy
        self.num_rows = num_rows
        self.padded = padded
        self._kept = _Kept() if kept is None else kept

    @property
    def is_dense(self) -> bool:
        return self.occupancy is None

    @property
    def dense_plan(self) -> Any:
        """What conv/dense.py keeps with the grid."""
        return self._kept.dense_plan

    @dense_plan.setter
    def dense_plan(self, plan: Any) -> None:
        self._kept.dense_plan = plan

    @property
    def slots(self) -> Tensor:
        """[num_rows] int64: block * side^3 + slot of each row."""
        if self._kept.slots is None:
            if self.occupancy is None:
                self._kept.slots = torch.arange(self.num_rows, device=self.topology.device)
            else:
                flat = self.occupancy.reshape(-1)
                # nonzero_static does not stall the GPU: the size was counted when the batch was collated
                fill = flat.numel() - 1
                self._kept.slots = torch.nonzero_static(flat, size=self.num_rows, fill_value=fill)[:, 0]
        return self._kept.slots

    @property
    def row_of(self) -> Tensor:
        """[M, side^3] int32 row of each slot, -1 where the voxel does not exist."""
        if self._kept.row_of is None:
            cells = self.side**3
            if self.occupancy is None:
                rows = torch.arange(self.num_rows, dtype=torch.int32, device=self.topology.device)
                self._kept.row_of = rows.view(-1, cells)
            else:
                flat = self.occupancy.reshape(-1)
                rows = flat.cumsum(0, dtype=torch.int32) - 1
                self._kept.row_of = torch.where(flat, rows, -1).view(-1, cells)
        return self._kept.row_of

    @property
    def neighbours(self) -> Tensor:
        """[num_rows, 27] int32 row of the neighbour at each tap, -1 where there is none."""
        if self._kept.neighbours is None:
            self._kept.neighbours = self.neighbour_rows(0, self.num_rows)
        return self._kept.neighbours

    def neighbour_rows(self, start: int, stop: int) -> Tensor:
        """`neighbours[start:stop]`; a large table is never built whole."""
        if self._kept.neighbours is None and (start, stop) != (0, self.num_rows) and self.num_rows <= TABLE_ROWS:
            self._kept.neighbours = self.neighbour_rows(0, self.num_rows)
        if self._kept.neighbours is not None:
            return self._kept.neighbours[start:stop]
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
        if self._kept.offsets is None:
            topology = self.topology
            if self.occupancy is None:
                per_block = torch.full((topology.num_blocks,), self.side**3, device=topology.device)
            else:
                per_block = self.occupancy.sum(1)
            counts = torch.zeros(topology.num_samples, dtype=torch.long, device=topology.device)
            counts.index_add_(0, topology.coords[:, 0].long(), per_block)
            if self.padded:
                counts[-1] = self.num_rows - counts[:-1].sum()
            self._kept.offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).cpu()
        return self._kept.offsets

    @property
    def tap_table(self) -> Tensor:
        """[27, num_rows] int32, `neighbours` with one contiguous column per tap, as the kernels read it."""
        if self._kept.tap_table is None:
            from trellis.modules.sparse.kernels import tables

            blocks = self.topology.block_neighbours
            slots, row_of = (None, None) if self.is_dense else (self.slots, self.row_of)
            self._kept.tap_table = tables.tap_table(blocks, self.side, self.num_rows, slots, row_of)
        return self._kept.tap_table

    @property
    def sample_starts(self) -> Tensor:
        """[B + 1] int64 on the device: `sample_offsets` without a stall."""
        if self._kept.starts is None:
            blocks = self.topology.sample_starts
            if self.occupancy is None:
                self._kept.starts = blocks * self.side**3
            else:
                rows = torch.nn.functional.pad(self.occupancy.sum(1).cumsum(0), (1, 0))
                self._kept.starts = rows[blocks]
                if self.padded:
                    self._kept.starts[-1:].fill_(self.num_rows)
        return self._kept.starts

    @property
    def child_starts(self) -> Tensor:
        """[num_rows + 1] int32: first row, on the next finer grid of the same batch, of each row's children.

        Set by `build_pyramid`; siblings are adjacent and in the order of their parents.
        """
        if self._kept.child_starts is None:
            raise ValueError("this grid has no finer grid below it")
        return self._kept.child_starts

    def link_children(self, fine: Grid) -> None:
        """Derive `child_starts` from the next finer grid."""
        if fine.side != 2 * self.side:
            raise ValueError(f"the finer grid must have side {2 * self.side}, got {fine.side}")
        if fine.occupancy is None:
            starts = torch.arange(self.num_rows + 1, dtype=torch.int32, device=self.topology.device) * 8
        else:
            counts = fine.occupancy.reshape(-1, 8).sum(1, dtype=torch.int32)[self.slots]
            starts = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
        self._kept.child_starts = starts

    def row_tiles(self, rows: int) -> RowTiles:
        """Tiles of at most `rows` rows of one sample each."""
        if rows not in self._kept.tiles:
            if has_kernels(self.topology.device):
                from trellis.modules.sparse.kernels import reduce

                self._kept.tiles[rows] = reduce.plan_tiles(self.sample_starts, self.num_rows, rows)
            else:
                self._kept.tiles[rows] = plan_tiles(self.sample_starts, self.num_rows, rows)
        return self._kept.tiles[rows]

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
    extent: int | None = None,
    window_sizes: WindowSizes | None = None,
    padded: bool = False,
) -> Pyramid:
    """Levels of a batch from its blocks.

    Args:
        coords: [M, 4] int (batch, x, y, z) of the blocks, ordered by sample.
        values: [M, 512] TSDF values, slots in Morton order; active: [M, 512] bool, the voxels that the encoder reads.
        level_sizes: rows at strides 1, 2, 4, 8; counted (a stall on a GPU) when None.
        num_samples: batch size; read off the coordinates when None.
        extent, window_sizes: see `Topology`.
        padded: `level_sizes` are bounds of the rows, and the last sample is there to fill up: at least one block, none
            with an active voxel. Its rows touch no other sample's; how many real ones there are need not be known to
            the host, so that work recorded once serves batches of many sizes.

    Raises:
        ValueError: shapes that do not fit, or a block without an active voxel.
    """
    m = coords.shape[0]
    if values.shape != (m, LATENT_STRIDE**3) or active.shape != values.shape:
        raise ValueError(
            f"values and active must be [{m}, 512] for {m} blocks, got {list(values.shape)} and {list(active.shape)}"
        )
    topology = Topology(coords, num_samples, extent, window_sizes)
    occupancy = [active, active.view(m, 64, 8).any(-1)]
    occupancy.append(occupancy[1].view(m, 8, 8).any(-1))
    if level_sizes is None:
        level_sizes = [int(o.sum()) for o in occupancy] + [int(occupancy[2].any(-1).sum())]
        if level_sizes[3] != m:
            raise ValueError(f"every block needs an active voxel; {m - level_sizes[3]} of {m} have none")
    grids = [Grid(topology, 8 >> i, occupancy[i], level_sizes[i], padded=padded) for i in range(3)]
    grids.append(topology.dense_grid(1))
    if has_kernels(coords.device):
        for fine, coarse in zip(grids, grids[1:]):
            coarse.link_children(fine)
    return Pyramid(topology, tuple(grids), values)  # type: ignore[arg-type]


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
