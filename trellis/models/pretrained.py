"""Weights: folders that `save_pretrained` writes, and Direct3D-S2's autoencoder weights into our model."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from trellis.models.autoencoders.ss_vqvae import SparseSDFVQVAE
from trellis.utils.io_utils import atomic_write, write_json

PREFIXES = ("module.", "vae.")
QUANTIZER = "quantizer."
CODEBOOK = "quantizer.codebook"


@dataclass(frozen=True)
class Report:
    """What became of every tensor.

    Attributes:
        loaded: names taken from the file. new: names of the model that the file does not have (the codebook).
        mismatched: lines "name: why" for tensors of the file that do not fit the model.
        fitting_config: the model arguments that the file was made with, as far as its shapes tell.
        refused: nothing was taken; `loaded` are the names that would fit.
    """

    loaded: list[str]
    new: list[str]
    mismatched: list[str]
    fitting_config: dict[str, int] = field(default_factory=dict)
    refused: bool = False

    def text(self) -> str:
        """A few lines for a person."""
        fate = "would fit" if self.refused else "loaded"
        lines = [f"{len(self.loaded)} tensors {fate}, {len(self.new)} new, {len(self.mismatched)} do not fit"]
        if self.new:
            lines.append("new: " + ", ".join(self.new))
        lines += [f"does not fit: {line}" for line in self.mismatched]
        if self.mismatched:
            lines.append(f"the file fits a config with {json.dumps(self.fitting_config)}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class PretrainedMismatch(ValueError):
    """Weights that do not fit; `report` says which and what would fit."""

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a `.ckpt` ({"vae": ...}), `.pth`/`.pt` or `.safetensors`, prefixes stripped. Nothing is unpickled
    beyond tensors and plain containers.

    Raises:
        ValueError: no such file, an unknown suffix, a damaged file, one without tensors, or one with two names for a
            tensor.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the path of a .ckpt, .pth, .pt or .safetensors file, or null")
    if path.suffix not in (".safetensors", ".ckpt", ".pth", ".pt", ".bin"):
        raise ValueError(f"{path}: weights must be .ckpt, .pth, .pt, .bin or .safetensors, got {path.suffix!r}")
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles make the loader trip over anything, UnicodeDecodeError to IndexError
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: not a readable weights file (damaged, or not only tensors): {reason}") from None
    for key in ("vae", "state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a state dict is needed, got {type(content).__name__}")
    names: dict[str, str] = {}
    for name in (name for name, value in content.items() if isinstance(value, Tensor)):
        short = _strip(name)
        if short in names:
            raise ValueError(f"{path}: a tensor must have one name, got {names[short]!r} and {name!r} for {short!r}")
        names[short] = name
    if not names:
        raise ValueError(f"{path}: holds no tensors; keys: {sorted(map(str, content))[:8]}")
    return {short: content[name] for short, name in names.items()}


def _strip(name: str) -> str:
    changed = True
    while changed:
        changed = False
        for prefix in PREFIXES:
            if name.startswith(prefix):
                name, changed = name[len(prefix) :], True
    return name


def _fitting_config(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Channels, latent size and blocks that a file's shapes tell; one value where encoder and decoder agree."""
    config: dict[str, int] = {}
    for key, of_part in (("model_channels", _channels), ("num_blocks", _count_blocks)):
        values = {f"{key}_{part}": of_part(tensors, part) for part in ("encoder", "decoder")}
        known = {name: value for name, value in values.items() if value is not None}
        if len(known) == 2 and len(set(known.values())) == 1:
            known = {key: next(iter(known.values()))}
        config |= known
    for key, name, axis in (("latent_channels", "decoder.input_layer.weight", 1), ("num_embeddings", CODEBOOK, 0)):
        if (size := _size(tensors, name, axis)) is not None:
            config[key] = size
    return config


def _channels(tensors: dict[str, Tensor], part: str) -> int | None:
    return _size(tensors, f"{part}.input_layer.weight", 0)


