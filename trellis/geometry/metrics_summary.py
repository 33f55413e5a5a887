"""Summaries of metrics over shapes and patients, and the size of a shape in bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_NOT_METRICS = ("sha256", "label", "patient_id", "split")


def summarise(
    rows: Sequence[Mapping[str, Any]], *, confidence: float = 0.95, num_bootstrap: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Mean, median, 5th and 95th percentile of every numeric column, with a confidence interval of the mean.

    The interval is a percentile bootstrap over patients, because shapes of one patient are not independent: patients
    are drawn with replacement, and all shapes of a drawn patient count (Davison & Hinkley 1997, section 3.8). Rows
    without `patient_id` count as a patient each. Of one patient alone there is no interval: both ends are None.

    Args:
        rows: one mapping a shape; numbers and bools are summarised, other values ignored. A column that is missing or
            None in some rows is summarised over the others, and its `n` says over how many.

    Returns:
        {"n", "n_patients", column: {"n", "mean", "median", "p05", "p95", "ci_low", "ci_high"}}; no rows give n = 0
        alone.

    Raises:
        ValueError: a value that is NaN or infinite; names row and column.
    """
    patients = [str(row["patient_id"]) if row.get("patient_id") else f"row {i}" for i, row in enumerate(rows)]
    names, patient = np.unique(np.array(patients, dtype=object), return_inverse=True) if patients else ([], None)
    result: dict[str, Any] = {"n": len(rows), "n_patients": len(names)}
    if not rows:
        return result
    draws = np.random.default_rng(seed).integers(len(names), size=(num_bootstrap, len(names)))
    columns = dict.fromkeys(key for row in rows for key, value in row.items() if _is_number(key, value))
    for column in columns:
        values = np.array([row[column] if _is_number(column, row.get(column)) else np.nan for row in rows], dtype=float)
        have = np.array([_is_number(column, row.get(column)) for row in rows])
        if not np.isfinite(values[have]).all():
            bad = int(np.flatnonzero(have & ~np.isfinite(values))[0])
            raise ValueError(f"row {bad}: {column} must be finite, got {values[bad]}")
        values, owner = values[have], patient[have]
        sums, counts = np.bincount(owner, values, len(names)), np.bincount(owner, minlength=len(names))
        low = high = None
        if np.count_nonzero(counts) > 1:
            drawn = counts[draws].sum(axis=1)
            means = sums[draws].sum(axis=1)[drawn > 0] / drawn[drawn > 0]
            tail = (1 - confidence) / 2
            low, high = (float(end) for end in np.quantile(means, (tail, 1 - tail)))
        p05, median, p95 = np.quantile(values, (0.05, 0.5, 0.95))
        result[column] = {
            "n": int(have.sum()),
            "mean": float(values.mean()),
            "median": float(median),
            "p05": float(p05),
            "p95": float(p95),
            "ci_low": low,
            "ci_high": high,
        }
    return result


def summarise_by(rows: Sequence[Mapping[str, Any]], key: str, **options: Any) -> dict[str, dict[str, Any]]:
    """`summarise` of the rows of each value of a column, such as `label` or `patient_id`, in sorted order."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(str(row.get(key, "")), []).append(row)
    return {name: summarise(groups[name], **options) for name in sorted(groups)}


def _is_number(column: str, value: object) -> bool:
    return column not in _NOT_METRICS and isinstance(value, (bool, int, float, np.bool_, np.integer, np.floating))


def bits_per_shape(ids: np.ndarray, num_codes: int, block_index: np.ndarray) -> dict[str, float]:
    """Bits to store a shape's tokens: M q log2 K for the codes plus the positions of the blocks.

    Positions are an octree of occupancy: 8 bits for each node that has a block below it, from the root to the level
    above the blocks, and 8 bits for the depth. Neither is entropy-coded, and `to_world` and labels are not counted.

    Args:
        ids: [M] or [M, q] integers in [0, num_codes).
        num_codes: K.
        block_index: [M, 3] non-negative integers, each block once.

    Returns:
        bits_ids, bits_positions, bits (their sum), bits_per_block (0 for a shape without blocks).
    """
    ids, index = np.asarray(ids), np.asarray(block_index).astype(np.int64).reshape(-1, 3)
    if num_codes < 1:
        raise ValueError(f"num_codes must be at least 1, got {num_codes}")
    if ids.ndim not in (1, 2) or len(ids) != len(index):
        raise ValueError(f"ids must be [M] or [M, q] with M = {len(index)} as block_index, got shape {list(ids.shape)}")
    if ids.size and (ids.min() < 0 or ids.max() >= num_codes):
        raise ValueError(f"ids must lie in [0, {num_codes}), got [{ids.min()}, {ids.max()}]")
    if len(index) and index.min() < 0:
        raise ValueError(f"block_index must not be negative, got {index.min()}")
    if len(np.unique(index, axis=0)) != len(index):
        raise ValueError("block_index lists a block twice")
    bits_ids = float(ids.size * np.log2(num_codes))
    positions = 8.0
    if len(index):
        for _ in range(max(1, int(index.max()).bit_length())):
            index = np.unique(index >> 1, axis=0)
            positions += 8.0 * len(index)
    total = bits_ids + positions
    return {
        "bits_ids": bits_ids,
        "bits_positions": positions,
        "bits": total,
        "bits_per_block": total / len(ids) if len(ids) else 0.0,
    }
