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

from trellis.modules.sparse.morton import slot_positions

logger = logging.getLogger(__name__)

MAX_GRAPHS = 32
MAX_BLOCKS = 1 << 15
"""Larger batches keep the GPU busy without graphs."""
WIDEST_CELL = 512
"""Blocks by which one graph's batches may differ: about 1 ms of an H100's time."""
SIGHTINGS = {True: 2, False: 16}
"""Batches of a cell before it gets its graph, in training and otherwise; twice as many before its second, and so on.

Recording takes as long as some fifty steps save: a training makes thousands, but few cohorts to encode are so large.
"""
FILL_BLOCKS = (1024, 64)
"""Blocks to fill up with: as many as a graph may need, or what a small grid holds."""

Rows = dict[str, Tensor]
Work = Callable[[Rows, "Sizes", Sequence[Tensor]], Rows]
"""Of inputs by name [blocks, ...] with their sizes, and weights, to outputs by name [blocks, ...]."""


@dataclass(frozen=True)
class Sizes:
    """Blocks of a batch, and its rows at strides 2 and 4 (0 where a pass does not read them)."""

    blocks: int
    rows2: int = 0
    rows4: int = 0

    @property
    def level_sizes(self) -> list[int]:
        """As `build_pyramid` takes them; the rows at stride 1 are a bound."""
        return [512 * self.blocks, self.rows2, self.rows4, self.blocks]


def cell_width(blocks: int) -> int:
    """Width of the cell that holds `blocks`: an eighth of its power of two, from 16 to `WIDEST_CELL`."""
    return min(WIDEST_CELL, max(16, 1 << max(0, blocks.bit_length() - 4)))


