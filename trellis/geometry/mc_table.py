"""Marching-cubes cases, generated: loops on the faces of a cell and their triangulations, for all 256 sign patterns.

The rule for a face depends on its four signs alone: every run of inside corners along the face's border is cut off by
a segment of its own (so two inside corners on a diagonal stay apart). Both cells at a face therefore draw the same
segments. The segments of a cell join into closed loops; a loop is filled with triangles whose inner edges never lie in
a face of the cell, so that no edge can be met by a third triangle (every loop that occurs, of 3 to 7 edges, has such a
filling).
The surface that comes out of any signs is hence a closed manifold.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

CORNERS = np.array([(x, y, z) for x in (0, 1) for y in (0, 1) for z in (0, 1)], dtype=np.int64)
"""[8, 3] corner offsets; corner c is bit c of a case, set where the value is inside."""
EDGES = np.array(
    [(axis, *np.insert((u, v), axis, 0)) for axis in (0, 1, 2) for u in (0, 1) for v in (0, 1)], dtype=np.int64
)
"""[12, 4] axis and base offset (x, y, z) of the cell's edges."""

LONGEST_LOOP = 7


@dataclass(frozen=True)
class CaseTable:
    """Triangles of all 256 cases.

    Attributes:
        triangle_start: [257] int64, rows of `triangles` that belong to a case.
        triangles: [T, 3] int8 edges of the cell (rows of `EDGES`); right-handed normals point from inside to outside.
        loop_of_triangle: [T] int64, the loop that a triangle helps to fill; a loop's triangles are consecutive.
        loop_triangle: [L] int64, first triangle of a loop.
        loop_corner: [L, 7] int8, where the loop's vertices, in order, are found among its triangles' corners (3 *
            triangle + corner); padded with -1.
    """

    triangle_start: np.ndarray
    triangles: np.ndarray
    loop_of_triangle: np.ndarray
    loop_triangle: np.ndarray
    loop_corner: np.ndarray


def _edge_between(a: int, b: int) -> int:
    axis = int(np.flatnonzero(CORNERS[a] != CORNERS[b])[0])
    base = np.minimum(CORNERS[a], CORNERS[b])
    return int(np.flatnonzero(np.equal(EDGES, (axis, *base)).all(axis=1))[0])


def _cell_faces() -> list[list[int]]:
    """Corners of the six faces, counter-clockwise seen from outside the cell."""
    faces = []
    for axis in (0, 1, 2):
        u, v = (axis + 1) % 3, (axis + 2) % 3
        for side in (0, 1):
            ring = []
            for du, dv in ((0, 0), (1, 0), (1, 1), (0, 1)):
                corner = np.zeros(3, dtype=np.int64)
                corner[axis], corner[u], corner[v] = side, du, dv
                ring.append(int(corner @ (4, 2, 1)))
            faces.append(ring if side else ring[::-1])
    return faces


def _loops(case: int, faces: list[list[int]]) -> list[list[int]]:
    """Closed loops of cell edges, each seen from outside the surface in counter-clockwise order."""
    following: dict[int, int] = {}
    for ring in faces:
        inside = [bool(case >> corner & 1) for corner in ring]
        for i in range(4):
            if inside[i] or not inside[(i + 1) % 4]:
                continue
            end = i + 1  # a run of inside corners starts after corner i; find where it ends
            while inside[(end + 1) % 4]:
                end += 1
            enter = _edge_between(ring[i], ring[(i + 1) % 4])
            leave = _edge_between(ring[end % 4], ring[(end + 1) % 4])
            following[enter] = leave
    loops = []
    while following:
        start = min(following)
        loop, edge = [start], following.pop(start)
        while edge != start:
            loop.append(edge)
            edge = following.pop(edge)
        loops.append(loop)
    return loops


def _share_a_face(a: int, b: int) -> bool:
    """Whether two cell edges lie in one face of the cell."""
    for axis in (0, 1, 2):
        for side in (0, 1):
            if all(EDGES[e, 0] != axis and EDGES[e, 1 + axis] == side for e in (a, b)):
                return True
    return False


def _polygon_triangulations(n: int) -> list[list[tuple[int, int, int]]]:
    """All triangulations of a polygon with corners 0..n-1."""

    @cache
    def span(i: int, j: int) -> tuple[tuple[tuple[int, int, int], ...], ...]:
        if j - i < 2:
            return ((),)
        return tuple(
            (*left, (i, k, j), *right) for k in range(i + 1, j) for left in span(i, k) for right in span(k, j)
        )

    return [list(t) for t in span(0, n - 1)]


def _fill(loop: list[int]) -> list[tuple[int, int, int]]:
    """Best triangulation of a loop without a diagonal in a cell face (smallest angle largest, at edge midpoints)."""
    middle = EDGES[loop, 1:] + 0.5 * np.eye(3)[EDGES[loop, 0]]
    n, best, best_score = len(loop), [], -2.0
    for triangles in _polygon_triangulations(n):
        sides = {tuple(sorted((t[i], t[(i + 1) % 3]))) for t in triangles for i in range(3)}
        diagonals = [(a, b) for a, b in sides if b - a not in (1, n - 1)]
        if any(_share_a_face(loop[a], loop[b]) for a, b in diagonals):
            continue
        score = -max(_largest_cosine(middle[list(t)]) for t in triangles)
        if score > best_score + 1e-9:
            best, best_score = [(loop[a], loop[b], loop[c]) for a, b, c in triangles], score
    assert best, f"no triangulation of {loop} keeps off the cell's faces"
    return best


def _largest_cosine(points: np.ndarray) -> float:
    """Cosine of a triangle's smallest angle."""
    cosines = []
    for i in range(3):
        u, v = points[(i + 1) % 3] - points[i], points[(i + 2) % 3] - points[i]
        cosines.append(float(u @ v / (np.linalg.norm(u) * np.linalg.norm(v))))
    return max(cosines)


@cache
def case_table() -> CaseTable:
    """The table, made on first use (about 0.3 s)."""
    faces = _cell_faces()
    triangles: list[tuple[int, int, int]] = []
    start, loop_of_triangle, loop_triangle, loop_corner = [0], [], [], []
    for case in range(256):
        for loop in _loops(case, faces):
            filled = _fill(loop)
            corners = [edge for triangle in filled for edge in triangle]
            loop_of_triangle.extend([len(loop_triangle)] * len(filled))
            loop_triangle.append(len(triangles))
            loop_corner.append([corners.index(edge) for edge in loop] + [-1] * (LONGEST_LOOP - len(loop)))
            triangles.extend(filled)
        start.append(len(triangles))
    return CaseTable(
        np.array(start, dtype=np.int64),
        np.array(triangles, dtype=np.int8),
        np.array(loop_of_triangle, dtype=np.int64),
        np.array(loop_triangle, dtype=np.int64),
        np.array(loop_corner, dtype=np.int8),
    )
