"""Peak memory of reading volumes and making surfaces from them, each path in a process of its own (Linux).

python benchmarks/bench_volume_memory.py [--size 400 400 320] [--json OUT]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

MASKS = 24


def blobs(shape: tuple[int, ...]) -> np.ndarray:
    """uint8 [X, Y, Z]: 60 balls of different size, and one voxel near two corners."""
    rng = np.random.default_rng(0)
    grid = np.ogrid[tuple(slice(n) for n in shape)]
    data = np.zeros(shape, dtype=np.uint8)
    for value in range(1, 61):
        centre, radius = rng.uniform(0.1, 0.9, 3) * shape, rng.uniform(0.03, 0.08) * min(shape)
        data[sum((a - c) ** 2 for a, c in zip(grid, centre)) < radius**2] = value
    data[1, 1, 1] = data[-2, -2, -2] = 1
    return data


def write_files(folder: Path, shape: tuple[int, ...]) -> None:
    import nibabel

    data = blobs(shape)
    np.save(folder / "labels.npy", data)
    for dtype in ("uint8", "int16", "float32"):
        nibabel.save(nibabel.Nifti1Image(data.astype(dtype), np.eye(4)), folder / f"{dtype}.nii.gz")
    (folder / "masks").mkdir()
    for value in range(1, MASKS + 1):
        mask = (data == value).astype(np.uint8)
        nibabel.save(nibabel.Nifti1Image(mask, np.eye(4)), folder / f"masks/m{value}.nii.gz")


def paths(folder: Path) -> dict[str, Callable[[], Callable[[], object]]]:
    """Path -> what loads its input, and gives back the work to be measured."""
    from trellis.geometry.volume import (
        LabelVolume,
        label_surfaces,
        read_intensity,
        read_label_layers,
        threshold_surface,
    )

    def surfaces(make: Callable[[np.ndarray], np.ndarray]) -> Callable[[], object]:
        volume = LabelVolume(make(np.load(folder / "labels.npy", allow_pickle=False)), np.eye(4))
        return lambda: label_surfaces(volume)

    def threshold(dtype: str) -> Callable[[], object]:
        data = np.load(folder / "labels.npy", allow_pickle=False).astype(dtype)
        return lambda: threshold_surface(data, np.eye(4), 30)

    return {
        "read labels, uint8 .nii.gz": lambda: lambda: read_label_layers(folder / "uint8.nii.gz"),
        "read labels, int16 .nii.gz": lambda: lambda: read_label_layers(folder / "int16.nii.gz"),
        "read labels, float32 .nii.gz": lambda: lambda: read_label_layers(folder / "float32.nii.gz"),
        f"read a folder of {MASKS} masks, uint8 .nii.gz": lambda: lambda: read_label_layers(folder / "masks"),
        "read intensities, int16 .nii.gz": lambda: lambda: read_intensity(folder / "int16.nii.gz"),
        "label_surfaces, uint8, 60 labels": lambda: surfaces(lambda data: data),
        "label_surfaces, int32, 60 labels": lambda: surfaces(lambda data: data.astype(np.int32) * 1000),
        "label_surfaces, uint8, one label everywhere": lambda: surfaces(np.ones_like),
        "threshold_surface, int16": lambda: threshold("int16"),
        "threshold_surface, float64": lambda: threshold("float64"),
    }


def memory_bytes(key: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))


def measure(folder: Path, name: str) -> dict:
    import nibabel  # noqa: F401
    import scipy.ndimage
    import scipy.sparse.linalg  # noqa: F401
    import vtkmodules.util.numpy_support
    import vtkmodules.vtkFiltersCore  # noqa: F401

    voxels = int(np.prod(np.load(folder / "labels.npy", mmap_mode="r", allow_pickle=False).shape))
    work = paths(folder)[name]()
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")  # the peak starts again from here
    before, start = memory_bytes("VmRSS"), time.process_time()
    work()
    seconds, above = time.process_time() - start, memory_bytes("VmHWM") - before
    return {"path": name, "voxels": voxels, "peak_mb": round(above / 1e6), "bytes_per_voxel": round(above / voxels, 1),
            "cpu_s": round(seconds, 2)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=3, default=[400, 400, 320])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(Path(args.one[0]), args.one[1])))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), tuple(args.size))
        for name in paths(Path(folder)):
            command = [sys.executable, __file__, "--one", folder, name]
            rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
            print(json.dumps(rows[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
