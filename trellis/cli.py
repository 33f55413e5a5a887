"""The trellis-vqvae command: argument parsing over the library, one function a sub-command; only here is printed."""

from __future__ import annotations

import functools
import logging
import math
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

EXIT_DONE, EXIT_FAILED, EXIT_WRONG_INPUT = 0, 1, 2
EXIT_INTERRUPTED, EXIT_TERMINATED = 130, 143

logger = logging.getLogger("trellis")
app = typer.Typer(
    name="trellis-vqvae",
    help="Medical 3D shapes to discrete tokens and back: prepare, train, encode, decode, evaluate.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"trellis-vqvae {version('trellis-vqvae')}")
        raise typer.Exit(EXIT_DONE)


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="show the version and exit", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Medical 3D shapes to discrete tokens and back: prepare, train, encode, decode, evaluate."""


class Terminated(BaseException):
    """SIGTERM was received; not an Exception, so that nothing on the way swallows it."""


class Space(str, Enum):
    """Space of mesh files that do not say theirs."""

    LPS = "LPS"
    RAS = "RAS"


class Nested(str, Enum):
    """What a closed surface inside another means."""

    cavity = "cavity"
    solid = "solid"


class Split(str, Enum):
    """Which shapes of a prepared folder."""

    train = "train"
    val = "val"
    test = "test"
    all = "all"


Ckpt = Annotated[str, typer.Argument(metavar="CKPT", help="run folder, weights file, published folder or hub id")]
Out = Annotated[Path, typer.Option("--out", "-o", help="folder for the results", show_default=False)]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default: cuda where there is one")]
NoEma = Annotated[bool, typer.Option("--no-ema", help="weights of the last step instead of the averaged ones")]
MeshSpace = Annotated[Space, typer.Option("--mesh-space", help="space of mesh files that do not say theirs")]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error, and more log lines")]
Resolution = Annotated[int | None, typer.Option(help="voxels per side; default: what the model was trained at")]
MaxHole = Annotated[float | None, typer.Option("--max-hole-mm", help="widest hole of a surface that is closed")]
NestedOption = Annotated[Nested, typer.Option("--nested", help="what a closed surface inside another means")]
MaxMemory = Annotated[
    float | None,
    typer.Option("--max-memory-gb", help="split large shapes into parts, to stay within so many GB of the device"),
]
Spacing = Annotated[tuple[float, float, float] | None, typer.Option(help="of volumes that have none")]
Threshold = Annotated[str | None, typer.Option(metavar="LOW[:HIGH]", help="volumes are intensities")]
Labels = Annotated[str | None, typer.Option(help="label numbers or names to take, with commas between")]

Command = TypeVar("Command", bound=Callable[..., int])


def edge(command: Command) -> Command:
    """Exit codes and messages of a sub-command: one line on stderr for what a user can mend, no traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        debug = bool(kwargs.get("debug"))
        configure_logging(debug)
        signal.signal(signal.SIGTERM, _on_sigterm)
        try:
            code = command(*args, **kwargs)
        except KeyboardInterrupt:
            code = complain("interrupted", EXIT_INTERRUPTED)
        except Terminated:
            code = complain("terminated", EXIT_TERMINATED)
        except ValueError as error:
            if debug:
                raise
            code = complain(str(error), EXIT_WRONG_INPUT)
        except ModuleNotFoundError as error:
            if debug:
                raise
            code = complain(f"{error}: this command needs it; see trellis-vqvae doctor", EXIT_WRONG_INPUT)
        except (OSError, MemoryError) as error:
            if debug:
                raise
            code = complain(str(error) or "out of memory", EXIT_FAILED)
        raise typer.Exit(code)

    return run  # type: ignore[return-value]


def complain(message: str, code: int) -> int:
    """Print an error on stderr and return `code`."""
    print(f"error: {message}", file=sys.stderr)
    return code


def configure_logging(debug: bool) -> None:
    """Log lines of the library on stderr."""
    level = logging.DEBUG if debug else logging.INFO
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s", stream=sys.stderr, force=True)
    logging.getLogger("trellis").setLevel(level)


def _on_sigterm(number: int, frame: object) -> None:
    raise Terminated


def split_list(text: str | None) -> tuple[str, ...] | None:
    """Parts of a comma-separated option; None stays None."""
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


@contextmanager
def progress_on_stderr(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar as the callback(done, total) that the library's batches take."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""Context of a command whose options another parser reads."""

PREPARE_EXAMPLES = """\
example: trellis-vqvae prepare patients/ -o data/ --resolutions 64,512 --labels liver,spleen
example: trellis-vqvae prepare ct/ -o bones/ --threshold 300 --threshold-label bone --frame fixed-mm:500"""


@app.command(context_settings=PASSED_ON)
def prepare(context: typer.Context) -> None:
    """Meshes and label volumes to a prepared dataset (--help lists the options)."""
    from trellis.preparation.options import parse_prepare, prepare_parser

    parser = prepare_parser("trellis-vqvae prepare", PREPARE_EXAMPLES, out_option=True, lists="commas")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error, and more log lines")
    run_prepare(**parse_prepare(parser, context.args))


@edge
def run_prepare(*, data_root: str, out: str, debug: bool, **options: Any) -> int:
    """What `prepare` does, with arguments that are parsed already."""
    from trellis.preparation.prepare import prepare_dataset
    from trellis.preparation.report import describe_summary

    summary = prepare_dataset(data_root, out, **options)
    print(describe_summary(summary))
    if options["world_size"] > 1:
        print(f"after all {options['world_size']} ranks: python -m dataset_toolkits.build_metadata {out}")
    return summary.exit_code


@app.command(
    context_settings=PASSED_ON,
    epilog="Example: trellis-vqvae train --config config.json --data_dir data/ --output_dir run/",
)
def train(context: typer.Context) -> None:
    """Train a model; takes the options of train.py (--help lists them)."""
    from trellis.trainers.launch import main as train_main

    raise typer.Exit(train_main(context.args, prog="trellis-vqvae train"))


@app.command(epilog="Example: trellis-vqvae encode run/ liver.stl labels.nii.gz -o tokens/")
@edge
def encode(
    ckpt: Ckpt,
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT...", help="meshes, volumes, prepared shapes")],
    out: Out,
    resolution: Resolution = None,
    split: Annotated[Split, typer.Option(help="of prepared folders")] = Split.all,
    include: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="of a folder's files; repeatable")] = None,
    exclude: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="not these; repeatable")] = None,
    labels: Labels = None,
    label_names: Annotated[Path | None, typer.Option(help="table of label names; else one beside a volume")] = None,
    mask_folders: Annotated[bool, typer.Option("--mask-folders", help="a folder is one mask file per class")] = False,
    spacing_mm: Spacing = None,
    threshold: Threshold = None,
    threshold_label: Annotated[str, typer.Option(help="label of that shape")] = "threshold",
    min_component_ml: Annotated[float, typer.Option(help="remove smaller parts of labels")] = 0.0,
    frame: Annotated[str, typer.Option(help="cube: shape or fixed-mm:SIZE, as the model was trained with")] = "shape",
    name: Annotated[str | None, typer.Option(help="label of the meshes given; default: their file's stem")] = None,
    mesh_space: MeshSpace = Space.LPS,
    max_hole_mm: MaxHole = None,
    nested: NestedOption = Nested.cavity,
    device: Device = None,
    no_ema: NoEma = False,
    debug: Debug = False,
) -> int:
    """Shapes to token files {sha256}_r{R}.safetensors; those that are there already are kept."""
    from trellis.pipelines.batch import encode_many
    from trellis.pipelines.shape_inputs import InputOptions
    from trellis.pipelines.tokenizer import SparseSDFTokenizer

    tokenizer = SparseSDFTokenizer.from_pretrained(ckpt, device=device, ema=not no_ema)
    options = InputOptions(
        resolution=resolution or tokenizer.resolution, split=split.value, mesh_space=mesh_space.value,
        include=tuple(include or ()), exclude=tuple(exclude or ()),
        labels=split_list(labels), label=name, label_names=label_names, mask_folders=mask_folders,
        max_hole_mm=max_hole_mm, nested=nested.value, spacing_mm=spacing_mm, threshold=threshold,
        threshold_label=threshold_label, min_component_ml=min_component_ml, frame=frame, device=tokenizer.device.type,
    )  # fmt: skip
    with progress_on_stderr("encoding") as progress:
        outcome = encode_many(
            tokenizer, inputs, out, options, progress=progress,
            written=lambda shape, path: logger.debug("%s -> %s", shape.source, path.name),
        )  # fmt: skip
    return report_outcome(outcome, out, "token files")


