"""What a user hands to `encode`: meshes, label volumes, prepared files and prepared folders, as shapes one by one."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from trellis.utils.blocks import BAND_VOXELS, SparseSDFBlocks, check_resolution
from trellis.utils.io_utils import load_sparse_sdf, sha256_of_file

MeshArrays = tuple[np.ndarray, np.ndarray]
_PREPARED_NAME = re.compile(r"([0-9A-Za-z_-]{1,128})_r(\d+)")
_PREPARED_FIELDS = {"block_index", "sparse_index", "sparse_sdf/sparse_index"}


@dataclass(frozen=True)
class InputOptions:
    """How inputs are read.

    Attributes:
        resolution: of meshes and volumes, and of the files taken from a prepared folder.
        split: of prepared folders, "train", "val", "test" or "all".
        mesh_space: "LPS" or "RAS", the space of mesh files that do not say.
        labels: label values or names of volumes that are taken; None: all.
        label: name of a mesh's structure; None: the file's stem.
        max_hole_mm, nested: see `trellis.utils.mesh_repair.clean_mesh`.
        device: where distances are computed, "cpu" or "cuda".
    """

    resolution: int | None = None
    split: str = "all"
    mesh_space: str = "LPS"
    labels: tuple[str, ...] | None = None
    label: str | None = None
    max_hole_mm: float | None = None
    nested: str = "cavity"
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.resolution is not None:
            check_resolution(self.resolution)

    def required_resolution(self) -> int:
        """The resolution; ValueError when none is known."""
        if self.resolution is None:
            raise ValueError("resolution must be given: this model does not say which one it was trained at")
        return self.resolution


@dataclass(frozen=True)
class ShapeInput:
    """One shape that is yet to be read.

    Attributes:
        source: the input that it comes from, for messages; sha256, label: its identity; resolution: voxels per side.
        load: reads or computes its blocks; ValueError where that cannot be done.
    """

    source: str
    sha256: str
    label: str
    resolution: int
    load: Callable[[], SparseSDFBlocks]


@dataclass(frozen=True)
class Source:
    """An input file, or one shape of a prepared folder: its name for messages, and its shapes when asked for."""

    name: str
    shapes: Callable[[], Iterator[ShapeInput]]


def sources_of(paths: Sequence[str | Path], options: InputOptions) -> list[Source]:
    """The sources of some inputs, in order; prepared folders are listed right away, files are not yet read.

    Raises:
        ValueError: a path that is not there or of no known kind, or a prepared folder without such a split.
    """
    sources: list[Source] = []
    for path in [found for given in paths for found in _files_of(Path(given))]:
        if path.is_dir():
            sources += [Source(s.source, partial(iter, (s,))) for s in _prepared_folder(path, options)]
        else:
            sources.append(_source_of_file(path, options))
    return sources


def _files_of(path: Path) -> list[Path]:
    """The path itself; of a folder that is not a prepared one, the shapes that lie in it."""
    prepared = path / "metadata.csv", path / "sparse_sdf"
    if not path.is_dir() or any(p.exists() for p in prepared) or any(path.glob("*_r[0-9]*.npz")):
        return [path]
    found = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith(".") and _kind(p))
    if not found:
        raise ValueError(f"{path}: neither a prepared folder (metadata.csv) nor one with meshes or volumes in it")
    return found


def _kind(path: Path) -> str:
    """ "prepared", "volume" or "mesh"; empty for a file of no such kind."""
    from trellis.geometry.volume import is_volume_file
    from trellis.utils.mesh_utils import is_mesh_file

    if is_prepared_file(path):
        return "prepared"
    return "volume" if is_volume_file(path) else "mesh" if is_mesh_file(path) else ""


def _source_of_file(path: Path, options: InputOptions) -> Source:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    readers = {
        "prepared": partial(_prepared_file, path),
        "volume": partial(_volume, path, options),
        "mesh": partial(_mesh, path, options),
    }
    kind = _kind(path)
    if not kind:
        raise ValueError(f"{path}: neither a mesh, nor a label volume, nor a prepared .npz")
    return Source(str(path), readers[kind])


def is_prepared_file(path: Path) -> bool:
    """Whether an .npz holds a sparse SDF (by the names inside it; an .npz may also hold a volume)."""
    if path.suffix.lower() != ".npz":
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile):
        return True  # loading it then says what is wrong
    return bool(names & _PREPARED_FIELDS)


def blocks_of_mesh(
    vertices: np.ndarray, faces: np.ndarray, options: InputOptions, *, clean: bool = True
) -> SparseSDFBlocks:
    """The sparse SDF of a surface in RAS mm.

    Args:
        clean: repair the surface first. A label's surface needs none: it knows its inside, and may touch itself along
            an edge, which a repair would take for a fault.

    Raises:
        ValueError: a surface that cannot be repaired, or no resolution.
    """
    from trellis.geometry.sdf import mesh_to_sparse_sdf
    from trellis.utils.mesh_repair import clean_mesh

    resolution = options.required_resolution()
    if clean:
        vertices, faces, _ = clean_mesh(vertices, faces, max_hole_mm=options.max_hole_mm, nested=options.nested)
    return mesh_to_sparse_sdf(vertices, faces, resolution, band_voxels=BAND_VOXELS, device=options.device)


def identity_of_prepared(path: Path) -> str:
    """The sha256 in a prepared file's name, or else of its content."""
    match = _PREPARED_NAME.fullmatch(path.stem)
    return match[1] if match else sha256_of_file(path)


