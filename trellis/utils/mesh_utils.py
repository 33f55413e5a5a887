"""Reading and writing meshes in the patient's RAS millimetres, whatever space and format the file is in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trellis.utils.io_utils import unreadable
from trellis.utils.mesh_readers import MESH_SPACES, READERS, RawMesh, is_freesurfer_surface, read_freesurfer
from trellis.utils.mesh_writers import WRITERS

MAX_FILE_BYTES = 16 << 30


@dataclass(frozen=True)
class Mesh:
    """A triangle mesh.

    Attributes:
        vertices: [V, 3] float64, RAS mm.
        faces: [F, 3] int64, rows of `vertices`, counter-clockwise seen from outside.
        name: stem of the file that it came from.
        space: "LPS" or "RAS", what the file's numbers were read as. space_is_tagged: whether the file (or its format)
            says so itself.
    """

    vertices: np.ndarray
    faces: np.ndarray
    name: str = ""
    space: str = ""
    space_is_tagged: bool = False


def check_mesh_space(mesh_space: str) -> str:
    """Return `mesh_space`; ValueError unless it is "LPS" or "RAS"."""
    if mesh_space not in MESH_SPACES:
        raise ValueError(f"mesh_space must be one of {list(MESH_SPACES)}, got {mesh_space!r}")
    return mesh_space


def mesh_suffix(path: str | Path) -> str:
    """Lower-case suffix under which the registry knows a mesh file (".surf.gii" is ".gii", "a.gii.gz" ".gii.gz")."""
    suffixes = Path(path).suffixes
    suffix = suffixes[-1].lower() if suffixes else ""
    return (suffixes[-2] + suffixes[-1]).lower() if suffix == ".gz" and len(suffixes) > 1 else suffix


def is_mesh_file(path: str | Path) -> bool:
    """Whether `read_mesh` has a reader for this file, by its suffix or by FreeSurfer's magic bytes."""
    return mesh_suffix(path) in READERS or is_freesurfer_surface(Path(path))


def swap_lps_ras(points: np.ndarray) -> np.ndarray:
    """LPS to RAS and back: x and y change sign (a rotation by 180 degrees about z, so faces keep their order)."""
    return np.asarray(points, dtype=np.float64) * np.array([-1.0, -1.0, 1.0]) + 0.0


def read_mesh(path: str | Path, *, mesh_space: str = "LPS") -> Mesh:
    """Read a mesh file into RAS mm.

    A `SPACE=LPS` or `SPACE=RAS` tag in the file (3D Slicer's) is honoured; an untagged file is read as `mesh_space`.
    GIfTI and FreeSurfer files are RAS by their own definitions (FreeSurfer: c_ras is added).

    Args:
        path: .stl, .ply, .obj, .off, .glb, .gltf, .gii, .vtk, .vtp, or a FreeSurfer surface (known by its content).
        mesh_space: "LPS" or "RAS", the space of a file that does not say.

    Returns:
        The mesh; vertices that the format stores more than once (STL, OBJ, glTF) are merged, nothing else is repaired.

    Raises:
        ValueError: no such file, unknown suffix, unreadable or truncated, no triangles, a vertex that is not finite,
            a face that names no vertex. The message names file, rule and value.
    """
    path = Path(path)
    check_mesh_space(mesh_space)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise ValueError(f"{path}: a mesh file may have at most {MAX_FILE_BYTES} bytes, got {size}")
    reader = READERS.get(mesh_suffix(path))
    if reader is None and is_freesurfer_surface(path):
        reader = read_freesurfer
    if reader is None:
        raise ValueError(
            f"{path}: no mesh reader for {mesh_suffix(path) or 'a file without suffix'!r}; known: "
            f"{', '.join(sorted(READERS))}, and FreeSurfer surfaces"
        )
    try:
        raw = reader(path)
        vertices, faces = _checked(raw)
    except Exception as error:
        # the format libraries raise whatever they trip over; a bad file is always the user's to fix
        words = str(error) or type(error).__name__
        reason = f"needs more memory than there is: {words}" if isinstance(error, MemoryError) else words
        raise unreadable(f"{path}: not a readable {mesh_suffix(path) or 'FreeSurfer'} mesh", error, reason) from error
    space = raw.space or mesh_space
    if space == "LPS":
        vertices = swap_lps_ras(vertices)
    return Mesh(vertices, faces, name=mesh_stem(path), space=space, space_is_tagged=bool(raw.space))


def mesh_stem(path: str | Path) -> str:
    """A mesh file's name without its format's suffix ("lh.pial" and "liver.v2" of "liver.v2.stl" keep their dots)."""
    name = Path(path).name
    for suffix in (".surf.gii.gz", ".gii.gz", ".surf.gii", *READERS):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def _checked(raw: RawMesh) -> tuple[np.ndarray, np.ndarray]:
    vertices = np.ascontiguousarray(raw.vertices, dtype=np.float64)
    faces = np.ascontiguousarray(raw.faces, dtype=np.int64)
    if vertices.ndim != 2 or vertices.shape[1] != 3:
        raise ValueError(f"vertices must be [V, 3], got {list(vertices.shape)}")
    if faces.ndim != 2 or faces.shape[1] != 3:
        raise ValueError(f"faces must be triangles [F, 3], got {list(faces.shape)}")
    if not len(faces):
        raise ValueError(f"it holds no triangles ({len(vertices)} vertices)")
    bad = np.count_nonzero(~np.isfinite(vertices).all(axis=1))
    if bad:
        raise ValueError(f"all vertices must be finite, got {bad} of {len(vertices)} with NaN or infinity")
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise ValueError(
            f"faces must name vertices 0 to {len(vertices) - 1}, got indices from {faces.min()} to {faces.max()}"
        )
    return vertices, faces


def write_mesh(path: str | Path, vertices: np.ndarray, faces: np.ndarray, *, mesh_space: str = "LPS") -> None:
    """Write a mesh, tagged with its space, atomically.

    Args:
        path: .stl (binary), .ply (binary), .obj, .off or .glb.
        vertices: [V, 3] floats, RAS mm; stored as float32 (text formats: nine digits).
        faces: [F, 3] integers; may be empty.
        mesh_space: "LPS" (3D Slicer's rule) or "RAS": the axes that are written.

    Raises:
        ValueError: unknown suffix or space, wrong shapes, vertices that are not finite.
    """
    path = Path(path)
    check_mesh_space(mesh_space)
    writer = WRITERS.get(mesh_suffix(path))
    if writer is None:
        raise ValueError(f"{path}: no mesh writer for {mesh_suffix(path)!r}; known: {', '.join(sorted(WRITERS))}")
    vertices = np.asarray(vertices, dtype=np.float64).reshape(-1, 3)
    faces = np.asarray(faces, dtype=np.int64).reshape(-1, 3)
    if not np.isfinite(vertices).all():
        raise ValueError(f"{path}: vertices must be finite to be written")
    if len(faces) and (faces.min() < 0 or faces.max() >= len(vertices)):
        raise ValueError(f"{path}: faces must name vertices 0 to {len(vertices) - 1}, got up to {faces.max()}")
    if mesh_space == "LPS":
        vertices = swap_lps_ras(vertices)
    writer(path, vertices, faces, mesh_space)
