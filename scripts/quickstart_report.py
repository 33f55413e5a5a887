"""Print the quickstart's table and draw its picture: `python scripts/quickstart_report.py OUT`; exit 3 below target."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from trellis.pipelines.quickstart_report import DEFAULT_MINIMUM, make_report, write_overview


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 something is missing, 3 a target was missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="the quickstart's folder")
    parser.add_argument("--minimum", type=float, default=DEFAULT_MINIMUM, help="mean Dice to reach (%(default)s)")
    args = parser.parse_args(argv)
    out: Path = args.out
    try:
        report = make_report(out / "data", out / "eval", out / "tokens")
        write_overview(out / "data", out / "meshes", out / "overview.png")
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("Mean Dice on subjects that were not trained on (variations of templates, not patients):\n")
    print(report.table())
    print(f"\npicture: {out / 'overview.png'}; figures: {out / 'eval' / 'summary.json'}")
    problems = report.problems(args.minimum)
    for problem in problems:
        print(f"TARGET MISSED: {problem}", file=sys.stderr)
    return 3 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
