"""Line charts as SVG text: no library, no address, a few kilobytes each."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

Points = Sequence[tuple[float, float]]
COLOURS = ("#2f6fde", "#e0662f", "#2f9e6e", "#b0478f", "#8a6d1f", "#5b5fc7", "#c23b3b", "#3a8fa3", "#7a7a7a", "#9acb3c")
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 340, 204, 46, 12, 10, 30
_MOST_POINTS = 300
_DOTTED = 12  # lines of at most so many points show each of them


@dataclass(frozen=True)
class _Span:
    """What an axis shows, and where on the paper."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False  # equal ratios take equal room

    def at(self, value: float) -> float:
        """Units of the paper; values outside stay at the edge."""
        low, high = self._scaled(self.low), self._scaled(self.high)
        share = min(max((self._scaled(value) - low) / (high - low), 0.0), 1.0)
        return round(self.start + share * (self.end - self.start), 1)

    def _scaled(self, value: float) -> float:
        return math.log10(max(value, 1e-300)) if self.log else value

    def ticks(self) -> list[float]:
        """Round numbers that are written beside the axis."""
        return log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high)


def line_chart(
    series: Mapping[str, Points],
    *,
    title: str,
    x_title: str = "step",
    log_x: bool = False,
    reserved: Mapping[str, str] | None = None,
) -> str:
    """One chart with a line a name; a long noisy line is drawn pale with its running mean on top.

    `reserved`: colours of names that look the same on every chart of a page.
    """
    lines = {name: [point for point in points if all(map(math.isfinite, point))] for name, points in series.items()}
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return ""
    xs, ys = [x for p in lines.values() for x, _ in p], [y for p in lines.values() for _, y in p]
    across = _Span(min(xs), max(max(xs), min(xs) * (1 + 1e-9) + 1e-9), _LEFT, _WIDTH - _RIGHT, log_x and min(xs) > 0)
    up = _Span(*_range(ys), _HEIGHT - _BOTTOM, _TOP)
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}" class="chart">',
        *_axis(across, up, x_title),
    ]
    colours = _colours(list(lines), reserved or {})
    for name, points in lines.items():
        colour, smooth = colours[name], _smoothed(points)
        for line, opacity, width in ((points, 0.25 if smooth else 1.0, 1.0 if smooth else 1.8), (smooth, 1.0, 1.8)):
            place = [(across.at(x), up.at(y)) for x, y in _thinned(line)]
            parts.append(_path(place, colour, opacity, width) if len(place) > 1 else "")
            parts.append(_dots(place, colour) if len(place) <= _DOTTED else "")
    parts.append("</svg>")
    return f"<figure><figcaption>{escape(title)}{_legend(colours)}</figcaption>{''.join(parts)}</figure>"


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Limits that a few wild values at the start of training do not flatten."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    usual = ordered[min(int(0.98 * len(ordered)), len(ordered) - 1)]
    if high - low > 4 * (usual - low) > 0:
        high = usual + 0.15 * (usual - low)
    pad = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - pad, high + pad


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers within the limits."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
    first = math.ceil(low / step)
    return [round(k * step, 10) for k in range(first, math.floor(high / step) + 1)]


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """1, 2 and 5 of each decade within the limits, or powers of ten where these are too many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        found = [d * 10.0**k for k in decades for d in digits if low <= d * 10.0**k * (1 + 1e-9) <= high * (1 + 2e-9)]
        if len(found) <= most:
            return found or [low, high]
    return found[:: -(-len(found) // most)]


def _axis(across: _Span, up: _Span, x_title: str) -> list[str]:
    parts = []
    for value in up.ticks():
        y = up.at(value)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}" class="rule"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 3.5}" text-anchor="end">{_short(value)}</text>')
    for value in across.ticks():
        x = across.at(value)
        parts.append(f'<text x="{x}" y="{_HEIGHT - 15}" text-anchor="middle">{_short(value)}</text>')
    parts.append(
        f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 2}" text-anchor="end" class="dim">{escape(x_title)}</text>'
    )
    return parts


def _short(value: float) -> str:
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if abs(value) >= 1e4 else f"{value:g}"


def _path(points: Sequence[Sequence[float]], colour: str, opacity: float, width: float) -> str:
    line = "M" + " L".join(f"{x} {y}" for x, y in points)
    return f'<path d="{line}" fill="none" stroke="{colour}" stroke-width="{width}" opacity="{opacity}"/>'


def _dots(points: Sequence[Sequence[float]], colour: str) -> str:
    return "".join(
        f'<circle cx="{x}" cy="{y}" r="{2.4 if len(points) > 1 else 3}" fill="{colour}"/>' for x, y in points
    )


def _thinned(points: Points) -> Points:
    stride = -(-len(points) // _MOST_POINTS)
    return [*points[::stride], points[-1]] if stride > 1 else points


def _smoothed(points: Points) -> list[tuple[float, float]]:
    """Running mean over a thirtieth of the line; short lines stay as they are."""
    if len(points) < 40:
        return []
    half = max(len(points) // 60, 1)
    total = [0.0]
    for _, y in points:
        total.append(total[-1] + y)
    found = []
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


def _legend(colours: Mapping[str, str]) -> str:
    if len(colours) < 2:
        return ""
    entries = (f'<span><i style="background:{colour}"></i>{escape(name)}</span>' for name, colour in colours.items())
    return f'<span class="legend">{"".join(entries)}</span>'
