"""Tables of label names: where they are found, what is said of bad ones, and nnU-Net's regions."""

from __future__ import annotations

import csv
import json

import nibabel
import numpy as np
import pytest
from preparation_shapes import write_labels

from trellis.geometry.volume import LabelVolume
from trellis.pipelines.inspect_file import inspect_file
from trellis.pipelines.shape_inputs import InputOptions, sources_of
from trellis.preparation.label_tables import Regions, digest_of, find_table, read_table
from trellis.preparation.prepare import prepare_dataset
from trellis.utils.io_utils import load_sparse_sdf

OPTIONS = {"resolutions": (32,), "workers": 0, "progress": False}
BRATS = {"background": 0, "whole tumor": [1, 2, 3], "tumor core": [2, 3], "enhancing": 3}


@pytest.mark.parametrize(("at", "found"), [(".", True), ("a", True), ("a/b", True), ("..", False)])
def test_a_table_is_looked_for_up_to_data_root_and_one_folder_above_the_volume(tmp_path, at, found):
    root = tmp_path / "in"
    path = write_labels(root / "a" / "b" / "seg.nii.gz")
    (root / at / "dataset.json").write_text(json.dumps({"labels": {"liver": 2}}))
    assert (find_table(path, root) is not None) is found
    assert find_table(path, root / "a" / "b") == (path.parent / "dataset.json" if at == "a/b" else
                                                  root / "a" / "dataset.json" if at == "a" else None)  # fmt: skip


def nested(tmp_path):
    """1 around 2 around 3, as boxes of 12, 8 and 4 voxels; and a voxel of 9 that is in no region."""
    data = np.zeros((16, 16, 16), dtype=np.uint8)
    for value, margin in ((1, 2), (2, 4), (3, 6)):
        data[margin:-margin, margin:-margin, margin:-margin] = value
    data[15, 15, 15] = 9
    root = tmp_path / "in"
    (root / "p").mkdir(parents=True)
    nibabel.save(nibabel.Nifti1Image(data, np.eye(4)), root / "p" / "seg.nii.gz")
    (root / "dataset.json").write_text(json.dumps({"labels": BRATS, "regions_class_order": [1, 2, 3]}))
    return root


def test_regions_are_unions_and_overlap(tmp_path):
    root, out = nested(tmp_path), tmp_path / "out"
    summary = prepare_dataset(root, out, **OPTIONS)
    with open(out / "metadata.csv", newline="") as stream:
        volumes = {row["label"]: float(row["volume_ml"]) * 1000 for row in csv.DictReader(stream)}
    expected = {"whole tumor": 12**3, "tumor core": 8**3, "enhancing": 4**3}
    assert volumes.keys() == expected.keys()
    for label, volume in expected.items():
        assert volumes[label] == pytest.approx(volume, rel=0.03)
    assert any("values [9] are in none of the regions" in warning for warning in summary.warnings)
    options = {**OPTIONS, "labels": ["*core", "3"], "label_names": root / "dataset.json"}
    assert prepare_dataset(root, tmp_path / "picked", **options).n_shapes == 2, "a region of one value has it as number"


def test_encode_and_inspect_know_regions_too(tmp_path):
    root = nested(tmp_path)
    (source,) = sources_of([root / "p" / "seg.nii.gz"], InputOptions(resolution=32))
    shapes = {shape.label: shape.sha256 for shape in source.shapes()}
    prepare_dataset(root, tmp_path / "out", **OPTIONS)
    assert set(shapes.values()) == {path.stem for path in (tmp_path / "out" / "meshes").iterdir()}
    facts = inspect_file(root / "p" / "seg.nii.gz")
    voxels = {entry["name"]: entry["voxels"] for entry in facts["labels"]}
    assert voxels == {"whole tumor": 12**3, "tumor core": 8**3, "enhancing": 4**3}


def test_regions_of_several_layers():
    one, two = np.zeros((2, 4, 4, 4), dtype=np.uint8)
    one[0, 0, :2], two[0, 0, 1:3] = 1, 5
    layers = [LabelVolume(one, np.eye(4)), LabelVolume(two, np.eye(4))]
    (whole,) = Regions({"both": (1, 5), "absent": (7,)}).layers(layers)
    assert whole.names == {8: "both"} and np.count_nonzero(whole.data == 8) == 3
    with pytest.raises(ValueError, match=r"none of the regions \['absent'\] is there; its values are \[1, 5\]"):
        Regions({"absent": (7,)}).layers(layers)


