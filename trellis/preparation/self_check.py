"""A self-check of the data preparation, on shapes whose distances are known from formulas."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SPHERE_CENTRE_MM = np.array([31.0, -17.0, 42.0])
SPHERE_RADIUS_MM = 20.0
TORUS_CENTRE_MM = np.array([-12.0, 25.0, 7.0])
TORUS_RADII_MM = (24.0, 8.0)
TORUS_LABEL = 3
RESOLUTIONS = (64, 128)


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: what, the figure that came out, and whether it is right."""

    what: str
    value: str
    ok: bool


def sphere_distance(points: np.ndarray) -> np.ndarray:
    """Signed distance [N] in mm of RAS points [N, 3] to the sphere."""
    return np.linalg.norm(points - SPHERE_CENTRE_MM, axis=1) - SPHERE_RADIUS_MM


def torus_distance(points: np.ndarray) -> np.ndarray:
    """Signed distance [N] in mm of RAS points [N, 3] to the torus, whose axis is z."""
    p = points - TORUS_CENTRE_MM
    ring = np.hypot(p[:, 0], p[:, 1]) - TORUS_RADII_MM[0]
    return np.hypot(ring, p[:, 2]) - TORUS_RADII_MM[1]


def make_data(root: Path) -> None:
    """Four patients: two with the sphere as STL (one untagged in LPS, one tagged RAS), one with the torus as a NIfTI
    label volume whose axes are oblique, anisotropic and left-handed, one with a box."""
    from trellis.utils.mesh_utils import write_mesh

    vertices, faces = _sphere_mesh(64, 96)
    for folder in ("patient_1", "patient_2", "patient_3", "patient_4"):
        (root / folder).mkdir(parents=True)
    lps = vertices * [-1, -1, 1]
    _write_untagged_stl(root / "patient_1" / "sphere.stl", lps[faces])
    write_mesh(root / "patient_2" / "sphere.stl", vertices, faces, mesh_space="RAS")
    _write_torus(root / "patient_3" / "seg.nii.gz")
    stretched = SPHERE_CENTRE_MM + (vertices - SPHERE_CENTRE_MM) * [1.0, 0.7, 0.5]
    write_mesh(root / "patient_4" / "egg.ply", stretched, faces, mesh_space="LPS")


def _sphere_mesh(rings: int, sectors: int) -> tuple[np.ndarray, np.ndarray]:
    theta = np.linspace(0, np.pi, rings + 1)[1:-1]
    phi = np.arange(sectors) * 2 * np.pi / sectors
    t, p = (grid.reshape(-1) for grid in np.meshgrid(theta, phi, indexing="ij"))
    body = np.stack([np.sin(t) * np.cos(p), np.sin(t) * np.sin(p), np.cos(t)], axis=1)
    vertices = np.concatenate([body, [[0, 0, 1.0], [0, 0, -1.0]]]) * SPHERE_RADIUS_MM + SPHERE_CENTRE_MM
    j = np.arange(sectors)
    k = (j + 1) % sectors
    north, south, last = len(body), len(body) + 1, (rings - 2) * sectors
    faces = [np.stack([np.full(sectors, north), j, k], axis=1)]
    for ring in range(rings - 2):
        a, b = ring * sectors, (ring + 1) * sectors
        faces += [np.stack([a + j, b + j, b + k], axis=1), np.stack([a + j, b + k, a + k], axis=1)]
    faces.append(np.stack([last + j, np.full(sectors, south), last + k], axis=1))
    return vertices, np.concatenate(faces)


def _write_untagged_stl(path: Path, corners: np.ndarray) -> None:
    record = np.zeros(len(corners), dtype=[("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
    record["corners"] = corners
    path.write_bytes(b"\0" * 80 + np.uint32(len(corners)).tobytes() + record.tobytes())


def _write_torus(path: Path) -> None:
    import nibabel

    angle = np.deg2rad(20.0)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1.0]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-0.8, 0.9, 1.2])  # one axis mirrored: left-handed
    shape = (96, 88, 24)
    affine[:3, 3] = TORUS_CENTRE_MM - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    index = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), -1).reshape(-1, 3)
    inside = torus_distance(index @ affine[:3, :3].T + affine[:3, 3]) < 0
    data = (inside * TORUS_LABEL).astype(np.uint8).reshape(shape)
    nibabel.save(nibabel.Nifti1Image(data, affine), path)


