"""Batches without end, and a state that resumes them exactly.

    BucketSampler    which clips make the next batch                   bucket_sampler
    DecodeWorkers    processes that decode into shared memory          decode_workers, decode_worker, decode_watch
    BatchPipeline    one thread: plans in, laid-out batches out        batch_pipeline, planned_batch
    ClipLoader       the trainer's side: the state, waiting, reports   here

The state counts the batches handed out, whatever has been decoded ahead, and depends neither on the number of workers
nor on that of ranks.

Shapes   B clips, C = 3, T frames, H height, W width.
"""

from __future__ import annotations

import math
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from opensora_fast.errors import UserError
from opensora_fast.train.batch_memory import take_memory
from opensora_fast.train.batch_pipeline import BatchPipeline
from opensora_fast.train.bucket_sampler import BatchPlan, BucketSampler, evaluation_plans
from opensora_fast.train.buckets import BucketTable, thinned_fps
from opensora_fast.train.dataset import ClipRequest, clip_request
from opensora_fast.train.decode_workers import DecodeWorkers, decode_in_order
from opensora_fast.train.index import ClipIndex, ClipRecord
from opensora_fast.train.planned_batch import PlannedBatch
from opensora_fast.video_decoder import choose_decoder
from opensora_fast.video_io import to_signed

if TYPE_CHECKING:
    from opensora_fast.train.cached_loader import EncodedBatch

_MIB = 2**20
_CLIPS_FOR_A_WORKER = 4  # of a fixed pass: to start one more process takes as long as to decode a few


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Decoded clips.  Files that could not be read are missing from it; `plan` still names them."""

    video_BCTHW: Tensor
    """in [-1, 1]; float32 unless the loader was asked for another type"""
    text: list[str]
    fps: Tensor
    """float32 [B], frames per second of these frames (after thinning); 0 for images"""
    motion: list[float | None]
    paths: list[str]
    plan: BatchPlan
    encoded: EncodedBatch | None = None
    """latents and text embeddings from a cache; the clips are not decoded then"""


class Batches(Protocol):
    """What the training loop reads: batches without end, and the state behind the last one handed out."""

    skipped: dict[str, str]

    def __iter__(self) -> Iterator[Batch]: ...
    def __next__(self) -> Batch: ...
    def state_dict(self) -> dict: ...
    def load_state_dict(self, state: dict) -> None: ...
    def close(self) -> None: ...


class ClipLoader:
    """Iterates decoded batches of `sampler`'s plans, without end.

    workers: processes that decode.  prefetch: batches laid out ahead of the trainer.
    pinned_gib: GiB for laid-out batches; 0 is room for the largest of them, prefetch + 2 times.
    device: where batches are put; for a CUDA device the memory is pinned, and copying overlaps with the step before.
    dtype: of the pixels.
    slow_batch_s, batch_timeout_s: after so many seconds of waiting for a batch, `say` is told which file is in which
    stage, and a UserError says it.
    skipped: {path: reason} of files that could not be read so far.  They are left out of their batches; a batch of
    which nothing remains is replaced by the next of the epoch's order (see `bucket_sampler`).
    The pixels of a batch lie in memory that is used again when the last tensor made of them is gone: a consumer that
    keeps more batches than there is room for waits for itself, and is told so.
    Raises UserError when the memory cannot be had or does not fit the largest batch, and when a whole epoch gives
    nothing; RuntimeError naming the file for a fault in decoding that is not the file's. These last two come in the
    batch's turn, and again from every call after that, until the loader is closed or its state is loaded.
    """

    def __init__(
        self,
        clips: ClipIndex,
        sampler: BucketSampler,
        *,
        workers: int,
        prefetch: int = 2,
        pinned_gib: float = 0.0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        slow_batch_s: float = 30.0,
        batch_timeout_s: float = 600.0,
        say: Callable[[str], None] = print,
    ):
        if workers < 1:
            raise UserError(f"data.workers={workers}: clips are decoded by processes of their own; use 1 or more")
        if prefetch < 1:
            raise UserError(f"data.prefetch={prefetch}: use 1 or more")
        self.skipped: dict[str, str] = {}
        self._clips, self._sampler, self._device = clips, sampler, _numbered(torch.device(device))
        self._workers, self._prefetch, self._dtype = workers, prefetch, dtype
        self._slow_batch_s, self._batch_timeout_s, self._say = slow_batch_s, batch_timeout_s, say
        self._state = sampler.state_dict()
        self._decoder = choose_decoder()
        self._pipeline: BatchPipeline | None = None
        self._memory = take_memory(
            clips,
            sampler,
            workers=workers,
            prefetch=prefetch,
            pinned_gib=pinned_gib,
            device=self._device,
            dtype=dtype,
        )

    def __iter__(self) -> Iterator[Batch]:
        self._started()  # the workers begin while the caller does something else first
        return self

    def __next__(self) -> Batch:
        planned = self._waited_for(self._started())
        self._state = planned.state
        self.skipped.update(planned.skipped)
        assert planned.video_BCTHW is not None
        return _batch(planned.plan, planned.records, planned.video_BCTHW, self._sampler.fps_max)

    def state_dict(self) -> dict:
        """The state after the last batch handed out, whatever has been decoded ahead; JSON-ready."""
        return self._state

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state` was taken; what has been decoded ahead is dropped."""
        self.close()
        self._sampler.load_state_dict(state)
        self._state = self._sampler.state_dict()

    def close(self) -> None:
        """Stop the workers and drop what they have decoded ahead; iterating starts new ones.  The state is kept."""
        if self._pipeline is not None:
            self._close_pipeline()
            self._pipeline = None
            self._sampler.load_state_dict(self._state)

    def describe(self) -> str:
        """Who decodes, with what and why, and into how much memory; one line."""
        kind = "pinned memory" if self._device.type == "cuda" else "memory"
        return (
            f"{self._workers} worker{' decodes' if self._workers == 1 else 's decode'} with {self._decoder.name} "
            f"({self._decoder.reason}) into {self._memory.shared.bytes / _MIB:.1f} MiB; batches are laid out in "
            f"{self._memory.pinned_bytes / _MIB:.1f} MiB of {kind}"
        )

    @property
    def worker_processes(self) -> list[int]:
        """The process ids of the workers that are at work."""
        return [] if self._pipeline is None else self._pipeline.worker_processes

    def _started(self) -> BatchPipeline:
        if self._pipeline is None:
            self._pipeline = self._new_pipeline()
        return self._pipeline

    def _new_pipeline(self) -> BatchPipeline:
        start_workers = partial(DecodeWorkers, self._workers, self._memory.shared, decoder=self._decoder.name)
        pipeline = BatchPipeline(
            self._clips,
            self._sampler,
            start_workers=start_workers,
            workers=self._workers,
            prefetch=self._prefetch,
            memory=self._memory,
            device=self._device,
            dtype=self._dtype,
        )
        self._close_pipeline = weakref.finalize(self, pipeline.close)
        return pipeline

    def _waited_for(self, pipeline: BatchPipeline) -> PlannedBatch:
        """The next batch; a long wait is reported once, and ends with the limit."""
        begun = time.monotonic()
        limits = sorted({min(self._slow_batch_s, self._batch_timeout_s), self._batch_timeout_s})
        for limit in limits:
            planned = pipeline.take(max(0.0, begun + limit - time.monotonic()))
            if planned is not None:
                return planned
            if limit < self._batch_timeout_s:
                self._say(f"a batch is late, {limit:g} s so far: {pipeline.where().reason}")
        delay = pipeline.where()
        raise UserError(
            f"no batch came within data.batch_timeout_s={self._batch_timeout_s:g}: {delay.reason}; {delay.remedy}"
        )


