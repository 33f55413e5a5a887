"""Arrays, vertices, edges and orientation of triangle meshes, vectorised; nothing here moves a vertex."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

MAX_FACES = 1 << 28


def check_mesh_arrays(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vertices as float64 [V, 3] and faces as int64 [F, 3], without vertices that no face uses.

    Raises:
        ValueError: wrong shapes, non-finite vertices, no faces, or indices out of range.
    """
    v = np.asarray(vertices, dtype=np.float64)
    f = np.asarray(faces)
    if v.ndim != 2 or v.shape[1] != 3:
        raise ValueError(f"vertices must be [V, 3], got shape {list(v.shape)}")
    if f.ndim != 2 or f.shape[1] != 3 or not (np.issubdtype(f.dtype, np.integer) or f.size == 0):
        raise ValueError(f"faces must be integers [F, 3], got {f.dtype} {list(f.shape)}")
    if len(f) == 0 or len(v) == 0:
        raise ValueError(f"the mesh must have faces, got {len(v)} vertices and {len(f)} faces")
    if len(f) > MAX_FACES:
        raise ValueError(f"a mesh may have at most {MAX_FACES} faces, got {len(f)}")
    if not np.isfinite(v).all():
        bad = int((~np.isfinite(v)).any(axis=1).sum())
        raise ValueError(f"vertices must be finite, got {bad} of {len(v)} with NaN or infinite coordinates")
    f = f.astype(np.int64, copy=False)
    if f.min() < 0 or f.max() >= len(v):
        raise ValueError(f"faces must index vertices 0 to {len(v) - 1}, got {f.min()} to {f.max()}")
    return drop_unused_vertices(v, f)


