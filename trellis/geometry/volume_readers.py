"""One small function per volume format that is read; a new format is one more entry of `READERS`."""

from __future__ import annotations

import gzip
import logging
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from trellis.geometry.label_names import caret_label_names
from trellis.geometry.volume_dicom import read_dicom_folder
from trellis.geometry.volume_itk import read_metaimage, read_nrrd
from trellis.geometry.volume_raw import (
    CONFLICT_MM,
    MAX_VOXELS,
    RawVolume,
    affine_from_spacing,
    check_affine,
    check_packing,
    frames_last,
)
from trellis.utils.io_utils import UnreadableFile, check_npy_header, is_transient, unreadable

log = logging.getLogger(__name__)

MGH_DEFAULT_AXES = np.array([[-1.0, 0, 0], [0, 0, 1], [0, -1, 0]])
"""FreeSurfer's for volumes without geometry (setDirectionCosine, coronal): x to the left, y down, z to the front."""
CARET_CODES = (0, 30)
"""Codes of header extensions that may hold Caret XML: 30 is Caret's, and TotalSegmentator writes 0."""


def read_nifti(path: Path) -> RawVolume:
    """NIfTI-1, NIfTI-2 and Analyze pairs' .nii: sform if its code is positive, else qform, else spacing alone.

    Names of labels come from a Caret label table in the header's extensions, as TotalSegmentator writes it.
    """
    import nibabel

    image = nibabel.load(path)
    if not isinstance(image, nibabel.Nifti1Pair):
        raise ValueError(f"a NIfTI image is needed, got {type(image).__name__}")
    header = image.header
    shape = frames_last(image.shape)
    _check_nibabel_bytes(path, image)
    spaced = _has_spacing(path, type(header))
    if not spaced:
        header["pixdim"][1:4] = 1  # the qform's directions and origin stay
    affine, notes = _nifti_affine(header, shape)
    unit = header.get_xyzt_units()[0]
    scale = {"meter": 1000.0, "micron": 0.001}.get(unit, 1.0)
    if scale != 1:
        notes.append(f"the header's unit is {unit}: converted to mm")
        affine = np.diag([scale, scale, scale, 1.0]) @ affine
    names, name_notes = _caret_names(header) if len(shape) == 3 else ((), [])
    data = np.asanyarray(image.dataobj).reshape(shape)
    if spaced or header.get_sform(coded=True)[1] > 0:
        return RawVolume(data, check_affine(affine), names, (*notes, *name_notes))
    return RawVolume(data, None, names, (*notes, *name_notes), pose=affine)


def _has_spacing(path: Path, header_type: Any) -> bool:
    """Whether the stored header has three voxel sizes above 0; nibabel's image has them repaired in silence."""
    with _opened(path) as stream:
        raw = header_type(stream.read(header_type.template_dtype.itemsize), check=False)
    spacing = raw["pixdim"][1:4]
    return bool((np.isfinite(spacing) & (spacing > 0)).all())


def _opened(path: Path) -> BinaryIO:
    """The file, unpacked where its suffix says that it is packed."""
    return gzip.open(path) if path.suffix.lower() in (".gz", ".mgz") else open(path, "rb")  # type: ignore[return-value]


def _caret_names(header: object) -> tuple[tuple[dict[int, str], ...], list[str]]:
    """Label names of the first header extension that is a Caret label table, and what is wrong with it."""
    for extension in header.extensions:  # type: ignore[attr-defined]
        # nibabel from 5.3 on has the bytes as `content`, and its get_content() cannot read what it has no class for
        content = extension.content if hasattr(extension, "content") else extension.get_content()
        if extension.get_code() not in CARET_CODES or not isinstance(content, bytes) or b"<LabelTable" not in content:
            continue
        try:
            return (caret_label_names(content),), []
        except ValueError as error:
            return (), [f"the label table in the header's extension is not used: {error}"]
    return (), []


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
    if compressed:
        check_packing(needed, held)
    elif needed > held:
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
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape[:3]], indexing="ij")).reshape(3, -1)
    moved = (first[:3, :3] - second[:3, :3]) @ corners + (first[:3, 3] - second[:3, 3])[:, None]
    return float(np.nan_to_num(np.linalg.norm(moved, axis=0), nan=np.inf).max())


