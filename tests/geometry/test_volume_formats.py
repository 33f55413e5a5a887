"""Volume files: layers, names and masks, what is written, units, thresholds, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from volume_cases import ORIENTATIONS, SHEARED, itk_image, labels, save, write_nrrd

from trellis.geometry.volume import (
    IntensityVolume,
    UnreadMask,
    labels_of,
    parse_threshold,
    read_intensity,
    read_label_layers,
    read_volume,
    threshold_surface,
    write_label_volume,
)


def signed_volume(vertices: np.ndarray, faces: np.ndarray) -> float:
    a, b, c = np.moveaxis(vertices[faces], 1, 0)
    return float(np.einsum("ij,ij->", a, np.cross(b, c)) / 6)


def test_a_folder_without_slices_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="one DICOM series is needed, got 0"):
        read_volume(tmp_path)


def test_slicer_segmentation_with_overlapping_layers(tmp_path: Path):
    import SimpleITK

    first, second = labels(), np.zeros_like(labels())
    second[3:6, 4:7, 2:5] = 1
    image = itk_image(np.stack([first, second], axis=-1), ORIENTATIONS["oblique"])
    for number, (name, value, layer) in enumerate([("liver", 2, 0), ("tumour", 1, 1), ("left kidney", 5, 0)]):
        image.SetMetaData(f"Segment{number}_Name", name)
        image.SetMetaData(f"Segment{number}_LabelValue", str(value))
        image.SetMetaData(f"Segment{number}_Layer", str(layer))
    path = tmp_path / "case.seg.nrrd"
    SimpleITK.WriteImage(image, str(path), useCompression=True)
    layers = read_label_layers(path)
    assert [layer.names for layer in layers] == [{2: "liver", 5: "left kidney"}, {1: "tumour"}]
    np.testing.assert_array_equal(layers[0].data, first)
    np.testing.assert_array_equal(layers[1].data, second)
    np.testing.assert_allclose(layers[1].affine, ORIENTATIONS["oblique"], atol=1e-6)
    with pytest.raises(ValueError, match="got 2 layers of segments"):
        read_volume(path)

    image.SetMetaData("Segment1_LabelValue", "2")
    SimpleITK.WriteImage(itk_with(image, np.stack([first, second * 2], axis=-1)), str(path))
    layers = read_label_layers(path)  # value 2 in both layers: it stays in the first
    assert [layer.names for layer in layers] == [{2: "liver", 5: "left kidney"}, {1: "tumour"}]
    assert [layer.file_values for layer in layers] == [{2: 2}, {1: 2}]
    np.testing.assert_array_equal(layers[0].data, first)
    np.testing.assert_array_equal(layers[1].data, second)

    image.SetMetaData("Segment3_Name", "nothing")  # an empty segment does not name another layer's
    image.SetMetaData("Segment3_LabelValue", "5")
    image.SetMetaData("Segment3_Layer", "1")
    odd = second.astype(np.int32) * 2147483647
    SimpleITK.WriteImage(itk_with(image, np.stack([first.astype(np.int32), odd], axis=-1)), str(path))
    layers = read_label_layers(path)
    assert [layer.names for layer in layers] == [{2: "liver", 5: "left kidney"}, {}]
    odd = np.where(first == 2, 2147483647, odd)
    SimpleITK.WriteImage(itk_with(image, np.stack([np.where(first == 2, 2147483647, 0), odd], axis=-1)), str(path))
    layers = read_label_layers(path)
    assert [layer.names for layer in layers] == [{2147483647: "2147483647"}, {1: "2147483647"}]


def itk_with(image, data):
    import SimpleITK

    other = SimpleITK.GetImageFromArray(np.ascontiguousarray(np.moveaxis(data, (0, 1, 2), (2, 1, 0))), isVector=True)
    other.CopyInformation(image)
    for key in image.GetMetaDataKeys():
        other.SetMetaData(key, image.GetMetaData(key))
    return other


def test_one_layer_segmentation_names(tmp_path: Path):
    import SimpleITK

    image = itk_image(labels(), ORIENTATIONS["anisotropic"])
    image.SetMetaData("Segment0_Name", "aorta")
    image.SetMetaData("Segment0_LabelValue", "5")
    SimpleITK.WriteImage(image, str(tmp_path / "a.seg.nrrd"))
    assert read_volume(tmp_path / "a.seg.nrrd").names == {5: "aorta"}


@pytest.mark.parametrize(("name", "code"), [("a.nii.gz", 0), ("a.nii", 30)])
def test_names_in_a_nifti_header_as_totalsegmentator_writes(tmp_path: Path, name: str, code: int):
    import nibabel

    table = (
        '<?xml version="1.0" encoding="UTF-8"?> <CaretExtension>  <Date><![CDATA[2013-07-14T05:45:09]]></Date>   '
        '<VolumeInformation Index="0">   <LabelTable>\n'
        '<Label Key="2" Red="1.0" Green="0.0" Blue="0.0" Alpha="1"><![CDATA[kidney_right]]></Label>\n'
        '<Label Key="5" Red="0.0" Green="1.0" Blue="0.0" Alpha="1"><![CDATA[aorta]]></Label>\n\n'
        "  </LabelTable>  <StudyMetaDataLinkSet>  </StudyMetaDataLinkSet>  <VolumeType><![CDATA[Label]]></VolumeType>"
        "   </VolumeInformation></CaretExtension>\n              "
    )

    def write(*contents: bytes) -> None:
        image = nibabel.Nifti1Image(labels(), SHEARED)
        image.set_sform(SHEARED, 1)
        for content in contents:
            image.header.extensions.append(nibabel.nifti1.Nifti1Extension(code, content))
        nibabel.save(image, tmp_path / name)

    write(b"something else", table.encode())
    for volume in (read_volume(tmp_path / name), *read_label_layers(tmp_path / name)):
        assert volume.names == {2: "kidney_right", 5: "aorta"} and volume.notes == ()
    np.testing.assert_array_equal(volume.data, labels())
    np.testing.assert_allclose(volume.affine, SHEARED, atol=1e-6)
    write(table.replace("<CaretE", "<!DOCTYPE x [<!ENTITY y 'z'>]><CaretE").encode())
    volume = read_volume(tmp_path / name)
    assert volume.names == {}
    assert volume.notes == ("the label table in the header's extension is not used: a document type is refused",)


def test_folder_of_masks_as_totalsegmentator_writes(tmp_path: Path):
    data = labels()
    for name, mask in {"aorta": data == 2, "liver": data == 5, "spleen": data == 99}.items():
        save(tmp_path / f"{name}.nii.gz", mask.astype(np.uint8), SHEARED)
    (volume,) = read_label_layers(tmp_path)
    assert volume.names == {1: "aorta", 2: "liver"}
    np.testing.assert_array_equal(volume.data == 1, data == 2)
    np.testing.assert_array_equal(volume.data == 2, data == 5)
    np.testing.assert_allclose(volume.affine, SHEARED, atol=1e-5)
    save(tmp_path / "body.nii.gz", (data > 0).astype(np.uint8), SHEARED)  # overlaps the others
    layers = read_label_layers(tmp_path)
    assert [layer.names for layer in layers] == [{1: "aorta", 3: "liver"}, {2: "body"}]
    save(tmp_path / "moved.nii.gz", (data > 0).astype(np.uint8), np.eye(4))
    with pytest.raises(ValueError, match="mask 4 of 5, .*moved.nii.gz: lies on another grid than aorta.nii.gz, mask 1"):
        read_label_layers(tmp_path)


def test_a_mask_that_cannot_be_read_does_not_stop_the_others_where_it_is_asked_for(tmp_path: Path):
    data = labels()
    save(tmp_path / "liver.nii.gz", (data == 5).astype(np.uint8), SHEARED)
    save(tmp_path / "two.nii.gz", data, SHEARED)
    (tmp_path / "aorta.nii.gz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="mask 1 of 3: .*aorta.nii.gz: not a readable"):
        read_label_layers(tmp_path)
    unread: list[UnreadMask] = []
    (volume,) = read_label_layers(tmp_path, unread=unread)
    assert volume.names == {2: "liver"} and [(mask.value, mask.name) for mask in unread] == [(1, "aorta"), (3, "two")]
    assert "ImageFileError" in unread[0].error.public and "mask 1 of 3: " in unread[0].error.public
    assert "mask 3 of 3: " in str(unread[1].error) and "0 and one value" in str(unread[1].error)
    (tmp_path / "liver.nii.gz").write_bytes(b"nothing")
    assert read_label_layers(tmp_path, unread=[]) == []


def test_a_folder_of_masks_takes_no_more_memory_for_more_masks(tmp_path: Path):
    data = np.zeros((60, 50, 40), dtype=np.uint8)
    for number in range(40):
        data[number, 1:-1, 1:-1] = number + 1
    peaks = []
    for count in (4, 40):
        folder = tmp_path / str(count)
        folder.mkdir()
        for value in range(1, count + 1):
            np.savez(folder / f"m{value:02d}.npz", volume=data == value, affine=np.eye(4))
        peaks.append(peak_bytes(lambda folder=folder: read_label_layers(folder)))
        (layer,) = read_label_layers(folder)
        assert labels_of(layer) == list(range(1, count + 1))
    assert peaks[1] < 1.2 * peaks[0]  # all held at once: 3.6 times


def test_channel_stacked_masks(tmp_path: Path):
    a, b = labels() == 2, labels() > 0
    save(tmp_path / "a.nii.gz", np.stack([a, b], axis=-1).astype(np.uint8), SHEARED)
    np.savez(tmp_path / "a.npz", volume=np.stack([a, b], axis=-1), affine=SHEARED)
    for name in ("a.nii.gz", "a.npz"):
        layers = read_label_layers(tmp_path / name)
        assert [labels_of(layer) for layer in layers] == [[1], [2]]
        np.testing.assert_array_equal(layers[1].data == 2, b)
        with pytest.raises(ValueError, match="one 3D volume is needed, got 2 frames"):
            read_volume(tmp_path / name)
    save(tmp_path / "time.nii", np.stack([labels()] * 3, axis=-1), SHEARED)
    with pytest.raises(ValueError, match=r"channel 0 must be a mask of 0 and one value, got \[0, 2, 5\]"):
        read_label_layers(tmp_path / "time.nii")
    save(tmp_path / "one.nii", labels(), SHEARED)
    assert [labels_of(layer) for layer in read_label_layers(tmp_path / "one.nii")] == [[2, 5]]


@pytest.mark.parametrize("suffix", ["nii", "nii.gz", "nrrd", "mha", "npz"])
def test_written_volumes_come_back(tmp_path: Path, suffix: str):
    for affine in [*ORIENTATIONS.values(), SHEARED]:
        path = tmp_path / "out" / f"labels.{suffix}"
        if affine is SHEARED and suffix in ("nrrd", "mha"):
            with pytest.raises(ValueError, match="cannot hold a sheared grid"):
                write_label_volume(path, labels(), affine)
            continue
        write_label_volume(path, labels().astype(np.int64) * 300, affine)
        volume = read_volume(path)
        np.testing.assert_array_equal(volume.data, labels().astype(int) * 300)
        np.testing.assert_allclose(volume.affine, affine, atol=1e-4)
        assert volume.notes == ()
        assert [p.name for p in path.parent.iterdir()] == [path.name]
    with pytest.raises(ValueError, match="written as"):
        write_label_volume(tmp_path / "a.mgz", labels(), np.eye(4))


# thresholds


def test_threshold_surface_is_exact_below_a_voxel():
    affine = ORIENTATIONS["oblique left-handed"]
    index = np.stack(np.meshgrid(*[np.arange(n) for n in (40, 34, 30)], indexing="ij"), axis=-1)
    world = index @ affine[:3, :3].T + affine[:3, 3]
    centre = np.array([20.3, 17.1, 14.6]) @ affine[:3, :3].T + affine[:3, 3]
    distance = np.linalg.norm(world - centre, axis=-1)
    vertices, faces = threshold_surface(100 - 5 * distance, affine, 50)  # |x| <= 10
    radius = np.linalg.norm(vertices - centre, axis=1)
    assert np.abs(radius - 10).max() < 0.06 and abs(radius.mean() - 10) < 0.02
    assert signed_volume(vertices, faces) == pytest.approx(4 / 3 * np.pi * 1000, rel=0.01)
    shell, shell_faces = threshold_surface(100 - 5 * distance, affine, 50, 70)  # 6 <= |x| <= 10
    assert signed_volume(shell, shell_faces) == pytest.approx(4 / 3 * np.pi * (1000 - 216), rel=0.015)
    edges = np.concatenate([shell_faces[:, [0, 1]], shell_faces[:, [1, 2]], shell_faces[:, [2, 0]]])
    np.testing.assert_array_equal(np.unique(edges, axis=0), np.unique(edges[:, ::-1], axis=0))


def plain_threshold(data: np.ndarray, low: float, high: float | None) -> tuple[np.ndarray, np.ndarray]:
    """The surface in index space, the whole field in float64 at once."""
    from vtkmodules.util.numpy_support import numpy_to_vtk, vtk_to_numpy
    from vtkmodules.vtkCommonDataModel import vtkImageData
    from vtkmodules.vtkFiltersCore import vtkFlyingEdges3D

    field = data.astype(np.float64) - low
    field = field if high is None else np.minimum(field, high - data.astype(np.float64))
    field = np.pad(np.where(field == 0, 1e-12 * np.abs(field).max(), field), 1, mode="edge")
    rim = np.ones(field.shape, dtype=bool)
    rim[1:-1, 1:-1, 1:-1] = False
    field[rim] = -np.abs(field[rim])
    image = vtkImageData()
    image.SetDimensions(*field.shape)
    image.GetPointData().SetScalars(numpy_to_vtk(np.ascontiguousarray(field.transpose(2, 1, 0)).ravel(), deep=1))
    contour = vtkFlyingEdges3D()
    contour.SetInputData(image)
    contour.SetValue(0, 0.0)
    contour.Update()
    mesh = contour.GetOutput()
    points = vtk_to_numpy(mesh.GetPoints().GetData()).astype(np.float64) - 1
    return points, vtk_to_numpy(mesh.GetPolys().GetConnectivityArray()).reshape(-1, 3)


@pytest.mark.parametrize(("dtype", "scale", "shift"), [
    (np.int16, 300, -40), (np.uint8, 40, 120), (np.float32, 1e-3, 0), (np.float64, 1e-30, 0), (np.float64, 1e250, 0),
    (np.float64, 1.0, 1e6),
])  # fmt: skip
@pytest.mark.parametrize("chunk", [1, 1000, 1 << 20])
def test_threshold_in_slabs_is_the_threshold_of_the_whole(monkeypatch, dtype, scale: float, shift: float, chunk: int):
    from scipy import ndimage

    from trellis.geometry import label_surfaces

    monkeypatch.setattr(label_surfaces, "CHUNK_VOXELS", chunk)
    noise = ndimage.gaussian_filter(np.random.default_rng(3).standard_normal((23, 19, 31)), 1.5)
    data = (noise / noise.std() * scale + shift).astype(dtype)
    low, high = float(shift), float(shift + 1.5 * scale)  # many voxels of the integer types lie on the level
    for order in ("C", "F"):
        for bounds in ((low, None), (low, high)):
            vertices, faces = threshold_surface(np.asarray(data, order=order), np.eye(4), *bounds)
            expected, expected_faces = plain_threshold(data, *bounds)
            np.testing.assert_array_equal(faces, expected_faces)
            # whole numbers on the level are moved off it by 1e-6 of the field's scale; neighbours differ by 1 and more
            np.testing.assert_allclose(vertices, expected, atol=1e-5 + 1e-6 * np.abs(data.astype(float) - low).max())
    assert len(faces) > 2000


@pytest.mark.parametrize("odd", [-6e5, 6e5, -3.4e38, 3.4e38])
def test_a_fill_value_leaves_the_surface_alone(odd: float):
    """One voxel of another magnitude, away from the surface: the rest of the surface is what it was."""
    x, y, z = np.meshgrid(*[np.arange(24) - 11.3] * 3, indexing="ij")
    data = np.clip(0.5 + (6.2 - np.sqrt(x**2 + y**2 + z**2)) / 4, 0, 1).astype(np.float32)
    expected, faces = threshold_surface(data, np.eye(4), 0.5)
    data[(1, 1, 1) if odd < 0 else (11, 11, 11)] = odd
    vertices, same = threshold_surface(data, np.eye(4), 0.5)
    np.testing.assert_array_equal(same, faces)
    np.testing.assert_allclose(vertices, expected, atol=1e-4)


def test_fill_values_on_both_sides_keep_every_sign():
    data = np.zeros((20, 20, 20), dtype=np.float32)
    data[5:15, 5:15, 5:15] = 1
    data[0, 0, 0], data[10, 10, 10] = -3.4e38, 3.4e38
    vertices, _ = threshold_surface(data, np.eye(4), 0.5)
    np.testing.assert_allclose([vertices.min(0), vertices.max(0)], [[4.5] * 3, [14.5] * 3], atol=1e-6)


def test_threshold_holds_one_field_in_float32():
    data = np.zeros((200, 180, 160), dtype=np.int16)
    data[40:60, 50:70, 60:80] = 100
    assert peak_bytes(lambda: threshold_surface(data, np.eye(4), 50)) < 9 * data.size  # in float64 at once: 25


def peak_bytes(work) -> int:
    """Largest sum of NumPy's arrays while `work` runs, above what there was."""
    import tracemalloc

    work()  # imports and caches
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_threshold_at_the_border_and_on_the_level():
    data = np.zeros((4, 5, 6), dtype=np.int16)
    data[:, :, :3] = 100
    vertices, faces = threshold_surface(data, np.eye(4), 50)
    assert signed_volume(vertices, faces) == pytest.approx(4 * 5 * 3, rel=0.12)
    np.testing.assert_allclose(vertices.min(0), [-0.5, -0.5, -0.5], atol=1e-5)
    np.testing.assert_allclose(vertices.max(0), [3.5, 4.5, 2.5], atol=1e-5)
    vertices, faces = threshold_surface(data, np.eye(4), 100)  # every inner voxel is on the level: it counts as inside
    assert np.isfinite(vertices).all() and signed_volume(vertices, faces) > 0
    with pytest.raises(ValueError, match=r"no voxel reaches the threshold 101: values lie in \[0.0, 100.0\]"):
        threshold_surface(data, np.eye(4), 101)


