"""All shapes of a patient back into one label volume, in the geometry of a reference."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
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


def label_numbers(names: Sequence[str]) -> list[int]:
    """A label value from 1 for each name: the number that a name is (or ends in, after "_"), else the next free one.

    Names that are the same get the same value.
    """
    wanted: dict[str, int] = {}
    for name in dict.fromkeys(names):
        tail = name.rsplit("_", 1)[-1]
        number = int(tail) if tail.isdecimal() and len(tail) < 5 else 0
        if number and number not in wanted.values():
            wanted[name] = number
    free = iter(number for number in range(1, len(names) + 70_000) if number not in set(wanted.values()))
    return [wanted[name] if name in wanted else wanted.setdefault(name, next(free)) for name in names]


class LabelPainter:
    """Paints masks into one label volume; where two overlap the smaller shape keeps the voxel.

    Attributes:
        labels: uint16 [X, Y, Z]. overlaps: voxels that more than one shape claimed.
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


def write_label_table(path: Path, rows: Sequence[tuple[int, str, str, int]]) -> None:
    """number, label, sha256 and voxels of each shape in a label volume, as CSV."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["number", "label", "sha256", "voxels"])
    table.writerows(rows)
    with atomic_write(path) as stream:
        stream.write(text.getvalue().encode())
