"""What a run writes about itself: log.txt, TensorBoard, and a line on the console now and then."""

from __future__ import annotations

import json
import logging
import math
import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from trellis.trainers.event_file import EventFile
from trellis.utils.io_utils import atomic_write

logger = logging.getLogger(__name__)


class OutputError(RuntimeError):
    """A file of the run, other than a checkpoint, could not be written."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Context whose OSError becomes an OutputError that names the file."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{path}: could not be written: {error}") from error


class RunLog:
    """Log of one run, written by the first rank; on other ranks everything does nothing.

    log.txt has one JSON object a step. Resuming at `step` drops the lines of later steps, which a killed run had
    written after its last checkpoint and which will be written again.

    The first write that the system refuses is said in one line and sets `failed`; nothing is written after it.

    Args:
        step: steps done so far. boards: whether `board` will be called, now and then; then `close` writes the rest.

    Raises:
        OutputError: the files cannot be made.
    """

    def __init__(
        self, folder: Path, *, step: int, total_steps: int, samples_per_step: int, boards: bool, enabled: bool
    ) -> None:
        self.enabled = enabled
        self.failed = False
        self.total_steps, self.samples_per_step, self.boards = total_steps, samples_per_step, boards
        self._step = step
        self._window: dict[str, tuple[float, int]] = {}
        self._printed_at: tuple[int, float] = (step, time.monotonic())
        if not enabled:
            return
        self._path, self._board_path = folder / "log.txt", folder / "tb_logs"
        with writing(self._path):
            trim_log(self._path, step)
            self._stream = self._path.open("a", encoding="utf-8")
        with writing(self._board_path):
            self._board = EventFile(self._board_path, restart_at=step + 1 if step else None)

    @contextmanager
    def _ends_the_log(self, path: Path) -> Iterator[None]:
        try:
            with writing(path):
                yield
        except OutputError as error:
            if not self.failed:
                logger.error("%s; training ends", error)
            self.failed = True

    def restart_clock(self, step: int) -> None:
        """Leave what happened so far out of the rate."""
        self._printed_at = (step, time.monotonic())

    def write(self, record: dict[str, Any]) -> None:
        """One step's line. A figure that is not finite becomes null, since JSON has no NaN."""
        if not self.enabled or self.failed:
            return
        with self._ends_the_log(self._path):
            self._stream.write(json.dumps({k: _plain(v) for k, v in record.items()}, allow_nan=False) + "\n")
            self._stream.flush()
        self._step = int(record["step"])
        for key, value in record.items() if self.boards else ():
            if key != "step" and isinstance(value, (int, float)) and math.isfinite(value):
                total, count = self._window.get(key, (0.0, 0))
                self._window[key] = (total + value, count + 1)

    def board(self, extra: Mapping[str, float]) -> None:
        """Means since the last call, speed and memory to TensorBoard."""
        if not self.enabled or self.failed:
            return
        means = {key: total / count for key, (total, count) in self._window.items()}
        self._window.clear()
        if means.get("step_s"):
            means["samples_per_s"] = self.samples_per_step / means["step_s"]
        means["host_memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            means["cuda_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        figures = {f"{_group(key)}/{key}": value for key, value in means.items()} | dict(extra)
        with self._ends_the_log(self._board_path):
            self._board.scalars(self._step, figures)

    def picture(self, png: bytes) -> None:
        """The samples of this step to TensorBoard."""
        if not self.enabled or self.failed:
            return
        with self._ends_the_log(self._board_path):
            self._board.picture(self._step, "samples", png)

    def progress(self, record: dict[str, Any]) -> None:
        """A line on the console, with the rate since the last one and the time left."""
        if not self.enabled:
            return
        step, now = int(record["step"]), time.monotonic()
        steps, seconds = step - self._printed_at[0], now - self._printed_at[1]
        self._printed_at = (step, now)
        rate = steps / max(seconds, 1e-9)
        left = _duration((self.total_steps - step) / rate) if rate > 0 else "?"
        figures = "  ".join(
            f"{key} {record[key]:.4g}"
            for key in ("loss", "mse_band", "commitment", "perplexity", "codes_used", "lr")
            if isinstance(record.get(key), (int, float))
        )
        logger.info("step %d/%d  %s  %.3g steps/s  %s left", step, self.total_steps, figures, rate, left)

    def close(self) -> None:
        """What `board` has not written yet, and the end of the files."""
        if not self.enabled:
            return
        if self._window:
            self.board({})
        for path, file in ((self._path, self._stream), (self._board_path, self._board)):
            with self._ends_the_log(path):
                file.close()


def trim_log(path: Path, step: int) -> None:
    """Drop the lines after `step`, and a line cut in half by a crash."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if int(json.loads(line)["step"]) <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            logger.warning("%s: dropped a line that is no step: %.60s", path, line)
    with atomic_write(path) as stream:
        stream.write("".join(line + "\n" for line in kept).encode())


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _group(key: str) -> str:
    if key.startswith(("perplexity", "codes", "epoch_")):
        return "codebook"
    if key.endswith(("_s", "_gib")):
        return "speed"
    return "loss" if key in ("loss", "mse_band", "mse_extra", "vq", "commitment") else "train"


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(int(max(seconds, 0)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"
