"""Scoring a tokenizer on a prepared dataset: decoded meshes against true surfaces, beside the TSDF's own ceiling."""

from __future__ import annotations

import csv
import io
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trellis.geometry.metrics_summary import bits_per_shape, summarise, summarise_by
from trellis.pipelines.batch import HANDLED, Failure, Progress, one_line, write_errors
from trellis.pipelines.report import Case, truth_is_tsdf, worst_rows, write_report
from trellis.pipelines.scoring import TOLERANCES_MM, TSDF_SUFFIX, Pair, score_pairs, true_surface, worst_row
from trellis.pipelines.token_files import Tokens
from trellis.pipelines.tokenizer import SparseSDFTokenizer
from trellis.utils.blocks import SparseSDFBlocks
from trellis.utils.io_utils import atomic_write, load_sparse_sdf, write_json

if TYPE_CHECKING:
    from trellis.datasets.sparse_sdf import Item

logger = logging.getLogger(__name__)

BASELINES = ("tsdf",)
METRICS_NAME, SUMMARY_NAME, REPORT_NAME = "metrics.csv", "summary.json", "report.html"
GROUP_TABLES = {"label": "labels.csv", "patient_id": "patients.csv"}
IN_GROUPS = ("dice", "dice_blocks", "hd95_mm", "assd_mm", "volume_error_fraction", "dice_source")
"""Metrics that summary.json has for each label and patient, beside the surface Dice at each tolerance; labels.csv and
patients.csv have all."""
FAILED = {"error": "see errors.csv"}
NO_TRUTH = "no such file: metadata.csv lists the shape, whose true surface this is"


