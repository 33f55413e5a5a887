"""Surfaces from label volumes by constrained SurfaceNets (all labels at once), and from intensity by a threshold."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from trellis.geometry.label_smoothing import fair_displacements, sheets_of
from trellis.geometry.label_triangles import cut_quads, quad_centres, triangulate
from trellis.geometry.label_volumes import CHUNK_VOXELS, components_beside, restore_volumes

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

    box, origin = _padded_box_of(volume.data)
    box = _compact(box, present)
    points, quads, sides = _surface_nets(box, len(present))
    if smoothing_iterations and smoothing_reach_voxels:
        reach = smoothing_reach_voxels
        sheets = sheets_of(quads, len(points))
        moved = fair_displacements(points, quads, sides, sheets, iterations=smoothing_iterations, reach=reach)
        beside, voxels = components_beside(box, points, quads, sides)
        moved = restore_volumes(moved, points, quads, beside, voxels, sheets, reach=reach)
        centres = quad_centres(moved, points, quads, sheets, reach=reach)
        points, faces, sides = triangulate(points + moved, quads, sides, sheets, centres)
    else:
        faces, sides = cut_quads(points, quads)[0].reshape(-1, 3), np.repeat(sides, 2, axis=0)
    world = (points + origin) @ volume.affine[:3, :3].T + volume.affine[:3, 3]
    mirrored = np.linalg.det(volume.affine[:3, :3]) < 0
    surfaces = _split_by_label(world, faces, sides, len(present), mirrored)
    by_value = dict(zip(present, surfaces))
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


def _compact(data: np.ndarray, labels: list[int]) -> np.ndarray:
    """The `labels` (all that occur, ascending) renumbered 1, 2, ... (VTK keeps labels as doubles and looks them up one
    by one)."""
    if labels[-1] == len(labels) and data.dtype in (np.uint8, np.uint16, np.int32):
        return data
    values = np.array([0, *labels], dtype=data.dtype)
    compact = np.empty(data.shape, np.uint8 if len(values) <= 256 else np.uint16 if len(values) <= 65536 else np.int32)
    for x in range(len(data)):  # a slice at a time: the positions are int64
        compact[x] = np.searchsorted(values, data[x])
    return compact


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
    points, faces = _zero_surface(_level_field(np.asarray(data), low, high))
    affine = np.asarray(affine, dtype=np.float64)
    if np.linalg.det(affine[:3, :3]) < 0:
        faces = faces[:, ::-1]
    return (points - 1) @ affine[:3, :3].T + affine[:3, 3], np.ascontiguousarray(faces)


def _level_field(data: np.ndarray, low: float, high: float | None) -> np.ndarray:
    """How far each voxel is within the bounds, in units of the most that occurs on one side, closed around.

    Computed in float64 a slab at a time, so that the field itself is all that is held.

    Returns:
        [X + 2, Y + 2, Z + 2] float32 in Fortran order, which is VTK's; negative on the rim.
    """
    step = max(CHUNK_VOXELS // max(data.shape[0] * data.shape[1], 1), 1)
    slabs = [slice(start, min(start + step, data.shape[2])) for start in range(0, data.shape[2], step)]

    def within(slab: slice) -> np.ndarray:
        values = data[:, :, slab].astype(np.float64)
        return values - low if high is None else np.minimum(values - low, high - values)

    most_inside, most_outside, reached = 0.0, 0.0, False
    for slab in slabs:
        part = within(slab)
        most_inside, most_outside = max(most_inside, float(part.max())), max(most_outside, float(-part.min()))
        reached = reached or bool((part >= 0).any())
    if not reached:
        bounds = f"{low}" if high is None else f"{low} to {high}"
        lowest, highest = float(data.min()), float(data.max())
        raise ValueError(f"no voxel reaches the threshold {bounds}: values lie in [{lowest}, {highest}]")
    # the smaller of the two: a fill value or an outlier on one side says nothing of the contrast at the surface
    scale = min((most for most in (most_inside, most_outside) if most > 0), default=1.0)
    field = np.empty([n + 2 for n in data.shape], dtype=np.float32, order="F")
    for slab in slabs:
        part = within(slab)
        part /= scale
        np.clip(part, -1e6, 1e6, out=part)
        # a voxel exactly on the level would give triangles without area
        part[(part >= 0) & (part < 1e-6)] = 1e-6
        part[(part < 0) & (part > -1e-6)] = -1e-6
        field[1:-1, 1:-1, slab.start + 1 : slab.stop + 1] = part
    for axis in range(3):
        along = np.moveaxis(field, axis, 0)
        inner = [slice(None) if done < axis else slice(1, -1) for done in range(3) if done != axis]
        for rim, beside in ((0, 1), (-1, -2)):
            along[rim, inner[0], inner[1]] = -np.abs(along[beside, inner[0], inner[1]])
    return field


def _zero_surface(field: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 0 level of a field in Fortran order: vertices [V, 3] float64 in index space, faces [F, 3] int64."""
    from vtkmodules.util.numpy_support import numpy_to_vtk, vtk_to_numpy
    from vtkmodules.vtkCommonDataModel import vtkImageData
    from vtkmodules.vtkFiltersCore import vtkFlyingEdges3D

    image = vtkImageData()
    image.SetDimensions(*field.shape)
    image.GetPointData().SetScalars(numpy_to_vtk(field.reshape(-1, order="F"), deep=0))
    contour = vtkFlyingEdges3D()
    contour.SetInputData(image)
    contour.SetValue(0, 0.0)
    contour.ComputeNormalsOff()
    contour.ComputeScalarsOff()
    contour.Update()
    mesh = contour.GetOutput()
    points = vtk_to_numpy(mesh.GetPoints().GetData()).astype(np.float64)
    return points, vtk_to_numpy(mesh.GetPolys().GetConnectivityArray()).astype(np.int64).reshape(-1, 3)
