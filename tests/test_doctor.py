"""The doctor's findings: what works, what is missing, and what crashes or hangs in a probe of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from trellis import doctor
from trellis.doctor import Finding, Report


def child_of(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Make the doctor's child processes run `program` instead of a probe."""
    real = subprocess.run

    def run(command, **kwargs):
        return real([sys.executable, "-c", program], **kwargs)

    monkeypatch.setattr(doctor.subprocess, "run", run)


def test_crash_is_reported_by_signal(monkeypatch):
    child_of(monkeypatch, "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    finding = doctor.run_probe("tsdf", "cuda:0", timeout_s=30)
    assert not finding.ok and "SIGSEGV" in finding.detail
    assert "--device cpu" in finding.advice and "\n" not in finding.advice
    assert "update the NVIDIA driver" in finding.advice
    assert "python -m trellis.doctor_probes tsdf cuda:0" in finding.advice


def test_hang_is_reported_and_ends(monkeypatch):
    child_of(monkeypatch, "import time; time.sleep(60)")
    start = time.monotonic()
    finding = doctor.run_probe("attention", "cpu", timeout_s=1)
    assert not finding.ok and "no answer within 1 s (--timeout-s waits longer)" in finding.detail
    assert time.monotonic() - start < 20


def test_error_is_reported_in_its_own_words(monkeypatch):
    child_of(monkeypatch, "raise RuntimeError('relative error 0.5 in float32')")
    finding = doctor.run_probe("convolution", "cpu", timeout_s=30)
    assert finding.detail == "fails: RuntimeError: relative error 0.5 in float32"


def test_noise_before_the_answer_is_ignored(monkeypatch):
    child_of(monkeypatch, "print('Warp 1.0 says hello'); print('{\"detail\": \"fine\"}')")
    assert doctor.run_probe("tsdf", "cpu", timeout_s=30).detail.startswith("fine")


@pytest.mark.parametrize("end", ["bye now", "3", "{}", "[" * 3])
def test_an_end_that_is_no_answer_is_a_failed_probe(monkeypatch, end):
    child_of(monkeypatch, f"print('{{\"detail\": \"fine\"}}'); print('x' * 300); print({end!r})")
    finding = doctor.run_probe("attention", "cpu", timeout_s=30)
    assert not finding.ok and finding.detail.startswith("fails: its output does not end with an answer but with: xxx")
    assert finding.detail.endswith(f"xx | {end}") and len(finding.detail) < 280
    assert finding.advice.startswith("pip install --force-reinstall torch; ")
    devices, found = doctor.find_devices(timeout_s=30)
    assert devices == ["cpu"] and not found[0].ok and "trellis.doctor_probes devices cpu" in found[0].advice


def test_every_probe_has_a_repair_for_every_kind_of_device():
    assert doctor.REPAIRS.keys() == doctor.PROBES.keys()
    assert all(repairs.keys() == {"cpu", "cuda"} for repairs in doctor.REPAIRS.values())


def test_missing_package_gets_one_line_of_advice(monkeypatch):
    monkeypatch.setattr(doctor, "package_version", lambda name: None if name in ("nibabel", "triton") else "99.0")
    found = {finding.name: finding for finding in doctor.packages()}
    assert not found["nibabel"].ok and found["nibabel"].essential and "pip install nibabel" in found["nibabel"].advice
    assert not found["triton"].ok and not found["triton"].essential
    assert found["numpy"].ok and not found["numpy"].advice
    assert set(found) == set(doctor.PACKAGES) | set(doctor.OPTIONAL_PACKAGES)


def test_old_package_is_named_with_what_is_needed(monkeypatch):
    monkeypatch.setattr(doctor, "package_version", lambda name: "2.4.1+cu121" if name == "torch" else "99.0")
    monkeypatch.setattr(doctor, "lowest_versions", lambda: {"torch": "2.6", "numpy": "1.26"})
    found = {finding.name: finding for finding in doctor.packages()}
    assert not found["torch"].ok and "2.6 or newer" in found["torch"].detail and "torch>=2.6" in found["torch"].advice
    assert found["numpy"].ok
    assert doctor.numbers_of("2.13.0+cpu") > doctor.numbers_of("2.6") and doctor.numbers_of("nightly") == []


def test_lowest_versions_are_the_projects():
    assert doctor.lowest_versions()["torch"] == "2.6"


def test_only_essential_findings_decide():
    good, note, bad = Finding("a", "x"), Finding("b", "y", ok=False, essential=False), Finding("c", "z", ok=False)
    assert Report({"s": [good, note]}).ok
    assert not Report({"s": [good, note, bad]}).ok
    text = doctor.as_text(Report({"s": [good, note, bad]}))
    assert "something essential" in text and "FAIL c: z" in text and "note b: y" in text
    json.dumps(Report({"s": [good]}).as_dict())


def test_machine_without_gpu_is_told_so(monkeypatch):
    answer = {"torch": "2.13.0+cpu", "cuda_build": None, "threads": 2, "gpus": [], "warp_cuda": False}
    monkeypatch.setattr(doctor, "_run_child", lambda arguments, timeout_s, key: answer)
    devices, found = doctor.find_devices(timeout_s=1)
    assert devices == ["cpu"]
    assert "CPU build" in found[-1].advice and not found[-1].essential
    answer["cuda_build"] = "13.0"
    assert "nvidia-smi" in doctor.find_devices(timeout_s=1)[1][-1].advice


def test_triton_s_compiler_is_looked_for(monkeypatch, tmp_path):
    (tmp_path / "Python.h").write_text("")
    monkeypatch.setattr(doctor.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/clang" if name == "clang" else None)
    found = doctor.compiler_for_triton()
    assert found.ok and found.detail == "/usr/bin/clang" and not found.advice
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    (tmp_path / "Python.h").unlink()
    found = doctor.compiler_for_triton()
    assert not found.ok and not found.essential and found.detail == "no gcc or clang and no Python.h"
    assert "apt install gcc python3-dev" in found.advice
    monkeypatch.setenv("CC", "/opt/cc")
    assert doctor.compiler_for_triton().detail == "no Python.h"
    answer = {"torch": "2.13.0", "threads": 1, "cuda_build": "13.0", "warp_cuda": True}
    answer["gpus"] = [{"name": "H100", "memory_gib": 79.0, "capability": "9.0"}]
    monkeypatch.setattr(doctor, "_run_child", lambda *given: answer)
    devices, sections = doctor.find_devices(timeout_s=1)
    assert devices == ["cpu", "cuda:0"] and sections[-1].name == "C compiler for Triton" and not sections[-1].ok


def test_a_whole_examination_of_this_machine():
    report = doctor.examine()
    assert list(report.sections)[:4] == ["machine", "packages", "devices", "probes on cpu"]
    assert report.ok, doctor.as_text(report)
    probes = {finding.name: finding for finding in report.sections["probes on cpu"]}
    assert probes.keys() == doctor.PROBES.keys() and all(finding.essential for finding in probes.values())
    assert probes["convolution"].detail.startswith("backend cpu; relative error ")
    assert probes["attention"].detail.startswith("backend padded SDPA in float32; relative error ")
    assert "largest error" in probes["tsdf"].detail
    assert json.loads(json.dumps(report.as_dict()))["ok"] is True
    lines = doctor.as_text(report).splitlines()
    assert "probes on cpu:" in lines and lines[-1] == "all that is essential works"
    assert any(line.startswith("  ok   attention: backend padded SDPA in float32") for line in lines)
