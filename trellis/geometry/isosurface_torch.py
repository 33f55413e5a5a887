"""The surface of `isosurface.extract_mesh` made on the tensors' own device: the same vertices and triangles.

Vertices are numbered by their keys (row of the block, voxel, axis) in ascending order, and triangles find theirs by
binary search among the keys; so nothing but the blocks' values, the vertices and the triangles is held whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trellis.geometry.block_complement import OFFSETS_27
from trellis.geometry.block_complement_torch import PaddedBlockTensors
from trellis.geometry.isosurface import (
    EDGE_MARGIN,
    GOOD_GRADIENT,
    KINK_RATIO,
    KINKED_GRADIENT,
    MAX_CORRECTION_VOXELS,
    NOTHING_INSIDE,
    logger,
)
from trellis.geometry.mc_table import CORNERS, EDGES, case_table
from trellis.geometry.sharp_features_torch import sharpen_tensors
from trellis.utils.blocks import STORAGE_BLOCK, SparseSDFBlocks

_PAD = 11  # voxels -1..9 of a block along each axis
_VOXELS = STORAGE_BLOCK**3
_STRIDES = (_PAD * _PAD, _PAD, 1)


@dataclass(frozen=True)
class ChunkSizes:
    """How much is worked on at once: blocks and triangles."""

    blocks: int = 8192
    faces: int = 1 << 20


@dataclass(frozen=True)
class _Edges:
    """Grid edges between an inside and an outside voxel, and the cells that hold any.

    Attributes:
        keys: [V] int64 ascending, 1536 * row + 3 * voxel + axis. vertices: [V, 3] float64 in voxels.
        normals: [V, 3] float32, zero where not known. reliable: [V] bool.
        cells: [N] int64, 512 * row + voxel. cases: [N] uint8.
    """

    keys: Tensor
    vertices: Tensor
    normals: Tensor
    reliable: Tensor
    cells: Tensor
    cases: Tensor


@torch.no_grad()
def extract_mesh_tensors(
    block_index: Tensor,
    block_sdf: Tensor,
    *,
    resolution: int,
    band_voxels: int,
    to_world: np.ndarray | None = None,
    sizes: ChunkSizes = ChunkSizes(),
) -> tuple[Tensor, Tensor]:
    """As `isosurface.extract_mesh`, on the device of `block_sdf`.

    Args:
        block_index: [M, 3] integers; block_sdf: [M, 8, 8, 8] float16, x slowest; on one device.
        to_world: [4, 4] float64 or None. sizes: bounds the memory besides what is held whole.

    Returns:
        vertices [V, 3] float64 and faces [F, 3] int32; those of `extract_mesh` to rounding, in its order but for the
        faces around sharp features.

    Raises:
        ValueError: as `extract_mesh`.
    """
    device = block_sdf.device
    if not bool(torch.isfinite(block_sdf).all()):
        raise ValueError("block_sdf must be finite, got inf or NaN")
    side = resolution // STORAGE_BLOCK
    if len(block_index) and (int(block_index.min()) < 0 or int(block_index.max()) >= side):
        raise ValueError(
            f"block_index must lie in [0, {side}), got [{int(block_index.min())}, {int(block_index.max())}]"
        )
    if not len(block_index):
        return torch.zeros(0, 3, dtype=torch.float64, device=device), torch.zeros(
            0, 3, dtype=torch.int32, device=device
        )
    padded = PaddedBlockTensors(block_index, block_sdf, resolution)
    rows = _rows_with_surface(block_sdf, padded, sizes)
    neighbours = padded.neighbours(rows)
    edges = _crossed_edges(block_sdf, padded, rows, neighbours, band_voxels, sizes)
    faces, table_rows = _faces(rows, neighbours, len(padded.coords), edges, sizes)
    del padded, neighbours, rows
    if not len(faces):
        logger.warning(NOTHING_INSIDE)
    vertices, normals, faces = sharpen_tensors(
        edges.vertices, edges.normals, edges.reliable, faces, table_rows, sizes.faces
    )
    del edges, table_rows
    vertices = _balance_chords(vertices, normals, faces, sizes)
    vertices = (vertices + 0.5) / resolution - 0.5
    if to_world is not None:
        linear, shift = (torch.from_numpy(part.copy()).to(device) for part in (to_world[:3, :3], to_world[:3, 3]))
        vertices = vertices @ linear.T + shift
        if np.linalg.det(to_world[:3, :3]) < 0:
            faces = faces.flip(1)
    return vertices, faces.contiguous()


def extract_mesh_on(blocks: SparseSDFBlocks, device: str | torch.device) -> tuple[np.ndarray, np.ndarray]:
    """`extract_mesh` of blocks in memory, worked out on `device`: vertices float64 [V, 3], faces int64 [F, 3]."""
    vertices, faces = extract_mesh_tensors(
        torch.from_numpy(blocks.block_index).to(device),
        torch.from_numpy(blocks.block_sdf).to(device),
        resolution=blocks.resolution,
        band_voxels=blocks.band_voxels,
        to_world=blocks.to_world,
    )
    return vertices.cpu().numpy(), faces.long().cpu().numpy()


BYTES_PER_VERTEX, BYTES_PER_BLOCK = 320, 2048
BYTES_PER_CHUNK_BLOCK, BYTES_PER_CHUNK_FACE = 70_000, 200
"""Bounds. Counted on live tensors: 160 a vertex where little is sharp, 300 where a third of the triangles is."""


def surface_bytes(block_sdf: Tensor, sizes: ChunkSizes = ChunkSizes()) -> int:
    """Bytes on the device that `extract_mesh_tensors` takes at the most besides its input [M, 8, 8, 8].

    Vertices are counted as the sign changes inside blocks and a seventh more, for those between blocks.
    """
    changes = 0
    for part in block_sdf.split(sizes.blocks):
        inside = part < 0
        for axis in (1, 2, 3):
            first, second = inside.narrow(axis, 0, STORAGE_BLOCK - 1), inside.narrow(axis, 1, STORAGE_BLOCK - 1)
            changes += int((first != second).sum())
    held = changes * 8 // 7 * BYTES_PER_VERTEX + len(block_sdf) * BYTES_PER_BLOCK
    return held + sizes.blocks * BYTES_PER_CHUNK_BLOCK + sizes.faces * BYTES_PER_CHUNK_FACE


def sizes_within(block_sdf: Tensor, max_bytes: float) -> ChunkSizes | None:
    """The largest of a few chunk sizes with which `surface_bytes` is at most `max_bytes`; None if none is."""
    for sizes in (ChunkSizes(), ChunkSizes(2048, 1 << 18), ChunkSizes(512, 1 << 16)):
        if surface_bytes(block_sdf, sizes) <= max_bytes:
            return sizes
    return None


def _rows_with_surface(block_sdf: Tensor, padded: PaddedBlockTensors, sizes: ChunkSizes) -> Tensor:
    """Rows, ascending, of the blocks whose 9-cubed voxels 0..8 may hold both signs."""
    device, m, total = block_sdf.device, padded.num_blocks, len(padded.coords)
    # one row more, for what lies beyond the shell, where nothing can differ
    has_inside, has_outside = (torch.zeros(total + 1, dtype=torch.bool, device=device) for _ in range(2))
    for start in range(0, m, sizes.blocks):
        inside = (block_sdf[start : start + sizes.blocks] < 0).flatten(1)
        has_inside[start : start + len(inside)] = inside.any(1)
        has_outside[start : start + len(inside)] = ~inside.all(1)
    has_inside[m:total], has_outside[m:total] = padded.shell_inside, ~padded.shell_inside
    corners = torch.from_numpy(CORNERS).to(device)
    mixed = []
    for rows in torch.arange(total, device=device).split(8 * sizes.blocks):
        around = padded.find(padded.coords[rows][:, None, :] + corners)
        around = torch.where(around < 0, total, around)
        mixed.append(rows[has_inside[around].any(1) & has_outside[around].any(1)])
    return torch.cat(mixed)


def _padding_table(device: torch.device) -> tuple[Tensor, Tensor]:
    """For each of the 11-cubed voxels -1..9: in which neighbour (row of OFFSETS_27) it lies, and its voxel there."""
    voxel = np.stack(np.meshgrid(*[np.arange(-1, 10)] * 3, indexing="ij"), -1).reshape(-1, 3)
    block = voxel // STORAGE_BLOCK
    local = voxel - block * STORAGE_BLOCK
    which = (block + 1) @ (9, 3, 1)
    assert np.array_equal(OFFSETS_27[which], block)
    place = local @ (STORAGE_BLOCK**2, STORAGE_BLOCK, 1)
    return torch.from_numpy(which).to(device), torch.from_numpy(place).to(device)


def _crossed_edges(
    block_sdf: Tensor,
    padded: PaddedBlockTensors,
    rows: Tensor,
    neighbours: Tensor,
    band_voxels: int,
    sizes: ChunkSizes,
) -> _Edges:
    device, m = block_sdf.device, padded.num_blocks
    which, place = _padding_table(device)
    flat = block_sdf.reshape(-1)
    # what a row's values are: its own block, or one value for a whole missing block
    missing = torch.ones(len(padded.coords) + 1 - m, dtype=torch.float32, device=device)
    missing[:-1][padded.shell_inside] = -1
    parts: list[tuple[Tensor, ...]] = []
    for start in range(0, len(rows), sizes.blocks):
        around = neighbours[start : start + sizes.blocks].long()
        around = torch.where(around < 0, len(padded.coords), around)[:, which]
        exists = around < m
        values = torch.where(
            exists, flat[torch.where(exists, around * _VOXELS + place, 0)].float(), missing[(around - m).clamp_min(0)]
        )
        del around, exists
        inside = values.view(-1, _PAD, _PAD, _PAD)[:, 1:10, 1:10, 1:10] < 0
        case = torch.zeros(len(values), *(STORAGE_BLOCK,) * 3, dtype=torch.uint8, device=device)
        for bit, (x, y, z) in enumerate(CORNERS.tolist()):
            case |= inside[:, x : x + 8, y : y + 8, z : z + 8].to(torch.uint8) << bit
        case = case.view(-1)
        active = ((case != 0) & (case != 255)).nonzero()[:, 0]
        here = inside[:, :8, :8, :8]
        crossing = torch.stack(
            [here != inside[:, 1:, :8, :8], here != inside[:, :8, 1:, :8], here != inside[:, :8, :8, 1:]], dim=-1
        )
        edges = crossing.view(-1).nonzero()[:, 0]
        del inside, here, crossing
        position, normal, known = _edge_roots(values.view(-1), edges, band_voxels)
        block, voxel, axis = edges // (3 * _VOXELS), edges // 3 % _VOXELS, edges % 3
        base = padded.coords[rows[start : start + sizes.blocks]][block] * STORAGE_BLOCK
        base = (base + torch.stack([voxel >> 6, voxel >> 3 & 7, voxel & 7], dim=-1)).double()
        base.scatter_add_(1, axis[:, None], position[:, None])
        parts.append((edges + start * 3 * _VOXELS, base, normal, known, active + start * _VOXELS, case[active]))
    if not parts:
        empty = torch.zeros(0, dtype=torch.long, device=device)
        zero = torch.zeros(0, 3, dtype=torch.float64, device=device)
        return _Edges(empty, zero, zero.float(), empty.bool(), empty, empty.to(torch.uint8))
    return _Edges(*(torch.cat(column) for column in zip(*parts)))


def _edge_roots(flat: Tensor, edges: Tensor, band_voxels: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `isosurface._edge_roots`, of padded values [C * 11^3] float32; the formulas and their reasons are there."""
    block, voxel, axis = edges // (3 * _VOXELS), edges // 3 % _VOXELS, edges % 3
    base = block * _PAD**3 + (voxel >> 6) * _PAD * _PAD + (voxel >> 3 & 7) * _PAD + (voxel & 7) + sum(_STRIDES)
    step = torch.tensor(_STRIDES, device=flat.device)[axis]
    f0, f1, f2, f3 = (flat[base + k * step].double() for k in (-1, 0, 1, 2))
    usable = (f0.abs() < 1) & (f1.abs() < 1) & (f2.abs() < 1) & (f3.abs() < 1)
    d1, d2 = f0 - 2 * f1 + f2, f1 - 2 * f2 + f3
    usable &= d1 * d2 > 0
    limit = torch.where(usable, KINK_RATIO * torch.minimum(d1.abs(), d2.abs()), 0.0)
    d1, d2 = torch.clamp(d1, -limit, limit), torch.clamp(d2, -limit, limit)
    rise = f2 - f1
    t = f1 / (f1 - f2)
    for _ in range(4):
        bend = (2 - t) * d1 + (1 + t) * d2
        value = (1 - t) * f1 + t * f2 - t * (1 - t) / 6 * bend
        slope = rise - (1 - 2 * t) / 6 * bend - t * (1 - t) / 6 * (d2 - d1)
        safe = slope * rise > 0
        t = torch.where(safe, t - value / torch.where(safe, slope, 1.0), t).clamp(0, 1)
    up = torch.sign(rise)
    del f0, f1, f2, f3, d1, d2, limit, bend, value, slope, safe, usable, rise
    first, first_error = _gradient(flat, base, band_voxels)
    second, second_error = _gradient(flat, base + step, band_voxels)
    worst = torch.maximum(first_error, second_error)
    known = worst < torch.inf
    reliable = worst < GOOD_GRADIENT
    normal = (1 - t)[:, None] * first + t[:, None] * second
    kinked = (known & (worst > KINKED_GRADIENT)).nonzero()[:, 0]
    if len(kinked):
        up, along = up[kinked], axis[kinked]
        steepest = torch.zeros(len(kinked), dtype=torch.float64, device=flat.device)
        t_k, normal_k, reliable_k = t[kinked], normal[kinked], reliable[kinked]
        for origin, at in ((0, base[kinked]), (1, (base + step)[kinked])):
            gradient, error = _one_sided_gradient(flat, at, band_voxels)
            rise = gradient.gather(1, along[:, None])[:, 0] * up
            meet = origin - flat[at] * band_voxels / torch.where(rise > 0, rise * up, 1.0)
            good = (error < GOOD_GRADIENT) & (rise > steepest) & (meet > -EDGE_MARGIN) & (meet < 1 + EDGE_MARGIN)
            steepest = torch.where(good, rise, steepest)
            t_k = torch.where(good, meet, t_k)
            normal_k = torch.where(good[:, None], gradient, normal_k)
            reliable_k = reliable_k | good
        t[kinked], normal[kinked], reliable[kinked] = t_k, normal_k, reliable_k
    t = t.clamp(EDGE_MARGIN, 1 - EDGE_MARGIN)
    length = _length(normal)
    known &= length > 0
    normal = normal * torch.where(known, 1 / torch.where(known, length, 1.0), 0.0)[:, None]
    return t, normal.float(), reliable & known


