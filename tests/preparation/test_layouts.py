"""Folders as nnU-Net, TotalSegmentator, FreeSurfer and Slicer leave them, and the patterns that choose among files."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from preparation_shapes import ellipsoid, write_labels, write_stl

from dataset_toolkits.datasets import MedicalData
from trellis.pipelines.inspect_file import inspect_file
from trellis.pipelines.shape_inputs import InputOptions, sources_of
from trellis.preparation import layouts
from trellis.preparation.discover import find_sources
from trellis.preparation.given_splits import read_splits, splits_of_patients
from trellis.preparation.layouts import fits, is_chosen
from trellis.preparation.prepare import prepare_dataset
from trellis.preparation.report import describe_summary

OPTIONS = {"resolutions": (32,), "workers": 0, "progress": False, "keep_patient_ids": True}


def rows_of(out: Path) -> list[dict[str, str]]:
    with open(out / "metadata.csv", newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def write_image(path: Path, *, low: int = 3, high: int = 12, dtype: type = np.int16) -> Path:
    """Noise of whole numbers above 0, which a reader of labels cannot tell from labels by type or range."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = np.random.default_rng(sum(str(path).encode())).integers(low, high, (14, 12, 10)).astype(dtype)
    image = nibabel.MGHImage if path.suffix == ".mgz" else nibabel.Nifti1Image
    nibabel.save(image(data, np.eye(4)), path)
    return path


@pytest.mark.parametrize(
    ("pattern", "matching", "other"),
    [
        ("ct.nii.gz", ["ct.nii.gz", "a/b/ct.nii.gz"], ["a/pct.nii.gz"]),
        ("*.seg.nrrd", ["a/x.seg.nrrd"], ["a/x.nrrd"]),
        ("imagesTr", ["imagesTr/case_0.nii.gz", "D1/imagesTr/case_0.nii.gz"], ["imagesTr2/case_0.nii.gz"]),
        ("*/mri/aseg.mgz", ["sub-1/mri/aseg.mgz", "a/sub-1/mri/aseg.mgz"], ["mri/aseg.mgz", "s/mri/aseg.mgz.bak"]),
        ("sub-0[12]/*", ["sub-01/a/b.stl"], ["sub-03/a.stl", "x/sub-01/a.stl"]),
        ("./sub-01/", ["sub-01/a/b.stl"], ["sub-011/b.stl"]),
    ],
)
def test_patterns(pattern, matching, other):
    assert all(fits(path, pattern) for path in matching) and not any(fits(path, pattern) for path in other)


def test_both_kinds_of_patterns_must_agree():
    paths = ["a/ct.nii.gz", "a/seg.nii.gz", "b/seg.nii.gz"]
    assert [p for p in paths if is_chosen(p, [], ["ct.*"])] == paths[1:]
    assert [p for p in paths if is_chosen(p, ["a", "nothing"], ["ct.*"])] == paths[1:2]
    assert [p for p in paths if is_chosen(p, [], [])] == paths


@pytest.mark.parametrize("pattern", ["", "/", "/abs/*", "../other/*", "."])
def test_patterns_are_relative(tmp_path, pattern):
    write_labels(tmp_path / "p" / "seg.nii.gz")
    with pytest.raises(ValueError, match="exclude must be a pattern of paths relative to DATA_ROOT"):
        find_sources(tmp_path, exclude=[pattern])


@pytest.fixture
def nnunet(tmp_path) -> Path:
    """A dataset of four training cases and one of test, with their images and the folds."""
    root = tmp_path / "raw" / "Dataset007_Abdomen"
    for i in range(4):
        write_labels(root / "labelsTr" / f"case_{i}.nii.gz", scale=1 + 0.1 * i)
        for channel in range(2):
            write_image(root / "imagesTr" / f"case_{i}_{channel:04d}.nii.gz")
    write_labels(root / "labelsTs" / "case_8.nii.gz", scale=1.9)
    write_image(root / "imagesTs" / "case_8_0000.nii.gz")
    labels = {"background": 0, "liver": 2, "spleen": 7}
    (root / "dataset.json").write_text(json.dumps({"channel_names": {"0": "CT"}, "labels": labels}))
    folds = [{"train": ["case_0", "case_3"], "val": ["case_1", "case_2"]}, {"train": ["case_1", "gone"], "val": []}]
    (root / "splits_final.json").write_text(json.dumps(folds))
    return root


