"""Surfaces from label volumes by constrained SurfaceNets (all labels at once), and from intensity by a threshold."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from trellis.geometry.label_smoothing import fair_displacements, sheets_of
from trellis.geometry.label_triangles import cut_quads, quad_centres, triangulate
from trellis.geometry.label_volumes import components_beside, restore_volumes

if TYPE_CHECKING:
    from trellis.geometry.volume import LabelVolume

SMOOTHING_ITERATIONS = 30
SMOOTHING_REACH_VOXELS = 0.499
"""How far a vertex may move from the centre of its cell along each axis; below 0.5 no voxel centre changes sides."""


def label_surfaces(
    volume: LabelVolume,
    labels: Iterable[int] | None = None,
    *,
    smoothing_iterations: int = SMOOTHING_ITERATIONS,
    smoothing_reach_voxels: float = SMOOTHING_REACH_VOXELS,
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """The closed surface of each label, in world mm.

    Neighbouring labels share their boundary's triangles (no gap, no overlap). Where a label meets the volume's border
    its surface is closed half a voxel outside the last voxel centre. Every component is kept. A label that touches
    itself along an edge or at a corner comes out closed and consistently oriented, but not manifold there.

    Method: the quads of SurfaceNets (Gibson 1998), one vertex per boundary cell, between all labels at once; then
    vertices move inside their cells to the smallest bending energy (`label_smoothing`), in voxel index space, so that
    every voxel centre stays on its side; then each component is given back the volume of its voxels (`label_volumes`)
    and quads become two triangles or, where the surface bends, four (`label_triangles`); then the volume's affine.

    Args:
        volume: labels with their affine.
        labels: label values to give back, None for all that occur. All are computed: a label's surface does not depend
            on what else was asked for.
        smoothing_iterations: relaxation steps; 0 gives the voxel stairs.
        smoothing_reach_voxels: the constraint, from 0 to below 0.5.

    Returns:
        label -> (vertices [V, 3] float64 RAS mm, faces [F, 3] int64, normals outward), in the order of `labels`.

    Raises:
        ValueError: a label that does not occur, smoothing out of range.
    """
    from trellis.geometry.volume import labels_of

    if not 0 <= smoothing_reach_voxels < 0.5:
        raise ValueError(f"smoothing_reach_voxels must be from 0 to below 0.5, got {smoothing_reach_voxels}")
    if smoothing_iterations < 0:
        raise ValueError(f"smoothing_iterations must be 0 or more, got {smoothing_iterations}")
    present = labels_of(volume)
    wanted = present if labels is None else [int(label) for label in labels]
    missing = sorted(set(wanted) - set(present))
    if missing:
        raise ValueError(f"labels {missing} do not occur in the volume; labels that do: {present}")
    if not wanted:
        return {}

    cropped, origin = _padded_box_of(volume.data)
    compact, values = _compact(cropped)
    points, quads, sides = _surface_nets(compact, len(values))
    if smoothing_iterations and smoothing_reach_voxels:
        reach = smoothing_reach_voxels
        sheets = sheets_of(quads, len(points))
        moved = fair_displacements(points, quads, sides, sheets, iterations=smoothing_iterations, reach=reach)
        beside, voxels = components_beside(compact, points, quads, sides)
        moved = restore_volumes(moved, points, quads, beside, voxels, sheets, reach=reach)
        centres = quad_centres(moved, points, quads, sheets, reach=reach)
        points, faces, sides = triangulate(points + moved, quads, sides, sheets, centres)
    else:
        faces, sides = cut_quads(points, quads)[0].reshape(-1, 3), np.repeat(sides, 2, axis=0)
    world = (points + origin) @ volume.affine[:3, :3].T + volume.affine[:3, 3]
    mirrored = np.linalg.det(volume.affine[:3, :3]) < 0
    surfaces = _split_by_label(world, faces, sides, len(values), mirrored)
    by_value = dict(zip(values, surfaces))
    return {label: by_value[label] for label in wanted}


def _padded_box_of(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The box around all labels with one voxel of background around it.

    Returns:
        [x, y, z] copy, and the index [3] of its first voxel in the volume.
    """
    mask = data != 0
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


