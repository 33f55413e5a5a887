"""Runs cases one after another in a process of its own, and says on stdout which begins and how it ended.

The process limits its own memory. A case that crashes or hangs takes the process with it: `robust_runner` sees which.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import sys
import time
import warnings
from pathlib import Path

EXTRA_ADDRESS_SPACE = 3 << 30
"""Bytes that a case may map on top of what the libraries take."""
MOST_RESIDENT = 700 << 20
"""Most resident memory that a case may add."""
LONGEST_MESSAGE = 4000


def status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    return 0


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


def warm_up(entries: set[str], folder: Path) -> None:
    """Import what the entries need, by one valid file each, before memory is limited."""
    from robust_entries import ENTRIES
    from robust_files import FORMATS, place

    for name, (entry, file_name, make) in FORMATS.items():
        if entry in entries:
            ENTRIES[entry](place(folder / "valid" / name.replace(" ", "_"), file_name, make()))


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


def main(job_file: str) -> None:
    """The job: {"folder", "cases": [{"id", "entry", "path"}], "formats": [{"name", "first", "last"}]}."""
    job = json.loads(Path(job_file).read_text())
    folder = Path(job["folder"])
    warnings.simplefilter("ignore")
    import numpy as np
    from robust_files import FORMATS, mutate_inside, place

    entries = {case["entry"] for case in job["cases"]} | {FORMATS[part["name"]][0] for part in job["formats"]}
    warm_up(entries, folder)
    respect_permissions()
    limit = status("VmSize") + EXTRA_ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
    report(ready=True)
    for case in job["cases"]:
        report(begin=case["id"])
        start = time.perf_counter()
        outcome, words = run(case["entry"], Path(case["path"]))
        report(id=case["id"], outcome=outcome, words=words, seconds=round(time.perf_counter() - start, 3))
    for part in job["formats"]:
        entry, file_name, make = FORMATS[part["name"]]
        valid = make()
        where = folder / "mutated" / part["name"].replace(" ", "_")
        place(where, file_name, valid)
        for number in range(part["first"], part["last"]):
            identity = f"{part['name']} {number}"
            report(begin=identity)
            start = time.perf_counter()
            rng = np.random.default_rng([number, *part["name"].encode()])
            data = mutate_inside(file_name, valid, rng)
            (where / file_name).write_bytes(data)
            outcome, words = run(entry, where if file_name.endswith("metadata.csv") else _entry_path(where, file_name))
            report(id=identity, outcome=outcome, words=words, seconds=round(time.perf_counter() - start, 3))


def _entry_path(where: Path, file_name: str) -> Path:
    path = where / file_name
    return path.parent if path.suffix == ".dcm" else path


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(sys.argv[1])
