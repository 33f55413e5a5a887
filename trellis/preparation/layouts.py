"""Which files below a folder count: patterns that a user gives, and the layouts of nnU-Net and TotalSegmentator."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

MASKS_FOLDER = "segmentations"
"""A folder of this name holds one mask file per class, as TotalSegmentator writes it."""

NNUNET_LABELS, NNUNET_IMAGES = ("labelsTr", "labelsTs"), ("imagesTr", "imagesTs")
TOTALSEGMENTATOR_IMAGES = ("ct", "mri")

NOT_CHOSEN = "not chosen by --include and --exclude"
NOT_LABELS = f"of nnU-Net datasets, outside {' and '.join(NNUNET_LABELS)}"
NOT_IMAGES = f"of nnU-Net datasets, outside {' and '.join(NNUNET_IMAGES)} (--threshold reads intensities)"
IMAGE_OF_MASKS = f"images called {' or '.join(TOTALSEGMENTATOR_IMAGES)} beside a folder {MASKS_FOLDER}"
MASKS_NOT_IMAGES = "folders of masks (--threshold reads intensities)"
LOOSE_SLICES = "DICOM slices beside a volume file (a series is read where it has a folder to itself)"


def fits(relative: str, pattern: str) -> bool:
    """Whether a path relative to DATA_ROOT, or a folder above it, fits a pattern.

    A pattern with a slash inside is for paths from DATA_ROOT on, one without for any name on the path. `*` stands for
    any characters, slashes too; `?` and `[abc]` for one.
    """
    pattern = pattern.removeprefix("./").strip("/")
    parts = relative.split("/")
    names = ["/".join(parts[: n + 1]) for n in range(len(parts))] if "/" in pattern else parts
    return any(fnmatchcase(name, pattern) for name in names)


def is_chosen(relative: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Whether a path fits one of `include` (any path does where that is empty), and none of `exclude`."""
    wanted = not include or any(fits(relative, pattern) for pattern in include)
    return wanted and not any(fits(relative, pattern) for pattern in exclude)


def check_patterns(name: str, patterns: Iterable[str]) -> tuple[str, ...]:
    """Patterns as a tuple; ValueError for one that is empty or climbs out of DATA_ROOT."""
    patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    for pattern in patterns:
        if not pattern.strip("./") or pattern.startswith(("/", "../")):
            raise ValueError(f"{name} must be a pattern of paths relative to DATA_ROOT, got {pattern!r}")
    return patterns


def is_nnunet(folder: Path) -> bool:
    """Whether a folder is an nnU-Net dataset (or one of the Medical Segmentation Decathlon, which has its layout)."""
    return (folder / "dataset.json").is_file() and (folder / NNUNET_LABELS[0]).is_dir()


def nnunet_case(path: Path, dataset: Path, data_root: Path, *, images: bool) -> str | None:
    """The case that a file of an nnU-Net dataset belongs to; None for what is not of the kind that is read.

    Args:
        dataset: a folder that `is_nnunet`, at or below `data_root`; its path is put before the case in the latter case.
        images: images are read instead of labels; a case's channels (`case_0000.nii.gz`) are one patient.
    """
    if path.relative_to(dataset).parts[0] not in (NNUNET_IMAGES if images else NNUNET_LABELS):
        return None
    case = stem(path)
    if images:
        case = re.sub(r"_\d{4}$", "", case)
    return case if dataset == data_root else f"{dataset.relative_to(data_root).as_posix()}/{case}"


def is_image_of_masks(path: Path) -> bool:
    """Whether a volume is the image that the masks in the folder beside it were drawn on (TotalSegmentator's data)."""
    return stem(path) in TOTALSEGMENTATOR_IMAGES and (path.parent / MASKS_FOLDER).is_dir()


def stem(path: Path) -> str:
    """The name of a source without its format's suffix ("case.01" of "case.01.nii.gz")."""
    from trellis.geometry.volume_readers import is_volume_file, volume_suffix
    from trellis.utils.mesh_utils import mesh_stem

    if path.is_dir():
        return path.name
    return path.name[: -len(volume_suffix(path))] if is_volume_file(path) else mesh_stem(path)
