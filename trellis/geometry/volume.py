"""Label volumes in the patient's RAS millimetres: read, checked and written."""

from __future__ import annotations

import gzip
import io
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

import numpy as np

from trellis.geometry.label_surfaces import label_surfaces, threshold_surface
from trellis.geometry.label_volumes import CHUNK_VOXELS, count_values
from trellis.geometry.volume_raw import RawVolume, check_affine, check_spacing
from trellis.geometry.volume_readers import is_volume_file, read_raw_volume, volume_suffix
from trellis.utils.io_utils import UnreadableFile, atomic_write

__all__ = [
    "IntensityVolume", "LabelVolume", "UnreadMask", "as_labels", "is_volume_file", "label_surfaces", "labels_of",
    "parse_threshold", "read_intensity", "read_label_layers", "read_volume", "threshold_surface", "write_label_volume",
]  # fmt: skip

Spacing = tuple[float, float, float]


@dataclass(frozen=True)
class LabelVolume:
    """One integer label per voxel; 0 is background.

    Attributes:
        data: [X, Y, Z] integers >= 0.
        affine: [4, 4] float64, voxel index (centre of a voxel) to RAS mm; any invertible one, shear included.
        names: label value -> name, where the file carries names.
        notes: what a user should know about the file's header.
        file_values: label value -> its number in the file, of values that several layers of the file use for different
            segments: such a number alone does not say which segment is meant, and what names it is the file.
    """

    data: np.ndarray
    affine: np.ndarray
    names: dict[int, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    file_values: dict[int, int] = field(default_factory=dict)

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


@dataclass(frozen=True)
class IntensityVolume:
    """One number per voxel: a CT, an MR image, a probability map.

    Attributes:
        data: [X, Y, Z] integers or floats, finite.
        affine: [4, 4] float64, voxel index (centre of a voxel) to RAS mm.
        notes: what a user should know about the file's header.
    """

    data: np.ndarray
    affine: np.ndarray
    notes: tuple[str, ...] = ()


def labels_of(volume: LabelVolume) -> list[int]:
    """Sorted label values that occur, background left out."""
    if volume.data.dtype.itemsize <= 2:
        values = np.flatnonzero(count_values(volume.data, int(volume.data.max(initial=0)) + 1))
    else:
        values = np.unique(volume.data)
    return [int(v) for v in values if v != 0]


def read_volume(path: str | Path, *, spacing_mm: Spacing | None = None) -> LabelVolume:
    """Read a label volume.

    Args:
        path: .nii, .nii.gz, .mgh, .mgz, .nrrd, .seg.nrrd, .nhdr, .mha, .mhd, .npy, .npz, or a folder that holds one
            DICOM series.
        spacing_mm: voxel spacing along the array axes, for files that have none; a file that has one must agree.

    Returns:
        The volume, data in the smallest unsigned type that holds its labels.

    Raises:
        ValueError: no such file, unknown suffix, truncated, more than one frame, no spacing, values that are not
            whole numbers >= 0, no label at all. Names file, rule and value.
    """
    return _one_volume(read_raw_volume(path), path, spacing_mm)


def _one_volume(raw: RawVolume, path: str | Path, spacing_mm: Spacing | None) -> LabelVolume:
    try:
        if raw.data.ndim != 3:
            what = "layers of segments" if raw.names else "frames or channels"
            raise ValueError(f"one 3D volume is needed, got {raw.data.shape[3]} {what}, shape {list(raw.data.shape)}")
        volume = LabelVolume(
            as_labels(raw.data), _affine(raw, spacing_mm), raw.names[0] if raw.names else {}, raw.notes
        )
        if not volume.data.any():
            raise ValueError("no labels: every voxel is 0")
        return volume
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


@dataclass(frozen=True)
class UnreadMask:
    """A mask of a folder that cannot be read: its value and name there, and why; `error` says which of how many."""

    value: int
    name: str
    error: ValueError


def read_label_layers(
    path: str | Path, *, spacing_mm: Spacing | None = None, unread: list[UnreadMask] | None = None
) -> list[LabelVolume]:
    """Read labels that may overlap, as volumes in each of which they do not.

    Args:
        path: any volume file of `read_volume`; a .seg.nrrd with overlapping layers; a volume with a mask per channel
            (label = channel + 1); or a folder with one mask file per class, as TotalSegmentator writes it (named after
            the files, labels 1, 2, ... in order of the names). A folder without mask files is read as a DICOM series.
        unread: receives masks of a folder that cannot be read, and the others are read (there may be none left);
            without it the first of them is an error.

    Returns:
        One volume where nothing overlaps, else as few as it takes to put every mask into the first that has room.
        A label value means one thing in all of them. One that several layers of segments use stays in the first and
        gets a free number in the others; `LabelVolume.file_values` has the file's.

    Raises:
        ValueError: as `read_volume`; masks on different grids; a layer that cannot be told from a time series
            (several values in a channel without segment names).
    """
    path = Path(path)
    files = sorted(p for p in path.iterdir() if p.is_file() and is_volume_file(p)) if path.is_dir() else []
    if files:
        return _masks_of_folder(path, files, spacing_mm, unread)
    raw = read_raw_volume(path)
    if raw.data.ndim == 3:
        return [_one_volume(raw, path, spacing_mm)]
    try:
        affine = _affine(raw, spacing_mm)
        if raw.names:
            layers = [LabelVolume(as_labels(raw.data[..., i]), affine, n, raw.notes) for i, n in enumerate(raw.names)]
            return _distinct_values(layers)
        for channel in range(raw.data.shape[3]):
            values = np.unique(as_labels(raw.data[..., channel]))
            if len(values) > 2 or (len(values) == 2 and values[0] != 0):
                raise ValueError(f"channel {channel} must be a mask of 0 and one value, got {values[:5].tolist()}")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    masks = ((channel + 1, raw.data[..., channel] != 0) for channel in range(raw.data.shape[3]))
    stacked = _stack_masks(masks)
    if not stacked:
        raise ValueError(f"{path}: no labels: every voxel is 0")
    return _named_layers(stacked, affine, {}, raw.notes)


def _distinct_values(layers: list[LabelVolume]) -> list[LabelVolume]:
    """Layers that are not empty, in which a value means one segment, see `read_label_layers`."""
    present = [labels_of(layer) for layer in layers]
    if not any(present):
        raise ValueError("no labels: every voxel is 0")
    users = Counter(value for values in present for value in values)
    free = (value for value in count(1) if value not in users)
    taken: set[int] = set()
    result = []
    for layer, values in zip(layers, present):
        shared = {value: next(free) if value in taken else value for value in values if users[value] > 1}
        taken |= shared.keys()
        names = {value: layer.names[value] for value in values if value in layer.names and value not in shared}
        names |= {after: layer.names.get(before, f"{before}") for before, after in shared.items()}
        data = _with_values(layer.data, values, [shared.get(value, value) for value in values])
        if values:
            file_values = {after: before for before, after in shared.items()}
            result.append(LabelVolume(data, layer.affine, names, layer.notes, file_values))
    return result


def _with_values(data: np.ndarray, before: list[int], after: list[int]) -> np.ndarray:
    """Labels [X, Y, Z] with other values; `before` are all that occur, ascending."""
    if before == after:
        return data
    old, new = np.array([0, *before]), np.array([0, *after], dtype=np.int32)
    result = np.empty(data.shape, dtype=np.int32)
    for x in range(len(data)):  # a slice at a time: the positions are int64
        result[x] = new[np.searchsorted(old, data[x])]
    return as_labels(result)


def _masks_of_folder(
    path: Path, files: list[Path], spacing_mm: Spacing | None, unread: list[UnreadMask] | None
) -> list[LabelVolume]:
    """One mask at a time is held beside the layers."""
    affine: np.ndarray | None = None
    shape: tuple[int, ...] = ()
    names = {value: file.name[: -len(volume_suffix(file))] for value, file in enumerate(files, start=1)}
    first = 0

    def masks() -> Iterator[tuple[int, np.ndarray]]:
        nonlocal affine, shape, first
        for value, file in enumerate(files, start=1):
            try:
                mask, own = _read_mask(file, spacing_mm)
            except ValueError as error:
                named = _with_prefix(error, f"mask {value} of {len(files)}: ")
                if unread is None:
                    raise named from None
                unread.append(UnreadMask(value, names[value], named))
                continue
            if affine is None:
                affine, shape, first = own, mask.shape, value
            elif mask.shape != shape or not np.allclose(own, affine, atol=1e-3):
                other = f"{files[first - 1].name}, mask {first}"
                raise ValueError(f"mask {value} of {len(files)}, {file}: lies on another grid than {other}")
            yield value, mask

    layers = _stack_masks(masks())
    if not layers and not unread:
        raise ValueError(f"{path}: no labels: every voxel is 0")
    return [] if affine is None else _named_layers(layers, affine, names, ())


def _read_mask(file: Path, spacing_mm: Spacing | None) -> tuple[np.ndarray, np.ndarray]:
    """A mask file as bool [X, Y, Z], and its affine."""
    raw = read_raw_volume(file)
    try:
        mask = LabelVolume(as_labels(raw.data), _affine(raw, spacing_mm))
        present = labels_of(mask)
        if len(present) > 1:
            raise ValueError(f"a mask of 0 and one value is needed in a folder of masks, got {present[:5]}")
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return mask.data != 0, mask.affine


def _with_prefix(error: ValueError, prefix: str) -> ValueError:
    """The same error, its message and what of it may be written behind `prefix`."""
    if isinstance(error, UnreadableFile):
        return UnreadableFile(f"{prefix}{error}", f"{prefix}{error.public}")
    return ValueError(f"{prefix}{error}")


def _stack_masks(masks: Iterable[tuple[int, np.ndarray]]) -> list[np.ndarray]:
    """Layers uint16 [X, Y, Z], each mask in the first that has room for it; empty masks are left out."""
    layers: list[np.ndarray] = []
    for value, mask in masks:
        if not mask.any():
            continue
        room = next((layer for layer in layers if not layer[mask].any()), None)
        if room is None:
            room = np.zeros(mask.shape, dtype=np.uint16)
            layers.append(room)
        room[mask] = value
    return layers


def _named_layers(
    layers: list[np.ndarray], affine: np.ndarray, names: dict[int, str], notes: tuple[str, ...]
) -> list[LabelVolume]:
    volumes = [LabelVolume(layer, affine, {}, notes) for layer in layers]
    return [replace(v, names={n: names[n] for n in labels_of(v) if n in names}) for v in volumes]


def read_intensity(path: str | Path, *, spacing_mm: Spacing | None = None) -> IntensityVolume:
    """Read a volume of intensities for `threshold_surface`; files and errors as `read_volume`.

    Raises:
        ValueError: also for values that are not finite.
    """
    raw = read_raw_volume(path)
    try:
        if raw.data.ndim != 3:
            raise ValueError(f"one 3D volume is needed, got shape {list(raw.data.shape)}")
        if raw.data.dtype.kind == "f" and not np.isfinite(raw.data).all():
            raise ValueError(f"intensities must be finite, got {np.count_nonzero(~np.isfinite(raw.data))} that are not")
        data = raw.data.astype(np.uint8) if raw.data.dtype.kind == "b" else raw.data
        return IntensityVolume(data, _affine(raw, spacing_mm), raw.notes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse_threshold(text: str) -> tuple[float, float | None]:
    """(low, high) of "LOW" or "LOW:HIGH"; ValueError unless they are finite and LOW < HIGH."""
    parts = text.split(":")
    try:
        values = [float(part) for part in parts]
    except ValueError:
        values = []
    if len(values) not in (1, 2) or not np.isfinite(values).all() or (len(values) == 2 and values[0] >= values[1]):
        raise ValueError(f"a threshold is LOW or LOW:HIGH with LOW < HIGH, got {text!r}")
    return values[0], values[1] if len(values) == 2 else None


def _affine(raw: RawVolume, spacing_mm: Spacing | None) -> np.ndarray:
    if raw.affine is None and spacing_mm is None:
        raise ValueError(
            "it has no voxel spacing: give it (spacing_mm), or store 'spacing_mm' or 'affine' beside 'volume' in an "
            ".npz file"
        )
    if spacing_mm is None:
        return raw.affine
    if raw.affine is None:
        return raw.affine_with(spacing_mm)
    own = np.linalg.norm(raw.affine[:3, :3], axis=0)
    if not np.allclose(own, check_spacing(spacing_mm), rtol=1e-3):
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
        flat = data.ravel(order="K")
        parts = (flat[start : start + CHUNK_VOXELS] for start in range(0, flat.size, CHUNK_VOXELS))
        broken = sum(int(np.count_nonzero(part != np.rint(part))) for part in parts)
        if broken:
            raise ValueError(
                f"labels must be whole numbers, got {broken} voxels with fractions between {low} and {high}: an "
                "intensity or probability volume needs a threshold"
            )
    smallest = next(t for t in (np.uint8, np.uint16, np.int32) if high <= np.iinfo(t).max)
    return data.astype(smallest, order="C")


def write_label_volume(path: str | Path, data: np.ndarray, affine: np.ndarray) -> None:
    """Write labels with their geometry, atomically.

    Args:
        path: .nii, .nii.gz, .nrrd, .mha or .npz.
        data: [X, Y, Z] integers or bool >= 0; affine: [4, 4] voxel index to RAS mm. A sheared one needs .nii, .nii.gz
            or .npz: the other formats' directions are orthogonal.

    Raises:
        ValueError: unknown suffix, labels or affine that are not valid, shear that the format cannot hold.
    """
    path = Path(path)
    affine = check_affine(affine)
    labels = as_labels(np.asarray(data))
    if labels.ndim != 3:
        raise ValueError(f"{path}: data must be [X, Y, Z], got {list(labels.shape)}")
    suffix = volume_suffix(path)
    if suffix in (".nii", ".nii.gz"):
        content = _nifti_bytes(labels, affine)
        content = gzip.compress(content, 6, mtime=0) if suffix.endswith(".gz") else content
    elif suffix == ".npz":
        buffer = io.BytesIO()
        np.savez_compressed(buffer, volume=labels, affine=affine)
        content = buffer.getvalue()
    elif suffix in (".nrrd", ".mha"):
        _write_itk(path, labels, affine, suffix)
        return
    else:
        raise ValueError(f"{path}: labels are written as .nii, .nii.gz, .nrrd, .mha or .npz, got {suffix!r}")
    with atomic_write(path) as stream:
        stream.write(content)


def _nifti_bytes(labels: np.ndarray, affine: np.ndarray) -> bytes:
    import nibabel

    image = nibabel.Nifti1Image(labels, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code=1)
    unit = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    orthogonal = np.allclose(unit.T @ unit, np.eye(3), atol=1e-6)
    # a qform cannot hold shear: better none than one that disagrees
    image.set_qform(affine, code=1 if orthogonal else 0, strip_shears=True)
    return image.to_bytes()


def _write_itk(path: Path, labels: np.ndarray, affine: np.ndarray, suffix: str) -> None:
    import SimpleITK

    from trellis.geometry.volume_itk import check_itk_path

    check_itk_path(path)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    unit = affine[:3, :3] / spacing
    if not np.allclose(unit.T @ unit, np.eye(3), atol=1e-6):
        raise ValueError(f"{path}: {suffix} cannot hold a sheared grid: write .nii.gz or .npz")
    to_lps = np.diag([-1.0, -1.0, 1.0])
    image = SimpleITK.GetImageFromArray(labels.transpose(2, 1, 0))
    image.SetSpacing(spacing.tolist())
    image.SetOrigin((to_lps @ affine[:3, 3]).tolist())
    image.SetDirection((to_lps @ unit).reshape(-1).tolist())
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as folder:
        written = Path(folder) / f"volume{suffix}"
        SimpleITK.WriteImage(image, str(written), useCompression=True)
        written.replace(path)
