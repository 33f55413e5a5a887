"""What a user hands to `encode`: meshes, volumes, prepared files and prepared folders, as shapes one by one."""

from __future__ import annotations

import dataclasses
import logging
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from trellis.preparation.label_tables import LabelNames
from trellis.preparation.privacy import hide_quoted
from trellis.preparation.settings import PrepareSettings
from trellis.utils.blocks import BAND_VOXELS, SparseSDFBlocks, check_resolution
from trellis.utils.io_utils import load_sparse_sdf, load_sparse_sdf_header, printable, sha256_of_file

logger = logging.getLogger(__name__)

_PREPARED_NAME = re.compile(r"([0-9A-Za-z_-]{1,128})_r(\d+)")
_PREPARED_FIELDS = {"block_index", "sparse_index", "sparse_sdf/sparse_index"}


@dataclass(frozen=True)
class InputOptions:
    """How inputs are read.

    Attributes:
        resolution: of meshes and volumes, and of the files taken from a prepared folder.
        split: of prepared folders, "train", "val", "test" or "all".
        label: name of a mesh's structure; None: the file's stem.
        label_names: a table of label names for all volumes; None: one beside a volume (of the same name, or a
            dataset.json in its folder or the one above), as the preparation finds it.
        mask_folders: a folder of volumes is one mask file per class; otherwise only one called "segmentations" is.
        include, exclude: patterns of the files of a folder that is given, see `trellis.preparation.layouts.fits`.
        mesh_space, labels, max_hole_mm, nested, spacing_mm, threshold, threshold_label, min_component_ml, device: see
            `PrepareSettings`; labels are those of volumes, a mesh that is given is always taken.
        frame: "shape" or "fixed-mm:SIZE". A patient's frame needs all shapes of the patient: prepare them first.
    """

    resolution: int | None = None
    split: str = "all"
    mesh_space: str = "LPS"
    labels: tuple[str, ...] | None = None
    label: str | None = None
    label_names: str | Path | None = None
    mask_folders: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    max_hole_mm: float | None = None
    nested: str = "cavity"
    spacing_mm: tuple[float, float, float] | None = None
    threshold: str | None = None
    threshold_label: str = "threshold"
    min_component_ml: float = 0.0
    frame: str = "shape"
    device: str = "cpu"

    def __post_init__(self) -> None:
        from trellis.preparation.frames import PATIENT
        from trellis.preparation.layouts import check_patterns

        check_patterns("include", self.include)
        check_patterns("exclude", self.exclude)
        if self.resolution is not None:
            check_resolution(self.resolution)
        if self.frame == PATIENT:
            raise ValueError(
                "frame patient needs all shapes of a patient: prepare them with --frame patient and encode the "
                "prepared folder"
            )
        self.settings()

    def required_resolution(self) -> int:
        """The resolution; ValueError when none is known."""
        if self.resolution is None:
            raise ValueError("resolution must be given: this model does not say which one it was trained at")
        return self.resolution

    def settings(self) -> PrepareSettings:
        """The same as settings of a preparation, so that both make the same shapes; ValueError for a bad option."""
        return PrepareSettings(
            mesh_space=self.mesh_space, max_hole_mm=self.max_hole_mm, nested=self.nested, labels=self.labels,
            spacing_mm=self.spacing_mm, threshold=self.threshold, threshold_label=self.threshold_label,
            min_component_ml=self.min_component_ml, frame=self.frame, device=self.device,
        )  # fmt: skip

    def told(self) -> dict[str, Any]:
        """What tokens of a mesh or volume say of these options, see `ShapeInput`."""
        return {"prep_hash": self.settings().prep_hash, "frame": self.frame}


@dataclass(frozen=True)
class ShapeInput:
    """One shape that is yet to be read.

    Attributes:
        source: the input that it comes from, for messages; sha256, label: its identity; resolution: voxels per side.
        load: reads or computes its blocks; ValueError where that cannot be done.
        told: fields of its tokens, by name, as far as they are known without making the shape: token files that say
            otherwise are of another one. Reads little, and computes nothing; ValueError where it cannot.
        label_table: digest of the table of label names that it was found with, see `Tokens`.
    """

    source: str
    sha256: str
    label: str
    resolution: int
    load: Callable[[], SparseSDFBlocks]
    told: Callable[[], Mapping[str, Any]]
    label_table: str = ""


