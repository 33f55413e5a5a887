"""Merge the ranks of a preparation into its tables: `python -m dataset_toolkits.build_metadata OUT`."""

from __future__ import annotations

import argparse
import logging
import sys

from trellis.preparation.metadata import build_metadata


def build_parser() -> argparse.ArgumentParser:
    """Options of the merge."""
    parser = argparse.ArgumentParser(
        prog="python -m dataset_toolkits.build_metadata",
        description="Rebuild metadata.csv, errors.csv and splits.json of a prepared folder from its records.",
        epilog="example: python -m dataset_toolkits.build_metadata prepared/",
    )
    parser.add_argument("out", metavar="OUT", help="the prepared folder")
    parser.add_argument("--seed", type=int, help="of the split (the one that the preparation was run with)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 some shapes failed, 2 wrong argument or input."""
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    try:
        tables = build_metadata(args.out, seed=args.seed)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    shapes = ", ".join(f"{split} {count}" for split, count in tables.shapes.items())
    print(f"{len(tables.rows)} shapes in {args.out}/metadata.csv ({shapes}), {len(tables.failures)} in errors.csv")
    return 1 if tables.failures else 0


if __name__ == "__main__":
    sys.exit(main())
