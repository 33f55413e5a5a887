"""The quickstart's table on a small made-up dataset whose right figures are known."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from trellis.pipelines import quickstart_report as report
from trellis.utils.blocks import SparseSDFBlocks, morton_order
from trellis.utils.io_utils import save_sparse_sdf

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
RESOLUTION = 64
TO_WORLD = np.array([[80.0, 0, 0, 5], [0, 80, 0, -7], [0, 0, 80, 11], [0, 0, 0, 1]])


def ball(radius: float) -> SparseSDFBlocks:
    """A ball in the middle of the cube, radius in voxels."""
    axis = np.arange(RESOLUTION) + 0.5 - RESOLUTION / 2
    grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1)
    tsdf = np.clip((np.linalg.norm(grid, axis=-1) - radius) / 4, -1, 1).astype(np.float16)
    side = RESOLUTION // 8
    cells = tsdf.reshape(side, 8, side, 8, side, 8).transpose(0, 2, 4, 1, 3, 5)
    index = np.argwhere((np.abs(cells) < 1).any(axis=(3, 4, 5)))
    index = index[morton_order(index)]
    return SparseSDFBlocks(index.astype(np.int16), np.ascontiguousarray(cells[tuple(index.T)]), TO_WORLD, RESOLUTION)


@pytest.fixture
def prepared(tmp_path):
    """Three training balls of other radii, one test ball, and an evaluation that claims a Dice of 0.99."""
    trimesh = pytest.importorskip("trimesh")
    from trellis.utils.mesh_utils import write_mesh

    radii = {"aa": ("train", 14), "bb": ("train", 19), "cc": ("train", 25), "dd": ("test", 21)}
    for name, (_, radius) in radii.items():
        save_sparse_sdf(tmp_path / "data" / "sparse_sdf" / f"{name}_r64.npz", ball(radius))
        sphere = trimesh.creation.icosphere(4, radius=radius * 80 / 64)
        write_mesh(tmp_path / "data" / "meshes" / f"{name}.ply", sphere.vertices + TO_WORLD[:3, 3], sphere.faces,
                   mesh_space="RAS")  # fmt: skip
    with open(tmp_path / "data" / "metadata.csv", "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["sha256", "label", "patient_id", "split", "error"])
        writer.writerows([name, "ball", name, split, ""] for name, (split, _) in radii.items())
    (tmp_path / "eval").mkdir()
    with open(tmp_path / "eval" / "metrics.csv", "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["sha256", "label", "patient_id", "dice", "dice_tsdf"])
        writer.writerow(["dd", "ball", "dd", "0.99", "0.999"])
    summary = {"codebook_size": 32, "labels": {"ball": {}}, "codes_used": None}
    (tmp_path / "eval" / "summary.json").write_text(json.dumps(summary))
    return tmp_path


def write_tokens(folder, ids):
    from trellis.pipelines.token_files import Tokens, save_tokens

    tokens = Tokens(
        ids=np.asarray(ids, np.int32), block_index=np.stack([np.arange(len(ids))] * 3, 1).astype(np.int16),
        to_world=TO_WORLD, resolution=RESOLUTION, band_voxels=4, label="ball", sha256="dd", quantizer="VectorQuantizer",
        codebook_size=32, model_hash="0" * 64,
    )  # fmt: skip
    save_tokens(folder / "dd_r64.safetensors", tokens)


def test_null_figures_agree_with_closed_forms_and_are_written(prepared):
    write_tokens(prepared / "tokens", [3, 3, 7, 1])
    found = report.make_report(prepared / "data", prepared / "eval", prepared / "tokens")
    (line,) = found.lines
    assert (line.name, line.n, line.ours, line.ceiling) == ("ball", 1, 0.99, 0.999)
    assert line.nearest == pytest.approx(2 * 19**3 / (19**3 + 21**3), abs=0.01)
    assert line.nearest < line.kmeans < 1
    assert found.codes_used == 3
    assert found.problems() == []
    assert "0.9900" in found.table()
    summary = json.loads((prepared / "eval" / "summary.json").read_text())
    assert summary["null_nearest_dice"]["mean"] == pytest.approx(line.nearest)
    assert summary["labels"]["ball"]["null_kmeans_dice"]["median"] == pytest.approx(line.kmeans)
    assert summary["codes_used"] == 3
    with open(prepared / "eval" / "metrics.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert float(rows[0]["null_nearest_dice"]) == pytest.approx(line.nearest)
    # a second run replaces the columns
    again = report.make_report(prepared / "data", prepared / "eval", prepared / "tokens")
    assert again == found


def test_missed_targets_are_named():
    line = report.Line("liver", 2, 1.0, 0.84, 0.7, 0.86)
    found = report.Report([line], line, 5, 1024, "")
    assert len(found.problems()) == 2
    assert "liver" in found.problems()[0]
    assert "below 0.85" in found.problems()[1]
    nan = report.Line("all", 2, 1.0, float("nan"), 0.7, 0.8)
    assert report.Report([], nan, 5, 1024, "").problems(), "a Dice that is not a number is no success"


def test_an_evaluation_of_other_shapes_is_refused(prepared):
    with open(prepared / "eval" / "metrics.csv", "a") as stream:
        stream.write("ee,ball,ee,0.5,0.9\n")
    with pytest.raises(ValueError, match="must list the 1 test shapes"):
        report.make_report(prepared / "data", prepared / "eval", prepared / "tokens")


def test_a_structure_that_was_never_trained_on_is_refused(prepared):
    shapes = report.read_shapes(prepared / "data", RESOLUTION)
    shapes = [report.Shape(s.sha256, s.label + s.split, s.split, s.blocks) for s in shapes]
    with pytest.raises(ValueError, match="no training shape"):
        report.score_nulls(shapes, prepared / "data", 8)


def write_decoded(folder):
    pytest.importorskip("warp")
    import trimesh

    from trellis.utils.mesh_utils import write_mesh

    sphere = trimesh.creation.icosphere(2, radius=20)
    write_mesh(folder / "dd_r64.stl", sphere.vertices, sphere.faces)


def test_overview_has_inputs_and_reconstructions(prepared):
    write_decoded(prepared / "meshes")
    report.write_overview(prepared / "data", prepared / "meshes", prepared / "overview.png")
    assert (prepared / "overview.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_exit_codes_of_the_script(prepared, capsys):
    """0 when the targets are met, 3 and a reason when one is missed, 2 when something is not there."""
    spec = importlib.util.spec_from_file_location("quickstart_report_script", SCRIPTS / "quickstart_report.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    write_tokens(prepared / "tokens", [3, 3, 7, 1])
    assert script.main([str(prepared)]) == 2 and "error: " in capsys.readouterr().err
    write_decoded(prepared / "meshes")
    assert script.main([str(prepared)]) == 0
    printed = capsys.readouterr()
    assert "0.9900" in printed.out and not printed.err and (prepared / "overview.png").is_file()
    assert script.main([str(prepared), "--minimum", "1.0"]) == 3
    assert capsys.readouterr().err == "TARGET MISSED: mean Dice 0.9900 is below 1.0\n"


def test_the_quickstart_ends_with_the_exit_code_of_its_table(tmp_path):
    """The script's own lines, with stand-ins for python and the command: all stages pass, the table misses a target."""
    commands = tmp_path / "bin"
    commands.mkdir()
    python = 'case "$*" in *quickstart_report*) exit 3;; *sys.prefix*) echo "$VIRTUAL_ENV";; *) echo 1;; esac'
    for name, line in (("trellis-vqvae", "exit 0"), ("python", python)):
        (commands / name).write_text(f"#!/usr/bin/env bash\n{line}\n")
        (commands / name).chmod(0o755)
    environment = {"PATH": f"{commands}:{os.environ['PATH']}", "VIRTUAL_ENV": str(tmp_path), "HOME": str(tmp_path)}
    command = ["bash", SCRIPTS / "quickstart.sh", tmp_path / "out"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 3 and "8/8" in done.stdout and "times" in done.stdout, done.stdout + done.stderr
