"""Job arrays: what ranks make and merge is what a single run makes; who may run at once; nothing half-written stays."""

from __future__ import annotations

import csv
import fcntl
import json
import os
from pathlib import Path

import pytest
from preparation_shapes import ellipsoid, make_patients, write_labels, write_stl

from dataset_toolkits import build_metadata as build_metadata_toolkit
from trellis.preparation.discover import find_sources
from trellis.preparation.metadata import build_metadata
from trellis.preparation.prepare import prepare_dataset
from trellis.preparation.shares import groups_of_patients

OPTIONS = {"resolutions": (32,), "workers": 0, "progress": False}
KEY = "ab" * 32


def results(out: Path) -> dict[str, bytes]:
    """Every file but the lock and the manifests of runs, by relative path; of records without the time they took."""
    found = {}
    for path in sorted(out.rglob("*")):
        if path.is_file() and path.name != ".lock" and not path.name.startswith("run_"):
            content = path.read_bytes()
            if path.suffix == ".json" and path.parent.name == "sdf":
                record = json.loads(content)
                record.pop("seconds")
                content = json.dumps(record).encode()
            found[path.relative_to(out).as_posix()] = content
    return found


def run_ranks(root: Path, out: Path, n: int, *, order: tuple[int, ...] | None = None, **options) -> int:
    out.mkdir(exist_ok=True)
    (out / ".patient_key").write_text(KEY)
    computed = 0
    for rank in order or range(n):
        computed += prepare_dataset(root, out, **{**OPTIONS, **options}, rank=rank, world_size=n).n_computed
    return computed


@pytest.fixture
def shared_shapes(tmp_path) -> Path:
    """Five patients; 01 and 03 have a file in common, 00 and 04 a volume, and 02 a broken one."""
    root = make_patients(tmp_path / "in", 5)
    (root / "patient_02" / "broken.stl").write_bytes(b"solid nothing")
    write_stl(root / "patient_03" / "liver.stl", *ellipsoid((30, 9, 9)))
    for patient in ("patient_01", "patient_03"):
        write_stl(root / patient / "spleen.stl", *ellipsoid((5, 6, 7)))
    write_labels(root / "patient_00" / "seg.nii.gz")
    (root / "patient_04" / "scan.nii.gz").write_bytes((root / "patient_00" / "seg.nii.gz").read_bytes())
    return root


@pytest.mark.parametrize("frame", ["shape", "patient"])
def test_ranks_make_what_a_single_run_makes(shared_shapes, tmp_path, frame):
    """Byte for byte, npz and records too, in whatever order the ranks run; and nothing is done again afterwards."""
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    assert run_ranks(shared_shapes, alone, 1, frame=frame) == 10 + 8
    with open(alone / "metadata.csv", newline="") as stream:
        assert len({row["patient_id"] for row in csv.DictReader(stream)}) == 5
    for order in ((2, 0, 1), (1, 2, 0)):
        run_ranks(shared_shapes, shared, 3, order=order, frame=frame)
        tables = build_metadata(shared)
        assert (len(tables.rows), len(tables.failures), tables.duplicates) == (8, 1, 3)
        assert results(shared) == results(alone)
    assert run_ranks(shared_shapes, shared, 3, frame=frame) == 0
    assert run_ranks(shared_shapes, shared, 1, frame=frame) == 0


def test_patients_with_a_file_in_common_go_together(shared_shapes):
    numbers = [[int(name[-1]) for name in group] for group in groups_of_patients(find_sources(shared_shapes).sources)]
    assert numbers == [[0, 4], [1, 3], [2]]
    write_labels(shared_shapes / "patient_01" / "seg.nii.gz")  # the volume of patients 0 and 4: all of them together
    numbers = [[int(name[-1]) for name in group] for group in groups_of_patients(find_sources(shared_shapes).sources)]
    assert numbers == [[0, 1, 3, 4], [2]]
    (shared_shapes / "patient_02" / "link.stl").symlink_to(shared_shapes / "nowhere")
    assert len(groups_of_patients(find_sources(shared_shapes).sources)) == 2


