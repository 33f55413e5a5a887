"""A worker process: takes (function, task) from a pipe, sends back results, ends when the pipe is closed."""

from __future__ import annotations

import signal
import sys
from multiprocessing.connection import Connection


def serve(connection: Connection) -> None:
    """Answer ("done", result) or ("failed", text) to each (function, task) until the other end is gone."""
    while True:
        try:
            function, task = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answer = ("done", function(task))
        except Exception as error:
            answer = ("failed", f"{type(error).__name__}: {error}")
        try:
            connection.send(answer)
        except OSError:  # nobody waits for it any more
            return


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides what it means
    serve(Connection(int(sys.argv[1])))
