"""Weight gradient of the sparse convolutions: sums over rows of gathered inputs times output gradients.

Rows are split over programs; each writes float32 partial sums, which are added in a fixed order: no atomics, the same
bits on every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trellis.modules.sparse.conv.triton_gather import gather
from trellis.modules.sparse.conv.triton_tiles import CHILDREN, PLAIN, Tile, wgrad_tile
from trellis.modules.sparse.kernels.support import cdiv, dot_precision

MAX_PARTIAL_BYTES = 96 << 20
"""Bound of the partial sums of one launch."""
PROGRAMS = 132 * 6
"""Programs that fill a large card a few times over."""


@triton.jit(do_not_specialize=["count", "share", "first_child", "width"])
def gather_wgrad_kernel(
    feats, grad, partial, table, count, share, first_child, width,
    C_IN: tl.constexpr, C_OUT: tl.constexpr, TAPS: tl.constexpr, MODE: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TPS: tl.constexpr,
    SWAP: tl.constexpr,
):  # fmt: skip
    TILES_M: tl.constexpr = (C_IN + BM - 1) // BM
    TILES_N: tl.constexpr = (C_OUT + BN - 1) // BN
    COPIES: tl.constexpr = GROUP if MODE == 1 else 1
    pid = tl.program_id(0)
    split = tl.program_id(1).to(tl.int64)
    base = partial + split * width
    first = split * share
    last = tl.minimum(first + share, count)
    if pid < TILES_N * COPIES:
        # sums of grad over its rows: programs of their own, so that the products' loop has no branch
        child = pid // TILES_N
        columns = (pid % TILES_N) * BN + tl.arange(0, BN)
        total = tl.zeros([BN], tl.float32)
        for start in range(first, last, BK):
            rows = start + tl.arange(0, BK)
            inside = (rows < last)[:, None] & (columns < C_OUT)[None, :]
            pointers = grad + (rows * COPIES + child)[:, None] * C_OUT + columns[None, :]
            total += tl.sum(tl.load(pointers, mask=inside, other=0.0).to(tl.float32), 0)
        tl.store(base + (TAPS * C_IN + child) * C_OUT + columns, total, mask=columns < C_OUT)
    else:
        pid -= TILES_N * COPIES
        first_channel = (pid % TILES_M) * BM
        pid = pid // TILES_M
        columns = (pid % TILES_N) * BN + tl.arange(0, BN)
        tap = (pid // TILES_N) * TPS
        channels = first_channel + tl.arange(0, BM)
        if SWAP:
            acc = tl.zeros([BN, TPS * BM], tl.float32)
        else:
            acc = tl.zeros([TPS * BM, BN], tl.float32)
        for start in range(first, last, BK):
            rows = start + tl.arange(0, BK)
            live = rows < last
            a = gather(feats, table, count, rows, live, tap, channels, first_child, C_IN, TAPS, MODE, GROUP, TPS, BM)
            source = rows
            if MODE == 1:
                source = rows * GROUP + tap // 8
            pointers = grad + source[:, None] * C_OUT + columns[None, :]
            if C_OUT % BN == 0:
                g = tl.load(pointers, mask=live[:, None], other=0.0)
            else:
                g = tl.load(pointers, mask=live[:, None] & (columns < C_OUT)[None, :], other=0.0)
            if SWAP:
                acc = tl.dot(tl.trans(g), a, acc, input_precision=PRECISION)
            else:
                acc = tl.dot(tl.trans(a), g, acc, input_precision=PRECISION)
        if SWAP:
            acc = tl.trans(acc)
        place = tl.arange(0, TPS * BM)
        of_tap, of_channel = tap + place // BM, first_channel + place % BM
        inside = ((of_channel < C_IN) & (of_tap < TAPS))[:, None] & (columns < C_OUT)[None, :]
        tl.store(base + (of_tap * C_IN + of_channel)[:, None] * C_OUT + columns[None, :], acc, mask=inside)


def gather_wgrad(
    feats: Tensor,
    grad: Tensor,
    table: Tensor,
    *,
    mode: int = PLAIN,
    first_child: int = 0,
    group: int = 8,
    tile: Tile | None = None,
    programs: int = PROGRAMS,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Sums over rows r of feats[row(r, t)]^T grad[r], and the sums of grad over its rows.

    Args:
        feats: [N, in]; grad: [N, out], or [N * group, out] for CHILDREN; table: [27, N] int32.
        first_child, group: the children that `grad` holds. dtype: of the result, float32 when None.

    Returns:
        [27, in, out] ([8 * group, in, out] for CHILDREN) and [out].
    """
    count = table.shape[1]
    c_in, c_out = feats.shape[1], grad.shape[1]
    taps = 27 if mode == PLAIN else 8 * group
    dtype = dtype or torch.float32
    if count == 0:
        empty = {"dtype": dtype, "device": feats.device}
        return torch.zeros(taps, c_in, c_out, **empty), torch.zeros(c_out, **empty)
    tile = tile or wgrad_tile(c_in, c_out, mode, feats.dtype)
    width = cdiv(taps, tile.taps) * cdiv(c_in, tile.rows) * cdiv(c_out, tile.columns)
    splits = min(
        max(1, cdiv(programs, width)),
        max(1, MAX_PARTIAL_BYTES // (4 * taps * c_in * c_out)),
        cdiv(count, 4 * tile.depth),
    )
    share = cdiv(cdiv(count, splits), tile.depth) * tile.depth
    splits = cdiv(count, share)
    children = group if mode == CHILDREN else 1
    size = taps * c_in * c_out
    partial = torch.empty(splits, size + children * c_out, dtype=torch.float32, device=feats.device)
    programs = width + children * cdiv(c_out, tile.columns)
    gather_wgrad_kernel[(programs, splits)](
        feats, grad, partial, table, count, share, first_child, partial.shape[1],
        C_IN=c_in, C_OUT=c_out, TAPS=taps, MODE=CHILDREN if mode == CHILDREN else PLAIN, GROUP=group,
        PRECISION=dot_precision(feats.dtype), BM=tile.rows, BN=tile.columns, BK=tile.depth, TPS=tile.taps,
        SWAP=tile.swap, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    total = (partial[0] if splits == 1 else partial.sum(0)).to(dtype)
    columns = total[size:] if children == 1 else total[size:].view(children, c_out).sum(0)
    return total[:size].view(taps, c_in, c_out), columns
