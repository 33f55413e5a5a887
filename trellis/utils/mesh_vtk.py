"""Legacy VTK poly data (.vtk), ASCII and binary, versions 1 to 5, read without VTK, whose reader trusts its input."""

from __future__ import annotations

import re

import numpy as np

from trellis.utils.mesh_text import fan, numbers

VTK_TYPES = {
    "char": "i1", "unsigned_char": "u1", "short": "i2", "unsigned_short": "u2", "int": "i4", "unsigned_int": "u4",
    "long": "i8", "unsigned_long": "u8", "float": "f4", "double": "f8", "vtkidtype": "i4", "vtktypeint64": "i8",
    "vtktypeint32": "i4",
}  # fmt: skip
CELLS = ("VERTICES", "LINES", "POLYGONS", "TRIANGLE_STRIPS")


class _Source:
    """Reads lines and arrays one after another; what is announced is checked against what is left."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at, self.binary = data, 0, False

    def line(self) -> str | None:
        """The next line that is not empty, None at the end."""
        while self.at < len(self.data):
            end = self.data.find(b"\n", self.at)
            end = len(self.data) if end < 0 else end
            text = self.data[self.at : end].strip()
            self.at = end + 1
            if text:
                return text[:1024].decode("latin-1")
        return None

    def array(self, count: int, kind: str, what: str) -> np.ndarray:
        """`count` numbers of a VTK type, as float64 or int64."""
        if kind.lower() not in VTK_TYPES:
            raise ValueError(f"{what} have the unknown type {kind!r}")
        dtype = np.dtype(">" + VTK_TYPES[kind.lower()])
        wide = np.float64 if dtype.kind == "f" else np.int64
        left = len(self.data) - self.at
        if count < 0 or count * (dtype.itemsize if self.binary else 1) > left:
            raise ValueError(f"{what} announce {count} numbers, and {max(left, 0)} bytes are left: truncated")
        if self.binary:
            values = np.frombuffer(self.data, dtype=dtype, count=count, offset=self.at).astype(wide)
            self.at += count * dtype.itemsize
            return values
        words = re.compile(rb"\S+")
        start, found = self.at, None
        for _ in range(count):
            found = words.search(self.data, self.at)
            if found is None:
                raise ValueError(f"{what} announce {count} numbers, and the file ends before: truncated")
            self.at = found.end()
        return numbers(self.data[start : self.at], what, wide)


def parse_vtk(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Vertices [V, 3] float64 and triangles [F, 3] int64 of a legacy VTK surface; polygons and strips are cut up."""
    source = _Source(data)
    if not (source.line() or "").startswith("# vtk DataFile"):
        raise ValueError("a legacy VTK file starts with '# vtk DataFile'")
    source.at = data.find(b"\n", data.find(b"\n") + 1) + 1  # past the title, which may be empty
    encoding = (source.line() or "").upper()
    if encoding not in ("ASCII", "BINARY"):
        raise ValueError(f"the third line must be ASCII or BINARY, got {encoding[:40]!r}")
    source.binary = encoding == "BINARY"
    dataset = (source.line() or "").upper().split()
    if dataset != ["DATASET", "POLYDATA"]:
        raise ValueError(f"a surface (DATASET POLYDATA) is needed, got {' '.join(dataset)[:60]!r}")
    points: np.ndarray | None = None
    faces = [np.zeros((0, 3), dtype=np.int64)]
    while (line := source.line()) is not None:
        words = line.split()
        keyword = words[0].upper()
        if keyword in ("POINT_DATA", "CELL_DATA"):
            break
        if keyword == "POINTS":
            points = source.array(3 * _whole(words, 1), words[2] if len(words) > 2 else "", "points").reshape(-1, 3)
        elif keyword in CELLS:
            counts, indices = _cells(source, words)
            if keyword == "POLYGONS":
                faces.append(fan(counts, indices))
            elif keyword == "TRIANGLE_STRIPS":
                faces.append(strips_to_triangles(counts, indices))
        elif keyword == "METADATA":
            _skip_metadata(source)
        elif keyword == "FIELD":
            _skip_field(source, _whole(words, 2))
        else:
            raise ValueError(f"a line is not understood: {line[:60]!r}")
    if points is None:
        raise ValueError("it has no POINTS")
    return points.astype(np.float64), np.concatenate(faces)


