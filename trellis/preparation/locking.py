"""One run at a time in a prepared folder, or several ranks of one; and no half-written file after it."""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

LOCK_NAME = ".lock"


@contextmanager
def locked(out: Path, *, exclusive: bool) -> Iterator[None]:
    """Hold a prepared folder, alone or together with others that do not ask for it alone.

    Who has it alone removes what killed processes left half-written, before and after: a worker may be killed while its
    run goes on, and one of an earlier run may have outlived that by a moment.

    Raises:
        ValueError: somebody else holds it.
    """
    with open(out / LOCK_NAME, "w", encoding="utf-8") as stream:
        alone = False
        try:
            fcntl.flock(stream, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            alone = exclusive
        except BlockingIOError:
            raise ValueError(f"{out}: another preparation is running there") from None
        except OSError as error:
            logger.warning("%s cannot be locked (%s): do not run two preparations there at once", out, error.strerror)
        if alone:
            _remove_leftovers(out)
        yield
        if alone:
            _remove_leftovers(out)


def _remove_leftovers(out: Path) -> None:
    for folder in (".", "meshes", "masks", "sparse_sdf", "records", "records/sources", "records/sdf"):
        for path in (out / folder).glob(".*.tmp"):
            path.unlink(missing_ok=True)
