"""Prepared sparse SDF files as plain CPU tensors: the training dataset and its collate function."""

from __future__ import annotations

import csv
import dataclasses
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from trellis.datasets.crop import crop_generator, draw_crop
from trellis.utils.blocks import STORAGE_BLOCK, SparseSDFBlocks, c_to_morton_permutation, check_resolution
from trellis.utils.io_utils import load_sparse_sdf

logger = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
_VOXELS = STORAGE_BLOCK**3
_SAFE_ID = re.compile(r"[0-9A-Za-z_-]{1,128}")

WINDOWS = ((8, 0), (8, 4))
"""Side and shift, in blocks, of the attention windows of the published network: they are counted here, for a GPU."""

WindowSizes = dict[tuple[int, int], tuple[int, int]]

_ROWS_PER_PIECE = 256
# In Morton order voxels come in pairs along z, which C order keeps adjacent too: two float16 move as one int32.
_PAIR_PERMUTATION = c_to_morton_permutation().reshape(-1, 2)[:, 0] // 2


@dataclass(frozen=True)
class Item:
    """One shape of the dataset; `num_voxels` (active) and `num_blocks` are None where metadata.csv does not say."""

    sha256: str
    path: Path
    label: str = ""
    patient_id: str = ""
    num_voxels: int | None = None
    num_blocks: int | None = None


