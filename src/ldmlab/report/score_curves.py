"""Curves of a page: a run's metrics.csv, and scores over the number of samples, the guidance scale and classes."""

import csv
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldmlab import format1
from ldmlab.errors import InputError
from ldmlab.report.line_chart import Chart, Points
from ldmlab.report.page_content import DASH, Charts, Row, Section, Table
from ldmlab.report.score_lines import called, number_text, score_line, score_text

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
        with open(path, newline="", encoding="utf-8") as file:
            return [
                {format1.metric(name): text for name, text in row.items() if name and isinstance(text, str)}
                for row in csv.DictReader(file)
            ]
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path} cannot be read ({error}); restore it, or leave this run out.") from None


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
    if points := result.get("guidance_scale_curve"):
        sections.append(_over_guidance(points, result))
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


def _over_guidance(points: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> Section:
    own = result["sampling"].get("guidance_scale")
    scales: list[Any] = [point.get("guidance_scale") for point in points]
    scores: dict[str, list[Any]] = {name: [] for point in points for name in point["scores"]}
    for name, found in scores.items():
        found += [point["scores"].get(name) for point in points]
    lines = {
        name: score_line(name, next((score for score in found if score is not None), {}), result)
        for name, found in scores.items()
    }
    curves: dict[str, dict[str, Points]] = {}
    for name, line in lines.items():
        curve = [
            (scale, score["value"]) for scale, score in zip(scales, scores[name], strict=True) if score is not None
        ]
        curves.setdefault(_ONE_CHART.get(name) or line.title, {})[line.title] = curve
    charts = [Chart(f"{what} over guidance scale", series, "guidance scale") for what, series in curves.items()]
    if {"fid", "recall"} <= scores.keys():
        curve = [(recall["value"], fid["value"]) for recall, fid in zip(scores["recall"], scores["fid"], strict=True)]
        charts.append(Chart(f"{lines['fid'].title} against recall", {"": curve}, "recall"))
    rows = []
    for scale, cells in zip(scales, zip(*scores.values(), strict=True), strict=True):
        texts = [_cell(name, score) for name, score in zip(scores, cells, strict=True)]
        rows.append(Row("ours" if scale == own else "theirs", f"{scale:g}", texts))
    notes = ["The same conditions, noise and number of samples at every scale."]
    table = Table("", [line.head for line in lines.values()], rows, notes, "guidance scale")
    return Section("Over the guidance scale", [Charts(charts), table])


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
