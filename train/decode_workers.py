"""Processes that decode clips into shared memory, and what happens when one of them dies.

    trainer   submit(job) ------ pipe: what to read, where to put it ------> worker   decodes into its slot
              poll()      <----- pipe: done, skipped or a fault ------------          notes its stage on the board

Processes, and no threads, because a damaged file can crash FFmpeg: the worker that dies is replaced, its clip is tried
once more, and when that worker dies too the clip is skipped like any other file that cannot be read.  Pixels are never
sent: a slot is a piece of memory that both sides map.  A worker has one job waiting beside the one it is at, so that it
need not wait for an answer; all others wait here, and go to whoever is free first.

The processes are in groups of their own: Ctrl-C and a scheduler's SIGTERM go to the trainer's group, and it must get to
save first.  None outlives the trainer, however that ends (see `decode_worker`).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing.connection import Connection, wait
from socket import AF_UNIX, SOCK_STREAM, socketpair
from typing import Any

import numpy as np
import torch

from opensora_fast.errors import UserError
from opensora_fast.frame_sizes import centre
from opensora_fast.host_memory import HostMemory
from opensora_fast.train.buckets import Bucket
from opensora_fast.train.dataset import ClipRequest
from opensora_fast.train.decode_watch import Sight, StatusBoard
from opensora_fast.train.pinned_pool import Block, PinnedPool, block_bytes
from opensora_fast.video_decoder import DecoderName, choose_decoder

_STARTS = 3  # times that a worker which does not start is tried again
_AT_A_WORKER = 2  # the job it is at, and one that waits
_LONGEST_POLL_S = 1000.0  # the system takes only some weeks


def slot_bytes(frames: int, height: int, width: int) -> int:
    """What a clip's slot takes: an eighth more than its size, for what its own ratio covers beyond that."""
    return frames * height * width * 3 * 9 // 8


@dataclass(kw_only=True, eq=False)
class Job:
    """One clip to decode; `slot` belongs to the job until whoever submitted it drops it."""

    request: ClipRequest
    slot: Block
    deaths: list[str] = field(default_factory=list)
    """of workers that were at it"""
    height: int = 0
    width: int = 0
    """of the frames in the slot, which cover the size asked for; set when decoded"""
    skipped: str | None = None
    """why there are none"""
    fault: str | None = None
    """why there are none, when that is not the file's fault but a mistake of ours; names the file"""

    @property
    def finished(self) -> bool:
        return self.height > 0 or self.skipped is not None or self.fault is not None

    def result(self) -> np.ndarray | UserError:
        """A copy of the frames' centre, in the size asked for, or why there are none; RuntimeError for a fault."""
        if self.fault is not None:
            raise RuntimeError(self.fault)
        if self.skipped is not None:
            return UserError(self.skipped)
        pixels_THWC = self.slot.tensor(torch.uint8, (self.request.frames, self.height, self.width, 3)).numpy()
        return centre(pixels_THWC, self.request.height, self.request.width).copy()


