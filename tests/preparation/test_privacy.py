"""Names of people, folders and files stay out of everything that is written."""

from __future__ import annotations

import logging
import re
import stat

import nibabel
import numpy as np
import pytest
from preparation_shapes import ellipsoid, write_labels, write_stl

from trellis.preparation.prepare import prepare_dataset
from trellis.preparation.privacy import label_without_patient, load_or_create_key, pseudonym, scrub

OPTIONS = {"resolutions": (32,), "workers": 0, "progress": False}
NAMES = ("Quillfeather", "Zebedee", "Ostropoler", "19570413", "Wigglesworth")


@pytest.fixture
def hospital(tmp_path):
    root = tmp_path / "Wigglesworth_ward"
    vertices, faces = ellipsoid()
    write_stl(root / "Quillfeather_Zebedee" / "19570413" / "Quillfeather_Zebedee_spleen.stl", vertices, faces)
    path = write_labels(root / "Ostropoler" / "Ostropoler_scan.nii.gz")
    image = nibabel.load(path)
    image.header["descrip"] = b"Ostropoler 19570413"
    image.header["db_name"] = b"Wigglesworth"
    image.set_qform(image.affine @ np.diag([1, 1, 3, 1]), code=1)  # a conflict, which the reader logs
    nibabel.save(image, path)
    (root / "Ostropoler" / "Quillfeather.stl").write_bytes(b"solid Zebedee 19570413")
    (root / "Ostropoler" / "Zebedee.nii.gz").write_bytes(b"not gzip")
    write_stl(root / "Zebedee" / "Zebedee.stl", *ellipsoid((9, 9, 7)))
    return root


def write_mask(path, low, high):
    data = np.zeros((12, 12, 12), dtype=np.uint8)
    data[low:high, 3:9, 2:8] = 1
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(data, np.eye(4)), path)


@pytest.mark.parametrize(("inner", "options"), [("segmentations", {}), (".", {"mask_folders": True})])
def test_masks_lose_the_patients_name(tmp_path, inner, options):
    folder, out = tmp_path / "in" / "Doe_Jane" / inner, tmp_path / "out"
    write_mask(folder / "Doe_Jane_liver.nii.gz", 2, 6)
    write_mask(folder / "spleen_DOE_JANE.nii.gz", 5, 9)
    write_mask(folder / "spleen.nii.gz", 8, 11)
    summary = prepare_dataset(tmp_path / "in", out, **OPTIONS, **options, labels=["liver", "spleen*"])
    assert summary.n_shapes == 3 and not summary.warnings
    for content in everything_written(out):
        assert b"doe" not in content.lower()
    text = (out / "metadata.csv").read_text()
    assert all(f",{label}," in text for label in ("liver", "spleen_2", "spleen_3"))
    prepare_dataset(tmp_path / "in", out, **OPTIONS, **options, keep_patient_ids=True)
    assert all(f",{label}," in (out / "metadata.csv").read_text() for label in ("Doe_Jane_liver", "spleen"))


def everything_written(out):
    for path in out.rglob("*"):
        yield str(path.relative_to(out)).encode()
        if path.is_file():
            yield path.read_bytes()


def test_no_name_in_any_output(hospital, tmp_path, caplog):
    out = tmp_path / "out"
    with caplog.at_level(logging.INFO):
        summary = prepare_dataset(hospital, out, **OPTIONS)
    assert summary.n_shapes == 4 and summary.n_failed == 2
    for name in NAMES:
        for content in everything_written(out):
            assert name.lower().encode() not in content.lower(), name
        assert name not in caplog.text
        assert name not in repr(summary.failures)
    assert "sform" in caplog.text and any("sform" in warning for warning in summary.warnings)
    assert "spleen" in (out / "metadata.csv").read_text()


