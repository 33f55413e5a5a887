"""One label volume through every format and orientation: its meshes lie in the same place in world mm."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from volume_cases import (
    FORMATS,
    LPS,
    ORIENTATIONS,
    SHEARED,
    TILTED,
    dicom_slices,
    labels,
    save,
    write_dicom,
    write_nrrd,
)

from trellis.geometry.volume import LabelVolume, label_surfaces, read_volume
from trellis.utils.mesh_utils import read_mesh, write_mesh

ATOL_MM = 1e-3


@cache
def plain_surfaces(turned: bool, iterations: int) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """The surfaces on a plain grid; `turned`: of the volume with its slices in opposite order."""
    data = labels()[:, :, ::-1] if turned else labels()
    return label_surfaces(LabelVolume(data, np.eye(4)), smoothing_iterations=iterations)


def triangles_by_hand(affine: np.ndarray, *, turned: bool = False, iterations: int = 30) -> dict[int, np.ndarray]:
    """[F, 3, 3] of each label: made on a plain grid, moved by the affine, turned where that mirrors."""
    if turned:
        affine = affine @ [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, -1, labels().shape[2] - 1], [0, 0, 0, 1]]
    moved = {}
    for label, (vertices, faces) in plain_surfaces(turned, iterations).items():
        faces = faces[:, ::-1] if np.linalg.det(affine[:3, :3]) < 0 else faces
        moved[label] = (vertices @ affine[:3, :3].T + affine[:3, 3])[faces]
    return moved


def in_order(points: np.ndarray) -> np.ndarray:
    """[N, 3], sorted: points that are the same but for rounding come out in the same order."""
    points = points.reshape(-1, 3)
    return points[np.lexsort(np.round(points + 1e-4 / 3, 2).T)]


def signed_volume(triangles: np.ndarray) -> float:
    a, b, c = np.moveaxis(triangles, 1, 0)
    return float(np.einsum("ij,ij->", a, np.cross(b, c)) / 6)


@pytest.mark.parametrize(("name", "orientation"), [(name, key) for name in FORMATS for key in FORMATS[name]])
def test_meshes_lie_where_the_voxels_lie(tmp_path: Path, name: str, orientation: str):
    affine = FORMATS[name][orientation]
    # the slices of a series have an order: from the one at the lowest position along rows x columns
    turned = name == "series" and np.linalg.det(affine[:3, :3]) < 0
    save(tmp_path / name, labels(), affine)
    volume = read_volume(tmp_path / name, spacing_mm=(0.7, 0.9, 2.5) if name == "a.npy" else None)
    np.testing.assert_array_equal(volume.data, labels()[:, :, ::-1] if turned else labels())
    expected = triangles_by_hand(affine, turned=turned)
    for label, (vertices, faces) in label_surfaces(volume).items():
        np.testing.assert_allclose(vertices[faces], expected[label], atol=ATOL_MM)
        assert signed_volume(vertices[faces]) > 0
    stairs = triangles_by_hand(affine, iterations=0)
    for label, (vertices, _) in label_surfaces(volume, smoothing_iterations=0).items():  # the same points in any order
        corners = np.unique(np.round(stairs[label].reshape(-1, 3), 6), axis=0)
        np.testing.assert_allclose(in_order(vertices), in_order(corners), atol=ATOL_MM)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_left_handed_qform_is_written_as_one(tmp_path: Path, orientation: str):
    """What the cases of qform.nii stand for: no sform, and the sign of the third axis in pixdim[0]."""
    import nibabel

    save(tmp_path / "qform.nii", labels(), ORIENTATIONS[orientation])
    header = nibabel.load(tmp_path / "qform.nii").header
    assert header["sform_code"] == 0 and header["qform_code"] == 1
    assert header["pixdim"][0] == (-1 if "left-handed" in orientation else 1)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_written_stl_lies_there_by_slicers_rule(tmp_path: Path, orientation: str):
    affine = ORIENTATIONS[orientation]
    path = tmp_path / "shape.stl"
    for label, (vertices, faces) in label_surfaces(LabelVolume(labels(), affine)).items():
        write_mesh(path, vertices, faces)
        expected = triangles_by_hand(affine)[label]
        assert b"SPACE=LPS" in path.read_bytes()[:80]
        raw = np.frombuffer(path.read_bytes()[84:], dtype=[("n", "<f4", 3), ("v", "<f4", (3, 3)), ("a", "<u2")])["v"]
        # 3D Slicer turns a file tagged LPS into RAS: x and y change sign
        np.testing.assert_allclose(raw.astype(float) @ LPS[:3, :3], expected, atol=ATOL_MM)
        back = read_mesh(path)
        np.testing.assert_allclose(back.vertices[back.faces], expected, atol=ATOL_MM)


# one frame on a fourth axis


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.npz", "a.npy", "a.nrrd", "a.seg.nrrd"])
def test_a_fourth_axis_of_one_frame_changes_nothing(tmp_path: Path, name: str):
    affine = np.diag([0.7, 0.9, 2.5, 1]) if name == "a.npy" else SHEARED
    save(tmp_path / name, labels()[..., None], affine)
    volume = read_volume(tmp_path / name, spacing_mm=(0.7, 0.9, 2.5) if name == "a.npy" else None)
    np.testing.assert_array_equal(volume.data, labels())
    np.testing.assert_allclose(volume.affine, affine, atol=1e-5)


def test_a_fourth_axis_in_metaimage_and_in_front(tmp_path: Path):
    lps = LPS @ ORIENTATIONS["oblique left-handed"]
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    matrix = np.eye(4)
    matrix[:3, :3] = lps[:3, :3] / spacing
    numbers = {
        "TransformMatrix": matrix.T.reshape(-1), "Offset": [*lps[:3, 3], 0], "ElementSpacing": [*spacing, 1],
        "DimSize": [*labels().shape, 1],
    }  # fmt: skip
    lines = ["ObjectType = Image", "NDims = 4", "BinaryData = True"]
    lines += [f"{key} = {' '.join(f'{x:.9g}' for x in values)}" for key, values in numbers.items()]
    head = "\n".join([*lines, "ElementType = MET_UCHAR", "ElementDataFile = LOCAL", ""]).encode()
    (tmp_path / "a.mha").write_bytes(head + labels().tobytes(order="F"))
    volume = read_volume(tmp_path / "a.mha")
    np.testing.assert_array_equal(volume.data, labels())
    np.testing.assert_allclose(volume.affine, ORIENTATIONS["oblique left-handed"], atol=1e-5)

    write_nrrd(tmp_path / "a.nrrd", labels()[..., None], SHEARED)  # Slicer has the layers first
    text = (tmp_path / "a.nrrd").read_bytes()
    for before, after in (
        (b"sizes: 14 12 9 1", b"sizes: 1 14 12 9"), (b"directions: (", b"directions: none ("), (b") none\n", b")\n"),
        (b"kinds: domain domain domain list", b"kinds: list domain domain domain"),
    ):  # fmt: skip
        assert before in text
        text = text.replace(before, after)
    (tmp_path / "a.nrrd").write_bytes(text)
    volume = read_volume(tmp_path / "a.nrrd")
    np.testing.assert_array_equal(volume.data, labels())
    np.testing.assert_allclose(volume.affine, SHEARED, atol=1e-5)


# DICOM: slices that do not form a grid


def series(tmp_path: Path, **changes) -> Path:
    """Nine slices; `changes` is a slice's number behind "at" and what differs there."""
    slices = dicom_slices(labels(), ORIENTATIONS["oblique"])
    for key, change in changes.items():
        slices[int(key.removeprefix("at"))].update(change)
    folder = tmp_path / "series"
    write_dicom(folder, slices)
    return folder


