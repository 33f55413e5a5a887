"""Exact distances from points to a triangle mesh, and area-uniform samples of a mesh."""

from __future__ import annotations

import numpy as np

_CHUNK_FACES = 1 << 18


def face_normals(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unit normals [F, 3] (zero for a degenerate face) and areas [F], float64."""
    normals, areas = np.empty((len(faces), 3)), np.empty(len(faces))
    for start in range(0, len(faces), _CHUNK_FACES):
        part = slice(start, start + _CHUNK_FACES)
        a, b, c = (vertices[faces[part, k]].T for k in range(3))
        u, v = b - a, c - a
        cross = np.stack([u[1] * v[2] - u[2] * v[1], u[2] * v[0] - u[0] * v[2], u[0] * v[1] - u[1] * v[0]], axis=-1)
        length = np.sqrt((cross * cross).sum(axis=1))
        normals[part] = cross / np.where(length > 0, length, 1)[:, None]
        areas[part] = length / 2
    return normals, areas


def sample_surface(
    vertices: np.ndarray, faces: np.ndarray, count: int, seed: int, *, areas: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Points spread uniformly by area (stratified: one in each of `count` equal shares of the area).

    Args:
        areas: [F] of the faces, if they are known already.

    Returns:
        points [count, 3] float64 and the face of each, [count] int64.
    """
    rng = np.random.default_rng(seed)
    areas = face_normals(vertices, faces)[1] if areas is None else areas
    ends = np.cumsum(areas)
    if not ends[-1] > 0:
        raise ValueError(f"a surface with an area is needed, got {len(faces)} faces of total area {ends[-1]:.3g}")
    at = (np.arange(count) + rng.random(count)) / count * ends[-1]
    face = np.minimum(np.searchsorted(ends, at, side="right"), np.flatnonzero(areas)[-1])
    # the square root makes it uniform in the triangle: Osada et al., Shape distributions, 2002, section 4.2
    root, share = np.sqrt(rng.random(count))[:, None], rng.random(count)[:, None]
    a, b, c = (vertices[faces[face, k]] for k in range(3))
    return (1 - root) * a + root * (1 - share) * b + root * share * c, face


def closest_point_on_triangles(points: np.ndarray, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Closest point [N, 3] of triangle i (corners a, b, c [N, 3]) to point i, float64.

    The point of the plane where it lies in the triangle, else the closest of the three sides.
    """
    ab, ac, ap = b - a, c - a, points - a
    best = _closest_on_segment(points, a, b)
    best_sq = ((points - best) ** 2).sum(axis=1)
    for p, q in ((b, c), (c, a)):
        candidate = _closest_on_segment(points, p, q)
        candidate_sq = ((points - candidate) ** 2).sum(axis=1)
        nearer = candidate_sq < best_sq
        best[nearer], best_sq[nearer] = candidate[nearer], candidate_sq[nearer]
    d00, d01, d11 = ((u * v).sum(axis=1) for u, v in ((ab, ab), (ab, ac), (ac, ac)))
    d20, d21 = (ap * ab).sum(axis=1), (ap * ac).sum(axis=1)
    determinant = d00 * d11 - d01 * d01
    solid = determinant > 1e-14 * d00 * d11  # a sliver below that is its sides
    safe = np.where(solid, determinant, 1)
    v, w = (d11 * d20 - d01 * d21) / safe, (d00 * d21 - d01 * d20) / safe
    over = solid & (v >= 0) & (w >= 0) & (v + w <= 1)
    best[over] = (a + v[:, None] * ab + w[:, None] * ac)[over]
    return best


def _closest_on_segment(points: np.ndarray, p: np.ndarray, q: np.ndarray) -> np.ndarray:
    d = q - p
    length_sq = (d * d).sum(axis=1)
    t = np.clip(((points - p) * d).sum(axis=1) / np.where(length_sq > 0, length_sq, 1), 0, 1)
    return p + t[:, None] * d


class ClosestTriangle:
    """Distances to one mesh: Warp's BVH finds the triangle in float32, the distance to it is computed in float64.

    Where two triangles are equally near to float32's precision either may be taken: an error of about 1e-7 of the size
    of the mesh at most.
    """

    def __init__(self, vertices: np.ndarray, faces: np.ndarray) -> None:
        from trellis.geometry.surface_distance_kernels import build_mesh

        self.vertices, self.faces = np.asarray(vertices, dtype=np.float64), np.asarray(faces)
        self.normals, self.areas = face_normals(self.vertices, self.faces)
        self._solid = np.flatnonzero(self.areas > 0)
        if not len(self._solid):
            raise ValueError(f"a mesh with an area is needed, got {len(self.faces)} faces without")
        used = np.zeros(len(self.vertices), dtype=bool)
        used[self.faces] = True
        low, high = self.vertices[used].min(axis=0), self.vertices[used].max(axis=0)
        self._centre, self._scale = (low + high) / 2, 2 / float((high - low).max())
        self._mesh = build_mesh(self._unit(self.vertices), self.faces[self._solid].astype(np.int32))

    def _unit(self, points: np.ndarray) -> np.ndarray:
        return ((points - self._centre) * self._scale).astype(np.float32)

    def query(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Distances [N] float64 and closest faces [N] int64 of points [N, 3]."""
        from trellis.geometry.surface_distance_kernels import closest_faces

        found = closest_faces(self._mesh, self._unit(points), 1e9)
        if (found < 0).any():
            raise ValueError("points must be finite and within 1e9 times the size of the mesh")
        face = self._solid[found]
        corners = (self.vertices[self.faces[face, k]] for k in range(3))
        nearest = closest_point_on_triangles(points, *corners)
        return np.linalg.norm(points - nearest, axis=1), face
