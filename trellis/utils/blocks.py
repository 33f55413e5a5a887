"""Sparse TSDF blocks: the container of one shape, Morton order, and block lookup."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

STORAGE_BLOCK = 8
"""Side of a stored leaf block, in voxels."""
LATENT_STRIDE = 8
"""Voxels of the input grid per latent voxel, per axis, in the published network."""
BAND_VOXELS = 4
"""Half-width of the stored band, in voxels."""
MIN_RESOLUTION, MAX_RESOLUTION = 32, 4096


def check_resolution(resolution: int) -> int:
    """Return `resolution` as int; ValueError unless it is a multiple of 8 from 32 to 4096."""
    value = int(resolution)
    if value != resolution or value % STORAGE_BLOCK or not MIN_RESOLUTION <= value <= MAX_RESOLUTION:
        raise ValueError(
            f"resolution must be a multiple of {STORAGE_BLOCK} from {MIN_RESOLUTION} to {MAX_RESOLUTION}, "
            f"got {resolution}"
        )
    return value


def check_label_value(value: int | None) -> None:
    """ValueError unless a label's number is None or from 1 to 2^31 - 1, as volumes hold them."""
    if value is not None and not 1 <= value < 1 << 31:
        raise ValueError(f"label_value must be from 1 to {(1 << 31) - 1}, got {value}")


def _spread_bits(values: np.ndarray) -> np.ndarray:
    """Insert two zero bits between the low 21 bits of each int64 (the usual magic-number dilation)."""
    x = values.astype(np.int64) & 0x1FFFFF
    for shift, mask in (
        (32, 0x1F00000000FFFF),
        (16, 0x1F0000FF0000FF),
        (8, 0x100F00F00F00F00F),
        (4, 0x10C30C30C30C30C3),
        (2, 0x1249249249249249),
    ):
        x = (x | (x << shift)) & mask
    return x


def morton_encode(coords: np.ndarray) -> np.ndarray:
    """Morton keys of integer coordinates.

    Args:
        coords: [N, 3] non-negative integers below 2^21, axes x, y, z.

    Returns:
        [N] int64 keys; x is the high bit of each triple.
    """
    c = np.asarray(coords)
    return (_spread_bits(c[:, 0]) << 2) | (_spread_bits(c[:, 1]) << 1) | _spread_bits(c[:, 2])


def morton_order(coords: np.ndarray) -> np.ndarray:
    """Indices [N] int64 that sort integer coordinates [N, 3] in Morton order."""
    return np.argsort(morton_encode(coords), kind="stable")


def block_voxel_offsets(block: int = STORAGE_BLOCK) -> np.ndarray:
    """Offsets [block^3, 3] int32 of a block's voxels in C order (x slowest)."""
    return np.stack(np.meshgrid(*[np.arange(block, dtype=np.int32)] * 3, indexing="ij"), -1).reshape(-1, 3)


def c_to_morton_permutation(block: int = STORAGE_BLOCK) -> np.ndarray:
    """[block^3] int64 p with `c_order_row[p]` in Morton order inside the block."""
    return morton_order(block_voxel_offsets(block))


@dataclass(frozen=True)
class SparseSDFBlocks:
    """The sparse TSDF of one shape.

    Attributes:
        block_index: [M, 3] int16, leaf blocks (8-cubed voxels) that hold an active voxel, in Morton order.
        block_sdf: [M, 8, 8, 8] float16, `clip(distance / (band_voxels / resolution), -1, 1)` of every voxel, negative
            inside.
        to_world: [4, 4] float64, grid space [-0.5, 0.5]^3 to RAS mm; uniform scale and translation. None for
            schema-1 files, which do not carry it.
        resolution: voxels per side of the cube.
        band_voxels: half-width of the band in voxels.
        label, patient_id, prep_hash: text that travels with the shape.
        frame: whose cube it is, "shape", "patient" or "fixed-mm:SIZE".
        label_value: the label's number in the volume that it came from, 1 or more; None where there is none (a mesh, a
            file of masks) or it is not known.
    """

    block_index: np.ndarray
    block_sdf: np.ndarray
    to_world: np.ndarray | None
    resolution: int
    band_voxels: int = BAND_VOXELS
    label: str = ""
    patient_id: str = ""
    prep_hash: str = ""
    frame: str = "shape"
    label_value: int | None = None

    def __post_init__(self) -> None:
        check_resolution(self.resolution)
        check_label_value(self.label_value)
        m = self.block_index.shape[0]
        if self.block_index.shape != (m, 3) or self.block_index.dtype != np.int16:
            raise ValueError(
                f"block_index must be int16 [M, 3], got {self.block_index.dtype} {list(self.block_index.shape)}"
            )
        if self.block_sdf.shape != (m, *(STORAGE_BLOCK,) * 3) or self.block_sdf.dtype != np.float16:
            raise ValueError(
                f"block_sdf must be float16 [{m}, 8, 8, 8], got {self.block_sdf.dtype} {list(self.block_sdf.shape)}"
            )
        if self.to_world is not None and (self.to_world.shape != (4, 4) or self.to_world.dtype != np.float64):
            raise ValueError(
                f"to_world must be float64 [4, 4], got {self.to_world.dtype} {list(self.to_world.shape)}"
            )

    @property
    def num_blocks(self) -> int:
        return self.block_index.shape[0]

    @property
    def active(self) -> np.ndarray:
        """[M, 8, 8, 8] bool: |v| < 1 after the float16 rounding."""
        return np.abs(self.block_sdf) < 1

    @property
    def voxel_size_mm(self) -> float | None:
        """Edge of a voxel in mm, or None without `to_world`."""
        return None if self.to_world is None else float(self.to_world[0, 0]) / self.resolution

    def to_voxels(self) -> tuple[np.ndarray, np.ndarray]:
        """Active voxels: coordinates [N, 3] int32 and values [N, 1] float32, in Morton order."""
        order = c_to_morton_permutation()
        values = self.block_sdf.reshape(-1, STORAGE_BLOCK**3)[:, order]
        block, voxel = np.nonzero(np.abs(values) < 1)
        offsets = block_voxel_offsets()[order]
        coords = self.block_index[block].astype(np.int32) * STORAGE_BLOCK + offsets[voxel]
        return coords, values[block, voxel].astype(np.float32)[:, None]


