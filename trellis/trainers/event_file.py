"""TensorBoard's event file, written at once: a write that the system refuses is an OSError where it happens."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class EventFile:
    """A new event file in `folder`. No thread writes it and nothing waits in a queue, unlike SummaryWriter's.

    Args:
        restart_at: step from which TensorBoard shall forget what earlier files of the folder say; None to forget
            nothing.

    Raises:
        OSError: here and in every method, when the file cannot be written.
    """

    def __init__(self, folder: Path, *, restart_at: int | None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names.
        self.path = folder / f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._writer = RecordWriter(self.path.open("xb"))
        self._write(0, file_version="brain.Event:2")
        if restart_at is not None:
            self._write(restart_at, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures by tag."""
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in figures.items()]
        self._write(step, summary=self._summary(value=values))

    def picture(self, step: int, tag: str, png: bytes) -> None:
        """A PNG as it is, without an imaging library to encode it again."""
        height, width = (int.from_bytes(png[i : i + 4], "big") for i in (20, 16))
        image = self._summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
        self._write(step, summary=self._summary(value=[self._summary.Value(tag=tag, image=image)]))

    def _write(self, step: int, **content: Any) -> None:
        self._writer.write(self._event(wall_time=time.time(), step=step, **content).SerializeToString())
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
