"""Label tables of many tools, and picks by value, name and pattern."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trellis.geometry.label_names import MAX_CARET_BYTES, caret_label_names, pick_labels, read_label_names

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
    "name_first.txt": "background 0\nliver 1\n\"left kidney\"   2\naorta 17\n",
    "headed.txt": "Structure Value\nliver 1\nleft kidney 2\naorta 17\n",
    "heading.txt": "Version 2\n1 liver\n2 left kidney\n17 aorta\n",
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
    "colours.txt": ("liver 1 255 0 0\naorta 17 0 255 0\n", "a name and one whole number, got 'liver 1 255 0 0'"),
    "vertebrae.txt": ("liver 5\nvertebra 7 31\n", "a name and one whole number, got 'vertebra 7 31'"),
    "report.txt": ("report of 2024\nall well\n", "a name and one whole number, got 'all well'"),
    "names.txt": ("liver 1\naorta\n", "a name and one whole number, got 'aorta'"),
    "twice_last.txt": ("liver 1\nspleen 1\n", "label 1 has two names, 'liver' and 'spleen'"),
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


# a label table in a volume's header


def caret(body: str, before: str = '<?xml version="1.0" encoding="UTF-8"?> ') -> bytes:
    """As TotalSegmentator writes it, spaces behind the end included."""
    table = f'<VolumeInformation Index="0">   <LabelTable>\n{body}\n  </LabelTable></VolumeInformation>'
    return f"{before}<CaretExtension>  <Date><![CDATA[2013]]></Date> {table}</CaretExtension>\n    ".encode()


def test_caret_label_table():
    row = '<Label Key="{}" Red="1.0" Green="0.0" Blue="0.5" Alpha="1"><![CDATA[{}]]></Label>'
    names = {0: "background", **EXPECTED, 90: "lung & <airways>", 91: "", -1: "none", 92: "Brücke"}
    body = "\n".join(row.format(value, name) for value, name in names.items())
    assert caret_label_names(caret(body)) == {**EXPECTED, 90: "lung & <airways>", 92: "Brücke"}
    plain = "<Label Key='1'>liver</Label><Label Key='2'>left &lt;kidney&#62;</Label><Label Key='1'>liver</Label>"
    assert caret_label_names(caret(plain, "") + b"\0\0\0") == {1: "liver", 2: "left <kidney>"}
    second = caret("<Label Key='1'>liver</Label>").replace(
        b"</CaretExtension>",
        b"<VolumeInformation Index='1'><LabelTable><Label Key='1'>x</Label></LabelTable></VolumeInformation>"
        b"</CaretExtension>",
    )
    assert caret_label_names(second) == {1: "liver"}


LAUGHS = "".join(f'<!ENTITY l{i + 1} "{f"&l{i};" * 10}">' for i in range(9))
BAD_CARET = {
    "entities": (caret("<Label Key='1'>&l9;</Label>", f"<!DOCTYPE x [<!ENTITY l0 'lol'>{LAUGHS}]>"), "document type"),
    "file": (
        caret("<Label Key='1'>&f;</Label>", "<!DOCTYPE x [<!ENTITY f SYSTEM 'file:///etc/hostname'>]>"), "document type"
    ),
    "in utf-16": (
        caret("<Label Key='1'>x</Label>", "<!DOCTYPE x>").decode().encode("utf-16"), "document type"
    ),
    "unknown entity": (caret("<Label Key='1'>&f;</Label>"), "not well-formed XML in line 2, column 15"),
    "cut": (caret("<Label Key='1'>liver</Label>")[:-30], "not well-formed"),
    "empty": (b"", "not well-formed"),
    "deep": (b"<a>" * 100_000 + b"</a>" * 100_000, "LabelTable is missing"),
    "other root": (caret("").replace(b"CaretExtension", b"Extension"), "LabelTable is missing"),
    "word": (caret("<Label Key='one'>liver</Label>"), "Key must be a whole number, got 'one'"),
    "no key": (caret("<Label>liver</Label>"), "Key must be a whole number, got ''"),
    "twice": (caret("<Label Key='1'>a</Label><Label Key='1'>b</Label>"), "label 1 has two names, 'a' and 'b'"),
    "long": (caret(" " * MAX_CARET_BYTES), f"at most {MAX_CARET_BYTES} bytes"),
}


@pytest.mark.parametrize("name", BAD_CARET)
def test_bad_caret_tables_are_refused(name: str):
    content, message = BAD_CARET[name]
    with pytest.raises(ValueError, match=message):
        caret_label_names(content)
