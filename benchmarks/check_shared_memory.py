"""What the kernels take of shared memory on several kinds of card, by Triton's compiler: needs no card.

python benchmarks/check_shared_memory.py [--capability 80 89 90 100 120] [--only "512, 512"] [--dtype float16]

For each width of the tile table, and the capability's limit: the tile that is chosen, the bytes that `triton_tiles`
estimates, and the bytes that the compiled kernel asks for. Ends with 1 if one asks for more than its estimate or limit.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from trellis.modules.sparse.conv import triton_tiles as tiles
from trellis.modules.sparse.conv.triton_gemm import gather_gemm_kernel
from trellis.modules.sparse.conv.triton_scalar import scalar_backward_kernel
from trellis.modules.sparse.conv.triton_wgrad import TAPS, gather_wgrad_kernel
from trellis.modules.sparse.kernels.nearest import CODES, ROWS, nearest_kernel, tile_of
from trellis.modules.sparse.kernels.support import SharedMemory

CARDS = {
    75: SharedMemory(64 << 10, False),
    80: SharedMemory(163 << 10, False),
    89: SharedMemory(99 << 10, False),
    90: SharedMemory(227 << 10, True),
    100: SharedMemory(227 << 10, True),
    120: SharedMemory(99 << 10, False),
}
"""By compute capability: T4, A100, RTX 40 and L4, H100, B200, RTX 50."""
POINTERS = {"table": "i32", "partial": "fp32", "values": "fp32", "grad_values": "fp32", "sums": "fp32"}
SHORT = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def demand(kernel: Any, constants: dict[str, Any], types: dict[str, str], options: dict, capability: int) -> int:
    """Bytes of shared memory that a compiled kernel asks for; `types` of its pointers, all other arguments are i32."""
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else f"*{types[n]}" if n in types else "i32" for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in types}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).metadata.shared


def convolution(kind: str, mode: int, c_in: int, c_out: int, dtype: torch.dtype, capability: int) -> tuple:
    """Tile, estimate and demand of one entry of the table."""
    memory = CARDS[capability]
    types = {n: SHORT[dtype] for n in ("feats", "weights", "bias", "out", "gate", "grad", "out_weight", "grad_hidden")}
    types |= POINTERS
    constants = {"C_IN": c_in, "C_OUT": c_out, "MODE": mode, "PRECISION": "tf32"}
    if kind == "wgrad":
        tile, kernel = tiles.wgrad_tile(c_in, c_out, mode, dtype, memory), gather_wgrad_kernel
        constants |= {"ALL_TAPS": TAPS[mode], "TPS": tile.taps, "SWAP": tile.swap}
        estimate = tiles.wgrad_bytes(tile, dtype, memory)
    elif kind == "gemm":
        tile, kernel = tiles.gemm_tile(c_in, c_out, mode, dtype, memory), gather_gemm_kernel
        constants |= {"TAPS": (27, 8, 64)[mode], "GROUP": 8, "MIRRORED": False, "TRANSPOSED": False, "HAS_BIAS": True}
        constants |= {"ACCUMULATE": mode == tiles.PARENTS, "HAS_GATE": True}
        estimate = tiles.gemm_bytes(tile, dtype, memory)
    else:
        tile, kernel = tiles.scalar_tile(c_in, c_out, dtype, memory), scalar_backward_kernel
        constants |= {"GROUP": 2}
        estimate = tiles.gemm_bytes(tile, dtype, memory)
    constants |= {"BM": tile.rows, "BN": tile.columns, "BK": tile.depth, "CACHE": tile.cache}
    constants = {n: value for n, value in constants.items() if n in kernel.arg_names}
    types = {n: value for n, value in types.items() if n in kernel.arg_names}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return tile, estimate, demand(kernel, constants, types, options, capability)


def nearest(width: int, capability: int) -> tuple:
    rows, codes = tile_of(width, ROWS, CARDS[capability])
    types = {"rows": "fp32", "codebook": "fp32", "half_norm": "fp32", "out": "i64"}
    constants = {"L": width, "BL": width, "BM": rows, "BK": codes}
    taken = demand(nearest_kernel, constants, types, {"num_warps": rows // 16}, capability)
    return f"{rows} rows, {codes} of {CODES} codes", 4 * width * (rows + 2 * codes), taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capability", type=int, nargs="+", default=[80, 89, 90, 100, 120], choices=sorted(CARDS))
    parser.add_argument("--only", default="", help="entries whose name contains this")
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"])
    args = parser.parse_args()
    dtype, worst = getattr(torch, args.dtype), 0.0
    jobs = {f"{k} mode {m}, {a}, {b}": (convolution, k, m, a, b, dtype) for k, m, a, b in tiles.TUNED}
    jobs |= {f"nearest code, {width} channels": (nearest, width) for width in (16, 64, 256)}
    for capability in args.capability:
        for name, (function, *arguments) in jobs.items():
            if args.only in name:
                tile, estimate, taken = function(*arguments, capability)
                worst = max(worst, taken / min(estimate, CARDS[capability].limit))
                print(f"{capability} {name}: {taken} of {estimate} estimated, {tile}", flush=True)
    print(f"at most {worst:.3f} of the lower of estimate and limit; Triton {triton.__version__}")
    sys.exit(worst > 1)


if __name__ == "__main__":
    main()