def _length(vectors: Tensor) -> Tensor:
    """Lengths of [N, 3], summed in the order of numpy, so that comparisons come out the same."""
    x, y, z = vectors.unbind(1)
    return torch.sqrt(x * x + y * y + z * z)


def _gradient(flat: Tensor, at: Tensor, band_voxels: int) -> tuple[Tensor, Tensor]:
    """Central differences [N, 3] of the distance in voxels; | |g| - 1 |, inf where a sample is outside the band."""
    gradient = torch.empty(len(at), 3, dtype=torch.float32, device=at.device)
    known = torch.ones(len(at), dtype=torch.bool, device=at.device)
    for k, stride in enumerate(_STRIDES):
        after, before = flat[at + stride], flat[at - stride]
        gradient[:, k] = (after - before) * (band_voxels / 2)
        known &= (after.abs() < 1) & (before.abs() < 1)
    error = (_length(gradient) - 1).abs()
    return gradient, torch.where(known, error, torch.inf)


def _one_sided_gradient(flat: Tensor, at: Tensor, band_voxels: int) -> tuple[Tensor, Tensor]:
    """Of the eight gradients [N, 3] from differences to one side, the one whose length is closest to 1; | |g| - 1 |."""
    here = flat[at]
    sides = [
        [(here - flat[at - stride]).double() * band_voxels, (flat[at + stride] - here).double() * band_voxels]
        for stride in _STRIDES
    ]
    best = torch.zeros(len(at), 3, dtype=torch.float64, device=at.device)
    best_error = torch.full((len(at),), torch.inf, dtype=torch.float64, device=at.device)
    for choice in CORNERS.tolist():
        gradient = torch.stack([sides[k][choice[k]] for k in range(3)], dim=1)
        error = (_length(gradient) - 1).abs()
        better = error < best_error
        best = torch.where(better[:, None], gradient, best)
        best_error = torch.where(better, error, best_error)
    return best, best_error


