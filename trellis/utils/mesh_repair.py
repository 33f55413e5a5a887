"""Inspecting and repairing surfaces so that their inside is well defined: what is done is reported, or refused."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from trellis.utils.mesh_cleaning import (
    RepairReport,
    arrange_components,
    cap_holes,
    check_coordinates,
    close_seams,
    degenerate_faces,
    drop_useless_faces,
    merge_vertices,
)
from trellis.utils.mesh_merge import merge_identical_vertices
from trellis.utils.mesh_topology import (
    closed_chain_problem,
    drop_unused_vertices,
    face_areas,
    face_components,
    face_keys,
    mesh_edges,
    orient_consistently,
    signed_volume,
)

__all__ = ["MeshReport", "RepairReport", "clean_mesh", "count_self_intersections", "inspect_mesh"]

NESTED = ("cavity", "solid")
@dataclass
class MeshReport:
    """What `inspect_mesh` found. Counts are of the mesh after identical vertices were merged.

    Attributes:
        problems: one sentence each; empty for a clean mesh.
        actions: what `clean_mesh` would do.
        refused: why `clean_mesh` would refuse, or None.
    """

    num_vertices: int
    num_faces: int
    merged_vertices: int = 0
    degenerate_faces: int = 0
    duplicate_faces: int = 0
    open_edges: int = 0
    edges_of_many_faces: int = 0
    edges_of_opposite_faces: int = 0
    num_components: int = 0
    self_intersecting_faces: int | None = None
    is_watertight: bool = False
    area_mm2: float = 0.0
    volume_ml: float | None = None
    extent_mm: list[float] = field(default_factory=list)
    hole_widths_mm: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    actions: list[str] = field(default_factory=list)
    refused: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return asdict(self)


def clean_mesh(
    vertices: np.ndarray, faces: np.ndarray, *, max_hole_mm: float | None = None, nested: str = "cavity"
) -> tuple[np.ndarray, np.ndarray, RepairReport]:
    """A closed, outward-facing surface from a mesh, with a report of each repair.

    In this order: identical vertices are merged; degenerate and duplicate faces go; open edges within a millionth of
    the size are welded; T-junctions are split; faces are oriented consistently; holes are capped; components are turned
    outward, those that another one encloses inward ("cavity") or removed ("solid"); overlapping solids are united.
    A clean mesh comes back unchanged.

    Args:
        vertices: [V, 3] floats, mm.
        faces: [F, 3] integers.
        max_hole_mm: widest hole that is capped, measured between two vertices of its rim. Default: half the diagonal
            of its component's box.
        nested: what a component inside another one is, "cavity" or "solid".

    Returns:
        vertices [V', 3] float64, faces [F', 3] int64, RepairReport.

    Raises:
        ValueError: bad arrays, coordinates beyond 1e6 mm, holes too wide, a surface with one side, three faces at an
            edge, or pieces that enclose nothing.
    """
    if nested not in NESTED:
        raise ValueError(f"nested must be one of {list(NESTED)}, got {nested!r}")
    if max_hole_mm is not None and not max_hole_mm >= 0:
        raise ValueError(f"max_hole_mm must be 0 or more, got {max_hole_mm}")
    v, f = check_coordinates(vertices, faces)
    report = RepairReport()
    v, f = merge_vertices(v, f, report)
    report.is_watertight = bool((mesh_edges(f).count % 2 == 0).all())
    f = drop_useless_faces(v, f, report.actions)
    v, f = close_seams(v, f, report)
    f, turned = orient_consistently(v, f)
    if turned:
        report.actions.append(f"turned {turned} faces to agree with their neighbours")
    v, f = cap_holes(v, f, max_hole_mm, report)
    v, f = arrange_components(v, f, nested, report)
    problem = closed_chain_problem(f)
    if problem:
        raise ValueError(f"the surface could not be closed: {problem}")
    return *drop_unused_vertices(v, f), report


def inspect_mesh(
    vertices: np.ndarray, faces: np.ndarray, *, max_hole_mm: float | None = None, nested: str = "cavity"
) -> MeshReport:
    """What is wrong with a mesh, and what `clean_mesh` would do with it. Nothing about the mesh makes this raise.

    Args:
        vertices: [V, 3] floats, mm; faces: [F, 3] integers.
        max_hole_mm, nested: as in `clean_mesh`.
    """
    report = MeshReport(num_vertices=len(np.asarray(vertices)), num_faces=len(np.asarray(faces)))
    try:
        v, f = check_coordinates(vertices, faces)
        merged, f = merge_identical_vertices(v, f)
        report.merged_vertices, v = len(v) - len(merged), merged
        _count_problems(v, f, report)
        clean_v, clean_f, repair = clean_mesh(vertices, faces, max_hole_mm=max_hole_mm, nested=nested)
    except ValueError as error:
        report.refused = str(error)
        report.problems.append(f"refused: {error}")
        return report
    report.actions, report.hole_widths_mm = repair.actions, repair.hole_widths_mm
    report.volume_ml = signed_volume(clean_v, clean_f) / 1000
    return report


def _count_problems(v: np.ndarray, f: np.ndarray, report: MeshReport) -> None:
    repeated, flat = degenerate_faces(v, f)
    edges = mesh_edges(f)
    report.degenerate_faces = int(repeated.sum() + flat.sum())
    report.duplicate_faces = len(f) - len(np.unique(face_keys(f)))
    report.open_edges = int(edges.open.sum())
    report.edges_of_many_faces = int((edges.count > 2).sum())
    report.edges_of_opposite_faces = int(((edges.count > 1) & (edges.count % 2 == 0) & (edges.balance != 0)).sum())
    report.num_components = face_components(f, edges)[0]
    report.is_watertight = bool((edges.count % 2 == 0).all())
    report.area_mm2 = float(face_areas(v, f).sum())
    report.extent_mm = np.ptp(v, axis=0).tolist()
    report.self_intersecting_faces = count_self_intersections(v, f)
    for number, sentence in (
        (report.merged_vertices, "vertices repeat the coordinates of others"),
        (report.degenerate_faces, "faces have no area"),
        (report.duplicate_faces, "faces are copies of others"),
        (report.open_edges, "edges belong to one face only: the surface is open"),
        (report.edges_of_many_faces, "edges belong to more than two faces"),
        (report.edges_of_opposite_faces, "edges join faces of opposite direction"),
        (report.self_intersecting_faces, "faces cut through others"),
    ):
        if number:
            report.problems.append(f"{number} {sentence}")


def count_self_intersections(vertices: np.ndarray, faces: np.ndarray) -> int:
    """Faces that cut through a face with which they share no vertex; contacts within rounding do not count."""
    from trellis.utils.warp_utils import get_warp

    wp = get_warp()
    from trellis.utils.mesh_kernels import faces_that_cut_others

    size = max(float(np.ptp(vertices, axis=0).max()), 1e-300)
    centred = (vertices - vertices.mean(axis=0)) / size
    corners = wp.array(faces.astype(np.int32), dtype=wp.int32, device="cpu")
    mesh = wp.Mesh(wp.array(centred.astype(np.float32), dtype=wp.vec3, device="cpu"), corners.flatten())
    points = wp.array(centred, dtype=wp.float64, device="cpu")
    cuts = wp.zeros(len(faces), dtype=wp.uint8, device="cpu")
    wp.launch(
        faces_that_cut_others, len(faces), [mesh.id, points, corners, wp.float64(1e-18), 1e-6, cuts], device="cpu"
    )
    return int(cuts.numpy().sum())
