"""The results ledger: rows of measurements in JSON lines, read, checked and appended here and nowhere else.

A row is one provider of one case in one mode on one machine. Rows are appended and never edited. A row whose `status`
is not "timed" has a `reason` and no figures of a measurement: a red op, a provider that failed or that gives another
result, or a case that was only modelled, whose reason says by what.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from opensora_fast.errors import UserError

Row = dict[str, Any]

SCHEMA = 2  # rows without a number are the first
MODES = ("forward", "backward", "full", "step")
STATUSES = ("timed", "red", "failed", "modelled")
IDENTITY: Mapping[str, type | tuple[type, ...]] = {
    "op": str,
    "case": str,
    "provider": str,
    "mode": str,
    "shapes": dict,
    "dtype": str,
    "device": str,
    "time": str,
}
FIGURES: Mapping[str, type | tuple[type, ...]] = {
    "p20": (int, float),
    "p50": (int, float),
    "p80": (int, float),
    "rounds": int,
    "unit": str,
    "bytes": int,
    "flops": int,
}


def check(row: Row) -> None:
    """ValueError says what is wrong with a row."""
    status = row.get("status", "timed")
    if status not in STATUSES:
        raise ValueError(f"status is {status!r}; it must be one of {', '.join(STATUSES)}")
    wanted = {**IDENTITY, **(FIGURES if status == "timed" else {"reason": str})}
    for name, kind in wanted.items():
        if not isinstance(row.get(name), kind):
            raise ValueError(f"{name} is {row.get(name)!r}")
    if row["mode"] not in MODES:
        raise ValueError(f"mode is {row['mode']!r}; it must be one of {', '.join(MODES)}")
    if status == "timed":
        times = [row["p20"], row["p50"], row["p80"]]
        if not all(math.isfinite(time) and time > 0 for time in times) or sorted(times) != times:
            raise ValueError(f"p20, p50, p80 are {times}; they must be positive and ascend")


def append(path: Path, rows: Iterable[Row]) -> None:
    """Check the rows and append them to a file, which is made with its folder where it is missing."""
    rows = list(rows)
    for row in rows:
        check(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def read(paths: Sequence[Path]) -> list[Row]:
    """All rows of the files, in order. UserError names the file and line of one that is no row."""
    rows = []
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: no such file: name a file that `opensora-fast bench --out` wrote")
        lines = path.read_text().splitlines()
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                check(row)
            except ValueError as error:
                if number == len(lines) and isinstance(error, json.JSONDecodeError):
                    continue  # cut short by a crash
                raise UserError(f"{path}:{number} is no row of the ledger: {error}") from None
            rows.append(row)
    return rows
