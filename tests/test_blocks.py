"""Morton order, block lookup, blocks from voxel lists."""

from __future__ import annotations

import numpy as np
import pytest

from trellis.utils.blocks import (
    BlockLookup,
    SparseSDFBlocks,
    block_voxel_offsets,
    blocks_from_voxels,
    c_to_morton_permutation,
    check_resolution,
    morton_encode,
    morton_order,
    spread_signs,
)


def slow_morton(x: int, y: int, z: int) -> int:
    key = 0
    for bit in range(21):
        key |= (x >> bit & 1) << (3 * bit + 2) | (y >> bit & 1) << (3 * bit + 1) | (z >> bit & 1) << (3 * bit)
    return key


def test_morton_keys_against_bit_by_bit():
    rng = np.random.default_rng(0)
    coords = np.concatenate([rng.integers(0, 2**21, (200, 3)), np.eye(3, dtype=np.int64), [[0, 0, 0], [2**21 - 1] * 3]])
    assert morton_encode(coords).tolist() == [slow_morton(*map(int, c)) for c in coords]
    assert morton_encode(np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]])).tolist() == [4, 2, 1]
    assert morton_encode(coords.astype(np.int16)[:0]).shape == (0,)


def test_int16_coordinates_do_not_overflow():
    coords = np.array([[511, 300, 7]], dtype=np.int16)
    assert morton_encode(coords)[0] == slow_morton(511, 300, 7)


