"""Checkpoints: whole or absent, found only through a valid manifest, older ones never harmed."""

from __future__ import annotations

import errno
import json
import logging
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from trellis.config import InputError
from trellis.trainers import checkpoint as module
from trellis.trainers.checkpoint import (
    CheckpointError,
    find_checkpoint,
    load_misc,
    load_weights,
    manifest_steps,
    prune_checkpoints,
    save_checkpoint,
)


def save(run: Path, step: int, *, size: int = 1000) -> Path:
    weights = {"w": torch.arange(size, dtype=torch.float32) + step, "flag": torch.tensor(True)}
    ema = {0.999: {"w": weights["w"] * 2, "flag": weights["flag"]}}
    misc = {"step": step, "list": [1, (2, None)]}
    return save_checkpoint(run / "ckpts", "vqvae", step, weights, ema, misc, {"a": "b"})


def test_files_names_and_contents(tmp_path: Path):
    save(tmp_path, 40)
    assert sorted(p.name for p in (tmp_path / "ckpts").iterdir()) == [
        "misc_step0000040.pt", "step0000040.json", "vqvae_ema0.999_step0000040.safetensors",
        "vqvae_step0000040.safetensors",
    ]
    found = find_checkpoint(tmp_path)
    assert found is not None and found.step == 40 and found.model_name == "vqvae"
    assert load_weights(found.model)["w"][0] == 40 and load_weights(found.ema["0.999"])["w"][1] == 82
    assert load_misc(found) == {"step": 40, "list": [1, (2, None)]}


def test_latest_skips_what_is_broken_and_says_why(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step)
    folder = tmp_path / "ckpts"
    half = folder / "vqvae_step0000005.safetensors"
    half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
    flipped = bytearray((folder / "misc_step0000004.pt").read_bytes())
    flipped[len(flipped) // 2] ^= 1
    (folder / "misc_step0000004.pt").write_bytes(flipped)
    (folder / "step0000003.json").write_text('{"format": 1, "st')
    (folder / "vqvae_ema0.999_step0000002.safetensors").unlink()
    found = find_checkpoint(tmp_path)
    assert found is not None and found.step == 1
    for text in ("vqvae_step0000005.safetensors has", "SHA-256 differs", "step0000003.json: not a manifest",
                 "vqvae_ema0.999_step0000002.safetensors is missing"):
        assert text in caplog.text
    with pytest.raises(InputError, match="has .* bytes, the manifest says"):
        find_checkpoint(tmp_path, 5)
    with pytest.raises(InputError, match=r"no such checkpoint; there are steps \[5, 4, 3, 2, 1\]"):
        find_checkpoint(tmp_path, "7")
    with pytest.raises(InputError, match="latest, none or a step"):
        find_checkpoint(tmp_path, "newest")
    assert find_checkpoint(tmp_path, "none") is None


def test_files_without_a_manifest_are_no_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    save(tmp_path, 3).unlink()
    assert find_checkpoint(tmp_path) is None
    assert "misc_step0000003.pt" in caplog.text
    assert find_checkpoint(tmp_path / "nowhere") is None


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd"])
def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path, name: str):
    path = save(tmp_path, 3)
    manifest = json.loads(path.read_text())
    manifest["files"][name] = manifest["files"].pop("vqvae_step0000003.safetensors")
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="not a manifest"):
        find_checkpoint(tmp_path, 3)


@pytest.mark.parametrize("fails_at", [0, 1, 2, 3])
def test_disk_full_at_any_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int):
    save(tmp_path, 1)
    before = {p.name: p.read_bytes() for p in (tmp_path / "ckpts").iterdir()}
    opened = []
    real = module.atomic_write

    @contextmanager
    def filling_up(path):
        opened.append(path)
        with real(path) as stream:
            if len(opened) - 1 == fails_at:
                stream.write(b"half")
                raise OSError(errno.ENOSPC, "No space left on device")
            yield stream

    def filling_up_json(path, value) -> None:
        with filling_up(path) as stream:
            stream.write(json.dumps(value).encode())

    monkeypatch.setattr(module, "atomic_write", filling_up)
    monkeypatch.setattr(module, "write_json", filling_up_json)
    with pytest.raises(CheckpointError, match="step 2 was not written .*No space left.*earlier checkpoints are intact"):
        save(tmp_path, 2)
    assert {p.name: p.read_bytes() for p in (tmp_path / "ckpts").iterdir()} == before


LIMITED = """
import resource, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_checkpoint import CheckpointError, save
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
save(Path(sys.argv[1]), 1, size=1000)
try:
    save(Path(sys.argv[1]), 2, size=1_000_000)
except CheckpointError as error:
    print("said:", error)
"""


def test_a_write_that_the_system_refuses_leaves_nothing(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path), str(Path(__file__).parent)], capture_output=True, text=True,
        check=True, timeout=60,
    )
    assert "said:" in done.stdout and "earlier checkpoints are intact" in done.stdout
    assert not [p for p in (tmp_path / "ckpts").iterdir() if "0000002" in p.name or p.name.endswith(".tmp")]
    found = find_checkpoint(tmp_path)
    assert found is not None and found.step == 1


def test_no_room_is_known_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(CheckpointError, match="are needed, 0 MiB are free"):
        save(tmp_path, 1)
    assert not any((tmp_path / "ckpts").iterdir())


def test_pruning_keeps_the_newest_and_foreign_files(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "ckpts" / "notes_step0000001.txt").write_text("mine")
    prune_checkpoints(tmp_path / "ckpts", 2, 3)
    assert find_checkpoint(tmp_path, 2) and find_checkpoint(tmp_path, 3)
    assert [p.name for p in (tmp_path / "ckpts").glob("*0000001*")] == ["notes_step0000001.txt"]


def test_pruning_counts_whole_checkpoints_up_to_the_one_just_saved(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """After a newer one broke and training went on from an older one: what was just saved is not removed for it."""
    for step in (100, 120, 150, 200):
        save(tmp_path, step)
    folder = tmp_path / "ckpts"
    for step in (120, 200):
        path = folder / f"misc_step{step:07d}.pt"
        path.write_bytes(path.read_bytes()[:10])
    prune_checkpoints(folder, 1, 150)
    assert manifest_steps(folder) == [200, 150, 120]
    assert find_checkpoint(tmp_path).step == 150
    assert "step0000120.json is not whole (a file is cut)" in caplog.text


def test_a_disk_that_refuses_everything_gives_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*given, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(module, "atomic_write", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(CheckpointError, match="checkpoint of step 1 was not written .*Read-only file system"):
        save(tmp_path, 1)
    monkeypatch.undo()
    for step in (1, 2):
        save(tmp_path, step)
    monkeypatch.setattr(Path, "unlink", refuse)
    prune_checkpoints(tmp_path / "ckpts", 1, 2)  # said, no more


def test_metadata_of_weights(tmp_path: Path):
    save(tmp_path, 1)
    found = find_checkpoint(tmp_path, 1)
    assert module.weights_metadata(found.model) and module.weights_metadata(found.misc) == {}
    assert module.weights_metadata(tmp_path / "nowhere") == {}


def test_weights_that_are_none(tmp_path: Path):
    (tmp_path / "a.safetensors").write_bytes(b"\x00" * 20)
    torch.save({"a": 1}, tmp_path / "b.pt")
    torch.save({"a": slice(1)}, tmp_path / "c.pt")
    for name, message in [("a.safetensors", "not readable"), ("b.pt", "state dict of tensors"),
                          ("c.pt", "not readable"), ("d.pt", "no such")]:
        with pytest.raises(InputError, match=message):
            load_weights(tmp_path / name)
