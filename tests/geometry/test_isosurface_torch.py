"""The surface on tensors against the numpy one: the same vertices and the same triangles, whatever the blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_isosurface import (
    analytic_blocks,
    assert_closed_manifold,
    box,
    capsule,
    noise_blocks,
    signed_volume,
    sphere,
    torus,
)

from trellis.geometry.block_complement import PaddedBlocks
from trellis.geometry.block_complement_torch import PaddedBlockTensors, component_labels
from trellis.geometry.isosurface import extract_mesh
from trellis.geometry.isosurface_torch import (
    BYTES_PER_BLOCK,
    BYTES_PER_CHUNK_BLOCK,
    BYTES_PER_CHUNK_FACE,
    BYTES_PER_VERTEX,
    ChunkSizes,
    extract_mesh_on,
    extract_mesh_tensors,
    sizes_within,
    surface_bytes,
)
from trellis.utils.blocks import SparseSDFBlocks

TO_WORLD = np.array([[80.0, 0, 0, 5], [0, 80, 0, -40], [0, 0, 80, 300], [0, 0, 0, 1]])


def rounded(blocks: SparseSDFBlocks, seed: int, noise: float = 0.02) -> SparseSDFBlocks:
    """The field as a network would give it: not quite a distance."""
    added = np.random.default_rng(seed).normal(0, noise, blocks.block_sdf.shape)
    values = np.clip(blocks.block_sdf + added, -1, 1).astype(np.float16)
    return SparseSDFBlocks(blocks.block_index, values, blocks.to_world, blocks.resolution)


def some(blocks: SparseSDFBlocks, share: float, seed: int) -> SparseSDFBlocks:
    """Blocks missing, so that the surface runs into empty space."""
    kept = np.random.default_rng(seed).random(blocks.num_blocks) < share
    return SparseSDFBlocks(blocks.block_index[kept], blocks.block_sdf[kept], blocks.to_world, blocks.resolution)


def turned(distance, angles):
    """A distance function turned about z, then x."""
    (cz, sz), (cx, sx) = ((np.cos(a), np.sin(a)) for a in angles)
    turn = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]]) @ np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return lambda p: distance(p @ turn.T)


BALL = analytic_blocks(sphere((0.011, 0.02, -0.03), 0.3), 64, TO_WORLD)
CASES = {
    "sphere": BALL,
    "torus": analytic_blocks(torus((0.001, 0.002, 0.003), 0.3, 0.12), 96),
    "capsule": analytic_blocks(capsule((-0.2, -0.13, -0.1), (0.2, 0.21, 0.17), 0.12), 64),
    "box": analytic_blocks(box((-0.02, 0.03, 0.01), (0.3, 0.2, 0.25)), 64, TO_WORLD),
    "turned box": analytic_blocks(turned(box((-0.02, 0.03, 0.01), (0.3, 0.2, 0.25)), (0.4, 0.9)), 64, TO_WORLD),
    "mirrored": SparseSDFBlocks(BALL.block_index, BALL.block_sdf, TO_WORLD @ np.diag([-1.0, 1, 1, 1]), 64),
    "noisy": rounded(BALL, 0),
    "noisy box": rounded(analytic_blocks(turned(box((0, 0, 0), (0.2, 0.2, 0.3)), (0.4, 0.9)), 64), 0, 0.002),
    "open band": some(rounded(BALL, 1), 0.7, 2),
    "one block": SparseSDFBlocks(np.array([[2, 1, 3]], dtype=np.int16), noise_blocks(4).block_sdf[:1], None, 32),
    **{f"noise {seed}": noise_blocks(seed) for seed in range(4)},
}


def by_row(rows: np.ndarray) -> np.ndarray:
    return rows[np.lexsort(rows.T[::-1])]


def compare(got: tuple[np.ndarray, np.ndarray], want: tuple[np.ndarray, np.ndarray]) -> None:
    np.testing.assert_allclose(got[0], want[0], rtol=0, atol=1e-9 * max(1.0, np.abs(want[0]).max(initial=0)))
    assert got[1].dtype == np.int64
    np.testing.assert_array_equal(by_row(got[1]), by_row(want[1]))


@pytest.mark.parametrize("name", CASES)
def test_the_same_mesh_as_numpy(name):
    blocks = CASES[name]
    want = extract_mesh(blocks)
    got = extract_mesh_on(blocks, "cpu")
    assert len(want[1]) > 20
    assert_closed_manifold(got[1], len(got[0]))
    compare(got, want)
    assert name.startswith(("noise", "one", "open")) or signed_volume(*got) > 0


@pytest.mark.parametrize("sizes", [ChunkSizes(3, 70), ChunkSizes(11, 900)])
def test_chunks_change_nothing(sizes):
    blocks = CASES["open band"]
    given = (torch.from_numpy(blocks.block_index), torch.from_numpy(blocks.block_sdf))
    options = {"resolution": blocks.resolution, "band_voxels": blocks.band_voxels, "to_world": blocks.to_world}
    vertices, faces = extract_mesh_tensors(*given, **options, sizes=sizes)
    compare((vertices.numpy(), faces.long().numpy()), extract_mesh(blocks))


def test_shell_rows_and_signs_are_those_of_numpy():
    for seed in range(12):
        blocks = noise_blocks(seed)
        want = PaddedBlocks(blocks)
        got = PaddedBlockTensors(
            torch.from_numpy(blocks.block_index), torch.from_numpy(blocks.block_sdf), blocks.resolution
        )
        np.testing.assert_array_equal(got.coords.numpy(), want.coords)
        np.testing.assert_array_equal(got.shell_inside.numpy(), want.shell_inside)
        rows = np.arange(len(want.coords))
        np.testing.assert_array_equal(got.neighbours(torch.from_numpy(rows)).numpy(), want.neighbours(rows))


def test_components_of_long_chains():
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    chain = order[:600]
    labels = component_labels(chain[:-1], chain[1:], 1000)
    assert (labels[chain] == chain.min()).all()
    rest = order[600:]
    assert torch.equal(labels[rest], rest)


def test_nothing_and_a_full_cube():
    index = np.stack(np.meshgrid(*[np.arange(4)] * 3, indexing="ij"), -1).reshape(-1, 3).astype(np.int16)
    full = SparseSDFBlocks(index, np.full((64, 8, 8, 8), -1, dtype=np.float16), None, 32)
    compare(extract_mesh_on(full, "cpu"), extract_mesh(full))
    for count in (0, 64):
        vertices, faces = extract_mesh_on(SparseSDFBlocks(index[:count], -full.block_sdf[:count], None, 32), "cpu")
        assert vertices.shape == (0, 3) and faces.shape == (0, 3)


def test_refuses_what_is_not_a_field():
    values = np.ones((2, 8, 8, 8), dtype=np.float16)
    index = np.array([[0, 0, 0], [1, 0, 0]], dtype=np.int16)
    broken = values.copy()
    broken[1, 2, 3, 4] = np.nan
    with pytest.raises(ValueError, match="finite"):
        extract_mesh_on(SparseSDFBlocks(index, broken, None, 32), "cpu")
    with pytest.raises(ValueError, match="twice"):
        extract_mesh_on(SparseSDFBlocks(index[[0, 0]], values, None, 32), "cpu")
    with pytest.raises(ValueError, match=r"\[0, 4\)"):
        extract_mesh_on(SparseSDFBlocks(index + np.int16(3), values, None, 32), "cpu")


def test_memory_is_counted_from_the_surface():
    values = torch.from_numpy(BALL.block_sdf)
    vertices = len(extract_mesh(BALL)[0])
    large, small = surface_bytes(values), surface_bytes(values, ChunkSizes(1, 1))
    held = small - BYTES_PER_BLOCK * len(values) - BYTES_PER_CHUNK_BLOCK - BYTES_PER_CHUNK_FACE
    assert 0.97 < held / (BYTES_PER_VERTEX * vertices) < 1.03
    assert sizes_within(values, large) == ChunkSizes()
    assert surface_bytes(values, sizes_within(values, large - 1)) < large
    assert sizes_within(values, small) is None
