"""Small sources for the preparation's tests: ellipsoids as meshes and blobs as label volumes."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def ellipsoid(radii=(10.0, 8.0, 6.0), centre=(0.0, 0.0, 0.0), level: int = 2):
    import trimesh

    ball = trimesh.creation.icosphere(subdivisions=level)
    return ball.vertices * np.array(radii) + np.array(centre), np.asarray(ball.faces, dtype=np.int64)


def write_stl(path: Path, vertices: np.ndarray, faces: np.ndarray) -> Path:
    """An untagged binary STL, the numbers as they are."""
    record = np.zeros(len(faces), dtype=[("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
    record["corners"] = vertices[faces]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\0" * 80 + np.uint32(len(faces)).tobytes() + record.tobytes())
    return path


def write_labels(path: Path, *, scale: float = 1.0) -> Path:
    """A NIfTI volume of two boxes, labels 2 and 7, with an off-centre affine."""
    import nibabel

    data = np.zeros((14, 12, 10), dtype=np.uint8)
    data[2:8, 2:9, 2:8] = 2
    data[8:12, 3:7, 3:8] = 7
    affine = np.diag([-1.5 * scale, 1.0, 2.0, 1.0])
    affine[:3, 3] = [40, -30, 20]
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(data, affine), path)
    return path


def make_patients(root: Path, n: int, *, first: int = 0) -> Path:
    """Patient folders patient_00, ... with one ellipsoid each, all different."""
    for i in range(first, first + n):
        vertices, faces = ellipsoid((10 + i, 8, 6 + 0.1 * i), centre=(i, 2 * i, -i))
        write_stl(root / f"patient_{i:02d}" / "liver.stl", vertices, faces)
    return root
