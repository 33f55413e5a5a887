"""Tokens of a patient back onto the patient's grid: with a decoder that gives the TSDF itself, the labels come back."""

from __future__ import annotations

import csv
import logging
from dataclasses import replace

import numpy as np
import pytest

from trellis.geometry.volume import read_volume, write_label_volume
from trellis.pipelines.batch import decode_together, encode_many
from trellis.pipelines.label_volume import VolumeGrid
from trellis.pipelines.shape_inputs import InputOptions
from trellis.pipelines.token_files import load_tokens, save_tokens
from trellis.pipelines.tokenizer import SparseSDFTokenizer
from trellis.preparation.prepare import prepare_dataset
from trellis.utils.io_utils import load_sparse_sdf

OBLIQUE = np.array([[-0.9, 0.3, 0.2, 40.0], [0.25, 1.0, -0.3, -25.0], [0.27, -0.27, 1.5, 7.0], [0, 0, 0, 1]])
OBLIQUE[:3, :3] = np.linalg.qr(OBLIQUE[:3, :3])[0] * (1.0, 1.2, 1.8)
SHEARED = np.array([[-1.0, 0.3, 0.0, 40.0], [0.1, 1.1, 0.4, -25.0], [0.0, 0.2, 1.7, 7.0], [0, 0, 0, 1]])
NAMES = {3: "liver", 52: "spleen, left"}


def two_organs() -> np.ndarray:
    """Two ellipsoids that touch, of 31,000 and 5,600 voxels."""
    at = np.stack(np.meshgrid(*[np.arange(n) for n in (60, 50, 44)], indexing="ij"), axis=-1)
    data = np.zeros(at.shape[:3], dtype=np.uint8)
    data[(((at - (24, 25, 21)) / (22, 20, 17)) ** 2).sum(axis=-1) < 1] = 3
    data[((((at - (47, 24, 22)) / (9, 14, 11)) ** 2).sum(axis=-1) < 1) & (data == 0)] = 52
    return data


class PerfectTokenizer(SparseSDFTokenizer):
    """Decodes tokens to the TSDF of the prepared shape that they were made from."""

    data = None

    def decode_values(self, tokens):
        import torch

        blocks = load_sparse_sdf(self.data / "sparse_sdf" / f"{tokens.sha256}_r{tokens.resolution}.npz")
        return torch.from_numpy(blocks.block_sdf)


def dice(a, b):
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))


@pytest.fixture(scope="module")
def patient(request, tmp_path_factory, model):
    """A label volume with its table, the prepared folder, its tokens, and a decoder without loss."""
    root = tmp_path_factory.mktemp(request.param)
    source = root / "in" / "someone" / "seg.nii.gz"
    write_label_volume(source, two_organs(), {"oblique": OBLIQUE, "sheared": SHEARED}[request.param])
    source.with_name("seg.csv").write_text("".join(f'{value};"{name}"\n' for value, name in NAMES.items()))
    prepare_dataset(root / "in", root / "data", resolutions=(96,), workers=0, progress=False)
    tokenizer = PerfectTokenizer(model, resolution=96)
    tokenizer.data = root / "data"
    encode_many(tokenizer, [root / "data"], root / "tokens", InputOptions(resolution=96))
    return root, source, tokenizer


@pytest.mark.parametrize("patient", ["oblique", "sheared"], indirect=True)
def test_labels_come_back_with_their_numbers_and_names(patient, tmp_path):
    root, source, tokenizer = patient
    tokens = [load_tokens(path) for path in (root / "tokens").iterdir()]
    assert {t.label_value: t.label for t in tokens} == NAMES
    (owner,) = {t.patient_id for t in tokens}
    with open(root / "data" / "metadata.csv", newline="") as stream:
        assert {row["patient_id"] for row in csv.DictReader(stream)} == {owner} != {""}
    assert not any(b"someone" in path.read_bytes() for path in (root / "tokens").iterdir()), "a pseudonym, not the name"
    out = tmp_path / "someone" / "all.nii.gz"
    outcome = decode_together(tokenizer, [root / "tokens"], out, VolumeGrid.like(source))
    assert outcome.exit_code == 0 and [path.name for path in outcome.written] == ["all.nii.gz", "all.csv"]
    before, after = read_volume(source), read_volume(out)
    assert after.notes == () and after.data.shape == before.data.shape
    np.testing.assert_allclose(after.affine, before.affine, atol=1e-5)
    assert np.unique(after.data).tolist() == [0, *NAMES]
    for value in NAMES:
        assert dice(after.data == value, before.data == value) > 0.99
    again = prepare_dataset(tmp_path, tmp_path / "data", resolutions=(32,), workers=0, progress=False)
    with open(again.out / "metadata.csv", newline="") as stream:
        assert sorted(row["label"] for row in csv.DictReader(stream)) == sorted(NAMES.values())


