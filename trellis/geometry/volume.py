"""Label volumes in the patient's RAS millimetres: read, checked and written."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from trellis.geometry.label_surfaces import label_surfaces
from trellis.geometry.volume_readers import (
    RawVolume,
    affine_from_spacing,
    check_affine,
    is_volume_file,
    read_raw_volume,
)

__all__ = [
    "LabelVolume", "is_volume_file", "label_surfaces", "labels_of", "read_volume",
]  # fmt: skip


@dataclass(frozen=True)
class LabelVolume:
    """One integer label per voxel; 0 is background.

    Attributes:
        data: [X, Y, Z] integers >= 0.
        affine: [4, 4] float64, voxel index (centre of a voxel) to RAS mm; any invertible one, shear included.
        names: label value -> name, where the file carries names.
        notes: what a user should know about the file's header.
    """

    data: np.ndarray
    affine: np.ndarray
    names: dict[int, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.data.ndim != 3 or self.data.dtype.kind not in "iu":
            raise ValueError(
                f"data must be integers [X, Y, Z], got {self.data.dtype} {list(self.data.shape)}"
            )
        check_affine(self.affine)

    @property
    def spacing_mm(self) -> np.ndarray:
        """[3] float64, distance of neighbouring voxel centres along each array axis."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    @property
    def voxel_volume_mm3(self) -> float:
        return float(abs(np.linalg.det(self.affine[:3, :3])))


def labels_of(volume: LabelVolume) -> list[int]:
    """Sorted label values that occur, background left out."""
    data = volume.data
    if data.dtype.itemsize <= 2:
        values = np.flatnonzero(np.bincount(data.reshape(-1)))
    else:
        values = np.unique(data)
    return [int(v) for v in values if v != 0]


def read_volume(path: str | Path, *, spacing_mm: tuple[float, float, float] | None = None) -> LabelVolume:
    """Read a label volume.

    Args:
        path: .nii, .nii.gz, .mgh, .mgz, .npy, .npz.
        spacing_mm: voxel spacing along the array axes, for files that have none; a file that has one must agree.

    Returns:
        The volume, data in the smallest unsigned type that holds its labels.

    Raises:
        ValueError: no such file, unknown suffix, truncated, more than one frame, no spacing, values that are not
            whole numbers >= 0, no label at all. Names file, rule and value.
    """
    raw = read_raw_volume(path)
    try:
        if raw.data.ndim != 3:
            raise ValueError(f"it has {raw.data.shape[3]} overlapping layers, and one label volume is needed")
        return _label_volume(raw, spacing_mm)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _label_volume(raw: RawVolume, spacing_mm: tuple[float, float, float] | None) -> LabelVolume:
    volume = LabelVolume(as_labels(raw.data), _affine(raw, spacing_mm), raw.names[0], raw.notes)
    if not volume.data.any():
        raise ValueError("no labels: every voxel is 0")
    return volume


def _affine(raw: RawVolume, spacing_mm: tuple[float, float, float] | None) -> np.ndarray:
    if raw.affine is None and spacing_mm is None:
        raise ValueError(
            "it has no voxel spacing: give it (spacing_mm), or store 'spacing_mm' or 'affine' beside 'volume' in an "
            ".npz file"
        )
    if spacing_mm is None:
        return raw.affine
    given = affine_from_spacing(spacing_mm)
    if raw.affine is None:
        return given
    own = np.linalg.norm(raw.affine[:3, :3], axis=0)
    if not np.allclose(own, np.diag(given)[:3], rtol=1e-3):
        raise ValueError(f"it says that its spacing is {own.tolist()} mm, and {list(spacing_mm)} was given")
    return raw.affine


def as_labels(data: np.ndarray) -> np.ndarray:
    """Any numeric array as labels, in the smallest unsigned type that holds them.

    Raises:
        ValueError: values that are not finite, not whole, negative or above 2^31 - 1.
    """
    if data.dtype.kind == "b":
        return data.astype(np.uint8)
    low, high = data.min(), data.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("labels must be whole numbers, got NaN or infinity")
    if low < 0 or high > np.iinfo(np.int32).max:
        raise ValueError(f"labels must be whole numbers from 0 to 2147483647, got values from {low} to {high}")
    if data.dtype.kind == "f":
        broken = np.count_nonzero(data != np.rint(data))
        if broken:
            raise ValueError(
                f"labels must be whole numbers, got {broken} voxels with fractions between {low} and {high}: an "
                "intensity or probability volume needs a threshold"
            )
    smallest = next(t for t in (np.uint8, np.uint16, np.int32) if high <= np.iinfo(t).max)
    return np.ascontiguousarray(data.astype(smallest))
