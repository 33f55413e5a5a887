"""Labels told from intensities; as a program it prints how connected the values of volumes are."""

from __future__ import annotations

import sys

import nibabel
import numpy as np
import pytest

from trellis.geometry.volume import LabelVolume, labels_of, read_volume
from trellis.preparation.label_check import CONNECTED, agreement, check_labels


def blocks_of_labels(edge: int, n: int) -> np.ndarray:
    """n^3 cubic labels side by side."""
    coords = np.indices((edge * n,) * 3) // edge
    return (1 + coords[0] + n * coords[1] + n * n * coords[2]).astype(np.uint16)


def test_agreement_by_hand():
    data = np.zeros((1, 3, 3), dtype=np.uint8)
    data[0] = [[1, 1, 2], [0, 1, 2], [4, 0, 2]]
    # pairs of 1: two of its own, two with a 2; of 2: two of its own, two with a 1; 4 has labels nowhere beside it
    np.testing.assert_array_equal(agreement(data, [1, 2, 4]), [0.5, 0.5, np.nan])
    np.testing.assert_array_equal(agreement(data, [2]), [0.5])


def test_labels_pass_and_images_do_not():
    rng = np.random.default_rng(0)
    image = rng.integers(3, 12, (20, 20, 20))
    some, many = blocks_of_labels(3, 6), blocks_of_labels(3, 7)
    cases = {
        "few scattered": (image % 5, [], True), "scattered": (image, [], False),
        "scattered, with names": (image, range(3, 12), True),
        "blocks": (some, [], True), "many blocks": (many, [], False), "many, one with a name": (many, [343], False),
        "many with names": (many, range(1, 344), True),
    }  # fmt: skip
    points = np.zeros((20, 20, 20), dtype=np.uint8)
    points[tuple(rng.permutation(10)[:, None].repeat(3, 1).T * 2)] = np.arange(1, 11)
    cases["ten single voxels"] = (points, [], True)
    for name, (data, named, passes) in cases.items():
        volume = LabelVolume(data.astype(np.uint16), np.eye(4))
        if passes:
            check_labels([volume], named)
        else:
            with pytest.raises(ValueError, match="values without a name.*--exclude.*--threshold.*--label-names"):
                check_labels([volume], named)
                pytest.fail(name)


def test_a_large_volume_is_looked_at_in_slices(monkeypatch):
    data = blocks_of_labels(4, 5)
    values = labels_of(LabelVolume(data, np.eye(4)))
    whole = agreement(data, values)
    monkeypatch.setattr("trellis.preparation.label_check._VOXELS_LOOKED_AT", data.size // 4)
    np.testing.assert_allclose(agreement(data, values), whole, atol=0.01)


def test_images_and_atlases_lie_far_apart(anatomy_dir):
    nilearn = pytest.importorskip("nilearn.datasets")
    for path in sorted(anatomy_dir.glob("*.nii.gz")):
        volume = read_volume(path)
        check_labels([volume], [])
        assert np.nanmedian(agreement(volume.data, labels_of(volume))) > 2 * CONNECTED
    image = nilearn.load_mni152_template(resolution=2)
    data = np.rint(np.asarray(image.dataobj) / image.get_fdata().max() * 255).astype(np.uint8)
    assert np.nanmedian(agreement(data, np.unique(data)[1:].tolist())) < CONNECTED / 4


if __name__ == "__main__":
    for name in sys.argv[1:]:
        labels = np.asarray(nibabel.load(name).dataobj).astype(np.int64)
        shares = agreement(labels, np.unique(labels[labels > 0]).tolist())
        print(f"{len(shares)} values, median {np.nanmedian(shares):.3f}: {name}")
