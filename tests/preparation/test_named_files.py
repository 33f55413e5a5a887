"""Files that a source names for its numbers belong to it: voxels of detached headers and buffers of glTF."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
from preparation_shapes import ellipsoid, write_stl

from trellis.preparation.discover import MESH, find_sources
from trellis.preparation.prepare import prepare_dataset
from trellis.preparation.shares import groups_of_patients

OPTIONS = {"resolutions": (32,), "workers": 0, "progress": False}
MHD = """ObjectType = Image\nNDims = 3\nDimSize = 12 12 12\nElementSpacing = 1 1 1\nElementType = MET_UCHAR
ElementDataFile = {}\n"""
NHDR = """NRRD0004\ntype: uchar\ndimension: 3\nsizes: 12 12 12\nspacings: 1 1 1\nencoding: raw\ndata file: {}\n"""
HEADERS = {".mhd": MHD, ".nhdr": NHDR}


def write_voxels(path: Path, length: int) -> None:
    data = np.zeros((12, 12, 12), np.uint8)
    data[2:8, 2:8, 2 : 2 + length] = 1
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.tobytes())


def write_detached(folder: Path, suffix: str, length: int, data: str = "result.raw") -> Path:
    write_voxels(folder / data, length)
    (folder / f"seg{suffix}").write_text(HEADERS[suffix].format(data))
    return folder / f"seg{suffix}"


def write_gltf(folder: Path, radii=(10.0, 8.0, 6.0), name: str = "liver") -> Path:
    import trimesh

    vertices, faces = ellipsoid(radii)
    files = trimesh.exchange.gltf.export_gltf(trimesh.Scene(trimesh.Trimesh(vertices, faces, process=False)))
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        (folder / (f"{name}.gltf" if file == "model.gltf" else file)).write_bytes(content)
    return folder / f"{name}.gltf"


def ids_of(out: Path) -> dict[str, str]:
    """Patient to sha256, of datasets with one shape a patient."""
    with open(out / "metadata.csv", newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert not any(row["error"] for row in rows), rows
    return {row["patient_id"]: row["sha256"] for row in rows}


def edit_later(path: Path, write) -> None:
    """Another content at another time, which the clock of a file system may be too coarse to show."""
    facts = path.stat()
    write()
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns + 10**9))


@pytest.mark.parametrize("suffix", HEADERS)
def test_voxels_in_a_file_of_another_stem_count(tmp_path, suffix):
    root, out = tmp_path / "in", tmp_path / "out"
    write_detached(root / "anna", suffix, 4)
    write_detached(root / "bert", suffix, 6)
    assert [len(source.files) for source in find_sources(root).sources] == [2, 2]
    summary = prepare_dataset(root, out, **OPTIONS, keep_patient_ids=True)
    first = ids_of(out)
    assert first.keys() == {"anna", "bert"} and len(set(first.values())) == 2 and summary.n_duplicates == 0
    assert prepare_dataset(root, out, **OPTIONS, keep_patient_ids=True).n_computed == 0
    edit_later(root / "anna" / "result.raw", lambda: write_voxels(root / "anna" / "result.raw", 8))
    assert prepare_dataset(root, out, **OPTIONS, keep_patient_ids=True).n_computed == 2
    assert ids_of(out)["anna"] != first["anna"] and ids_of(out)["bert"] == first["bert"]


@pytest.mark.parametrize("make", [write_detached, write_gltf])
def test_equal_numbers_under_two_patients_go_together(tmp_path, make):
    arguments = (".mhd", 4) if make is write_detached else ()
    for patient in ("anna", "bert", "carl"):
        make(tmp_path / patient, *arguments)
    assert groups_of_patients(find_sources(tmp_path).sources) == [["anna", "bert", "carl"]]
    data = next(path for path in (tmp_path / "bert").iterdir() if path.suffix in (".raw", ".bin"))
    data.write_bytes(bytes([*data.read_bytes()[:-1], 1]))
    assert groups_of_patients(find_sources(tmp_path).sources) == [["anna", "carl"], ["bert"]]


def test_masks_with_detached_headers_count_with_their_voxels(tmp_path):
    root, out = tmp_path / "in", tmp_path / "out"
    for patient, length in (("anna", 4), ("bert", 6)):
        write_detached(root / patient / "segmentations", ".mhd", length)
    prepare_dataset(root, out, **OPTIONS, keep_patient_ids=True)
    assert len(set(ids_of(out).values())) == 2


def test_a_mesh_of_a_headers_stem_is_a_mesh(tmp_path):
    """It is no data file of the header's."""
    write_detached(tmp_path / "anna", ".mhd", 4, data="seg.raw")
    write_stl(tmp_path / "anna" / "seg.stl", *ellipsoid())
    found = find_sources(tmp_path)
    assert [(s.relative, len(s.files)) for s in found.sources] == [("anna/seg.mhd", 2), ("anna/seg.stl", 1)]
    assert found.others == 0