class SparseSDF(Dataset):
    """Shapes of one resolution and split from prepared folders.

    Args:
        roots: a prepared folder (metadata.csv and sparse_sdf/), several, or a comma-separated string of them. A folder
            without metadata.csv whose npz files lie in it (or in its sparse_sdf/) counts as training data as a whole.
        resolution: voxels per side; files `{sha256}_r{resolution}.npz` are read.
        split: "train", "val", "test" or "all".
        min_points: shapes with fewer active voxels are refused, with one log line each.
        max_points: shapes with more active voxels are cropped to a box of whole blocks drawn from (seed, epoch, id);
            at least 512, and enough for a block of the shape with its neighbours (13,824 always is), or reading the
            shape is a ValueError.
        snapshot_mc_threshold: 0 alone is accepted, the surface is the 0 level.
        seed: of the crops.
        convert_unsigned: read old files of unsigned distances as double shells, instead of refusing them.

    Attributes:
        items: list of Item in order of sha256, root by root. refused: list of (sha256, reason).

    Samples are dicts as `collate` describes, without the batch column and dimension. An index may be a pair
    (epoch, i), which overrides `set_epoch` for that sample.

    Raises:
        ValueError: an argument breaks its rule, a listed file is missing, or no shape is left.
    """

    def __init__(
        self,
        roots: str | Path | Sequence[str | Path],
        *,
        resolution: int,
        split: str = "train",
        min_points: int | None = None,
        max_points: int | None = None,
        snapshot_mc_threshold: float = 0,
        seed: int = 0,
        convert_unsigned: bool = False,
    ) -> None:
        self.resolution = check_resolution(resolution)
        if split not in (*SPLITS, "all"):
            raise ValueError(f"split must be one of {', '.join(SPLITS)} or all, got {split!r}")
        if snapshot_mc_threshold != 0:
            raise ValueError(
                f"snapshot_mc_threshold must be 0 (the surface is the 0 level, there is no other), "
                f"got {snapshot_mc_threshold}"
            )
        if min_points is not None and min_points < 0:
            raise ValueError(f"min_points must be null or at least 0, got {min_points}")
        if max_points is not None and max_points < _VOXELS:
            raise ValueError(f"max_points must be null or at least {_VOXELS}, one whole block, got {max_points}")
        self.split = split
        self.min_points = min_points
        self.max_points = max_points
        self.seed = seed
        self.convert_unsigned = convert_unsigned
        self.roots = parse_roots(roots)
        self.items: list[Item] = []
        self.refused: list[tuple[str, str]] = []
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # shared: persistent workers see set_epoch
        for root in self.roots:
            self._add_root(root)
        if not self.items:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.refused[:5]) or "no shape is listed"
            raise ValueError(
                f"{', '.join(map(str, self.roots))}: no shape of split {split!r} at resolution {resolution} ({reasons})"
            )

    def _add_root(self, root: Path) -> None:
        listed = _items_of_metadata(root, self.resolution, self.split) if (root / "metadata.csv").is_file() else None
        if listed is None:
            items, refused = _items_of_flat_folder(root, self.resolution, self.split), []
        else:
            items, refused = listed
        known = {item.sha256 for item in self.items}
        for item in sorted(items, key=lambda item: item.sha256):
            if item.sha256 in known:
                refused.append((item.sha256, f"listed twice; the copy in {root} is left out"))
                continue
            known.add(item.sha256)
            if self.min_points is not None:
                count = self._count(item)
                if count < self.min_points:
                    refused.append((item.sha256, f"{count} active voxels, fewer than min_points = {self.min_points}"))
                    continue
            self.items.append(item)
        for name, reason in refused:
            logger.warning("shape %s is left out: %s", name, reason)
        self.refused.extend(refused)
        missing = [item.path.name for item in items if not item.path.is_file()]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise ValueError(f"{root}: metadata.csv lists files that are not there: {', '.join(missing[:3])}{more}")

    def _count(self, item: Item) -> int:
        if item.num_voxels is not None:
            return item.num_voxels
        return int(np.count_nonzero(active_mask(self._load(item).block_sdf)))

    def _load(self, item: Item) -> SparseSDFBlocks:
        blocks = load_sparse_sdf(item.path, convert_unsigned=self.convert_unsigned)
        if blocks.resolution != self.resolution:
            raise ValueError(f"{item.path}: resolution must be {self.resolution}, got {blocks.resolution}")
        if blocks.num_blocks == 0:
            raise ValueError(f"{item.path}: the file holds no block")
        return blocks

    def __len__(self) -> int:
        return len(self.items)

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that crops are drawn from; seen by workers that are already running."""
        self._epoch.fill_(int(epoch))

    @property
    def share_cropped(self) -> float | None:
        """Share of shapes with more than `max_points` active voxels; None where the counts are not in metadata.csv."""
        if self.max_points is None:
            return 0.0
        counts = [item.num_voxels for item in self.items]
        if any(count is None for count in counts):
            return None
        return sum(count > self.max_points for count in counts) / len(counts)

    def known_sizes(self) -> list[tuple[str, int]]:
        """(id, blocks) of the shapes that are never cropped, where metadata.csv has both counts."""
        return [
            (item.sha256, item.num_blocks)
            for item in self.items
            if item.num_blocks is not None and item.num_voxels is not None
            and (self.max_points is None or item.num_voxels <= self.max_points)
        ]

    def expected_blocks(self) -> list[int] | None:
        """Blocks of each sample, of a crop about; None where metadata.csv lacks a count."""
        expected = []
        for item in self.items:
            if item.num_blocks is None or item.num_voxels is None:
                return None
            kept = 1.0 if self.max_points is None else min(1.0, self.max_points / max(1, item.num_voxels))
            expected.append(round(kept * item.num_blocks))
        return expected

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        epoch, i = index if isinstance(index, tuple) else (self.epoch, index)
        item = self.items[i]
        blocks = self._load(item)
        label = item.label or None
        loss = None
        if self.max_points is not None:
            counts = active_counts(blocks.block_sdf)
            if int(counts.sum()) > self.max_points:
                rng = crop_generator(self.seed, epoch, item.sha256)
                try:
                    crop = draw_crop(blocks.block_index, counts, self.max_points, rng)
                except ValueError as error:
                    raise ValueError(f"{item.path}: {error}") from None
                loss = crop.loss[crop.keep]
                kept = {"block_index": blocks.block_index[crop.keep], "block_sdf": blocks.block_sdf[crop.keep]}
                blocks = dataclasses.replace(blocks, **kept)
        sample = sample_from_blocks(blocks, sha256=item.sha256, label=label)
        empty = ~sample["active"].numpy().view(np.uint64).any(axis=1)
        if empty.any():
            raise ValueError(f"{item.path}: {int(empty.sum())} blocks hold no active voxel")
        if loss is not None:
            sample |= {"loss_blocks": torch.from_numpy(loss), "cropped": True}
        return sample


def active_mask(block_sdf: np.ndarray) -> np.ndarray:
    """|v| < 1 of a contiguous float16 array, by bit patterns (six times faster than abs on float16)."""
    return (block_sdf.view(np.uint16) & np.uint16(0x7FFF)) < np.uint16(0x3C00)


def active_counts(block_sdf: np.ndarray) -> np.ndarray:
    """Active voxels [M] int64 of each block of [M, 8, 8, 8] float16."""
    counts = np.empty(len(block_sdf), dtype=np.int64)
    rows = np.ascontiguousarray(block_sdf).reshape(-1, _VOXELS)
    for start in range(0, len(rows), _ROWS_PER_PIECE):
        piece = slice(start, start + _ROWS_PER_PIECE)
        counts[piece] = count_true(active_mask(rows[piece]))
    return counts


def count_true(mask: np.ndarray) -> np.ndarray:
    """True values [M] of each row of a contiguous mask [M, 512]."""
    # Eight columns at once: a row's 64 words sum to eight byte counters of at most 64 each.
    return mask.view(np.uint64).sum(axis=1).view(np.uint8).reshape(-1, 8).sum(axis=1)


def _morton_rows(block_sdf: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values and active mask, [M, 512] each, in Morton order from C order; in pieces that stay in cache."""
    pairs = block_sdf.view(np.int32)
    out = np.empty_like(pairs)
    active = np.empty(block_sdf.shape, dtype=bool)
    for start in range(0, len(pairs), _ROWS_PER_PIECE):
        piece = slice(start, start + _ROWS_PER_PIECE)
        np.take(pairs[piece], _PAIR_PERMUTATION, axis=1, out=out[piece], mode="clip")  # clip: no bounds-check copy
        active[piece] = active_mask(out[piece])
    return out.view(np.float16), active


