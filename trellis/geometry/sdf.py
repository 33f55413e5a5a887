"""Triangle mesh -> sparse truncated signed distance field, by refinement of cells near the surface."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from types import ModuleType

import numpy as np

from trellis.geometry.transforms import check_to_world, normalising_transform, world_to_grid
from trellis.utils.blocks import BAND_VOXELS, STORAGE_BLOCK, SparseSDFBlocks, check_resolution
from trellis.utils.mesh_merge import merge_identical_vertices
from trellis.utils.mesh_topology import check_mesh_arrays, closed_chain_problem
from trellis.utils.warp_utils import check_warp_device, get_warp

logger = logging.getLogger(__name__)

SIGN_METHODS = ("auto", "crossings", "winding")
_MAX_SHARE = 0.01
_CHUNK_BLOCKS = {"cpu": 4096, "cuda": 32768}
_BLOCK_CAP, _CELL_CAP = 384, 96


@dataclass
class StageTimes:
    """Seconds of CPU time and of wall time by stage, filled by `mesh_to_sparse_sdf` when given one.

    With a CUDA `device`, each stage waits for the device's work, so that the time is booked where it is spent.
    """

    device: str = "cpu"
    cpu: dict[str, float] = field(default_factory=dict)
    wall: dict[str, float] = field(default_factory=dict)
    _last: tuple[float, float] = field(default_factory=lambda: (time.process_time(), time.perf_counter()))

    def lap(self, name: str) -> None:
        """Book the time since the last lap under `name`."""
        if self.device != "cpu":
            get_warp().synchronize_device(self.device)
        now = (time.process_time(), time.perf_counter())
        self.cpu[name] = self.cpu.get(name, 0.0) + now[0] - self._last[0]
        self.wall[name] = self.wall.get(name, 0.0) + now[1] - self._last[1]
        self._last = now


def mesh_to_sparse_sdf(
    vertices: np.ndarray,
    faces: np.ndarray,
    resolution: int,
    *,
    band_voxels: int = BAND_VOXELS,
    device: str = "cpu",
    to_world: np.ndarray | None = None,
    sign_method: str = "auto",
    times: StageTimes | None = None,
) -> SparseSDFBlocks:
    """The sparse TSDF of a closed surface: every 8-cubed block that holds a voxel with |distance| < band.

    Distances are to the nearest triangle, in float64. Signs come from the winding number at each voxel's centre,
    counted exactly from the surface's crossings with lines of voxels; inside is winding number > 0.5.

    Args:
        vertices: [V, 3] floats, world mm (RAS).
        faces: [F, 3] integers, counter-clockwise seen from outside.
        resolution: voxels per side of the cube, a multiple of 8 from 32 to 4096.
        band_voxels: half-width of the band in voxels, 1 to 32.
        device: "cpu", "cuda" or "cuda:N"; the same kernels run on each.
        to_world: [4, 4] uniform scale + translation from grid space [-0.5, 0.5]^3 to world mm. Default: the bounding
            box is centred and its longest side is 0.95.
        sign_method: "auto" and "crossings" need a closed, consistently oriented surface (self-intersections are no
            obstacle); "winding" takes any triangles and signs every voxel by Warp's fast winding number, slower and
            approximate.
        times: receives the time of each stage.

    Returns:
        SparseSDFBlocks with blocks in Morton order. A shape without a voxel centre inside gives a field without a
        negative value, and a warning in the log.

    Raises:
        ValueError: bad shapes, non-finite vertices, indices out of range, no faces, a resolution or transform that is
            not allowed, a shape that leaves the cube, or a surface that cannot be signed; the message says what to do.
    """
    resolution = check_resolution(resolution)
    if int(band_voxels) != band_voxels or not 1 <= band_voxels <= 32:
        raise ValueError(f"band_voxels must be an integer from 1 to 32, got {band_voxels}")
    if sign_method not in SIGN_METHODS:
        raise ValueError(f"sign_method must be one of {list(SIGN_METHODS)}, got {sign_method!r}")
    device = check_warp_device(device)
    wp = get_warp()
    times = times if times is not None else StageTimes()
    vertices, faces = check_mesh_arrays(vertices, faces)
    if sign_method != "winding":
        vertices, faces = _require_closed(vertices, faces)
    to_world = normalising_transform(vertices) if to_world is None else check_to_world(to_world)
    grid = world_to_grid(vertices, to_world)
    if np.abs(grid).max() > 0.5:
        low, high = grid.min(axis=0), grid.max(axis=0)
        raise ValueError(
            "the shape must lie in the cube of to_world, [-0.5, 0.5]^3 in grid space, "
            f"got {low.round(4).tolist()} to {high.round(4).tolist()}"
        )
    index_coords = (grid + 0.5) * resolution - 0.5
    times.lap("check")
    surface = _Surface(wp, index_coords, faces, device, winding=sign_method == "winding")
    times.lap("bvh")
    if sign_method == "winding":
        signs: _WindingSigns | object = _WindingSigns(wp, surface)
    else:
        from trellis.geometry.sdf_sign import CrossingSigns

        signs = CrossingSigns(index_coords, surface.faces, resolution)
        _check_winding(signs)
    times.lap("crossings")
    candidates = _refine(wp, surface, resolution, band_voxels)
    times.lap("refine")
    found = _fill_blocks(wp, surface, signs, candidates, band_voxels, times)
    if not (found[1] < 0).any():
        logger.warning(
            "no voxel centre is inside the shape at resolution %d: it passes between them, and no mesh can be made "
            "from this field; use a higher resolution or a smaller cube", resolution
        )  # fmt: skip
    return SparseSDFBlocks(*found, to_world, resolution, int(band_voxels))


def _require_closed(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mesh if it is closed and consistently oriented, after a merge of identical vertices if that takes it."""
    problem = closed_chain_problem(faces)
    if problem:
        vertices, faces = merge_identical_vertices(vertices, faces)
        problem = closed_chain_problem(faces)
    if problem:
        raise ValueError(
            f"the surface must be closed and consistently oriented for its sign: {problem}. Repair it with "
            "trellis.utils.mesh_repair.clean_mesh (prepare does), or ask for sign_method='winding'"
        )
    return vertices, faces


