"""The prepared dataset that the trainer's tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
from training_cases import write_dataset


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("prepared") / "data", 5)
