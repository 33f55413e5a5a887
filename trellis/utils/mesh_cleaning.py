"""The single steps of repairing a surface; each reports what it did, or refuses."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from trellis.utils.mesh_holes import Hole, find_holes, split_t_junctions, weld_open_vertices
from trellis.utils.mesh_merge import merge_identical_vertices
from trellis.utils.mesh_solids import enclosure, split_components, unite_overlapping
from trellis.utils.mesh_topology import (
    check_mesh_arrays,
    drop_unused_vertices,
    face_areas,
    face_components,
    face_keys,
    mesh_edges,
    signed_volume,
)

MAX_COORDINATE_MM = 1e6
DEFAULT_HOLE_SHARE = 0.5
"""Without `max_hole_mm` a hole may be this share of its component's box diagonal wide."""
EMPTY_SHARE = 0.02
"""A capped piece encloses nothing if its volume is below this share of its caps' area times the widest hole."""
DEBRIS_SHARE = 1e-2
"""Open pieces that enclose nothing are dropped, and reported, up to this share of all area; beyond it: refused."""


@dataclass
class RepairReport:
    """What `clean_mesh` did.

    Attributes:
        actions: one sentence per repair, empty for a mesh that needed none.
        is_watertight: whether the input, after a merge of identical vertices, had an even number of faces at each edge.
        sign_method: how the repaired mesh is signed: "crossings", by integer winding numbers.
        hole_widths_mm: the holes that were capped.
    """

    actions: list[str] = field(default_factory=list)
    is_watertight: bool = True
    sign_method: str = "crossings"
    hole_widths_mm: list[float] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return asdict(self)


