"""Options of a preparation on a command line: one parser for `trellis-vqvae prepare` and for the toolkit."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any

EXIT_CODES = "exit code: 0 done, 1 some shapes failed (errors.csv says which and why), 2 an argument or input is wrong"
LISTS = ("commas", "spaces")


class _Flat(argparse.Action):
    """Stores one list, whether the values came with commas or as several arguments."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        parts = values if self.nargs == "+" else [values]
        setattr(namespace, self.dest, [value for part in parts for value in part])


def _numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isascii() and part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"must be whole numbers, got {text!r}")
    return [int(part) for part in parts]


def _words(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def prepare_parser(prog: str, examples: str, *, out_option: bool, lists: str) -> argparse.ArgumentParser:
    """The parser of a preparation; what it returns are the arguments of `trellis.preparation.prepare.prepare_dataset`.

    Args:
        prog: name of the command. examples: shown below the options, before the exit codes.
        out_option: OUT is given by -o; otherwise it is the second argument.
        lists: "commas" (`--labels liver,spleen`) or "spaces" (`--labels liver spleen`, where a label may hold commas).
    """
    if lists not in LISTS:
        raise ValueError(f"lists must be one of {LISTS}, got {lists!r}")
    parser = argparse.ArgumentParser(
        prog=prog, epilog=f"{examples}\n\n{EXIT_CODES}", allow_abbrev=False,
        description="Prepare every mesh and label volume below DATA_ROOT: truth meshes, sparse SDFs, metadata.csv with "
        "a split. Finished work is kept: run it again to continue.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("data_root", metavar="DATA_ROOT", help="searched recursively; its folders are the patients")
    if out_option:
        parser.add_argument("-o", "--out", required=True, metavar="OUT", help="the prepared folder")
    else:
        parser.add_argument("out", metavar="OUT", help="the prepared folder")
    _add_sources(parser, lists)
    _add_shapes(parser, lists)
    _add_patients(parser)
    _add_running(parser)
    return parser


def _add_sources(parser: argparse.ArgumentParser, lists: str) -> None:
    group = parser.add_argument_group("what is read")
    group.add_argument("--mesh-space", default="LPS", choices=["LPS", "RAS"], help="of untagged meshes (%(default)s)")
    words: dict[str, Any] = {"type": _words} if lists == "commas" else {"type": lambda text: [text], "nargs": "+"}
    label = "LABEL[,LABEL...]" if lists == "commas" else "LABEL"
    group.add_argument(
        "--labels", action=_Flat, metavar=label, help="numbers, names or patterns that are kept (all)", **words
    )
    group.add_argument("--label-names", metavar="TABLE", help="names of labels (else a table beside a volume is used)")
    add_search_options(group)
    group.add_argument("--spacing-mm", type=float, nargs=3, metavar=("X", "Y", "Z"), help="of volumes that have none")
    group.add_argument("--threshold-label", default="threshold", help="label of that shape (%(default)s)")
    group.add_argument("--min-component-ml", type=float, default=0.0, help="remove smaller parts of labels")
    group.add_argument("--max-hole-mm", type=float, help="widest hole of a surface that is closed")
    group.add_argument("--nested", default="cavity", choices=["cavity", "solid"], help="inner shells (%(default)s)")


def add_search_options(group: Any) -> None:
    """Options that decide which files of DATA_ROOT are read; see `trellis.preparation.discover.find_sources`."""
    for name, what in (("include", "read only"), ("exclude", "leave out")):
        group.add_argument(
            f"--{name}", action="append", default=[], metavar="GLOB",
            help=f"{what} paths below DATA_ROOT that fit, or a name in them if it has no slash; repeatable",
        )  # fmt: skip
    group.add_argument("--mask-folders", action="store_true", help="a folder of volumes is one mask file per class")
    group.add_argument("--threshold", metavar="LOW[:HIGH]", help="volumes are intensities, not labels")


def _add_shapes(parser: argparse.ArgumentParser, lists: str) -> None:
    group = parser.add_argument_group("what is made")
    several = {} if lists == "commas" else {"nargs": "+"}
    group.add_argument(
        "--resolutions", type=_numbers, action=_Flat, default=[64, 512, 1024],
        metavar="R[,R...]" if lists == "commas" else "R",
        help="voxels per side (%(default)s)", **several,
    )  # fmt: skip
    group.add_argument("--frame", default="shape", help="cube: shape, patient or fixed-mm:SIZE (%(default)s)")
    group.add_argument("--band-voxels", type=int, default=4, help="half-width of the stored band (%(default)s)")
    group.add_argument("--schema", type=int, default=2, choices=[1, 2], help="of the npz files (%(default)s)")


def _add_patients(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("patients and splits")
    group.add_argument("--patient-regex", help="finds the patient in the relative path (first group, or all)")
    group.add_argument("--keep-patient-ids", action="store_true", help="write patients' names as they are")
    group.add_argument("--keep-source-paths", action="store_true", help="write the sources' relative paths")
    group.add_argument("--key-file", help="the secret behind the pseudonyms (OUT/.patient_key)")
    group.add_argument("--seed", type=int, default=0, help="of the split (%(default)s)")
    group.add_argument("--splits-file", help="take the split from this JSON (nnU-Net's splits_final.json)")
    group.add_argument("--fold", type=int, default=0, help="which fold of it (%(default)s)")


def _add_running(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how it runs")
    group.add_argument("--workers", type=int, help="local processes (one a core); 0: everything in this process")
    group.add_argument("--scheduler", metavar="tcp://HOST:PORT", help="a running Dask scheduler instead")
    group.add_argument("--device", default="cpu", help="where distances are computed, cpu or cuda (%(default)s)")
    group.add_argument("--rank", type=int, default=0, help="which part of the sources (%(default)s)")
    group.add_argument("--world_size", "--world-size", type=int, default=1, help="number of parts (%(default)s)")
    group.add_argument("--retry-failed", action="store_true", help="try again what failed for good")
    group.add_argument("--prune-stale", action="store_true", help="remove files of shapes and settings that are gone")
    group.add_argument("--quiet", dest="progress", action="store_false", help="no progress bar")


def parse_prepare(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Arguments as keywords of `prepare_dataset`."""
    return vars(parser.parse_args(with_negative_thresholds(arguments)))


def with_negative_thresholds(arguments: Sequence[str] | None = None) -> list[str]:
    """Arguments (None: those of the program), with `--threshold -200:300` in a form that may start with "-"."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    for at in range(len(given) - 2, -1, -1):
        if given[at] == "--threshold" and re.match(r"-[\d.]", given[at + 1]):
            given[at : at + 2] = [f"--threshold={given[at + 1]}"]
    return given
