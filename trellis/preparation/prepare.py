"""Preparing a dataset: every shape below DATA_ROOT to truth meshes, sparse SDFs and tables."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trellis.preparation import records
from trellis.preparation.discover import VOLUME, Discovery, Source, find_sources
from trellis.preparation.execution import Runner, open_runner
from trellis.preparation.frames import cube_of, parse_frame
from trellis.preparation.given_splits import read_splits, splits_of_patients
from trellis.preparation.label_tables import LabelNames, digest_of, find_table, read_table
from trellis.preparation.locking import locked
from trellis.preparation.metadata import write_tables
from trellis.preparation.privacy import KEY_NAME, hide_quoted, load_or_create_key, pseudonym
from trellis.preparation.progress import progress_bar
from trellis.preparation.prune import prune
from trellis.preparation.settings import PrepareSettings
from trellis.preparation.shares import groups_of_patients
from trellis.preparation.split import DEFAULT_FRACTIONS
from trellis.preparation.tasks import SDFTask, SourceTask, compute_sdf, failure, read_source
from trellis.utils.io_utils import printable


@dataclass(frozen=True)
class PrepareSummary:
    """What a preparation did.

    Attributes:
        out: the prepared folder. n_sources: files that hold shapes; n_shapes: shapes, failed ones included.
        n_computed: sources read and SDFs computed by this run; 0 when everything was there already.
        n_failed: lines of errors.csv. n_duplicates: shapes found in more than one source.
        n_stale: files that belong to nothing present and were left where they are.
        left_out: reason -> number of files that hold shapes or images and were not read.
        patients, shapes: per split, of shapes without error; empty for one rank of several (they are merged later).
        warnings: one line each. seconds: wall-clock time.
    """

    out: Path
    n_sources: int
    n_shapes: int
    n_computed: int
    n_failed: int
    n_duplicates: int
    n_stale: int
    patients: dict[str, int]
    shapes: dict[str, int]
    left_out: Mapping[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def exit_code(self) -> int:
        """0 when all is well, 1 when something failed."""
        return 1 if self.n_failed else 0


def prepare_dataset(
    data_root: str | Path,
    out: str | Path,
    *,
    resolutions: Sequence[int] = (64, 512, 1024),
    workers: int | None = None,
    scheduler: str | None = None,
    mesh_space: str = "LPS",
    patient_regex: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    keep_patient_ids: bool = False,
    keep_source_paths: bool = False,
    key_file: str | Path | None = None,
    seed: int = 0,
    split_fractions: tuple[float, float, float] = DEFAULT_FRACTIONS,
    band_voxels: int = 4,
    labels: Sequence[str | int] | None = None,
    label_names: str | Path | None = None,
    mask_folders: bool = False,
    spacing_mm: tuple[float, float, float] | None = None,
    threshold: str | None = None,
    threshold_label: str = "threshold",
    min_component_ml: float = 0.0,
    max_hole_mm: float | None = None,
    nested: str = "cavity",
    frame: str = "shape",
    splits_file: str | Path | None = None,
    fold: int = 0,
    schema: int = 2,
    device: str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    retry_failed: bool = False,
    prune_stale: bool = False,
    progress: bool = True,
) -> PrepareSummary:
    """Prepare every shape below a folder. Finished work is kept: a second run does nothing, a killed one continues.

    Args:
        data_root: searched recursively for meshes and label volumes; its first folders are the patients.
        out: receives metadata.csv, errors.csv, splits.json, meshes/, masks/, sparse_sdf/ and records/.
        resolutions: voxels per side. workers: local processes, None for one a core, 0 for this process alone.
        scheduler: a Dask scheduler's address instead of local processes.
        mesh_space: space of mesh files that do not say theirs.
        patient_regex, include, exclude, mask_folders: see `find_sources`.
        keep_patient_ids, keep_source_paths: write patients' names and sources' relative paths as they are.
        key_file: the secret behind pseudonyms, default OUT/.patient_key; keep it, and do not pass it on.
        seed, split_fractions: of the split by patients. labels: numbers, names or patterns that are kept, None for all.
        label_names: a table of label names for all volumes; without it one beside a volume (of the same name, or a
            dataset.json above it) is used. spacing_mm, threshold, threshold_label, min_component_ml: see
            `PrepareSettings`.
        max_hole_mm, nested: see `trellis.utils.mesh_repair.clean_mesh`. schema: of the npz files.
        frame: "shape", "patient" or "fixed-mm:SIZE", the cube of each shape.
        splits_file, fold: take the split from a file (see `read_splits`) instead of drawing it.
        device: where distances are computed. rank, world_size: take every world_size-th patient (those who have a file
            in common together), and leave the tables to `trellis.preparation.metadata.build_metadata`, which merges
            the ranks.
        retry_failed: try again what failed for good (what failed for want of memory or disk always is).
        prune_stale: remove files of shapes, sources and settings that are not present any more (else they stay, and
            are counted); not for a rank, which does not know of all shapes.
        progress: show a bar on stderr.

    Raises:
        ValueError: an argument breaks its rule, or there is nothing to prepare.
    """
    start = time.perf_counter()
    settings = PrepareSettings(
        resolutions=tuple(resolutions), band_voxels=band_voxels, mesh_space=mesh_space, max_hole_mm=max_hole_mm,
        nested=nested, labels=None if labels is None else tuple(map(str, labels)), schema=schema, frame=frame,
        device=device, spacing_mm=spacing_mm, threshold=threshold, threshold_label=threshold_label,
        min_component_ml=min_component_ml,
    )  # fmt: skip
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be at least 0 and below world_size, got rank {rank} of {world_size}")
    if prune_stale and world_size > 1:
        raise ValueError("prune_stale needs all ranks' shapes: run once without rank and world_size after their merge")
    data_root, out = Path(data_root), Path(out)
    if out.resolve() == data_root.resolve():
        raise ValueError(f"OUT must be another folder than DATA_ROOT, got {out} for both")
    given = None if splits_file is None else read_splits(splits_file, fold)
    names = None if label_names is None else read_table(label_names)
    found = find_sources(
        data_root, patient_regex=patient_regex, include=include, exclude=exclude, mask_folders=mask_folders,
        images=threshold is not None, skip_folder=out,
    )  # fmt: skip
    warnings = [f"{pattern} fits nothing" for pattern in found.unused]
    out.mkdir(parents=True, exist_ok=True)
    with locked(out, exclusive=world_size == 1):
        key = load_or_create_key(key_file or out / KEY_NAME)
        if given is not None:
            shown = {s.patient: _patient_id(s.patient, key, keep_patient_ids) for s in found.sources}
            by_name, absent = splits_of_patients(found.sources, given, shown)
            given = {shown[name]: split for name, split in by_name.items()}
            warnings += absent
        _withdraw_manifests(out, rank, world_size)
        groups = groups_of_patients(found.sources) if world_size > 1 else []
        others = {patient for i, group in enumerate(groups) for patient in group if i % world_size != rank}
        problems: list[str] = []
        everyones = [
            _source_task(source, key, data_root, out, settings, keep_patient_ids, keep_source_paths, names,
                         [] if source.patient in others else problems)
            for source in found.sources
        ]  # fmt: skip
        tasks = [task for task in everyones if task.patient not in others]
        for problem, count in Counter(problems).items():
            warnings.append(f"{count} volume(s): {problem if keep_source_paths else hide_quoted(problem)}")
        computed = _run(tasks, out, settings, workers, scheduler, retry_failed, progress)
        manifest = _manifest(found, tasks, settings, key, rank, world_size, keep_source_paths)
        manifest |= {
            "seed": seed, "keep_patient_ids": keep_patient_ids, "label_names": digest_of(names),
            "search": pseudonym(key, "search", json.dumps([groups, [[s.relative, s.patient] for s in found.sources]])),
            "state": _digest_of_state(everyones), "given_splits": given,
        }  # fmt: skip
        _withdraw_manifests(out, rank, world_size)
        records.write_record(records.manifest_path(out, rank, world_size), manifest)
        if world_size > 1:
            return _summary_of_rank(out, manifest, computed, found.left_out, warnings, time.perf_counter() - start)
        tables = write_tables(out, fractions=split_fractions)
        owners = {row["sha256"]: row["patient_id"] for row in tables.rows}
        n_stale = prune(out, manifest["sources"], owners, settings.prep_hash, remove=prune_stale)
    return PrepareSummary(
        out=out, n_sources=len(tasks), n_shapes=len(tables.rows), n_computed=computed, n_failed=len(tables.failures),
        n_duplicates=tables.duplicates, n_stale=0 if prune_stale else n_stale,
        patients=tables.patients, shapes=tables.shapes, left_out=found.left_out,
        warnings=warnings + tables.warnings, failures=tables.failures, seconds=time.perf_counter() - start,
    )  # fmt: skip


def _patient_id(patient: str, key: bytes, keep: bool) -> str:
    """How tables and files call a patient."""
    return printable(patient) if keep else pseudonym(key, "patient", patient)


def _source_task(
    source: Source, key: bytes, data_root: Path, out: Path, settings: PrepareSettings, keep_ids: bool, keep_paths: bool,
    names: LabelNames | None, problems: list[str],
) -> SourceTask:  # fmt: skip
    patient_id = _patient_id(source.patient, key, keep_ids)
    table = find_table(source.path, data_root, problems) if source.kind == VOLUME and names is None else None
    expected = {
        "prep_hash": settings.prep_hash,
        "patient_id": patient_id,
        "stamp": [_stamp(path) for path in source.files],
        "names": digest_of(names),
        "table": None if table is None else _stamp(table),
        "labels": None if settings.labels is None else list(settings.labels),
        "kept": [keep_ids, keep_paths],
    }
    return SourceTask(
        path=source.path, relative=source.relative, kind=source.kind,
        key=pseudonym(key, "source", source.relative, digits=32), patient=source.patient, patient_id=patient_id,
        out=out, data_root=data_root, settings=settings, expected=expected, keep_patient_ids=keep_ids,
        keep_source_paths=keep_paths, files=source.files, names=names, table=table,
    )  # fmt: skip


def _stamp(path: Path) -> list[int] | None:
    """Size and time of a file; None for a dangling link, of which reading it will say so."""
    try:
        facts = path.stat()
    except OSError:
        return None
    return [facts.st_size, facts.st_mtime_ns]


def _run(
    tasks: list[SourceTask], out: Path, settings: PrepareSettings, workers: int | None, scheduler: str | None,
    retry_failed: bool, progress: bool,
) -> int:  # fmt: skip
    """Read sources that are not up to date, then compute what is missing; returns the number of tasks that were run."""
    known: dict[str, dict[str, Any]] = {}
    stale = []
    for task in tasks:
        record = records.read_record(records.source_record_path(out, task.key))
        if records.source_is_current(out, record, task.expected, retry_failed):
            known[task.key] = record
        else:
            stale.append(task)
    if not stale and not _sdf_tasks(tasks, known, out, settings, retry_failed):
        return 0
    with open_runner(workers, scheduler) as run:
        for task, record in _with_progress(run, read_source, stale, _lost_source, "reading", progress):
            known[task.key] = record
        todo = _sdf_tasks(tasks, known, out, settings, retry_failed)
        for _ in _with_progress(run, compute_sdf, todo, _lost_sdf, "computing", progress):
            pass
    return len(stale) + len(todo)


def _with_progress(
    run: Runner, function: Any, tasks: list[Any], lost: Any, title: str, progress: bool
) -> Iterator[tuple[Any, dict[str, Any]]]:
    # the time for an SDF grows about linearly with its resolution
    weights = [task.resolution if isinstance(task, SDFTask) else 1 for task in tasks]
    with progress_bar(title, weights, shown=progress) as advance:
        for task, record in run(function, tasks, lost):
            failed = len(record.get("failures", [])) + bool(record.get("failure"))
            advance(failed, task.resolution if isinstance(task, SDFTask) else 1)
            yield task, record


def _sdf_tasks(
    tasks: list[SourceTask], known: dict[str, dict[str, Any]], out: Path, settings: PrepareSettings, retry_failed: bool
) -> list[SDFTask]:
    """Shapes and resolutions that are not there yet, the largest resolution first to keep workers busy to the end."""
    owners: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    for key in sorted(task.key for task in tasks):
        record = known.get(key)
        for shape in record["shapes"] if record else []:
            owners.setdefault(shape["sha256"], (shape, record))
    frame = parse_frame(settings.frame)
    boxes: dict[str, list[list[list[float]]]] = {}
    for shape, record in owners.values():
        boxes.setdefault(record["patient_id"], []).append(shape["box_mm"])
    result = []
    for resolution in reversed(settings.resolutions):
        for sha256, (shape, record) in owners.items():
            expected = {
                "prep_hash": settings.prep_hash,
                "patient_id": record["patient_id"],
                "truth_bytes": shape["truth_bytes"],
                "label_value": shape["label_value"],
                "to_world": None,
            }
            refusal = None
            try:
                expected["to_world"] = cube_of(frame, shape["box_mm"], boxes[record["patient_id"]]).tolist()
            except ValueError as error:
                refusal = str(error)
            done = records.read_record(records.sdf_record_path(out, sha256, resolution))
            if not records.sdf_is_current(out, done, expected, sha256, resolution, retry_failed):
                result.append(SDFTask(sha256, shape["label"], resolution, out, settings, expected, refusal))
    return result


def _lost_source(task: SourceTask, reason: str) -> dict[str, Any]:
    record = {**task.expected, "content": None, "shapes": [], "failures": [failure(task.key, "read", reason)]}
    records.write_record(records.source_record_path(task.out, task.key), record)
    return record


def _lost_sdf(task: SDFTask, reason: str) -> dict[str, Any]:
    record = {**task.expected, "failure": failure(task.sha256, f"sdf_r{task.resolution}", reason)}
    records.write_record(records.sdf_record_path(task.out, task.sha256, task.resolution), record)
    return record


def _manifest(
    found: Discovery, tasks: list[SourceTask], settings: PrepareSettings, key: bytes, rank: int, world_size: int,
    keep_source_paths: bool,
) -> dict[str, Any]:  # fmt: skip
    reason = "patient_regex does not match its path"
    failures = []
    for relative in found.unmatched[rank::world_size]:
        entry = failure(pseudonym(key, "source", relative, digits=32), "discover", reason)
        failures.append({**entry, "source": printable(relative)} if keep_source_paths else entry)
    return {
        "rank": rank, "world_size": world_size, "prep_hash": settings.prep_hash, "frame": settings.frame,
        "resolutions": list(settings.resolutions), "keep_source_paths": keep_source_paths,
        "key": pseudonym(key, "key", ""), "labels": None if settings.labels is None else list(settings.labels),
        "sources": [task.key for task in tasks], "failures": failures,
    }  # fmt: skip


def _withdraw_manifests(out: Path, rank: int, world_size: int) -> None:
    """Remove this rank's manifest and those of runs with another number of ranks: they no longer count.

    From here until its new manifest is there a rank counts as one that has not finished, also when it is killed.
    """
    own = records.manifest_path(out, rank, world_size)
    for path in (out / "records").glob("run_*_of_*.json"):
        if path == own or not path.name.endswith(f"_of_{world_size}.json"):
            path.unlink(missing_ok=True)


def _digest_of_state(tasks: Sequence[SourceTask]) -> str:
    """16 hexadecimal digits of the sizes and times of all sources' files and tables of label names."""
    stamps = [[task.key, task.expected["stamp"], task.expected["table"]] for task in tasks]
    return hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:16]


def _summary_of_rank(
    out: Path, manifest: dict[str, Any], computed: int, left_out: Mapping[str, int], warnings: list[str], seconds: float
) -> PrepareSummary:
    n_shapes = 0
    failures = list(manifest["failures"])
    for key in manifest["sources"]:
        record = records.read_record(records.source_record_path(out, key)) or {"shapes": [], "failures": []}
        failures += record["failures"]
        n_shapes += len(record["shapes"])
        for shape in record["shapes"]:
            for resolution in manifest["resolutions"]:
                done = records.read_record(records.sdf_record_path(out, shape["sha256"], resolution)) or {}
                failures += [done["failure"]] if done.get("failure") else []
    kept = [{name: entry[name] for name in ("id", "stage", "reason")} for entry in failures]
    return PrepareSummary(
        out, len(manifest["sources"]), n_shapes, computed, len(kept), 0, 0, {}, {}, left_out=left_out,
        warnings=warnings, failures=kept, seconds=seconds,
    )  # fmt: skip
