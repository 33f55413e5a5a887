"""One small function per volume format that is read; a new format is one more entry of `READERS`."""

from __future__ import annotations

import gzip
import logging
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

log = logging.getLogger(__name__)

MAX_VOXELS = 1 << 31
"""Most voxels of a volume that is read (2048 x 1024 x 1024)."""
CONFLICT_MM = 1e-3
"""Distance from which on two disagreeing geometries of one header are reported."""
DEFLATE_MAX_RATIO = 1032
"""Deflate cannot pack better than this, so a header that announces more bytes than that is wrong."""


@dataclass(frozen=True)
class RawVolume:
    """A volume as its file has it.

    Attributes:
        data: [X, Y, Z], any numeric dtype; with several layers [X, Y, Z, L].
        affine: [4, 4] float64, voxel index to RAS mm; None where the file has no spacing.
        names: label value -> name; with several layers one such table each.
        notes: what a user should know about the header, in words.
    """

    data: np.ndarray
    affine: np.ndarray | None
    names: tuple[dict[int, str], ...] = ({},)
    notes: tuple[str, ...] = field(default=())


def check_size(shape: tuple[int, ...]) -> None:
    """ValueError for a volume without voxels or with more than MAX_VOXELS."""
    if any(n <= 0 for n in shape):
        raise ValueError(f"every axis needs at least one voxel, got shape {list(shape)}")
    total = 1
    for n in shape:
        total *= int(n)  # Python integers: header values can overflow int64
    if total > MAX_VOXELS:
        raise ValueError(f"a volume may have at most {MAX_VOXELS} voxels, got shape {list(shape)}")


def drop_single_frames(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The three axes of a volume; trailing axes of length 1 are dropped, longer ones are an error."""
    if len(shape) > 3 and any(n != 1 for n in shape[3:]):
        raise ValueError(f"one 3D volume is needed, got shape {list(shape)}: choose a frame first")
    if len(shape) < 3:
        raise ValueError(f"three axes are needed, got shape {list(shape)}")
    return tuple(shape[:3])


def check_affine(affine: np.ndarray) -> np.ndarray:
    """The affine as [4, 4] float64; ValueError unless it is finite, invertible and ends in 0 0 0 1."""
    affine = np.asarray(affine, dtype=np.float64)
    if affine.shape != (4, 4):
        raise ValueError(f"the affine must be [4, 4], got {list(affine.shape)}")
    if not np.isfinite(affine).all():
        raise ValueError("the affine must be finite, got NaN or infinity")
    if not np.array_equal(affine[3], [0, 0, 0, 1]):
        raise ValueError(f"the last row of the affine must be 0 0 0 1, got {affine[3].tolist()}")
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if lengths.min() <= 0 or lengths.max() > 1e6:
        raise ValueError(f"voxel spacing must be above 0 and at most 1e6 mm, got {lengths.tolist()}")
    if abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-6:
        raise ValueError("the voxel axes must not lie in one plane: the affine cannot be inverted")
    return affine


def read_nifti(path: Path) -> RawVolume:
    """NIfTI-1, NIfTI-2 and Analyze pairs' .nii: sform if its code is positive, else qform, else spacing alone."""
    import nibabel

    image = nibabel.load(path)
    if not isinstance(image, nibabel.Nifti1Pair):
        raise ValueError(f"a NIfTI image is needed, got {type(image).__name__}")
    header = image.header
    shape = drop_single_frames(image.shape)
    check_size(shape)
    _check_nibabel_bytes(path, image)
    affine, notes = _nifti_affine(header, shape)
    unit = header.get_xyzt_units()[0]
    scale = {"meter": 1000.0, "micron": 0.001}.get(unit, 1.0)
    if scale != 1:
        notes.append(f"the header's unit is {unit}: converted to mm")
        affine = np.diag([scale, scale, scale, 1.0]) @ affine
    data = np.asanyarray(image.dataobj).reshape(shape)
    return RawVolume(data, check_affine(affine), notes=tuple(notes))


def _check_nibabel_bytes(path: Path, image: object) -> None:
    """Refuse a header that announces more bytes than the file can hold, before they are allocated."""
    dtype = image.get_data_dtype()  # type: ignore[attr-defined]
    if dtype.fields is not None or dtype.kind not in "iuf":
        raise ValueError(f"one number per voxel is needed, got voxels of type {dtype}")
    needed = dtype.itemsize
    for n in image.shape:  # type: ignore[attr-defined]
        needed *= int(n)
    held = path.stat().st_size
    compressed = path.suffix.lower() in (".gz", ".mgz")
    if needed > held * (DEFLATE_MAX_RATIO if compressed else 1):
        raise ValueError(f"its header announces {needed} bytes of voxels, and the file has {held}: truncated")


def _nifti_affine(header: object, shape: tuple[int, ...]) -> tuple[np.ndarray, list[str]]:
    notes: list[str] = []
    sform, sform_code = header.get_sform(coded=True)  # type: ignore[attr-defined]
    try:
        qform, qform_code = header.get_qform(coded=True)  # type: ignore[attr-defined]
    except Exception as error:  # nibabel refuses quaternions longer than 1; a valid sform does not need them
        if sform_code <= 0:
            raise
        qform, qform_code = None, 0
        notes.append(f"the qform is not valid ({error}): the sform is used")
    if sform_code > 0 and qform_code > 0:
        distance = _largest_distance(sform, qform, shape)
        if distance > CONFLICT_MM:
            notes.append(f"sform and qform differ by up to {distance:.3g} mm: the sform is used")
    if sform_code > 0:
        return np.asarray(sform, dtype=np.float64), notes
    if qform_code > 0:
        return np.asarray(qform, dtype=np.float64), notes
    notes.append("the header has neither sform nor qform: voxel spacing alone, index 0 at the origin, axes as RAS")
    return np.diag([*(float(z) for z in header.get_zooms()[:3]), 1.0]), notes  # type: ignore[attr-defined]


def _largest_distance(first: np.ndarray, second: np.ndarray, shape: tuple[int, ...]) -> float:
    """Largest distance in mm between two affines over a volume's corners (where it is, as both are affine)."""
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape], indexing="ij")).reshape(3, -1)
    moved = (first[:3, :3] - second[:3, :3]) @ corners + (first[:3, 3] - second[:3, 3])[:, None]
    return float(np.nan_to_num(np.linalg.norm(moved, axis=0), nan=np.inf).max())


