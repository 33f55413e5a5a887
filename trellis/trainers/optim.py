"""Optimizers and learning-rate schedules by name, their arguments checked before anything is built."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.optim import lr_scheduler as torch_schedulers

from trellis.config import InputError, Named
from trellis.utils.typed_json import check_call

OPTIMIZERS: Mapping[str, type[torch.optim.Optimizer]] = {
    name: getattr(torch.optim, name) for name in ("AdamW", "Adam", "NAdam", "RAdam", "RMSprop", "SGD", "Adagrad")
}

FUSED = ("AdamW", "Adam", "SGD")
"""Those with a fused update on CUDA."""


def linear_warmup(optimizer: torch.optim.Optimizer, warmup_steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Learning rate rising linearly over `warmup_steps`, then constant (TRELLIS's LinearWarmupLRScheduler)."""
    _at_least("warmup_steps", warmup_steps, 0)
    return torch_schedulers.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, warmup_steps)))


def warmup_cosine(
    optimizer: torch.optim.Optimizer, total_steps: int, warmup_steps: int = 0, min_ratio: float = 0.0
) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear rise over `warmup_steps`, then half a cosine down to `min_ratio` of the rate at `total_steps`."""
    _at_least("warmup_steps", warmup_steps, 0)
    _at_least("total_steps", total_steps, warmup_steps + 1)
    if not 0 <= min_ratio <= 1:
        raise ValueError(f"min_ratio must be in [0, 1], got {min_ratio}")

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
        return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))

    return torch_schedulers.LambdaLR(optimizer, factor)


SCHEDULERS: Mapping[str, Callable[..., torch.optim.lr_scheduler.LRScheduler]] = {
    "LinearWarmupLRScheduler": linear_warmup,
    "WarmupCosineLRScheduler": warmup_cosine,
    **{
        name: getattr(torch_schedulers, name)
        for name in ("CosineAnnealingLR", "StepLR", "MultiStepLR", "ExponentialLR", "PolynomialLR", "LinearLR")
    },
}


def build_optimizer(spec: Named, parameters: Mapping[str, torch.Tensor], codebook: Sequence[str]) -> Any:
    """An optimizer over named parameters. The names in `codebook` get no weight decay, which would pull codes to 0.

    Raises:
        InputError: unknown name, unknown or impossible arguments.
    """
    target = _pick(OPTIMIZERS, spec, "trainer.args.optimizer", given=("params",))
    groups = [{"params": [p for name, p in parameters.items() if name not in codebook]}]
    codes = [parameters[name] for name in parameters if name in codebook]
    if codes:
        groups.append({"params": codes, "weight_decay": 0.0})
    args = {key: tuple(value) if isinstance(value, list) else value for key, value in spec.args.items()}
    on_cuda = all(p.device.type == "cuda" for p in parameters.values())
    if on_cuda and spec.name in FUSED and not {"fused", "foreach"} & set(args):
        args["fused"] = True  # one pass over weights, gradients and moments
    return _build("trainer.args.optimizer", target, groups, args)


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a scalar on the device, the optimizer's `found_inf`, can tell its next step to change nothing.

    That is how `torch.amp.GradScaler` has fused optimizers skip a step. (SGD's momentum would start from memory that
    nobody wrote where the first step is skipped; hence Adam and AdamW alone.)
    """
    return isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)) and all(
        group.get("fused") for group in optimizer.param_groups
    )


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> list[str]:
    """Take over a saved state: moments, and the learning rate that the schedule had reached.

    What the config sets is the config's: other settings (weight decay, betas, ...) are those of `optimizer` as it was
    built, and where its learning rate is another one, the reached rate changes by the same factor.

    Returns:
        What differs, as "setting: saved -> now".
    """
    groups, changes = [], []
    for number, (saved, own) in enumerate(zip(state["param_groups"], optimizer.param_groups)):
        settings = {key: value for key, value in own.items() if key not in ("params", "lr", "initial_lr")}
        group = {**saved, **settings}
        before, now = saved.get("initial_lr", saved["lr"]), own.get("initial_lr", own["lr"])
        if before != now:
            group["lr"], group["initial_lr"] = saved["lr"] * now / before if before else now, now
        compared = [("lr", before, now)] if number == 0 else []
        compared += [(key, saved[key], settings[key]) for key in settings if key in saved]
        changes += [f"{key}: {a} -> {b}" for key, a, b in compared if a != b and key not in ("fused", "foreach")]
        groups.append(group)
    optimizer.load_state_dict({**state, "param_groups": groups + state["param_groups"][len(groups) :]})
    return list(dict.fromkeys(changes))


PROGRESS_OF_SCHEDULES = ("last_epoch", "_step_count", "_last_lr", "_is_initial", "_get_lr_called_within_step")


def load_scheduler(scheduler: Any, state: dict[str, Any]) -> list[str]:
    """Take over how far a saved schedule had come; its settings are those of `scheduler`. Returns what differs."""
    own = scheduler.state_dict()
    settings = {key: value for key, value in own.items() if key not in PROGRESS_OF_SCHEDULES}
    scheduler.load_state_dict({**state, **settings})
    return [
        f"{key}: {state[key]} -> {value}"
        for key, value in settings.items()
        if key in state and state[key] != value and key not in ("base_lrs", "lr_lambdas")
    ]


def build_scheduler(spec: Named | None, optimizer: torch.optim.Optimizer) -> Any:
    """The learning-rate schedule, stepped once a step; constant for None."""
    if spec is None:
        return torch_schedulers.LambdaLR(optimizer, lambda step: 1.0)
    target = _pick(SCHEDULERS, spec, "trainer.args.lr_scheduler", given=("optimizer", "last_epoch", "verbose"))
    return _build("trainer.args.lr_scheduler", target, optimizer, dict(spec.args))


def _pick(table: Mapping[str, Any], spec: Named, path: str, given: Sequence[str]) -> Any:
    if spec.name not in table:
        raise InputError(f"{path}.name: must be one of {', '.join(sorted(table))}, got {spec.name!r}")
    problems: list[str] = []
    check_call(table[spec.name], spec.args, f"{path}.args", problems, check_types=False, given=("self", *given))
    if problems:
        raise InputError("; ".join(problems))
    return table[spec.name]


def _build(path: str, target: Callable[..., Any], first: Any, args: dict[str, Any]) -> Any:
    try:
        return target(first, **args)
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}.args: {error}, got {args}") from None


def _at_least(name: str, value: int, minimum: int) -> None:
    if not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} must be a whole number of at least {minimum}, got {value}")
