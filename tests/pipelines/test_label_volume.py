"""One label volume from many shapes: values, overlaps, headers."""

from __future__ import annotations

import nibabel
import numpy as np
import pytest

from trellis.geometry.label_names import read_label_names
from trellis.geometry.volume import read_volume, write_label_volume
from trellis.pipelines.label_volume import LabelPainter, VolumeGrid, label_values, write_label_table

SHEARED = np.array([[-1.5, 0.2, 0, 10], [0.1, 1.0, 0.3, -20], [0, 0, 2.0, 30], [0, 0, 0, 1]])


def test_values_are_those_of_the_source_if_all_are_known_and_distinct():
    assert label_values([("spleen", 3), ("liver", 52), ("liver", 52)]) == {"spleen": 3, "liver": 52}
    assert label_values([("liver", 1 << 30)]) == {"liver": 1 << 30}
    assert label_values([("spleen", 3), ("liver", None)]) == {"liver": 1, "spleen": 2}
    assert label_values([("spleen", 3), ("liver", 3)]) == {"liver": 1, "spleen": 2}
    assert label_values([("liver", 3), ("liver", 4)]) == {"liver": 1}
    assert label_values([]) == {}


def box(shape, low, high):
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(a, b) for a, b in zip(low, high))] = True
    return mask


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_smaller_shape_keeps_the_voxel_in_any_order(order):
    shape = (12, 10, 8)
    masks = [box(shape, (0, 0, 0), (10, 10, 8)), box(shape, (5, 5, 2), (12, 9, 6)), box(shape, (8, 6, 3), (10, 8, 5))]
    painter = LabelPainter(shape)
    for i in order:
        assert painter.paint(masks[i], i + 1) == masks[i].sum()
    expected = np.where(masks[2], 3, np.where(masks[1], 2, np.where(masks[0], 1, 0)))
    np.testing.assert_array_equal(painter.labels, expected)
    assert painter.overlaps >= np.count_nonzero(masks[0] & masks[1])


def test_no_overlap_and_empty_mask():
    painter = LabelPainter((4, 4, 4))
    assert painter.paint(box((4, 4, 4), (0, 0, 0), (2, 4, 4)), 5) == 32
    assert painter.paint(np.zeros((4, 4, 4), dtype=bool), 6) == 0
    assert painter.paint(box((4, 4, 4), (2, 0, 0), (4, 4, 4)), 7) == 32
    assert painter.overlaps == 0 and sorted(np.unique(painter.labels)) == [5, 7]


def test_header_holds_the_geometry_and_nothing_else(tmp_path):
    data = np.arange(300, 324, dtype=np.uint16).reshape(2, 3, 4)
    write_label_volume(tmp_path / "a.nii.gz", data, SHEARED)
    write_label_volume(tmp_path / "b.nii.gz", data, SHEARED)
    image = nibabel.load(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(np.asarray(image.dataobj), data)
    np.testing.assert_allclose(image.affine, SHEARED, atol=1e-5)
    assert read_volume(tmp_path / "a.nii.gz").notes == (), "a qform that contradicts the sform would be noted"
    assert image.get_data_dtype() == np.uint16 and image.header.get_xyzt_units()[0] == "mm"
    for field in ("descrip", "intent_name", "aux_file", "db_name"):
        assert not bytes(image.header[field]).strip(b"\0")
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes(), "no time, no name in the gzip"


def test_grid_of_a_reference_that_is_no_label_volume(tmp_path):
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    nibabel.save(nibabel.Nifti1Image(np.random.default_rng(0).normal(size=(5, 6, 7)), affine), tmp_path / "ct.nii.gz")
    grid = VolumeGrid.like(tmp_path / "ct.nii.gz")
    assert grid.shape == (5, 6, 7)
    np.testing.assert_allclose(grid.affine, affine)
    np.save(tmp_path / "bare.npy", np.zeros((3, 3, 3)))
    with pytest.raises(ValueError, match="spacing"):
        VolumeGrid.like(tmp_path / "bare.npy")


def test_table_is_read_back(tmp_path):
    names = {52: "liver, left", 3: "7"}
    write_label_table(tmp_path / "t.csv", names)
    assert (tmp_path / "t.csv").read_text() == 'value,name\n3,7\n52,"liver, left"\n'
    assert read_label_names(tmp_path / "t.csv") == names
