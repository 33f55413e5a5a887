"""The SparseSDF dataset: order, masks, levels, crops, old files, and what is refused."""

from __future__ import annotations

import csv
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from trellis.datasets.crop import _counts_with_neighbours, crop_generator, draw_crop
from trellis.datasets.sparse_sdf import SparseSDF, active_counts, collate, level_sizes
from trellis.utils.blocks import SparseSDFBlocks, block_voxel_offsets, c_to_morton_permutation, morton_order
from trellis.utils.io_utils import save_sparse_sdf


def ellipsoid_blocks(resolution: int, radii=(0.45, 0.3, 0.2), label: str = "egg") -> SparseSDFBlocks:
    """An asymmetric shell with a TSDF-like value: enough structure to notice a swapped axis."""
    n = resolution // 8
    blocks = np.stack(np.meshgrid(*[np.arange(n)] * 3, indexing="ij"), -1).reshape(-1, 3)
    voxels = blocks[:, None] * 8 + block_voxel_offsets()[None]
    centre = (voxels + 0.5) / resolution - 0.5
    distance = (np.linalg.norm(centre / np.array(radii), axis=-1) - 1) * min(radii)
    sdf = np.clip(distance * resolution / 4, -1, 1).astype(np.float16)
    keep = (np.abs(sdf) < 1).any(axis=1)
    blocks, sdf = blocks[keep], sdf[keep]
    order = morton_order(blocks)
    to_world = np.diag([80.0, 80.0, 80.0, 1.0])
    return SparseSDFBlocks(
        blocks[order].astype(np.int16), sdf[order].reshape(-1, 8, 8, 8), to_world, resolution, label=label
    )