@dataclass(frozen=True)
class Source:
    """An input file, or one shape of a prepared folder: its name for messages, and its shapes when asked for."""

    name: str
    shapes: Callable[[], Iterator[ShapeInput]]


def sources_of(paths: Sequence[str | Path], options: InputOptions) -> list[Source]:
    """The sources of some inputs, in order; prepared folders are listed right away, files are not yet read.

    Raises:
        ValueError: a path that is not there or of no known kind, a prepared folder without such a split, or a table of
            label names that cannot be read.
    """
    names = None
    if options.label_names is not None:
        from trellis.preparation.label_tables import read_table

        names = read_table(options.label_names)
    sources: list[Source] = []
    for path in map(Path, paths):
        if path.is_dir():
            sources += _sources_of_folder(path, options, names)
        else:
            sources.append(_source_of_file(path, options, names))
    return sources


def _sources_of_folder(path: Path, options: InputOptions, names: LabelNames | None) -> list[Source]:
    """The shapes of a prepared folder; of another one the shapes that lie in it, or the one volume that it is."""
    from trellis.preparation.discover import MASKS_FOLDER, VOLUME, sources_of_folder
    from trellis.preparation.layouts import LOOSE_SLICES, NOT_CHOSEN, is_chosen

    markers = path / "metadata.csv", path / "sparse_sdf"
    if any(p.exists() for p in markers) or any(path.glob("*_r[0-9]*.npz")):
        return [Source(s.source, partial(iter, (s,))) for s in _prepared_folder(path, options)]
    files = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
    prepared = [p for p in files if is_prepared_file(p)]
    masks = options.mask_folders or path.name.lower() == MASKS_FOLDER
    inside = sources_of_folder(path, [p for p in files if p not in prepared], masks=masks)
    sources = [Source(str(p), partial(_prepared_file, p)) for p in prepared]
    chosen = [f for f in inside.found if f[0] == path or is_chosen(f[0].name, options.include, options.exclude)]
    left_out = {NOT_CHOSEN: len(inside.found) - len(chosen), LOOSE_SLICES: inside.loose_slices}
    for reason, count in left_out.items():
        if count:
            logger.warning("%s: %d left out: %s", path, count, reason)
    for inner, kind, parts in chosen:
        read = partial(_volume, inner, parts, options, names) if kind == VOLUME else partial(_mesh, inner, options)
        sources.append(Source(str(inner), read))
    if not sources:
        raise ValueError(f"{path}: neither a prepared folder (metadata.csv) nor one with meshes or volumes in it")
    return sorted(sources, key=lambda source: source.name)


def _source_of_file(path: Path, options: InputOptions, names: LabelNames | None) -> Source:
    from trellis.geometry.volume import is_volume_file
    from trellis.preparation.discover import files_of_volume
    from trellis.utils.mesh_utils import is_mesh_file

    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if is_prepared_file(path):
        return Source(str(path), partial(_prepared_file, path))
    if is_volume_file(path):
        return Source(str(path), partial(_volume, path, files_of_volume(path), options, names))
    if is_mesh_file(path):
        return Source(str(path), partial(_mesh, path, options))
    raise ValueError(f"{path}: neither a mesh, nor a label volume, nor a prepared .npz")


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
    vertices: np.ndarray, faces: np.ndarray, options: InputOptions, *, from_mesh: bool = True
) -> SparseSDFBlocks:
    """The sparse SDF of a surface in RAS mm, as the preparation makes it.

    Args:
        from_mesh: False for a label's surface, see `trellis.preparation.surfaces.closed_surface`.

    Raises:
        ValueError: a surface that cannot be repaired or does not fit its frame, or no resolution.
    """
    from trellis.geometry.sdf import mesh_to_sparse_sdf
    from trellis.preparation.frames import box_of, cube_of, parse_frame
    from trellis.preparation.surfaces import closed_surface

    resolution = options.required_resolution()
    surface = closed_surface(
        vertices, faces, from_mesh=from_mesh, nested=options.nested, max_hole_mm=options.max_hole_mm
    )
    cube = cube_of(parse_frame(options.frame), box_of(surface.vertices), ())
    blocks = mesh_to_sparse_sdf(
        surface.stored_vertices, surface.faces, resolution, band_voxels=BAND_VOXELS, device=options.device,
        to_world=cube,
    )  # fmt: skip
    return dataclasses.replace(blocks, frame=options.frame, prep_hash=options.settings().prep_hash)


