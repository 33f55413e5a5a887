"""DICOM's elements are walked before a library reads them: what is sound passes, what lies is named."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from trellis.geometry.dicom_check import UNDEFINED, check_elements, is_dicom


def element(tag: int, kind: bytes, value: bytes, *, length: int | None = None, order: str = "<") -> bytes:
    head = struct.pack(order + "HH", tag >> 16, tag & 0xFFFF)
    length = len(value) if length is None else length
    if kind in (b"SQ", b"OW", b"OB", b"UN"):
        return head + kind + b"\0\0" + struct.pack(order + "I", length) + value
    return head + (kind + struct.pack(order + "H", length) if kind else struct.pack(order + "I", length)) + value


def write(path: Path, body: bytes, syntax: bytes = b"1.2.840.10008.1.2.1\0") -> Path:
    path.write_bytes(bytes(128) + b"DICM" + element(0x00020010, b"UI", syntax) + body)
    return path


def item(content: bytes, length: int | None = None) -> bytes:
    return element(0xFFFEE000, b"", content, length=length)


NAME = element(0x00100010, b"PN", b"NOBODY")
ENDS = element(0xFFFEE00D, b"", b""), element(0xFFFEE0DD, b"", b"")
SOUND = {
    "plain": NAME,
    "sequence of known length": element(0x00081140, b"SQ", item(NAME) + item(b"")) + NAME,
    "sequence of unknown length": element(
        0x00081140, b"SQ", item(NAME + ENDS[0], UNDEFINED) + item(NAME) + ENDS[1], length=UNDEFINED) + NAME,
    "packed pixels": element(
        0x7FE00010, b"OB", item(b"") + item(b"\xff\xff\xff\xff" * 5) + ENDS[1], length=UNDEFINED) + NAME,
}  # fmt: skip


@pytest.mark.parametrize("case", SOUND)
def test_sound_files_pass_and_lies_behind_them_are_found(tmp_path: Path, case: str):
    check_elements(write(tmp_path / "a", SOUND[case]))
    liar = element(0x00100020, b"OW", b"1234", length=5000)
    with pytest.raises(ValueError, match=r"\(0010,0020\) announces 5000 bytes, and 4 are left"):
        check_elements(write(tmp_path / "a", SOUND[case] + liar))


def test_lies_inside_sequences_are_found(tmp_path: Path):
    inner = item(element(0x00100020, b"OW", b"", length=1 << 30))
    with pytest.raises(ValueError, match="announces 1073741824 bytes"):
        check_elements(write(tmp_path / "a", element(0x00081140, b"SQ", inner)))


def test_other_transfer_syntaxes(tmp_path: Path):
    implicit, big = b"1.2.840.10008.1.2\0", b"1.2.840.10008.1.2.2\0"
    check_elements(write(tmp_path / "a", element(0x00100010, b"", b"NOBODY"), implicit))
    check_elements(write(tmp_path / "a", element(0x00100010, b"PN", b"NOBODY", order=">"), big))
    with pytest.raises(ValueError, match="announces 7000"):
        check_elements(write(tmp_path / "a", element(0x00100010, b"", b"NOBODY", length=7000), implicit))
    with pytest.raises(ValueError, match="announces 7000"):
        check_elements(write(tmp_path / "a", element(0x00100010, b"PN", b"NOBODY", length=7000, order=">"), big))
    with pytest.raises(ValueError, match=r"\(0010,0010\) has no type that DICOM knows"):
        check_elements(write(tmp_path / "a", element(0x00100010, b"zz", b"NOBODY")))
    check_elements(write(tmp_path / "a", b"\x01\x02\x03" * 9, b"1.2.840.10008.1.2.1.99"))  # deflated: not looked into


@pytest.mark.parametrize("compressor", ["", "JPEG", "JPEG2000"])
def test_what_a_library_writes_passes(tmp_path: Path, compressor: str):
    import SimpleITK

    writer = SimpleITK.ImageFileWriter()
    writer.SetFileName(str(tmp_path / "a.dcm"))
    if compressor:
        writer.UseCompressionOn()
        writer.SetCompressor(compressor)
    writer.Execute(SimpleITK.GetImageFromArray(np.arange(2000, dtype=np.int16).reshape(1, 40, 50)))
    assert is_dicom(tmp_path / "a.dcm") and not is_dicom(tmp_path)
    check_elements(tmp_path / "a.dcm")