@pytest.mark.parametrize("patient", ["sheared"], indirect=True)
def test_direct_encoding_knows_the_numbers_too(patient, tmp_path):
    _, source, tokenizer = patient
    encode_many(tokenizer, [source], tmp_path, InputOptions(resolution=96))
    assert {(t.label_value, t.label, t.patient_id) for t in map(load_tokens, tmp_path.iterdir())} == {
        (value, name, "") for value, name in NAMES.items()
    }


@pytest.mark.parametrize("patient", ["sheared"], indirect=True)
def test_one_patient_at_a_time(patient, tmp_path, caplog):
    root, source, tokenizer = patient
    grid, tokens = VolumeGrid.like(source), sorted((root / "tokens").iterdir())
    mine = load_tokens(tokens[0])
    save_tokens(tmp_path / "other.safetensors", replace(mine, patient_id="someone-else"))
    both = [*tokens, tmp_path / "other.safetensors"]
    with pytest.raises(ValueError, match=rf"one patient .*{mine.patient_id}, someone-else"):
        decode_together(tokenizer, both, tmp_path / "out" / "all.nii.gz", grid)
    assert not (tmp_path / "out").exists()
    outcome = decode_together(tokenizer, both, tmp_path / "out" / "all.nii.gz", grid, patient=mine.patient_id)
    assert outcome.exit_code == 0 and np.unique(read_volume(outcome.written[0]).data).tolist() == [0, *NAMES]
    with pytest.raises(ValueError, match="no token file is of patient 'nobody'"):
        decode_together(tokenizer, both, tmp_path / "out" / "all.nii.gz", grid, patient="nobody")
    assert "become one region" not in caplog.text and "do not say" not in caplog.text
    # two shapes of one label, one of which does not say whose it is
    save_tokens(tmp_path / "other.safetensors", replace(mine, patient_id="", label_value=None))
    with caplog.at_level(logging.WARNING):
        outcome = decode_together(tokenizer, both, tmp_path / "out" / "all.nii.gz", grid)
    assert f"2 token files are of label '{mine.label}'" in caplog.text
    assert "1 of 3 token files do not say" in caplog.text
    assert np.unique(read_volume(outcome.written[0]).data).tolist() == [0, 1, 2]


@pytest.mark.parametrize("patient", ["sheared"], indirect=True)
def test_what_fails_or_misses_the_grid_is_told(patient, tmp_path, caplog):
    root, source, tokenizer = patient
    tokens = sorted((root / "tokens").iterdir())
    away = replace(load_tokens(tokens[0]))
    away.to_world[:3, 3] += 1e4
    save_tokens(tmp_path / "away.safetensors", away)
    (tmp_path / "broken.safetensors").write_bytes(tokens[1].read_bytes()[:-9])
    inputs = [tmp_path / "away.safetensors", tmp_path / "broken.safetensors"]
    with caplog.at_level(logging.WARNING):
        outcome = decode_together(tokenizer, inputs, tmp_path / "out" / "all.nii.gz", VolumeGrid.like(source))
    assert outcome.exit_code == 1 and [failure.id for failure in outcome.failures] == ["broken"]
    assert f"label '{away.label}' holds no voxel centre" in caplog.text
    none = decode_together(tokenizer, inputs[1:], tmp_path / "none" / "all.nii.gz", VolumeGrid.like(source))
    assert none.exit_code == 1 and [path.name for path in (tmp_path / "none").iterdir()] == ["errors.csv"]