def identity_of_prepared(path: Path) -> str:
    """The sha256 in a prepared file's name, or else of its content."""
    match = _PREPARED_NAME.fullmatch(path.stem)
    return match[1] if match else sha256_of_file(path)


def _prepared_folder(path: Path, options: InputOptions) -> Iterator[ShapeInput]:
    from trellis.datasets.sparse_sdf import SparseSDF

    dataset = SparseSDF(path, resolution=options.required_resolution(), split=options.split)
    for item in dataset.items:
        yield ShapeInput(
            str(item.path), item.sha256, item.label, dataset.resolution, partial(load_sparse_sdf, item.path),
            partial(load_sparse_sdf_header, item.path),
        )  # fmt: skip


def _prepared_file(path: Path) -> Iterator[ShapeInput]:
    blocks = load_sparse_sdf(path)
    told = partial(load_sparse_sdf_header, path)
    yield ShapeInput(path.name, identity_of_prepared(path), blocks.label, blocks.resolution, lambda: blocks, told)


def _mesh(path: Path, options: InputOptions) -> Iterator[ShapeInput]:
    from trellis.preparation.discover import files_of_mesh
    from trellis.preparation.tasks import content_hash, shape_id
    from trellis.utils.mesh_utils import mesh_stem, read_mesh

    def load() -> SparseSDFBlocks:
        mesh = read_mesh(path, mesh_space=options.mesh_space)
        try:
            return blocks_of_mesh(mesh.vertices, mesh.faces, options)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    label = printable(options.label if options.label is not None else mesh_stem(path))
    identity = shape_id(content_hash(files_of_mesh(path)), label)
    yield ShapeInput(str(path), identity, label, options.required_resolution(), load, options.told)


def _volume(
    path: Path, files: Sequence[Path], options: InputOptions, names: LabelNames | None
) -> Iterator[ShapeInput]:
    from trellis.preparation.label_tables import digest_of, find_table, read_table
    from trellis.preparation.surfaces import Surfaces, shapes_of_volume
    from trellis.preparation.tasks import content_hash, shape_id

    resolution = options.required_resolution()
    if names is None:
        problems: list[str] = []
        table = find_table(path, path.parent, problems)
        names = read_table(table) if table is not None else {}
        for problem in problems:
            logger.warning("%s: %s", path, hide_quoted(problem))
    shapes = shapes_of_volume(path, options.settings(), names)
    if not shapes.labels and not shapes.unread:
        wanted, present = list(options.labels or ()), list(shapes.present[:20])
        raise ValueError(f"{path}: holds none of the labels {wanted}; it has {present}")
    content = content_hash(files)
    made: list[Surfaces] = []

    def load(label: str) -> SparseSDFBlocks:
        if not made:  # all labels at once, and only when one of them is not done yet
            made.append(shapes.surfaces())
            for note in made[0].notes:
                logger.warning("%s: %s", path, hide_quoted(note))
        try:
            if label in made[0].failures:
                raise made[0].failures[label]
            blocks = blocks_of_mesh(*made[0].by_label.pop(label), options, from_mesh=False)
            return dataclasses.replace(blocks, label_value=made[0].values.get(label))
        except ValueError as error:
            raise ValueError(f"{path}, label {label}: {error}") from None

    for label in shapes.labels:
        yield ShapeInput(
            f"{path}, label {label}", shape_id(content, label), label, resolution, partial(load, label), options.told,
            label_table=digest_of(names) if names else "",
        )  # fmt: skip
    if shapes.unread:  # the shapes of the other masks are done by now
        raise ValueError(f"{path}: {'; '.join(str(error) for error in shapes.unread.values())}")
