"""VTK XML poly data (.vtp), all its encodings, read without VTK, whose reader crashes on damaged files."""

from __future__ import annotations

import base64
import binascii
import lzma
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from xml.etree import ElementTree

import numpy as np

from trellis.utils.mesh_text import fan, numbers
from trellis.utils.mesh_vtk import strips_to_triangles

VTP_TYPES = {
    "Int8": "i1", "UInt8": "u1", "Int16": "i2", "UInt16": "u2", "Int32": "i4", "UInt32": "u4", "Int64": "i8",
    "UInt64": "u8", "Float32": "f4", "Float64": "f8",
}  # fmt: skip
MAX_ARRAY_BYTES = 4 << 30


@dataclass(frozen=True)
class _File:
    """What holds for all arrays of a file: byte order, type of the block headers, packer, appended bytes."""

    order: str
    head: np.dtype
    compressor: str
    appended: bytes
    appended_is_text: bool


def parse_vtp(data: bytes) -> tuple[np.ndarray, np.ndarray, str]:
    """Vertices [V, 3] float64, triangles [F, 3] int64 and the text of the field SPACE ("" without one).

    Polygons become fans, strips are cut up, lines and points have no surface. Several pieces are joined.
    """
    text, appended, is_text = _split_appended(data)
    if b"<!DOCTYPE" in text or b"<!ENTITY" in text:
        raise ValueError("a VTK file has no document type of its own")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ValueError(f"not well-formed XML: {error}") from None
    poly = root.find("PolyData")
    if root.tag != "VTKFile" or poly is None:
        raise ValueError("a surface is needed: <VTKFile type='PolyData'>")
    order = {"LittleEndian": "<", "BigEndian": ">"}.get(root.get("byte_order", "LittleEndian"))
    head = {"UInt32": "u4", "UInt64": "u8"}.get(root.get("header_type", "UInt32"))
    if order is None or head is None:
        raise ValueError("byte_order or header_type is not one of VTK's")
    file = _File(order, np.dtype(order + head), root.get("compressor", ""), appended, is_text)
    vertices, faces, offset = [np.zeros((0, 3))], [np.zeros((0, 3), dtype=np.int64)], 0
    for piece in poly.findall("Piece"):
        points, triangles = _piece(piece, file)
        vertices.append(points)
        faces.append(triangles + offset)
        offset += len(points)
    return np.concatenate(vertices), np.concatenate(faces), _space(poly, file)


def _split_appended(data: bytes) -> tuple[bytes, bytes, bool]:
    """The XML without its appended data, that data (after its underscore), and whether it is base64."""
    found = re.search(rb"<AppendedData\b[^>]*>\s*_", data)
    if found is None:
        return data, b"", False
    end = data.rfind(b"</AppendedData>")
    if end < found.end():
        raise ValueError("its appended data do not end: truncated")
    is_text = re.search(rb"encoding\s*=\s*[\"']base64", found.group()) is not None
    return data[: found.start()] + data[end + len(b"</AppendedData>") :], data[found.end() : end], is_text


def _piece(piece: ElementTree.Element, file: _File) -> tuple[np.ndarray, np.ndarray]:
    count = _whole(piece, "NumberOfPoints")
    holder = piece.find("Points/DataArray")
    points = np.zeros(0) if holder is None else _array(holder, file)
    if points.size != 3 * count:
        raise ValueError(f"{count} points need {3 * count} numbers, got {points.size}")
    faces = [np.zeros((0, 3), dtype=np.int64)]
    for tag, cut in (("Polys", fan), ("Strips", strips_to_triangles)):
        cells = piece.find(tag)
        if cells is None or not _whole(piece, f"NumberOf{tag}"):
            continue
        arrays = {part.get("Name"): part for part in cells.findall("DataArray")}
        if not {"connectivity", "offsets"} <= arrays.keys():
            raise ValueError(f"{tag} must have the arrays connectivity and offsets")
        indices, ends = (_array(arrays[name], file).astype(np.int64) for name in ("connectivity", "offsets"))
        counts = np.diff(ends, prepend=0)
        if len(ends) != _whole(piece, f"NumberOf{tag}") or counts.min() < 0 or ends[-1] != len(indices):
            raise ValueError(f"cell offsets must rise to {len(indices)}, one for each of the announced cells")
        faces.append(cut(counts, indices))
    return points.astype(np.float64).reshape(-1, 3), np.concatenate(faces)


def _space(poly: ElementTree.Element, file: _File) -> str:
    for array in poly.findall("FieldData/Array") + poly.findall("FieldData/DataArray"):
        if array.get("Name") == "SPACE":
            codes = _array(array, file, kind="Int8" if array.get("type") == "String" else None)
            return bytes(int(code) & 255 for code in codes[:64].tolist()).split(b"\0")[0].decode("latin-1")
    return ""


