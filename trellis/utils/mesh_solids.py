"""Closed components of a mesh: which encloses which, and the union of those that overlap."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trellis.utils.mesh_topology import closed_chain_problem, drop_unused_vertices, signed_volume

MAX_POINT_FACE_PAIRS = 50_000_000
MAX_SAMPLES = 262


@dataclass(frozen=True)
class Component:
    """A closed component.

    Attributes:
        faces: [F, 3] int64, rows of the whole mesh's vertices.
        low, high: [3] float64, corners of its box.
        volume: signed, mm^3.
    """

    faces: np.ndarray
    low: np.ndarray
    high: np.ndarray
    volume: float


def split_components(vertices: np.ndarray, faces: np.ndarray, label: np.ndarray, count: int) -> list[Component]:
    """The components of a mesh by the label [F] of its faces."""
    order = np.argsort(label, kind="stable")
    parts = np.split(faces[order], np.cumsum(np.bincount(label, minlength=count))[:-1])
    found = []
    for part in parts:
        used = vertices[np.unique(part)]
        local = drop_unused_vertices(vertices, part) if len(used) < len(vertices) else (vertices, part)
        found.append(Component(part, used.min(axis=0), used.max(axis=0), signed_volume(*local)))
    return found


def winding_of_points(points: np.ndarray, vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Winding numbers [N] int64 of points [N, 3] in a closed mesh, by the crossings of rays along +z.

    A ray that meets an edge or a vertex counts as one that passes by at (eps, eps^2) in x and y: of the faces around,
    it crosses as many as such a ray does (Edelsbrunner & Muecke, Simulation of simplicity, 1990).
    """
    a, b, c = (vertices[faces[:, i]] for i in range(3))
    low = np.minimum(np.minimum(a, b), c)
    high = np.maximum(np.maximum(a, b), c)
    result = np.zeros(len(points), dtype=np.int64)
    for i, p in enumerate(points):
        near = np.flatnonzero(
            (low[:, 0] <= p[0]) & (high[:, 0] > p[0]) & (low[:, 1] <= p[1]) & (high[:, 1] > p[1]) & (high[:, 2] > p[2])
        )
        u, v, w = a[near] - p, b[near] - p, c[near] - p
        (wa, side_a), (wb, side_b), (wc, side_c) = _side_of_edge(v, w), _side_of_edge(w, u), _side_of_edge(u, v)
        area = wa + wb + wc
        hit = (side_a == side_b) & (side_b == side_c)
        z = (wa * u[:, 2] + wb * v[:, 2] + wc * w[:, 2]) / np.where(area == 0, 1, area)
        result[i] = int(np.sign(area[hit & (z > 0)]).sum())
    return result