def test_slices_may_lie_a_hundredth_of_a_millimetre_off(tmp_path: Path):
    at = dicom_slices(labels(), ORIENTATIONS["oblique"])[3]["position"]
    volume = read_volume(series(tmp_path, at3={"position": at + [0.005, 0, -0.005]}))
    np.testing.assert_allclose(volume.affine, ORIENTATIONS["oblique"], atol=1e-6)
    with pytest.raises(ValueError, match=r"slice 4 of 9 .* lies 0\.014 mm from its place"):
        read_volume(series(tmp_path, at3={"position": at + [0.01, 0, -0.01]}))


def test_a_missing_slice_is_refused(tmp_path: Path):
    folder = tmp_path / "series"
    slices = dicom_slices(labels(), TILTED)
    write_dicom(folder, slices[:4] + slices[5:])
    with pytest.raises(ValueError, match=r"evenly spaced.*gaps go from 2\.\d+ to 4\.\d+ mm: one is missing"):
        read_volume(folder)


def test_slices_at_one_position_are_refused(tmp_path: Path):
    same = {"position": np.array([1.0, 2, 3])}
    folder = series(tmp_path, **{f"at{k}": same for k in range(9)})
    with pytest.raises(ValueError, match=r"slices 1 and 2 of 9 lie at one place \(0\.000 mm apart\)"):
        read_volume(folder)


