"""Build a cohort of template variations: `python -m dataset_toolkits.datasets.TemplateCohort OUT/source`."""

from __future__ import annotations

import argparse
import logging
import sys
import time

from trellis.preparation.template_cohort import DESCRIPTION, CohortSettings, build_cohort


def build_parser() -> argparse.ArgumentParser:
    """Options; the defaults are those of CohortSettings."""
    defaults = CohortSettings()
    parser = argparse.ArgumentParser(prog="python -m dataset_toolkits.datasets.TemplateCohort", description=DESCRIPTION)
    parser.add_argument("out", help="folder for subject_01, subject_02, ...; a record cohort.json is put beside it")
    parser.add_argument("--subjects", type=int, default=defaults.subjects, help="number of subjects (%(default)s)")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of the random fields (%(default)s)")
    parser.add_argument("--rms-mm", type=float, default=defaults.rms_mm, help="RMS displacement in mm (%(default)s)")
    parser.add_argument(
        "--smoothness-mm", type=float, default=defaults.smoothness_mm, help="Gaussian of the field in mm (%(default)s)"
    )
    parser.add_argument(
        "--min-jacobian", type=float, default=defaults.min_jacobian, help="smallest that is accepted (%(default)s)"
    )
    parser.add_argument(
        "--spacing-mm", type=int, default=defaults.spacing_mm, help="voxel edge of the label volumes (%(default)s)"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 a wrong setting."""
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    start = time.perf_counter()
    try:
        settings = CohortSettings(
            args.subjects, args.seed, args.rms_mm, args.smoothness_mm, args.min_jacobian, args.spacing_mm
        )
        reports = build_cohort(args.out, settings)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(reports)} template variations in {args.out} ({time.perf_counter() - start:.1f} s)")
    print(f"displacement RMS {min(r.rms_mm for r in reports):.2f} to {max(r.rms_mm for r in reports):.2f} mm, "
          f"largest {max(r.max_mm for r in reports):.1f} mm")
    print(f"smallest Jacobian determinant {min(r.smallest_jacobian for r in reports):.3f} "
          f"(must be above {settings.min_jacobian}; drawn again: {sum(r.draws - 1 for r in reports)} times)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
