"""From a config to a trainer that is ready to run: dataset, model, starting weights, checkpoint."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trellis.config import InputError, RunConfig, TrainerArgs, load_config, wrong_input
from trellis.datasets.sparse_sdf import SparseSDF
from trellis.models.autoencoders.ss_vqvae import SparseSDFVQVAE
from trellis.trainers.base import Trainer
from trellis.trainers.checkpoint import (
    Checkpoint,
    NoValidCheckpoint,
    find_checkpoint,
    load_weights,
    manifest_steps,
    weights_metadata,
)
from trellis.trainers.logs import writing
from trellis.trainers.random_state import seed_everything
from trellis.trainers.vae.sparse_sdf_vqvae import SparseSDFVQVAEObjective
from trellis.utils.dist_utils import Ranks, gather_objects
from trellis.utils.io_utils import atomic_write, write_json

logger = logging.getLogger(__name__)

CLASSES: dict[str, Callable[..., Any]] = {"SparseSDFVQVAE": SparseSDFVQVAE, "SparseSDF": SparseSDF}
"""What configs name, to build it and to check its arguments."""


@dataclass(frozen=True)
class RunOptions:
    """The options of one run; see train.py for what each means."""

    config: str
    output_dir: str
    data_dir: str
    load_dir: str | None = None
    ckpt: str = "latest"
    overrides: tuple[str, ...] = ()
    device: str | None = None
    tryrun: bool = False
    profile: bool = False


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """`load_config` with the arguments of the model and dataset checked against their classes."""
    return load_config(path, overrides, signatures=CLASSES)


def choose_checkpoint(options: RunOptions) -> Checkpoint | None:
    """The checkpoint to go on from.

    Raises:
        InputError: one was asked for that is not there, or going on would mix two histories in the output folder.
    """
    output, source = Path(options.output_dir), Path(options.load_dir or options.output_dir)
    try:
        checkpoint = find_checkpoint(source, options.ckpt)
    except NoValidCheckpoint as error:
        raise InputError(
            f"--ckpt {options.ckpt}: {error}. Restore these files, or start anew: --ckpt none and another --output_dir"
        ) from None
    if checkpoint is None and options.load_dir is not None and options.ckpt != "none":
        raise InputError(f"--load_dir {source}: there is no valid checkpoint in {source / 'ckpts'}")
    step = -1 if checkpoint is None else checkpoint.step
    later = [s for s in manifest_steps(output / "ckpts") if s > step]
    if later and (options.ckpt != "latest" or source.resolve() != output.resolve()):
        where = f"--ckpt {options.ckpt}" if options.load_dir is None else f"--load_dir {source} --ckpt {options.ckpt}"
        raise InputError(
            f"{where}: {output} holds checkpoints of later steps {sorted(later)}, which a new history must not be "
            "mixed with; to go on from these drop both options, else give another --output_dir, or remove them"
        )
    return checkpoint


def build_trainer(options: RunOptions, ranks: Ranks, device: torch.device) -> Trainer:
    """Everything that a run needs, checked and loaded; nothing is run.

    Raises:
        InputError: config, data, weights or checkpoint are not as they must be.
        OutputError: the output folder cannot be written.
    """
    config = read_config(options.config, options.overrides)
    args = config.trainer
    with wrong_input("dataset"):
        dataset = SparseSDF(options.data_dir, **config.dataset.args)
    logger.info("%d shapes at resolution %s", len(dataset), config.dataset.args["resolution"])
    seed_everything(args.seed)
    with wrong_input(f"models.{config.model_name}.args"):
        model = CLASSES[config.model.name](**config.model.args)
    checkpoint = choose_checkpoint(options)
    _check_ranks_found_the_same(checkpoint, options)
    if checkpoint is None:
        load_starting_weights(model, config)
    model.to(device)
    output = Path(options.output_dir)
    objective = SparseSDFVQVAEObjective(model, args, device=device, speaks=ranks.is_first)
    metadata = {
        "class": config.model.name, "args": config.model.args, "model": config.model_name,
        "resolution": config.dataset.args["resolution"],
    }  # fmt: skip
    trainer = Trainer(
        args, objective, config.model_name, model, dataset, output, ranks=ranks, device=device, metadata=metadata
    )
    if checkpoint is not None:
        if checkpoint.model_name != config.model_name:
            raise InputError(f"the checkpoint is of model {checkpoint.model_name!r}, not {config.model_name!r}")
        _check_same_network(checkpoint, config)
        trainer.load(checkpoint)
        logger.info("going on from step %d of %s", checkpoint.step, checkpoint.model.parent)
    only_tried = (options.tryrun or options.profile) and bool(manifest_steps(output / "ckpts"))
    if ranks.is_first and not only_tried:  # what a run's checkpoints are read with stays as it was trained
        _write_run_files(output, config, model)
    return trainer


def _check_ranks_found_the_same(checkpoint: Checkpoint | None, options: RunOptions) -> None:
    """InputError where ranks go on from different steps, as without one folder that all of them see."""
    steps = gather_objects(None if checkpoint is None else checkpoint.step)
    if len(set(steps)) > 1:
        found = ", ".join(f"rank {rank}: {'none' if step is None else step}" for rank, step in enumerate(steps))
        folder = options.load_dir or options.output_dir
        raise InputError(
            f"{folder}: ranks found checkpoints of different steps ({found}); it must be one folder that all see"
        )


SHAPELESS_ARGUMENTS = ("window_size", "num_heads", "num_head_channels", "qk_rms_norm")
"""Of the model: with other values the same weights fit and compute something else."""


def _check_same_network(checkpoint: Checkpoint, config: RunConfig) -> None:
    """InputError where the config's model would compute something else with the checkpoint's weights."""
    saved = weights_metadata(checkpoint.model).get("args")
    if not isinstance(saved, dict):
        return
    defaults = inspect.signature(CLASSES[config.model.name]).parameters
    for name in SHAPELESS_ARGUMENTS:
        before, now = (args.get(name, defaults[name].default) for args in (saved, config.model.args))
        if before != now:
            raise InputError(
                f"models.{config.model_name}.args.{name} must stay {json.dumps(before)}, with which "
                f"{checkpoint.model} was trained, got {json.dumps(now)}"
            )


def load_starting_weights(model: nn.Module, config: RunConfig) -> None:
    """`finetune_ckpt` or `pretrained_vae_path`, where one is given.

    Raises:
        InputError: both are given, no such file, or it does not fit.
    """
    args = config.trainer
    if args.finetune_ckpt is not None and args.pretrained_vae_path is not None:
        raise InputError("trainer.args: finetune_ckpt and pretrained_vae_path are two sources of weights, give one")
    if args.finetune_ckpt is not None:
        path = _finetune_path(args, config.model_name)
        tensors = load_weights(path)
        with wrong_input(f"trainer.args.finetune_ckpt {path}"):
            _load_exactly(model, tensors)
        logger.info("weights from %s: all %d tensors", path, len(tensors))
    elif args.pretrained_vae_path is not None:
        _load_pretrained(model, args)


def _finetune_path(args: TrainerArgs, model_name: str) -> str:
    if isinstance(args.finetune_ckpt, dict):
        if list(args.finetune_ckpt) != [model_name]:
            raise InputError(f"trainer.args.finetune_ckpt must name {model_name!r}, got {sorted(args.finetune_ckpt)}")
        return args.finetune_ckpt[model_name]
    assert args.finetune_ckpt is not None
    return args.finetune_ckpt


def _load_exactly(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise ValueError(str(error)) from None


def _load_pretrained(model: nn.Module, args: TrainerArgs) -> None:
    from trellis.models.pretrained import load_direct3d

    path = Path(args.pretrained_vae_path or "")
    with wrong_input("trainer.args.pretrained_vae_path"):
        report = load_direct3d(model, path, partial=args.pretrained_partial)
    logger.info("pretrained weights from %s: %s", path, report.text())
    logger.info("loaded: %s", ", ".join(report.loaded))


def _write_run_files(output: Path, config: RunConfig, model: nn.Module) -> None:
    path = output / "config.json"
    if path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            before = None
        changed = differing_keys(before, config.raw)
        if changed:
            logger.warning("the config differs from that of the run so far: %s", ", ".join(changed))
    summary = output / f"{config.model_name}_model_summary.txt"
    with writing(path):
        write_json(path, config.raw)
    with writing(summary), atomic_write(summary) as stream:
        stream.write(model_summary(config.model.name, model).encode())


def differing_keys(a: Any, b: Any, path: str = "") -> list[str]:
    """Dotted keys whose values differ between two JSON values."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [key for key in [*a, *b] if a.get(key) != b.get(key)]
        return [
            found for key in dict.fromkeys(keys) for found in differing_keys(a.get(key), b.get(key), f"{path}.{key}")
        ]
    return [] if a == b else [path.lstrip(".") or "everything"]


def model_summary(name: str, model: nn.Module) -> str:
    """A table of parameters and buffers with shapes, and their totals per top-level module."""
    lines = [name, "", f"{'name':<72} {'shape':<20} {'numbers':>12}"]
    totals: dict[str, int] = {}
    trained = dict(model.named_parameters())
    for key, tensor in model.state_dict().items():
        kind = "" if key in trained and trained[key].requires_grad else "  (not trained)"
        lines.append(f"{key:<72} {str(list(tensor.shape)):<20} {tensor.numel():>12,}{kind}")
        totals[key.split(".")[0]] = totals.get(key.split(".")[0], 0) + tensor.numel()
    lines += ["", *(f"{part:<72} {'':<20} {count:>12,}" for part, count in totals.items())]
    count = sum(p.numel() for p in trained.values() if p.requires_grad)
    return "\n".join([*lines, f"{'trained parameters':<72} {'':<20} {count:>12,}", ""])
