"""Weight gradient of the sparse convolutions: sums over rows of gathered inputs times output gradients.

Rows are split over programs; each writes float32 partial sums, which a second kernel adds in a fixed order: no atomics,
the same bits on every run. A program handles up to four taps, which share the rows of the output's gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trellis.modules.sparse.conv.triton_gather import gather
from trellis.modules.sparse.conv.triton_tiles import CHILDREN, PAIRS, PLAIN, Tile, wgrad_tile
from trellis.modules.sparse.kernels.support import cdiv, dot_precision, shared_memory

MAX_PARTIAL_BYTES = 96 << 20
"""Bound of the partial sums of one launch."""
PROGRAMS = 132 * 6
"""Programs that fill a large card a few times over."""


@triton.jit
def tap_product(acc, a, g, PRECISION: tl.constexpr, SWAP: tl.constexpr):
    if SWAP:
        acc = tl.dot(tl.trans(g), a, acc, input_precision=PRECISION)
    else:
        acc = tl.dot(tl.trans(a), g, acc, input_precision=PRECISION)
    return acc


@triton.jit
def store_tap(acc, base, tap, channels, columns, C_IN: tl.constexpr, C_OUT: tl.constexpr, SWAP: tl.constexpr):
    if SWAP:
        acc = tl.trans(acc)
    inside = (channels < C_IN)[:, None] & (columns < C_OUT)[None, :]
    tl.store(base + (tap * C_IN + channels)[:, None] * C_OUT + columns[None, :], acc, mask=inside)


@triton.jit(do_not_specialize=["count", "share", "first_child", "width"])
def gather_wgrad_kernel(
    feats, grad, partial, table, count, share, first_child, width,
    C_IN: tl.constexpr, C_OUT: tl.constexpr, ALL_TAPS: tl.constexpr, MODE: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TPS: tl.constexpr,
    SWAP: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    TILES_M: tl.constexpr = (C_IN + BM - 1) // BM
    TILES_N: tl.constexpr = (C_OUT + BN - 1) // BN
    COPIES: tl.constexpr = 8 if MODE == 1 else 1
    pid = tl.program_id(0)
    split = tl.program_id(1).to(tl.int64)
    base = partial + split * width
    first = split * share
    last = tl.minimum(first + share, count)
    if pid < TILES_N * COPIES:
        # sums of grad over its rows: programs of their own, so that the products' loop has no branch
        child = pid // TILES_N
        columns = (pid % TILES_N) * BN + tl.arange(0, BN)
        total = tl.zeros([BK, BN], tl.float32)
        for start in range(first, last, BK):
            rows = start + tl.arange(0, BK)
            inside = (rows < last)[:, None] & (columns < C_OUT)[None, :]
            pointers = grad + (rows * COPIES + child)[:, None] * C_OUT + columns[None, :]
            total += tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        tl.store(base + (ALL_TAPS * C_IN + child) * C_OUT + columns, tl.sum(total, 0), mask=columns < C_OUT)
    else:
        pid -= TILES_N * COPIES
        first_channel = (pid % TILES_M) * BM
        pid = pid // TILES_M
        columns = (pid % TILES_N) * BN + tl.arange(0, BN)
        tap = (pid // TILES_N) * TPS
        channels = first_channel + tl.arange(0, BM)
        if SWAP:
            acc0 = tl.zeros([BN, BM], tl.float32)
        else:
            acc0 = tl.zeros([BM, BN], tl.float32)
        acc1 = acc0
        acc2 = acc0
        acc3 = acc0
        for start in range(first, last, BK):
            rows = start + tl.arange(0, BK)
            live = rows < last
            source = rows
            if MODE == 1:
                source = rows * 8 + tap // 8
            pointers = grad + source[:, None] * C_OUT + columns[None, :]
            if C_OUT % BN == 0:
                g = tl.load(pointers, mask=live[:, None], other=0.0)
            else:
                g = tl.load(pointers, mask=live[:, None] & (columns < C_OUT)[None, :], other=0.0)
            a = gather(feats, table, count, rows, live, tap, channels, first_child, C_IN, MODE, 8, BM, CACHE)
            acc0 = tap_product(acc0, a, g, PRECISION, SWAP)
            if TPS > 1:
                a = gather(feats, table, count, rows, live, tap + 1, channels, first_child, C_IN, MODE, 8, BM, CACHE)
                acc1 = tap_product(acc1, a, g, PRECISION, SWAP)
            if TPS > 2:
                a = gather(feats, table, count, rows, live, tap + 2, channels, first_child, C_IN, MODE, 8, BM, CACHE)
                acc2 = tap_product(acc2, a, g, PRECISION, SWAP)
            if TPS > 3:
                a = gather(feats, table, count, rows, live, tap + 3, channels, first_child, C_IN, MODE, 8, BM, CACHE)
                acc3 = tap_product(acc3, a, g, PRECISION, SWAP)
        store_tap(acc0, base, tap, channels, columns, C_IN, C_OUT, SWAP)
        if TPS > 1:
            store_tap(acc1, base, tap + 1, channels, columns, C_IN, C_OUT, SWAP)
        if TPS > 2:
            store_tap(acc2, base, tap + 2, channels, columns, C_IN, C_OUT, SWAP)
        if TPS > 3:
            store_tap(acc3, base, tap + 3, channels, columns, C_IN, C_OUT, SWAP)


@triton.jit
def reduced_tap(tap, child):
    """The reduced tap (0 to 7) of `child` on which tap 0 .. 26 falls: per axis floor((p + d) / 2) + 1 - p."""
    x = (child >> 2) & 1
    y = (child >> 1) & 1
    z = child & 1
    x = (x + tap % 3 + 1) // 2 - x
    y = (y + (tap // 3) % 3 + 1) // 2 - y
    z = (z + tap // 9 + 1) // 2 - z
    return 4 * x + 2 * y + z


@triton.jit(do_not_specialize=["splits", "width", "first_child"])
def sum_partial_kernel(
    partial, out, splits, width, first_child,
    SIZE: tl.constexpr, C_OUT: tl.constexpr, MODE: tl.constexpr, BLOCK: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Weight gradient [27, SIZE], then bias gradient [C_OUT], from partial sums; of 8 children's collapsed taps, or
    added to `out` from those of two children."""
    BLOCKS: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    COPIES: tl.constexpr = 1 if MODE == 0 else 8 if MODE == 1 else 2
    ALL: tl.constexpr = (27 if MODE == 0 else 64 if MODE == 1 else 24) * SIZE
    pid = tl.program_id(0)
    is_bias = pid >= 27 * BLOCKS
    tap = tl.minimum(pid // BLOCKS, 26)
    place = (pid - tl.where(is_bias, 27, tap) * BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    known = place < tl.where(is_bias, C_OUT, SIZE)
    offset = place
    if MODE == 3:
        # rows of two children side by side
        offset += tl.where(is_bias, 0, place // C_OUT * C_OUT)
    total = tl.zeros([BS, BLOCK], tl.float32)
    for first in range(0, splits * COPIES, BS):
        part = first + tl.arange(0, BS)
        child = part % COPIES
        if MODE == 0:
            start = child + tap * SIZE
        else:
            reduced = reduced_tap(tap, first_child + child)
            if MODE == 1:
                start = (child * 8 + reduced) * SIZE
            else:
                # the children differ in z, which is the last of the 2x2x3 parents
                of_tap = 4 * (reduced % 2 + child) + reduced // 4 + 2 * (reduced // 2 % 2)
                start = of_tap * 2 * SIZE + child * C_OUT
        start = tl.where(is_bias, ALL + child * C_OUT, start)
        pointers = partial + ((part // COPIES).to(tl.int64) * width + start)[:, None] + offset[None, :]
        total += tl.load(pointers, mask=(part < splits * COPIES)[:, None] & known[None, :], other=0.0)
    target = out + tl.where(is_bias, 27, tap) * SIZE + place
    result = tl.sum(total, 0)
    if MODE == 3:
        result += tl.load(target, mask=known, other=0.0)
    tl.store(target, result.to(out.dtype.element_ty), mask=known)


TAPS = {PLAIN: 27, CHILDREN: 64, PAIRS: 12}
"""Taps of one launch."""


def partial_sums(
    feats: Tensor, c_out: int, table: Tensor, *, mode: int = PLAIN, tile: Tile | None = None
) -> tuple[Tensor, int]:
    """Room for the partial sums of a launch of `gather_wgrad`, and the rows of each program.

    Args:
        c_out: columns of a row of grad, of one child (CHILDREN) or both (PAIRS).

    Returns:
        float32 [splits, taps * in * out + sums of grad], not written yet; no split without rows.
    """
    count, c_in = table.shape[1], feats.shape[1]
    size = TAPS[mode] * c_in * c_out
    width = size + c_out * (8 if mode == CHILDREN else 1)
    if count == 0:
        return torch.empty(0, width, dtype=torch.float32, device=feats.device), 1
    tile = tile or wgrad_tile(c_in, c_out, mode, feats.dtype, shared_memory(feats.device))
    programs = TAPS[mode] // tile.taps * cdiv(c_in, tile.rows) * cdiv(c_out, tile.columns)
    splits = min(max(1, cdiv(PROGRAMS, programs)), max(1, MAX_PARTIAL_BYTES // (4 * size)), cdiv(count, 4 * tile.depth))
    share = cdiv(cdiv(count, splits), tile.depth) * tile.depth
    return torch.empty(cdiv(count, share), width, dtype=torch.float32, device=feats.device), share


def gather_wgrad(
    partial: Tensor,
    share: int,
    feats: Tensor,
    grad: Tensor,
    table: Tensor,
    *,
    mode: int = PLAIN,
    first_child: int = 0,
    tile: Tile | None = None,
) -> None:
    """Write partial sums over rows r of feats[row(r, t)]^T grad[r], and of grad over its rows.

    Args:
        partial, share: of `partial_sums` with the same mode and tile.
        feats: [N, in]; grad: [N, out], [8 N, out] for CHILDREN; table: [27, N] int32. All contiguous.
        first_child: for PAIRS, of the two children whose columns are side by side in grad.
    """
    count = table.shape[1]
    if count == 0:
        return
    c_in, c_out = feats.shape[1], grad.shape[1]
    tile = tile or wgrad_tile(c_in, c_out, mode, feats.dtype, shared_memory(feats.device))
    children = 8 if mode == CHILDREN else 1
    programs = cdiv(c_out, tile.columns) * (children + TAPS[mode] // tile.taps * cdiv(c_in, tile.rows))
    gather_wgrad_kernel[(programs, partial.shape[0])](
        feats, grad, partial, table, count, share, first_child, partial.shape[1],
        C_IN=c_in, C_OUT=c_out, ALL_TAPS=TAPS[mode], MODE=mode, PRECISION=dot_precision(feats.dtype),
        BM=tile.rows, BN=tile.columns, BK=tile.depth, TPS=tile.taps, SWAP=tile.swap, CACHE=tile.cache,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def sum_partial(
    partial: Tensor, c_in: int, c_out: int, dtype: torch.dtype, *, mode: int = PLAIN
) -> tuple[Tensor, Tensor]:
    """Gradients of the weight [27, in, out], for CHILDREN behind its collapsed form, and of the bias [out]."""
    out = torch.empty(27 * c_in * c_out + c_out, dtype=dtype, device=partial.device)
    _sum(partial, out, c_in, c_out, mode, 8 if mode == CHILDREN else 1)
    return out[:-c_out].view(27, c_in, c_out), out[-c_out:]


def add_pair(partial: Tensor, out: Tensor, first_child: int, c_in: int, c_out: int) -> None:
    """Add a PAIRS launch's share of those gradients to float32 [27 * in * out + out], weight before bias."""
    _sum(partial, out, c_in, c_out, PAIRS, 2, first_child)


def _sum(
    partial: Tensor, out: Tensor, c_in: int, c_out: int, mode: int, children: int, first_child: int = 0
) -> None:
    size, splits = c_in * c_out, partial.shape[0]
    block, rows = (1024, 4) if splits * children <= 4 else (128, 32)
    sum_partial_kernel[(27 * cdiv(size, block) + cdiv(c_out, block),)](
        partial, out, splits, partial.shape[1], first_child,
        SIZE=size, C_OUT=c_out, MODE=mode, BLOCK=block, BS=rows,
    )  # fmt: skip
