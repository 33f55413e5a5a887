"""Warp kernel that shoots rays at a mesh; in its own file because Warp is imported here."""

from __future__ import annotations

import numpy as np

from trellis.utils.warp_utils import get_warp

wp = get_warp()


@wp.kernel
def _first_hit(
    mesh: wp.uint64,
    origins: wp.array(dtype=wp.vec3),
    directions: wp.array(dtype=wp.vec3),
    lengths: wp.array(dtype=float),
) -> None:
    i = wp.tid()
    query = wp.mesh_query_ray(mesh, origins[i], directions[i], 1.0e6)
    if query.result:
        lengths[i] = query.t
    else:
        lengths[i] = wp.inf


def ray_lengths(vertices: np.ndarray, faces: np.ndarray, origins: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Distance [N] float64 from each origin [N, 3] to the first hit along its direction [N, 3]; inf without one."""
    mesh = wp.Mesh(
        points=wp.array(np.asarray(vertices, dtype=np.float32), dtype=wp.vec3, device="cpu"),
        indices=wp.array(np.asarray(faces, dtype=np.int32).reshape(-1), dtype=wp.int32, device="cpu"),
    )
    lengths = wp.empty(len(origins), dtype=float, device="cpu")
    wp.launch(
        _first_hit,
        len(origins),
        [
            mesh.id,
            wp.array(np.asarray(origins, dtype=np.float32), dtype=wp.vec3, device="cpu"),
            wp.array(np.asarray(directions, dtype=np.float32), dtype=wp.vec3, device="cpu"),
            lengths,
        ],
        device="cpu",
    )
    return lengths.numpy().astype(np.float64)
