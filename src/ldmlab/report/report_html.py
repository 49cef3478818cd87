"""The page of an evaluation: one HTML file with everything inside it."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ldmlab.report.curves import charts
from ldmlab.report.report_audit import audit_section
from ldmlab.report.report_curves import curve_sections
from ldmlab.report.report_formats import html_table
from ldmlab.report.report_images import image_tag, thumbnail_tag
from ldmlab.report.report_style import STYLE
from ldmlab.report.report_table import ReportTable
from ldmlab.report.report_task import task_sections
from ldmlab.report.score_names import number_text

Rows = Sequence[Mapping[str, str]]
IMAGES_A_RUN = 16  # in a comparison
_ARROW = {"lower": "↓", "higher": "↑", "info": ""}


def evaluation_page(result: Mapping[str, Any], folder: Path, scores: Rows) -> str:
    """One evaluation: images first, then numbers, then everything that made them."""
    from ldmlab.report.report import settings_rows, title

    sections = [
        _tiles(scores),
        _samples(result, folder),
        _score_table(scores, result),
        task_sections(result, folder),
        curve_sections(result),
        _categories(result, folder),
        audit_section(result, folder),
        _extras(result, folder),
        _curves(result, folder),
        _buckets(result),
        _paper(result),
        _open(result),
        _settings(settings_rows(result)),
    ]
    return page(title(result), _lead(result), sections)


def _lead(result: Mapping[str, Any]) -> str:
    """What the images of the page are."""
    sampling = result["sampling"]
    beside = f"{result['reference']['images']} {_split(result)} images"
    if "steps" not in sampling:
        return f"{beside} of {sampling['size']} px, encoded and decoded again, beside the originals."
    return (
        f"{sampling['images']} images of {sampling['size']} px, {sampling['steps']} {sampling['sampler'].upper()} "
        f"steps, guidance scale {sampling['guidance_scale']:g}, eta {sampling['eta']:g}, "
        f"{result['model'].get('weights', '')} weights, set beside {beside}."
    )


def comparison_page(results: Sequence[Mapping[str, Any]], names: Sequence[str], tables: Sequence[ReportTable]) -> str:
    """Several evaluations: a table for each measurement, then a row of samples of each."""
    sections = [f"<section>{html_table(table)}</section>" for table in tables]
    for name, result in zip(names, results, strict=True):
        folder, shown = Path(result["folder"]), result["images"]["samples"][:IMAGES_A_RUN]
        images = "".join(thumbnail_tag(folder, item["file"], item["caption"]) for item in shown)
        sections.append(_section(name, f'<div class="thumbnails">{images}</div>'))
    return page("Comparison", f"{len(results)} evaluations side by side.", sections)


def page(title: str, lead: str, sections: Sequence[str]) -> str:
    """The frame."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><main><header><h1>{escape(title)}</h1><p>{escape(lead)}</p></header>"
        f"{''.join(sections)}</main></body></html>\n"
    )


def _split(result: Mapping[str, Any]) -> str:
    return "held-out" if result["reference"]["split"] == "val" else "training"


def _section(title: str, content: str, note: str = "") -> str:
    if not content:
        return ""
    return f"<section><h2>{escape(title)}</h2>{f'<p>{note}</p>' if note else ''}{content}</section>"


def _card(folder: Path, names: Sequence[str], caption: str, mark: str = "") -> str:
    images = "".join(image_tag(folder, name, caption) for name in names)
    return f'<figure class="card {mark}"><div>{images}</div><figcaption>{escape(caption)}</figcaption></figure>'


def _tiles(scores: Rows) -> str:
    tiles = "".join(
        f'<div class="tile" title="{escape(row["meaning"])}"><b>{escape(row["value"].split(" ±")[0])}</b>'
        f"<span>{escape(row['shown'])} {_ARROW[row['direction']]}</span></div>"
        for row in scores
    )
    return f'<div class="tiles">{tiles}</div>'


def _samples(result: Mapping[str, Any], folder: Path) -> str:
    pairs = zip(result["images"]["samples"], result["images"]["real"], strict=True)
    told = result["sampling"]["conditions"] == "reference" and any(i["caption"] for i in result["images"]["samples"])
    if told:
        cards = [_card(folder, [drawn["file"], real["file"]], drawn["caption"]) for drawn, real in pairs]
        rebuilt = "steps" not in result["sampling"]
        note = f"Each pair: drawn from the caption, and the {_split(result)} image whose caption it is."
        if rebuilt:
            return _section("Rebuilt and real", f'<div class="cards pairs">{"".join(cards)}</div>')
        return _section("Drawn and real", f'<div class="cards pairs">{"".join(cards)}</div>', note)
    drawn = "".join(image_tag(folder, item["file"]) for item in result["images"]["samples"])
    real = "".join(image_tag(folder, item["file"]) for item in result["images"]["real"])
    halves = f"<div><h3>Drawn</h3>{drawn}</div><div><h3>Real ({_split(result)})</h3>{real}</div>"
    return _section("Drawn and real", f'<div class="halves">{halves}</div>')