def test_names_are_kept_on_request(hospital, tmp_path):
    out = tmp_path / "out"
    prepare_dataset(hospital, out, **OPTIONS, keep_patient_ids=True, keep_source_paths=True)
    text = (out / "metadata.csv").read_text()
    assert "Ostropoler/Ostropoler_scan.nii.gz" in text and ",Quillfeather_Zebedee," in text
    errors = (out / "errors.csv").read_text()
    assert errors.splitlines()[0] == "id,stage,reason,source" and "Ostropoler/Zebedee.nii.gz" in errors
    assert prepare_dataset(hospital, out, **OPTIONS).n_stale > 0
    assert prepare_dataset(hospital, out, **OPTIONS, prune_stale=True).n_stale == 0
    for name in NAMES[:3]:
        for content in everything_written(out):
            assert name.encode() not in content, "a later run without the options takes the names out again"


def test_the_key_is_secret_and_decides_the_pseudonyms(tmp_path):
    first = load_or_create_key(tmp_path / "one")
    assert stat.S_IMODE((tmp_path / "one").stat().st_mode) == 0o600
    assert load_or_create_key(tmp_path / "one") == first
    second = load_or_create_key(tmp_path / "two")
    assert pseudonym(first, "patient", "Doe") != pseudonym(second, "patient", "Doe")
    assert pseudonym(first, "patient", "Doe") != pseudonym(first, "source", "Doe")
    assert re.fullmatch("[0-9a-f]{16}", pseudonym(first, "patient", "Doe"))
    (tmp_path / "one").chmod(0o644)
    load_or_create_key(tmp_path / "one")
    assert stat.S_IMODE((tmp_path / "one").stat().st_mode) == 0o600
    (tmp_path / "bad").write_text("secret")
    with pytest.raises(ValueError, match="hexadecimal digits"):
        load_or_create_key(tmp_path / "bad")


@pytest.mark.parametrize(
    ("label", "patient", "expected"),
    [
        ("doe_jane_liver", "doe_jane", "liver"),
        ("liver-DOE_JANE-left", "doe_jane", "liver_left"),
        ("doe", "doe", "shape"),
        ("kidney_left", "doe", "kidney_left"),
        ("12", "12", "12"),
        ("left lobe of doe", "doe", "left_lobe_of"),
    ],
)
def test_labels_lose_the_patients_name(label, patient, expected):
    assert label_without_patient(label, patient) == expected


def test_scrub_takes_the_longest_name_first():
    assert scrub("/a/doe/doe_scan.stl: bad", ["doe", "/a/doe/doe_scan.stl", "doe_scan.stl"]) == "<source>: bad"


@pytest.mark.parametrize(
    ("regex", "name", "label"),
    [("^([A-Za-z]+)_", "DoeJane_liver.stl", "liver"), ("^(.*)$", "ward/DoeJane/DoeJane_liver.stl", "liver"),
     ("^(ward/[^/]+)", "ward/DoeJane/liver_of_doejane.stl", "liver_of"), ("Doe", "DoeJane_liver.stl", "Jane_liver")],
)  # fmt: skip
def test_a_regex_for_patients_keeps_them_out_of_labels_wherever_the_file_lies(tmp_path, regex, name, label):
    out = tmp_path / "out"
    write_stl(tmp_path / "in" / name, *ellipsoid())
    prepare_dataset(tmp_path / "in", out, **OPTIONS, patient_regex=regex)
    assert f",{label}," in (out / "metadata.csv").read_text()
    for content in everything_written(out):
        assert b"doe" not in content.lower()
    prepare_dataset(tmp_path / "in", out, **OPTIONS, patient_regex=regex, keep_patient_ids=True)
    assert f",{name.rpartition('/')[2].removesuffix('.stl')}," in (out / "metadata.csv").read_text()


def test_a_file_in_data_root_without_a_regex_is_called_as_it_is(tmp_path, caplog):
    write_stl(tmp_path / "in" / "liver.stl", *ellipsoid())
    prepare_dataset(tmp_path / "in", tmp_path / "out", **OPTIONS)
    assert ",liver," in (tmp_path / "out" / "metadata.csv").read_text()
    assert "whole name, which becomes their label" in caplog.text
