"""Other kinds of sources: label tables, folders of masks, channels, thresholds, small components, spacing."""

from __future__ import annotations

import csv
import json

import nibabel
import numpy as np
import pytest
from preparation_shapes import ellipsoid, write_labels, write_stl

from trellis.geometry.volume import LabelVolume
from trellis.pipelines.inspect_file import inspect_file
from trellis.preparation.discover import find_sources
from trellis.preparation.prepare import prepare_dataset
from trellis.preparation.surfaces import matches, names_of_labels, picks_of_labels, without_small_components
from trellis.utils.io_utils import load_sparse_sdf

OPTIONS = {"resolutions": (32,), "workers": 0, "progress": False}


def rows_in(out):
    with open(out / "metadata.csv", newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def labels_in(out):
    return sorted(row["label"] for row in rows_in(out))


def save(path, data, affine=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(data, np.eye(4) if affine is None else affine), path)


def box(low, high, shape=(16, 16, 16)):
    data = np.zeros(shape, dtype=np.uint8)
    data[tuple(slice(a, b) for a, b in zip(low, high))] = 1
    return data


def write_segments(path):
    """Slicer's file of two layers: liver 1 and spleen 2, and a tumour in the liver that is 1 too."""
    import SimpleITK

    liver, spleen, tumour = (box((at, 2, 2), (at + size,) * 3) for at, size in ((2, 6), (9, 5), (4, 3)))
    layers = np.stack([liver + 2 * spleen * (1 - liver), tumour], axis=-1)
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(layers.transpose(2, 1, 0, 3)), isVector=True)
    for n, (name, value, layer) in enumerate([("liver", 1, 0), ("spleen", 2, 0), ("tumour", 1, 1)]):
        for key, text in (("Name", name), ("LabelValue", value), ("Layer", layer)):
            image.SetMetaData(f"Segment{n}_{key}", str(text))
    path.parent.mkdir(parents=True, exist_ok=True)
    SimpleITK.WriteImage(image, str(path))


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
    labels, numbers = names_of_labels([1, 2, 3, 4], names), {n: n for n in (1, 2, 3, 4)}
    assert labels == {1: "rib_1", 2: "rib_2", 3: "lung", 4: "4"}
    picks = picks_of_labels(labels, names, ["1", "LUNG"], numbers)
    assert picks == {1: {"1"}, 2: set(), 3: {"LUNG"}, 4: set()}
    assert picks_of_labels(labels, names, ["rib"], numbers) == {1: {"rib"}, 2: {"rib"}, 3: set(), 4: set()}
    assert picks_of_labels(labels, names, ["1", "4"], {}) == {1: set(), 2: set(), 3: set(), 4: {"4"}}
    assert matches(["a*", "B"], {"abc", "b"}) == {"a*", "B"} and matches([], {"a"}) == set()
    odd = ["Tumour [GTV]", "tumour [g-z]*", "[x"]
    assert matches(odd, {"tumour [gtv]", "tumour gtv"}) == set(odd[:2]) and matches(odd, {"[X"}) == {"[x"}


def test_every_label_has_a_name_of_its_own(tmp_path):
    names = {1: "lesion", 2: "lesion", 3: "lesion_1", 4: "4_5", 5: "4", 6: "4"}
    labels = names_of_labels([1, 2, 3, 4, 5, 6], names)
    assert labels == {1: "lesion_1_1", 2: "lesion_2", 3: "lesion_1_3", 4: "4_5_4", 5: "4_5_5", 6: "4_6"}
    root, out = tmp_path / "in", tmp_path / "out"
    save(root / "p" / "seg.nii.gz", sum(value * box((4 * value - 3,) * 3, (4 * value,) * 3) for value in (1, 2, 3)))
    (root / "p" / "seg.csv").write_text("1,lesion\n2,lesion\n3,lesion_1\n")
    prepare_dataset(root, out, **OPTIONS)
    assert labels_in(out) == ["lesion_1_1", "lesion_1_3", "lesion_2"]


SHARED = "values [1] are of several segments each, in layers that overlap: no label table names those"


