"""Who is doing what, and since when: a board in shared memory that decoding workers write and the trainer reads.

A worker notes the job and its stage as each begins, which costs a few stores; nothing is sent.  So the trainer can tell
what a worker was at that hangs, or that was killed, and names the file in a report or an error.

One row of int64 per worker: job (-1: none), stage (position in STAGES), since (nanoseconds of the system's monotonic
clock, which all processes share).
"""

from __future__ import annotations

import mmap
import os
import time
from dataclasses import dataclass

import numpy as np

STAGES = ("open", "seek", "decode")
"""What a clip goes through in a worker, in this order."""

_JOB, _STAGE, _SINCE, _COLUMNS = 0, 1, 2, 3


@dataclass(frozen=True, kw_only=True)
class Sight:
    """One look at a worker: the job it has begun (None: it is idle), the stage it is in, and for how many seconds."""

    job: int | None
    stage: str
    seconds: float


class StatusBoard:
    """`descriptor` is that of the shared memory; a worker attaches with it."""

    def __init__(self, workers: int, descriptor: int | None = None):
        bytes = workers * _COLUMNS * 8
        if descriptor is None:
            self.descriptor = os.memfd_create("decode-status")
            os.ftruncate(self.descriptor, bytes)
        else:
            self.descriptor = descriptor
        self._rows = np.frombuffer(mmap.mmap(self.descriptor, bytes), np.int64).reshape(workers, _COLUMNS)
        if descriptor is None:
            self._rows[:, _JOB] = -1

    def begin(self, worker: int, job: int) -> None:
        """The worker takes up a job, which is seen with its first stage and never with the job's before."""
        self.enter(worker, STAGES[0])
        self._rows[worker, _JOB] = job

    def enter(self, worker: int, stage: str) -> None:
        """The worker enters a stage."""
        self._rows[worker, _SINCE] = time.monotonic_ns()
        self._rows[worker, _STAGE] = STAGES.index(stage)

    def finish(self, worker: int) -> None:
        """The worker is done with its job."""
        self._rows[worker, _JOB] = -1

    def look(self, worker: int) -> Sight:
        job, stage, since = self._rows[worker].tolist()
        seconds = (time.monotonic_ns() - since) / 1e9
        return Sight(job=None if job < 0 else job, stage=STAGES[stage], seconds=seconds)

    def close(self) -> None:
        """Give the descriptor up; what is on the board can still be read. May be called again."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
