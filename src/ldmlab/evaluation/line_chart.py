"""Line charts as SVG text: no library, no address, a few kilobytes each."""

import math
from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]
COLOURS = ("#2f6fde", "#e0662f", "#2f9e6e", "#b0478f", "#8a6d1f", "#5b5fc7", "#c23b3b", "#3a8fa3", "#7a7a7a", "#9acb3c")
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 340, 204, 46, 12, 10, 30
_MOST_POINTS = 300


def line_chart(series: Mapping[str, Points], *, title: str, x_title: str = "step") -> str:
    """One chart with a line a name; a long noisy line is drawn pale with its running mean on top."""
    lines = {name: [point for point in points if all(map(math.isfinite, point))] for name, points in series.items()}
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return ""
    xs, ys = [x for p in lines.values() for x, _ in p], [y for p in lines.values() for _, y in p]
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1e-9)
    y_low, y_high = _range(ys)
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}" class="chart">',
        *_axis(x_low, x_high, y_low, y_high, x_title),
    ]
    for number, points in enumerate(lines.values()):
        colour, smooth = COLOURS[number % len(COLOURS)], _smoothed(points)
        for line, opacity, width in ((points, 0.25 if smooth else 1.0, 1.0 if smooth else 1.8), (smooth, 1.0, 1.8)):
            place = [
                (_at(x, x_low, x_high, _LEFT, _WIDTH - _RIGHT), _at(y, y_low, y_high, _HEIGHT - _BOTTOM, _TOP))
                for x, y in _thinned(line)
            ]
            parts.append(_path(place, colour, opacity, width) if place else "")
    parts.append("</svg>")
    return f"<figure><figcaption>{escape(title)}{_legend(list(lines))}</figcaption>{''.join(parts)}</figure>"


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Limits that a few wild values at the start of training do not flatten."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    usual = ordered[min(int(0.98 * len(ordered)), len(ordered) - 1)]
    if high - low > 4 * (usual - low) > 0:
        high = usual + 0.15 * (usual - low)
    pad = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - pad, high + pad


def _at(value: float, low: float, high: float, start: float, end: float) -> float:
    share = min(max((value - low) / (high - low), 0.0), 1.0)
    return round(start + share * (end - start), 1)


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers within the limits."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
    first = math.ceil(low / step)
    return [round(k * step, 10) for k in range(first, math.floor(high / step) + 1)]


def _axis(x_low: float, x_high: float, y_low: float, y_high: float, x_title: str) -> list[str]:
    parts = []
    for value in ticks(y_low, y_high):
        y = _at(value, y_low, y_high, _HEIGHT - _BOTTOM, _TOP)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}" class="rule"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 3.5}" text-anchor="end">{_short(value)}</text>')
    for value in ticks(x_low, x_high):
        x = _at(value, x_low, x_high, _LEFT, _WIDTH - _RIGHT)
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
    if len(points) == 1:
        return f'<circle cx="{points[0][0]}" cy="{points[0][1]}" r="3" fill="{colour}"/>'
    line = "M" + " L".join(f"{x} {y}" for x, y in points)
    return f'<path d="{line}" fill="none" stroke="{colour}" stroke-width="{width}" opacity="{opacity}"/>'


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


def _legend(names: Sequence[str]) -> str:
    if len(names) < 2:
        return ""
    entries = (
        f'<span><i style="background:{COLOURS[n % len(COLOURS)]}"></i>{escape(name)}</span>'
        for n, name in enumerate(names)
    )
    return f'<span class="legend">{"".join(entries)}</span>'
