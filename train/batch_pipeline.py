"""From plans to batches, ahead of the trainer: one thread that keeps everybody else at work.

    plans -> slots -> workers decode -> the collator lays the batch out in pinned memory -> copy to the device
    (drawn in order, submitted in order, laid out in order, handed out in order; only decoding is done out of order)

Plans are drawn while the workers have too little to do, `prefetch` batches are laid out ahead of the one that the
trainer has, and one of those is on its way to the device, on a stream of its own: the trainer's stream waits for an
event, nobody for the device. A batch's pinned block is held until that event has happened. Without a GPU the block's
own tensor is the batch.

What bounds memory: two pools that are there from the start. Everything is taken in the order in which it is used up,
but for one case: when nothing is left of a batch, its stand-in wants slots that batches behind it hold. These are taken
back then, the youngest first, and decoded again later; a worker that is at one of them is waited for. So the oldest
batch always gets what it needs: with nobody else's clips in the slots there is a gap for each of its own.

A batch that cannot be made is an error at its own turn, behind all batches before it, whatever the number of workers.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress

import torch
from torch import Tensor

from opensora_fast.errors import UserError
from opensora_fast.train.batch_memory import BatchMemory
from opensora_fast.train.bucket_sampler import BatchPlan, BucketSampler
from opensora_fast.train.buckets import Draw
from opensora_fast.train.collate import ClipPixels, Collator
from opensora_fast.train.dataset import clip_request
from opensora_fast.train.decode_workers import DecodeWorkers, Job, slot_bytes
from opensora_fast.train.index import ClipIndex, ClipRecord
from opensora_fast.train.planned_batch import Delay, PlannedBatch

_TICK = 0.1  # seconds: how late memory is noticed that came back without anything else happening
_GLANCE = 0.002  # seconds that a batch being laid out is waited for before the workers are listened to again


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

        Raises UserError when a whole epoch gives nothing, RuntimeError naming the file for a fault in decoding; so does
        every call after that.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._has_next() or self._failure is not None, timeout):
                return None
            failure = self._window[0].failure if self._has_next() else self._failure
            if failure is not None:
                raise failure
            batch = self._window.popleft()
        os.eventfd_write(self._wake, 1)
        if batch.copied is not None and batch.video_BCTHW is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(batch.copied)
            batch.video_BCTHW.record_stream(stream)  # its memory is the copying stream's: not to be reused too early
        return batch

    def where(self) -> Delay:
        """What the next batch is waiting for."""
        with self._changed:
            batch = self._window[0] if self._window else None
        if self._workers is None:
            return Delay(reason="the workers are being started")
        if batch is None:
            return Delay(reason="the next batch is being planned")
        return batch.delay(self._workers.sights())

    def close(self) -> None:
        """End the thread and the workers, and drop what is on its way. May be called again, and from any thread."""
        if self._stopping:
            return
        self._stopping = True
        os.eventfd_write(self._wake, 1)
        if threading.current_thread() is not self._thread:  # where the garbage collector may run
            self._thread.join()
            self._window.clear()
            os.close(self._wake)

    def _has_next(self) -> bool:
        return bool(self._window) and self._window[0].ready

    def _run(self) -> None:
        try:
            with ExitStack() as at_the_end:  # the last first, and all of it
                at_the_end.callback(self._finish_copies)
                at_the_end.callback(self._drop_unfinished)
                at_the_end.callback(self._collator.close)
                self._workers = self._start_workers()
                at_the_end.callback(self._workers.close)
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

    def _drop_unfinished(self) -> None:
        """Batches that are ready can still be taken when this thread has failed."""
        with self._changed:
            while self._window and not self._window[-1].ready:
                self._window.pop()

    def _finish_copies(self) -> None:
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
        oldest = True  # whether no batch before will give slots back
        for batch in self._batches():
            plan, bucket = batch.plan, batch.plan.bucket
            while batch.stage == "queued" and len(batch.jobs) < len(plan.indices):
                wanted = slot_bytes(bucket.frames, bucket.height, bucket.width)
                slot = self._slots.take(wanted, timeout=0)
                while slot is None and oldest and self._take_back_from_behind(batch):
                    slot = self._slots.take(wanted, timeout=0)
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
            oldest = oldest and not batch.jobs

    def _take_back_from_behind(self, batch: PlannedBatch) -> bool:
        """Whether the youngest clip gave its slot back: not when a worker is at it, or none is behind `batch`."""
        assert self._workers is not None
        youngest = next((other for other in reversed(self._batches()) if other.jobs), batch)
        if youngest is batch or not self._workers.withdraw(youngest.jobs[-1]):
            return False
        youngest.jobs.pop()
        return True

    def _lay_out(self) -> None:
        """Decoded batches to the collator, one behind the other, and those that it has done made ready."""
        laid_out = 0
        for batch in self._batches():
            if batch.failure is not None:
                return
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
        fault = next((job.fault for job in batch.jobs if job.fault is not None), None)
        if fault is not None:
            self._fail(batch, RuntimeError(fault))
            return False
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
            self._fail(batch, UserError(f"no clip of epoch {batch.plan.epoch + 1} could be read; the last: {reason}"))
        else:
            batch.plan, batch.records = plan, self._records(plan)

    def _fail(self, batch: PlannedBatch, failure: Exception) -> None:
        batch.failure = failure
        batch.enter("failed")
        self._make_ready(batch)

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
