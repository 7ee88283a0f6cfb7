"""The table and the picture of measured rows: in the terminal while they are made, and as one HTML file afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from opensora_fast.kernels import backend
from opensora_fast.profiling import ledger
from opensora_fast.profiling.console import print_table
from opensora_fast.profiling.ledger import Row
from opensora_fast.profiling.providers import PROVIDERS

LEFT = ("case", "dtype", "layout", "mode", "backend")
CAPTION = (
    "medians; a rate counts what must be read, written or computed, once; % of bound: of a copy of as many bytes, or of"
    " a large product where that is slower; the last columns: times as fast as that provider"
)
NOT_A_BASELINE = ("ours", "copy")
Key = tuple[str, ...]


def key(row: Row) -> Key:
    """What a row measures: rows of one key differ in provider alone."""
    shapes = " ".join(f"{name}{tuple(shape)}" for name, shape in row["shapes"].items())
    return row["device"], row["op"], row["case"], row["dtype"], row.get("layout", ""), row["mode"], shapes


def modern(row: Row) -> Row:
    """A row of the first schema in the terms of today's: its provider was ours under the name of its backend."""
    if row.get("schema"):
        return row
    row = {"status": "timed", "bound_by": "copy", **row}
    if row["provider"] in backend.NAMES:
        row |= {"provider": "ours", "backend": row["provider"]}
    row |= {"flops_per_second": row["flops"] / row["p50"], "share_of_bound": row["bound"] / row["p50"]}
    return row


def grouped(rows: Iterable[Row]) -> dict[Key, dict[str, Row]]:
    """Key -> provider -> its newest row, in the order of first appearance."""
    groups: dict[Key, dict[str, Row]] = {}
    for row in map(modern, rows):
        groups.setdefault(key(row), {})[row["provider"]] = row
    return groups


def table(rows: Iterable[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings and lines: one per key that has a row of ours, and one per key whose rows are only other providers'."""
    groups = grouped(rows)
    others = [name for name in PROVIDERS if any(name in of for of in groups.values()) and name not in NOT_A_BASELINE]
    headings = ["case", "dtype", "layout", "mode", "backend", "ms", "rate", "% of bound"]
    headings += [f"x {name}" for name in others]
    return headings, [_line(of, others) for of in groups.values()]


def _line(of: Mapping[str, Row], others: Sequence[str]) -> list[str]:
    first = of.get("ours") or next(iter(of.values()))
    ours = of.get("ours")
    layout = first.get("layout", "").removesuffix("_format")
    line = [first["case"], first["dtype"], layout, first["mode"]]
    if ours is None:
        line += ["-", "-", "-", "-"]
    elif ours["status"] != "timed":
        line += [ours.get("backend", "-"), ours["status"], "-", "-"]
    else:
        line += [ours["backend"], milliseconds(ours), rate(ours), f"{100 * ours['share_of_bound']:.0f}"]
    return line + [_times(ours, of.get(name)) for name in others]


def _times(ours: Row | None, other: Row | None) -> str:
    """How many times as fast ours is; the other's milliseconds where ours was not timed."""
    if other is None:
        return "-"
    if other["status"] != "timed":
        return other["status"]
    if ours is None or ours["status"] != "timed":
        return f"{milliseconds(other)} ms"
    return f"{other['p50'] / ours['p50']:.2f}"


def milliseconds(row: Row) -> str:
    return f"{1e3 * row['p50']:.3g}"


def rate(row: Row) -> str:
    """TB/s or TFLOP/s, by what bounds the op; a thousandth of them on a CPU."""
    small = row["device"].startswith("CPU")
    unit, of = ("FLOP/s", "flops_per_second") if row.get("bound_by") == "product" else ("B/s", "bytes_per_second")
    return f"{row[of] / (1e9 if small else 1e12):.3g} {'G' if small else 'T'}{unit}"


def main(paths: Sequence[Path], html: Path | None) -> int:
    """Print the table of the rows in some files and write the page beside the first, or to `html`."""
    from opensora_fast.profiling.roofline import write_page

    rows = ledger.read(paths)
    headings, lines = table(rows)
    devices = ", ".join(dict.fromkeys(row["device"] for row in rows))
    print_table(headings, lines, title=devices, caption=CAPTION, left=LEFT)
    path = html or paths[0].with_suffix(".html")
    write_page(rows, path, title=paths[0].stem)
    print(f"report {path}")
    return 0