@pytest.mark.parametrize("name", ["../bert/result.raw", "/result.raw", "gone.raw", "LIST", "seg%02d.raw 1 3 1"])
def test_a_header_that_names_no_file_beside_it_stands_alone(tmp_path, name):
    write_detached(tmp_path / "bert", ".mhd", 4)
    (tmp_path / "anna").mkdir()
    (tmp_path / "anna" / "seg.mhd").write_text(MHD.format(name))
    assert [len(source.files) for source in find_sources(tmp_path).sources] == [1, 2]


def test_a_volume_that_comes_to_a_header_is_read(tmp_path):
    root, out = tmp_path / "in", tmp_path / "out"
    write_detached(root / "anna", ".mhd", 4)
    (root / "anna" / "result.raw").rename(tmp_path / "result.raw")
    assert prepare_dataset(root, out, **OPTIONS).n_failed == 1
    (tmp_path / "result.raw").rename(root / "anna" / "result.raw")
    assert prepare_dataset(root, out, **OPTIONS).n_failed == 0


def test_headers_of_any_length_and_kind_are_looked_at(tmp_path):
    """A header longer than one piece, one without an end, a page of empty lines, and a pipe."""
    voxels = write_detached(tmp_path / "anna", ".mhd", 4)
    comments = "".join(f"Comment{i} = {'x' * 60}\n" for i in range(3000))
    voxels.write_text(comments + MHD.format("result.raw"))
    (tmp_path / "anna" / "endless.mhd").write_text(comments)
    (tmp_path / "anna" / "empty.mhd").write_bytes(b"\n" * (1 << 20))
    (tmp_path / "anna" / "spaces.nhdr").write_bytes(b"NRRD0004\na" + b" " * (1 << 20))
    os.mkfifo(tmp_path / "anna" / "pipe.mhd")
    found = {source.path.name: len(source.files) for source in find_sources(tmp_path).sources}
    assert found == {"seg.mhd": 2, "endless.mhd": 1, "empty.mhd": 1, "spaces.nhdr": 1, "pipe.mhd": 1}


def test_buffers_of_gltf_count(tmp_path):
    root, out = tmp_path / "in", tmp_path / "out"
    for patient, length in (("anna", 10.0), ("bert", 9.0)):
        write_gltf(root / patient, (length, 8.0, 6.0))
        (root / patient / "liver.gltf").write_bytes((root / "anna" / "liver.gltf").read_bytes())
    found = find_sources(root)
    assert {source.kind for source in found.sources} == {MESH} and all(len(s.files) > 1 for s in found.sources)
    assert found.others == 0
    prepare_dataset(root, out, **OPTIONS, keep_patient_ids=True)
    first = ids_of(out)
    assert len(set(first.values())) == 2
    pairs = zip(found.sources[0].files[1:], found.sources[1].files[1:])
    buffer, other = next((mine, its) for mine, its in pairs if mine.read_bytes() != its.read_bytes())
    edit_later(buffer, lambda: buffer.write_bytes(other.read_bytes()))
    # its reading, and the field again where the shape that both have now counts as anna's (by the order of pseudonyms)
    assert prepare_dataset(root, out, **OPTIONS, keep_patient_ids=True).n_computed in (1, 2)
    with open(out / "metadata.csv", newline="", encoding="utf-8") as stream:
        assert {row["sha256"] for row in csv.DictReader(stream)} == {first["bert"]}
    assert prepare_dataset(root, out, **OPTIONS, keep_patient_ids=True).n_computed == 0


@pytest.mark.parametrize("uri", ["../secret.bin", "/secret.bin", "gone.bin", ""])
def test_a_buffer_that_is_not_beside_its_gltf_is_refused(tmp_path, uri):
    from trellis.utils.mesh_utils import read_mesh

    (tmp_path / "secret.bin").write_bytes(bytes(64))
    path = write_gltf(tmp_path / "anna")
    document = json.loads(path.read_text())
    document["buffers"][0]["uri"] = uri
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match="beside it: no such file"):
        read_mesh(path)
