"""Shapes to sparse SDFs: `python -m dataset_toolkits.compute_sparse_sdf DATA_ROOT OUT`."""

from __future__ import annotations

import argparse
import logging
import sys

from trellis.preparation.prepare import prepare_dataset
from trellis.preparation.report import describe_summary

EXAMPLE = """examples:
  python -m dataset_toolkits.compute_sparse_sdf hospital/ prepared/
  python -m dataset_toolkits.compute_sparse_sdf hospital/ prepared/ --resolutions 64 512 --labels liver spleen
  one of four jobs of an array, then the merge:
  python -m dataset_toolkits.compute_sparse_sdf hospital/ prepared/ --rank 0 --world_size 4
  python -m dataset_toolkits.build_metadata prepared/

exit code: 0 done, 1 some shapes failed (errors.csv says which and why), 2 an argument or the input is wrong"""


def build_parser() -> argparse.ArgumentParser:
    """Options of the preparation."""
    parser = argparse.ArgumentParser(
        prog="python -m dataset_toolkits.compute_sparse_sdf", epilog=EXAMPLE,
        description="Prepare every mesh and label volume below DATA_ROOT: truth meshes, sparse SDFs, metadata.csv.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("data_root", metavar="DATA_ROOT", help="searched recursively; its folders are the patients")
    parser.add_argument("out", metavar="OUT", help="the prepared folder")
    parser.add_argument("--resolutions", type=int, nargs="+", default=[64, 512, 1024], metavar="R", help="%(default)s")
    parser.add_argument("--workers", type=int, help="local processes (one a core); 0: everything in this process")
    parser.add_argument("--scheduler", metavar="tcp://HOST:PORT", help="a running Dask scheduler instead")
    parser.add_argument("--mesh-space", default="LPS", choices=["LPS", "RAS"], help="of untagged meshes (%(default)s)")
    parser.add_argument("--patient-regex", help="finds the patient in the relative path (first group, or all)")
    parser.add_argument("--labels", nargs="+", metavar="LABEL", help="numbers, names or patterns that are kept (all)")
    parser.add_argument("--label-names", metavar="TABLE", help="names of labels (else a table beside a volume is used)")
    parser.add_argument("--mask-folders", action="store_true", help="a folder of volumes is one mask file per class")
    parser.add_argument("--spacing-mm", type=float, nargs=3, help="of volumes that have none")
    parser.add_argument("--threshold", metavar="LOW[:HIGH]", help="volumes are intensities, not labels")
    parser.add_argument("--threshold-label", default="threshold", help="label of that shape (%(default)s)")
    parser.add_argument("--min-component-ml", type=float, default=0.0, help="remove smaller parts of labels")
    parser.add_argument("--keep-patient-ids", action="store_true", help="write patients' names as they are")
    parser.add_argument("--keep-source-paths", action="store_true", help="write the sources' relative paths")
    parser.add_argument("--key-file", help="the secret behind the pseudonyms (OUT/.patient_key)")
    parser.add_argument("--seed", type=int, default=0, help="of the split (%(default)s)")
    parser.add_argument("--band-voxels", type=int, default=4, help="half-width of the stored band (%(default)s)")
    parser.add_argument("--max-hole-mm", type=float, help="widest hole that is closed")
    parser.add_argument("--nested", default="cavity", choices=["cavity", "solid"], help="inner shells (%(default)s)")
    parser.add_argument("--frame", default="shape", help="cube: shape, patient or fixed-mm:SIZE (%(default)s)")
    parser.add_argument("--splits-file", help="take the split from this JSON (nnU-Net's splits_final.json)")
    parser.add_argument("--fold", type=int, default=0, help="which fold of it (%(default)s)")
    parser.add_argument("--schema", type=int, default=2, choices=[1, 2], help="of the npz files (%(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    parser.add_argument("--rank", type=int, default=0, help="which part of the sources (%(default)s)")
    parser.add_argument("--world_size", type=int, default=1, help="number of parts (%(default)s)")
    parser.add_argument("--retry-failed", action="store_true", help="try again what failed for good")
    parser.add_argument("--prune-stale", action="store_true", help="remove files of shapes and settings that are gone")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 some failed, 2 wrong argument or input."""
    options = vars(build_parser().parse_args(argv))
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    progress = not options.pop("quiet")
    try:
        summary = prepare_dataset(options.pop("data_root"), options.pop("out"), progress=progress, **options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.strerror or error}; run the same command again to continue", file=sys.stderr)
        return 1
    print(describe_summary(summary))
    if options["world_size"] > 1:
        print(f"after all {options['world_size']} ranks: python -m dataset_toolkits.build_metadata {summary.out}")
    return summary.exit_code


if __name__ == "__main__":
    sys.exit(main())
