"""Connected components in numpy against SciPy's."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from trellis.geometry.block_complement import component_labels


@pytest.mark.parametrize("seed", range(6))
def test_components_of_random_graphs(seed: int):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 400))
    a, b = rng.integers(0, count, (2, int(rng.integers(0, count + 1))))
    before = a.copy(), b.copy()
    labels = component_labels(a, b, count)
    _, want = connected_components(coo_matrix((np.ones(len(a)), (a, b)), shape=(count, count)), directed=False)
    smallest = np.full(want.max() + 1, count)
    np.minimum.at(smallest, want, np.arange(count))
    np.testing.assert_array_equal(labels, smallest[want])
    assert np.array_equal(a, before[0]) and np.array_equal(b, before[1])


def test_components_of_a_long_chain_in_any_order():
    order = np.random.default_rng(0).permutation(3000)
    chain, rest = order[:2000], order[2000:]
    labels = component_labels(chain[:-1], chain[1:], 3000)
    assert (labels[chain] == chain.min()).all()
    np.testing.assert_array_equal(labels[rest], rest)
