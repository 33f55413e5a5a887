"""Every malformed input ends in a result or a clear ValueError; nothing crashes, hangs, or is written elsewhere."""

from __future__ import annotations

import pytest
from robust_malformed import CASES, EITHER
from robust_runner import Job, broken, run_jobs

APART = ("decode", "pretrained", "weights", "tokens", "config", "prepare", "resolution", "sdf", "dataset", "splits")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    root = tmp_path_factory.mktemp("malformed")
    jobs = [Job([], [], (root / name,)) for name in ("together", "apart")]
    for number, (name, malformed) in enumerate(CASES.items()):
        job = jobs[malformed.entry in APART]
        folder = job.watched[0] / f"case{number}"
        folder.mkdir(parents=True)
        job.cases.append({"id": name, "entry": malformed.entry, "path": str(malformed.make(folder))})
    found = run_jobs(jobs, tmp_path_factory.mktemp("runs"))
    return {outcome.id: outcome for outcome in found}


def test_the_corpus_is_large_enough():
    assert len(CASES) >= 60


def test_nothing_breaks(outcomes):
    assert set(CASES) <= set(outcomes), set(CASES) - set(outcomes)
    assert not broken(list(outcomes.values())), broken(list(outcomes.values()))


def test_each_ends_as_it_must(outcomes):
    wrong = []
    for name, malformed in CASES.items():
        outcome = outcomes[name]
        if malformed.ends != EITHER and outcome.outcome != malformed.ends:
            wrong.append(f"{name}: {outcome.outcome} instead of {malformed.ends}: {outcome.words}")
        elif outcome.outcome == "refused" and malformed.words.lower() not in outcome.words.lower():
            wrong.append(f"{name}: {malformed.words!r} is not in {outcome.words!r}")
    assert not wrong, "\n".join(wrong)
