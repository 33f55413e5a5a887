"""Label volumes: headers, spacing, refusals; and their surfaces: where they lie, closed, outward, smooth."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from trellis.geometry.volume import LabelVolume, as_labels, label_surfaces, labels_of, read_volume

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "bench_label_surfaces.py"
SHEARED = np.array([[1.1, 0.3, 0, -20], [0.05, 0.9, 0.2, 31], [0, -0.1, 2.0, 7], [0, 0, 0, 1.0]])


def blob_labels(shape=(13, 15, 11)) -> np.ndarray:
    """Two touching labels without any symmetry, one of them at the volume's border."""
    x, y, z = np.meshgrid(*[np.arange(n) for n in shape], indexing="ij")
    data = np.zeros(shape, dtype=np.uint8)
    data[(x - 5) ** 2 + 1.3 * (y - 6) ** 2 + 1.7 * (z - 4) ** 2 < 17] = 3
    data[(x - 9) ** 2 + (y - 9) ** 2 + (z - 8) ** 2 < 14] = 7
    return data


def signed_volume(vertices: np.ndarray, faces: np.ndarray) -> float:
    a, b, c = np.moveaxis(vertices[faces], 1, 0)
    return float(np.einsum("ij,ij->", a, np.cross(b, c)) / 6)


def directed_edges(faces: np.ndarray) -> np.ndarray:
    return np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])


def assert_closed_and_consistent(faces: np.ndarray) -> None:
    edges = directed_edges(faces)
    there = np.unique(edges, axis=0, return_counts=True)
    back = np.unique(edges[:, ::-1], axis=0, return_counts=True)
    np.testing.assert_array_equal(there[0], back[0])
    np.testing.assert_array_equal(there[1], back[1])


def save_nifti(path: Path, data: np.ndarray, affine: np.ndarray, *, sform=1, qform=0) -> None:
    import nibabel

    image = nibabel.Nifti1Image(data, affine)
    image.set_sform(affine, code=sform)
    image.set_qform(affine, code=qform, strip_shears=True)
    nibabel.save(image, path)


# reading


@pytest.mark.parametrize("suffix", ["nii", "nii.gz"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64, np.int32])
def test_nifti_with_its_full_affine(tmp_path: Path, suffix: str, dtype):
    path = tmp_path / f"labels.{suffix}"
    save_nifti(path, blob_labels().astype(dtype), SHEARED)
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.data, blob_labels())
    assert volume.data.dtype == np.uint8
    np.testing.assert_allclose(volume.affine, SHEARED, atol=1e-6)
    np.testing.assert_allclose(volume.spacing_mm, np.linalg.norm(SHEARED[:3, :3], axis=0), atol=1e-6)
    assert labels_of(volume) == [3, 7] and volume.notes == ()


def test_nifti_qform_sform_rules(tmp_path: Path):
    import nibabel

    path = tmp_path / "a.nii"
    oblique = np.eye(4)
    angle = 0.3
    oblique[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    oblique[:3, 3] = [5, -6, 7]
    save_nifti(path, blob_labels(), oblique, sform=0, qform=1)
    np.testing.assert_allclose(read_volume(path).affine, oblique, atol=1e-5)

    image = nibabel.Nifti1Image(blob_labels(), None)
    image.set_qform(oblique, code=1)
    moved = oblique.copy()
    moved[0, 3] += 0.25
    image.set_sform(moved, code=2)
    nibabel.save(image, path)
    volume = read_volume(path)
    np.testing.assert_allclose(volume.affine, moved, atol=1e-5)
    assert "sform and qform differ by up to 0.25 mm" in volume.notes[0]

    image.set_sform(oblique, code=2)
    nibabel.save(image, path)
    assert read_volume(path).notes == ()

    path.write_bytes(nifti_bytes(int16={252: 0, 254: 0}, float32={80: 2, 84: 3, 88: 4}))
    volume = read_volume(path)
    assert len(volume.notes) == 1 and "neither sform nor qform: voxel spacing alone" in volume.notes[0]
    np.testing.assert_array_equal(volume.affine, np.diag([2, 3, 4, 1]))


@pytest.mark.parametrize("size", [0, -1, np.nan, np.inf])
@pytest.mark.parametrize("codes", [{252: 0, 254: 0}, {252: 1, 254: 0}], ids=["spacing alone", "qform"])
def test_nifti_without_a_spacing_is_refused_unless_it_is_given(tmp_path: Path, codes: dict, size: float):
    """pixdim[1..3] as stored: nibabel makes 1 of 0, and 2 of -2. pixdim[0] is qfac: here the third axis points down."""
    changes = {80: 2.0, 84: 3.0, 88: size, 256: 0.6, 268: 5.0, 76: -1.0}  # quatern_b 0.6: 73.7 degrees about x
    content = nifti_bytes(int16=codes, float32=changes)
    (tmp_path / "a.nii").write_bytes(content)
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(content))
    turned = np.eye(4)
    if codes[252]:
        turned[1:3, 1:3] = [[0.28, 0.96], [0.96, -0.28]]
        turned[0, 3] = 5
    for name in ("a.nii", "a.nii.gz"):
        with pytest.raises(ValueError, match=rf"{name}: it has no voxel spacing"):
            read_volume(tmp_path / name)
        given = read_volume(tmp_path / name, spacing_mm=(2, 3, 4))
        np.testing.assert_allclose(given.affine, turned @ np.diag([2, 3, 4, 1]), atol=1e-6)
    (tmp_path / "a.nii").write_bytes(nifti_bytes(int16=codes, float32={**changes, 88: 4.0}))
    np.testing.assert_allclose(read_volume(tmp_path / "a.nii").affine, given.affine, atol=1e-6)
    (tmp_path / "a.nii").write_bytes(nifti_bytes(float32={80: size}))  # with a sform, the spacing is the sform's
    np.testing.assert_array_equal(read_volume(tmp_path / "a.nii").affine, np.eye(4))


