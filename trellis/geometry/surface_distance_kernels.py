"""Warp kernel of the closest triangle to a point."""

from __future__ import annotations

import numpy as np

from trellis.utils.warp_utils import get_warp

wp = get_warp()


@wp.kernel
def _closest_face(
    mesh: wp.uint64, points: wp.array(dtype=wp.vec3), max_distance: float, faces: wp.array(dtype=wp.int32)
) -> None:
    i = wp.tid()
    query = wp.mesh_query_point_no_sign(mesh, points[i], max_distance)
    faces[i] = -1
    if query.result:
        faces[i] = query.face


def build_mesh(vertices: np.ndarray, faces: np.ndarray) -> object:
    """A Warp mesh with its BVH on the CPU, from float32 [V, 3] and int32 [F, 3]."""
    return wp.Mesh(
        wp.array(vertices, dtype=wp.vec3, device="cpu"), wp.array(faces.reshape(-1), dtype=wp.int32, device="cpu")
    )


def closest_faces(mesh: object, points: np.ndarray, max_distance: float) -> np.ndarray:
    """[N] int32 index of the face closest to each of float32 points [N, 3]; -1 beyond max_distance."""
    out = wp.empty(len(points), dtype=wp.int32, device="cpu")
    queries = wp.array(points, dtype=wp.vec3, device="cpu")
    wp.launch(_closest_face, len(points), inputs=[mesh.id, queries, max_distance, out], device="cpu")
    return out.numpy()
