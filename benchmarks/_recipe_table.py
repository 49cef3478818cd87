"""The table and the figure of `recipes.py`, from its lines alone: means and 95 % intervals, pairs of seeds."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from scipy.stats import t as student

Line = Mapping[str, Any]
ENCODERS = {"clip": "CLIP", "classifier": "classifier"}
COLOURS = ("#2f6fde", "#e0662f")
OTHERS = (
    "precision_classifier",
    "recall_classifier",
    *(f"{w}_{s}" for s in ("pairs", "concepts") for w in ("style", "category")),
)
SMALL = 0.15  # relative difference that the number of seeds should decide


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval by Student's t; no interval of one value."""

    value: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Interval":
        """Of independent values."""
        half = math.nan
        if len(values) > 1:
            half = float(student.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
        return cls(mean(values), mean(values) - half, mean(values) + half, len(values))

    @property
    def decided(self) -> bool:
        """Whether 0 lies outside; never of one value."""
        return self.low > 0 or self.high < 0

    def ratio(self) -> "Interval":
        """Of logarithms, as factors."""
        return Interval(math.exp(self.value), math.exp(self.low), math.exp(self.high), self.count)

    def text(self, digits: int = 3) -> str:
        """The mean with the half width of the interval."""
        half = float(f"{self.high - self.value:.2g}")  # 290, not 2.9e+02
        return f"{self.value:.{digits}g}" + ("" if math.isnan(half) else f" ± {half:g}")


class Results:
    """The lines of the seeds that are compared: those that only chose are left out."""

    def __init__(self, lines: Sequence[Line], chosen: Mapping[str, Line], tuning: Sequence[int]) -> None:
        self._lines, self.chosen, self.tuning = lines, chosen, tuning

    def of(self, arm: str, share: float = 1.0) -> dict[int, Line]:
        """By seed."""
        choice = self.chosen.get(arm)
        return {
            line["seed"]: line
            for line in self._lines
            if line["arm"] == arm
            and line["share"] == share
            and line["choice"] == choice
            and line["seed"] not in self.tuning
        }

    def values(self, arm: str, score: str, share: float = 1.0) -> Interval | None:
        """Mean over seeds; None where there is none."""
        found = [line["scores"][score] for line in self.of(arm, share).values()]
        return Interval.of(found) if found else None

    def against_paper(self, arm: str, score: str, share: float = 1.0) -> Interval | None:
        """Log of the ratio to the paper's recipe after its whole training, over seeds that both have."""
        own, base = self.of(arm, share), self.of("paper")
        pairs = [math.log(own[s]["scores"][score] / base[s]["scores"][score]) for s in sorted(own.keys() & base.keys())]
        return Interval.of(pairs) if pairs else None


def results(lines: Sequence[Line], tuning: Sequence[int]) -> Results:
    """With the choice of each arm by its tuning seeds."""
    chosen = {}
    for arm in dict.fromkeys(line["arm"] for line in lines):
        tried: dict[str, list[Line]] = {}
        for line in lines:
            if line["arm"] == arm and line["seed"] in tuning and line["share"] == 1.0:
                tried.setdefault(str(line["choice"]), []).append(line)
        if tried:
            best = min(tried.values(), key=lambda own: mean(math.log(one["scores"]["distance"]) for one in own))
            chosen[arm] = best[0]["choice"]
    return Results(lines, chosen, tuning)


def spread(lines: Sequence[Line]) -> tuple[float, int, int]:
    """Pooled deviation of a log distance over seeds, its degrees of freedom, pairs of seeds that decide `SMALL`."""
    groups: dict[str, list[float]] = {}
    for line in lines:
        if line["share"] == 1.0:
            groups.setdefault(f"{line['arm']} {line['choice']}", []).append(math.log(line["scores"]["distance"]))
    several = [own for own in groups.values() if len(own) > 1]
    freedom = sum(len(own) - 1 for own in several)
    if not freedom:
        return math.nan, 0, 0
    deviation = math.sqrt(sum((x - mean(own)) ** 2 for own in several for x in own) / freedom)
    goal, pairs = math.log(1 + SMALL), 2
    while pairs < 100 and float(student.ppf(0.975, pairs - 1)) * deviation * math.sqrt(2 / pairs) > goal:
        pairs += 1
    return deviation, freedom, pairs


def table(lines: Sequence[Line], titles: Mapping[str, str], tuning: Sequence[int]) -> str:
    """Markdown: distances with factors, then the other scores."""
    found, rows, more = results(lines, tuning), [], []
    for arm, title in titles.items():
        own = found.of(arm)
        if not own:
            continue
        first = next(iter(own.values()))
        cells = [title, _choice(first), str(first["steps"]), f"{first['flops'] / 1e12:.2f}"]
        cells.append(f"{mean(line['processor_seconds'] for line in own.values()):.0f}")
        for encoder in ENCODERS:
            cells.append(_text(found.values(arm, f"distance_{encoder}")))
            cells.append("" if arm == "paper" else _factor(found.against_paper(arm, f"distance_{encoder}")))
        rows.append([*cells, str(len(own))])
        more.append([title, *(_text(found.values(arm, score), 2) for score in OTHERS)])
    for line in lines:
        if line["arm"] == "held-out images":
            scores = line["scores"]
            distances = [cell for encoder in ENCODERS for cell in (f"{scores[f'distance_{encoder}']:.3g}", "")]
            rows.append(["held-out images themselves", "", "", "", "", *distances, ""])
            more.append(["held-out images themselves", *(f"{scores[score]:.2g}" for score in OTHERS)])
    heads = ["recipe", "choice", "steps", "TFLOP", "processor s"]
    heads += [text for name in ENCODERS.values() for text in (f"distance, {name}", "factor")]
    return "\n\n".join([_markdown([*heads, "seeds"], rows), _markdown(["recipe", *map(_named, OTHERS)], more)])


def _named(score: str) -> str:
    return score.removesuffix("_classifier").replace("_", ", ")


def _choice(line: Line) -> str:
    return ", ".join(f"{name} {value}" for name, value in line["choice"].items()).replace("guidance_", "")


def _text(interval: Interval | None, digits: int = 3) -> str:
    return "" if interval is None else interval.text(digits)


def _factor(interval: Interval | None) -> str:
    """In bold where it is decided."""
    if interval is None:
        return ""
    one = interval.ratio()
    text = f"{one.value:.2f}" + ("" if math.isnan(one.low) else f" ({one.low:.2f} to {one.high:.2f})")
    return f"**{text}**" if interval.decided else text


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def halves(lines: Sequence[Line], arm: str, tuning: Sequence[int]) -> list[str]:
    """Sentences: an arm after a part of its compute against the paper's recipe after all of it."""
    found, said = results(lines, tuning), []
    for share in sorted({line["share"] for line in lines if line["arm"] == arm}):
        for encoder, name in ENCODERS.items():
            log = found.against_paper(arm, f"distance_{encoder}", share)
            if log is not None:
                said.append(f"{arm} after {share:.0%} of the compute / paper after all, {name}: {_factor(log)}")
    return said


def noise_of(lines: Sequence[Line]) -> str:
    """Whether wall times can be compared."""
    timed = [line for line in lines if "seconds" in line]
    if not timed:
        return ""
    wait = sum(line["seconds"] for line in timed) / max(sum(line["processor_seconds"] for line in timed), 1e-9)
    load = mean(line["load"] for line in timed)
    idle = wait < 1.2 and load <= (os.cpu_count() or 1)
    quiet = "quiet" if idle else "NOT quiet: compare processor seconds, not wall time"
    return f"the machine was {quiet} (wall / processor time {wait:.1f}, mean load {load:.1f})"


def report(out: Path, lines: Sequence[Line]) -> None:
    """Print everything and draw OUT/recipes.png."""
    from recipes import ARMS

    tuning = sorted({line["seed"] for line in lines if line["seed"] >= 100})
    titles = {name: arm.title for name, arm in ARMS.items()}
    print(table(lines, titles, tuning))
    deviation, freedom, pairs = spread(lines)
    print(
        f"\nspread of a log distance over seeds {deviation:.3f} ({freedom} degrees of freedom); "
        f"{pairs} pairs of seeds decide {SMALL:.0%}"
    )
    print("\n".join([*halves(lines, "stacked", tuning), noise_of(lines)]))
    figure(lines, titles, tuning).save(out / "recipes.png")
    print(f"figure: {out / 'recipes.png'}")


class Canvas:
    """Text and lines in the units of the final image, drawn twice as large."""

    def __init__(self, width: int, height: int) -> None:
        self.size = width, height
        self.image = Image.new("RGB", (2 * width, 2 * height), "white")
        self._draw, self._font = ImageDraw.Draw(self.image), ImageFont.load_default(26)

    def line(self, x0: float, y0: float, x1: float, y1: float, colour: str = "#cccccc", width: int = 1) -> None:
        self._draw.line((2 * x0, 2 * y0, 2 * x1, 2 * y1), colour, 2 * width)

    def dot(self, x: float, y: float, colour: str, radius: float = 4) -> None:
        self._draw.ellipse((2 * (x - radius), 2 * (y - radius), 2 * (x + radius), 2 * (y + radius)), colour)

    def text(self, x: float, y: float, text: str, anchor: str = "lm", colour: str = "#222222") -> None:
        self._draw.text((2 * x, 2 * y), text, colour, self._font, anchor)


def figure(lines: Sequence[Line], titles: Mapping[str, str], tuning: Sequence[int]) -> Image.Image:
    """Above: factors to the paper's recipe with intervals; below: distance over compute."""
    found = results(lines, tuning)
    arms = [arm for arm in titles if arm != "paper" and found.against_paper(arm, "distance_clip")]
    canvas = Canvas(860, 130 + 34 * len(arms) + 330)
    _factors(canvas, found, arms, titles)
    _curves(canvas, found, 110 + 34 * len(arms))
    return canvas.image


def _factors(canvas: Canvas, found: Results, arms: Sequence[str], titles: Mapping[str, str]) -> None:
    left, right, top = 300, 830, 60
    logs = {(a, e): found.against_paper(a, f"distance_{e}") for a in arms for e in ENCODERS}
    ends = [end for log in logs.values() if log for end in (log.value, log.low, log.high) if not math.isnan(end)]
    low, high = min([*ends, math.log(0.7)]) - 0.05, max([*ends, math.log(1.3)]) + 0.05
    at = lambda value: left + (value - low) / (high - low) * (right - left)  # noqa: E731
    bottom = top + 34 * len(arms)
    canvas.text(20, 20, "distance / that of the paper's recipe at equal FLOPs, 95 % intervals (below 1 is better)")
    for tick in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.2, 1.5, 2, 3):
        if low < math.log(tick) < high:
            canvas.line(at(math.log(tick)), top, at(math.log(tick)), bottom, "#222222" if tick == 1 else "#dddddd")
            canvas.text(at(math.log(tick)), bottom + 12, f"{tick:g}", "mm")
    for row, arm in enumerate(arms):
        canvas.text(left - 10, top + 34 * row + 17, titles[arm], "rm")
        for number, encoder in enumerate(ENCODERS):
            log, y = logs[arm, encoder], top + 34 * row + 12 + 10 * number
            if log is not None:
                canvas.line(at(max(log.low, low)), y, at(min(log.high, high)), y, COLOURS[number], 2)
                canvas.dot(at(log.value), y, COLOURS[number])
    for number, name in enumerate(ENCODERS.values()):
        canvas.dot(310 + 150 * number, 42, COLOURS[number])
        canvas.text(320 + 150 * number, 42, name)