def _surface_nets(data: np.ndarray, label_count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All boundaries between different labels of a padded volume, as quads with vertices at cell centres.

    Returns:
        points [V, 3] float64 in voxel index space; quads [Q, 4] int64; sides [Q, 2] int64, the two labels that a quad
        parts, 0 for background.
    """
    from vtkmodules.util.numpy_support import numpy_to_vtk, vtk_to_numpy
    from vtkmodules.vtkCommonDataModel import vtkImageData
    from vtkmodules.vtkFiltersCore import vtkSurfaceNets3D

    image = vtkImageData()
    image.SetDimensions(*data.shape)
    # VTK's first axis is the fastest one; it borrows this memory
    flat = np.ascontiguousarray(data.transpose(2, 1, 0)).reshape(-1)
    image.GetPointData().SetScalars(numpy_to_vtk(flat, deep=0))
    nets = vtkSurfaceNets3D()
    nets.SetInputData(image)
    nets.SetBackgroundLabel(0)
    nets.GenerateLabels(label_count, 1, label_count)
    nets.SetOutputStyleToDefault()
    nets.SetOutputMeshTypeToQuads()
    nets.SmoothingOff()
    nets.Update()
    mesh = nets.GetOutput()
    points = vtk_to_numpy(mesh.GetPoints().GetData()).astype(np.float64)
    quads = vtk_to_numpy(mesh.GetPolys().GetConnectivityArray()).astype(np.int64).reshape(-1, 4)
    sides = vtk_to_numpy(mesh.GetCellData().GetArray("BoundaryLabels")).astype(np.int64).reshape(-1, 2)
    return *_one_vertex_per_cell(points, quads, data.shape), sides


def _one_vertex_per_cell(
    points: np.ndarray, quads: np.ndarray, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Join the vertices of a cell: in some cells where labels touch VTK makes several, and surfaces would gape."""
    cell = np.floor(points).astype(np.int64)
    key = (cell[:, 0] * shape[1] + cell[:, 1]) * shape[2] + cell[:, 2]
    _, first, joined = np.unique(key, return_index=True, return_inverse=True)
    return points[first], joined.reshape(-1)[quads]


def _split_by_label(
    points: np.ndarray, faces: np.ndarray, sides: np.ndarray, label_count: int, mirrored: bool
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each label's closed surface, faces turned so that its normals point away from it.

    A face belongs to the labels on both of its sides; as SurfaceNets orders it, it points away from the first of
    `sides`, and is turned for the second.
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


def threshold_surface(
    data: np.ndarray, affine: np.ndarray, low: float, high: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The closed surface around intensities from `low` (to `high`), at sub-voxel precision, in world mm.

    Between neighbouring voxel centres the intensity is taken as linear (flying edges, Schroeder et al. 2015, a form
    of marching cubes). Where the structure meets the volume's border it is closed half a voxel outside the last centre.

    Args:
        data: [X, Y, Z] numbers; affine: [4, 4] voxel index to RAS mm.
        low, high: bounds; None for no upper one.

    Returns:
        vertices [V, 3] float64 RAS mm, faces [F, 3] int64, normals outward.

    Raises:
        ValueError: no voxel lies within the bounds.
    """
    from vtkmodules.util.numpy_support import numpy_to_vtk, vtk_to_numpy
    from vtkmodules.vtkCommonDataModel import vtkImageData
    from vtkmodules.vtkFiltersCore import vtkFlyingEdges3D

    values = np.asarray(data, dtype=np.float64)
    field = values - low if high is None else np.minimum(values - low, high - values)
    if not (field >= 0).any():
        bounds = f"{low}" if high is None else f"{low} to {high}"
        raise ValueError(f"no voxel reaches the threshold {bounds}: values lie in [{values.min()}, {values.max()}]")
    # a voxel exactly on the level would give triangles without area
    tiny = 1e-6 * max(float(np.abs(field).max()), 1e-300)
    field = np.where(np.abs(field) < tiny, tiny, field)
    field = np.pad(field, 1, mode="edge")
    for axis in range(3):
        for end in (0, -1):
            face = np.moveaxis(field, axis, 0)[end]
            face[...] = -np.abs(face)
    image = vtkImageData()
    image.SetDimensions(*field.shape)
    flat = np.ascontiguousarray(field.transpose(2, 1, 0)).reshape(-1)
    image.GetPointData().SetScalars(numpy_to_vtk(flat, deep=0))
    contour = vtkFlyingEdges3D()
    contour.SetInputData(image)
    contour.SetValue(0, 0.0)
    contour.ComputeNormalsOff()
    contour.ComputeScalarsOff()
    contour.Update()
    mesh = contour.GetOutput()
    points = vtk_to_numpy(mesh.GetPoints().GetData()).astype(np.float64) - 1
    faces = vtk_to_numpy(mesh.GetPolys().GetConnectivityArray()).astype(np.int64).reshape(-1, 3)
    affine = np.asarray(affine, dtype=np.float64)
    if np.linalg.det(affine[:3, :3]) < 0:
        faces = faces[:, ::-1]
    return points @ affine[:3, :3].T + affine[:3, 3], np.ascontiguousarray(faces)
