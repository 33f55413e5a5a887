"""`sharp_features` on tensors: flat sides extended on the device; the loops at features, few, filled on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from trellis.geometry.isosurface import EDGE_MARGIN
from trellis.geometry.mc_table import case_table
from trellis.geometry.sharp_features import (
    BEND_COSINE,
    FLAT_NEIGHBOURS,
    FLAT_VOXELS,
    PARALLEL_COSINE,
    REACH_VOXELS,
    ROUNDS,
    SHARP_COSINE,
    fill_sharp_loops,
)

_SIDES = ((0, 1), (1, 2), (2, 0))
_LOOSE = 1e-3
"""Loops so little below the bound on cosines are handed on too: `fill_sharp_loops` decides, in its own rounding."""


def sharpen_tensors(
    vertices: Tensor, normals: Tensor, reliable: Tensor, faces: Tensor, table_rows: Tensor, chunk_faces: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `sharp_features.sharpen`; the faces that stay come first and the others after them.

    Args:
        vertices: [V, 3] float64 in voxels; normals: [V, 3] float32; reliable: [V] bool; faces: [F, 3] int32;
            table_rows: [F] int16.
        chunk_faces: triangles that are worked on at once.
    """
    vertices, normals, reliable = extend_flat_sides(vertices, normals, reliable, faces, chunk_faces)
    chosen = _faces_of_sharp_loops(normals, reliable, faces, table_rows, chunk_faces)
    if not bool(chosen.any()):
        return vertices, normals, faces
    part, rest = faces[chosen].long(), faces[~chosen]
    used, local = torch.unique(part, return_inverse=True)
    given = (vertices[used], normals[used], reliable[used], local, table_rows[chosen])
    points, _, filled = (torch.from_numpy(x) for x in fill_sharp_loops(*(x.cpu().numpy() for x in given)))
    added = points[len(used) :].to(vertices.device)
    name = torch.cat([used, torch.arange(len(added), device=used.device) + len(vertices)])
    return (
        torch.cat([vertices, added]),
        torch.cat([normals, normals.new_zeros(len(added), 3)]),
        torch.cat([rest, name[filled.to(used.device)].int()]),
    )


def _faces_of_sharp_loops(
    normals: Tensor, reliable: Tensor, faces: Tensor, table_rows: Tensor, chunk_faces: int
) -> Tensor:
    """[F] bool, the triangles of all loops with two well-known normals far apart in one triangle, and a few more."""
    table = case_table()
    loop_of = torch.from_numpy(table.loop_of_triangle).to(faces.device)
    loop_start = torch.from_numpy(table.loop_triangle).to(faces.device)
    loop_size = torch.bincount(loop_of)
    chosen = torch.zeros(len(faces), dtype=torch.bool, device=faces.device)
    for start in range(0, len(faces), chunk_faces):
        part = faces[start : start + chunk_faces]
        normal, known = normals[part], reliable[part]
        sharp = torch.zeros(len(part), dtype=torch.bool, device=faces.device)
        for i, j in _SIDES:
            cosine = (normal[:, i] * normal[:, j]).sum(1)
            sharp |= known[:, i] & known[:, j] & (cosine < SHARP_COSINE + _LOOSE)
        found = sharp.nonzero()[:, 0] + start
        row = table_rows[found].long()
        loop = loop_of[row]
        first = found - (row - loop_start[loop])
        for k in range(int(loop_size.max())):
            chosen[(first + k)[k < loop_size[loop]]] = True
    return chosen