def run_checks(folder: Path, *, workers: int | None = None) -> list[Check]:
    """Make the data in `folder`, prepare it, and look at the results."""
    from trellis.preparation.prepare import prepare_dataset

    make_data(folder / "source")
    out = folder / "prepared"
    options = {"resolutions": RESOLUTIONS, "workers": workers, "progress": False}
    first = prepare_dataset(folder / "source", out, **options)
    again = prepare_dataset(folder / "source", out, **options)
    with open(out / "metadata.csv", newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    by_label: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        by_label.setdefault(row["label"], []).append(row)
    per_split = {split: first.patients.get(split, 0) for split in ("train", "val", "test")}
    checks = [
        Check("shapes prepared, none failed", f"{len(rows)} shapes, {first.n_failed} failed",
              len(rows) == 4 and first.n_failed == 0),
        Check("a second run has nothing to do", f"{again.n_computed} tasks", again.n_computed == 0),
        Check("each patient is in one split, no split is empty", str(per_split),
              sorted(per_split.values()) == [1, 1, 2]),
        Check("labels", ", ".join(sorted(by_label)), sorted(by_label) == ["3", "egg", "sphere"]),
    ]  # fmt: skip
    for label, distance, bound_voxels in (("sphere", sphere_distance, 0.1), (str(TORUS_LABEL), torus_distance, None)):
        for row in by_label.get(label, []):
            for resolution in RESOLUTIONS:
                checks += _shape_checks(out, row, resolution, distance, bound_voxels)
    checks += _volume_checks(by_label)
    checks += _dataset_checks(out)
    return checks


def _shape_checks(
    out: Path,
    row: dict[str, str],
    resolution: int,
    distance: Callable[[np.ndarray], np.ndarray],
    bound_voxels: float | None,
) -> list[Check]:
    from trellis.geometry.isosurface import extract_mesh
    from trellis.geometry.transforms import grid_to_world, voxel_centres
    from trellis.utils.blocks import block_voxel_offsets
    from trellis.utils.io_utils import load_sparse_sdf
    from trellis.utils.mesh_utils import read_mesh

    name = f"{row['label']} at {resolution}"
    blocks = load_sparse_sdf(out / "sparse_sdf" / f"{row['sha256']}_r{resolution}.npz")
    voxel_mm = blocks.voxel_size_mm
    # A label volume's surface can be off by its own voxels' size, whatever the resolution of the SDF.
    bound_mm = bound_voxels * voxel_mm if bound_voxels is not None else 0.9
    voxels = (blocks.block_index[:, None].astype(np.int64) * 8 + block_voxel_offsets()[None]).reshape(-1, 3)
    exact = distance(grid_to_world(voxel_centres(voxels, resolution), blocks.to_world))
    stored = blocks.block_sdf.reshape(-1).astype(np.float64)
    active = np.abs(stored) < 1
    error = np.abs(stored * blocks.band_voxels * voxel_mm - exact)[active]
    clear = np.abs(exact) > bound_mm
    wrong = int(np.count_nonzero((stored < 0)[clear] != (exact < 0)[clear]))
    truth = read_mesh(out / "meshes" / f"{row['sha256']}.ply", mesh_space="LPS")
    vertices, faces = extract_mesh(blocks)
    offset = float(np.abs(distance(vertices)).max())
    boxes = float(np.abs(_box(vertices) - _box(truth.vertices)).max())
    return [
        Check(f"{name}: stored distance and formula", f"at most {error.max():.3f} mm apart", error.max() <= bound_mm),
        Check(f"{name}: signs in every block voxel", f"{wrong} of {clear.sum()} wrong", wrong == 0),
        Check(f"{name}: extracted surface and formula", f"at most {offset:.3f} mm apart", offset <= bound_mm),
        Check(f"{name}: boxes of truth and extracted mesh", f"differ by {boxes:.3f} mm", boxes <= 0.5 * voxel_mm),
    ]


def _box(points: np.ndarray) -> np.ndarray:
    return np.stack([points.min(axis=0), points.max(axis=0)])


def _volume_checks(by_label: dict[str, list[dict[str, str]]]) -> list[Check]:
    large, small = TORUS_RADII_MM
    expected = {"sphere": 4 / 3 * np.pi * SPHERE_RADIUS_MM**3, str(TORUS_LABEL): 2 * np.pi**2 * large * small**2}
    checks = []
    for label, volume_mm3 in expected.items():
        for row in by_label.get(label, []):
            share = float(row["volume_ml"]) * 1000 / volume_mm3
            checks.append(Check(f"{label}: volume against the formula", f"{share:.2%}", abs(share - 1) < 0.02))
    return checks


def _dataset_checks(out: Path) -> list[Check]:
    from trellis.datasets.sparse_sdf import SparseSDF, collate

    dataset = SparseSDF(out, resolution=RESOLUTIONS[0], split="all")
    batch = collate([dataset[i] for i in range(len(dataset))])
    n_blocks = len(batch["block_coords"])
    return [
        Check("training tensors", f"{len(dataset)} shapes, {n_blocks} blocks, levels {batch['level_sizes']}",
              batch["level_sizes"][3] == n_blocks and bool(batch["active"].any(dim=1).all()))
    ]  # fmt: skip
