"""Reasons to stop early: noted, so that the step in progress ends and a checkpoint is written."""

from __future__ import annotations

import logging
import signal
import threading
import time
from types import FrameType
from typing import Any

from trellis.trainers.launch import EXIT_FAILED

logger = logging.getLogger(__name__)

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
SAME_SIGNAL_S = 1.0
NUM_FLAGS = len(EXIT_CODES) + 1
"""Length of `StopSignals.flags`."""


class StopSignals:
    """Context in which SIGINT and SIGTERM set a flag; a second signal interrupts at once, without saving.

    One that follows within `SAME_SIGNAL_S` is the same request: a scheduler signals all of a job's processes, and the
    supervisor passes on what it gets.

    Attributes:
        received: the signal, None before one. log_failed: set it where the run's log can no longer be written.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.log_failed = False
        self._received_at = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in EXIT_CODES:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.received is not None:
            if time.monotonic() - self._received_at > SAME_SIGNAL_S:
                raise KeyboardInterrupt
            return
        self._received_at = time.monotonic()
        self.received = signal.Signals(number)
        logger.info("%s: the step ends, then a checkpoint is written; once more stops at once", self.received.name)

    def flags(self) -> list[float]:
        """[1.0 after SIGINT, 1.0 after SIGTERM, 1.0 for a failed log]: what ranks sum to agree on stopping."""
        return [*(float(self.received is number) for number in EXIT_CODES), float(self.log_failed)]


def agreed_exit_code(flags: list[float]) -> int | None:
    """Exit code from the `NUM_FLAGS` flags summed over ranks; None when nobody has a reason to stop."""
    for flag, code in zip(flags, (*EXIT_CODES.values(), EXIT_FAILED), strict=True):
        if flag > 0:
            return code
    return None
