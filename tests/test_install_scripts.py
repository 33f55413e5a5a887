"""The scripts that install: what is asked of pip and when, with a Python that only writes down what it is told."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FAKE_PYTHON = """#!/usr/bin/env bash
here="$(cd "$(dirname "$0")" && pwd)"
case "$*" in
*sys.prefix*) dirname "$here" ;;
*sys.version_info*) [ -z "${OLD_PYTHON:-}" ] ;;
"-m pip --version") [ -e "$here/pip" ] ;;
"-m venv "*)
    mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && cp "$0" "$3/bin/trellis-vqvae"
    [ -z "${STOP:-}" ] && touch "$3/bin/pip"
    ;;
"-m pip install"*)
    echo "$(basename "$(dirname "$here")") ${*:4}" >>"$LOG"
    [ -z "${STOP:-}" ]
    ;;
esac
"""
PINNED = "-c constraints.txt -e"


class Clone:
    """A copy of the scripts beside a folder `trellis`, and calls of them from there."""

    def __init__(self, folder: Path) -> None:
        self.root, self.log, self.bin = folder / "clone", folder / "log", folder / "env" / "bin"
        (self.root / "trellis").mkdir(parents=True)
        (self.root / "trellis" / "__init__.py").write_text("")
        shutil.copytree(ROOT / "scripts", self.root / "scripts")
        for name in ("pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.root / name)
        self.bin.mkdir(parents=True, exist_ok=True)
        for name in ("python", "python3", "trellis-vqvae", "pip"):
            (self.bin / name).write_text(FAKE_PYTHON)
            (self.bin / name).chmod(0o755)

    def run(self, script: str, *arguments: str, fails: bool = False, **environment: str) -> list[str]:
        """What pip was asked for by one call: "ENVIRONMENT OPTIONS" each."""
        self.log.write_text("")
        own = {"PATH": f"{self.bin}:/usr/bin:/bin", "LOG": str(self.log), **environment}
        command = ["bash", f"scripts/{script}", *arguments]
        done = subprocess.run(command, cwd=self.root, env=own, capture_output=True, text=True, timeout=60)
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        return [line.replace("--quiet ", "") for line in self.log.read_text().splitlines()]


@pytest.fixture
def clone(tmp_path) -> Clone:
    return Clone(tmp_path)


def test_a_finished_installation_is_not_repeated_and_an_interrupted_one_is_finished(clone):
    assert clone.run("install.sh", STOP="1", fails=True) == [f"env {PINNED} .[dev]"]
    assert clone.run("install.sh") == [f"env {PINNED} .[dev]"]
    assert clone.run("install.sh") == []
    assert clone.run("install.sh", "quickstart") == [f"env {PINNED} .[quickstart]"]
    assert clone.run("install.sh", "quickstart") == clone.run("install.sh", "dev") == []


def test_other_requirements_or_another_clone_are_installed(clone, tmp_path):
    constraints = clone.root / "constraints.txt"
    before = constraints.read_text()
    clone.run("install.sh")
    constraints.write_text(before + "more==1\n")
    assert clone.run("install.sh", STOP="1", fails=True)
    constraints.write_text(before)
    assert clone.run("install.sh"), "the environment was left half-way to other versions"
    other = Clone(tmp_path / "other")
    other.bin = clone.bin
    assert other.run("install.sh") and other.run("install.sh") == []
    assert clone.run("install.sh"), "the other clone is what `import trellis` finds now"


def test_virtual_environments_are_made_and_half_made_ones_finished(clone):
    assert clone.run("install.sh", "dev", "new", STOP="1", fails=True) == []
    assert (clone.root / "new" / "bin" / "python").exists()
    assert clone.run("install.sh", "dev", "new") == [f"new {PINNED} .[dev]"]
    assert clone.run("install.sh", "dev", "new") == []


def test_python_310_installs_by_ranges(clone):
    assert clone.run("install.sh", OLD_PYTHON="1") == ["env -e .[dev]"]


def test_run_tests(clone):
    assert clone.run("run_tests.sh") == [f".venv {PINNED} .[dev]"] and clone.run("run_tests.sh") == []
    assert clone.run("run_tests.sh", VIRTUAL_ENV="active") == [f"env {PINNED} .[dev]"]


def test_quickstart_in_the_root_finishes_what_was_interrupted(clone):
    """There `import trellis` works without any installation."""
    wanted = [f".venv {PINNED} .[quickstart]"]
    assert clone.run("quickstart.sh", "out", STOP="1", fails=True) == []
    assert clone.run("quickstart.sh", "out") == wanted and clone.run("quickstart.sh", "out") == []
    assert clone.run("quickstart.sh", "out", VENV="mine") == [f"mine {PINNED} .[quickstart]"]
    active = {"VIRTUAL_ENV": "active"}
    assert clone.run("quickstart.sh", "out", STOP="1", fails=True, **active) == [f"env {PINNED} .[quickstart]"]
    assert clone.run("quickstart.sh", "out", **active) == [f"env {PINNED} .[quickstart]"]
    assert clone.run("quickstart.sh", "out", **active) == []


def normalised(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


def test_constraints_pin_each_package_once_in_order():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w-]+==[\w.]+", line) for line in lines)
    names = [normalised(line.split("==")[0]) for line in lines]
    assert names == sorted(set(names))
    declared = re.findall(r'"([\w-]+)>=', (ROOT / "pyproject.toml").read_text())
    assert len(declared) > 20 and {normalised(name) for name in declared} - {"setuptools"} <= set(names)
