"""Pictures: the right way round, shaded, framed; PNG files that others can read."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
import trimesh

from trellis.geometry.pixel_text import draw_text
from trellis.geometry.render import (
    corner_normals,
    diverging_colours,
    frame_of,
    png_bytes,
    render_colourings,
    render_grid,
    render_mesh,
    sequential_colours,
    view_axes,
    write_png,
)


def box(low, high) -> tuple[np.ndarray, np.ndarray]:
    corners = np.array(np.meshgrid(*zip(low, high), indexing="ij"), dtype=float).reshape(3, -1).T
    quads = [[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]]
    return corners, np.array([t for q in quads for t in (q[:3], [q[0], *q[2:]])])


def decode_png(data: bytes) -> np.ndarray:
    """An independent little decoder: filter type 2 only."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, {}
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        assert zlib.crc32(kind + body) == int.from_bytes(data[at + 8 + size : at + 12 + size], "big")
        chunks[kind] = body
        at += 12 + size
    width, height = int.from_bytes(chunks[b"IHDR"][:4], "big"), int.from_bytes(chunks[b"IHDR"][4:8], "big")
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), dtype=np.uint8).reshape(height, -1)
    assert (lines[:, 0] == 2).all()
    return np.cumsum(lines[:, 1:], axis=0, dtype=np.uint64).astype(np.uint8).reshape(height, width, -1)


