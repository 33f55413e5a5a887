"""Prepare 100 shapes while workers and the whole run are killed at random moments; compare with an undisturbed run.

    python benchmarks/bench_preparation_kills.py [--shapes 100] [--kills 10] [--workers 2] [--seed 0]

Kills (SIGKILL) hit one worker process or, about as often, the whole run, which is then started again. Their
moments are spread over the start of a run, reading, computing and its end: each strikes a random while after a random
number of finished tasks. Prints what was lost, left half-written, listed twice or done again: nothing, or it exits 1.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import nibabel
import numpy as np
import trimesh

from trellis.utils.io_utils import load_sparse_sdf

Stamps = dict[str, tuple[int, int]]


@dataclass
class Outcome:
    """What became of a run that was killed again and again, `kills` has a line for each time; all counts must be 0.

    `gave_up` counts starts that ended by themselves before all was done, `done_again` records of finished tasks that
    were written again. `tasks_of_last_run` is what the last start said it did, `tasks_left` what had no record before.
    """

    kills: list[str] = field(default_factory=list)
    phases: set[str] = field(default_factory=set)
    exit_code: int = -1
    tasks_of_last_run: int = -1
    tasks_left: int = 0
    gave_up: int = 0
    lost: int = 0
    half_written: int = 0
    left_over: int = 0
    unlike: int = 0
    done_again: int = 0
    rows_missing: int = 0
    rows_twice: int = 0

    def as_line(self) -> str:
        words = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in self.counts().items())
        return f"{words}; the last start did {self.tasks_of_last_run} tasks, {self.tasks_left} were left"

    def counts(self) -> dict[str, int]:
        names = ("gave_up", "lost", "half_written", "left_over", "unlike", "done_again", "rows_missing", "rows_twice")
        return {name: getattr(self, name) for name in names}

    @property
    def is_clean(self) -> bool:
        return not any(self.counts().values()) and self.exit_code == 0 and self.tasks_of_last_run == self.tasks_left


def make_sources(root: Path, shapes: int, detail: int = 3) -> int:
    """Meshes, and a label volume of two for every tenth shape; the number of sources."""
    ball = trimesh.creation.icosphere(subdivisions=detail)
    volumes = shapes // 10
    for i in range(shapes - 2 * volumes):
        mesh = trimesh.Trimesh(ball.vertices * [10 + 0.1 * i, 8, 6], ball.faces, process=False)
        (root / f"patient_{i:03d}").mkdir(parents=True)
        mesh.export(root / f"patient_{i:03d}" / "shape.stl")
    for i in range(volumes):
        data = np.zeros((20, 20, 20), dtype=np.uint8)
        data[2 : 6 + i % 10, 3:9, 4:15], data[2:15, 11:18, 4 : 6 + i // 10] = 1, 2
        nibabel.save(nibabel.Nifti1Image(data, np.eye(4)), root / f"patient_{i:03d}" / "labels.nii.gz")
    return shapes - volumes


def start(root: Path, out: Path, workers: int, resolutions: Sequence[int]) -> subprocess.Popen:
    command = [sys.executable, "-m", "dataset_toolkits.compute_sparse_sdf", root, out, "--resolutions", *resolutions,
               "--workers", workers, "--quiet"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        list(map(str, command)), env=environment, stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL
    )


def workers_of(pid: int) -> list[int]:
    """Worker processes that a run's threads started, those included that are just starting."""
    try:
        children = [int(c) for file in Path(f"/proc/{pid}/task").glob("*/children") for c in file.read_text().split()]
        return [child for child in children if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]
    except OSError:
        return []


def stamps(out: Path) -> Stamps:
    """Every record of finished work, and by what a file that was written again differs."""
    found = {}
    for name in ("sources", "sdf"):
        folder = out / "records" / name
        for entry in os.scandir(folder) if folder.is_dir() else ():
            if not entry.name.startswith("."):
                try:
                    found[f"{name}/{entry.name}"] = (entry.stat().st_ino, entry.stat().st_mtime_ns)
                except FileNotFoundError:
                    continue
    return found


def compare_again(known: Stamps, out: Path) -> int:
    """How many records of `known` were written again since; it is brought up to date."""
    now = stamps(out)
    again = sum(now.get(name) != stamp for name, stamp in known.items())
    known.update(now)
    return again


def half_written(out: Path) -> int:
    count = 0
    for path in (out / "sparse_sdf").glob("*.npz"):
        try:
            load_sparse_sdf(path)
        except ValueError:
            count += 1
    return count


def phase_of(done: int, sources: int, total: int) -> str:
    return "start" if done == 0 else "reading" if done < sources else "computing" if done < total else "end"