def test_nifti_units_and_frames(tmp_path: Path):
    import nibabel

    path = tmp_path / "a.nii.gz"
    image = nibabel.Nifti1Image(blob_labels()[..., None], np.diag([500.0, 500, 700, 1]))
    image.header.set_xyzt_units("micron")
    nibabel.save(image, path)
    volume = read_volume(path)
    assert volume.data.shape == blob_labels().shape
    np.testing.assert_allclose(volume.spacing_mm, [0.5, 0.5, 0.7], rtol=1e-6)
    save_nifti(path, np.stack([blob_labels()] * 2, axis=-1), np.eye(4))
    with pytest.raises(ValueError, match=r"a.nii.gz.*one 3D volume.*\[13, 15, 11, 2\]"):
        read_volume(path)


def test_mgz_keeps_its_place(tmp_path: Path):
    import nibabel

    affine = np.array([[-1.0, 0, 0, 20], [0, 0, 1, -30], [0, -1, 0, 40], [0, 0, 0, 1]])
    path = tmp_path / "aseg.mgz"
    nibabel.save(nibabel.MGHImage(blob_labels().astype(np.int32), affine), path)
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.data, blob_labels())
    np.testing.assert_allclose(volume.affine, affine, atol=1e-4)


def test_mgh_without_geometry_is_noted_and_negative_sizes_are_refused(tmp_path: Path):
    import nibabel

    content = nibabel.MGHImage(blob_labels(), SHEARED).to_bytes()
    path = tmp_path / "a.mgh"
    path.write_bytes(content[:28] + b"\0\0" + content[30:])  # goodRASFlag
    volume = read_volume(path)
    assert volume.notes == ("the header has no geometry: 1 mm, coronal, centred, as FreeSurfer does",)
    # x to the left, y down, z to the front, 0 in the middle of 13 x 15 x 11 voxels (nibabel's turns it upside down)
    np.testing.assert_array_equal(volume.affine, [[-1, 0, 0, 6.5], [0, 0, 1, -5.5], [0, -1, 0, 7.5], [0, 0, 0, 1]])
    path.write_bytes(content)
    assert read_volume(path).notes == ()
    path.write_bytes(content[:30] + struct.pack(">f", -1.1) + content[34:])
    with pytest.raises(ValueError, match=r"a.mgh: .*voxel spacing must be above 0, got \[-1.1"):
        read_volume(path)