def _whole(words: list[str], at: int) -> int:
    if len(words) <= at or not words[at].isdigit():
        raise ValueError(f"a whole number is needed in {' '.join(words)[:60]!r}")
    return int(words[at])


def _cells(source: _Source, words: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Corners per cell and all corners, from either layout: (n, ids...) rows, or version 5's offsets and ids."""
    cells, size = _whole(words, 1), _whole(words, 2)
    mark = source.at
    following = (source.line() or "").split()
    if following and following[0].upper() == "OFFSETS":
        offsets = source.array(cells, following[1] if len(following) > 1 else "", "offsets")
        following = (source.line() or "").split()
        if len(following) < 2 or following[0].upper() != "CONNECTIVITY":
            raise ValueError("OFFSETS must be followed by CONNECTIVITY")
        indices = source.array(size, following[1], "cells")
        counts = np.diff(offsets)
        if len(offsets) and (offsets[0] != 0 or offsets[-1] != size or counts.min(initial=0) < 0):
            raise ValueError(f"cell offsets must rise from 0 to {size}")
        return counts, indices
    source.at = mark
    rows = source.array(size, "int", "cells")
    starts, at = [], 0
    for _ in range(cells):
        if at >= size or rows[at] < 0:
            raise ValueError(f"{cells} cells do not fit into {size} numbers")
        starts.append(at)
        at += int(rows[at]) + 1
    if at != size:
        raise ValueError(f"{cells} cells take {at} numbers, got {size}")
    starts_array = np.array(starts, dtype=np.int64)
    keep = np.ones(size, dtype=bool)
    keep[starts_array] = False
    return rows[starts_array], rows[keep]


def strips_to_triangles(counts: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Triangles [F, 3] of strips: `counts` corners each, `indices` one strip after the other."""
    triangles, at = [np.zeros((0, 3), dtype=np.int64)], 0
    for count in counts.tolist():
        strip = indices[at : at + count]
        at += count
        if count < 3:
            raise ValueError(f"a triangle strip needs at least 3 corners, got {count}")
        rows = np.stack([strip[:-2], strip[1:-1], strip[2:]], axis=1)
        rows[1::2] = rows[1::2, ::-1]  # every other triangle of a strip is turned
        triangles.append(rows)
    return np.concatenate(triangles)


def _skip_metadata(source: _Source) -> None:
    """Metadata ends at an empty line."""
    end = re.compile(rb"\n[ \t\r]*\n").search(source.data, source.at - 1)
    source.at = end.end() if end else len(source.data)


def _skip_field(source: _Source, arrays: int) -> None:
    for _ in range(arrays):
        words = (source.line() or "").split()
        if words and words[0].upper() == "METADATA":
            _skip_metadata(source)
            words = (source.line() or "").split()
        if len(words) >= 4 and words[3].lower() == "string":
            for _ in range(_whole(words, 1) * _whole(words, 2)):
                _skip_string(source)
        else:
            source.array(_whole(words, 1) * _whole(words, 2), words[3] if len(words) > 3 else "", "field values")


def _skip_string(source: _Source) -> None:
    """A line; in a binary file a length, whose first two bits tell its size (1, 2, 4, 8 bytes), and the characters."""
    if not source.binary:
        if source.line() is None:
            raise ValueError("a field of strings ends early: truncated")
        return
    if source.at >= len(source.data):
        raise ValueError("a field of strings ends early: truncated")
    size = 1 << (3 - (source.data[source.at] >> 6))
    length = int.from_bytes(source.data[source.at : source.at + size], "big") & ((1 << (8 * size - 2)) - 1)
    source.at += size + length
