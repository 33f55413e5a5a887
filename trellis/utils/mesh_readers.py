"""One small function per mesh format that is read; a new format is one more entry of `READERS`."""

from __future__ import annotations

import base64
import gzip
import io
import json
import logging
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trellis.utils.io_utils import open_regular
from trellis.utils.mesh_merge import merge_identical_vertices
from trellis.utils.mesh_text import parse_obj, parse_off, parse_ply
from trellis.utils.mesh_vtk import parse_vtk
from trellis.utils.mesh_vtp import parse_vtp
from trellis.utils.mesh_writers import STL_TRIANGLE

log = logging.getLogger(__name__)

MESH_SPACES = ("LPS", "RAS")
MAX_UNPACKED_BYTES = 1 << 30
"""Most bytes that a compressed mesh may unpack to."""


@dataclass(frozen=True)
class RawMesh:
    """A mesh as its file has it.

    Attributes:
        vertices: [V, 3] floats in `space`; faces: [F, 3] integers.
        space: "LPS" or "RAS" where the file or its format says so, else None.
    """

    vertices: np.ndarray
    faces: np.ndarray
    space: str | None = None


def find_space_tag(text: bytes) -> str | None:
    """The space named by a `SPACE=...` tag in header or comment bytes, None without one.

    Raises:
        ValueError: a tag that names another space than LPS or RAS.
    """
    found = {match.decode().upper() for match in re.findall(rb"\bSPACE\s*=\s*([A-Za-z]+)", text)}
    if not found:
        return None
    if len(found) > 1 or not found <= set(MESH_SPACES):
        raise ValueError(f"the SPACE tag must be LPS or RAS, got {sorted(found)}")
    return found.pop()


def read_stl(path: Path) -> RawMesh:
    """STL, binary or ASCII; the size of a binary file must be what its facet count says."""
    data = path.read_bytes()
    if len(data) == 0:
        raise ValueError("the file is empty")
    count = struct.unpack_from("<I", data, 80)[0] if len(data) >= 84 else None
    if count is not None and len(data) == 84 + STL_TRIANGLE.itemsize * count:
        corners = np.frombuffer(data, dtype=STL_TRIANGLE, offset=84)["corners"].reshape(-1, 3)
        space = find_space_tag(data[:80])
    elif data.lstrip()[:5].lower() == b"solid":
        corners = _ascii_stl_corners(data)
        space = find_space_tag(data.lstrip().split(b"\n", 1)[0][:1024])
    elif count is None:
        raise ValueError(f"a binary STL has at least 84 bytes, got {len(data)}")
    else:
        raise ValueError(
            f"its header announces {count} triangles, {84 + STL_TRIANGLE.itemsize * count} bytes, and the file has "
            f"{len(data)}: truncated or not an STL"
        )
    vertices, faces = merge_identical_vertices(corners, np.arange(len(corners), dtype=np.int64).reshape(-1, 3))
    return RawMesh(vertices, faces, space)


def _ascii_stl_corners(data: bytes) -> np.ndarray:
    lower = data.lower()
    if b"endsolid" not in lower[-1024:]:
        raise ValueError("an ASCII STL ends with 'endsolid', this one does not: truncated")
    words = re.findall(rb"\bvertex\s+(\S+)\s+(\S+)\s+(\S+)", lower)
    facets = lower.count(b"endfacet")
    if len(words) != 3 * facets:
        raise ValueError(f"{facets} facets need {3 * facets} vertices, got {len(words)}")
    return np.array(words, dtype="S").astype(np.float64).reshape(-1, 3)


