"""One label volume through every format and orientation: its meshes lie in the same place in world mm."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from trellis.geometry.volume import (
    IntensityVolume,
    LabelVolume,
    label_surfaces,
    labels_of,
    parse_threshold,
    read_intensity,
    read_label_layers,
    read_volume,
    threshold_surface,
    write_label_volume,
)
from trellis.utils.mesh_utils import read_mesh, write_mesh

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def rotation(degrees: float, axis: tuple[float, float, float]) -> np.ndarray:
    """Rodrigues' formula."""
    k = np.array(axis) / np.linalg.norm(axis)
    cross = np.array([[0, -k[2], k[1]], [k[2], 0, -k[0]], [-k[1], k[0], 0]])
    angle = np.radians(degrees)
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def affine_of(matrix: np.ndarray, spacing: tuple, origin: tuple) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = matrix * spacing
    affine[:3, 3] = origin
    return affine


ORIENTATIONS = {
    "anisotropic": affine_of(np.eye(3), (0.7, 0.9, 2.5), (-12, 34, 56.5)),
    "left-handed": affine_of(np.diag([-1.0, 1, 1]), (1, 1, 2), (40, -20, 5)),
    "permuted": affine_of(np.eye(3)[:, [2, 0, 1]], (1.5, 1, 0.8), (-3, 2, 1)),
    "oblique": affine_of(rotation(25, (1, 2, 3)), (0.8, 0.8, 2.0), (10, -90, 33)),
    "oblique left-handed": affine_of(rotation(-40, (3, -1, 1)) @ np.diag([1.0, 1, -1]), (1, 1.2, 1.4), (0, 0, -700)),
}
SHEARED = np.array([[1.1, 0.3, 0, -20], [0.05, 0.9, 0.2, 31], [0, -0.1, 2.0, 7], [0, 0, 0, 1.0]])


def labels() -> np.ndarray:
    x, y, z = np.meshgrid(*[np.arange(n) for n in (14, 12, 9)], indexing="ij")
    data = np.zeros(x.shape, dtype=np.uint8)
    data[(x - 5) ** 2 + 1.3 * (y - 6) ** 2 + 1.7 * (z - 4) ** 2 < 15] = 2
    data[(x > 8) & (y > 3) & (y < 9) & (z > 2)] = 5
    return data


def itk_image(data: np.ndarray, affine: np.ndarray):
    """Built by hand, apart from the code under test."""
    import SimpleITK

    lps = LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    flipped = np.ascontiguousarray(np.moveaxis(data, (0, 1, 2), (2, 1, 0)))
    image = SimpleITK.GetImageFromArray(flipped, isVector=data.ndim > 3)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:3, :3] / spacing).reshape(-1).tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    return image


def save(path: Path, data: np.ndarray, affine: np.ndarray) -> None:
    import nibabel
    import SimpleITK

    if path.name.endswith((".nii", ".nii.gz")):
        image = nibabel.Nifti1Image(data, affine)
        image.set_sform(affine, 1)
        nibabel.save(image, path)
    elif path.suffix == ".mgz":
        nibabel.save(nibabel.MGHImage(data.astype(np.int32), affine), path)
    elif path.suffix == ".npz":
        np.savez(path, volume=data, affine=affine)
    else:
        SimpleITK.WriteImage(itk_image(data, affine), str(path))


def world_by_hand(affine: np.ndarray) -> dict[int, np.ndarray]:
    """Vertices of the same surfaces made on a plain grid and moved by the affine."""
    plain = label_surfaces(LabelVolume(labels(), np.eye(4)))
    return {label: v @ affine[:3, :3].T + affine[:3, 3] for label, (v, _) in plain.items()}


def signed_volume(vertices: np.ndarray, faces: np.ndarray) -> float:
    a, b, c = np.moveaxis(vertices[faces], 1, 0)
    return float(np.einsum("ij,ij->", a, np.cross(b, c)) / 6)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("suffix", ["nii.gz", "mgz", "nrrd", "nhdr", "mha", "mhd", "npz"])