def extend_flat_sides(
    vertices: Tensor, normals: Tensor, reliable: Tensor, faces: Tensor, chunk_faces: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `sharp_features._extend_flat_sides`, where the reasons are; in chunks of faces."""
    near = torch.zeros(len(vertices), dtype=torch.bool, device=faces.device)
    for part in faces.split(chunk_faces):
        normal = normals[part]
        turn = (normal * normal.roll(-1, 1)).sum(2).amin(1)
        near[part[(turn < BEND_COSINE) | ~reliable[part].all(1)].view(-1).long()] = True
    if not bool(near.any()):
        return vertices, normals, reliable
    side, parallels = reliable.clone(), torch.zeros(len(vertices), dtype=torch.int32, device=faces.device)
    for one, two in _links(faces, near, chunk_faces):
        known = reliable[one] & reliable[two]
        one, two = one[known], two[known]
        normal = normals[one]
        cosine = (normal * normals[two]).sum(1)
        parallel = one[cosine > PARALLEL_COSINE]
        parallels.index_add_(0, parallel, torch.ones_like(parallel, dtype=torch.int32))
        height = ((vertices[two] - vertices[one]) * normal).sum(1)
        side[one[(cosine > SHARP_COSINE) & (height.abs() > FLAT_VOXELS)]] = False
    side &= parallels >= FLAT_NEIGHBOURS
    del parallels
    if not bool(side.any()):
        return vertices, normals, reliable
    plane = torch.where(side, torch.arange(len(vertices), device=faces.device), -1)
    vertices, normals, reliable = vertices.clone(), normals.clone(), reliable.clone()
    for _ in range(ROUNDS):
        found = []
        for one, two in _links(faces, near, chunk_faces):
            open_ = (plane[one] < 0) & (plane[two] >= 0)
            found.append((one[open_], two[open_]))
        one, two = (torch.cat(column) for column in zip(*found))
        _hand_on_planes(vertices, normals, reliable, plane, one, two)
    return vertices, normals, reliable


def _links(faces: Tensor, near: Tensor, chunk_faces: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Sides (one, two) int64 of the faces with a vertex in `near`, in the order of `sharp_features`."""
    for i, j in _SIDES:
        for part in faces.split(chunk_faces):
            chosen = part[near[part].any(1)].long()
            yield chosen[:, i], chosen[:, j]


def _hand_on_planes(
    vertices: Tensor, normals: Tensor, reliable: Tensor, plane: Tensor, one: Tensor, two: Tensor
) -> None:
    """One round: vertices `one` without a plane take that of their neighbour `two`, or one of several; in place."""
    bent = (normals[one] * normals[two]).sum(1) < BEND_COSINE
    unsure = ~reliable
    unsure[one[bent]] = True
    chosen = unsure[one]
    vertex, giver = one[chosen], plane[two[chosen]]
    # of the vertex's coordinates, the one along its grid edge is no integer
    place = vertices[vertex]
    axis = (place - place.round()).abs().argmax(1, keepdim=True)
    normal = normals[giver].double()
    height = ((place - vertices[giver]) * normal).sum(1)
    slope = normal.gather(1, axis)[:, 0]
    move = torch.where(slope == 0, torch.inf, -height / torch.where(slope == 0, 1.0, slope))
    here = place.gather(1, axis)[:, 0]
    low = here.floor()
    here = here + move
    fits = (move.abs() < REACH_VOXELS) & (here > low) & (here < low + 1)
    vertex, giver, slope, here, low, axis = (x[fits] for x in (vertex, giver, slope, here, low, axis[:, 0]))
    if not len(vertex):
        return
    group = torch.unique(vertex, return_inverse=True)[1]
    count = torch.bincount(group)
    home, normal = vertices[giver], normals[giver].double()
    # index_put_ adds in the order of rows on every device, unlike index_add_
    centroid = home.new_zeros(len(count), 3).index_put_((group,), home, accumulate=True) / count[:, None]
    height = ((centroid[group] - home) * normal).sum(1)
    below = height.new_zeros(len(count)).index_put_((group,), height, accumulate=True)
    outward = here * torch.sign(slope) * torch.where(below < 0, 1, -1)[group]
    best = torch.argsort(outward, stable=True)
    best = best[torch.argsort(vertex[best], stable=True)]
    ordered = vertex[best]
    best = best[torch.cat([ordered.new_ones(1).bool(), ordered[1:] != ordered[:-1]])]
    vertex, giver = vertex[best], giver[best]
    plane[vertex], normals[vertex], reliable[vertex] = giver, normals[giver], True
    vertices[vertex, axis[best]] = torch.clamp(here[best], low[best] + EDGE_MARGIN, low[best] + 1 - EDGE_MARGIN)
