"""Files of a prepared folder that no present shape owns: counted, and removed on request."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from trellis.preparation import records

_SDF_NAME = re.compile(r"([0-9a-f]{64})_r(\d+)\.(?:npz|json)")
_TRUTH_NAME = re.compile(r"([0-9a-f]{64})\.(?:ply|npz)")


def stale_files(out: Path, source_keys: Sequence[str], patients: dict[str, str], prep_hash: str) -> Iterator[Path]:
    """Files below OUT that belong to sources, shapes or settings which are not present any more.

    Args:
        source_keys: of the present sources. patients: sha256 of each present shape to its patient id.
        prep_hash: of the present settings; files of other resolutions with the same hash are kept.
    """
    keys = set(source_keys)
    for path in sorted((out / "records" / "sources").glob("*.json")):
        if path.stem not in keys:
            yield path
    for path in sorted([*(out / "meshes").glob("*.ply"), *(out / "masks").glob("*.npz")]):
        match = _TRUTH_NAME.fullmatch(path.name)
        if match and match[1] not in patients:
            yield path
    for path in sorted([*(out / "sparse_sdf").glob("*.npz"), *(out / "records" / "sdf").glob("*.json")]):
        match = _SDF_NAME.fullmatch(path.name)
        if match:
            record = records.read_record(records.sdf_record_path(out, match[1], int(match[2]))) or {}
            owner = patients.get(match[1])
            if owner is None or record.get("prep_hash") != prep_hash or record.get("patient_id") != owner:
                yield path


def prune(out: Path, source_keys: Sequence[str], patients: dict[str, str], prep_hash: str, *, remove: bool) -> int:
    """Number of stale files, which are removed if `remove` is true."""
    paths = list(stale_files(out, source_keys, patients, prep_hash))
    if remove:
        for path in paths:
            path.unlink(missing_ok=True)
    return len(paths)