def test_arrays_need_a_spacing(tmp_path: Path):
    np.save(tmp_path / "a.npy", blob_labels())
    with pytest.raises(ValueError, match=r"a.npy: it has no voxel spacing: give it \(spacing_mm\)"):
        read_volume(tmp_path / "a.npy")
    volume = read_volume(tmp_path / "a.npy", spacing_mm=(1, 2, 3.5))
    np.testing.assert_array_equal(volume.affine, np.diag([1, 2, 3.5, 1]))
    np.savez(tmp_path / "a.npz", volume=blob_labels().astype(bool), spacing_mm=[1, 2, 3])
    volume = read_volume(tmp_path / "a.npz")
    assert labels_of(volume) == [1]
    np.testing.assert_array_equal(volume.spacing_mm, [1, 2, 3])
    with pytest.raises(ValueError, match=r"spacing is \[1.0, 2.0, 3.0\] mm, and \[1, 1, 1\] was given"):
        read_volume(tmp_path / "a.npz", spacing_mm=(1, 1, 1))
    np.savez(tmp_path / "b.npz", volume=blob_labels(), affine=SHEARED)
    np.testing.assert_array_equal(read_volume(tmp_path / "b.npz").affine, SHEARED)
    np.savez(tmp_path / "c.npz", volume=blob_labels(), affine=SHEARED, spacing_mm=[9, 9, 9])
    with pytest.raises(ValueError, match="disagree"):
        read_volume(tmp_path / "c.npz")
    for bad in ([1, 2], [1, -1, 1], [1, np.nan, 1], ["a", "b", "c"]):
        np.savez(tmp_path / "d.npz", volume=blob_labels(), spacing_mm=bad)
        with pytest.raises(ValueError, match="d.npz.*spacing_mm must be"):
            read_volume(tmp_path / "d.npz")


def nifti_bytes(**changes) -> bytes:
    import nibabel

    data = nibabel.Nifti1Image(blob_labels(), np.eye(4)).to_bytes()
    raw = bytearray(data)
    for offset, value in changes.get("int16", {}).items():
        struct.pack_into("<h", raw, offset, value)
    for offset, value in changes.get("float32", {}).items():
        struct.pack_into("<f", raw, offset, value)
    return bytes(raw)


