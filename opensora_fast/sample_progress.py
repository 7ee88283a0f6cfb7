"""How far sampling is, and how long the rest takes: bars where stderr is a terminal, a line now and then otherwise.

The time that is left follows from all that was done so far, however long a step takes, so it is there after the first
step.  What was made is told on stdout, everything else on stderr.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

LINE_EVERY = 30.0  # seconds from one line to the next where there are no bars


class Pace:
    """How long the rest of `total` takes, from how long what is done took."""

    def __init__(self, total: float, now: float) -> None:
        self._total = total
        self._began = self._reached_at = now
        self._done = 0.0

    def reached(self, done: float, now: float) -> None:
        """So much is done."""
        self._done, self._reached_at = done, now

    def left(self, now: float) -> float | None:
        """Seconds until all is done; None while nothing is."""
        if not self._done:
            return None
        whole = (self._reached_at - self._began) / self._done * (self._total - self._done)
        return max(0.0, whole - (now - self._reached_at))


class _TimeLeft(ProgressColumn):
    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__()
        self._clock = clock

    def render(self, task: Task) -> Text:
        pace: Pace | None = task.fields.get("pace")
        return Text(f"left: {_shown(pace.left(self._clock()) if pace else None)}", style="progress.remaining")


class SampleProgress:
    """Told of every step, by whoever samples; silent where not `shown`. The bars are there inside its `with`."""

    def __init__(
        self,
        requests: int,
        *,
        shown: bool,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._requests = requests
        self._shown = shown
        self._clock = clock
        self._ended = 0
        self._name = ""
        self._total = 0
        self._told_at = clock()
        console = console or Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            _TimeLeft(clock),
            console=console,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),  # what goes elsewhere must not be drawn over the bars
            disable=not (shown and console.is_terminal),
            get_time=clock,
        )
        self._read = self._bars.add_task("reading weights", total=None)
        self._all = self._bars.add_task("requests", total=requests, visible=requests > 1)
        self._paint = self._bars.add_task("picture", visible=False)
        self._steps = self._bars.add_task("steps", visible=False)
        self._pace_of_all: Pace | None = None  # from the first request on
        self._pace = Pace(0, clock())

    def __enter__(self) -> SampleProgress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def begin(self, name: str, steps: int, *, painting: bool) -> None:
        """A request begins; `painting`: FLUX makes its picture first, in as many steps."""
        now = self._clock()
        self._name, self._total = name, steps
        self._pace = Pace(steps, now)
        if self._pace_of_all is None:
            self._pace_of_all = Pace(self._requests, now)
        self._bars.update(self._read, visible=False)
        self._bars.update(self._all, pace=self._pace_of_all)
        self._bars.reset(
            self._paint,
            total=steps,
            visible=painting,
            description=f"{name}: picture",
            pace=self._pace if painting else None,
        )
        self._bars.reset(
            self._steps,
            total=steps,
            visible=True,
            description=f"{name}: video",
            start=not painting,
            pace=None if painting else self._pace,
        )

    def painted(self, done: int) -> None:
        """So many steps of the picture are done."""
        self._reached(done, "picture")
        self._bars.update(self._paint, completed=done)
        if done == self._total:
            self._pace = Pace(self._total, self._clock())
            self._bars.update(self._steps, pace=self._pace)
            self._bars.start_task(self._steps)

    def step(self, done: int) -> None:
        """So many steps of the video are done."""
        if self._pace_of_all is not None:
            self._pace_of_all.reached(self._ended + done / self._total, self._clock())
        self._reached(done, "video")
        self._bars.update(self._steps, completed=done)

    def ended(self, line: str | None = None) -> None:
        """The request is through; `line` says what was made."""
        self._ended += 1
        if self._pace_of_all is not None:
            self._pace_of_all.reached(self._ended, self._clock())
        self._bars.update(self._all, completed=self._ended)
        if line is not None and self._shown:
            print(line, flush=True)

    def say(self, line: str) -> None:
        """Tell something else."""
        if self._shown:
            self._bars.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _reached(self, done: int, what: str) -> None:
        now = self._clock()
        self._pace.reached(done, now)
        if self._bars.disable and now - self._told_at >= LINE_EVERY:
            self._told_at = now
            self.say(f"{self._name}: {what}, step {done} of {self._total}, left: {_shown(self._pace.left(now))}")


def _shown(seconds: float | None) -> str:
    return "-:--:--" if seconds is None else str(timedelta(seconds=round(seconds)))