def test_only_files_that_look_alike_are_read(tmp_path, monkeypatch):
    root = make_patients(tmp_path, 4)  # all of one size
    read = []
    real = groups_of_patients.__globals__["content_hash"]
    monkeypatch.setitem(groups_of_patients.__globals__, "content_hash", lambda files: read.append(files) or real(files))
    assert len(groups_of_patients(find_sources(root).sources)) == 4 and not read
    (root / "patient_03" / "liver.stl").write_bytes((root / "patient_00" / "liver.stl").read_bytes())
    assert len(groups_of_patients(find_sources(root).sources)) == 3 and len(read) == 2


def test_the_merge_waits_for_all_ranks(tmp_path):
    root, out = make_patients(tmp_path / "in", 5), tmp_path / "out"
    for rank in (1, 0, 2):
        with pytest.raises(ValueError, match="have not finished" if rank != 1 else "no preparation"):
            build_metadata(out)
        prepare_dataset(root, out, **OPTIONS, rank=rank, world_size=3)
        assert not (out / "metadata.csv").exists()
    assert len(build_metadata(out).rows) == 5


def test_labels_that_no_rank_holds_are_a_warning_of_the_merge(tmp_path):
    root, out = make_patients(tmp_path / "in", 2), tmp_path / "out"
    run_ranks(root, out, 2, labels=["liver", "heart"])
    assert build_metadata(out).warnings == ["no source holds the labels heart"]


@pytest.mark.parametrize(
    ("one", "two", "what"),
    [
        ({}, {"band_voxels": 2}, "prep_hash"),
        ({}, {"keep_patient_ids": True}, "keep_patient_ids"),
        ({}, {"keep_source_paths": True}, "keep_source_paths"),
        ({}, {"key_file": "other.key"}, "key"),
        ({}, {"label_names": "table.csv"}, "label_names"),
        ({"label_names": "table.csv"}, {"label_names": "table2.csv"}, "label_names"),
        ({}, {"exclude": ["patient_02"]}, "search"),
        ({}, {"patient_regex": r"patient_0(\d)"}, "search"),
        ({}, {"seed": 1}, "seed"),
        ({}, {"labels": ["liver"]}, "labels"),
    ],
)
def test_ranks_must_agree(tmp_path, monkeypatch, one, two, what):
    monkeypatch.chdir(tmp_path)
    Path("other.key").write_text("cd" * 32)
    Path("table.csv").write_text("value,name\n1,a\n")
    Path("table2.csv").write_text("value,name\n1,b\n")
    root, out = make_patients(tmp_path / "in", 3), tmp_path / "out"
    run_ranks(root, out, 2, order=(0,), **one)
    run_ranks(root, out, 2, order=(1,), **two)
    with pytest.raises(ValueError, match=rf"the ranks ran with different {what} \("):
        build_metadata(out)
    assert not (out / "metadata.csv").exists()


def test_ranks_that_saw_other_files_are_refused(tmp_path):
    """A patient that is added in between would be in nobody's share."""
    root, out = make_patients(tmp_path / "in", 3, first=1), tmp_path / "out"
    run_ranks(root, out, 2, order=(0,))
    make_patients(root, 1)
    run_ranks(root, out, 2, order=(1,))
    with pytest.raises(ValueError, match=r"different search \(files below DATA_ROOT, and whose they are\)"):
        build_metadata(out)
    run_ranks(root, out, 2)
    assert len(build_metadata(out).rows) == 4


def edit(path: Path, *, radius: float) -> None:
    """Another mesh under the same name, in a file of the same size and another time."""
    facts = path.stat()
    write_stl(path, *ellipsoid((radius, 7, 7)))
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns + 10**9))


def test_a_rank_that_did_not_see_the_files_as_they_are_is_refused(tmp_path):
    """Files are edited under their names, and one rank is not run again."""
    root, out = make_patients(tmp_path / "in", 4), tmp_path / "out"
    run_ranks(root, out, 3)
    first = {row["sha256"] for row in build_metadata(out).rows}
    for patient in sorted(root.iterdir()):
        edit(patient / "liver.stl", radius=20 + int(patient.name[-2:]))
    run_ranks(root, out, 3, order=(0, 1))
    with pytest.raises(ValueError, match=r"different state \(sizes and times of the files") as caught:
        build_metadata(out)
    assert "(ranks [0, 1])" in str(caught.value) and "(ranks [2])" in str(caught.value)
    run_ranks(root, out, 3, order=(2,))
    assert len({row["sha256"] for row in build_metadata(out).rows} - first) == 4


