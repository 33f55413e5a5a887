"""Label tables of many tools, and picks by value, name and pattern."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trellis.geometry.label_names import pick_labels, read_label_names

EXPECTED = {1: "liver", 2: "left kidney", 17: "aorta"}

TABLES = {
    "dataset.json": json.dumps({"labels": {"background": 0, "liver": 1, "left kidney": [2], "aorta": "17"}}),
    "old.json": json.dumps({"labels": {"0": "background", "1": "liver", "2": "left kidney", "17": "aorta"}}),
    "map.json": json.dumps({"1": "liver", "2": "left kidney", "17": "aorta"}),
    "snap.label": (
        "################\n# ITK-SnAP Label Description File\n"
        '    0     0    0    0        0  0  0    "Clear Label"\n    1   255    0    0        1  1  1    "liver"\n'
        '    2     0  255    0      0.5  1  1    "left kidney"\n   17     0    0  255        1  1  1    "aorta"\n'
    ),
    "lut.txt": "#No. Label Name:  R G B A\n\n0 Unknown 0 0 0 0\n"
    "1 liver 1 2 3 0\n2 left kidney 4 5 6 0\n17   aorta  7 8 9 0\n",
    "atlas.nii.txt": "1 liver 2001\n2 left kidney 2002\n17 aorta 2003\n",
    "table.csv": "label,name,r\n1,liver,255\n2,left kidney,0\n17,aorta,3\n",
    "named.csv": 'name,id\n"liver",1\nleft kidney,2\naorta,17\n',
    "labels.csv": "index;label\n1;liver\n2;left kidney\n17;aorta\n",
    "plain.tsv": "1\tliver\n2\tleft kidney\n17\taorta\n",
    "bom.csv": "\ufeffvalue,name\r\n1,liver\r\n2,left kidney\r\n17,aorta\r\n",
}


@pytest.mark.parametrize("name", TABLES)
def test_every_table_gives_the_same_names(tmp_path: Path, name: str):
    (tmp_path / name).write_text(TABLES[name], encoding="utf-8")
    assert read_label_names(tmp_path / name) == EXPECTED


BAD = {
    "region.json": (json.dumps({"labels": {"whole": [1, 2]}}), r"'whole' joins the labels \[1, 2\]"),
    "deep.json": ("[" * 100000, "deep.json"),
    "list.json": ("[1]", "JSON object"),
    "cut.json": ('{"labels": {', "cut.json"),
    "float.json": (json.dumps({"liver": 1.5}), "whole number or a name, got 1.5"),
    "words.json": (json.dumps({"liver": "big"}), "neither 'liver' nor 'big'"),
    "twice.txt": ("1 liver\n1 spleen\n", "label 1 has two names, 'liver' and 'spleen'"),
    "empty.txt": ("", "no label name found"),
    "prose.txt": ("nothing to see\n", "no label name found"),
    "numbers.csv": ("1,2\n3,4\n", "a column of label values and one of names"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_tables_are_refused(tmp_path: Path, name: str):
    text, message = BAD[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_label_names(tmp_path / name)
    assert name in str(caught.value)
    with pytest.raises(ValueError, match="no such file"):
        read_label_names(tmp_path / "absent.txt")


def test_picks():
    present = [1, 2, 17, 40]
    assert pick_labels(["17", 1], present, EXPECTED) == [1, 17]
    assert pick_labels(["Left Kidney", "a*"], present, EXPECTED) == [2, 17]
    assert pick_labels(["*"], present, EXPECTED) == [1, 2, 17]
    with pytest.raises(ValueError, match="no label 'lifer' in this volume; near: liver"):
        pick_labels(["lifer"], present, EXPECTED)
    with pytest.raises(ValueError, match="no label '3' in this volume; values present: 1, 2, 17, 40"):
        pick_labels(["3"], present, {})