def _curves(canvas: Canvas, found: Results, top: float) -> None:
    for number, (encoder, name) in enumerate(ENCODERS.items()):
        shares = (0.25, 0.5, 1.0)
        points = {
            arm: [(share, value) for share in shares if (value := found.values(arm, f"distance_{encoder}", share))]
            for arm in ("paper", "stacked")
        }
        canvas.text(70 + 420 * number, top + 35, f"distance ({name}) over share of the FLOPs")
        _panel(canvas, points, 70 + 420 * number, top + 60)


def _panel(canvas: Canvas, points: Mapping[str, Sequence[tuple[float, Interval]]], left: float, top: float) -> None:
    """One line an arm, over shares from 0 to 1, with intervals."""
    width, height = 340, 240
    ends = [value.value if math.isnan(value.high) else value.high for own in points.values() for _, value in own]
    most = 1.05 * max(ends, default=1.0)

    def place(share: float, value: float) -> tuple[float, float]:
        return left + share * width, top + height * (1 - value / most)

    for share in (0.25, 0.5, 1.0):
        canvas.text(left + share * width, top + height + 12, f"{share:g}", "mm")
    for value in (0.0, most / 2, most):
        canvas.line(*place(0, value), *place(1, value), "#dddddd" if value else "#222222")
        canvas.text(left - 8, place(0, value)[1], f"{value:.3g}", "rm")
    for colour, (arm, own) in zip(("#7a7a7a", "#2f9e6e"), points.items(), strict=True):
        for (share, one), (later, other) in pairwise(own):
            canvas.line(*place(share, one.value), *place(later, other.value), colour, 2)
        for share, one in own:
            if not math.isnan(one.low):
                canvas.line(*place(share, one.low), *place(share, one.high), colour, 1)
            canvas.dot(*place(share, one.value), colour)
        if own:
            x, y = place(own[0][0], own[0][1].value)
            canvas.text(x + 8, y - 12, arm, colour=colour)
