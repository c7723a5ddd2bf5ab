"""Line charts as inline SVG, coloured by the page's style sheet."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

Points = list[tuple[float, float]]

WIDTH, HEIGHT = 400, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 8, 8, 24
_MOST_POINTS = 300
_SMOOTH_SHARE = 0.1
"""Width of the moving mean as a share of the points."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart."""

    label: str
    points: Points
    smooth: bool = True
    """Draw the moving mean on top of a faint line of the raw values."""
    low: Points = field(default_factory=list)
    high: Points = field(default_factory=list)
    """Ends of an interval at each point, drawn as a band; none if empty."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart, ready for the page."""

    title: str
    help: str
    legend: tuple[tuple[str, str], ...]
    """Label and last value of each line, in the order of their colours."""
    svg: Markup


@dataclass(frozen=True)
class _Axes:
    """Maps values to pixels."""

    x_ticks: list[float]
    y_ticks: list[float]

    def x(self, value: float) -> float:
        return _LEFT + _share(value, self.x_ticks) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - _BOTTOM - _share(value, self.y_ticks) * (HEIGHT - _TOP - _BOTTOM)


def line_chart(
    title: str, help: str, lines: Sequence[Series], x_label: str = "step"
) -> Chart | None:
    """Draw lines over axes that include y = 0; None if there is nothing to draw."""
    drawn = [(line, points) for line in lines if (points := _finite(line.points))]
    if not drawn:
        return None
    tops = [moving_mean(points) if line.smooth else points for line, points in drawn]
    bands = [(_finite(line.low), _finite(line.high)) for line, _ in drawn]
    xs = [x for _, points in drawn for x, _ in points]
    ys = [y for _, points in drawn for _, y in points]
    ys += [y for band in bands for points in band for _, y in points]
    axes = _Axes(
        _whole_ticks(min(xs), max(xs)),
        nice_ticks(min(0.0, *ys), max(0.0, *ys), 4),
    )
    body = Markup("").join(
        [
            *_grid(axes, x_label),
            *(_band(axes, *band, index) for index, band in enumerate(bands) if all(band)),
            *(_path(axes, p, index, "raw") for index, (s, p) in enumerate(drawn) if s.smooth),
            *(_path(axes, p, index, "line") for index, p in enumerate(tops)),
        ]
    )
    svg = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>')
    return Chart(
        title=title,
        help=help,
        legend=tuple(
            (line.label, number(points[-1][1]))
            for (line, _), points in zip(drawn, tops, strict=True)
        ),
        svg=svg.format(WIDTH, HEIGHT, title, body),
    )


def moving_mean(points: Points) -> Points:
    """Centred moving mean over about a tenth of the points; one-sided at the ends."""
    half = round(len(points) * _SMOOTH_SHARE / 2)
    means = []
    for index, (x, _) in enumerate(points):
        near = points[max(index - half, 0) : index + half + 1]
        means.append((x, sum(y for _, y in near) / len(near)))
    return means


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers from at most `low` to at least `high`."""
    if high <= low:
        low, high = low - abs(low) / 2, high + (abs(high) / 2 or 1.0)
    rough = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def _whole_ticks(low: float, high: float) -> list[float]:
    """Both ends, and whole numbers between that leave room for the label at the right end."""
    between = [t for t in nice_ticks(low, high, 5) if t == round(t) and low < t]
    return [low, *(t for t in between if t < low + 0.85 * (high - low)), high]


def number(value: float) -> str:
    """A number in few characters: 0.031, 1.2e-06, 14.2k."""
    size = abs(value)
    if value and not 1e-4 <= size < 1e9:
        return f"{value:.2g}"
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    return f"{value / 1e3:.3g}k" if size >= 1e3 else f"{value:.3g}"


def _share(value: float, ticks: Sequence[float]) -> float:
    span = ticks[-1] - ticks[0]
    return (value - ticks[0]) / span if span else 0.5


def _finite(points: Points) -> Points:
    """Points that can be drawn, many of them gathered into means."""
    kept = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    size = math.ceil(len(kept) / _MOST_POINTS) if kept else 1
    bins = [kept[start : start + size] for start in range(0, len(kept), size)]
    return [(sum(x for x, _ in b) / len(b), sum(y for _, y in b) / len(b)) for b in bins]


def _grid(axes: _Axes, x_label: str) -> Iterator[Markup]:
    line = Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>')
    text = Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>')
    for tick in axes.y_ticks:
        y = axes.y(tick)
        yield line.format(_LEFT, WIDTH - _RIGHT, y, y)
        yield text.format(_LEFT - 6, y + 3.5, "end", number(tick))
    for tick in axes.x_ticks[:-1]:
        if tick < axes.x_ticks[-1]:
            yield text.format(axes.x(tick), HEIGHT - 8, "middle", number(tick))
    yield text.format(WIDTH - _RIGHT, HEIGHT - 8, "end", f"{x_label} {number(axes.x_ticks[-1])}")


def _band(axes: _Axes, low: Points, high: Points, index: int) -> Markup:
    corners = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in [*low, *reversed(high)])
    return Markup('<polygon class="band c{}" points="{}"/>').format(index, corners)


def _path(axes: _Axes, points: Points, index: int, kind: str) -> Markup:
    if len(points) == 1:
        dot = Markup('<circle class="{} c{}" cx="{:.1f}" cy="{:.1f}" r="2.5"/>')
        return dot.format("dot", index, axes.x(points[0][0]), axes.y(points[0][1]))
    steps = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in points)
    return Markup('<polyline class="{} c{}" points="{}"/>').format(kind, index, steps)
