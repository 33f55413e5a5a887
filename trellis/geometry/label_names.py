"""Names of label values: from the tables that segmentation tools write, and picking labels by name."""

from __future__ import annotations

import csv
import difflib
import fnmatch
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from trellis.utils.io_utils import UnreadableFile, is_transient

MAX_TABLE_BYTES, MAX_CARET_BYTES = 64 << 20, 4 << 20
VALUE_COLUMNS = ("label", "value", "label_value", "labelvalue", "index", "id", "idx", "no", "no.", "key", "intensity")
NAME_COLUMNS = ("name", "label_name", "labelname", "structure", "region", "roi", "description", "segment", "text")
BACKGROUND_NAMES = ("background", "clear label", "unknown")


def read_label_names(path: str | Path) -> dict[int, str]:
    """Label value -> name from a table file; 0 and background are left out.

    Args:
        path: nnU-Net's `dataset.json` (names to values, or the older values to names), any flat JSON of either kind, an
            ITK-SNAP label description, a FreeSurfer or Slicer colour table, or CSV/TSV/TXT with a value and a name
            in either order (with or without a header line).

    Raises:
        ValueError: no such file, no name in it, a value with two names, regions that join several labels.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.stat().st_size > MAX_TABLE_BYTES:
        raise ValueError(f"{path}: a label table may have at most {MAX_TABLE_BYTES} bytes, got {path.stat().st_size}")
    try:
        content = path.read_bytes()
    except OSError as error:
        message = f"{path}: cannot be read: {error.strerror}"
        raise UnreadableFile(message, message, is_transient(error)) from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    try:
        pairs = _from_json(text) if path.suffix.lower() == ".json" else _from_text(text)
        names: dict[int, str] = {}
        for value, name in pairs:
            name = name.strip()
            if value < 0:
                raise ValueError(f"label values must be 0 or more, got {value} for {name!r}")
            if names.get(value, name) != name:
                raise ValueError(f"label {value} has two names, {names[value]!r} and {name!r}")
            names[value] = name
    except (ValueError, csv.Error, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None
    names = {v: n for v, n in names.items() if v != 0 and n and n.lower() not in BACKGROUND_NAMES}
    if not names:
        raise ValueError(f"{path}: no label name found: lines of a value and a name, or a JSON map, are needed")
    return names


def caret_label_names(xml: bytes) -> dict[int, str]:
    """Label value -> name of a Caret volume extension, the form in which TotalSegmentator's multi-label files carry it.

    `<CaretExtension><VolumeInformation Index="0"><LabelTable><Label Key="1" ...>spleen</Label>...`; of several volumes
    the first one's. 0, values below it and empty names are left out.

    Raises:
        ValueError: more than MAX_CARET_BYTES, a document type (entities could read files or grow without end), not
            well-formed, no label table, a key that is no whole number, a value with two names.
    """
    if len(xml) > MAX_CARET_BYTES:
        raise ValueError(f"it may have at most {MAX_CARET_BYTES} bytes, got {len(xml)}")
    try:
        root = ElementTree.fromstring(xml.strip(b"\0 \t\r\n"), ElementTree.XMLParser(target=_PlainXml()))
    except ElementTree.ParseError as error:
        raise ValueError(f"not well-formed XML in line {error.position[0]}, column {error.position[1]}") from None
    table = root.find("VolumeInformation/LabelTable")
    if root.tag != "CaretExtension" or table is None:
        raise ValueError("CaretExtension/VolumeInformation/LabelTable is missing")
    names: dict[int, str] = {}
    for label in table.findall("Label"):
        key, name = label.get("Key", ""), "".join(label.itertext()).strip()
        if not re.fullmatch(r"-?\d{1,18}", key):
            raise ValueError(f"a label's Key must be a whole number, got {key[:40]!r}")
        if names.get(int(key), name) != name:
            raise ValueError(f"label {int(key)} has two names, {names[int(key)]!r} and {name!r}")
        names[int(key)] = name
    return {value: name for value, name in names.items() if value > 0 and name}


class _PlainXml(ElementTree.TreeBuilder):
    """A tree of a document without a document type, and so without entities of its own."""

    def doctype(self, name: str, public_id: str | None, system_id: str | None) -> None:
        raise ValueError("a document type is refused")


def _from_json(text: str) -> list[tuple[int, str]]:
    document = json.loads(text)
    if isinstance(document, dict) and isinstance(document.get("labels"), dict):
        document = document["labels"]
    if not isinstance(document, dict):
        raise ValueError("a JSON object of labels is needed")
    return [_json_pair(key, value) for key, value in document.items()]


def _json_pair(key: str, value: Any) -> tuple[int, str]:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, list):
        raise ValueError(f"{key!r} joins the labels {value}: give a table with one name per label")
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"label {key!r} needs a whole number or a name, got {value!r}")
    if isinstance(value, int):
        return value, key
    if re.fullmatch(r"\d+", key):
        return int(key), value
    if re.fullmatch(r"\d+", value):
        return int(value), key
    raise ValueError(f"neither {key!r} nor {value!r} is a label value")


def _from_text(text: str) -> list[tuple[int, str]]:
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith(("#", "//"))]
    if not lines:
        return []
    snap = [re.fullmatch(r'\s*(\d+)(?:\s+[\d.]+){6,7}\s+"(.*)"\s*', line) for line in lines]
    if all(snap):
        return [(int(m.group(1)), m.group(2)) for m in snap if m]
    delimiter = next((d for d in "\t;," if all(d in line for line in lines)), None)
    if delimiter:
        return _from_table(list(csv.reader(lines, delimiter=delimiter, skipinitialspace=True)))
    return _from_words([line.split() for line in lines])


def _from_words(lines: list[list[str]]) -> list[tuple[int, str]]:
    """Lines of words, all with the value first or all with it last.

    '17 Left-Hippocampus 220 216 20 0' and '1 Precentral L 2001': the numbers after a name are no part of it; lines that
    begin with a word are headings. Where no line begins with a number, each ends in the one number that is its value,
    but for a heading in the first line.
    """
    pairs = []
    for words in lines:
        if re.fullmatch(r"\d+", words[0]):
            end = len(words)
            while end > 2 and _is_number(words[end - 1]):
                end -= 1
            pairs.append((int(words[0]), " ".join(words[1:end]).strip('"')))
    if pairs:
        return pairs
    last = [len(words) > 1 and re.fullmatch(r"\d+", words[-1]) is not None for words in lines]
    if not any(last):
        return []
    for words, value_last in list(zip(lines, last))[0 if last[0] else 1 :]:
        if not value_last or _is_number(words[-2]):
            raise ValueError(f"a line must be a name and one whole number, got {' '.join(words)[:80]!r}")
        pairs.append((int(words[-1]), " ".join(words[:-1]).strip('"')))
    return pairs


def _is_number(word: str) -> bool:
    return re.fullmatch(r"-?[\d.]+", word) is not None


def _from_table(rows: list[list[str]]) -> list[tuple[int, str]]:
    rows = [[cell.strip() for cell in row] for row in rows if any(cell.strip() for cell in row)]
    value_at, name_at = None, None
    if not rows:
        return []
    if not any(re.fullmatch(r"\d+", cell) for cell in rows[0]):
        head = [cell.lower() for cell in rows[0]]
        rows = rows[1:]
        name_at = next((head.index(c) for c in NAME_COLUMNS if c in head), None)
        value_at = next((head.index(c) for c in VALUE_COLUMNS if c in head and head.index(c) != name_at), None)
        if name_at is None and "label" in head and value_at is not None and head[value_at] != "label":
            name_at = head.index("label")
    if not rows:
        return []
    width = min(len(row) for row in rows)
    whole = [all(re.fullmatch(r"\d+", row[i]) for row in rows) for i in range(width)]
    if value_at is None or value_at >= width or not whole[value_at]:
        value_at = next((i for i in range(width) if whole[i] and i != name_at), None)
    if name_at is None:
        name_at = next((i for i in range(width) if i != value_at and not whole[i]), None)
    if value_at is None or name_at is None:
        raise ValueError(f"a column of label values and one of names are needed, got rows like {rows[0]}")
    return [(int(row[value_at]), row[name_at] if name_at < len(row) else "") for row in rows]


def pick_labels(wanted: Sequence[str | int], present: Iterable[int], names: dict[int, str]) -> list[int]:
    """Label values that a user picks by value, name or pattern.

    Args:
        wanted: whole numbers ("3" too), names (case does not matter) or shell patterns such as "vertebra_*".
        present: the label values of the volume; names: their names.

    Returns:
        Values in ascending order.

    Raises:
        ValueError: a pick that matches nothing that is present; names what is near.
    """
    values = sorted(set(present))
    by_name = {v: names[v].lower() for v in values if v in names}
    picked: set[int] = set()
    for want in wanted:
        text = str(want).strip().lower()
        if text.isdigit():
            found = [int(text)] if int(text) in values else []
        else:
            found = [v for v, name in by_name.items() if name == text or fnmatch.fnmatchcase(name, text)]
        if not found:
            near = difflib.get_close_matches(text, by_name.values(), n=3)
            hint = f"; near: {', '.join(near)}" if near else f"; values present: {_some(values)}"
            raise ValueError(f"no label {want!r} in this volume{hint}")
        picked.update(found)
    return sorted(picked)


def _some(values: list[int]) -> str:
    return ", ".join(map(str, values[:12])) + (", ..." if len(values) > 12 else "")
