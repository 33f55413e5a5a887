"""Shared test helpers: GPU selection, and the optional reference material beside the checkout."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

REFERENCE_ROOT = Path(os.environ.get("TRELLIS_REFERENCE_DIR", Path(__file__).resolve().parents[2] / "shared"))
"""Material too large for the repository; tests that need it are skipped without it."""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`-m gpu` leaves files without such a test alone: a machine that only trains lacks what they import."""
    if config.getoption("-m") != "gpu" or collection_path.suffix != ".py":
        return None
    return "mark.gpu" not in collection_path.read_text(encoding="utf-8") or None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect `gpu` tests unless `-m` names them; asked for without a device they fail in their fixture."""
    if "gpu" in (config.getoption("-m") or ""):
        return
    # by marker: the keywords of an item hold the folders' names too
    kept = [item for item in items if item.get_closest_marker("gpu") is None]
    dropped = [item for item in items if item.get_closest_marker("gpu") is not None]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


@pytest.fixture(autouse=True)
def no_handlers_stay() -> Iterator[None]:
    """Commands that run in this process set logging up for a stderr that is pytest's, and gone after the test."""
    root = logging.getLogger()
    before = list(root.handlers)
    yield
    for handler in list(root.handlers):
        if type(handler) is logging.StreamHandler and handler not in before:
            root.removeHandler(handler)


@pytest.fixture
def cuda_device() -> str:
    import torch

    if not torch.cuda.is_available():
        pytest.fail("this test was asked for with -m gpu and there is no CUDA device")
    return "cuda"


@pytest.fixture(scope="session")
def parity_dir() -> Path:
    path = REFERENCE_ROOT / "parity"
    if not path.is_dir():
        pytest.skip("the published network's fixtures are not beside this checkout")
    return path


@pytest.fixture(scope="session")
def anatomy_dir() -> Path:
    path = REFERENCE_ROOT / "data"
    if not path.is_dir():
        pytest.skip("the label volumes for measurements are not beside this checkout")
    return path
