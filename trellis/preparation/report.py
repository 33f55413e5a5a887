"""A preparation's summary in words, for the commands that print it."""

from __future__ import annotations

from collections import Counter

from trellis.preparation.prepare import PrepareSummary
from trellis.preparation.records import ERRORS_NAME

_SHOWN = 5


def describe_summary(summary: PrepareSummary) -> str:
    """Several lines: what was done, the split, warnings and failures (the first few of each, with the rest counted)."""
    done = "nothing left to do" if summary.n_computed == 0 else f"{summary.n_computed} tasks"
    lines = [
        f"{summary.n_shapes} shapes from {summary.n_sources} sources in {summary.out}: {done}, {summary.seconds:.1f} s"
    ]
    if summary.patients:
        parts = [f"{name} {summary.patients[name]} ({summary.shapes[name]} shapes)" for name in summary.patients]
        lines.append(f"patients: {', '.join(parts)}")
    if summary.n_duplicates:
        lines.append(f"{summary.n_duplicates} shapes were found more than once and count once")
    if summary.n_stale:
        what = "shapes or settings that are gone or not chosen"
        lines.append(f"{summary.n_stale} files belong to {what}; --prune-stale removes them")
    lines += [f"{count} left out: {reason}" for reason, count in summary.left_out.items()]
    lines += _some("warning", summary.warnings)
    reasons = Counter(f"{entry['stage']}: {entry['reason']}" for entry in summary.failures)
    lines += _some("failed", [f"{count} x {reason}" for reason, count in reasons.most_common()])
    if summary.n_failed:
        lines.append(f"{summary.n_failed} failed; ids and reasons are in {summary.out / ERRORS_NAME}")
    return "\n".join(lines)


def _some(kind: str, items: list[str]) -> list[str]:
    more = [f"{kind}: and {len(items) - _SHOWN} more"] if len(items) > _SHOWN else []
    return [f"{kind}: {item}" for item in items[:_SHOWN]] + more
