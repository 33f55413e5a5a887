"""Blocks onto a volume's voxels: against spheres whose inside is known, on straight, oblique and mirrored grids."""

from __future__ import annotations

import numpy as np
import pytest

from trellis.geometry.voxelize import InsideTest, grid_around, voxelize
from trellis.utils.blocks import SparseSDFBlocks, block_voxel_offsets, morton_order

CENTRE = np.array([12.0, -7.0, 30.0])
RADIUS_MM = 20.0


def sphere_blocks(resolution: int = 64, *, hollow: bool = False) -> SparseSDFBlocks:
    """A sphere of 20 mm around CENTRE; `hollow` cuts out a concentric one of 8 mm."""
    to_world = np.eye(4)
    to_world[:3, :3] *= 2 * RADIUS_MM / 0.95
    to_world[:3, 3] = CENTRE
    side = resolution // 8
    index = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), -1).reshape(-1, 3)
    voxels = index[:, None] * 8 + block_voxel_offsets()
    r = np.linalg.norm(((voxels + 0.5) / resolution - 0.5) * to_world[0, 0], axis=-1)
    distance = r - RADIUS_MM
    if hollow:
        distance = np.maximum(distance, 8.0 - r)
    values = np.clip(distance / (4 * to_world[0, 0] / resolution), -1, 1).astype(np.float16)
    keep = (np.abs(values) < 1).any(axis=1)
    index, values = index[keep], values[keep]
    order = morton_order(index)
    return SparseSDFBlocks(
        index[order].astype(np.int16), values[order].reshape(-1, 8, 8, 8), to_world, resolution
    )


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
    inside = voxelize(sphere_blocks(hollow=hollow), affine, shape)
    radius = radius_of(affine, shape)
    expected = (radius < RADIUS_MM) & ~(hollow & (radius < 8))
    sure = (np.abs(radius - RADIUS_MM) > 0.05) & (np.abs(radius - 8) > 0.1)
    assert expected.sum() > 5000
    np.testing.assert_array_equal(inside[sure], expected[sure])


def test_volume_that_cuts_or_misses_the_shape():
    blocks = sphere_blocks()
    affine = np.eye(4)
    affine[:3, 3] = CENTRE
    inside = voxelize(blocks, affine, (30, 25, 22))
    radius = radius_of(affine, (30, 25, 22))
    sure = np.abs(radius - RADIUS_MM) > 0.05
    np.testing.assert_array_equal(inside[sure], (radius < RADIUS_MM)[sure])
    affine[:3, 3] = CENTRE + 1000
    assert not voxelize(blocks, affine, (5, 6, 7)).any()


def test_volume_of_a_sphere_on_its_own_grid():
    blocks = sphere_blocks()
    affine, shape = grid_around(blocks, 0.5)
    inside = voxelize(blocks, affine, shape)
    exact = 4 / 3 * np.pi * RADIUS_MM**3
    assert abs(inside.sum() * 0.125 / exact - 1) < 2e-3
    assert not inside[0].any() and not inside[:, -1].any()


def test_own_voxel_centres_take_the_stored_signs():
    blocks = sphere_blocks()
    voxels = (blocks.block_index.astype(np.int64)[:, None] * 8 + block_voxel_offsets()).reshape(-1, 3)
    np.testing.assert_array_equal(InsideTest(blocks)(voxels.astype(float)), blocks.block_sdf.reshape(-1) < 0)


def test_no_block_and_bad_arguments():
    full = sphere_blocks()
    empty = SparseSDFBlocks(full.block_index[:0], full.block_sdf[:0], full.to_world, 64)
    assert not voxelize(empty, np.eye(4), (4, 4, 4)).any()
    assert not InsideTest(empty)(np.zeros((3, 3))).any()
    with pytest.raises(ValueError, match="to_world"):
        voxelize(SparseSDFBlocks(full.block_index, full.block_sdf, None, 64), np.eye(4), (4, 4, 4))
    for spacing in (0.0, -1.0, float("nan"), 1e-6):
        with pytest.raises(ValueError, match="spacing_mm"):
            grid_around(full, spacing)
