"""Warp kernels for inspecting meshes."""

# Warp infers what functions return, and reads int(0) as the start of a variable that changes.
# ruff: noqa: ANN201, SIM109, UP018

import warp as wp

wp.set_module_options({"enable_backward": False})


@wp.func
def row(points: wp.array2d(dtype=wp.float64), i: int):
    return wp.vec3d(points[i, 0], points[i, 1], points[i, 2])


@wp.func
def volume(a: wp.vec3d, b: wp.vec3d, c: wp.vec3d, d: wp.vec3d):
    """Six times the signed volume of a tetrahedron."""
    return wp.dot(b - a, wp.cross(c - a, d - a))


@wp.func
def segment_cuts(s: wp.vec3d, t: wp.vec3d, a: wp.vec3d, b: wp.vec3d, c: wp.vec3d, least: wp.float64):
    """1 if the segment s-t passes through the inside of triangle abc; contacts within rounding do not count."""
    vs = volume(s, a, b, c)
    vt = volume(t, a, b, c)
    cuts = int(0)
    if (vs > least and vt < -least) or (vs < -least and vt > least):
        u = volume(s, t, a, b)
        v = volume(s, t, b, c)
        w = volume(s, t, c, a)
        if (u > least and v > least and w > least) or (u < -least and v < -least and w < -least):
            cuts = 1
    return cuts


@wp.kernel
def faces_that_cut_others(
    mesh: wp.uint64,
    points: wp.array2d(dtype=wp.float64),
    faces: wp.array2d(dtype=wp.int32),
    least: wp.float64,
    margin: float,
    cuts: wp.array(dtype=wp.uint8),
):
    """cuts[f] = 1 where an edge of face f passes through a face that shares no vertex with it, or the reverse."""
    f = wp.tid()
    i = faces[f, 0]
    j = faces[f, 1]
    k = faces[f, 2]
    a = row(points, i)
    b = row(points, j)
    c = row(points, k)
    low = wp.min(a, wp.min(b, c))
    high = wp.max(a, wp.max(b, c))
    pad = wp.vec3(margin, margin, margin)
    hits = wp.mesh_query_aabb(
        mesh,
        wp.vec3(float(low[0]), float(low[1]), float(low[2])) - pad,
        wp.vec3(float(high[0]), float(high[1]), float(high[2])) + pad,
    )
    g = int(0)
    found = int(0)
    while found == 0 and wp.mesh_query_aabb_next(hits, g):
        shared = int(0)
        for n in range(3):
            w = faces[g, n]
            if w == i or w == j or w == k:
                shared = 1
        if shared == 0:
            p = row(points, faces[g, 0])
            q = row(points, faces[g, 1])
            r = row(points, faces[g, 2])
            found = wp.max(segment_cuts(a, b, p, q, r, least), segment_cuts(b, c, p, q, r, least))
            found = wp.max(found, segment_cuts(c, a, p, q, r, least))
            found = wp.max(found, segment_cuts(p, q, a, b, c, least))
            found = wp.max(found, segment_cuts(q, r, a, b, c, least))
            found = wp.max(found, segment_cuts(r, p, a, b, c, least))
    cuts[f] = wp.uint8(found)
