"""The empty space around a set of blocks: which missing blocks are inside the shape and which are outside.

Missing blocks that are joined by faces are one component. The component that reaches the border of the block grid is
outside; an enclosed one takes the majority sign of the voxels that touch it over a face (a tie is outside).

No dense grid of blocks is made. Only the shell is labelled: the missing blocks that touch an existing one at a face,
edge or corner. Inside one component C of the missing blocks, the shell around one connected piece K of the block set is
joined by faces, because the frontier between K and C is connected (space is simply connected). Pieces that float in C
are linked by rays: from every shell block we walk along +x to the next existing block or to the border. The shell block
of K with the largest x cannot meet K again, so its ray ends at the border, or at a piece that reaches further along x
(an enclosing one, or another that floats, for which the same holds): following these, all of C's shell is linked.
"""

from __future__ import annotations

import numpy as np

from trellis.utils.blocks import STORAGE_BLOCK, SparseSDFBlocks

OFFSETS_27 = np.stack(np.meshgrid(*[np.arange(-1, 2)] * 3, indexing="ij"), -1).reshape(-1, 3)
"""[27, 3] neighbour offsets in C order; row 13 is the block itself."""
_FACE_LAYERS = {  # offset of the missing block from an existing one -> the voxels of the existing one that touch it
    (-1, 0, 0): (0, slice(None), slice(None)),
    (1, 0, 0): (-1, slice(None), slice(None)),
    (0, -1, 0): (slice(None), 0, slice(None)),
    (0, 1, 0): (slice(None), -1, slice(None)),
    (0, 0, -1): (slice(None), slice(None), 0),
    (0, 0, 1): (slice(None), slice(None), -1),
}


def inside_mask(block_sdf: np.ndarray) -> np.ndarray:
    """v < 0 for float16 values of any shape, from their bits (numpy compares float16 slowly); -0 is not inside."""
    bits = block_sdf.view(np.int16)
    return (bits < 0) & (bits != np.int16(-0x8000))


