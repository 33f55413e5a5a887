"""Splits: quotas, the same on every run, stable when patients come and go."""

from __future__ import annotations

import pytest

from trellis.preparation.split import SPLITS, assign_splits, patient_order_key


def keys(n, seed=0):
    return {f"p{i}": patient_order_key(seed, [f"content{i}", f"other{i}"]) for i in range(n)}


def counts(splits):
    return tuple(sum(value == split for value in splits.values()) for split in SPLITS)


@pytest.mark.parametrize(
    ("n", "expected"),
    [(1, (1, 0, 0)), (2, (1, 0, 1)), (3, (1, 1, 1)), (10, (8, 1, 1)), (24, (20, 2, 2)), (99, (79, 10, 10))],
)
def test_quotas(n, expected):
    assert counts(assign_splits(keys(n))) == expected


def test_no_patient():
    assert assign_splits({}) == {}


def test_small_numbers_are_announced(caplog):
    assign_splits(keys(2))
    assert "cannot fill three splits" in caplog.text


def test_the_draw_depends_on_seed_and_content_alone():
    first = assign_splits(keys(30))
    assert assign_splits(dict(reversed(keys(30).items()))) == first
    assert assign_splits(keys(30, seed=1)) != first
    renamed = {f"other_{name}": key for name, key in keys(30).items()}
    assert assign_splits(renamed) == {f"other_{name}": split for name, split in first.items()}
    assert patient_order_key(0, ["a", "b"]) == patient_order_key(0, ["b", "a"])


def test_nobody_moves_when_patients_are_added():
    previous = assign_splits(keys(20))
    grown = assign_splits(keys(50), previous=previous)
    assert all(grown[patient] == split for patient, split in previous.items())
    assert counts(grown) == (40, 5, 5)


def test_added_patients_move_few_even_without_memory():
    before, after = assign_splits(keys(100)), assign_splits(keys(101))
    assert sum(before[patient] != after[patient] for patient in before) <= 2


def test_an_emptied_split_is_filled_and_said(caplog):
    previous = assign_splits(keys(10))
    left = {patient: key for patient, key in keys(10).items() if previous[patient] != "test"}
    again = assign_splits(left, previous=previous)
    assert counts(again)[2] == 1 and "no patient left" in caplog.text
    assert sum(again[patient] != previous[patient] for patient in left) == 1


def test_fractions():
    assert counts(assign_splits(keys(10), fractions=(0.5, 0.3, 0.2))) == (5, 3, 2)
    assert counts(assign_splits(keys(10), fractions=(1.0, 0.0, 0.0))) == (10, 0, 0)
    assert counts(assign_splits(keys(4), fractions=(0.1, 0.45, 0.45)))[0] >= 1
    for bad in ((0.5, 0.5, 0.5), (0.8, 0.2), (1.2, -0.1, -0.1), (0.0, 0.5, 0.5)):
        with pytest.raises(ValueError, match="fractions"):
            assign_splits(keys(4), fractions=bad)
