"""Warp kernels, one source for CPU and CUDA, for distances of block voxels to a triangle mesh.

All positions are index coordinates: voxel i's centre is at i, one unit is one voxel. Decisions about which triangle is
nearest are taken in float64 except inside Warp's own float32 BVH, whose answers are only used with a margin or to pick
a triangle whose distance is then computed in float64.
"""

# Warp infers what functions return, and reads int(0) as the start of a variable that changes.
# ruff: noqa: ANN201, UP018

import warp as wp

TRIANGLE_COLUMNS = 16
"""float64 per triangle: corner a, edges ab and ac, unit normal, ab.ab, ab.ac, ac.ac, 1 / |ab x ac|^2 (0: flat)."""

wp.set_module_options({"enable_backward": False})


@wp.func
def segment_dist_sq(q: wp.vec3d, d: wp.vec3d, dd: wp.float64):
    """Squared distance of q to the segment from 0 to d; dd = d.d."""
    t = wp.float64(0.0)
    if dd > wp.float64(0.0):
        t = wp.clamp(wp.dot(q, d) / dd, wp.float64(0.0), wp.float64(1.0))
    return wp.length_sq(q - t * d)


@wp.func
def triangle_dist_sq(tri: wp.array2d(dtype=wp.float64), f: int, p: wp.vec3d):
    """Squared distance of p to triangle f: plane distance over the inside, else the nearest of the three edges."""
    q = p - wp.vec3d(tri[f, 0], tri[f, 1], tri[f, 2])
    ab = wp.vec3d(tri[f, 3], tri[f, 4], tri[f, 5])
    ac = wp.vec3d(tri[f, 6], tri[f, 7], tri[f, 8])
    e00 = tri[f, 12]
    e01 = tri[f, 13]
    e11 = tri[f, 14]
    inverse = tri[f, 15]
    d0 = wp.dot(q, ab)
    d1 = wp.dot(q, ac)
    s = (e11 * d0 - e01 * d1) * inverse
    t = (e00 * d1 - e01 * d0) * inverse
    zero = wp.float64(0.0)
    result = zero
    if inverse > zero and s >= zero and t >= zero and s + t <= wp.float64(1.0):
        h = wp.dot(q, wp.vec3d(tri[f, 9], tri[f, 10], tri[f, 11]))
        result = h * h
    else:
        result = wp.float64(1.0e300)
        everything = inverse <= zero
        if t < zero or everything:
            result = wp.min(result, segment_dist_sq(q, ab, e00))
        if s < zero or everything:
            result = wp.min(result, segment_dist_sq(q, ac, e11))
        if s + t > wp.float64(1.0) or everything:
            result = wp.min(result, segment_dist_sq(q - ab, ac - ab, e00 - wp.float64(2.0) * e01 + e11))
    return result


@wp.kernel
def cells_near_surface(
    mesh: wp.uint64, cells: wp.array2d(dtype=wp.int32), span: float, reach: float, near: wp.array(dtype=wp.uint8)
):
    """near[i] = 1 where cell i, `span` voxels a side, has its centre within `reach` of the surface."""
    i = wp.tid()
    half = (span - 1.0) * 0.5
    c = wp.vec3(float(cells[i, 0]) * span + half, float(cells[i, 1]) * span + half, float(cells[i, 2]) * span + half)
    query = wp.mesh_query_point_no_sign(mesh, c, reach)
    near[i] = wp.uint8(0)
    if query.result:
        near[i] = wp.uint8(1)


