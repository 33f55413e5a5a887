"""Which cube a shape is put into: its own, its patient's, or one of fixed size."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SHAPE, PATIENT, FIXED = "shape", "patient", "fixed-mm"


@dataclass(frozen=True)
class Frame:
    """A rule for cubes.

    Attributes:
        kind: "shape" (the longest side of the shape is 0.95 of the cube), "patient" (the same for all shapes of a
            patient together, so that size and place survive) or "fixed-mm" (the cube is `size_mm` wide and centred on
            the shape, so that size survives).
    """

    kind: str = SHAPE
    size_mm: float | None = None


def parse_frame(text: str) -> Frame:
    """A frame from "shape", "patient" or "fixed-mm:SIZE"; ValueError for anything else."""
    if text in (SHAPE, PATIENT):
        return Frame(text)
    match = re.fullmatch(r"fixed-mm:(\d+(?:\.\d*)?|\.\d+)", text)
    if match and 0 < float(match[1]) <= 1e6:
        return Frame(FIXED, float(match[1]))
    raise ValueError(f"frame must be shape, patient or fixed-mm:SIZE with SIZE in mm above 0, got {text!r}")


def box_of(vertices: np.ndarray) -> list[list[float]]:
    """[[x, y, z], [x, y, z]], the corners of the box of vertices [V, 3] as they are stored, in float32."""
    stored = np.asarray(vertices, dtype=np.float32)
    return [stored.min(axis=0).astype(float).tolist(), stored.max(axis=0).astype(float).tolist()]


Box = Sequence[Sequence[float]]


def cube_of(frame: Frame, box: Box, patient_boxes: Sequence[Box]) -> np.ndarray:
    """The `to_world` [4, 4] of a shape.

    Args:
        box: the shape's, as `box_of` gives it, mm. patient_boxes: those of all shapes of its patient.

    Raises:
        ValueError: the shape is longer than 0.95 of a fixed cube.
    """
    from trellis.geometry.transforms import FILL, normalising_transform

    if frame.kind == PATIENT:
        return normalising_transform(np.concatenate([np.asarray(corners) for corners in patient_boxes]))
    if frame.kind == SHAPE:
        return normalising_transform(np.asarray(box))
    low, high = np.asarray(box)
    longest = float((high - low).max())
    if longest > FILL * frame.size_mm:
        raise ValueError(
            f"the shape does not fit frame fixed-mm:{frame.size_mm:g}: its longest side may be {FILL:g} of that, "
            f"{FILL * frame.size_mm:.6g} mm, and is {longest:.6g} mm"
        )
    to_world = np.eye(4)
    to_world[:3, :3] *= frame.size_mm
    to_world[:3, 3] = (low + high) / 2
    return to_world
