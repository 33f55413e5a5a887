"""Closing open edges of triangle meshes: near-identical vertices, T-junctions, and caps over holes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from trellis.utils.mesh_merge import merge_by_group
from trellis.utils.mesh_topology import Edges, mesh_edges

MAX_EXACT_LOOP = 200
"""Loops up to this many vertices get the cap of least area; longer ones are divided first."""


def weld_tolerance(vertices: np.ndarray) -> float:
    """Distance below which two places are one as far as files can tell: a millionth of the size, or float32's step."""
    size = float(np.linalg.norm(np.ptp(vertices, axis=0)))
    return max(1e-6 * size, 4 * float(np.finfo(np.float32).eps) * float(np.abs(vertices).max()))


def weld_open_vertices(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Merge vertices of open edges that lie within the tolerance of each other, if that closes edges.

    Returns:
        vertices, faces (some may have become degenerate) and the number of vertices that went.
    """
    edges = mesh_edges(faces)
    rim = np.unique(edges.ends[edges.open])
    if len(rim) < 2:
        return vertices, faces, 0
    pairs = cKDTree(vertices[rim]).query_pairs(weld_tolerance(vertices), output_type="ndarray")
    if not len(pairs):
        return vertices, faces, 0
    graph = coo_array((np.ones(len(pairs), np.int8), (rim[pairs[:, 0]], rim[pairs[:, 1]])), shape=(len(vertices),) * 2)
    _, group = connected_components(graph, directed=False)
    merged = merge_by_group(vertices, faces, group)
    if int(mesh_edges(merged[1]).open.sum()) >= int(edges.open.sum()):
        return vertices, faces, 0
    return *merged, len(vertices) - len(merged[0])


def split_t_junctions(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, int]:
    """Split faces at vertices of open edges that lie on another face's open edge.

    Returns:
        faces [F', 3] int64 and the number of vertices that were let into an edge.
    """
    edges = mesh_edges(faces)
    if not edges.open.any():
        return faces, 0
    rim = np.unique(edges.ends[edges.open])
    tree = cKDTree(vertices[rim])
    tolerance = weld_tolerance(vertices)
    half = edges.half[edges.first[edges.open]]
    start, end = faces.ravel()[half], np.roll(faces, -1, axis=1).ravel()[half]
    a, b = vertices[start], vertices[end]
    length = np.linalg.norm(b - a, axis=1)
    near = tree.query_ball_point((a + b) / 2, length / 2 + tolerance)
    splits: dict[int, list[int]] = {}
    for i, found in enumerate(near):
        if len(found) <= 2 or length[i] <= 2 * tolerance:
            continue
        candidates = rim[found]
        direction = (b[i] - a[i]) / length[i]
        offset = vertices[candidates] - a[i]
        along = offset @ direction
        away = np.linalg.norm(offset - np.outer(along, direction), axis=1)
        on_edge = (away <= tolerance) & (along > tolerance) & (along < length[i] - tolerance)
        on_edge &= (candidates != start[i]) & (candidates != end[i])
        if on_edge.any():
            splits[int(half[i])] = candidates[on_edge][np.argsort(along[on_edge])].tolist()
    if not splits:
        return faces, 0
    keep = np.ones(len(faces), dtype=bool)
    added: list[tuple[int, int, int]] = []
    for face in {h // 3 for h in splits}:
        keep[face] = False
        pieces = [tuple(int(v) for v in faces[face])]
        for corner in range(3):
            points = splits.get(3 * face + corner)
            if points:
                edge = (int(faces[face, corner]), int(faces[face, (corner + 1) % 3]))
                pieces = [new for piece in pieces for new in _split_piece(piece, edge, points)]
        added.extend(pieces)
    count = sum(len(points) for points in splits.values())
    return np.concatenate([faces[keep], np.array(added, dtype=np.int64).reshape(-1, 3)]), count


def _split_piece(
    piece: tuple[int, ...], edge: tuple[int, int], points: list[int]
) -> list[tuple[int, int, int]]:
    """A triangle divided from the corner opposite `edge`, if it has that edge."""
    for corner in range(3):
        if (piece[corner], piece[(corner + 1) % 3]) == edge:
            apex = piece[(corner + 2) % 3]
            chain = [edge[0], *points, edge[1]]
            return [(chain[i], chain[i + 1], apex) for i in range(len(chain) - 1)]
    return [(piece[0], piece[1], piece[2])]


@dataclass(frozen=True)
class Hole:
    """One loop of open edges and its cap.

    Attributes:
        loop: [N] int64 vertices, in the direction of the cap.
        cap: [N - 2, 3] int64 faces.
        width_mm: largest distance between two vertices of the loop.
        cap_area: area of the cap, mm^2.
    """

    loop: np.ndarray
    cap: np.ndarray
    width_mm: float
    cap_area: float


def find_holes(vertices: np.ndarray, faces: np.ndarray, edges: Edges | None = None) -> list[Hole]:
    """The holes of a consistently oriented mesh, each with a cap that uses the vertices of its loop.

    Raises:
        ValueError: open edges that do not form loops (neighbours of opposite direction, or three faces at an edge).
    """
    edges = mesh_edges(faces) if edges is None else edges
    unbalanced = edges.balance != 0
    if (np.abs(edges.balance[unbalanced]) > 1).any() or (edges.count[unbalanced] > 1).any():
        many = int((edges.count[unbalanced] > 1).sum())
        raise ValueError(f"holes must be bounded by edges of one face, got {many} edges where faces do not pair up")
    ends = edges.ends[unbalanced]
    up = edges.balance[unbalanced] > 0
    start, end = np.where(up, ends[:, 1], ends[:, 0]), np.where(up, ends[:, 0], ends[:, 1])
    return [_cap(vertices, loop) for loop in _loops(start.tolist(), end.tolist())]


def _loops(start: list[int], end: list[int]) -> list[np.ndarray]:
    """Directed edges, as many into each vertex as out of it, divided into loops that visit no vertex twice."""
    outgoing: dict[int, list[int]] = {}
    for a, b in zip(start, end):
        outgoing.setdefault(a, []).append(b)
    loops = []
    for first in sorted(outgoing):
        while outgoing[first]:
            path, position = [first], {first: 0}
            while path:
                following = outgoing[path[-1]].pop() if outgoing[path[-1]] else None
                if following is None:
                    break
                if following in position:
                    at = position[following]
                    loops.append(np.array(path[at:], dtype=np.int64))
                    for vertex in path[at + 1 :]:
                        del position[vertex]
                    path = path[: at + 1]
                    if at == 0 and not outgoing[following]:
                        break
                else:
                    position[following] = len(path)
                    path.append(following)
    return loops


def _cap(vertices: np.ndarray, loop: np.ndarray) -> Hole:
    points = vertices[loop]
    cap = loop[_triangulate(points)]
    a, b, c = (vertices[cap[:, i]] for i in range(3))
    area = float(np.linalg.norm(np.cross(b - a, c - a), axis=1).sum() / 2)
    return Hole(loop, cap, loop_width(points), area)


def loop_width(points: np.ndarray) -> float:
    """Largest distance between two points [N, 3]; for very long loops the diagonal of their box, which is no less."""
    if len(points) > 3000:
        return float(np.linalg.norm(np.ptp(points, axis=0)))
    square = (points**2).sum(1)
    centred = points - points.mean(axis=0)
    square = (centred**2).sum(1)
    return float(np.sqrt(np.maximum(square[:, None] + square - 2 * centred @ centred.T, 0).max()))


def _triangulate(points: np.ndarray) -> np.ndarray:
    """Faces [N - 2, 3] over a loop [N, 3], of least total area (Barequet and Sharir 1995) for loops of moderate length.

    Longer loops are cut into chains; the polygon of the chains' ends and each chain with its chord are done apart.
    """
    n = len(points)
    if n < 3:
        return np.zeros((0, 3), dtype=np.int64)
    if n <= MAX_EXACT_LOOP:
        return _least_area(points)
    chains = max(3, min(MAX_EXACT_LOOP // 2, int(np.sqrt(n))))
    cuts = np.linspace(0, n, chains, endpoint=False).astype(np.int64)
    parts = [cuts[_triangulate(points[cuts])]]
    for i, begin in enumerate(cuts):
        stop = cuts[i + 1] if i + 1 < chains else n
        chain = np.arange(begin, stop + 1) % n
        if len(chain) > 2:
            parts.append(chain[_triangulate(points[chain])])
    return np.concatenate(parts)


def _least_area(points: np.ndarray) -> np.ndarray:
    n = len(points)
    cost = np.zeros((n, n))
    choice = np.zeros((n, n), dtype=np.int64)
    for gap in range(2, n):
        i = np.arange(n - gap)
        j = i + gap
        m = i[:, None] + np.arange(1, gap)
        area = np.linalg.norm(np.cross(points[m] - points[i, None], points[j, None] - points[i, None]), axis=-1)
        total = cost[i[:, None], m] + cost[m, j[:, None]] + area
        best = total.argmin(axis=1)
        choice[i, j] = m[i, best]
        cost[i, j] = total[i, best]
    faces, stack = [], [(0, n - 1)]
    while stack:
        i, j = stack.pop()
        if j - i >= 2:
            m = int(choice[i, j])
            faces.append((i, m, j))
            stack += [(i, m), (m, j)]
    return np.array(faces, dtype=np.int64)