def bad_volumes(folder: Path) -> dict[str, str]:
    """Writes bad files, and gives what their refusal must say."""
    good = nifti_bytes()
    packed = gzip.compress(good)
    (folder / "cut.nii").write_bytes(good[:1000])
    (folder / "cut.nii.gz").write_bytes(packed[: len(packed) // 2])
    (folder / "text.nii.gz").write_bytes(b"hello")
    (folder / "text.nii").write_bytes(b"hello" * 200)
    (folder / "empty.nii").write_bytes(b"")
    absurd = nifti_bytes(int16={42: 32767, 44: 32767, 46: 32767})
    (folder / "absurd.nii").write_bytes(absurd)
    (folder / "absurd.nii.gz").write_bytes(gzip.compress(absurd))
    (folder / "large.nii.gz").write_bytes(gzip.compress(nifti_bytes(int16={42: 1200, 44: 1200, 46: 1200})))
    (folder / "negative.nii").write_bytes(nifti_bytes(int16={42: -5}))
    (folder / "nan.nii").write_bytes(nifti_bytes(float32={280: float("nan")}))
    (folder / "flat.nii").write_bytes(nifti_bytes(float32={280: 0.0}))
    save_nifti(folder / "zeros.nii.gz", np.zeros((4, 4, 4), np.uint8), np.eye(4))
    save_nifti(folder / "fractions.nii.gz", blob_labels() * np.float32(0.3), np.eye(4))
    save_nifti(folder / "below.nii.gz", blob_labels().astype(np.int16) - 1, np.eye(4))
    save_nifti(folder / "nans.nii.gz", np.where(blob_labels() > 3, np.nan, 0.0), np.eye(4))
    np.savez(folder / "objects.npz", volume=np.array([{"a": 1}], dtype=object), spacing_mm=[1, 1, 1])
    np.save(folder / "objects.npy", np.array([{"a": 1}], dtype=object))
    np.savez(folder / "other.npz", image=blob_labels(), spacing_mm=[1, 1, 1])
    np.savez(folder / "words.npz", volume=np.array([[["a"]]]), spacing_mm=[1, 1, 1])
    np.savez(folder / "flat.npz", volume=blob_labels()[0], spacing_mm=[1, 1, 1])
    np.savez(folder / "nothing.npz", volume=blob_labels()[:0], spacing_mm=[1, 1, 1])
    (folder / "cut.npz").write_bytes((folder / "other.npz").read_bytes()[:700])
    (folder / "volume.xyz").write_bytes(b"")
    return {
        "cut.nii": "truncated", "cut.nii.gz": "truncated or damaged", "text.nii.gz": "text.nii.gz",
        "text.nii": "text.nii", "empty.nii": "empty.nii", "absurd.nii": "at most 2147483648 voxels",
        "absurd.nii.gz": "at most 2147483648 voxels", "large.nii.gz": "announces 1728000000 bytes.*truncated",
        "negative.nii": "negative.nii", "nan.nii": "finite", "flat.nii": "spacing must be above 0",
        "zeros.nii.gz": "no labels: every voxel is 0", "fractions.nii.gz": "whole numbers, got .* fractions",
        "below.nii.gz": "from 0 to 2147483647, got values from -1", "nans.nii.gz": "NaN",
        "objects.npz": "pickled objects, which are never loaded", "objects.npy": "pickled objects",
        "other.npz": "field 'volume' is missing; fields present: .*image", "words.npz": "must be numbers, got dtype",
        "flat.npz": "three axes", "nothing.npz": "at least one voxel", "cut.npz": "cut.npz",
        "volume.xyz": "no volume reader for '.xyz'; known: .mgh", "absent.nii": "no such file",
    }  # fmt: skip


def test_bad_volumes_get_a_clear_error(tmp_path: Path):
    for name, message in bad_volumes(tmp_path).items():
        with pytest.raises(ValueError, match=message) as caught:
            read_volume(tmp_path / name, spacing_mm=(1, 1, 1) if name.endswith("npy") else None)
        assert name in str(caught.value)


def test_as_labels_takes_the_smallest_type():
    assert as_labels(np.array([[[0, 255]]], dtype=np.float64)).dtype == np.uint8
    assert as_labels(np.array([[[0, 256]]], dtype=np.int64)).dtype == np.uint16
    assert as_labels(np.array([[[0, 70000]]], dtype=np.uint32)).dtype == np.int32
    assert as_labels(np.array([[[False, True]]])).dtype == np.uint8


# surfaces


@pytest.mark.parametrize("iterations", [0, 16])
def test_surfaces_are_closed_outward_and_in_place(iterations: int):
    data = blob_labels()
    for affine in (np.eye(4), SHEARED, SHEARED @ np.diag([1, -1, 1, 1.0])):
        volume = LabelVolume(data, affine)
        surfaces = label_surfaces(volume, smoothing_iterations=iterations)
        assert list(surfaces) == [3, 7]
        for label, (vertices, faces) in surfaces.items():
            assert vertices.dtype == np.float64 and faces.dtype == np.int64
            assert_closed_and_consistent(faces)
            voxels = np.count_nonzero(data == label)
            assert signed_volume(vertices, faces) == pytest.approx(voxels * volume.voxel_volume_mm3, rel=0.04)
            index = np.argwhere(data == label)
            centre = index.mean(axis=0) @ affine[:3, :3].T + affine[:3, 3]
            a, b, c = np.moveaxis(vertices[faces], 1, 0)
            weight = np.einsum("ij,ij->i", a - centre, np.cross(b - centre, c - centre))
            middle = ((a + b + c + centre) * weight[:, None]).sum(axis=0) / (4 * weight.sum())
            np.testing.assert_allclose(middle, centre, atol=0.1)


def test_raw_stairs_are_exact():
    data = blob_labels()
    for label, (vertices, faces) in label_surfaces(LabelVolume(data, np.eye(4)), smoothing_iterations=0).items():
        assert signed_volume(vertices, faces) == pytest.approx(np.count_nonzero(data == label), abs=1e-6)
        index = np.argwhere(data == label)
        np.testing.assert_array_equal(vertices.min(axis=0), index.min(axis=0) - 0.5)
        np.testing.assert_array_equal(vertices.max(axis=0), index.max(axis=0) + 0.5)


def test_picking_labels_changes_nothing_but_the_choice():
    volume = LabelVolume(blob_labels().astype(np.int32) * 1000, SHEARED)
    everything = label_surfaces(volume)
    assert list(everything) == [3000, 7000]
    picked = label_surfaces(volume, [7000])
    assert list(picked) == [7000]
    np.testing.assert_allclose(
        np.sort(picked[7000][0], axis=0), np.sort(everything[7000][0], axis=0), atol=2e-5
    )
    assert label_surfaces(volume, []) == {}
    with pytest.raises(ValueError, match=r"labels \[5\] do not occur.*\[3000, 7000\]"):
        label_surfaces(volume, [5, 7000])
    with pytest.raises(ValueError, match="smoothing_iterations"):
        label_surfaces(volume, smoothing_iterations=-1)


def test_neighbours_share_their_boundary():
    surfaces = label_surfaces(LabelVolume(blob_labels(), np.eye(4)))
    triangles = []
    for vertices, faces in surfaces.values():
        corners = np.round(vertices[faces], 6)
        triangles.append({tuple(map(tuple, sorted(map(tuple, t)))) for t in corners})
    assert len(triangles[0] & triangles[1]) > 10


def test_labels_that_fill_the_volume_or_touch_themselves_are_closed():
    full = LabelVolume(np.ones((3, 4, 5), np.uint8), np.eye(4))
    vertices, faces = label_surfaces(full, smoothing_iterations=0)[1]
    assert_closed_and_consistent(faces)
    assert signed_volume(vertices, faces) == pytest.approx(60)
    data = np.zeros((6, 6, 6), np.uint8)
    data[1, 1, 1] = data[2, 2, 1] = 1  # along an edge
    data[3, 3, 2] = 1  # at a corner
    data[5, 5, 5] = 2  # one voxel at the volume's border
    surfaces = label_surfaces(LabelVolume(data, np.eye(4)))
    for label, voxels in ((1, 3), (2, 1)):
        vertices, faces = surfaces[label]
        assert_closed_and_consistent(faces)
        assert signed_volume(vertices, faces) == pytest.approx(voxels, rel=2e-3)


def test_thin_and_tiny_structures_survive():
    for where in (np.s_[5:6, 5:6, 5:6], np.s_[3:12, 5:6, 5:6], np.s_[3:12, 3:12, 5:6], np.s_[5:7, 5:7, 5:7]):
        data = np.zeros((14, 14, 12), np.uint8)
        data[where] = 1
        vertices, faces = label_surfaces(LabelVolume(data, np.eye(4)))[1]
        assert_closed_and_consistent(faces)
        assert signed_volume(vertices, faces) == pytest.approx(data.sum(), rel=2e-3)


@pytest.mark.parametrize("labels", [1, 2, 3, 7])
def test_every_configuration_of_labels_is_closed_and_keeps_its_voxels(labels: int):
    """Noise holds every way in which labels can touch; VTK alone leaves gaps in some."""
    benchmark = load_benchmark()
    data = np.random.default_rng(labels).integers(0, labels + 1, size=(17, 16, 15)).astype(np.uint8)
    for iterations in (0, 30):
        surfaces = label_surfaces(LabelVolume(data, np.eye(4)), smoothing_iterations=iterations)
        assert list(surfaces) == list(range(1, labels + 1))
        for label, (vertices, faces) in surfaces.items():
            assert_closed_and_consistent(faces)
            again = benchmark.voxelise(vertices + 2, faces, (21, 20, 19))[2:-2, 2:-2, 2:-2]
            overlap = 2 * np.count_nonzero(again & (data == label)) / (again.sum() + np.count_nonzero(data == label))
            assert overlap > 0.999


def load_benchmark():
    import importlib.util

    spec = importlib.util.spec_from_file_location("bench_label_surfaces", BENCHMARK)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    return benchmark


def test_a_tilted_plane_and_a_ball_come_out_without_stairs():
    index = np.stack(np.meshgrid(*[np.arange(24)] * 3, indexing="ij"), axis=-1).astype(float)
    normal = np.array([0.35, 0.2, 1.0]) / np.linalg.norm([0.35, 0.2, 1.0])
    half = (index - 11.3) @ normal < 0
    vertices, faces = label_surfaces(LabelVolume(half.astype(np.uint8), np.eye(4)))[1]
    inner = ((vertices > 5) & (vertices < 18)).all(axis=1)
    off = (vertices[inner] - 11.3) @ normal
    assert off.std() < 0.02 and abs(off.mean()) < 0.02  # raw stairs: about 0.35
    ball = np.linalg.norm(index - [11.2, 11.6, 11.9], axis=-1) < 8.5
    vertices, faces = label_surfaces(LabelVolume(ball.astype(np.uint8), np.eye(4)))[1]
    radius = np.linalg.norm(vertices - [11.2, 11.6, 11.9], axis=1)
    assert radius.std() < 0.07 and abs(radius.mean() - 8.5) < 0.05
    assert signed_volume(vertices, faces) == pytest.approx(ball.sum(), rel=1e-3)


def test_quality_on_real_anatomy(anatomy_dir: Path):
    """A corner of the AAL atlas with many whole and cut regions; the benchmark measures all of it."""
    benchmark = load_benchmark()
    volume = read_volume(anatomy_dir / "aal.nii.gz")
    part = LabelVolume(np.ascontiguousarray(volume.data[30:90, 60:130, 40:100]), np.eye(4))
    few = np.isin(part.data, [label for label in labels_of(part) if np.count_nonzero(part.data == label) > 1500])
    figures = benchmark.measure(LabelVolume(np.where(few, part.data, 0), np.eye(4)))
    assert figures["labels"] > 15
    assert figures["dice_min"] >= 0.999
    assert figures["volume_error_median"] <= 0.001 and figures["volume_error_worst"] <= 0.01
    assert figures["angle_p95_deg_all_faces"] <= 26 and figures["labels_above_32_deg"] == 0
    assert figures["angle_p95_deg_off_junctions_worst"] <= 26
    assert abs(figures["signed_distance_median_voxels"]) < 0.02
