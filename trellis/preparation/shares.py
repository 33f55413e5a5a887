"""Which patients a rank of a job array takes: the same answer on every rank, without their talking to each other."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path

from trellis.preparation.discover import Source
from trellis.preparation.tasks import content_hash
from trellis.utils.io_utils import open_regular

_SAMPLE_BYTES = 4096


def groups_of_patients(sources: Iterable[Source]) -> list[list[str]]:
    """Patients in groups that one rank must take together: those who have a source of the same content.

    A shape that two patients have belongs to one of them, and which one is decided among all its sources. Files are
    read only where sizes and a sample from the middle of each are equal.

    Returns:
        Names, sorted within and among the groups; most groups are one patient.
    """
    sources = list(sources)
    leader = {source.patient: source.patient for source in sources}

    def find(patient: str) -> str:
        while leader[patient] != patient:
            patient = leader[patient]
        return patient

    for alike in _of_same_content(sources):
        first, *others = sorted({find(source.patient) for source in alike})
        leader.update(dict.fromkeys(others, first))
    groups: dict[str, list[str]] = {}
    for patient in sorted(leader):
        groups.setdefault(find(patient), []).append(patient)
    return sorted(groups.values())


def _of_same_content(sources: list[Source]) -> list[list[Source]]:
    """Sources of equal content, of several patients; what cannot be read is like nothing."""
    kinds: tuple[Callable[[Source], Hashable], ...] = (_sizes, _samples, lambda source: content_hash(source.files))
    groups = [sources]
    for kind in kinds:
        groups = [part for group in groups for part in _divided(group, kind) if len({s.patient for s in part}) > 1]
    return groups


def _divided(sources: list[Source], kind: Callable[[Source], Hashable]) -> list[list[Source]]:
    parts: dict[Hashable, list[Source]] = {}
    for source in sources:
        try:
            parts.setdefault(kind(source), []).append(source)
        except OSError:
            continue
    return list(parts.values())


def _sizes(source: Source) -> Hashable:
    return tuple(sorted(path.stat().st_size for path in source.files))


def _samples(source: Source) -> Hashable:
    return frozenset(_sample(path) for path in source.files)


def _sample(path: Path) -> bytes:
    with open(path, "rb", opener=open_regular) as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, (size - _SAMPLE_BYTES) // 2))
        return hashlib.sha256(stream.read(_SAMPLE_BYTES)).digest()
