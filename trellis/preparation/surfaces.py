"""From one source to the surfaces of its shapes: labels by name, overlapping layers, thresholds, small components."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from trellis.preparation.label_tables import LabelNames, named_layers
from trellis.preparation.privacy import label_without_patient
from trellis.preparation.settings import PrepareSettings

if TYPE_CHECKING:
    from trellis.geometry.source_grid import SourceMask
    from trellis.geometry.volume import LabelVolume

MeshArrays = tuple[np.ndarray, np.ndarray]


@dataclass
class Surfaces:
    """What a source holds.

    Attributes:
        by_label: label -> (vertices [V, 3] float64 RAS mm, faces [F, 3] int64).
        notes: what a user should know, one sentence each.
        picked: entries of the settings' labels that matched something here.
        failures: label -> error of labels that could not be made into a surface.
        masks: label -> what cuts the label out of its volume; none for meshes and thresholds.
        values: label -> its number in the volume; none for meshes, thresholds, masks in a folder and segments whose
            number other segments of the volume have, too.
    """

    by_label: dict[str, MeshArrays] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    picked: set[str] = field(default_factory=set)
    failures: dict[str, Exception] = field(default_factory=dict)
    masks: dict[str, Callable[[], SourceMask]] = field(default_factory=dict)
    values: dict[str, int] = field(default_factory=dict)


def matches(wanted: Collection[str], names: Collection[str]) -> set[str]:
    """The entries of `wanted` (numbers, names in any case, patterns such as "vertebra_*") that fit one of `names`.

    An entry that is a name fits it even if it reads as a pattern, as "tumour [GTV]" does.
    """
    lower = [name.lower() for name in names]
    return {w for w in wanted if any(name == w.lower() or fnmatch.fnmatchcase(name, w.lower()) for name in lower)}


def names_of_labels(numbers: Sequence[int], names: Mapping[int, str]) -> dict[int, str]:
    """Label number to the name of its shape, each another; a name that occurs twice gets its number behind it, a label
    without a name is called by its number.

    The numbers are all that occur: what a shape is called must not depend on which are wanted.
    """
    labels = {number: names.get(number) or str(number) for number in numbers}
    counts = Counter(labels.values())
    while len(counts) < len(labels):  # again where a name with its number is another label's name
        labels = {number: f"{name}_{number}" if counts[name] > 1 else name for number, name in labels.items()}
        counts = Counter(labels.values())
    return labels


def picks_of_labels(
    labels: Mapping[int, str], names: Mapping[int, str], wanted: Collection[str], numbers: Mapping[int, int]
) -> dict[int, set[str]]:
    """Label number -> entries of `wanted` that fit the label.

    Args:
        labels, names: what its shape is called, and what it is called itself. numbers: the number in the file that it
            can be picked by, of those that can.
    """
    return {
        n: matches(wanted, {label, names.get(n, label), *([str(numbers[n])] if n in numbers else [])})
        for n, label in labels.items()
    }


def surfaces_of_mesh(path: Path, label: str, settings: PrepareSettings) -> Surfaces:
    """The one surface of a mesh file, if its label is wanted."""
    from trellis.utils.mesh_utils import read_mesh

    result = Surfaces()
    if settings.labels is not None:
        result.picked = matches(settings.labels, {label})
        if not result.picked:
            return result
    mesh = read_mesh(path, mesh_space=settings.mesh_space)
    result.by_label[label] = (mesh.vertices, mesh.faces)
    return result


@dataclass(frozen=True)
class VolumeShapes:
    """The shapes of a volume by name, before any surface of theirs is made.

    Attributes:
        labels: of the shapes that are wanted. present: names of all labels, for messages.
        picked: entries of the settings' labels that matched something here.
        surfaces: makes the surfaces, all at once; the errors of `unread` are among its failures.
        unread: label -> error of masks in a folder that are wanted and cannot be read.
    """

    labels: tuple[str, ...]
    present: tuple[str, ...]
    picked: frozenset[str]
    surfaces: Callable[[], Surfaces]
    unread: Mapping[str, ValueError] = field(default_factory=dict)


def surfaces_of_volume(
    path: Path, settings: PrepareSettings, names: LabelNames, patient: str | None = None
) -> Surfaces:
    """The surfaces of a volume; see `shapes_of_volume`."""
    return shapes_of_volume(path, settings, names, patient).surfaces()


def shapes_of_volume(
    path: Path, settings: PrepareSettings, names: LabelNames, patient: str | None = None
) -> VolumeShapes:
    """The shapes of a label volume (or of an intensity volume, where the settings have a threshold).

    Args:
        path: a file, a folder of masks or a folder of one DICOM series.
        names: label value -> name, or regions; names that the file carries itself fill what is missing here. Masks in a
            folder are called as their files are: their values only count the files, and pick none.
        patient: a name that is cut out of those of masks.

    Raises:
        ValueError: see `trellis.geometry.volume.read_label_layers` and `read_intensity`; an image instead of labels.
            A mask of a folder that cannot be read does not stop the others.
    """
    from trellis.geometry.volume import UnreadMask, labels_of, read_label_layers

    if settings.threshold is not None:
        label = (settings.threshold_label,)
        return VolumeShapes(
            label, label, frozenset(settings.labels or ()), partial(_threshold_surfaces, path, settings)
        )
    broken: list[UnreadMask] = []
    layers = read_label_layers(path, spacing_mm=settings.spacing_mm, unread=broken)
    masks = bool(broken) or (path.is_dir() and any(layer.names for layer in layers))
    try:
        layers, known = named_layers(layers, names, masks=masks)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    known = {**known, **{mask.value: mask.name for mask in broken}}
    if masks and patient is not None:
        known = {number: label_without_patient(name, patient) for number, name in known.items()}
    numbers = [number for layer in layers for number in labels_of(layer)] + [mask.value for mask in broken]
    shared = {number: value for layer in layers for number, value in layer.file_values.items()}
    present = names_of_labels(numbers, known)
    labels, picked = present, set[str]()
    if settings.labels is not None:
        of_file = {} if masks else {number: shared.get(number, number) for number in numbers}
        picks = picks_of_labels(present, known, settings.labels, of_file)
        labels, picked = {n: label for n, label in present.items() if picks[n]}, set().union(*picks.values())
    unread = {labels[mask.value]: mask.error for mask in broken if mask.value in labels}
    labels = {number: label for number, label in labels.items() if label not in unread}
    values = {} if masks else {label: number for number, label in labels.items() if number not in shared}
    start = Surfaces(picked=picked, failures=dict(unread), values=values)
    make = partial(_label_surfaces, layers, labels, start, settings.min_component_ml)
    return VolumeShapes(tuple(labels.values()), tuple(present.values()), frozenset(picked), make, unread)


def _label_surfaces(
    layers: Sequence[LabelVolume], labels: Mapping[int, str], known: Surfaces, min_component_ml: float
) -> Surfaces:
    """What is `known` of a volume's shapes, with the surfaces and masks of its `labels`."""
    from trellis.geometry.source_grid import cut_out, label_boxes
    from trellis.geometry.volume import label_surfaces, labels_of

    notes = sorted({note for layer in layers for note in layer.notes})
    result = Surfaces(notes=notes, picked=set(known.picked), failures=dict(known.failures), values=dict(known.values))
    for layer in layers:
        here = [number for number in labels_of(layer) if number in labels]
        if min_component_ml:
            layer, removed = without_small_components(layer, here, min_component_ml)
            gone = [number for number in here if number not in labels_of(layer)]
            here = [number for number in here if number not in gone]
            for number, count in removed.items():
                result.notes.append(
                    f"label {labels[number]}: {count} components below {min_component_ml:g} ml were removed"
                )
            for number in gone:
                error = ValueError(f"no component has at least {min_component_ml:g} ml (min_component_ml)")
                result.failures[labels[number]] = error
        for number, surface in (label_surfaces(layer, here) if here else {}).items():
            result.by_label[labels[number]] = surface
        for number, box in label_boxes(layer.data, here).items():
            result.masks[labels[number]] = partial(cut_out, layer.data, number, box, layer.affine)
    return result


