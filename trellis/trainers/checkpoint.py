"""Checkpoints of a run: written whole or not at all, found again only through a valid manifest."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from trellis.config import InputError
from trellis.utils.io_utils import atomic_write, sha256_of_file, write_json

logger = logging.getLogger(__name__)

FORMAT = 1
_MANIFEST = re.compile(r"step(\d{7,})\.json")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; earlier ones are intact."""


class NoValidCheckpoint(InputError):
    """There are manifests of checkpoints, and the files of none of them are whole."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose manifest and files are valid.

    Attributes:
        model: path of the weights; ema: {rate as written: path}; misc: path of everything else.
    """

    step: int
    model_name: str
    model: Path
    ema: dict[str, Path]
    misc: Path


def file_names(model_name: str, step: int, ema_rates: list[float]) -> dict[str, str]:
    """File names of a checkpoint: {"model": ..., "ema{rate}": ..., "misc": ...}."""
    names = {"model": f"{model_name}_step{step:07d}.safetensors"}
    names |= {f"ema{rate}": f"{model_name}_ema{rate}_step{step:07d}.safetensors" for rate in ema_rates}
    return names | {"misc": f"misc_step{step:07d}.pt"}


def save_checkpoint(
    folder: str | Path,
    model_name: str,
    step: int,
    weights: Mapping[str, torch.Tensor],
    ema: Mapping[float, Mapping[str, torch.Tensor]],
    misc: Mapping[str, Any],
    metadata: Mapping[str, Any],
) -> Path:
    """Write a checkpoint: the files, each atomically, and last the manifest with their sizes and hashes.

    Args:
        misc: tensors and plain containers only; it is read with `weights_only=True`.
        metadata: plain values that go into the weights files, as JSON under one key.

    Returns:
        The manifest's path.

    Raises:
        CheckpointError: no room, or the folder cannot be written; what was written of this step is removed.
    """
    folder = Path(folder)
    names = file_names(model_name, step, list(ema))
    manifest_path = folder / f"step{step:07d}.json"
    contents = {"model": _safetensors_bytes(weights, metadata)}
    for rate, tensors in ema.items():
        contents[f"ema{rate}"] = _safetensors_bytes(tensors, {**metadata, "ema_rate": rate})
    buffer = io.BytesIO()
    torch.save(dict(misc), buffer)
    contents["misc"] = buffer.getbuffer()
    needed = sum(len(content) for content in contents.values())
    written = [folder / name for name in names.values()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise OSError(f"{needed / 2**20:.0f} MiB are needed, {free / 2**20:.0f} MiB are free")
        manifest_path.unlink(missing_ok=True)
        for key, name in names.items():
            with atomic_write(folder / name) as stream:
                stream.write(contents[key])
        files = {
            names[key]: {"role": key, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for key, content in contents.items()
        }
        write_json(manifest_path, {"format": FORMAT, "step": step, "model": model_name, "files": files})
    except OSError as error:
        for path in [manifest_path, *written]:
            with contextlib.suppress(OSError):  # of a disk that is read-only, say
                path.unlink(missing_ok=True)
        raise CheckpointError(
            f"{folder}: the checkpoint of step {step} was not written ({error}); earlier checkpoints are intact"
        ) from error
    return manifest_path


def _safetensors_bytes(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> bytes:
    copies = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # One key: the format's writer puts several in an arbitrary order, and equal weights shall be equal files.
    return safetensors.torch.save(copies, metadata={"trellis_vqvae": json.dumps(dict(metadata), sort_keys=True)})


def manifest_steps(folder: str | Path) -> list[int]:
    """Steps that have a manifest, valid or not, newest first."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    return sorted((int(m[1]) for p in folder.iterdir() if (m := _MANIFEST.fullmatch(p.name))), reverse=True)


def read_manifest(folder: str | Path, step: int) -> Checkpoint:
    """The checkpoint of a step, its files checked against the manifest.

    Raises:
        InputError: no manifest, one that is not ours, or files that are missing, cut or altered.
    """
    folder = Path(folder)
    path = folder / f"step{step:07d}.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT or manifest["step"] != step:
            raise ValueError(f"format {manifest['format']} and step {manifest['step']}")
        model_name, files = str(manifest["model"]), dict(manifest["files"])
        roles: dict[str, Path] = {}
        for name, facts in files.items():
            if Path(name).name != name:
                raise ValueError(f"file name {name!r}")
            roles[str(facts["role"])] = folder / name
            size, digest = int(facts["bytes"]), str(facts["sha256"])
            if not (folder / name).is_file():
                raise InputError(f"{name} is missing")
            found = (folder / name).stat().st_size
            if found != size:
                raise InputError(f"{name} has {found} bytes, the manifest says {size}")
            if sha256_of_file(folder / name) != digest:
                raise InputError(f"{name} is not the file that was written (its SHA-256 differs)")
        ema = {role.removeprefix("ema"): path for role, path in roles.items() if role.startswith("ema")}
        return Checkpoint(step, model_name, roles["model"], ema, roles["misc"])
    except FileNotFoundError:
        raise InputError(f"{path}: no such checkpoint; there are steps {manifest_steps(folder) or 'none'}") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a manifest of format {FORMAT} ({error})") from None


def find_checkpoint(run_folder: str | Path, which: str | int = "latest") -> Checkpoint | None:
    """The checkpoint that `--ckpt` means.

    Args:
        run_folder: the folder that holds ckpts/.
        which: "latest" (the newest valid one; those skipped are logged with the reason), "none", or a step.

    Returns:
        None for "none", and where "latest" finds no manifest.

    Raises:
        NoValidCheckpoint: "latest" finds manifests, but no valid one; says what is wrong with each.
        InputError: a step that is not there or not valid, or text that is none of these.
    """
    folder = Path(run_folder) / "ckpts"
    if which == "none":
        return None
    if which != "latest":
        if not str(which).isdigit():
            raise InputError(f"--ckpt must be latest, none or a step, got {which!r}")
        return read_manifest(folder, int(which))
    invalid = []
    for step in manifest_steps(folder):
        try:
            found = read_manifest(folder, step)
        except InputError as error:
            invalid.append(str(error))
            continue
        for problem in invalid:
            logger.warning("skipped checkpoint: %s", problem)
        return found
    if invalid:
        raise NoValidCheckpoint(f"{folder}: there is no valid checkpoint: {'; '.join(invalid)}")
    orphans = sorted(p.name for p in folder.glob("misc_step*.pt")) if folder.is_dir() else []
    if orphans:
        logger.warning("%s: no valid checkpoint; files without a valid manifest: %s", folder, ", ".join(orphans))
    return None


def load_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file, or of a .pt/.pth/.ckpt state dict read without unpickling code.

    Raises:
        InputError: no such file, or not readable as either.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such weights file")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"{path}: not readable as weights: {error}") from None
    if not isinstance(loaded, dict) or not all(isinstance(t, torch.Tensor) for t in loaded.values()):
        raise InputError(f"{path}: must hold a state dict of tensors, got {type(loaded).__name__}")
    return loaded


def weights_metadata(path: str | Path) -> dict[str, Any]:
    """What `save_checkpoint` wrote beside the tensors; {} for a file without it, or one that cannot be read."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("trellis_vqvae", "{}")
        found = json.loads(text)
    except (OSError, ValueError, RecursionError, safetensors.SafetensorError):
        return {}
    return found if isinstance(found, dict) else {}


def load_misc(checkpoint: Checkpoint) -> dict[str, Any]:
    """Optimizer, sampler, generators and the rest of a checkpoint, on the CPU."""
    try:
        return torch.load(checkpoint.misc, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"{checkpoint.misc}: not readable: {error}") from None


def prune_checkpoints(folder: str | Path, keep_last: int, step: int) -> None:
    """Remove all but the newest `keep_last` whole checkpoints up to `step`, the one that was just saved.

    A manifest goes before its files. Checkpoints that lack a file or a part of one do not count, and stay, as do those
    of later steps. What the system refuses to remove is logged.
    """
    folder = Path(folder)
    whole = []
    for saved in manifest_steps(folder):
        path = folder / f"step{saved:07d}.json"
        if saved > step:
            continue
        try:
            files = json.loads(path.read_text(encoding="utf-8"))["files"]
            sizes = {str(name): int(facts["bytes"]) for name, facts in files.items()}
            if all((folder / name).stat().st_size == size for name, size in sizes.items()):
                whole.append((saved, path, list(sizes)))
                continue
            reason = "a file is cut"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = str(error)
        logger.warning("not pruned: %s is not whole (%s)", path, reason)
    for saved, path, names in whole[keep_last:]:
        try:
            path.unlink()
            for name in names:
                if Path(name).name == name:
                    (folder / name).unlink(missing_ok=True)
        except OSError as error:
            logger.warning("not pruned: %s: %s", path, error)
            continue
        logger.info("removed the checkpoint of step %d (keep_last = %d)", saved, keep_last)