def test_two_slices_at_one_place_are_refused(tmp_path: Path):
    at = dicom_slices(labels(), ORIENTATIONS["oblique"])[5]["position"]
    with pytest.raises(ValueError, match=r"gaps .* above 0: slices 6 and 7 of 9 lie at one place"):
        read_volume(series(tmp_path, at6={"position": at}))
    # at one place along the normal, and beside each other
    beside = dicom_slices(labels(), ORIENTATIONS["oblique"])[5]
    with pytest.raises(ValueError, match="slices 6 and 7 of 9 lie at one place"):
        read_volume(series(tmp_path, at6={"position": beside["position"] + 7 * beside["rows"]}))


def test_a_slice_off_the_line_is_refused(tmp_path: Path):
    part = dicom_slices(labels(), ORIENTATIONS["oblique"])[5]
    with pytest.raises(ValueError, match=r"slice 6 of 9 .* lies 1\.500 mm from its place"):
        read_volume(series(tmp_path, at5={"position": part["position"] + 1.5 * part["columns"]}))


def test_a_turned_or_scaled_slice_is_refused(tmp_path: Path):
    part = dicom_slices(labels(), ORIENTATIONS["oblique"])[4]
    for change in (
        {"rows": part["columns"], "columns": -part["rows"]},
        {"rows": -part["rows"], "columns": -part["columns"]},
        {"spacing": part["spacing"] * [1, 1.01]},
    ):
        with pytest.raises(ValueError, match=r"one orientation and pixel spacing: those of slice 5 of 9 .* by up to"):
            read_volume(series(tmp_path, at4=change))


def test_slices_that_do_not_say_where_they_lie_are_refused(tmp_path: Path):
    slices = dicom_slices(labels(), ORIENTATIONS["oblique"])
    for key, what in (("position", r"position \(0020,0032\)"), ("rows", r"orientation \(0020,0037\)")):
        lacking = [{k: v for k, v in part.items() if k != key} if n == 4 else part for n, part in enumerate(slices)]
        write_dicom(tmp_path / "series", lacking)
        with pytest.raises(ValueError, match=rf"series: {what} is missing"):
            read_volume(tmp_path / "series")
    with pytest.raises(ValueError, match=r"pixel spacing must be above 0, got 0 and 0\.8 mm"):
        read_volume(series(tmp_path, at4={"spacing": np.array([0.8, 0])}))
    with pytest.raises(ValueError, match="orientation must be two unit vectors at right angles"):
        read_volume(series(tmp_path, at4={"rows": slices[4]["columns"]}))


def test_a_single_slice_needs_a_thickness(tmp_path: Path):
    affine = ORIENTATIONS["oblique"]
    (part,) = dicom_slices(labels()[:, :, 4:5], affine)
    write_dicom(tmp_path / "series", [part])
    np.testing.assert_allclose(read_volume(tmp_path / "series").affine, affine, atol=1e-6)
    del part["thickness"]
    write_dicom(tmp_path / "series", [part])
    with pytest.raises(ValueError, match="no voxel spacing"):
        read_volume(tmp_path / "series")
    given = read_volume(tmp_path / "series", spacing_mm=(0.8, 0.8, 3))
    np.testing.assert_allclose(given.affine, affine @ np.diag([1, 1, 1.5, 1]), atol=1e-6)


def test_files_of_several_frames_are_refused(tmp_path: Path):
    part = dicom_slices(labels(), ORIENTATIONS["oblique"])[0]
    write_dicom(tmp_path / "series", [{**part, "pixels": labels()}])
    with pytest.raises(ValueError, match="file 1 of the series has 9 frames: one slice a file is needed"):
        read_volume(tmp_path / "series")