@pytest.mark.parametrize("place", ["given.txt", "in/dataset.json", "in/p/a.csv", None])
def test_segments_of_overlapping_layers_that_share_a_value_keep_their_names(tmp_path, place):
    root, out = tmp_path / "in", tmp_path / "out"
    write_segments(root / "p" / "a.seg.nrrd")
    if place:
        names = {"liver": 1, "milt": 2, "aorta": 3}
        lines = "".join(f"{value},{name}\n" for name, value in names.items())
        (tmp_path / place).write_text(json.dumps({"labels": names}) if place.endswith("json") else lines)
    given = tmp_path / place if place == "given.txt" else None
    summary = prepare_dataset(root, out, **OPTIONS, label_names=given)
    assert summary.warnings == ([f"1 source(s): {SHARED}"] if place else [])
    prepared = [load_sparse_sdf(path) for path in (out / "sparse_sdf").iterdir()]
    spleen = ("milt" if place else "spleen", 2)
    assert {(shape.label, shape.label_value) for shape in prepared} == {("liver", None), ("tumour", None), spleen}
    labels = inspect_file(root / "p" / "a.seg.nrrd")["labels"]
    beside = "milt" if place and not given else "spleen"
    facts = {(entry["name"], entry["label"], entry["layer"]) for entry in labels}
    assert facts == {("liver", 1, 0), (beside, 2, 0), ("tumour", 1, 1)}
    for wanted, expected in ((["1"], ["liver", "tumour"]), (["3"], []), (["aorta"], [])):
        prepare_dataset(root, out, **OPTIONS, label_names=given, labels=wanted)
        assert labels_in(out) == expected


def test_regions_do_not_guess_which_segment_a_shared_value_means(tmp_path):
    root, out = tmp_path / "in", tmp_path / "out"
    write_segments(root / "p" / "a.seg.nrrd")
    (root / "dataset.json").write_text(json.dumps({"labels": {"both": [2, 3], "one": 2}}))
    summary = prepare_dataset(root, out, **OPTIONS)
    assert labels_in(out) == ["both", "one"], "the value 3, which the reader gave to a segment, is in no region"
    assert "values [1] are in none of the regions" in summary.warnings[0]
    volumes = {row["label"]: float(row["volume_ml"]) for row in rows_in(out)}
    assert volumes["both"] == volumes["one"]
    (root / "dataset.json").write_text(json.dumps({"labels": {"both": [1, 2]}}))
    summary = prepare_dataset(root, out, **OPTIONS)
    assert "regions of the label table join the values [1], and the file has several" in summary.failures[0]["reason"]


def test_one_bad_mask_is_a_failure_of_its_own(tmp_path):
    folder, out = tmp_path / "in" / "Doe_Jane" / "segmentations", tmp_path / "out"
    save(folder / "liver.nii.gz", box((2, 2, 2), (9, 9, 9)))
    save(folder / "spleen.nii.gz", box((6, 6, 6), (13, 12, 11)))
    (folder / "Doe_Jane_aorta.nii.gz").write_bytes(b"nothing")
    summary = prepare_dataset(tmp_path / "in", out, **OPTIONS)
    (failure,) = summary.failures
    assert failure["reason"] == "mask 1 of 3: <source>: not a readable .nii.gz volume: ImageFileError"
    rows = {row["label"]: row for row in rows_in(out)}
    assert rows.keys() == {"liver", "spleen", "aorta"} and failure["reason"] in rows["aorta"]["error"]
    assert rows["aorta"]["sha256"] == failure["id"] and not rows["liver"]["error"] + rows["spleen"]["error"]
    assert prepare_dataset(tmp_path / "in", out, **OPTIONS, labels=["liver"]).exit_code == 0
    for name in ("liver", "spleen"):
        (folder / f"{name}.nii.gz").write_bytes(b"nothing")
    summary = prepare_dataset(tmp_path / "in", out, **OPTIONS)
    assert summary.n_failed == 3 and {row["label"] for row in rows_in(out) if row["error"]} == rows.keys()


def test_the_order_of_masks_picks_none(tmp_path):
    root, out = tmp_path / "in", tmp_path / "out"
    for name in ("7", "Tumour [GTV]", "liver"):
        save(root / "p" / "segmentations" / f"{name}.nii.gz", box((2, 2, 2), (9, 9, 9 + len(name) % 4)))
    summary = prepare_dataset(root, out, **OPTIONS, labels=["2", "7", "tumour [gtv]"])
    assert labels_in(out) == ["7", "Tumour [GTV]"] and summary.warnings == ["no source holds the labels 2"]


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
