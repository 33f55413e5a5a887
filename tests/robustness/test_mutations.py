"""Seeded mutations of a valid file of each format: a result or a clear ValueError, whatever the bytes."""

from __future__ import annotations

import pytest
from robust_files import FORMATS
from robust_runner import Job, broken, run_jobs

MUTATIONS = 300
PARTS = 2
"""Processes that share the formats."""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    names = list(FORMATS)
    jobs = [
        Job([], [{"name": name, "first": 0, "last": MUTATIONS} for name in names[part::PARTS]])
        for part in range(PARTS)
    ]
    return run_jobs(jobs, tmp_path_factory.mktemp("mutations"))


def test_every_mutation_ends_in_a_result_or_a_clear_error(outcomes):
    assert not broken(outcomes), broken(outcomes)
    assert len(outcomes) == MUTATIONS * len(FORMATS)


def test_mutations_are_neither_all_harmless_nor_all_refused(outcomes):
    for name in FORMATS:
        of_format = [outcome.outcome for outcome in outcomes if outcome.id.rsplit(" ", 1)[0] == name]
        assert 5 <= of_format.count("refused") <= MUTATIONS - 5, (name, of_format.count("refused"))
