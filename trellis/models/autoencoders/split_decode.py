"""Decoding a shape in parts within a memory budget: attention by whole windows, convolutions by blocks with halos.

Nothing in the decoder is global over a sample: Linears and LayerNorms see one row, attention one window, convolutions
their neighbours. So parts are exact once each has the rows that its outputs depend on.

Halos, counted backwards in voxels of each level from one block, whose voxels are [0, 8) at the finest level. A 3x3x3
convolution reads one voxel further on either side; a subdivision reads parents floor(v / 2).

    fine    last convolution [-1, 9), its parents [-1, 5); convolution [-2, 6); convolution after the subdivision
            [-3, 7), its parents [-2, 4): two voxels of two a block, hence one ring of blocks.
    coarse  from [0, 2): convolution [-1, 3); convolution after the subdivision [-2, 4), its parents [-1, 2);
            convolution [-2, 3): two rings of blocks.

Between the two parts the whole shape is held, where a block has the fewest numbers (`SparseSDFDecoder.coarse`). Rows of
the halo are computed too, are wrong near its rim, and are dropped: every block is handed out once.

Memory, by counting the tensors that live at once, in units of C numbers of the activations' dtype (C channels, MLP
ratio r), and in bytes of tables beside them (docs/performance.md has what is measured):

    held for every block     2 (x and the state between the parts) + 400 bytes; or 1 + 1 KB of values + 400 bytes
    trunk, a row             16 + 2 r
    coarse, a block          8 + 1.3 KB of neighbours (on a CPU, where they are 64-bit while they are made: 14 KB)
    fine, a block            22 + 8.3 KB (on a CPU 31 + 100 KB)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trellis.models.autoencoders.decoder import SparseSDFDecoder
from trellis.modules.sparse.levels import Topology
from trellis.modules.sparse.morton import packed_keys

COARSE_RINGS, FINE_RINGS = 2, 1


@dataclass(frozen=True)
class PartSizes:
    """The most rows (blocks, halo included) that are worked on at once, in each part of the decoder."""

    trunk: int
    coarse: int
    fine: int


WORKSPACE_BYTES = 128 << 20
"""Libraries' workspaces, weights cast for a layer, and a gathered chunk of the CPU's convolutions."""


def parts_within(
    decoder: SparseSDFDecoder, num_blocks: int, max_bytes: float, dtype: torch.dtype, device: torch.device
) -> PartSizes:
    """Part sizes whose peak, with all that a shape of `num_blocks` blocks holds throughout, stays below `max_bytes`.

    Args:
        max_bytes: of everything but the weights.

    Raises:
        ValueError: a budget that is too small for the smallest parts; names the least that is enough.
    """
    c, ratio = decoder.input_layer.out_features, 0.0
    window = 1
    for block in decoder.blocks:
        ratio, window = block.mlp.mlp[0].out_features / c, block.attn.window_size
    row = c * dtype.itemsize
    on_cpu = device.type == "cpu"
    each = (
        (16 + 2 * ratio) * row,
        8 * row + (14 << 10 if on_cpu else 1300),
        (31 * row + (100 << 10) if on_cpu else 22 * row + 8300),
    )
    # an attention window, and a block with two rings or one around it
    least = [min(num_blocks, n) for n in (window**3, (2 * COARSE_RINGS + 1) ** 3, (2 * FINE_RINGS + 1) ** 3)]
    held = WORKSPACE_BYTES + num_blocks * (max(2 * row, row + 1024) + 400)
    need = held + max(n * size for n, size in zip(least, each))
    if max_bytes < need:
        raise ValueError(
            f"{max_bytes / 1e9:.2f} GB beside the weights are too little to decode {num_blocks} blocks in parts; "
            f"the least is {need / 1e9:.2f} GB"
        )
    return PartSizes(*(min(num_blocks, int((max_bytes - held) / size)) for size in each))


@torch.no_grad()
def split_decode(
    decoder: SparseSDFDecoder,
    latent: Tensor,
    coords: Tensor,
    dtype: torch.dtype,
    sizes: PartSizes,
    *,
    factor: float | None = None,
    fused: bool = True,
    backend: str = "auto",
) -> Iterator[tuple[Tensor, Tensor]]:
    """The values of `decoder.forward`, some blocks at a time.

    Args:
        latent: [M, L]; coords: [M, 4] (batch, x, y, z), samples in ascending order. On the decoder's device, which must
            be the current one while the parts are taken.
        dtype, factor, fused, backend: as of `decoder.forward`. On a CPU "auto" is "cpu", whose memory is predictable.

    Yields:
        rows [n] int64 and their TSDF [n, 512]; every row once.

    Raises:
        ValueError: sizes below one window of attention, or one block with its halo.
    """
    if backend == "auto" and latent.device.type == "cpu":
        backend = "cpu"
    topology = Topology(coords)
    samples = topology.num_samples
    m = len(latent)
    x = torch.empty(m, decoder.input_layer.out_features, dtype=dtype, device=latent.device)
    for part in torch.arange(m, device=latent.device).split(sizes.trunk):
        x[part] = decoder.embed(latent[part], Topology(coords[part], samples), dtype, factor)
    for block in decoder.blocks:
        plan = topology.windows(block.attn.window_size, block.attn.shift)
        for start, stop in _whole_windows(plan.cu_seqlens.tolist(), sizes.trunk):
            rows = plan.order[start:stop].sort().values
            x[rows] = block(x[rows], Topology(coords[rows], samples), fused)
            _give_back(x.device)
    order = torch.argsort(packed_keys(coords))
    state: Tensor | None = None
    for rows, around, place in _parts(topology, order, COARSE_RINGS, sizes.coarse):
        part = decoder.coarse(x[around], Topology(coords[around], samples), fused, backend)
        if state is None:
            state = part.new_empty(m, 8, part.shape[1])
        state[rows] = part.view(len(around), 8, -1)[place]
        del part
        _give_back(x.device)
    del x
    if state is None:
        return
    for rows, around, place in _parts(topology, order, FINE_RINGS, sizes.fine):
        given = state[around].view(8 * len(around), -1)
        yield rows, decoder.fine(given, Topology(coords[around], samples), fused, backend)[place]
        del given
        _give_back(state.device)


def _give_back(device: torch.device) -> None:
    """Return unused memory to CUDA: parts differ in size, and what one leaves behind seldom fits the next."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _whole_windows(starts: list[int], most: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows (sorted by window) of as many whole windows as `most` rows hold."""
    first = 0
    for here, after in zip(starts, starts[1:]):
        if after - here > most:
            raise ValueError(f"a part must hold a whole attention window of {after - here} rows, got {most}")
        if after - first > most:
            yield first, here
            first = here
    if starts[-1] > first:
        yield first, starts[-1]


