"""`block_complement` on tensors, on the device where they are: the same rows in the same order, the same signs."""

from __future__ import annotations

import torch
from torch import Tensor

from trellis.geometry.block_complement import OFFSETS_27
from trellis.utils.blocks import STORAGE_BLOCK

_CHUNK = 1 << 17
"""Blocks whose 27 neighbours are looked up at once."""


class PaddedBlockTensors:
    """Existing blocks and the shell of missing ones around them; see `block_complement.PaddedBlocks`.

    Args:
        block_index: [M, 3] integers; block_sdf: [M, 8, 8, 8] floats; resolution: voxels per side of the cube.

    Attributes:
        coords: [M + S, 3] int64; the shell's blocks may lie one step outside the grid.
        num_blocks: M.
        shell_inside: [S] bool, whether the shell block is inside the shape.

    Raises:
        ValueError: a block listed twice.
    """

    def __init__(self, block_index: Tensor, block_sdf: Tensor, resolution: int) -> None:
        existing = block_index.long()
        self.num_blocks = len(existing)
        self.grid = resolution // STORAGE_BLOCK
        self._side = self.grid + 4  # room for two steps outside the grid on either side
        self._offsets = torch.from_numpy(OFFSETS_27).to(existing.device)
        own = self._key(existing)
        self._existing_keys, self._existing_rows = torch.sort(own)
        if bool((self._existing_keys[1:] == self._existing_keys[:-1]).any()):
            raise ValueError("block_index lists a block twice")
        self.coords = torch.cat([existing, self._find_shell()])
        self._sorted, self._order = torch.sort(self._key(self.coords))
        self.shell_inside = self._label_shell(block_sdf)

    def _key(self, coords: Tensor) -> Tensor:
        """Linear keys, x fastest, so that the blocks along +x are neighbours in sorted order."""
        c = coords + 2
        return (c[..., 2] * self._side + c[..., 1]) * self._side + c[..., 0]

    def _find_shell(self) -> Tensor:
        own = self._existing_keys
        steps = self._key(self._offsets) - self._key(torch.zeros_like(self._offsets[0]))
        near = [torch.unique(part[:, None] + steps) for part in own.split(_CHUNK)]
        keys = torch.unique(torch.cat(near)) if near else own
        place = torch.searchsorted(own, keys).clamp_max(max(len(own) - 1, 0))
        keys = keys[own[place] != keys] if len(own) else keys
        x, rest = keys % self._side, torch.div(keys, self._side, rounding_mode="floor")
        return torch.stack([x, rest % self._side, torch.div(rest, self._side, rounding_mode="floor")], dim=-1) - 2

    def find(self, coords: Tensor) -> Tensor:
        """Rows [...] of block coordinates [..., 3] (at most two steps outside the grid); -1 where there is none."""
        if not len(self._sorted):
            return torch.full(coords.shape[:-1], -1, dtype=torch.long, device=coords.device)
        keys = self._key(coords)
        place = torch.searchsorted(self._sorted, keys).clamp_max(len(self._sorted) - 1)
        return torch.where(self._sorted[place] == keys, self._order[place], -1)

    def neighbours(self, rows: Tensor) -> Tensor:
        """[N, 27] int32 rows of the neighbours of rows [N], in the order of `OFFSETS_27`; -1 beyond the shell."""
        found = [self.find(self.coords[part][:, None, :] + self._offsets).int() for part in rows.split(_CHUNK)]
        return torch.cat(found) if found else torch.zeros(0, 27, dtype=torch.int32, device=rows.device)

    def _rows_along_x(self, coords: Tensor) -> Tensor:
        """First existing block at or after each coordinate along +x; -1 if the ray reaches the border."""
        keys = self._existing_keys
        wanted = self._key(coords)
        place = torch.searchsorted(keys, wanted).clamp_max(len(keys) - 1)
        line, wanted_line = (torch.div(k, self._side, rounding_mode="floor") for k in (keys[place], wanted))
        return torch.where((keys[place] >= wanted) & (line == wanted_line), self._existing_rows[place], -1)

    def _label_shell(self, block_sdf: Tensor) -> Tensor:
        m, device = self.num_blocks, self.coords.device
        shell = self.coords[m:]
        count = len(shell)
        if not count:
            return torch.zeros(0, dtype=torch.bool, device=device)
        outside = count  # one more node stands for everything beyond the grid
        here = torch.arange(count, device=device)
        at_border = ((shell <= 0) | (shell >= self.grid - 1)).any(dim=1)
        border = here[at_border]
        pairs = [torch.stack([border, torch.full_like(border, outside)])]
        for axis in range(3):
            step = torch.zeros(3, dtype=torch.long, device=device)
            step[axis] = 1
            row = self.find(shell + step)
            joined = row >= m
            pairs.append(torch.stack([here[joined], row[joined] - m]))
        ahead = self._rows_along_x(shell)
        back = torch.tensor([1, 0, 0], device=device)
        before = self.find(self.coords[ahead.clamp_min(0)] - back) - m
        pairs.append(torch.stack([here, torch.where(ahead >= 0, before, outside)]))
        a, b = torch.cat(pairs, dim=1)
        assert bool((b >= 0).all()), "the block before the first existing one along +x is always in the shell"
        label = component_labels(a, b, count + 1)
        votes = torch.zeros(count + 1, dtype=torch.long, device=device)  # inside voxels minus outside voxels
        for axis in range(3):
            for sign, layer in ((-1, 0), (1, STORAGE_BLOCK - 1)):
                step = torch.zeros(3, dtype=torch.long, device=device)
                step[axis] = sign
                row = self.find(shell - step)
                touching = ((row >= 0) & (row < m) & ~at_border).nonzero()[:, 0]
                values = block_sdf.select(1 + axis, layer)[row[touching]]
                inside = (values < 0).sum(dim=(1, 2))
                votes.index_add_(0, label[touching], 2 * inside - STORAGE_BLOCK**2)
        inside_component = votes > 0
        inside_component[label[outside]] = False
        return inside_component[label[:count]]


def component_labels(a: Tensor, b: Tensor, count: int) -> Tensor:
    """[count] int64, the smallest node of each node's component in the graph of edges a[i] - b[i].

    Every round hooks the roots of both ends of each edge to the smaller one and then flattens all trees, so that the
    number of components at least halves wherever one is left to join: about log2(count) rounds.
    """
    label = torch.arange(count, device=a.device)
    while True:
        of_a, of_b = label[a], label[b]
        low = torch.minimum(of_a, of_b)
        hooked = label.scatter_reduce(0, of_a, low, "amin").scatter_reduce(0, of_b, low, "amin")
        while not torch.equal(flat := hooked[hooked], hooked):
            hooked = flat
        if torch.equal(hooked, label):
            return label
        label = hooked
