"""Every malformed input ends in a result or a clear ValueError; nothing crashes, hangs, or is written elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from robust_malformed import CASES, EITHER
from robust_runner import Job, broken, run_jobs

APART = ("decode", "pretrained", "weights", "tokens", "config", "prepare", "resolution", "sdf", "dataset", "splits")


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every path below a folder with size and time."""
    found = {}
    for parent, folders, names in os.walk(folder):
        for name in (*folders, *names):
            facts = os.lstat(os.path.join(parent, name))
            if not os.path.isdir(os.path.join(parent, name)):
                found[os.path.join(parent, name)] = (facts.st_size, facts.st_mtime_ns)
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    root = tmp_path_factory.mktemp("malformed")
    cases, folders = [], {}
    for number, (name, malformed) in enumerate(CASES.items()):
        folder = root / f"case{number}"
        folder.mkdir()
        path = malformed.make(folder)
        folders[name] = folder
        cases.append({"id": name, "entry": malformed.entry, "path": str(path)})
    before = listing(root)
    jobs = [
        Job([case for case in cases if (case["entry"] in APART) == apart], []) for apart in (False, True)
    ]
    found, stderr = run_jobs(jobs, tmp_path_factory.mktemp("runs"))
    after = listing(root)
    return {outcome.id: outcome for outcome in found}, before, after, stderr


def test_the_corpus_is_large_enough():
    assert len(CASES) >= 60


def test_nothing_breaks(outcomes):
    found, _, _, _ = outcomes
    assert set(CASES) <= set(found), set(CASES) - set(found)
    assert not broken(list(found.values())), broken(list(found.values()))


def test_each_ends_as_it_must(outcomes):
    found, _, _, _ = outcomes
    wrong = []
    for name, malformed in CASES.items():
        outcome = found[name]
        if malformed.ends != EITHER and outcome.outcome != malformed.ends:
            wrong.append(f"{name}: {outcome.outcome} instead of {malformed.ends}: {outcome.words}")
        elif outcome.outcome == "refused" and malformed.words.lower() not in outcome.words.lower():
            wrong.append(f"{name}: {malformed.words!r} is not in {outcome.words!r}")
    assert not wrong, "\n".join(wrong)


def test_inputs_are_left_alone_and_nothing_is_written_outside(outcomes):
    _, before, after, _ = outcomes
    outside = {path for path in after.keys() - before.keys() if "/root/out/" not in path}
    assert not outside
    assert {path: facts for path, facts in after.items() if path in before} == before
