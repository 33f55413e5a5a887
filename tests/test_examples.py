"""The examples and the network's self-check run as they are shown, on small shapes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from trellis.models.autoencoders.ss_vqvae import SparseSDFVQVAE
from trellis.models.pretrained import save_pretrained

ROOT = Path(__file__).resolve().parents[1]


def module_of(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{Path(path).stem}", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def box_file(tmp_path) -> Path:
    from trellis.utils.mesh_utils import write_mesh

    corners = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], dtype=float) * [40, 30, 20]
    quads = np.array([[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]])
    path = tmp_path / "liver.stl"
    write_mesh(path, corners, np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]]))
    return path


def test_tsdf_of_a_mesh(box_file, capsys):
    module_of("examples/tsdf_of_a_mesh.py").main(str(box_file), "64")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("repairs: ")
    assert float(lines[-1].split()[1].rstrip(",")) > 0.999


def test_encode_decode(box_file, tmp_path, capsys):
    from trellis.pipelines.tokenizer import SparseSDFTokenizer

    torch.manual_seed(0)
    model = SparseSDFVQVAE(model_channels=64, latent_channels=8, num_blocks=1, num_embeddings=32, mlp_ratio=2.0)
    # fields of an untrained network: a little inside, so that there is a surface
    torch.nn.init.constant_(model.decoder.out_layer.bias, -0.01)
    save_pretrained(model, tmp_path / "model")
    tokenizer = SparseSDFTokenizer(model, resolution=32)
    tokenizer.save_pretrained(tmp_path / "model")
    module_of("examples/encode_decode.py").main(str(tmp_path / "model"), str(box_file), str(tmp_path / "out"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["shape.safetensors", "shape.stl"]
    assert "codebook of 32" in capsys.readouterr().out


def test_self_check_of_the_network(monkeypatch, capsys):
    script = module_of("scripts/test_model_forward.py")
    monkeypatch.setattr(script, "RESOLUTION", 32)
    monkeypatch.setattr(script.sys, "argv", ["test_model_forward.py", "--device", "cpu"])
    assert script.main() == 0
    out = capsys.readouterr().out
    assert out.count("ok  ") == 8 and "FAIL" not in out


def test_self_check_can_fail(capsys):
    check = module_of("scripts/test_model_forward.py").Checks()
    check("a thing", True)
    check("another", False)
    assert check.failed == 1 and "FAIL another" in capsys.readouterr().out
