"""The self-check of the data preparation on the command line: `python -m dataset_toolkits.self_check`."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from trellis.preparation.self_check import run_checks


def main(argv: list[str] | None = None) -> int:
    """Print one line a check. Exit code: 0 all right, 1 something is wrong."""
    parser = argparse.ArgumentParser(
        prog="bash scripts/test_data_preprocessing.sh",
        description="Prepare shapes whose distances are known from formulas, and compare.",
        epilog="example: bash scripts/test_data_preprocessing.sh --keep check/",
    )
    parser.add_argument("--keep", metavar="FOLDER", help="leave data and results there")
    parser.add_argument("--workers", type=int, help="local processes; 0: this process alone")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        checks = run_checks(Path(args.keep or scratch), workers=args.workers)
    for check in checks:
        print(f"{'ok   ' if check.ok else 'WRONG'} {check.what}: {check.value}")
    wrong = sum(not check.ok for check in checks)
    print(f"{len(checks) - wrong} of {len(checks)} checks passed in {time.perf_counter() - start:.1f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
