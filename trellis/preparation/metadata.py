"""The tables of a prepared dataset, rebuilt from the records: metadata.csv, errors.csv and splits.json."""

from __future__ import annotations

import csv
import io
import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trellis.preparation import records
from trellis.preparation.locking import locked
from trellis.preparation.split import DEFAULT_FRACTIONS, SPLITS, assign_splits, patient_order_key
from trellis.utils.io_utils import atomic_write, printable, write_json

logger = logging.getLogger(__name__)

THIN_VOXELS = 1.5
"""Shapes thinner than this many voxels may lose parts at that resolution: a warning."""


@dataclass(frozen=True)
class Tables:
    """What was written.

    Attributes:
        rows: of metadata.csv; failures: of errors.csv, dicts with id, stage, reason.
        patients: patients with at least one prepared shape per split. shapes: prepared shapes per split.
        duplicates: shapes that were found in more than one source, counted once each time they were left out.
        warnings: one line each.
    """

    rows: list[dict[str, Any]]
    failures: list[dict[str, str]]
    patients: dict[str, int]
    shapes: dict[str, int]
    duplicates: int
    warnings: list[str] = field(default_factory=list)


def build_metadata(
    out: str | Path,
    *,
    seed: int | None = None,
    fractions: tuple[float, float, float] = DEFAULT_FRACTIONS,
) -> Tables:
    """Merge the records of all ranks into metadata.csv, errors.csv and splits.json, each written atomically.

    What killed ranks left half-written is removed.

    Args:
        out: the prepared folder.
        seed: of the split; None takes the one that the ranks were run with.
        fractions: shares of patients in train, val and test.

    Raises:
        ValueError: no record there, a rank of the run is missing or has not finished its last run, or the ranks ran
            with different settings, keys, label names, or over different files or different states of them.
    """
    out = Path(out)
    if not (out / "records").is_dir():
        raise ValueError(f"{out}: no preparation has been run here (nothing below records/)")
    with locked(out, exclusive=True):
        return write_tables(out, seed=seed, fractions=fractions)


def write_tables(
    out: Path, *, seed: int | None = None, fractions: tuple[float, float, float] = DEFAULT_FRACTIONS
) -> Tables:
    """`build_metadata` for who holds the folder already."""
    parts = _complete_run(out)
    run = parts[0]
    seed = run["seed"] if seed is None else seed
    sources = [(key, _source_record(out, key, run)) for part in parts for key in part["sources"]]
    failures = [failure for part in parts for failure in part["failures"]]
    shapes, duplicates = _owned_shapes(sources)
    contents: dict[str, list[str]] = {}
    for _, record in sources:
        failures.extend(record["failures"])
        if record["shapes"]:
            contents.setdefault(record["patient_id"], []).append(record["content"])
    rows, warnings = [], _notes(sources) + _absent_labels(sources, run["labels"])
    for shape in shapes:
        row, of_shape = _row(out, shape, run)
        failures.extend(of_shape)
        rows.append(row)
    warnings += _thin_warnings(rows, run["resolutions"]) + _hollow_warnings(rows, run["resolutions"])
    done = {row["patient_id"] for row in rows if not row["error"]}
    keys = {patient: patient_order_key(seed, contents[patient]) for patient in done}
    given = _given_splits(parts)
    if given is None:
        splits = assign_splits(keys, fractions=fractions, previous=_previous_splits(out, seed, fractions))
    else:
        splits = {patient: given[patient] for patient in done if patient in given}
        if len(splits) < len(done):
            warnings.append(f"{len(done) - len(splits)} patients are in none of the given splits")
    for row in rows:
        row["split"] = splits.get(row["patient_id"], "")
    rows += [_failed_row(entry, record) for _, record in sources for entry in record["failures"] if "label" in entry]
    rows.sort(key=lambda row: row["sha256"])
    entries = sorted({(f["id"], f["stage"], f["reason"], f.get("source", "")) for f in failures})
    failures = [dict(zip(("id", "stage", "reason", "source"), entry)) for entry in entries]
    _write_csv(out / records.METADATA_NAME, _columns(run), rows)
    error_columns = ["id", "stage", "reason"] + (["source"] if run["keep_source_paths"] else [])
    _write_csv(out / records.ERRORS_NAME, error_columns, failures)
    write_json(
        out / records.SPLITS_NAME,
        {
            "seed": None if given is not None else seed,
            "fractions": None if given is not None else list(fractions),
            "patients": dict(sorted(splits.items())),
        },
    )
    return Tables(
        rows=rows,
        failures=failures,
        patients={split: sum(value == split for value in splits.values()) for split in SPLITS},
        shapes={split: sum(row["split"] == split and not row["error"] for row in rows) for split in SPLITS},
        duplicates=duplicates,
        warnings=warnings,
    )


