"""Token files: what is written, what comes back, and that damaged or foreign files are refused by name."""

from __future__ import annotations

import json
import struct
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from trellis.pipelines import batch
from trellis.pipelines.token_files import Tokens, load_tokens, read_token_metadata, save_tokens, tensors_hash


def some_tokens(depth: int | None = None) -> Tokens:
    rng = np.random.default_rng(0)
    index = np.array([[0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0], [3, 2, 1], [7, 7, 7]], dtype=np.int16)
    shape = (6,) if depth is None else (6, depth)
    return Tokens(
        ids=rng.integers(0, 100, shape).astype(np.int32),
        block_index=index,
        to_world=np.diag([90.0, 90.0, 90.0, 1.0]),
        resolution=64,
        band_voxels=4,
        label="left caudate, Größe 2",
        sha256="0f" * 32,
        quantizer="vq",
        codebook_size=100,
        model_hash="ab" * 32,
        frame="fixed-mm:250",
        prep_hash="0123456789abcdef",
        patient_id="91c5b9cf746411e6",
        label_value=50,
    )


@pytest.mark.parametrize("depth", [None, 3])
def test_round_trip(tmp_path, depth):
    tokens = some_tokens(depth)
    path = tmp_path / "a.safetensors"
    save_tokens(path, tokens)
    again = load_tokens(path)
    for field in fields(Tokens):
        np.testing.assert_equal(getattr(again, field.name), getattr(tokens, field.name))
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_file_is_as_documented(tmp_path):
    """Read with the safetensors library alone: names, dtypes and the text fields."""
    path = tmp_path / "a.safetensors"
    save_tokens(path, some_tokens())
    with safe_open(path, "numpy") as file:
        assert sorted(file.keys()) == ["block_index", "ids", "to_world"]
        assert file.get_tensor("ids").dtype == np.int32
        assert file.get_tensor("block_index").dtype == np.int16
        assert file.get_tensor("to_world").dtype == np.float64
        assert file.metadata() == {
            "format_version": "1", "resolution": "64", "band_voxels": "4", "label": "left caudate, Größe 2",
            "sha256": "0f" * 32, "quantizer": "vq", "codebook_size": "100", "model_hash": "ab" * 32,
            "frame": "fixed-mm:250", "prep_hash": "0123456789abcdef", "patient_id": "91c5b9cf746411e6",
            "label_value": "50",
        }  # fmt: skip


def test_files_that_do_not_say_whose_they_are(tmp_path):
    path = tmp_path / "a.safetensors"
    tokens = replace(some_tokens(), patient_id="", label_value=None)
    save_tokens(path, tokens)
    assert not {"patient_id", "label_value"} & read_token_metadata(path).keys()
    again = load_tokens(path)
    assert (again.patient_id, again.label_value) == ("", None)
    save_tokens(path, some_tokens())
    path.write_bytes(path.read_bytes().replace(b'"label_value":"50"', b'"label_value":"5x"'))
    with pytest.raises(ValueError, match="a.safetensors: label_value must be an integer, got '5x'"):
        load_tokens(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ids": np.full(6, 100, dtype=np.int32)}, r"ids must lie in \[0, 100\)"),
        ({"ids": np.full(6, -1, dtype=np.int32)}, "ids must lie"),
        ({"ids": np.zeros(5, dtype=np.int32)}, "block_index must be int16"),
        ({"ids": np.zeros(6, dtype=np.int64)}, "ids must be int32"),
        ({"block_index": np.zeros((6, 3), dtype=np.int16)}, "Morton"),
        ({"block_index": np.full((6, 3), 8, dtype=np.int16)}, r"block_index must lie in \[0, 8\)"),
        ({"to_world": np.full((4, 4), np.nan)}, "to_world must be"),
        ({"to_world": np.diag([1.0, 2.0, 1.0, 1.0])}, "uniform"),
        ({"resolution": 60}, "resolution"),
        ({"band_voxels": 0}, "band_voxels"),
        ({"frame": "cube"}, "frame must be"),
        ({"label_value": 0}, "label_value must be from 1"),
    ],
)
def test_values_out_of_range(change, words):
    with pytest.raises(ValueError, match=words):
        replace(some_tokens(), **change)