def test_threshold_arguments_and_intensity_files(tmp_path: Path):
    assert parse_threshold("150") == (150.0, None)
    assert parse_threshold("-200:1e3") == (-200.0, 1000.0)
    for bad in ("", "a", "3:1", "1:2:3", "nan", "1:inf"):
        with pytest.raises(ValueError, match="LOW or LOW:HIGH"):
            parse_threshold(bad)
    data = np.linspace(-1000, 1000, 60).reshape(3, 4, 5).astype(np.float32)
    save(tmp_path / "ct.nii.gz", data, SHEARED)
    volume = read_intensity(tmp_path / "ct.nii.gz")
    assert isinstance(volume, IntensityVolume)
    np.testing.assert_array_equal(volume.data, data)
    data[0, 0, 0] = np.nan
    save(tmp_path / "ct.nii.gz", data, SHEARED)
    with pytest.raises(ValueError, match="must be finite, got 1"):
        read_intensity(tmp_path / "ct.nii.gz")


# units, and spacing that is not there


@pytest.mark.parametrize(
    ("unit", "mm", "note"),
    [("mm", 1, ""), ("", 1, ""), ("???", 1, ""), ("cm", 10, "cm"), ("m", 1000, "m"), ("um", 1e-3, "um"),
     ("microns", 1e-3, "microns"), ("µm", 1e-3, "µm"), ("Millimeters", 1, "")],
)  # fmt: skip
def test_units_of_nrrd_become_millimetres(tmp_path: Path, unit: str, mm: float, note: str):
    path = tmp_path / "a.nrrd"
    write_nrrd(path, labels(), SHEARED, extra=f'space units: "{unit}" "{unit}" "{unit}"', unit_mm=mm)
    latin = path.read_bytes().replace(unit.encode(), unit.encode("latin-1"))
    for data in {path.read_bytes(), latin}:
        path.write_bytes(data)
        volume = read_volume(path)
        np.testing.assert_allclose(volume.affine, SHEARED, atol=1e-5)
        assert volume.notes == ((f"the header's unit is {note}: converted to mm",) if note else ())


