"""The runner of the corpora sees what it is there to see: escapes, crashes, memory, and errors of a wrong kind."""

from __future__ import annotations

from robust_runner import Job, run_jobs

WORDS = {
    "shell": "work/escaped", "home": "home/escaped", "temporary": "tmp/tmp", "above": "inputs/escaped",
    "overwrite": "overwrite/a.txt", "delete": "delete/a.txt", "crash": "exit status", "memory": "MiB; result",
    "other error": "KeyError", "nameless": "does not name the file",
}  # fmt: skip


def test_every_misdeed_is_seen(tmp_path):
    cases = []
    for word in ("nothing", *WORDS):
        path = tmp_path / "inputs" / "cases" / word / "a.txt"
        path.parent.mkdir(parents=True)
        path.write_text(word)
        cases.append({"id": word, "entry": "misbehave", "path": str(path)})
    outcomes = run_jobs([Job(cases, [], (tmp_path / "inputs",))], tmp_path / "runs")
    assert outcomes[0].id == "nothing" and outcomes[0].good
    found = {outcome.id: outcome for outcome in outcomes[1:]}
    assert set(found) == set(WORDS)
    for word, outcome in found.items():
        assert not outcome.good and WORDS[word] in outcome.words, outcome
    assert found["crash"].outcome == "crashed"