def _whole(element: ElementTree.Element, name: str) -> int:
    text = element.get(name, "0").strip()
    if not re.fullmatch(r"\d{1,15}", text):
        raise ValueError(f"{name} must be a whole number, got {text[:40]!r}")
    return int(text)


def _array(element: ElementTree.Element, file: _File, *, kind: str | None = None) -> np.ndarray:
    """The numbers of a DataArray, [N] float64 or int64 (or their narrower own type)."""
    kind = kind or element.get("type", "")
    if kind not in VTP_TYPES:
        raise ValueError(f"an array has the unknown type {kind[:40]!r}")
    dtype, form = np.dtype(file.order + VTP_TYPES[kind]), element.get("format", "ascii")
    name = f"array {element.get('Name', '')[:40]!r}"
    if form == "ascii":
        wide = np.float64 if dtype.kind == "f" else np.int64
        return numbers((element.text or "").encode(), name, wide)
    if form == "appended":
        text = file.appended[_whole(element, "offset") :]
        raw = _decode(text, file, name) if file.appended_is_text else _unpacked(_slices(text), file, name)
    elif form == "binary":
        raw = _decode((element.text or "").encode(), file, name)
    else:
        raise ValueError(f"{name} has the unknown format {form[:40]!r}")
    if len(raw) % dtype.itemsize:
        raise ValueError(f"{name} holds {len(raw)} bytes, no multiple of {dtype.itemsize}: truncated")
    return np.frombuffer(raw, dtype=dtype)


Take = Callable[[int], bytes]
"""take(n) gives the next n bytes, fewer at the end."""


def _slices(data: bytes) -> Take:
    at = 0

    def take(size: int) -> bytes:
        nonlocal at
        at += size
        return data[at - size : at]

    return take


def _decode(text: bytes, file: _File, name: str) -> bytes:
    """The content of base64, which may run on into other arrays. A packed array's head is encoded apart from it."""
    text = re.match(rb"[A-Za-z0-9+/=\s]*", text).group()  # type: ignore[union-attr]
    text = b"".join(text.split())
    if not file.compressor:
        return _unpacked(_slices(_plain(text, name)), file, name)
    first = _plain(text[:16], name)  # never padded: a head has three numbers at least
    if len(first) < file.head.itemsize:
        raise ValueError(f"{name} has no head: truncated")
    size = (3 + int(np.frombuffer(first, file.head, 1)[0])) * file.head.itemsize
    if size > len(text):
        raise ValueError(f"{name} announces a head of {size} bytes: truncated")
    cut = -(-size // 3) * 4
    return _unpacked(_slices(_plain(text[:cut], name)[:size] + _plain(text[cut:], name)), file, name)


def _plain(text: bytes, name: str) -> bytes:
    """Pieces of base64, each with its own padding, decoded and joined."""
    try:
        return b"".join(base64.b64decode(part) for part in re.findall(rb"[^=]+=*", text))
    except binascii.Error as error:
        raise ValueError(f"{name} is not base64: {error}") from None


def _unpacked(take: Take, file: _File, name: str) -> bytes:
    """The content behind a block head: its length, or numbers and sizes of packed blocks."""
    size = file.head.itemsize

    def heads(count: int) -> list[int]:
        raw = take(count * size)
        if len(raw) < count * size:
            raise ValueError(f"{name} has no whole head: truncated")
        return [int(value) for value in np.frombuffer(raw, file.head)]

    if not file.compressor:
        (length,) = heads(1)
        raw = take(min(length, MAX_ARRAY_BYTES))
        if len(raw) < length:
            raise ValueError(f"{name} announces {length} bytes, and {len(raw)} are there: truncated")
        return raw
    blocks, block_size, last = heads(3)
    if blocks * size > MAX_ARRAY_BYTES or blocks * block_size > MAX_ARRAY_BYTES:
        raise ValueError(f"{name} announces {blocks} blocks of {block_size} bytes")
    result = []
    for i, packed in enumerate(heads(blocks)):
        wanted = last if last and i == blocks - 1 else block_size
        block = _unpack(take(packed), wanted, file.compressor)
        if len(block) != wanted:
            raise ValueError(f"a block of {name} unpacks to {len(block)} bytes instead of {wanted}")
        result.append(block)
    return b"".join(result)


def _unpack(packed: bytes, wanted: int, compressor: str) -> bytes:
    try:
        if compressor == "vtkZLibDataCompressor":
            return zlib.decompressobj().decompress(packed, wanted + 1)
        if compressor == "vtkLZMADataCompressor":
            return lzma.LZMADecompressor().decompress(packed, wanted + 1)
    except (zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"a packed block is damaged: {error}") from None
    raise ValueError(f"arrays packed by {compressor[:40]!r} are not read: save with zlib, or without compression")
