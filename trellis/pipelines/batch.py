"""Many shapes to token files and many token files to meshes or volumes: resumable, with every failure recorded."""

from __future__ import annotations

import csv
import io
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from trellis.pipelines.label_volume import (
    LabelPainter,
    VolumeGrid,
    label_values,
    write_label_table,
)
from trellis.pipelines.shape_inputs import InputOptions, ShapeInput, Source, sources_of
from trellis.pipelines.token_files import TOKEN_SUFFIX, Tokens, load_tokens, read_token_metadata, save_tokens
from trellis.pipelines.tokenizer import NO_SURFACE, SparseSDFTokenizer
from trellis.preparation.privacy import hide_quoted, names_of, scrub
from trellis.utils.io_utils import atomic_write, sha256_of_file

logger = logging.getLogger(__name__)

MESH_FORMATS = ("stl", "ply", "glb", "obj", "off")
VOLUME_FORMAT = "nii.gz"
ERRORS_NAME = "errors.csv"

HANDLED = (ValueError, OSError, MemoryError, RuntimeError)
"""What one shape may fail with while the others go on; RuntimeError is what PyTorch raises when memory runs out."""

Progress = Callable[[int, int], None]
"""Told after each source how many are done, and how many there are."""


@dataclass(frozen=True)
class Failure:
    """A shape that could not be handled.

    Attributes:
        source: the path of the input, for the terminal; it goes into no file.
        id: the shape's sha256, or that of the input's content; stage: what failed.
        reason: one line, for the terminal; `write_errors` keeps it without names.
    """

    source: str
    id: str
    stage: str
    reason: str


@dataclass
class Outcome:
    """What a batch did: files written, files that were there already, and failures."""

    written: list[Path] = field(default_factory=list)
    skipped: list[Path] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0, or 1 when something failed."""
        return 1 if self.failures else 0


def encode_many(
    tokenizer: SparseSDFTokenizer,
    inputs: Sequence[str | Path],
    out: str | Path,
    options: InputOptions,
    *,
    progress: Progress = lambda done, total: None,
    written: Callable[[ShapeInput, Path], None] = lambda shape, path: None,
) -> Outcome:
    """Write `{sha256}_r{R}.safetensors` below `out` for every shape of the inputs.

    A token file that is there, whole, of this model and of the shape as it is now is kept (see `ShapeInput`). A shape
    that fails is recorded in the outcome and in errors.csv, and the rest goes on.

    Args:
        progress: called after each source. written: called after each file.

    Raises:
        ValueError: an input that is not there or of no known kind; nothing is done then.
    """
    out = Path(out)
    sources = sources_of(inputs, options)
    outcome = Outcome()
    for done, source in enumerate(sources, start=1):
        for shape in _shapes_of(source, outcome):
            path = out / f"{shape.sha256}_r{shape.resolution}{TOKEN_SUFFIX}"
            if _is_done(path, shape, tokenizer):
                outcome.skipped.append(path)
                continue
            try:
                tokens = tokenizer.encode(shape.load(), label=shape.label, sha256=shape.sha256)
                save_tokens(path, replace(tokens, label_table=shape.label_table))
            except HANDLED as error:
                outcome.failures.append(_failure_of_source(source.name, shape.sha256, "encode", error))
                continue
            outcome.written.append(path)
            written(shape, path)
        progress(done, len(sources))
    write_errors(out, outcome.failures)
    return outcome


def _shapes_of(source: Source, outcome: Outcome) -> Iterator[ShapeInput]:
    """The shapes of a source; when it cannot be read that is a failure of the outcome."""
    try:
        yield from source.shapes()
    except HANDLED as error:
        outcome.failures.append(_failure_of_source(source.name, _content_id(source.name), "read", error))


def _failure_of_source(source: str, identity: str, stage: str, error: BaseException) -> Failure:
    """A failure without the words of the file that it trips over: they may be a patient's, and terminals are logged."""
    logger.debug("%s", source, exc_info=error)
    return Failure(source, identity, stage, hide_quoted(one_line(error)))


def _content_id(name: str) -> str:
    try:
        return sha256_of_file(name)
    except OSError:
        return "unreadable"


def _is_done(path: Path, shape: ShapeInput, tokenizer: SparseSDFTokenizer) -> bool:
    """Whether a token file is there, whole, of this model and of the shape as it is now; nothing is computed for it."""
    if not path.is_file():
        return False
    try:
        tokens = load_tokens(path)
    except ValueError:
        return False
    if (tokens.model_hash, tokens.sha256, tokens.resolution, tokens.label_table) != (
        tokenizer.model_hash, shape.sha256, shape.resolution, shape.label_table,
    ):  # fmt: skip
        return False
    try:
        told = shape.told()
    except HANDLED:
        return False  # loading the shape then says what is wrong
    return all(np.array_equal(getattr(tokens, name), value) for name, value in told.items())


