"""`pretrained_vae_path` through the training command: what it says, and how it ends, when weights fit or do not."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import save_file
from training_cases import tiny_config, train, write_config

from trellis.models.autoencoders.ss_vqvae import SparseSDFVQVAE
from trellis.trainers.checkpoint import find_checkpoint

FROM_CODEBOOK = "new: quantizer.codebook, quantizer.initialized, quantizer.unused_steps"


@pytest.fixture
def published(tmp_path: Path) -> tuple[Path, list[str]]:
    """Weights without a codebook for the model of `tiny_config`, and their names."""
    model = SparseSDFVQVAE(**tiny_config()["models"]["vqvae"]["args"])
    tensors = {name: value for name, value in model.state_dict().items() if not name.startswith("quantizer.")}
    save_file({f"vae.{name}": value for name, value in tensors.items()}, tmp_path / "published.safetensors")
    return tmp_path / "published.safetensors", sorted(tensors)


def listed(output: str) -> list[str]:
    """Names on the log line of what was loaded."""
    lines = [line.split("loaded: ", 1)[1] for line in output.splitlines() if " INFO loaded: " in line]
    assert len(lines) == 1, output
    return sorted(lines[0].split(", "))


def test_the_log_lists_what_was_loaded(tmp_path: Path, prepared: Path, published: tuple[Path, list[str]]):
    path, names = published
    config = write_config(tmp_path / "c.json", tiny_config(pretrained_vae_path=str(path)))
    code, output = train(config, prepared, tmp_path / "run", "--tryrun")
    assert code == 0, output
    assert f"pretrained weights from {path}: {len(names)} tensors loaded, 3 new, 0 do not fit" in output
    assert FROM_CODEBOOK in output and listed(output) == names


def test_a_misfit_ends_with_2_and_trains_when_a_part_may_do(
    tmp_path: Path, prepared: Path, published: tuple[Path, list[str]]
):
    path, names = published
    raw = tiny_config(pretrained_vae_path=str(path), max_steps=1)
    raw["models"]["vqvae"]["args"]["latent_channels"] = 4
    config = write_config(tmp_path / "c.json", raw)
    code, output = train(config, prepared, tmp_path / "run")
    assert code == 2 and "Traceback" not in output, output
    wrong = ["decoder.input_layer.weight", "encoder.out_layer.bias", "encoder.out_layer.weight"]
    assert "nothing was loaded (pretrained_partial: true loads what fits)" in output
    assert f"{len(names) - 3} tensors would fit, 3 new, 3 do not fit" in output
    assert all(f"does not fit: {name}: the model's is [" in output for name in wrong)
    assert '"latent_channels": 8' in output and " INFO loaded: " not in output
    assert find_checkpoint(tmp_path / "run") is None

    code, output = train(config, prepared, tmp_path / "run", "--set", "trainer.args.pretrained_partial=true")
    assert code == 0, output
    assert f"{len(names) - 3} tensors loaded, 3 new, 3 do not fit" in output
    assert listed(output) == sorted(set(names) - set(wrong))
    assert find_checkpoint(tmp_path / "run") is not None
