"""The published network's float32 results, reproduced: always from the compact fixture, and from the full ones."""

from __future__ import annotations

import json

import numpy as np
import pytest
from published_network import COMPACT, HERE, compact, errors_of, published_network, published_shapes, read_fixture

TOLERANCE = {"latent_mean": 1e-5, "latent_logvar": 1e-5, "decoded_sdf": 1e-6}
"""float32 against the published network's own float32"""


@pytest.fixture(scope="module")
def model():
    return published_network()


@pytest.fixture(scope="module", params=[COMPACT, "r64_batch2", "r128"])
def fixture(request):
    folder = HERE if request.param == COMPACT else request.getfixturevalue("parity_dir")
    return read_fixture(folder / f"{request.param}.npz")


@pytest.mark.parametrize("fused", [True, False])
def test_latents_and_field(model, fixture, fused):
    model.fused = fused
    errors = errors_of(model, fixture)
    assert errors.keys() == TOLERANCE.keys()
    for name, error in errors.items():
        print(f"fused={fused}: {name}, {error.size} numbers, largest error {np.abs(error).max():.2e}")
        assert error.size and np.abs(error).max() < TOLERANCE[name]


def test_names_and_shapes(model):
    own = {name: list(value.shape) for name, value in model.state_dict().items() if not name.startswith("quantizer.")}
    assert own == published_shapes() and len(own) == 116


def test_the_compact_fixture_is_the_full_one_in_part(parity_dir):
    made, kept = compact(read_fixture(parity_dir / "r64_batch2.npz")), read_fixture(HERE / f"{COMPACT}.npz")
    assert made.keys() == kept.keys()
    assert all(made[name].dtype == kept[name].dtype and np.array_equal(made[name], kept[name]) for name in made)
    assert json.loads((parity_dir / "state_dict.json").read_text()) == published_shapes()
