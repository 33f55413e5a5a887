"""Tiles fit the shared memory of the card; the H100's are those that were measured."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from trellis.modules.sparse.conv import triton_tiles as tiles
from trellis.modules.sparse.kernels.support import SharedMemory, shared_memory

pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).resolve().parents[2]
H100 = SharedMemory()
CARDS = [H100, SharedMemory(163 << 10, False), SharedMemory(99 << 10, False), SharedMemory(64 << 10, False)]
"""H100, A100, RTX 4090, and the least that a supported card has."""
WIDTHS = [16, 24, 32, 40, 64, 96, 128, 256, 512]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def chosen(c_in, c_out, dtype, memory):
    """Every tile of a pair of widths, with what it takes."""
    for mode in (tiles.PLAIN, tiles.CHILDREN, tiles.PARENTS):
        tile = tiles.gemm_tile(c_in, c_out, mode, dtype, memory)
        yield tile, tiles.gemm_bytes(tile, dtype, memory)
    for mode in (tiles.PLAIN, tiles.CHILDREN, tiles.PAIRS):
        tile = tiles.wgrad_tile(c_in, c_out, mode, dtype, memory)
        yield tile, tiles.wgrad_bytes(tile, dtype, memory)
    tile = tiles.scalar_tile(c_in, c_out, dtype, memory)
    yield tile, tiles.gemm_bytes(tile, dtype, memory)


def test_an_h100_has_the_measured_tiles():
    find = {"gemm": tiles.gemm_tile, "wgrad": tiles.wgrad_tile}
    for (kernel, mode, c_in, c_out), tile in tiles.TUNED.items():
        if kernel == "scalar":
            assert tiles.scalar_tile(c_in, c_out, torch.float16, H100) == tile
        else:
            assert find[kernel](c_in, c_out, mode, torch.bfloat16, H100) == tile
    unbounded = SharedMemory(1 << 40)
    for dtype in DTYPES:
        for c_in in WIDTHS:
            for c_out in WIDTHS:
                pairs = zip(chosen(c_in, c_out, dtype, H100), chosen(c_in, c_out, dtype, unbounded))
                assert all(a[0] == b[0] for a, b in pairs)


@pytest.mark.parametrize("memory", CARDS, ids=lambda m: f"{m.limit >> 10} KB")
def test_tiles_fit_the_card(memory):
    for dtype in DTYPES:
        for c_in in WIDTHS:
            for c_out in WIDTHS:
                for tile, taken in chosen(c_in, c_out, dtype, memory):
                    assert taken <= memory.limit and tile.stages >= 2 and tile.depth >= 16
    stages = [tiles.gemm_tile(512, 512, tiles.PLAIN, torch.float16, m).stages for m in CARDS]
    assert stages == [7, 7, 6, 4]


def test_depth_gives_way_where_no_stage_is_left():
    tile = tiles.gemm_tile(512, 512, tiles.PLAIN, torch.float16, SharedMemory(40 << 10, False))
    assert (tile.stages, tile.depth) == (2, 32)


def test_nearest_code_fits_the_card():
    from trellis.modules.sparse.kernels.nearest import tile_of

    assert tile_of(16, 128, H100) == tile_of(128, 128, H100) == (128, 128)
    for memory in CARDS:
        for wide in (16, 32, 64, 128, 256):
            rows, codes = tile_of(wide, 128, memory)
            assert 4 * wide * (rows + 2 * codes) <= memory.limit and min(rows, codes) >= 16


def test_limit_is_the_cards_own(monkeypatch):
    import triton.runtime

    properties = {3: {"max_shared_mem": 101376}}
    driver = SimpleNamespace(active=SimpleNamespace(utils=SimpleNamespace(get_device_properties=properties.get)))
    monkeypatch.setattr(triton.runtime, "driver", driver)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 9))
    shared_memory.cache_clear()
    try:
        assert shared_memory(torch.device("cuda", 3)) == SharedMemory(101376, False)
        assert shared_memory(torch.device("cpu")) == H100
    finally:
        shared_memory.cache_clear()


def test_compiled_kernels_take_no_more_than_estimated():
    """The widest tile as Triton compiles it for an RTX 4090; about 4 s."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "benchmarks" / "check_shared_memory.py"), "--capability", "89"]
    command += ["--only", "gemm mode 0, 512, 512"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("89 gemm") == 1
