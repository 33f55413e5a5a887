"""One label volume, the orientations that it is moved through, and its files in every volume format."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

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
TILTED = ORIENTATIONS["oblique"] @ np.array([[1, 0, 0.3, 0], [0, 1, -0.8, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
"""As a tilted gantry makes it: rows and columns at right angles, slices shifted against each other."""
PLACED = {"placed": np.diag([0.7, 0.9, 2.5, 1.0])}
"""What a bare array can express: a spacing."""

FORMATS = {
    **{name: {**ORIENTATIONS, "sheared": SHEARED} for name in (
        "a.nii", "a.nii.gz", "a.mgh", "a.mgz", "a.npz", "a.nrrd", "a.nhdr", "a.seg.nrrd")},
    **{name: ORIENTATIONS for name in ("qform.nii", "qform.nii.gz", "a.mha", "a.mhd")},
    "series": {**ORIENTATIONS, "tilted": TILTED},
    "a.npy": PLACED,
}  # fmt: skip
"""Name of a file or folder -> the orientations that its format can express."""


def labels() -> np.ndarray:
    x, y, z = np.meshgrid(*[np.arange(n) for n in (14, 12, 9)], indexing="ij")
    data = np.zeros(x.shape, dtype=np.uint8)
    data[(x - 5) ** 2 + 1.3 * (y - 6) ** 2 + 1.7 * (z - 4) ** 2 < 15] = 2
    data[(x > 8) & (y > 3) & (y < 9) & (z > 2)] = 5
    return data


def blob_labels(shape=(13, 15, 11)) -> np.ndarray:
    """Two touching labels without any symmetry, one of them at the volume's border."""
    x, y, z = np.meshgrid(*[np.arange(n) for n in shape], indexing="ij")
    data = np.zeros(shape, dtype=np.uint8)
    data[(x - 5) ** 2 + 1.3 * (y - 6) ** 2 + 1.7 * (z - 4) ** 2 < 17] = 3
    data[(x - 9) ** 2 + (y - 9) ** 2 + (z - 8) ** 2 < 14] = 7
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
    """Write a volume [X, Y, Z] or [X, Y, Z, frames] in the format of a path's name, "series" being a DICOM folder."""
    import nibabel
    import SimpleITK

    if path.name == "series":
        write_dicom(path, dicom_slices(data, affine))
    elif path.name.endswith((".nii", ".nii.gz")):
        image = nibabel.Nifti1Image(data, affine)
        image.set_sform(affine, code=0 if path.name.startswith("qform") else 1)
        image.set_qform(affine, code=1 if path.name.startswith("qform") else 0, strip_shears=True)
        nibabel.save(image, path)
    elif path.suffix in (".mgh", ".mgz"):
        nibabel.save(nibabel.MGHImage(data.astype(np.int32), affine), path)
    elif path.suffix == ".npz":
        np.savez(path, volume=data, affine=affine)
    elif path.suffix == ".npy":
        np.save(path, data)
    elif path.suffix in (".nrrd", ".nhdr") and not is_orthogonal(affine):  # ITK writes no shear
        write_nrrd(path, data, affine)
    else:
        SimpleITK.WriteImage(itk_image(data, affine), str(path))


def is_orthogonal(affine: np.ndarray) -> bool:
    unit = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return np.allclose(unit.T @ unit, np.eye(3), atol=1e-6)


def write_nrrd(path: Path, data: np.ndarray, affine: np.ndarray, *, extra: str = "", unit_mm: float = 1.0) -> None:
    """NRRD by hand: [X, Y, Z] or [X, Y, Z, 1] uint8; vectors in a unit of `unit_mm`; `extra` header lines."""
    lps = LPS @ affine / unit_mm
    vectors = [f"({','.join(f'{x:.9g}' for x in column)})" for column in lps[:3, :3].T]
    frames = data.ndim - 3
    head = [
        "NRRD0004", "type: uchar", f"dimension: {data.ndim}", "space: left-posterior-superior",
        f"sizes: {' '.join(map(str, data.shape))}", f"space directions: {' '.join(vectors + ['none'] * frames)}",
        f"kinds: {' '.join(['domain'] * 3 + ['list'] * frames)}", "encoding: raw",
        f"space origin: ({','.join(f'{x:.9g}' for x in lps[:3, 3])})", *extra.splitlines(),
    ]  # fmt: skip
    voxels = data.astype(np.uint8).tobytes(order="F")
    if path.suffix == ".nhdr":
        path.with_suffix(".raw").write_bytes(voxels)
        head.append(f"data file: {path.stem}.raw")
        voxels = b""
    path.write_bytes("\n".join([*head, "", ""]).encode() + voxels)


