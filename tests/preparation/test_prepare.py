"""prepare_dataset end to end on tiny shapes: files, tables, resume, settings, failures."""

from __future__ import annotations

import csv
import json
import os

import numpy as np
import pytest
from preparation_shapes import ellipsoid, make_patients, write_labels, write_stl

from trellis.datasets.sparse_sdf import SparseSDF
from trellis.preparation import tasks
from trellis.preparation.prepare import prepare_dataset
from trellis.preparation.report import describe_summary
from trellis.utils.io_utils import load_sparse_sdf
from trellis.utils.mesh_utils import read_mesh

OPTIONS = {"resolutions": (32,), "workers": 0, "progress": False}


def rows_of(out, name="metadata.csv"):
    with open(out / name, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def contents(out):
    """Every file but the lock, by relative path."""
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("hospital")
    make_patients(root, 3)
    write_labels(root / "patient_03" / "scan" / "seg.nii.gz")
    (root / "notes.txt").write_text("not a shape")
    out = tmp_path_factory.mktemp("results") / "prepared"
    return root, out, prepare_dataset(root, out, **{**OPTIONS, "resolutions": (48, 32)})


def test_files_and_tables(prepared):
    _, out, summary = prepared
    rows = rows_of(out)
    columns = (
        "sha256,label,patient_id,split,num_faces,is_watertight,volume_ml,min_thickness_voxels,frame,r32_num_voxels,"
        "r32_num_blocks,r48_num_voxels,r48_num_blocks,error"
    )
    assert (out / "metadata.csv").read_text().splitlines()[0] == columns
    assert sorted(row["label"] for row in rows) == ["2", "7", "liver", "liver", "liver"]
    assert len({row["sha256"] for row in rows}) == 5 and len({row["patient_id"] for row in rows}) == 4
    assert (out / "errors.csv").read_text() == "id,stage,reason\n"
    assert summary.exit_code == 0 and summary.n_shapes == 5 and summary.n_sources == 4 and summary.n_computed == 14
    assert sum(summary.patients.values()) == 4 and min(summary.patients.values()) >= 1
    for row in rows:
        assert row["is_watertight"] == "True" and not row["error"]
        truth = read_mesh(out / "meshes" / f"{row['sha256']}.ply", mesh_space="LPS")  # the tag says RAS and wins
        assert len(truth.faces) == int(row["num_faces"])
        for resolution in (32, 48):
            blocks = load_sparse_sdf(out / "sparse_sdf" / f"{row['sha256']}_r{resolution}.npz")
            assert (blocks.label, blocks.patient_id) == (row["label"], row["patient_id"])
            assert int(row[f"r{resolution}_num_voxels"]) == int(blocks.active.sum())
            assert int(row[f"r{resolution}_num_blocks"]) == blocks.num_blocks
            box = truth.vertices.max(axis=0) - truth.vertices.min(axis=0)
            assert blocks.to_world[0, 0] == pytest.approx(box.max() / 0.95, rel=1e-6)


def test_shapes_lie_in_ras_millimetres(prepared):
    _, out, _ = prepared
    largest = max((row for row in rows_of(out) if row["label"] == "liver"), key=lambda row: float(row["volume_ml"]))
    truth = read_mesh(out / "meshes" / f"{largest['sha256']}.ply")
    # patient_02's numbers are LPS: its centre (2, 4, -2) is (-2, -4, -2) in RAS
    np.testing.assert_allclose((truth.vertices.max(axis=0) + truth.vertices.min(axis=0)) / 2, [-2, -4, -2], atol=0.01)
    expected = 4 / 3 * np.pi * 12 * 8 * 6.2 / 1000
    assert float(largest["volume_ml"]) == pytest.approx(expected, rel=0.06)
    # The shortest axis is 12.4 mm; voxels at 32 are 24 / 0.95 / 32 mm. Rays beside the middle are shorter.
    assert 5 < float(largest["min_thickness_voxels"]) < 12.4 / (24 / 0.95 / 32)
    two = next(row for row in rows_of(out) if row["label"] == "2")
    box = read_mesh(out / "meshes" / f"{two['sha256']}.ply").vertices
    low, high = np.array([40 - 1.5 * 7.5, -28.5, 23]), np.array([40 - 1.5 * 1.5, -21.5, 35])
    assert np.abs(box.min(axis=0) - low).max() < 1 and np.abs(box.max(axis=0) - high).max() < 1


def test_the_dataset_reads_it(prepared):
    _, out, _ = prepared
    sizes = [len(SparseSDF(out, resolution=32, split=split)) for split in ("train", "val", "test")]
    assert sum(sizes) == 5 and min(sizes) >= 1


def test_a_second_run_does_nothing(prepared, monkeypatch):
    root, out, _ = prepared
    before = contents(out)
    for name in ("read_source", "compute_sdf"):
        monkeypatch.setattr(f"trellis.preparation.prepare.{name}", lambda task: pytest.fail("work was done again"))
    summary = prepare_dataset(root, out, **{**OPTIONS, "resolutions": (32, 48)})
    assert summary.n_computed == 0 and summary.exit_code == 0
    assert contents(out) == before
    assert "nothing left to do" in describe_summary(summary)


def test_what_is_missing_or_damaged_is_made_again(tmp_path):
    root, out = make_patients(tmp_path / "in", 3), tmp_path / "out"
    prepare_dataset(root, out, **OPTIONS)
    before = contents(out)
    files = sorted((out / "sparse_sdf").iterdir())
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:500])
    (out / "meshes" / files[2].name.replace("_r32.npz", ".ply")).unlink()
    (out / "sparse_sdf" / ".half.npz.abc.tmp").write_bytes(b"left by a killed run")
    assert prepare_dataset(root, out, **OPTIONS).n_computed == 3  # two SDFs, one surface (whose SDF still fits it)
    after = contents(out)
    assert after.keys() == before.keys()
    for path in files:
        load_sparse_sdf(path)