@wp.kernel
def list_block_triangles(
    mesh: wp.uint64,
    tri: wp.array2d(dtype=wp.float64),
    blocks: wp.array2d(dtype=wp.int32),
    band: float,
    radius: float,
    margin: float,
    lists: wp.array2d(dtype=wp.int32),
    counts: wp.array(dtype=wp.int32),
):
    """Per block, the triangles that can be nearest to one of its voxels within the band; counts = -1 on overflow."""
    b = wp.tid()
    c = wp.vec3(
        float(blocks[b, 0]) * 8.0 + 3.5, float(blocks[b, 1]) * 8.0 + 3.5, float(blocks[b, 2]) * 8.0 + 3.5
    )
    cd = wp.vec3d(wp.float64(c[0]), wp.float64(c[1]), wp.float64(c[2]))
    query = wp.mesh_query_point_no_sign(mesh, c, band + radius + margin)
    n = int(0)
    if query.result:
        nearest = float(wp.sqrt(triangle_dist_sq(tri, query.face, cd)))
        # A voxel at most `radius` from the centre: its nearest triangle is within nearest + radius of it, hence
        # within nearest + 2 radius of the centre; and a triangle outside band + radius is out of every voxel's band.
        reach = wp.min(nearest + 2.0 * radius, band + radius) + margin
        limit = wp.float64(reach) * wp.float64(reach)
        box = wp.vec3(reach, reach, reach)
        hits = wp.mesh_query_aabb(mesh, c - box, c + box)
        f = int(0)
        cap = lists.shape[1]
        while n <= cap and wp.mesh_query_aabb_next(hits, f):
            if triangle_dist_sq(tri, f, cd) <= limit:
                if n < cap:
                    lists[b, n] = f
                n += 1
        if n > cap:
            n = -1
    counts[b] = n


@wp.kernel
def list_cell_triangles(
    mesh: wp.uint64,
    tri: wp.array2d(dtype=wp.float64),
    blocks: wp.array2d(dtype=wp.int32),
    band: float,
    radius: float,
    margin: float,
    block_lists: wp.array2d(dtype=wp.int32),
    block_counts: wp.array(dtype=wp.int32),
    lists: wp.array2d(dtype=wp.int32),
    away: wp.array2d(dtype=wp.float32),
    counts: wp.array(dtype=wp.int32),
    bounds: wp.array(dtype=wp.float32),
):
    """The same for the eight 4-cubed cells of a block, from the block's list; bounds = distance of the cell's centre.

    away = distance of each listed triangle from the cell's centre; the nearest stands first. counts = 0 means that no
    voxel of the cell is in the band; -1 that the list does not hold all candidates.
    """
    i = wp.tid()
    b = i / 8
    k = i % 8
    c = wp.vec3(
        float(blocks[b, 0] * 8 + (k / 4) * 4) + 1.5,
        float(blocks[b, 1] * 8 + ((k / 2) % 2) * 4) + 1.5,
        float(blocks[b, 2] * 8 + (k % 2) * 4) + 1.5,
    )
    cd = wp.vec3d(wp.float64(c[0]), wp.float64(c[1]), wp.float64(c[2]))
    total = block_counts[b]
    n = int(0)
    nearest = float(0.0)
    if total < 0:
        query = wp.mesh_query_point_no_sign(mesh, c, band + radius + margin)
        if query.result:
            nearest = float(wp.sqrt(triangle_dist_sq(tri, query.face, cd)))
            n = -1
    elif total > 0:
        best = wp.float64(1.0e300)
        first = int(0)
        for j in range(total):
            square = triangle_dist_sq(tri, block_lists[b, j], cd)
            if square < best:
                best = square
                first = block_lists[b, j]
        nearest = float(wp.sqrt(best))
        reach = wp.min(nearest + 2.0 * radius, band + radius) + margin
        limit = wp.float64(reach) * wp.float64(reach)
        cap = lists.shape[1]
        if best <= limit:
            lists[i, 0] = first
            away[i, 0] = nearest
            n = int(1)
            for j in range(total):
                f = block_lists[b, j]
                square = triangle_dist_sq(tri, f, cd)
                if square <= limit and f != first:
                    if n < cap:
                        lists[i, n] = f
                        away[i, n] = float(wp.sqrt(square))
                    n += 1
            if n > cap:
                n = -1
    counts[i] = n
    bounds[i] = nearest


