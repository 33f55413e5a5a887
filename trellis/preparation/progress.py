"""A progress bar on stderr with rate, time left and failures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(title: str, total: int, *, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """A function to call once per finished task, with its number of failures; does nothing unless `shown`."""
    if not shown or total == 0:
        yield lambda failed: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        "{task.description}", BarColumn(), MofNCompleteColumn(), "{task.fields[rate]}", "{task.fields[failed]}",
        TimeElapsedColumn(), "left", TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total, rate="", failed="")
        failures = 0

        def advance(failed: int) -> None:
            nonlocal failures
            failures += failed
            bar.advance(task)
            speed = bar.tasks[task].speed
            bar.update(
                task, rate=f"{speed:.2f}/s" if speed else "", failed=f"[red]{failures} failed[/red]" if failures else ""
            )

        yield advance