DECODE_EXAMPLES = """\
Example: trellis-vqvae decode run/ tokens/ -o meshes/ --format stl

Example: trellis-vqvae decode run/ tokens/ -o meshes/ --format ply --max-memory-gb 4

Example: trellis-vqvae decode run/ tokens/ -o labels/ --like ct.nii.gz   (one patient's shapes as one label volume)"""
MERGED_NAME = "decoded_labels"


@app.command(epilog=DECODE_EXAMPLES)
@edge
def decode(
    ckpt: Ckpt,
    tokens: Annotated[list[Path], typer.Argument(metavar="TOKENS...", help="token files, or folders of them")],
    out: Out,
    file_format: Annotated[
        str | None,
        typer.Option("--format", help="a file a shape: stl (unless a grid is given), ply, glb, obj, off or nii.gz"),
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option(help="volume whose grid is taken; without --format all shapes become one label volume"),
    ] = None,
    spacing_mm: Annotated[float | None, typer.Option("--spacing-mm", help="cubic voxels, a nii.gz a shape")] = None,
    merge: Annotated[
        str | None, typer.Option(help=f"NAME of the label volume of all shapes ({MERGED_NAME}); needs --like")
    ] = None,
    patient: Annotated[str | None, typer.Option(help="only tokens of this patient id")] = None,
    mesh_space: Annotated[Space, typer.Option("--mesh-space", help="space that meshes are written in")] = Space.LPS,
    max_memory_gb: MaxMemory = None,
    device: Device = None,
    no_ema: NoEma = False,
    debug: Debug = False,
) -> int:
    """Token files to meshes in millimetres, under the same stem, or to label volumes."""
    from trellis.pipelines.batch import VOLUME_FORMAT, decode_many, decode_together
    from trellis.pipelines.label_volume import VolumeGrid
    from trellis.pipelines.tokenizer import SparseSDFTokenizer

    file_format = None if file_format is None else file_format.lower().lstrip(".")
    if like is not None and spacing_mm is not None:
        raise ValueError("--like and --spacing-mm exclude each other: one grid is needed")
    grid = VolumeGrid.like(like) if like else VolumeGrid(spacing_mm=spacing_mm) if spacing_mm is not None else None
    if merge is not None and like is None:
        raise ValueError("--merge needs --like REFERENCE: shapes have no grid in common")
    if merge is not None and file_format not in (None, VOLUME_FORMAT):
        raise ValueError(f"--merge writes a {VOLUME_FORMAT}, got --format {file_format}")
    if file_format is None and like is not None:
        merge = merge or MERGED_NAME
    target = None if merge is None else out / f"{Path(merge).name.removesuffix('.nii.gz')}.{VOLUME_FORMAT}"
    if target is not None and target.exists() and target.samefile(like):
        raise ValueError(f"{target}: the reference would be overwritten; give another --merge NAME or another folder")
    tokenizer = SparseSDFTokenizer.from_pretrained(ckpt, device=device, ema=not no_ema, max_memory_gb=max_memory_gb)
    with progress_on_stderr("decoding") as progress:
        if target is not None:
            outcome = decode_together(tokenizer, tokens, target, grid, patient=patient, progress=progress)
        else:
            outcome = decode_many(
                tokenizer, tokens, out, file_format=file_format or ("stl" if grid is None else VOLUME_FORMAT),
                mesh_space=mesh_space.value, grid=grid, patient=patient, progress=progress,
            )  # fmt: skip
    return report_outcome(outcome, out, "files")