def _complete_run(out: Path) -> list[dict[str, Any]]:
    parts = [value for _, value in records.manifests(out)]
    if not parts:
        raise ValueError(f"{out}: no preparation has finished here (no records/run_*.json): run it again")
    sizes = sorted({part["world_size"] for part in parts})
    if len(sizes) > 1:
        raise ValueError(f"{out}: parts of runs with world sizes {sizes} are there; run all ranks of one of them again")
    missing = sorted(set(range(sizes[0])) - {part["rank"] for part in parts})
    if missing:
        raise ValueError(f"{out}: ranks {missing} of {sizes[0]} have not finished")
    for name, what in records.SHARED_BY_RANKS.items():
        ranks: dict[str, list[int]] = {}
        for part in parts:
            ranks.setdefault(repr(part[name]), []).append(part["rank"])
        if len(ranks) > 1:
            values = ", ".join(f"{value} (ranks {some})" for value, some in sorted(ranks.items()))
            raise ValueError(f"{out}: the ranks ran with different {name} ({what}): {values}")
    return parts


def _source_record(out: Path, key: str, run: dict[str, Any]) -> dict[str, Any]:
    record = records.read_record(records.source_record_path(out, key))
    if record is None or record.get("prep_hash") != run["prep_hash"]:
        lost = {"id": key, "stage": "read", "reason": "its record is missing or of other settings: run again"}
        return {"patient_id": "", "content": key, "shapes": [], "failures": [lost]}
    if "source" in record and run["keep_source_paths"]:
        for entry in (*record["shapes"], *record["failures"]):
            entry["source"] = record["source"]
    return record


def _owned_shapes(sources: Sequence[tuple[str, dict[str, Any]]]) -> tuple[list[dict[str, Any]], int]:
    """Each shape once, of the source with the smallest key; the rest are counted as duplicates and logged."""
    owned: dict[str, dict[str, Any]] = {}
    duplicates = 0
    for _, record in sorted(sources, key=lambda pair: pair[0]):
        for shape in record["shapes"]:
            if shape["sha256"] in owned:
                duplicates += 1
                first = owned[shape["sha256"]]["patient_id"]
                logger.warning(
                    "shape %s is found twice (patients %s and %s): the first counts", shape["sha256"], first,
                    record["patient_id"],
                )
            else:
                owned[shape["sha256"]] = {**shape, "patient_id": record["patient_id"]}
    return sorted(owned.values(), key=lambda shape: shape["sha256"]), duplicates