def token_paths(inputs: Sequence[str | Path], patient: str | None = None) -> list[Path]:
    """Token files from files and folders (all *.safetensors directly in a folder), without repeats.

    Args:
        patient: only files of this patient id, and those that cannot be read, of which decoding says why.

    Raises:
        ValueError: a path that is not there, a folder without token files, or no file of that patient.
    """
    paths: list[Path] = []
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            found = sorted(path.glob(f"*{TOKEN_SUFFIX}"))
            if not found:
                raise ValueError(f"{path}: the folder holds no token file (*{TOKEN_SUFFIX})")
            paths += found
        elif path.is_file():
            paths.append(path)
        else:
            raise ValueError(f"{path}: no such file")
    paths = list(dict.fromkeys(paths))
    if patient is None:
        return paths
    owners = {path: _patient_of(path) for path in paths}
    if patient not in owners.values():
        raise ValueError(f"no token file is of patient {patient!r}; {_patients(owners.values())}")
    return [path for path, owner in owners.items() if owner in (patient, None)]


def _patient_of(path: Path) -> str | None:
    """The patient id of a token file, empty where it does not say; None for a file that cannot be read."""
    try:
        return read_token_metadata(path).get("patient_id", "")
    except ValueError:
        return None


def _patients(owners: Iterable[str | None]) -> str:
    """Which patients there are, for a message."""
    found = sorted({owner for owner in owners if owner})
    more = f" and {len(found) - 5} more" if len(found) > 5 else ""
    return f"the tokens are of {', '.join(found[:5])}{more}" if found else "the tokens do not say whose they are"


def decode_many(
    tokenizer: SparseSDFTokenizer,
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    file_format: str = "stl",
    mesh_space: str = "LPS",
    grid: VolumeGrid | None = None,
    patient: str | None = None,
    progress: Progress = lambda done, total: None,
) -> Outcome:
    """Write a mesh, or a mask on a volume's grid, for every token file, under the same stem.

    Args:
        file_format: one of `MESH_FORMATS`, or "nii.gz", which needs `grid`.
        mesh_space: "LPS" or "RAS", of the meshes that are written (they are tagged).
        patient: only token files of this patient id.

    Raises:
        ValueError: an unknown format, a missing grid, or inputs that are not there; nothing is done then.
    """
    file_format = file_format.lower().lstrip(".")
    if file_format not in (*MESH_FORMATS, VOLUME_FORMAT):
        raise ValueError(f"format must be one of {', '.join((*MESH_FORMATS, VOLUME_FORMAT))}, got {file_format!r}")
    if file_format == VOLUME_FORMAT and grid is None:
        raise ValueError("format nii.gz needs --like REFERENCE or --spacing-mm, the voxels to write on")
    if file_format != VOLUME_FORMAT and grid is not None:
        raise ValueError(f"--like and --spacing-mm belong to format nii.gz, got format {file_format!r}")
    out, outcome = Path(out), Outcome()
    paths = token_paths(inputs, patient)
    twice = sorted(stem for stem, count in Counter(path.stem for path in paths).items() if count > 1)
    if twice:
        raise ValueError(f"two token files have the stem {twice[0]!r}: decode them into different folders")
    for done, path in enumerate(paths, start=1):
        target = out / f"{path.stem}.{file_format}"
        try:
            _decode_one(tokenizer, path, target, mesh_space, grid)
            outcome.written.append(target)
        except HANDLED as error:
            outcome.failures.append(Failure(str(path), path.stem, "decode", one_line(error)))
        progress(done, len(paths))
    write_errors(out, outcome.failures)
    return outcome


