"""Evaluation of a small dataset: known scores, the ceiling, failures that count, and tables that agree."""

from __future__ import annotations

import csv
import json
import os
import re
from dataclasses import replace

import numpy as np
import pytest
import trimesh
from pipeline_shapes import ellipsoid_blocks

from trellis.geometry.isosurface import extract_mesh
from trellis.geometry.sdf import mesh_to_sparse_sdf
from trellis.geometry.source_grid import SourceMask, load_source_mask, save_source_mask
from trellis.pipelines import evaluate
from trellis.pipelines.evaluate import CodeCounts, evaluate_dataset, figures_of, table
from trellis.pipelines.scoring import OF_TRUTH, Pair, score_pair, score_pairs, worst_row
from trellis.preparation.prepare import prepare_dataset
from trellis.utils.io_utils import load_sparse_sdf, save_sparse_sdf
from trellis.utils.mesh_utils import read_mesh, write_mesh

AXES = {"a": (0.475, 0.3, 0.22), "b": (0.25, 0.475, 0.35), "c": (0.4, 0.4, 0.475), "d": (0.475, 0.2, 0.4)}


@pytest.fixture
def dataset(tmp_path):
    """Four ellipsoids of two labels and two patients in the test split, one more in train, with truth meshes."""
    folder = tmp_path / "data"
    (folder / "meshes").mkdir(parents=True)
    rows = [["sha256", "label", "patient_id", "split", "error", "r32_num_voxels"]]
    for name, axes in [*AXES.items(), ("e", (0.3, 0.3, 0.475))]:
        blocks = ellipsoid_blocks(axes=axes, label="liver" if name in "ab" else "spleen")
        sha = name * 64
        save_sparse_sdf(folder / "sparse_sdf" / f"{sha}_r32.npz", blocks)
        write_mesh(folder / "meshes" / f"{sha}.ply", *extract_mesh(ellipsoid_blocks(64, axes=axes)), mesh_space="RAS")
        count = int(np.count_nonzero(blocks.active))
        split = "train" if name == "e" else "test"
        patient = {"a": "p1", "c": "p1", "e": "p3"}.get(name, "p2")
        rows.append([sha, blocks.label, patient, split, "", count])
    with open(folder / "metadata.csv", "w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    return folder


def read_csv(path):
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


def test_scores_files_and_table(tokenizer, dataset, tmp_path):
    steps = []
    summary = evaluate_dataset(
        tokenizer, dataset, tmp_path / "eval", num_samples=2000, worst=1, progress=lambda *step: steps.append(step)
    )
    rows = read_csv(tmp_path / "eval" / "metrics.csv")
    assert [row["sha256"][0] for row in rows] == ["a", "b", "c", "d"]
    assert {row["label"] for row in rows} == {"liver", "spleen"} and {row["patient_id"] for row in rows} == {"p1", "p2"}
    assert json.loads((tmp_path / "eval" / "summary.json").read_text()) == summary
    assert (summary["n"], summary["n_failed"], summary["resolution"]) == (4, 0, 32)
    for name in ("dice", "dice_blocks", "hd95_mm", "assd_mm"):
        values = [float(row[name]) for row in rows]
        assert summary[name]["mean"] == pytest.approx(np.mean(values))
        assert summary[name]["median"] == pytest.approx(np.median(values))
        assert {"p05", "p95", "ci_low", "ci_high"} <= summary[name].keys()
    liver = [float(row["dice"]) for row in rows if row["label"] == "liver"]
    assert summary["labels"]["liver"]["dice"]["mean"] == pytest.approx(np.mean(liver))
    assert summary["patients"]["p1"]["n"] == 2
    # 32 voxels a side: the TSDF is nearly the truth, an untrained network is not
    assert summary["ceiling"]["dice"]["mean"] > 0.98
    assert all(float(row["dice"]) < float(row["dice_tsdf"]) for row in rows)
    assert 1 < summary["codes_used"] <= 32 and 1 < summary["perplexity"] <= summary["codes_used"]
    assert float(rows[0]["bits_ids"]) == 5 * int(rows[0]["num_blocks"])
    assert steps[-1] == (4, 4)
    assert (tmp_path / "eval" / "report.html").read_text().count("data:image/png") == 4
    text = table(summary)
    assert "liver" in text and "codes used" in text and f"{summary['ceiling']['dice']['mean']:.4g}" in text


def test_baseline_scores_the_tsdf_itself(dataset, tmp_path):
    summary = evaluate_dataset(None, dataset, tmp_path / "eval", num_samples=2000, worst=0)
    assert summary["dice"]["mean"] == summary["ceiling"]["dice"]["mean"] > 0.98
    assert summary["codes_used"] is None and summary["baseline"] == "tsdf" and summary["model_hash"] is None
    assert "codes" not in table(summary)


def test_tolerances_and_tables_of_groups(dataset, tmp_path):
    out = tmp_path / "eval"
    summary = evaluate_dataset(None, dataset, out, num_samples=500, tolerances_mm=(0.5, 3), worst=0)
    assert {"nsd_0.5mm", "nsd_3mm"} <= summary.keys() & summary["ceiling"].keys() and "nsd_1mm" not in summary
    text = (out / "report.html").read_text()
    assert text.index("NSD at 0.5 mm") < text.index("NSD at 3 mm")
    rows, tables = read_csv(out / "metrics.csv"), {}
    for key, name in (("label", "labels.csv"), ("patient_id", "patients.csv")):
        tables[key] = {(row[key], row["metric"]): row for row in read_csv(out / name)}
        for metric in ("dice", "hd_mm", "assd_voxels", "normal_consistency", "volume_error_fraction", "nsd_3mm_tsdf"):
            for group in {row[key] for row in rows}:
                values = [float(row[metric]) for row in rows if row[key] == group]
                found = tables[key][group, metric]
                assert float(found["mean"]) == pytest.approx(np.mean(values)) and int(found["n"]) == len(values)
                assert float(found["p95"]) == pytest.approx(np.quantile(values, 0.95))
                if key == "label":
                    assert float(found["ci_low"]) <= np.mean(values) + 1e-12
                else:
                    assert found["ci_low"] == found["ci_high"] == "", "one patient has no interval"
    head = re.findall(r"<th[^>]*>([^<]*)</th>", text[text.index('id="shapes"') :])
    for title in ("Dice", "Dice in blocks", "HD95 mm", "ASSD mm", "NSD at 0.5 mm", "NSD at 3 mm", "volume error"):
        assert head[head.index(title) + 1] == "TSDF"
    for group in (*summary["labels"].values(), *summary["patients"].values()):
        assert {"nsd_0.5mm", "nsd_3mm"} <= group.keys() & group["ceiling"].keys()
    assert summary["patients"]["p1"]["dice"]["ci_low"] is None and summary["labels"]["liver"]["dice"]["ci_low"] > 0.9


def test_labels_are_scored_on_their_own_voxels_too(tmp_path):
    """Two boxes of 6 x 7 x 6 and 4 x 4 x 5 voxels of 1.5 x 1 x 2 mm, prepared from a NIfTI."""
    nibabel = pytest.importorskip("nibabel")
    data = np.zeros((14, 12, 10), dtype=np.uint8)
    data[2:8, 2:9, 2:8], data[8:12, 3:7, 3:8] = 2, 7
    (tmp_path / "in" / "someone").mkdir(parents=True)
    affine = np.diag([-1.5, 1.0, 2.0, 1.0])
    nibabel.save(nibabel.Nifti1Image(data, affine), tmp_path / "in" / "someone" / "seg.nii.gz")
    out = tmp_path / "data"
    assert prepare_dataset(tmp_path / "in", out, resolutions=(128,), workers=0, progress=False).exit_code == 0
    rows = {row["label"]: row for row in read_csv(out / "metadata.csv")}
    assert len(list((out / "masks").glob("*.npz"))) == 2
    # one of the two masks loses a layer: 6 x 7 x 5 of its 6 x 7 x 6 voxels are left
    path = out / "masks" / f"{rows['2']['sha256']}.npz"
    whole = load_source_mask(path)
    save_source_mask(path, replace(whole, mask=whole.mask[:, :, :5]))
    summary = evaluate_dataset(None, out, tmp_path / "eval", split="all", num_samples=500, worst=0)
    scored = {row["label"]: row for row in read_csv(tmp_path / "eval" / "metrics.csv")}
    assert scored["7"]["dice_source"] == scored["7"]["dice_source_tsdf"] == "1.0"
    assert float(scored["7"]["volume_error_source_ml"]) == 0
    # the surface passes close by the centres of the box's eight corner voxels, and the TSDF may lose them
    assert float(scored["2"]["dice_source"]) == pytest.approx(2 * 210 / (252 + 210), abs=2e-3)
    assert float(scored["2"]["volume_error_source_ml"]) == pytest.approx(42 * 0.003, abs=8.01 * 0.003)
    assert float(scored["2"]["volume_error_source_fraction"]) == pytest.approx(42 / 210, abs=8.01 / 210)
    assert summary["dice_source"]["mean"] == pytest.approx((1 + float(scored["2"]["dice_source"])) / 2)
    assert summary["ceiling"]["dice_source"] == summary["dice_source"]
    assert "Dice on source grid" in table(summary)
    path.unlink()  # what is missing is made again, and nothing else
    again = prepare_dataset(tmp_path / "in", out, resolutions=(128,), workers=0, progress=False)
    assert again.n_computed == 1 and load_source_mask(path).mask.shape == (6, 7, 6)
    path.write_bytes(b"PK nothing")
    summary = evaluate_dataset(None, out, tmp_path / "eval", split="all", num_samples=500, worst=0)
    assert summary["n_failed"] == 1 and summary["dice_source"]["mean"] == 0.5


def test_several_processes_give_the_same_rows(tokenizer, dataset, tmp_path):
    one = evaluate_dataset(tokenizer, dataset, tmp_path / "one", num_samples=500, worst=0)
    two = evaluate_dataset(tokenizer, dataset, tmp_path / "two", num_samples=500, workers=2, worst=0)
    assert one == two
    assert (tmp_path / "one" / "metrics.csv").read_bytes() == (tmp_path / "two" / "metrics.csv").read_bytes()


def test_perfect_reconstruction_reaches_the_ceiling():
    blocks = ellipsoid_blocks()
    row = score_pair(Pair("s", "l", "p", blocks, blocks, None, {}), 2000)
    assert row["dice"] == row["dice_blocks"] == row["dice_tsdf"] == 1.0
    assert row["hd95_mm"] < 1e-4 and row["truth"] == "tsdf"
    moved = replace(blocks, block_sdf=np.clip(blocks.block_sdf + np.float16(0.25), -1, 1))
    row = score_pair(Pair("s", "l", "p", blocks, moved, None, {}), 2000)
    # a quarter of the band of 4 voxels of 100/32 mm inward
    assert row["assd_mm"] == pytest.approx(3.125, rel=0.1)
    assert 0.6 < row["dice"] < 0.95 and row["volume_error_ml"] < 0


def test_field_without_a_surface_counts_as_the_worst():
    blocks = ellipsoid_blocks()
    nothing = replace(blocks, block_sdf=np.ones_like(blocks.block_sdf))
    row = score_pair(Pair("s", "l", "p", blocks, nothing, None, {}), 500)
    assert row["dice"] == row["dice_blocks"] == 0 and row["pred_is_empty"]
    assert row["hd95_mm"] == pytest.approx(100 * np.sqrt(3))


@pytest.fixture
def plate(tmp_path):
    """TSDF at 32 and true surface of 40 x 40 x 0.1 mm, which no voxel centre is inside of."""
    box = trimesh.creation.box(bounds=[(10, 20, 30), (50, 60, 30.1)])
    mesh = np.array(box.vertices, dtype=float), np.array(box.faces)
    write_mesh(tmp_path / "plate.ply", *mesh, mesh_space="RAS")
    return replace(mesh_to_sparse_sdf(*mesh, 32), label="sheet"), tmp_path / "plate.ply"


def test_nothing_is_perfect_on_a_shape_between_voxel_centres(plate):
    """No reconstruction, an arbitrary one without a surface, and none at all of a TSDF that is empty itself."""
    blocks, path = plate
    pair = Pair("s", "l", "p", blocks, blocks, path, {})
    for each in (pair, replace(pair, decoded=None, failed=True), replace(pair, decoded=None)):
        row = score_pair(each, 200)
        assert row["dice"] == row["iou"] == row["dice_blocks"] == row["dice_tsdf"] == row["dice_blocks_tsdf"] == 0
        assert row["pred_is_empty"] and not row["truth_is_empty"] and row["hd_voxels"] > 32
    row = score_pair(replace(pair, truth=None), 200)
    assert row["truth_is_empty"] and row["dice"] == 1 and row["dice_blocks"] is None
    row = score_pair(replace(pair, truth=None, decoded=None, failed=True), 200)
    assert row["dice"] == row["dice_blocks"] == 0 and row["hd_voxels"] > 32, "what failed is never perfect"
    thick = replace(blocks, block_sdf=np.clip(blocks.block_sdf - np.float16(0.2), -1, 1))
    assert score_pair(replace(pair, decoded=thick), 200)["dice"] == 0


def test_figures_that_do_not_exist_are_left_out(tokenizer, dataset, plate, tmp_path, monkeypatch):
    """A reconstruction that lies between the voxel centres too: blank Dice, counted distances, and a page."""
    blocks, path = plate
    sha = "c" * 64
    save_sparse_sdf(dataset / "sparse_sdf" / f"{sha}_r32.npz", blocks)
    (dataset / "meshes" / f"{sha}.ply").write_bytes(path.read_bytes())
    decode, thin = tokenizer.decode, read_mesh(path, mesh_space="RAS")
    monkeypatch.setattr(tokenizer, "decode", lambda tokens: blocks if tokens.label == "sheet" else decode(tokens))
    monkeypatch.setattr(
        "trellis.geometry.isosurface.extract_mesh",
        lambda given: (thin.vertices + (0, 0, 0.01), thin.faces) if given.label == "sheet" else extract_mesh(given),
    )
    summary = evaluate_dataset(tokenizer, dataset, tmp_path / "eval", num_samples=500, worst=9)
    row = {row["sha256"][0]: row for row in read_csv(tmp_path / "eval" / "metrics.csv")}["c"]
    assert row["dice"] == row["iou"] == row["dice_blocks"] == row["dice_tsdf"] == "" and float(row["hd95_mm"]) < 0.02
    assert summary["dice"]["n"] == summary["dice_blocks"]["n"] == 3 and summary["hd95_mm"]["n"] == 4
    assert "Dice - (TSDF -)" in (tmp_path / "eval" / "report.html").read_text()


def test_shape_without_a_place_has_no_millimetres():
    blocks = replace(ellipsoid_blocks(), to_world=None)
    row = score_pair(Pair("s", "l", "p", blocks, blocks, None, {}), 500)
    assert row["dice"] == 1.0 and row["hd95_mm"] is None and row["assd_mm_tsdf"] is None
    assert row["volume_pred_ml"] is None and row["hd95_voxels"] < 1e-3


@pytest.mark.parametrize("workers", [1, 2])
def test_what_fails_counts_as_the_worst_and_is_named(tokenizer, dataset, tmp_path, monkeypatch, workers):
    """b cannot be read, c has no truth to be scored against, d cannot be encoded: no mean gets better by that."""
    broken = dataset / "sparse_sdf" / f"{'b' * 64}_r32.npz"
    broken.write_bytes(broken.read_bytes()[:500])
    truth = dataset / "meshes" / f"{'c' * 64}.ply"
    truth.write_bytes(b"ply nonsense")
    encode = tokenizer.encode

    def failing(shape, *, sha256=""):
        if sha256[:1] == "d":
            raise RuntimeError("out of memory")
        return encode(shape, sha256=sha256)

    monkeypatch.setattr(tokenizer, "encode", failing)
    out = tmp_path / "eval"
    summary = evaluate_dataset(tokenizer, dataset, out, num_samples=500, worst=9, workers=workers)
    assert (summary["n"], summary["n_failed"], summary["n_failed_unread"]) == (4, 3, 1)
    rows = {row["sha256"][0]: row for row in read_csv(out / "metrics.csv")}
    assert [bool(rows[name]["error"]) for name in "abcd"] == [False, True, True, True]
    worst = 100 * np.sqrt(3)  # the diagonal of a cube of 100 mm
    for name in "cd":
        row = {metric: float(rows[name][metric]) for metric in ("hd_mm", "hd95_mm", "assd_mm", "chamfer_mm")}
        assert row == pytest.approx(dict.fromkeys(row, worst))
        assert float(rows[name]["assd_voxels"]) == pytest.approx(32 * np.sqrt(3))
        assert rows[name]["dice"] == rows[name]["dice_blocks"] == rows[name]["nsd_2mm"] == "0.0"
        assert (rows[name]["volume_error_fraction"], rows[name]["euler_match"]) == ("-1.0", "False")
    assert rows["c"]["hd95_mm_tsdf"] == "" and 0 < float(rows["d"]["hd95_mm_tsdf"]) < 5, "d has a truth and a TSDF"
    assert float(rows["d"]["volume_error_ml"]) == -float(rows["d"]["volume_truth_ml"]) < 0
    assert rows["b"]["dice"] == "0.0" and rows["b"]["hd95_mm"] == rows["b"]["nsd_1mm"] == ""
    assert summary["hd95_mm"]["n"] == 3 and summary["dice"]["n"] == 4 and summary["ceiling"]["dice"]["n"] == 2
    assert summary["hd95_mm"]["mean"] == pytest.approx((float(rows["a"]["hd95_mm"]) + 2 * worst) / 3)
    errors = read_csv(out / "errors.csv")
    assert not any(str(dataset) in row["reason"] for row in errors if row["stage"] == "read")
    assert sorted((row["id"][0], row["stage"]) for row in errors) == [("b", "read"), ("c", "score"), ("d", "encode")]
    assert "3 of 4 shapes failed" in table(summary) and "1 of them could not be read" in table(summary)
    assert (out / "report.html").read_text().count("data:image/png") == 4, "pictures of what did not fail"


@pytest.mark.parametrize("with_model", [True, False])
def test_a_truth_that_is_not_there_is_a_failure(tokenizer, dataset, tmp_path, with_model):
    """Of one shape, then of all, as when meshes/ was not copied: the TSDF never takes its place unannounced."""
    model, out = tokenizer if with_model else None, tmp_path / "eval"
    (dataset / "meshes" / f"{'c' * 64}.ply").unlink()
    summary = evaluate_dataset(model, dataset, out, num_samples=500, worst=9)
    assert (summary["n"], summary["n_failed"], summary["n_failed_unread"], summary["n_truth_tsdf"]) == (4, 1, 0, 0)
    rows = {row["sha256"][0]: row for row in read_csv(out / "metrics.csv")}
    assert rows["c"]["error"] and rows["c"]["dice"] == rows["c"]["dice_blocks"] == "0.0" and not rows["c"]["dice_tsdf"]
    assert float(rows["c"]["hd95_mm"]) == pytest.approx(100 * np.sqrt(3)), "the cube is known, and so the worst"
    assert {row["truth"] for name, row in rows.items() if name != "c"} == {"mesh"}
    (error,) = read_csv(out / "errors.csv")
    assert (error["id"], error["stage"]) == ("c" * 64, "read")
    assert error["reason"].startswith(f"meshes/{'c' * 64}.ply: no such file")
    assert "1 of 4 shapes failed" in table(summary) and "could not be read" not in table(summary)
    for path in (dataset / "meshes").glob("*.ply"):
        path.unlink()
    summary = evaluate_dataset(model, dataset, out, num_samples=500, worst=9)
    assert summary["n_failed"] == 4 and summary["dice"]["mean"] == 0 and "dice" not in summary["ceiling"]


def test_shapes_that_never_had_a_truth_are_counted(tokenizer, dataset, tmp_path):
    """A folder without metadata.csv, and a file without a place in the world, of which no mesh in mm is a truth."""
    path = dataset / "sparse_sdf" / f"{'a' * 64}_r32.npz"
    save_sparse_sdf(path, load_sparse_sdf(path), schema=1)
    summary = evaluate_dataset(None, dataset, tmp_path / "eval", num_samples=200, worst=0)
    assert (summary["n_failed"], summary["n_truth_tsdf"]) == (0, 1)
    assert "the TSDF itself was the truth of 1 of 4 shapes" in table(summary)
    assert "the TSDF itself was the truth of 1 of 4 shapes" in (tmp_path / "eval" / "report.html").read_text()
    (dataset / "metadata.csv").unlink()
    (dataset / "meshes").rename(tmp_path / "elsewhere")
    for model in (tokenizer, None):
        summary = evaluate_dataset(model, dataset, tmp_path / "eval", split="all", num_samples=200, worst=0)
        assert (summary["n"], summary["n_failed"], summary["n_truth_tsdf"]) == (5, 0, 5)
    (tmp_path / "elsewhere").rename(dataset / "meshes")
    summary = evaluate_dataset(None, dataset, tmp_path / "eval", split="all", num_samples=200, worst=0)
    assert summary["n_truth_tsdf"] == 1 and summary["dice"]["mean"] < 1
    assert "the TSDF itself was the truth of" in table(summary)


def test_a_shape_that_fails_twice_is_one(tokenizer, dataset, tmp_path, monkeypatch):
    (dataset / "meshes" / f"{'c' * 64}.ply").write_bytes(b"ply nonsense")
    monkeypatch.setattr(tokenizer, "encode", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("out of memory")))
    summary = evaluate_dataset(tokenizer, dataset, tmp_path / "eval", num_samples=500, worst=0)
    assert summary["n"] == summary["n_failed"] == summary["hd95_mm"]["n"] == 4
    assert len(read_csv(tmp_path / "eval" / "errors.csv")) == 5


