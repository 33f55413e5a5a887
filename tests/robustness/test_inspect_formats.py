"""inspect says what is in every format, and what is wrong with it when it is cut short."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from robust_files import FORMATS, label_array, place

from trellis.pipelines.inspect_file import as_text, inspect_file
from trellis.preparation.prepare import prepare_dataset
from trellis.utils.mesh_utils import write_mesh

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
    facts = inspect_file(tmp_path / "ct.npz", threshold="2000")
    assert "no voxel reaches the threshold" in facts["refused"]


def test_options_mean_what_they_mean_to_a_preparation(tmp_path):
    """Volumes of what would be made: those that prepare writes, under the same options."""
    outer, inner, faces = np.array(OCTAHEDRON) * 30.0, np.array(OCTAHEDRON) * 12.0 + (1, 2, 0.5), np.array(FACES)
    nested = np.concatenate([outer, inner]), np.concatenate([faces, faces + 6])
    (tmp_path / "in" / "p").mkdir(parents=True)
    shell, hole, ct = (tmp_path / "in" / "p" / name for name in ("shell.ply", "hole.ply", "ct.npy"))
    write_mesh(shell, *nested)
    write_mesh(hole, outer, faces[1:])
    data = np.full((16, 14, 12), -1000, dtype=np.int16)
    data[3:12, 3:11, 3:9] = -150
    np.save(ct, data)
    of_volume = {"spacing_mm": (1.0, 1.0, 2.0), "threshold": "-200:300"}
    for options in ({"nested": "cavity"}, {"nested": "solid"}, {"max_hole_mm": 50.0, **of_volume}):
        prepare_dataset(tmp_path / "in", tmp_path / "out", resolutions=(32,), workers=0, progress=False, **options)
        with open(tmp_path / "out" / "metadata.csv", newline="") as stream:
            made = {row["label"]: float(row["volume_ml"]) for row in csv.DictReader(stream) if not row["error"]}
        for path, label in ((shell, "shell"), (hole, "hole"), (ct, "threshold")):
            facts = inspect_file(path, **options)
            assert ("refused" in facts) == (label not in made), (path, facts)
            if label in made:
                assert facts["afterwards"]["volume_ml"] == pytest.approx(made[label], rel=1e-4)
    assert set(made) == {"shell", "hole", "threshold"}
    volume = 4 / 3 * np.array([30.0, 12.0]) ** 3 / 1000
    for name, want in (("cavity", volume[0] - volume[1]), ("solid", volume[0])):
        assert inspect_file(shell, nested=name)["afterwards"]["volume_ml"] == pytest.approx(want, rel=1e-4)
    assert "30" in inspect_file(hole, max_hole_mm=30.0)["refused"], "its rim is 42 mm wide"
    np.save(ct, (data > -500).astype(np.uint8))
    labels = inspect_file(ct, spacing_mm=(1.0, 1.0, 2.0))["labels"]
    assert [label["ml"] for label in labels] == [9 * 8 * 6 * 2 / 1000]
    with pytest.raises(ValueError, match="spacing_mm must be three numbers above 0"):
        inspect_file(ct, spacing_mm=(1.0, 0.0, 2.0))


OCTAHEDRON = ((1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1))
FACES = ((0, 2, 4), (2, 1, 4), (1, 3, 4), (3, 0, 4), (2, 0, 5), (1, 2, 5), (3, 1, 5), (0, 3, 5))
