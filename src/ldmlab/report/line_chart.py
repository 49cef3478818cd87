"""Line charts as SVG text, without libraries or links, a few kilobytes each."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import accumulate

import jinja2
from markupsafe import Markup

Points = Sequence[tuple[float, float]]
GAP = (math.nan, math.nan)  # a point that is no number ends a stretch of its line
COLOURS = ("#2f6fde", "#e0662f", "#2f9e6e", "#b0478f", "#8a6d1f", "#5b5fc7", "#c23b3b", "#3a8fa3", "#7a7a7a", "#9acb3c")
_WIDTH, _HEIGHT, _RIGHT, _TOP, _BOTTOM = 340, 204, 14, 10, 30
_LETTER = 5.8  # width of a figure at the size of tick labels
_MOST_POINTS = 300
_LARGEST, _SMALLEST = 1e30, 1e-30
_DOTTED = 12  # lines of at most so many points show each of them


@dataclass(frozen=True)
class _Span:
    """Range and position of an axis."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False  # equal ratios take equal room
    fixed: tuple[float, ...] = ()  # ticks

    def at(self, value: float) -> float:
        """Pixel coordinates; values outside are clipped to the edge."""
        low, high = self._scaled(self.low), self._scaled(self.high)
        share = min(max((self._scaled(value) - low) / (high - low), 0.0), 1.0)
        return round(self.start + share * (self.end - self.start), 1)

    def _scaled(self, value: float) -> float:
        return math.log10(max(value, 1e-300)) if self.log else value

    def ticks(self) -> list[tuple[float, str]]:
        """Round numbers and how they are written; labels are all different."""
        values = list(self.fixed) or (log_ticks if self.log else ticks)(self.low, self.high)
        for digits in range(4, 13):
            labels = [short(value, digits) for value in values]
            if len(set(labels)) == len(values):
                break
        return list(zip(values, labels, strict=True))


@dataclass(frozen=True)
class Chart:
    """A line a name. A long noisy line is pale with its running mean on top.

    `reserved`: colours of names that are the same on every chart of a page. `x_ticks`: where x has few values.
    `spreads`: drawn as bars from y - spread to y + spread.
    """

    title: str
    series: Mapping[str, Points]
    x_title: str = "step"
    log_x: bool = False
    reserved: Mapping[str, str] = field(default_factory=dict)
    x_ticks: tuple[float, ...] = ()
    spreads: Mapping[str, Sequence[float | None]] = field(default_factory=dict)  # line => +- of each of its points

    def __bool__(self) -> bool:
        """Whether it has a point."""
        return any(_stretches(points) for points in self.series.values())

    @cached_property
    def svg(self) -> Markup:
        """A figure with a legend; empty without a point."""
        lines = {name: found for name, points in self.series.items() if (found := _stretches(points))}
        if not lines:
            return Markup("")
        every = [point for stretches in lines.values() for stretch in stretches for point in stretch]
        bars = [(name, x, y, spread) for name in lines for x, y, spread in self.points(name) if spread]
        ends = [y + sign * spread for _, _, y, spread in bars for sign in (-1, 1)]
        up = _Span(*_range([*(y for _, y in every), *ends]), _HEIGHT - _BOTTOM, _TOP)
        rules = [(up.at(value), text) for value, text in up.ticks()]
        left = 10 + _LETTER * max((len(text) for _, text in rules), default=1)
        across = _across([x for x, _ in every], left, self.log_x, self.x_ticks)
        colours = _colours(list(lines), self.reserved)
        strokes = [
            (colours[name], *stroke)
            for name, found in lines.items()
            for stretch in found
            for stroke in _strokes(stretch, across, up)
        ]
        upright = [(colours[name], across.at(x), up.at(y - part), up.at(y + part)) for name, x, y, part in bars]
        shown = {"colours": colours, "rules": rules, "labels": _labels(across), "strokes": strokes, "bars": upright}
        return Markup(_figure().render(chart=self, size=(_WIDTH, _HEIGHT, _RIGHT, left), **shown))

    def points(self, name: str) -> list[tuple[float, float, float | None]]:
        """x, y and spread of a line's finite points."""
        spreads = self.spreads.get(name) or [None] * len(self.series[name])
        rows = [(x, y, spread) for (x, y), spread in zip(self.series[name], spreads, strict=True)]
        return [row for row in rows if all(abs(number) < _LARGEST for number in row if number is not None)]


@cache
def _figure() -> jinja2.Template:
    environment = jinja2.Environment(loader=jinja2.PackageLoader("ldmlab.report"), autoescape=True)
    return environment.get_template("chart.svg.j2")