class DecodeWorkers:
    """`count` processes; `memory` is shared, and every job's slot lies in it.

    Used from one thread, and closed by it; `sights` and `processes` may be asked for by any. Raises UserError when the
    system gives no process.
    """

    def __init__(self, count: int, memory: HostMemory, *, decoder: DecoderName):
        self._memory, self._decoder = memory, decoder
        self._board = StatusBoard(count)
        self._jobs: dict[int, Job] = {}
        self._waiting: deque[int] = deque()
        self._next_job = 0
        self._fruitless = 0  # workers in a row that died without a job begun or finished
        self._workers: list[_Worker] = []
        try:
            for number in range(count):
                self._workers.append(_Worker(number, count, memory, self._board, decoder))
        except BaseException:
            self.close()
            raise

    def submit(self, job: Job) -> None:
        """Have it decoded, after all that was submitted before."""
        self._jobs[self._next_job] = job
        self._waiting.append(self._next_job)
        self._next_job += 1
        self._hand_out()

    def withdraw(self, job: Job) -> bool:
        """Whether the job's slot is nobody's: it is finished, or no worker has got it yet and now none will."""
        if job.finished:
            return True
        number = next((number for number in self._waiting if self._jobs[number] is job), None)
        if number is None:
            return False
        self._waiting.remove(number)
        del self._jobs[number]
        return True

    def poll(self, timeout: float | None, wake: Any = None) -> list[Job]:
        """Jobs that were finished since; waits for one, or for `wake` to become readable, up to `timeout` seconds.

        Raises RuntimeError when workers die over and over without getting to a job, UserError when the system gives no
        process in place of a dead one.
        """
        finished: list[Job] = []
        readable = [each for worker in self._workers for each in (worker.connection, worker.death)]
        ready = wait(readable + ([wake] if wake is not None else []), timeout)
        for number, worker in enumerate(self._workers):
            if worker.connection in ready or worker.death in ready:
                finished += self._answers(worker)
            if worker.death in ready:
                finished += self._replace(number, worker)
        self._hand_out()
        return finished

    def sights(self) -> list[tuple[Job, Sight | None]]:
        """All jobs that are not finished, with what is seen of those that a worker has begun."""
        begun = {sight.job: sight for sight in map(self._board.look, range(len(self._workers)))}
        return [(job, begun.get(number)) for number, job in self._jobs.copy().items()]  # poll() may run meanwhile

    def stage_of(self, job: Job) -> str:
        """What a job that is not finished is at, and for how long: "in stage open for 3 s"."""
        sight = next((sight for other, sight in self.sights() if other is job), None)
        return "in stage queued" if sight is None else f"in stage {sight.stage} for {sight.seconds:.0f} s"

    def give_up(self, job: Job, reason: str) -> None:
        """Skip a job for this reason, unless it is finished after all; a worker that is at it is replaced."""
        number = next(number for number, other in self._jobs.items() if other is job)
        if self.withdraw(job):
            job.skipped = reason
            return
        at, worker = next((at, worker) for at, worker in enumerate(self._workers) if number in worker.jobs)
        worker.process.kill()
        worker.process.wait()
        self._answers(worker)  # what it got out before
        if not job.finished:
            worker.jobs.remove(number)
            worker.answered = True  # it did get to a job
            del self._jobs[number]
            job.skipped = reason
        self._replace(at, worker)
        self._hand_out()

    @property
    def processes(self) -> list[int]:
        """Their process ids."""
        return [worker.process.pid for worker in self._workers]

    def close(self) -> None:
        """End the processes, whatever they are at; what was submitted is dropped. May be called again."""
        for worker in self._workers:
            worker.kill()
        self._workers.clear()
        self._board.close()

    def _hand_out(self) -> None:
        """Jobs to workers, each to the one with the fewest."""
        while self._waiting:
            worker = min(self._workers, key=lambda worker: len(worker.jobs))
            if len(worker.jobs) >= _AT_A_WORKER:
                return
            number = self._waiting.popleft()
            worker.jobs.append(number)
            job = self._jobs[number]
            try:
                worker.connection.send((number, job.request, job.slot.offset, job.slot.bytes))
            except (BrokenPipeError, ConnectionResetError):
                return  # it is dead: poll() takes its jobs back

    def _answers(self, worker: _Worker) -> list[Job]:
        """What a worker has sent, to the last message that a dead one got out."""
        finished = []
        try:
            while worker.connection.poll():
                message = worker.connection.recv()
                number, kind, *content = message
                job = self._jobs.pop(number)
                worker.jobs.remove(number)
                worker.answered = True
                if kind == "fault":
                    job.fault = content[0]
                elif kind == "skip":
                    job.skipped = content[0]
                else:
                    job.height, job.width = content
                finished.append(job)
        except (EOFError, ConnectionResetError):
            pass
        return finished

    def _replace(self, number: int, worker: _Worker) -> list[Job]:
        """Another worker in place of a dead one, whose jobs it gets; the job that killed two is skipped."""
        end = _end_of(worker.process.wait())
        finished = []
        sight = self._board.look(number)
        if sight.job in worker.jobs:
            job = self._jobs[sight.job]
            job.deaths.append(f"{end} in stage {sight.stage}")
            if len(job.deaths) > 1:
                worker.jobs.remove(sight.job)
                del self._jobs[sight.job]
                job.skipped = f"{job.request.path}: two loader workers died of it ({', '.join(job.deaths)}); replace it"
                finished.append(job)
        else:
            self._fruitless = 0 if worker.answered else self._fruitless + 1
            if self._fruitless > _STARTS:
                raise RuntimeError(f"a loader worker could not start ({end}); its messages are above")
        worker.kill()
        self._board.finish(number)
        self._waiting.extendleft(reversed(worker.jobs))
        self._workers[number] = _Worker(number, len(self._workers), self._memory, self._board, self._decoder)
        return finished


