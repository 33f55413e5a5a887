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
        for number, name in enumerate(names, start=1):
            if result.setdefault(name, split) != split:  # the name itself may be a patient's
                raise ValueError(f"{path}: entry {number} of {split} is in two splits, {result[name]} too")
    return result


def splits_of_patients(
    sources: Iterable[Source], given: Mapping[str, str], shown: Mapping[str, str]
) -> tuple[dict[str, str], list[str]]:
    """The split of each patient who is named in the table, see `patients_of_names`, and warnings.

    Args:
        sources: everything that was found. given: as `read_splits` returns it.
        shown: patient to the id that messages may use.

    Raises:
        ValueError: a patient is in two splits, a name may be that of several patients, or the table names none.
    """
    meant = patients_of_names(sources, given)
    result: dict[str, str] = {}
    for name, patients in meant.items():
        if len(patients) > 1:
            ids = ", ".join(sorted(shown[patient] for patient in patients)[:5])
            raise ValueError(
                f"{_place(name, given)} of the splits fits files of {len(patients)} patients ({ids}): write "
                "DATASET/CASE for a case of one of several nnU-Net datasets, else the name of the patient's folder"
            )
        for patient in patients:
            if result.setdefault(patient, given[name]) != given[name]:
                raise ValueError(f"patient {shown[patient]} is in two splits, {result[patient]} and {given[name]}")
    if not result:
        raise ValueError("the splits name none of the patients or files that were found")
    absent = [name for name, patients in meant.items() if not patients]
    if not absent:
        return result, []
    what = f"{len(absent)} of {len(given)} names of the splits are no patient's and no file's"
    return result, [f"{what}; the first is {_place(absent[0], given)}"]


def patients_of_names(sources: Iterable[Source], names: Iterable[str]) -> dict[str, set[str]]:
    """The patients that each name may stand for: the one who is called so, else those with a file of that name
    (without its suffix), or whose own name ends with it after a slash (nnU-Net's are DATASET/CASE)."""
    by_alias: dict[str, set[str]] = {}
    sources = list(sources)
    for source in sources:
        parts = source.patient.split("/")
        for alias in {stem(source.path), *("/".join(parts[start:]) for start in range(1, len(parts)))}:
            by_alias.setdefault(alias, set()).add(source.patient)
    patients = {source.patient for source in sources}
    return {name: {name} if name in patients else by_alias.get(name, set()) for name in names}


def _place(name: str, given: Mapping[str, str]) -> str:
    """Where a name stands in the table: it may be a patient's, and is not repeated."""
    split = given[name]
    return f"entry {[other for other in given if given[other] == split].index(name) + 1} of {split}"