def test_an_nnunet_dataset_gives_its_labels_by_case(nnunet, tmp_path):
    summary = prepare_dataset(nnunet, tmp_path / "out", **OPTIONS, splits_file=nnunet / "splits_final.json")
    assert summary.exit_code == 0 and summary.n_sources == 5 and summary.left_out == {layouts.NOT_LABELS: 9}
    assert "9 left out: of nnU-Net datasets, outside labelsTr and labelsTs" in describe_summary(summary)
    rows = rows_of(tmp_path / "out")
    assert {row["patient_id"]: row["split"] for row in rows} == {
        "case_0": "train", "case_1": "val", "case_2": "val", "case_3": "train", "case_8": "",
    }  # fmt: skip
    assert sorted(row["label"] for row in rows) == ["liver"] * 5 + ["spleen"] * 5


def test_its_folder_of_labels_alone_keeps_names_and_cases(nnunet, tmp_path):
    out = tmp_path / "out"
    options = {**OPTIONS, "splits_file": nnunet / "splits_final.json", "fold": 1}
    summary = prepare_dataset(nnunet / "labelsTr", out, **options)
    assert {(row["patient_id"], row["label"]) for row in rows_of(out)} == {
        (f"case_{i}", label) for i in range(4) for label in ("liver", "spleen")
    }
    absent = [line for line in summary.warnings if "names of the splits" in line]
    assert absent == ["1 of 2 names of the splits are no patient's and no file's; the first is entry 2 of train"]


def test_a_folder_of_nnunet_datasets_keeps_equal_case_names_apart(nnunet, tmp_path):
    other = nnunet.parent / "Dataset008_Other"
    write_labels(other / "labelsTr" / "case_0.nii.gz", scale=3.0)
    (other / "dataset.json").write_text(json.dumps({"labels": {"a": 2, "b": 7}}))
    found = find_sources(nnunet.parent)
    patients = [source.patient for source in found.sources]
    assert len(set(patients)) == 6 and patients[0] == "Dataset007_Abdomen/case_0"
    assert patients[-1] == "Dataset008_Other/case_0"
    assert {s.patient for s in find_sources(nnunet.parent, patient_regex=r"(case_\d)").sources} == {
        "case_0", "case_1", "case_2", "case_3", "case_8",
    }  # fmt: skip


@pytest.fixture
def two_datasets(nnunet):
    """Datasets 7 (cases 0 to 3, and 8) and 8 (cases 0 and 5)."""
    other = nnunet.parent / "Dataset008_Other"
    for case in (0, 5):
        write_labels(other / "labelsTr" / f"case_{case}.nii.gz", scale=3.0 + case)
    (other / "dataset.json").write_text(json.dumps({"labels": {"a": 2, "b": 7}}))
    return nnunet.parent


def test_splits_of_one_dataset_are_not_those_of_equal_cases_of_another(two_datasets, tmp_path):
    table = tmp_path / "splits.json"
    options = {**OPTIONS, "splits_file": table}
    hidden = {**options, "keep_patient_ids": False}
    table.write_text(json.dumps([{"train": ["case_3", "case_0"], "val": ["case_1"]}]))
    with pytest.raises(ValueError, match=r"entry 2 of train .* fits files of 2 patients .*DATASET/CASE") as caught:
        prepare_dataset(two_datasets, tmp_path / "hidden", **hidden)
    assert "case_0" not in str(caught.value) and "Dataset00" not in str(caught.value)
    table.write_text(json.dumps([{"train": ["case_3", "Dataset007_Abdomen/case_0"], "val": ["case_5"]}]))
    prepare_dataset(two_datasets, tmp_path / "out", **options)
    splits = {row["patient_id"]: row["split"] for row in rows_of(tmp_path / "out")}
    assert {patient: split for patient, split in splits.items() if split} == {
        "Dataset007_Abdomen/case_0": "train", "Dataset007_Abdomen/case_3": "train", "Dataset008_Other/case_5": "val",
    }  # fmt: skip
    assert splits["Dataset008_Other/case_0"] == ""


