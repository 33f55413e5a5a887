"""Encoding files directly gives the shapes, ids and tokens that preparing them first gives."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import trimesh
from pipeline_shapes import ellipsoid_blocks

from trellis.pipelines.batch import encode_many
from trellis.pipelines.shape_inputs import InputOptions
from trellis.pipelines.token_files import load_tokens
from trellis.preparation.prepare import prepare_dataset
from trellis.utils.io_utils import save_sparse_sdf
from trellis.utils.mesh_utils import write_mesh

AFFINE = np.array([[-1.1, 0.2, 0, 40.0], [0.2, 1.3, 0, -25.0], [0, 0, 2.0, 7.0], [0, 0, 0, 1]])
"""Anisotropic, oblique and left-handed, off the origin."""


def save(path: Path, data: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(data, AFFINE), path)
    return path


def box_of_voxels(low, high, value=1) -> np.ndarray:
    data = np.zeros((24, 20, 16), dtype=np.uint8)
    data[tuple(slice(a, b) for a, b in zip(low, high))] = value
    return data


def two_labels() -> np.ndarray:
    data = box_of_voxels((3, 4, 2), (14, 12, 9), 2) + box_of_voxels((14, 4, 2), (20, 15, 13), 7)
    data[22, 18, 14] = 7  # a component of its own, 2.9 mm3
    return data


def octahedron() -> tuple[np.ndarray, np.ndarray]:
    vertices = np.array([[20, 0, 0], [-20, 0, 0], [0, 13, 0], [0, -13, 0], [0, 0, 9], [0, 0, -9]]) / 7 + [100, -50, 7]
    faces = [[0, 2, 4], [2, 1, 4], [1, 3, 4], [3, 0, 4], [2, 0, 5], [1, 2, 5], [3, 1, 5], [0, 3, 5]]
    return vertices, np.array(faces)


@pytest.fixture
def data_root(tmp_path) -> Path:
    """A labelled volume with nnU-Net's table above it, overlapping masks, and a mesh with a dot in its name."""
    root = tmp_path / "in"
    save(root / "p1" / "seg.nii.gz", two_labels())
    (root / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "liver": 2, "spleen": 7}}))
    save(root / "p2" / "segmentations" / "aorta.nii.gz", box_of_voxels((2, 2, 2), (12, 12, 12)))
    save(root / "p2" / "segmentations" / "vessel.nii.gz", box_of_voxels((8, 3, 4), (18, 9, 12)))
    (root / "p3").mkdir()
    write_mesh(root / "p3" / "tooth.v2.stl", *octahedron())
    return root


def encoded(tokenizer, inputs, out, **options):
    outcome = encode_many(tokenizer, inputs, out, InputOptions(resolution=32, **options))
    return outcome, {path.name: load_tokens(path) for path in sorted(out.glob("*.safetensors"))}


def assert_same(one: dict, other: dict) -> None:
    assert list(one) == list(other)
    for name, tokens in one.items():
        for field in ("ids", "block_index", "to_world"):
            np.testing.assert_array_equal(getattr(tokens, field), getattr(other[name], field))
        for field in ("sha256", "label", "label_value", "frame", "prep_hash", "resolution", "band_voxels"):
            assert getattr(tokens, field) == getattr(other[name], field)


@pytest.mark.parametrize("frame", ["shape", "fixed-mm:120"])
def test_files_and_the_prepared_folder_give_the_same_tokens(tokenizer, data_root, tmp_path, frame):
    data = tmp_path / "data"
    prepare_dataset(data_root, data, resolutions=(32,), workers=0, progress=False, frame=frame)
    _, prepared = encoded(tokenizer, [data], tmp_path / "a")
    inputs = [data_root / "p1" / "seg.nii.gz", data_root / "p2" / "segmentations", data_root / "p3" / "tooth.v2.stl"]
    outcome, direct = encoded(tokenizer, inputs, tmp_path / "b", frame=frame)
    assert not outcome.failures
    assert sorted(t.label for t in direct.values()) == ["aorta", "liver", "spleen", "tooth.v2", "vessel"]
    assert {t.frame for t in direct.values()} == {frame}
    assert_same(prepared, direct)
    folders = [data_root / "p1", data_root / "p2" / "segmentations", data_root / "p3"]
    again, _ = encoded(tokenizer, folders, tmp_path / "b", frame=frame)
    assert len(again.skipped) == 5 and not again.written, "folders are their files, and what is there is kept"


