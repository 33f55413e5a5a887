"""What this machine has and whether the parts of the project work on it: versions, devices, and small real runs."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES: dict[str, str] = {
    "torch": "training and encoding cannot run; pip install torch",
    "numpy": "nothing can run; pip install numpy",
    "safetensors": "weights and tokens cannot be read; pip install safetensors",
    "tensorboard": "training cannot log; pip install tensorboard",
    "scipy": "metrics and preparation cannot run; pip install scipy",
    "warp-lang": "no mesh can be turned into a TSDF, no picture drawn; pip install warp-lang",
    "trimesh": "OBJ, GLB and others cannot be read; pip install trimesh",
    "manifold3d": "overlapping surfaces cannot be united; pip install manifold3d",
    "pyvista": "label volumes cannot become surfaces; pip install pyvista",
    "vtk": "label volumes cannot become surfaces; pip install vtk",
    "nibabel": "NIfTI, GIfTI and FreeSurfer cannot be read; pip install nibabel",
    "SimpleITK": "NRRD, MHA and DICOM cannot be read; pip install SimpleITK",
    "dask": "preparation of many shapes cannot run; pip install dask distributed",
    "distributed": "preparation of many shapes cannot run; pip install distributed",
    "cryptography": "local workers of a preparation cannot run; pip install cryptography",
    "typer": "the command line cannot run; pip install typer",
    "rich": "no progress bars; pip install rich",
    "huggingface_hub": "models cannot be fetched by hub id; pip install huggingface_hub",
}
"""Package -> what is lost without it, and what to do."""
OPTIONAL_PACKAGES: dict[str, str] = {
    "triton": "no fast path on a GPU; comes with PyTorch's CUDA build for Linux, or pip install triton",
    "nilearn": "the quickstart's cohort cannot be built; pip install 'trellis-vqvae[quickstart]'",
    "pytest": "the tests cannot run; bash scripts/run_tests.sh installs it",
}
PROBES: dict[str, str] = {
    "convolution": "a sparse convolution against the slow oracle, forward and gradients",
    "attention": "window attention against a plain softmax",
    "tsdf": "a box to its TSDF, against the exact distance",
}
REPAIRS: dict[str, dict[str, str]] = {
    "convolution": {
        "cpu": "pip install --force-reinstall torch numpy",
        "cuda": "pip install --force-reinstall torch from the index for your driver (pytorch.org), with its Triton",
    },
    "attention": {
        "cpu": "pip install --force-reinstall torch",
        "cuda": "pip install --force-reinstall torch from the index for your driver (pytorch.org)",
    },
    "tsdf": {
        "cpu": "pip install --force-reinstall warp-lang",
        "cuda": "pip install -U warp-lang and update the NVIDIA driver to what it asks for",
    },
}
"""What to do where a probe fails, by the kind of device."""
PROBE_TIMEOUT_S = 180.0
OUTPUT_END = 200
"""Characters of a child's output that are shown where they are not the answer."""


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Attributes:
        name: what was looked at; detail: what was found; advice: what to do about it, empty when nothing is to do.
        ok: whether it is as it should be; essential: whether the project is unusable when it is not.
    """

    name: str
    detail: str
    ok: bool = True
    essential: bool = True
    advice: str = ""

    def as_dict(self) -> dict[str, str | bool]:
        return dict(vars(self))


@dataclass
class Report:
    """Everything found, in the order of `sections`."""

    sections: dict[str, list[Finding]] = field(default_factory=dict)

    @property
    def findings(self) -> list[Finding]:
        return [finding for section in self.sections.values() for finding in section]

    @property
    def ok(self) -> bool:
        """Whether all that is essential works."""
        return all(finding.ok for finding in self.findings if finding.essential)

    def as_dict(self) -> dict[str, object]:
        return {
            "ok": self.ok,
            "sections": {name: [f.as_dict() for f in found] for name, found in self.sections.items()},
        }


def examine(*, timeout_s: float = PROBE_TIMEOUT_S) -> Report:
    """Look at everything; each device's probes run in processes of their own, so a crash or hang is a finding."""
    report = Report()
    report.sections["machine"] = machine()
    report.sections["packages"] = packages()
    devices, found = find_devices(timeout_s=timeout_s)
    report.sections["devices"] = found
    for device in devices:
        report.sections[f"probes on {device}"] = [
            run_probe(probe, device, timeout_s=timeout_s, essential=device == "cpu") for probe in PROBES
        ]
    return report


def machine() -> list[Finding]:
    """Operating system, Python, cores and memory."""
    version = platform.python_version()
    supported = (3, 10) <= sys.version_info[:2] <= (3, 13)
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return [
        Finding("system", f"{platform.system()} {platform.machine()}, {cores} cores, {pages / 2**30:.0f} GiB memory"),
        Finding(
            "python", version, ok=supported, advice="" if supported else "use Python 3.10 to 3.13"
        ),
        Finding("trellis-vqvae", package_version("trellis-vqvae") or "run from a folder, not installed"),
    ]


def package_version(name: str) -> str | None:
    """Installed version of a distribution, without importing it; None when it is not there."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def packages() -> list[Finding]:
    """Versions of what the project uses, and what is lost where one is missing or older than the project allows."""
    found = []
    lowest = lowest_versions()
    for table, essential in ((PACKAGES, True), (OPTIONAL_PACKAGES, False)):
        for name, loss in table.items():
            version, needed = package_version(name), lowest.get(name.lower())
            detail, advice = version or "missing", "" if version else loss
            if version and needed and numbers_of(version) < numbers_of(needed):
                detail, advice = f"{version}, {needed} or newer is needed", f"pip install -U '{name}>={needed}'"
            found.append(Finding(name, detail, ok=not advice, essential=essential, advice=advice))
    return found


def lowest_versions() -> dict[str, str]:
    """Package (lower case) -> lowest version that the installed project's metadata allows; empty when not installed."""
    try:
        requirements = importlib.metadata.requires("trellis-vqvae") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    matches = (re.match(r"([A-Za-z0-9_.-]+)>=([\d.]+)", requirement) for requirement in requirements)
    return {match[1].lower(): match[2] for match in matches if match}