def test_regions_of_one_value_are_all_kept(tmp_path):
    root = nested(tmp_path)
    (root / "dataset.json").write_text(json.dumps({"labels": {"whole": [1, 2, 3], "core": 3, "again": [3]}}))
    prepare_dataset(root, tmp_path / "out", **OPTIONS)
    prepared = [load_sparse_sdf(path) for path in (tmp_path / "out" / "sparse_sdf").iterdir()]
    values = {shape.label: shape.label_value for shape in prepared}
    assert len(prepared) == 3 and values["core"] == 3 and values["again"] is None
    assert prepare_dataset(root, tmp_path / "picked", **OPTIONS, labels=["3"]).n_shapes == 2
    (root / "dataset.json").write_text(json.dumps({"labels": {"whole": [1, 2], "core": [3, 2], "core ": [3]}}))
    with pytest.raises(ValueError, match="two regions are called 'core'"):
        read_table(root / "dataset.json")


@pytest.mark.parametrize("value", [[1, "2"], [1, -2], [True, 2], "3"])
def test_a_region_holds_whole_numbers(tmp_path, value):
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({"labels": {"a": [1, 2], "b": value}}))
    with pytest.raises(ValueError, match="a region must be a list of label values"):
        read_table(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [('{"labels": {"liver": 2,}}', "Illegal trailing comma|Expecting property name"),
     ('{"labels": {"liver": 2, "milt": 2}}', "two names"), ('{"modality": "CT"}', "label value")],
)  # fmt: skip
def test_a_dataset_json_that_names_nothing_is_said(tmp_path, content, reason):
    root = tmp_path / "Doe_Jane"
    for name in ("one", "two"):
        write_labels(root / name / "seg.nii.gz", scale=len(name))
    (root / "dataset.json").write_text(content)
    warnings = [
        line
        for keep in (True, False)
        for line in prepare_dataset(root, tmp_path / "out", **OPTIONS, keep_source_paths=keep).warnings
    ]
    said = "2 volume(s): dataset.json names no labels: "
    assert len(warnings) == 2 and all(line.startswith(said) for line in warnings)
    assert any(word in warnings[0] for word in reason.split("|")) and not any("Doe" in line for line in warnings)
    (root / "dataset.json").unlink()
    (root / "one" / "seg.json").write_text('{"RepetitionTime": 2')  # of the scan: nobody said that it names labels
    assert prepare_dataset(root, tmp_path / "out", **OPTIONS).warnings == []


TWICE = "2 liver\n2 Doe_Jane\n"


@pytest.mark.parametrize("name", ["Doe.csv", "Doe.nii.gz.tsv", "Doe.ctbl", "Doe.nii.label", "Doe.txt"])
def test_a_table_of_the_volumes_name_that_has_a_mistake_is_said(tmp_path, name, caplog):
    root = tmp_path / "in"
    path = write_labels(root / "p" / "Doe.nii.gz")
    (path.parent / name).write_text(TWICE.replace(" ", "," if "csv" in name else "\t"))
    (root / "dataset.json").write_text(json.dumps({"labels": {"liver": 2, "milt": 7}}))
    said = f"a .{name.rpartition('.')[2]} file of the volume's name names no labels: label 2 has two names, "
    for keep, names in ((False, "<source> and <source>"), (True, "'liver' and 'Doe_Jane'")):
        summary = prepare_dataset(root, tmp_path / "out", **OPTIONS, keep_source_paths=keep)
        assert summary.warnings == [f"1 volume(s): {said}{names}"] and summary.exit_code == 0
    (source,) = sources_of([path], InputOptions(resolution=32))
    list(source.shapes())
    assert said in caplog.text
    assert inspect_file(path)["tables_not_used"] == [f"{said}'liver' and 'Doe_Jane'"]
    (path.parent / name).write_text("")
    assert "no label name found" in prepare_dataset(root, tmp_path / "out", **OPTIONS).warnings[0]


def test_tables_are_told_apart():
    tables = [{1: "a", 2: "b"}, {1: "a"}, {1: "b", 2: "a"}, Regions({"a": (1, 2)}), Regions({"a": (1, 3)}), None]
    assert len({digest_of(table) for table in tables}) == 6
    assert digest_of({2: "b", 1: "a"}) == digest_of(tables[0])