def report_outcome(outcome: Any, out: Path, what: str) -> int:
    """Print what a batch did; returns its exit code."""
    for failure in outcome.failures:
        reason = failure.reason if failure.source in failure.reason else f"{failure.source}: {failure.reason}"
        print(f"failed: {reason}", file=sys.stderr)
    kept = f", {len(outcome.skipped)} there already" if outcome.skipped else ""
    failed = f", {len(outcome.failures)} failed (see {out / 'errors.csv'})" if outcome.failures else ""
    print(f"{out}: {len(outcome.written)} {what} written{kept}{failed}")
    return outcome.exit_code


@app.command(epilog="Example: trellis-vqvae evaluate run/ data/ --split test -o eval/")
@edge
def evaluate(
    inputs: Annotated[list[str], typer.Argument(metavar="CKPT DATA", help="checkpoint and prepared folder")],
    out: Out,
    split: Annotated[Split, typer.Option(help="which shapes")] = Split.test,
    resolution: Resolution = None,
    baseline: Annotated[str | None, typer.Option(help="tsdf: score the TSDF itself; CKPT is not needed")] = None,
    workers: Annotated[int, typer.Option(help="processes that compute metrics")] = 1,
    tolerances_mm: Annotated[
        str, typer.Option("--tolerances-mm", help="of the normalised surface Dice, with commas between")
    ] = "1,2",
    worst: Annotated[int, typer.Option(help="shapes that report.html shows pictures of, the worst first")] = 6,
    device: Device = None,
    no_ema: NoEma = False,
    debug: Debug = False,
) -> int:
    """Score decoded meshes against the truth: metrics.csv, labels.csv, patients.csv, summary.json and report.html."""
    from trellis.pipelines.evaluate import BASELINES, evaluate_dataset, table
    from trellis.pipelines.tokenizer import SparseSDFTokenizer

    if baseline is not None and baseline not in BASELINES:
        raise ValueError(f"--baseline must be one of {', '.join(BASELINES)}, got {baseline!r}")
    if len(inputs) != 2 and not (baseline and len(inputs) == 1):
        raise ValueError(f"evaluate takes CKPT and DATA (DATA alone with --baseline), got {len(inputs)} arguments")
    try:
        tolerances = [float(word) for word in tolerances_mm.split(",")]
    except ValueError:
        tolerances = []
    if not tolerances or not all(0 < value < math.inf for value in tolerances):
        raise ValueError(f"--tolerances-mm must be numbers above 0 with commas between, got {tolerances_mm!r}")
    tokenizer = None
    if baseline is None:
        tokenizer = SparseSDFTokenizer.from_pretrained(inputs[0], device=device, ema=not no_ema)
    with progress_on_stderr("evaluating") as progress:
        summary = evaluate_dataset(
            tokenizer, inputs[-1], out, split=split.value, resolution=resolution, workers=workers, worst=worst,
            tolerances_mm=tolerances, progress=progress,
        )  # fmt: skip
    print(table(summary))
    print(f"{out}: metrics.csv, summary.json, report.html")
    return EXIT_FAILED if summary["n_failed"] else EXIT_DONE


