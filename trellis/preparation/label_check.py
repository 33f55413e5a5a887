"""Whether the values of a volume are labels, or intensities of an image that got among them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from trellis.geometry.volume import LabelVolume

MAX_UNNAMED, FEW_UNNAMED = 256, 4
CONNECTED = 0.25
"""Median agreement of labels; see `agreement` for that of atlases and of images."""

_VOXELS_LOOKED_AT = 1 << 21


def check_labels(layers: Sequence[LabelVolume], named: Collection[int]) -> None:
    """Refuse a volume whose values without a name are probably no labels.

    That is more than MAX_UNNAMED of them; or more than FEW_UNNAMED, if most of them are scattered: their voxels have
    other values beside them (see `agreement`).

    Raises:
        ValueError: says what to do.
    """
    from trellis.geometry.volume import labels_of

    for layer in layers:
        unnamed = sorted(set(labels_of(layer)).difference(named))
        if len(unnamed) <= FEW_UNNAMED:
            continue
        shares = agreement(layer.data, unnamed)
        shares = shares[np.isfinite(shares)]
        scattered = len(shares) > 0 and float(np.median(shares)) < CONNECTED
        if len(unnamed) > MAX_UNNAMED or scattered:
            raise ValueError(
                f"it has {len(unnamed)} values without a name{', scattered over it' if scattered else ''}: probably an "
                "image and no labels. Leave it out (--exclude), give a --threshold, or name its labels (--label-names)"
            )


def agreement(data: np.ndarray, values: Sequence[int]) -> np.ndarray:
    """How connected each value is: of the pairs of labelled voxels side by side of which one or both have the value,
    the share where both have it.

    Median over values: 0.65 to 0.90 in AAL, AICHA and JHU's tracts, 0.01 to 0.03 in a T1 image and tissue maps
    (printed by `python tests/preparation/test_label_check.py VOLUME...`).

    Args:
        data: [X, Y, Z] integers >= 0, 0 is background; of large volumes some slices are looked at.
        values: ascending.

    Returns:
        [V] float64, NaN for a value without such a pair.
    """
    data = data[:: max(1, data.size // _VOXELS_LOOKED_AT)]
    place = np.searchsorted(values, data).clip(max=len(values) - 1)
    place[np.asarray(values)[place] != data] = len(values)  # background and named labels
    both, one = np.zeros(len(values) + 1), np.zeros(len(values) + 1)
    for axis in (1, 2):
        near = [slice(None)] * 3, [slice(None)] * 3
        near[0][axis], near[1][axis] = slice(None, -1), slice(1, None)
        first, second = tuple(near[0]), tuple(near[1])
        labelled = (data[first] != 0) & (data[second] != 0)
        a, b = place[first][labelled], place[second][labelled]
        both += np.bincount(a[a == b], minlength=len(both))
        one += np.bincount(a[a != b], minlength=len(one)) + np.bincount(b[a != b], minlength=len(one))
    with np.errstate(invalid="ignore"):
        return (both / (both + one))[:-1]