def test_changed_settings_and_sources_are_made_again(tmp_path):
    root, out = make_patients(tmp_path / "in", 3), tmp_path / "out"
    prepare_dataset(root, out, **OPTIONS)
    summary = prepare_dataset(root, out, **{**OPTIONS, "band_voxels": 3})
    assert summary.n_computed == 6
    assert {load_sparse_sdf(p).band_voxels for p in (out / "sparse_sdf").iterdir()} == {3}
    summary = prepare_dataset(root, out, **{**OPTIONS, "band_voxels": 3, "resolutions": (32, 40)})
    assert summary.n_computed == 3, "another resolution is added to what is there"
    vertices, faces = ellipsoid((20, 9, 9))
    write_stl(root / "patient_01" / "liver.stl", vertices, faces)
    old = {row["sha256"] for row in rows_of(out)}
    assert prepare_dataset(root, out, **{**OPTIONS, "band_voxels": 3}).n_computed == 2
    new = {row["sha256"] for row in rows_of(out)}
    assert len(new) == 3 and len(new & old) == 2, "the changed file is another shape, the old one is gone"


def test_failures_are_recorded_and_the_rest_is_finished(tmp_path):
    root, out = make_patients(tmp_path / "in", 3), tmp_path / "out"
    (root / "patient_00" / "broken.stl").write_bytes(b"solid nothing")
    (root / "patient_03").mkdir()
    write_labels(root / "patient_03" / "seg.nii.gz")
    whole = (root / "patient_03" / "seg.nii.gz").read_bytes()
    (root / "patient_03" / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    (root / "patient_03" / "array.npy").write_bytes(b"\x93NUMPY garbage")
    summary = prepare_dataset(root, out, **OPTIONS)
    errors = rows_of(out, "errors.csv")
    assert summary.exit_code == 1 and summary.n_failed == 3 == len(errors)
    assert all(error["stage"] == "read" and error["id"] and error["reason"] for error in errors)
    assert len(rows_of(out)) == 5 and all(not row["error"] for row in rows_of(out))
    again = prepare_dataset(root, out, **OPTIONS)
    assert again.n_computed == 0 and again.exit_code == 1, "what failed for good is not tried again, and not forgotten"
    assert prepare_dataset(root, out, **OPTIONS, retry_failed=True).n_computed == 3
    assert "3 failed" in describe_summary(again)


def test_a_shape_that_fails_at_one_resolution_keeps_the_others(tmp_path, monkeypatch):
    root, out = make_patients(tmp_path / "in", 3), tmp_path / "out"
    real = tasks.save_sparse_sdf
    full = {"disk": True}

    def save(path, blocks, **options):
        if full["disk"] and blocks.resolution == 40:
            raise OSError(28, "No space left on device")
        real(path, blocks, **options)

    monkeypatch.setattr(tasks, "save_sparse_sdf", save)
    options = {**OPTIONS, "resolutions": (32, 40)}
    assert prepare_dataset(root, out, **options).n_failed == 3
    assert all("No space left" in row["error"] and row["r32_num_voxels"] for row in rows_of(out))
    assert len(SparseSDF(out, resolution=32, split="all")) == 3
    with pytest.raises(ValueError, match="No space left"):
        SparseSDF(out, resolution=40, split="all")
    full["disk"] = False
    summary = prepare_dataset(root, out, **options)
    assert summary.n_computed == 3 and summary.exit_code == 0, "a full disk is no property of the data: tried again"


def test_stale_files_stay_unless_asked(tmp_path):
    root, out = make_patients(tmp_path / "in", 3), tmp_path / "out"
    prepare_dataset(root, out, **{**OPTIONS, "resolutions": (32, 40)})
    (root / "patient_02" / "liver.stl").unlink()
    summary = prepare_dataset(root, out, **OPTIONS)
    assert summary.n_shapes == 2 and summary.n_stale == 6, "a source's record, a mesh, two SDFs and their records"
    prepare_dataset(root, out, **OPTIONS, prune_stale=True)
    assert len(list((out / "sparse_sdf").iterdir())) == 4, "another resolution of a present shape is not stale"
    assert prepare_dataset(root, out, **{**OPTIONS, "resolutions": (32, 40)}).n_computed == 0


def test_labels_are_picked_by_name_or_number(tmp_path):
    root, out = make_patients(tmp_path / "in", 1), tmp_path / "out"
    write_labels(root / "patient_03" / "seg.nii.gz")
    prepare_dataset(root, out, **OPTIONS, labels=["liver", 7])
    assert sorted(row["label"] for row in rows_of(out)) == ["7", "liver"]
    assert prepare_dataset(root, out, **OPTIONS, labels=["spleen"]).warnings


def test_the_same_content_counts_once(tmp_path, caplog):
    root, out = make_patients(tmp_path / "in", 2), tmp_path / "out"
    copy = root / "patient_09" / "liver.stl"
    copy.parent.mkdir()
    copy.write_bytes((root / "patient_00" / "liver.stl").read_bytes())
    summary = prepare_dataset(root, out, **OPTIONS)
    assert summary.n_duplicates == 1 and summary.n_shapes == 2 and "found twice" in caplog.text
    assert prepare_dataset(root, out, **OPTIONS).n_computed == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolutions": (500,)}, "multiple of 8"),
        ({"resolutions": ()}, "at least one"),
        ({"mesh_space": "RPS"}, "mesh_space"),
        ({"workers": -1}, "workers"),
        ({"rank": 2, "world_size": 2}, "rank"),
        ({"rank": 0, "world_size": 2, "prune_stale": True}, "prune_stale needs all ranks"),
        ({"include": ["/abs"]}, "include must be"),
        ({"band_voxels": 0}, "band_voxels"),
        ({"patient_regex": "("}, "regular expression"),
        ({"labels": []}, "labels"),
        ({"split_fractions": (0.5, 0.5, 0.5)}, "fractions"),
        ({"device": "tpu"}, "device"),
        ({"frame": "fixed-mm:0"}, "frame must be"),
        ({"splits_file": "nowhere.json"}, "splits"),
    ],
)
def test_bad_arguments(tmp_path, options, message):
    make_patients(tmp_path / "in", 1)
    with pytest.raises(ValueError, match=message):
        prepare_dataset(tmp_path / "in", tmp_path / "out", **{**OPTIONS, **options})