def _prepared_folder(path: Path, options: InputOptions) -> Iterator[ShapeInput]:
    from trellis.datasets.sparse_sdf import SparseSDF

    dataset = SparseSDF(path, resolution=options.required_resolution(), split=options.split)
    for item in dataset.items:
        yield ShapeInput(item.sha256, item.sha256, item.label, dataset.resolution, partial(load_sparse_sdf, item.path))


def _prepared_file(path: Path) -> Iterator[ShapeInput]:
    blocks = load_sparse_sdf(path)
    yield ShapeInput(path.name, identity_of_prepared(path), blocks.label, blocks.resolution, lambda: blocks)


def _mesh(path: Path, options: InputOptions) -> Iterator[ShapeInput]:
    from trellis.preparation.tasks import shape_id
    from trellis.utils.mesh_utils import read_mesh

    def load() -> SparseSDFBlocks:
        mesh = read_mesh(path, mesh_space=options.mesh_space)
        try:
            return blocks_of_mesh(mesh.vertices, mesh.faces, options)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    label = options.label if options.label is not None else path.name.split(".")[0]
    identity = shape_id(sha256_of_file(path), label)
    yield ShapeInput(str(path), identity, label, options.required_resolution(), load)


def _volume(path: Path, options: InputOptions) -> Iterator[ShapeInput]:
    from trellis.geometry.volume import label_surfaces, labels_of, read_volume
    from trellis.preparation.tasks import names_of_labels, shape_id

    volume = read_volume(path)
    content = sha256_of_file(path)
    named = names_of_labels(labels_of(volume), volume.names, options.labels)
    if not named:
        present = list(names_of_labels(labels_of(volume), volume.names, None).values())
        raise ValueError(f"{path}: holds none of the labels {list(options.labels or ())}; it has {present[:20]}")
    surfaces: dict[int, MeshArrays] = {}

    def load(number: int) -> SparseSDFBlocks:
        if not surfaces:  # all labels at once, and only when one of them is not done yet
            surfaces.update(label_surfaces(volume, list(named)))
        try:
            return blocks_of_mesh(*surfaces.pop(number), options, clean=False)
        except ValueError as error:
            raise ValueError(f"{path}, label {named[number]}: {error}") from None

    for number, name in named.items():
        what = f"{path}, label {name}"
        yield ShapeInput(what, shape_id(content, name), name, options.required_resolution(), partial(load, number))
