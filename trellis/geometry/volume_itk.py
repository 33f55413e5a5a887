"""NRRD (Slicer segmentations too) and MetaImage, through SimpleITK; its LPS becomes RAS."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from trellis.geometry.volume_raw import RawVolume, check_affine, check_packing, check_size
from trellis.utils.io_utils import open_regular

MAX_HEADER_BYTES, HEADER_PIECE_BYTES = 1 << 20, 1 << 16
TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""From the LPS of ITK and DICOM."""
_NRRD_END, _META_END = rb"^\s*$", rb"^[^\S\n]*ElementDataFile[^\S\n]*=.*$"
"""The line that ends a text header."""
_NRRD_FILE, _META_FILE = ("data file", "datafile"), ("elementdatafile",)
"""Keys under which a header names the file with its voxels."""


def _text_header(path: Path, end: bytes) -> dict[str, str]:
    """`key: value` and `key = value` lines before the line that matches `end` (it included); keys in lower case."""
    head, found, piece = b"", None, b"\n"
    with open(path, "rb", opener=open_regular) as stream:
        while piece and len(head) < MAX_HEADER_BYTES and (found is None or found.end() == len(head)):
            piece = stream.read(HEADER_PIECE_BYTES)
            head += piece
            found = re.search(end, head, flags=re.MULTILINE)
    head = head[: found.end() if found else len(head)]
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError:
        text = head.decode("latin-1")
    parts = ((line, re.search(r"[:=]=?", line)) for line in text.splitlines())
    pairs = ((line[: sign.start()].strip(), line[sign.end() :].strip()) for line, sign in parts if sign)
    return {key.lower(): value for key, value in pairs if key and "#" not in key}


def _data_file(path: Path, header: dict[str, str], *keys: str) -> Path:
    """The file with a header's voxels: the one that it names under one of `keys`, or its own.

    Raises:
        ValueError: the header names several files, one that does not lie beside it, or one that is not there.
    """
    name = next((header[key] for key in keys if key in header), "LOCAL")
    if name.upper() == "LOCAL":
        return path
    if name.upper().startswith("LIST") or "%" in name:
        raise ValueError("voxels spread over a list of files are not read: save one file")
    other = Path(name)
    if other.is_absolute() or ".." in other.parts:
        raise ValueError(f"its voxels must lie in a file beside it, got {name!r}")
    target = path.parent / other
    if not target.is_file():
        raise ValueError(f"its voxels should be in {name!r} beside it: no such file")
    return target


def named_data_file(path: Path) -> Path | None:
    """The file beside a NRRD or MetaImage header that holds its voxels; None where the header holds them itself, or
    names none that is read (reading it then says why).

    Raises:
        OSError: the header cannot be read.
    """
    end, keys = (_META_END, _META_FILE) if path.suffix.lower() in (".mhd", ".mha") else (_NRRD_END, _NRRD_FILE)
    try:
        target = _data_file(path, _text_header(path, end), *keys)
    except ValueError:
        return None
    return None if target == path else target


def check_itk_path(path: Path) -> None:
    """ValueError for a path that is not UTF-8: given to SimpleITK, it would end the process."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("its path has bytes that are not UTF-8, which SimpleITK cannot open: rename it") from None


def _read_image(path: Path, held_bytes: int, skipped_bytes: int | None) -> Any:
    """The SimpleITK image, after its header was checked against what the file can hold.

    Args:
        skipped_bytes: before the voxels of a data file that holds nothing else, unpacked; then its length must fit.
            None where it may have any.
    """
    import SimpleITK

    check_itk_path(path)
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    needed = check_announced(reader, held_bytes)
    if skipped_bytes is not None and held_bytes != needed + skipped_bytes:
        raise ValueError(
            f"its data file has {held_bytes} bytes, and the header announces {needed} of voxels after {skipped_bytes}: "
            "size, voxel type or the bytes to skip are wrong"
        )
    return reader.Execute()


def _whole_number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"[+-]?\d{1,18}", text) else None


def check_announced(reader: Any, held_bytes: int) -> int:
    """Bytes of the voxels that an image's information announces; ValueError if the file cannot hold them, packed."""
    import SimpleITK

    size = reader.GetSize()
    check_size(size)
    components = reader.GetNumberOfComponents()
    voxel_bytes = SimpleITK.Image([1] * len(size), reader.GetPixelID(), components).GetSizeOfPixelComponent()
    needed = voxel_bytes * components
    for n in size:
        needed *= int(n)
    check_packing(needed, held_bytes)
    return needed


def image_voxels(image: Any) -> np.ndarray:
    """Voxels of a SimpleITK image, [X, Y, Z] or, with frames or channels, [X, Y, Z, L]."""
    import SimpleITK

    data = SimpleITK.GetArrayFromImage(image)
    if data.dtype.kind not in "iuf":
        raise ValueError(f"voxels must be real numbers, got {image.GetPixelIDTypeAsString()}")
    vector = image.GetNumberOfComponentsPerPixel() > 1
    frames = data.shape[-1:] if vector else ()
    dimension = image.GetDimension()
    data = data.transpose(*range(dimension - 1, -1, -1), *([dimension] if vector else []))
    if dimension < 3:
        raise ValueError(f"three axes are needed, got shape {list(data.shape)}")
    if dimension > 3:  # time or layers last; SimpleITK gives four axes at most here
        if vector and data.shape[3] != 1:
            raise ValueError(f"one 3D volume is needed, got shape {list(data.shape)}")
        frames = frames or ((data.shape[3],) if data.shape[3] != 1 else ())
    return np.ascontiguousarray(data.reshape(*data.shape[:3], *frames))


