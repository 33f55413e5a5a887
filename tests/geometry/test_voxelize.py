"""Meshes onto a volume's voxels: against spheres whose inside is known, on straight, oblique and mirrored grids."""

from __future__ import annotations

import numpy as np
import pytest

from trellis.geometry.voxelize import grid_around, voxelize

CENTRE = np.array([12.0, -7.0, 30.0])
RADIUS_MM = 20.0


def sphere(radius: float, rings: int = 120) -> tuple[np.ndarray, np.ndarray]:
    """A fine latitude-longitude sphere around CENTRE, outward; its chords stay within 0.02 mm of the sphere."""
    theta = np.linspace(0, np.pi, rings + 1)[1:-1]
    phi = np.linspace(0, 2 * np.pi, 2 * rings, endpoint=False)
    t, p = np.meshgrid(theta, phi, indexing="ij")
    body = np.stack([np.sin(t) * np.cos(p), np.sin(t) * np.sin(p), np.cos(t)], -1).reshape(-1, 3)
    points = np.concatenate([[[0, 0, 1]], body, [[0, 0, -1]]]) * radius + CENTRE
    n = len(phi)
    first = 1 + np.arange(n)
    faces = [np.stack([np.zeros(n, int), first, 1 + (np.arange(n) + 1) % n], -1)]
    for ring in range(len(theta) - 1):
        a, b = 1 + ring * n + np.arange(n), 1 + ring * n + (np.arange(n) + 1) % n
        faces += [np.stack([a, a + n, b], -1), np.stack([b, a + n, b + n], -1)]
    last = 1 + (len(theta) - 1) * n + np.arange(n)
    following = 1 + (len(theta) - 1) * n + (np.arange(n) + 1) % n
    faces.append(np.stack([last, np.full(n, len(points) - 1), following], -1))
    return points, np.concatenate(faces)


def hollow_sphere() -> tuple[np.ndarray, np.ndarray]:
    outer, inner = sphere(RADIUS_MM), sphere(8.0)
    return np.concatenate([outer[0], inner[0]]), np.concatenate([outer[1], inner[1][:, ::-1] + len(outer[0])])


def radius_of(affine: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    index = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), -1)
    return np.linalg.norm(index @ affine[:3, :3].T + affine[:3, 3] - CENTRE, axis=-1)


def rotation(degrees: float) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]]) @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]])


@pytest.mark.parametrize("hollow", [False, True])
@pytest.mark.parametrize("kind", ["straight", "oblique", "mirrored", "sheared"])
def test_sphere_on_other_grids(kind: str, hollow: bool):
    matrix = np.diag([1.1, 0.9, 1.7])
    if kind == "oblique":
        matrix = rotation(33) @ matrix
    elif kind == "mirrored":
        matrix = matrix @ np.diag([-1, 1, 1])
    elif kind == "sheared":
        matrix = matrix + np.array([[0, 0.4, 0], [0, 0, 0], [0.2, 0, 0]])
    shape = (61, 67, 45)
    affine = np.eye(4)
    affine[:3, :3] = matrix
    affine[:3, 3] = CENTRE - matrix @ (np.array(shape) / 2 + [0.3, -0.2, 0.1])
    inside = voxelize(*(hollow_sphere() if hollow else sphere(RADIUS_MM)), affine, shape)
    radius = radius_of(affine, shape)
    expected = (radius < RADIUS_MM) & ~(hollow & (radius < 8))
    sure = (np.abs(radius - RADIUS_MM) > 0.02) & (np.abs(radius - 8) > 0.02)
    assert expected.sum() > 5000 and sure.mean() > 0.99
    np.testing.assert_array_equal(inside[sure], expected[sure])


def test_volume_that_cuts_or_misses_the_shape():
    affine = np.eye(4)
    affine[:3, 3] = CENTRE
    inside = voxelize(*sphere(RADIUS_MM), affine, (30, 25, 22))
    radius = radius_of(affine, (30, 25, 22))
    sure = np.abs(radius - RADIUS_MM) > 0.02
    np.testing.assert_array_equal(inside[sure], (radius < RADIUS_MM)[sure])
    affine[:3, 3] = CENTRE + 1000
    assert not voxelize(*sphere(RADIUS_MM), affine, (5, 6, 7)).any()


def test_grid_around_holds_the_shape():
    vertices, faces = sphere(RADIUS_MM)
    affine, shape = grid_around(vertices, 0.7)
    inside = voxelize(vertices, faces, affine, shape)
    exact = 4 / 3 * np.pi * RADIUS_MM**3
    assert abs(inside.sum() * 0.7**3 / exact - 1) < 5e-3
    first, last = affine[:3, 3], affine[:3, 3] + 0.7 * (np.array(shape) - 1)
    assert (first <= vertices.min(axis=0) + 1e-9).all() and (last >= vertices.max(axis=0) - 1e-9).all()
    assert shape == (59, 59, 59)


def test_no_mesh_and_bad_arguments():
    vertices, faces = sphere(RADIUS_MM, rings=8)
    assert not voxelize(vertices[:0], faces[:0], np.eye(4), (4, 4, 4)).any()
    with pytest.raises(ValueError, match="closed"):
        affine = np.eye(4)
        affine[:3, 3] = CENTRE - 25
        voxelize(vertices, faces[:-3], affine, (50, 50, 50))
    with pytest.raises(ValueError, match="affine"):
        voxelize(vertices, faces, np.diag([1.0, 1.0, 0.0, 1.0]), (4, 4, 4))
    for spacing in (0.0, -1.0, float("nan"), 1e-6):
        with pytest.raises(ValueError, match="spacing_mm"):
            grid_around(vertices, spacing)
    with pytest.raises(ValueError, match="no vertices"):
        grid_around(vertices[:0], 1.0)
