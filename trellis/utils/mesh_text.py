"""Parsers of the plain-text and PLY mesh formats; polygons become triangle fans and no face is dropped."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

PLY_TYPES = {
    "char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4", "float": "f4",
    "double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4",
    "float32": "f4", "float64": "f8",
}  # fmt: skip
PLY_FORMATS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}


def numbers(text: bytes, what: str, dtype: type = np.float64) -> np.ndarray:
    """All numbers of a whitespace-separated text, [N] of `dtype`; ValueError names `what` if a word is none."""
    words = text.split()
    try:
        return np.array(words, dtype="S").astype(dtype) if words else np.zeros(0, dtype)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{what} must be numbers: {error}") from None


def fan(counts: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Triangle fans of polygons.

    Args:
        counts: [P] corners per polygon; indices: [sum(counts)] vertex indices, polygon after polygon.

    Returns:
        [F, 3] int64; polygons of fewer than three corners are an error.
    """
    counts = np.asarray(counts, dtype=np.int64)
    if len(counts) and counts.min() < 3:
        raise ValueError(f"a face needs at least 3 corners, got {counts.min()}")
    start = np.cumsum(counts) - counts
    triangles = counts - 2
    polygon = np.repeat(np.arange(len(counts)), triangles)
    step = np.arange(triangles.sum()) - np.repeat(np.cumsum(triangles) - triangles, triangles)
    first = start[polygon]
    indices = np.asarray(indices, dtype=np.int64)
    return np.stack([indices[first], indices[first + step + 1], indices[first + step + 2]], axis=1)