def test_dataset_and_case_are_enough_below_other_folders(two_datasets):
    sources = find_sources(two_datasets.parent).sources
    shown = {source.patient: "id" for source in sources}
    above = two_datasets.name
    found, warnings = splits_of_patients(sources, {"Dataset008_Other/case_0": "val", "case_3": "train"}, shown)
    assert found == {f"{above}/Dataset008_Other/case_0": "val", f"{above}/Dataset007_Abdomen/case_3": "train"}
    assert warnings == []


def test_channels_of_an_image_are_the_case_of_the_splits(two_datasets):
    sources = find_sources(two_datasets, images=True).sources
    found, _ = splits_of_patients(sources, {"case_2": "val"}, {source.patient: "id" for source in sources})
    assert found == {"Dataset007_Abdomen/case_2": "val"}


def test_a_patients_own_name_goes_before_the_names_of_files(tmp_path):
    for path in ("anna/liver.stl", "bert/anna.stl"):
        write_stl(tmp_path / path, *ellipsoid())
    sources = find_sources(tmp_path).sources
    shown = {"anna": "id a", "bert": "id b"}
    assert splits_of_patients(sources, {"anna": "test"}, shown)[0] == {"anna": "test"}
    assert splits_of_patients(sources, {"liver": "test"}, shown)[0] == {"anna": "test"}
    with pytest.raises(ValueError, match="patient id a is in two splits, test and val"):
        splits_of_patients(sources, {"anna": "test", "liver": "val"}, shown)


def test_a_name_in_two_splits_is_not_repeated(tmp_path):
    table = tmp_path / "splits.json"
    table.write_text(json.dumps({"train": ["a", "DoeJane"], "val": ["b", "c", "DoeJane"]}))
    with pytest.raises(ValueError, match="entry 3 of val is in two splits, train too") as caught:
        read_splits(table)
    assert "DoeJane" not in str(caught.value)


def test_with_a_threshold_an_nnunet_dataset_gives_its_images(nnunet):
    found = find_sources(nnunet, images=True, exclude=["*_0001.nii.gz"])
    assert [(s.relative, s.patient) for s in found.sources] == [
        *((f"imagesTr/case_{i}_0000.nii.gz", f"case_{i}") for i in range(4)), ("imagesTs/case_8_0000.nii.gz", "case_8"),
    ]  # fmt: skip
    assert found.left_out == {layouts.NOT_CHOSEN: 4, layouts.NOT_IMAGES: 5}


def test_images_that_are_read_as_labels_are_refused(nnunet, tmp_path):
    summary = prepare_dataset(nnunet / "imagesTr", tmp_path / "out", **OPTIONS, exclude=["case_[123]*"])
    assert summary.n_failed == 2 == summary.left_out[layouts.NOT_CHOSEN] - 4 and summary.n_shapes == 0
    assert "8 values without a name, scattered over it" in summary.failures[0]["reason"]
    assert "--exclude" in summary.failures[0]["reason"]


def test_totalsegmentators_image_is_left_out(tmp_path):
    root = tmp_path / "in"
    for i in (1, 2, 3):
        write_image(root / f"s000{i}" / "ct.nii.gz")
        for name, high in (("liver", 7), ("spleen", 5)):
            mask = np.zeros((12, 12, 12), dtype=np.uint8)
            mask[2:high, 3:9, 2 : 4 + i] = 1
            path = root / f"s000{i}" / "segmentations" / f"{name}.nii.gz"
            path.parent.mkdir(exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(mask, np.eye(4)), path)
    write_labels(root / "s0001" / "lesion.nii.gz")
    summary = prepare_dataset(root, tmp_path / "out", **OPTIONS)
    assert summary.exit_code == 0 and summary.left_out == {layouts.IMAGE_OF_MASKS: 3}
    assert sorted(row["label"] for row in rows_of(tmp_path / "out")) == ["2", "7"] + ["liver"] * 3 + ["spleen"] * 3
    found = find_sources(root, images=True, exclude=["lesion.nii.gz"])
    assert {s.relative for s in found.sources} == {f"s000{i}/ct.nii.gz" for i in (1, 2, 3)}
    assert found.left_out == {layouts.MASKS_NOT_IMAGES: 3, layouts.NOT_CHOSEN: 1}