def _row(out: Path, shape: dict[str, Any], run: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    row: dict[str, Any] = {
        "sha256": shape["sha256"], "label": shape["label"], "patient_id": shape["patient_id"],
        "num_faces": shape["num_faces"], "is_watertight": shape["is_watertight"],
        "volume_ml": f"{shape['volume_ml']:.6g}", "min_thickness_voxels": "", "frame": run["frame"],
        "source": shape.get("source", ""),
    }  # fmt: skip
    failures = []
    for resolution in run["resolutions"]:
        record = records.read_record(records.sdf_record_path(out, shape["sha256"], resolution))
        if record is None or record.get("prep_hash") != run["prep_hash"]:
            reason = "it has not been computed with these settings: run again"
            failures.append({"id": shape["sha256"], "stage": f"sdf_r{resolution}", "reason": reason})
        elif record.get("failure"):
            failures.append(record["failure"])
        else:
            row[f"r{resolution}_num_voxels"] = record["num_voxels"]
            row[f"r{resolution}_num_blocks"] = record["num_blocks"]
            row[f"r{resolution}_num_inside"] = record.get("num_inside")
            thickness, voxel = shape["min_thickness_mm"], record["voxel_size_mm"]
            if thickness is not None and voxel:
                row[f"r{resolution}_thickness"] = thickness / voxel
                row["min_thickness_voxels"] = row["min_thickness_voxels"] or f"{thickness / voxel:.3f}"
    row["error"] = "; ".join(f"{failure['stage']}: {failure['reason']}" for failure in failures)
    return row, [{**failure, "source": row["source"]} for failure in failures]


def _thin_warnings(rows: Sequence[dict[str, Any]], resolutions: Sequence[int]) -> list[str]:
    """One line a resolution at which shapes are thinner than 1.5 voxels, with the thinnest of them."""
    warnings = []
    for resolution in resolutions:
        thin = sorted((row.pop(f"r{resolution}_thickness", math.inf), row["sha256"], row["label"]) for row in rows)
        count = sum(value < THIN_VOXELS for value, _, _ in thin)
        if count:
            value, sha256, label = thin[0]
            warnings.append(
                f"{count} shapes are thinner than {THIN_VOXELS} voxels at {resolution}, parts of them may be lost; "
                f"the thinnest, {value:.2f}, is label {label}, {sha256}"
            )
    return warnings


def _hollow_warnings(rows: Sequence[dict[str, Any]], resolutions: Sequence[int]) -> list[str]:
    """One line a resolution at which shapes have no voxel centre inside, with the first of them."""
    warnings = []
    for resolution in resolutions:
        hollow = sorted(
            (row["sha256"], row["label"]) for row in rows if row.pop(f"r{resolution}_num_inside", None) == 0
        )
        if hollow:
            sha256, label = hollow[0]
            warnings.append(
                f"{len(hollow)} shapes lie between voxel centres at {resolution}: their fields have no inside, and no "
                f"mesh comes back from them; the first is label {label}, {sha256}"
            )
    return warnings


def _notes(sources: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """What the readers have to say about headers, one line a kind with the number of sources."""
    counts = Counter(note for _, record in sources for note in record.get("notes", []))
    return [f"{count} source(s): {note}" for note, count in sorted(counts.items())]


def _absent_labels(sources: Sequence[tuple[str, dict[str, Any]]], wanted: Sequence[str] | None) -> list[str]:
    """A warning that names the labels which were asked for and are nowhere."""
    found = {label for _, record in sources for label in record.get("picked", [])}
    absent = [label for label in wanted or () if label not in found]
    return [f"no source holds the labels {', '.join(absent)}"] if absent else []


def _failed_row(failure: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    return {
        "sha256": failure["id"], "label": failure["label"], "patient_id": record["patient_id"], "split": "",
        "source": failure.get("source", ""), "error": f"{failure['stage']}: {failure['reason']}",
    }  # fmt: skip


def _columns(run: dict[str, Any]) -> list[str]:
    counts = [f"r{r}_num_{what}" for r in run["resolutions"] for what in ("voxels", "blocks")]
    facts = ["num_faces", "is_watertight", "volume_ml", "min_thickness_voxels", "frame"]
    source = ["source"] if run["keep_source_paths"] else []
    return ["sha256", "label", "patient_id", "split", *facts, *counts, *source, "error"]


def _given_splits(parts: Sequence[dict[str, Any]]) -> dict[str, str] | None:
    """Patient to split where the splits were given; ValueError where only some ranks, or not the same, were given."""
    tables = [part["given_splits"] for part in parts]
    if any((table is None) != (tables[0] is None) for table in tables):
        raise ValueError("splits were given to some ranks and not to others; run them again")
    if tables[0] is None:
        return None
    merged: dict[str, str] = {}
    for patient, split in (pair for table in tables for pair in table.items()):
        if merged.setdefault(patient, split) != split:
            raise ValueError(f"patient {patient} is in two splits, {merged[patient]} and {split}")
    return merged


def _previous_splits(out: Path, seed: int, fractions: tuple[float, float, float]) -> dict[str, str]:
    """Earlier assignments, where seed and fractions are the same."""
    value = records.read_record(out / records.SPLITS_NAME) or {}
    if value.get("seed") != seed or value.get("fractions") != list(fractions):
        return {}
    return {str(patient): str(split) for patient, split in value.get("patients", {}).items()}


def _write_csv(path: Path, columns: list[str], rows: Sequence[dict[str, Any]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=columns, extrasaction="ignore", restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with atomic_write(path) as stream:
        stream.write(printable(text.getvalue()).encode("utf-8"))