def test_every_metric_has_the_figure_of_the_tsdf_beside_it(tmp_path):
    blocks = ellipsoid_blocks()
    moved = replace(blocks, block_sdf=np.clip(blocks.block_sdf + np.float16(0.25), -1, 1))
    source = SourceMask(np.ones((4, 4, 4), dtype=bool), np.zeros(3, dtype=np.int64), (8, 8, 8), np.diag([9.0, 9, 9, 1]))
    save_source_mask(tmp_path / "mask.npz", source)
    row = score_pair(Pair("s", "l", "p", blocks, moved, None, {"bits": 7.0}, tmp_path / "mask.npz"), 500, (0.5, 3.0))
    own = {name for name in row if not name.endswith("_tsdf")} - {"truth", "num_blocks", "bits", *OF_TRUTH}
    assert {f"{name}_tsdf" for name in own} == row.keys() - own - {"truth", "num_blocks", "bits", *OF_TRUTH}
    assert {"dice", "dice_blocks", "iou_source", "hd_voxels", "chamfer_squared_grid", "volume_error_ml"} <= own
    ceiling = score_pair(Pair("s", "l", "p", blocks, None, None, {}, tmp_path / "mask.npz"), 500, (0.5, 3.0))
    assert all(row[f"{name}_tsdf"] == ceiling[name] == ceiling[f"{name}_tsdf"] for name in own)
    assert row["hd_voxels"] > 2 * row["hd_voxels_tsdf"]


