"""Shaded pictures of meshes by ray casting with Warp: no display, no OpenGL; and PNG files."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from trellis.utils.io_utils import atomic_write
from trellis.utils.warp_utils import get_warp

BACKGROUND = (1.0, 1.0, 1.0)
BONE = (0.87, 0.81, 0.72)
MISSING = (0.94, 0.94, 0.94)
AZIMUTH_DEG, ELEVATION_DEG = 40.0, 18.0
CREASE_DEG = 50.0
"""Neighbouring faces that meet at a larger angle are shaded with an edge between them."""
MAX_SMOOTH_FACES = 400_000
"""Above this a face is about a pixel, and its own normal does."""

MeshArrays = tuple[np.ndarray, np.ndarray]


def view_axes(azimuth_deg: float, elevation_deg: float) -> np.ndarray:
    """Right, up and towards-the-viewer axes of a camera, rows of [3, 3], world axes RAS.

    Azimuth 0 looks at the patient's face (the viewer stands anterior, patient's left on the viewer's right); it turns
    the viewer towards the patient's left. Elevation lifts the viewer.
    """
    azimuth, elevation = np.radians([azimuth_deg, elevation_deg])
    towards = np.array(
        [-np.sin(azimuth) * np.cos(elevation), np.cos(azimuth) * np.cos(elevation), np.sin(elevation)]
    )
    right = np.array([-np.cos(azimuth), -np.sin(azimuth), 0.0])
    return np.stack([right, np.cross(towards, right), towards])


def corner_normals(vertices: np.ndarray, faces: np.ndarray, crease_deg: float = CREASE_DEG) -> np.ndarray:
    """Shading normals per face corner: area-weighted mean over the vertex's faces within `crease_deg` of this face.

    Args:
        vertices: [V, 3] float64; faces: [F, 3] int64.

    Returns:
        [F, 3, 3] float64 unit vectors.
    """
    corners = vertices[faces]
    weighted = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    length = np.linalg.norm(weighted, axis=1, keepdims=True)
    unit = weighted / np.maximum(length, 1e-300)
    if len(faces) > MAX_SMOOTH_FACES:
        return np.repeat(unit[:, None], 3, axis=1)
    flat = faces.reshape(-1)
    whole = np.stack([np.bincount(flat, np.repeat(weighted[:, k], 3), len(vertices)) for k in range(3)], axis=1)
    total = whole[flat]
    # Where all faces of a vertex lie within half the angle of their mean, any two of them lie within the angle.
    mean = whole / np.maximum(np.linalg.norm(whole, axis=1, keepdims=True), 1e-300)
    off = np.einsum("fi,fki->fk", unit, mean[faces]).reshape(-1) <= np.cos(np.radians(crease_deg) / 2)
    creased = np.zeros(len(vertices), dtype=bool)
    creased[flat[off]] = True
    left = np.flatnonzero(creased[flat])
    total[left] = 0
    order = left[np.argsort(flat[left], kind="stable")]
    count = np.bincount(flat[left], minlength=len(vertices))
    first = np.cumsum(count) - count
    # corner by corner of each vertex's ring: as many rounds as the largest ring has faces
    for step in range(int(count.max(initial=0))):
        has = left[step < count[flat[left]]]
        other = order[first[flat[has]] + step] // 3
        mine = has // 3
        alike = np.einsum("ij,ij->i", unit[mine], unit[other]) > np.cos(np.radians(crease_deg))
        total[has[alike]] += weighted[other[alike]]
    size = np.linalg.norm(total, axis=1, keepdims=True)
    smooth = np.where(size > 1e-300, total / np.maximum(size, 1e-300), np.repeat(unit, 3, axis=0))
    return smooth.reshape(-1, 3, 3)


@cache
def _kernel() -> Any:
    wp = get_warp()

    @wp.kernel(module="unique")
    def shade(
        mesh: wp.uint64,
        normals: wp.array(dtype=wp.vec3),
        colours: wp.array2d(dtype=wp.vec3),
        right: wp.vec3,
        up: wp.vec3,
        towards: wp.vec3,
        centre: wp.vec3,
        half_width: float,
        distance: float,
        side: int,
        occlusion_rays: int,
        background: wp.vec3,
        images: wp.array3d(dtype=wp.vec3),
    ) -> None:
        row, column = wp.tid()
        x = (2.0 * (float(column) + 0.5) / float(side) - 1.0) * half_width
        y = (1.0 - 2.0 * (float(row) + 0.5) / float(side)) * half_width
        origin = centre + right * x + up * y + towards * distance
        query = wp.mesh_query_ray(mesh, origin, -towards, 4.0 * distance)
        if not query.result:
            for k in range(images.shape[0]):
                images[k, row, column] = background
            return
        face = query.face
        # Warp's (u, v) weigh the first two corners
        w = 1.0 - query.u - query.v
        normal = wp.normalize(
            normals[3 * face] * query.u + normals[3 * face + 1] * query.v + normals[3 * face + 2] * w
        )
        # the inside of a surface, seen through a hole, is lit as well, but darker and redder
        tint = wp.vec3(1.0, 1.0, 1.0)
        facing = wp.dot(normal, towards)
        if wp.dot(query.normal, towards) < 0.0:
            normal = -normal
            tint = wp.vec3(0.62, 0.52, 0.52)
            facing = -facing
        point = origin - towards * query.t

        key = wp.normalize(towards * 0.9 - right * 0.55 + up * 0.75)
        fill = wp.normalize(towards * 0.7 + right * 0.85 - up * 0.15)
        diffuse = 0.72 * wp.max(wp.dot(normal, key), 0.0) + 0.24 * wp.max(wp.dot(normal, fill), 0.0)
        ambient = 0.30 + 0.14 * wp.dot(normal, up)
        open_sky = wp.float32(1.0)
        if occlusion_rays > 0:
            # cosine-distributed directions, stratified, turned by a random angle per sample
            state = wp.rand_init(17, row * side + column)
            turn = 6.2831853 * wp.randf(state)
            shift = wp.randf(state)
            tangent = wp.normalize(wp.cross(normal, wp.vec3(0.31, -0.87, 0.39)))
            bitangent = wp.cross(normal, tangent)
            hits = wp.float32(0.0)  # a variable of the loop, not a constant
            reach = 0.4 * half_width
            for i in range(occlusion_rays):
                share = (float(i) + shift) / float(occlusion_rays)
                angle = turn + 2.3999632 * float(i)
                flat = wp.sqrt(share)
                direction = (tangent * wp.cos(angle) + bitangent * wp.sin(angle)) * flat
                direction = direction + normal * wp.sqrt(1.0 - share + 1.0e-4)
                other = wp.mesh_query_ray(mesh, point + normal * (2.0e-3 * half_width), direction, reach)
                if other.result:
                    hits = hits + 1.0 - other.t / reach
            open_sky = 1.0 - hits / float(occlusion_rays)
        half_way = wp.normalize(key + towards)
        gloss = 0.10 * wp.pow(wp.max(wp.dot(normal, half_way), 0.0), 30.0)
        rim = wp.pow(1.0 - wp.clamp(facing, 0.0, 1.0), 4.0)
        light = 1.08 * (ambient + diffuse) * (0.25 + 0.75 * open_sky) * (1.0 - 0.4 * rim)
        for k in range(images.shape[0]):
            colour = colours[k, 3 * face] * query.u + colours[k, 3 * face + 1] * query.v + colours[k, 3 * face + 2] * w
            images[k, row, column] = wp.cw_mul(colour, tint) * light + wp.vec3(1.0, 1.0, 1.0) * (gloss * open_sky)

    return shade


def frame_of(
    meshes: Sequence[MeshArrays], *, azimuth_deg: float = AZIMUTH_DEG, elevation_deg: float = ELEVATION_DEG
) -> tuple[np.ndarray, float]:
    """Centre [3] and half width in mm of the square view from one direction that just holds all meshes."""
    axes = view_axes(azimuth_deg, elevation_deg)
    seen = [np.asarray(vertices, dtype=np.float64) @ axes.T for vertices, _ in meshes if len(vertices)]
    if not seen:
        return np.zeros(3), 1.0
    low = np.min([p.min(axis=0) for p in seen], axis=0)
    high = np.max([p.max(axis=0) for p in seen], axis=0)
    half_width = 0.53 * max(float((high - low)[:2].max()), 1e-6)
    return axes.T @ ((low + high) / 2), half_width


def render_mesh(
    vertices: np.ndarray,
    faces: np.ndarray,
    *,
    colours: np.ndarray | tuple[float, float, float] = BONE,
    **options: Any,
) -> np.ndarray:
    """A shaded orthographic picture of a mesh: [size, size, 3] uint8, row 0 at the top.

    Args:
        vertices: [V, 3] floats, RAS mm; faces: [F, 3] integers. An empty mesh gives a grey picture.
        colours: one colour, or [V, 3] per vertex; linear values in [0, 1].
        options: see `render_colourings`.
    """
    return render_colourings(vertices, faces, [colours], **options)[0]


def render_colourings(
    vertices: np.ndarray,
    faces: np.ndarray,
    colourings: Sequence[np.ndarray | tuple[float, float, float]],
    *,
    size: int = 512,
    azimuth_deg: float = AZIMUTH_DEG,
    elevation_deg: float = ELEVATION_DEG,
    background: tuple[float, float, float] = BACKGROUND,
    frame: tuple[np.ndarray, float] | None = None,
    samples: int = 2,
    occlusion_rays: int = 8,
    device: str = "cpu",
) -> np.ndarray:
    """Pictures of a mesh in several colourings from one view, for little more than the price of one.

    Args:
        vertices, faces: as in `render_mesh`. colourings: K of its `colours`.
        size: pixels per side.
        azimuth_deg, elevation_deg: see `view_axes`.
        frame: centre [3] and half width in mm of the view, so that several pictures share a scale; None fits it.
        samples: anti-aliasing, samples per pixel and axis.
        occlusion_rays: ambient-occlusion rays per sample, 0 to leave it out.
        device: a Warp device.

    Returns:
        [K, size, size, 3] uint8.
    """
    if size < 1 or samples < 1:
        raise ValueError(f"size and samples must be at least 1, got {size} and {samples}")
    vertices = np.asarray(vertices, dtype=np.float64).reshape(-1, 3)
    faces = np.asarray(faces, dtype=np.int64).reshape(-1, 3)
    if not len(faces):
        return np.full((len(colourings), size, size, 3), np.round(255 * MISSING[0]), dtype=np.uint8)
    per_corner = np.empty((len(colourings), 3 * len(faces), 3), dtype=np.float32)
    for row, given in zip(per_corner, colourings):
        colours = np.asarray(given, dtype=np.float32)
        if colours.shape not in ((3,), vertices.shape):
            raise ValueError(f"colours must be [3] or [{len(vertices)}, 3], got {list(colours.shape)}")
        row[:] = colours[faces.reshape(-1)] if colours.ndim == 2 else colours
    centre, half_width = frame or frame_of(
        [(vertices, faces)], azimuth_deg=azimuth_deg, elevation_deg=elevation_deg
    )
    # float32 in the ray caster: work near the origin, in units of the half width
    points = (vertices - centre) / half_width
    radius = max(1.0, float(np.linalg.norm(points, axis=1).max()))

    wp = get_warp()
    side = size * samples
    with wp.ScopedDevice(device):
        mesh = wp.Mesh(
            points=wp.array(points.astype(np.float32), dtype=wp.vec3),
            indices=wp.array(faces.reshape(-1).astype(np.int32), dtype=wp.int32),
        )
        images = wp.zeros((len(colourings), side, side), dtype=wp.vec3)
        normals = corner_normals(points, faces).reshape(-1, 3)
        wp.launch(
            _kernel(),
            dim=(side, side),
            inputs=[
                mesh.id,
                wp.array(normals.astype(np.float32), dtype=wp.vec3),
                wp.array(per_corner, dtype=wp.vec3),
                *[wp.vec3(*axis) for axis in view_axes(azimuth_deg, elevation_deg)],
                wp.vec3(0.0, 0.0, 0.0),
                1.0,
                2.0 * radius,
                side,
                occlusion_rays,
                wp.vec3(*background),
            ],
            outputs=[images],
        )
        shaded = images.numpy()
    shaded = np.clip(shaded, 0, 1).reshape(-1, size, samples, size, samples, 3).mean(axis=(2, 4))
    return np.round(255 * shaded).astype(np.uint8)


def render_grid(
    rows: Sequence[MeshArrays | None | Sequence[MeshArrays | None]],
    *,
    size: int = 320,
    gap: int = 8,
    labels: Sequence[Sequence[str]] | None = None,
    column_titles: Sequence[str] | None = None,
    share_frame: bool = True,
    **options: Any,
) -> np.ndarray:
    """Pictures of meshes in a grid.

    Args:
        rows: rows of meshes (vertices, faces), or one flat row; None stands for a missing mesh, a grey picture.
        size: pixels per picture; gap: pixels between pictures.
        labels: a line of text under each picture, rows as in `rows`.
        column_titles: a line of text above each column.
        share_frame: all pictures of a row have the same view and scale, so that sizes can be compared.
        options: handed to `render_mesh`.

    Returns:
        [H, W, 3] uint8.
    """
    from trellis.geometry.pixel_text import LINE_HEIGHT, draw_text

    table = [list(row) for row in (rows if rows and _is_row(rows[0]) else [rows])]
    columns = max((len(row) for row in table), default=0)
    if not columns:
        raise ValueError("there is no mesh to draw")
    line = LINE_HEIGHT + 4
    top = line + gap // 2 if column_titles else 0
    cell = size + (line if labels else 0)
    height, width = top + len(table) * (cell + gap) + gap, columns * (size + gap) + gap
    view = {key: options[key] for key in ("azimuth_deg", "elevation_deg") if key in options}
    canvas = np.full((height, width, 3), 255, dtype=np.uint8)
    for i, row in enumerate(table):
        present = [mesh for mesh in row if mesh is not None]
        frame = frame_of(present, **view) if share_frame else None
        for j, mesh in enumerate(row):
            empty = (np.zeros((0, 3)), np.zeros((0, 3), dtype=np.int64))
            vertices, faces = empty if mesh is None else mesh
            y, x = top + gap + i * (cell + gap), gap + j * (size + gap)
            canvas[y : y + size, x : x + size] = render_mesh(vertices, faces, size=size, frame=frame, **options)
            if labels and i < len(labels) and j < len(labels[i]):
                draw_text(canvas, labels[i][j], y + size + 2, x + size // 2, width=size)
    for j, title in enumerate(column_titles or []):
        draw_text(canvas, title, gap // 2 + 2, gap + j * (size + gap) + size // 2, width=size)
    return canvas


def _is_row(item: Any) -> bool:
    """Whether an item of `render_grid`'s argument is a row of meshes and not a mesh (a pair of arrays) or None."""
    if item is None:
        return False
    return not (len(item) == 2 and all(isinstance(part, np.ndarray) for part in item))


