"""Curves of a page: a run's metrics.csv, and scores over the number of samples, settings of sampling and classes."""

import csv
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

from ldmlab import format1
from ldmlab.errors import InputError
from ldmlab.files import read_text
from ldmlab.report.line_chart import Chart, Points
from ldmlab.report.page_content import DASH, Charts, Row, Section, Table
from ldmlab.report.score_lines import ScoreLine, called, number_text, score_line, score_text

_FIRST = ("loss", "psnr", "ssim", "lpips", "recall", "fid", "reconstruction")  # what is looked at first
_LAST = (
    *("lr", "learning_rate", "memory", "per_second", "seconds", "norm", "grad", "skipped", "epoch", "chance"),
    *("images", "position", "psnr_std", "ssim_std", "lpips_std"),
)
_MOST_LINES = 10
_MOST_CLASSES = 40  # of a table, the worst first
_ONE_CHART = {"precision": "precision and recall", "recall": "precision and recall"}


def read_curves(path: Path) -> dict[str, Points]:
    """Column name to (step, value) points; empty cells and cells that are no numbers are left out."""
    columns: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in metric_rows(path):
        step = _number(row.pop("step", None))
        for name, text in row.items():
            value = _number(text)
            if step is not None and value is not None:
                columns[name].append((step, value))
    return dict(columns)


def metric_rows(path: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv by today's names of the columns."""
    try:
        return [
            {format1.metric(name): text for name, text in row.items() if name and isinstance(text, str)}
            for row in csv.DictReader(StringIO(read_text(path), newline=""))
        ]
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path} cannot be read ({error}); restore or delete it, or leave this run out.") from None


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


def run_charts(path: Path) -> list[Chart]:
    """The most informative first."""
    groups: dict[str, dict[str, Points]] = defaultdict(dict)
    for name, points in read_curves(path).items():
        stem, line = _stem(name)
        groups[stem][line] = points
    stems = sorted(groups, key=lambda stem: (_rank(stem), stem))
    charts = [Chart(stem, dict(list(groups[stem].items())[:_MOST_LINES])) for stem in stems]
    return [chart for chart in charts if chart]


def _stem(name: str) -> tuple[str, str]:
    """`latent_std/3` and `loss_at/0-99` are lines 3 and 0-99; `train/psnr` and `val/psnr` lines of psnr."""
    name = name.removeprefix("val/") if re.search(r"/.*/", name) else name
    head, _, tail = name.rpartition("/")
    if head and re.fullmatch(r"[\d.\-–to_]+", tail):
        return head, tail
    return (tail, head) if head in ("train", "val") else (name, name)


def _rank(stem: str) -> int:
    if any(word in stem for word in _LAST):
        return 2
    return 0 if any(word in stem for word in _FIRST) else 1


# ---- scores over scales and classes


def over_scales(result: Mapping[str, Any]) -> list[Section]:
    """Sections: charts above their tables."""
    sections = [_over_samples(name, points, result) for name, points in (result.get("sample_curves") or {}).items()]
    if points := result.get("sweep"):
        sections.append(_over_sweep(points, result))
    if rows := result.get("by_class"):
        sections.append(_by_class(rows, result))
    return sections


def _over_samples(name: str, points: Sequence[Mapping[str, float]], result: Mapping[str, Any]) -> Section:
    """The distance at each number of samples, and the straight line over 1 / n, extrapolated to 0."""
    limit, distance = result["scores"][name], called("Fréchet distance", result)
    measured = [(1000 / point["images"], point["value"]) for point in points]
    line = [(0.0, limit["value"]), measured[0]]
    heading = f"{distance} over the number of samples"
    chart = Chart(heading, {"measured": measured, "extrapolated": line}, "1000 / samples")
    rows = [Row("theirs", f"{point['images']:,.0f}", [number_text(point["value"])]) for point in points]
    rows.append(Row("ours", "infinitely many", [_cell(name, limit)]))
    notes = [
        "At each number the mean over disjoint parts that together hold every sample; extrapolated by a straight line "
        "over 1 / samples, ± its standard error. The number of reference images does not change.",
        *(f"{mark}." for mark in limit["marks"]),
    ]
    return Section(
        "Over the number of samples", [Charts([chart]), Table("", [f"{distance} ↓"], rows, notes, "samples")]
    )