def test_options_of_volumes(tokenizer, tmp_path):
    """A threshold, small components, a table that is given and a spacing mean what they mean to the preparation."""
    root, data = tmp_path / "in", tmp_path / "data"
    (root / "p").mkdir(parents=True)
    np.save(root / "p" / "seg.npy", two_labels())
    (tmp_path / "names.txt").write_text("2 left lobe\n7 right lobe\n")
    options = {"label_names": tmp_path / "names.txt", "spacing_mm": (1.0, 1.5, 2.0), "min_component_ml": 0.01}
    prepare_dataset(root, data, resolutions=(32,), workers=0, progress=False, **options)
    _, prepared = encoded(tokenizer, [data], tmp_path / "a")
    _, direct = encoded(tokenizer, [root / "p" / "seg.npy"], tmp_path / "b", **options)
    assert sorted(t.label for t in direct.values()) == ["left lobe", "right lobe"]
    assert_same(prepared, direct)
    intensity = {"spacing_mm": (1.0, 1.5, 2.0), "threshold": "1:3", "threshold_label": "bone"}
    prepare_dataset(root, tmp_path / "bones", resolutions=(32,), workers=0, progress=False, **intensity)
    _, prepared = encoded(tokenizer, [tmp_path / "bones"], tmp_path / "c")
    _, direct = encoded(tokenizer, [root / "p" / "seg.npy"], tmp_path / "d", **intensity)
    assert [t.label for t in direct.values()] == ["bone"]
    assert_same(prepared, direct)


def test_other_settings_make_other_tokens(tokenizer, data_root, tmp_path):
    mesh, out = data_root / "p3" / "tooth.v2.stl", tmp_path / "out"
    _, first = encoded(tokenizer, [mesh], out)
    outcome, second = encoded(tokenizer, [mesh], out, frame="fixed-mm:50")
    assert len(outcome.written) == 1 and list(first) == list(second)
    (tokens,) = second.values()
    assert tokens.frame == "fixed-mm:50" and tokens.to_world[0, 0] == 50
    assert tokenizer.decode(tokens).frame == "fixed-mm:50"


def of_label(found: dict, label: str):
    (tokens,) = [tokens for tokens in found.values() if tokens.label == label]
    return tokens


def no_work(monkeypatch) -> None:
    """From here on computing a distance field, or reading the values of a prepared one, is an error."""

    def never(*_, **__):
        raise AssertionError("nothing has to be made to know that tokens are current")

    monkeypatch.setattr("trellis.geometry.sdf.mesh_to_sparse_sdf", never)
    monkeypatch.setattr("trellis.pipelines.shape_inputs.load_sparse_sdf", never)


def test_tokens_of_a_folder_that_was_prepared_otherwise_are_made_again(tokenizer, data_root, tmp_path, monkeypatch):
    data, out = tmp_path / "data", tmp_path / "out"
    options = {"resolutions": (32,), "workers": 0, "progress": False}
    prepare_dataset(data_root, data, **options)
    encoded(tokenizer, [data], out)
    prepare_dataset(data_root, data, frame="fixed-mm:60", **options)
    outcome, tokens = encoded(tokenizer, [data], out)
    assert len(outcome.written) == 5 and {t.frame for t in tokens.values()} == {"fixed-mm:60"}
    assert all(t.to_world[0, 0] == 60 for t in tokens.values())
    files = sorted((data / "sparse_sdf").glob("*.npz"))
    assert len(encoded(tokenizer, files, out)[0].skipped) == 5, "a file is the folder's shape"
    no_work(monkeypatch)
    assert len(encoded(tokenizer, [data], out)[0].skipped) == 5