@wp.kernel
def voxel_values_from_lists(
    tri: wp.array2d(dtype=wp.float64),
    blocks: wp.array2d(dtype=wp.int32),
    band: wp.float64,
    lists: wp.array2d(dtype=wp.int32),
    away: wp.array2d(dtype=wp.float32),
    counts: wp.array(dtype=wp.int32),
    inside: wp.array2d(dtype=wp.uint8),
    values: wp.array2d(dtype=wp.float16),
    active: wp.array(dtype=wp.uint8),
):
    """TSDF of every voxel whose cell has a complete list (counts >= 0); marks blocks with an active voxel."""
    b, i = wp.tid()
    x = i / 64
    y = (i / 8) % 8
    z = i % 8
    cell = b * 8 + (x / 4) * 4 + (y / 4) * 2 + z / 4
    n = counts[cell]
    if n >= 0:
        p = wp.vec3d(
            wp.float64(blocks[b, 0] * 8 + x), wp.float64(blocks[b, 1] * 8 + y), wp.float64(blocks[b, 2] * 8 + z)
        )
        # A triangle can be nearer than the best so far only if it is within `enough` of the cell's centre.
        to_centre = wp.length(wp.vec3(float(x % 4) - 1.5, float(y % 4) - 1.5, float(z % 4) - 1.5)) + 1.0e-3
        best = band * band
        enough = float(band) + to_centre
        for j in range(n):
            if away[cell, j] < enough:
                square = triangle_dist_sq(tri, lists[cell, j], p)
                if square < best:
                    best = square
                    enough = float(wp.sqrt(square)) + to_centre
        value = wp.float16(wp.sqrt(best) / band)
        if float(value) < 1.0:
            active[b] = wp.uint8(1)
        if (int(inside[b, i / 8]) >> z) & 1:
            value = -value
        values[b, i] = value


@wp.kernel
def voxel_values_from_bvh(
    mesh: wp.uint64,
    tri: wp.array2d(dtype=wp.float64),
    blocks: wp.array2d(dtype=wp.int32),
    rows: wp.array(dtype=wp.int32),
    band: wp.float64,
    margin: float,
    bounds: wp.array(dtype=wp.float32),
    inside: wp.array2d(dtype=wp.uint8),
    values: wp.array2d(dtype=wp.float16),
    active: wp.array(dtype=wp.uint8),
):
    """The same for cells listed in `rows`, by bounded closest-point queries; a thread walks four voxels along z.

    The distance of a neighbour plus one, or of the cell's centre plus the way to it, bounds each query's radius.
    """
    i, row = wp.tid()
    cell = rows[i]
    b = cell / 8
    k = cell % 8
    x = (k / 4) * 4 + row / 4
    y = ((k / 2) % 2) * 4 + row % 4
    z0 = (k % 2) * 4
    limit = float(band) + margin
    offset = wp.vec3(float(row / 4) - 1.5, float(row % 4) - 1.5, -1.5)
    bound = bounds[cell] + wp.length(offset)
    for dz in range(4):
        z = z0 + dz
        p = wp.vec3(float(blocks[b, 0] * 8 + x), float(blocks[b, 1] * 8 + y), float(blocks[b, 2] * 8 + z))
        best = band
        query = wp.mesh_query_point_no_sign(mesh, p, wp.min(bound + margin, limit))
        bound = limit
        if query.result:
            pd = wp.vec3d(wp.float64(p[0]), wp.float64(p[1]), wp.float64(p[2]))
            exact = wp.sqrt(triangle_dist_sq(tri, query.face, pd))
            best = wp.min(exact, band)
            bound = float(exact) + 1.0
        value = wp.float16(best / band)
        if float(value) < 1.0:
            active[b] = wp.uint8(1)
        if (int(inside[b, x * 8 + y]) >> z) & 1:
            value = -value
        values[b, x * 64 + y * 8 + z] = value


@wp.kernel
def block_signs_by_winding(mesh: wp.uint64, blocks: wp.array2d(dtype=wp.int32), inside: wp.array2d(dtype=wp.uint8)):
    """inside[b, x * 8 + y]: bit z is 1 where Warp's fast winding number of the voxel's centre is above 0.5."""
    b, i = wp.tid()
    bits = int(0)
    for z in range(8):
        p = wp.vec3(float(blocks[b, 0] * 8 + i / 8), float(blocks[b, 1] * 8 + i % 8), float(blocks[b, 2] * 8 + z))
        query = wp.mesh_query_point_sign_winding_number(mesh, p, 1.0e6, 3.0, 0.5)
        if query.result and query.sign < 0.0:
            bits = bits | (1 << z)
    inside[b, i] = wp.uint8(bits)