def capacity(seen: Sequence[Sizes], whole_cell: bool) -> Sizes:
    """Sizes of a graph: closely of the batches seen, or of any in their cell, with room in the rows."""
    most = max(s.blocks for s in seen)
    if not whole_cell:
        blocks = _round_up(most + 1, 32)
        rows = (max(s.rows2 for s in seen), max(s.rows4 for s in seen))
        return Sizes(blocks, *(_round_up(n, 64) for n in rows))
    width = cell_width(most)
    blocks = _round_up((most // width + 1) * width + 1, 32)
    rows = (max(s.rows2 / s.blocks for s in seen), max(s.rows4 / s.blocks for s in seen))
    return Sizes(blocks, *(_round_up(int(1.08 * r * blocks), 64) for r in rows))


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step


def filling_coords(count: int, sample: int, extent: int) -> Tensor | None:
    """int32 [count, 4] blocks of one sample in Morton order, spread out in a grid of `extent`; None if they do not fit.

    Spread, so that the attention windows that they fill are no fuller than others.
    """
    side = 1
    while side**3 < count:
        side *= 2
    for stride in (4, 2, 1):
        if side * stride <= extent:
            xyz = slot_positions(side)[:count].int() * stride
            return torch.cat([torch.full((count, 1), sample, dtype=torch.int32), xyz], 1)
    return None


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
        that have one. filling: int32 coordinates of the blocks that fill up.
    """

    size: Sizes
    filling: Tensor
    inputs: Rows = field(default_factory=dict)
    outputs: Rows = field(default_factory=dict)
    gradients: Rows = field(default_factory=dict)
    forward: Callable[[], None] = lambda: None
    backward: Callable[[], None] = lambda: None

    def takes(self, batch: Sizes) -> bool:
        """Whether a batch can be filled up to this size; that takes at least one block."""
        fits = batch.rows2 <= self.size.rows2 and batch.rows4 <= self.size.rows4
        return fits and 0 < self.size.blocks - batch.blocks <= len(self.filling)


class CudaRecorder:
    """Records on the current CUDA device, all into one region of memory."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.bytes = 0
        self._pool: Any = None
        self._keeper: Any = None

    def rehearse(self, function: Callable[[], None]) -> int:
        """Run unrecorded, which compiles kernels and makes handles and buffers, and again.

        Returns the bytes that the second run took. PyTorch's peak of allocated memory starts anew here: what an
        earlier, larger pass took is forgotten.
        """
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # memory of the stream that ran before is of no use to this one
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            function()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def reserve(self, size: int) -> bool:
        """One free segment of `size` bytes for the recordings to come; False where the card has no room.

        One segment, since each recording starts with all of it free: however their sizes differ, it does not grow.
        There is room where as much again is left, for the batches that run as they are.
        """
        self.release()
        free, _ = torch.cuda.mem_get_info()
        if free < 2.1 * size:
            return False
        self._pool = torch.cuda.graph_pool_handle()

        def fill() -> None:
            torch.empty(size, dtype=torch.uint8, device="cuda")[:1].zero_()

        self._keeper = self._capture(fill)
        return True

    def free_bytes(self) -> int:
        """What a pass outside the recordings can have."""
        kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated() - self.bytes
        return torch.cuda.mem_get_info()[0] + max(0, kept)

    def release(self) -> None:
        """Give the memory back; no recording may be left."""
        self._pool = self._keeper = None
        self.bytes = 0
        torch.cuda.empty_cache()

    def _capture(self, function: Callable[[], None]) -> torch.cuda.CUDAGraph:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        graph = torch.cuda.CUDAGraph()
        # other threads (data loading, NCCL's) may go on calling CUDA
        with torch.cuda.graph(graph, pool=self._pool, stream=self.stream, capture_error_mode="thread_local"):
            function()
        self.bytes += torch.cuda.memory_reserved() - before  # the segment, or what did not fit into it
        return graph

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """A callable that runs the kernels of `function` again."""
        return self._capture(function).replay


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
        self._fillings: dict[Hashable, Tensor | None] = {}
        self._gradients: list[tuple[Tensor, list[Tensor], list[int]]] = []
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
    ) -> Rows | None:
        """The outputs of `function` for a batch, through a graph; None where it has none (yet): call it yourself.

        Args:
            key: what else the work depends on, beside sizes: kind of pass, dtypes, switches.
            inputs: by name [blocks, ...], `coords` among them.
            function: of inputs with a sample more; must read the weights that it is given.
            weights: every tensor that it reads beside; with `train` those that require a gradient get one.
            samples, extent: of the batch, see `Topology`.
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
        cell = (key, samples, extent, train, cell_width(size.blocks), size.blocks // cell_width(size.blocks))
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
            filling = self._filling(samples, extent, inputs["coords"].device)
            if filling is None:
                return None
            recording = Recording(capacity(seen, made > 0), filling)
            if not recording.takes(size) or not self._record(recording, cell, size, inputs, function, weights, train):
                return None
        else:
            self.hits += 1
        self._recordings.move_to_end(cell)
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
            if buffer.dtype == torch.bool:
                self._buffers.clear_after(buffer, blocks)
        recording.inputs["coords"][blocks:].copy_(recording.filling[: recording.size.blocks - blocks])

    def _filling(self, samples: int, extent: int, device: torch.device) -> Tensor | None:
        place = (samples, extent)
        if place not in self._fillings:
            tables = (filling_coords(count, samples, extent) for count in FILL_BLOCKS)
            table = next((t for t in tables if t is not None), None)
            self._fillings[place] = None if table is None else table.to(device)
        return self._fillings[place]

    def _record(
        self,
        recording: Recording,
        cell: Hashable,
        batch: Sizes,
        inputs: Rows,
        function: Work,
        weights: Sequence[Tensor],
        train: bool,
    ) -> bool:
        """Record the passes, rehearsed with the batch; False where the card has no room."""
        size = recording.size
        self.turn += 1  # a pass that waits for its backward pass read the buffers that are filled now
        buffers = {name: self._buffers.rows(name, size.blocks, rows) for name, rows in inputs.items()}
        recording.inputs = buffers
        self._recordings.pop(cell, None)
        if self._recorder is None:
            self._recorder = self.make_recorder()
        self._load(recording, batch, inputs)
        held: dict[str, Any] = {}
        trained = [w for w in weights if w.requires_grad]
        if train and not self._gradients:
            self._gradients = _flat_gradients(trained)

        def forward() -> None:
            # Leaves of their own in the same memory: what autograd keeps with the model's parameters belongs to the
            # stream of earlier passes, and recording must not touch another stream.
            leaves = [w.detach().requires_grad_(train and w.requires_grad) for w in weights]
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
            for _, views, numbers in self._gradients:
                torch._foreach_copy_(views, [grads[i] for i in numbers])

        def both() -> None:
            forward()
            if train:
                backward()
            held.clear()

        took = self._recorder.rehearse(both)
        if took > self._recorder.bytes:
            # the first is fitted closely; larger ones that come later leave room for more
            wanted = took if self._recorder.bytes == 0 else took + took // 2
            self._recordings.clear()
            if not self._recorder.reserve(wanted):
                self.refuse(f"they need {wanted / 1e9:.1f} GB, and as much must stay free")
                return False
        recording.forward = self._recorder.record(forward)
        if train:
            recording.backward = self._recorder.record(backward)
        held.clear()
        self._recordings[cell] = recording
        while len(self._recordings) > self.max_graphs:
            self._recordings.popitem(last=False)
        return True


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