def _count_blocks(tensors: dict[str, Tensor], part: str) -> int | None:
    matches = (re.match(rf"{part}\.blocks\.(\d+)\.", name) for name in tensors)
    return max((int(match[1]) + 1 for match in matches if match), default=None)


def _size(tensors: dict[str, Tensor], name: str, axis: int) -> int | None:
    return tensors[name].shape[axis] if name in tensors and tensors[name].ndim > axis else None


def load_direct3d(model: SparseSDFVQVAE, path: str | Path, partial: bool = False) -> Report:
    """Load Direct3D-S2 autoencoder weights (or a VQ-VAE's own) into `model`; all that fits, or nothing.

    Only the quantizer's tensors may be absent from the file; anything else that is missing, left over or of another
    shape is a misfit. The quantizer's state goes with its codebook: a codebook without it starts it anew, and without
    a codebook that fits none of it is taken.

    Args:
        partial: load what fits and report the rest, instead of refusing.

    Raises:
        PretrainedMismatch: something does not fit and `partial` is false, or nothing fits; the model is unchanged.
        ValueError: the file cannot be read.
    """
    tensors = read_state_dict(path)
    own = model.state_dict()
    problems = {name: _misfit(name, value, own) for name, value in sorted(tensors.items())}
    if problems.get(CODEBOOK, "absent") is not None:
        state = [name for name in problems if name.startswith(QUANTIZER) and problems[name] is None]
        problems |= {name: "the state of a codebook that is not loaded" for name in state}
    loaded = [name for name, problem in problems.items() if problem is None]
    mismatched = [f"{name}: {problem}" for name, problem in problems.items() if problem is not None]
    absent = [name for name in own if name not in tensors]
    new = [name for name in absent if name.startswith(QUANTIZER)]
    mismatched += [f"{name}: not in the file" for name in absent if not name.startswith(QUANTIZER)]
    refused = bool(mismatched and not partial) or not loaded
    report = Report(loaded, new, mismatched, _fitting_config(tensors), refused)
    if refused:
        hint = " (pretrained_partial: true loads what fits)" if loaded else ""
        raise PretrainedMismatch(
            f"{path}: does not fit this model, and nothing was loaded{hint}\n{report.text()}", report
        )
    model.load_state_dict({name: tensors[name] for name in loaded}, strict=False)
    return report


def _misfit(name: str, value: Tensor, own: dict[str, Tensor]) -> str | None:
    """Why a file's tensor cannot be taken; None where it can."""
    if name not in own:
        return f"the model has no such tensor, the file's is {list(value.shape)}"
    if own[name].shape != value.shape:
        return f"the model's is {list(own[name].shape)}, the file's {list(value.shape)}"
    if not bool(torch.isfinite(value.float()).all()):
        return "the file's values are not finite"
    return None


def save_pretrained(model: SparseSDFVQVAE, folder: str | Path) -> None:
    """Write `config.json` and `model.safetensors`: a published model."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    with atomic_write(folder / "model.safetensors") as stream:
        stream.write(save(tensors))
    write_json(folder / "config.json", {"name": type(model).__name__, "args": model.config})


def from_pretrained(folder: str | Path, device: str | torch.device = "cpu") -> SparseSDFVQVAE:
    """The model of a published folder, in evaluation mode.

    Raises:
        ValueError: a missing or damaged file, or weights that do not fit the config.
    """
    folder = Path(folder)
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable model config: {error}") from None
    if not isinstance(config, dict) or config.get("name") != SparseSDFVQVAE.__name__ or "args" not in config:
        raise ValueError(f'{path}: must hold "name": "{SparseSDFVQVAE.__name__}" and "args"')
    try:
        model = SparseSDFVQVAE(**config["args"])
    except TypeError as error:
        raise ValueError(f"{path}: {error}") from None
    weights = folder / "model.safetensors"
    tensors = read_state_dict(weights)
    wrong = sorted(set(tensors) ^ set(model.state_dict()))
    if wrong:
        raise ValueError(f"{weights}: tensors do not match the config's model: {wrong[:5]}")
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{weights}: {error}") from None
    return model.to(device).eval()
