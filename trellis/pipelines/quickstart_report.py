"""The quickstart's closing table: our Dice beside the TSDF's, the nearest training shape's and block k-means's."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trellis.pipelines.null_models import (
    block_rows,
    dense_inside,
    fit_block_kmeans,
    nearest_training_shape,
    quantize_blocks,
    transplant,
)
from trellis.utils.blocks import SparseSDFBlocks
from trellis.utils.io_utils import atomic_write, load_sparse_sdf, write_json

logger = logging.getLogger(__name__)

NULLS = ("null_nearest_dice", "null_kmeans_dice")
DEFAULT_MINIMUM = 0.85


@dataclass(frozen=True)
class Line:
    """One line of the table: a structure, the number of test shapes, and mean Dice of the four reconstructions."""

    name: str
    n: int
    ceiling: float
    ours: float
    nearest: float
    kmeans: float

    @property
    def beaten(self) -> bool:
        """Whether ours is above both null models."""
        return self.ours > max(self.nearest, self.kmeans)


@dataclass(frozen=True)
class Report:
    """What the quickstart shows.

    Attributes:
        lines: one a structure, in order of their names. overall: mean over all test shapes.
        codes_used, codebook_size: distinct codes in the token files of the test shapes, out of how many.
        kmeans_note: how the k-means went.
    """

    lines: list[Line]
    overall: Line
    codes_used: int
    codebook_size: int
    kmeans_note: str

    def problems(self, minimum: float = DEFAULT_MINIMUM) -> list[str]:
        """Targets that were missed, one line each; empty when all is well."""
        found = [
            f"{line.name}: our Dice {line.ours:.4f} does not beat the null models "
            f"(nearest training shape {line.nearest:.4f}, k-means {line.kmeans:.4f})"
            for line in self.lines
            if not line.beaten
        ]
        if not self.overall.ours >= minimum:
            found.append(f"mean Dice {self.overall.ours:.4f} is below {minimum}")
        return found

    def table(self) -> str:
        """The table as text."""
        head = ["structure", "n", "TSDF itself", "ours", "nearest training", "k-means blocks"]
        rows = [head]
        for line in [*self.lines, self.overall]:
            figures = (line.ceiling, line.ours, line.nearest, line.kmeans)
            rows.append([line.name, str(line.n), *(f"{value:.4f}" for value in figures)])
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        text = [
            "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths)))
            for row in rows
        ]
        rule = "  ".join("-" * w for w in widths)
        codes = f"codes used on the test shapes: {self.codes_used} of {self.codebook_size}; {self.kmeans_note}"
        return "\n".join([text[0], rule, *text[1:-1], rule, text[-1], codes])


@dataclass(frozen=True)
class Shape:
    """A prepared shape: its row of metadata.csv and its TSDF."""

    sha256: str
    label: str
    split: str
    blocks: SparseSDFBlocks


def read_shapes(data: Path, resolution: int) -> list[Shape]:
    """Shapes of metadata.csv without an error, in its order.

    Raises:
        ValueError: no metadata.csv there, or a listed file that cannot be read.
    """
    path = data / "metadata.csv"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; a prepared dataset is needed")
    with open(path, newline="", encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if not row.get("error")]
    return [
        Shape(
            row["sha256"], row["label"], row["split"],
            load_sparse_sdf(data / "sparse_sdf" / f"{row['sha256']}_r{resolution}.npz"),
        )
        for row in rows
    ]  # fmt: skip


def mesh_dice(blocks: SparseSDFBlocks, truth: tuple[np.ndarray, np.ndarray]) -> float | None:
    """Dice of the surface of `blocks` against a true surface, as `trellis-vqvae evaluate` counts it."""
    from trellis.geometry.isosurface import extract_mesh
    from trellis.geometry.metrics import evaluate_pair

    frame = np.eye(4) if blocks.to_world is None else blocks.to_world
    # the surface samples serve the distances, which are not looked at here
    return evaluate_pair(extract_mesh(blocks), truth, blocks.resolution, to_world=frame, num_samples=1)["dice"]


def score_nulls(
    shapes: Sequence[Shape], data: Path, codes: int, seed: int = 0
) -> tuple[dict[str, dict[str, float | None]], str]:
    """Dice of both null models on every test shape, `{sha256: {null: dice}}`, and a remark on the k-means.

    Raises:
        ValueError: a test structure without a training shape, or fewer training blocks than codes.
    """
    from trellis.utils.mesh_utils import read_mesh

    train = [shape for shape in shapes if shape.split == "train"]
    fit = fit_block_kmeans(block_rows([shape.blocks for shape in train]), codes, seed=seed)
    rows = sum(shape.blocks.num_blocks for shape in train)
    note = (
        f"k-means: {codes} codes from {rows} training blocks, {fit.init}, "
        f"{len(fit.inertia)} iterations{'' if fit.converged else ', not converged'}"
    )
    inside = {shape.sha256: dense_inside(shape.blocks) for shape in shapes if shape.split in ("train", "test")}
    scores: dict[str, dict[str, float | None]] = {}
    for shape in shapes:
        if shape.split != "test":
            continue
        same = [other for other in train if other.label == shape.label]
        if not same:
            raise ValueError(f"structure {shape.label!r} has test shapes and no training shape")
        nearest, _ = nearest_training_shape(inside[shape.sha256], [inside[other.sha256] for other in same])
        mesh = read_mesh(data / "meshes" / f"{shape.sha256}.ply", mesh_space="RAS")
        truth = (mesh.vertices, mesh.faces)
        values = (
            mesh_dice(transplant(same[nearest].blocks, shape.blocks), truth),
            mesh_dice(quantize_blocks(shape.blocks, fit), truth),
        )
        scores[shape.sha256] = dict(zip(NULLS, values))
    return scores, note


def make_report(data: str | Path, evaluation: str | Path, tokens: str | Path, *, resolution: int = 64) -> Report:
    """Score the null models, add them to `metrics.csv` and `summary.json` of an evaluation, and return the report.

    Args:
        data: the prepared folder. evaluation: what `trellis-vqvae evaluate` wrote of its test split.
        tokens: the token files of the test shapes.

    Raises:
        ValueError: a file is missing or malformed, or the evaluation is of other shapes.
    """
    from trellis.pipelines.token_files import load_tokens

    data, evaluation, tokens = Path(data), Path(evaluation), Path(tokens)
    summary = json.loads((evaluation / "summary.json").read_text())
    rows = _read_rows(evaluation / "metrics.csv")
    shapes = read_shapes(data, resolution)
    test = {shape.sha256: shape for shape in shapes if shape.split == "test"}
    if sorted(row["sha256"] for row in rows) != sorted(test):
        raise ValueError(f"{evaluation / 'metrics.csv'}: must list the {len(test)} test shapes of {data}")
    files = {sha256: tokens / f"{sha256}_r{resolution}.safetensors" for sha256 in test}
    used: set[int] = set()
    for path in files.values():
        used.update(np.unique(load_tokens(path).ids).tolist())
    codes = int(summary["codebook_size"])
    scores, note = score_nulls(shapes, data, codes)
    for row in rows:
        row.update({name: "" if value is None else str(value) for name, value in scores[row["sha256"]].items()})
    _write_rows(evaluation / "metrics.csv", rows)
    labels = sorted({row["label"] for row in rows})
    lines = [_line(label, [row for row in rows if row["label"] == label]) for label in labels]
    report = Report(lines, _line("all", rows), len(used), codes, note)
    for name in NULLS:
        summary[name] = _spread([float(row[name]) for row in rows if row[name]])
        for label, group in summary["labels"].items():
            group[name] = _spread([float(row[name]) for row in rows if row["label"] == label and row[name]])
    summary["codes_used"] = len(used)
    write_json(evaluation / "summary.json", summary)
    return report


def _line(name: str, rows: Sequence[dict[str, str]]) -> Line:
    columns = ("dice_tsdf", "dice", *NULLS)
    # a shape that failed has no ceiling, and its Dice of 0 counts all the same; one between voxel centres has neither
    means = [np.mean([float(row[c]) for row in rows if row.get(c)]) for c in columns]
    return Line(name, len(rows), *(float(value) for value in means))


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return dict.fromkeys(("mean", "median", "p05", "p95"))
    low, median, high = np.percentile(values, (5, 50, 95))
    return {"mean": float(np.mean(values)), "median": float(median), "p05": float(low), "p95": float(high)}


def _read_rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; run trellis-vqvae evaluate first")
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def _write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with atomic_write(path) as stream:
        stream.write(text.getvalue().encode())


def write_overview(data: str | Path, meshes: str | Path, path: str | Path, *, resolution: int = 64) -> None:
    """One picture: for the first test shape of each structure, the input surface beside its reconstruction.

    Args:
        meshes: what `trellis-vqvae decode --format stl` wrote of the test shapes.
    """
    from trellis.geometry.render import render_grid, write_png
    from trellis.utils.mesh_utils import read_mesh

    data, meshes = Path(data), Path(meshes)
    first: dict[str, str] = {}
    with open(data / "metadata.csv", newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            if row["split"] == "test" and not row.get("error"):
                first.setdefault(row["label"], row["sha256"])
    pictures, captions = [], []
    for label in sorted(first):
        truth = read_mesh(data / "meshes" / f"{first[label]}.ply", mesh_space="RAS")
        decoded = read_mesh(meshes / f"{first[label]}_r{resolution}.stl")
        title = label.replace("_", " ")
        pictures.append([(truth.vertices, truth.faces), (decoded.vertices, decoded.faces)])
        captions.append([f"{title}: input", f"{title}: decoded"])
    # two structures a row; they share the row's view, as they lie in one head
    rows = [sum(pictures[i : i + 2], []) for i in range(0, len(pictures), 2)]
    write_png(path, render_grid(rows, labels=[sum(captions[i : i + 2], []) for i in range(0, len(captions), 2)]))