@pytest.mark.parametrize("placed", [True, False])
def test_worst_row_is_that_of_an_empty_reconstruction(placed):
    blocks = ellipsoid_blocks() if placed else replace(ellipsoid_blocks(), to_world=None)
    nothing = replace(blocks, block_sdf=np.ones_like(blocks.block_sdf))
    pair = Pair("s", "l", "p", blocks, nothing, None, {"bits": 7.0})
    assert score_pair(pair, 500) == score_pair(replace(pair, decoded=None, failed=True), 500)
    measured, worst = score_pair(pair, 500, (0.5, 3.0)), worst_row(pair, (0.5, 3.0))
    assert {"dice", "dice_blocks", "assd_mm", "hd95_voxels", "nsd_0.5mm", "bits", "euler_match"} <= worst.keys()
    assert worst == pytest.approx({name: measured[name] for name in worst})


def test_use_of_codes_of_each_shape(tokenizer, dataset, tmp_path):
    summary = evaluate_dataset(tokenizer, dataset, tmp_path / "eval", num_samples=500, worst=0)
    used = set()
    for row in read_csv(tmp_path / "eval" / "metrics.csv"):
        ids = tokenizer.encode(dataset / "sparse_sdf" / f"{row['sha256']}_r32.npz").ids
        share = np.unique(ids, return_counts=True)[1] / len(ids)
        assert int(row["codes_used"]) == len(share)
        assert float(row["perplexity"]) == pytest.approx(np.exp(-(share * np.log(share)).sum()))
        used |= set(ids.tolist())
    assert summary["codes_used"] == len(used), "in the summary: of all shapes together"