def test_tokens_in_a_cube_that_has_grown_are_made_again(tokenizer, data_root, tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    options = {"resolutions": (32,), "workers": 0, "progress": False, "frame": "patient"}
    prepare_dataset(data_root, data, **options)
    _, before = encoded(tokenizer, [data], out)
    vertices, faces = octahedron()
    write_mesh(data_root / "p3" / "jaw.stl", vertices * 2, faces)
    prepare_dataset(data_root, data, **options)
    outcome, after = encoded(tokenizer, [data], out)
    assert len(outcome.written) == 2 and len(outcome.skipped) == 4, "the new shape, and that of the same patient"
    old, new = of_label(before, "tooth.v2"), of_label(after, "tooth.v2")
    assert new.prep_hash == old.prep_hash and new.to_world[0, 0] > 1.5 * old.to_world[0, 0]
    np.testing.assert_array_equal(new.to_world, of_label(after, "jaw").to_world)


def test_a_prepared_file_says_whose_it_is_and_where(tokenizer, tmp_path):
    """Each field that tokens take from a prepared file, changed alone; files of schema 1 have few of them."""
    blocks = ellipsoid_blocks()
    path, out = tmp_path / "data" / "x_r32.npz", tmp_path / "out"
    save_sparse_sdf(path, blocks)
    encoded(tokenizer, [path.parent], out, split="train")
    moved = blocks.to_world.copy()
    moved[0, 3] += 1e-9
    for change in (
        {"patient_id": "p"}, {"prep_hash": "h"}, {"frame": "patient"}, {"label_value": 3}, {"label_value": None},
        {"to_world": moved}, {"block_index": blocks.block_index[1:], "block_sdf": blocks.block_sdf[1:]},
    ):  # fmt: skip
        blocks = dataclasses.replace(blocks, **change)
        save_sparse_sdf(path, blocks)
        for given, done in (([path.parent], "written"), ([path.parent], "skipped"), ([path], "skipped")):
            outcome, _ = encoded(tokenizer, given, out)
            assert len(getattr(outcome, done)) == 1, (change, given)
    save_sparse_sdf(path, blocks, schema=1)
    outcome, tokens = encoded(tokenizer, [path.parent], out)
    assert len(outcome.written) == 1 and next(iter(tokens.values())).to_world is None
    assert len(encoded(tokenizer, [path.parent], out)[0].skipped) == 1
    path.write_bytes(b"PK damaged")
    assert len(encoded(tokenizer, [path.parent], out)[0].failures) == 1, "tokens do not hide that their shape is gone"


def test_names_that_were_swapped_are_other_shapes(tokenizer, tmp_path, monkeypatch):
    volume, out = save(tmp_path / "seg.nii.gz", two_labels()), tmp_path / "out"
    table = tmp_path / "seg.csv"
    table.write_text("value,name\n2,liver\n7,spleen\n")
    _, before = encoded(tokenizer, [volume], out)
    table.write_text("value,name\n2,spleen\n7,liver\n")
    outcome, after = encoded(tokenizer, [volume], out)
    assert len(outcome.written) == 2 and list(before) == list(after)
    assert [of_label(found, "liver").label_value for found in (before, after)] == [2, 7]
    np.testing.assert_array_equal(of_label(before, "liver").to_world, of_label(after, "spleen").to_world)
    with monkeypatch.context() as patch:
        no_work(patch)
        assert len(encoded(tokenizer, [volume], out)[0].skipped) == 2
    # regions: the same name and value, of other voxels
    table.unlink()
    for values, done in (([2, 7], 1), ([2, 9], 1), ([2, 9], 0)):
        (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "organs": values}}))
        outcome, _ = encoded(tokenizer, [volume], out)
        assert len(outcome.written) == done and not outcome.failures


def test_what_does_not_work_is_told(tokenizer, data_root, tmp_path):
    volume = data_root / "p1" / "seg.nii.gz"
    outcome, tokens = encoded(tokenizer, [volume, data_root / "p3"], tmp_path / "out", min_component_ml=2.0)
    assert len(tokens) == 2 and len(outcome.failures) == 1
    assert "label liver: no component has at least 2 ml" in outcome.failures[0].reason
    outcome, _ = encoded(tokenizer, [volume, data_root / "p3"], tmp_path / "out2", frame="fixed-mm:5")
    assert len(outcome.failures) == 3 and all("does not fit" in failure.reason for failure in outcome.failures)
    with pytest.raises(ValueError, match="patient"):
        InputOptions(frame="patient")
    with pytest.raises(ValueError, match="no such file"):
        encoded(tokenizer, [volume], tmp_path / "out", label_names=tmp_path / "none.txt")


def test_names_of_slices_stay_out_of_the_record(tokenizer, data_root, tmp_path):
    masks = data_root / "p2" / "segmentations"
    (masks / "jane-doe-1970.nii.gz").write_bytes(b"not a volume")
    outcome, tokens = encoded(tokenizer, [masks], tmp_path / "out")
    assert "mask 2 of 3: " in outcome.failures[0].reason and "jane-doe-1970" in outcome.failures[0].reason
    assert sorted(t.label for t in tokens.values()) == ["aorta", "vessel"], "the other masks are encoded"
    text = (tmp_path / "out" / "errors.csv").read_text()
    assert "jane-doe" not in text and str(tmp_path) not in text
    assert [row["stage"] for row in csv.DictReader(text.splitlines())] == ["read"]


def test_a_gltf_with_its_numbers_beside_it_is_the_shape_that_preparing_gives(tokenizer, tmp_path):
    root, data = tmp_path / "in", tmp_path / "data"
    (root / "p4").mkdir(parents=True)
    scene = trimesh.Scene(trimesh.Trimesh(*octahedron(), process=False))
    for name, content in trimesh.exchange.gltf.export_gltf(scene).items():
        (root / "p4" / ("kidney.gltf" if name == "model.gltf" else name)).write_bytes(content)
    assert len(list((root / "p4").iterdir())) > 1
    prepare_dataset(root, data, resolutions=(32,), workers=0, progress=False)
    _, one = encoded(tokenizer, [data], tmp_path / "one")
    _, other = encoded(tokenizer, [root / "p4" / "kidney.gltf"], tmp_path / "other")
    assert len(one) == 1
    assert_same(one, other)
