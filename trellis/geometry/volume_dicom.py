"""A folder with one DICOM series: its slices must form one grid, sheared ones (a tilted gantry) included."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trellis.geometry.dicom_check import check_elements, is_dicom
from trellis.geometry.volume_itk import TO_RAS, check_announced, check_itk_path, image_voxels
from trellis.geometry.volume_raw import RawVolume, check_affine, check_size

GRID_TOLERANCE_MM = 0.01
"""How far a slice may lie from its place in the grid; more means a missing, doubled or turned slice."""
UNIT_TOLERANCE = 0.01
"""How far the cosines of an orientation, which are rounded, may be from two unit vectors at right angles."""


@dataclass(frozen=True)
class _Slice:
    """One file: size [2], origin [3] and axes [3, 2] (mm in LPS per step along a row and along a column), and the text
    of its thickness, "" without one."""

    file: str
    size: tuple[int, int]
    origin: np.ndarray
    axes: np.ndarray
    thickness: str


def read_dicom_folder(path: Path) -> RawVolume:
    """A folder with the slices of one DICOM series (sub-folders are not searched), one slice a file, in any order.

    Raises:
        ValueError: no series or several, slices that do not form one grid or do not say where they lie.
    """
    import SimpleITK

    slices = [_read_slice(file, number) for number, file in enumerate(_files_of_series(path), start=1)]
    sizes = {part.size for part in slices}
    if len(sizes) != 1:
        raise ValueError(f"all slices must have one size, got {sorted(sizes)}")
    check_size((*slices[0].size, len(slices)))
    normal = np.cross(*slices[0].axes.T)
    slices.sort(key=lambda part: float(part.origin @ normal))
    grid, spaced = _grid(slices)
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames([part.file for part in slices])
    data = image_voxels(reader.Execute())
    return RawVolume(data, check_affine(TO_RAS @ grid)) if spaced else RawVolume(data, None, pose=TO_RAS @ grid)


def _files_of_series(path: Path) -> tuple[str, ...]:
    import SimpleITK

    slices = sorted(file for file in path.iterdir() if file.name.upper() != "DICOMDIR" and is_dicom(file))
    for number, file in enumerate(slices, start=1):
        try:
            check_itk_path(file)
            check_elements(file)
        except ValueError as error:
            raise ValueError(f"file {number} of {len(slices)}: {error}") from None
    series = SimpleITK.ImageSeriesReader.GetGDCMSeriesIDs(str(path))
    if len(series) != 1:
        raise ValueError(f"a folder with one DICOM series is needed, got {len(series)} series")
    files = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(path), series[0])
    left_out = {file.name for file in slices} - {Path(name).name for name in files}
    if left_out:
        raise ValueError(f"{len(left_out)} of {len(slices)} DICOM files cannot be read as slices of its series")
    return files


def _read_slice(file: str, number: int) -> _Slice:
    """The geometry of one file, from its own elements: the library fills in what is missing.

    DICOM PS3.3, C.7.6.2.1.1: a step along a row goes in the first direction by the second pixel spacing.
    """
    import SimpleITK

    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(file)
    reader.ReadImageInformation()
    check_announced(reader, Path(file).stat().st_size)
    size = reader.GetSize()
    if len(size) > 2 and size[2] != 1:
        raise ValueError(f"file {number} of the series has {size[2]} frames: one slice a file is needed")
    try:
        origin = _numbers(_text(reader, "0020|0032"), 3, "position (0020,0032)")
        directions = _numbers(_text(reader, "0020|0037"), 6, "orientation (0020,0037)").reshape(2, 3)
        between_rows, between_columns = _numbers(_text(reader, "0028|0030"), 2, "pixel spacing (0028,0030)")
        length = np.linalg.norm(directions, axis=1)
        if np.abs(length - 1).max() > UNIT_TOLERANCE or abs(directions[0] @ directions[1]) > UNIT_TOLERANCE:
            raise ValueError(f"orientation must be two unit vectors at right angles, got {directions.tolist()}")
        if min(between_rows, between_columns) <= 0:
            raise ValueError(f"pixel spacing must be above 0, got {between_rows:g} and {between_columns:g} mm")
    except ValueError as error:
        raise ValueError(f"file {number} of the series: {error}") from None
    axes = (directions / length[:, None]).T * [between_columns, between_rows]
    thickness = _text(reader, "0018|0050") or _text(reader, "0018|0088")  # of the slice, or between slices
    return _Slice(file, (int(size[0]), int(size[1])), origin, axes, thickness)


def _text(reader: Any, key: str) -> str:
    return reader.GetMetaData(key).strip(" \0") if reader.HasMetaDataKey(key) else ""


def _numbers(text: str, count: int, name: str) -> np.ndarray:
    """[count] float64 of an element's text; ValueError where there is none or it holds something else."""
    if not text:
        raise ValueError(f"{name} is missing")
    try:
        values = np.array([float(word) for word in text.split("\\")])
    except ValueError:
        values = np.zeros(0)
    if len(values) != count or not np.isfinite(values).all():
        raise ValueError(f"{name} must be {count} finite numbers, got {text[:80]!r}")
    return values


def _grid(slices: list[_Slice]) -> tuple[np.ndarray, bool]:
    """The affine [4, 4] (index to LPS mm) on which all slices, in order of position, lie; and whether its third axis
    has a spacing: a single slice without thickness has none, and that axis then is a unit vector."""
    first, count = slices[0], len(slices)
    grid = np.eye(4)
    grid[:3, :2], grid[:3, 3] = first.axes, first.origin
    normal = np.cross(*first.axes.T)
    normal /= np.linalg.norm(normal)
    if count == 1:
        thickness = float(_numbers(first.thickness, 1, "thickness")[0]) if first.thickness else 1.0
        if thickness <= 0:
            raise ValueError(f"the thickness of a single slice must be above 0, got {thickness:g} mm")
        grid[:3, 2] = normal * thickness
        return grid, bool(first.thickness)
    last_index = np.array(first.size) - 1
    for number, part in enumerate(slices, start=1):
        turned = (part.axes - first.axes) * last_index
        moved = max(np.linalg.norm(turned, axis=0).max(), np.linalg.norm(turned.sum(axis=1)))
        if moved > GRID_TOLERANCE_MM:
            raise ValueError(
                f"all slices must have one orientation and pixel spacing: those of slice {number} of {count} (in order "
                f"of position) move its corners by up to {moved:.3f} mm"
            )
    gaps = np.diff([part.origin @ normal for part in slices])
    if gaps.min() <= GRID_TOLERANCE_MM:
        number = int(gaps.argmin()) + 1
        raise ValueError(
            f"gaps between slices must be above 0: slices {number} and {number + 1} of {count} lie at one place "
            f"({gaps.min():.3f} mm apart)"
        )
    origins = np.array([part.origin for part in slices])
    grid[:3, 2] = (origins[-1] - origins[0]) / (count - 1)
    off = np.linalg.norm(origins - (origins[0] + np.arange(count)[:, None] * grid[:3, 2]), axis=1)
    if off.max() > GRID_TOLERANCE_MM:
        raise ValueError(
            f"slices must be evenly spaced on a line: slice {int(off.argmax()) + 1} of {count} (in order of position) "
            f"lies {off.max():.3f} mm from its place, gaps go from {gaps.min():.3f} to {gaps.max():.3f} mm: one is "
            "missing or double"
        )
    return grid, True