class BlockLookup:
    """Finds blocks by coordinate with a sorted key table; memory in proportion to the blocks."""

    def __init__(self, block_index: np.ndarray) -> None:
        keys = morton_encode(block_index.astype(np.int64))
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]

    def find(self, coords: np.ndarray) -> np.ndarray:
        """Rows [N] int64 of block coordinates [N, 3]; -1 where there is no such block (or it is negative)."""
        coords = np.asarray(coords, dtype=np.int64)
        if self._keys.size == 0:
            return np.full(len(coords), -1, dtype=np.int64)
        negative = (coords < 0).any(axis=1)
        keys = morton_encode(np.maximum(coords, 0))
        pos = np.minimum(np.searchsorted(self._keys, keys), self._keys.size - 1)
        found = (self._keys[pos] == keys) & ~negative
        return np.where(found, self._order[pos], -1)


def blocks_from_voxels(
    coords: np.ndarray, values: np.ndarray, resolution: int, *, to_world: np.ndarray | None, band_voxels: int
) -> SparseSDFBlocks:
    """Blocks from a voxel list; voxels that are not listed take the sign of a listed one that they reach over faces.

    Args:
        coords: [N, 3] integers in [0, resolution); values: [N] or [N, 1] floats in [-1, 1].

    Raises:
        ValueError: coordinates outside the grid, listed twice, or values that are not finite or outside [-1, 1].
    """
    resolution = check_resolution(resolution)
    coords = np.asarray(coords).astype(np.int64).reshape(-1, 3)
    values = np.asarray(values, dtype=np.float32).reshape(-1)
    if len(coords) != len(values):
        raise ValueError(f"as many coordinates as values are needed, got {len(coords)} and {len(values)}")
    if len(coords) and (coords.min() < 0 or coords.max() >= resolution):
        raise ValueError(f"coordinates must lie in [0, {resolution}), got [{coords.min()}, {coords.max()}]")
    if not np.isfinite(values).all() or (np.abs(values) > 1).any():
        raise ValueError("values must be finite and in [-1, 1]: a TSDF divided by its band")
    block_keys = morton_encode(coords // STORAGE_BLOCK)
    keys, first, inverse = np.unique(block_keys, return_index=True, return_inverse=True)
    block_index = (coords[first] // STORAGE_BLOCK).astype(np.int16)
    local = coords % STORAGE_BLOCK
    flat = inverse * 512 + local[:, 0] * 64 + local[:, 1] * 8 + local[:, 2]
    if len(np.unique(flat)) != len(flat):
        raise ValueError("a voxel is listed twice")
    sdf = np.zeros(len(keys) * 512, dtype=np.float16)
    sdf[flat] = values.astype(np.float16)
    known = np.zeros(len(keys) * 512, dtype=bool)
    known[flat] = True
    sdf = spread_signs(sdf.reshape(-1, 8, 8, 8), known.reshape(-1, 8, 8, 8))
    active = (np.abs(sdf) < 1).any(axis=(1, 2, 3))
    return SparseSDFBlocks(block_index[active], sdf[active], to_world, resolution, band_voxels)


def spread_signs(sdf: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Fill unknown voxels of blocks with +-1, the sign handed on from known ones over faces inside the block.

    Args:
        sdf: [M, 8, 8, 8] float16; known: [M, 8, 8, 8] bool, at least one per block.

    Returns:
        [M, 8, 8, 8] float16 with every voxel set. Known values are unchanged.
    """
    sign = np.where(known, np.where(sdf < 0, -1, 1), 0).astype(np.int8)
    todo = np.flatnonzero((sign == 0).any(axis=(1, 2, 3)))
    while todo.size:
        part = sign[todo]
        before = np.count_nonzero(part)
        for axis in (1, 2, 3):
            view = np.moveaxis(part, axis, 0)
            for i in range(1, 8):
                view[i] = np.where(view[i] == 0, view[i - 1], view[i])
            for i in range(6, -1, -1):
                view[i] = np.where(view[i] == 0, view[i + 1], view[i])
        sign[todo] = part
        left = (part == 0).any(axis=(1, 2, 3))
        if np.count_nonzero(part) == before and left.any():
            raise ValueError("a block without any known voxel")
        todo = todo[left]
    return np.where(known, sdf, sign.astype(np.float16))
