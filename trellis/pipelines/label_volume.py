"""All shapes of a patient back into one label volume, in the geometry of a reference."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trellis.utils.io_utils import atomic_write


@dataclass(frozen=True)
class VolumeGrid:
    """Voxels to write a shape on: those of a reference (affine [4, 4], shape), or cubes of `spacing_mm` around it."""

    affine: np.ndarray | None = None
    shape: tuple[int, int, int] | None = None
    spacing_mm: float | None = None

    @classmethod
    def like(cls, path: str | Path) -> VolumeGrid:
        """The grid of any volume file that has a geometry, whatever its voxels hold."""
        from trellis.geometry.volume_readers import read_raw_volume

        raw = read_raw_volume(path)
        if raw.affine is None:
            raise ValueError(f"{path}: has no voxel spacing, and so no place in millimetres")
        return cls(affine=raw.affine, shape=tuple(int(n) for n in raw.data.shape[:3]))

    def voxels_inside(self, vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """bool [X, Y, Z] of a mesh in RAS mm, and the affine of these voxels."""
        from trellis.geometry.voxelize import grid_around, voxelize

        if self.affine is not None and self.shape is not None:
            affine, shape = self.affine, self.shape
        else:
            affine, shape = grid_around(vertices, float(self.spacing_mm or 0))
        return voxelize(vertices, faces, affine, shape), affine


def label_values(shapes: Sequence[tuple[str, int | None]]) -> dict[str, int]:
    """The value of each label in a volume of several shapes.

    Args:
        shapes: label, and its number in the volume that the shape came from or None, of each shape.

    Returns:
        Those numbers where all are known and no two labels share one; else 1, 2, ... in order of the labels.
    """
    known: dict[str, set[int | None]] = {}
    for label, value in shapes:
        known.setdefault(label, set()).add(value)
    values = [value for several in known.values() for value in several]
    if None not in values and len(set(values)) == len(values) == len(known):
        return {label: value for label, (value,) in known.items()}
    return {label: value for value, label in enumerate(sorted(known), start=1)}


class LabelPainter:
    """Paints masks into one volume; where two overlap the smaller shape keeps the voxel.

    Attributes:
        labels: uint16 [X, Y, Z], the numbers painted with. overlaps: voxels that more than one shape claimed.
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.labels = np.zeros(shape, dtype=np.uint16)
        self.overlaps = 0
        self._sizes: dict[int, int] = {}

    def paint(self, mask: np.ndarray, number: int) -> int:
        """Add the voxels of a mask [X, Y, Z] bool; returns how many it has."""
        size = int(np.count_nonzero(mask))
        index = np.flatnonzero(mask)
        flat = self.labels.reshape(-1)
        before = flat[index]
        others = (before != 0) & (before != number)
        self.overlaps += int(np.count_nonzero(others))
        limit = np.zeros(int(before.max(initial=0)) + 1, dtype=np.int64)
        for value, owned in self._sizes.items():
            if value < len(limit):
                limit[value] = owned
        flat[index[~others | (limit[before] > size)]] = number
        self._sizes[number] = max(size, self._sizes.get(number, 0))
        return size


def write_label_table(path: Path, labels: Mapping[int, str]) -> None:
    """The names of a volume's values as CSV (value, name); beside the volume a preparation takes them from it."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["value", "name"])
    table.writerows(sorted(labels.items()))
    with atomic_write(path) as stream:
        stream.write(text.getvalue().encode())
