"""Where kernels can run: without the compiler that Triton's launcher needs, plain PyTorch takes their place."""

from __future__ import annotations

import logging

import pytest
import torch

from trellis.modules.sparse.conv.functional import resolve_backend
from trellis.modules.sparse.kernels import support

CUDA = torch.device("cuda", 0)


class Driver:
    """Triton's, before anything was built."""

    def __init__(self, error: Exception | None) -> None:
        self.error, self.asked = error, 0

    @property
    def active(self) -> Driver:
        self.asked += 1
        if self.error is not None:
            raise self.error
        return self

    utils = object()


@pytest.fixture
def driver_with(monkeypatch: pytest.MonkeyPatch):
    runtime = pytest.importorskip("triton.runtime", reason="Triton is not installed")

    def put(error: Exception | None) -> Driver:
        driver = Driver(error)
        monkeypatch.setattr(runtime, "driver", driver)
        support.triton_works.cache_clear()
        return driver

    yield put
    support.triton_works.cache_clear()


def test_without_a_compiler_plain_pytorch_runs_and_that_is_said_once(driver_with, caplog):
    driver = driver_with(RuntimeError("Failed to find C compiler. Please specify via CC environment variable\nor so"))
    with caplog.at_level(logging.WARNING):
        assert [resolve_backend("auto", CUDA, torch.float16) for _ in range(3)] == ["cpu"] * 3
    assert driver.asked == 1 and len(caplog.records) == 1
    said = caplog.records[0].getMessage()
    assert "Failed to find C compiler" in said and "install these, or set CC" in said and "\n" not in said


def test_with_one_the_kernels_run(driver_with, caplog):
    driver_with(None)
    assert resolve_backend("auto", CUDA, torch.float16) == "triton" and not caplog.records
    assert resolve_backend("auto", CUDA, torch.float64) == "cpu"
    assert resolve_backend("auto", torch.device("cpu")) == "cpu"


def test_what_is_asked_for_by_name_is_no_fallback(driver_with):
    driver_with(RuntimeError("Failed to find C compiler"))
    assert resolve_backend("triton", CUDA, torch.float16) == "triton"


def test_a_cpu_never_asks(driver_with):
    driver = driver_with(RuntimeError("no"))
    assert not support.has_kernels(torch.device("cpu")) and driver.asked == 0