def test_all_broken_gives_tables_without_nan(tokenizer, dataset, tmp_path):
    for path in (dataset / "sparse_sdf").glob("*.npz"):
        path.write_bytes(b"PK")
    summary = evaluate_dataset(tokenizer, dataset, tmp_path / "eval", num_samples=500, worst=0)
    assert summary["n_failed"] == 4 and summary["dice"]["mean"] == 0 and "hd95_mm" not in summary
    assert "NaN" not in (tmp_path / "eval" / "summary.json").read_text()
    table(summary)


def test_missing_data_is_refused(tokenizer, dataset, tmp_path):
    with pytest.raises(ValueError, match="'val'"):
        evaluate_dataset(tokenizer, dataset, tmp_path / "eval", split="val")
    with pytest.raises(ValueError, match="not there"):
        evaluate_dataset(tokenizer, dataset, tmp_path / "eval", resolution=64)
    with pytest.raises(ValueError, match="resolution must be given"):
        (tmp_path / "nothing").mkdir()
        evaluate_dataset(None, tmp_path / "nothing", tmp_path / "eval")
    assert not (tmp_path / "eval").exists()


def test_perplexity_of_known_use():
    counts = CodeCounts(8)
    counts.add(np.array([1, 1, 5, 5]))
    counts.add(np.array([[7, 7], [6, 6]]))
    assert counts.figures() == {"codes_used": 4, "perplexity": pytest.approx(4.0)}
    assert CodeCounts(8).figures() == {"codes_used": 0, "perplexity": 0.0}
    assert evaluate.BASELINES == ("tsdf",)


def test_ceiling_stands_apart():
    found = {"n": 1, "n_patients": 1, "dice": {"mean": 0.5}, "dice_tsdf": {"mean": 0.9}, "iou": {"mean": 0.3}}
    assert figures_of(found, ["dice"]) == {
        "n": 1, "n_patients": 1, "dice": {"mean": 0.5}, "ceiling": {"dice": {"mean": 0.9}},
    }  # fmt: skip


class EndsItsReader:
    """Blocks whose pickle ends the process that reads it, as the system does for want of memory."""

    def __reduce__(self):
        return os._exit, (9,)


def test_a_scoring_process_that_is_ended_costs_its_shape_alone():
    good = ellipsoid_blocks()
    pairs = [Pair(f"s{i}", "l", "p", EndsItsReader() if i == 2 else good, good, None, {}) for i in range(8)]
    rows, lost = [], []
    for pair, score in score_pairs(iter(pairs), 2, 500):
        try:
            rows.append((pair.sha256, score()["dice"]))
        except RuntimeError as error:
            lost.append((pair.sha256, str(error)))
    assert rows == [(f"s{i}", 1.0) for i in (0, 1, 3, 4, 5, 6, 7)]
    assert lost == [("s2", "the process that scored it was ended, for want of memory perhaps")]
