"""What every volume reader returns, and the checks that they share."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

MAX_VOXELS = 1 << 31
"""Most voxels of a volume that is read (2048 x 1024 x 1024)."""
CONFLICT_MM = 1e-3
"""Distance from which on two disagreeing geometries of one header are reported."""
DEFLATE_MAX_RATIO = 1032
"""Deflate cannot pack better than this, so a header that announces more bytes than that is wrong."""


CONSTANT_RATIO, SURELY_LARGE_BYTES = 1000, 256 << 20
"""Voxels of this many bytes that are packed more than this are one value everywhere: a bomb, no segmentation."""


def check_packing(needed: int, held: int) -> None:
    """ValueError for `held` bytes that cannot hold `needed` bytes of voxels, or nothing but one value."""
    if needed > held * DEFLATE_MAX_RATIO:
        raise ValueError(f"its header announces {needed} bytes of voxels, and the file has {held}: truncated")
    if needed > SURELY_LARGE_BYTES and needed > held * CONSTANT_RATIO:
        raise ValueError(f"{held} bytes that unpack to {needed} are one value everywhere: not unpacked")


@dataclass(frozen=True)
class RawVolume:
    """A volume as its file has it.

    Attributes:
        data: [X, Y, Z], any numeric dtype; with several frames or layers [X, Y, Z, L].
        affine: [4, 4] float64, voxel index to RAS mm; None where the file has no spacing.
        pose: [4, 4] float64, directions of the voxel axes (of any length) and origin in RAS mm, for a file that has
            these but no spacing.
        names: per layer, label value -> name; empty where the file names none.
        notes: what a user should know about the header, in words.
    """

    data: np.ndarray
    affine: np.ndarray | None
    names: tuple[dict[int, str], ...] = ()
    notes: tuple[str, ...] = ()
    pose: np.ndarray = field(default_factory=lambda: np.eye(4))

    def affine_with(self, spacing_mm: object) -> np.ndarray:
        """[4, 4] float64: the pose with a spacing [3] in mm along the array axes."""
        affine = self.pose.copy()
        affine[:3, :3] *= check_spacing(spacing_mm) / np.linalg.norm(affine[:3, :3], axis=0)
        return check_affine(affine)


def check_size(shape: tuple[int, ...]) -> None:
    """ValueError for a volume without voxels or with more than MAX_VOXELS."""
    if any(n <= 0 for n in shape):
        raise ValueError(f"every axis needs at least one voxel, got shape {list(shape)}")
    total = 1
    for n in shape:
        total *= int(n)  # Python integers: header values can overflow int64
    if total > MAX_VOXELS:
        raise ValueError(f"a volume may have at most {MAX_VOXELS} voxels, got shape {list(shape)}")


def frames_last(shape: tuple[int, ...]) -> tuple[int, ...]:
    """[X, Y, Z] or [X, Y, Z, L] for a header's shape; trailing axes of length 1 are dropped.

    Raises:
        ValueError: fewer than three axes, or more than one axis of frames.
    """
    if len(shape) < 3:
        raise ValueError(f"three axes are needed, got shape {list(shape)}")
    check_size(shape)
    frames = [n for n in shape[3:] if n != 1]
    if len(frames) > 1:
        raise ValueError(f"one 3D volume is needed, got shape {list(shape)}")
    return (*shape[:3], *frames)


def check_affine(affine: np.ndarray) -> np.ndarray:
    """The affine as [4, 4] float64; ValueError unless it is finite, invertible and ends in 0 0 0 1."""
    affine = np.asarray(affine)
    if affine.dtype.kind not in "iuf":
        raise ValueError(f"the affine must be numbers, got dtype {affine.dtype}")
    affine = affine.astype(np.float64)
    if affine.shape != (4, 4):
        raise ValueError(f"the affine must be [4, 4], got {list(affine.shape)}")
    if not np.isfinite(affine).all():
        raise ValueError("the affine must be finite, got NaN or infinity")
    if not np.array_equal(affine[3], [0, 0, 0, 1]):
        raise ValueError(f"the last row of the affine must be 0 0 0 1, got {affine[3].tolist()}")
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if lengths.min() <= 0 or lengths.max() > 1e6:
        raise ValueError(f"voxel spacing must be above 0 and at most 1e6 mm, got {lengths.tolist()}")
    if abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-6:
        raise ValueError("the voxel axes must not lie in one plane: the affine cannot be inverted")
    return affine


def check_spacing(spacing_mm: object) -> np.ndarray:
    """The spacing as [3] float64; ValueError unless it is three positive numbers."""
    spacing = np.asarray(spacing_mm)
    if spacing.shape != (3,) or spacing.dtype.kind not in "iuf":
        raise ValueError(f"spacing_mm must be three numbers, got {spacing_mm!r}")
    if not np.isfinite(spacing).all() or (spacing <= 0).any():
        raise ValueError(f"spacing_mm must be positive, got {spacing.tolist()}")
    return spacing.astype(np.float64)


def affine_from_spacing(spacing_mm: object) -> np.ndarray:
    """[4, 4] float64: index 0 at the origin, axes as RAS."""
    return check_affine(np.diag([*check_spacing(spacing_mm), 1.0]))
