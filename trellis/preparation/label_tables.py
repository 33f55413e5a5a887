"""Tables that name the labels of volumes: where they are found, and nnU-Net's regions, which join several values."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trellis.geometry.label_names import BACKGROUND_NAMES, MAX_TABLE_BYTES, read_label_names
from trellis.preparation.label_check import check_labels

if TYPE_CHECKING:
    from trellis.geometry.volume import LabelVolume

NNUNET_TABLE = "dataset.json"


@dataclass(frozen=True)
class Regions:
    """Labels that are unions of values and may overlap, as nnU-Net's region-based training has them.

    Attributes:
        values: name of a region to the values that are in it.
    """

    values: Mapping[str, tuple[int, ...]]

    def layers(self, volumes: Sequence[LabelVolume]) -> list[LabelVolume]:
        """One volume a region that is present. A region of one value has it for a label (the first of several that do),
        others have numbers above all values.

        Raises:
            ValueError: no region is present, or one has a value that several segments of the file share.
        """
        from trellis.geometry.volume import LabelVolume, as_labels, labels_of

        present = {volume.file_values.get(value, value) for volume in volumes for value in labels_of(volume)}
        joined = {value for values in self.values.values() for value in values}
        shared = sorted(joined & _shared_values(volumes))
        if shared:
            raise ValueError(
                f"regions of the label table join the values {shared[:10]}, and the file has several segments of these "
                "in layers that overlap: save it with a value for each segment, or give a table of another kind"
            )
        following, taken = max(present | joined) + 1, set[int]()
        rest = sorted(present - joined)
        notes = (f"values {rest[:10]} are in none of the regions of the label table",) if rest else ()
        result = []
        for name, values in self.values.items():
            # a number that the reader has given away is none of the table's
            mask = np.any([np.isin(v.data, [n for n in values if n not in v.file_values]) for v in volumes], axis=0)
            number = values[0]
            if len(values) > 1 or number in taken:
                number, following = following, following + 1
            if mask.any():
                taken.add(number)
                data, kept = as_labels(mask * np.int32(number)), (*volumes[0].notes, *notes)
                file_values = {number: values[0]} if len(values) == 1 and number != values[0] else {}
                result.append(LabelVolume(data, volumes[0].affine, {number: name}, kept, file_values))
        if not result:
            raise ValueError(f"none of the regions {list(self.values)} is there; its values are {sorted(present)[:10]}")
        return result


LabelNames = Mapping[int, str] | Regions


def _shared_values(layers: Sequence[LabelVolume]) -> set[int]:
    """Values in the file that stand for several segments."""
    return {value for layer in layers for value in layer.file_values.values()}


def read_table(path: str | Path) -> LabelNames:
    """Names of label values, or the regions of an nnU-Net `dataset.json` whose labels are lists of values.

    Raises:
        ValueError: see `trellis.geometry.label_names.read_label_names`; a region that is no list of whole numbers.
    """
    path = Path(path)
    labels = _labels_of_json(path) if path.suffix.lower() == ".json" else {}
    if not any(isinstance(value, list) and len(value) > 1 for value in labels.values()):
        return read_label_names(path)
    values = {}
    for name, value in labels.items():
        joined = value if isinstance(value, list) else [value]
        if not joined or not all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in joined):
            raise ValueError(f"{path}: a region must be a list of label values from 0, got {value!r} for {name!r}")
        if name.strip().lower() not in BACKGROUND_NAMES and joined != [0]:
            if name.strip() in values:
                raise ValueError(f"{path}: two regions are called {name.strip()!r}")
            values[name.strip()] = tuple(joined)
    return Regions(values)


def _labels_of_json(path: Path) -> dict[str, Any]:
    """The labels of an nnU-Net table as they are written; empty for anything else, of which its reader says more."""
    try:
        if path.stat().st_size > MAX_TABLE_BYTES:
            return {}
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    labels = document.get("labels") if isinstance(document, dict) else None
    return labels if isinstance(labels, dict) else {}


def digest_of(names: LabelNames | None) -> str | None:
    """16 hexadecimal digits that tell one table from another."""
    if names is None:
        return None
    pairs = names.values if isinstance(names, Regions) else names
    return hashlib.sha256(json.dumps(sorted(map(list, pairs.items()))).encode()).hexdigest()[:16]


def candidate_tables(path: Path, data_root: Path) -> Iterator[Path]:
    """Files that may name the labels of a volume: one of its own name beside it, then dataset.json in its folder, the
    folder above, and on the way up to DATA_ROOT."""
    path, data_root = Path(os.path.abspath(path)), Path(os.path.abspath(data_root))
    if path.is_file():
        from trellis.geometry.volume_readers import volume_suffix

        stem = path.name[: -len(volume_suffix(path))]
        bases = dict.fromkeys((stem, path.name, path.name.removesuffix(".gz")))
        for base in bases:
            for suffix in (".txt", ".csv", ".tsv", ".ctbl", ".label", ".json"):
                yield path.parent / (base + suffix)
    yield path.parent / NNUNET_TABLE
    for folder in path.parents[1:]:
        yield folder / NNUNET_TABLE
        if data_root not in folder.parents:
            return


def find_table(path: Path, data_root: Path, problems: list[str] | None = None) -> Path | None:
    """The first of `candidate_tables` that is there and names labels.

    One that cannot be read as a table is passed over, and `problems` then receives why, without the volume's name. A
    .json of the volume's own name is passed over in silence: most are parameters of the scan.
    """
    for candidate in candidate_tables(path, data_root):
        if candidate.is_file():
            try:
                read_table(candidate)
            except (ValueError, OSError) as error:
                suffix = candidate.suffix
                if problems is not None and (candidate.name == NNUNET_TABLE or suffix != ".json"):
                    what = NNUNET_TABLE if suffix == ".json" else f"a {suffix} file of the volume's name"
                    problems.append(f"{what} names no labels: {str(error).removeprefix(f'{candidate}: ')}")
                continue
            return candidate
    return None


def named_layers(
    layers: Sequence[LabelVolume], names: LabelNames, *, masks: bool
) -> tuple[Sequence[LabelVolume], dict[int, str]]:
    """Volumes whose labels are the shapes, and the names that are known of them.

    Args:
        layers: as `trellis.geometry.volume.read_label_layers` gives them. names: of a table; they go before names that
            a file carries itself, but for values that several segments of the file share: which of them the table
            means is not known, so these keep the file's names, with a note. masks: the volumes are masks in a folder,
            which are called as their files are.

    Raises:
        ValueError: it looks like an image (`check_labels`), none of the table's regions is there, or one has a value
            that segments share.
    """
    own = {number: name for layer in layers for number, name in layer.names.items()}
    if masks:
        return layers, own
    if isinstance(names, Regions):
        check_labels(layers, {value for values in names.values.values() for value in values})
        layers = names.layers(layers)
        return layers, {number: name for layer in layers for number, name in layer.names.items()}
    given_away = {number for layer in layers for number in layer.file_values}
    known = {**own, **{number: name for number, name in names.items() if number not in given_away}}
    unused = sorted(_shared_values(layers) & names.keys())
    if unused:
        note = f"values {unused[:10]} are of several segments each, in layers that overlap: no label table names those"
        layers = [replace(layers[0], notes=(*layers[0].notes, note)), *layers[1:]]
    check_labels(layers, known.keys())
    return layers, known