def _stretches(points: Points) -> list[Points]:
    """Runs of finite points."""
    found: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if all(abs(number) < _LARGEST for number in point):  # false of NaN too
            found[-1].append(point)
        elif found[-1]:
            found.append([])
    return [stretch for stretch in found if stretch]


def _across(xs: Sequence[float], left: float, log: bool, fixed: tuple[float, ...]) -> _Span:
    low, high = min(xs), max(xs)
    inside = tuple(x for x in fixed if low <= x <= high)
    if high - low <= max(1e-9 * abs(high), _SMALLEST):  # one place: in the middle, with its own tick
        pad = 0.5 * abs(low) if abs(low) > _SMALLEST else 0.5
        return _Span(low - pad, high + pad, left, _WIDTH - _RIGHT, False, (low,))
    return _Span(low, high, left, _WIDTH - _RIGHT, log and low > 0, inside)


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Limits that ignore a few outliers at the start of training."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    usual = ordered[min(int(0.98 * len(ordered)), len(ordered) - 1)]
    if high - low > 4 * (usual - low) > 0:
        high = usual + 0.15 * (usual - low)
    wide = high - low > max(1e-9 * abs(high), _SMALLEST)
    pad = 0.05 * (high - low if wide else max(abs(low), abs(high)))
    pad = pad if pad > _SMALLEST else 1.0
    return low - pad, high + pad


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers within the limits, at least two."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
    first = math.ceil(low / step)
    found = [float(f"{k * step:.12g}") for k in range(first, math.floor(high / step) + 1)]
    return list(dict.fromkeys(found)) if len(found) > 1 or count > 16 else ticks(low, high, 2 * count)


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """1, 2 and 5 of each decade within the limits, or powers of ten if these are too many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        found = [d * 10.0**k for k in decades for d in digits if low <= d * 10.0**k * (1 + 1e-9) <= high * (1 + 2e-9)]
        if len(found) <= most:
            return found if len(found) > 1 else [low, high]
    return found[:: -(-len(found) // most)]


def short(value: float, digits: int = 4) -> str:
    """A tick's number in few characters: 12k, 0.25, 3.42e-4."""
    size = abs(value)
    if size >= 1e12 or 0 < size < 1e-3:
        mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}"
    for least, unit, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if size >= least:
            return f"{value / unit:.{digits}g}{letter}"
    text = f"{value:.{digits}g}"
    return f"{float(text):.0f}" if "e" in text else text


def _labels(across: _Span) -> Iterator[tuple[float, str, str]]:
    """Place, anchor and text of the labels below the chart that do not run into the one before."""
    before = -math.inf
    for value, text in across.ticks():
        x, half = across.at(value), _LETTER * len(text) / 2
        if x - half >= before:
            before = x + half + 3
            yield (_WIDTH, "end", text) if x + half > _WIDTH else (x, "middle", text)


def _strokes(points: Points, across: _Span, up: _Span) -> Iterator[tuple[float, float, str, Points]]:
    """Opacity, width, path and dots: one stretch, pale beneath its running mean where it is long, dotted if short."""
    smooth = _smoothed(points)
    for line, opacity, width in ((points, 0.25 if smooth else 1.0, 1.0 if smooth else 1.8), (smooth, 1.0, 1.8)):
        stride = -(-len(line) // _MOST_POINTS)
        thinned = [*line[::stride], line[-1]] if stride > 1 else line
        place = [(across.at(x), up.at(y)) for x, y in thinned]
        path = "M" + " L".join(f"{x} {y}" for x, y in place) if len(place) > 1 else ""
        yield opacity, width, path, place if len(place) <= _DOTTED else []


def _smoothed(points: Points) -> list[tuple[float, float]]:
    """Running mean over a thirtieth of the line; short lines are unchanged."""
    if len(points) < 40:
        return []
    half, found = max(len(points) // 60, 1), []
    total = [0.0, *accumulate(y for _, y in points)]
    for i, (x, _) in enumerate(points):
        left, right = max(i - half, 0), min(i + half + 1, len(points))
        found.append((x, (total[right] - total[left]) / (right - left)))
    return found


def _colours(names: Sequence[str], reserved: Mapping[str, str]) -> dict[str, str]:
    """A colour a name: its own where one is reserved, else the next that no reserved name here has."""
    taken = {reserved[name] for name in names if name in reserved}
    free = [colour for colour in COLOURS if colour not in taken] or list(COLOURS)
    others = [name for name in names if name not in reserved]
    own = {name: free[number % len(free)] for number, name in enumerate(others)}
    return {name: reserved[name] if name in reserved else own[name] for name in names}