def read_mgh(path: Path) -> RawVolume:
    """FreeSurfer .mgh and .mgz with scanner coordinates (vox2ras)."""
    import nibabel

    image = nibabel.load(path)
    if not isinstance(image, nibabel.MGHImage):
        raise ValueError(f"an MGH image is needed, got {type(image).__name__}")
    shape = frames_last(image.shape)
    _check_nibabel_bytes(path, image)
    data = np.asanyarray(image.dataobj).reshape(shape)
    with _opened(path) as stream:
        has_geometry = struct.unpack(">28xh", stream.read(30))[0] != 0  # goodRASFlag
    if not has_geometry:
        affine = np.eye(4)
        affine[:3, :3] = MGH_DEFAULT_AXES
        affine[:3, 3] = -affine[:3, :3] @ shape[:3] / 2
        note = "the header has no geometry: 1 mm, coronal, centred, as FreeSurfer does"
        return RawVolume(data, affine, notes=(note,))
    if not (image.header["delta"] > 0).all():
        raise ValueError(f"voxel spacing must be above 0, got {image.header['delta'].tolist()} mm")
    return RawVolume(data, check_affine(image.affine))


def read_npy(path: Path) -> RawVolume:
    """A bare array [X, Y, Z]; it has no spacing of its own."""
    with open(path, "rb") as stream:
        check_npy_header(stream, path.stat().st_size, "the array")
        stream.seek(0)
        return RawVolume(_plain_array(np.load(stream, allow_pickle=False)), None)


def read_npz(path: Path) -> RawVolume:
    """An archive with `volume` [X, Y, Z] and `spacing_mm` [3] or `affine` [4, 4] (voxel index to RAS mm)."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.file_size > 8 * MAX_VOXELS:
                raise ValueError(f"{entry.filename!r} unpacks to {entry.file_size} bytes")
            check_packing(entry.file_size, entry.compress_size)
            with archive.open(entry) as member:
                check_npy_header(member, entry.file_size, entry.filename)
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
    return data.reshape(frames_last(data.shape))


READERS: dict[str, Callable[[Path], RawVolume]] = {
    ".nii": read_nifti,
    ".nii.gz": read_nifti,
    ".mgh": read_mgh,
    ".mgz": read_mgh,
    ".nrrd": read_nrrd,
    ".nhdr": read_nrrd,
    ".seg.nrrd": read_nrrd,
    ".mha": read_metaimage,
    ".mhd": read_metaimage,
    ".npy": read_npy,
    ".npz": read_npz,
}
"""Suffix -> reader(path) -> RawVolume; a folder is read as a DICOM series."""

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


def _one_line(error: Exception) -> str:
    """An error's words; of ITK's multi-line reports, which carry source paths and addresses, the description."""
    text = str(error) or type(error).__name__
    found = re.search(r"(?:ITK |itk::)ERROR: (?:\w+\([^)]*\): )?(.*)", text, flags=re.DOTALL)
    return " ".join((found.group(1) if found else text).split())


def read_raw_volume(path: str | Path) -> RawVolume:
    """Read any known volume file; every failure is a ValueError that names the file."""
    path = Path(path)
    if not path.is_file() and not path.is_dir():  # a pipe or a device would never end
        raise ValueError(f"{path}: no such file")
    reader = read_dicom_folder if path.is_dir() else READERS.get(volume_suffix(path))
    if reader is None:
        raise ValueError(
            f"{path}: no volume reader for {volume_suffix(path) or 'a file without suffix'!r}; known: "
            f"{', '.join(sorted(READERS))}"
        )
    try:
        if path.is_file():
            path.open("rb").close()  # libraries take a file that may not be read for one of another format
    except OSError as error:
        message = f"{path}: cannot be read: {error.strerror}"
        raise UnreadableFile(message, message, is_transient(error)) from None
    try:
        raw = reader(path)
    except MemoryError as error:
        message = f"{path}: needs more memory than there is: {error}"
        raise UnreadableFile(message, message, transient=True) from None
    except UNREADABLE as error:
        what = "could not be read to its end" if is_transient(error) else "truncated or damaged"
        raise unreadable(f"{path}: {what}", error, str(error) or type(error).__name__) from error
    except Exception as error:
        # the format libraries raise whatever they trip over; a bad file is always the user's to fix
        reason = _one_line(error)
        if "allow_pickle" in reason or "Object arrays" in reason:
            reason = "it holds pickled objects, which are never loaded: save plain numbers"
        kind = "DICOM" if path.is_dir() else volume_suffix(path)
        raise unreadable(f"{path}: not a readable {kind} volume", error, reason) from error
    for note in raw.notes:
        log.warning("%s: %s", path, note)
    return raw
