"""Finding sources and their patients."""

from __future__ import annotations

import pytest
from preparation_shapes import ellipsoid, write_labels, write_stl

from trellis.preparation.discover import find_sources
from trellis.preparation.layouts import LOOSE_SLICES


@pytest.fixture
def root(tmp_path):
    vertices, faces = ellipsoid(level=1)
    write_stl(tmp_path / "sub-01" / "ses-1" / "liver.stl", vertices, faces)
    write_stl(tmp_path / "sub-02" / "Liver.STL", vertices, faces)
    write_labels(tmp_path / "sub-02" / "seg.nii.gz")
    write_stl(tmp_path / "loose.stl", vertices, faces)
    write_stl(tmp_path / ".trash" / "old.stl", vertices, faces)
    (tmp_path / "sub-01" / "report.txt").write_text("text")
    return tmp_path


def test_first_folder_is_the_patient(root, caplog):
    found = find_sources(root)
    assert [(s.relative, s.kind, s.patient) for s in found.sources] == [
        ("loose.stl", "mesh", "loose"),
        ("sub-01/ses-1/liver.stl", "mesh", "sub-01"),
        ("sub-02/Liver.STL", "mesh", "sub-02"),
        ("sub-02/seg.nii.gz", "volume", "sub-02"),
    ]
    assert found.others == 1 and "lie directly in DATA_ROOT" in caplog.text


@pytest.mark.parametrize("regex", [r"sub-(\d+)", r"x?sub-(?P<patient>\d+)", r"(?<=sub-)\d+"])
def test_patient_regex(root, regex):
    found = find_sources(root, patient_regex=regex)
    assert [source.patient for source in found.sources] == ["01", "02", "02"]
    assert found.unmatched == ["loose.stl"]


@pytest.mark.parametrize(("regex", "warned"), [(r"^(\w+)\.stl", True), (r"^loose\.stl$", True), (r"^(lo)ose", False)])
def test_a_regex_that_fits_a_whole_name_leaves_it_in_the_label_and_that_is_said(root, caplog, regex, warned):
    find_sources(root, patient_regex=regex)
    assert ("1 meshes lie directly in DATA_ROOT" in caplog.text) == warned


def test_links_are_followed_once_and_loops_end(root):
    (root / "sub-01" / "loop").symlink_to(root, target_is_directory=True)
    (root / "sub-03").symlink_to(root / "sub-01", target_is_directory=True)
    relatives = [source.relative for source in find_sources(root).sources]
    assert len(relatives) == 4


def test_a_folder_can_be_left_out(root):
    assert {s.patient for s in find_sources(root, skip_folder=root / "sub-02").sources} == {"loose", "sub-01"}


def write_slices(folder, names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(bytes(128) + b"DICM")


def test_slices_are_known_by_their_first_bytes(root):
    """Archives name them by UID, of which the last number looks like a suffix; the index of a disk is none."""
    names = ["1.2.840.113619.2.55.3", "1.2.840.113619.2.55.4", "IMG0001", "a.dcm"]
    write_slices(root / "sub-03" / "series", [*names, "DICOMDIR"])
    found = find_sources(root)
    (series,) = (source for source in found.sources if source.patient == "sub-03")
    assert series.relative == "sub-03/series" and [path.name for path in series.files] == names
    assert found.others == 2 and not found.left_out


def test_slices_beside_a_volume_are_counted(root):
    write_slices(root / "sub-02", ["1.dcm", "2.dcm", "3.dcm"])
    found = find_sources(root)
    assert [source.relative for source in found.sources if source.kind == "volume"] == ["sub-02/seg.nii.gz"]
    assert found.left_out == {LOOSE_SLICES: 3} and found.others == 1
