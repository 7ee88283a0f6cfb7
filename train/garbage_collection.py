"""Python's garbage collector, at the training loop's pace: where it runs by itself, one rank stops and all others wait.

What exists when training begins is set aside, so that a collection looks only at what was made since, and the few
reference cycles of a step are collected at fixed steps, the same on all ranks. Processes of their own, such as the
loader's workers, keep the collector as it is.
"""

from __future__ import annotations

import gc


class CollectedEvery:
    """Within `with`, the collector is off but for `step`; behind it, it is as it was before."""

    def __init__(self, steps: int):
        self._steps = steps

    def __enter__(self) -> CollectedEvery:
        self._was_on = gc.isenabled()
        gc.disable()
        gc.collect()
        gc.freeze()
        return self

    def step(self, number: int) -> None:
        """Call once at the end of each step; collects when `number` divides by `steps`."""
        if number % self._steps == 0:
            gc.collect()

    def __exit__(self, *_: object) -> None:
        gc.unfreeze()
        if self._was_on:
            gc.enable()
