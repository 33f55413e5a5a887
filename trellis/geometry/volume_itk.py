"""NRRD (Slicer segmentations too), MetaImage and DICOM series, through SimpleITK; its LPS becomes RAS."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from trellis.geometry.dicom_check import check_elements, is_dicom
from trellis.geometry.volume_raw import RawVolume, check_affine, check_packing, check_size

MAX_HEADER_BYTES = 1 << 20
UNIFORM_SPACING_TOLERANCE_MM = 0.01
"""How far DICOM slices may lie from even spacing; more means a missing or doubled slice."""


def _text_header(path: Path, end: bytes) -> dict[str, str]:
    """`key: value` and `key = value` lines before the line that matches `end` (it included); keys in lower case."""
    with open(path, "rb") as stream:
        head = stream.read(MAX_HEADER_BYTES)
    found = re.search(end, head, flags=re.MULTILINE)
    text = head[: found.end() if found else len(head)].decode("latin-1")
    pairs = (re.match(r"\s*([^:=#]+?)\s*(?:[:=]=?)\s*(.*)", line) for line in text.splitlines())
    return {m.group(1).lower(): m.group(2).strip() for m in pairs if m}


def _check_data_file(path: Path, name: str | None) -> int:
    """Bytes of voxels that a header's data file can hold; it must lie beside the header.

    None, LOCAL and LIST-like values (several files) count as the header's own size or as unknown (-1).
    """
    if name is None or name.upper() == "LOCAL":
        return path.stat().st_size
    if name.upper().startswith("LIST") or "%" in name:
        raise ValueError("voxels spread over a list of files are not read: save one file")
    other = Path(name)
    if other.is_absolute() or ".." in other.parts:
        raise ValueError(f"its voxels must lie in a file beside it, got {name!r}")
    target = path.parent / other
    if not target.is_file():
        raise ValueError(f"its voxels should be in {name!r} beside it: no such file")
    return target.stat().st_size


def _read_image(path: Path, held_bytes: int) -> Any:
    """The SimpleITK image, after its header was checked against what the file can hold."""
    import SimpleITK

    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    _check_announced(reader, held_bytes)
    return reader.Execute()


def _check_announced(reader: Any, held_bytes: int) -> None:
    """ValueError if an image's information announces more bytes than can be packed into what the file holds."""
    import SimpleITK

    size = reader.GetSize()
    check_size(size)
    components = reader.GetNumberOfComponents()
    voxel_bytes = SimpleITK.Image([1] * len(size), reader.GetPixelID(), components).GetSizeOfPixelComponent()
    needed = voxel_bytes * components
    for n in size:
        needed *= int(n)
    check_packing(needed, held_bytes)


def _from_image(image: Any, notes: tuple[str, ...] = (), *, has_spacing: bool = True) -> RawVolume:
    import SimpleITK

    data = SimpleITK.GetArrayFromImage(image)
    if data.dtype.kind not in "iuf":
        raise ValueError(f"voxels must be real numbers, got {image.GetPixelIDTypeAsString()}")
    vector = image.GetNumberOfComponentsPerPixel() > 1
    frames = data.shape[-1:] if vector else ()
    data = data.transpose(*range(image.GetDimension() - 1, -1, -1), *([image.GetDimension()] if vector else []))
    dimension = image.GetDimension()
    if dimension < 3:
        raise ValueError(f"three axes are needed, got shape {list(data.shape)}")
    if dimension > 3:  # time or layers last; SimpleITK gives four axes at most here
        if vector and data.shape[3] != 1:
            raise ValueError(f"one 3D volume is needed, got shape {list(data.shape)}")
        frames = frames or ((data.shape[3],) if data.shape[3] != 1 else ())
    data = data.reshape(*data.shape[:3], *frames)
    affine = None
    if has_spacing:
        direction = np.array(image.GetDirection()).reshape(dimension, dimension)[:3, :3]
        affine = np.eye(4)
        affine[:3, :3] = direction * np.array(image.GetSpacing())[:3]
        affine[:3, 3] = np.array(image.GetOrigin())[:3]
        affine = check_affine(np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine)
    return RawVolume(np.ascontiguousarray(data), affine, notes=notes)


def read_nrrd(path: Path) -> RawVolume:
    """NRRD, with Slicer's segment names and overlapping layers where its metadata has them."""
    header = _text_header(path, rb"^\s*$")
    if not any(key.startswith("nrrd0") for key in header) and not path.open("rb").read(4) == b"NRRD":
        raise ValueError("an NRRD file starts with 'NRRD'")
    if any(key in header for key in ("data file", "datafile")):
        held = _check_data_file(path, header.get("data file", header.get("datafile")))
    else:
        held = path.stat().st_size
    _refuse_negative_spacing(header, "spacings")
    image = _read_image(path, held)
    spaced = "space directions" in header or "spacings" in header
    raw = _from_image(image, has_spacing=spaced)
    if raw.affine is not None and "space directions" in header:
        raw = RawVolume(raw.data, _nrrd_affine(header, raw.affine), notes=raw.notes)
    names = _slicer_segments({key: image.GetMetaData(key) for key in image.GetMetaDataKeys()}, raw.data)
    return RawVolume(raw.data, raw.affine, names, raw.notes)


