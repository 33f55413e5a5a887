"""Runs cases in limited processes: a crash or a hang of one case is a result, and the rest goes on.

A process has a folder of its own, with its current directory, HOME and TMPDIR in it; a case that touches a file there,
or in a watched folder of its job, is broken. Warp's compiled kernels stay where the tests have them.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trellis.utils.warp_utils import get_warp

START_SECONDS, CASE_SECONDS = 120.0, 25.0


@dataclass(frozen=True)
class Outcome:
    """How a case ended: "result", "refused" (a ValueError that names the file), or what is wrong."""

    id: str
    outcome: str
    words: str
    seconds: float

    @property
    def good(self) -> bool:
        return self.outcome in ("result", "refused")


@dataclass
class Job:
    """Cases (id, entry, path) and formats (name, first and last number of their mutations) of one process.

    No case may touch a file of the watched folders; two jobs run at once, so each needs folders of its own.
    """

    cases: list[dict[str, str]]
    formats: list[dict[str, Any]]
    watched: tuple[Path, ...] = ()

    def without(self, done: set[str]) -> Job:
        cases = [case for case in self.cases if case["id"] not in done]
        formats = []
        for part in self.formats:
            finished = [n for n in range(part["first"], part["last"]) if f"{part['name']} {n}" in done]
            first = max(finished) + 1 if finished else part["first"]
            if first < part["last"]:
                formats.append({**part, "first": first})
        return Job(cases, formats, self.watched)


def run_jobs(jobs: Sequence[Job], folder: Path) -> list[Outcome]:
    """All outcomes. Two processes at a time."""
    with ThreadPoolExecutor(2) as pool:
        parts = pool.map(lambda pair: _run_job(pair[1], folder / f"job{pair[0]}"), enumerate(jobs))
        return [outcome for outcomes in parts for outcome in outcomes]


def _run_job(job: Job, folder: Path) -> list[Outcome]:
    outcomes: list[Outcome] = []
    for name in ("home", "tmp", "work"):
        (folder / name).mkdir(parents=True)
    while job.cases or job.formats:
        found, ended = _run_once(job, folder)
        outcomes += found
        if ended is None:
            break
        outcomes.append(ended)
        if ended.id == "start":
            break
        job = job.without({outcome.id for outcome in outcomes})
    return outcomes


def _run_once(job: Job, folder: Path) -> tuple[list[Outcome], Outcome | None]:
    """Outcomes until the end, or until a case crashed or hung: then that one too."""
    job_file, errors = folder / "job.json", folder.with_name(f"{folder.name}_stderr.txt")
    folders = {"folder": str(folder / "files"), "watched": [str(folder), *map(str, job.watched)]}
    job_file.write_text(json.dumps({**folders, "cases": job.cases, "formats": job.formats}))
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"), "1")
    kernels = str(Path(get_warp().config.kernel_cache_dir).parent)
    own = {"HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp"), "WARP_CACHE_PATH": kernels}
    environment = {**os.environ, **threads, **own, "PYTHONFAULTHANDLER": "1"}
    command = [sys.executable, str(Path(__file__).with_name("robust_worker.py")), str(job_file)]
    lines: queue.Queue[str | None] = queue.Queue()
    with open(errors, "wb") as stream:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=stream, env=environment, cwd=folder / "work",
            text=True, bufsize=1,
        )  # fmt: skip

        def pump() -> None:
            for line in process.stdout:
                lines.put(line)
            lines.put(None)

        threading.Thread(target=pump, daemon=True).start()
        outcomes, running, ready, ended = [], "start", False, None
        while True:
            try:
                line = lines.get(timeout=CASE_SECONDS if ready else START_SECONDS)
            except queue.Empty:
                ended = Outcome(running, "hung", f"no end after {CASE_SECONDS} s", CASE_SECONDS)
                break
            if line is None:
                code = process.wait()
                if code != 0:
                    ended = Outcome(running, "crashed", f"exit status {code}", 0.0)
                break
            if not line.startswith("{"):
                continue  # a library's own words
            message = json.loads(line)
            if "begin" in message:
                running = message["begin"]
            elif "ready" in message:
                ready = True
            else:
                outcomes.append(Outcome(**message))
        process.kill()
        process.wait()
    text = errors.read_text(errors="replace")
    if ended is not None:
        ended = Outcome(ended.id, ended.outcome, f"{ended.words}\n{text[-1500:]}", ended.seconds)
    return outcomes, ended


def broken(outcomes: Sequence[Outcome]) -> str:
    """A line for each case that broke the contract, for an assertion's message."""
    bad = [outcome for outcome in outcomes if not outcome.good]
    lines = [f"{outcome.id}: {outcome.outcome}: {outcome.words}" for outcome in bad[:40]]
    return "\n".join([f"{len(bad)} of {len(outcomes)} cases broke the contract", *lines]) if bad else ""