def _image_affine(image: Any) -> np.ndarray:
    """[4, 4] float64, voxel index to LPS mm."""
    dimension = image.GetDimension()
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(dimension, dimension)[:3, :3]
    affine[:3, :3] *= np.array(image.GetSpacing())[:3]
    affine[:3, 3] = np.array(image.GetOrigin())[:3]
    return affine


def read_nrrd(path: Path) -> RawVolume:
    """NRRD, with Slicer's segment names and overlapping layers where its metadata has them."""
    header = _text_header(path, _NRRD_END)
    if not any(key.startswith("nrrd0") for key in header) and not path.open("rb").read(4) == b"NRRD":
        raise ValueError("an NRRD file starts with 'NRRD'")
    file = _data_file(path, header, *_NRRD_FILE)
    held, skipped = file.stat().st_size, _nrrd_skip(header) if file != path else None
    _refuse_negative_spacing(header, "spacings")
    image = _read_image(path, held, skipped)
    data, affine = image_voxels(image), TO_RAS @ _image_affine(image)
    about_space: tuple[str, ...] = ()
    if "space directions" in header:
        affine, about_space = _nrrd_affine(header, affine)
    units = header.get("space units" if "space directions" in header else "units", "")
    affine, notes = _in_mm(affine, re.findall(r'"([^"]*)"', units)[:3])  # a fourth may be of time
    notes += about_space
    names = _slicer_segments({key: image.GetMetaData(key) for key in image.GetMetaDataKeys()}, data)
    if "space directions" in header or "spacings" in header:
        return RawVolume(data, check_affine(affine), names, notes)
    return RawVolume(data, None, names, notes, pose=affine)


MM_PER_UNIT = {
    "mm": 1.0, "millimeter": 1.0, "millimetre": 1.0, "cm": 10.0, "centimeter": 10.0, "centimetre": 10.0, "m": 1000.0,
    "meter": 1000.0, "metre": 1000.0, "um": 0.001, "\u00b5m": 0.001, "\u03bcm": 0.001, "micron": 0.001,
    "micrometer": 0.001, "micrometre": 0.001,
}  # fmt: skip
UNIT_NOT_KNOWN = ("", "?", "??", "???", "none", "nan")
"""How NRRD and MetaImage write that a unit is not known; then it is taken for mm, as their readers do."""


def _in_mm(affine: np.ndarray, units: list[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """The affine [4, 4] in mm, and a note where it was not; ValueError for units that are not known or not one."""
    stated = {unit.strip() for unit in units if unit.strip().lower() not in UNIT_NOT_KNOWN}
    if not stated:
        return affine, ()
    scales = {MM_PER_UNIT.get(unit.lower().removesuffix("s")) for unit in stated}
    scale = scales.pop()
    if scale is None or scales:
        raise ValueError(f"one unit of length is needed, of mm, cm, m and um, got {sorted(stated)}")
    if scale == 1:
        return affine, ()
    return np.diag([scale, scale, scale, 1.0]) @ affine, (f"the header's unit is {stated.pop()}: converted to mm",)


def _nrrd_skip(header: dict[str, str]) -> int | None:
    """Bytes before the voxels of a data file, None where its length says nothing: packed, text, lines to skip."""
    if header.get("encoding", "").lower() != "raw" or header.get("line skip", header.get("lineskip", "0")) != "0":
        return None
    skip = _whole_number(header.get("byte skip", header.get("byteskip", "0")))
    return skip if skip is not None and skip >= 0 else None  # -1: the voxels are what the file ends with


TO_RAS_OF_SPACE = {
    "left-posterior-superior": (-1, -1, 1), "lps": (-1, -1, 1), "right-anterior-superior": (1, 1, 1), "ras": (1, 1, 1),
    "left-anterior-superior": (-1, 1, 1), "las": (-1, 1, 1),
}  # fmt: skip


def _nrrd_affine(header: dict[str, str], fallback: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """The affine as the header's own vectors say (ITK makes directions orthonormal, and loses shear), and notes."""
    space = header.get("space", "").strip().lower()
    to_ras, notes = TO_RAS_OF_SPACE.get(space), ()
    if to_ras is None:
        said = f"the header's space, {space[:40]!r}, does" if space else "the header's space directions do"
        notes = (f"{said} not say where the patient's left is: taken as left-posterior-superior",)
    vectors = re.findall(r"\(([^)]*)\)", header["space directions"])
    if len(vectors) != 3:
        return fallback, notes
    try:
        columns = [[float(x) for x in v.split(",")] for v in vectors]
        origin = [float(x) for x in header.get("space origin", "(0,0,0)").strip("() ").split(",")]
    except ValueError:
        raise ValueError(f"space directions are not understood: {header['space directions']!r}") from None
    affine = np.eye(4)
    affine[:3, :3] = np.array(columns).T
    affine[:3, 3] = origin
    return np.diag([*(to_ras or (-1, -1, 1)), 1.0]) @ affine, notes


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
    header = _text_header(path, _META_END)
    if "elementdatafile" not in header or "dimsize" not in header:
        raise ValueError("a MetaImage header has DimSize and ElementDataFile")
    _check_meta_header(header)
    _refuse_negative_spacing(header, "elementspacing", "elementsize")
    file = _data_file(path, header, *_META_FILE)
    spaced = "elementspacing" in header or "elementsize" in header
    packed = header.get("compresseddata", "false").lower() == "true"
    skipped = int(header.get("headersize", "0")) if file != path and not packed else -1
    image = _read_image(path, file.stat().st_size, skipped if skipped >= 0 else None)  # -1: voxels end the file
    affine, notes = _in_mm(TO_RAS @ _image_affine(image), [header.get("distanceunits", "")])
    if spaced:
        return RawVolume(image_voxels(image), check_affine(affine), notes=notes)
    return RawVolume(image_voxels(image), None, notes=notes, pose=affine)


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
