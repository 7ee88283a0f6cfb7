"""A training run, finished or not, as its recipe and metrics tell it.

Units: losses are those of the run's task, seconds are wall clock, memory is in GiB (1024^3 bytes).
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensora_fast.errors import UserError
from opensora_fast.train.metrics import mean, read_metrics

FIRST_STEPS, LAST_STEPS = 10, 50  # whose mean losses tell how far a run has come


@dataclass(frozen=True)
class Change:
    """A figure at two ends; None where the run has not come that far."""

    start: float | None
    end: float | None

    @property
    def percent(self) -> float | None:
        """Change in percent of the start: negative when the figure fell."""
        if self.start is None or self.end is None or self.start == 0:
            return None
        return (self.end - self.start) / abs(self.start) * 100


@dataclass(frozen=True, kw_only=True)
class Run:
    name: str  # of its folder
    recipe: dict[str, Any]
    steps: list[dict[str, Any]]  # rows of metrics.jsonl by kind
    heldout: list[dict[str, Any]]
    skipped: list[dict[str, Any]]

    @property
    def is_diffusion(self) -> bool:
        return "model" in self.recipe

    @property
    def steps_done(self) -> int:
        return max((row["step"] for row in (*self.steps, *self.skipped)), default=0)

    @property
    def finished(self) -> bool:
        return self.steps_done >= self.recipe["loop"]["steps"]

    @property
    def loss(self) -> Change:
        """Mean of the first 10 steps to mean of the last 50 steps after them."""
        losses = [row["loss"] for row in self.steps]
        first, last = losses[:FIRST_STEPS], losses[FIRST_STEPS:][-LAST_STEPS:]
        return Change(mean(first) if first else None, mean(last) if last else None)

    def heldout_change(self, name: str) -> Change:
        """The held-out figure of that name at the first and at the last evaluation."""
        values = [row[name] for row in self.heldout if name in row]
        return Change(values[0] if values else None, values[-1] if len(values) > 1 else None)

    @property
    def step_seconds(self) -> float | None:
        """Median over the steps, waiting for data included; evaluation and checkpoints are not part of a step."""
        return statistics.median(row["step_seconds"] for row in self.steps) if self.steps else None

    @property
    def tokens_per_second(self) -> float | None:
        """All tokens by all seconds, so that a few slow steps count for what they cost."""
        return self._share("tokens")

    @property
    def data_share(self) -> float | None:
        """Part of the step time that was spent waiting for data, 0 to 1."""
        return self._share("data_seconds")

    @property
    def memory_gib(self) -> float | None:
        return max((row["memory_gib"] for row in self.steps), default=None)

    def _share(self, name: str) -> float | None:
        seconds = sum(row["step_seconds"] for row in self.steps)
        return sum(row[name] for row in self.steps) / seconds if seconds else None


def find_runs(folder: Path) -> list[Run]:
    """The run that `folder` is, and those in its direct subfolders by name. Raises UserError when there is none."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder: name a run, or the folder that holds runs")
    candidates = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    runs = [
        _read_run(path)
        for path in candidates
        if (path / "metrics.jsonl").is_file() and (path / "recipe.json").is_file()
    ]
    if not runs:
        raise UserError(
            f"{folder}: neither it nor a folder in it is a run (recipe.json and metrics.jsonl): "
            "name a run, or the folder that holds runs"
        )
    return runs


def _read_run(path: Path) -> Run:
    rows = read_metrics(path)
    by_kind = {kind: [row for row in rows if row["kind"] == kind] for kind in ("step", "heldout", "skipped")}
    return Run(
        name=path.resolve().name,
        recipe=json.loads((path / "recipe.json").read_text()),
        steps=by_kind["step"],
        heldout=by_kind["heldout"],
        skipped=by_kind["skipped"],
    )