def test_unsorted_blocks_are_refused():
    tokens = some_tokens()
    with pytest.raises(ValueError, match="Morton"):
        replace(tokens, block_index=tokens.block_index[::-1].copy())


def test_cut_at_every_length(tmp_path):
    whole = tmp_path / "a.safetensors"
    save_tokens(whole, some_tokens())
    data = whole.read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in [*range(0, 40), *range(40, len(data), 37), len(data) - 1]:
        cut.write_bytes(data[:length])
        with pytest.raises(ValueError, match="cut.safetensors"):
            load_tokens(cut)


def header_only(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"solid ascii stl",
        b"\xff" * 200,
        struct.pack("<Q", 2**63) + b"{}",
        header_only(b"[1, 2]"),
        header_only(b"{" * 50),
        header_only(b"[" * 200_000),
        header_only(b"{}"),
        header_only(json.dumps({"ids": 3, "block_index": 4}).encode()),
        header_only(json.dumps({"__metadata__": [1], "ids": {}, "block_index": {}}).encode()),
    ],
)
def test_foreign_bytes(tmp_path, data):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="x.safetensors"):
        load_tokens(path)


def test_seeded_mutations_end_in_a_result_or_a_clear_error(tmp_path):
    whole = tmp_path / "a.safetensors"
    save_tokens(whole, some_tokens())
    data = np.frombuffer(whole.read_bytes(), dtype=np.uint8)
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(300):
        changed = data.copy()
        where = rng.integers(0, len(data), rng.integers(1, 8))
        changed[where] = rng.integers(0, 256, len(where))
        path = tmp_path / "mutated.safetensors"
        path.write_bytes(changed.tobytes())
        try:
            load_tokens(path)
        except ValueError as error:
            refused += 1
            assert "mutated.safetensors" in str(error)
    assert refused > 150


def test_other_safetensors_and_versions(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"weight": np.zeros(3)}, path)
    with pytest.raises(ValueError, match="not of tokens"):
        read_token_metadata(path)
    save_tokens(path, some_tokens())
    path.write_bytes(path.read_bytes().replace(b'"format_version":"1"', b'"format_version":"9"'))
    with pytest.raises(ValueError, match="version must be 1, got '9'"):
        load_tokens(path)
    with pytest.raises(ValueError, match="cannot be read"):
        load_tokens(tmp_path / "none.safetensors")


def test_hash_depends_on_every_part():
    base = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([True, False])}
    hashes = {
        tensors_hash(base),
        tensors_hash({**base, "a": base["a"].view(3, 2)}),
        tensors_hash({**base, "a": base["a"].double()}),
        tensors_hash({**base, "a": base["a"] + 1}),
        tensors_hash({"c": base["a"], "b": base["b"]}),
        tensors_hash({"a": base["a"]}),
    }
    assert len(hashes) == 6
    assert tensors_hash(dict(reversed(base.items()))) == tensors_hash(base)
    assert tensors_hash({**base, "a": base["a"].t().contiguous().t()}) == tensors_hash(base)


@pytest.mark.timeout(30)
def test_many_token_files_are_looked_through_once(tmp_path, monkeypatch):
    """Each stem compared with each other one would take minutes."""
    paths = [tmp_path / f"{i:05d}.safetensors" for i in range(30_000)]
    monkeypatch.setattr(batch, "token_paths", lambda *_: [*paths, tmp_path / "sub" / paths[7].name])
    with pytest.raises(ValueError, match="two token files have the stem '00007'"):
        batch.decode_many(None, [tmp_path], tmp_path / "out", file_format="stl")
