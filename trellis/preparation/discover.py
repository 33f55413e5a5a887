"""Finding shapes: meshes and label volumes below DATA_ROOT, and whose they are."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from trellis.preparation import layouts
from trellis.preparation.layouts import MASKS_FOLDER, check_patterns, fits, is_chosen, is_nnunet, nnunet_case, stem

logger = logging.getLogger(__name__)

MESH, VOLUME = "mesh", "volume"

NAMING_VOLUMES = (".mhd", ".mha", ".nhdr", ".nrrd")
"""Volumes whose header may name another file that holds the voxels."""


@dataclass(frozen=True)
class Source:
    """A file, or a folder of masks or of one DICOM series, that holds shapes.

    Attributes:
        path: where it is; relative: below DATA_ROOT, with forward slashes.
        kind: "mesh" or "volume".
        patient: the patient's name as the folders have it; never written anywhere unless asked for.
        files: what its content is in: the file and those that it names for its numbers, or a folder's files and theirs.
    """

    path: Path
    relative: str
    kind: str
    patient: str
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Discovery:
    """What a search found.

    Attributes:
        sources: in order of their relative path. unmatched: relative paths that no patient could be read off.
        others: number of files that are neither meshes nor volumes.
        left_out: reason -> number of meshes, volumes or slices that are there and are not read.
        unused: patterns that fit nothing, as "--include PATTERN".
    """

    sources: list[Source]
    unmatched: list[str]
    others: int
    left_out: Mapping[str, int] = field(default_factory=dict)
    unused: tuple[str, ...] = ()


def find_sources(
    data_root: str | Path,
    *,
    patient_regex: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    mask_folders: bool = False,
    images: bool = False,
    skip_folder: str | Path | None = None,
) -> Discovery:
    """Search a folder recursively for meshes and volumes.

    An nnU-Net dataset (`layouts.is_nnunet`) at or below it gives its label volumes alone, and its cases are the
    patients; TotalSegmentator's images beside its masks are left out.

    Args:
        data_root: the folder. Links are followed, each folder once; names that start with a dot are left out.
        patient_regex: searched in the relative path; its group "patient", else its first group, else the match is the
            patient. Without it the first folder below `data_root` is, and a file directly there is its own patient.
        include, exclude: patterns of relative paths, see `layouts.fits`; a folder of masks or slices is taken or left
            as a whole.
        mask_folders: read every folder with volumes as one volume with a mask file per class; otherwise only those
            that are called "segmentations".
        images: intensities are wanted, not labels: of nnU-Net's folders the images, and no masks.
        skip_folder: a folder that is not searched (where the results go).

    Raises:
        ValueError: no such folder, a bad expression or pattern, or nothing there that counts.
    """
    root = Path(data_root)
    if not root.is_dir():
        raise ValueError(f"{root}: DATA_ROOT must be a folder")
    try:
        pattern = re.compile(patient_regex) if patient_regex is not None else None
    except re.error as error:
        raise ValueError(f"patient_regex must be a regular expression, got {patient_regex!r}: {error}") from None
    include, exclude = check_patterns("include", include), check_patterns("exclude", exclude)
    sources, unmatched, others = [], [], 0
    left_out: Counter[str] = Counter()
    unused = {f"--{name} {one}": one for name, given in (("include", include), ("exclude", exclude)) for one in given}
    datasets: set[Path] = set()
    for folder, files in _walk(root, Path(skip_folder) if skip_folder is not None else None):
        if is_nnunet(folder):
            datasets.add(folder)
        dataset = next((path for path in (folder, *folder.parents) if path in datasets), None)
        masks = folder != root and dataset is None and (mask_folders or folder.name.lower() == MASKS_FOLDER)
        here = sources_of_folder(folder, files, masks=masks)
        others += here.others
        left_out[layouts.LOOSE_SLICES] += here.loose_slices
        for path, kind, parts in here.found:
            relative = path.relative_to(root).as_posix()
            unused = {name: one for name, one in unused.items() if not fits(relative, one)}
            case = None if dataset is None else nnunet_case(path, dataset, root, images=images)
            if not is_chosen(relative, include, exclude):
                left_out[layouts.NOT_CHOSEN] += 1
            elif dataset is not None and case is None:
                left_out[layouts.NOT_IMAGES if images else layouts.NOT_LABELS] += 1
            elif images and masks and path == folder:
                left_out[layouts.MASKS_NOT_IMAGES] += 1
            elif not images and kind == VOLUME and layouts.is_image_of_masks(path):
                left_out[layouts.IMAGE_OF_MASKS] += 1
            else:
                patient = case if case is not None and pattern is None else _patient(relative, path, pattern)
                if patient is None:
                    unmatched.append(relative)
                else:
                    sources.append(Source(path, relative, kind, patient, tuple(parts)))
    left_out = +left_out
    if not sources and not unmatched:
        reasons = "".join(f"; {count} left out: {reason}" for reason, count in left_out.items())
        raise ValueError(
            f"{root}: neither a mesh nor a label volume to read is below this folder ({others} other files{reasons})"
        )
    direct = sum(_is_its_patient(source) for source in sources)
    if direct:
        logger.warning(
            "%d meshes lie directly in DATA_ROOT and are their patients' by their whole name, which becomes their "
            "label. Put them into a folder per patient, or give a patient regex that fits a part of the name, if that "
            "is not so or if the names identify people",
            direct,
        )
    if others:
        logger.info("%d files below DATA_ROOT are neither meshes nor volumes", others)
    return Discovery(
        sorted(sources, key=lambda source: source.relative), sorted(unmatched), others, dict(left_out), tuple(unused)
    )


def _is_its_patient(source: Source) -> bool:
    """Whether a mesh lies directly in DATA_ROOT and its whole name is its patient's."""
    from trellis.utils.mesh_utils import mesh_stem

    return (
        source.kind == MESH
        and "/" not in source.relative
        and source.patient in (mesh_stem(source.path), source.relative)
    )


