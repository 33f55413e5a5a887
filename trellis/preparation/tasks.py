"""What a worker does: read a source to surfaces, and a surface to a sparse SDF. Results are small dicts."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trellis.preparation import records
from trellis.preparation.discover import MESH
from trellis.preparation.frames import box_of
from trellis.preparation.privacy import label_without_patient, names_of, scrub, scrubbed_logs
from trellis.preparation.settings import PrepareSettings
from trellis.utils.io_utils import save_sparse_sdf, sha256_of_file

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SourceTask:
    """One source file to read; `expected` is what its record must say to count as done."""

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

    A ValueError is about the input, and stays until input or settings change. Anything else (a full disk, no memory, a
    lost worker) is tried again by the next run.
    """
    if isinstance(error, ValueError):
        reason = str(error)
    elif isinstance(error, BaseException):
        reason = f"{type(error).__name__}: {error}"
    else:
        reason = error
    reason = " ".join(scrub(reason, names or []).split())
    return {"id": identity, "stage": stage, "reason": reason[:2000], "permanent": isinstance(error, ValueError)}


def read_source(task: SourceTask) -> dict[str, Any]:
    """Read a source file, write the truth mesh of each of its shapes, and write and return the source's record."""
    names = names_of(task.path, task.data_root)
    record: dict[str, Any] = {**task.expected, "content": None, "shapes": [], "failures": []}
    if task.keep_source_paths:
        names = []
        record["source"] = task.relative
    stage = "read"
    try:
        record["content"] = sha256_of_file(task.path)
        with scrubbed_logs(names):
            surfaces = _surfaces(task, record)
        stage = "clean"
        for label, (vertices, faces) in surfaces.items():
            identity = shape_id(record["content"], label)
            try:
                record["shapes"].append(_write_truth(task, identity, label, vertices, faces))
            except Exception as error:
                logger.debug("shape %s", identity, exc_info=True)
                record["failures"].append({**failure(identity, stage, error, names=names), "label": label})
    except Exception as error:
        logger.debug("source %s", task.key, exc_info=True)
        record["failures"].append(failure(record["content"] or task.key, stage, error, names=names))
    records.write_record(records.source_record_path(task.out, task.key), record)
    return record


def shape_id(content: str, label: str) -> str:
    """The sha256 of a shape: of its source's content hash and its label."""
    return hashlib.sha256(f"{content}\0{label}".encode()).hexdigest()


def names_of_labels(
    numbers: Sequence[int], names: Mapping[int, str], wanted: Collection[str] | None
) -> dict[int, str]:
    """Label number to the name of its shape, of those wanted (by number or name); a name that occurs twice gets its
    number behind it, a label without a name is called by its number."""
    plain = {number: names.get(number) or str(number) for number in numbers}
    counts = Counter(plain.values())  # over all labels: what a shape is called must not depend on the choice
    labels = {number: f"{name}_{number}" if counts[name] > 1 else name for number, name in plain.items()}
    if wanted is None:
        return labels
    return {number: label for number, label in labels.items() if {label, plain[number], str(number)} & set(wanted)}


def _surfaces(task: SourceTask, record: dict[str, Any]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Label to surface (vertices RAS mm, faces) of the labels that are wanted."""
    wanted = task.settings.labels
    if task.kind == MESH:
        from trellis.utils.mesh_utils import mesh_stem, read_mesh

        mesh_label = mesh_stem(task.path)
        if not task.keep_patient_ids and "/" in task.relative:
            mesh_label = label_without_patient(mesh_label, task.patient)
        if wanted is not None and mesh_label not in wanted:
            return {}
        mesh = read_mesh(task.path, mesh_space=task.settings.mesh_space)
        return {mesh_label: (mesh.vertices, mesh.faces)}
    from trellis.geometry.volume import label_surfaces, labels_of, read_volume

    volume = read_volume(task.path)
    hidden = [] if task.keep_source_paths else names_of(task.path, task.data_root)
    record["notes"] = [scrub(note, hidden) for note in volume.notes]
    labels = names_of_labels(labels_of(volume), volume.names, wanted)
    if not labels:
        return {}
    return {labels[number]: surface for number, surface in label_surfaces(volume, list(labels)).items()}


def _write_truth(
    task: SourceTask, identity: str, label: str, vertices: np.ndarray, faces: np.ndarray
) -> dict[str, Any]:
    """Clean a surface, write it, and return the facts of the shape."""
    from trellis.geometry.thickness import thin_thickness_mm
    from trellis.utils.mesh_repair import clean_mesh
    from trellis.utils.mesh_topology import closed_chain_problem
    from trellis.utils.mesh_utils import write_mesh

    # A label's surface knows its inside. It may touch itself along an edge, which a repair would take for a fault.
    is_watertight, repairs = True, []
    if task.kind == MESH or closed_chain_problem(faces):
        options = {"nested": task.settings.nested, "max_hole_mm": task.settings.max_hole_mm}
        vertices, faces, report = clean_mesh(vertices, faces, **options)
        is_watertight, repairs = bool(report.is_watertight), [str(action) for action in report.actions]
    path = records.truth_path(task.out, identity)
    write_mesh(path, vertices, faces, mesh_space="RAS")
    thickness = thin_thickness_mm(vertices, faces)
    corners = vertices[faces] - vertices.mean(axis=0)
    volume_mm3 = float(np.einsum("ij,ij->i", corners[:, 0], np.cross(corners[:, 1], corners[:, 2])).sum() / 6)
    return {
        "sha256": identity,
        "label": label,
        "num_faces": int(len(faces)),
        "is_watertight": is_watertight,
        "repairs": repairs,
        "volume_ml": volume_mm3 / 1000,
        "min_thickness_mm": thickness if np.isfinite(thickness) else None,
        "box_mm": box_of(vertices),
        "truth_bytes": path.stat().st_size,
    }


def compute_sdf(task: SDFTask) -> dict[str, Any]:
    """Compute one sparse SDF from the truth mesh, write the npz, then its record; return the record."""
    start = time.perf_counter()
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
            frame=task.settings.frame,
        )  # fmt: skip
        path = records.sdf_path(task.out, task.sha256, task.resolution)
        save_sparse_sdf(path, blocks, schema=task.settings.schema)
        record |= {
            "num_voxels": int(np.count_nonzero(blocks.active)),
            "num_blocks": blocks.num_blocks,
            "voxel_size_mm": blocks.voxel_size_mm,
            "bytes": path.stat().st_size,
            "seconds": round(time.perf_counter() - start, 3),
        }
    except Exception as error:
        logger.debug("shape %s at %d", task.sha256, task.resolution, exc_info=True)
        record["failure"] = failure(task.sha256, f"sdf_r{task.resolution}", error, names=[str(task.out)])
    records.write_record(records.sdf_record_path(task.out, task.sha256, task.resolution), record)
    return record
