"""Atomic writes and sparse SDF files of both schemas."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import pickle
import zipfile

import numpy as np
import pytest

from trellis.utils.blocks import SparseSDFBlocks, blocks_from_voxels, morton_order
from trellis.utils.io_utils import (
    UnreadableFile,
    atomic_write,
    load_sparse_sdf,
    save_sparse_sdf,
    sha256_of_file,
    within_unit_interval,
    write_json,
)


@pytest.fixture
def blocks() -> SparseSDFBlocks:
    rng = np.random.default_rng(0)
    index = np.unique(rng.integers(0, 8, (9, 3)), axis=0)
    index = index[morton_order(index)].astype(np.int16)
    sdf = rng.uniform(-1, 1, (len(index), 8, 8, 8)).astype(np.float16)
    to_world = np.diag([3.0, 3.0, 3.0, 1.0])
    to_world[:3, 3] = [1, -2, 3]
    return SparseSDFBlocks(index, sdf, to_world, 64, 4, label="liver ä", patient_id="p", prep_hash="h", label_value=7)


def fields_of(path):
    with np.load(path) as archive:
        return {name: archive[name] for name in archive.files}


def test_a_write_is_whole_or_nothing(tmp_path):
    path = tmp_path / "sub" / "file.bin"
    with atomic_write(path) as stream:
        stream.write(b"old")
        assert not path.exists()
    with pytest.raises(RuntimeError), atomic_write(path) as stream:
        stream.write(b"half of the new")
        raise RuntimeError("stop")
    assert path.read_bytes() == b"old" and os.listdir(path.parent) == ["file.bin"]


def test_permissions_follow_the_umask(tmp_path):
    mask = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "file") as stream:
            stream.write(b"x")
    finally:
        os.umask(mask)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_json_and_hash(tmp_path):
    write_json(tmp_path / "a.json", {"x": [1, 2.5, None]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [1, 2.5, None]}
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [1, 2.5, None]}
    data = bytes(range(256)) * 9000
    (tmp_path / "data").write_bytes(data)
    assert sha256_of_file(tmp_path / "data") == hashlib.sha256(data).hexdigest()


def test_unreadable_files_come_back_whole_from_other_processes():
    error = pickle.loads(pickle.dumps(UnreadableFile("a.ply: line 'x'", "a.ply: ValueError")))
    assert (type(error), str(error), error.public) == (UnreadableFile, "a.ply: line 'x'", "a.ply: ValueError")


def test_schema_2_round_trip(tmp_path, blocks):
    path = tmp_path / "x_r64.npz"
    save_sparse_sdf(path, blocks)
    back = load_sparse_sdf(path)
    for name in ("block_index", "block_sdf", "to_world"):
        one, two = getattr(back, name), getattr(blocks, name)
        assert one.dtype == two.dtype
        np.testing.assert_array_equal(one, two)
    assert (back.resolution, back.band_voxels) == (64, 4)
    assert (back.label, back.patient_id, back.prep_hash, back.label_value) == ("liver ä", "p", "h", 7)
    assert {info.compress_type for info in zipfile.ZipFile(path).infolist()} == {zipfile.ZIP_STORED}
    assert int(fields_of(path)["schema_version"]) == 2
    save_sparse_sdf(path, dataclasses.replace(blocks, label_value=None))
    assert "label_value" not in fields_of(path) and load_sparse_sdf(path).label_value is None
    np.savez(path, **{**fields_of(path), "label_value": np.int64(-3)})
    with pytest.raises(ValueError, match="x_r64.npz: label_value must be from 1 to 2147483647, got -3"):
        load_sparse_sdf(path)


@pytest.mark.parametrize("prefix", ["", "sparse_sdf/"])
def test_schema_1_is_read_flat_and_nested(tmp_path, prefix):
    coords = np.array([[3, 4, 5], [20, 1, 2], [3, 4, 6]], dtype=np.int32)
    values = np.array([[0.25], [-0.5], [-0.125]], dtype=np.float32)
    arrays = {f"{prefix}sparse_sdf": values, f"{prefix}sparse_index": coords, f"{prefix}resolution": np.int64(32)}
    np.savez(tmp_path / "old.npz", **arrays)
    back = load_sparse_sdf(tmp_path / "old.npz")
    expected = blocks_from_voxels(coords, values, 32, to_world=None, band_voxels=4)
    np.testing.assert_array_equal(back.block_sdf, expected.block_sdf)
    np.testing.assert_array_equal(back.block_index, expected.block_index)
    assert back.to_world is None
    save_sparse_sdf(tmp_path / "again.npz", back, schema=1)
    again = fields_of(tmp_path / "again.npz")
    assert again["sparse_sdf"].shape == (3, 1) and again["sparse_sdf"].dtype == np.float32
    assert again["sparse_index"].dtype == np.int32
    with pytest.raises(ValueError, match="needs to_world"):
        save_sparse_sdf(tmp_path / "no.npz", back)
    with pytest.raises(ValueError, match="schema must be"):
        save_sparse_sdf(tmp_path / "no.npz", back, schema=3)
    assert not (tmp_path / "no.npz").exists()


def test_raw_unsigned_distances_are_recognised(tmp_path):
    coords = np.array([[1, 1, 1], [1, 1, 2], [9, 1, 1]], dtype=np.int32)
    raw = np.array([0.0, 0.06, 0.12], dtype=np.float32)[:, None]  # below 4 / 32 = 0.125
    np.savez(tmp_path / "udf.npz", sparse_sdf=raw, sparse_index=coords, resolution=32)
    with pytest.raises(ValueError, match=r"udf\.npz.*unsigned"):
        load_sparse_sdf(tmp_path / "udf.npz")
    back = load_sparse_sdf(tmp_path / "udf.npz", convert_unsigned=True)
    assert back.to_voxels()[1].max() == pytest.approx(0.96, abs=1e-3)
    np.savez(tmp_path / "tsdf.npz", sparse_sdf=raw * 8, sparse_index=coords, resolution=32)
    load_sparse_sdf(tmp_path / "tsdf.npz")  # values above 4/R are a TSDF, if a one-sided one


def broken(blocks, **changes):
    fields = {
        "schema_version": np.int64(2), "resolution": np.int64(64), "band_voxels": np.int64(4),
        "block_index": blocks.block_index, "block_sdf": blocks.block_sdf, "to_world": blocks.to_world,
    }  # fmt: skip
    fields.update(changes)
    return {name: value for name, value in fields.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": np.int64(3)}, "schema_version must be 2, got 3"),
        ({"block_sdf": None}, "'block_sdf' is missing"),
        ({"resolution": np.int64(500)}, "multiple of 8"),
        ({"block_index": "shift"}, "block_index must lie in"),
        ({"block_index": "reverse"}, "Morton order"),
        ({"block_index": "repeat"}, "Morton order"),
        ({"block_sdf": "nan"}, "without NaN"),
        ({"block_sdf": "large"}, r"\[-1, 1\]"),
        ({"block_sdf": "small"}, r"\[-1, 1\]"),
        ({"to_world": np.full((4, 4), np.nan)}, "finite"),
        ({"to_world": np.eye(3)}, "to_world must be"),
    ],
)
def test_malformed_schema_2_names_file_and_rule(tmp_path, blocks, changes, message):
    index, sdf = blocks.block_index, blocks.block_sdf.copy()
    made = {
        "shift": index + np.int16(8), "reverse": index[::-1], "repeat": np.repeat(index[:1], len(index), axis=0),
    }  # fmt: skip
    bad_value = {"nan": np.nan, "large": 1.001, "small": -np.inf}
    for name, value in changes.items():
        if isinstance(value, str) and value in made:
            changes = {name: made[value]}
        elif isinstance(value, str):
            sdf[-1, 3, 2, 1] = bad_value[value]
            changes = {name: sdf}
    np.savez(tmp_path / "bad.npz", **broken(blocks, **changes))
    with pytest.raises(ValueError, match=r"bad\.npz.*" + message):
        load_sparse_sdf(tmp_path / "bad.npz")


def test_files_that_are_no_archive(tmp_path, blocks):
    path = tmp_path / "x.npz"
    with pytest.raises(ValueError, match="no such file"):
        load_sparse_sdf(path)
    save_sparse_sdf(path, blocks)
    whole = path.read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2], whole[:-10]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.npz"):
            load_sparse_sdf(path)
    single = io.BytesIO()
    np.save(single, np.zeros(3))
    path.write_bytes(single.getvalue())
    with pytest.raises(ValueError, match="single array"):
        load_sparse_sdf(path)


def test_pickled_objects_are_not_loaded(tmp_path, blocks):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "sprung"),))

    np.savez(tmp_path / "trap.npz", **broken(blocks, label=np.array([Trap()], dtype=object)))
    with pytest.raises(ValueError, match=r"trap\.npz"):
        load_sparse_sdf(tmp_path / "trap.npz")
    assert not (tmp_path / "sprung").exists()


def test_headers_that_announce_too_much_and_bombs(tmp_path, blocks, monkeypatch):
    save_sparse_sdf(tmp_path / "x.npz", blocks)
    with zipfile.ZipFile(tmp_path / "x.npz") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f2", "fortran_order": False, "shape": (1 << 50, 8, 8, 8)})
    members["block_sdf.npy"] = header.getvalue() + bytes(1024)
    with zipfile.ZipFile(tmp_path / "absurd.npz", "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    with pytest.raises(ValueError, match=r"absurd\.npz.*announces"):
        load_sparse_sdf(tmp_path / "absurd.npz")
    monkeypatch.setattr("trellis.utils.io_utils._BOMB_BYTES", 1 << 22)
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("block_sdf.npy", bytes(8 << 20))
    with pytest.raises(ValueError, match=r"bomb\.npz.*unpack"):
        load_sparse_sdf(tmp_path / "bomb.npz")


def test_unit_interval_by_bits_agrees_with_abs():
    every_half = np.arange(65536, dtype=np.uint16).view(np.float16)
    with np.errstate(invalid="ignore"):
        expected = np.abs(every_half.astype(np.float64)) <= 1
    assert [within_unit_interval(every_half[i : i + 1]) for i in range(0, 65536, 7)] == expected[::7].tolist()
    assert within_unit_interval(every_half[expected]) and within_unit_interval(every_half[:0])
    assert not within_unit_interval(every_half)
    assert within_unit_interval(np.array([1, -1, 0, -0.0], np.float16)[::2])