def _check_winding(signs: object) -> None:
    """Refuse surfaces whose winding numbers say that they are not the boundary of their inside."""
    if signs.negative_share > _MAX_SHARE:
        raise ValueError(
            "the surface, or a part of it, faces inward: winding numbers below 0 fill "
            f"{signs.negative_share:.1%} of the volume of those above. Orient it with "
            "trellis.utils.mesh_repair.clean_mesh (prepare does)"
        )
    if signs.overlap_share > _MAX_SHARE:
        logger.warning(
            "the surface overlaps itself in %.1f%% of its inside (winding number above 1): signs are right, distances "
            "there are to inner faces",
            100 * signs.overlap_share,
        )


class _Surface:
    """A triangle mesh on a device, in index coordinates."""

    def __init__(
        self, wp: ModuleType, index_coords: np.ndarray, faces: np.ndarray, device: str, *, winding: bool
    ) -> None:
        self.device = device
        corners = index_coords[faces]
        ab, ac = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
        normal = np.cross(ab, ac)
        square = np.einsum("ij,ij->i", normal, normal)
        e00, e11 = np.einsum("ij,ij->i", ab, ab), np.einsum("ij,ij->i", ac, ac)
        # Below this the normal is rounding noise; the edges alone then stand for the triangle.
        flat = square <= 1e-24 * np.maximum(e00, e11) ** 2
        inverse = np.where(flat, 0, 1 / np.where(flat, 1, square))
        normal *= np.sqrt(inverse)[:, None]
        table = np.concatenate(
            [corners[:, 0], ab, ac, normal, np.stack([e00, np.einsum("ij,ij->i", ab, ac), e11, inverse], 1)], 1
        )
        self.triangles = wp.array(table, dtype=wp.float64, device=device)
        self.faces = wp.array(faces.astype(np.int32), dtype=wp.int32, device=device)
        self.mesh = wp.Mesh(
            wp.array(index_coords.astype(np.float32), dtype=wp.vec3, device=device),
            self.faces.flatten(),
            support_winding_number=winding,
        )
        # Float32 positions in the BVH, and Warp's arithmetic on them, are off by this much at most, in voxels.
        self.margin = 1e-3 + 1e-5 * float(np.abs(index_coords).max())


class _WindingSigns:
    """Signs of blocks from Warp's fast winding number, for surfaces that are not closed."""

    def __init__(self, wp: ModuleType, surface: _Surface) -> None:
        self.wp, self.surface = wp, surface

    def sign_blocks(self, blocks: object) -> object:
        from trellis.geometry import sdf_kernels as kernels

        inside = self.wp.zeros((blocks.shape[0], 64), dtype=self.wp.uint8, device=self.surface.device)
        self.wp.launch(
            kernels.block_signs_by_winding,
            inside.shape,
            [self.surface.mesh.id, blocks, inside],
            device=self.surface.device,
        )
        return inside


