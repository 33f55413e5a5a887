"""The self-check passes, and can fail."""

from __future__ import annotations

import numpy as np
import pytest

from trellis.preparation import self_check


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(self_check, "RESOLUTIONS", (32,))


def test_it_passes(small, tmp_path):
    checks = self_check.run_checks(tmp_path, workers=0)
    assert len(checks) > 15 and [check for check in checks if not check.ok] == []


def test_it_notices_a_surface_in_the_wrong_place(small, tmp_path, monkeypatch):
    monkeypatch.setattr(self_check, "SPHERE_CENTRE_MM", self_check.SPHERE_CENTRE_MM.copy())
    make = self_check.make_data

    def make_then_move(root):
        make(root)
        self_check.SPHERE_CENTRE_MM = self_check.SPHERE_CENTRE_MM * np.array([-1, 1, 1])

    monkeypatch.setattr(self_check, "make_data", make_then_move)
    wrong = [check.what for check in self_check.run_checks(tmp_path, workers=0) if not check.ok]
    assert any("sphere" in what for what in wrong) and not any(what.startswith("3 ") for what in wrong)