def _score_table(scores: Rows, result: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{escape(row['shown'])} {_ARROW[row['direction']]}</td><td class='value'>{escape(row['value'])}</td>"
        f"<td>{escape(row['meaning'])}</td><td class='dim'>{escape(row['note'])}</td></tr>"
        for row in scores
    )
    features = result["features"]
    note = f"Features: {escape(features['name'])}, {features['width']} wide. ↓ lower is better, ↑ higher."
    return _section("Scores", f"<table>{rows}</table>", note)


def _categories(result: Mapping[str, Any], folder: Path) -> str:
    found = result.get("categories")
    if not found:
        return ""
    seen = found["training_captions"]
    blocks = []
    for row, other in zip(found["by_category"], seen["by_category"], strict=True):
        name = row["category"]
        bars = _bar("real", row["real_right"], row["real"]) + _bar("drawn", row["samples_right"], row["samples"])
        blocks.append(f"<tr><td>{escape(name)}</td><td>{bars}</td>{_strip(folder, found, name)}</tr>")
        bars = _bar("drawn", other["samples_right"], other["samples"])
        blocks.append(f"<tr><td class='dim'>training captions</td><td>{bars}</td>{_strip(folder, seen, name)}</tr>")
    note = (
        "A small network that has seen only real training images sorts held-out real images and samples. Balanced "
        f"over categories it is right for {found['held_out_real']:.1%} of real images, {found['samples']:.1%} of "
        f"samples for held-out captions and {seen['samples']:.1%} of samples for training captions (chance "
        f"{found['chance']:.1%}). Framed in green: put into the category that was asked for."
    )
    return _section("Does it draw what was asked?", f'<table class="categories">{"".join(blocks)}</table>', note)


def _strip(folder: Path, found: Mapping[str, Any], category: str) -> str:
    images = "".join(_verdict(folder, item) for item in found["images"] if item["category"] == category)
    return f"<td class='strip'>{images}</td>"


def _verdict(folder: Path, item: Mapping[str, Any]) -> str:
    word = "right" if item["right"] else "wrong"
    return f'<span class="{word}">{image_tag(folder, item["file"], item["caption"])}</span>'


def _bar(name: str, right: int, count: int) -> str:
    share = right / count if count else 0.0
    return f'<div class="bar {name}"><i style="width:{share:.0%}"></i><span>{name} {right}/{count}</span></div>'


def _extras(result: Mapping[str, Any], folder: Path) -> str:
    blocks = "".join(
        f'<figure class="wide"><figcaption>{escape(item["title"])}</figcaption>'
        f"{image_tag(folder, item['file'])}</figure>"
        for item in result["images"].get("extras", [])
    )
    return _section("More images", blocks)


def _curves(result: Mapping[str, Any], folder: Path) -> str:
    blocks = []
    for run in result.get("curves", []):
        figures = [chart for chart in charts(folder / run["file"]) if chart]
        first, rest = "".join(figures[:6]), "".join(figures[6:])
        more = f'<details><summary>{len(figures) - 6} more</summary><div class="charts">{rest}</div></details>'
        blocks.append(f'<h3>{escape(run["title"])}</h3><div class="charts">{first}</div>{more if rest else ""}')
    return _section("Training", "".join(blocks))


def _paper(result: Mapping[str, Any]) -> str:
    from ldmlab.report.report_table import paper_report

    tables = paper_report([result])
    comparable = bool((result.get("paper") or {}).get("comparable"))
    note = "Our row meets every condition of the paper's measurement that is known." if comparable else ""
    stamp = "" if comparable or not tables else '<p><em class="stamp">not comparable</em></p>'
    return _section("The paper's tables", stamp + "".join(map(html_table, tables)), note) if tables else ""


def _buckets(result: Mapping[str, Any]) -> str:
    """Scores by size of the hole."""
    buckets = result.get("buckets") or {}
    columns = list(dict.fromkeys(name for bucket in buckets.values() for name in bucket["scores"]))
    lines = [
        f"<tr><td>{bucket['hole'][0]:.0%} to {bucket['hole'][1]:.0%}</td><td>{bucket['images']:,}</td>"
        + "".join(f"<td>{_score_of(bucket['scores'].get(column))}</td>" for column in columns)
        + "</tr>"
        for bucket in buckets.values()
    ]
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    table = f'<table class="numbers"><tr><th>hole</th><th>images</th>{head}</tr>{"".join(lines)}</table>'
    note = "Each size is compared with its own originals alone, so its distance rests on fewer images."
    return _section("By size of the hole", table if buckets else "", note)


def _score_of(score: Mapping[str, Any] | None) -> str:
    return "–" if score is None else number_text(score["value"])


def _open(result: Mapping[str, Any]) -> str:
    """What the paper does not fix."""
    rows = (result["protocol"].get("leaves_open") or {}).items()
    body = "".join(f"<tr><td>{escape(name)}</td><td>{escape(text)}</td></tr>" for name, text in rows)
    return _section("What the paper leaves open, and what is chosen here", f"<table>{body}</table>" if body else "")


def _settings(rows: Sequence[tuple[str, str]]) -> str:
    body = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows)
    return _section("Settings and origin", f'<table class="settings">{body}</table>')
