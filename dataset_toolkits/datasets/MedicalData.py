"""What a folder of medical data holds: `python -m dataset_toolkits.datasets.MedicalData ROOT`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections import Counter

from trellis.preparation.discover import find_sources
from trellis.preparation.options import add_search_options, with_negative_thresholds


def build_parser() -> argparse.ArgumentParser:
    """Options of the listing."""
    parser = argparse.ArgumentParser(
        prog="python -m dataset_toolkits.datasets.MedicalData",
        description="List what a preparation with the same options would find below DATA_ROOT: files by kind, and "
        "patients. Writes nothing.",
        epilog="example: python -m dataset_toolkits.datasets.MedicalData hospital/ --patient-regex 'sub-([0-9]+)'",
    )
    parser.add_argument("data_root", metavar="DATA_ROOT", help="searched recursively")
    parser.add_argument("--patient-regex", help="finds the patient in the relative path (first group, or all)")
    add_search_options(parser)
    parser.add_argument("--list", action="store_true", help="one line a file: kind, patient, relative path")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 some files have no patient, 2 wrong argument or nothing found."""
    args = build_parser().parse_args(with_negative_thresholds(argv))
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    try:
        found = find_sources(
            args.data_root, patient_regex=args.patient_regex, include=args.include, exclude=args.exclude,
            mask_folders=args.mask_folders, images=args.threshold is not None,
        )  # fmt: skip
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.list:
        for source in found.sources:
            print(f"{source.kind}\t{source.patient}\t{source.relative}")
    kinds = Counter(source.kind for source in found.sources)
    per_patient = Counter(source.patient for source in found.sources).values()
    volumes = "label volumes" if args.threshold is None else "volumes"
    print(f"{kinds['mesh']} meshes, {kinds['volume']} {volumes}, {found.others} other files")
    for reason, count in found.left_out.items():
        print(f"{count} left out: {reason}")
    if per_patient:
        print(f"{len(per_patient)} patients with {min(per_patient)} to {max(per_patient)} files each")
    for pattern in found.unused:
        print(f"{pattern} fits nothing", file=sys.stderr)
    if found.unmatched:
        print(f"{len(found.unmatched)} files whose path the patient regex does not match", file=sys.stderr)
    return 1 if found.unmatched else 0


if __name__ == "__main__":
    sys.exit(main())
