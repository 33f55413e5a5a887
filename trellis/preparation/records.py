"""Records of finished work below OUT/records: what makes a preparation resumable and its tables rebuildable."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trellis.utils.io_utils import write_json

SHARED_BY_RANKS = {
    "prep_hash": "settings of the shapes",
    "resolutions": "--resolutions",
    "labels": "--labels",
    "label_names": "the table of --label-names",
    "frame": "--frame",
    "seed": "--seed",
    "keep_patient_ids": "--keep-patient-ids",
    "keep_source_paths": "--keep-source-paths",
    "key": "the key behind pseudonyms",
    "search": "files below DATA_ROOT, and whose they are",
    "state": "sizes and times of the files below DATA_ROOT: run all ranks again over one state of it",
}
"""What a manifest holds that must be the same for all ranks of a run, and what that is."""

METADATA_NAME, ERRORS_NAME, SPLITS_NAME = "metadata.csv", "errors.csv", "splits.json"


def sdf_path(out: Path, sha256: str, resolution: int) -> Path:
    """The sparse SDF file of a shape at a resolution."""
    return out / "sparse_sdf" / f"{sha256}_r{resolution}.npz"


def truth_path(out: Path, sha256: str) -> Path:
    """The cleaned surface of a shape, RAS mm."""
    return out / "meshes" / f"{sha256}.ply"


def mask_path(out: Path, sha256: str) -> Path:
    """The voxels of a shape that came from a label volume, on that volume's grid."""
    return out / "masks" / f"{sha256}.npz"


def source_record_path(out: Path, key: str) -> Path:
    """The record of one source file; `key` is its pseudonym."""
    return out / "records" / "sources" / f"{key}.json"


def sdf_record_path(out: Path, sha256: str, resolution: int) -> Path:
    """The record of one shape at one resolution."""
    return out / "records" / "sdf" / f"{sha256}_r{resolution}.json"


def manifest_path(out: Path, rank: int, world_size: int) -> Path:
    """The record of one rank's part: its sources and settings."""
    return out / "records" / f"run_{rank}_of_{world_size}.json"


def read_record(path: Path) -> dict[str, Any] | None:
    """A record, or None where there is none or it cannot be read (then the work is done again)."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def write_record(path: Path, value: dict[str, Any]) -> None:
    """Write a record, atomically."""
    write_json(path, value)


def manifests(out: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every rank's manifest with its path, in order of rank."""
    found = []
    for path in (out / "records").glob("run_*_of_*.json"):
        value = read_record(path)
        if value is None or not {"rank", "world_size", "sources", *SHARED_BY_RANKS} <= value.keys():
            raise ValueError(f"{path}: not a readable record of a preparation; run that rank again")
        found.append((path, value))
    yield from sorted(found, key=lambda pair: (pair[1]["world_size"], pair[1]["rank"]))


def source_is_current(out: Path, record: dict[str, Any] | None, expected: dict[str, Any], retry_failed: bool) -> bool:
    """Whether a source's record matches the file and the settings, and its surfaces are all there."""
    if record is None or any(record.get(key) != value for key, value in expected.items()):
        return False
    failures = record.get("failures", [])
    if any(retry_failed or not failure["permanent"] for failure in failures):
        return False
    return all(
        _size(truth_path(out, shape["sha256"])) == shape["truth_bytes"]
        and _size(mask_path(out, shape["sha256"])) == shape.get("mask_bytes", 0)
        for shape in record["shapes"]
    )


def sdf_is_current(
    out: Path, record: dict[str, Any] | None, expected: dict[str, Any], sha256: str, resolution: int, retry_failed: bool
) -> bool:
    """Whether a shape's record at a resolution matches the settings and its file is whole (or failed for good)."""
    if record is None or any(record.get(key) != value for key, value in expected.items()):
        return False
    if record.get("failure"):
        return record["failure"]["permanent"] and not retry_failed
    return _size(sdf_path(out, sha256, resolution)) == record["bytes"]


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