def _over_sweep(points: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> Section:
    """Scores over the first setting of numbers, a line for each combination of the others, ± as bars."""
    swept, own = [name for name in points[0] if name != "scores"], result["sampling"]
    names = [name.replace("_", " ") for name in swept]
    x = next((name for name in swept if all(isinstance(point[name], int | float) for point in points)), None)
    x_title = "row of the table" if x is None else x.replace("_", " ")
    places = [float(row if x is None else point[x]) for row, point in enumerate(points, 1)]
    others = [name for name in swept if x not in (None, name)]
    labels = [", ".join(f"{name.replace('_', ' ')} {_text(point[name])}" for name in others) for point in points]
    first: dict[str, Mapping[str, Any]] = {}
    for point in points:
        first = {name: score for name, score in point["scores"].items() if score is not None} | first
    lines = {name: score_line(name, score, result) for name, score in first.items()}
    found = sorted(zip(places, labels, [point["scores"] for point in points], strict=True), key=lambda one: one[0])
    charts = _sweep_charts(found, lines, x_title)
    rows = []
    for point in points:
        cells = [_cell(name, point["scores"].get(name)) for name in lines]
        same = all(own.get(name) in (point[name], _text(point[name])) for name in swept)
        rows.append(Row("ours" if same else "theirs", ", ".join(_text(point[name]) for name in swept), cells))
    seeds = (result["protocol"] or {}).get("sweep_seeds") or 1
    notes = ["The same conditions, noise and number of samples in every row."]
    notes += [f"± is the deviation over {seeds} seeds of the noise, of which each value is the mean."] * (seeds > 1)
    table = Table("", [line.head for line in lines.values()], rows, notes, ", ".join(names))
    return Section(f"Over {', '.join(names)}", [Charts(charts), table])


def _sweep_charts(
    found: Sequence[tuple[float, str, Mapping[str, Any]]],  # place, line and scores of each point
    lines: Mapping[str, ScoreLine],
    x_title: str,
) -> list[Chart]:
    charts: dict[str, Chart] = {}
    for name, line in lines.items():
        what = _ONE_CHART.get(name) or line.title
        chart = charts.setdefault(what, Chart(f"{what} over {x_title}", {}, x_title))
        series, spreads = dict(chart.series), dict(chart.spreads)
        for place, label, scores in found:
            if (score := scores.get(name)) is not None:
                key = ", ".join(filter(None, (line.title if name in _ONE_CHART or not label else "", label)))
                series[key] = [*series.get(key, ()), (place, score["value"])]
                spreads[key] = [*spreads.get(key, ()), score.get("spread")]
        charts[what] = replace(chart, series=series, spreads=spreads)
    shown = list(charts.values())
    if {"fid", "recall"} <= lines.keys():
        pairs: dict[str, Points] = {}
        for _, label, scores in found:
            if scores.get("fid") and scores.get("recall"):
                pairs[label] = [*pairs.get(label, ()), (scores["recall"]["value"], scores["fid"]["value"])]
        shown.append(Chart(f"{lines['fid'].title} against recall", pairs, "recall"))
    return shown


def _text(value: Any) -> str:
    """A swept value: an interval as LOW..HIGH, no value as none."""
    if isinstance(value, list | tuple):
        return "..".join(f"{float(part)}" for part in value)
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _by_class(rows: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> Section:
    names = ("kid", "precision", "recall")
    heads = [score_line(name, {"value": 0.0}, result).head for name in names]
    shown = []
    for row in rows[:_MOST_CLASSES]:
        cells = [DASH if row[name] is None else score_text(name, row[name], row.get("spread")) for name in names]
        shown.append(Row("theirs", str(row["class"]), [f"{row['samples']:,}", f"{row['real']:,}", *cells]))
    notes = [
        "Each class's samples compared with its own real images, the worst first; the kernel distance is unbiased, "
        "precision and recall of few images are coarse."
    ]
    if len(rows) > _MOST_CLASSES:
        notes.append(f"{_MOST_CLASSES} of {len(rows):,} classes; metrics.json holds all.")
    field = str(result["protocol"].get("class_field"))
    return Section(f"By {field}", [Table("", ["samples", "real", *heads], shown, notes, field)])


def _cell(name: str, score: Mapping[str, Any] | None) -> str:
    return DASH if score is None else score_text(name, score["value"], score.get("spread"))
