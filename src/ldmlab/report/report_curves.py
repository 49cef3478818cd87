"""What a report says beyond single numbers: scores over the number of samples and over guidance, class by class."""

from collections.abc import Mapping, Sequence
from typing import Any

from ldmlab.report.line_chart import Points, line_chart
from ldmlab.report.report_formats import as_markdown, html_table
from ldmlab.report.report_table import ARROW, DASH, ReportTable, TableRow
from ldmlab.report.score_names import called, number_text, score_text

_MOST_CLASSES = 40  # of a table, the worst first
_ONE_CHART = {"precision": "precision and recall", "recall": "precision and recall"}


def curve_markdown(result: Mapping[str, Any]) -> list[str]:
    """Lines of report.md."""
    tables = [table for table, _ in _blocks(result)]
    return ["", "## Curves and classes", "", *as_markdown(tables).splitlines()] if tables else []


def curve_sections(result: Mapping[str, Any]) -> str:
    """Sections of the page: charts above their tables."""
    return "".join(f"<section>{html_table(table, _figures(charts))}</section>" for table, charts in _blocks(result))


def _figures(charts: Sequence[str]) -> str:
    return f'<div class="charts">{"".join(charts)}</div>' if charts else ""


def _blocks(result: Mapping[str, Any]) -> list[tuple[ReportTable, list[str]]]:
    """Tables with their charts."""
    blocks = [_over_samples(name, points, result) for name, points in (result.get("sample_curves") or {}).items()]
    if points := result.get("guidance_scale_curve"):
        blocks.append(_over_guidance(points, result))
    if rows := result.get("by_class"):
        blocks.append((_by_class(rows, result), []))
    return blocks


def _over_samples(
    name: str, points: Sequence[Mapping[str, float]], result: Mapping[str, Any]
) -> tuple[ReportTable, list[str]]:
    """The distance at each number of samples, and the straight line over 1 / n to where it meets the axis."""
    limit, distance = result["scores"][name], called("fid", "Fréchet distance", result)
    measured = [(1000 / point["images"], point["value"]) for point in points]
    line = [(0.0, limit["value"]), measured[0]]
    chart = line_chart(
        {"measured": measured, "extrapolated": line},
        title=f"{distance} over the number of samples",
        x_title="1000 / samples",
    )
    rows = [TableRow("theirs", f"{point['images']:,.0f}", (number_text(point["value"]),)) for point in points]
    rows.append(TableRow("ours", "infinitely many", (_value(name, limit),)))
    notes = (
        "At each number the mean over disjoint parts that together hold every sample; extrapolated by a straight line "
        "over 1 / samples, ± its standard error. The reference's own number of images stays as it is.",
        *(f"{mark}." for mark in limit["marks"]),
    )
    columns = (f"{distance} {ARROW['lower']}",)
    return ReportTable("Over the number of samples", columns, tuple(rows), notes, "samples"), [chart]


def _over_guidance(points: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> tuple[ReportTable, list[str]]:
    from ldmlab.report.report import MEANING

    names = list(dict.fromkeys(name for point in points for name in point["scores"]))
    meanings = {name: MEANING.get(name, (name, "info", "")) for name in names}
    meanings = {name: (called(name, told[0], result), *told[1:]) for name, told in meanings.items()}
    charts: dict[str, dict[str, Points]] = {}
    for name in names:
        line = [
            (point["guidance_scale"], point["scores"][name]["value"]) for point in points if name in point["scores"]
        ]
        shown = meanings[name][0]
        charts.setdefault(_ONE_CHART.get(name) or shown, {})[shown] = line
    figures = [line_chart(lines, title=f"{title} over guidance", x_title="guidance") for title, lines in charts.items()]
    if {"fid", "recall"} <= set(names):
        line = [(point["scores"]["recall"]["value"], point["scores"]["fid"]["value"]) for point in points]
        figures.append(line_chart({"": line}, title=f"{meanings['fid'][0]} against recall", x_title="recall"))
    own = result["sampling"].get("guidance_scale")
    rows = [
        TableRow(
            "ours" if point["guidance_scale"] == own else "theirs",
            f"{point['guidance_scale']:g}",
            tuple(_value(name, point["scores"].get(name)) for name in names),
        )
        for point in points
    ]
    columns = tuple(f"{shown} {ARROW[direction]}".strip() for shown, direction, _ in meanings.values())
    note = "The same requests, noise and number of samples at every scale."
    return ReportTable("Over the guidance scale", columns, tuple(rows), (note,), "guidance"), figures


def _by_class(rows: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> ReportTable:
    shown = [
        TableRow(
            "theirs",
            str(row["class"]),
            (
                f"{row['samples']:,}",
                f"{row['real']:,}",
                *(_value(name, None if row[name] is None else row) for name in ("kid", "precision", "recall")),
            ),
        )
        for row in rows[:_MOST_CLASSES]
    ]
    columns = ("samples", "real", "Kernel distance ↓", "Precision ↑", "Recall ↑")
    notes = [
        "Each class's samples beside its own real images alone, the worst first; the kernel distance is unbiased, "
        "precision and recall of few images are coarse."
    ]
    if len(rows) > _MOST_CLASSES:
        notes.append(f"{_MOST_CLASSES} of {len(rows):,} classes; metrics.json holds all.")
    field = result["protocol"].get("class_field")
    return ReportTable(f"By {field}", columns, tuple(shown), tuple(notes), str(field))


def _value(name: str, found: Mapping[str, Any] | None) -> str:
    """A score with its spread; `found`: a score, or a row that holds it by name."""
    if found is None:
        return DASH
    value, spread = found.get("value", found.get(name)), found.get("spread")
    return score_text(name, value, spread)