def diverging_colours(values: np.ndarray, limit: float) -> np.ndarray:
    """Blue (-limit) over near-white (0) to red (+limit): [V] floats -> [V, 3]; what is not finite is dark grey."""
    return _interpolate(values, -limit, limit, [(0.10, 0.25, 0.65), (0.45, 0.65, 0.90), (0.93, 0.92, 0.89),
                                                (0.95, 0.58, 0.42), (0.70, 0.05, 0.10)])  # fmt: skip


def sequential_colours(values: np.ndarray, limit: float) -> np.ndarray:
    """Light (0) over orange to dark red (limit): [V] floats -> [V, 3]; what is not finite is dark grey."""
    return _interpolate(values, 0.0, limit, [(0.95, 0.93, 0.86), (0.99, 0.78, 0.45), (0.93, 0.42, 0.20),
                                             (0.70, 0.10, 0.12), (0.35, 0.02, 0.08)])  # fmt: skip


def _interpolate(values: np.ndarray, low: float, high: float, stops: list[tuple[float, float, float]]) -> np.ndarray:
    if not high > low:
        raise ValueError(f"limit must be positive, got {high}")
    values = np.asarray(values, dtype=np.float64).reshape(-1)
    at = np.linspace(low, high, len(stops))
    table = np.array(stops)
    colours = np.stack([np.interp(values, at, table[:, i]) for i in range(3)], axis=1)
    return np.where(np.isfinite(values)[:, None], colours, 0.25)


def png_bytes(image: np.ndarray) -> bytes:
    """An image [H, W, 3] or [H, W] uint8 as PNG (8 bits a channel)."""
    image = np.ascontiguousarray(image)
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
        raise ValueError(f"image must be uint8 [H, W, 3] or [H, W], got {image.dtype} {list(image.shape)}")
    if 0 in image.shape:
        raise ValueError(f"image must have pixels, got {list(image.shape)}")
    height, width = image.shape[:2]
    rows = image.reshape(height, -1)
    # filter 2 (up) of the PNG specification: differences to the row above pack better
    up = rows.copy()
    up[1:] -= rows[:-1]
    lines = np.concatenate([np.full((height, 1), 2, dtype=np.uint8), up], axis=1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2 if image.ndim == 3 else 0, 0, 0, 0)
    packed = zlib.compress(lines.tobytes(), 6)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def write_png(path: str | Path, image: np.ndarray) -> None:
    """Write an image [H, W, 3] or [H, W] uint8 as PNG, atomically."""
    data = png_bytes(image)
    with atomic_write(path) as stream:
        stream.write(data)