def _refine(wp: ModuleType, surface: _Surface, resolution: int, band: int) -> np.ndarray:
    """Blocks [N, 3] int32 in Morton order whose centre is near enough to the surface to hold an active voxel."""
    from trellis.geometry import sdf_kernels as kernels

    blocks_per_side = resolution // STORAGE_BLOCK
    size = 1 << max((blocks_per_side - 1).bit_length() - 2, 0)
    children = np.stack(np.meshgrid([0, 1], [0, 1], [0, 1], indexing="ij"), -1).reshape(-1, 3).astype(np.int32)
    cells = np.zeros((1, 3), dtype=np.int32)
    side = 1 << (blocks_per_side - 1).bit_length()
    while True:
        if side <= size:
            span = float(side * STORAGE_BLOCK)
            reach = band + (span - 1) / 2 * 3**0.5 + surface.margin
            on_device = wp.array(cells, dtype=wp.int32, device=surface.device)
            near = wp.empty(len(cells), dtype=wp.uint8, device=surface.device)
            wp.launch(
                kernels.cells_near_surface,
                len(cells),
                [surface.mesh.id, on_device, span, reach, near],
                device=surface.device,
            )
            cells = cells[near.numpy() != 0]
        if side == 1 or len(cells) == 0:
            return cells
        side //= 2
        cells = (cells[:, None, :] * 2 + children).reshape(-1, 3)
        cells = cells[(cells * side < blocks_per_side).all(axis=1)]


def _fill_blocks(
    wp: ModuleType, surface: _Surface, signs: object, candidates: np.ndarray, band: int, times: StageTimes
) -> tuple[np.ndarray, np.ndarray]:
    """Index [M, 3] int16 and TSDF [M, 8, 8, 8] float16 of the candidate blocks that hold an active voxel."""
    from trellis.geometry import sdf_kernels as kernels

    device, mesh, tri = surface.device, surface.mesh.id, surface.triangles
    chunk = min(_CHUNK_BLOCKS["cpu" if device == "cpu" else "cuda"], max(len(candidates), 1))
    block_radius, cell_radius = 3.5 * 3**0.5, 1.5 * 3**0.5
    block_lists = wp.empty((chunk, _BLOCK_CAP), dtype=wp.int32, device=device)
    block_counts = wp.empty(chunk, dtype=wp.int32, device=device)
    lists = wp.empty((chunk * 8, _CELL_CAP), dtype=wp.int32, device=device)
    away = wp.empty((chunk * 8, _CELL_CAP), dtype=wp.float32, device=device)
    counts = wp.empty(chunk * 8, dtype=wp.int32, device=device)
    bounds = wp.empty(chunk * 8, dtype=wp.float32, device=device)
    values = wp.empty((chunk, STORAGE_BLOCK**3), dtype=wp.float16, device=device)
    kept_index, kept_values = [], []
    for start in range(0, len(candidates), chunk):
        part = candidates[start : start + chunk]
        n = len(part)
        blocks = wp.array(part, dtype=wp.int32, device=device)
        active = wp.zeros(n, dtype=wp.uint8, device=device)
        inside = signs.sign_blocks(blocks)
        times.lap("signs")
        wp.launch(
            kernels.list_block_triangles,
            n,
            [mesh, tri, blocks, float(band), block_radius, surface.margin, block_lists, block_counts],
            device=device,
        )
        times.lap("block lists")
        wp.launch(
            kernels.list_cell_triangles,
            n * 8,
            [
                mesh,
                tri,
                blocks,
                float(band),
                cell_radius,
                surface.margin,
                block_lists,
                block_counts,
                lists,
                away,
                counts,
                bounds,
            ],
            device=device,
        )
        times.lap("cell lists")
        wp.launch(
            kernels.voxel_values_from_lists,
            (n, STORAGE_BLOCK**3),
            [tri, blocks, wp.float64(band), lists, away, counts, inside, values, active],
            device=device,
        )
        times.lap("distances")
        overflow = np.flatnonzero(counts.numpy()[: n * 8] < 0).astype(np.int32)
        if len(overflow):
            rows = wp.array(overflow, dtype=wp.int32, device=device)
            wp.launch(
                kernels.voxel_values_from_bvh,
                (len(overflow), 16),
                [mesh, tri, blocks, rows, wp.float64(band), surface.margin, bounds, inside, values, active],
                device=device,
            )
        times.lap("distances by queries")
        keep = active.numpy() != 0
        kept_index.append(part[keep].astype(np.int16))
        kept_values.append(values.numpy()[:n][keep])
        times.lap("collect")
    if not kept_index:
        return np.zeros((0, 3), np.int16), np.zeros((0, 8, 8, 8), np.float16)
    found = np.concatenate(kept_index), np.concatenate(kept_values).reshape(-1, 8, 8, 8)
    times.lap("collect")
    return found