def _edge_table(device: torch.device) -> tuple[Tensor, Tensor]:
    """For voxel v and edge e of its cell, at 12 v + e: the corner neighbour whose edge it is, and 3 * voxel + axis."""
    voxel = np.stack(np.unravel_index(np.arange(_VOXELS), (STORAGE_BLOCK,) * 3), axis=-1)
    position = voxel[:, None] + EDGES[None, :, 1:]
    corner = (position // STORAGE_BLOCK) @ (4, 2, 1)
    local = (position % STORAGE_BLOCK) @ (STORAGE_BLOCK**2, STORAGE_BLOCK, 1) * 3 + EDGES[:, 0]
    return torch.from_numpy(corner.reshape(-1)).to(device), torch.from_numpy(local.reshape(-1)).to(device)


def _faces(rows: Tensor, neighbours: Tensor, num_rows: int, edges: _Edges, sizes: ChunkSizes) -> tuple[Tensor, Tensor]:
    """[F, 3] int32 faces of the active cells, and the row of each in the case table, [F] int16."""
    device, table = rows.device, case_table()
    starts, triangles = (torch.from_numpy(part).to(device) for part in (table.triangle_start, table.triangles))
    corner_of, local_of = _edge_table(device)
    compact = torch.full((num_rows + 1,), -1, dtype=torch.long, device=device)
    compact[rows] = torch.arange(len(rows), device=device)
    columns = [9 * x + 3 * y + z for x, y, z in (CORNERS + 1).tolist()]
    corner_rows = compact[neighbours[:, columns].long()]  # -1 reads the last place, which stays -1
    faces, table_rows = [], []
    for start in range(0, len(edges.cells), sizes.faces // 2):  # two triangles a cell, about
        cells = edges.cells[start : start + sizes.faces // 2]
        cases = edges.cases[start : start + sizes.faces // 2].long()
        counts = starts[cases + 1] - starts[cases]
        ends = counts.cumsum(0)
        cell = torch.repeat_interleave(torch.arange(len(cells), device=device), counts, output_size=int(ends[-1]))
        row = starts[cases][cell] + torch.arange(len(cell), device=device) - (ends - counts)[cell]
        block, voxel = cells[cell] // _VOXELS, cells[cell] % _VOXELS
        place = voxel[:, None] * 12 + triangles[row]
        owner = corner_rows[block[:, None], corner_of[place]]
        wanted = owner * (3 * _VOXELS) + local_of[place]
        vertex = torch.searchsorted(edges.keys, wanted, out_int32=True)
        found = edges.keys[vertex.clamp_max(len(edges.keys) - 1)] == wanted
        assert bool(found.all()), "every edge of a case has its vertex"
        faces.append(vertex)
        table_rows.append(row.short())
    if not faces:
        return torch.zeros(0, 3, dtype=torch.int32, device=device), torch.zeros(0, dtype=torch.int16, device=device)
    return torch.cat(faces), torch.cat(table_rows)


def _balance_chords(vertices: Tensor, normals: Tensor, faces: Tensor, sizes: ChunkSizes) -> Tensor:
    """As `isosurface._balance_chords`; sums run in any order, so the last bits of float64 may differ."""
    weight = torch.zeros(len(vertices), dtype=torch.float64, device=vertices.device)
    total = torch.zeros_like(weight)
    for part in faces.split(sizes.faces):
        corner, normal = vertices[part], normals[part].double()
        side = corner.roll(-1, 1) - corner
        area = torch.linalg.vector_norm(torch.linalg.cross(side[:, 0], side[:, 1]), dim=1)
        offset = (side * (normal.roll(-1, 1) - normal)).sum((1, 2)) / 24
        offset = torch.where((normal == 0).all(2).any(1), 0.0, offset)
        place = part.long().view(-1)
        weight.index_add_(0, place, area.repeat_interleave(3))
        total.index_add_(0, place, (area * offset).repeat_interleave(3))
    shift = (total / weight.clamp_min(1e-30)).clamp(-MAX_CORRECTION_VOXELS, MAX_CORRECTION_VOXELS)
    return vertices + shift[:, None] * normals
