"""inspect says what is in every format, and what is wrong with it when it is cut short."""

from __future__ import annotations

import json

import numpy as np
import pytest
from robust_files import FORMATS, label_array, place

from trellis.pipelines.inspect_file import as_text, inspect_file

KINDS = {
    "mesh": "mesh", "volume": "volume", "layers": "volume", "intensity": "volume", "sdf": "prepared shape",
    "tokens": "tokens",
}  # fmt: skip
CASES = [name for name, (kind, *_) in FORMATS.items() if kind in KINDS]


@pytest.mark.parametrize("name", CASES)
def test_every_format(tmp_path, name):
    kind, file, make = FORMATS[name]
    data = make()
    facts = inspect_file(place(tmp_path, file, data))
    assert facts["kind"] == KINDS[kind] and json.dumps(facts, allow_nan=False) and len(as_text(facts)) > 50
    if kind == "volume":
        if name == "npy":
            assert "spacing_mm" in facts["refused"] and facts["values"].endswith("0 to 3")
        else:
            numbers = [entry["label"] for entry in facts["labels"]]
            assert "refused" not in facts and len(facts["spacing_mm"]) == 3
            assert numbers == np.unique(label_array())[1:].tolist() or name == "dicom"
    elif kind == "mesh":
        assert "refused" not in facts and facts["afterwards"]["volume_ml"] > 0
    cut = tmp_path / "cut"
    facts = inspect_file(place(cut, file, data[: len(data) // 2]))
    assert json.dumps(facts, allow_nan=False)
    if kind in ("volume", "layers", "sdf"):
        assert facts["refused"]


def test_tables_masks_that_overlap_and_borders(tmp_path):
    path = place(tmp_path, "a.nii.gz", FORMATS["nifti gz"][2]())
    assert inspect_file(path)["names_from"] == "none: labels are called by their numbers"
    (tmp_path / "a.csv").write_text("label,name\n1,liver\n3,spleen\n")
    facts = inspect_file(path)
    assert facts["names_from"] == "a.csv beside it" and [e["name"] for e in facts["labels"]] == ["liver", "spleen"]
    assert [e["voxels"] for e in facts["labels"]] == [36, 8] and facts["labels"][1]["ml"] == pytest.approx(8 * 0.003)
    masks = tmp_path / "segmentations"
    masks.mkdir()
    one, two = np.zeros((2, 6, 5, 4), dtype=np.uint8)
    one[1:4, 1:4, 1:3], two[3:, 1:4, 1:3] = 1, 1
    for name, mask in (("kidney", one), ("cyst", two), ("nothing", 0 * one)):
        np.savez(masks / f"{name}.npz", volume=mask, spacing_mm=np.array([1.0, 1, 2]))
    facts = inspect_file(masks)
    assert facts["overlapping_layers"] == 2 and facts["names_from"] == "the files' names"
    assert {e["name"]: (e["voxels"], e["layer"], "at_border" in e) for e in facts["labels"]} == {
        "cyst": (18, 0, True), "kidney": (18, 1, False),
    }  # fmt: skip


def test_intensities_say_that_they_need_a_threshold(tmp_path):
    np.savez(tmp_path / "ct.npz", volume=np.linspace(-1000, 1500, 60).reshape(3, 4, 5), spacing_mm=np.ones(3))
    facts = inspect_file(tmp_path / "ct.npz")
    assert facts["values"] == "float64, -1000 to 1500" and "labels must be whole numbers" in facts["refused"]
