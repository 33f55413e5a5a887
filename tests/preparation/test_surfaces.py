"""Other kinds of sources: label tables, folders of masks, channels, thresholds, small components, spacing."""

from __future__ import annotations

import csv
import json

import nibabel
import numpy as np
import pytest
from preparation_shapes import ellipsoid, write_labels, write_stl

from trellis.geometry.volume import LabelVolume
from trellis.preparation.discover import find_sources
from trellis.preparation.prepare import prepare_dataset
from trellis.preparation.surfaces import matches, names_of_labels, without_small_components

OPTIONS = {"resolutions": (32,), "workers": 0, "progress": False}


def labels_in(out):
    with open(out / "metadata.csv", newline="", encoding="utf-8") as stream:
        return sorted(row["label"] for row in csv.DictReader(stream))


def save(path, data, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(data, np.eye(4) if affine is None else affine), path)


def box(low, high, shape=(16, 16, 16)):
    data = np.zeros(shape, dtype=np.uint8)
    data[tuple(slice(a, b) for a, b in zip(low, high))] = 1
    return data


@pytest.mark.parametrize(
    ("table", "content"),
    [
        ("patient/seg.nii.txt", "2 liver 4001\n7 spleen 4002\n"),
        ("patient/seg.csv", "label,name\n2,liver\n7,spleen\n"),
        ("patient/dataset.json", '{"labels": {"background": 0, "liver": 2, "spleen": 7}}'),
        ("dataset.json", '{"labels": {"0": "background", "2": "liver", "7": "spleen"}}'),
        ("given.txt", "2 liver\n7 spleen\n"),
    ],
)
def test_label_tables(tmp_path, table, content):
    root, out = tmp_path / "in", tmp_path / "out"
    write_labels(root / "patient" / "seg.nii.gz")
    (root / "patient" / "seg.json").write_text('{"RepetitionTime": 2.0}')  # of the scan, no table
    (root / table).write_text(content)
    given = root / table if table.startswith("given") else None
    prepare_dataset(root, out, **OPTIONS, label_names=given)
    assert labels_in(out) == ["liver", "spleen"]
    if given is None:
        (root / table).write_text(content.replace("spleen", "milt"))
        assert prepare_dataset(root, out, **OPTIONS).n_computed == 2, "the volume is read again, one shape is new"
        assert labels_in(out) == ["liver", "milt"]


def test_labels_by_pattern_and_absent_ones(tmp_path):
    root, out = tmp_path / "in", tmp_path / "out"
    write_labels(root / "a" / "seg.nii.gz")
    write_stl(root / "a" / "Kidney_Left.stl", *ellipsoid())
    (root / "dataset.json").write_text(json.dumps({"labels": {"liver": 2, "kidney_right": 7}}))
    summary = prepare_dataset(root, out, **OPTIONS, labels=["kidney_*", "2", "heart"])
    assert labels_in(out) == ["Kidney_Left", "kidney_right", "liver"]
    assert summary.warnings[-1] == "no source holds the labels heart"


def test_names_do_not_depend_on_what_is_picked():
    names = {1: "rib", 2: "rib", 3: "lung"}
    assert names_of_labels([1, 2, 3, 4], names, None) == {1: "rib_1", 2: "rib_2", 3: "lung", 4: "4"}
    assert names_of_labels([1, 2, 3, 4], names, ["1", "LUNG"]) == {1: "rib_1", 3: "lung"}
    assert names_of_labels([1, 2, 3, 4], names, ["rib"]) == {1: "rib_1", 2: "rib_2"}
    assert matches(["a*", "B"], {"abc", "b"}) == {"a*", "B"} and matches([], {"a"}) == set()


@pytest.mark.parametrize("folder", ["segmentations", "anything"])
def test_a_folder_of_masks_is_one_source(tmp_path, folder):
    root, out = tmp_path / "in", tmp_path / "out"
    save(root / "p" / folder / "liver.nii.gz", box((2, 2, 2), (9, 9, 9)))
    save(root / "p" / folder / "spleen.nii.gz", box((6, 6, 6), (13, 12, 11)))  # overlaps the other
    save(root / "p" / folder / "empty.nii.gz", box((0, 0, 0), (0, 0, 0)))
    summary = prepare_dataset(root, out, **OPTIONS, mask_folders=folder != "segmentations")
    assert labels_in(out) == ["liver", "spleen"] and summary.n_sources == 1 and summary.exit_code == 0
    save(root / "p" / folder / "spleen.nii.gz", box((6, 6, 6), (13, 12, 12)))
    assert prepare_dataset(root, out, **OPTIONS, mask_folders=True).n_computed == 3, "new content: two new shapes"