def parse_obj(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Vertices [V, 3] float64 and triangles [F, 3] int64 of an OBJ; negative (relative) indices are resolved."""
    data = re.sub(rb"\\\r?\n", b" ", data)  # a backslash continues the line
    rows: list[list[bytes]] = []
    polygons: list[list[bytes]] = []
    vertices_before: list[int] = []
    for line in data.splitlines():
        words = line.split(b"#", 1)[0].split()
        if not words:
            continue
        if words[0] == b"v":
            if len(words) < 4:
                raise ValueError(f"a vertex needs 3 coordinates, got {line.decode(errors='replace')!r}")
            rows.append(words[1:4])
        elif words[0] == b"f":
            polygons.append([word.split(b"/", 1)[0] for word in words[1:]])
            vertices_before.append(len(rows))
    vertices = numbers(b" ".join(b" ".join(row) for row in rows), "vertex coordinates").reshape(-1, 3)
    counts = np.array([len(polygon) for polygon in polygons], dtype=np.int64)
    indices = numbers(b" ".join(b" ".join(polygon) for polygon in polygons), "face indices", np.int64)
    if len(indices) and (indices == 0).any():
        raise ValueError("OBJ counts vertices from 1, and a face names vertex 0")
    before = np.repeat(np.array(vertices_before, dtype=np.int64), counts)
    return vertices, fan(counts, np.where(indices < 0, before + indices, indices - 1))


def parse_off(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Vertices [V, 3] float64 and triangles [F, 3] int64 of a text OFF, COFF, NOFF or STOFF file."""
    lines = [line for raw in data.splitlines() if (line := raw.split(b"#", 1)[0].strip())]
    head = re.match(rb"(ST)?C?N?OFF\b", lines[0]) if lines else None
    if head is None:
        raise ValueError("an OFF file starts with 'OFF'")
    rest = lines[0][head.end() :].strip()
    lines = ([rest] if rest else []) + lines[1:]
    counts = numbers(lines[0], "the counts", np.int64) if lines else np.zeros(0)
    if len(counts) < 2 or counts.min() < 0:
        raise ValueError("the line after 'OFF' must give the numbers of vertices and faces")
    vertex_count, face_count = int(counts[0]), int(counts[1])
    if len(lines) < 1 + vertex_count + face_count:
        raise ValueError(
            f"it announces {vertex_count} vertices and {face_count} faces, and {len(lines) - 1} lines follow: truncated"
        )
    rows = [line.split()[:3] for line in lines[1 : 1 + vertex_count]]
    if any(len(row) < 3 for row in rows):
        raise ValueError("a vertex needs 3 coordinates")
    vertices = numbers(b" ".join(b" ".join(row) for row in rows), "vertex coordinates").reshape(-1, 3)
    polygons, sizes = [], []
    for line in lines[1 + vertex_count : 1 + vertex_count + face_count]:
        words = line.split()
        size = int(words[0])
        if len(words) < 1 + size:
            raise ValueError(f"a face of {size} corners lists {len(words) - 1}")
        sizes.append(size)
        polygons.append(b" ".join(words[1 : 1 + size]))
    return vertices, fan(np.array(sizes, dtype=np.int64), numbers(b" ".join(polygons), "face indices", np.int64))


def parse_ply(data: bytes) -> tuple[np.ndarray, np.ndarray, bytes]:
    """Vertices [V, 3] float64, triangles [F, 3] int64 and the comment lines of a PLY.

    Counts that the file cannot hold are refused before anything is allocated.
    """
    end = re.search(rb"^end_header[ \t]*\r?\n", data, flags=re.MULTILINE)
    if not data.startswith(b"ply") or end is None:
        raise ValueError("a PLY file starts with 'ply' and has an 'end_header' line")
    header, body = data[: end.start()].decode("latin-1").splitlines(), memoryview(data)[end.end() :]
    order, elements = _ply_header(header)
    source: _AsciiRows | _BinaryRows = _AsciiRows(bytes(body)) if order == "" else _BinaryRows(body, order)
    vertices: np.ndarray | None = None
    faces: np.ndarray | None = None
    for name, count, properties in elements:
        if count > len(body):  # every row takes at least a byte
            raise ValueError(f"element {name!r} announces {count} rows, and {len(body)} bytes follow: truncated")
        wanted = {"vertex": ("x", "y", "z"), "face": ("vertex_indices", "vertex_index")}.get(name, ())
        columns = source.read(name, count, properties, wanted)
        if name == "vertex":
            missing = [axis for axis in "xyz" if axis not in columns]
            if missing:
                raise ValueError(f"element vertex has no property {', '.join(missing)}")
            vertices = np.stack([np.asarray(columns[axis], dtype=np.float64) for axis in "xyz"], axis=1)
        elif name == "face":
            lists = [columns[key] for key in wanted if key in columns]
            if len(lists) != 1 or not isinstance(lists[0], tuple):
                raise ValueError("element face must have one list property vertex_indices")
            faces = fan(*lists[0])
    if vertices is None or faces is None:
        raise ValueError("it must have the elements vertex and face")
    return vertices, faces, "\n".join(line for line in header if line.startswith("comment")).encode("latin-1")


Property = tuple[str, str, str | None]
"""(name, type, type of the list's length or None for a scalar)"""


def _ply_header(lines: Sequence[str]) -> tuple[str, list[tuple[str, int, list[Property]]]]:
    order: str | None = None
    elements: list[tuple[str, int, list[Property]]] = []
    for line in lines[1:]:
        words = line.split()
        if not words or words[0] in ("comment", "obj_info"):
            continue
        try:
            if words[0] == "format":
                order = PLY_FORMATS[words[1]]
            elif words[0] == "element":
                elements.append((words[1], int(words[2]), []))
                if elements[-1][1] < 0:
                    raise ValueError
            elif words[0] == "property" and words[1] == "list":
                elements[-1][2].append((words[4], PLY_TYPES[words[3]], PLY_TYPES[words[2]]))
            elif words[0] == "property":
                elements[-1][2].append((words[2], PLY_TYPES[words[1]], None))
            else:
                raise ValueError
        except (KeyError, IndexError, ValueError):
            raise ValueError(f"a PLY header line is not understood: {line!r}") from None
    if order is None:
        raise ValueError("its header has no format line")
    return order, elements


class _BinaryRows:
    """Reads elements of a binary PLY one after another."""

    def __init__(self, body: memoryview, order: str) -> None:
        self._body, self._order, self._at = body, order, 0

    def _take(self, dtype: np.dtype, count: int, name: str) -> np.ndarray:
        end = self._at + dtype.itemsize * count
        if end > len(self._body):
            raise ValueError(f"element {name!r} needs {end} bytes after the header, got {len(self._body)}: truncated")
        rows = np.frombuffer(self._body, dtype=dtype, count=count, offset=self._at)
        self._at = end
        return rows

    def read(self, name: str, count: int, properties: list[Property], wanted: Sequence[str]) -> dict:
        if not properties or not count:
            return {key: (np.zeros(0, int),) * 2 if length else np.zeros(0) for key, _, length in properties}
        lists = [i for i, (_, _, length) in enumerate(properties) if length]
        # rows whose lists all have the length of the first row's are one structured array: nearly every file
        sizes = self._first_row_sizes(properties)
        fields: list[tuple] = []
        for i, (_, kind, length) in enumerate(properties):
            if length:
                fields.append((f"n{i}", self._order + length))
                fields.append((f"p{i}", self._order + kind, (sizes[i],)))
            else:
                fields.append((f"p{i}", self._order + kind))
        start, dtype = self._at, np.dtype(fields)
        if start + dtype.itemsize * count <= len(self._body):
            rows = self._take(dtype, count, name)
            if all((rows[f"n{i}"] == sizes[i]).all() for i in lists):
                return {
                    key: (np.full(count, sizes[i]), rows[f"p{i}"].reshape(-1)) if length else rows[f"p{i}"]
                    for i, (key, _, length) in enumerate(properties)
                }
            self._at = start
        return self._read_row_by_row(name, count, properties, wanted)

    def _first_row_sizes(self, properties: list[Property]) -> dict[int, int]:
        start, sizes = self._at, {}
        for i, (name, kind, length) in enumerate(properties):
            if length:
                sizes[i] = int(self._take(np.dtype(self._order + length), 1, name)[0])
                if sizes[i] < 0:
                    raise ValueError(f"a list of {sizes[i]} entries")
            self._take(np.dtype(self._order + kind), sizes.get(i, 1), name)
        self._at = start
        return sizes

    def _read_row_by_row(self, name: str, count: int, properties: list[Property], wanted: Sequence[str]) -> dict:
        values: dict[str, list] = {key: [] for key, _, _ in properties if key in wanted}
        lengths: dict[str, list[int]] = {key: [] for key in values}
        types = [
            (key, np.dtype(self._order + kind), np.dtype(self._order + length) if length else None)
            for key, kind, length in properties
        ]
        for _ in range(count):
            for key, kind, length in types:
                size = 1 if length is None else int(self._take(length, 1, name)[0])
                if size < 0:
                    raise ValueError(f"a list of {size} entries in element {name!r}")
                row = self._take(kind, size, name)
                if key in values:
                    values[key].append(row)
                    lengths[key].append(size)
        is_list = {key: length is not None for key, _, length in types}
        joined = {key: np.concatenate(rows) for key, rows in values.items()}
        return {key: (np.array(lengths[key]), rows) if is_list[key] else rows for key, rows in joined.items()}


class _AsciiRows:
    """Reads elements of an ASCII PLY one after another."""

    def __init__(self, body: bytes) -> None:
        self._lines, self._at = [line for line in body.splitlines() if line.strip()], 0

    def read(self, name: str, count: int, properties: list[Property], wanted: Sequence[str]) -> dict:
        lines = self._lines[self._at : self._at + count]
        if len(lines) < count:
            raise ValueError(f"element {name!r} announces {count} rows, and {len(lines)} lines are left: truncated")
        self._at += count
        if not any(length for _, _, length in properties):
            table = numbers(b" ".join(lines), f"element {name!r}")
            if table.size != count * len(properties):
                raise ValueError(f"element {name!r} needs {len(properties)} numbers a row")
            table = table.reshape(count, len(properties))
            return {key: table[:, i] for i, (key, _, _) in enumerate(properties)}
        values: dict[str, list[bytes]] = {key: [] for key, _, _ in properties}
        lengths: dict[str, list[int]] = {key: [] for key, _, _ in properties}
        for line in lines:
            words, at = line.split(), 0
            for key, _, length in properties:
                size = int(words[at]) if length and at < len(words) else 1
                at += 1 if length else 0
                if size < 0 or at + size > len(words):
                    raise ValueError(f"a row of element {name!r} is too short: {line.decode(errors='replace')!r}")
                values[key].append(b" ".join(words[at : at + size]))
                lengths[key].append(size)
                at += size
        result: dict = {}
        for key, kind, length in properties:
            if key in wanted:
                flat = numbers(b" ".join(values[key]), key, np.int64 if kind[0] in "iu" else np.float64)
                result[key] = (np.array(lengths[key], dtype=np.int64), flat) if length else flat
        return result
