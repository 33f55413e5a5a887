"""Progress on stderr with rate, time left and failures: a bar in a terminal, now and then a line in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

SECONDS_BETWEEN_LINES = 30.0
"""Where stderr is no terminal (a job's log)."""

Advance = Callable[[int, float], None]


@contextmanager
def progress_bar(title: str, weights: Sequence[float], *, shown: bool = True) -> Iterator[Advance]:
    """A function to call once per finished task, with its number of failures and its weight.

    Args:
        weights: of all tasks, in proportion to the time that each may take, for the time left. shown: else nothing is
            printed.
    """
    if not shown or not weights:
        yield lambda failed, weight: None
        return
    pace = Pace(len(weights), sum(weights))
    if sys.stderr.isatty():
        with _bar(title, pace) as advance:
            yield advance
        return
    last = pace.start

    def advance(failed: int, weight: float) -> None:
        nonlocal last
        pace.add(failed, weight)
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES or pace.done == pace.total:
            last = now
            sys.stderr.write(f"{title}: {pace.line()}\n")
            sys.stderr.flush()

    yield advance


class Pace:
    """What is done of a number of tasks, how fast, and how long the rest takes at that pace."""

    def __init__(self, total: int, total_weight: float) -> None:
        self.total, self.total_weight = total, total_weight
        self.done = self.failures = 0
        self.done_weight = 0.0
        self.start = time.monotonic()

    def add(self, failed: int, weight: float) -> None:
        """Count a finished task."""
        self.done, self.failures, self.done_weight = self.done + 1, self.failures + failed, self.done_weight + weight

    def rate(self) -> str:
        """Tasks a second since the start, or a minute where that is more readable."""
        rate = self.done / max(time.monotonic() - self.start, 1e-9)
        return f"{rate:.2f}/s" if rate >= 0.1 else f"{60 * rate:.2f}/min"

    def left(self) -> str:
        """Time left as h:mm:ss."""
        seconds = (time.monotonic() - self.start) * (self.total_weight / max(self.done_weight, 1e-9) - 1)
        minutes, seconds = divmod(round(max(seconds, 0)), 60)
        return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"

    def line(self) -> str:
        """All of it in words."""
        failed = f", {self.failures} failed" if self.failures else ""
        return f"{self.done} of {self.total}, {self.rate()}, {self.left()} left{failed}"


@contextmanager
def _bar(title: str, pace: Pace) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TimeElapsedColumn

    columns = ("{task.description}", BarColumn(), "{task.fields[words]}, elapsed", TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=pace.total_weight, words=f"0 of {pace.total}")

        def advance(failed: int, weight: float) -> None:
            pace.add(failed, weight)
            bar.update(task, advance=weight, words=pace.line())

        yield advance
