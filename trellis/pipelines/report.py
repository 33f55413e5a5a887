"""report.html: one self-contained page of an evaluation, with the worst cases as pictures coloured by distance."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from trellis.pipelines.scoring import TSDF_SUFFIX
from trellis.utils.io_utils import atomic_write

Mesh = tuple[np.ndarray, np.ndarray]
Column = tuple[str, str, str]
_NSD = "nsd_"
"""Stands for the surface Dice at every tolerance."""
COLUMNS = (
    ("label", "label", ""), ("sha256", "shape", ""), ("patient_id", "patient", ""), ("dice", "Dice", ".4f"),
    ("dice_blocks", "Dice in blocks", ".4f"), ("dice_source", "Dice on source grid", ".4f"),
    ("hd95_mm", "HD95 mm", ".3f"), ("assd_mm", "ASSD mm", ".3f"), (_NSD, "", ".4f"),
    ("volume_error_fraction", "volume error", "+.2%"), ("num_blocks", "tokens", ".0f"),
    ("bits_per_block", "bits/token", ".2f"), ("codes_used", "codes used", ".0f"), ("perplexity", "perplexity", ".1f"),
)  # fmt: skip
"""Column of metrics.csv, its title, and its number format (none for text)."""
METRICS = (
    ("dice", "Dice", ".4f"), ("iou", "IoU", ".4f"), ("dice_blocks", "Dice in the blocks", ".4f"),
    ("dice_source", "Dice on the source's voxels", ".4f"), ("iou_source", "IoU on the source's voxels", ".4f"),
    ("hd_mm", "HD, mm", ".3f"), ("hd95_mm", "HD95, mm", ".3f"), ("assd_mm", "ASSD, mm", ".3f"),
    ("chamfer_mm", "Chamfer, mm", ".3f"), ("hd_voxels", "HD, voxels", ".3f"), ("hd95_voxels", "HD95, voxels", ".3f"),
    ("assd_voxels", "ASSD, voxels", ".3f"), ("chamfer_voxels", "Chamfer, voxels", ".3f"),
    ("chamfer_squared_grid", "Chamfer, squared, grid units", ".2e"), (_NSD, "", ".4f"),
    ("f_score_1voxel", "F-score at 1 voxel", ".4f"), ("normal_consistency", "normal consistency", ".4f"),
    ("volume_error_ml", "volume error, ml", "+.3f"), ("volume_error_fraction", "volume error", "+.2%"),
    ("volume_error_source_ml", "volume error on the source's voxels, ml", "+.3f"),
    ("volume_error_source_fraction", "volume error on the source's voxels", "+.2%"),
    ("euler_match", "same Euler characteristic", ".1%"), ("bits", "bits per shape, positions included", ".0f"),
)  # fmt: skip
"""Metric of summary.json, its title, and its number format."""
TSDF = "TSDF"
"""Title of the columns that hold the ceiling of the one before."""
PICTURE_SIZE = 300

_STYLE = """
:root{color-scheme:light dark;--line:#8885;--soft:#8881;--grey:#777;--accent:#2a6fdb}
body{font:15px/1.5 system-ui,sans-serif;margin:0 auto;max-width:1180px;padding:1.5rem}
h1{font-size:1.5rem;margin:0}h2{font-size:1.15rem;margin:2rem 0 .6rem}
p{margin:.4rem 0}.facts{color:var(--grey);margin-bottom:1rem}
.tiles{display:flex;flex-wrap:wrap;gap:.8rem;margin:1rem 0}
.tile{border:1px solid var(--line);border-radius:8px;padding:.6rem 1rem;min-width:7.5rem}
.tile b{display:block;font-size:1.5rem;font-variant-numeric:tabular-nums}.tile small{color:var(--grey)}
.scroll{overflow:auto}.tall{max-height:85vh}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.92rem}
th,td{padding:.28rem .7rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th.t,td.t{text-align:left}td.c,th.c{color:var(--grey)}
thead th{position:sticky;top:0;background:Canvas;white-space:normal;vertical-align:bottom;z-index:1}
thead th:not(.c){min-width:4rem}
th:first-child,td:first-child{position:sticky;left:0;background:Canvas;white-space:normal;overflow-wrap:anywhere;
min-width:min(14rem,38vw)}thead th:first-child{z-index:2}
table.sort th{cursor:pointer}table.sort th:hover{color:var(--accent)}
th[aria-sort=ascending]::after{content:" \\25B2"}th[aria-sort=descending]::after{content:" \\25BC"}
tr.bad td{color:#c33}tbody tr:hover{background:var(--soft)}
.case{border:1px solid var(--line);border-radius:8px;padding:.7rem 1rem;margin:.8rem 0}
.case .row{display:grid;grid-template-columns:repeat(auto-fit,minmax(140px,1fr));gap:.6rem}figure{margin:.4rem 0 0}
figure img{width:100%;border-radius:4px;display:block;box-shadow:0 0 0 1px var(--line)}
figcaption{font-size:.85rem;color:var(--grey)}
.bar{display:inline-block;width:220px;height:12px;vertical-align:middle;border-radius:3px}
code{font-size:.85em}input{font:inherit;padding:.2rem .5rem;margin:.3rem 0}
"""
_SCRIPT = """
for(const table of document.querySelectorAll('table.sort')){const heads=[...table.tHead.rows[0].cells];
heads.forEach((head,i)=>{head.tabIndex=0;const go=()=>{const up=head.getAttribute('aria-sort')!=='ascending';
heads.forEach(h=>h.removeAttribute('aria-sort'));head.setAttribute('aria-sort',up?'ascending':'descending');
const value=r=>{const c=r.cells[i],v=c.dataset.v;return v===undefined?c.textContent:v===''?null:+v};
const rows=[...table.tBodies[0].rows].sort((a,b)=>{const x=value(a),y=value(b);
if(x===null||y===null)return(x===null)-(y===null);
const d=typeof x==='number'?x-y:x.localeCompare(y,undefined,{numeric:true});return up?d:-d});
table.tBodies[0].append(...rows)};head.onclick=go;head.onkeydown=e=>{if(e.key==='Enter')go()}})}
const find=document.getElementById('find');
find.oninput=()=>{for(const r of document.getElementById('shapes').tBodies[0].rows)
r.hidden=!r.textContent.toLowerCase().includes(find.value.toLowerCase())};
"""


@dataclass(frozen=True)
class Case:
    """A shape to show: its row of metrics.csv, the true surface and the reconstructed one."""

    row: dict[str, Any]
    truth: Mesh
    pred: Mesh


def worst_rows(rows: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Up to `count` rows that were scored in mm and did not fail, the lowest Dice first; ties by HD95."""
    scored = [row for row in rows if row.get("hd95_mm") is not None and not row.get("error")]
    return sorted(scored, key=lambda row: (*_by_dice(row), -row["hd95_mm"]))[:count]


def _by_dice(row: dict[str, Any]) -> tuple[bool, float]:
    """To sort by Dice; shapes that have none come last."""
    return row["dice"] is None, row["dice"] or 0.0


def write_report(
    path: str | Path, summary: dict[str, Any], rows: Sequence[dict[str, Any]], cases: Sequence[Case]
) -> None:
    """Write the page atomically. It loads nothing: style, script and pictures are inside it."""
    what = "the TSDF itself" if summary["baseline"] else "reconstruction from tokens"
    facts = [f"split {summary['split']}", f"{summary['resolution']} cubed"]
    if summary.get("n_truth_tsdf"):
        facts.append(truth_is_tsdf(summary))
    if summary["model_hash"]:
        facts.append(f"model {summary['model_hash'][:12]}")
    body = [
        f"<h1>Evaluation: {what}</h1>",
        f'<p class="facts">{escape(", ".join(facts))}</p>',
        _tiles(summary),
        "<h2>Summary</h2>",
        "<p>Mean over shapes with its 95 % confidence interval (bootstrap over patients), beside the mean of the TSDF "
        "itself, which no model at this resolution can be expected to pass.</p>",
        _summary_table(summary),
        "<h2>Labels</h2>",
        _group_table(summary["labels"], "label"),
        _worst_cases(cases, summary["n_failed"]),
        "<h2>All shapes</h2>",
        '<p>A click on a title sorts. <input id="find" placeholder="label, shape or patient" aria-label="filter"></p>',
        _shapes_table(rows),
        "<h2>Patients</h2>",
        _group_table(summary["patients"], "patient"),
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        f"<title>Evaluation</title><style>{_STYLE}</style></head><body>"
        + "\n".join(body)
        + f"<script>{_SCRIPT}</script></body></html>\n"
    )
    with atomic_write(path) as stream:
        stream.write(page.encode())


def truth_is_tsdf(summary: dict[str, Any]) -> str:
    """How many shapes were scored against their own TSDF, in words."""
    return f"the TSDF itself was the truth of {summary['n_truth_tsdf']} of {summary['n']} shapes"


def _tiles(summary: dict[str, Any]) -> str:
    def mean(group: dict[str, Any], name: str, pattern: str) -> str:
        return format(group[name]["mean"], pattern) if name in group else "-"

    tiles = [(str(summary["n"]), "shapes", f"{summary['n_failed']} failed")]
    shown = ("dice", "hd95_mm", "assd_mm")
    for name, title, pattern in (metric for metric in METRICS if metric[0] in shown):
        tiles.append((mean(summary, name, pattern), title, f"TSDF {mean(summary['ceiling'], name, pattern)}"))
    if summary["codes_used"] is not None:
        tiles.append(
            (str(summary["codes_used"]), "codes used", f"of {summary['codebook_size']}, "
             f"perplexity {summary['perplexity']:.0f}")
        )  # fmt: skip
    cells = [
        f'<div class="tile"><b>{escape(value)}</b>{escape(title)}<br><small>{escape(note)}</small></div>'
        for value, title, note in tiles
    ]
    return f'<div class="tiles">{"".join(cells)}</div>'


def _present(columns: Sequence[Column], groups: Sequence[Mapping[str, Any]]) -> list[Column]:
    """Those of some columns that a group has; the normalised surface Dice at whatever tolerances were asked for."""
    present = {name: None for group in groups for name in group}
    found = []
    for name, title, pattern in columns:
        if name == _NSD:
            nsd = {float(each[4:-2]): each for each in present if each.startswith(_NSD) and each.endswith("mm")}
            found += [(nsd[tolerance], f"NSD at {tolerance:g} mm", pattern) for tolerance in sorted(nsd)]
        elif name in present:
            found.append((name, title, pattern))
    return found


def _summary_table(summary: dict[str, Any]) -> str:
    titles = ["", "mean", TSDF, "95 % interval", "median", "5th pct.", "95th pct."]
    rows = []
    for name, title, pattern in _present(METRICS, [summary]):
        value, ceiling = summary[name], summary["ceiling"].get(name)
        ends = value["ci_low"], value["ci_high"]
        interval = "-" if None in ends else f"{ends[0]:{pattern}} to {ends[1]:{pattern}}"
        mean, *rest = (f"{value[key]:{pattern}}" for key in ("mean", "median", "p05", "p95"))
        beside = f'<td class="c">{ceiling["mean"]:{pattern}}</td>' if ceiling else '<td class="c">-</td>'
        cells = "".join(f"<td>{cell}</td>" for cell in (interval, *rest))
        rows.append(f'<tr><td class="t">{escape(title)}</td><td>{mean}</td>{beside}{cells}</tr>')
    return _table(titles, rows)


def _group_table(groups: dict[str, dict[str, Any]], kind: str) -> str:
    metrics = _present(METRICS, list(groups.values()))
    titles = [kind, "shapes"]
    for name, title, _ in metrics:
        titles += [title, TSDF] if any(name in group["ceiling"] for group in groups.values()) else [title]
    rows = []
    for group_name, group in groups.items():
        cells = [f'<td class="t">{escape(group_name) or "-"}</td>', _cell(group["n"], "d")]
        for name, _, pattern in metrics:
            cells.append(_cell(group[name]["mean"] if name in group else None, pattern))
            if any(name in other["ceiling"] for other in groups.values()):
                cells.append(_cell(group["ceiling"][name]["mean"] if name in group["ceiling"] else None, pattern, "c"))
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return _table(titles, rows, sortable=True)


def _shapes_table(rows: Sequence[dict[str, Any]]) -> str:
    columns = []
    for name, title, pattern in _present(COLUMNS, rows):
        columns.append((name, title, pattern))
        if any(f"{name}{TSDF_SUFFIX}" in row for row in rows):
            columns.append((f"{name}{TSDF_SUFFIX}", TSDF, pattern))
    lines = []
    for row in sorted(rows, key=_by_dice):
        cells = []
        for name, _, pattern in columns:
            value = row.get(name)
            if pattern:
                cells.append(_cell(value, pattern, "c" if name.endswith(TSDF_SUFFIX) else ""))
            elif name == "sha256":
                cells.append(f'<td class="t"><code title="{escape(str(value))}">{escape(str(value))[:12]}</code></td>')
            else:
                cells.append(f'<td class="t">{escape(str(value or "-"))}</td>')
        mark = ' class="bad" title="failed, see errors.csv"' if row.get("error") else ""
        lines.append(f"<tr{mark}>{''.join(cells)}</tr>")
    return _table([title for _, title, _ in columns], lines, sortable=True, identity="shapes", text_columns=3)


def _cell(value: Any, pattern: str, kind: str = "") -> str:
    shown = f' class="{kind}"' if kind else ""
    if value is None:
        return f'<td{shown} data-v="">-</td>'
    return f'<td{shown} data-v="{value!r}">{value:{pattern}}</td>'


def _table(
    titles: Sequence[str], rows: Sequence[str], *, sortable: bool = False, identity: str = "", text_columns: int = 1
) -> str:
    kinds = ["t" if i < text_columns else "c" if title == TSDF else "" for i, title in enumerate(titles)]
    heads = "".join(
        f'<th scope="col"{f" class={kind}" if kind else ""}>{escape(title)}</th>' for title, kind in zip(titles, kinds)
    )
    attributes = (' class="sort"' if sortable else "") + (f' id="{identity}"' if identity else "")
    inner = f"<thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="scroll{" tall" if identity else ""}"><table{attributes}>{inner}</table></div>'


def _worst_cases(cases: Sequence[Case], n_failed: int) -> str:
    if not cases:
        return ""
    from trellis.geometry.render import sequential_colours

    distances = [(_distances(case.truth, case.pred), _distances(case.pred, case.truth)) for case in cases]
    finite = [np.quantile(d[np.isfinite(d)], 0.98) for pair in distances for d in pair if np.isfinite(d).any()]
    limit = float(f"{max([*finite, 1e-6]):.2g}")
    ramp = sequential_colours(np.linspace(0, limit, 12), limit)
    stops = ", ".join(f"rgb({r:.0f} {g:.0f} {b:.0f})" for r, g, b in 255 * ramp)
    parts = [
        "<h2>Worst cases</h2>",
        f"<p>Lowest Dice first{', without those that failed' if n_failed else ''}. Colour: distance to the other "
        f'surface, 0 <span class="bar" style="background:linear-gradient(90deg, {stops})"></span> {limit:g} mm and '
        "more.</p>",
    ]
    for case, (on_truth, on_pred) in zip(cases, distances):
        row = case.row
        title = f"{row['label'] or 'shape'} {row['sha256'][:12]}"
        dice, ceiling = ("-" if row[name] is None else f"{row[name]:.4f}" for name in ("dice", "dice_tsdf"))
        figures = f"Dice {dice} (TSDF {ceiling}), HD95 {row['hd95_mm']:.3f} mm, ASSD {row['assd_mm']:.3f} mm"
        pictures = _pictures(case, on_truth, on_pred, limit)
        shown = "".join(
            f'<figure><img alt="{escape(title)}: {name}" src="data:image/png;base64,{data}">'
            f"<figcaption>{name}</figcaption></figure>"
            for name, data in pictures
        )
        parts.append(f'<div class="case"><b>{escape(title)}</b> {escape(figures)}<div class="row">{shown}</div></div>')
    return "\n".join(parts)


def _distances(mesh: Mesh, other: Mesh) -> np.ndarray:
    """Distance [V] of each vertex to the other surface; infinite where that is empty."""
    from trellis.geometry.surface_distance import ClosestTriangle

    if len(mesh[1]) == 0 or len(other[1]) == 0:
        return np.full(len(mesh[0]), np.inf)
    return ClosestTriangle(*other).query(np.asarray(mesh[0], dtype=np.float64))[0]


def _pictures(case: Case, on_truth: np.ndarray, on_pred: np.ndarray, limit: float) -> list[tuple[str, str]]:
    from trellis.geometry.render import BONE, frame_of, png_bytes, render_colourings, sequential_colours

    view = {"size": PICTURE_SIZE, "frame": frame_of([case.truth, case.pred]), "occlusion_rays": 4}
    truth, by_distance = render_colourings(*case.truth, [BONE, sequential_colours(on_truth, limit)], **view)
    pred, pred_by_distance = render_colourings(*case.pred, [BONE, sequential_colours(on_pred, limit)], **view)
    shown = {
        "truth": truth,
        "reconstruction": pred,
        "reconstruction, distance to truth": pred_by_distance,
        "truth, distance to reconstruction": by_distance,
    }
    return [(name, base64.b64encode(png_bytes(image)).decode()) for name, image in shown.items()]
