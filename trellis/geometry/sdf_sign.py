"""Exact signs of voxel centres: integer winding numbers from crossings of the surface with lines of voxels along z."""

# Warp infers what functions return, and reads int(0) as the start of a variable that changes.
# ruff: noqa: ANN201, UP018

import numpy as np
import warp as wp

SUBVOXEL_BITS = 16
"""Vertices are rounded to 2^-16 voxel for the sign, so that every comparison is exact in int64 up to 4096 voxels."""

wp.set_module_options({"enable_backward": False})


@wp.func
def floor_div(a: wp.int64, b: wp.int64):
    """Floor of a / b for b > 0."""
    q = a / b
    if q * b > a:
        q -= wp.int64(1)
    return q


@wp.func
def first_row_above(a: wp.vec3l, b: wp.vec3l, x: wp.int64):
    """Smallest voxel row strictly above the edge's y at line x. Both faces of an edge get the same answer."""
    lo = a
    hi = b
    if a[0] > b[0]:
        lo = b
        hi = a
    dx = hi[0] - lo[0]
    return floor_div(lo[1] * dx + (hi[1] - lo[1]) * (x - lo[0]), dx * wp.int64(65536)) + wp.int64(1)


@wp.func
def corner(points: wp.array2d(dtype=wp.int64), v: int):
    return wp.vec3l(points[v, 0], points[v, 1], points[v, 2])


@wp.func
def area_xy(a: wp.vec3l, b: wp.vec3l, c: wp.vec3l):
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


@wp.kernel
def count_lines(
    points: wp.array2d(dtype=wp.int64), faces: wp.array2d(dtype=wp.int32), n: wp.array(dtype=wp.int32)
):
    """Lines x = integer that each triangle straddles, the upper end included and the lower not."""
    f = wp.tid()
    a = corner(points, faces[f, 0])
    b = corner(points, faces[f, 1])
    c = corner(points, faces[f, 2])
    one = wp.int64(65536)
    lines = wp.int64(0)
    if area_xy(a, b, c) != wp.int64(0):
        low = wp.min(a[0], wp.min(b[0], c[0]))
        high = wp.max(a[0], wp.max(b[0], c[0]))
        lines = floor_div(high, one) - floor_div(low, one)
    n[f] = wp.int32(lines)


@wp.func
def rows_on_line(a: wp.vec3l, b: wp.vec3l, c: wp.vec3l, x: wp.int64):
    """Voxel rows [low, high) that the triangle covers on line x, seen along z."""
    low = wp.int64(2147483647)
    high = wp.int64(-2147483647)
    if (a[0] < x) != (b[0] < x):
        k = first_row_above(a, b, x)
        low = wp.min(low, k)
        high = wp.max(high, k)
    if (b[0] < x) != (c[0] < x):
        k = first_row_above(b, c, x)
        low = wp.min(low, k)
        high = wp.max(high, k)
    if (c[0] < x) != (a[0] < x):
        k = first_row_above(c, a, x)
        low = wp.min(low, k)
        high = wp.max(high, k)
    return low, high


@wp.func
def triangle_of_line(line_end: wp.array(dtype=wp.int32), line: int):
    """Row of the first inclusive prefix sum above `line`."""
    low = int(0)
    high = line_end.shape[0] - 1
    while low < high:
        mid = (low + high) / 2
        if line_end[mid] > line:
            high = mid
        else:
            low = mid + 1
    return low


@wp.func
def line_position(points: wp.array2d(dtype=wp.int64), faces: wp.array2d(dtype=wp.int32), f: int, after: int):
    """x of the line that is `after` lines below the last one of triangle f."""
    high = wp.max(
        points[faces[f, 0], 0], wp.max(points[faces[f, 1], 0], points[faces[f, 2], 0])
    )
    return floor_div(high, wp.int64(65536)) - wp.int64(after - 1)


@wp.kernel
def count_crossings(
    points: wp.array2d(dtype=wp.int64),
    faces: wp.array2d(dtype=wp.int32),
    line_end: wp.array(dtype=wp.int32),
    n: wp.array(dtype=wp.int32),
):
    """Crossings on each line of each triangle."""
    line = wp.tid()
    f = triangle_of_line(line_end, line)
    x = line_position(points, faces, f, line_end[f] - line) * wp.int64(65536)
    low, high = rows_on_line(
        corner(points, faces[f, 0]), corner(points, faces[f, 1]), corner(points, faces[f, 2]), x
    )
    n[line] = wp.int32(wp.max(high - low, wp.int64(0)))


