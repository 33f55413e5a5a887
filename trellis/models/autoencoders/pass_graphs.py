"""CUDA graphs of whole passes through the network: the host starts one graph in place of several hundred kernels.

A graph runs recorded kernels on fixed addresses and sizes, and no two batches have the same sizes. So a batch is filled
up to the sizes of a graph with one more sample, of blocks without an active voxel: norms, attention and convolutions
never mix samples, so that no value of the others changes, and its gradients are zero
(`trellis.modules.sparse.levels.build_pyramid`, `padded`). A cell, an interval of block counts, has one graph; a
batch whose cell has none yet runs as it is.

All graphs record into one region of memory, since only one of them is at work at a time: the activations between a
forward pass and its backward pass live there, and any other pass overwrites them.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trellis.models.autoencoders.cuda_recorder import CudaRecorder
from trellis.models.autoencoders.pass_sizes import Filling, Sizes, capacity, cell_width, make_filling
from trellis.modules.sparse.kernels.support import on_device

logger = logging.getLogger(__name__)

MAX_GRAPHS = 32
MAX_BLOCKS = 1 << 15
"""Larger batches keep the GPU busy without graphs."""
SIGHTINGS = {True: 2, False: 16}
"""Batches of a cell before it gets its graph, in training and otherwise; twice as many before its second, and so on.

Recording takes as long as some fifty steps save: a training makes thousands, but few cohorts to encode are so large.
"""
Rows = dict[str, Tensor]
Work = Callable[[Rows, "Sizes", Sequence[Tensor]], Rows]
"""Of inputs by name [blocks, ...] with their sizes, and weights, to outputs by name [blocks, ...]."""
Split = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""Of the weights that passes are given to those that the work reads: views of them."""


