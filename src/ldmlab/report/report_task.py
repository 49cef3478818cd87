"""The task's own part of a report: what judges found, class by class, and the scores of answers without a model."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ldmlab.report.report_formats import as_markdown, html_table
from ldmlab.report.report_images import image_tag
from ldmlab.report.report_table import ARROW, DASH, ReportTable, TableRow
from ldmlab.report.score_names import number_text

_CARDS = 12  # samples shown with what was asked and what others answer


def task_rows(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """Lines of the table of scores: each judge on samples and on real images."""
    rows = []
    for name, found in (result.get("judges") or {}).items():
        real = f"{_share(found['of_real'])} of the judge's score on held-out real images"
        guess = f"chance {_share(found['chance'])}; " if found["chance"] is not None else ""
        limit = f"its own limit{learned_note(found)}"
        notes = f"{real}; {guess}beside what others asked for {_share(found['shuffled'])}"
        rows += [
            _row(f"judge_{name}", f"Judge: {found['measures']}", found["samples"], "higher", found["how"], notes),
            _row(f"judge_{name}_real", "Judge on real images", found["held_out_real"], "info", "", limit),
        ]
    return rows


def learned_note(found: Mapping[str, Any]) -> str:
    """What a judge has learned from, after a semicolon; nothing for records that do not say."""
    if not (learned := found.get("learned")):
        return ""
    return "; learned from {examples:,} real examples in {updates:,} updates of {batch_size}".format(**learned)


def _row(name: str, shown: str, value: float, direction: str, meaning: str, note: str) -> dict[str, str]:
    return {
        "name": name,
        "shown": shown,
        "value": f"{value:.1%}",
        "direction": direction,
        "meaning": meaning,
        "note": note,
    }


def task_tables(result: Mapping[str, Any]) -> list[ReportTable]:
    """The model among the baselines, then each judge's classes."""
    tables = [_baselines(result)] if result.get("baselines") else []
    return tables + [_classes(found) for found in (result.get("judges") or {}).values()]


def _baselines(result: Mapping[str, Any]) -> ReportTable:
    from ldmlab.report.report import MEANING

    names = list(result["scores"])
    arrows = [MEANING.get(name, (name, "info", "")) for name in names]
    rows = [
        TableRow("theirs", found["title"], tuple(_value(found["scores"].get(name)) for name in names))
        for found in result["baselines"].values()
    ]
    rows.append(TableRow("ours", "this model", tuple(_value(result["scores"][name]) for name in names)))
    columns = tuple(f"{shown} {ARROW[direction]}".strip() for shown, direction, _ in arrows)
    note = "All answer the same requests and are compared with the same real images through the same features."
    return ReportTable("Beside answers without a model", columns, tuple(rows), (note,))


def _classes(found: Mapping[str, Any]) -> ReportTable:
    rows = [
        TableRow("theirs", one["name"], (_of(one, "real"), _of(one, "samples")))
        for one in found["classes"]
        if one["real_count"] or one["samples_count"]
    ]
    total = TableRow("ours", "mean over classes", (_share(found["held_out_real"]), _share(found["samples"])))
    chance = [f"Blind guessing would reach {_share(found['chance'])}."] if found["chance"] is not None else []
    notes = [
        found["how"],
        f"The same samples beside what others asked for: {_share(found['shuffled'])}.",
        *chance,
    ]
    title = found["measures"][:1].upper() + found["measures"][1:]
    return ReportTable(title, ("held-out real images", "samples"), (*rows, total), tuple(notes))


def _of(one: Mapping[str, Any], kind: str) -> str:
    return DASH if one[kind] is None else f"{_share(one[kind])} of {one[f'{kind}_count']:,}"


def task_markdown(result: Mapping[str, Any]) -> list[str]:
    """Lines of report.md."""
    tables = task_tables(result)
    return ["", "## The task", "", *as_markdown(tables).splitlines()] if tables else []


def task_sections(result: Mapping[str, Any], folder: Path) -> str:
    """Sections of the page."""
    tables = "".join(f"<section>{html_table(table)}</section>" for table in task_tables(result))
    return _cards(result, folder) + tables


def _cards(result: Mapping[str, Any], folder: Path) -> str:
    """What was asked, what baselines answer, what the model drew, what the original shows; a row each."""
    if not (given := result.get("given")):
        return ""
    baselines = (result.get("baselines") or {}).values()
    columns: list[tuple[str, Sequence[str]]] = [("asked", given)]
    columns += [(found["title"], found["images"]) for found in baselines]
    columns += [("drawn", _files(result, "samples")), ("real", _files(result, "real"))]
    rows = list(zip(*(files for _, files in columns), strict=True))
    stride = max(len(rows) // _CARDS, 1)
    titles = [title for title, _ in columns]
    cards = "".join(_card(folder, files, titles) for files in rows[::stride][:_CARDS])
    return (
        f"<section><h2>Asked and drawn</h2><p>From left to right: {escape(', '.join(titles))}.</p>"
        f'<div class="cards rows">{cards}</div></section>'
    )


def _card(folder: Path, files: Sequence[str], titles: Sequence[str]) -> str:
    images = "".join(image_tag(folder, name, title) for name, title in zip(files, titles, strict=True))
    return f'<figure class="card"><div>{images}</div></figure>'


def _files(result: Mapping[str, Any], kind: str) -> list[str]:
    return [item["file"] for item in result["images"][kind]]


def _value(score: Mapping[str, Any] | None) -> str:
    return DASH if score is None else number_text(score["value"])


def _share(value: float | None) -> str:
    return "none" if value is None else f"{value:.1%}"