def test_a_table_of_label_names_that_was_edited_in_between_is_refused(tmp_path):
    root, out = make_patients(tmp_path / "in", 2), tmp_path / "out"
    write_labels(root / "patient_00" / "seg.nii.gz")
    table = root / "patient_00" / "seg.csv"
    table.write_text("value,name\n2,a\n")
    run_ranks(root, out, 2, order=(0,))
    table.write_text("value,name\n2,liver\n")
    run_ranks(root, out, 2, order=(1,))
    with pytest.raises(ValueError, match="different state"):
        build_metadata(out)


def test_a_rank_that_finds_nothing_to_do_still_counts(tmp_path):
    """So does one whose share is empty, and one that is run again alone."""
    root, out = make_patients(tmp_path / "in", 2), tmp_path / "out"
    run_ranks(root, out, 3)
    rows = build_metadata(out).rows
    assert run_ranks(root, out, 3, order=(1,)) == 0 and build_metadata(out).rows == rows
    assert run_ranks(root, out, 3, order=(2,)) == 0 and build_metadata(out).rows == rows


@pytest.mark.parametrize("n", [1, 3])
def test_a_rank_that_was_killed_does_not_count(tmp_path, monkeypatch, n):
    """Although it had finished an earlier run; and one of another number of ranks that was begun ends the older run."""
    root, out = make_patients(tmp_path / "in", 4), tmp_path / "out"
    run_ranks(root, out, 3)
    build_metadata(out)

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setitem(prepare_dataset.__globals__, "_run", killed)
        run_ranks(root, out, n, order=(n - 1,))
    reason = r"ranks \[2\] of 3 have not finished" if n == 3 else "no preparation has finished"
    with pytest.raises(ValueError, match=reason):
        build_metadata(out)
    run_ranks(root, out, n, order=(n - 1,))
    assert len(build_metadata(out).rows) == 4


def leave_half_written(out: Path) -> list[Path]:
    names = [".a.tmp", "records/sources/.b.json.x.tmp", "sparse_sdf/.c.npz.y.tmp", "meshes/.d.ply.z.tmp"]
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(b"half")
    return [out / name for name in names]


def test_the_merge_removes_what_killed_ranks_left(tmp_path):
    root, out = make_patients(tmp_path / "in", 2), tmp_path / "out"
    out.mkdir()
    left = leave_half_written(out)
    run_ranks(root, out, 2)
    assert all(path.exists() for path in left), "another rank may be writing them"
    build_metadata(out)
    assert not any(path.exists() for path in left)


def test_what_a_killed_worker_left_is_gone_after_the_run(tmp_path, monkeypatch):
    root, out = make_patients(tmp_path / "in", 1), tmp_path / "out"
    module, left = prepare_dataset.__globals__, []
    real = module["write_tables"]
    monkeypatch.setitem(module, "write_tables", lambda *a, **k: left.extend(leave_half_written(out)) or real(*a, **k))
    prepare_dataset(root, out, **OPTIONS)
    assert len(left) == 4 and not any(path.exists() for path in left)


@pytest.mark.parametrize("kind", [fcntl.LOCK_EX, fcntl.LOCK_SH])
def test_two_runs_at_once_are_refused(tmp_path, capsys, kind):
    """A run and a merge need the folder alone; ranks share it."""
    root, out = make_patients(tmp_path / "in", 2), tmp_path / "out"
    run_ranks(root, out, 2)
    with open(out / ".lock", "w") as stream:
        fcntl.flock(stream, kind)
        with pytest.raises(ValueError, match="another preparation is running"):
            prepare_dataset(root, out, **OPTIONS)
        assert build_metadata_toolkit.main([str(out)]) == 2
        assert "another preparation is running" in capsys.readouterr().err
        if kind == fcntl.LOCK_SH:
            assert run_ranks(root, out, 2) == 0
        else:
            with pytest.raises(ValueError, match="another preparation is running"):
                run_ranks(root, out, 2)
    assert build_metadata_toolkit.main([str(out)]) == 0