def _threshold_surfaces(path: Path, settings: PrepareSettings) -> Surfaces:
    from trellis.geometry.volume import parse_threshold, read_intensity, threshold_surface

    low, high = parse_threshold(settings.threshold)
    volume = read_intensity(path, spacing_mm=settings.spacing_mm)
    result = Surfaces(notes=list(volume.notes), picked=set(settings.labels or ()))
    result.by_label[settings.threshold_label] = threshold_surface(volume.data, volume.affine, low, high)
    return result


@dataclass(frozen=True)
class Closed:
    """A closed surface, and what had to be done for that.

    Attributes:
        vertices: [V, 3] float64, RAS mm, not yet rounded as they are stored. faces: [F, 3] int64.
        is_watertight: whether it was closed as it came. repairs: what was done, one sentence each.
    """

    vertices: np.ndarray
    faces: np.ndarray
    is_watertight: bool
    repairs: list[str]

    @property
    def stored_vertices(self) -> np.ndarray:
        """[V, 3] float64 as they come back from the truth mesh, which holds float32: distances are measured to it."""
        return self.vertices.astype(np.float32).astype(np.float64)


def closed_surface(
    vertices: np.ndarray, faces: np.ndarray, *, from_mesh: bool, nested: str, max_hole_mm: float | None
) -> Closed:
    """Repair a surface where it needs that.

    A label's surface knows its inside; it may touch itself along an edge, which a repair would take for a fault. So
    only one that is open is repaired; a mesh always is looked at.

    Raises:
        ValueError: the surface is refused.
    """
    from trellis.utils.mesh_repair import clean_mesh
    from trellis.utils.mesh_topology import closed_chain_problem

    if not from_mesh and not closed_chain_problem(faces):
        return Closed(vertices, faces, True, [])
    vertices, faces, report = clean_mesh(vertices, faces, nested=nested, max_hole_mm=max_hole_mm)
    return Closed(vertices, faces, bool(report.is_watertight), [str(action) for action in report.actions])


def without_small_components(
    volume: LabelVolume, numbers: Sequence[int], min_ml: float
) -> tuple[LabelVolume, dict[int, int]]:
    """A label volume without components (voxels that touch, corners included) below a size.

    Args:
        numbers: labels that are looked at. min_ml: smallest volume that stays.

    Returns:
        The volume, and label -> number of removed components, of labels that lost any.
    """
    from scipy import ndimage

    from trellis.geometry.source_grid import label_boxes

    voxel_ml = volume.voxel_volume_mm3 / 1000
    data, removed = volume.data.copy(), {}
    for number, box in label_boxes(volume.data, numbers).items():
        part = data[box]
        components, count = ndimage.label(part == number, structure=np.ones((3, 3, 3)))
        small = np.bincount(components.ravel(), minlength=count + 1) * voxel_ml < min_ml
        small[0] = False
        if small.any():
            part[small[components]] = 0
            removed[number] = int(small.sum())
    return dataclasses.replace(volume, data=data), removed
