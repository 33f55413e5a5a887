"""Number formats of training: float32 parameters and one flat gradient, loss scaling, half-precision copies."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)

INITIAL_LOG_SCALE = 20.0
"""Start of the log2 loss scale of inflat_all; it falls to what the network bears within the first steps."""
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

    Args:
        apart: names that get a flat tensor of their own, for other settings of the optimizer.

    Attributes:
        parameters: {name: float32 tensor}, views of the flat buffer. gradients: likewise, of `gradient`.
        flat: {"weights" and, where there are any, "apart": flat float32 leaf}, the same numbers as `parameters`. The
            optimizer updates these: all that are offered work number by number, and a few large tensors take the host
            far less time than hundreds. Zeros fill the gaps between parameters.
        gradient: flat float32 gradient over all of them, in that order.
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
        self.scale_growth = scale_growth
        self.log_scale = INITIAL_LOG_SCALE
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
        self.flat: dict[str, torch.Tensor] = {}
        for (group, size), gradient in zip(sizes.items(), gradients):
            if size:
                self.flat[group] = torch.zeros(size, device=device, requires_grad=True)
                self.flat[group].grad = gradient
        self._of_model: dict[str, nn.Parameter] = {}
        self._half: dict[str, torch.Tensor] = {}  # laid out as `flat`, so that one copy makes all half weights
        self.parameters: dict[str, torch.Tensor] = {}
        self.gradients: dict[str, torch.Tensor] = {}
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
                parameter.data = self.view(name, self._half[group])
                self.parameters[name] = own
            self.gradients[name] = self.view(name, flat.grad)
        self.copy_to_model()
        self._averaged = [name for name in self.parameters if self.group_of(name) == "weights"]
        # The model's tensors stay where they are, so that this is read from the modules once and not every step.
        self._weights = {
            name: self.parameters.get(name, tensor).detach() for name, tensor in model.state_dict().items()
        }
        self._scaler = torch.amp.GradScaler(device.type, enabled=mode == "amp")

    @property
    def scales_loss(self) -> bool:
        """Whether overflow is an ordinary event of this mode."""
        return self.mode in ("inflat_all", "amp")

    def group_of(self, name: str) -> str:
        """Which of `flat` a parameter lies in."""
        return self._place[name][0]

    def view(self, name: str, flat: torch.Tensor) -> torch.Tensor:
        """The part of a parameter, in its shape, of a tensor that is laid out as its group's of `flat`."""
        start, shape = self._place[name][1], self._shapes[name]
        return flat[start : start + shape.numel()].view(shape)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of `loss`, scaled."""
        if self.mode == "inflat_all":
            loss = loss * 2.0**self.log_scale
        elif self.mode == "amp":
            loss = self._scaler.scale(loss)
        loss.backward()

    @torch.no_grad()
    def collect(self) -> None:
        """After the last micro-batch: the model's gradients become the flat float32 one. It is still scaled."""
        handed = {}
        for name, parameter in self._of_model.items():
            if parameter.grad is None:
                self.gradients[name].zero_()
            else:
                handed[name] = parameter.grad
                parameter.grad = None  # so that the next backward pass hands its own over, rather than add it to zeros
        if handed:
            torch._foreach_copy_([self.gradients[name] for name in handed], list(handed.values()))

    def drop(self) -> None:
        """Forget what backward passes left in the model since the last `collect`."""
        for parameter in self._of_model.values():
            parameter.grad = None

    @torch.no_grad()
    def unscale(self, optimizer: torch.optim.Optimizer) -> torch.Tensor:
        """Undo the loss scale, after the sum over ranks; returns the gradient's norm, not finite after an overflow."""
        if self.mode == "inflat_all":
            self.gradient.mul_(2.0**-self.log_scale)
        elif self.mode == "amp":
            self._scaler.unscale_(optimizer)
        return torch.linalg.vector_norm(self.gradient)

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer, *, finite: bool) -> None:
        """Update the parameters, or only the loss scale where the gradient is not finite."""
        if self.mode == "amp":
            if finite:
                self._scaler.step(optimizer)
            self._scaler.update()
            return
        if finite:
            optimizer.step()
            self.copy_to_model()
        if self.mode == "inflat_all":
            self.log_scale += self.scale_growth if finite else -1.0

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Half weights from their masters."""
        for group, half in self._half.items():
            half.copy_(self.flat[group])

    @property
    def loss_scale(self) -> float:
        if self.mode == "inflat_all":
            return 2.0**self.log_scale
        return float(self._scaler.get_scale()) if self.mode == "amp" else 1.0

    def bytes_of_a_step(self) -> int:
        """Gradients before they are collected, and half copies of the weights, which exist during a step alone."""
        return {None: 4, "inflat_all": 2, "amp": 6, "bf16": 6}[self.mode] * self.gradient.numel()

    def weights(self, average: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """The model's state with masters in place of half weights: what a checkpoint holds.

        Args:
            average: laid out as flat["weights"]; its numbers are then in the place of those.
        """
        averaged = {} if average is None else {name: self.view(name, average) for name in self._averaged}
        return {**self._weights, **averaged}

    @torch.no_grad()
    def load_weights(self, tensors: Mapping[str, torch.Tensor], average: torch.Tensor | None = None) -> None:
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
        return {"mode": self.mode, "log_scale": self.log_scale, "scaler": self._scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the loss scale; one of another mode starts afresh."""
        if state["mode"] != self.mode:
            logger.warning("the checkpoint was trained with fp16_mode %s, this run has %s", state["mode"], self.mode)
            return
        self.log_scale = float(state["log_scale"])
        if self.mode == "amp":
            self._scaler.load_state_dict(state["scaler"])
