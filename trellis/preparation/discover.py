"""Finding shapes: meshes and label volumes below DATA_ROOT, and whose they are."""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

MESH, VOLUME = "mesh", "volume"
MASKS_FOLDER = "segmentations"
"""A folder of this name holds one mask file per class, as TotalSegmentator writes it."""

DETACHED_HEADERS = (".mhd", ".nhdr")


@dataclass(frozen=True)
class Source:
    """A file, or a folder of masks or of one DICOM series, that holds shapes.

    Attributes:
        path: where it is; relative: below DATA_ROOT, with forward slashes.
        kind: "mesh" or "volume".
        patient: the patient's name as the folders have it; never written anywhere unless asked for.
        files: what its content is in: the file, its data file where a header stands alone, or a folder's files.
    """

    path: Path
    relative: str
    kind: str
    patient: str
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Discovery:
    """What a search found: sources in order of their relative path, paths that no patient could be read off, and the
    number of other files."""

    sources: list[Source]
    unmatched: list[str]
    others: int


def find_sources(
    data_root: str | Path,
    *,
    patient_regex: str | None = None,
    exclude: str | Path | None = None,
    mask_folders: bool = False,
) -> Discovery:
    """Search a folder recursively for meshes and volumes.

    Args:
        data_root: the folder. Links are followed, each folder once; names that start with a dot are left out.
        patient_regex: searched in the relative path; its group "patient", else its first group, else the match is the
            patient. Without it the first folder below `data_root` is, and a file directly there is its own patient.
        exclude: a folder that is not searched (where the results go).
        mask_folders: read every folder with volumes as one volume with a mask file per class; otherwise only those
            that are called "segmentations".

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
    for folder, files in _walk(root, Path(exclude) if exclude is not None else None):
        masks = mask_folders or folder.name.lower() == MASKS_FOLDER
        found, rest = sources_of_folder(folder, files, masks=masks and folder != root)
        others += rest
        for path, kind, parts in found:
            relative = path.relative_to(root).as_posix()
            patient = _patient(relative, path, pattern)
            if patient is None:
                unmatched.append(relative)
            else:
                sources.append(Source(path, relative, kind, patient, tuple(parts)))
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


def _walk(root: Path, exclude: Path | None) -> list[tuple[Path, list[Path]]]:
    """Each folder with its files, both sorted; every real folder once."""
    seen = {os.path.realpath(root)}
    excluded = os.path.realpath(exclude) if exclude is not None else None
    result: list[tuple[Path, list[Path]]] = []

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
        result.append((Path(folder), [Path(folder, name) for name in sorted(files) if not name.startswith(".")]))
    return result


def sources_of_folder(
    folder: Path, files: list[Path], *, masks: bool
) -> tuple[list[tuple[Path, str, list[Path]]], int]:
    """(path, kind, files) of each source in a folder, and the number of other files.

    Args:
        files: those of the folder that count. masks: its volumes are one mask each, and together one source.
    """
    from trellis.geometry.volume import is_volume_file
    from trellis.utils.mesh_utils import is_mesh_file

    found: list[tuple[Path, str, list[Path]]] = []
    volumes = [path for path in files if is_volume_file(path)]
    rest = [path for path in files if path not in set(volumes)]
    if masks and volumes:
        found.append((folder, VOLUME, volumes))
    else:
        found += [(path, VOLUME, [path, *_data_files(path, rest)]) for path in volumes]
    rest = [path for path in rest if not any(path in parts for _, _, parts in found)]
    slices = [path for path in rest if _is_dicom(path)]
    if slices and not volumes:
        found.append((folder, VOLUME, slices))
    others = 0
    for path in rest:
        if slices and path in slices:
            continue
        if is_mesh_file(path):
            found.append((path, MESH, [path]))
        else:
            others += 1
    return found, others


def _data_files(header: Path, files: list[Path]) -> list[Path]:
    """Files with the voxels of a header that stands alone (.mhd, .nhdr): those of its stem."""
    if header.suffix.lower() not in DETACHED_HEADERS:
        return []
    return [path for path in files if path.name.split(".")[0] == header.stem.split(".")[0]]


def files_of_volume(path: Path) -> tuple[Path, ...]:
    """A volume's file and, where it is only a header, the files beside it that hold its voxels."""
    from trellis.geometry.volume import is_volume_file

    if path.suffix.lower() not in DETACHED_HEADERS:
        return (path,)
    others = sorted(p for p in path.parent.iterdir() if p.is_file() and not p.name.startswith("."))
    return (path, *_data_files(path, [p for p in others if not is_volume_file(p)]))


def _is_dicom(path: Path) -> bool:
    from trellis.geometry.dicom_check import is_dicom

    if path.suffix.lower() not in ("", ".dcm", ".ima"):
        return False
    return is_dicom(path)


def _patient(relative: str, path: Path, pattern: re.Pattern[str] | None) -> str | None:
    if pattern is None:
        first, _, rest = relative.partition("/")
        return first if rest or path.is_dir() else path.name.split(".")[0]
    match = pattern.search(relative)
    if match is None:
        return None
    if "patient" in pattern.groupindex:
        return match["patient"]
    return match[1] if pattern.groups else match[0]