def level_sizes(active: np.ndarray) -> list[int]:
    """Distinct occupied voxels at strides 1, 2, 4 and 8.

    Args:
        active: [M, 512] bool, contiguous, rows in Morton order: 8 siblings are adjacent, so one uint64 holds them.
    """
    octets = active.view(np.uint64) != 0
    pairs = octets.view(np.uint64) != 0
    return [
        int(np.count_nonzero(active)),
        int(np.count_nonzero(octets)),
        int(np.count_nonzero(pairs)),
        int(np.count_nonzero(pairs.view(np.uint64))),
    ]


def window_sizes(block_index: np.ndarray) -> WindowSizes:
    """{(side, shift): how many attention windows hold a block, and the most blocks of one} of one sample.

    Args:
        block_index: [M, 3] int, not negative; a window is floor((block + shift) / side) per axis.
    """
    sizes = {}
    for side, shift in WINDOWS:
        x, y, z = (np.asarray(block_index, dtype=np.int64).T + shift) // side
        span = int(max(y.max(initial=0), z.max(initial=0))) + 1
        counts = np.bincount((x * span + y) * span + z)
        sizes[side, shift] = int(np.count_nonzero(counts)), int(counts.max(initial=0))
    return sizes


def sample_from_blocks(blocks: SparseSDFBlocks, *, sha256: str = "", label: str | None = None) -> dict[str, Any]:
    """The training sample of one shape, uncropped; what `SparseSDF` returns and what encoding a shape starts from.

    Returns the keys of `collate` without the batch column: `block_coords` [M, 3], `to_world` [4, 4],
    `blocks_per_sample` and `cropped` scalars, `sha256` and `label` text.
    """
    sdf, active = _morton_rows(np.ascontiguousarray(blocks.block_sdf).reshape(-1, _VOXELS))
    to_world = np.full((4, 4), np.nan) if blocks.to_world is None else blocks.to_world
    return {
        "block_coords": torch.from_numpy(blocks.block_index.astype(np.int32)),
        "block_sdf": torch.from_numpy(sdf),
        "active": torch.from_numpy(active),
        "loss_blocks": torch.ones(blocks.num_blocks, dtype=torch.bool),
        "blocks_per_sample": torch.tensor(blocks.num_blocks),
        "level_sizes": level_sizes(active),
        "window_sizes": window_sizes(blocks.block_index),
        "resolution": blocks.resolution,
        "sha256": sha256,
        "label": blocks.label if label is None else label,
        "to_world": torch.from_numpy(np.array(to_world, dtype=np.float64)),
        "cropped": False,
    }


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Concatenate samples to a batch; rows sorted by sample, then Morton.

    Returns:
        `block_coords` int32 [M, 4] (batch, x, y, z) of 8-cubed blocks; `block_sdf` float16 [M, 512] in Morton order
        inside the block; `active` bool [M, 512]; `loss_blocks` bool [M], False on the one-block rim of a crop's cut;
        `blocks_per_sample` int64 [B]; `level_sizes` list of 4 ints, distinct occupied voxels at strides 1, 2, 4, 8;
        `window_sizes` as the function of that name, of all samples; `resolution` int; `sha256`, `label` lists of text;
        `to_world` float64 [B, 4, 4], NaN where a file has none; `cropped` bool [B].

    Raises:
        ValueError: no sample, or samples of different resolutions.
    """
    if not samples:
        raise ValueError("a batch needs at least one sample")
    resolutions = sorted({sample["resolution"] for sample in samples})
    if len(resolutions) > 1:
        raise ValueError(f"the samples of a batch must share one resolution, got {resolutions}")
    counts = torch.stack([sample["blocks_per_sample"] for sample in samples]).to(torch.int64)
    batch = torch.repeat_interleave(torch.arange(len(samples), dtype=torch.int32), counts)
    coords = torch.cat([sample["block_coords"] for sample in samples])
    return {
        "block_coords": torch.cat([batch[:, None], coords], dim=1),
        **{key: torch.cat([sample[key] for sample in samples]) for key in ("block_sdf", "active", "loss_blocks")},
        "blocks_per_sample": counts,
        "level_sizes": [sum(sizes) for sizes in zip(*(sample["level_sizes"] for sample in samples))],
        "window_sizes": joined_window_sizes([sample["window_sizes"] for sample in samples]),
        "resolution": resolutions[0],
        "sha256": [sample["sha256"] for sample in samples],
        "label": [sample["label"] for sample in samples],
        "to_world": torch.stack([sample["to_world"] for sample in samples]),
        "cropped": torch.tensor([sample["cropped"] for sample in samples]),
    }


def joined_window_sizes(sizes: Sequence[WindowSizes]) -> WindowSizes:
    """Of a batch from `window_sizes` of its samples, which share no window."""
    return {kind: (sum(s[kind][0] for s in sizes), max(s[kind][1] for s in sizes)) for kind in WINDOWS}


def parse_roots(roots: str | Path | Sequence[str | Path]) -> list[Path]:
    """Folders from one path, a list, or a comma-separated string; ValueError for one that is no folder."""
    if isinstance(roots, Path) or (isinstance(roots, str) and Path(roots).is_dir()):
        roots = [roots]
    elif isinstance(roots, str):
        roots = [part.strip() for part in roots.split(",") if part.strip()]
    paths = [Path(root) for root in roots]
    for path in paths:
        if not path.is_dir():
            raise ValueError(f"{path}: the data folder does not exist")
    if not paths:
        raise ValueError("roots must name at least one data folder, got none")
    return paths


def _items_of_metadata(root: Path, resolution: int, split: str) -> tuple[list[Item], list[tuple[str, str]]]:
    try:
        with open(root / "metadata.csv", newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            columns = list(reader.fieldnames or [])
            rows = list(reader)
    except (OSError, UnicodeError, csv.Error) as error:
        raise ValueError(f"{root / 'metadata.csv'}: not a readable table: {error}") from None
    if "sha256" not in columns:
        raise ValueError(f"{root / 'metadata.csv'}: column sha256 is missing; columns present: {', '.join(columns)}")
    if "split" not in columns:
        logger.warning("%s has no column split: every shape counts as training data", root / "metadata.csv")
    _check_splits(root, rows)
    _check_patients(root, rows)
    items, refused = [], []
    for number, row in enumerate(rows, start=2):
        name = row["sha256"] or ""
        if not _SAFE_ID.fullmatch(name):
            raise ValueError(f"{root / 'metadata.csv'}, line {number}: sha256 must be a plain id, got {name!r}")
        if split not in ("all", row.get("split", "train")):
            continue
        path = root / "sparse_sdf" / f"{name}_r{resolution}.npz"
        column = f"r{resolution}_num_voxels"
        count = row.get(column)
        if row.get("error") and not count:  # with a count it failed at another resolution
            refused.append((name, row["error"]))
            continue
        if column in columns and not count and not path.is_file():
            refused.append((name, f"not prepared at resolution {resolution}"))
            continue
        voxels, blocks = (_int(text, root, number) for text in (count, row.get(f"r{resolution}_num_blocks")))
        items.append(Item(name, path, row.get("label") or "", row.get("patient_id") or "", voxels, blocks))
    return items, refused


def _check_patients(root: Path, rows: Sequence[dict[str, str]]) -> None:
    """ValueError for a patient whose shapes are in two splits: figures on such a split mean nothing."""
    splits: dict[str, str] = {}
    for row in rows:
        patient, split = row.get("patient_id"), row.get("split")
        if patient and split and splits.setdefault(patient, split) != split:
            both = f"{splits[patient]} and {split}"
            raise ValueError(f"{root / 'metadata.csv'}: patient {patient} is in two splits, {both}")


def _check_splits(root: Path, rows: Sequence[dict[str, str]]) -> None:
    """ValueError for a split of another name; shapes of no split, which preparation may leave, are counted aloud."""
    without = 0
    for number, row in enumerate(rows, start=2):
        split = row.get("split", SPLITS[0])
        if split and split not in SPLITS:
            raise ValueError(
                f"{root / 'metadata.csv'}, line {number}: split must be one of {', '.join(SPLITS)}, or empty for none "
                f"of them, got {split!r}"
            )
        without += not split and not row.get("error")
    if without:
        logger.warning("%s: %d shapes have an empty split and belong to none", root / "metadata.csv", without)


def _int(text: str | None, root: Path, line: int) -> int | None:
    if not text:
        return None
    try:
        return int(float(text))
    except (ValueError, OverflowError):
        raise ValueError(
            f"{root / 'metadata.csv'}, line {line}: a count of voxels or blocks must be a number, got {text!r}"
        ) from None


def _items_of_flat_folder(root: Path, resolution: int, split: str) -> list[Item]:
    suffix = f"_r{resolution}.npz"
    folder = root if any(root.glob(f"*{suffix}")) else root / "sparse_sdf"
    paths = sorted(folder.glob(f"*{suffix}")) if folder.is_dir() else []
    if not paths:
        raise ValueError(f"{root}: neither metadata.csv nor a file *{suffix} is there")
    if split not in ("train", "all"):
        return []
    logger.info("%s has no metadata.csv: its %d files of resolution %d count as training data", root, len(paths),
                resolution)
    return [Item(path.name.removesuffix(suffix), path) for path in paths]