def write_dataset(root: Path, shapes: dict[str, SparseSDFBlocks], splits=None, schema=2, patient="p"):
    resolution = next(iter(shapes.values())).resolution
    rows = []
    for name, blocks in shapes.items():
        save_sparse_sdf(root / "sparse_sdf" / f"{name}_r{resolution}.npz", blocks, schema=schema)
        rows.append({
            "sha256": name, "label": blocks.label, "patient_id": patient, "split": (splits or {}).get(name, "train"),
            f"r{resolution}_num_voxels": int(blocks.active.sum()), f"r{resolution}_num_blocks": blocks.num_blocks,
            "error": "",
        })
    with open(root / "metadata.csv", "w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return root


@pytest.fixture(scope="module")
def shape() -> SparseSDFBlocks:
    return ellipsoid_blocks(64)


@pytest.fixture
def root(tmp_path, shape):
    other = ellipsoid_blocks(64, radii=(0.2, 0.25, 0.4), label="roll")
    return write_dataset(tmp_path, {"bb": shape, "aa": other, "cc": shape}, {"cc": "test"}, patient="")


def test_sample_matches_the_voxel_list_of_the_file(root, shape):
    dataset = SparseSDF(root, resolution=64)
    assert [item.sha256 for item in dataset.items] == ["aa", "bb"]
    sample = dataset[1]
    coords, values = shape.to_voxels()
    offsets = block_voxel_offsets()[c_to_morton_permutation()]
    block, voxel = np.nonzero(sample["active"].numpy())
    assert sample["block_coords"].dtype == torch.int32 and sample["block_sdf"].dtype == torch.float16
    np.testing.assert_array_equal(sample["block_coords"].numpy()[block] * 8 + offsets[voxel], coords)
    np.testing.assert_array_equal(sample["block_sdf"].numpy()[block, voxel].astype(np.float32), values[:, 0])
    assert sample["label"] == "egg" and sample["sha256"] == "bb" and not sample["cropped"]
    np.testing.assert_array_equal(sample["to_world"].numpy(), shape.to_world)


def test_level_sizes_count_distinct_voxels_at_each_stride(root, shape):
    coords, _ = shape.to_voxels()
    expected = [len(np.unique(coords // stride, axis=0)) for stride in (1, 2, 4, 8)]
    assert SparseSDF(root, resolution=64)[1]["level_sizes"] == expected
    assert expected[3] == shape.num_blocks
    assert level_sizes(np.zeros((0, 512), bool)) == [0, 0, 0, 0]


def test_active_counts(shape):
    expected = shape.active.reshape(-1, 512).sum(axis=1)
    np.testing.assert_array_equal(active_counts(shape.block_sdf), expected)
    assert active_counts(np.zeros((3, 8, 8, 8), np.float16)).tolist() == [512] * 3
    assert active_counts(shape.block_sdf[:0]).shape == (0,)


def counted_windows(coords, side, shift):
    """How many attention windows the blocks of a batch lie in, and the most of them in one."""
    windows = torch.cat([coords[:, :1], (coords[:, 1:] + shift) // side], 1)
    counts = torch.unique(windows, dim=0, return_counts=True)[1]
    return len(counts), int(counts.max())


def test_collate_offsets_sums_and_keeps_the_order(root):
    dataset = SparseSDF(root, resolution=64)
    first, second = dataset[0], dataset[1]
    batch = collate([second, first, second])
    n = [len(s["block_coords"]) for s in (second, first, second)]
    assert batch["block_coords"].shape == (sum(n), 4) and batch["block_coords"].dtype == torch.int32
    assert batch["block_coords"][:, 0].tolist() == [0] * n[0] + [1] * n[1] + [2] * n[2]
    assert torch.equal(batch["block_coords"][n[0] : n[0] + n[1], 1:], first["block_coords"])
    assert torch.equal(batch["block_sdf"][n[0] : n[0] + n[1]], first["block_sdf"])
    assert batch["blocks_per_sample"].tolist() == n and batch["blocks_per_sample"].dtype == torch.int64
    assert batch["level_sizes"] == [2 * a + b for a, b in zip(second["level_sizes"], first["level_sizes"])]
    assert batch["window_sizes"] == {kind: counted_windows(batch["block_coords"], *kind) for kind in ((8, 0), (8, 4))}
    assert batch["label"] == ["egg", "roll", "egg"] and batch["cropped"].tolist() == [False] * 3
    assert batch["to_world"].shape == (3, 4, 4) and batch["to_world"].dtype == torch.float64
    assert batch["resolution"] == 64 and bool(batch["loss_blocks"].all())


def test_collate_refuses_no_sample_and_mixed_resolutions(root):
    sample = SparseSDF(root, resolution=64)[0]
    with pytest.raises(ValueError, match="at least one"):
        collate([])
    with pytest.raises(ValueError, match="one resolution"):
        collate([sample, {**sample, "resolution": 128}])


def test_schema_1_and_flat_folders_are_read(tmp_path, shape, caplog):
    save_sparse_sdf(tmp_path / "dd_r64.npz", shape, schema=1)
    with caplog.at_level(logging.INFO):
        dataset = SparseSDF(str(tmp_path), resolution=64)
    assert sum("training data" in record.message for record in caplog.records) == 1
    sample = dataset[0]
    assert torch.isnan(sample["to_world"]).all()
    coords, _ = shape.to_voxels()
    assert sample["level_sizes"][0] == len(coords)
    with pytest.raises(ValueError, match="no shape of split 'val'"):
        SparseSDF(tmp_path, resolution=64, split="val")


def test_old_unsigned_files_are_refused_by_name(tmp_path, shape):
    coords, values = shape.to_voxels()
    np.savez(tmp_path / "ee_r64.npz", sparse_sdf=np.abs(values) * 4 / 64, sparse_index=coords, resolution=64)
    with pytest.raises(ValueError, match=r"ee_r64\.npz.*unsigned"):
        SparseSDF(tmp_path, resolution=64)[0]
    assert SparseSDF(tmp_path, resolution=64, convert_unsigned=True)[0]["block_sdf"].min() >= 0


def test_min_points_refuses_and_says_so(root, shape, caplog):
    count = int(shape.active.sum())
    other = SparseSDF(root, resolution=64)[0]["level_sizes"][0]
    assert other != count
    with caplog.at_level(logging.WARNING):
        dataset = SparseSDF(root, resolution=64, min_points=min(count, other) + 1)
    assert len(dataset) == 1 and len(dataset.refused) == 1
    assert "min_points" in caplog.text
    with pytest.raises(ValueError, match="no shape of split"):
        SparseSDF(root, resolution=64, min_points=10**9)


def test_expected_blocks_are_those_of_the_samples_and_about_those_of_crops(root):
    dataset = SparseSDF(root, resolution=64)
    assert dataset.expected_blocks() == [len(dataset[i]["block_coords"]) for i in range(len(dataset))]
    half = dataset.items[1].num_voxels // 2
    crops = SparseSDF(root, resolution=64, max_points=half).expected_blocks()
    assert crops[1] == pytest.approx(dataset.items[1].num_blocks / 2, abs=1)
    (root / "metadata.csv").write_text((root / "metadata.csv").read_text().replace("r64_num_blocks", "other"))
    assert SparseSDF(root, resolution=64).expected_blocks() is None


def test_crop_is_a_box_within_budget_with_a_silent_rim(root, shape):
    budget = 4000
    dataset = SparseSDF(root, resolution=64, max_points=budget)
    full = SparseSDF(root, resolution=64)[1]
    assert dataset.share_cropped == 1.0
    everything = {tuple(c): i for i, c in enumerate(full["block_coords"].tolist())}
    for epoch in range(6):
        sample = dataset[(epoch, 1)]
        coords = sample["block_coords"].numpy()
        assert sample["cropped"] and 0 < sample["level_sizes"][0] <= budget
        rows = [everything[tuple(c)] for c in coords.tolist()]
        assert rows == sorted(rows)
        assert torch.equal(sample["block_sdf"], full["block_sdf"][rows])
        low, high = coords.min(axis=0), coords.max(axis=0)
        kept = set(map(tuple, coords.tolist()))
        for block in everything:
            assert (block in kept) == bool((low <= block).all() and (block <= high).all())
        assert sample["loss_blocks"].any()
        for block, loss in zip(coords, sample["loss_blocks"].tolist()):
            cut = any(
                tuple(block + step) in everything and tuple(block + step) not in kept
                for step in (np.array(np.unravel_index(i, (3, 3, 3))) - 1 for i in range(27))
            )
            assert not (loss and cut), "a block beside a removed one must carry no loss"


def test_sides_that_are_not_cut_keep_their_loss():
    index = np.stack([np.arange(20), np.zeros(20), np.zeros(20)], axis=1).astype(np.int16)
    crop = draw_crop(index, np.full(20, 100), 1000, np.random.default_rng(0))
    kept = np.flatnonzero(crop.keep)
    assert len(kept) == 10 and np.array_equal(kept, np.arange(kept[0], kept[0] + 10))
    silent = set(np.flatnonzero(~crop.loss))
    assert silent == {int(i) for i in (kept[0], kept[-1]) if i not in (0, 19)}


def cube_of_blocks(side: int) -> np.ndarray:
    return np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), -1).reshape(-1, 3).astype(np.int16)


def test_a_budget_for_few_blocks_still_leaves_one_with_loss_and_none_on_the_rim():
    """Of a full cube only the corners fit with their neighbours: 8 blocks, where others need 12, 18 or 27."""
    index, counts = cube_of_blocks(6), np.full(216, 100)
    for seed in range(30):
        crop = draw_crop(index, counts, 1000, np.random.default_rng(seed))
        kept = {tuple(block) for block in index[crop.keep]}
        assert 100 * len(kept) <= 1000 and crop.loss[crop.keep].any()
        for block in index[crop.keep & crop.loss]:
            around = {tuple(b) for b in index if np.abs(b - block).max() <= 1}
            assert around <= kept
    with pytest.raises(ValueError, match=r"max_points must be at least 800, .*; got 799"):
        draw_crop(index, counts, 799, np.random.default_rng(0))


@pytest.mark.parametrize("seed", range(4))
def test_counts_with_neighbours_against_brute_force(seed):
    rng = np.random.default_rng(seed)
    index = cube_of_blocks(7)[rng.random(343) < 0.3].astype(np.int64) + rng.integers(0, 50, 3)
    counts = rng.integers(1, 512, len(index))
    near = np.abs(index[:, None] - index).max(axis=-1) <= 1
    np.testing.assert_array_equal(_counts_with_neighbours(index, counts), near @ counts)


def test_a_shape_that_no_crop_fits_is_refused_by_name(root):
    with pytest.raises(ValueError, match=r"bb_r64\.npz: max_points must be at least \d+, .*; got 512"):
        SparseSDF(root, resolution=64, max_points=512)[1]


def test_crops_depend_on_seed_epoch_and_id_alone(root):
    def draw(seed, epoch, i):
        return SparseSDF(root, resolution=64, max_points=4000, seed=seed)[(epoch, i)]["block_coords"]

    assert torch.equal(draw(0, 3, 1), draw(0, 3, 1))
    changed = [draw(0, e, 1) for e in range(4)] + [draw(1, 0, 1)]
    assert any(not torch.equal(changed[0], other) for other in changed[1:4])
    assert not torch.equal(draw(7, 0, 1), draw(8, 0, 1)) or not torch.equal(draw(7, 1, 1), draw(8, 1, 1))
    assert crop_generator(0, 1, "a").integers(1 << 30) != crop_generator(0, 1, "b").integers(1 << 30)


def test_workers_see_set_epoch_and_draw_the_same(root):
    dataset = SparseSDF(root, resolution=64, max_points=4000)
    loader = DataLoader(dataset, batch_size=2, collate_fn=collate, num_workers=1, persistent_workers=True)
    for epoch in (0, 5):
        dataset.set_epoch(epoch)
        (batch,) = list(loader)
        assert torch.equal(batch["block_coords"], collate([dataset[(epoch, 0)], dataset[(epoch, 1)]])["block_coords"])


def test_a_corrupt_file_is_an_error_with_its_name(root):
    dataset = SparseSDF(root, resolution=64)
    path = dataset.items[0].path
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=path.name):
        dataset[0]
    damaged = bytearray(data)
    damaged[len(data) // 2] ^= 0x41
    path.write_bytes(bytes(damaged))
    with pytest.raises(ValueError, match=path.name):
        dataset[0]
    path.unlink()
    with pytest.raises(ValueError, match=path.name):
        SparseSDF(root, resolution=64)


def test_a_block_without_an_active_voxel_is_an_error(tmp_path, shape):
    sdf = shape.block_sdf.copy()
    sdf[3] = 1
    bad = SparseSDFBlocks(shape.block_index, sdf, shape.to_world, 64)
    write_dataset(tmp_path, {"aa": bad})
    with pytest.raises(ValueError, match="1 blocks hold no active voxel"):
        SparseSDF(tmp_path, resolution=64)[0]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"resolution": 500}, "multiple of 8"),
        ({"resolution": 64, "snapshot_mc_threshold": 0.2}, "snapshot_mc_threshold must be 0"),
        ({"resolution": 64, "split": "dev"}, "split must be one of"),
        ({"resolution": 64, "max_points": 100}, "max_points"),
        ({"resolution": 64, "min_points": -1}, "min_points"),
        ({"resolution": 128}, "_r128.npz"),
    ],
)
def test_bad_arguments_are_refused(root, kwargs, message):
    with pytest.raises(ValueError, match=message):
        SparseSDF(root, **kwargs)


