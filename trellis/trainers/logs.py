"""What a run writes about itself: log.txt, TensorBoard, and a line on the console now and then."""

from __future__ import annotations

import json
import logging
import math
import resource
import time
from pathlib import Path
from typing import Any

import torch

from trellis.utils.io_utils import atomic_write

logger = logging.getLogger(__name__)


class RunLog:
    """Log of one run, written by the first rank; on other ranks everything does nothing.

    log.txt has one JSON object a step. Resuming at `step` drops the lines of later steps, which a killed run had
    written after its last checkpoint and which will be written again.
    """

    def __init__(self, folder: Path, *, step: int, total_steps: int, enabled: bool) -> None:
        self.enabled = enabled
        self.total_steps = total_steps
        self._window: dict[str, list[float]] = {}
        self._printed_at: tuple[int, float] = (step, time.monotonic())
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter

        self._path = folder / "log.txt"
        trim_log(self._path, step)
        self._stream = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tb_logs"), purge_step=step + 1 if step else None)

    def restart_clock(self, step: int) -> None:
        """Leave what happened so far out of the rate."""
        self._printed_at = (step, time.monotonic())

    def write(self, record: dict[str, Any]) -> None:
        """One step's line. A figure that is not finite becomes null, since JSON has no NaN."""
        if not self.enabled:
            return
        self._stream.write(json.dumps({k: _plain(v) for k, v in record.items()}, allow_nan=False) + "\n")
        self._stream.flush()
        for key, value in record.items():
            if key != "step" and isinstance(value, (int, float)) and math.isfinite(value):
                self._window.setdefault(key, []).append(value)

    def board(self, step: int, *, samples_per_step: int, extra: dict[str, float]) -> None:
        """Means since the last call, speed and memory to TensorBoard."""
        if not self.enabled:
            return
        means = {key: sum(values) / len(values) for key, values in self._window.items()}
        self._window.clear()
        if means.get("step_s"):
            means["samples_per_s"] = samples_per_step / means["step_s"]
        means["host_memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            means["cuda_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        for key, value in {**means, **extra}.items():
            self._board.add_scalar(key if "/" in key else f"{_group(key)}/{key}", value, step)
        self._board.flush()

    def picture(self, step: int, png: bytes) -> None:
        """A PNG to TensorBoard as it is, without an imaging library to encode it again."""
        if not self.enabled:
            return
        from tensorboard.compat.proto.summary_pb2 import Summary

        height, width = (int.from_bytes(png[i : i + 4], "big") for i in (20, 16))
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
        self._board.file_writer.add_summary(Summary(value=[Summary.Value(tag="samples", image=image)]), step)
        self._board.flush()

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
        if self.enabled:
            self._stream.close()
            self._board.close()


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