def _trimesh_geometry(data: bytes, file_type: str, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    import trimesh

    loaded = trimesh.load(io.BytesIO(data), file_type=file_type, process=False, **options)
    parts = loaded.dump() if isinstance(loaded, trimesh.Scene) else [loaded]
    vertices, faces, offset = [np.zeros((0, 3))], [np.zeros((0, 3), dtype=np.int64)], 0
    for part in parts:
        if not isinstance(part, trimesh.Trimesh):
            continue  # point clouds and paths have no surface
        vertices.append(np.asarray(part.vertices, dtype=np.float64))
        faces.append(np.asarray(part.faces, dtype=np.int64).reshape(-1, 3) + offset)
        offset += len(part.vertices)
    return np.concatenate(vertices), np.concatenate(faces)


def _leading_comments(data: bytes) -> bytes:
    """Comment lines among the first 64 KiB of a text format."""
    return b"\n".join(line for line in data[: 1 << 16].splitlines() if line.lstrip().startswith(b"#"))


def read_ply(path: Path) -> RawMesh:
    """PLY, ASCII or binary."""
    vertices, faces, comments = parse_ply(path.read_bytes())
    return RawMesh(vertices, faces, find_space_tag(comments))


def read_obj(path: Path) -> RawMesh:
    """Wavefront OBJ; materials are not opened."""
    data = path.read_bytes()
    return RawMesh(*merge_identical_vertices(*parse_obj(data)), find_space_tag(_leading_comments(data)))


def read_off(path: Path) -> RawMesh:
    """Object File Format, text."""
    data = path.read_bytes()
    return RawMesh(*parse_off(data), find_space_tag(_leading_comments(data)))


def _gltf_tag(document: dict) -> str | None:
    space = (document.get("asset", {}).get("extras") or {}).get("SPACE")
    return None if space is None else find_space_tag(f"SPACE={space}".encode())


def read_glb(path: Path) -> RawMesh:
    """Binary glTF 2.0: all triangles of the scene, node transforms applied, numbers taken as millimetres."""
    data = path.read_bytes()
    if len(data) < 20 or data[:4] != b"glTF":
        raise ValueError("a GLB file starts with 'glTF'")
    length, json_length = struct.unpack_from("<I", data, 8)[0], struct.unpack_from("<I", data, 12)[0]
    if length != len(data) or 20 + json_length > len(data):
        raise ValueError(f"its header announces {length} bytes, and the file has {len(data)}: truncated")
    space = _gltf_tag(json.loads(data[20 : 20 + json_length]))
    vertices, faces = _trimesh_geometry(data, "glb", skip_materials=True)
    return RawMesh(*merge_identical_vertices(vertices, faces), space)


def gltf_buffers(path: Path, document: Any) -> dict[str, Path | None]:
    """Each address in a glTF document that names a file of numbers, and that file; None where it is not beside it."""
    buffers = document.get("buffers") if isinstance(document, dict) else None
    uris = [one.get("uri") for one in buffers if isinstance(one, dict)] if isinstance(buffers, list) else []
    folder = (path.resolve() if path.is_symlink() else path).parent
    result: dict[str, Path | None] = {}
    for uri in uris:
        if isinstance(uri, str) and "base64," not in uri:  # what trimesh unpacks; it takes anything else for a file
            name = uri.strip()
            inside = name and "\0" not in name and not Path(name).is_absolute() and ".." not in Path(name).parts
            result[uri] = folder / name if inside and (folder / name).is_file() else None
    return result


def named_gltf_files(path: Path) -> list[Path]:
    """The files with numbers that a .gltf file names and that are there; none of one that cannot be understood.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb", opener=open_regular) as stream:
        data = stream.read()
    try:
        found = gltf_buffers(path, json.loads(data))
    except (ValueError, RecursionError):
        return []
    return list(dict.fromkeys(file for file in found.values() if file is not None))


def read_gltf(path: Path) -> RawMesh:
    """glTF 2.0 as JSON; its buffers may be inside or beside it, never elsewhere."""
    import trimesh

    data = path.read_bytes()
    document = json.loads(data)
    space = _gltf_tag(document)
    for uri, file in gltf_buffers(path, document).items():
        if file is None:
            raise ValueError(f"its numbers should be in {uri[:200]!r} beside it: no such file")
    resolver = trimesh.resolvers.FilePathResolver(str(path.resolve()))
    vertices, faces = _trimesh_geometry(data, "gltf", resolver=resolver, skip_materials=True)
    return RawMesh(*merge_identical_vertices(vertices, faces), space)


def read_gifti(path: Path) -> RawMesh:
    """GIfTI surface (.gii, .gii.gz), coordinates in RAS.

    A transform that leads to scanner or aligned-anatomical space is applied unless the coordinates are there already;
    FreeSurfer's c_ras (metadata VolGeomC_R, _A, _S) is added to coordinates that are not declared as scanner space.
    """
    import nibabel

    if path.name.lower().endswith(".gz"):
        text = _gunzip(path)
    else:
        text = path.read_bytes()
    _refuse_gifti_bomb(text)
    image = nibabel.GiftiImage.from_bytes(text)
    points = image.get_arrays_from_intent("NIFTI_INTENT_POINTSET")
    triangles = image.get_arrays_from_intent("NIFTI_INTENT_TRIANGLE")
    if len(points) != 1 or len(triangles) != 1:
        raise ValueError(
            f"a GIfTI surface has one POINTSET and one TRIANGLE array, got {len(points)} and {len(triangles)}"
        )
    vertices = np.asarray(points[0].data, dtype=np.float64)
    faces = np.asarray(triangles[0].data, dtype=np.int64)
    matrix = _gifti_to_ras(points[0])
    vertices = vertices @ matrix[:3, :3].T + matrix[:3, 3]
    if np.linalg.det(matrix[:3, :3]) < 0:
        faces = faces[:, ::-1]
    return RawMesh(vertices, faces, "RAS")


def _gunzip(path: Path) -> bytes:
    """A packed XML file's content, at most MAX_UNPACKED_BYTES, in pieces: one read of that size reserves it all."""
    content = io.BytesIO()
    with gzip.open(path) as stream:
        while piece := stream.read(1 << 20):
            content.write(piece)
            if content.tell() > MAX_UNPACKED_BYTES:
                raise ValueError(f"it unpacks to more than {MAX_UNPACKED_BYTES} bytes")
            if b"\0" in piece:
                raise ValueError("XML does not contain zero bytes: damaged")
    return content.getvalue()


def _refuse_gifti_bomb(text: bytes) -> None:
    """ValueError if packed arrays hold more than the dimensions of any array in the file can need."""
    dimensions = re.findall(rb"<DataArray\b[^>]*>", text)
    most = 0
    for tag in dimensions:
        size = 8
        for n in re.findall(rb"\bDim\d\s*=\s*[\"'](\d{1,18})[\"']", tag):
            size *= int(n)
        most = max(most, size)
    for packed in re.findall(rb"<Data>([^<]*)</Data>", text):
        try:
            stream = base64.b64decode(packed)
        except ValueError:
            continue  # plain numbers, or damaged: the parser will say
        if stream[:1] != b"\x78":
            continue
        unpacker, total = zlib.decompressobj(), 0
        while stream and not unpacker.eof:
            total += len(unpacker.decompress(stream, 1 << 20))
            stream = unpacker.unconsumed_tail
            if total > most + 64:
                raise ValueError(f"a packed array unpacks to more than the {most} bytes that its dimensions allow")


def _gifti_to_ras(array: Any) -> np.ndarray:
    patient_spaces = (1, 2)  # NIFTI_XFORM_SCANNER_ANAT, NIFTI_XFORM_ALIGNED_ANAT
    system, matrix = array.coordsys, np.eye(4)
    here = int(getattr(system, "dataspace", 0) or 0)
    there = int(getattr(system, "xformspace", 0) or 0)
    if here in patient_spaces:
        return matrix
    if there in patient_spaces and system.xform is not None:
        return np.asarray(system.xform, dtype=np.float64)
    meta = {str(key): str(value) for key, value in dict(array.meta).items()}
    matrix[:3, 3] = [float(meta.get(f"VolGeomC_{axis}", 0)) for axis in "RAS"]
    return matrix


def is_freesurfer_surface(path: Path) -> bool:
    """Whether a file begins as FreeSurfer's binary triangle or quad surfaces do."""
    try:
        with open(path, "rb", opener=open_regular) as stream:
            return stream.read(3) in (b"\xff\xff\xfe", b"\xff\xff\xff", b"\xff\xff\xfd")
    except OSError:
        return False


def read_freesurfer(path: Path) -> RawMesh:
    """FreeSurfer surface geometry: surface RAS plus c_ras of the volume that it names, so scanner RAS."""
    import nibabel

    data = path.read_bytes()
    if data[:3] == b"\xff\xff\xfe":
        comments_end = data.find(b"\n\n", 3, 65536)
        if comments_end < 0 or len(data) < comments_end + 10:
            raise ValueError("its comment lines do not end: truncated")
        vertex_count, face_count = struct.unpack_from(">ii", data, comments_end + 2)
        needed = comments_end + 10 + 12 * (vertex_count + face_count)
        if vertex_count < 0 or face_count < 0 or len(data) < needed:
            raise ValueError(
                f"its header announces {vertex_count} vertices and {face_count} faces, at least {needed} bytes, and "
                f"the file has {len(data)}: truncated"
            )
    vertices, faces, info = nibabel.freesurfer.read_geometry(str(path), read_metadata=True)
    centre = info.get("cras") if info else None
    if centre is None:
        log.warning("a FreeSurfer surface has no volume information: c_ras is taken as zero")
        centre = np.zeros(3)
    return RawMesh(np.asarray(vertices, dtype=np.float64) + np.asarray(centre), faces, "RAS")


def read_vtk(path: Path) -> RawMesh:
    """Legacy VTK poly data; the title line may carry the space tag."""
    data = path.read_bytes()
    return RawMesh(*parse_vtk(data), find_space_tag(b"\n".join(data[:512].split(b"\n")[:2])))


def read_vtp(path: Path) -> RawMesh:
    """VTK XML poly data; a string field SPACE carries the space tag."""
    vertices, faces, space = parse_vtp(path.read_bytes())
    return RawMesh(vertices, faces, find_space_tag(f"SPACE={space}".encode()) if space else None)


READERS: dict[str, Callable[[Path], RawMesh]] = {
    ".stl": read_stl,
    ".ply": read_ply,
    ".obj": read_obj,
    ".off": read_off,
    ".glb": read_glb,
    ".gltf": read_gltf,
    ".gii": read_gifti,
    ".gii.gz": read_gifti,
    ".vtk": read_vtk,
    ".vtp": read_vtp,
}
"""Suffix -> reader(path) -> RawMesh; whatever a reader raises reaches the user as ValueError with the file's name."""
