"""A line chart as inline SVG: axes with round ticks, and lines that a style sheet colours through their class.

The size is fixed in SVG units and the browser scales it, so that one chart serves a desk and a phone.
A line of any length becomes at most `MAX_POINTS` points that keep its extremes: a run of 100,000 steps stays small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]

WIDTH = 460
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 24, 36  # room for labels
MAX_POINTS = 800
LOG_ABOVE = 20  # ratio of largest to smallest value above which the y axis becomes logarithmic


@dataclass(frozen=True, kw_only=True)
class Line:
    """Points (x, y) in ascending x, joined, or drawn as dots. `style` is a CSS class, `name` is what a legend says."""

    name: str
    style: str
    points: Sequence[Point]
    dots: bool = False


def line_chart(
    lines: Sequence[Line], *, x_label: str, y_label: str, height: int, from_zero: bool = False, log_log: bool = False
) -> str:
    """The chart of at least one line with at least one point each, all finite, as an <svg> element.

    The y axis starts at zero where `from_zero` says so. Otherwise it is logarithmic where the values are positive and
    span a ratio of more than `LOG_ABOVE`, and runs between the round numbers around the values where they are not.
    With `log_log` both axes are logarithmic, and all values must be positive.
    """
    values = [y for line in lines for _, y in line.points]
    across = [x for line in lines for x, _ in line.points]
    if log_log:
        x_axis = _log_axis(min(across), max(max(across), 2 * min(across)), LEFT, WIDTH - RIGHT)
    else:
        x_axis = _exact_axis(0, max([*across, 1]), LEFT, WIDTH - RIGHT)
    low, high = min(values), max(values)
    logarithmic = log_log or (not from_zero and low > 0 and high / low > LOG_ABOVE)
    y_axis = (_log_axis if logarithmic else _round_axis)(0 if from_zero else low, high, height - BOTTOM, TOP)
    marks = [_grid(y_axis), _x_ticks(x_axis, height)]
    marks += [f'<text x="0" y="11">{escape(y_label)}{" (logarithmic)" if logarithmic else ""}</text>']
    marks += [f'<text class="end" x="{WIDTH - RIGHT}" y="{height - 4}">{escape(x_label)}</text>']
    marks += [_draw(line, x_axis, y_axis) for line in lines]
    label = escape(f"{', '.join(line.name for line in lines)}: {y_label} by {x_label}", quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">{"".join(marks)}</svg>'


def thin(points: Sequence[Point], limit: int) -> list[Point]:
    """At most `limit` points: the lowest and the highest of each stretch, in their order."""
    if len(points) <= limit:
        return list(points)
    stretch = math.ceil(len(points) / (limit // 2))
    kept = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        extremes = {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
        kept += sorted(extremes)
    return kept


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    start: float  # SVG coordinate of `low`
    end: float
    ticks: list[float]
    logarithmic: bool = False

    def place(self, value: float) -> float:
        low, high = self.low, self.high
        if self.logarithmic:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)


def _exact_axis(low: float, high: float, start: float, end: float) -> _Axis:
    """A linear axis from `low` to `high`."""
    step = _round_step(low, high)
    inside = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return _Axis(low, high, start, end, [index * step for index in inside])


def _round_axis(low: float, high: float, start: float, end: float) -> _Axis:
    """A linear axis whose ends are ticks. It starts at zero when the values differ by less than their labels show."""
    if high - low <= 1e-3 * max(abs(low), abs(high)):
        low, high = (min(low, 0.0), max(high, 0.0)) if low else (0.0, 1.0)
    step = _round_step(low, high)
    around = range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)
    ticks = [index * step for index in around]
    return _Axis(ticks[0], ticks[-1], start, end, ticks)


def _log_axis(low: float, high: float, start: float, end: float) -> _Axis:
    """A logarithmic axis with ticks at 1, 2 and 5 times the powers of ten, or at these alone when there are many."""
    margin = (high / low) ** 0.03
    low, high = low / margin, high * margin
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    digits = (1, 2, 5) if high / low < 1000 else (1,)
    ticks = [digit * 10.0**decade for decade in decades for digit in digits if low <= digit * 10.0**decade <= high]
    return _Axis(low, high, start, end, ticks, logarithmic=True)


def _round_step(low: float, high: float) -> float:
    """The 1, 2 or 5 times a power of ten that cuts the range into at most 5 parts."""
    smallest = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(smallest))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= smallest * (1 - 1e-9))


def _tick_label(value: float) -> str:
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.4g}"
    if 1e4 <= abs(value) < 1e8:
        return f"{value / 1000:,.4g}k"
    digits, power = f"{value:.2e}".split("e")
    return f"{float(digits):g}e{int(power)}"


def _grid(axis: _Axis) -> str:
    marks = []
    for tick in axis.ticks:
        y = axis.place(tick)
        marks += [f'<path class="grid" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>']
        marks += [f'<text class="end" x="{LEFT - 6}" y="{y + 4:.1f}">{_tick_label(tick)}</text>']
    return "".join(marks)


def _x_ticks(axis: _Axis, height: int) -> str:
    y = height - BOTTOM + 16
    return "".join(
        f'<text class="middle" x="{axis.place(tick)}" y="{y}">{_tick_label(tick)}</text>' for tick in axis.ticks
    )


def _draw(line: Line, x_axis: _Axis, y_axis: _Axis) -> str:
    places = [(x_axis.place(x), y_axis.place(y)) for x, y in thin(line.points, MAX_POINTS)]
    if line.dots or len(places) == 1:
        radius = 3.5 if len(places) <= 20 else 2.5
        return "".join(f'<circle class="{line.style}" cx="{x}" cy="{y}" r="{radius}"/>' for x, y in places)
    return f'<path class="line {line.style}" d="M{"L".join(f"{x} {y}" for x, y in places)}"/>'