def numbers_of(version: str) -> list[int]:
    """[2, 13, 0] of "2.13.0+cpu"; what follows the leading numbers does not count."""
    match = re.match(r"\d+(\.\d+)*", version)
    return [int(part) for part in match[0].split(".")] if match else []


def find_devices(*, timeout_s: float) -> tuple[list[str], list[Finding]]:
    """Device names to probe ("cpu", "cuda:0", ...) and what PyTorch and Warp say of them."""
    answer = _run_child(["devices", "cpu"], timeout_s, "gpus")
    if isinstance(answer, str):
        advice = f"pip install --force-reinstall torch; {_whole_error('devices', 'cpu')}"
        return ["cpu"], [Finding("PyTorch", answer, ok=False, advice=advice)]
    devices, found = ["cpu"], []
    found.append(Finding("cpu", f"PyTorch {answer['torch']}, {answer['threads']} threads"))
    for i, gpu in enumerate(answer["gpus"]):
        devices.append(f"cuda:{i}")
        found.append(
            Finding(f"cuda:{i}", f"{gpu['name']}, {gpu['memory_gib']:.0f} GiB, compute capability {gpu['capability']}")
        )
    if not answer["gpus"]:
        advice = (
            f"PyTorch is a CPU build ({answer['torch']}); for a GPU install the build for your driver from pytorch.org"
            if not answer["cuda_build"]
            else f"PyTorch is built for CUDA {answer['cuda_build']} and finds no GPU; check nvidia-smi and the driver"
        )
        found.append(Finding("GPU", "none found", ok=False, essential=False, advice=advice))
        return devices, found
    found.append(compiler_for_triton())
    if not answer["warp_cuda"]:
        advice = "Warp finds no CUDA device, TSDFs are made on the CPU; check the driver's version against Warp's"
        found.append(Finding("Warp on CUDA", "not available", ok=False, essential=False, advice=advice))
    return devices, found


def compiler_for_triton() -> Finding:
    """Whether the C compiler and the headers are there with which Triton builds its launcher for a GPU, once."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton looks for them
    headers = Path(sysconfig.get_paths(scheme=scheme)["include"]) / "Python.h"
    missing = [] if compiler else ["gcc or clang"]
    if not headers.is_file():
        missing.append("Python.h")
    if not missing:
        return Finding("C compiler for Triton", str(compiler), essential=False)
    advice = (
        "Triton builds a small launcher once and cannot, and plain PyTorch runs in its place, much slower: "
        "install gcc and Python's headers (Debian: apt install gcc python3-dev; conda: conda install gcc), or set CC"
    )
    return Finding("C compiler for Triton", f"no {' and no '.join(missing)}", ok=False, essential=False, advice=advice)


def run_probe(probe: str, device: str, *, timeout_s: float = PROBE_TIMEOUT_S, essential: bool = True) -> Finding:
    """Run one of `PROBES` on a device in a process of its own."""
    start = time.monotonic()
    answer = _run_child([probe, device], timeout_s, "detail")
    if isinstance(answer, str):
        advice = f"{REPAIRS[probe][device.split(':')[0]]}; {_whole_error(probe, device)}"
        if device != "cpu":
            advice += "; --device cpu works without it"
        return Finding(probe, answer, ok=False, essential=essential, advice=advice)
    return Finding(probe, f"{answer['detail']} ({time.monotonic() - start:.1f} s with start-up)", essential=essential)


def _whole_error(probe: str, device: str) -> str:
    return f"python -m trellis.doctor_probes {probe} {device} shows the whole error"


def _run_child(arguments: list[str], timeout_s: float, key: str) -> dict | str:
    """The JSON object with `key` that a child process prints as its last line, or one line on how it failed."""
    command = [sys.executable, "-m", "trellis.doctor_probes", *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=timeout_s, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return f"hangs: no answer within {timeout_s:.0f} s (--timeout-s waits longer)"
    if done.returncode < 0:
        return f"crashes: ended by {signal.Signals(-done.returncode).name}"
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        errors = [line for line in done.stderr.strip().splitlines() if line.strip()]
        return f"fails: {errors[-1].strip() if errors else f'exit status {done.returncode}'}"
    try:
        answer = json.loads(lines[-1])
    except ValueError:
        answer = None
    if not isinstance(answer, dict) or key not in answer:
        return f"fails: its output does not end with an answer but with: {' | '.join(lines)[-OUTPUT_END:]}"
    return answer


def as_text(report: Report) -> str:
    """The report for a terminal: a block a section, then one line of advice for each thing to do."""
    lines = []
    for name, findings in report.sections.items():
        lines.append(f"{name}:")
        lines += [f"  {_mark(finding)} {finding.name}: {finding.detail}" for finding in findings]
    todo = [finding for finding in report.findings if finding.advice]
    if todo:
        lines += ["to do:", *(f"  {finding.name}: {finding.advice}" for finding in todo)]
    lines.append("all that is essential works" if report.ok else "something essential does not work")
    return "\n".join(lines)


def _mark(finding: Finding) -> str:
    if finding.ok:
        return "ok  "
    return "FAIL" if finding.essential else "note"