def _nrrd_affine(header: dict[str, str], fallback: np.ndarray) -> np.ndarray:
    """The affine as the header's own vectors say (ITK makes directions orthonormal, and loses shear)."""
    spaces = {"left-posterior-superior": (-1, -1, 1), "lps": (-1, -1, 1), "right-anterior-superior": (1, 1, 1),
              "ras": (1, 1, 1), "left-anterior-superior": (-1, 1, 1), "las": (-1, 1, 1)}  # fmt: skip
    to_ras = spaces.get(header.get("space", "").lower())
    vectors = re.findall(r"\(([^)]*)\)", header["space directions"])
    if to_ras is None or len(vectors) != 3:
        return fallback
    try:
        columns = [[float(x) for x in v.split(",")] for v in vectors]
        origin = [float(x) for x in header.get("space origin", "(0,0,0)").strip("() ").split(",")]
    except ValueError:
        raise ValueError(f"space directions are not understood: {header['space directions']!r}") from None
    affine = np.eye(4)
    affine[:3, :3] = np.array(columns).T
    affine[:3, 3] = origin
    return check_affine(np.diag([*to_ras, 1.0]) @ affine)


def _slicer_segments(meta: dict[str, str], data: np.ndarray) -> tuple[dict[int, str], ...]:
    """Names per layer from `SegmentN_Name`, `_LabelValue` and `_Layer` (3D Slicer's .seg.nrrd); () without any."""
    layers = data.shape[3] if data.ndim == 4 else 1
    names: tuple[dict[int, str], ...] = tuple({} for _ in range(layers))
    numbers = sorted(int(m.group(1)) for key in meta if (m := re.fullmatch(r"Segment(\d+)_Name", key)))
    for n in numbers:
        layer = int(meta.get(f"Segment{n}_Layer", 0))
        value = int(meta.get(f"Segment{n}_LabelValue", 1))
        if not 0 <= layer < layers:
            raise ValueError(f"segment {n} is in layer {layer}, and the file has {layers}")
        if value in names[layer]:
            raise ValueError(f"two segments of layer {layer} have the label value {value}")
        names[layer][value] = meta[f"Segment{n}_Name"]
    return names if numbers else ()


def read_metaimage(path: Path) -> RawVolume:
    """MetaImage, .mha or .mhd with its data file beside it."""
    header = _text_header(path, rb"^\s*ElementDataFile\s*=.*$")
    if "elementdatafile" not in header or "dimsize" not in header:
        raise ValueError("a MetaImage header has DimSize and ElementDataFile")
    _check_meta_header(header)
    _refuse_negative_spacing(header, "elementspacing", "elementsize")
    held = _check_data_file(path, header["elementdatafile"])
    spaced = "elementspacing" in header or "elementsize" in header
    return _from_image(_read_image(path, held), has_spacing=spaced)


def _check_meta_header(header: dict[str, str]) -> None:
    """ValueError for numbers that MetaIO would trust: axes, sizes, channels, length of packed data."""
    axes = header.get("ndims", "")
    if axes not in ("3", "4"):
        raise ValueError(f"NDims must be 3 or 4, got {axes[:40]!r}")
    for name, count, lowest in (
        ("dimsize", int(axes), 1), ("elementnumberofchannels", 1, 1), ("compresseddatasize", 1, 0),
        ("headersize", 1, -1),
    ):  # fmt: skip
        words = header.get(name, " ".join(["1"] * count)).split()
        if len(words) != count or not all(re.fullmatch(r"[+-]?\d{1,18}", word) for word in words):
            raise ValueError(f"{name} must be {count} whole numbers, got {' '.join(words)[:40]!r}")
        if min(map(int, words)) < lowest:
            raise ValueError(f"{name} must be at least {lowest}, got {' '.join(words)[:40]!r}")


def _refuse_negative_spacing(header: dict[str, str], *names: str) -> None:
    """ValueError for a spacing below zero, which ITK turns into a flipped axis in silence."""
    for name in names:
        if re.search(r"(?<![\deE])-\s*\.?\d", header.get(name, "")):
            raise ValueError(f"{name} must be above 0, got {header[name][:60]!r}")


def read_dicom_folder(path: Path) -> RawVolume:
    """A folder with the slices of one DICOM series (sub-folders are not searched)."""
    import SimpleITK

    slices = sorted(file for file in path.iterdir() if file.name.upper() != "DICOMDIR" and is_dicom(file))
    for number, file in enumerate(slices, start=1):
        try:
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
    reader = SimpleITK.ImageFileReader()
    positions, normal, sizes = [], None, set()
    for name in files:
        reader.SetFileName(name)
        reader.ReadImageInformation()
        _check_announced(reader, Path(name).stat().st_size)
        direction = np.array(reader.GetDirection()).reshape(3, 3)
        normal = direction[:, 2] if normal is None else normal
        positions.append(float(np.dot(reader.GetOrigin(), normal)))
        sizes.add(tuple(reader.GetSize()))
        if not reader.HasMetaDataKey("0028|0030") and not reader.HasMetaDataKey("5200|9229"):
            raise ValueError(f"slice {len(positions)} has no pixel spacing")
    if len(sizes) != 1:
        raise ValueError(f"all slices must have one size, got {sorted(sizes)}")
    check_size((*next(iter(sizes))[:2], len(files)) if len(files) > 1 else next(iter(sizes)))
    gaps = np.diff(positions)
    if len(gaps) and np.abs(gaps - gaps.mean()).max() > UNIFORM_SPACING_TOLERANCE_MM:
        raise ValueError(
            f"slices must be evenly spaced, got gaps from {gaps.min():.3f} to {gaps.max():.3f} mm: one is missing or "
            "double"
        )
    if len(files) == 1:
        return _from_image(SimpleITK.ReadImage(files[0]))
    stack = SimpleITK.ImageSeriesReader()
    stack.SetFileNames(files)
    return _from_image(stack.Execute())