def test_freesurfer_subjects(tmp_path):
    root, lut = tmp_path / "subjects", tmp_path / "FreeSurferColorLUT.txt"
    for subject in ("sub-01", "sub-02"):
        labels = nibabel.load(write_labels(tmp_path / "labels.nii.gz", scale=1.0 + int(subject[-1])))
        write_image(root / subject / "mri" / "T1.mgz", low=1, high=256, dtype=np.uint8)
        nibabel.save(nibabel.MGHImage(np.asarray(labels.dataobj), labels.affine), root / subject / "mri" / "aseg.mgz")
    lut.write_text("#No. Label Name: R G B A\n2 Left-Cerebral-White-Matter 245 245 245 0\n7 Left-Cerebellum 1 2 3 0\n")
    options = {**OPTIONS, "label_names": lut}
    summary = prepare_dataset(root, tmp_path / "all", **options)
    assert summary.n_failed == 2 and "without a name, scattered over it" in summary.failures[0]["reason"]
    summary = prepare_dataset(root, tmp_path / "out", **options, include=["*/mri/aseg.mgz", "*/surf/?h.pial"])
    assert summary.exit_code == 0 and summary.left_out == {layouts.NOT_CHOSEN: 2}
    assert "--include */surf/?h.pial fits nothing" in summary.warnings
    assert {row["label"] for row in rows_of(tmp_path / "out")} == {"Left-Cerebral-White-Matter", "Left-Cerebellum"}


def test_slicer_folders(tmp_path, capsys):
    root = tmp_path / "in"
    for name in ("CT.nrrd", "Segmentation.seg.nrrd"):
        (root / "doe").mkdir(parents=True, exist_ok=True)
        (root / "doe" / name).write_bytes(b"NRRD0004\n")
    write_stl(root / "doe" / "models" / "liver.stl", *ellipsoid())
    write_stl(root / "doe" / "models" / "old.stl", *ellipsoid((3, 3, 3)))
    arguments = [str(root), "--list", "--include", "*.seg.nrrd", "--include", "*/models", "--exclude", "old.stl"]
    assert MedicalData.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "volume\tdoe\tdoe/Segmentation.seg.nrrd" in printed and "mesh\tdoe\tdoe/models/liver.stl" in printed
    assert "1 meshes, 1 label volumes, 0 other files\n2 left out: not chosen" in printed
    assert MedicalData.main([str(root), "--threshold", "-200:300"]) == 0
    assert "2 meshes, 2 volumes, 0 other files" in capsys.readouterr().out
    assert MedicalData.main([str(root), "--include", "*.nii.gz"]) == 2
    assert "4 left out: not chosen by --include and --exclude" in capsys.readouterr().err


def test_names_with_dots_are_patients_of_their_own(tmp_path):
    for name in ("doe.01.nii.gz", "doe.02.nii.gz"):
        write_labels(tmp_path / name)
    assert [source.patient for source in find_sources(tmp_path).sources] == ["doe.01", "doe.02"]


def test_encode_and_inspect_choose_and_refuse_alike(tmp_path, caplog):
    folder = tmp_path / "doe"
    write_labels(folder / "seg.nii.gz")
    image = write_image(folder / "ct.nii.gz")
    for name in ("1.2.1", "1.2.2"):
        (folder / name).write_bytes(bytes(128) + b"DICM")
    (source,) = sources_of([folder], InputOptions(resolution=32, exclude=("ct.*",)))
    assert source.name == str(folder / "seg.nii.gz")
    assert f"1 left out: {layouts.NOT_CHOSEN}" in caplog.text and f"2 left out: {layouts.LOOSE_SLICES}" in caplog.text
    with pytest.raises(ValueError, match="neither a prepared folder"):
        sources_of([folder], InputOptions(resolution=32, include=("*.mha",)))
    with pytest.raises(ValueError, match="include must be a pattern"):
        InputOptions(include=("/doe",))
    (source,) = sources_of([image], InputOptions(resolution=32))
    with pytest.raises(ValueError, match="probably an image"):
        list(source.shapes())
    facts = inspect_file(image)
    assert "probably an image" in facts["refused"] and facts["shape"] == [14, 12, 10]