def decode_together(
    tokenizer: SparseSDFTokenizer,
    inputs: Sequence[str | Path],
    path: str | Path,
    grid: VolumeGrid,
    *,
    patient: str | None = None,
    progress: Progress = lambda done, total: None,
) -> Outcome:
    """Write the shapes of all token files, which are one patient's, as one label volume.

    Values are those of `label_values`; a table of them (value, name) is written beside the volume as CSV, where a
    preparation finds it. Where shapes overlap the smaller one keeps the voxel; shapes of one label are united, with a
    warning.

    Args:
        path: of the volume, .nii.gz. grid: the reference's. patient: only token files of this patient id.

    Raises:
        ValueError: a path of another kind, no reference, inputs that are not there, or tokens of several patients.
    """
    from trellis.geometry.volume import write_label_volume

    path = Path(path)
    if not path.name.endswith(f".{VOLUME_FORMAT}"):
        raise ValueError(f"{path}: a label volume is written as .{VOLUME_FORMAT}")
    if grid.shape is None or grid.affine is None:
        raise ValueError("one volume for all shapes needs --like REFERENCE: shapes have no grid in common")
    paths, outcome = token_paths(inputs, patient), Outcome()
    found: list[tuple[Path, Tokens]] = []
    for token_path in paths:
        try:
            found.append((token_path, load_tokens(token_path)))
        except HANDLED as error:
            outcome.failures.append(Failure(str(token_path), token_path.stem, "read", one_line(error)))
    _check_one_patient([tokens for _, tokens in found])
    values = label_values([(tokens.label, tokens.label_value) for _, tokens in found])
    painter, numbers = LabelPainter(grid.shape), {label: i for i, label in enumerate(values, start=1)}
    painted: dict[str, int] = {}
    for done, (token_path, tokens) in enumerate(found, start=1):
        try:
            voxels = painter.paint(_mask(tokenizer, token_path, tokens, grid)[0], numbers[tokens.label])
            painted[tokens.label] = painted.get(tokens.label, 0) + voxels
        except HANDLED as error:
            outcome.failures.append(Failure(str(token_path), token_path.stem, "decode", one_line(error)))
        progress(done, len(found))
    for label, voxels in painted.items():
        if not voxels:
            logger.warning("label %r holds no voxel centre of the reference's grid", label)
    if painter.overlaps:
        logger.warning("%d voxels belonged to more than one label; the smaller shape kept each", painter.overlaps)
    if painted:
        smallest = np.min_scalar_type(max(values.values()))
        write_label_volume(path, np.array([0, *values.values()], dtype=smallest)[painter.labels], grid.affine)
        table = path.with_name(path.name.removesuffix(f".{VOLUME_FORMAT}") + ".csv")
        write_label_table(table, {values[label]: label for label in painted})
        outcome.written += [path, table]
    write_errors(path.parent, outcome.failures)
    return outcome


def _check_one_patient(tokens: Sequence[Tokens]) -> None:
    """ValueError for tokens of several patients; a warning for labels that occur twice."""
    owners = {each.patient_id for each in tokens}
    if len(owners - {""}) > 1:
        raise ValueError(f"a label volume is of one patient (--patient ID picks one) and {_patients(owners)}")
    if len(owners) > 1:
        unknown = sum(not each.patient_id for each in tokens)
        logger.warning("%d of %d token files do not say whose they are, and are taken too", unknown, len(tokens))
    for label, count in Counter(each.label for each in tokens).items():
        if count > 1:
            logger.warning("%d token files are of label %r: they become one region", count, label)


def _mask(tokenizer: SparseSDFTokenizer, path: Path, tokens: Tokens, grid: VolumeGrid) -> tuple[np.ndarray, np.ndarray]:
    """Voxels inside the decoded shape, and their affine."""
    if tokens.to_world is None:
        raise ValueError(f"{path}: the tokens have no place in millimetres (to_world), and so none in a volume")
    return grid.voxels_inside(*_mesh(tokenizer, path, tokens))


def _mesh(tokenizer: SparseSDFTokenizer, path: Path, tokens: Tokens) -> tuple[np.ndarray, np.ndarray]:
    try:
        vertices, faces = tokenizer.decode_mesh(tokens)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if len(faces) == 0:
        raise ValueError(f"{path}: {NO_SURFACE}")
    return vertices, faces


def _decode_one(
    tokenizer: SparseSDFTokenizer, path: Path, target: Path, mesh_space: str, grid: VolumeGrid | None
) -> None:
    from trellis.geometry.volume import write_label_volume
    from trellis.utils.mesh_utils import write_mesh

    tokens = load_tokens(path)
    if grid is not None:
        inside, affine = _mask(tokenizer, path, tokens, grid)
        write_label_volume(target, inside, affine)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix == ".ply":
        try:
            tokenizer.decode_ply(tokens, target, mesh_space=mesh_space)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return
    vertices, faces = _mesh(tokenizer, path, tokens)
    write_mesh(target, vertices, faces, mesh_space=mesh_space)


def write_errors(out: Path, failures: Sequence[Failure]) -> None:
    """errors.csv with id, stage, reason; an older one goes away when there is nothing to record.

    Reasons lose the names of files and of the folders they are in, and what they quote, as those of a preparation do.
    """
    path = out / ERRORS_NAME
    if not failures:
        path.unlink(missing_ok=True)
        return
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(["id", "stage", "reason"])
    rows.writerows([f.id, f.stage, _without_names(f)] for f in failures)
    try:
        with atomic_write(path) as stream:
            stream.write(text.getvalue().encode())
    except OSError as error:  # a full disk: the failures themselves still have to reach the user
        logger.warning("%s could not be written: %s", path, error)


def _without_names(failure: Failure) -> str:
    path = Path(failure.source)
    files = [path, *path.iterdir()] if path.is_dir() else [path]  # a folder of slices or masks
    above = Path(os.path.abspath(path)).parent.parent
    return hide_quoted(scrub(failure.reason, [name for file in files for name in names_of(file, above)]))


def one_line(error: BaseException) -> str:
    """First line of an error's message, of `UnreadableFile` the one without a library's words; or its type's name."""
    lines = str(getattr(error, "public", error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__
