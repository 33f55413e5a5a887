"""Runs cases one after another in a process of its own, and says on stdout which begins and how it ended.

A case that writes, changes or deletes a file of the watched folders is broken, unless it is told to write there.
The process limits its own memory. A case that crashes or hangs takes the process with it: `robust_runner` sees which.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

EXTRA_ADDRESS_SPACE = 3 << 30
"""Bytes that a case may map on top of what the libraries take."""
MOST_RESIDENT = 700 << 20
"""Most resident memory that a case may add."""
LONGEST_MESSAGE = 4000


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:", 1)[1].split(None, 1)[0]) << 10


def reset_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def respect_permissions() -> None:
    """Take from root the right to read what it has no permission for, so that unreadable files are unreadable."""
    if os.geteuid() != 0:
        return
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3 of the capability interface, this process
    data = (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capget(header, data) == 0:
        data[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        libc.capset(header, data)


def warm_up(entries: set[str]) -> None:
    """Import what the entries need, by one valid file each, before memory is limited."""
    from robust_entries import ENTRIES
    from robust_files import FORMATS, place

    with tempfile.TemporaryDirectory() as folder:
        for name, (entry, file_name, make) in FORMATS.items():
            if entry in entries:
                ENTRIES[entry](place(Path(folder) / name.replace(" ", "_"), file_name, make()))


def listing(folders: Sequence[Path]) -> dict[str, tuple[int, ...]]:
    """Every path in and below the folders, links not followed, with its mode; of all but folders also size and time."""
    found: dict[str, tuple[int, ...]] = {}
    left: list[str | Path] = list(folders)
    while left:
        with os.scandir(left.pop()) as entries:
            for entry in entries:
                facts = entry.stat(follow_symlinks=False)
                found[entry.path] = (facts.st_mode, facts.st_size, facts.st_mtime_ns)
                if entry.is_dir(follow_symlinks=False):
                    found[entry.path] = (facts.st_mode,)
                    left.append(entry.path)
    return found


def run_watched(entry: str, path: Path, folders: Sequence[Path]) -> tuple[str, str]:
    """(outcome, words) of `run`, or "broken" where it touched a file of the folders outside PATH/out of `prepare`."""
    before = listing(folders)
    outcome, words = run(entry, path)
    after = listing(folders)
    touched = [name for name in sorted({**before, **after}) if before.get(name) != after.get(name)]
    if entry == "prepare":
        touched = [name for name in touched if not Path(name).is_relative_to(path / "out")]
    if touched:
        outcome, words = "broken", f"wrote, changed or deleted {touched[:5]}; {outcome}: {words}"
    return outcome, words


def run(entry: str, path: Path) -> tuple[str, str]:
    """(outcome, words): "result", "refused", or "broken" with what is wrong."""
    from robust_entries import ENTRIES

    reset_peak()
    before = status("VmRSS")
    try:
        ENTRIES[entry](path)
        outcome, words = "result", ""
    except ValueError as error:
        outcome, words = "refused", str(error)
        if path.name not in words and path.parent.name not in words:
            outcome, words = "broken", f"the message does not name the file: {words}"
        elif len(words) > LONGEST_MESSAGE:
            outcome, words = "broken", f"a message of {len(words)} characters"
        elif "more memory than there is" in words:
            outcome, words = "broken", f"memory ran out: {words}"
    except BaseException as error:
        outcome, words = "broken", f"{type(error).__name__}: {error}"
    grown = status("VmHWM") - before
    if grown > MOST_RESIDENT:
        outcome, words = "broken", f"took {grown >> 20} MiB; {outcome}: {words}"
    return outcome, words[:600]


def report(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


def mutations(name: str, first: int, last: int, folder: Path) -> Iterator[tuple[str, str, Path]]:
    """(id, entry, path) of a format's mutations, each written when it is asked for."""
    import numpy as np
    from robust_files import FORMATS, mutate_inside, place

    entry, file_name, make = FORMATS[name]
    valid = make()
    place(folder, file_name, valid)
    for number in range(first, last):
        rng = np.random.default_rng([number, *name.encode()])
        (folder / file_name).write_bytes(mutate_inside(file_name, valid, rng))
        path = folder if file_name.endswith("metadata.csv") else _entry_path(folder, file_name)
        yield f"{name} {number}", entry, path
    shutil.rmtree(folder)


def main(job_file: str) -> None:
    """The job: {"folder", "watched", "cases": [{"id", "entry", "path"}], "formats": [{"name", "first", "last"}]}."""
    job = json.loads(Path(job_file).read_text())
    folder, watched = Path(job["folder"]), [Path(name) for name in job["watched"]]
    warnings.simplefilter("ignore")
    from robust_files import FORMATS

    entries = {case["entry"] for case in job["cases"]} | {FORMATS[part["name"]][0] for part in job["formats"]}
    warm_up(entries)
    respect_permissions()
    limit = status("VmSize") + EXTRA_ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
    report(ready=True)
    given = [(case["id"], case["entry"], Path(case["path"])) for case in job["cases"]]
    made = [
        mutations(part["name"], part["first"], part["last"], folder / part["name"].replace(" ", "_"))
        for part in job["formats"]
    ]
    for identity, entry, path in itertools.chain(given, *made):
        report(begin=identity)
        start = time.perf_counter()
        outcome, words = run_watched(entry, path, watched)
        report(id=identity, outcome=outcome, words=words, seconds=round(time.perf_counter() - start, 3))


def _entry_path(where: Path, file_name: str) -> Path:
    path = where / file_name
    return path.parent if path.suffix == ".dcm" else path


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(sys.argv[1])
