"""The template cohort: the deformation's figures against closed forms, and the files that are written."""

from __future__ import annotations

import json

import numpy as np
import pytest

from trellis.preparation import template_cohort as cohort

BOX = np.stack(np.meshgrid(*(np.linspace(-30, 30, 9),) * 3, indexing="ij"), axis=-1).reshape(-1, 3)


def test_integrating_a_constant_field_translates():
    velocity = np.broadcast_to(np.array([1.0, -2.0, 0.5])[:, None, None, None], (3, 6, 7, 8)).copy()
    np.testing.assert_allclose(cohort.integrate_velocity(velocity, 4.0), velocity, atol=1e-12)


def test_integrating_a_linear_field_is_the_exponential():
    # v = a x along x: the flow at time 1 is x -> x exp(a); away from the border, where the field is cut off
    nodes = np.meshgrid(*(np.arange(21.0) - 10,) * 3, indexing="ij")
    velocity = np.stack([0.1 * nodes[0] * 2.0, 0 * nodes[0], 0 * nodes[0]])
    displacement = cohort.integrate_velocity(velocity, 2.0, squarings=10)
    expected = nodes[0] * 2.0 * (np.exp(0.1) - 1)
    inner = (slice(4, -4),) * 3
    np.testing.assert_allclose(displacement[0][inner], expected[inner], atol=2e-3)
    assert np.abs(displacement[1:]).max() == 0


def test_the_field_has_the_asked_rms_a_positive_jacobian_and_an_inverse():
    warp = cohort.random_diffeomorphism(np.random.default_rng(3), BOX, rms_mm=4.0, smoothness_mm=18.0)
    moved = warp.apply(BOX)
    length = np.linalg.norm(moved - BOX, axis=1)
    assert np.sqrt((length**2).mean()) == pytest.approx(4.0, rel=1e-3)
    np.testing.assert_allclose(warp.apply_inverse(moved), BOX, atol=0.15)
    assert warp.jacobian().min() > 0.2


def test_jacobian_of_a_stretch():
    nodes = np.stack(np.meshgrid(*(np.arange(5.0) * 4,) * 3, indexing="ij"))
    forward = nodes * np.array([0.5, 0.0, -0.25])[:, None, None, None]
    warp = cohort.Diffeomorphism(np.zeros(3), 4.0, forward, -forward)
    np.testing.assert_allclose(warp.jacobian(), 1.5 * 0.75)


def test_a_field_that_cannot_pass_is_refused():
    settings = cohort.CohortSettings(rms_mm=60.0, smoothness_mm=8.0)
    templates = cohort.Templates(np.zeros((2, 1, 1, 1), np.float32), np.eye(4), BOX, np.zeros((1, 1, 1)), {})
    with pytest.raises(ValueError, match="smallest Jacobian above 0.2"):
        cohort.draw_subject(templates, settings, 0)


@pytest.mark.parametrize(
    "change", [{"subjects": 0}, {"rms_mm": -1.0}, {"smoothness_mm": 3.0}, {"min_jacobian": 1.0}, {"seed": -1}]
)
def test_settings_are_checked(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        cohort.CohortSettings(**change)


def test_specks_join_the_tissue_around_them():
    labels = np.full((9, 9, 9), 2, np.uint8)
    labels[4, 4, 4] = 1
    labels[0, :, :] = 0
    cleaned = cohort._without_specks(labels, 5)
    assert cleaned[4, 4, 4] == 2
    assert (cleaned[0] == 0).all()
    lonely = np.zeros((9, 9, 9), np.uint8)
    lonely[4, 4, 4] = 1
    assert not cohort._without_specks(lonely, 5).any()


def test_files_are_written_once_and_are_the_same_every_time(tmp_path):
    nib = pytest.importorskip("nibabel")
    pytest.importorskip("nilearn")
    settings = cohort.CohortSettings(subjects=1, seed=7)
    reports = cohort.build_cohort(tmp_path / "a" / "source", settings)
    folder = tmp_path / "a" / "source" / "subject_01"
    assert sorted(p.name for p in folder.iterdir()) == [
        "pial_left.stl", "pial_right.stl", "tissue.nii.gz", "white_left.stl", "white_right.stl"
    ]  # fmt: skip
    assert reports[0].rms_mm == pytest.approx(4.0, rel=1e-3)
    assert reports[0].smallest_jacobian > 0.2
    from trellis.geometry.label_names import read_label_names

    assert read_label_names(tmp_path / "a" / "source" / "dataset.json") == cohort.TISSUE_NAMES
    image = nib.load(folder / "tissue.nii.gz")
    labels = np.asarray(image.dataobj)
    litres = np.bincount(labels.ravel())[1:] * np.prod(image.header.get_zooms()) / 1e6
    assert labels.dtype == np.uint8
    assert 0.9 < litres[0] < 1.3
    assert 0.5 < litres[1] < 0.8
    assert not any(np.take(labels, i, axis).any() for i in (0, -1) for axis in range(3)), "tissue at the border"

    # the surface lies in the tissue that was moved with it, in world mm
    from trellis.utils.mesh_utils import read_mesh

    mesh = read_mesh(folder / "white_left.stl")
    index = np.rint((mesh.vertices - image.affine[:3, 3]) @ np.linalg.inv(image.affine[:3, :3]).T).astype(int)
    assert (labels[tuple(index.T)] > 0).mean() > 0.9
    assert mesh.vertices[:, 0].mean() < -10, "the left hemisphere has negative x in RAS"

    stamps = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert cohort.build_cohort(tmp_path / "a" / "source", settings) == reports
    assert {p: p.stat().st_mtime_ns for p in folder.iterdir()} == stamps
    (folder / "pial_left.stl").unlink()
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    cohort.build_cohort(tmp_path / "a" / "source", settings)
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.name in before} == before

    record = json.loads((tmp_path / "a" / "cohort.json").read_text())
    assert record["settings"]["seed"] == 7
    assert "No subject is a person" in record["description"]
    with pytest.raises(ValueError, match="another folder"):
        cohort.build_cohort(tmp_path / "a" / "source", cohort.CohortSettings(subjects=1, seed=8))


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "mine.stl").write_text("solid\n")
    with pytest.raises(ValueError, match="must be empty"):
        cohort.build_cohort(tmp_path / "source", cohort.CohortSettings(subjects=1))
