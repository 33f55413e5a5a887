"""Nearest code: distances and their smallest in one pass, never a [N, K] tensor."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trellis.modules.sparse.kernels.support import SharedMemory, cdiv, power_of_2, shared_memory

ROWS, CODES = 128, 128
PROGRAMS = 132
"""Programs below which each takes fewer rows."""


@triton.jit(do_not_specialize=["count", "codes"])
def nearest_kernel(
    rows, codebook, half_norm, out, count, codes, L: tl.constexpr, BL: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    channel = tl.arange(0, BL)
    live = (row < count)[:, None] & (channel < L)[None, :]
    x = tl.load(rows + row[:, None] * L + channel[None, :], mask=live, other=0.0)
    best = tl.full([BM], float("inf"), tl.float32)
    place = tl.zeros([BM], tl.int64)
    for start in range(0, codes, BK):
        code = start + tl.arange(0, BK)
        inside = (channel < L)[:, None] & (code < codes)[None, :]
        c = tl.load(codebook + code.to(tl.int64)[None, :] * L + channel[:, None], mask=inside, other=0.0)
        score = tl.load(half_norm + code, mask=code < codes, other=float("inf"))[None, :]
        score = score - tl.dot(x, c, input_precision="ieee")
        least = tl.min(score, 1)
        # the first of equal ones, as argmin takes
        at = tl.min(tl.where(score == least[:, None], code[None, :], 2147483647), 1)
        better = least < best
        best = tl.where(better, least, best)
        place = tl.where(better, at.to(tl.int64), place)
    tl.store(out + row, place, mask=row < count)


def tile_of(wide: int, rows: int, memory: SharedMemory) -> tuple[int, int]:
    """Rows and codes of a tile: those of a program, halved until shared memory holds the rows and two sets of codes."""
    codes = CODES
    while 4 * wide * (rows + 2 * codes) > memory.limit and rows > 16:
        rows, codes = (rows, codes // 2) if codes > 16 else (rows // 2, codes)
    return rows, codes


def nearest_code(rows: Tensor, codebook: Tensor) -> Tensor:
    """Index [N] int64 of the nearest code (Euclidean) of float32 rows [N, L] among float32 [K, L]; 0 for NaN."""
    count, width = rows.shape
    out = torch.empty(count, dtype=torch.int64, device=rows.device)
    if count:
        half_norm = 0.5 * codebook.square().sum(1)
        wide = max(16, power_of_2(width))
        rows_each = ROWS if cdiv(count, ROWS) >= PROGRAMS else ROWS // 2
        rows_each, codes_each = tile_of(wide, rows_each, shared_memory(rows.device))
        nearest_kernel[(cdiv(count, rows_each),)](
            rows.contiguous(), codebook.contiguous(), half_norm, out, count, codebook.shape[0],
            L=width, BL=wide, BM=rows_each, BK=codes_each, num_warps=rows_each // 16,
        )  # fmt: skip
    return out
