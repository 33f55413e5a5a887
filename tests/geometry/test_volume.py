"""Label volumes: headers, spacing, refusals."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
from volume_cases import SHEARED, blob_labels

from trellis.geometry.volume import as_labels, labels_of, read_volume


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
