"""A run's metrics.csv as charts: names that share a stem become lines of one chart."""

import csv
import re
from collections import defaultdict
from pathlib import Path

from ldmlab.report.line_chart import Points, line_chart

_FIRST = ("loss", "psnr", "ssim", "lpips", "recall", "fid", "reconstruction")  # what is looked at first
_LAST = (
    "lr",
    "learning_rate",
    "memory",
    "per_second",
    "seconds",
    "norm",
    "grad",
    "skipped",
    "epoch",
    "chance",
    "images",
    "position",
    "psnr_std",
    "ssim_std",
    "lpips_std",
)
_MOST_LINES = 10


def read_curves(path: Path) -> dict[str, Points]:
    """Column name to (step, value) points; empty cells are left out."""
    columns: dict[str, list[tuple[float, float]]] = defaultdict(list)
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            step = row.pop("step", None)
            for name, text in row.items():
                if step and name and isinstance(text, str) and text:
                    columns[name].append((float(step), float(text)))
    return dict(columns)


def charts(path: Path) -> list[str]:
    """SVG figures, the most telling first."""
    groups: dict[str, dict[str, Points]] = defaultdict(dict)
    for name, points in read_curves(path).items():
        stem, line = _stem(name)
        groups[stem][line] = points
    stems = sorted(groups, key=lambda stem: (_rank(stem), stem))
    return [line_chart(dict(list(groups[stem].items())[:_MOST_LINES]), title=stem) for stem in stems]


def _stem(name: str) -> tuple[str, str]:
    """`latent_std/3` and `loss_at/0-99` are lines 3 and 0-99; `train/psnr` and `val/psnr` lines of psnr."""
    name = name.removeprefix("val/") if re.search(r"/.*/", name) else name
    head, _, tail = name.rpartition("/")
    if head and re.fullmatch(r"[\d.\-–to_]+", tail):
        return head, tail
    if head in ("train", "val", "held_out"):
        return tail, head
    return name, name


def _rank(stem: str) -> int:
    if any(word in stem for word in _LAST):
        return 2
    return 0 if any(word in stem for word in _FIRST) else 1
