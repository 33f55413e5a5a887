"""A label on the voxels it came from: cut out, stored beside the truth mesh, and compared with meshes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trellis.geometry.rasterize import dice_and_iou, inside_runs, overlap, run_length
from trellis.utils.io_utils import atomic_write, read_npz

Mesh = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class SourceMask:
    """One label of a volume.

    Attributes:
        mask: [x, y, z] bool, the label in its bounding box. start: [3] int, the box's first voxel in the volume.
        shape: voxels of the volume along each axis. affine: [4, 4] float64, voxel of the volume to RAS mm; any
            invertible one.
    """

    mask: np.ndarray
    start: np.ndarray
    shape: tuple[int, int, int]
    affine: np.ndarray

    def __post_init__(self) -> None:
        mask, start, shape = self.mask, np.asarray(self.start), np.asarray(self.shape)
        if mask.ndim != 3 or mask.dtype != np.bool_:
            raise ValueError(f"mask must be bool [x, y, z], got {mask.dtype} {list(mask.shape)}")
        if start.shape != (3,) or shape.shape != (3,) or (start < 0).any() or (start + mask.shape > shape).any():
            raise ValueError(f"a box of {list(mask.shape)} from {start.tolist()} is not within {shape.tolist()}")
        if self.affine.shape != (4, 4) or not _invertible(self.affine):
            raise ValueError(f"affine must be an invertible [4, 4] matrix, got {self.affine.tolist()}")

    @property
    def voxel_ml(self) -> float:
        """Volume of a voxel."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000


def _invertible(affine: np.ndarray) -> bool:
    determinant = np.linalg.det(affine[:3, :3])
    return bool(np.isfinite(affine).all() and np.isfinite(determinant) and determinant != 0)


Box = tuple[slice, slice, slice]


def label_boxes(data: np.ndarray, numbers: Sequence[int]) -> dict[int, Box]:
    """Bounding box of each label of `numbers` in data [X, Y, Z] that occurs there.

    Labels may be any integers from 1; SciPy's `find_objects` needs memory in proportion to the largest.
    """
    from scipy import ndimage

    wanted = np.array(sorted(numbers), dtype=np.int64)
    if len(wanted) == 0:
        return {}
    if wanted[-1] < 1 << 16:
        found = ndimage.find_objects(data, int(wanted[-1]))  # passes over larger numbers
        boxes = {int(number): found[number - 1] for number in wanted}
    else:
        at = np.searchsorted(wanted, data).clip(max=len(wanted) - 1)
        found = ndimage.find_objects(np.where(wanted[at] == data, at + 1, 0).astype(np.int32), len(wanted))
        boxes = dict(zip(wanted.tolist(), found))
    return {number: box for number, box in boxes.items() if box is not None}


def cut_out(data: np.ndarray, number: int, box: Box, affine: np.ndarray) -> SourceMask:
    """The label `number` of a volume [X, Y, Z], whose bounding box is `box`."""
    start = np.array([part.start for part in box], dtype=np.int64)
    return SourceMask(data[box] == number, start, tuple(int(n) for n in data.shape), np.asarray(affine, dtype=float))


def save_source_mask(path: str | Path, source: SourceMask) -> None:
    """Write a mask as an npz of packed bits, atomically."""
    with atomic_write(path) as stream:
        np.savez_compressed(
            stream,
            bits=np.packbits(source.mask.reshape(-1)),
            box=np.array(source.mask.shape, dtype=np.int64),
            start=np.asarray(source.start, dtype=np.int64),
            shape=np.array(source.shape, dtype=np.int64),
            affine=source.affine,
        )


def load_source_mask(path: str | Path) -> SourceMask:
    """Read a mask of `save_source_mask`.

    Raises:
        ValueError: no such file, or not one; names the file.
    """
    try:
        fields = read_npz(path)
        box, bits = [int(n) for n in fields["box"]], fields["bits"]
        count = int(np.prod(box, dtype=object))
        if len(box) != 3 or min(box) < 0 or bits.dtype != np.uint8 or bits.shape != (-(-count // 8),):
            raise ValueError(f"{bits.dtype} {list(bits.shape)} do not hold the bits of a box of {box}")
        mask = np.unpackbits(bits, count=count).astype(bool).reshape(box)
        return SourceMask(mask, fields["start"], tuple(int(n) for n in fields["shape"]), fields["affine"])
    except Exception as error:  # damaged headers make numpy and zipfile raise anything
        raise ValueError(f"{path}: not a readable mask: {error or type(error).__name__}") from None


def metrics_on_source_grid(mesh: Mesh, source: SourceMask) -> dict[str, Any]:
    """Overlap and volume of a mesh on the voxels of the volume that the truth came from.

    A voxel belongs to the mesh if its centre is inside; what lies beyond the volume is not counted. Volumes are voxels
    times the volume of a voxel.

    Args:
        mesh: (vertices [V, 3] RAS mm, faces [F, 3]), closed and outward; no faces for an empty one.

    Returns:
        dice_source, iou_source (as `dice_and_iou` has them; a label without voxels is empty), volume_error_source_ml
        (mesh less label), volume_error_source_fraction (of the label).

    Raises:
        ValueError: an open mesh.
    """
    vertices, faces = np.asarray(mesh[0], dtype=np.float64), np.asarray(mesh[1])
    label = int(np.count_nonzero(source.mask))
    inside = both = 0
    if len(faces):
        matrix, origin = source.affine[:3, :3], source.affine[:3, 3]
        voxels = np.linalg.solve(matrix, (vertices - origin).T).T
        low = np.maximum(np.floor(voxels.min(axis=0)), 0)
        high = np.minimum(np.ceil(voxels.max(axis=0)) + 1, source.shape)  # one past the last
        low = np.minimum(low, source.start).astype(np.int64)
        high = np.maximum(high, np.asarray(source.start) + source.mask.shape).astype(np.int64)
        window = np.zeros(high - low + (0, 0, 1), dtype=bool)  # lines one longer, as `inside_runs` has them
        first = source.start - low
        window[tuple(slice(a, a + n) for a, n in zip(first, source.mask.shape))] = source.mask
        faces = faces if np.linalg.det(matrix) > 0 else faces[:, ::-1]
        start, stop = inside_runs(voxels - low, faces, tuple(int(n) for n in high - low))
        inside, both = run_length(start, stop), overlap((start, stop), _runs(window))
    error = inside - label
    dice, iou = dice_and_iou(inside, label, both, empty=(len(faces) == 0, label == 0))
    return {
        "dice_source": dice,
        "iou_source": iou,
        "volume_error_source_ml": error * source.voxel_ml,
        "volume_error_source_fraction": error / label if label else float(np.sign(error)),
    }


def _runs(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where runs of true values start and stop in a flattened mask whose last value of each line is false."""
    flat = mask.reshape(-1)
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    edges = np.concatenate([[0], edges]) if flat[0] else edges
    return edges[::2], edges[1::2]
