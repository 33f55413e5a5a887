"""Progress: counts, rate and time left, by weight; lines in a log, nothing when it is off."""

from __future__ import annotations

import time

import pytest

from trellis.preparation import progress
from trellis.preparation.progress import Pace, progress_bar


def test_time_left_goes_by_weight(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    pace = Pace(12, 4 * 1024 + 4 * 512 + 4 * 64)
    now[0] += 40
    for _ in range(4):
        pace.add(0, 1024)
    # 4096 of 6400 took 40 s, so 2304 take 22.5 s, although two thirds of the tasks are to do
    assert pace.line() == "4 of 12, 0.10/s, 0:00:22 left"
    now[0] += 3600
    for _ in range(8):
        pace.add(1, 288)
    assert pace.line() == "12 of 12, 0.20/min, 0:00:00 left, 8 failed"
    slow = Pace(2, 2)
    now[0] += 5000
    slow.add(0, 1)
    assert slow.left() == "1:23:20"


@pytest.mark.parametrize("seconds", [0.0, 1000.0])
def test_a_log_file_gets_lines(monkeypatch, capsys, seconds):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", seconds)
    with progress_bar("reading", [1, 1, 1]) as advance:
        for _ in range(3):
            advance(0, 1)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (3 if seconds == 0 else 1) and lines[-1].startswith("reading: 3 of 3, ")
    with progress_bar("reading", [1], shown=False) as advance:
        advance(0, 1)
    assert capsys.readouterr().err == ""
