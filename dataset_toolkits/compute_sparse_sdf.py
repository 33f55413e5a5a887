"""Shapes to sparse SDFs: `python -m dataset_toolkits.compute_sparse_sdf DATA_ROOT OUT`."""

from __future__ import annotations

import argparse
import logging
import sys

from trellis.preparation.options import parse_prepare, prepare_parser
from trellis.preparation.prepare import prepare_dataset
from trellis.preparation.report import describe_summary

PROG = "python -m dataset_toolkits.compute_sparse_sdf"
EXAMPLES = """examples:
  python -m dataset_toolkits.compute_sparse_sdf hospital/ prepared/
  python -m dataset_toolkits.compute_sparse_sdf hospital/ prepared/ --resolutions 64 512 --labels liver spleen
  one of four jobs of an array, then the merge:
  python -m dataset_toolkits.compute_sparse_sdf hospital/ prepared/ --rank 0 --world_size 4
  python -m dataset_toolkits.build_metadata prepared/"""


def build_parser() -> argparse.ArgumentParser:
    """Options of the preparation."""
    return prepare_parser(PROG, EXAMPLES, out_option=False, lists="spaces")


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 some failed, 2 wrong argument or input."""
    options = parse_prepare(build_parser(), argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    try:
        summary = prepare_dataset(options.pop("data_root"), options.pop("out"), **options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.strerror or error}; run the same command again to continue", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; run the same command again to continue", file=sys.stderr)
        return 130
    print(describe_summary(summary))
    if options["world_size"] > 1:
        print(f"after all {options['world_size']} ranks: python -m dataset_toolkits.build_metadata {summary.out}")
    return summary.exit_code


if __name__ == "__main__":
    sys.exit(main())