def _walk(root: Path, skipped: Path | None) -> list[tuple[Path, list[Path]]]:
    """Each folder with its files, both sorted; every real folder once."""
    seen = {os.path.realpath(root)}
    excluded = os.path.realpath(skipped) if skipped is not None else None
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


class FolderContent(NamedTuple):
    """(path, kind, files) of each source in a folder, the number of DICOM slices that are none because volume files lie
    beside them, and the number of other files."""

    found: list[tuple[Path, str, list[Path]]]
    loose_slices: int
    others: int


def sources_of_folder(folder: Path, files: list[Path], *, masks: bool) -> FolderContent:
    """What lies in a folder itself.

    Args:
        files: those of the folder that count. masks: its volumes are one mask each, and together one source.
    """
    from trellis.geometry.volume import is_volume_file
    from trellis.utils.mesh_utils import is_mesh_file

    volumes = [path for path in files if is_volume_file(path)]
    rest = [path for path in files if not is_volume_file(path)]
    found: list[tuple[Path, str, list[Path]]] = []
    if masks and volumes:
        content = dict.fromkeys(part for path in volumes for part in files_of_volume(path))
        found.append((folder, VOLUME, list(content)))
    else:
        found += [(path, VOLUME, list(files_of_volume(path))) for path in volumes]
    meshes = {path: files_of_mesh(path) for path in rest if is_mesh_file(path)}
    data = {part for _, _, parts in found for part in parts}.union(*(parts[1:] for parts in meshes.values()))
    slices, others = [], 0
    for path in rest:
        if path in data:
            continue
        if path in meshes:
            found.append((path, MESH, list(meshes[path])))
        elif is_dicom_slice(path):
            slices.append(path)
        else:
            others += 1
    if slices and not volumes:
        found.append((folder, VOLUME, slices))
    return FolderContent(found, len(slices) if volumes else 0, others)


def files_of_volume(path: Path) -> tuple[Path, ...]:
    """A volume's file and, where its header names another one for the voxels, that one; reading says what is wrong."""
    from trellis.geometry.volume_itk import named_data_file

    if path.suffix.lower() not in NAMING_VOLUMES:
        return (path,)
    try:
        named = named_data_file(path)
    except OSError:
        named = None
    return (path,) if named is None else (path, named)


def files_of_mesh(path: Path) -> tuple[Path, ...]:
    """A mesh's file and, of a .gltf, the files that it names for its numbers; reading says what is wrong."""
    from trellis.utils.mesh_readers import named_gltf_files

    if path.suffix.lower() != ".gltf":
        return (path,)
    try:
        return (path, *named_gltf_files(path))
    except OSError:
        return (path,)


def is_dicom_slice(path: Path) -> bool:
    """Whether a file is DICOM by its first bytes, whatever its suffix (archives name slices by UID), and no index."""
    from trellis.geometry.dicom_check import is_dicom

    return path.name.upper() != "DICOMDIR" and is_dicom(path)


def _patient(relative: str, path: Path, pattern: re.Pattern[str] | None) -> str | None:
    if pattern is None:
        first, _, rest = relative.partition("/")
        return first if rest or path.is_dir() else stem(path)
    match = pattern.search(relative)
    if match is None:
        return None
    if "patient" in pattern.groupindex:
        return match["patient"]
    return match[1] if pattern.groups else match[0]