class _Worker:
    """One process, the trainer's end of its pipe, and a descriptor that becomes readable when it is dead.

    Raises UserError when the system gives none of these.
    """

    def __init__(self, number: int, count: int, memory: HostMemory, board: StatusBoard, decoder: DecoderName):
        self.jobs: list[int] = []
        self.answered = False  # whether it has finished a job
        try:
            self._start(number, count, memory, board, decoder)
        except OSError as error:
            raise UserError(
                f"--data.workers={count}: the system does not start worker {number + 1} ({error}): lower "
                "--data.workers, or raise its limits of processes, open files or memory"
            ) from error

    def _start(self, number: int, count: int, memory: HostMemory, board: StatusBoard, decoder: DecoderName) -> None:
        ours, theirs = socketpair(AF_UNIX, SOCK_STREAM)
        passed = [theirs.fileno(), memory.descriptor, board.descriptor]
        words = [number, count, os.getpid(), *passed, memory.bytes, decoder]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "OMP_NUM_THREADS": "1",  # one worker, one core
            "OPENBLAS_NUM_THREADS": "1",
        }
        with ours, theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "opensora_fast.train.decode_worker", *map(str, words)],
                stdin=subprocess.DEVNULL,
                pass_fds=passed,
                process_group=0,
                env=environment,
            )
            try:
                self.death = os.pidfd_open(self.process.pid)
            except OSError:
                self.process.kill()
                self.process.wait()
                raise
            self.connection = Connection(ours.detach())

    def kill(self) -> None:
        """May be called again."""
        self.process.kill()
        self.process.wait()
        self.connection.close()
        if self.death >= 0:
            os.close(self.death)
            self.death = -1


def decode_in_order(
    requests: Iterable[ClipRequest],
    *,
    buckets: Iterable[Bucket],
    workers: int,
    slow_s: float = 30.0,
    limit_s: float = 600.0,
    say: Callable[[str], None] = print,
) -> Generator[np.ndarray | UserError, None, None]:
    """Each request's frames, in its own size, or why there are none: uint8 [T, height, width, 3], arrays of their own.

    buckets: all that the requests may be of. `workers` processes decode ahead of the iteration; they end with it.
    slow_s, limit_s: seconds of waiting for a clip, after which `say` is told which file is in which stage, and after
    which the clip is given up: there are no frames of it then.
    Raises what `DecodeWorkers` does, and UserError when there is no memory for their slots.
    """
    ahead = _AT_A_WORKER * workers + 2
    largest = max(slot_bytes(bucket.frames, bucket.height, bucket.width) for bucket in buckets)
    # Room for twice as many of the largest: then a gap is left for each clip, however those before it lie, since none
    # takes or leaves more than the largest.
    setting = "--data.workers" if workers > 1 else "the resolutions or frames of --data.buckets"
    memory = HostMemory(2 * ahead * block_bytes(largest), shared=True, setting=setting)
    slots = PinnedPool(memory, largest=largest, setting=setting)
    pool = DecodeWorkers(workers, memory, decoder=choose_decoder().name)
    jobs: deque[Job] = deque()
    coming = iter(requests)
    try:
        while True:
            for request in islice(coming, ahead - len(jobs)):
                slot = slots.take(slot_bytes(request.frames, request.height, request.width), timeout=None)
                assert slot is not None
                jobs.append(Job(request=request, slot=slot))
                pool.submit(jobs[-1])
            if not jobs:
                return
            _wait_for(jobs[0], pool, slow_s=slow_s, limit_s=limit_s, say=say)
            yield jobs.popleft().result()
    finally:
        pool.close()


def _wait_for(job: Job, pool: DecodeWorkers, *, slow_s: float, limit_s: float, say: Callable[[str], None]) -> None:
    """Until the job is finished; a long wait is reported once, and with the limit the job is given up."""
    begun = time.monotonic()
    for limit in sorted({min(slow_s, limit_s), limit_s}):
        while not job.finished and (left := begun + limit - time.monotonic()) > 0:
            pool.poll(min(left, _LONGEST_POLL_S))
        if job.finished:
            return
        if limit < limit_s:
            say(f"a clip is late, {limit:g} s so far: {job.request.path} {pool.stage_of(job)}")
    pool.give_up(job, f"{job.request.path}: not decoded within {limit_s:g} s ({pool.stage_of(job)}); replace it")


def _end_of(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