@wp.func
def pack(resolution: wp.int64, x: wp.int64, y: wp.int64, z: wp.int64):
    """Sort key of a crossing: line of voxels, then height in sub-voxels; the lowest bit is left for the direction."""
    return (((x * resolution + y) << wp.int64(31)) + z + wp.int64(262144)) << wp.int64(1)


@wp.kernel
def write_crossings(
    points: wp.array2d(dtype=wp.int64),
    faces: wp.array2d(dtype=wp.int32),
    line_end: wp.array(dtype=wp.int32),
    crossing_end: wp.array(dtype=wp.int32),
    resolution: wp.int64,
    keys: wp.array(dtype=wp.int64),
):
    """Sort keys of all crossings; the lowest bit is 1 where a line along +z leaves the surface (its normal is up)."""
    line = wp.tid()
    f = triangle_of_line(line_end, line)
    xi = line_position(points, faces, f, line_end[f] - line)
    x = xi * wp.int64(65536)
    a = corner(points, faces[f, 0])
    b = corner(points, faces[f, 1])
    c = corner(points, faces[f, 2])
    low, high = rows_on_line(a, b, c, x)
    area = area_xy(a, b, c)
    leaves = wp.int64(0)
    if area > wp.int64(0):
        leaves = wp.int64(1)
    # The weights are exact integers of one sign, so the height has no cancellation.
    bottom = wp.float64(wp.min(a[2], wp.min(b[2], c[2])))
    top = wp.float64(wp.max(a[2], wp.max(b[2], c[2])))
    end = wp.int64(crossing_end[line])
    row = low
    while row < high:
        p = wp.vec3l(x, row * wp.int64(65536), wp.int64(0))
        wa = wp.float64(area_xy(p, b, c))
        wb = wp.float64(area_xy(a, p, c))
        wc = wp.float64(area_xy(a, b, p))
        z = (wa * wp.float64(a[2]) + wb * wp.float64(b[2]) + wc * wp.float64(c[2])) / wp.float64(area)
        z = wp.clamp(z, bottom, top)
        keys[int(end - (high - row))] = pack(resolution, xi, row, wp.int64(wp.floor(z))) + leaves
        row += wp.int64(1)


@wp.kernel
def crossing_steps(keys: wp.array(dtype=wp.int64), steps: wp.array(dtype=wp.int32)):
    """+1 where a line along +z enters, -1 where it leaves."""
    i = wp.tid()
    steps[i] = wp.int32(1) - wp.int32(2) * wp.int32(keys[i] & wp.int64(1))


@wp.kernel
def winding_lengths(
    keys: wp.array(dtype=wp.int64), winding: wp.array(dtype=wp.int32), lengths: wp.array(dtype=wp.float64)
):
    """Total length of lines with winding number below 0, 1, and above 1."""
    i = wp.tid()
    w = winding[i]
    if w != 0 and i + 1 < keys.shape[0]:
        length = wp.float64((keys[i + 1] >> wp.int64(1)) - (keys[i] >> wp.int64(1)))
        if w < 0:
            wp.atomic_add(lengths, 0, length)
        elif w == 1:
            wp.atomic_add(lengths, 1, length)
        else:
            wp.atomic_add(lengths, 2, length)


@wp.kernel
def block_signs(
    keys: wp.array(dtype=wp.int64),
    winding: wp.array(dtype=wp.int32),
    line_start: wp.array(dtype=wp.int32),
    blocks: wp.array2d(dtype=wp.int32),
    resolution: wp.int64,
    inside: wp.array2d(dtype=wp.uint8),
):
    """inside[b, x * 8 + y]: bit z is 1 where the winding number of the voxel's centre is above 0.5."""
    b, i = wp.tid()
    x = wp.int64(blocks[b, 0] * 8 + i / 8)
    y = wp.int64(blocks[b, 1] * 8 + i % 8)
    line = int(x * resolution + y)
    low = line_start[line]
    end = line_start[line + 1]
    target = pack(resolution, x, y, wp.int64(blocks[b, 2] * 8) * wp.int64(65536))
    high = end
    while low < high:
        mid = (low + high) / 2
        if keys[mid] < target:
            low = mid + 1
        else:
            high = mid
    bits = int(0)
    for z in range(8):
        while low < end and keys[low] < target:
            low += 1
        # The winding numbers of every line sum to zero on a closed surface: the running sum of all lines serves.
        if low > line_start[line] and winding[low - 1] > 0:
            bits = bits | (1 << z)
        target += wp.int64(131072)
    inside[b, i] = wp.uint8(bits)