def test_units_along_axes_and_of_metaimage(tmp_path: Path):
    head = "NRRD0004\ntype: uchar\ndimension: 3\nsizes: 14 12 9\nspacings: 0.1 0.2 0.3\nunits: {}\nencoding: raw\n\n"
    (tmp_path / "a.nrrd").write_bytes(head.format('"cm" "cm" "cm"').encode() + labels().tobytes(order="F"))
    np.testing.assert_allclose(read_volume(tmp_path / "a.nrrd").spacing_mm, [1, 2, 3])
    (tmp_path / "a.nrrd").write_bytes(head.format("cm cm cm").encode() + labels().tobytes(order="F"))
    with pytest.raises(ValueError, match="a.nrrd: not a readable .nrrd volume: .*trouble parsing units") as caught:
        read_volume(tmp_path / "a.nrrd")
    assert "SimpleITK" not in str(caught.value) and "0x" not in str(caught.value)  # the library's files and addresses
    save(tmp_path / "a.mha", labels(), ORIENTATIONS["oblique"])
    content = (tmp_path / "a.mha").read_bytes()
    (tmp_path / "a.mha").write_bytes(content.replace(b"ElementSpacing", b"DistanceUnits = cm\nElementSpacing"))
    volume = read_volume(tmp_path / "a.mha")
    np.testing.assert_allclose(volume.affine[:3], ORIENTATIONS["oblique"][:3] * 10, atol=1e-4)
    assert volume.notes == ("the header's unit is cm: converted to mm",)