def test_nothing_to_prepare(tmp_path):
    with pytest.raises(ValueError, match="must be a folder"):
        prepare_dataset(tmp_path / "nowhere", tmp_path / "out", **OPTIONS)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "readme.md").write_text("#")
    with pytest.raises(ValueError, match=r"neither a mesh nor a label volume.*1 other"):
        prepare_dataset(tmp_path / "in", tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="another folder"):
        prepare_dataset(tmp_path / "in", tmp_path / "in", **OPTIONS)


def test_results_inside_the_data_folder_are_not_found_again(tmp_path):
    root = make_patients(tmp_path / "in", 1)
    prepare_dataset(root, root / "out", **OPTIONS)
    assert prepare_dataset(root, root / "out", **OPTIONS).n_sources == 1


def test_the_patients_frame_keeps_size_and_place(tmp_path):
    root, out = make_patients(tmp_path / "in", 2), tmp_path / "out"
    write_labels(root / "patient_00" / "seg.nii.gz")
    prepare_dataset(root, out, **OPTIONS, frame="patient")
    cubes: dict[str, list] = {}
    for row in rows_of(out):
        blocks = load_sparse_sdf(out / "sparse_sdf" / f"{row['sha256']}_r32.npz")
        assert blocks.frame == row["frame"] == "patient"
        cubes.setdefault(row["patient_id"], []).append(blocks.to_world)
    shared = max(cubes.values(), key=len)
    assert len(shared) == 3 and all(np.array_equal(matrix, shared[0]) for matrix in shared)
    write_labels(root / "patient_00" / "more.nii.gz", scale=3.0)  # a larger box for all of that patient, no other
    assert prepare_dataset(root, out, **OPTIONS, frame="patient").n_computed == 1 + 3 + 2