def test_view_axes_follow_the_patient():
    right, up, towards = view_axes(0, 0)
    np.testing.assert_allclose(towards, [0, 1, 0], atol=1e-12)  # the viewer stands anterior
    np.testing.assert_allclose(right, [-1, 0, 0], atol=1e-12)  # and sees the patient's left on the right
    np.testing.assert_allclose(up, [0, 0, 1], atol=1e-12)
    np.testing.assert_allclose(view_axes(90, 0)[2], [-1, 0, 0], atol=1e-12)  # from the patient's left
    axes = view_axes(33, 21)
    np.testing.assert_allclose(axes @ axes.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(axes) == pytest.approx(1)


def test_an_asymmetric_shape_appears_where_it_should():
    # a big box at the patient's right and below, a small one at the patient's left and above
    a, fa = box((10, -5, -20), (30, 5, 0))
    b, fb = box((-30, -5, 20), (-25, 5, 25))
    vertices, faces = np.concatenate([a, b]), np.concatenate([fa, fb + 8])
    image = render_mesh(vertices, faces, size=61, azimuth_deg=0, elevation_deg=0, occlusion_rays=0)
    ink = (image < 250).any(axis=2)
    assert image.shape == (61, 61, 3) and image.dtype == np.uint8
    rows, columns = np.nonzero(ink)
    half = 30
    assert ink[:half, half:].sum() > 0 and ink[:half, :half].sum() == 0  # small one: upper right only
    assert ink[half:, :half].sum() > 4 * ink[:half, half:].sum()  # big one: lower left
    assert columns.min() <= 3 and columns.max() >= 57  # the frame just holds it


def test_frame_and_shading_are_of_the_shape():
    vertices, faces = box((-1, -2, -3), (1, 2, 3))
    centre, half_width = frame_of([(vertices + 100, faces)], azimuth_deg=0, elevation_deg=0)
    np.testing.assert_allclose(centre, [100, 100, 100])
    assert half_width == pytest.approx(3 * 1.06)
    near = render_mesh(vertices, faces, size=33)
    far = render_mesh(vertices * 7 + [500, -300, 900], faces, size=33)
    assert np.abs(near.astype(int) - far).mean() < 1.0
    assert len(np.unique(near[..., 0])) > 10
    small = render_mesh(vertices, faces, size=33, frame=(np.zeros(3), 30.0))
    assert 0 < (small < 250).any(axis=2).sum() < 0.05 * 33 * 33


def test_corner_normals_keep_creases_and_smooth_curves():
    vertices, faces = box((0, 0, 0), (1, 2, 3))
    normals = corner_normals(vertices, faces)
    a, b, c = np.moveaxis(vertices[faces], 1, 0)
    flat = np.cross(b - a, c - a)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    np.testing.assert_allclose(normals, np.repeat(flat[:, None], 3, axis=1), atol=1e-12)
    rounded = corner_normals(vertices, faces, crease_deg=100)
    np.testing.assert_allclose(np.linalg.norm(rounded, axis=2), 1)
    assert np.abs(np.abs(rounded).min(axis=2)).min() > 0.1  # all three sides of a box's corner have their say


def test_corner_normals_by_every_pair_of_faces():
    """On a shape that is smooth in one half and crumpled in the other, with a face of no area."""
    sphere = trimesh.creation.icosphere(3)
    vertices, faces = np.array(sphere.vertices), np.concatenate([np.array(sphere.faces), [[5, 5, 9]]])
    vertices += np.random.default_rng(0).normal(size=vertices.shape) * np.where(vertices[:, :1] > 0, 0.06, 0.0)
    a, b, c = np.moveaxis(vertices[faces], 1, 0)
    weighted = np.cross(b - a, c - a)
    unit = weighted / np.maximum(np.linalg.norm(weighted, axis=1, keepdims=True), 1e-300)
    alike = unit @ unit.T > np.cos(np.radians(50))
    found = corner_normals(vertices, faces)
    for vertex in np.unique(faces):
        ring = np.flatnonzero((faces == vertex).any(axis=1))
        for face in ring:
            total = weighted[ring[alike[face, ring]]].sum(axis=0)
            expected = total / np.linalg.norm(total) if total.any() else unit[face]
            got = found[face, faces[face] == vertex]
            np.testing.assert_allclose(got, np.broadcast_to(expected, got.shape), atol=1e-9)


def test_several_colourings_are_the_pictures_one_by_one():
    vertices, faces = box((0, 0, 0), (1, 2, 3))
    colours = [(0.9, 0.2, 0.1), np.random.default_rng(0).random((8, 3))]
    together = render_colourings(vertices, faces, colours, size=40)
    assert (together == [render_mesh(vertices, faces, colours=c, size=40) for c in colours]).all()
    assert (together[0] != together[1]).any() and render_colourings(vertices, faces[:0], colours, size=4).shape[0] == 2


def test_grid_of_rows_labels_and_a_missing_mesh():
    shape = box((0, 0, 0), (1, 2, 3))
    one = render_grid([shape, None], size=40, gap=4, occlusion_rays=0)
    assert one.shape == (4 + 44, 4 + 2 * 44, 3)
    assert (one[10:30, 60:80] == one[20, 70]).all()
    rows = render_grid(
        [[shape, shape], [shape]], size=40, gap=4, labels=[["a", "b"], ["c"]], column_titles=["x", "y"],
        occlusion_rays=0,
    )
    assert rows.shape[0] > 2 * 44 and rows.shape[1] == 92
    with pytest.raises(ValueError, match="no mesh"):
        render_grid([])


def test_colours_and_their_maps():
    values = np.array([-2.0, -1, 0, 1, 2, np.nan])
    colours = diverging_colours(values, 1.0)
    np.testing.assert_array_equal(colours[0], colours[1])
    np.testing.assert_array_equal(colours[3], colours[4])
    assert colours[1, 2] > colours[1, 0] and colours[3, 0] > colours[3, 2] and colours[2].min() > 0.85
    np.testing.assert_array_equal(colours[5], 0.25)
    assert sequential_colours(values[2:4], 1.0)[0].mean() > sequential_colours(values[2:4], 1.0)[1].mean()
    vertices, faces = box((0, 0, 0), (1, 1, 1))
    red = np.where(vertices[:, :1] > 0.5, [[1.0, 0, 0]], [[0, 0, 1.0]])  # patient's right red, left blue
    image = render_mesh(vertices, faces, size=32, azimuth_deg=0, elevation_deg=0, colours=red).astype(int)
    assert image[16, 4, 0] > image[16, 4, 2] + 50 and image[16, 27, 2] > image[16, 27, 0] + 50
    with pytest.raises(ValueError, match=r"\[8, 3\], got \[7, 3\]"):
        render_mesh(vertices, faces, colours=red[:7])
    with pytest.raises(ValueError, match="limit"):
        diverging_colours(values, 0.0)


def test_empty_mesh_gives_a_picture():
    image = render_mesh(np.zeros((0, 3)), np.zeros((0, 3), int), size=16)
    assert image.shape == (16, 16, 3) and (image == image[0, 0]).all()


def test_png_round_trip(tmp_path: Path):
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, size=(13, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decode_png(png_bytes(image)), image)
    np.testing.assert_array_equal(decode_png(png_bytes(image[..., 0]))[..., 0], image[..., 0])
    write_png(tmp_path / "a.png", image)
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    for bad in (image.astype(float), image[..., :2], image[:0]):
        with pytest.raises(ValueError, match="image"):
            png_bytes(bad)


def test_text_is_drawn_inside_and_cut():
    canvas = np.full((20, 60, 3), 255, dtype=np.uint8)
    draw_text(canvas, "iW", 2, 30, width=60)
    ink = (canvas < 100).all(axis=2)
    assert ink.sum() > 40 and not ink[:, :15].any() and not ink[:2].any()
    again = np.full((20, 60, 3), 255, dtype=np.uint8)
    draw_text(again, "WWWWWWWWWWWWWWWWWWWWWWWW", 2, 30, width=60)
    draw_text(again, "\N{SNOWMAN}", -30, 200, width=60)