def _parts(topology: Topology, order: Tensor, rings: int, most: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Blocks in Morton order in parts of at most `most` rows with `rings` rings of blocks around them.

    Yields:
        rows of the part, rows with the halo (ascending), and the places of the first among the second.
    """
    start, count = 0, most
    while start < len(order):
        rows = order[start : start + count]
        around = _grown(topology.block_neighbours, rows, rings)
        if len(around) > most:
            if len(rows) == 1:
                raise ValueError(f"a part must hold a block with its halo of {len(around)} rows, got {most}")
            count = max(1, min(len(rows) - 1, int(0.95 * len(rows) * most / len(around))))
            continue
        yield rows, around, torch.searchsorted(around, rows)
        start += len(rows)


def _grown(neighbours: Tensor, rows: Tensor, rings: int) -> Tensor:
    """Ascending rows of blocks that lie at most `rings` steps (faces, edges, corners) from `rows`."""
    m = len(neighbours)
    # one place more, which takes the neighbours that do not exist (-1)
    found = torch.zeros(m + 1, dtype=torch.bool, device=rows.device)
    found[rows] = True
    for _ in range(rings):
        found[neighbours[found[:m].nonzero()[:, 0]].reshape(-1).long()] = True
    return found[:m].nonzero()[:, 0]
