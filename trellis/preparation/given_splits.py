"""Splits that somebody made already: nnU-Net's splits_final.json, or one table of three lists."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from trellis.preparation.discover import Source
from trellis.preparation.layouts import stem
from trellis.preparation.split import SPLITS


def read_splits(path: str | Path, fold: int = 0) -> dict[str, str]:
    """Case or patient name to split.

    Args:
        path: JSON; a list of folds, each {"train": [names], "val": [names]} (nnU-Net's splits_final.json), or one such
            table. A list "test" is read where there is one.
        fold: which entry of a list.

    Raises:
        ValueError: not such a file, no such fold, or a name in two splits.
    """
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a readable JSON file of splits: {error}") from None
    if isinstance(value, list):
        if not 0 <= fold < len(value):
            raise ValueError(f"{path}: fold must be from 0 to {len(value) - 1}, got {fold}")
        value = value[fold]
    if not isinstance(value, dict) or not set(value) & set(SPLITS):
        raise ValueError(f"{path}: lists named {', '.join(SPLITS)} are needed")
    result: dict[str, str] = {}
    for split in SPLITS:
        names = value.get(split, [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{path}: {split} must be a list of names")
        for name in names:
            if result.setdefault(name, split) != split:
                raise ValueError(f"{path}: {name} is in two splits, {result[name]} and {split}")
    return result


def splits_of_patients(
    sources: Iterable[Source], given: Mapping[str, str], shown: Mapping[str, str]
) -> tuple[dict[str, str], list[str]]:
    """The split of each patient whose name, or one of whose files' names, is in the table, and warnings.

    Args:
        sources: everything that was found. given: as `read_splits` returns it.
        shown: patient to the id that messages may use.

    Raises:
        ValueError: the files of a patient are in two splits, or the table names none of the patients.
    """
    result: dict[str, str] = {}
    met = set()
    for source in sources:
        for name in (source.patient, stem(source.path)):
            split = given.get(name)
            if split is None:
                continue
            met.add(name)
            if result.setdefault(source.patient, split) != split:
                raise ValueError(
                    f"patient {shown[source.patient]} is in two splits, {result[source.patient]} and {split}"
                )
    if not result:
        raise ValueError("the splits name none of the patients or files that were found")
    absent = [name for name in given if name not in met]
    if not absent:
        return result, []
    of_split = [name for name in given if given[name] == given[absent[0]]]
    place = f"entry {of_split.index(absent[0]) + 1} of {given[absent[0]]}"  # the name itself may be a patient's
    what = f"{len(absent)} of {len(given)} names of the splits are no patient's and no file's"
    return result, [f"{what}; the first is {place}"]
