"""How far sampling is: bars with the time that is left where stderr is a terminal, a line for every file otherwise.

What was made is told on stdout, everything else on stderr.
"""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class SampleProgress:
    """Told of every step, by whoever samples; silent where not `shown`. The bars are there inside its `with`."""

    def __init__(self, requests: int, *, shown: bool) -> None:
        self._requests = requests
        self._shown = shown
        self._count = 0
        console = Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),  # what goes elsewhere must not be drawn over the bars
            disable=not (shown and console.is_terminal),
        )
        self._read = self._bars.add_task("reading weights", total=None)
        self._all = self._bars.add_task("requests", total=requests, visible=requests > 1)
        self._paint = self._bars.add_task("picture", visible=False)
        self._steps = self._bars.add_task("steps", visible=False)

    def __enter__(self) -> SampleProgress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def begin(self, name: str, steps: int, *, painting: bool) -> None:
        """A request begins; `painting`: FLUX makes its picture first, in as many steps."""
        self._count += 1
        self._bars.update(self._read, visible=False)
        self._bars.reset(self._paint, total=steps, visible=painting, description=f"{name}: picture")
        self._bars.reset(self._steps, total=steps, visible=True, description=f"{name}: video", start=not painting)

    def painted(self, done: int) -> None:
        """So many steps of the picture are done."""
        self._bars.update(self._paint, completed=done)
        self._bars.start_task(self._steps)

    def step(self, done: int) -> None:
        """So many steps of the video are done."""
        self._bars.update(self._steps, completed=done)

    def ended(self, line: str | None = None) -> None:
        """The request is through; `line` says what was made."""
        self._bars.update(self._all, completed=self._count)
        if line is not None and self._shown:
            print(line, flush=True)

    def say(self, line: str) -> None:
        """Tell something else."""
        if self._shown:
            self._bars.console.print(line, markup=False, highlight=False, soft_wrap=True)
