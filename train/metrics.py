"""What a run says while it works: metrics.jsonl (one row per event), TensorBoard, and a progress bar on a terminal.

Rows have `kind`: "step" (loss, grad_norm, lr, step_seconds, data_seconds, tokens, tokens_per_second, memory_gib,
bucket), "heldout" (what the task's evaluation returns) or "skipped" (a non-finite step, with its files). Seconds are
wall clock.
"""

from __future__ import annotations

import json
import math
import resource
import uuid
from collections.abc import Iterable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def read_metrics(run: Path) -> list[dict]:
    """Rows of a run's metrics.jsonl, in order; a half-written last line (a killed run) is left out."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


class Metrics:
    """Writer of a run's metrics after `first_step` (0: a fresh start). Later rows, of a killed run, are dropped."""

    def __init__(self, run: Path, *, first_step: int, total_steps: int, log_every: int, title: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        kept = [row for row in read_metrics(run) if row["step"] <= first_step] if first_step else []
        temporary = run / f"metrics.jsonl.tmp-{uuid.uuid4().hex[:8]}"
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        temporary.replace(run / "metrics.jsonl")
        self._file = open(run / "metrics.jsonl", "a")  # noqa: SIM115 - closed in __exit__, it lives as long as the run
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1)
        self._log_every = log_every
        self.console = Console()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self._bar = self._progress.add_task(title, total=total_steps, completed=first_step, status="")
        self._title = title
        self._total = total_steps

    def __enter__(self) -> Metrics:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        self._file.close()
        self._board.close()

    def row(self, kind: str, step: int, values: dict) -> None:
        """Append one row; numbers also go to TensorBoard as `kind/name`."""
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def step(self, step: int, values: dict) -> None:
        """One optimiser step: a row, the bar, and a line every `log_every` steps where there is no terminal."""
        self.row("step", step, values)
        status = f"loss {values['loss']:.4f}  {values['step_seconds']:.2f} s/step"
        self._progress.update(self._bar, completed=step, status=status)
        if self._progress.disable and (step % self._log_every == 0 or step == self._total):
            self.say(f"{self._title}  step {step}/{self._total}  {status}")

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True)


def memory_gib(device: torch.device) -> float:
    """Peak memory so far in GiB (1024^3 bytes): the device's allocations, or the process's resident set on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values)
