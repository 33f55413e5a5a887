"""One small function per mesh format that is written; a new format is one more entry of `WRITERS`."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np

from trellis.utils.io_utils import atomic_write

STL_TRIANGLE = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
"""One binary STL facet, 50 bytes."""


def _tag(space: str) -> str:
    # 3D Slicer looks for SPACE=... anywhere in the header or comment; the rest is free text
    return f"trellis-vqvae SPACE={space}"


def _unit_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    corners = vertices[faces]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    length = np.linalg.norm(normals, axis=1, keepdims=True)
    return np.divide(normals, length, out=np.zeros_like(normals), where=length > 0)


def write_stl(path: Path, vertices: np.ndarray, faces: np.ndarray, space: str) -> None:
    triangles = np.zeros(len(faces), dtype=STL_TRIANGLE)
    triangles["normal"] = _unit_normals(vertices, faces)
    triangles["corners"] = vertices[faces]
    with atomic_write(path) as stream:
        stream.write(_tag(space).encode().ljust(80))
        stream.write(struct.pack("<I", len(faces)))
        stream.write(triangles.tobytes())


PLY_FACE = np.dtype([("n", "u1"), ("index", "<i4", 3)])
"""One binary PLY triangle, 13 bytes."""


def write_ply(path: Path, vertices: np.ndarray, faces: np.ndarray, space: str) -> None:
    rows = np.empty(len(faces), dtype=PLY_FACE)
    rows["n"] = 3
    rows["index"] = faces
    write_ply_rows(path, vertices.astype("<f4"), rows.view(np.uint8), space)


def write_ply_rows(path: Path, vertices: np.ndarray, rows: np.ndarray, space: str) -> None:
    """A binary PLY file from what stands in it: vertices float32 [V, 3], and the triangles' bytes (`PLY_FACE`)."""
    header = (
        f"ply\nformat binary_little_endian 1.0\ncomment {_tag(space)}\n"
        f"element vertex {len(vertices)}\nproperty float x\nproperty float y\nproperty float z\n"
        f"element face {rows.size // PLY_FACE.itemsize}\nproperty list uchar int vertex_indices\nend_header\n"
    )
    with atomic_write(path) as stream:
        stream.write(header.encode())
        for part in (vertices, rows):
            if part.size:  # an empty array has no bytes to view
                stream.write(memoryview(np.ascontiguousarray(part)).cast("B"))


def write_obj(path: Path, vertices: np.ndarray, faces: np.ndarray, space: str) -> None:
    with atomic_write(path) as stream:
        stream.write(f"# {_tag(space)}\n".encode())
        np.savetxt(stream, vertices, fmt="v %.9g %.9g %.9g")
        np.savetxt(stream, faces + 1, fmt="f %d %d %d")


def write_off(path: Path, vertices: np.ndarray, faces: np.ndarray, space: str) -> None:
    with atomic_write(path) as stream:
        stream.write(f"OFF\n# {_tag(space)}\n{len(vertices)} {len(faces)} 0\n".encode())
        np.savetxt(stream, vertices, fmt="%.9g %.9g %.9g")
        np.savetxt(stream, faces, fmt="3 %d %d %d")


def write_glb(path: Path, vertices: np.ndarray, faces: np.ndarray, space: str) -> None:
    """glTF 2.0 binary with one mesh; the space tag stands in `asset.extras`. Numbers stay millimetres."""
    positions = vertices.astype("<f4")
    indices = faces.astype("<u4")
    binary = positions.tobytes() + indices.tobytes()
    document: dict = {"asset": {"version": "2.0", "generator": "trellis-vqvae", "extras": {"SPACE": space}}}
    if len(faces):  # glTF has no empty accessors: an empty mesh is a file without nodes
        document |= {
            "scene": 0,
            "scenes": [{"nodes": [0]}],
            "nodes": [{"mesh": 0}],
            "meshes": [{"primitives": [{"attributes": {"POSITION": 0}, "indices": 1, "mode": 4}]}],
            "buffers": [{"byteLength": len(binary)}],
            "bufferViews": [
                {"buffer": 0, "byteOffset": 0, "byteLength": positions.nbytes, "target": 34962},
                {"buffer": 0, "byteOffset": positions.nbytes, "byteLength": indices.nbytes, "target": 34963},
            ],
            "accessors": [
                {
                    "bufferView": 0,
                    "componentType": 5126,
                    "count": len(positions),
                    "type": "VEC3",
                    "min": positions.min(axis=0).tolist(),
                    "max": positions.max(axis=0).tolist(),
                },
                {"bufferView": 1, "componentType": 5125, "count": indices.size, "type": "SCALAR"},
            ],
        }
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    chunks = struct.pack("<II", len(text), 0x4E4F534A) + text
    if len(faces):
        chunks += struct.pack("<II", len(binary), 0x004E4942) + binary
    with atomic_write(path) as stream:
        stream.write(struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks)


WRITERS: dict[str, Callable[[Path, np.ndarray, np.ndarray, str], None]] = {
    ".stl": write_stl,
    ".ply": write_ply,
    ".obj": write_obj,
    ".off": write_off,
    ".glb": write_glb,
}
"""Suffix -> writer(path, vertices [V, 3] in `space`, faces [F, 3], space)."""