def strike(run: subprocess.Popen, whole: bool, rng: np.random.Generator) -> None:
    """Kill a worker (the next one that starts, where there is none), or the run, of which nothing is left then."""
    workers = workers_of(run.pid)
    if whole:
        run.kill()
        run.wait()
        while any(Path(f"/proc/{pid}").exists() for pid in workers):  # they notice that their run is gone, and end
            time.sleep(0.01)
        return
    while not workers and run.poll() is None:
        time.sleep(0.01)
        workers = workers_of(run.pid)
    if workers:
        os.kill(int(rng.choice(workers)), signal.SIGKILL)


def run_with_kills(
    root: Path, out: Path, clean: Path, *, sources: int, shapes: int, kills: int, workers: Sequence[int], seed: int,
    resolutions: Sequence[int],
) -> Outcome:  # fmt: skip
    """Prepare `root` into `out`, killing on the way; compare with `clean`, prepared from the same with the same key.

    Args:
        workers: of the first start, the second, ..., over again; a start with 0 is only ever killed as a whole.
    """
    rng, outcome, known = np.random.default_rng(seed), Outcome(), Stamps()
    total = sources + shapes * len(resolutions)
    # one in the start-up, one at the end, the others each in its share of all tasks
    shares = np.linspace(1, total, kills - 1)
    points = [0, *(int(rng.integers(low, high)) for low, high in zip(shares[:-1], shares[1:])), total]
    whole = rng.permutation(kills) % 2 == 1
    pools = itertools.cycle(workers)
    pool = next(pools)
    outcome.tasks_left = total
    run = start(root, out, pool, resolutions)
    begin = time.perf_counter()
    for point, is_whole in zip(points, whole):
        while len(stamps(out)) < point and run.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.random() * (1.0 if point == 0 else 0.1 if point < total else 0.02))
        outcome.done_again += compare_again(known, out)
        phase = phase_of(len(known), sources, total)
        outcome.phases.add(phase)
        ended, is_whole = run.poll() is not None, bool(is_whole) or pool == 0 or point == total
        outcome.gave_up += ended and len(known) < total
        strike(run, is_whole, rng)
        outcome.half_written += half_written(out) if is_whole else 0
        outcome.done_again += compare_again(known, out)
        what = "nobody, it had ended" if ended else "the run" if is_whole else "a worker"
        outcome.kills.append(f"{time.perf_counter() - begin:.1f} s, {phase}, {len(known)} of {total}: {what}")
        if is_whole or ended:
            outcome.tasks_left = total - len(known)
            pool = next(pools)
            run = start(root, out, pool, resolutions)
    text, _ = run.communicate()
    outcome.exit_code = run.returncode
    tasks = re.search(r": (\d+) tasks", text)
    outcome.tasks_of_last_run = int(tasks[1]) if tasks else 0
    outcome.done_again += compare_again(known, out)
    outcome.half_written += half_written(out)
    outcome.left_over = len(list(out.rglob("*.tmp")))
    count_differences(out, clean, shapes, outcome)
    return outcome


def count_differences(out: Path, clean: Path, shapes: int, outcome: Outcome) -> None:
    files = [path for kind in ("sparse_sdf", "meshes", "masks") for path in (clean / kind).iterdir()]
    for name in ["metadata.csv", "errors.csv", "splits.json", *(path.relative_to(clean).as_posix() for path in files)]:
        outcome.lost += not (out / name).exists()
        outcome.unlike += (out / name).exists() and (out / name).read_bytes() != (clean / name).read_bytes()
    with open(out / "metadata.csv", newline="") as stream:
        rows = [row["sha256"] for row in csv.DictReader(stream) if not row["error"]]
    outcome.rows_missing, outcome.rows_twice = shapes - len(set(rows)), len(rows) - len(set(rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", type=int, default=100)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    resolutions = (32, 64)
    with tempfile.TemporaryDirectory() as folder:
        root, out, clean = Path(folder) / "in", Path(folder) / "out", Path(folder) / "clean"
        sources = make_sources(root, args.shapes)
        for path in (out, clean):
            path.mkdir()
        (clean / ".patient_key").write_text(secrets.token_hex(32))
        shutil.copy(clean / ".patient_key", out)
        start(root, clean, args.workers, resolutions).communicate()
        begin = time.perf_counter()
        outcome = run_with_kills(
            root, out, clean, sources=sources, shapes=args.shapes, kills=args.kills, workers=[args.workers],
            seed=args.seed, resolutions=resolutions,
        )  # fmt: skip
        print("\n".join(outcome.kills))
        print(f"{time.perf_counter() - begin:.0f} s, exit code {outcome.exit_code}; {outcome.as_line()}")
        again = start(root, out, args.workers, resolutions).communicate()[0].splitlines()[0]
        print(f"one more run: {again}")
    return 0 if outcome.is_clean and "nothing left" in again else 1


if __name__ == "__main__":
    sys.exit(main())