def _side_of_edge(start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cross product in x and y of edges relative to a point, [N]; and its sign, of (eps, eps^2) beside where it is 0.

    Both change sign, and nothing else, with the direction of an edge, so that the two faces of an edge agree.
    """
    cross = start[:, 0] * end[:, 1] - start[:, 1] * end[:, 0]
    edge = end - start
    beside = np.where(edge[:, 1] != 0, -edge[:, 1], edge[:, 0])
    return cross, np.sign(np.where(cross != 0, cross, beside))


def enclosure(vertices: np.ndarray, components: list[Component]) -> np.ndarray:
    """[C, C] bool: entry (i, j) says that component j encloses component i whole."""
    count = len(components)
    encloses = np.zeros((count, count), dtype=bool)
    low = np.array([c.low for c in components])
    high = np.array([c.high for c in components])
    for i, part in enumerate(components):
        outer = np.flatnonzero((low < low[i]).all(axis=1) & (high > high[i]).all(axis=1))
        if not len(outer):
            continue
        corners = vertices[part.faces].mean(axis=1)
        own = vertices[np.unique(part.faces)]
        for j in outer:
            samples = _samples(own, corners, MAX_POINT_FACE_PAIRS // max(len(components[j].faces), 1))
            # A few at first: most boxes inside boxes are not enclosed.
            first = winding_of_points(samples[:4], vertices, components[j].faces)
            if (first != 0).all():
                encloses[i, j] = (winding_of_points(samples[4:], vertices, components[j].faces) != 0).all()
    return encloses


def _samples(own: np.ndarray, centres: np.ndarray, limit: int) -> np.ndarray:
    """Points of a component: centres of some faces, its extreme vertices, and more vertices, as many as `limit` allows.

    Vertices are drawn in by a hair's breadth: one that touches the other component counts as on its own side.
    """
    middle = own.mean(axis=0)
    extreme = own[np.concatenate([own.argmin(axis=0), own.argmax(axis=0)])]
    rest = own[:: max(1, len(own) // max(min(limit, 4 * MAX_SAMPLES) - 10, 1))]
    inner = np.concatenate([extreme, rest])
    inner = inner + (middle - inner) * 2e-7
    return np.concatenate([centres[:: max(1, len(centres) // 4)][:4], inner])


def unite_overlapping(
    vertices: np.ndarray, solids: list[list[np.ndarray]]
) -> tuple[np.ndarray, np.ndarray, int, int]:
    """One surface around all solids: those whose boxes meet are united by manifold3d, if their insides overlap.

    Args:
        solids: each a list of closed faces [F, 3]: an outer surface and its cavities.

    Returns:
        vertices, faces, the number of solids that were united with others, and the number that may overlap but could
        not be united because they are not manifold.
    """
    boxes = np.array([[vertices[s[0]].reshape(-1, 3).min(0), vertices[s[0]].reshape(-1, 3).max(0)] for s in solids])
    cluster = _meeting_boxes(boxes)
    new_vertices, new_faces = [vertices], []
    offset, united, failed = len(vertices), 0, 0
    for key in np.unique(cluster):
        members = [solids[i] for i in np.flatnonzero(cluster == key)]
        result = _union(vertices, members) if len(members) > 1 else None
        if result is None or isinstance(result, str):
            new_faces += [f for solid in members for f in solid]
            failed += len(members) if isinstance(result, str) else 0
            continue
        v, f = result
        new_vertices.append(v)
        new_faces.append(f + offset)
        offset += len(v)
        united += len(members)
    v, f = drop_unused_vertices(np.concatenate(new_vertices), np.concatenate(new_faces))
    return v, f, united, failed


def _meeting_boxes(boxes: np.ndarray) -> np.ndarray:
    """Cluster [S] of boxes [S, 2, 3] that meet, directly or through others."""
    from scipy.sparse.csgraph import connected_components

    low, high = boxes[:, 0], boxes[:, 1]
    meet = (low[:, None] <= high[None]).all(-1) & (high[:, None] >= low[None]).all(-1)
    return connected_components(meet, directed=False)[1]


def _union(vertices: np.ndarray, solids: list[list[np.ndarray]]) -> tuple[np.ndarray, np.ndarray] | str | None:
    """The union's mesh; None if nothing overlaps; a sentence if manifold3d cannot take a part."""
    import manifold3d

    parts, total = [], 0.0
    for solid in solids:
        v, f = drop_unused_vertices(vertices, np.concatenate(solid))
        part = manifold3d.Manifold(manifold3d.Mesh64(np.ascontiguousarray(v), np.ascontiguousarray(f, dtype=np.uint64)))
        if part.status() != manifold3d.Error.NoError:
            return f"manifold3d refused a part: {part.status()}"
        parts.append(part)
        total += part.volume()
    whole = manifold3d.Manifold.batch_boolean(parts, manifold3d.OpType.Add)
    if whole.status() != manifold3d.Error.NoError:
        return f"manifold3d failed: {whole.status()}"
    if whole.volume() >= total * (1 - 1e-7):
        return None
    mesh = whole.to_mesh64()
    f = np.asarray(mesh.tri_verts).astype(np.int64)
    v = np.asarray(mesh.vert_properties)[:, :3].astype(np.float64)
    if closed_chain_problem(f):
        return "manifold3d's union is not closed"
    return v, f
