"""The five charts of a run: loss, step time, throughput, gradient norm and learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from opensora_fast.profiling.runs import Run
from opensora_fast.profiling.svg_chart import Line, Point, line_chart

TALL, LOW = 364, 170  # heights in SVG units: the loss chart stands beside two low ones


@dataclass(frozen=True)
class Chart:
    title: str
    lines: list[Line]  # for the legend
    svg: str  # safe to put into a page as it is


def run_charts(run: Run, device: str) -> list[Chart]:
    """The charts of a run that has made a step, loss first; figures that depend on the hardware say `device`."""
    if not run.steps:
        return []
    window = max(5, len(run.steps) // 25) | 1  # odd, to be centred
    loss = _points(run.steps, "loss")
    loss_lines = [
        Line(name="each step", style="faint", points=loss),
        Line(name=f"mean of {window} steps", style="main", points=_smooth(loss, window)),
        Line(name="held-out clips", style="second", points=_points(run.heldout, "loss"), dots=True),
    ]
    loss_unit = "mean squared velocity error" if run.is_diffusion else "mean absolute error, pixels −1 to 1"
    seconds = Line(name="step", style="main", points=_points(run.steps, "step_seconds"))
    waiting = Line(name="of it waiting for data", style="second", points=_points(run.steps, "data_seconds"))
    throughput, norm, rate = (
        [Line(name="each step", style="main", points=_points(run.steps, column))]
        for column in ("tokens_per_second", "grad_norm", "lr")
    )
    return [
        _chart("Loss", loss_unit, loss_lines, height=TALL),
        _chart("Step time", f"seconds, {device}", [seconds, waiting], from_zero=True),
        _chart("Throughput", f"tokens per second, {device}", throughput, from_zero=True),
        _chart("Gradient norm", "before clipping", norm),
        _chart("Learning rate", "per step", rate, from_zero=True),
    ]


def _chart(title: str, unit: str, lines: Sequence[Line], *, height: int = LOW, from_zero: bool = False) -> Chart:
    drawn = [line for line in lines if line.points]
    return Chart(title, drawn, line_chart(drawn, x_label="step", y_label=unit, height=height, from_zero=from_zero))


def _points(rows: Sequence[dict], column: str) -> list[Point]:
    """(step, value) of the rows; a held-out figure can be infinite or nan, which no chart can place."""
    return [(row["step"], row[column]) for row in rows if math.isfinite(row[column])]


def _smooth(points: Sequence[Point], window: int) -> list[Point]:
    """Centred mean of `window` points; near an end, of those that there are."""
    sums = [0.0, *accumulate(y for _, y in points)]
    smooth = []
    for index, (x, _) in enumerate(points):
        start, stop = max(0, index - window // 2), min(len(points), index + window // 2 + 1)
        smooth.append((x, (sums[stop] - sums[start]) / (stop - start)))
    return smooth
