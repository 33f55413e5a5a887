"""Finding shapes: meshes and label volumes below DATA_ROOT, and whose they are."""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

MESH, VOLUME = "mesh", "volume"


@dataclass(frozen=True)
class Source:
    """A file that holds shapes.

    Attributes:
        path: where it is; relative: below DATA_ROOT, with forward slashes.
        kind: "mesh" or "volume".
        patient: the patient's name as the folders have it; never written anywhere unless asked for.
    """

    path: Path
    relative: str
    kind: str
    patient: str


@dataclass(frozen=True)
class Discovery:
    """What a search found: sources in order of their relative path, paths that no patient could be read off, and the
    number of other files."""

    sources: list[Source]
    unmatched: list[str]
    others: int


def find_sources(
    data_root: str | Path, *, patient_regex: str | None = None, exclude: str | Path | None = None
) -> Discovery:
    """Search a folder recursively for meshes and volumes.

    Args:
        data_root: the folder. Links are followed, each folder once; names that start with a dot are left out.
        patient_regex: searched in the relative path; its group "patient", else its first group, else the match is the
            patient. Without it the first folder below `data_root` is, and a file directly there is its own patient.
        exclude: a folder that is not searched (where the results go).

    Raises:
        ValueError: no such folder, a bad expression, or neither mesh nor volume there.
    """
    root = Path(data_root)
    if not root.is_dir():
        raise ValueError(f"{root}: DATA_ROOT must be a folder")
    try:
        pattern = re.compile(patient_regex) if patient_regex is not None else None
    except re.error as error:
        raise ValueError(f"patient_regex must be a regular expression, got {patient_regex!r}: {error}") from None
    sources, unmatched, others = [], [], 0
    for path in _walk(root, Path(exclude) if exclude is not None else None):
        kind = _kind(path)
        relative = path.relative_to(root).as_posix()
        if kind is None:
            others += 1
            continue
        patient = _patient(relative, path, pattern)
        if patient is None:
            unmatched.append(relative)
        else:
            sources.append(Source(path, relative, kind, patient))
    if not sources and not unmatched:
        raise ValueError(f"{root}: neither a mesh nor a label volume is below this folder ({others} other files)")
    direct = sum("/" not in source.relative and source.kind == MESH for source in sources)
    if direct and pattern is None:
        logger.warning(
            "%d meshes lie directly in DATA_ROOT: each counts as a patient, and its name becomes its label. Put them "
            "into a folder per patient, or give a patient regex, if that is not so or if the names identify people",
            direct,
        )
    if others:
        logger.info("%d files below DATA_ROOT are neither meshes nor volumes", others)
    return Discovery(sorted(sources, key=lambda source: source.relative), sorted(unmatched), others)


def _walk(root: Path, exclude: Path | None) -> list[Path]:
    seen = {os.path.realpath(root)}
    excluded = os.path.realpath(exclude) if exclude is not None else None
    paths: list[Path] = []

    def unreadable(error: OSError) -> None:
        raise ValueError(f"{error.filename}: the folder cannot be read: {error.strerror}")

    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=unreadable):
        kept = []
        for name in sorted(subfolders):
            real = os.path.realpath(os.path.join(folder, name))
            if not name.startswith(".") and real not in seen and real != excluded:
                seen.add(real)
                kept.append(name)
        subfolders[:] = kept
        paths.extend(Path(folder, name) for name in sorted(files) if not name.startswith("."))
    return paths


def _kind(path: Path) -> str | None:
    from trellis.geometry.volume import is_volume_file
    from trellis.utils.mesh_utils import is_mesh_file

    if is_volume_file(path):
        return VOLUME
    return MESH if is_mesh_file(path) else None


def _patient(relative: str, path: Path, pattern: re.Pattern[str] | None) -> str | None:
    if pattern is None:
        first, _, rest = relative.partition("/")
        return first if rest else path.name.split(".")[0]
    match = pattern.search(relative)
    if match is None:
        return None
    if "patient" in pattern.groupindex:
        return match["patient"]
    return match[1] if pattern.groups else match[0]