def dicom_slices(data: np.ndarray, affine: np.ndarray) -> list[dict]:
    """Slices of a volume whose first two axes are at right angles: `pixels` [X, Y], and their geometry in LPS."""
    lps = LPS @ affine
    spacing = np.linalg.norm(lps[:3, :2], axis=0)
    return [
        {"pixels": data[:, :, k], "position": lps[:3, 3] + k * lps[:3, 2], "rows": lps[:3, 0] / spacing[0],
         "columns": lps[:3, 1] / spacing[1], "spacing": spacing, "thickness": np.linalg.norm(lps[:3, 2])}
        for k in range(data.shape[2])
    ]  # fmt: skip


def write_dicom(folder: Path, slices: list[dict]) -> None:
    """One CT series by hand, explicit little endian; the files' names have another order than the slices.

    A slice may leave out "position", "rows" (then there is no orientation) and "thickness".
    """
    folder.mkdir(exist_ok=True)
    names = np.random.default_rng(0).permutation(len(slices))
    for number, (name, part) in enumerate(zip(names, slices)):
        (folder / f"{name}.dcm").write_bytes(dicom_file(number, part))


def dicom_file(number: int, part: dict) -> bytes:
    def element(group: int, item: int, kind: bytes, value: bytes) -> bytes:
        value += (b"\0" if kind in (b"UI", b"OW", b"OB") else b" ") * (len(value) % 2)
        size = struct.pack("<HI", 0, len(value)) if kind in (b"OW", b"OB") else struct.pack("<H", len(value))
        return struct.pack("<HH", group, item) + kind + size + value

    def decimals(*values: float) -> bytes:
        return "\\".join(np.format_float_positional(x, 11)[:16] for x in values).encode()

    def short(value: int) -> bytes:
        return struct.pack("<H", value)

    uid, pixels = b"1.2.826.0.1.3680043.2.1125.", np.atleast_3d(part["pixels"])
    width, height, frames = pixels.shape
    body = [
        (8, 0x16, b"UI", b"1.2.840.10008.5.1.4.1.1.2"), (8, 0x18, b"UI", uid + b"3.%d" % number),
        (8, 0x60, b"CS", b"CT"),
        *([(0x18, 0x50, b"DS", decimals(part["thickness"]))] if "thickness" in part else []),
        (0x20, 0xD, b"UI", uid + b"2"), (0x20, 0xE, b"UI", uid + b"1"), (0x20, 0x13, b"IS", b"%d" % number),
        *([(0x20, 0x32, b"DS", decimals(*part["position"]))] if "position" in part else []),
        *([(0x20, 0x37, b"DS", decimals(*part["rows"], *part["columns"]))] if "rows" in part else []),
        (0x28, 2, b"US", short(1)), (0x28, 4, b"CS", b"MONOCHROME2"),
        *([(0x28, 8, b"IS", b"%d" % frames)] if frames > 1 else []),
        (0x28, 0x10, b"US", short(height)), (0x28, 0x11, b"US", short(width)),
        (0x28, 0x30, b"DS", decimals(*part["spacing"][::-1])),  # between rows first
        (0x28, 0x100, b"US", short(16)), (0x28, 0x101, b"US", short(16)), (0x28, 0x102, b"US", short(15)),
        (0x28, 0x103, b"US", short(0)), (0x7FE0, 0x10, b"OW", pixels.astype("<u2").tobytes(order="F")),
    ]  # fmt: skip
    meta = b"".join(element(2, item, kind, value) for item, kind, value in (
        (1, b"OB", b"\0\1"), (2, b"UI", body[0][3]), (3, b"UI", body[1][3]), (0x10, b"UI", b"1.2.840.10008.1.2.1"),
    ))  # fmt: skip
    head = element(2, 0, b"UL", struct.pack("<I", len(meta))) + meta
    return bytes(128) + b"DICM" + head + b"".join(element(*row) for row in body)
