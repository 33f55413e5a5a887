"""A walk over a DICOM file's elements before a library reads it: lengths that lie would make it reserve gigabytes."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from trellis.utils.io_utils import open_regular

IMPLICIT, DEFLATED, BIG_ENDIAN = b"1.2.840.10008.1.2", b"1.2.840.10008.1.2.1.99", b"1.2.840.10008.1.2.2"
LONG_TYPES = frozenset((b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"))
SHORT_TYPES = frozenset((
    b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FD", b"FL", b"IS", b"LO", b"LT", b"PN", b"SH", b"SL", b"SS",
    b"ST", b"TM", b"UI", b"UL", b"US",
))  # fmt: skip
UNDEFINED = 0xFFFFFFFF
PIXELS, ITEM = (0x7FE0, 0x0010), (0xFFFE, 0xE000)


def is_dicom(path: Path) -> bool:
    """Whether a file begins as DICOM's part 10 says."""
    try:
        with open(path, "rb", opener=open_regular) as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


def check_elements(path: Path) -> None:
    """ValueError if an element of a DICOM file is longer than the file, or has no type that DICOM knows.

    Deflated files are not looked into. Sequences are entered where their type says that they are one.
    """
    with open(path, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at, syntax = _walk(data, 132, "<", explicit=True, only_meta=True)
        if syntax != DEFLATED:
            _walk(data, at, ">" if syntax == BIG_ENDIAN else "<", explicit=syntax != IMPLICIT, only_meta=False)


def _walk(data: mmap.mmap, at: int, order: str, *, explicit: bool, only_meta: bool) -> tuple[int, bytes]:
    """The position behind the elements (of group 2 alone, for `only_meta`), and the transfer syntax found there."""
    syntax, in_fragments = b"", False
    while at + 8 <= len(data):
        tag = struct.unpack_from(order + "HH", data, at)
        if only_meta and tag[0] != 2:
            break
        kind = data[at + 4 : at + 6]
        if tag[0] == 0xFFFE or not explicit:
            length, at = struct.unpack_from(order + "I", data, at + 4)[0], at + 8
            kind = b""
        elif kind in LONG_TYPES:
            if at + 12 > len(data):
                raise ValueError(f"element {_name(tag)} is cut off: truncated")
            length, at = struct.unpack_from(order + "I", data, at + 8)[0], at + 12
        elif kind in SHORT_TYPES:
            length, at = struct.unpack_from(order + "H", data, at + 6)[0], at + 8
        else:
            raise ValueError(f"element {_name(tag)} has no type that DICOM knows: damaged")
        if length == UNDEFINED:
            if kind == b"UN":
                break  # its content has no types; the library must do
            in_fragments = in_fragments or tag == PIXELS
            continue
        if length > len(data) - at:
            raise ValueError(
                f"element {_name(tag)} announces {length} bytes, and {len(data) - at} are left: truncated or damaged"
            )
        if tag == (2, 0x10):
            syntax = data[at : at + length].rstrip(b"\0 ")
        if kind != b"SQ" and (tag != ITEM or in_fragments):
            at += length
    return at, syntax


def _name(tag: tuple[int, int]) -> str:
    return f"({tag[0]:04x},{tag[1]:04x})"
