"""A small cohort of made-up subjects: smooth variations of the MNI152 tissue maps and fsaverage5 surfaces.

Nothing here is a patient. Each subject is one random diffeomorphism applied to templates that nilearn carries inside
its own package, so that a whole preparation, training and evaluation can be shown without a download.
"""

from __future__ import annotations

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trellis.preparation.execution import default_workers
from trellis.utils.io_utils import atomic_write, write_json

logger = logging.getLogger(__name__)

DESCRIPTION = (
    "Smooth random diffeomorphic variations of templates: the MNI152 2009a grey and white matter maps (label volumes) "
    "and the fsaverage5 pial and white surfaces, as bundled with nilearn. No subject is a person."
)
TISSUE_NAMES = {1: "grey_matter", 2: "white_matter"}
SURFACE_NAMES = ("pial_left", "pial_right", "white_left", "white_right")
VOLUME_NAME, TABLE_NAME = "tissue", "dataset.json"
MAX_DRAWS = 20
_GRID_MM = 4.0
_MARGIN_MM = 24.0
_SQUARINGS = 6


@dataclass(frozen=True)
class CohortSettings:
    """What a cohort is made from; the same settings give the same files.

    Attributes:
        subjects: number of subjects.
        seed: of the random fields; subject i depends on (seed, i) alone.
        rms_mm: root mean square length of the displacement over the template's brain voxels, in mm.
        smoothness_mm: standard deviation of the Gaussian that smooths the velocity noise, in mm.
        min_jacobian: smallest Jacobian determinant that a subject may have; a field below it is drawn again.
        spacing_mm: voxel edge of the label volumes, in whole mm.
    """

    subjects: int = 28
    seed: int = 0
    rms_mm: float = 4.0
    smoothness_mm: float = 18.0
    min_jacobian: float = 0.2
    spacing_mm: int = 2

    def __post_init__(self) -> None:
        for name in ("subjects", "rms_mm", "smoothness_mm", "spacing_mm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        if not 0 < self.min_jacobian < 1:
            raise ValueError(f"min_jacobian must lie between 0 and 1, got {self.min_jacobian}")
        if self.smoothness_mm < 2 * _GRID_MM:
            raise ValueError(
                f"smoothness_mm must be at least {2 * _GRID_MM} (the field's grid is {_GRID_MM} mm), "
                f"got {self.smoothness_mm}"
            )


@dataclass(frozen=True)
class SubjectReport:
    """Facts of one subject's deformation: displacement in mm over the brain, smallest Jacobian determinant, draws."""

    name: str
    rms_mm: float
    max_mm: float
    smallest_jacobian: float
    draws: int


@dataclass(frozen=True)
class Diffeomorphism:
    """A smooth map of the world and its inverse, as displacements on a regular RAS-aligned grid.

    Attributes:
        origin_mm: [3] world position of grid node (0, 0, 0).
        spacing_mm: distance of nodes in mm.
        forward, inverse: [3, X, Y, Z] float64 displacements in mm.
    """

    origin_mm: np.ndarray
    spacing_mm: float
    forward: np.ndarray
    inverse: np.ndarray

    def _move(self, displacement: np.ndarray, points: np.ndarray) -> np.ndarray:
        return points + _sample((np.asarray(points, np.float64) - self.origin_mm).T / self.spacing_mm, displacement).T

    def apply(self, points: np.ndarray) -> np.ndarray:
        """World points [N, 3] in mm where the map takes them."""
        return self._move(self.forward, points)

    def apply_inverse(self, points: np.ndarray) -> np.ndarray:
        """World points [N, 3] in mm that the map takes to `points`, up to the integration error."""
        return self._move(self.inverse, points)

    def jacobian(self) -> np.ndarray:
        """[X, Y, Z] float64 Jacobian determinant of the forward map at the nodes, by central differences."""
        gradient = np.stack([np.stack(np.gradient(d, self.spacing_mm), axis=-1) for d in self.forward], axis=-2)
        return np.linalg.det(gradient + np.eye(3))


def _sample(index: np.ndarray, field: np.ndarray) -> np.ndarray:
    """Trilinear values [C, ...] of `field` [C, X, Y, Z] at fractional node indices [3, ...]."""
    from scipy.ndimage import map_coordinates

    return np.stack([map_coordinates(channel, index, order=1, mode="nearest") for channel in field])


def integrate_velocity(velocity: np.ndarray, spacing_mm: float, squarings: int = _SQUARINGS) -> np.ndarray:
    """Displacement exp(v) - id of a stationary velocity field, by scaling and squaring.

    The start is one Euler step of v / 2^squarings; each squaring composes the map with itself (Arsigny et al., A
    Log-Euclidean Framework for Statistics on Diffeomorphisms, MICCAI 2006).

    Args:
        velocity: [3, X, Y, Z] float64 in mm per unit of time.

    Returns:
        [3, X, Y, Z] float64 displacement in mm at time 1.
    """
    nodes = np.stack(np.meshgrid(*(np.arange(n, dtype=np.float64) for n in velocity.shape[1:]), indexing="ij"))
    displacement = velocity / 2**squarings
    for _ in range(squarings):
        displacement = displacement + _sample(nodes + displacement / spacing_mm, displacement)
    return displacement


def random_diffeomorphism(
    rng: np.random.Generator, brain_mm: np.ndarray, *, rms_mm: float, smoothness_mm: float
) -> Diffeomorphism:
    """A random smooth map whose displacement has the RMS length `rms_mm` over the points `brain_mm`.

    Args:
        rng: source of the velocity noise.
        brain_mm: [N, 3] world points in mm.
    """
    from scipy.ndimage import gaussian_filter

    origin = brain_mm.min(axis=0) - _MARGIN_MM
    shape = np.ceil((brain_mm.max(axis=0) + _MARGIN_MM - origin) / _GRID_MM).astype(int) + 1
    noise = rng.standard_normal((3, *shape))
    velocity = np.stack([gaussian_filter(c, smoothness_mm / _GRID_MM, mode="reflect") for c in noise])
    index = (brain_mm - origin).T / _GRID_MM

    def rms(field: np.ndarray) -> float:
        return float(np.sqrt((_sample(index, field) ** 2).sum(axis=0).mean()))

    velocity *= rms_mm / rms(velocity)
    forward = integrate_velocity(velocity, _GRID_MM)
    for _ in range(4):  # exp is not linear: a few steps of fixed-point iteration bring the RMS to four digits
        velocity *= rms_mm / rms(forward)
        forward = integrate_velocity(velocity, _GRID_MM)
        if abs(rms(forward) / rms_mm - 1) < 1e-4:
            break
    return Diffeomorphism(origin, _GRID_MM, forward, integrate_velocity(-velocity, _GRID_MM))


@dataclass(frozen=True)
class Templates:
    """The undeformed anatomy.

    Attributes:
        probability: [2, X, Y, Z] float32 maps of grey and white matter.
        affine: [4, 4] float64, voxel to RAS mm.
        brain_mm: [N, 3] float64 world positions of a sample of the tissue voxels.
        distance_mm: [X, Y, Z] float64 distance to the nearest voxel with any tissue probability.
        surfaces: name -> (vertices [V, 3] float64 RAS mm, faces [F, 3] int64).
    """

    probability: np.ndarray
    affine: np.ndarray
    brain_mm: np.ndarray
    distance_mm: np.ndarray
    surfaces: dict[str, tuple[np.ndarray, np.ndarray]]


def load_templates(spacing_mm: int = 2) -> Templates:
    """Read the MNI152 tissue maps, resampled to `spacing_mm`, and the fsaverage5 surfaces; no network is used."""
    try:
        import nibabel as nib
        from nilearn import datasets
        from scipy.ndimage import distance_transform_edt
    except ImportError as error:
        raise ValueError(f"nilearn is needed: pip install 'trellis-vqvae[quickstart]' ({error})") from None

    grey = datasets.load_mni152_gm_template(resolution=spacing_mm)
    white = datasets.load_mni152_wm_template(resolution=spacing_mm)
    probability = np.stack([np.asarray(image.dataobj, dtype=np.float32) for image in (grey, white)])
    affine = np.asarray(grey.affine, dtype=np.float64)
    # the templates end a voxel below the brain: room on every side keeps moved tissue off the volume's border
    pad = int(np.ceil(_MARGIN_MM / 2 / spacing_mm))
    probability = np.pad(probability, ((0, 0), *((pad, pad),) * 3))
    affine[:3, 3] -= affine[:3, :3] @ np.full(3, pad)
    brain = np.argwhere(_labels_of(probability) > 0)[::7]  # every 7th voxel: enough for an RMS
    distance_mm = distance_transform_edt(probability.sum(axis=0) == 0, sampling=np.linalg.norm(affine[:3, :3], axis=0))
    files = datasets.fetch_surf_fsaverage("fsaverage5")
    surfaces = {}
    for name in SURFACE_NAMES:
        vertices, faces = nib.load(files[name]).agg_data()
        surfaces[name] = (np.asarray(vertices, np.float64), np.asarray(faces, np.int64))
    return Templates(probability, affine, brain @ affine[:3, :3].T + affine[:3, 3], distance_mm, surfaces)


def _labels_of(probability: np.ndarray) -> np.ndarray:
    """[X, Y, Z] uint8 labels: 1 grey, 2 white, 0 where the two together are below one half."""
    grey, white = probability
    return np.where(grey + white > 0.5, np.where(white > grey, 2, 1), 0).astype(np.uint8)


def _without_specks(labels: np.ndarray, smallest_voxels: int) -> np.ndarray:
    """Labels whose face-connected components below `smallest_voxels` are joined to the other tissue around them."""
    from scipy import ndimage

    result = labels.copy()
    for label, other in ((1, 2), (2, 1)):
        components, count = ndimage.label(labels == label)
        size = np.bincount(components.ravel(), minlength=count + 1)
        small = (size < smallest_voxels)[components] & (components > 0)
        beside_other = ndimage.maximum_filter(labels == other, size=3)
        result[small] = np.where(beside_other[small], other, 0)
    return result


def deform_labels(templates: Templates, warp: Diffeomorphism) -> np.ndarray:
    """[X, Y, Z] uint8 label volume of the deformed templates: probabilities pulled back, then the likelier tissue."""
    # tissue cannot come from further away than the longest displacement
    reach = float(np.linalg.norm(warp.inverse, axis=0).max()) + warp.spacing_mm
    voxels = np.argwhere(templates.distance_mm <= reach)
    world = voxels @ templates.affine[:3, :3].T + templates.affine[:3, 3]
    back = np.linalg.inv(templates.affine)
    source = warp.apply_inverse(world) @ back[:3, :3].T + back[:3, 3]
    probability = np.zeros_like(templates.probability)
    probability[:, voxels[:, 0], voxels[:, 1], voxels[:, 2]] = _sample(source.T, templates.probability)
    voxel_ml = abs(np.linalg.det(templates.affine[:3, :3])) / 1000
    # thresholded probability maps leave specks of a few voxels that are no anatomy
    return _without_specks(_labels_of(probability), max(1, round(0.25 / voxel_ml)))


def draw_subject(templates: Templates, settings: CohortSettings, index: int) -> tuple[Diffeomorphism, SubjectReport]:
    """The deformation of subject `index` (from 0), drawn again while its smallest Jacobian is too small.

    Raises:
        ValueError: no field of these settings passes; asks for a smaller displacement or a smoother field.
    """
    smallest = -np.inf
    for draw in range(MAX_DRAWS):
        rng = np.random.default_rng([settings.seed, index, draw])
        warp = random_diffeomorphism(
            rng, templates.brain_mm, rms_mm=settings.rms_mm, smoothness_mm=settings.smoothness_mm
        )
        smallest = float(warp.jacobian().min())
        if smallest > settings.min_jacobian:
            length = np.linalg.norm(warp.apply(templates.brain_mm) - templates.brain_mm, axis=1)
            rms = float(np.sqrt((length**2).mean()))
            return warp, SubjectReport(_name(index), rms, float(length.max()), smallest, draw + 1)
    raise ValueError(
        f"no smooth field of {settings.rms_mm} mm RMS and smoothness {settings.smoothness_mm} mm has a smallest "
        f"Jacobian above {settings.min_jacobian} in {MAX_DRAWS} draws (last: {smallest:.3f}): "
        "choose a smaller displacement or a smoother field"
    )


def write_subject(folder: Path, templates: Templates, warp: Diffeomorphism) -> None:
    """Write one subject: `tissue.nii.gz` with labels 1 and 2, and one `.stl` a surface."""
    import gzip

    import nibabel as nib

    from trellis.utils.mesh_utils import write_mesh

    image = nib.Nifti1Image(deform_labels(templates, warp), templates.affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(templates.affine, code=2)
    image.set_qform(templates.affine, code=2)
    with atomic_write(folder / f"{VOLUME_NAME}.nii.gz") as stream:
        stream.write(gzip.compress(image.to_bytes(), compresslevel=6, mtime=0))
    for name, (vertices, faces) in templates.surfaces.items():
        write_mesh(folder / f"{name}.stl", warp.apply(vertices), faces)


def _expected_files(folder: Path) -> list[Path]:
    return [folder / f"{VOLUME_NAME}.nii.gz", *(folder / f"{name}.stl" for name in SURFACE_NAMES)]


def build_cohort(out_dir: str | Path, settings: CohortSettings, *, workers: int | None = None) -> list[SubjectReport]:
    """Write the cohort `out_dir/subject_01/...`; subjects that are there from the same settings are left alone.

    `out_dir/dataset.json` names the labels, as nnU-Net's does. `out_dir/../cohort.json` records the settings and each
    subject's figures, and is what a second run looks at.

    Args:
        workers: subjects made at a time; None for `default_workers()`. The files do not depend on it.

    Raises:
        ValueError: `out_dir` holds a cohort of other settings, or files that no record explains.
    """
    out_dir = Path(out_dir)
    record_path = out_dir.parent / "cohort.json"
    done = _read_record(record_path, settings)
    if not record_path.exists() and out_dir.is_dir() and any(out_dir.iterdir()):
        raise ValueError(f"{out_dir}: must be empty or hold a cohort with its record {record_path.name}")
    labels = {"background": 0, **{name: label for label, name in TISSUE_NAMES.items()}}
    write_json(out_dir / TABLE_NAME, {"description": DESCRIPTION, "labels": labels})
    names = [_name(index) for index in range(settings.subjects)]
    kept = {n: done[n] for n in names if n in done and all(p.is_file() for p in _expected_files(out_dir / n))}
    missing = [index for index, name in enumerate(names) if name not in kept]
    if missing:
        _write_record(record_path, settings, list(kept.values()))
        templates = load_templates(settings.spacing_mm)

    def make(index: int) -> SubjectReport:
        warp, report = draw_subject(templates, settings, index)
        write_subject(out_dir / report.name, templates, warp)
        return report

    # threads: nearly all of a subject's time passes in NumPy, SciPy and zlib, which let others run
    with ThreadPoolExecutor(workers or default_workers()) as pool:
        for report in pool.map(make, missing):
            kept[report.name] = report
            _write_record(record_path, settings, list(kept.values()))
            logger.info("%s: %.2f mm RMS, smallest Jacobian %.3f", report.name, report.rms_mm, report.smallest_jacobian)
    reports = [kept[name] for name in names]
    _write_record(record_path, settings, reports)
    return reports


def _name(index: int) -> str:
    return f"subject_{index + 1:02d}"


def _write_record(path: Path, settings: CohortSettings, reports: list[SubjectReport]) -> None:
    write_json(
        path,
        {
            "description": DESCRIPTION,
            "settings": asdict(settings),
            "subjects": [asdict(report) for report in reports],
        },
    )


def _read_record(path: Path, settings: CohortSettings) -> dict[str, SubjectReport]:
    """Reports by subject of an earlier run with the same settings; the number of subjects may differ."""
    if not path.is_file():
        return {}
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        before = CohortSettings(**record["settings"])
        reports = {entry["name"]: SubjectReport(**entry) for entry in record["subjects"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a cohort record ({error})") from None
    if {**asdict(before), "subjects": 0} != {**asdict(settings), "subjects": 0}:
        raise ValueError(f"{path}: the cohort there is of {before}, asked for {settings}: choose another folder")
    return reports