class PaddedBlocks:
    """Existing blocks and the shell of missing ones around them, found by coordinate.

    Rows 0..M-1 are the existing blocks in their own order, rows M..M+S-1 the shell.

    Attributes:
        coords: [M + S, 3] int64 block coordinates; shell blocks may lie one step outside the grid.
        num_blocks: M.
        shell_inside: [S] bool, whether the shell block is inside the shape.
    """

    def __init__(self, blocks: SparseSDFBlocks) -> None:
        existing = blocks.block_index.astype(np.int64)
        self.num_blocks = len(existing)
        self.grid = blocks.resolution // STORAGE_BLOCK
        self._side = self.grid + 4  # room for two steps outside the grid on either side
        shell = self._find_shell(existing)
        self.coords = np.concatenate([existing, shell])
        keys = self._key(self.coords)
        self._order = np.argsort(keys, kind="stable")
        self._sorted = keys[self._order]
        if (self._sorted[1:] == self._sorted[:-1]).any():
            raise ValueError("block_index lists a block twice")
        self.shell_inside = self._label_shell(blocks.block_sdf)

    def _key(self, coords: np.ndarray) -> np.ndarray:
        """Linear keys, x fastest, so that the blocks along +x are neighbours in sorted order."""
        c = coords + 2
        return (c[..., 2] * self._side + c[..., 1]) * self._side + c[..., 0]

    def _find_shell(self, existing: np.ndarray) -> np.ndarray:
        own = self._key(existing)
        steps = self._key(OFFSETS_27) - self._key(np.zeros(3, dtype=np.int64))
        keys = np.setdiff1d(np.unique(own[:, None] + steps), own)
        x, rest = keys % self._side, keys // self._side
        return np.stack([x, rest % self._side, rest // self._side], axis=-1) - 2

    def find(self, coords: np.ndarray) -> np.ndarray:
        """Rows of block coordinates [..., 3] (at most two steps outside the grid); -1 for a block that is neither."""
        if not len(self._sorted):
            return np.full(coords.shape[:-1], -1, dtype=np.int64)
        keys = self._key(coords)
        position = np.minimum(np.searchsorted(self._sorted, keys), len(self._sorted) - 1)
        return np.where(self._sorted[position] == keys, self._order[position], -1)

    def neighbours(self, rows: np.ndarray) -> np.ndarray:
        """[N, 27] rows of the neighbours of rows [N], in the order of `OFFSETS_27`; -1 where beyond the shell."""
        return self.find(self.coords[rows][:, None, :] + OFFSETS_27)

    def _rows_along_x(self, coords: np.ndarray) -> np.ndarray:
        """First existing block at or after each coordinate along +x; -1 if the ray reaches the border."""
        existing = self._order[self._order < self.num_blocks]  # sorted by key
        keys = self._key(self.coords[existing])
        wanted = self._key(coords)
        position = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        same_line = (keys[position] >= wanted) & (keys[position] // self._side == wanted // self._side)
        return np.where(same_line, existing[position], -1)

    def _label_shell(self, block_sdf: np.ndarray) -> np.ndarray:
        m = self.num_blocks
        shell = self.coords[m:]
        count = len(shell)
        if not count:
            return np.zeros(0, dtype=bool)
        outside = count  # one more node stands for everything beyond the grid
        here = np.arange(count)
        at_border = ((shell <= 0) | (shell >= self.grid - 1)).any(axis=1)
        pairs = [np.stack([here[at_border], np.full(at_border.sum(), outside)])]
        for step in np.eye(3, dtype=np.int64):
            row = self.find(shell + step)
            joined = row >= m
            pairs.append(np.stack([here[joined], row[joined] - m]))
        ahead = self._rows_along_x(shell)
        before = self.find(self.coords[np.maximum(ahead, 0)] - (1, 0, 0)) - m
        pairs.append(np.stack([here, np.where(ahead >= 0, before, outside)]))
        a, b = np.concatenate(pairs, axis=1)
        assert (b >= 0).all(), "the block before the first existing one along +x is always in the shell"
        label = component_labels(a, b, count + 1)
        votes = np.zeros(count + 1, dtype=np.int64)  # inside voxels minus outside voxels at a component's faces
        for step, layer in _FACE_LAYERS.items():
            row = self.find(shell - np.array(step))
            touching = np.flatnonzero((row >= 0) & (row < m) & ~at_border)
            inside = inside_mask(block_sdf[(row[touching], *layer)]).reshape(-1, STORAGE_BLOCK**2).sum(axis=1)
            np.add.at(votes, label[touching], 2 * inside - STORAGE_BLOCK**2)
        inside_component = votes > 0
        inside_component[label[outside]] = False
        return inside_component[label[:count]]

    def missing_inside(self, coords: np.ndarray) -> np.ndarray:
        """[N] bool, whether missing blocks at [N, 3] (inside the grid, anywhere) are inside the shape."""
        coords = np.asarray(coords, dtype=np.int64)
        if not self.num_blocks:
            return np.zeros(len(coords), dtype=bool)
        ahead = self._rows_along_x(coords)
        before = self.find(self.coords[np.maximum(ahead, 0)] - (1, 0, 0)) - self.num_blocks
        assert (before[ahead >= 0] >= 0).all(), "coords must be blocks that do not exist"
        return np.where(ahead >= 0, self.shell_inside[np.maximum(before, 0)], False)


def component_labels(a: np.ndarray, b: np.ndarray, count: int) -> np.ndarray:
    """[count] int64, the smallest node of each node's component in the graph of edges a[i] - b[i].

    In numpy alone, since training writes sample meshes and must not need SciPy. Every round hooks the roots of both
    ends of each edge to the smaller one, flattens all trees by pointer jumping, and drops the edges within a tree.
    """
    label = np.arange(count)
    while len(a):
        low = np.minimum(a, b)
        np.minimum.at(label, a, low)
        np.minimum.at(label, b, low)
        while not np.array_equal(flat := label[label], label):
            label = flat
        a, b = label[a], label[b]
        apart = a != b
        a, b = a[apart], b[apart]
    return label
