"""Mesh -> sparse TSDF on CUDA: the CPU's result, and the brute-force oracle's. Needs NumPy, SciPy, PyTorch and Warp."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from sdf_oracle import assert_matches, block_voxels, oracle_distance, oracle_winding

from trellis.geometry.sdf import mesh_to_sparse_sdf
from trellis.geometry.transforms import voxel_centres, world_to_grid

pytest.importorskip("warp", reason="Warp is not installed: a machine that only trains does without")
pytestmark = pytest.mark.gpu


def bent_torus(around: int, across: int) -> tuple[np.ndarray, np.ndarray]:
    """A closed surface of 2 * around * across triangles without symmetry, in mm."""
    u, v = np.meshgrid(np.arange(around) * 2 * np.pi / around, np.arange(across) * 2 * np.pi / across, indexing="ij")
    radius = 10 + 2 * np.sin(2 * u + 1) + 1.5 * np.cos(3 * v + u)
    ring = 30 + radius * np.cos(v)
    points = np.stack([ring * np.cos(u), 0.7 * ring * np.sin(u), radius * np.sin(v) + 5 * np.cos(u)], axis=-1)
    i, j = np.meshgrid(np.arange(around), np.arange(across), indexing="ij")
    a, b = i * across + j, (i + 1) % around * across + j
    c, d = (i + 1) % around * across + (j + 1) % across, i * across + (j + 1) % across
    faces = np.concatenate([np.stack([a, b, c], axis=-1), np.stack([a, c, d], axis=-1)]).reshape(-1, 3)
    return points.reshape(-1, 3) + (40, -60, 300), faces


def plate(thickness: float) -> tuple[np.ndarray, np.ndarray]:
    """A box of 1 x 0.8 x `thickness`."""
    corners = np.stack(np.meshgrid([0, 1], [0, 1], [0, 1], indexing="ij"), -1).reshape(-1, 3)
    sides = [[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]]
    faces = np.array([[q[0], q[i], q[i + 1]] for q in sides for i in (1, 2)])
    return corners * [1.0, 0.8, thickness], faces


def assert_same_as_cpu(vertices: np.ndarray, faces: np.ndarray, resolution: int, **options: object) -> object:
    """The same blocks; values that differ by rounding at most, since the order of float64 sums may differ."""
    cpu = mesh_to_sparse_sdf(vertices, faces, resolution, device="cpu", **options)
    cuda = mesh_to_sparse_sdf(vertices, faces, resolution, device="cuda", **options)
    assert np.array_equal(cpu.block_index, cuda.block_index)
    difference = np.abs(cpu.block_sdf.astype(np.float32) - cuda.block_sdf.astype(np.float32)) * 4
    assert difference.max() <= 0.002  # one step of float16 near 1, in voxels
    assert np.array_equal(np.signbit(cpu.block_sdf), np.signbit(cuda.block_sdf))
    return cuda


RESOLUTIONS = pytest.mark.parametrize("resolution", [40, 64, 256])
SIZES = pytest.mark.parametrize("size", [(24, 12), (300, 200)], ids=["few triangles", "many triangles"])


@RESOLUTIONS
@SIZES
def test_cuda_gives_the_cpu_result(resolution, size):
    assert_same_as_cpu(*bent_torus(*size), resolution)


@RESOLUTIONS
@SIZES
def test_cuda_gives_the_oracle_s_result(resolution, size):
    vertices, faces = bent_torus(*size)
    blocks = mesh_to_sparse_sdf(vertices, faces, resolution, device="cuda")
    coords, values = block_voxels(blocks)
    pick = np.random.default_rng(0).choice(len(coords), 60, replace=False)
    points = voxel_centres(coords[pick], resolution)
    grid = world_to_grid(vertices, blocks.to_world)
    distance = oracle_distance(points, grid, faces) * resolution
    assert_matches(coords[pick], values[pick], distance, oracle_winding(points, grid, faces) > 0.5)


@pytest.mark.parametrize("band", [1, 7])
def test_other_bands_on_cuda(band):
    vertices, faces = bent_torus(40, 30)
    cpu, cuda = (mesh_to_sparse_sdf(vertices, faces, 64, band_voxels=band, device=d) for d in ("cpu", "cuda"))
    assert np.array_equal(cpu.block_index, cuda.block_index)
    assert np.abs(cpu.block_sdf.astype(np.float32) - cuda.block_sdf.astype(np.float32)).max() <= 2**-11


def test_open_surfaces_by_winding_number_on_cuda():
    """Warp's fast winding number is approximate and sums in another order: the sign may differ where it is near 0.5."""
    vertices, faces = bent_torus(60, 40)
    faces = faces[20:]
    cpu, cuda = (
        mesh_to_sparse_sdf(vertices, faces, 64, sign_method="winding", device=device) for device in ("cpu", "cuda")
    )
    assert np.array_equal(cpu.block_index, cuda.block_index)
    assert np.abs(np.abs(cpu.block_sdf.astype(np.float32)) - np.abs(cuda.block_sdf.astype(np.float32))).max() < 0.001
    assert (np.signbit(cpu.block_sdf) != np.signbit(cuda.block_sdf)).mean() < 1e-3


def test_a_plate_between_voxel_centres_on_cuda(caplog):
    with caplog.at_level(logging.WARNING):
        blocks = assert_same_as_cpu(*plate(0.002), 64)
    assert not (blocks.block_sdf < 0).any()