def drop_unused_vertices(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mesh without vertices that no face uses; order is kept."""
    used = np.zeros(len(vertices), dtype=bool)
    used[faces.ravel()] = True
    if used.all():
        return vertices, faces
    return vertices[used], (np.cumsum(used) - 1)[faces]


@dataclass(frozen=True)
class Edges:
    """Edges of a mesh. Half-edge h = 3 * face + corner runs from that corner to the next.

    Attributes:
        half: [H] int64 half-edges sorted by edge, those that join a vertex to itself left out.
        first: [E] int64, where each edge's half-edges start in `half`.
        count: [E] int64, faces per edge.
        balance: [E] int64, half-edges that run up in vertex number less those that run down.
        ends: [E, 2] int64, the vertices, the lower number first.
    """

    half: np.ndarray
    first: np.ndarray
    count: np.ndarray
    balance: np.ndarray
    ends: np.ndarray

    @property
    def open(self) -> np.ndarray:
        """[E] bool: edges of one face."""
        return self.count == 1

    @property
    def edge_of_half(self) -> np.ndarray:
        """[H] int64, the edge of each entry of `half`."""
        return np.repeat(np.arange(len(self.first)), self.count)


def mesh_edges(faces: np.ndarray) -> Edges:
    """The edges of faces [F, 3] int64."""
    start, end = faces.ravel(), np.roll(faces, -1, axis=1).ravel()
    low, high = np.minimum(start, end), np.maximum(start, end)
    n = int(faces.max()) + 1 if len(faces) else 1
    keys = low * n + high
    half = np.argsort(keys, kind="stable")
    half = half[low[half] != high[half]]
    sorted_keys = keys[half]
    new = np.ones(len(half), dtype=bool)
    new[1:] = sorted_keys[1:] != sorted_keys[:-1]
    first = np.flatnonzero(new)
    count = np.diff(np.append(first, len(half)))
    up = np.where(start[half] < end[half], 1, -1)
    balance = np.add.reduceat(up, first) if len(first) else np.zeros(0, np.int64)
    ends = np.stack([low[half[first]], high[half[first]]], axis=1)
    return Edges(half, first, count, balance, ends)


def closed_chain_problem(faces: np.ndarray) -> str | None:
    """None if every directed edge is matched by its reverse as often as it occurs; else a sentence that counts.

    That is what makes the winding number of every point an integer. Edges shared by four or more faces are allowed.
    """
    start, end = faces.ravel(), np.roll(faces, -1, axis=1).ravel()
    n = int(faces.max()) + 1
    low, high = np.minimum(start, end), np.maximum(start, end)
    keys = ((low * n + high) << 1) | (start > end)
    keys = np.sort(keys[low != high])
    edges = keys >> 1
    new = np.ones(len(keys), dtype=bool)
    new[1:] = edges[1:] != edges[:-1]
    first = np.flatnonzero(new)
    balance = np.add.reduceat(1 - 2 * (keys & 1), first) if len(keys) else np.zeros(0, np.int64)
    bad = balance != 0
    if not bad.any():
        return None
    count = np.diff(np.append(first, len(keys)))
    open_edges = int((bad & (count == 1)).sum())
    others = int(bad.sum()) - open_edges
    return f"of {len(first)} edges {open_edges} belong to one face only and {others} join faces of opposite direction"


def face_components(faces: np.ndarray, edges: Edges) -> tuple[int, np.ndarray]:
    """Number of components and component [F] int of each face; faces that share an edge belong together."""
    face = edges.half // 3
    inner = np.ones(len(face), dtype=bool)
    inner[edges.first] = False
    at = np.flatnonzero(inner)
    graph = coo_array((np.ones(len(at), np.int8), (face[at - 1], face[at])), shape=(len(faces),) * 2)
    return connected_components(graph, directed=False)


def orient_consistently(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, int]:
    """Turn faces so that neighbours agree on their direction, as few faces per component as possible.

    Faces are joined over edges of two faces, and over edges of four or more in the order in which the faces lie around
    the edge, where the inside and the outside take turns. Closed meshes that agree already come back unchanged.

    Returns:
        faces [F, 3] int64 and the number that were turned.

    Raises:
        ValueError: a component cannot be oriented (a Moebius strip, a Klein bottle, an inner wall).
    """
    edges = mesh_edges(faces)
    if not (edges.balance[~edges.open] != 0).any():
        return faces, 0
    turn = _turned_faces(_joined_half_edges(vertices, faces, edges, around=True), faces)
    if turn is None:
        turn = _turned_faces(_joined_half_edges(vertices, faces, edges, around=False), faces)
    if turn is None:
        raise ValueError(
            "the surface must have two sides, got faces that cannot be oriented (a Moebius strip, an inner wall, or "
            "several surfaces that share faces)"
        )
    return np.where(turn[:, None], faces[:, ::-1], faces), int(turn.sum())


def _turned_faces(pairs: np.ndarray, faces: np.ndarray) -> np.ndarray | None:
    """[F] bool, the faces to turn so that all pairs of half-edges agree; None if no choice does it."""
    half_a, half_b = pairs[:, 0], pairs[:, 1]
    flat = faces.ravel()
    clash = (flat[half_a] == flat[half_b]).astype(np.int64)  # two faces that run along the edge the same way
    a, b, n = half_a // 3, half_b // 3, len(faces)
    # Every face stands twice in the graph, as it is and turned; a component that holds both has no orientation.
    rows = np.concatenate([a, a + n])
    cols = np.concatenate([b + n * clash, b + n * (1 - clash)])
    graph = coo_array((np.ones(len(rows), np.int8), (rows, cols)), shape=(2 * n, 2 * n))
    _, label = connected_components(graph, directed=False)
    if (label[:n] == label[n:]).any():
        return None
    kept = np.bincount(label[:n], minlength=int(label.max()) + 1)
    as_is, turned = kept[label[:n]], kept[label[n:]]
    return (as_is < turned) | ((as_is == turned) & (label[:n] > label[n:]))


def _joined_half_edges(vertices: np.ndarray, faces: np.ndarray, edges: Edges, *, around: bool) -> np.ndarray:
    """Pairs [P, 2] of half-edges whose faces have to run along their common edge in opposite directions."""
    two = edges.first[edges.count == 2]
    pairs = [np.stack([edges.half[two], edges.half[two + 1]], axis=1)]
    many = np.flatnonzero((edges.count > 2) & (edges.count % 2 == 0)) if around else []
    for e in many:
        half = edges.half[edges.first[e] : edges.first[e] + edges.count[e]]
        origin, tip = vertices[edges.ends[e, 0]], vertices[edges.ends[e, 1]]
        axis = (tip - origin) / max(float(np.linalg.norm(tip - origin)), 1e-300)
        apex = vertices[faces[half // 3, (half % 3 + 2) % 3]] - origin
        apex -= np.outer(apex @ axis, axis)
        u = apex[0] / max(float(np.linalg.norm(apex[0])), 1e-300)
        angle = np.arctan2(apex @ np.cross(axis, u), apex @ u)
        ring = half[np.argsort(angle, kind="stable")]
        pairs.append(np.stack([ring, np.roll(ring, -1)], axis=1))
    return np.concatenate(pairs)


def face_keys(faces: np.ndarray) -> np.ndarray:
    """One int64 per face, [F], equal for faces of the same three vertices in any order."""
    f = np.sort(faces, axis=1)
    if len(f) == 0 or int(f.max()) < 1 << 21:
        return (f[:, 0] << 42) | (f[:, 1] << 21) | f[:, 2]
    # Too many vertices for three in 63 bits: the first two are numbered by the edges that there are.
    _, edge = np.unique(f[:, 0] << 31 | f[:, 1], return_inverse=True)
    return edge.reshape(-1).astype(np.int64) << 31 | f[:, 2]


def signed_volume(vertices: np.ndarray, faces: np.ndarray) -> float:
    """Volume enclosed by a closed mesh, positive if it faces outward; the divergence theorem about the centre."""
    centred = vertices - vertices.mean(axis=0)
    a, b, c = (centred[faces[:, i]] for i in range(3))
    return float(np.einsum("ij,ij->", a, np.cross(b, c)) / 6)


def face_areas(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Areas [F] float64."""
    a, b, c = (vertices[faces[:, i]] for i in range(3))
    return np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2