def test_bad_metadata_is_refused(root, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        SparseSDF(tmp_path / "nowhere", resolution=64)
    path = root / "metadata.csv"
    path.write_text("sha256,split\n../../etc/passwd,train\n")
    with pytest.raises(ValueError, match="plain id"):
        SparseSDF(root, resolution=64)
    path.write_text("name,split\naa,train\n")
    with pytest.raises(ValueError, match="column sha256 is missing"):
        SparseSDF(root, resolution=64)
    path.write_text("sha256,label,split,r64_num_voxels,error\naa,x,train,,broken mesh\nbb,x,train,99,\n")
    assert [item.sha256 for item in SparseSDF(root, resolution=64).items] == ["bb"]


@pytest.mark.parametrize("split", ["Train", "valid", "train ", "all"])
@pytest.mark.parametrize("wanted", ["train", "all"])
def test_a_split_of_another_name_is_refused(tmp_path, shape, split, wanted):
    """Its shapes would belong to nothing, and nobody would hear of it."""
    write_dataset(tmp_path, {"aa": shape, "bb": shape}, {"bb": split})
    with pytest.raises(ValueError, match=f"metadata.csv, line 3: split must be one of train, val, test.*got '{split}'"):
        SparseSDF(tmp_path, resolution=64, split=wanted)


def test_shapes_of_no_split_are_counted_aloud(tmp_path, shape, caplog):
    """Preparation leaves the split empty for patients that a given table does not name."""
    write_dataset(tmp_path, {"aa": shape, "bb": shape}, {"bb": ""})
    assert [item.sha256 for item in SparseSDF(tmp_path, resolution=64).items] == ["aa"]
    assert "1 shapes have an empty split and belong to none" in caplog.text
    assert len(SparseSDF(tmp_path, resolution=64, split="all")) == 2
    caplog.clear()
    (tmp_path / "metadata.csv").write_text("sha256,label\naa,x\nbb,x\n")
    assert len(SparseSDF(tmp_path, resolution=64)) == 2
    assert "no column split" in caplog.text and "empty split" not in caplog.text


def test_a_patient_in_two_splits_is_an_error(tmp_path, shape):
    write_dataset(tmp_path, {"aa": shape, "bb": shape}, {"bb": "test"})  # both of patient p
    with pytest.raises(ValueError, match="patient p is in two splits"):
        SparseSDF(tmp_path, resolution=64)


def test_several_roots_join(tmp_path, shape):
    write_dataset(tmp_path / "one", {"aa": shape})
    write_dataset(tmp_path / "two", {"bb": shape, "aa": shape})
    dataset = SparseSDF(f"{tmp_path / 'one'},{tmp_path / 'two'}", resolution=64)
    assert [item.sha256 for item in dataset.items] == ["aa", "bb"]
    assert dataset.refused == [("aa", f"listed twice; the copy in {tmp_path / 'two'} is left out")]
