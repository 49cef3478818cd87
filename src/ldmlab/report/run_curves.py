"""A run's metrics.csv as charts: names that share a stem become lines of one chart."""

import csv
import re
from collections import defaultdict
from pathlib import Path

from ldmlab import format1
from ldmlab.errors import InputError
from ldmlab.report.line_chart import Chart, Points

_FIRST = ("loss", "psnr", "ssim", "lpips", "recall", "fid", "reconstruction")  # what is looked at first
_LAST = (
    *("lr", "learning_rate", "memory", "per_second", "seconds", "norm", "grad", "skipped", "epoch", "chance"),
    *("images", "position", "psnr_std", "ssim_std", "lpips_std"),
)
_MOST_LINES = 10


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
    """The most telling first."""
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
    if head in ("train", "val"):
        return tail, head
    return name, name


def _rank(stem: str) -> int:
    if any(word in stem for word in _LAST):
        return 2
    return 0 if any(word in stem for word in _FIRST) else 1
