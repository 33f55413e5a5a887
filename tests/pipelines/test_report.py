"""The report page: self-contained, escaped, complete, the worst first."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from pipeline_shapes import ellipsoid_blocks

from trellis.geometry.isosurface import extract_mesh
from trellis.geometry.metrics_summary import summarise, summarise_by
from trellis.pipelines import report
from trellis.pipelines.evaluate import figures_of
from trellis.pipelines.report import Case, worst_rows, write_report


class Page(HTMLParser):
    """Counts tags, collects cells and attributes, and checks that tags nest."""

    VOID = {"meta", "img", "br", "input"}

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def some_rows():
    rows = []
    for i, dice in enumerate((0.9, 0.5, 0.7)):
        label = "<script>alert(1)</script>" if i == 1 else "liver"
        row = {
            "sha256": f"{i}" * 64, "label": label, "patient_id": f"p{i % 2}", "dice": dice, "dice_tsdf": 0.99,
            "hd95_mm": 1.5 + i, "hd95_mm_tsdf": 0.1, "assd_mm": 0.5, "num_blocks": 10, "error": "",
        }  # fmt: skip
        rows.append(row)
    worst = {"dice": 0.0, "dice_tsdf": 0.98, "hd95_mm": 170.0, "assd_mm": 170.0, "error": "see errors.csv"}
    rows.append({"sha256": "f" * 64, "label": "liver", "patient_id": "p1", **worst})
    return rows


def summary_of(rows, **changes):
    return {
        "n_failed": 1, "split": "test", "resolution": 32, "baseline": None, **figures_of(summarise(rows)),
        "codes_used": 20, "perplexity": 11.5, "codebook_size": 32, "model_hash": "ab" * 32,
        "labels": {k: figures_of(v) for k, v in summarise_by(rows, "label").items()},
        "patients": {k: figures_of(v) for k, v in summarise_by(rows, "patient_id").items()}, **changes,
    }  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    rows = some_rows()
    truth, pred = (extract_mesh(ellipsoid_blocks(axes=axes)) for axes in ((0.475, 0.3, 0.22), (0.4, 0.475, 0.25)))
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(report, "PICTURE_SIZE", 48)
    nothing = (np.zeros((0, 3)), np.zeros((0, 3), dtype=np.int64))
    worst = worst_rows(rows, 2)
    write_report(path, summary_of(rows), rows, [Case(worst[0], truth, pred), Case(worst[1], truth, nothing)])
    monkeypatch.undo()
    return path.read_text(encoding="utf-8")


def test_page_is_well_formed_and_needs_nothing_else(page):
    parsed = Page()
    parsed.feed(page)
    assert not parsed.stack
    for tag, attributes in parsed.tags:
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)
    assert not re.search(r"https?://|@import|url\(", page)
    assert "default-src 'none'" in page


def test_text_of_users_is_escaped(page):
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in page


def test_figures_and_order(page):
    parsed = Page()
    parsed.feed(page)
    text = "\n".join(parsed.text)
    assert text.index("Worst cases") < text.index("Dice 0.5000 (TSDF 0.9900)") < text.index("Dice 0.7000")
    assert "20" in text and "perplexity 12" in text and "failed" in text
    shapes = page[page.index('id="shapes"') :]
    shapes = shapes[: shapes.index("</table>")]
    dice = re.findall(r'<td data-v="([\d.]+)">0\.\d{4}</td><td class="c" data-v="0.99"', shapes)
    assert dice == ["0.5", "0.7", "0.9"]
    assert shapes.index("f" * 12) < shapes.index("1" * 12), "what failed counts with Dice 0 and stands first"
    assert "without those that failed" in page


def test_summary_has_the_ceiling_beside_the_mean_and_no_interval_of_one_patient(page, tmp_path):
    def line_of(text, title):
        line = text[text.index(f'<td class="t">{title}</td>') :]
        return re.findall(r"<td[^>]*>([^<]*)</td>", line[: line.index("</tr>")])

    assert line_of(page, "Dice")[1:3] == ["0.5250", "0.9875"] and " to " in line_of(page, "Dice")[3]
    rows = [{**row, "patient_id": "p0"} for row in some_rows()]
    write_report(tmp_path / "r.html", summary_of(rows), rows, [])
    assert line_of((tmp_path / "r.html").read_text(), "Dice")[1:4] == ["0.5250", "0.9875", "-"]


def test_pictures_are_pngs_that_differ(page):
    pictures = [base64.b64decode(data) for data in re.findall(r'base64,([^"]+)"', page)]
    assert len(pictures) == 8 and all(data.startswith(b"\x89PNG") for data in pictures)
    assert len(set(pictures[:4])) == 4


def test_worst_rows_leave_out_what_failed():
    rows = some_rows()
    assert [row["dice"] for row in worst_rows(rows, 10)] == [0.5, 0.7, 0.9]
    assert worst_rows(rows, 0) == []


def test_baseline_without_pictures(tmp_path):
    rows = some_rows()
    changes = {"baseline": "tsdf", "model_hash": None, "codes_used": None, "codebook_size": None, "perplexity": None}
    write_report(tmp_path / "r.html", summary_of(rows, **changes), rows, [])
    text = (tmp_path / "r.html").read_text()
    assert "the TSDF itself" in text and "Worst cases" not in text and "codes used" not in text