def evaluate_dataset(
    tokenizer: SparseSDFTokenizer | None,
    data: str | Path,
    out: str | Path,
    *,
    split: str = "test",
    resolution: int | None = None,
    workers: int = 1,
    num_samples: int = 100_000,
    tolerances_mm: Sequence[float] = TOLERANCES_MM,
    worst: int = 6,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Encode, decode and score every shape of a split; write metrics.csv, summary.json and report.html.

    labels.csv and patients.csv have every metric for each label and each patient.

    Truth is `meshes/{sha256}.ply`, the surface that the TSDF was made from. A shape of metadata.csv without one fails.
    Where none is to be expected (a folder without metadata.csv) or it cannot be placed (no `to_world`), the TSDF's own
    surface takes its place: `truth` is "tsdf" in metrics.csv, and `n_truth_tsdf` counts them. Shapes that came from
    labels are also compared with the label on its own voxels, `masks/{sha256}.npz` (`dice_source` and others of
    `trellis.geometry.source_grid`). Shapes without `to_world` get no figures in mm. A shape whose field has no surface
    counts as the worst value (see `trellis.geometry.metrics`). So does one that cannot be encoded or scored or lost
    its truth, which is in errors.csv and in `n_failed`. One whose prepared file cannot be read is there too and in
    `n_failed_unread`; it counts with Dice 0, and its distances are unknown.

    Args:
        tokenizer: the model; None scores the TSDF itself.
        data: a prepared folder. split: "train", "val", "test" or "all".
        resolution: of the prepared files; default: what the model was trained at, else the only one there.
        workers: processes that compute metrics.
        num_samples: points on each surface, see `evaluate_pair`. tolerances_mm: of the normalised surface
            Dice. worst: shapes that report.html has pictures of.

    Returns:
        What stands in summary.json: n, n_failed, dice {mean, median, p05, p95}, dice_blocks, hd95_mm, assd_mm and more,
        codes_used and perplexity over all shapes together, `ceiling` (the TSDF's dice, ...), `labels` and `patients`
        (the same for each).

    Raises:
        ValueError: no such data, split or resolution.
    """
    from trellis.datasets.sparse_sdf import SparseSDF

    data, out = Path(data), Path(out)
    resolution = resolution or (tokenizer.resolution if tokenizer else None) or _only_resolution(data)
    dataset = SparseSDF(data, resolution=resolution, split=split)
    items = {item.sha256: item for item in dataset.items}
    failures: list[Failure] = []
    codes = CodeCounts(tokenizer.codebook_size if tokenizer else 0)
    rows: list[dict[str, Any]] = []
    unread: list[str] = []
    is_listed = (data / "metadata.csv").is_file()

    def pairs() -> Iterator[Pair]:
        for item in dataset.items:
            try:
                blocks = load_sparse_sdf(item.path)
            except HANDLED as error:
                failures.append(Failure(str(item.path), item.sha256, "read", one_line(error)))
                rows.append(_unread_row(data, item))
                unread.append(item.sha256)
                continue
            if is_listed and blocks.to_world is not None and not _truth_file(data, item.sha256).is_file():
                failures.append(Failure(str(item.path), item.sha256, "read", f"meshes/{item.sha256}.ply: {NO_TRUTH}"))
                as_worst = worst_row(_pair(item, blocks, None, data, {}), tolerances_mm)
                rows.append({**_identity(item), **as_worst, **FAILED})
                continue
            try:
                yield _reconstruct(tokenizer, item, blocks, data, codes)
            except HANDLED as error:
                failures.append(Failure(str(item.path), item.sha256, "encode", one_line(error)))
                yield replace(_pair(item, blocks, None, data, {}), failed=True)

    for pair, score in score_pairs(pairs(), workers, num_samples, tolerances_mm):
        try:
            rows.append({**_identity(pair), **score(), **(FAILED if pair.failed else {})})
        except HANDLED as error:
            failures.append(Failure(str(items[pair.sha256].path), pair.sha256, "score", one_line(error)))
            rows.append({**_identity(pair), **worst_row(pair, tolerances_mm), **FAILED})
        progress(len(rows), len(dataset.items))
    progress(len(dataset.items), len(dataset.items))
    rows.sort(key=lambda row: row["sha256"])
    groups = {key: summarise_by(rows, key) for key in GROUP_TABLES}
    in_groups = (*IN_GROUPS, *(f"nsd_{float(tolerance):g}mm" for tolerance in tolerances_mm))
    summary = {
        "n": len(rows),
        "n_failed": len({failure.id for failure in failures}),
        "n_failed_unread": len(unread),
        "n_truth_tsdf": sum(row.get("truth") == "tsdf" for row in rows),
        "n_not_prepared": len(dataset.refused),
        "split": split,
        "resolution": resolution,
        "baseline": None if tokenizer else "tsdf",
        **figures_of(summarise(rows)),
        **codes.figures(),
        "codebook_size": tokenizer.codebook_size if tokenizer else None,
        "model_hash": tokenizer.model_hash if tokenizer else None,
        "labels": {name: figures_of(found, in_groups) for name, found in groups["label"].items()},
        "patients": {name: figures_of(found, in_groups) for name, found in groups["patient_id"].items()},
    }
    write_rows(out / METRICS_NAME, rows)
    for key, name in GROUP_TABLES.items():
        write_group_table(out / name, key, groups[key])
    write_errors(out, failures)
    write_json(out / SUMMARY_NAME, summary)
    shown = worst_rows(rows, worst)
    # Decoded once more: keeping the meshes of a whole split would take memory in proportion to it.
    cases = [_case(row, tokenizer, items[row["sha256"]], data) for row in shown]
    write_report(out / REPORT_NAME, summary, rows, cases)
    return summary


def _case(row: dict[str, Any], tokenizer: SparseSDFTokenizer | None, item: Item, data: Path) -> Case:
    from trellis.geometry.isosurface import extract_mesh

    blocks = load_sparse_sdf(item.path)
    decoded = blocks if tokenizer is None else tokenizer.decode(tokenizer.encode(blocks))
    return Case(row, true_surface(_pair(item, blocks, None, data, {})), extract_mesh(decoded))


def _reconstruct(
    tokenizer: SparseSDFTokenizer | None, item: Item, blocks: SparseSDFBlocks, data: Path, codes: CodeCounts
) -> Pair:
    if tokenizer is None:
        return _pair(item, blocks, None, data, {})
    tokens = tokenizer.encode(blocks, sha256=item.sha256)
    decoded = tokenizer.decode(tokens)
    codes.add(tokens.ids)
    return _pair(item, blocks, decoded, data, token_figures(tokens))


def _pair(
    item: Item, blocks: SparseSDFBlocks, decoded: SparseSDFBlocks | None, data: Path, figures: dict[str, float]
) -> Pair:
    truth, mask = _truth_file(data, item.sha256), _mask_file(data, item.sha256)
    placed = blocks.to_world is not None
    return Pair(
        item.sha256, item.label, item.patient_id, blocks, decoded, token_figures=figures,
        truth=truth if placed and truth.is_file() else None, mask=mask if placed and mask.is_file() else None,
    )  # fmt: skip


def token_figures(tokens: Tokens) -> dict[str, float]:
    """Size of a shape's tokens in bits, and codes_used and perplexity of the shape alone."""
    codes = CodeCounts(tokens.codebook_size)
    codes.add(tokens.ids)
    return bits_per_shape(tokens.ids, tokens.codebook_size, tokens.block_index) | codes.figures()


def _identity(shape: Item | Pair) -> dict[str, Any]:
    return {"sha256": shape.sha256, "label": shape.label, "patient_id": shape.patient_id}


def _truth_file(data: Path, sha256: str) -> Path:
    return data / "meshes" / f"{sha256}.ply"


def _mask_file(data: Path, sha256: str) -> Path:
    return data / "masks" / f"{sha256}.npz"


def _unread_row(data: Path, item: Item) -> dict[str, Any]:
    """A shape whose prepared file cannot be read: no overlap; the size of its cube, and so distances, are unknown."""
    row = _identity(item) | dict.fromkeys(("dice", "iou", "dice_blocks"), 0.0)
    row |= {"dice_source": 0.0, "iou_source": 0.0} if _mask_file(data, item.sha256).is_file() else {}
    return {**row, **FAILED}


class CodeCounts:
    """How often each code was used over a set of shapes."""

    def __init__(self, size: int) -> None:
        self.counts = np.zeros(size, dtype=np.int64)

    def add(self, ids: np.ndarray) -> None:
        """Count the ids of one shape."""
        self.counts += np.bincount(ids.reshape(-1), minlength=len(self.counts))

    def figures(self) -> dict[str, Any]:
        """`codes_used` and `perplexity` (exp of the entropy of the use of codes); null without a model."""
        total = int(self.counts.sum())
        if not len(self.counts):
            return {"codes_used": None, "perplexity": None}
        share = self.counts[self.counts > 0] / max(total, 1)
        entropy = float(-(share * np.log(share)).sum())
        return {"codes_used": int((self.counts > 0).sum()), "perplexity": math.exp(entropy) if total else 0.0}


def figures_of(found: dict[str, Any], only: Sequence[str] | None = None) -> dict[str, Any]:
    """A summary with the TSDF's columns under `ceiling`; `only` names the metrics that are kept."""
    figures: dict[str, Any] = {"n": found["n"], "n_patients": found["n_patients"], "ceiling": {}}
    for name, value in found.items():
        metric = name.removesuffix(TSDF_SUFFIX)
        if isinstance(value, dict) and (only is None or metric in only):
            (figures if metric == name else figures["ceiling"])[metric] = value
    return figures


def table(summary: dict[str, Any]) -> str:
    """The summary as text: a line a label, and one for all, each with the TSDF's figure in brackets."""
    metrics = [("dice", "Dice"), ("dice_source", "Dice on source grid"), ("hd95_mm", "HD95 mm"), ("assd_mm", "ASSD mm")]
    metrics = [(name, title) for name, title in metrics if name != "dice_source" or name in summary]
    lines = [["", "n", *(f"{title} (TSDF)" for _, title in metrics)]]
    for name, group in [*summary["labels"].items(), ("all", summary)]:
        cells = [name or "-", str(group["n"])]
        for metric, _ in metrics:
            own, ceiling = group.get(metric), group["ceiling"].get(metric)
            shown = [f"{value['mean']:.4g}" if value else "-" for value in (own, ceiling)]
            cells.append(f"{shown[0]} ({shown[1]})")
        lines.append(cells)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = ["  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths)))
            for line in lines]  # fmt: skip
    if summary["codes_used"] is not None:
        rows.append(
            f"codes used {summary['codes_used']} of {summary['codebook_size']}, perplexity {summary['perplexity']:.1f}"
        )
    if summary["n_failed"]:
        rows.append(f"{summary['n_failed']} of {summary['n']} shapes failed (errors.csv) and count as the worst")
    if summary["n_failed_unread"]:
        rows.append(f"{summary['n_failed_unread']} of them could not be read: Dice 0, and no distance to count")
    if summary["n_truth_tsdf"]:
        rows.append(truth_is_tsdf(summary))
    return "\n".join(rows)


def _only_resolution(data: Path) -> int:
    found = sorted({int(p.stem.rsplit("_r", 1)[1]) for p in (data / "sparse_sdf").glob("*_r[0-9]*.npz")})
    if len(found) != 1:
        raise ValueError(f"{data}: resolution must be given, files of {found or 'none'} are there")
    return found[0]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """metrics.csv: a line a shape; empty where a figure does not exist."""
    first = ("sha256", "label", "patient_id", "dice", "dice_blocks", "hd95_mm", "assd_mm")
    columns: dict[str, None] = dict.fromkeys(first)
    for row in rows:
        columns |= dict.fromkeys(row)
    columns.pop("error", None)
    text = io.StringIO()
    table = csv.DictWriter(text, [*columns, "error"], restval="", lineterminator="\n")
    table.writeheader()
    table.writerows({name: "" if value is None else value for name, value in row.items()} for row in rows)
    with atomic_write(path) as stream:
        stream.write(text.getvalue().encode())


def write_group_table(path: Path, key: str, groups: dict[str, dict[str, Any]]) -> None:
    """labels.csv, patients.csv: a line for every metric of every group, with its mean, spread and interval."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    figures = ("n", "mean", "median", "p05", "p95", "ci_low", "ci_high")
    table.writerow([key, "metric", *figures])
    for name, found in groups.items():
        for metric, value in found.items():
            if isinstance(value, dict):
                table.writerow([name, metric, *(value[figure] for figure in figures)])
    with atomic_write(path) as stream:
        stream.write(text.getvalue().encode())
