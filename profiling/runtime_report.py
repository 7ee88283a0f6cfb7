"""Rows, table and page of what is measured about the runtime: checkpoints and loader, against other ways to do it.

A row's `case` says what was done, its `provider` by whom. `ours` carries `claims`: for each, what was measured, what
was aimed at, and in what unit; the table and the page are made from the rows alone.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opensora_fast.profiling import ledger
from opensora_fast.profiling.console import print_table
from opensora_fast.profiling.ledger import Row
from opensora_fast.profiling.machine import Machine
from opensora_fast.profiling.page_template import page_template
from opensora_fast.profiling.timing import Timing

HEADINGS = ("case", "provider", "seconds", "p20 to p80", "GB/s", "time in ours")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One figure with the aim that it is held to. `at_most` tells on which side of the aim is good."""

    name: str
    value: float
    aim: float
    at_most: bool
    unit: str

    @property
    def met(self) -> bool:
        return self.value <= self.aim if self.at_most else self.value >= self.aim

    def row(self) -> tuple[str, str, str]:
        """What, measured, aim: a line of a table."""
        side = "most" if self.at_most else "least"
        return self.name, f"{self.value:.2g} {self.unit}", f"at {side} {self.aim:.2g} {self.unit}"

    def __str__(self) -> str:
        name, measured, aim = self.row()
        return f"{name}: {measured} (aim: {aim})"


@dataclass(frozen=True)
class Chart:
    title: str
    svg: str  # safe to put into a page as it is


def row(
    machine: Machine, device: str, op: str, case: str, provider: str, timing: Timing, num_bytes: int, **more: Any
) -> Row:
    """A row of the ledger for `num_bytes` saved, loaded or made in the time of `timing`."""
    return {
        "schema": ledger.SCHEMA,
        "op": op,
        "case": case,
        "provider": provider,
        "mode": "full",
        "shapes": {},
        "dtype": "bytes",
        "status": "timed",
        **dataclasses.asdict(timing),
        "unit": "s",
        "bytes": num_bytes,
        "flops": 0,
        "bytes_per_second": num_bytes / timing.p50,
        "device": machine.device(device),
        "threads": torch.get_num_threads(),
        "torch": machine.torch,
        "commit": machine.commit,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **more,
    }


def claims_of(rows: Sequence[Row]) -> list[Claim]:
    """What the rows' measurements say about the aims."""
    return [Claim(**claim) for of in rows for claim in of.get("claims", [])]


def with_claims(of: Row, claims: Sequence[Claim]) -> Row:
    return of | {"claims": [dataclasses.asdict(claim) for claim in claims]}


def table(rows: Sequence[Row]) -> list[list[str]]:
    """One line a row, under HEADINGS; the last column compares with our row of the same case."""
    ours: Mapping[str, Row] = {of["case"]: of for of in rows if of["provider"] == "ours"}
    lines = []
    for of in rows:
        if of["status"] != "timed":
            lines.append([of["case"], of["provider"], of["reason"], "-", "-", "-"])
            continue
        base = ours.get(of["case"])
        lines.append(
            [
                of["case"],
                of["provider"],
                f"{of['p50']:.3g}",
                f"{of['p20']:.3g} to {of['p80']:.3g}",
                f"{of['bytes_per_second'] / 1e9:.3g}",
                f"{of['p50'] / base['p50']:.2f}" if base else "-",
            ]
        )
    return lines


def finish(
    rows: Sequence[Row], *, title: str, note: str, charts: Sequence[Chart], out: Path | None, html: Path | None
) -> None:
    """Print the table and the claims; append the rows to `out` and write the page to `html`, where they are given."""
    print_table(HEADINGS, table(rows), title=f"{title}; {rows[0]['device']}", caption=note, left=HEADINGS[:2])
    for claim in claims_of(rows):
        print(f"{'met' if claim.met else 'NOT MET'}: {claim}")
    if out is not None:
        ledger.append(out, rows)
    if html is not None:
        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_text(page(rows, title=title, note=note, charts=charts), encoding="utf-8")
        print(f"report {html}")


def page(rows: Sequence[Row], *, title: str, note: str, charts: Sequence[Chart]) -> str:
    """The same as one HTML document: bars of equal scale within a case, the charts, the aims."""
    cases: dict[str, list[tuple[Row, float]]] = {}
    timed = [of for of in rows if of["status"] == "timed"]
    for of in timed:
        longest = max(other["p50"] for other in timed if other["case"] == of["case"])
        cases.setdefault(of["case"], []).append((of, 100 * of["p50"] / longest))
    return page_template("runtime.html").render(
        title=title,
        device=rows[0]["device"],
        versions=f"torch {rows[0]['torch']}, commit {rows[0]['commit']}",
        cases=cases,
        claims=claims_of(rows),
        charts=charts,
        note=note,
        not_timed=[f"{of['case']} by {of['provider']}: {of['reason']}" for of in rows if of["status"] != "timed"],
    )