def test_masks_in_channels(tmp_path):
    root, out = tmp_path / "in", tmp_path / "out"
    root.mkdir()
    stack = np.stack([box((2, 2, 2), (9, 9, 9)), box((6, 6, 6), (13, 12, 11))], axis=-1)
    (root / "p").mkdir()
    np.savez(root / "p" / "masks.npz", volume=stack, spacing_mm=np.array([1.0, 2.0, 1.5]))
    prepare_dataset(root, out, **OPTIONS)
    assert labels_in(out) == ["1", "2"]


def test_spacing_is_refused_where_it_is_missing_unless_given(tmp_path):
    root, out = tmp_path / "in", tmp_path / "out"
    (root / "p").mkdir(parents=True)
    np.save(root / "p" / "seg.npy", box((2, 2, 2), (9, 9, 9)))
    assert "spacing" in prepare_dataset(root, out, **OPTIONS).failures[0]["reason"]
    assert prepare_dataset(root, out, **OPTIONS, spacing_mm=(1.0, 1.0, 2.0)).exit_code == 0
    with pytest.raises(ValueError, match="spacing_mm"):
        prepare_dataset(root, out, **OPTIONS, spacing_mm=(1.0, -1.0, 2.0))


def test_thresholds(tmp_path):
    root, out = tmp_path / "in", tmp_path / "out"
    grid = np.stack(np.meshgrid(*[np.arange(20.0)] * 3, indexing="ij"), -1)
    save(root / "p" / "ct.nii.gz", (100 - 10 * np.linalg.norm(grid - 9.3, axis=-1)).astype(np.float32))
    prepare_dataset(root, out, **OPTIONS, threshold="40", threshold_label="ball")
    with open(out / "metadata.csv", newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert row["label"] == "ball"
    assert float(row["volume_ml"]) * 1000 == pytest.approx(4 / 3 * np.pi * 6**3, rel=0.03)
    for bad in ("high", "3:2"):
        with pytest.raises(ValueError, match="threshold"):
            prepare_dataset(root, out, **OPTIONS, threshold=bad)


def test_small_components_are_removed_and_reported(tmp_path):
    data = box((1, 1, 1), (7, 7, 7)).astype(np.uint8)
    data[10:12, 10, 10] = 1
    data[12, 11, 11] = 1  # touches at an edge: the same component of 3 voxels
    data[14, 14, 14] = 4
    volume, removed = without_small_components(LabelVolume(data, np.diag([1.0, 1, 2, 1])), [1, 4], 0.0059)
    assert removed == {4: 1} and np.count_nonzero(volume.data == 1) == 216 + 3 and data[14, 14, 14] == 4
    volume, removed = without_small_components(LabelVolume(data, np.diag([1.0, 1, 2, 1])), [1], 0.0061)
    assert removed == {1: 1} and np.count_nonzero(volume.data == 1) == 216 and volume.data[14, 14, 14] == 4
    root, out = tmp_path / "in", tmp_path / "out"
    save(root / "p" / "seg.nii.gz", data, np.diag([1.0, 1, 2, 1]))
    summary = prepare_dataset(root, out, **OPTIONS, min_component_ml=0.0061)
    assert labels_in(out) == ["1", "4"] and summary.n_failed == 1 and "no component" in summary.failures[0]["reason"]
    assert any("label 1: 1 components below 0.0061 ml were removed" in warning for warning in summary.warnings)
    with pytest.raises(ValueError, match="min_component_ml"):
        prepare_dataset(root, out, **OPTIONS, min_component_ml=-1)


def test_headers_with_data_files_and_dicom_folders_are_one_source(tmp_path):
    (tmp_path / "p" / "series").mkdir(parents=True)
    (tmp_path / "p" / "seg.mhd").write_text("ElementDataFile = seg.raw")
    (tmp_path / "p" / "seg.raw").write_bytes(b"0")
    for name in ("slice1.dcm", "slice2", "notes"):
        content = bytes(128) + b"DICM" if name != "notes" else b"text"
        (tmp_path / "p" / "series" / name).write_bytes(content)
    found = find_sources(tmp_path)
    assert [(s.relative, [f.name for f in s.files]) for s in found.sources] == [
        ("p/seg.mhd", ["seg.mhd", "seg.raw"]), ("p/series", ["slice1.dcm", "slice2"]),
    ]  # fmt: skip
    assert found.others == 1
