"""From what a user calls a checkpoint (run folder, file, published folder, hub id) to a model with its weights."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from trellis.models.autoencoders.ss_vqvae import SparseSDFVQVAE
from trellis.models.pretrained import read_state_dict
from trellis.trainers.checkpoint import Checkpoint, find_checkpoint, manifest_steps, read_manifest, weights_metadata

logger = logging.getLogger(__name__)

PUBLISHED_FILES = ("config.json", "model.safetensors")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_MANIFEST = re.compile(r"step(\d{7,})\.json")
_WEIGHTS = re.compile(r"(?P<model>.+?)(_ema[\d.e-]+)?_step\d{7,}\.safetensors")


@dataclass(frozen=True)
class ModelSource:
    """Where a model's weights and arguments are.

    Attributes:
        weights: a safetensors file; args: the model's arguments; resolution: what it was trained at, None if unsaid.
        what: one line for a person, such as "step 4000, EMA 0.999".
    """

    weights: Path
    args: dict[str, Any]
    resolution: int | None
    what: str


def load_model(source: str | Path, *, ema: bool = True) -> tuple[nn.Module, int | None]:
    """The model of a checkpoint on the CPU in evaluation mode, and the resolution that it was trained at.

    Args:
        source: a run folder, a weights file or manifest in one, a published folder, or a hub id.
        ema: of a run folder, the averaged weights; False: those of the last step.

    Raises:
        ValueError: nothing there, an incomplete or damaged checkpoint, or weights that do not fit their config.
    """
    found = find_model(source, ema=ema)
    try:
        model = SparseSDFVQVAE(**found.args)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{found.weights}: its config does not make a model: {error}") from None
    tensors, own = read_state_dict(found.weights), model.state_dict()
    problems = [f"{name} is missing" for name in sorted(set(own) - set(tensors))]
    problems += [f"{name} is unknown" for name in sorted(set(tensors) - set(own))]
    problems += [
        f"{name} is {list(tensors[name].shape)} and should be {list(own[name].shape)}"
        for name in sorted(set(own) & set(tensors))
        if tensors[name].shape != own[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(f"{found.weights}: does not fit its config: {'; '.join(problems[:4])}{more}")
    model.load_state_dict(tensors)
    logger.info("model: %s", found.what)
    return model.eval(), found.resolution


def find_model(source: str | Path, *, ema: bool = True) -> ModelSource:
    """Where the model of `source` is; see `load_model`."""
    path = Path(source)
    if path.is_dir():
        if (path / "ckpts").is_dir():
            return _of_run(path, ema)
        if manifest_steps(path) and (path.parent / "config.json").is_file():
            return _of_run(path.parent, ema)
        if all((path / name).is_file() for name in PUBLISHED_FILES):
            return _published(path)
        raise ValueError(
            f"{path}: not a checkpoint: a run folder has config.json and ckpts/, a published model has "
            f"{' and '.join(PUBLISHED_FILES)}"
        )
    if path.is_file():
        return _of_file(path, ema)
    if isinstance(source, str) and _HUB_ID.fullmatch(source):
        return _published(_download(source))
    raise ValueError(f"{source}: no such checkpoint: give a run folder, a weights file, a published folder or a hub id")


def _of_run(folder: Path, ema: bool) -> ModelSource:
    checkpoint = find_checkpoint(folder, "latest")
    if checkpoint is None:
        raise ValueError(f"{folder}: the run has no valid checkpoint (no manifest in ckpts/ whose files are whole)")
    return _of_checkpoint(folder, checkpoint, ema)


def _of_checkpoint(folder: Path, checkpoint: Checkpoint, ema: bool) -> ModelSource:
    weights, what = checkpoint.model, f"step {checkpoint.step}"
    if ema and checkpoint.ema:
        rate = max(checkpoint.ema, key=float)
        weights, what = checkpoint.ema[rate], f"{what}, averaged weights (EMA {rate})"
    return _of_weights(weights, folder / "config.json", checkpoint.model_name, what)


def _of_file(path: Path, ema: bool) -> ModelSource:
    if match := _MANIFEST.fullmatch(path.name):
        return _of_checkpoint(path.parent.parent, read_manifest(path.parent, int(match[1])), ema)
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path}: a weights file must be .safetensors, got {path.suffix or 'no suffix'!r} "
            "(other weights become a model by training from them: pretrained_vae_path in the config)"
        )
    if match := _WEIGHTS.fullmatch(path.name):
        for config in (path.parent.parent / "config.json", path.parent / "config.json"):
            if config.is_file():
                return _of_weights(path, config, match["model"], path.name)
    config = path.parent / "config.json"
    if not config.is_file():
        raise ValueError(f"{path}: its config.json is neither beside it nor in the run folder above it")
    return _published(path.parent, path)


def _published(folder: Path, weights: Path | None = None) -> ModelSource:
    path = folder / "config.json"
    config = _read_json(path)
    args = config.get("args")
    if config.get("name") != SparseSDFVQVAE.__name__ or not isinstance(args, dict):
        raise ValueError(f'{path}: must hold "name": "{SparseSDFVQVAE.__name__}" and "args"')
    extra = config.get("tokenizer")
    resolution = extra.get("resolution") if isinstance(extra, dict) else None
    return ModelSource(weights or folder / "model.safetensors", args, resolution, f"published model in {folder}")


def _of_weights(weights: Path, config_path: Path, model_name: str, what: str) -> ModelSource:
    """A weights file of a run: as it says itself, else as the run's config.json, which a later start may change."""
    config, own = _read_json(config_path), weights_metadata(weights)
    if isinstance(own.get("args"), dict):
        source, name, args = f"{weights}: class in its metadata", own.get("class"), own["args"]
    else:
        source, (name, args) = f"{config_path}: models.{model_name}.name", _model_of(config, config_path, model_name)
    if name != SparseSDFVQVAE.__name__:
        raise ValueError(f"{source} must be {SparseSDFVQVAE.__name__}, got {name!r}")
    return ModelSource(weights, args, own.get("resolution", _resolution_of(config)), what)


def _model_of(config: dict[str, Any], path: Path, model_name: str) -> tuple[Any, dict[str, Any]]:
    """Class name and arguments of a model in a run's config.json."""
    try:
        model = config["models"][model_name]
        name, args = model["name"], model.get("args", {})
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{path}: holds no model {model_name!r} (models.{model_name}.name and .args)") from None
    if not isinstance(args, dict):
        raise ValueError(f"{path}: models.{model_name}.args must be an object, got {type(args).__name__}")
    return name, args


def _resolution_of(config: dict[str, Any]) -> int | None:
    dataset = config.get("dataset")
    return dataset.get("args", {}).get("resolution") if isinstance(dataset, dict) else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file, and the model's arguments stand in it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(value).__name__}")
    return value


def _download(hub_id: str) -> Path:
    """A hub repository's published files in the local cache."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(f"{hub_id}: no such path here, and a hub id needs: pip install huggingface_hub") from None
    logger.info("%s is no path here; asking the hub for it", hub_id)
    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=list(PUBLISHED_FILES)))
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{hub_id}: no such path here, and the hub did not give it: {reason}") from None
    missing = [name for name in PUBLISHED_FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{hub_id}: the hub's repository has no {' and no '.join(missing)}")
    return folder