INSPECT_EXAMPLES = """\
Example: trellis-vqvae inspect liver.stl --nested solid --max-hole-mm 20

Example: trellis-vqvae inspect ct.npy --spacing-mm 0.8 0.8 2 --threshold 300"""


@app.command(epilog=INSPECT_EXAMPLES)
@edge
def inspect(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="mesh, volume, prepared shape, tokens, model")],
    mesh_space: MeshSpace = Space.LPS,
    nested: NestedOption = Nested.cavity,
    max_hole_mm: MaxHole = None,
    spacing_mm: Spacing = None,
    threshold: Threshold = None,
    json_output: Annotated[bool, typer.Option("--json", help="one JSON object a line")] = False,
    debug: Debug = False,
) -> int:
    """Say what is in a file, what is wrong with it, and what prepare and encode, given the same options, would do."""
    import json

    from trellis.pipelines.inspect_file import as_text, inspect_file

    problems = 0
    for path in files:
        facts = inspect_file(
            path, mesh_space=mesh_space.value, nested=nested.value, max_hole_mm=max_hole_mm, spacing_mm=spacing_mm,
            threshold=threshold,
        )  # fmt: skip
        problems += bool(facts.get("refused"))
        print(json.dumps(facts) if json_output else as_text(facts))
    return EXIT_FAILED if problems else EXIT_DONE


@app.command(epilog="Example: trellis-vqvae doctor")
@edge
def doctor(
    json_output: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
    timeout_s: Annotated[float, typer.Option("--timeout-s", help="seconds for each probe")] = 180.0,
    debug: Debug = False,
) -> int:
    """Show versions, devices and backends, run a tiny piece of each part, and say what to do about what is missing."""
    import json

    from trellis.doctor import as_text, examine

    report = examine(timeout_s=timeout_s)
    print(json.dumps(report.as_dict(), indent=2) if json_output else as_text(report))
    return EXIT_DONE if report.ok else EXIT_FAILED


def main() -> None:
    """Entry point of the trellis-vqvae command."""
    app()


if __name__ == "__main__":
    main()
