"""Configs: strict JSON to typed dataclasses; every problem of a file is reported in one message."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from trellis.utils.io_utils import open_regular
from trellis.utils.typed_json import check_call, did_you_mean, from_json, report_unknown, show

MODEL_CLASSES = ("SparseSDFVQVAE",)
DATASET_CLASSES = ("SparseSDF",)
TRAINER_CLASSES = ("SparseSDF_VQVAETrainer",)
SEED_END = 2**63
"""The generators of PyTorch and NumPy take seeds below it, with what is added for each rank."""
_FILE_NAME_PART = re.compile(r"[A-Za-z0-9_.-]{1,128}")


class InputError(ValueError):
    """Something that the user gave is wrong; a command ends with exit code 2 and is never retried."""


class ConfigError(InputError):
    """A config that cannot be used. `problems` lists everything that is wrong with it."""

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        count = f"{len(self.problems)} problem" + ("s" if len(self.problems) > 1 else "")
        super().__init__("\n  - ".join([f"{source}: {count}", *self.problems]))


@contextmanager
def wrong_input(what: str) -> Iterator[None]:
    """Turn a ValueError about something that the user gave into an InputError, which ends a command with 2."""
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{what}: {error}") from error


@dataclass(frozen=True)
class Named:
    """A class by name and its keyword arguments: `{"name": ..., "args": {...}}`."""

    name: str
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainerArgs:
    """Arguments of the trainer; TRELLIS's names where it has one.

    A step is one optimizer step of all ranks. Intervals `i_*` count steps; null switches one off.

    Attributes:
        max_steps, max_epoch: training ends at whichever comes first; at least one is needed.
        batch_size_per_gpu: shapes per rank and step; batch_size: shapes per step over all ranks. Exactly one of them.
        batch_split: micro-batches per step; above the batch size means micro-batches of one shape.
        optimizer, lr_scheduler: see `trellis.trainers.optim`.
        ema_rate: rate or rates of the averaged copies of the weights.
        fp16_mode: "inflat_all" (half weights, float32 masters, log loss scale), "amp" (half activations, loss scale),
            "bf16" (bfloat16 activations) or null (float32).
        fp16_scale_growth: growth of the log2 loss scale a step, for inflat_all.
        grad_clip: largest gradient norm, or an AdaptiveGradClipper.
        finetune_ckpt: weights to start from, a path or {model name: path}; every tensor must fit.
        log_param_stats: RMS of every weight and gradient to TensorBoard.
        lambda_vq, lambda_commitment: weights of the codebook and commitment losses.
        lambda_extra: weight of decoded voxels outside the band, those inside it having 1.
        loss_type: "mse", "l1", or "l1_l2" (their sum).
        pretrained_vae_path: Direct3D-S2 weights to start from; they must fit unless pretrained_partial.
        codebook_init_samples: shapes that k-means initialises the codebook from; null: enough for 16 rows a code.
        num_samples: shapes in the pictures and meshes of `i_sample`.
        num_workers: loader processes per rank; null: 0 on a CPU, up to 8 on CUDA.
        max_memory_gb: device memory for a micro-batch, 1e9 bytes each; null: what is free on a CUDA device.
        keep_last: checkpoints to keep; null: all.
        seed: of the weights, the order of the shapes and everything else that is drawn.
    """

    optimizer: Named
    max_steps: int | None = None
    max_epoch: int | None = None
    batch_size_per_gpu: int | None = None
    batch_size: int | None = None
    batch_split: int = 1
    lr_scheduler: Named | None = None
    ema_rate: float | list[float] = field(default_factory=lambda: [0.9999])
    fp16_mode: Literal["inflat_all", "amp", "bf16"] | None = None
    fp16_scale_growth: float = 1e-3
    grad_clip: float | Named | None = None
    finetune_ckpt: str | dict[str, str] | None = None
    log_param_stats: bool = False
    i_print: int | None = 1000
    i_log: int | None = 500
    i_sample: int | None = 10000
    i_save: int | None = 10000
    i_ddpcheck: int | None = 10000
    lambda_vq: float = 1.0
    lambda_commitment: float = 0.25
    lambda_extra: float = 0.1
    loss_type: Literal["mse", "l1", "l1_l2"] = "mse"
    pretrained_vae_path: str | None = None
    pretrained_partial: bool = False
    codebook_init_samples: int | None = None
    num_samples: int = 4
    num_workers: int | None = None
    max_memory_gb: float | None = None
    keep_last: int | None = None
    seed: int = 0

    @property
    def ema_rates(self) -> list[float]:
        return list(self.ema_rate) if isinstance(self.ema_rate, list) else [self.ema_rate]

    def problems(self, path: str) -> list[str]:
        """Values that have the right type and break a rule."""
        found = []

        def rule(ok: bool, key: str, text: str) -> None:
            if not ok:
                found.append(f"{path}.{key}: must be {text}, got {json.dumps(getattr(self, key))}")

        positive = ["max_steps", "max_epoch", "batch_size_per_gpu", "batch_size", "batch_split", "i_print", "i_log",
                    "i_sample", "i_save", "i_ddpcheck", "keep_last", "codebook_init_samples"]
        for key in positive:
            value = getattr(self, key)
            rule(value is None or value >= 1, key, "at least 1" if key == "batch_split" else "null or at least 1")
        for key in ("lambda_vq", "lambda_commitment", "lambda_extra", "fp16_scale_growth", "num_samples", "seed"):
            rule(getattr(self, key) >= 0, key, "at least 0")
        rule(self.seed < SEED_END, "seed", "below 2**63")
        rule(self.num_workers is None or self.num_workers >= 0, "num_workers", "null or at least 0")
        rule(self.max_memory_gb is None or self.max_memory_gb > 0, "max_memory_gb", "null or above 0")
        rule(all(0 <= r < 1 for r in self.ema_rates), "ema_rate", "in [0, 1)")
        rule(len(set(self.ema_rates)) == len(self.ema_rates), "ema_rate", "without a rate given twice")
        if isinstance(self.grad_clip, (int, float)):
            rule(self.grad_clip > 0, "grad_clip", "above 0")
        if self.max_steps is None and self.max_epoch is None:
            found.append(f"{path}: max_steps or max_epoch is needed, both are null or missing")
        if (self.batch_size is None) == (self.batch_size_per_gpu is None):
            found.append(
                f"{path}: exactly one of batch_size and batch_size_per_gpu is needed, "
                f"got {self.batch_size} and {self.batch_size_per_gpu}"
            )
        return found


@dataclass(frozen=True)
class RunConfig:
    """A whole config: `models` has one entry; `raw` is the JSON that it came from, overrides included."""

    models: dict[str, Named]
    dataset: Named
    trainer_name: str
    trainer: TrainerArgs
    raw: dict[str, Any] = field(repr=False)

    @property
    def model_name(self) -> str:
        """The one entry of `models`: the name that checkpoints carry."""
        return next(iter(self.models))

    @property
    def model(self) -> Named:
        return self.models[self.model_name]


def load_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    signatures: Mapping[str, Callable[..., Any]] | None = None,
) -> RunConfig:
    """Read a config file, apply `key.path=value` overrides, and check all of it.

    Args:
        signatures: classes by the names that configs use, to check `args` of the model and dataset against.

    Raises:
        ConfigError: with every problem found.
    """
    path = Path(path)
    try:
        with open(path, encoding="utf-8", opener=open_regular) as stream:
            raw = json.load(stream, object_pairs_hook=_no_duplicates)
    except FileNotFoundError:
        raise ConfigError(str(path), ["no such file"]) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(str(path), [f"not readable as JSON: {error}"]) from None
    problems: list[str] = []
    for override in overrides:
        apply_override(raw, override, problems)
    return parse_config(raw, source=str(path), signatures=signatures, problems=problems)


def parse_config(
    raw: Any,
    *,
    source: str = "config",
    signatures: Mapping[str, Callable[..., Any]] | None = None,
    problems: list[str] | None = None,
) -> RunConfig:
    """Check a config that is already JSON; `problems` found before are reported with the new ones."""
    problems = [] if problems is None else problems
    signatures = signatures or {}
    if not isinstance(raw, dict):
        raise ConfigError(source, [*problems, f"must be a JSON object, got {type(raw).__name__}"])
    report_unknown(raw, ["models", "dataset", "trainer"], "", problems)
    models: dict[str, Named] = {}
    entries = raw.get("models")
    if not isinstance(entries, dict) or len(entries) != 1:
        problems.append(f"models: exactly one {{name: {{name, args}}}} is needed, got {show(entries)}")
    else:
        for name, entry in entries.items():
            if not _FILE_NAME_PART.fullmatch(name):
                problems.append(
                    f"models: a name becomes part of file names and must be 1 to 128 of A-Z a-z 0-9 _ . -, "
                    f"got {show(name)}"
                )
            models[name] = _named(entry, f"models.{name}", MODEL_CLASSES, problems)
    dataset = _named(raw.get("dataset"), "dataset", DATASET_CLASSES, problems)
    trainer = _named(raw.get("trainer"), "trainer", TRAINER_CLASSES, problems)
    for where, named in [*((f"models.{name}", model) for name, model in models.items()), ("dataset", dataset)]:
        if named.name in signatures:
            check_call(signatures[named.name], named.args, f"{where}.args", problems)
    args = from_json(TrainerArgs, trainer.args, "trainer.args", problems)
    if args is not None:
        problems.extend(args.problems("trainer.args"))
    if problems or args is None:
        raise ConfigError(source, problems)
    return RunConfig(models, dataset, trainer.name, args, raw)


def apply_override(raw: Any, override: str, problems: list[str]) -> None:
    """Set `a.b.c=value` in `raw`; the value is JSON, or text where it is not. A missing or null level is made."""
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        problems.append(f"--set {override}: must read key.path=value, as in trainer.args.max_steps=40")
        return
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    for depth, name in enumerate(names[:-1], start=1):
        if isinstance(raw, dict) and raw.get(name) is None:
            raw[name] = {}
        if not isinstance(raw, dict) or not isinstance(raw[name], dict):
            problems.append(f"--set {override}: {'.'.join(names[:depth])} is no object")
            return
        raw = raw[name]
    raw[names[-1]] = value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"key {twice[0]!r} is given twice in one object")
    return dict(pairs)


def _named(value: Any, path: str, names: Sequence[str], problems: list[str]) -> Named:
    found: list[str] = []
    named = from_json(Named, value, path, found)
    if named is None:
        problems.extend(found)
        return Named("", value.get("args") or {} if isinstance(value, dict) else {})
    if named.name not in names:
        close = did_you_mean(named.name, names)
        problems.append(f"{path}.name: must be one of {', '.join(names)}, got {named.name!r}{close}")
    return named
