"""From plans to batches, ahead of the trainer: one thread that keeps everybody else at work.

    plans -> slots -> workers decode -> the collator lays the batch out in pinned memory -> copy to the device
    (drawn in order, submitted in order, laid out in order, handed out in order; only decoding is done out of order)

Plans are drawn while the workers have too little to do, `prefetch` batches are laid out ahead of the one that the
trainer has, and one of those is on its way to the device, on a stream of its own: the trainer's stream waits for an
event, nobody for the device. A batch's pinned block is held until that event has happened. Without a GPU the block's
own tensor is the batch.

What bounds memory: two pools that are there from the start. Since everything is taken in the order in which it is used
up, the oldest batch always gets what it needs.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor

from opensora_fast.errors import UserError
from opensora_fast.train.batch_memory import BatchMemory
from opensora_fast.train.bucket_sampler import BatchPlan, BucketSampler
from opensora_fast.train.buckets import Draw
from opensora_fast.train.collate import ClipPixels, Collator, Ticket
from opensora_fast.train.dataset import clip_request
from opensora_fast.train.decode_workers import DecodeWorkers, Job, slot_bytes
from opensora_fast.train.index import ClipIndex, ClipRecord

_TICK = 0.1  # seconds: how late memory is noticed that came back without anything else happening
_GLANCE = 0.002  # seconds that a batch being laid out is waited for before the workers are listened to again
_NAMED = 3  # files that a report names


@dataclass(kw_only=True, eq=False)
class PlannedBatch:
    """One batch on its way; `state` is the sampler's behind it."""

    plan: BatchPlan
    state: dict
    records: list[ClipRecord]
    jobs: list[Job] = field(default_factory=list)
    """those submitted so far, in the order of the records"""
    skipped: dict[str, str] = field(default_factory=dict)
    stand_ins: Iterator[BatchPlan] | None = None
    video_BCTHW: Tensor | None = None
    ticket: Ticket | None = None
    copied: torch.cuda.Event | None = None
    ready: bool = False
    stage: str = "queued"
    since: float = field(default_factory=time.monotonic)

    def enter(self, stage: str) -> None:
        if stage != self.stage:
            self.stage, self.since = stage, time.monotonic()

    @property
    def undecoded(self) -> int:
        if self.video_BCTHW is not None:
            return 0
        return len(self.records) - sum(job.finished for job in self.jobs)

    def take_out_skipped(self) -> None:
        """Leave the clips out that could not be read; of their reasons, the last for each file is kept."""
        for record, job in zip(self.records, self.jobs, strict=True):
            if job.skipped is not None:
                self.skipped[record.path] = job.skipped
        kept = [pair for pair in zip(self.records, self.jobs, strict=True) if pair[1].skipped is None]
        self.records, self.jobs = [record for record, _ in kept], [job for _, job in kept]