@wp.kernel
def start_of_lines(keys: wp.array(dtype=wp.int64), starts: wp.array(dtype=wp.int32)):
    """First crossing of each line of voxels (of the next one that has any, for a line without)."""
    i = wp.tid()
    before = wp.int64(-1)
    line = wp.int64(starts.shape[0] - 1)
    if i > 0:
        before = keys[i - 1] >> wp.int64(32)
    if i < keys.shape[0]:
        line = keys[i] >> wp.int64(32)
    k = before + wp.int64(1)
    while k <= line:
        starts[int(k)] = i
        k += wp.int64(1)


class CrossingSigns:
    """The crossings of one closed surface with all lines of voxels, ready to sign blocks.

    Vertices are rounded to 2^-16 voxel, after which every decision is exact: rays through edges and vertices need no
    care, and self-intersections do no harm. The surface has to be closed as a chain: every directed edge is matched by
    its reverse.

    Args:
        index_coords: [V, 3] float64 vertices in index coordinates (voxel i's centre at i).
        faces: [F, 3] int32 device array.

    Attributes:
        negative_share: length of lines where the winding number is below 0, by the length where it is above.
        overlap_share: length where it is above 1, by the length where it is above 0.
    """

    def __init__(self, index_coords: np.ndarray, faces: wp.array, resolution: int) -> None:
        device = faces.device
        points = np.rint(index_coords * (1 << SUBVOXEL_BITS)).astype(np.int64)
        points = wp.array(points, dtype=wp.int64, device=device)
        self.resolution = resolution
        line_end = wp.zeros(faces.shape[0], dtype=wp.int32, device=device)
        wp.launch(count_lines, faces.shape[0], [points, faces, line_end], device=device)
        total = _scan(line_end)
        crossing_end = wp.zeros(max(total, 1), dtype=wp.int32, device=device)
        if total:
            wp.launch(count_crossings, total, [points, faces, line_end, crossing_end], device=device)
        n = _scan(crossing_end)
        keys = wp.zeros(2 * n, dtype=wp.int64, device=device)
        if n:
            wp.launch(
                write_crossings, total, [points, faces, line_end, crossing_end, wp.int64(resolution), keys],
                device=device,
            )
        self.keys = _sorted(keys, n)
        self.winding = wp.zeros(n, dtype=wp.int32, device=device)
        wp.launch(crossing_steps, n, [self.keys, self.winding], device=device)
        _scan(self.winding)
        self.line_start = wp.zeros(resolution * resolution + 1, dtype=wp.int32, device=device)
        wp.launch(start_of_lines, n + 1, [self.keys, self.line_start], device=device)
        lengths = wp.zeros(3, dtype=wp.float64, device=device)
        wp.launch(winding_lengths, n, [self.keys, self.winding, lengths], device=device)
        negative, single, multiple = lengths.numpy().tolist()
        self.negative_share = negative / max(single + multiple, 1.0)
        self.overlap_share = multiple / max(single + multiple, 1.0)

    def sign_blocks(self, blocks: wp.array) -> wp.array:
        """Bits [M, 64] uint8 of blocks [M, 3] int32: entry x * 8 + y, bit z, is 1 inside."""
        inside = wp.zeros((blocks.shape[0], 64), dtype=wp.uint8, device=blocks.device)
        wp.launch(
            block_signs, (blocks.shape[0], 64),
            [self.keys, self.winding, self.line_start, blocks, wp.int64(self.resolution), inside],
            device=blocks.device,
        )
        return inside


def _scan(counts: wp.array) -> int:
    """Inclusive prefix sum in place; returns the total."""
    if counts.shape[0] == 0:
        return 0
    wp.utils.array_scan(counts, counts, inclusive=True)
    total = int(counts[-1:].numpy()[0])
    if total < 0:
        raise ValueError("the surface crosses more than 2^31 lines of voxels; use a lower resolution")
    return total


def _sorted(keys: wp.array, n: int) -> wp.array:
    """The first n keys in order (NumPy's vectorised sort on the CPU, a radix sort on CUDA)."""
    if not n:  # a shape between the lines of voxels' centres; an empty slice is an error in Warp
        return keys
    if keys.device.is_cpu:
        keys[:n].numpy().sort()
    else:
        wp.utils.radix_sort_pairs(keys, wp.zeros(2 * n, dtype=wp.int32, device=keys.device), n)
    return keys[:n]
