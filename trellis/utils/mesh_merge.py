"""Making vertices one: those with equal coordinates, or those of a group. NumPy alone, as training imports it too."""

from __future__ import annotations

import numpy as np

_ODD = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], dtype=np.uint64)


def merge_identical_vertices(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Make vertices with equal coordinates one; -0 and 0 are equal, NaN equals nothing.

    Args:
        vertices: [V, 3] float32, or anything that becomes float64. faces: [F, 3] integers.

    Returns:
        [V', 3] vertices, float32 or float64, in the order of their first appearance, and [F, 3] int64 faces, in theirs.
    """
    v = np.asarray(vertices)
    v = np.ascontiguousarray(v if v.dtype == np.float32 else v.astype(np.float64)) + v.dtype.type(0)
    order = _order32(v) if v.dtype == np.float32 else _order64(v)
    if order is None:
        order = np.lexsort(v.T)
    new = np.ones(len(v), dtype=bool)
    new[1:] = _differ(v, order)
    group = np.empty(len(v), dtype=np.int64)
    group[order] = np.cumsum(new) - 1
    first = np.minimum.reduceat(order, np.flatnonzero(new)) if len(order) else order
    by_first = np.argsort(first)
    rank = np.empty(len(first), dtype=np.int64)
    rank[by_first] = np.arange(len(first))
    return v[first[by_first]], rank[group][faces]


def _order32(v: np.ndarray) -> np.ndarray:
    """An order [V] that puts equal rows together: by their bits, two coordinates to a word."""
    bits = v.view(np.uint32).astype(np.uint64)
    return np.lexsort((bits[:, 2], (bits[:, 0] << np.uint64(32)) | bits[:, 1]))


def _order64(v: np.ndarray) -> np.ndarray | None:
    """The same by one hash of the three coordinates, which sorts faster; None where two places share a hash."""
    words = v.view(np.uint64)
    key = np.zeros(len(v), dtype=np.uint64)
    for axis in range(3):
        mixed = words[:, axis] * _ODD[axis]
        key += mixed ^ (mixed >> np.uint64(29))
    order = np.argsort(key)
    key = key[order]
    return None if ((key[1:] == key[:-1]) & _differ(v, order)).any() else order


def _differ(v: np.ndarray, order: np.ndarray) -> np.ndarray:
    """[V - 1] bool: whether each row, in that order, is unlike the one before."""
    result = np.zeros(max(len(v) - 1, 0), dtype=bool)
    for axis in range(3):
        column = v[order, axis]
        result |= column[1:] != column[:-1]
    return result


def merge_by_group(vertices: np.ndarray, faces: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One vertex per group [V] int64, the first of each; numbered by first appearance, so that nothing else moves."""
    _, first, group = np.unique(group, return_index=True, return_inverse=True)
    by_first = np.argsort(first)
    rank = np.empty(len(first), dtype=np.int64)
    rank[by_first] = np.arange(len(first))
    return vertices[first[by_first]], rank[group][faces]
