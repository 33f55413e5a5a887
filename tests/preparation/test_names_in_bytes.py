"""Names of files and folders that are not UTF-8, as Latin-1 systems wrote them: prepared, or refused one by one."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from preparation_shapes import ellipsoid, make_patients, write_labels, write_stl

from trellis.preparation.prepare import prepare_dataset
from trellis.preparation.tasks import shape_id
from trellis.utils.io_utils import load_sparse_sdf, printable

OPTIONS = {"resolutions": (32,), "workers": 0, "progress": False}
NAME = os.fsdecode(b"M\xfcller")
SHOWN = "M\\udcfcller"


@pytest.fixture
def root(tmp_path) -> Path:
    """Two patients of plain names, one whose file and one whose folder is not, with a mesh, labels and masks."""
    root = make_patients(tmp_path / "in", 2)
    try:
        write_stl(root / "anna" / f"{NAME}.stl", *ellipsoid((7, 8, 9)))
    except OSError:
        pytest.skip("this file system has UTF-8 names alone")
    write_stl(root / NAME / "spleen.stl", *ellipsoid((9, 9, 7)))
    write_labels(root / NAME / f"{NAME} 2.nii.gz")
    (root / NAME / f"{NAME} 2.csv").write_text("value,name\n2,liver\n7,heart\n")
    return root


def rows_of(out: Path, name: str = "metadata.csv") -> list[dict[str, str]]:
    with open(out / name, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize("flags", [(), ("keep_patient_ids",), ("keep_source_paths",),
                                   ("keep_patient_ids", "keep_source_paths")])  # fmt: skip
def test_they_are_prepared_whatever_tables_show(root, tmp_path, flags):
    out, options = tmp_path / "out", dict.fromkeys(flags, True)
    summary = prepare_dataset(root, out, **OPTIONS, **options)
    assert summary.failures == [] and summary.n_shapes == 6
    rows = {row["label"]: row for row in rows_of(out)}
    assert rows.keys() == {"liver", SHOWN, "spleen", "heart"}
    assert len({row["patient_id"] for row in rows_of(out)}) == 4
    if "keep_patient_ids" in flags:
        assert rows["spleen"]["patient_id"] == rows["heart"]["patient_id"] == SHOWN
        assert SHOWN in json.loads((out / "splits.json").read_text(encoding="utf-8"))["patients"]
    if "keep_source_paths" in flags:
        assert rows[SHOWN]["source"] == f"anna/{SHOWN}.stl"
        assert rows["heart"]["source"] == f"{SHOWN}/{SHOWN} 2.nii.gz"
    stored = load_sparse_sdf(out / "sparse_sdf" / f"{rows[SHOWN]['sha256']}_r32.npz")
    assert (stored.label, stored.patient_id) == (SHOWN, rows[SHOWN]["patient_id"])
    assert prepare_dataset(root, out, **OPTIONS, **options).n_computed == 0


def test_masks_are_called_as_tables_can_hold(tmp_path):
    root, out = tmp_path / "in", tmp_path / "out"
    folder = root / "anna" / "segmentations"
    image = nibabel.load(write_labels(tmp_path / "labels.nii.gz"))
    data = np.asarray(image.dataobj)
    folder.mkdir(parents=True)
    for name, value in (("liver", 2), (f"{NAME}_7", 7)):
        mask = nibabel.Nifti1Image((data == value).astype(np.uint8), image.affine)
        try:
            (folder / f"{name}.nii").write_bytes(mask.to_bytes())
        except OSError:
            pytest.skip("this file system has UTF-8 names alone")
    assert prepare_dataset(root, out, **OPTIONS, keep_source_paths=True).failures == []
    assert {row["label"] for row in rows_of(out)} == {"liver", f"{SHOWN}_7"}


def test_the_id_is_of_the_label_as_tables_show_it():
    assert shape_id("content", NAME) == shape_id("content", SHOWN) != shape_id("content", "Müller")
    assert printable("Müller, 肝") == "Müller, 肝"


def test_what_simpleitk_would_end_the_process_for_is_refused(root, tmp_path):
    """In a process of its own, since that is what it would cost."""
    for number, name in enumerate((f"{NAME}.nrrd", f"{NAME}.mha", f"{NAME}.mhd", f"series/{NAME}")):
        path = root / f"bad{number}" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(CONTENT[path.suffix])
        (path.parent / "voxels.raw").write_bytes(bytes(8))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "dataset_toolkits.compute_sparse_sdf", root, out, "--resolutions", "32",
               "--workers", "0", "--keep-source-paths"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, timeout=300, check=False)
    assert done.returncode == 1, done.stderr
    errors = rows_of(out, "errors.csv")
    assert len(errors) == 4 and all("not UTF-8" in row["reason"] for row in errors), errors
    assert sum(not row["error"] for row in rows_of(out)) == 6


META = b"ObjectType = Image\nNDims = 3\nDimSize = 2 2 2\nElementSpacing = 1 1 1\nElementType = MET_UCHAR\n"
CONTENT = {
    ".mha": META + b"ElementDataFile = LOCAL\n" + bytes(8),
    ".mhd": META + b"ElementDataFile = voxels.raw\n",
    ".nrrd": b"NRRD0004\ntype: uchar\ndimension: 3\nsizes: 2 2 2\nspacings: 1 1 1\nencoding: raw\n\n" + bytes(8),
    "": bytes(128) + b"DICM",
}