def test_permutation_puts_siblings_together():
    order = c_to_morton_permutation()
    assert sorted(order) == list(range(512))
    offsets = block_voxel_offsets()
    assert offsets[1].tolist() == [0, 0, 1] and offsets[64].tolist() == [1, 0, 0]
    in_order = offsets[order]
    parents = (in_order // 2).reshape(64, 8, 3)
    assert (parents == parents[:, :1]).all()
    assert in_order[:8].tolist() == [[i >> 2, i >> 1 & 1, i & 1] for i in range(8)]


def test_lookup_finds_rows_and_says_where_there_is_none():
    rng = np.random.default_rng(1)
    blocks = np.unique(rng.integers(0, 40, (300, 3)), axis=0)
    blocks = blocks[rng.permutation(len(blocks))].astype(np.int16)
    lookup = BlockLookup(blocks)
    assert lookup.find(blocks).tolist() == list(range(len(blocks)))
    queries = rng.integers(-2, 42, (2000, 3))
    table = {tuple(map(int, b)): i for i, b in enumerate(blocks)}
    assert lookup.find(queries).tolist() == [table.get(tuple(map(int, q)), -1) for q in queries]
    assert lookup.find(np.zeros((0, 3), dtype=np.int64)).shape == (0,)
    assert BlockLookup(np.zeros((0, 3), dtype=np.int16)).find(queries).tolist() == [-1] * 2000


@pytest.mark.parametrize("bad", [0, 24, 33, 500, 4104, -64, 64.5])
def test_resolutions_that_are_refused(bad):
    with pytest.raises(ValueError, match="resolution"):
        check_resolution(bad)


def test_container_checks_shapes_and_types():
    index, sdf, matrix = np.zeros((1, 3), np.int16), np.zeros((1, 8, 8, 8), np.float16), np.eye(4)
    blocks = SparseSDFBlocks(index, sdf, np.diag([96.0, 96, 96, 1]), 64)
    assert blocks.num_blocks == 1 and blocks.voxel_size_mm == 1.5 and blocks.active.all()
    assert SparseSDFBlocks(index, sdf, None, 64).voxel_size_mm is None
    for args in (
        (index.astype(np.int32), sdf, matrix, 64),
        (index[:, :2], sdf, matrix, 64),
        (index, sdf.astype(np.float32), matrix, 64),
        (index, sdf[:, :4], matrix, 64),
        (index, sdf, matrix[:3], 64),
        (index, sdf, matrix, 60),
    ):
        with pytest.raises(ValueError, match=r"must be"):
            SparseSDFBlocks(*args)


def shell(resolution: int = 32):
    """Voxel list of a sphere's band that is cut as old files have it: nothing outside the band."""
    index = np.stack(np.meshgrid(*[np.arange(resolution)] * 3, indexing="ij"), -1).reshape(-1, 3)
    value = (np.linalg.norm(index + 0.5 - resolution / 2, axis=1) - 11) / 2
    band = np.abs(value.astype(np.float16)) < 1
    return index[band], value[band], index, value


def test_voxel_list_round_trip_and_signs_of_what_is_missing():
    coords, values, index, value = shell()
    shuffled = np.random.default_rng(2).permutation(len(coords))
    blocks = blocks_from_voxels(coords[shuffled], values[shuffled, None], 32, to_world=None, band_voxels=2)
    assert (morton_order(blocks.block_index) == np.arange(blocks.num_blocks)).all()
    back, back_values = blocks.to_voxels()
    order = np.lexsort(back.T[::-1])
    assert np.array_equal(back[order], coords) and back.dtype == np.int32 and back_values.shape == (len(coords), 1)
    np.testing.assert_array_equal(back_values[order, 0], values.astype(np.float16).astype(np.float32))
    full = np.clip(value, -1, 1).reshape(32, 32, 32)
    for block, sdf in zip(blocks.block_index, blocks.block_sdf):
        x, y, z = block * 8
        truth = full[x : x + 8, y : y + 8, z : z + 8]
        np.testing.assert_array_equal(sdf < 0, truth.astype(np.float16) < 0)
        assert np.isin(sdf[np.abs(truth) == 1], (-1, 1)).all()


@pytest.mark.parametrize(
    ("coords", "values", "message"),
    [
        ([[0, 0, 32]], [0.5], r"\[0, 32\)"),
        ([[0, -1, 0]], [0.5], r"\[0, 32\)"),
        ([[1, 2, 3], [1, 2, 3]], [0.5, 0.5], "twice"),
        ([[1, 2, 3]], [1.5], r"\[-1, 1\]"),
        ([[1, 2, 3]], [np.nan], "finite"),
        ([[1, 2, 3]], [0.1, 0.2], "as many"),
    ],
)
def test_bad_voxel_lists(coords, values, message):
    with pytest.raises(ValueError, match=message):
        blocks_from_voxels(np.array(coords), np.array(values), 32, to_world=None, band_voxels=4)


def test_no_voxels_are_no_blocks():
    blocks = blocks_from_voxels(np.zeros((0, 3)), np.zeros(0), 32, to_world=None, band_voxels=4)
    assert blocks.num_blocks == 0 and blocks.to_voxels()[0].shape == (0, 3)


def test_blocks_whose_voxels_are_all_at_the_band_are_dropped():
    coords = np.array([[0, 0, 0], [8, 0, 0]])
    blocks = blocks_from_voxels(coords, np.array([1.0, -0.5]), 32, to_world=None, band_voxels=4)
    assert blocks.block_index.tolist() == [[1, 0, 0]] and (blocks.block_sdf[0].reshape(-1)[1:] == -1).all()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_signs_spread_over_faces_from_listed_voxels(axis):
    sdf, known = np.zeros((2, 8, 8, 8), np.float16), np.zeros((2, 8, 8, 8), bool)
    layers, listed = np.moveaxis(sdf[0], axis, 0), np.moveaxis(known[0], axis, 0)
    layers[2], layers[3], listed[2:4] = -0.25, 0.25, True
    sdf[1, 5, 0, 7], known[1, 5, 0, 7] = -0.5, True
    spread = spread_signs(sdf, known)
    one = np.moveaxis(spread[0], axis, 0)
    assert (one[:2] == -1).all() and (one[2] == -0.25).all() and (one[3] == 0.25).all() and (one[4:] == 1).all()
    assert np.count_nonzero(spread[1] == -1) == 511 and spread[1, 5, 0, 7] == -0.5
    with pytest.raises(ValueError, match="without any known"):
        spread_signs(sdf, np.zeros_like(known))
