"""What a worker does: read a source to surfaces, and a surface to a sparse SDF. Results are small dicts."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trellis.preparation import records
from trellis.preparation.discover import MESH
from trellis.preparation.frames import box_of
from trellis.preparation.label_tables import LabelNames, read_table
from trellis.preparation.privacy import hide_quoted, label_without_patient, names_of, scrub, scrubbed_logs
from trellis.preparation.settings import PrepareSettings
from trellis.preparation.surfaces import Surfaces, closed_surface, surfaces_of_mesh, surfaces_of_volume
from trellis.utils.io_utils import printable, save_sparse_sdf, sha256_of_file

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SourceTask:
    """One source to read; `expected` is what its record must say to count as done.

    `names` are label names that were given for all sources; `table` is a file of them that was found for this one.
    """

    path: Path
    relative: str
    kind: str
    key: str
    patient: str
    patient_id: str
    out: Path
    data_root: Path
    settings: PrepareSettings
    expected: dict[str, Any]
    keep_patient_ids: bool
    keep_source_paths: bool
    files: tuple[Path, ...]
    names: LabelNames | None = None
    table: Path | None = None


@dataclass(frozen=True)
class SDFTask:
    """One shape at one resolution; `expected` holds its cube, `refusal` says why it has none."""

    sha256: str
    label: str
    resolution: int
    out: Path
    settings: PrepareSettings
    expected: dict[str, Any]
    refusal: str | None = None


def failure(identity: str, stage: str, error: BaseException | str, *, names: list[str] | None = None) -> dict[str, Any]:
    """A failure as data: id, stage, reason without names of files, and whether trying again is pointless.

    A ValueError is about the input, and stays until input or settings change, unless it says that the machine was at
    fault. That and anything else (a full disk, no memory, a lost worker) is tried again by the next run.
    """
    if isinstance(error, ValueError):
        reason = getattr(error, "public", str(error)) if names else str(error)
    elif isinstance(error, BaseException):
        reason = f"{type(error).__name__}: {error}"
    else:
        reason = error
    reason = printable(" ".join((hide_quoted(scrub(reason, names)) if names else reason).split()))
    permanent = isinstance(error, ValueError) and not getattr(error, "transient", False)
    return {"id": identity, "stage": stage, "reason": reason[:2000], "permanent": permanent}


def read_source(task: SourceTask) -> dict[str, Any]:
    """Read a source file, write the truth mesh of each of its shapes, and write and return the source's record.

    A record that is there already is returned: Dask runs a task again when its worker dies after the work was done.
    """
    path = records.source_record_path(task.out, task.key)
    record = records.read_record(path)
    if records.source_is_current(task.out, record, task.expected, retry_failed=True):
        return record
    names = [name for path in {task.path, *task.files} for name in names_of(path, task.data_root)] + [str(task.table)]
    record: dict[str, Any] = {**task.expected, "content": None, "shapes": [], "failures": []}
    if task.keep_source_paths:
        names = []
        record["source"] = printable(task.relative)
    stage = "read"
    try:
        record["content"] = content_hash(task.files)
        with scrubbed_logs(names), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # format libraries warn with paths; what matters is raised or in the notes
            surfaces = _with_printable_labels(_surfaces(task))
        record["notes"] = [printable(hide_quoted(scrub(note, names)) if names else note) for note in surfaces.notes]
        record["picked"] = sorted(surfaces.picked)
        stage = "clean"
        for label, error in surfaces.failures.items():
            entry = failure(shape_id(record["content"], label), stage, error, names=names)
            record["failures"].append({**entry, "label": label})
        for label, (vertices, faces) in surfaces.by_label.items():
            identity = shape_id(record["content"], label)
            try:
                facts = _write_truth(task, identity, label, vertices, faces)
                facts["mask_bytes"] = _write_mask(records.mask_path(task.out, identity), surfaces.masks.get(label))
                facts["label_value"] = surfaces.values.get(label)
                record["shapes"].append(facts)
            except Exception as error:
                logger.debug("shape %s", identity, exc_info=True)
                record["failures"].append({**failure(identity, stage, error, names=names), "label": label})
    except Exception as error:
        logger.debug("source %s", task.key, exc_info=True)
        record["failures"].append(failure(record["content"] or task.key, stage, error, names=names))
    records.write_record(path, record)
    return record


def shape_id(content: str, label: str) -> str:
    """The sha256 of a shape: of its source's content hash and its label, as tables show it."""
    return hashlib.sha256(f"{content}\0{printable(label)}".encode()).hexdigest()


def content_hash(files: Sequence[Path]) -> str:
    """SHA-256 of a file, or over the names and hashes of several (a mask's name is its label)."""
    if len(files) == 1:
        return sha256_of_file(files[0])
    lines = sorted(f"{path.name} {sha256_of_file(path)}" for path in files)
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def _surfaces(task: SourceTask) -> Surfaces:
    """The wanted surfaces of a source."""
    if task.kind == MESH:
        from trellis.utils.mesh_utils import mesh_stem

        label = mesh_stem(task.path)
        own_patient = "/" not in task.relative and task.patient == label  # the search warns of those
        if not task.keep_patient_ids and not own_patient:
            label = label_without_patient(label, task.patient)
        return surfaces_of_mesh(task.path, label, task.settings)
    names = task.names if task.names is not None else read_table(task.table) if task.table is not None else {}
    patient = None if task.keep_patient_ids else task.patient
    return surfaces_of_volume(task.path, task.settings, names, patient)