def read_mgh(path: Path) -> RawVolume:
    """FreeSurfer .mgh and .mgz with scanner coordinates (vox2ras)."""
    import nibabel

    image = nibabel.load(path)
    if not isinstance(image, nibabel.MGHImage):
        raise ValueError(f"an MGH image is needed, got {type(image).__name__}")
    shape = drop_single_frames(image.shape)
    check_size(shape)
    _check_nibabel_bytes(path, image)
    return RawVolume(np.asanyarray(image.dataobj).reshape(shape), check_affine(image.affine))


def read_npy(path: Path) -> RawVolume:
    """A bare array [X, Y, Z]; it has no spacing of its own."""
    with open(path, "rb") as stream:
        data = np.load(stream, allow_pickle=False)  # reads what is there: an absurd header runs out of file first
    return RawVolume(_plain_array(data), None)


def read_npz(path: Path) -> RawVolume:
    """An archive with `volume` [X, Y, Z] and `spacing_mm` [3] or `affine` [4, 4] (voxel index to RAS mm)."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.file_size > 8 * MAX_VOXELS:
                raise ValueError(f"{entry.filename} unpacks to {entry.file_size} bytes")
    with np.load(path, allow_pickle=False) as archive:
        if "volume" not in archive.files:
            raise ValueError(f"field 'volume' is missing; fields present: {sorted(archive.files)}")
        data = _plain_array(archive["volume"])
        affine = check_affine(archive["affine"]) if "affine" in archive.files else None
        if "spacing_mm" in archive.files:
            from_spacing = affine_from_spacing(archive["spacing_mm"])
            if affine is None:
                affine = from_spacing
            elif not np.allclose(np.linalg.norm(affine[:3, :3], axis=0), np.diag(from_spacing)[:3], rtol=1e-3):
                raise ValueError(f"affine and spacing_mm {archive['spacing_mm'].tolist()} disagree")
    return RawVolume(data, affine)


def _plain_array(data: np.ndarray) -> np.ndarray:
    if data.dtype.kind not in "biuf":
        raise ValueError(f"voxels must be numbers, got dtype {data.dtype}")
    shape = drop_single_frames(data.shape)
    check_size(shape)
    return data.reshape(shape)


def affine_from_spacing(spacing_mm: object) -> np.ndarray:
    """[4, 4] float64: index 0 at the origin, axes as RAS."""
    spacing = np.asarray(spacing_mm)
    if spacing.shape != (3,) or spacing.dtype.kind not in "iuf":
        raise ValueError(f"spacing_mm must be three numbers, got {spacing_mm!r}")
    if not np.isfinite(spacing).all() or (spacing <= 0).any():
        raise ValueError(f"spacing_mm must be positive, got {spacing.tolist()}")
    return check_affine(np.diag([*spacing.astype(np.float64), 1.0]))


READERS: dict[str, Callable[[Path], RawVolume]] = {
    ".nii": read_nifti,
    ".nii.gz": read_nifti,
    ".mgh": read_mgh,
    ".mgz": read_mgh,
    ".npy": read_npy,
    ".npz": read_npz,
}
"""Suffix -> reader(path) -> RawVolume."""

UNREADABLE = (OSError, EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile)
"""What the format libraries raise for a truncated or damaged file, besides ValueError."""


def volume_suffix(path: str | Path) -> str:
    """Lower-case suffix under which the registry knows a file: the longest of its endings that is known."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    for start in range(len(suffixes)):
        if "".join(suffixes[start:]) in READERS:
            return "".join(suffixes[start:])
    return suffixes[-1] if suffixes else ""


def is_volume_file(path: str | Path) -> bool:
    """Whether there is a volume reader for this file's suffix."""
    return volume_suffix(path) in READERS


def read_raw_volume(path: str | Path) -> RawVolume:
    """Read any known volume file; every failure is a ValueError that names the file."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    reader = READERS.get(volume_suffix(path))
    if reader is None:
        raise ValueError(
            f"{path}: no volume reader for {volume_suffix(path) or 'a file without suffix'!r}; known: "
            f"{', '.join(sorted(READERS))}"
        )
    try:
        raw = reader(path)
    except MemoryError:
        raise
    except UNREADABLE as error:
        raise ValueError(f"{path}: truncated or damaged: {str(error) or type(error).__name__}") from error
    except Exception as error:
        # the format libraries raise whatever they trip over; a bad file is always the user's to fix
        reason = str(error) or type(error).__name__
        if "allow_pickle" in reason or "Object arrays" in reason:
            reason = "it holds pickled objects, which are never loaded: save plain numbers"
        raise ValueError(f"{path}: not a readable {volume_suffix(path)} volume: {reason}") from error
    for note in raw.notes:
        log.warning("%s: %s", path, note)
    return raw