def check_coordinates(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`check_mesh_arrays`, and coordinates beyond 1e6 mm refused."""
    v, f = check_mesh_arrays(vertices, faces)
    largest = float(np.abs(v).max())
    if largest > MAX_COORDINATE_MM:
        raise ValueError(f"coordinates must lie within {MAX_COORDINATE_MM:.0e} mm of the origin, got {largest:.6g}")
    return v, f


def merge_vertices(v: np.ndarray, f: np.ndarray, report: RepairReport) -> tuple[np.ndarray, np.ndarray]:
    """`merge_identical_vertices`, reported."""
    before = len(v)
    merged = merge_identical_vertices(v, f)
    if len(merged[0]) < before:
        report.actions.append(f"merged {before - len(merged[0])} vertices that had identical coordinates")
    return merged


def degenerate_faces(v: np.ndarray, f: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[F] bool each: faces with a vertex twice, and faces of three vertices in one line."""
    repeated = (f[:, 0] == f[:, 1]) | (f[:, 1] == f[:, 2]) | (f[:, 2] == f[:, 0])
    a, b, c = (v[f[:, i]] for i in range(3))
    longest = np.maximum(np.maximum(((b - a) ** 2).sum(1), ((c - b) ** 2).sum(1)), ((a - c) ** 2).sum(1))
    return repeated, ~repeated & (2 * face_areas(v, f) <= 1e-12 * longest)


def drop_useless_faces(v: np.ndarray, f: np.ndarray, actions: list[str]) -> np.ndarray:
    """Faces without those that enclose nothing: degenerate ones, and copies of others."""
    repeated, flat = degenerate_faces(v, f)
    if repeated.any():
        f, flat = f[~repeated], flat[~repeated]
        actions.append(f"dropped {int(repeated.sum())} faces with a vertex twice")
    f = _drop_duplicates(f, actions)
    if flat.any() and len(f):
        flat = degenerate_faces(v, f)[1]
        # A flat face that closes the mesh (two short edges against a long one) stays; one that hangs on it goes.
        edges = mesh_edges(f)
        odd = np.bincount(edges.half // 3, weights=(edges.count % 2 == 1)[edges.edge_of_half], minlength=len(f))
        drop = flat & (odd >= 2)
        if drop.any():
            f = f[~drop]
            actions.append(f"dropped {int(drop.sum())} faces of zero area")
    if not len(f):
        raise ValueError("the mesh must have faces that enclose something, got degenerate faces only")
    return f


def _drop_duplicates(f: np.ndarray, actions: list[str]) -> np.ndarray:
    """One copy of each face that is there several times, or none where the other faces close without it."""
    _, first, group, count = np.unique(face_keys(f), return_index=True, return_inverse=True, return_counts=True)
    group = group.reshape(-1)
    if len(first) == len(f):
        return f
    single = count[group] == 1
    keep = single.copy()
    keep[first] = True
    edges = mesh_edges(f)
    # Edges by their faces that are there once: if those are even in number, the copies are no part of the surface.
    others = np.add.reduceat(single[edges.half // 3].astype(np.int64), edges.first)
    odd = np.bincount(edges.half // 3, weights=(others % 2 == 1)[edges.edge_of_half], minlength=len(f))
    copies = keep & ~single
    nothing = copies & (odd < 2) & (count[group] % 2 == 0)
    # Copies that only border on copies (every face twice) are a surface of their own, and one of each stays.
    alone = np.bincount(edges.half // 3, weights=(others == 0)[edges.edge_of_half], minlength=len(f))
    keep &= ~nothing | (alone >= 2)
    actions.append(f"dropped {int((~keep).sum())} duplicate faces")
    return f[keep]


def close_seams(v: np.ndarray, f: np.ndarray, report: RepairReport) -> tuple[np.ndarray, np.ndarray]:
    """Weld and split open edges that meet others but do not share their vertices."""
    if not mesh_edges(f).open.any():
        return v, f
    v, f, welded = weld_open_vertices(v, f)
    if welded:
        report.actions.append(f"welded {welded} vertices of open edges to others within a millionth of the size")
        f = drop_useless_faces(v, f, report.actions)
    for _ in range(4):
        f, split = split_t_junctions(v, f)
        if not split:
            break
        report.actions.append(f"split edges at {split} vertices that lay on them (T-junctions)")
    return v, f


def cap_holes(
    v: np.ndarray, f: np.ndarray, max_hole_mm: float | None, report: RepairReport
) -> tuple[np.ndarray, np.ndarray]:
    """Caps over all holes of a consistently oriented mesh; holes too wide and sheets that enclose nothing refused."""
    edges = mesh_edges(f)
    if not (edges.balance != 0).any():
        return v, f
    crowded = int(((edges.count % 2 == 1) & (edges.count > 1)).sum())
    if crowded:
        raise ValueError(
            f"each edge must have an even number of faces, got {crowded} edges of three or more (an inner wall, or "
            "several surfaces in one)"
        )
    holes = find_holes(v, f, edges)
    count, label = face_components(f, edges)
    f, holes, label = _drop_empty_pieces(v, f, label, count, holes, report)
    component_of_vertex = np.empty(len(v), dtype=np.int64)
    component_of_vertex[f.ravel()] = np.repeat(label, 3)
    for hole in holes:
        if max_hole_mm is None:
            piece = v[f[label == component_of_vertex[hole.loop[0]]]].reshape(-1, 3)
            limit = DEFAULT_HOLE_SHARE * float(np.linalg.norm(np.ptp(piece, axis=0)))
            rule = f"at most {limit:.4g} mm wide, half the diagonal of their piece, unless max_hole_mm allows more"
        else:
            limit = max_hole_mm
            rule = f"at most max_hole_mm = {limit:.4g} mm wide"
        if hole.width_mm > limit:
            raise ValueError(f"holes must be {rule}; got one of {hole.width_mm:.4g} mm, {len(hole.loop)} edges around")
    widths = sorted((hole.width_mm for hole in holes), reverse=True)
    if holes:
        report.actions.append(f"capped {len(holes)} holes, the widest {widths[0]:.4g} mm")
        report.hole_widths_mm = [round(w, 4) for w in widths]
        f = np.concatenate([f, *(hole.cap for hole in holes)])
    return v, f


def _drop_empty_pieces(
    v: np.ndarray, f: np.ndarray, label: np.ndarray, count: int, holes: list[Hole], report: RepairReport
) -> tuple[np.ndarray, list[Hole], np.ndarray]:
    """Open pieces that enclose nothing, dropped if they are debris beside a surface that does."""
    piece_of_vertex = np.empty(len(v), dtype=np.int64)
    piece_of_vertex[f.ravel()] = np.repeat(label, 3)
    holes_of: dict[int, list[Hole]] = {}
    for hole in holes:
        holes_of.setdefault(int(piece_of_vertex[hole.loop[0]]), []).append(hole)
    areas = face_areas(v, f)
    order = np.argsort(label, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(label, minlength=count))])
    empty = np.zeros(count, dtype=bool)
    for piece, own in holes_of.items():
        shell = np.concatenate([f[order[starts[piece] : starts[piece + 1]]], *(hole.cap for hole in own)])
        volume = abs(signed_volume(*drop_unused_vertices(v, shell)))
        flat = sum(hole.cap_area for hole in own) * max(hole.width_mm for hole in own)
        empty[piece] = volume < EMPTY_SHARE * flat or flat == 0
    if not empty.any():
        return f, holes, label
    share = float(areas[empty[label]].sum() / max(areas.sum(), 1e-300))
    number = int(empty.sum())
    if empty.all() or share > DEBRIS_SHARE:
        raise ValueError(
            f"the surface must enclose a volume, got {number} open pieces of {count} that enclose nothing, "
            f"{share:.1%} of the area (open sheets or loose triangles)"
        )
    report.actions.append(f"dropped {number} open pieces that enclose nothing, {share:.2%} of the area")
    keep = ~empty[label]
    holes = [hole for hole in holes if not empty[piece_of_vertex[hole.loop[0]]]]
    return f[keep], holes, label[keep]


def arrange_components(
    v: np.ndarray, f: np.ndarray, nested: str, report: RepairReport
) -> tuple[np.ndarray, np.ndarray]:
    """Turn each component the right way, keep or fill what lies inside another, unite what overlaps."""
    count, label = face_components(f, mesh_edges(f))
    parts = split_components(v, f, label, count)
    size = float(np.ptp(v, axis=0).max())
    hollow = [abs(p.volume) <= 1e-9 * max(float((p.high - p.low).max()), 1e-9 * size) ** 3 for p in parts]
    if all(hollow):
        raise ValueError(f"the surface must enclose a volume, got {count} components without any")
    if any(hollow):
        report.actions.append(f"dropped {sum(hollow)} closed components without volume")
        parts = [p for p, empty in zip(parts, hollow) if not empty]
    if len(parts) == 1:
        if parts[0].volume < 0:
            report.actions.append("turned the surface outward")
        turned = parts[0].faces if parts[0].volume > 0 else parts[0].faces[:, ::-1]
        return v, (f if parts[0].volume > 0 and not any(hollow) else turned)
    encloses = enclosure(v, parts)
    depth = encloses.sum(axis=1)
    inner = int((depth > 0).sum())
    if inner and nested == "solid":
        report.actions.append(f"removed {inner} components inside others (nested='solid')")
        encloses = encloses[np.ix_(depth == 0, depth == 0)]
        parts = [p for p, d in zip(parts, depth) if d == 0]
        depth = np.zeros(len(parts), dtype=np.int64)
    wanted = np.where(depth % 2 == 0, 1, -1)
    wrong = [p.volume * w < 0 for p, w in zip(parts, wanted)]
    turned_faces = [p.faces[:, ::-1] if bad else p.faces for p, bad in zip(parts, wrong)]
    outward = sum(bad and w > 0 for bad, w in zip(wrong, wanted))
    inward = sum(bad and w < 0 for bad, w in zip(wrong, wanted))
    if outward:
        report.actions.append(f"turned {outward} of {len(parts)} components outward")
    if inner and nested == "cavity":
        report.actions.append(
            f"took {int((wanted < 0).sum())} components inside others for cavities"
            + (f", turned {inward} of them inward" if inward else "")
        )
    solids = []
    for i in np.flatnonzero(depth % 2 == 0):
        cavities = np.flatnonzero(encloses[:, i] & (depth == depth[i] + 1))
        solids.append([turned_faces[i], *(turned_faces[j] for j in cavities)])
    if len(solids) == 1:
        return v, np.concatenate(solids[0])
    v, f, united, failed = unite_overlapping(v, solids)
    if united:
        report.actions.append(f"united {united} solids that overlap")
    if failed:
        report.actions.append(
            f"left {failed} solids that may overlap as they are (not manifold): inside is where the winding number is "
            "above 0.5, distances there can be to inner faces"
        )
    return v, f
