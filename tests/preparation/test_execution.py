"""How much memory workers may share: the smallest limit of the control groups that a process is in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trellis.preparation.execution import default_workers, memory_bytes

MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def limits(mount: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (mount / name).parent.mkdir(parents=True, exist_ok=True)
        (mount / name).write_text(f"{text}\n")
    return mount


V2, V1 = "memory.max", "memory.limit_in_bytes"
HYBRID = "9:name=systemd:/x\n4:cpu,memory:/job/7\n0::/\n"


@pytest.mark.parametrize(
    ("proc", "files", "expected"),
    [
        ("0::/user/job/step\n", {f"user/job/{V2}": "5000000", f"user/job/step/{V2}": "max"}, 5_000_000),
        ("0::/user/job/step\n", {f"user/{V2}": "9000000", f"user/job/step/{V2}": "7000000"}, 7_000_000),
        ("0::/user/job\n", {f"other/{V2}": "1000", f"user/job/deeper/{V2}": "1000"}, MACHINE),
        ("0::/host/path/of/container\n", {V2: "3000000"}, 3_000_000),
        ("0::/../../outside\n", {V2: "3000000"}, 3_000_000),
        (HYBRID, {f"memory/job/7/{V1}": "2000000", f"memory/{V1}": str(2**63 - 4096)}, 2_000_000),
        (HYBRID, {f"memory/job/{V1}": "2000000", f"job/{V2}": "1000"}, 2_000_000),
        (None, {V2: "4000000"}, 4_000_000),
        ("", {}, MACHINE),
    ],
)
def test_the_smallest_limit_on_the_way_up_counts(tmp_path, proc, files, expected):
    path = tmp_path / "self"
    if proc is not None:
        path.write_text(proc)
    assert memory_bytes(path, limits(tmp_path / "fs", files)) == expected


def test_fewer_workers_where_memory_is_short(monkeypatch):
    monkeypatch.setattr("trellis.preparation.execution.memory_bytes", lambda: 1 << 30)
    assert default_workers() == 1
    monkeypatch.undo()
    assert 0 < memory_bytes() <= MACHINE