class BatchPipeline:
    """Batches of `sampler`'s plans, in order; `take` gives the next one.

    start_workers makes the processes, `workers` of them, in the pipeline's thread.  prefetch: batches laid out ahead,
    in `dtype`.
    """

    def __init__(
        self,
        clips: ClipIndex,
        sampler: BucketSampler,
        *,
        start_workers: Callable[[], DecodeWorkers],
        workers: int,
        prefetch: int,
        memory: BatchMemory,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self._clips, self._sampler = clips, sampler
        self._start_workers, self._jobs_ahead, self._prefetch = start_workers, 2 * workers, prefetch
        self._slots, self._pinned, self._dtype = memory.slots, memory.batches, dtype
        self._device = device if device.type == "cuda" else None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._window: deque[PlannedBatch] = deque()
        self._on_the_way: deque[tuple[torch.cuda.Event, Tensor]] = deque()
        self._changed = threading.Condition()
        self._failure: BaseException | None = None
        self._stopping = False
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._collator = Collator()
        self._workers: DecodeWorkers | None = None
        self._thread = threading.Thread(target=self._run, name="batch pipeline", daemon=True)
        self._thread.start()

    @property
    def worker_processes(self) -> list[int]:
        """Their process ids; none before they are started."""
        return [] if self._workers is None else self._workers.processes

    def take(self, timeout: float) -> PlannedBatch | None:
        """The next batch, ready for use on the current stream; None when there is none within `timeout` seconds.

        Raises UserError when a whole epoch gives nothing, RuntimeError naming the file for a fault in decoding.
        """
        with self._changed:
            self._changed.wait_for(self._can_take, timeout)
            if self._failure is not None:
                raise self._failure
            if not self._can_take():
                return None
            batch = self._window.popleft()
        os.eventfd_write(self._wake, 1)
        if batch.copied is not None and batch.video_BCTHW is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(batch.copied)
            batch.video_BCTHW.record_stream(stream)  # its memory is the copying stream's: not to be reused too early
        return batch

    def where(self) -> str:
        """What the next batch is waiting for: files, stages and seconds, on one line."""
        with self._changed:
            batch = self._window[0] if self._window else None
        if batch is None or self._workers is None:
            return "the workers are being started"
        if batch.stage != "queued":
            files = [record.path for record in batch.records]
            if batch.stage == "collate" and batch.video_BCTHW is None:
                return f"{_listed(files)}: decoded, but the batches before still hold all pinned memory"
            return f"{_listed(files)} in stage {batch.stage} for {time.monotonic() - batch.since:.0f} s"
        own = set(batch.jobs)
        sights = [(job, sight) for job, sight in self._workers.sights() if job in own]
        begun = [
            f"{job.request.path} in stage {sight.stage} for {sight.seconds:.0f} s" for job, sight in sights if sight
        ]
        waiting = [f"{job.request.path} in stage queued" for job, sight in sights if not sight]
        return _listed(begun or waiting) or "nothing in particular"

    def close(self) -> None:
        """End the thread and the workers, and drop what is on its way. May be called again, and from any thread."""
        if self._stopping:
            return
        self._stopping = True
        os.eventfd_write(self._wake, 1)
        if threading.current_thread() is not self._thread:  # where the garbage collector may run
            self._thread.join()
            os.close(self._wake)

    def _can_take(self) -> bool:
        return self._failure is not None or (bool(self._window) and self._window[0].ready)

    def _run(self) -> None:
        try:
            self._workers = self._start_workers()
            while not self._stopping:
                self._draw()
                self._submit()
                self._lay_out()
                self._send()
                self._listen()
        except BaseException as failure:  # the trainer's thread raises it
            with self._changed:
                self._failure = failure
                self._changed.notify_all()
        finally:
            if self._workers is not None:
                self._workers.close()
            self._collator.close()
            self._window.clear()
            while self._on_the_way:
                self._on_the_way.popleft()[0].synchronize()

    def _listen(self) -> None:
        """Until something happens that gives this thread work."""
        assert self._workers is not None
        ticket = next((batch.ticket for batch in self._batches() if batch.ticket is not None), None)
        if ticket is not None:
            ticket.wait(_GLANCE)
        self._workers.poll(0 if ticket is not None else _GLANCE if self._on_the_way else _TICK, wake=self._wake)
        with suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        while self._on_the_way and self._on_the_way[0][0].query():
            self._on_the_way.popleft()

    def _draw(self) -> None:
        """Plans, while fewer batches are on their way than are wanted, or the workers would run out of clips."""
        while len(self._window) < self._prefetch or sum(b.undecoded for b in self._batches()) < self._jobs_ahead:
            plan = next(self._sampler)
            batch = PlannedBatch(plan=plan, state=self._sampler.state_dict(), records=self._records(plan))
            with self._changed:
                self._window.append(batch)

    def _batches(self) -> list[PlannedBatch]:
        """Those on their way; the trainer's thread takes the first away at any time."""
        with self._changed:
            return list(self._window)

    def _records(self, plan: BatchPlan) -> list[ClipRecord]:
        return [self._clips[index] for index in plan.indices]

    def _submit(self) -> None:
        """Clips to the workers, for as long as there are slots."""
        assert self._workers is not None
        for batch in self._batches():
            plan, bucket = batch.plan, batch.plan.bucket
            if batch.stage != "queued":
                continue
            while len(batch.jobs) < len(plan.indices):
                slot = self._slots.take(slot_bytes(bucket.frames, bucket.height, bucket.width), timeout=0)
                if slot is None:
                    return
                place = len(batch.jobs)
                index = plan.indices[place]
                request = clip_request(
                    batch.records[place],
                    bucket,
                    Draw(seed=self._sampler.seed, epoch=plan.epoch),
                    index,
                    plan.indices[:place].count(index),
                    fps_max=self._sampler.fps_max,
                )
                batch.jobs.append(Job(request=request, slot=slot))
                self._workers.submit(batch.jobs[-1])

    def _lay_out(self) -> None:
        """Decoded batches to the collator, one behind the other, and those that it has done made ready."""
        laid_out = 0
        for batch in self._batches():
            if batch.ticket is not None and batch.ticket.wait(0):
                batch.ticket = None
                batch.jobs = []  # the slots go back
                batch.enter("copy")
                if self._stream is None:
                    self._make_ready(batch)
            laid_out += batch.video_BCTHW is not None
            if batch.video_BCTHW is None and (
                batch.undecoded or laid_out >= self._prefetch or not self._begin_layout(batch)
            ):
                return

    def _begin_layout(self, batch: PlannedBatch) -> bool:
        """Whether the collator was given the batch: not when nothing is left of it, or all pinned memory is in use."""
        if batch.stage == "queued":
            batch.take_out_skipped()
            if not batch.jobs:
                self._stand_in(batch)
                return False
        batch.enter("collate")
        bucket = batch.plan.bucket
        shape = (len(batch.jobs), 3, bucket.frames, bucket.height, bucket.width)
        block = self._pinned.take(torch.Size(shape).numel() * self._dtype.itemsize, timeout=0)
        if block is None:
            return False
        clips = [
            ClipPixels(
                address=job.slot.address,
                height=job.height,
                width=job.width,
                frames=bucket.frames,
                top=(job.height - bucket.height) // 2,
                left=(job.width - bucket.width) // 2,
            )
            for job in batch.jobs
        ]
        batch.video_BCTHW = block.tensor(self._dtype, shape)
        batch.ticket = self._collator.submit(clips, batch.video_BCTHW)
        return True

    def _stand_in(self, batch: PlannedBatch) -> None:
        """Another plan for a batch of which nothing is left; the sampler's state behind it stays what it was."""
        if batch.stand_ins is None:
            batch.stand_ins = self._sampler.stand_ins(batch.plan)
        plan = next(batch.stand_ins, None)
        if plan is None:
            reason = list(batch.skipped.values())[-1]
            raise UserError(f"no clip of epoch {batch.plan.epoch + 1} could be read; the last: {reason}")
        batch.plan, batch.records = plan, self._records(plan)

    def _send(self) -> None:
        """The next batch to the device."""
        batch = next(iter(self._batches()), None)
        if self._stream is None or batch is None or batch.ready or batch.stage != "copy":
            return
        assert batch.video_BCTHW is not None
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            on_device_BCTHW = batch.video_BCTHW.to(self._device, non_blocking=True)
            batch.copied = torch.cuda.Event()
            batch.copied.record()
        self._on_the_way.append((batch.copied, batch.video_BCTHW))
        batch.video_BCTHW = on_device_BCTHW
        self._make_ready(batch)

    def _make_ready(self, batch: PlannedBatch) -> None:
        with self._changed:
            batch.ready = True
            self._changed.notify_all()


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
