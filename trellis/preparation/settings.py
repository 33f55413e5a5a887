"""Settings of a preparation, and the hash by which finished work is recognised."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass

from trellis.preparation.frames import parse_frame
from trellis.utils.blocks import BAND_VOXELS, check_resolution

PREP_VERSION = 6
"""Raised whenever the same settings give other files, so that old ones are made anew."""

MESH_SPACES = ("LPS", "RAS")
NESTED = ("cavity", "solid")


@dataclass(frozen=True)
class PrepareSettings:
    """What decides the content of prepared files.

    Attributes:
        resolutions: voxels per side, ascending.
        band_voxels: half-width of the stored band, in voxels.
        mesh_space: "LPS" or "RAS", the space of mesh files that do not say theirs.
        max_hole_mm: widest hole that is closed in a surface; None for the library's default.
        nested: what a closed surface inside another means, "cavity" or "solid".
        labels: label numbers or names that are kept, None for all.
        schema: of the npz files, 2 or 1.
        spacing_mm: voxel spacing of volumes that have none. threshold: "LOW" or "LOW:HIGH", volumes are intensities and
            give one shape, called `threshold_label`. min_component_ml: smaller components of labels are removed.
        frame: "shape", "patient" or "fixed-mm:SIZE", the cube of each shape.
        device: where distances are computed, "cpu" or "cuda"; does not change the files.
    """

    resolutions: tuple[int, ...] = (64, 512, 1024)
    band_voxels: int = BAND_VOXELS
    mesh_space: str = "LPS"
    max_hole_mm: float | None = None
    nested: str = "cavity"
    labels: tuple[str, ...] | None = None
    schema: int = 2
    spacing_mm: tuple[float, float, float] | None = None
    threshold: str | None = None
    threshold_label: str = "threshold"
    min_component_ml: float = 0.0
    frame: str = "shape"
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not self.resolutions:
            raise ValueError("resolutions must name at least one, got none")
        object.__setattr__(self, "resolutions", tuple(sorted({check_resolution(r) for r in self.resolutions})))
        if self.labels is not None:
            object.__setattr__(self, "labels", tuple(sorted({str(label) for label in self.labels})))
            if not self.labels:
                raise ValueError("labels must name at least one label, or be left out for all of them")
        if not 1 <= self.band_voxels <= 32 or int(self.band_voxels) != self.band_voxels:
            raise ValueError(f"band_voxels must be a whole number from 1 to 32, got {self.band_voxels}")
        if self.max_hole_mm is not None and not self.max_hole_mm >= 0:
            raise ValueError(f"max_hole_mm must be at least 0, got {self.max_hole_mm}")
        for name, value, allowed in (
            ("mesh_space", self.mesh_space, MESH_SPACES),
            ("nested", self.nested, NESTED),
            ("schema", self.schema, (1, 2)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r}")
        parse_frame(self.frame)
        self._check_volume_options()
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"device must be cpu, cuda or cuda:N, got {self.device!r}")

    def _check_volume_options(self) -> None:
        if not 0 <= self.min_component_ml < math.inf:
            raise ValueError(f"min_component_ml must be at least 0, got {self.min_component_ml}")
        if self.spacing_mm is not None:
            spacing = tuple(float(value) for value in self.spacing_mm)
            if len(spacing) != 3 or not all(0 < value < math.inf for value in spacing):
                raise ValueError(f"spacing_mm must be three numbers above 0, got {self.spacing_mm}")
            object.__setattr__(self, "spacing_mm", spacing)
        if self.threshold is not None:
            from trellis.geometry.volume import parse_threshold

            parse_threshold(self.threshold)
        if not self.threshold_label.strip():
            raise ValueError("threshold_label must not be empty")

    @property
    def prep_hash(self) -> str:
        """16 hexadecimal digits over every setting that changes a shape's files."""
        facts = {key: value for key, value in asdict(self).items() if key not in ("resolutions", "labels", "device")}
        text = json.dumps({"version": PREP_VERSION, **facts}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]
