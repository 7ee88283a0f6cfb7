"""The page of measured rows: for each device the roofline picture and the table, in one HTML file that stands alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from opensora_fast.profiling import bench_report
from opensora_fast.profiling.ledger import Row
from opensora_fast.profiling.page_template import page_template
from opensora_fast.profiling.svg_chart import Line, line_chart

HEIGHT = 300


@dataclass(frozen=True, kw_only=True)
class Device:
    """What the page shows of one device."""

    name: str
    picture: str  # SVG; empty where nothing was timed
    lines: list[Line]  # for the legend
    headings: list[str]
    table: list[list[str]]
    not_timed: list[str]
    versions: str


def write_page(rows: Sequence[Row], path: Path, *, title: str) -> None:
    """Write the page of these rows. Text from them is escaped."""
    names = dict.fromkeys(row["device"] for row in rows)
    devices = [
        _device(name, [row for row in map(bench_report.modern, rows) if row["device"] == name]) for name in names
    ]
    page = page_template("bench.html").render(title=title, devices=devices, caption=bench_report.CAPTION)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def _device(name: str, rows: list[Row]) -> Device:
    timed = [row for row in rows if row["status"] == "timed"]
    lines = picture_lines(timed)
    svg = ""
    if lines:
        label = "FLOP per byte that must move"
        svg = line_chart(lines, x_label=label, y_label="FLOP per second", height=HEIGHT, log_log=True)
    headings, table = bench_report.table(row for row in rows if row["op"] not in ("copy", "launch"))
    versions = {f"{key} {row[key]}" for row in rows for key in ("commit", "torch", "triton", "driver") if row.get(key)}
    return Device(
        name=name,
        picture=svg,
        lines=lines,
        headings=headings,
        table=table,
        not_timed=[
            f"{row['case']}, {row['dtype']}, {row['mode']} by {row['provider']}: {row['status']}, {row['reason']}"
            for row in rows
            if row["status"] != "timed"
        ],
        versions=", ".join(sorted(versions)),
    )


def picture_lines(rows: Sequence[Row]) -> list[Line]:
    """The roof, which is the fastest copy and the fastest product of these rows, and a dot for every other row."""
    rows = [row for row in rows if row["flops"] and row["bytes"]]
    ours = [row for row in rows if row["provider"] == "ours"]
    dots = {
        "eager PyTorch": ("faint", [row for row in rows if row["provider"] == "eager"]),
        "forward": ("main", [row for row in ours if row["mode"] != "backward"]),
        "backward": ("second", [row for row in ours if row["mode"] == "backward"]),
    }
    placed = {
        name: Line(name=name, style=style, points=sorted(map(_place, of)), dots=True)
        for name, (style, of) in dots.items()
        if of
    }
    copies = [row["bytes_per_second"] for row in rows if row["provider"] == "copy"]
    if not placed or not copies:
        return []
    across = [x for line in placed.values() for x, _ in line.points]
    left, right, slope = min(across), max(across), max(copies)
    products = [row["flops"] / row["bound"] for row in rows if row.get("bound_by") == "product"]
    peak = max([*products, *(y for line in placed.values() for _, y in line.points)]) if products else slope * right
    ridge = min(max(peak / slope, left), right)
    roof = [(left, slope * left), (ridge, min(peak, slope * ridge)), (right, min(peak, slope * right))]
    return [Line(name="bound: the fastest copy and product", style="roof", points=roof), *placed.values()]


def _place(row: Row) -> tuple[float, float]:
    return row["flops"] / row["bytes"], row["flops_per_second"]
