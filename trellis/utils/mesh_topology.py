"""Edges and vertices of triangle meshes: closedness as a chain, and merging of identical vertices."""

from __future__ import annotations

import numpy as np


def merge_identical_vertices(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Make vertices with equal coordinates one. [V, 3] float64, [F, 3] int64 in and out; faces keep their order."""
    v = np.asarray(vertices, dtype=np.float64) + 0.0  # -0 and 0 are the same place
    order = np.lexsort(v.T)
    new = np.ones(len(v), dtype=bool)
    new[1:] = (v[order[1:]] != v[order[:-1]]).any(axis=1)
    group = np.empty(len(v), dtype=np.int64)
    group[order] = np.cumsum(new) - 1
    # Numbered by first appearance, so that a mesh without duplicates comes back as it was.
    first = np.full(int(new.sum()), len(v), dtype=np.int64)
    np.minimum.at(first, group, np.arange(len(v)))
    rank = np.empty(len(first), dtype=np.int64)
    by_first = np.argsort(first)
    rank[by_first] = np.arange(len(first))
    return v[first[by_first]], rank[group][faces]


def closed_chain_problem(faces: np.ndarray) -> str | None:
    """None if every directed edge is matched by its reverse as often as it occurs; else a sentence that counts.

    That is what makes the winding number of every point an integer. Edges shared by four or more faces are allowed.
    """
    start, end = faces.ravel(), np.roll(faces, -1, axis=1).ravel()
    n = int(faces.max()) + 1
    low, high = np.minimum(start, end), np.maximum(start, end)
    keys = ((low * n + high) << 1) | (start > end)
    keys = np.sort(keys[low != high])
    edges = keys >> 1
    first = np.flatnonzero(np.concatenate([[True], edges[1:] != edges[:-1]]))
    balance = np.add.reduceat(1 - 2 * (keys & 1), first) if len(keys) else np.zeros(0, np.int64)
    bad = balance != 0
    if not bad.any():
        return None
    count = np.diff(np.concatenate([first, [len(keys)]]))
    open_edges = int((bad & (count == 1)).sum())
    others = int(bad.sum()) - open_edges
    return f"of {len(first)} edges {open_edges} belong to one face only and {others} join faces of opposite direction"