class EvaluationBatches:
    """A fixed list of batches, decoded anew each time it is iterated; see `evaluation_batches`.

    Worker processes decode, some clips ahead, and end with the pass. Clips that cannot be read, that kill their
    workers or that take too long are left out with a warning that names them.
    """

    def __init__(
        self,
        clips: ClipIndex,
        plans: list[BatchPlan],
        *,
        fps_max: float,
        workers: int,
        slow_clip_s: float,
        clip_timeout_s: float,
    ):
        self._clips, self._plans, self._fps_max, self._workers = clips, plans, fps_max, workers
        self._slow_clip_s, self._clip_timeout_s = slow_clip_s, clip_timeout_s

    def __len__(self) -> int:
        return len(self._plans)

    def __iter__(self) -> Iterator[Batch]:
        if not self._plans:
            return
        clips = sum(len(plan.indices) for plan in self._plans)
        decoded = decode_in_order(
            self._requests(),
            buckets={plan.bucket for plan in self._plans},
            workers=min(self._workers, math.ceil(clips / _CLIPS_FOR_A_WORKER)),
            slow_s=self._slow_clip_s,
            limit_s=self._clip_timeout_s,
        )
        with closing(decoded):
            for plan in self._plans:
                pixels, records = [], []
                for index, frames_THWC in zip(plan.indices, decoded, strict=False):
                    if isinstance(frames_THWC, UserError):
                        warnings.warn(f"left out of an evaluation: {frames_THWC}", stacklevel=2)
                    else:
                        pixels.append(torch.from_numpy(frames_THWC).permute(3, 0, 1, 2).contiguous())
                        records.append(self._clips[index])
                if records:
                    yield _batch(plan, records, to_signed(torch.stack(pixels)), self._fps_max)

    def _requests(self) -> Iterator[ClipRequest]:
        for plan in self._plans:
            for index in plan.indices:
                yield clip_request(self._clips[index], plan.bucket, None, fps_max=self._fps_max)


def evaluation_batches(
    clips: ClipIndex,
    buckets: BucketTable,
    *,
    multiple: int,
    batch_size: int | None = None,
    fps_max: float = 24,
    limit: int | None = None,
    workers: int = 1,
    slow_clip_s: float = 30.0,
    clip_timeout_s: float = 600.0,
) -> EvaluationBatches:
    """The clips of `evaluation_plans`, from their first frames on. Raises UserError when no clip fits.

    workers: processes at most; few clips get fewer. slow_clip_s, clip_timeout_s: seconds of waiting for a clip, after
    which its file and stage are said, and after which it is left out.
    """
    plans = evaluation_plans(clips, buckets, multiple=multiple, batch_size=batch_size, fps_max=fps_max, limit=limit)
    return EvaluationBatches(
        clips, plans, fps_max=fps_max, workers=workers, slow_clip_s=slow_clip_s, clip_timeout_s=clip_timeout_s
    )


def _numbered(device: torch.device) -> torch.device:
    """With its number: the pipeline's thread has a current device of its own."""
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def _batch(plan: BatchPlan, records: list[ClipRecord], video_BCTHW: Tensor, fps_max: float) -> Batch:
    return Batch(
        video_BCTHW=video_BCTHW,
        text=[record.text for record in records],
        fps=torch.tensor([thinned_fps(record.fps, fps_max) for record in records]),
        motion=[record.score_vmafmotion for record in records],
        paths=[record.path for record in records],
        plan=plan,
    )