def test_a_fixed_frame_keeps_size_and_refuses_what_does_not_fit(tmp_path):
    root, out = make_patients(tmp_path / "in", 3), tmp_path / "out"  # longest sides 20, 22, 24 mm
    summary = prepare_dataset(root, out, **OPTIONS, frame="fixed-mm:24")
    assert summary.n_failed == 1 and "does not fit frame fixed-mm:24" in summary.failures[0]["reason"]
    for row in rows_of(out):
        if not row["error"]:
            blocks = load_sparse_sdf(out / "sparse_sdf" / f"{row['sha256']}_r32.npz")
            assert blocks.to_world[0, 0] == 24 and blocks.frame == "fixed-mm:24"
    assert prepare_dataset(root, out, **OPTIONS, frame="fixed-mm:24").n_computed == 0
    assert prepare_dataset(root, out, **OPTIONS, frame="fixed-mm:30").n_computed == 6


def test_given_splits(tmp_path):
    root, out = make_patients(tmp_path / "in", 5), tmp_path / "out"
    write_labels(root / "patient_04" / "case_7.nii.gz")
    table = tmp_path / "splits_final.json"
    folds = [{"train": [], "val": []}, {"train": ["patient_00", "patient_03"], "val": ["patient_02", "case_7"]}]
    table.write_text(json.dumps(folds))
    summary = prepare_dataset(root, out, **OPTIONS, splits_file=table, fold=1, keep_patient_ids=True)
    splits = {row["patient_id"]: row["split"] for row in rows_of(out)}
    assert splits == {
        "patient_00": "train", "patient_01": "", "patient_02": "val", "patient_03": "train", "patient_04": "val",
    }  # fmt: skip
    assert any("1 patients are in none" in warning for warning in summary.warnings)
    sizes = [len(SparseSDF(out, resolution=32, split=split)) for split in ("train", "val", "all")]
    assert sizes == [2, 4, 7]
    drawn = prepare_dataset(root, out, **OPTIONS, keep_patient_ids=True)
    assert sorted(drawn.patients.values()) == [1, 1, 3], "what was given does not stick when it is drawn again"
    folds[1]["train"].append("patient_04")
    table.write_text(json.dumps(folds))
    with pytest.raises(ValueError, match="two splits, train and val|two splits, val and train"):
        prepare_dataset(root, out, **OPTIONS, splits_file=table, fold=1)
    for content, message in (
        ([], "fold"), ({"a": []}, "lists named"), ({"train": ["a"], "val": ["a"]}, "entry 1 of val is in two splits"),
        ({"train": "a"}, "list of names"), ({"train": ["nobody"]}, "none of the patients"),
    ):  # fmt: skip
        table.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            prepare_dataset(root, out, **OPTIONS, splits_file=table)


def test_schema_1_on_request(tmp_path):
    root, out = make_patients(tmp_path / "in", 1), tmp_path / "out"
    prepare_dataset(root, out, **OPTIONS, schema=1)
    (path,) = (out / "sparse_sdf").iterdir()
    assert set(np.load(path).files) == {"sparse_sdf", "sparse_index", "resolution"}


def test_shapes_between_voxel_centres_are_counted(tmp_path):
    """A plate of 0.1 voxel: prepared, with a line that says how many and which; one that is thick is not counted."""
    root, out = make_patients(tmp_path / "in", 1), tmp_path / "out"
    vertices, faces = ellipsoid()
    write_stl(root / "patient_01" / "plate.stl", np.where(vertices > 0, 1, -1) * (10.0, 8.0, 0.03), faces)
    summary = prepare_dataset(root, out, **OPTIONS)
    (row,) = (row for row in rows_of(out) if row["label"] == "plate")
    (line,) = (warning for warning in summary.warnings if "between voxel centres at 32" in warning)
    assert line.startswith("1 shapes") and row["sha256"] in line and not row["error"]
    assert float(row["min_thickness_voxels"]) < 0.2
    blocks = load_sparse_sdf(out / "sparse_sdf" / f"{row['sha256']}_r32.npz")
    assert blocks.num_blocks == int(row["r32_num_blocks"]) and not (blocks.block_sdf < 0).any()
    inside = [json.loads(path.read_text()).get("num_inside") for path in (out / "records").rglob("*.json")]
    assert sorted(n > 0 for n in inside if n is not None) == [False, True]


def test_records_hold_no_absolute_time_or_path(prepared):
    root, out, _ = prepared
    for path in (out / "records").rglob("*.json"):
        text = json.dumps(json.loads(path.read_text()))
        assert str(root) not in text and str(out) not in text and os.path.basename(root) not in text
