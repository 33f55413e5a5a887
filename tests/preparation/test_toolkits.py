"""The toolkits' commands: options, output and exit codes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from preparation_shapes import make_patients

from dataset_toolkits import build_metadata, compute_sparse_sdf, self_check
from dataset_toolkits.datasets import MedicalData

ROOT = Path(__file__).parents[2]
QUICK = ["--resolutions", "32", "--workers", "0", "--quiet"]


@pytest.mark.parametrize("module", [build_metadata, compute_sparse_sdf, MedicalData, self_check])
def test_help_shows_an_example(module, capsys):
    with pytest.raises(SystemExit) as end:
        module.main(["--help"])
    assert end.value.code == 0 and "example" in capsys.readouterr().out


def test_compute_and_merge(tmp_path, capsys):
    root, out = str(make_patients(tmp_path / "in", 3)), str(tmp_path / "out")
    assert compute_sparse_sdf.main([root, out, *QUICK]) == 0
    assert "3 shapes from 3 sources" in capsys.readouterr().out
    (tmp_path / "in" / "patient_00" / "bad.stl").write_bytes(b"")
    for rank in "01":
        code = compute_sparse_sdf.main([root, out, *QUICK, "--rank", rank, "--world_size", "2"])
        assert code == (1 if rank == "0" else 0)
    assert "build_metadata" in capsys.readouterr().out
    assert build_metadata.main([out]) == 1
    assert "3 shapes" in capsys.readouterr().out
    assert build_metadata.main([str(tmp_path)]) == 2
    assert "no preparation has been run here" in capsys.readouterr().err


def test_wrong_input_is_2(tmp_path, capsys):
    root, out = str(make_patients(tmp_path / "in", 1)), str(tmp_path / "out")
    assert compute_sparse_sdf.main([root, out, "--resolutions", "500"]) == 2
    assert "multiple of 8" in capsys.readouterr().err
    assert compute_sparse_sdf.main([str(tmp_path / "nowhere"), out]) == 2
    with pytest.raises(SystemExit) as end:
        compute_sparse_sdf.main([root])
    assert end.value.code == 2
    assert MedicalData.main([str(tmp_path / "nowhere")]) == 2


def test_listing(tmp_path, capsys):
    root = str(make_patients(tmp_path, 2))
    assert MedicalData.main([root, "--list"]) == 0
    out = capsys.readouterr().out
    assert "mesh\tpatient_01\tpatient_01/liver.stl" in out and "2 patients with 1 to 1 files each" in out
    assert MedicalData.main([root, "--patient-regex", "patient_01"]) == 1


@pytest.mark.parametrize("arguments", [[], ["only_one"]])
def test_the_script_says_how_it_is_used(arguments):
    script = ROOT / "scripts" / "prepare_medical_dataset.sh"
    done = subprocess.run(["bash", str(script), *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and "DATA_ROOT OUT" in done.stderr
