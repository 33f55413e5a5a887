"""Sizes that a recorded pass has room for, and the blocks that fill a batch up to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trellis.modules.sparse.morton import slot_positions
from trellis.modules.sparse.plans import WindowSizes

WIDEST_CELL = 512
"""Blocks by which one graph's batches may differ: about 1 ms of an H100's time."""
FILL_BLOCKS = (1024, 64)
"""Blocks to fill up with: as many as a graph may need, or what a small grid holds."""
LENGTH_STEP = 128
"""Rows that the attention kernels take of a window at a time: a bound of its length is a multiple."""

Window = tuple[int, int]
"""Side and shift of attention windows."""


@dataclass(frozen=True)
class Sizes:
    """Blocks of a batch, its rows at strides 2 and 4 (0 where a pass does not read them), and its attention windows.

    Attributes:
        windows: empty where nobody counted them; they are then bounded by the grid's extent.
    """

    blocks: int
    rows2: int = 0
    rows4: int = 0
    windows: WindowSizes = field(default_factory=dict)

    @property
    def level_sizes(self) -> list[int]:
        """As `build_pyramid` takes them; the rows at stride 1 are a bound."""
        return [512 * self.blocks, self.rows2, self.rows4, self.blocks]


@dataclass(frozen=True)
class Filling:
    """Blocks of one sample, the first of which fill a batch up.

    Attributes:
        coords: int32 [n, 4]. by_blocks: for each kind of window, how many the first 0, 1, ..., n blocks open, and the
            most blocks of one.
    """

    coords: Tensor
    by_blocks: dict[Window, tuple[list[int], list[int]]]

    def windows(self, kind: Window, blocks: int) -> tuple[int, int]:
        """Windows of the first blocks, and the most blocks of one."""
        numbers, longest = self.by_blocks[kind]
        return numbers[blocks], longest[blocks]


def cell_width(blocks: int) -> int:
    """Width of the cell that holds `blocks`: an eighth of its power of two, from 16 to `WIDEST_CELL`."""
    return min(WIDEST_CELL, max(16, 1 << max(0, blocks.bit_length() - 4)))


def capacity(seen: Sequence[Sizes], whole_cell: bool, filling: Filling) -> Sizes:
    """Sizes of a graph: closely of the batches seen, or of any in their cell, with room in the rows and windows."""
    most = max(s.blocks for s in seen)
    width = cell_width(most)
    first = most // width * width
    blocks = _round_up((first + width if whole_cell else most) + 1, 32)

    def largest(numbers: Sequence[int], room: float) -> int:
        """Of the batches seen; as a share of their blocks, with room, for a whole cell."""
        return int(max(room * n / s.blocks * blocks for n, s in zip(numbers, seen))) if whole_cell else max(numbers)

    rows = ([s.rows2 for s in seen], [s.rows4 for s in seen])
    windows = {}
    for kind in seen[0].windows:
        added, longest = filling.windows(kind, min(blocks - first, len(filling.coords)))
        number = largest([s.windows[kind][0] for s in seen], 1.15)
        longest = _round_up(max(longest, *(s.windows[kind][1] for s in seen)), LENGTH_STEP)
        windows[kind] = (_round_up(number + number // 8 + added, 8), min(longest, kind[0] ** 3))
    return Sizes(blocks, *(_round_up(largest(n, 1.08), 64) for n in rows), windows)


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


def make_filling(sample: int, extent: int, kinds: Sequence[Window], device: torch.device) -> Filling | None:
    """Blocks of a sample that fill batches up in a grid of `extent`; None where it has no room for them."""
    tables = (filling_coords(count, sample, extent) for count in FILL_BLOCKS)
    coords = next((t for t in tables if t is not None), None)
    if coords is None:
        return None
    return Filling(coords.to(device), {kind: _windows_of_first(coords, *kind) for kind in kinds})


def _windows_of_first(coords: Tensor, side: int, shift: int) -> tuple[list[int], list[int]]:
    numbers, longest = [0], [0]
    filled: Counter[tuple[int, ...]] = Counter()
    for window in ((coords[:, 1:] + shift) // side).tolist():
        filled[tuple(window)] += 1
        numbers.append(len(filled))
        longest.append(max(longest[-1], filled[tuple(window)]))
    return numbers, longest