@pytest.mark.parametrize(
    ("space", "noted"),
    [("right-anterior-superior", False), ("RAS", False), ("scanner-xyz", True), ("3D-right-handed", True)],
)
def test_spaces_of_nrrd(tmp_path: Path, space: str, noted: bool):
    """Those that say where left is are followed; of the others it is said what they are taken for."""
    write_nrrd(tmp_path / "a.nrrd", labels(), SHEARED)
    content = (tmp_path / "a.nrrd").read_bytes()
    assert b"space: left-posterior-superior" in content
    (tmp_path / "a.nrrd").write_bytes(content.replace(b"left-posterior-superior", space.encode()))
    volume = read_volume(tmp_path / "a.nrrd")
    expected = SHEARED if noted else np.diag([-1.0, -1.0, 1.0, 1.0]) @ SHEARED
    np.testing.assert_allclose(volume.affine, expected, atol=1e-5)
    said = f"the header's space, '{space.lower()}', does not say where the patient's left is: taken as left-posterior"
    assert [note.startswith(said) for note in volume.notes] == [True] * noted


def test_a_data_file_has_the_length_that_its_header_announces(tmp_path: Path):
    """Or all voxels would be shifted: a header of its own left in it, a wrong type, a wrong size."""
    voxels = labels().tobytes(order="F")
    nrrd = "NRRD0004\ntype: uchar\ndimension: 3\nsizes: 14 12 9\nspacings: 1 1 1\nencoding: raw\ndata file: a.raw\n"
    meta = "ObjectType = Image\nNDims = 3\nDimSize = 14 12 9\nElementSpacing = 1 1 1\nElementType = MET_UCHAR\n"
    end = "ElementDataFile = a.raw\n"
    for name, plain, skipping, from_the_end in (
        ("a.nhdr", nrrd + "\n", nrrd + "byte skip: 64\n\n", nrrd + "byte skip: -1\n\n"),
        ("a.mhd", meta + end, meta + "HeaderSize = 64\n" + end, meta + "HeaderSize = -1\n" + end),
    ):
        (tmp_path / "a.raw").write_bytes(voxels)
        (tmp_path / name).write_text(plain)
        np.testing.assert_array_equal(read_volume(tmp_path / name).data, labels())
        (tmp_path / "a.raw").write_bytes(bytes(64) + voxels)
        with pytest.raises(ValueError, match="data file has 1576 bytes, and the header announces 1512 of voxels after"):
            read_volume(tmp_path / name)
        for header in (skipping, from_the_end):
            (tmp_path / name).write_text(header)
            np.testing.assert_array_equal(read_volume(tmp_path / name).data, labels())


