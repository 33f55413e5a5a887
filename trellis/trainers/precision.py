"""Number formats of training: float32 parameters and one flat gradient, loss scaling, half-precision copies."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trellis.models.autoencoders.flat_weights import FlatWeights
from trellis.trainers.loss_scale import LossScale
from trellis.trainers.optim import skips_on_device

logger = logging.getLogger(__name__)

INITIAL_LOG_SCALE = {"inflat_all": 20.0, "amp": 16.0}
"""Start of the log2 loss scale; it falls to what the network bears within the first steps."""
AMP_GROWTH_INTERVAL = 2000
"""Finite steps in a row after which the scale of amp doubles, as in `torch.amp.GradScaler`."""
ALIGNMENT = 64
"""Numbers that a parameter's place in the flat buffers is a multiple of: kernels read 16 bytes at a time."""


def mode_on_device(mode: str | None, device: torch.device) -> str | None:
    """The mode that a device can run: half precision needs CUDA, and a CPU trains in float32 instead, saying so."""
    if device.type == "cpu" and mode in ("inflat_all", "amp"):
        logger.info("fp16_mode %s needs CUDA: training in float32 on the CPU", mode)
        return None
    return mode


class Precision:
    """What the optimizer sees of a model: float32 parameters and their gradients, each in one flat buffer.

    Modes: None is float32; "bf16" has bfloat16 activations; "amp" has half activations under a dynamic loss scale;
    "inflat_all" has half weights with float32 masters and a log2 loss scale that grows by `scale_growth` a step and
    drops by 1 on an overflow. Parameters that the model keeps in float32 (the codebook) are their own masters.

    Whether a step's gradient is finite, and so whether it counts, is decided on the device (`step`).

    Args:
        apart: names that get a flat tensor of their own, for other settings of the optimizer.

    Attributes:
        parameters: {name: float32 tensor}, views of the flat buffer. gradients: likewise, of `gradient`.
        flat: {"weights" and, where there are any, "apart": flat float32 leaf}, the same numbers as `parameters`. The
            optimizer updates these: all that are offered work number by number, and a few large tensors take the host
            far less time than hundreds. Zeros fill the gaps between parameters.
        gradient: flat float32 gradient over all of them, in that order.
        flat_weights: of the model as it computes, in its dtypes.
    """

    def __init__(
        self,
        model: nn.Module,
        mode: str | None,
        *,
        scale_growth: float = 1e-3,
        apart: Callable[[str], bool] = lambda name: False,
    ) -> None:
        self.model = model
        self.mode = mode
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        before = {name: p.detach().float() for name, p in trained.items()}
        if mode == "inflat_all":
            model.convert_to_fp16()
        elif mode is not None:
            model.set_compute_dtype({"amp": torch.float16, "bf16": torch.bfloat16}[mode])
        else:
            model.set_compute_dtype(torch.float32)
        self._shapes = {name: tensor.shape for name, tensor in before.items()}
        self._place: dict[str, tuple[str, int]] = {}
        sizes = {"weights": 0, "apart": 0}
        for name, tensor in before.items():
            group = "apart" if apart(name) else "weights"
            self._place[name] = (group, sizes[group])
            sizes[group] += -(-tensor.numel() // ALIGNMENT) * ALIGNMENT
        device = next(iter(before.values())).device
        self.gradient = torch.zeros(sum(sizes.values()), device=device)
        gradients = self.gradient.split(list(sizes.values()))
        self.flat: dict[str, Tensor] = {}
        for (group, size), gradient in zip(sizes.items(), gradients):
            if size:
                self.flat[group] = torch.zeros(size, device=device, requires_grad=True)
                self.flat[group].grad = gradient
        self._of_model: dict[str, nn.Parameter] = {}
        # Half weights and their gradients, laid out as `flat`, so that one operation converts all of them.
        self._half: dict[str, Tensor] = {}
        self._half_gradient: dict[str, Tensor] = {}
        self.parameters: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            if name not in trained:
                continue
            flat = self.flat[self.group_of(name)]
            own = self.view(name, flat.detach())
            own.copy_(before[name])
            self._of_model[name] = parameter
            if parameter.dtype == torch.float32:
                parameter.data = own
                self.parameters[name] = parameter
            else:
                group = self.group_of(name)
                if group not in self._half:
                    self._half[group] = torch.zeros(len(flat), dtype=parameter.dtype, device=device)
                    self._half_gradient[group] = torch.zeros_like(self._half[group])
                parameter.data = self.view(name, self._half[group])
                self.parameters[name] = own
            self.gradients[name] = self.view(name, flat.grad)
        # What a backward pass hands over of a parameter goes here first: a tensor of the parameter's own dtype.
        self._handed_to = {
            name: self.gradients[name] if p.dtype == torch.float32 else self.view(name, self._half_gradient[group])
            for name, p in self._of_model.items()
            for group in [self.group_of(name)]
        }
        leaves, layout = {}, {}
        for name, parameter in self._of_model.items():
            group, start = self._place[name]
            tensor = self.flat[group] if parameter.dtype == torch.float32 else self._half[group]
            leaves.setdefault((group, parameter.dtype), tensor.detach().requires_grad_())
            layout.setdefault((group, parameter.dtype), []).append((name, start, self._shapes[name]))
        self.flat_weights = FlatWeights(list(leaves.values()), list(layout.values()))
        self._of_leaves = [(leaf, self.flat[group].grad) for (group, _), leaf in leaves.items()]
        self.copy_to_model()
        self._averaged = [name for name in self.parameters if self.group_of(name) == "weights"]
        # The model's tensors stay where they are, so that this is read from the modules once and not every step.
        self._weights = {
            name: self.parameters.get(name, tensor).detach() for name, tensor in model.state_dict().items()
        }
        self.scale: LossScale | None = None
        if mode in INITIAL_LOG_SCALE:
            growth, interval = (scale_growth, 1) if mode == "inflat_all" else (1.0, AMP_GROWTH_INTERVAL)
            self.scale = LossScale(INITIAL_LOG_SCALE[mode], growth=growth, interval=interval, device=device)

    @property
    def scales_loss(self) -> bool:
        """Whether overflow is an ordinary event of this mode."""
        return self.scale is not None

    def group_of(self, name: str) -> str:
        """Which of `flat` a parameter lies in."""
        return self._place[name][0]

    def view(self, name: str, flat: Tensor) -> Tensor:
        """The part of a parameter, in its shape, of a tensor that is laid out as its group's of `flat`."""
        start, shape = self._place[name][1], self._shapes[name]
        return flat[start : start + shape.numel()].view(shape)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, scaled, to those of the model's parameters."""
        (loss if self.scale is None else loss * self.scale.factor()).backward()

    @torch.no_grad()
    def collect(self, *, first: bool) -> None:
        """Move the gradients of a micro-batch, the model's or those of `flat_weights`, into the flat float32 one.

        It is still scaled. Micro-batches add up in float32, and the next backward pass hands its gradients over, rather
        than add them one by one to those of this one.

        Args:
            first: whether it is the first of a step, which replaces what the flat gradient holds.
        """
        leaves = [(leaf, gradient) for leaf, gradient in self._of_leaves if leaf.grad is not None]
        replaced = first and sum(len(leaf) for leaf, _ in leaves) == len(self.gradient)
        if first and not replaced:
            self.gradient.zero_()
        for leaf, gradient in leaves:
            (gradient.copy_ if replaced else gradient.add_)(leaf.grad)
            leaf.grad = None
        handed = {name: p.grad for name, p in self._of_model.items() if p.grad is not None}
        full = [name for name, gradient in handed.items() if gradient.dtype == torch.float32]
        half = [name for name, gradient in handed.items() if gradient.dtype != torch.float32]
        if full:
            torch._foreach_add_([self._handed_to[name] for name in full], [handed[name] for name in full])
        if half:
            if len(half) < len(self._of_model) - len(full):
                for buffer in self._half_gradient.values():
                    buffer.zero_()
            torch._foreach_copy_([self._handed_to[name] for name in half], [handed[name] for name in half])
            for group, buffer in self._half_gradient.items():
                self.flat[group].grad.add_(buffer)
        for name in handed:
            self._of_model[name].grad = None

    def drop(self) -> None:
        """Forget what backward passes left in the model since the last `collect`."""
        for leaf in (*self._of_model.values(), *self.flat_weights.leaves):
            leaf.grad = None

    @torch.no_grad()
    def unscale(self) -> Tensor:
        """Undo the loss scale, after the sum over ranks; returns the gradient's norm, not finite after an overflow."""
        if self.scale is not None:
            self.gradient.mul_(1 / self.scale.factor())
        return torch.linalg.vector_norm(self.gradient)

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer, norm: Tensor, limit: Tensor | float) -> Tensor:
        """Clip the gradient and update the parameters, or only the loss scale where the gradient is not finite.

        Nothing waits for the device, unless the optimizer cannot be told there to skip (`skips_on_device`).

        Args:
            norm: of the gradient, from `unscale`. limit: above which the gradient is scaled down to it; may be inf.

        Returns:
            Whether the step counts: bool scalar on the device.
        """
        finite = norm.isfinite()
        if isinstance(limit, Tensor) or limit != math.inf:
            # never NaN, which would stay in the gaps between parameters
            self.gradient.mul_((limit / norm).clamp(max=1).nan_to_num(1.0))
        if skips_on_device(optimizer):
            optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
            optimizer.step()
        elif finite:
            optimizer.step()
        self.copy_to_model()
        if self.scale is not None:
            self.scale.update(finite)
        return finite

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Half weights from their masters."""
        for group, half in self._half.items():
            half.copy_(self.flat[group])

    def bytes_of_a_step(self) -> int:
        """Gradients before they are collected, and half copies of the weights, which exist during a step alone."""
        return {None: 4, "inflat_all": 2, "amp": 6, "bf16": 6}[self.mode] * self.gradient.numel()

    def weights(self, average: Tensor | None = None) -> dict[str, Tensor]:
        """The model's state with masters in place of half weights: what a checkpoint holds.

        Args:
            average: laid out as flat["weights"]; its numbers are then in the place of those.
        """
        averaged = {} if average is None else {name: self.view(name, average) for name in self._averaged}
        return {**self._weights, **averaged}

    @torch.no_grad()
    def load_weights(self, tensors: Mapping[str, Tensor], average: Tensor | None = None) -> None:
        """Take over saved weights; with `average` only the part of them that goes there.

        Raises:
            ValueError: names or shapes that are not the model's.
        """
        own = self.weights(average)
        problems = [f"missing {name}" for name in own if name not in tensors]
        problems += [f"unknown {name}" for name in tensors if name not in own]
        problems += [
            f"{name} is {list(tensors[name].shape)}, the model has {list(own[name].shape)}"
            for name in own
            if name in tensors and tensors[name].shape != own[name].shape
        ]
        if problems:
            more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
            raise ValueError(f"the weights do not fit the model: {'; '.join(problems[:8])}{more}")
        for name in own if average is None else self._averaged:
            own[name].copy_(tensors[name])
        self.copy_to_model()

    def state_dict(self) -> dict[str, Any]:
        return {"mode": self.mode, "scale": None if self.scale is None else self.scale.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the loss scale; one of another mode starts afresh."""
        if state["mode"] != self.mode:
            logger.warning("the checkpoint was trained with fp16_mode %s, this run has %s", state["mode"], self.mode)
        elif self.scale is not None:
            self.scale.load_state_dict(state["scale"] if "scale" in state else _scale_of_before(state))


def _scale_of_before(state: dict[str, Any]) -> dict[str, float]:
    """The loss scale of a checkpoint of before 26 November 2026, which kept amp's as `torch.amp.GradScaler` does."""
    if state["mode"] == "inflat_all":
        return {"log_scale": state["log_scale"], "finite_steps": 0}
    scaler = state["scaler"]
    return {"log_scale": math.log2(scaler["scale"]), "finite_steps": scaler["_growth_tracker"]}