def _with_printable_labels(surfaces: Surfaces) -> Surfaces:
    """The same surfaces under labels that tables can hold; a file name may have bytes that are not UTF-8.

    Raises:
        ValueError: two labels become one.
    """
    shown = {label: printable(label) for label in (*surfaces.by_label, *surfaces.failures)}
    if len(set(shown.values())) < len(shown):
        twice = next(label for label, count in Counter(shown.values()).items() if count > 1)
        raise ValueError(f"two labels are written {twice!r}: rename one of them")
    kinds = ("by_label", "failures", "masks", "values")
    renamed = {kind: {printable(k): v for k, v in getattr(surfaces, kind).items()} for kind in kinds}
    return dataclasses.replace(surfaces, **renamed)


def _write_truth(
    task: SourceTask, identity: str, label: str, vertices: np.ndarray, faces: np.ndarray
) -> dict[str, Any]:
    """Clean a surface, write it, and return the facts of the shape."""
    from trellis.geometry.thickness import thin_thickness_mm
    from trellis.utils.mesh_utils import write_mesh

    surface = closed_surface(
        vertices, faces, from_mesh=task.kind == MESH, nested=task.settings.nested,
        max_hole_mm=task.settings.max_hole_mm,
    )  # fmt: skip
    vertices, faces = surface.vertices, surface.faces
    path = records.truth_path(task.out, identity)
    write_mesh(path, vertices, faces, mesh_space="RAS")
    thickness = thin_thickness_mm(vertices, faces)
    corners = vertices[faces] - vertices.mean(axis=0)
    volume_mm3 = float(np.einsum("ij,ij->i", corners[:, 0], np.cross(corners[:, 1], corners[:, 2])).sum() / 6)
    return {
        "sha256": identity,
        "label": label,
        "num_faces": int(len(faces)),
        "is_watertight": surface.is_watertight,
        "repairs": surface.repairs,
        "volume_ml": volume_mm3 / 1000,
        "min_thickness_mm": thickness if np.isfinite(thickness) else None,
        "box_mm": box_of(vertices),
        "truth_bytes": path.stat().st_size,
    }


def _write_mask(path: Path, cut: Callable[[], Any] | None) -> int | None:
    """Write the voxels of a shape that came from labels; the size of the file, None where there is none."""
    if cut is None:
        path.unlink(missing_ok=True)
        return None
    from trellis.geometry.source_grid import save_source_mask

    save_source_mask(path, cut())
    return path.stat().st_size


def compute_sdf(task: SDFTask) -> dict[str, Any]:
    """Compute one sparse SDF from the truth mesh, write the npz, then its record; return the record.

    A record that is there already is returned, see `read_source`.
    """
    start = time.perf_counter()
    done = records.read_record(records.sdf_record_path(task.out, task.sha256, task.resolution))
    if records.sdf_is_current(task.out, done, task.expected, task.sha256, task.resolution, retry_failed=True):
        return done
    record: dict[str, Any] = dict(task.expected)
    try:
        from trellis.geometry.sdf import mesh_to_sparse_sdf
        from trellis.utils.mesh_utils import read_mesh

        if task.refusal:
            raise ValueError(task.refusal)
        mesh = read_mesh(records.truth_path(task.out, task.sha256), mesh_space="RAS")
        options = {"band_voxels": task.settings.band_voxels, "device": task.settings.device}
        cube = np.array(task.expected["to_world"])
        blocks = mesh_to_sparse_sdf(mesh.vertices, mesh.faces, task.resolution, to_world=cube, **options)
        blocks = dataclasses.replace(
            blocks, label=task.label, patient_id=task.expected["patient_id"], prep_hash=task.expected["prep_hash"],
            frame=task.settings.frame, label_value=task.expected["label_value"],
        )  # fmt: skip
        path = records.sdf_path(task.out, task.sha256, task.resolution)
        save_sparse_sdf(path, blocks, schema=task.settings.schema)
        record |= {
            "num_voxels": int(np.count_nonzero(blocks.active)),
            "num_blocks": blocks.num_blocks,
            "num_inside": int(np.count_nonzero(blocks.block_sdf < 0)),
            "voxel_size_mm": blocks.voxel_size_mm,
            "bytes": path.stat().st_size,
            "seconds": round(time.perf_counter() - start, 3),
        }
    except Exception as error:
        logger.debug("shape %s at %d", task.sha256, task.resolution, exc_info=True)
        record["failure"] = failure(task.sha256, f"sdf_r{task.resolution}", error, names=[str(task.out)])
    records.write_record(records.sdf_record_path(task.out, task.sha256, task.resolution), record)
    return record
