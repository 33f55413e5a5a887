"""Sources that no shape can be made of: each ends as a line in errors.csv, and the good ones are prepared."""

from __future__ import annotations

import csv
import os

import nibabel
import numpy as np
import pytest
from preparation_shapes import ellipsoid, make_patients, write_labels, write_stl

from trellis.preparation.prepare import prepare_dataset

OPTIONS = {"resolutions": (32,), "workers": 0, "progress": False}


def empty(path):
    path.write_bytes(b"")


def nan_vertices(path):
    vertices, faces = ellipsoid()
    vertices[3, 1] = np.nan
    write_stl(path, vertices, faces)


def open_sheet(path):
    vertices = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0.0]])
    write_stl(path, vertices, np.array([[0, 1, 2], [0, 2, 3]]))


def one_triangle(path):
    write_stl(path, np.eye(3), np.array([[0, 1, 2]]))


def count_too_large(path):
    write_stl(path, *ellipsoid())
    data = bytearray(path.read_bytes())
    data[80:84] = np.uint32(2**32 - 1).tobytes()
    path.write_bytes(bytes(data))


def volume_of_zeros(path):
    nibabel.save(nibabel.Nifti1Image(np.zeros((5, 5, 5), np.uint8), np.eye(4)), path)


def fractions(path):
    nibabel.save(nibabel.Nifti1Image(np.full((5, 5, 5), 0.5, np.float32), np.eye(4)), path)


def truncated(path):
    write_labels(path)
    path.write_bytes(path.read_bytes()[:60])


def pickled(path):
    np.savez(path, volume=np.array([{"a": 1}], dtype=object), spacing_mm=np.ones(3))


def text_in_binary(path):
    path.write_text("no array at all\n")


def dangling(path):
    path.symlink_to(path.parent / "nowhere")


CASES = {
    "empty.stl": empty, "empty.ply": empty, "empty.nii.gz": empty, "empty.npz": empty, "nan.stl": nan_vertices,
    "sheet.stl": open_sheet, "triangle.stl": one_triangle, "count.stl": count_too_large,
    "zeros.nii.gz": volume_of_zeros, "fractions.nii": fractions,
    "cut.nii.gz": truncated, "pickled.npz": pickled, "text.npy": text_in_binary,
    "text.nrrd": text_in_binary, "text.obj": text_in_binary, "text.vtp": text_in_binary, "link.nii.gz": dangling,
}  # fmt: skip


def test_every_bad_source_is_listed_and_the_rest_is_done(tmp_path):
    root, out = make_patients(tmp_path / "in", 3), tmp_path / "out"
    for name, make in CASES.items():
        folder = root / f"bad_{name.replace('.', '_')}"
        folder.mkdir()
        make(folder / name)
    good = root / "patient_ä ö" / "Leber, läßt \"grüßen\".stl"
    write_stl(good, *ellipsoid((7, 8, 9)))
    summary = prepare_dataset(root, out, **OPTIONS, keep_source_paths=True)
    with open(out / "errors.csv", newline="", encoding="utf-8") as stream:
        errors = {os.path.basename(row["source"]): row for row in csv.DictReader(stream)}
    assert errors.keys() == CASES.keys()
    for name, row in errors.items():
        assert len(row["reason"]) > 15 and "Traceback" not in row["reason"] and "\n" not in row["reason"], name
        assert not row["reason"].startswith(("TypeError", "KeyError", "IndexError", "AttributeError")), row["reason"]
    with open(out / "metadata.csv", newline="", encoding="utf-8") as stream:
        done = [row["label"] for row in csv.DictReader(stream) if not row["error"]]
    assert sorted(done) == ["Leber, läßt \"grüßen\"", "liver", "liver", "liver"]
    assert summary.n_failed == len(CASES) and summary.exit_code == 1


def test_an_unreadable_file_is_listed(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    root, out = make_patients(tmp_path / "in", 2), tmp_path / "out"
    (root / "patient_00" / "liver.stl").chmod(0)
    assert prepare_dataset(root, out, **OPTIONS).n_failed == 1