@pytest.mark.parametrize("units", ['"furlong" "furlong" "furlong"', '"s" "s" "s"', '"mm" "mm" "cm"'])
def test_units_that_are_not_known_are_refused(tmp_path: Path, units: str):
    write_nrrd(tmp_path / "a.nrrd", labels(), SHEARED, extra=f"space units: {units}")
    with pytest.raises(ValueError, match=r"a.nrrd: .*one unit of length is needed, of mm, cm, m and um, got \["):
        read_volume(tmp_path / "a.nrrd")


def test_a_given_spacing_keeps_the_directions_that_a_file_has(tmp_path: Path):
    affine = ORIENTATIONS["oblique left-handed"]
    save(tmp_path / "a.mha", labels(), affine)
    lines = (tmp_path / "a.mha").read_bytes().split(b"\n")
    (tmp_path / "a.mha").write_bytes(b"\n".join(x for x in lines if not x.startswith(b"ElementSpacing")))
    with pytest.raises(ValueError, match="no voxel spacing"):
        read_volume(tmp_path / "a.mha")
    np.testing.assert_allclose(read_volume(tmp_path / "a.mha", spacing_mm=(1, 1.2, 1.4)).affine, affine, atol=1e-5)


# refusals


def test_a_path_that_simpleitk_cannot_take_is_refused_for_writing_too(tmp_path: Path):
    folder = tmp_path / os.fsdecode(b"M\xfcller")
    folder.mkdir()
    for name in ("a.nrrd", "a.mha"):
        with pytest.raises(ValueError, match="not UTF-8, which SimpleITK cannot open"):
            write_label_volume(folder / name, labels(), np.eye(4))
    write_label_volume(folder / "a.nii.gz", labels(), np.eye(4))
    np.testing.assert_array_equal(read_volume(folder / "a.nii.gz").data, labels())


