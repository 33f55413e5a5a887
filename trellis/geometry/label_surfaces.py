"""Surfaces from label volumes by constrained SurfaceNets (all labels at once), and from intensity by a threshold."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from trellis.geometry.volume import LabelVolume

SMOOTHING_ITERATIONS = 16
SMOOTHING_DISTANCE_VOXELS = 0.3
"""How far a vertex may move from the centre of its cell, in voxels."""


def label_surfaces(
    volume: LabelVolume,
    labels: Iterable[int] | None = None,
    *,
    smoothing_iterations: int = SMOOTHING_ITERATIONS,
    smoothing_distance_voxels: float = SMOOTHING_DISTANCE_VOXELS,
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """The closed surface of each label, in world mm.

    Neighbouring labels share their boundary's triangles (no gap, no overlap). Where a label meets the volume's border
    its surface is closed half a voxel outside the last voxel centre. Every component is kept. A label that touches
    itself along an edge or at a corner comes out closed and consistently oriented, but not manifold there.

    Method: SurfaceNets (Gibson 1998) with the constraint of Frisken 2022 (every vertex stays within
    `smoothing_distance_voxels` of the centre of its cell), in voxel index space, then the volume's affine.

    Args:
        volume: labels with their affine.
        labels: label values to extract, None for all that occur.
        smoothing_iterations: relaxation steps; 0 gives the voxel stairs.
        smoothing_distance_voxels: the constraint, 0 to 0.5.

    Returns:
        label -> (vertices [V, 3] float64 RAS mm, faces [F, 3] int64, normals outward), in the order of `labels`.

    Raises:
        ValueError: a label that does not occur, smoothing out of range.
    """
    from trellis.geometry.volume import labels_of

    if not 0 <= smoothing_distance_voxels <= 0.5:
        raise ValueError(f"smoothing_distance_voxels must be from 0 to 0.5, got {smoothing_distance_voxels}")
    if smoothing_iterations < 0:
        raise ValueError(f"smoothing_iterations must be 0 or more, got {smoothing_iterations}")
    present = labels_of(volume)
    wanted = present if labels is None else [int(label) for label in labels]
    missing = sorted(set(wanted) - set(present))
    if missing:
        raise ValueError(f"labels {missing} do not occur in the volume; labels that do: {present}")
    if not wanted:
        return {}

    cropped, origin = _padded_box_of(volume.data, wanted if labels is not None else None)
    compact, values = _compact(cropped)
    points, faces, sides = _surface_nets(compact, len(values), smoothing_iterations, smoothing_distance_voxels)
    world = (points + origin) @ volume.affine[:3, :3].T + volume.affine[:3, 3]
    mirrored = np.linalg.det(volume.affine[:3, :3]) < 0
    surfaces = _split_by_label(world, faces, sides, len(values), mirrored)
    by_value = dict(zip(values, surfaces))
    return {label: by_value[label] for label in wanted}


def _padded_box_of(data: np.ndarray, wanted: list[int] | None) -> tuple[np.ndarray, np.ndarray]:
    """The box around the wanted labels with one voxel around it (their neighbours, or background outside the volume).

    Returns:
        [x, y, z] copy, and the index [3] of its first voxel in the volume.
    """
    mask = data != 0 if wanted is None else np.isin(data, wanted)
    low, high = np.zeros(3, dtype=np.int64), np.array(data.shape)
    for axis in range(3):
        used = np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis)))
        low[axis], high[axis] = used[0] - 1, used[-1] + 2
    inside = tuple(slice(max(a, 0), b) for a, b in zip(low, high))
    before = [int(max(-a, 0)) for a in low]
    after = [int(max(b - n, 0)) for b, n in zip(high, data.shape)]
    return np.pad(data[inside], list(zip(before, after))), low


def _compact(data: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Labels renumbered 1, 2, ... in ascending order (VTK keeps labels as doubles and looks them up one by one)."""
    values = np.unique(data)
    values = values[values != 0]
    if values[-1] == len(values) and data.dtype in (np.uint8, np.uint16, np.int32):
        return data, [int(v) for v in values]
    table_type = np.uint8 if len(values) < 256 else np.uint16 if len(values) < 65536 else np.int32
    compact = np.searchsorted(values, data).astype(table_type) + table_type(1)
    compact[data == 0] = 0
    return compact, [int(v) for v in values]


def _surface_nets(
    data: np.ndarray, label_count: int, iterations: int, distance: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All boundaries between different labels of a padded volume.

    Returns:
        points [V, 3] float64 in voxel index space; faces [F, 3] int64; sides [F, 2] int64, the two labels that a face
        parts, 0 for background.
    """
    import vtk
    from vtk.util.numpy_support import numpy_to_vtk, vtk_to_numpy

    image = vtk.vtkImageData()
    image.SetDimensions(*data.shape)
    scalars = numpy_to_vtk(np.ascontiguousarray(data.transpose(2, 1, 0)).reshape(-1), deep=0)
    image.GetPointData().SetScalars(scalars)
    nets = vtk.vtkSurfaceNets3D()
    nets.SetInputData(image)
    nets.SetBackgroundLabel(0)
    nets.GenerateLabels(label_count, 1, label_count)
    nets.SetOutputStyleToDefault()
    nets.SetOutputMeshTypeToTriangles()
    nets.SetTriangulationStrategyToMinEdge()
    nets.SetSmoothing(iterations > 0 and distance > 0)
    nets.AutomaticSmoothingConstraintsOff()
    nets.SetNumberOfIterations(max(iterations, 1))
    nets.SetRelaxationFactor(0.5)
    nets.SetConstraintStrategyToConstraintDistance()
    nets.SetConstraintDistance(distance)
    nets.Update()
    mesh = nets.GetOutput()
    points = vtk_to_numpy(mesh.GetPoints().GetData()).astype(np.float64)
    faces = vtk_to_numpy(mesh.GetPolys().GetConnectivityArray()).astype(np.int64).reshape(-1, 3)
    sides = vtk_to_numpy(mesh.GetCellData().GetArray("BoundaryLabels")).astype(np.int64).reshape(-1, 2)
    return points, faces, sides


def _split_by_label(
    points: np.ndarray, faces: np.ndarray, sides: np.ndarray, label_count: int, mirrored: bool
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each label's closed surface, faces turned so that its normals point away from it.

    A face belongs to the label on either side of it; its vertex order makes its normal point to the second one... of
    `sides`, which for the label on that second side means inward.
    """
    row = np.concatenate([np.arange(len(faces)), np.arange(len(faces))])
    owner = np.concatenate([sides[:, 0], sides[:, 1]])
    turned = np.repeat([False, True], len(faces)) ^ mirrored
    order = np.argsort(owner, kind="stable")
    bounds = np.searchsorted(owner[order], np.arange(1, label_count + 2))
    surfaces = []
    local = np.full(len(points), -1, dtype=np.int64)
    for label in range(1, label_count + 1):
        mine = order[bounds[label - 1] : bounds[label]]
        triangles = faces[row[mine]]
        triangles = np.where(turned[mine, None], triangles[:, ::-1], triangles)
        used = np.unique(triangles)
        local[used] = np.arange(len(used))
        surfaces.append((points[used], local[triangles]))
    return surfaces
