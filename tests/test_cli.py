"""The command line: help with an example each, exit codes, one clear line for an error, and real encode/decode."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from trellis.cli import app
from trellis.models.autoencoders.ss_vqvae import SparseSDFVQVAE
from trellis.models.pretrained import save_pretrained
from trellis.pipelines.token_files import load_tokens

COMMANDS = ["prepare", "train", "encode", "decode", "evaluate", "inspect", "doctor"]


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def box(size=(40.0, 20.0, 10.0), origin=(100.0, -50.0, 7.0)):
    corners = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], dtype=float)
    quads = np.array([[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]])
    return corners * size + origin, np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]])


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """A published model that reconstructs nothing well, but whose fields have a surface."""
    from trellis.datasets.sparse_sdf import collate, sample_from_blocks
    from trellis.geometry.sdf import mesh_to_sparse_sdf

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model = SparseSDFVQVAE(
        model_channels=64, latent_channels=8, num_blocks=1, num_embeddings=32, mlp_ratio=2.0, resolution=32
    )
    blocks = mesh_to_sparse_sdf(*box(), 32)
    model.initialize_codebook([collate([sample_from_blocks(blocks)])], seed=0)
    save_pretrained(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tokenizer": {"resolution": 32}}))
    return folder


@pytest.fixture
def mesh_file(tmp_path) -> Path:
    from trellis.utils.mesh_utils import write_mesh

    path = tmp_path / "in" / "box.stl"
    path.parent.mkdir()
    write_mesh(path, *box())
    return path


@pytest.fixture
def volume_file(tmp_path) -> Path:
    import nibabel

    data = np.zeros((30, 26, 22), dtype=np.uint8)
    data[4:20, 5:15, 3:12] = 2
    data[4:20, 15:22, 3:18] = 7
    path = tmp_path / "labels.nii.gz"
    nibabel.save(nibabel.Nifti1Image(data, np.diag([-1.5, 1.0, 2.0, 1.0])), path)
    return path


@pytest.mark.parametrize("command", [*COMMANDS, None])
def test_help(command):
    result = run(*([command] if command else []), "--help")
    assert result.exit_code == 0
    text = " ".join(result.output.split())
    if command:
        assert "xample: " in text, "each --help shows an example"
    else:
        assert all(name in text for name in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["encode"], "CKPT"),
        (["no-such-command"], "no-such-command"),
        (["decode", "x", "y", "-o", "z", "--no-such-option"], "--no-such-option"),
        (["encode", "no/such/../run", "y", "-o", "z"], "no such checkpoint"),
        (["evaluate", "one", "-o", "z"], "CKPT and DATA"),
        (["evaluate", "one", "two", "-o", "z", "--baseline", "magic"], "tsdf"),
        (["evaluate", "one", "two", "-o", "z", "--tolerances-mm", "1,-2"], "tolerances-mm"),
        (["inspect", "/no/such/file.stl"], "no such file"),
        (["prepare", "/no/such/folder", "-o", "/tmp/none"], "must be a folder"),
        (["prepare", "/no/such/folder", "-o", "/tmp/none", "--resolutions", "64,big"], "whole numbers"),
        (["prepare", "/no/such/folder"], "-o/--out"),
        (["prepare", "/no/such/folder", "-o", "/tmp/none", "--frame", "ball"], "fixed-mm:SIZE"),
        (["prepare", "/no/such/folder", "-o", "/tmp/none", "--threshold", "-5:-9"], "LOW < HIGH"),
        (["prepare", "/no/such/folder", "-o", "/tmp/none", "--spacing-mm", "1", "0", "1"], "above 0"),
        (["prepare", "/no/such/folder", "-o", "/tmp/none", "--no-such-option"], "--no-such-option"),
        (["decode", "x", "y", "-o", "z", "--like", "a.nii", "--spacing-mm", "1"], "exclude each other"),
    ],
)
def test_wrong_usage_exits_2_with_one_line(arguments, words):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert words in result.output and "Traceback" not in result.output


def test_debug_shows_the_error_itself():
    assert isinstance(run("inspect", "/no/such/file.stl", "--debug").exception, ValueError)


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_prepare_with_tables_frames_and_given_splits(tmp_path):
    for i, patient in enumerate("abc"):
        (tmp_path / "root" / patient).mkdir(parents=True)
        labels = np.zeros((16, 14, 12), dtype=np.uint8)
        labels[3 : 8 + i, 3:9, 3:9], labels[8 + i : 13, 3:9, 3:7] = 2, 7
        np.savez(tmp_path / "root" / patient / "seg.npz", volume=labels, spacing_mm=[1.0, 1.0, 2.0])
    (tmp_path / "names.txt").write_text("2 liver\n7 spleen\n")
    splits = [{"train": ["a"], "val": ["b"]}, {"train": ["b"], "val": ["a"], "test": ["c"]}]
    (tmp_path / "splits_final.json").write_text(json.dumps(splits))
    out = tmp_path / "out"
    result = run(
        "prepare", "--resolutions", "32", tmp_path / "root", "-o", out, "--workers", 0, "--label-names",
        tmp_path / "names.txt", "--frame", "patient", "--splits-file", tmp_path / "splits_final.json", "--fold", 1,
        "--keep-patient-ids", "--labels", "liver,7", "--quiet",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = rows_of(out / "metadata.csv")
    assert {row["label"] for row in rows} == {"liver", "spleen"} and {row["frame"] for row in rows} == {"patient"}
    assert {row["patient_id"]: row["split"] for row in rows} == {"a": "val", "b": "train", "c": "test"}
    assert len(rows) == 6


def test_prepare_of_intensities(tmp_path):
    folder = tmp_path / "root" / "p"
    folder.mkdir(parents=True)
    data = np.full((16, 14, 12), -1000, dtype=np.int16)
    data[3:12, 3:11, 3:9] = -150
    np.save(folder / "ct.npy", data)
    out = tmp_path / "out"
    result = run(
        "prepare", tmp_path / "root", "-o", out, "--resolutions", "32", "--workers", 0, "--threshold", "-200:300",
        "--threshold-label", "fat", "--spacing-mm", 1, 1, 2, "--frame", "fixed-mm:40", "--quiet",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    (row,) = rows_of(out / "metadata.csv")
    assert row["label"] == "fat" and row["frame"] == "fixed-mm:40"
    beyond = 2 * 50 / 850  # the surface lies where -200 is met between -150 and -1000
    box_ml = (8 + beyond) * (7 + beyond) * (5 + beyond) * 2 / 1000
    assert float(row["volume_ml"]) == pytest.approx(box_ml, rel=0.01)
    refused = run("prepare", tmp_path / "root", "-o", out, "--resolutions", "32", "--workers", 0, "--quiet")
    assert refused.exit_code == 1, "intensities without a threshold are a failure of its own"
    assert "whole numbers" in rows_of(out / "errors.csv")[0]["reason"]


def test_the_toolkit_and_the_command_have_the_same_options():
    from dataset_toolkits.compute_sparse_sdf import build_parser
    from trellis.preparation.options import prepare_parser

    def options(parser):
        return {action.dest: (action.option_strings, action.default) for action in parser._actions}

    ours, toolkit = options(prepare_parser("x", "", out_option=True, lists="commas")), options(build_parser())
    assert ours.pop("out")[0] == ["-o", "--out"] and toolkit.pop("out")[0] == []
    assert ours == toolkit
    import inspect

    from trellis.preparation.prepare import prepare_dataset

    known = set(inspect.signature(prepare_dataset).parameters) - {"split_fractions"}
    assert set(ours) - {"help"} == known - {"out"}, "whatever can be prepared can be asked for"


def test_encode_takes_the_options_of_volumes(model_folder, tmp_path):
    data = np.full((16, 14, 12), -1000, dtype=np.int16)
    data[3:12, 3:11, 3:9] = -150
    np.save(tmp_path / "ct.npy", data)
    out = tmp_path / "tokens"
    result = run(
        "encode", model_folder, tmp_path / "ct.npy", "-o", out, "--device", "cpu", "--threshold", "-200:300",
        "--threshold-label", "fat", "--spacing-mm", 1, 1, 2, "--frame", "fixed-mm:40",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    (path,) = out.iterdir()
    tokens = load_tokens(path)
    assert (tokens.label, tokens.frame, tokens.to_world[0, 0]) == ("fat", "fixed-mm:40", 40)
    assert "frame: fixed-mm:40" in run("inspect", path).output
    refused = run("encode", model_folder, tmp_path / "ct.npy", "-o", out, "--frame", "patient")
    assert refused.exit_code == 2 and "prepare them" in refused.output


def test_encode_decode_of_a_mesh(model_folder, mesh_file, tmp_path):
    tokens, meshes = tmp_path / "tokens", tmp_path / "meshes"
    result = run("encode", model_folder, mesh_file, "-o", tokens, "--device", "cpu")
    assert result.exit_code == 0, result.output
    (path,) = tokens.iterdir()
    found = load_tokens(path)
    assert path.name == f"{found.sha256}_r32.safetensors" and found.label == "box"
    np.testing.assert_allclose(found.to_world[:3, 3], [120, -40, 12], atol=1e-4)
    before = path.stat().st_mtime_ns
    again = run("encode", model_folder, mesh_file, "-o", tokens, "--device", "cpu")
    assert again.exit_code == 0 and "1 there already" in again.output and path.stat().st_mtime_ns == before
    path.write_bytes(path.read_bytes()[:-7])
    repaired = run("encode", model_folder, mesh_file, "-o", tokens, "--device", "cpu")
    assert repaired.exit_code == 0 and "1 token files written" in repaired.output
    np.testing.assert_array_equal(load_tokens(path).ids, found.ids)

    from trellis.utils.mesh_utils import read_mesh

    boxes = {}
    for file_format, space in (("stl", "LPS"), ("ply", "RAS"), ("obj", "LPS"), ("off", "LPS"), ("glb", "RAS")):
        out = meshes / file_format
        result = run("decode", model_folder, tokens, "-o", out, "--format", file_format, "--mesh-space", space)
        assert result.exit_code == 0, result.output
        (mesh_path,) = out.iterdir()
        assert mesh_path.name == f"{path.stem}.{file_format}"
        vertices = read_mesh(mesh_path).vertices
        boxes[file_format] = np.stack([vertices.min(axis=0), vertices.max(axis=0)])
    for file_format in boxes:
        np.testing.assert_allclose(boxes[file_format], boxes["stl"], atol=1e-3)


def test_decode_within_a_memory_budget(model_folder, mesh_file, tmp_path):
    from trellis.utils.mesh_utils import read_mesh

    tokens = tmp_path / "tokens"
    assert run("encode", model_folder, mesh_file, "-o", tokens, "--device", "cpu").exit_code == 0
    decode = ("decode", model_folder, tokens, "--format", "ply", "--device", "cpu")
    for folder, options in (("whole", ()), ("parts", ("--max-memory-gb", 0.5))):
        result = run(*decode, "-o", tmp_path / folder, *options)
        assert result.exit_code == 0, result.output
    whole, parts = (read_mesh(next((tmp_path / folder).iterdir())) for folder in ("whole", "parts"))
    # not vertex by vertex: a value next to 0 may round to the other side of it
    assert abs(len(parts.faces) - len(whole.faces)) <= 0.001 * len(whole.faces)
    np.testing.assert_allclose(parts.vertices.mean(axis=0), whole.vertices.mean(axis=0), atol=0.01)
    small = run(*decode, "-o", tmp_path / "small", "--max-memory-gb", 0.01)
    assert small.exit_code == 1 and "the least is 0." in small.output
    assert run(*decode, "-o", tmp_path / "none", "--max-memory-gb", 0).exit_code == 2


def test_encode_of_a_label_volume_and_back_onto_its_grid(model_folder, volume_file, tmp_path):
    import nibabel

    tokens, masks = tmp_path / "tokens", tmp_path / "masks"
    result = run("encode", model_folder, volume_file, "-o", tokens, "--device", "cpu")
    assert result.exit_code == 0, result.output
    labels = {load_tokens(path).label: path for path in tokens.iterdir()}
    assert sorted(labels) == ["2", "7"]
    one = run("encode", model_folder, volume_file, "-o", tmp_path / "one", "--labels", "7", "--device", "cpu")
    assert one.exit_code == 0 and [p.name for p in (tmp_path / "one").iterdir()] == [labels["7"].name]
    result = run("decode", model_folder, labels["2"], "-o", masks, "--format", "nii.gz", "--like", volume_file)
    assert result.exit_code == 0, result.output
    mask = nibabel.load(masks / f"{labels['2'].stem}.nii.gz")
    reference = nibabel.load(volume_file)
    assert mask.shape == reference.shape
    np.testing.assert_allclose(mask.affine, reference.affine, atol=1e-6)
    result = run("decode", model_folder, labels["2"], "-o", masks, "--format", "nii.gz", "--spacing-mm", 2)
    assert result.exit_code == 0, result.output
    np.testing.assert_allclose(np.abs(np.diag(nibabel.load(masks / f"{labels['2'].stem}.nii.gz").affine)[:3]), 2)


def test_all_shapes_of_a_patient_into_one_volume(model_folder, volume_file, tmp_path, monkeypatch):
    import nibabel

    tokens, out = tmp_path / "tokens", tmp_path / "out"
    assert run("encode", model_folder, volume_file, "-o", tokens, "--device", "cpu").exit_code == 0
    true_fields(monkeypatch, volume_file)
    refused = run("decode", model_folder, tokens, "-o", out, "--merge", "all")
    assert refused.exit_code == 2 and "--like" in refused.output
    result = run("decode", model_folder, tokens, "-o", out, "--like", volume_file)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in out.iterdir()) == ["decoded_labels.csv", "decoded_labels.nii.gz"]
    merged, source = (np.asarray(nibabel.load(p).dataobj) for p in (out / "decoded_labels.nii.gz", volume_file))
    for value in (2, 7):
        both = np.count_nonzero((merged == value) & (source == value))
        assert 2 * both / (np.count_nonzero(merged == value) + np.count_nonzero(source == value)) > 0.99
    assert (out / "decoded_labels.csv").read_text() == "value,name\n2,2\n7,7\n"
    for options in ((), ("--format", "nii.gz")):
        named = run("decode", model_folder, tokens, "-o", out / "b", "--like", volume_file, "--merge", "all", *options)
        assert named.exit_code == 0, named.output
        assert sorted(path.name for path in (out / "b").iterdir()) == ["all.csv", "all.nii.gz"]
    assert (out / "b" / "all.nii.gz").read_bytes() == (out / "decoded_labels.nii.gz").read_bytes()
    alone = run("decode", model_folder, tokens, "-o", out / "c", "--spacing-mm", 2)
    assert alone.exit_code == 0 and len(list((out / "c").glob("*_r32.nii.gz"))) == 2, "without --like a mask a shape"


def true_fields(monkeypatch, volume_file):
    """The decoder gives the TSDF that a shape of this volume has, not what an untrained network makes of it."""
    from trellis.pipelines.shape_inputs import InputOptions, sources_of
    from trellis.pipelines.tokenizer import SparseSDFTokenizer

    (source,) = sources_of([volume_file], InputOptions(resolution=32))
    fields = {shape.sha256: torch.from_numpy(shape.load().block_sdf) for shape in source.shapes()}
    monkeypatch.setattr(SparseSDFTokenizer, "decode_values", lambda self, tokens: fields[tokens.sha256])


def test_label_volumes_are_refused_where_they_would_do_harm(model_folder, volume_file, tmp_path):
    tokens = tmp_path / "tokens"
    assert run("encode", model_folder, volume_file, "-o", tokens, "--device", "cpu").exit_code == 0
    before = volume_file.read_bytes()
    decode = ("decode", model_folder, tokens, "--like", volume_file)
    over = run(*decode, "-o", volume_file.parent, "--merge", "labels")
    assert over.exit_code == 2 and "would be overwritten" in over.output and volume_file.read_bytes() == before
    mesh = run(*decode, "-o", tmp_path / "out", "--merge", "all", "--format", "stl")
    assert mesh.exit_code == 2 and "got --format stl" in mesh.output
    nobody = run(*decode, "-o", tmp_path / "out", "--patient", "p1")
    assert nobody.exit_code == 2 and "the tokens do not say whose they are" in nobody.output
    assert not (tmp_path / "out").exists()


def test_folder_of_plain_files_is_its_shapes(model_folder, mesh_file, volume_file, tmp_path):
    (mesh_file.parent / "notes.txt").write_text("not a shape")
    (mesh_file.parent / "labels.nii.gz").write_bytes(volume_file.read_bytes())
    result = run("encode", model_folder, mesh_file.parent, "-o", tmp_path / "tokens", "--device", "cpu")
    assert result.exit_code == 0 and len(list((tmp_path / "tokens").iterdir())) == 3, result.output
    empty = tmp_path / "empty"
    empty.mkdir()
    assert run("encode", model_folder, empty, "-o", tmp_path / "tokens").exit_code == 2


def test_bad_resolution_is_a_usage_error(model_folder, mesh_file, tmp_path):
    result = run("encode", model_folder, mesh_file, "-o", tmp_path / "tokens", "--resolution", "500")
    assert result.exit_code == 2 and "multiple of 8" in result.output


def test_evaluate_writes_its_tables(model_folder, mesh_file, tmp_path):
    from trellis.geometry.sdf import mesh_to_sparse_sdf
    from trellis.utils.io_utils import save_sparse_sdf
    from trellis.utils.mesh_utils import write_mesh

    data = tmp_path / "data"
    save_sparse_sdf(data / "sparse_sdf" / f"{'a' * 64}_r32.npz", mesh_to_sparse_sdf(*box(), 32))
    write_mesh(data / "meshes" / f"{'a' * 64}.ply", *box(), mesh_space="RAS")
    (data / "metadata.csv").write_text(f"sha256,label,patient_id,split,error\n{'a' * 64},box,p,test,\n")
    out = tmp_path / "eval"
    result = run("evaluate", model_folder, data, "-o", out, "--device", "cpu", "--worst", 0)
    assert result.exit_code == 0, result.output
    summary = json.loads((out / "summary.json").read_text())
    assert summary["n"] == 1 and summary["n_failed"] == 0 and 0 <= summary["dice"]["mean"] <= 1
    assert "box" in result.output and "codes used" in result.output
    baseline = run("evaluate", data, "-o", tmp_path / "tsdf", "--baseline", "tsdf", "--worst", 0)
    assert baseline.exit_code == 0
    assert json.loads((tmp_path / "tsdf" / "summary.json").read_text())["dice"]["mean"] == 1


def test_version():
    assert run("--version").output.startswith("trellis-vqvae 0.")


def test_failures_are_recorded_and_the_rest_is_done(model_folder, mesh_file, tmp_path):
    broken = tmp_path / "in" / "secretname.stl"
    broken.write_bytes(mesh_file.read_bytes()[:100])
    tokens = tmp_path / "tokens"
    result = run("encode", model_folder, broken, mesh_file, "-o", tokens, "--device", "cpu")
    assert result.exit_code == 1
    assert "secretname.stl" in result.output and "Traceback" not in result.output
    assert len(list(tokens.glob("*.safetensors"))) == 1
    with open(tokens / "errors.csv", newline="") as stream:
        (row,) = csv.DictReader(stream)
    assert row["reason"] and len(row["id"]) == 64
    assert "secretname" not in (tokens / "errors.csv").read_text()
    assert run("encode", model_folder, mesh_file, "-o", tokens, "--device", "cpu").exit_code == 0
    assert not (tokens / "errors.csv").exists()


def test_full_disk_is_a_failure_in_one_line(model_folder, mesh_file, tmp_path, monkeypatch):
    from trellis.utils import io_utils

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(io_utils.os, "fsync", full)
    result = run("encode", model_folder, mesh_file, "-o", tmp_path / "tokens", "--device", "cpu")
    assert result.exit_code == 1
    assert "box.stl: [Errno 28] No space left on device" in result.output and "Traceback" not in result.output
    assert list((tmp_path / "tokens").iterdir()) == [], "nothing half-written stays"


def test_decode_refuses_what_it_cannot_do(model_folder, mesh_file, tmp_path):
    tokens = tmp_path / "tokens"
    assert run("encode", model_folder, mesh_file, "-o", tokens, "--device", "cpu").exit_code == 0
    for options, words in (
        (["--format", "dae"], "format must be one of"),
        (["--format", "nii.gz"], "--like"),
        (["--format", "stl", "--spacing-mm", "1"], "nii.gz"),
        (["--format", "nii.gz", "--like", mesh_file], "no volume reader"),
        (["--device", "tpu"], "device must be"),
    ):
        result = run("decode", model_folder, tokens, "-o", tmp_path / "out", *options)
        assert result.exit_code == 2 and words in result.output, (options, result.output)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert run("decode", model_folder, empty, "-o", tmp_path / "out").exit_code == 2
    (tmp_path / "foreign.safetensors").write_bytes(b"solid")
    assert run("decode", model_folder, tmp_path / "foreign.safetensors", "-o", tmp_path / "out").exit_code == 1


def test_inspect_each_kind(model_folder, mesh_file, volume_file, tmp_path):
    tokens = tmp_path / "tokens"
    assert run("encode", model_folder, mesh_file, "-o", tokens, "--device", "cpu").exit_code == 0
    (token_file,) = tokens.iterdir()
    result = run("inspect", mesh_file, volume_file, token_file, model_folder, "--json")
    assert result.exit_code == 0, result.output
    facts = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert [fact["kind"] for fact in facts] == ["mesh", "volume", "tokens", "model"]
    assert facts[0]["num_faces"] == 12 and facts[0]["afterwards"]["volume_ml"] == pytest.approx(8.0, rel=1e-4)
    assert [label["label"] for label in facts[1]["labels"]] == [2, 7]
    assert facts[1]["labels"][0]["ml"] == pytest.approx(16 * 10 * 9 * 3 / 1000)
    assert facts[2]["model_hash"] == facts[3]["model_hash"]
    assert facts[0]["space"] == "LPS (the file says so)"
    untagged = tmp_path / "untagged.off"
    untagged.write_text("OFF\n4 4 0\n0 0 0\n9 0 0\n0 9 0\n0 0 9\n3 0 2 1\n3 0 1 3\n3 0 3 2\n3 1 2 3\n")
    assert "space: RAS (the file does not say: --mesh-space)" in run("inspect", untagged, "--mesh-space", "RAS").output
    text = run("inspect", volume_file).output
    assert "spacing mm: [1.5, 1, 2]" in text


def test_inspect_takes_the_options_of_prepare(mesh_file, tmp_path):
    np.save(tmp_path / "ct.npy", np.arange(-1000, 1016, dtype=np.int16).reshape(14, 12, 12))
    refused = run("inspect", tmp_path / "ct.npy", "--threshold", "-200:300")
    assert refused.exit_code == 1 and "it has no voxel spacing" in refused.output
    result = run("inspect", tmp_path / "ct.npy", "--spacing-mm", 1, 1, 2, "--threshold", "-200:300", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["spacing_mm"] == [1, 1, 2] and facts["threshold"] == "-200:300"
    # 500 of 2016 values lie within, and a voxel has 2 mm3
    assert facts["afterwards"]["volume_ml"] == pytest.approx(1.0, rel=0.05)
    open_mesh = tmp_path / "open.off"
    open_mesh.write_text("OFF\n5 5 0\n0 0 0\n9 0 0\n9 9 0\n0 9 0\n4 4 7\n3 0 1 4\n3 1 2 4\n3 2 3 4\n3 3 0 4\n3 0 2 1\n")
    assert run("inspect", open_mesh, "--max-hole-mm", 20, "--nested", "solid").exit_code == 0
    narrow = run("inspect", open_mesh, "--max-hole-mm", 2)
    assert narrow.exit_code == 1 and "refused: " in narrow.output
    assert run("inspect", mesh_file, "--max-hole-mm", -1).exit_code == 2


def test_train_takes_train_pys_options(tmp_path):
    result = run("train", "--config", tmp_path / "none.json", "--data_dir", tmp_path, "--output_dir", tmp_path / "run")
    assert result.exit_code == 2


def test_doctor_reports_and_exits(monkeypatch):
    from trellis import doctor
    from trellis.doctor import Finding, Report

    report = Report({"packages": [Finding("torch", "missing", ok=False, advice="pip install torch")]})
    monkeypatch.setattr(doctor, "examine", lambda timeout_s: report)
    result = run("doctor")
    assert result.exit_code == 1 and "pip install torch" in result.output
    assert json.loads(run("doctor", "--json").stdout)["ok"] is False


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals(number, code, tmp_path):
    """In a process of its own: a command that is stopped says so in one line and exits as shells expect."""
    program = (
        "import time, trellis.cli as cli\n"
        "@cli.app.command()\n@cli.edge\n"
        "def wait() -> int:\n    print('ready', flush=True)\n    time.sleep(60)\n    return 0\n"
        "cli.app(['wait'])\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a script behind & has it ignored
    )
    assert child.stdout.readline().strip() == "ready"
    time.sleep(0.1)
    child.send_signal(number)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == code and "Traceback" not in errors and errors.startswith("error: ")
