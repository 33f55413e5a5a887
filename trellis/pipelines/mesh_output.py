"""Meshes from tensors to files, packed on the tensors' device."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from trellis.utils.mesh_utils import check_mesh_space
from trellis.utils.mesh_writers import PLY_FACE, write_ply_rows


def write_ply_tensors(path: str | Path, vertices: Tensor, faces: Tensor, *, mesh_space: str = "LPS") -> None:
    """What `write_mesh` writes as binary PLY, from tensors of any one device.

    Args:
        vertices: [V, 3] floats, RAS mm. faces: [F, 3] integers from 0 to V - 1.
        mesh_space: "LPS" or "RAS": the axes that are written.

    Raises:
        ValueError: an unknown space, or vertices that are not finite.
    """
    check_mesh_space(mesh_space)
    if not bool(torch.isfinite(vertices).all()):
        raise ValueError(f"{path}: vertices must be finite to be written")
    if mesh_space == "LPS":
        vertices = vertices * torch.tensor([-1, -1, 1], dtype=vertices.dtype, device=vertices.device) + 0.0  # no -0
    rows = torch.full((len(faces), PLY_FACE.itemsize), 3, dtype=torch.uint8, device=faces.device)
    rows[:, 1:] = faces.to(torch.int32).contiguous().view(torch.uint8).view(-1, 12)
    write_ply_rows(Path(path), *(_to_host(part).numpy() for part in (vertices.float(), rows)), mesh_space)


def _to_host(values: Tensor) -> Tensor:
    """A copy in host memory; through pinned memory from CUDA, which is several times as fast."""
    if values.device.type != "cuda":
        return values
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values)
