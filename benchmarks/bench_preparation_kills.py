"""Prepare 100 shapes while workers and the whole run are killed at random points, then compare with an undisturbed run.

    python benchmarks/bench_preparation_kills.py [--shapes 100] [--kills 10] [--workers 2] [--seed 0]

Half of the kills hit one worker process, the other half the whole run (SIGKILL each), which is then started again.
Prints what was lost, left half-written or listed twice: nothing, or it exits 1.
"""

from __future__ import annotations

import argparse
import csv
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import trimesh

from trellis.utils.io_utils import load_sparse_sdf

RESOLUTIONS = (32, 64)


def make_sources(root: Path, n: int) -> None:
    ball = trimesh.creation.icosphere(subdivisions=3)
    for i in range(n):
        mesh = trimesh.Trimesh(ball.vertices * [10 + 0.1 * i, 8, 6], ball.faces, process=False)
        (root / f"patient_{i:03d}").mkdir(parents=True)
        mesh.export(root / f"patient_{i:03d}" / "shape.stl")


def start(root: Path, out: Path, workers: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "dataset_toolkits.compute_sparse_sdf", root, out, "--resolutions", *RESOLUTIONS,
               "--workers", workers, "--quiet"]  # fmt: skip
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL)


def workers_of(pid: int) -> list[int]:
    """Worker processes that a run's threads started, those included that are just starting."""
    children = [int(c) for file in Path(f"/proc/{pid}/task").glob("*/children") for c in file.read_text().split()]
    return [child for child in children if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]


def finished(out: Path) -> int:
    folder = out / "records" / "sdf"
    return len(list(folder.glob("*.json"))) if folder.is_dir() else 0


def check_files(out: Path, half: list[str]) -> None:
    for path in (out / "sparse_sdf").glob("*.npz"):
        try:
            load_sparse_sdf(path)
        except ValueError:
            half.append(path.name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", type=int, default=100)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    total = args.shapes * len(RESOLUTIONS)
    points = np.sort(rng.choice(np.arange(1, total - 2), size=args.kills, replace=False))
    half: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        root, out, clean = Path(folder) / "in", Path(folder) / "out", Path(folder) / "clean"
        make_sources(root, args.shapes)
        begin = time.perf_counter()
        run = start(root, out, args.workers)
        for i, point in enumerate(points):
            while finished(out) < point and run.poll() is None:
                time.sleep(0.01)
            time.sleep(rng.random() * 0.1)
            whole = i % 2 == 1
            if whole:
                run.kill()
                run.wait()
                check_files(out, half)
                run = start(root, out, args.workers)
            else:
                while not workers_of(run.pid):
                    time.sleep(0.01)
                os.kill(int(rng.choice(workers_of(run.pid))), signal.SIGKILL)
            print(f"kill {i + 1}: {'the run' if whole else 'a worker'} after {finished(out)} of {total} files")
        text, _ = run.communicate()
        print(f"finished after {time.perf_counter() - begin:.0f} s, exit code {run.returncode}: {text.splitlines()[0]}")
        start(root, clean, args.workers).communicate()
        again = start(root, out, args.workers).communicate()[0].splitlines()[0]
        print(f"one more run: {again}")
        check_files(out, half)
        with open(out / "metadata.csv", newline="") as stream:
            rows = [row["sha256"] for row in csv.DictReader(stream) if not row["error"]]
        names = {path.name for path in (clean / "sparse_sdf").iterdir()}
        present = {path.name for path in (out / "sparse_sdf").iterdir()}
        left = [str(path.relative_to(out)) for path in out.rglob("*.tmp")]
        different = 0
        for name in names & present:
            one, two = load_sparse_sdf(out / "sparse_sdf" / name), load_sparse_sdf(clean / "sparse_sdf" / name)
            different += not np.array_equal(one.block_sdf, two.block_sdf)
    print(
        f"lost {len(names - present)}, half-written {len(half)}, left over {len(left)}, rows twice "
        f"{len(rows) - len(set(rows))}, rows {len(rows)} of {args.shapes}, unlike an undisturbed run's {different}"
    )
    bad = names != present or half or left or different or len(set(rows)) != args.shapes or len(rows) != args.shapes
    return 1 if bad or run.returncode or "nothing left" not in again else 0


if __name__ == "__main__":
    sys.exit(main())