def test_bad_itk_files_get_a_clear_error(tmp_path: Path):
    save(tmp_path / "good.nrrd", labels(), np.eye(4))
    save(tmp_path / "good.mha", labels(), np.eye(4))
    nrrd, mha = (tmp_path / "good.nrrd").read_bytes(), (tmp_path / "good.mha").read_bytes()
    no_space = b"NRRD0004\ntype: uchar\ndimension: 3\nsizes: 14 12 9\nencoding: raw\n\n"
    no_space += bytes(14 * 12 * 9 - 1) + b"\1"
    no_spacing = b"\n".join(line for line in mha.split(b"\n") if not line.startswith(b"ElementSpacing"))
    elsewhere = mha.split(b"ElementDataFile")[0] + b"ElementDataFile = /etc/hostname\n"
    cases = {
        "text.nrrd": (b"hello", "starts with 'NRRD'"),
        "cut.nrrd": (nrrd[:-200], "cut.nrrd"),
        "head.nrrd": (nrrd[:60], "head.nrrd"),
        "absurd.nrrd": (nrrd.replace(b"sizes: 14 12 9", b"sizes: 99999 99999 9"), "at most 2147483648 voxels"),
        "large.nrrd": (nrrd.replace(b"sizes: 14 12 9", b"sizes: 1400 1200 900"), "announces 1512000000 bytes"),
        "away.nhdr": (no_space.replace(b"encoding", b"data file: ../good.nrrd\nencoding"), "must lie in a file beside"),
        "lost.nhdr": (no_space.replace(b"encoding", b"data file: lost.raw\nencoding"), "no such file"),
        "unspaced.nrrd": (no_space, "no voxel spacing"),
        "text.mha": (b"hello", "MetaImage header"),
        "cut.mha": (mha[:-200], "cut.mha"),
        "large.mha": (mha.replace(b"DimSize = 14 12 9", b"DimSize = 1400 1200 900"), "announces 1512000000 bytes"),
        "unspaced.mha": (no_spacing, "no voxel spacing"),
        "away.mhd": (elsewhere, "must lie in a file beside"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=message) as caught:
            read_volume(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    assert read_volume(tmp_path / "unspaced.nrrd", spacing_mm=(1, 2, 3)).spacing_mm.tolist() == [1, 2, 3]