def test_meshes_lie_where_the_voxels_lie(tmp_path: Path, suffix: str, orientation: str):
    affine = ORIENTATIONS[orientation]
    path = tmp_path / f"labels.{suffix}"
    save(path, labels(), affine)
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.data, labels())
    np.testing.assert_allclose(volume.affine, affine, atol=1e-4)
    expected = world_by_hand(affine)
    for label, (vertices, faces) in label_surfaces(volume).items():
        np.testing.assert_allclose(vertices, expected[label], atol=1e-3)
        assert signed_volume(vertices, faces) > 0
    stl = tmp_path / "shape.stl"
    write_mesh(stl, *label_surfaces(volume)[5])
    back = read_mesh(stl)
    a, b = back.vertices, expected[5]
    np.testing.assert_allclose([a.min(0), a.max(0), a.mean(0)], [b.min(0), b.max(0), b.mean(0)], atol=1e-3)
    raw = np.frombuffer(stl.read_bytes()[84:], dtype=[("n", "<f4", 3), ("v", "<f4", (3, 3)), ("a", "<u2")])["v"]
    slicer = raw.reshape(-1, 3).astype(float)  # a file tagged LPS: 3D Slicer turns it into RAS
    np.testing.assert_allclose(slicer.min(0), [-b.max(0)[0], -b.max(0)[1], b.min(0)[2]], atol=1e-3)


@pytest.mark.parametrize("suffix", ["nii", "npz", "nrrd"])
def test_sheared_grids_keep_their_shear(tmp_path: Path, suffix: str):
    path = tmp_path / f"labels.{suffix}"
    if suffix == "nrrd":
        lps = LPS @ SHEARED
        vectors = " ".join(f"({','.join(f'{x:.9g}' for x in column)})" for column in lps[:3, :3].T)
        header = (
            f"NRRD0004\ntype: uchar\ndimension: 3\nspace: left-posterior-superior\nsizes: 14 12 9\n"
            f"space directions: {vectors}\nkinds: domain domain domain\nencoding: raw\n"
            f"space origin: ({','.join(f'{x:.9g}' for x in lps[:3, 3])})\n\n"
        )
        path.write_bytes(header.encode() + labels().tobytes(order="F"))
    else:
        save(path, labels(), SHEARED)
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.data, labels())
    np.testing.assert_allclose(volume.affine, SHEARED, atol=1e-5)
    for label, (vertices, _) in label_surfaces(volume).items():
        np.testing.assert_allclose(vertices, world_by_hand(SHEARED)[label], atol=1e-3)


@pytest.mark.parametrize("orientation", ["oblique", "left-handed"])
def test_dicom_series(tmp_path: Path, orientation: str):
    import SimpleITK

    affine = ORIENTATIONS[orientation]
    image = itk_image(labels().astype(np.int16), affine)
    direction = image.GetDirection()
    writer = SimpleITK.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    if np.linalg.det(affine[:3, :3]) < 0:  # DICOM's slice axis is the cross product: turn the stack around
        image = image[:, :, ::-1]
        direction = image.GetDirection()
    for i in range(image.GetDepth()):
        part = image[:, :, i]
        where = image.TransformIndexToPhysicalPoint((0, 0, i))
        for key, value in {
            "0008|0060": "CT", "0020|000e": "1.2.826.0.1.3680043.2.1125.1", "0020|000d": "1.2.826.0.1.3680043.2.1125.2",
            "0008|0018": f"1.2.826.0.1.3680043.2.1125.3.{i}", "0020|0013": str(i),
            "0020|0032": "\\".join(map(str, where)),
            "0020|0037": "\\".join(str(direction[k]) for k in (0, 3, 6, 1, 4, 7)),
            "0018|0050": str(image.GetSpacing()[2]),
        }.items():  # fmt: skip
            part.SetMetaData(key, value)
        writer.SetFileName(str(tmp_path / f"{(7 * i) % 9}.dcm"))  # file names in another order than the slices
        writer.Execute(part)
    volume = read_volume(tmp_path)
    expected = world_by_hand(affine)
    for label, (vertices, faces) in label_surfaces(volume).items():
        assert len(vertices) == len(expected[label])
        found = vertices[np.lexsort(np.round(vertices, 1).T)].mean(0), vertices.min(0), vertices.max(0)
        wanted = expected[label].mean(0), expected[label].min(0), expected[label].max(0)
        np.testing.assert_allclose(found, wanted, atol=1e-2)
        assert signed_volume(vertices, faces) > 0
    (tmp_path / "4.dcm").unlink()
    with pytest.raises(ValueError, match="evenly spaced.*one is missing"):
        read_volume(tmp_path)


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
    layers = read_label_layers(path)  # value 2 in both layers: the layers get values of their own
    assert [layer.names for layer in layers] == [{1: "liver", 2: "left kidney"}, {3: "tumour"}]
    assert [labels_of(layer) for layer in layers] == [[1, 2], [3]]


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
    with pytest.raises(ValueError, match="moved.nii.gz: lies on another grid than aorta.nii.gz"):
        read_label_layers(tmp_path)


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


# refusals


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