class Buffers:
    """Named tensors at addresses that graphs may keep; shared by all graphs, grown for a larger one.

    Attributes:
        filled: {address: rows} that may hold something else than zero; of inputs that are masks, and of gradients.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}
        self.filled: dict[int, int] = {}

    def rows(self, name: str, count: int, like: Tensor) -> Tensor:
        """[count, ...] with the dtype, device and further sizes of `like`. Graphs hold on to what was there before."""
        kept = self._kept.get(name)
        same = kept is not None and (kept.dtype, kept.device, kept.shape[1:]) == (
            like.dtype, like.device, like.shape[1:]
        )  # fmt: skip
        if not same or len(kept) < count:
            room = count if not same else count + count // 4
            with torch.inference_mode(False):  # or only passes in that mode could write them
                kept = self._kept[name] = like.new_zeros(room, *like.shape[1:])
            self.filled[kept.data_ptr()] = 0
        return kept[:count]

    def clear_after(self, buffer: Tensor, rows: int) -> None:
        """Zeros after the first rows of a buffer, which were just written."""
        filled = self.filled[buffer.data_ptr()]
        if rows < filled:
            buffer[rows:].zero_()
        if filled <= len(buffer):  # else a graph that looks further still finds something there
            self.filled[buffer.data_ptr()] = rows


@dataclass
class Recording:
    """A recorded pass: what it reads and writes, and how to run it.

    Attributes:
        forward, backward: run it again. inputs, outputs, gradients: by name, [blocks, ...]; `gradients` of the outputs
        that have one. filling: the blocks that fill up.
    """

    size: Sizes
    filling: Filling
    inputs: Rows = field(default_factory=dict)
    outputs: Rows = field(default_factory=dict)
    gradients: Rows = field(default_factory=dict)
    forward: Callable[[], None] = lambda: None
    backward: Callable[[], None] = lambda: None

    def takes(self, batch: Sizes) -> bool:
        """Whether a batch can be filled up to this size; that takes at least one block."""
        added = self.size.blocks - batch.blocks
        if not 0 < added <= len(self.filling.coords):
            return False
        return batch.rows2 <= self.size.rows2 and batch.rows4 <= self.size.rows4 and all(
            of_batch[0] + of_filling[0] <= number and max(of_batch[1], of_filling[1]) <= longest
            for key, (number, longest) in self.size.windows.items()
            for of_batch, of_filling in [(batch.windows[key], self.filling.windows(key, added))]
        )


class PassGraphs:
    """The graphs of one model.

    Args:
        make_recorder: makes what records, when it is first needed. max_graphs: the least recently used one goes.
        max_blocks: batches with more blocks run as they are.
    """

    def __init__(
        self,
        make_recorder: Callable[[], Any] = CudaRecorder,
        max_graphs: int = MAX_GRAPHS,
        max_blocks: int = MAX_BLOCKS,
    ) -> None:
        self.make_recorder, self.max_graphs, self.max_blocks = make_recorder, max_graphs, max_blocks
        self._refused = False
        self._recorder: Any = None
        self.turn = 0
        self.clear()

    def clear(self) -> None:
        """Forget all graphs and give their memory back."""
        self.turn += 1
        self._recordings: OrderedDict[Hashable, Recording] = OrderedDict()
        self._seen: dict[Hashable, list[Sizes]] = {}
        self._made: dict[Hashable, int] = {}
        self._buffers = Buffers()
        self._fillings: dict[Hashable, Filling | None] = {}
        self._gradients: list[tuple[Tensor, list[Tensor], list[int]]] = []
        self._parts: list[tuple[list[Tensor], list[int]]] = []
        self._state: Hashable = None
        self.hits = self.misses = 0
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            recorder.release()

    def refuse(self, reason: str) -> None:
        """Give all memory back and record nothing from now on."""
        logger.warning("no CUDA graphs: %s", reason)
        self.clear()
        self._refused = True

    def __deepcopy__(self, memo: dict[int, Any]) -> PassGraphs:
        return PassGraphs(self.make_recorder, self.max_graphs, self.max_blocks)

    def __reduce__(self) -> tuple[Any, ...]:
        return PassGraphs, (self.make_recorder, self.max_graphs, self.max_blocks)

    @property
    def reserved_bytes(self) -> int:
        """Memory of the recordings, beside what PyTorch's allocator counts as allocated."""
        return 0 if self._recorder is None else self._recorder.bytes

    def run(
        self,
        key: Hashable,
        size: Sizes,
        inputs: Rows,
        function: Work,
        weights: Sequence[Tensor],
        *,
        samples: int,
        extent: int,
        train: bool,
        split: Split = list,
    ) -> Rows | None:
        """The outputs of `function` for a batch, through a graph; None where it has none (yet): call it yourself.

        Args:
            key: what else the work depends on, beside sizes: kind of pass, dtypes, switches.
            inputs: by name [blocks, ...], `coords` among them.
            function: of inputs with a sample more; must read the weights that it is given.
            weights: every tensor that it reads beside; with `train` those that require a gradient get one.
            samples, extent: of the batch, see `Topology`.
            split: what `function` gets for `weights`, each of which is handed its gradient as one.
        """
        if size.blocks == 0 or self._refused:
            return None
        if size.blocks > self.max_blocks:
            self._leave_room(size.blocks, train)
            return None
        state = tuple((w.data_ptr(), w.requires_grad) for w in weights)
        if state != self._state:
            if self._state is not None:
                self.clear()
            self._state = state
        width = cell_width(size.blocks)
        cell = (key, tuple(size.windows), samples, extent, train, width, size.blocks // width)
        recording = self._recordings.get(cell)
        if recording is None or not recording.takes(size):
            self.misses += 1
            seen = self._seen.setdefault(cell, [])
            seen.append(size)
            made = self._made.get(cell, 0)
            if len(seen) < SIGHTINGS[train] << made:
                recording = None
                self._leave_room(size.blocks, train)
                return None
            self._seen[cell] = []
            self._made[cell] = made + 1
            filling = self._filling(samples, extent, size, inputs["coords"].device)
            if filling is None:
                return None
            recording = Recording(capacity(seen, made > 0, filling), filling)
            # rehearsing takes what the batch would take as it is
            self._leave_room(size.blocks, train)
            if self._refused or not recording.takes(size):
                return None
            if not self._try_to_record(recording, cell, size, inputs, function, weights, train, split):
                return None
        else:
            self.hits += 1
        self._recordings.move_to_end(cell)
        self._recorder.follow()
        self._load(recording, size, inputs)
        if not train:
            self.turn += 1
            recording.forward()
            return {name: out[: size.blocks].clone() for name, out in recording.outputs.items()}
        trained = [w for w in weights if w.requires_grad]
        outputs = _Replay.apply(self, recording, size.blocks, *trained)
        return dict(zip(recording.outputs, outputs))

    def _leave_room(self, blocks: int, train: bool) -> None:
        """Give the graphs' memory up where a batch that runs as it is would not find enough beside it."""
        if not train or not self.reserved_bytes or not self._recordings:
            return
        most = max(r.size.blocks for r in self._recordings.values())
        needed = int(1.2 * self.reserved_bytes * blocks / most)
        if needed > self._recorder.free_bytes():
            self.refuse(f"a batch of {blocks} blocks needs about {needed / 1e9:.1f} GB, more than they leave")

    def _load(self, recording: Recording, size: Sizes, inputs: Rows) -> None:
        blocks = size.blocks
        for name, buffer in recording.inputs.items():
            buffer[:blocks].copy_(inputs[name])
            if name != "coords":  # what an earlier batch left might not be finite
                self._buffers.clear_after(buffer, blocks)
        recording.inputs["coords"][blocks:].copy_(recording.filling.coords[: recording.size.blocks - blocks])

    def _filling(self, samples: int, extent: int, size: Sizes, device: torch.device) -> Filling | None:
        place = (samples, extent, tuple(size.windows))
        if place not in self._fillings:
            self._fillings[place] = make_filling(samples, extent, list(size.windows), device)
        return self._fillings[place]

    def _try_to_record(self, *arguments: Any) -> bool:
        """`_record`, and nothing is recorded from now on where the card has no room."""
        try:
            return self._record(*arguments)
        except RuntimeError as error:
            if not _ran_out_of_memory(error):
                raise
        # outside the handler, which would keep what the failed recording held
        self.refuse("there is no room to record one")
        return False

    def _record(
        self,
        recording: Recording,
        cell: Hashable,
        batch: Sizes,
        inputs: Rows,
        function: Work,
        weights: Sequence[Tensor],
        train: bool,
        split: Split,
    ) -> bool:
        """Record the passes, rehearsed with the batch; False where the card has no room."""
        size = recording.size
        self.turn += 1  # a pass that waits for its backward pass read the buffers that are filled now
        buffers = {name: self._buffers.rows(name, size.blocks, rows) for name, rows in inputs.items()}
        recording.inputs = buffers
        self._recordings.pop(cell, None)
        if self._recorder is None:
            self._recorder = self.make_recorder()
        self._recorder.follow()
        self._load(recording, batch, inputs)
        held: dict[str, Any] = {}
        trained = [w for w in weights if w.requires_grad]
        with torch.enable_grad():
            wanted = [train and part.requires_grad for part in split(weights)]
        if train and not self._gradients:
            self._gradients = _flat_gradients(trained)
            self._parts = _parts_of(self._gradients, weights, split, wanted)

        def forward() -> None:
            # Leaves of their own in the same memory: what autograd keeps with the model's parameters belongs to the
            # stream of earlier passes, and recording must not touch another stream.
            parts = split([w.detach() for w in weights])
            leaves = [part.detach().requires_grad_(grad) for part, grad in zip(parts, wanted)]
            held["leaves"] = [leaf for leaf in leaves if leaf.requires_grad]
            with torch.set_grad_enabled(train):
                held["outputs"] = function(buffers, size, leaves)
            for name, out in held["outputs"].items():
                if name not in recording.outputs:
                    recording.outputs[name] = self._buffers.rows(f"out {name}", size.blocks, out.detach())
                recording.outputs[name].copy_(out.detach())

        def backward() -> None:
            outputs = {name: out for name, out in held["outputs"].items() if out.requires_grad}
            for name, out in outputs.items():
                if name not in recording.gradients:
                    recording.gradients[name] = self._buffers.rows(f"gradient {name}", size.blocks, out.detach())
            handed = [recording.gradients[name] for name in outputs]
            grads = torch.autograd.grad(list(outputs.values()), held["leaves"], handed, materialize_grads=True)
            for views, numbers in self._parts:
                torch._foreach_copy_(views, [grads[i] for i in numbers])

        def both() -> None:
            forward()
            if train:
                backward()
            held.clear()

        took = self._recorder.rehearse(both)
        if took > self._recorder.bytes:
            # the first is fitted closely; larger ones that come later leave room for more
            region = took if self._recorder.bytes == 0 else took + took // 2
            self._recordings.clear()
            if not self._recorder.reserve(region):
                self.refuse(f"they need {region / 1e9:.1f} GB, and as much must stay free")
                return False
        recording.forward = self._recorder.record(forward)
        if train:
            recording.backward = self._recorder.record(backward)
        held.clear()
        self._recordings[cell] = recording
        while len(self._recordings) > self.max_graphs:
            self._recordings.popitem(last=False)
        return True


def _ran_out_of_memory(error: BaseException | None) -> bool:
    """Whether that is what went wrong, or went wrong first: ending a recording that failed may fail too."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__context__
    return error is not None


def _flat_gradients(weights: Sequence[Tensor]) -> list[tuple[Tensor, list[Tensor], list[int]]]:
    """Per dtype: one flat tensor, views of it in the shapes of those weights, and their numbers."""
    groups: dict[torch.dtype, list[int]] = {}
    for number, weight in enumerate(weights):
        groups.setdefault(weight.dtype, []).append(number)
    out = []
    for numbers in groups.values():
        like = [weights[i] for i in numbers]
        flat = like[0].new_zeros(sum(w.numel() for w in like))
        out.append((flat, _views(flat, like), numbers))
    return out


def _parts_of(
    gradients: list[tuple[Tensor, list[Tensor], list[int]]], weights: Sequence[Tensor], split: Split, wanted: list[bool]
) -> list[tuple[list[Tensor], list[int]]]:
    """Per dtype: the parts of the weights' gradients, and their numbers among those that have one."""
    of_trained = {number: view for _, views, numbers in gradients for number, view in zip(numbers, views)}
    trained = iter(range(len(of_trained)))
    with torch.no_grad():
        parts = split([of_trained[next(trained)] if w.requires_grad else w.detach() for w in weights])
    groups: dict[torch.dtype, tuple[list[Tensor], list[int]]] = {}
    for number, part in enumerate(part for part, grad in zip(parts, wanted) if grad):
        views, numbers = groups.setdefault(part.dtype, ([], []))
        views.append(part)
        numbers.append(number)
    return list(groups.values())


def _views(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    return list(torch._utils._unflatten_dense_tensors(flat, like))


class _Replay(torch.autograd.Function):
    """A recorded training pass in autograd."""

    @staticmethod
    def forward(
        ctx: Any, graphs: PassGraphs, recording: Recording, blocks: int, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.graphs, ctx.recording, ctx.blocks, ctx.like = graphs, recording, blocks, weights
        graphs.turn += 1
        ctx.turn = graphs.turn
        recording.forward()
        outputs = {name: out[:blocks].clone() for name, out in recording.outputs.items()}
        ctx.mark_non_differentiable(*(out for name, out in outputs.items() if name not in recording.gradients))
        return tuple(outputs.values())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        graphs, recording, blocks = ctx.graphs, ctx.recording, ctx.blocks
        if ctx.turn != graphs.turn:
            raise RuntimeError(
                "the activations of this forward pass are gone: another pass of the model, or its own backward pass, "
                "came before this backward pass. Call backward before the model's next forward pass, or build the "
                "model with cuda_graphs=False"
            )
        graphs.turn += 1
        with on_device(recording.inputs["coords"].device):
            graphs._recorder.follow()
            for name, grad in zip(recording.outputs, grads):
                if name not in recording.gradients:
                    continue
                buffer = recording.gradients[name]
                if grad is not None:
                    buffer[:blocks].copy_(grad)
                graphs._buffers.clear_after(buffer, 0 if grad is None else blocks)
            recording.backward()
            out: list[Tensor | None] = [None] * len(ctx.like)
            for flat, _, numbers in graphs._gradients:
                for number, view in zip(numbers, _views(flat.clone(), [ctx.like[i] for i in numbers])):
                    out[number] = view
        return None, None, None, *out
