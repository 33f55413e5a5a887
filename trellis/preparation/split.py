"""Patients to train, val and test: seeded, whole patients only, stable when patients are added."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping

logger = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
DEFAULT_FRACTIONS = (0.8, 0.1, 0.1)


def patient_order_key(seed: int, content_hashes: Iterable[str]) -> str:
    """Where a patient stands in the draw: a function of the seed and of the content of its sources alone.

    Content and not names, so that the draw is the same in another folder, with another key for pseudonyms, or with
    renamed files, and gives no name away. The smallest of the hashes stays as long as that source stays.
    """
    return min(hashlib.sha256(f"{seed}:{value}".encode()).hexdigest() for value in content_hashes)


def assign_splits(
    order_keys: Mapping[str, str],
    *,
    fractions: tuple[float, float, float] = DEFAULT_FRACTIONS,
    previous: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Assign each patient to "train", "val" or "test".

    Patients are taken in the order of their keys: first test up to its quota, then val, the rest is train. A quota is
    the fraction rounded, at least one patient. Patients of `previous` keep their split; the others fill what is left
    of the quotas, so that nobody moves between splits when patients are added. With two patients there is no val, with
    one only train; both are logged.

    Args:
        order_keys: patient id to the key from `patient_order_key`.
        fractions: train, val, test; they sum to 1. A val or test fraction of 0 gives no patient.
    """
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6 or fractions[0] == 0:
        raise ValueError(f"split fractions must be three numbers (train, val, test) that sum to 1, got {fractions}")
    patients = sorted(order_keys, key=lambda patient: (order_keys[patient], patient))
    quotas = _quotas(len(patients), fractions)
    result = {patient: previous[patient] for patient in patients if previous and previous.get(patient) in SPLITS}
    counts = {split: sum(value == split for value in result.values()) for split in SPLITS}
    for patient in patients:
        if patient not in result:
            split = next((s for s in ("test", "val") if counts[s] < quotas[s]), "train")
            result[patient] = split
            counts[split] += 1
    _fill_empty(patients, result, quotas)
    return result


def _quotas(n: int, fractions: tuple[float, float, float]) -> dict[str, int]:
    if n < 3:
        if n:
            what = "train alone" if n == 1 else "one goes to train, one to test"
            logger.warning("%d patient(s) cannot fill three splits: %s", n, what)
        return {"val": 0, "test": int(n == 2 and fractions[2] > 0)}
    quotas = {s: max(1, int(f * n + 0.5)) if f else 0 for s, f in zip(("val", "test"), fractions[1:])}
    while sum(quotas.values()) >= n:
        quotas[max(quotas, key=lambda s: quotas[s])] -= 1
    return quotas


def _fill_empty(patients: list[str], result: dict[str, str], quotas: dict[str, int]) -> None:
    """Earlier assignments may leave a split without anyone (its patients are gone): move one over, and say so."""
    for split, wanted in (("test", quotas["test"]), ("val", quotas["val"]), ("train", 1)):
        if wanted and patients and split not in result.values():
            counts = {s: sum(value == s for value in result.values()) for s in SPLITS}
            donor = max(SPLITS, key=lambda s: counts[s])
            if counts[donor] < 2:
                continue
            moved = next(patient for patient in patients if result[patient] == donor)
            result[moved] = split
            logger.warning("split %s had no patient left: patient %s moved there from %s", split, moved, donor)
