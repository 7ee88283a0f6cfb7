"""Batches without end, and a state that resumes them exactly.

    BucketSampler   which clips make the next batch          cheap, in order, no files
    ClipLoader      decodes them, ahead and in parallel      torch's DataLoader is the engine

An epoch assigns every clip to a bucket, shuffles, and cuts each bucket into batches; what is left over waits for the
next epoch's shuffle.  A bucket with too few clips for one batch is filled by repeating them, from other starts, so that
a small data set trains too.  The order of an epoch's batches does not depend on the number of ranks: at each step rank
r of R takes the r-th of the next R batches, and fewer than R at the end are left out (or repeated, should the epoch
have no more).  So a state, which counts the batches handed out to all ranks, resumes at any number of ranks.

Workers are processes, so that a damaged file that crashes FFmpeg, or leaks memory in it, ends the run with an error
that names the batch's files, and the checkpoints stay good.  Threads would be no faster: FFmpeg works outside the
interpreter's lock, and two threads and two processes decode equally many clips per second (3.4 of 49 frames, 720p, on
two busy cores).  workers=0 decodes in the training process, which is right where no core is idle anyway.

Shapes   B clips, C = 3, T frames, H height, W width.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from opensora_fast.errors import UserError
from opensora_fast.train.buckets import Bucket, BucketTable, Draw, assign, misfits, thinned_fps, validate_buckets
from opensora_fast.train.dataset import decode_clip
from opensora_fast.train.index import ClipIndex
from opensora_fast.video_io import to_signed


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """One batch before decoding: positions in the index, and the size that its clips are brought to."""

    bucket: Bucket
    indices: tuple[int, ...]
    epoch: int


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Decoded clips.  Files that could not be read are missing from it; `plan` still names them."""

    video_BCTHW: Tensor
    """float32 in [-1, 1]"""
    text: list[str]
    fps: Tensor
    """float32 [B], frames per second of these frames (after thinning); 0 for images"""
    motion: list[float | None]
    paths: list[str]
    plan: BatchPlan


class BucketSampler:
    """One rank's share of the batches, epoch after epoch; see the module for the rules.

    multiple: what height and width must divide by (autoencoder's spatial compression x patch size).
    misfits: {reason: clips} that no bucket can ever take.
    Raises UserError when no clip fits any bucket.
    """

    def __init__(
        self,
        clips: ClipIndex,
        buckets: BucketTable,
        *,
        multiple: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        fps_max: float = 24,
    ):
        validate_buckets(buckets)
        if seed < 0:
            raise UserError(f"seed={seed}: use 0 or more")
        self.misfits = _require_fitting(clips, buckets, multiple=multiple, fps_max=fps_max)
        self.seed, self.fps_max = seed, fps_max
        self._clips, self._table, self._multiple = clips, buckets, multiple
        self._rank, self._world_size = rank, world_size
        self._inputs = self._digest()
        self._open_epoch(0)

    def __iter__(self) -> Iterator[BatchPlan]:
        return self

    def __next__(self) -> BatchPlan:
        while not self._whole_step_left():
            self._open_epoch(self._epoch + 1)
        place = self._order[(self._handed_out + self._rank) % len(self._order)]
        self._handed_out += self._world_size
        bucket = self._buckets[self._bucket_of_batch[place]]
        first = self._first_of_batch[place]
        indices = tuple(self._members[first : first + bucket.batch_size].tolist())
        return BatchPlan(bucket=bucket, indices=indices, epoch=self._epoch)

    def state_dict(self) -> dict:
        """Names the next batch; JSON-ready.  Equal on all ranks that have taken equally many."""
        return {"epoch": self._epoch, "handed_out": self._handed_out, "inputs": self._inputs}

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state` was taken.

        When clips, buckets or seed differ from those of the state, its epoch's order no longer exists: that epoch is
        left unfinished, with a warning.
        """
        same = state["inputs"] == self._inputs
        self._open_epoch(state["epoch"] if same else state["epoch"] + 1)
        if same:
            self._handed_out = state["handed_out"]
        else:
            warnings.warn(
                f"clips, buckets or seed differ from those of the saved state: epoch {state['epoch']} is left "
                f"unfinished and training goes on with epoch {state['epoch'] + 1}",
                stacklevel=2,
            )

    def _whole_step_left(self) -> bool:
        left = len(self._order) - self._handed_out
        return left >= self._world_size or (left > 0 and self._handed_out == 0)

    def _open_epoch(self, epoch: int) -> None:
        draw = Draw(seed=self.seed, epoch=epoch)
        buckets, bucket_of_N = assign(self._clips, self._table, draw, multiple=self._multiple, fps_max=self.fps_max)
        shuffled = draw.of("clips").permutation(len(self._clips))
        shuffled = shuffled[bucket_of_N[shuffled] >= 0]
        grouped = shuffled[np.argsort(bucket_of_N[shuffled], kind="stable")]
        members: list[np.ndarray] = []
        bucket_of_batch: list[np.ndarray] = []
        used, starts = np.unique(bucket_of_N[grouped], return_index=True)
        for bucket, clips in zip(used, np.split(grouped, starts[1:]), strict=False):
            batches = max(1, len(clips) // buckets[bucket].batch_size)
            members.append(np.resize(clips, batches * buckets[bucket].batch_size))  # repeats where there are too few
            bucket_of_batch.append(np.full(batches, bucket))
        nothing = np.zeros(0, np.int64)
        self._epoch, self._handed_out, self._buckets = epoch, 0, buckets
        self._members = np.concatenate([nothing, *members])
        self._bucket_of_batch = np.concatenate([nothing, *bucket_of_batch])
        batch_sizes = np.array([bucket.batch_size for bucket in buckets])[self._bucket_of_batch]
        self._first_of_batch = np.cumsum(batch_sizes) - batch_sizes
        self._order = draw.of("batches").permutation(len(batch_sizes))

    def _digest(self) -> str:
        """Of everything that the order depends on."""
        settings = [self.seed, self._table, self._multiple, self.fps_max]
        digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8)
        for column in (self._clips.num_frames, self._clips.height, self._clips.width, self._clips.fps):
            digest.update(np.ascontiguousarray(column).tobytes())
        return digest.hexdigest()


class ClipLoader:
    """Iterates decoded batches of `sampler`'s plans, without end.

    workers: processes that decode; 0 decodes in this one.  prefetch: batches that each of them works ahead.
    device: where batches are put; to a CUDA device they are copied asynchronously from pinned memory.
    skipped: {path: reason} of files that could not be read so far.  They are left out of their batches; a batch of
    which nothing remains is passed over, so that this rank's state runs ahead of the others': save one for each rank.
    Raises UserError when a whole epoch gives nothing, RuntimeError naming the files when a worker dies or fails.
    """

    def __init__(
        self,
        clips: ClipIndex,
        sampler: BucketSampler,
        *,
        workers: int = 0,
        prefetch: int = 2,
        device: torch.device | str = "cpu",
    ):
        self.skipped: dict[str, str] = {}
        self._clips, self._sampler = clips, sampler
        self._workers, self._prefetch, self._device = workers, prefetch, torch.device(device)
        self._state = sampler.state_dict()
        self._in_flight: deque[tuple[BatchPlan, dict]] = deque()
        self._decoded: Iterator[_Decoded] | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._decoded is None:
            self._decoded = self._start()
        first_epoch = None
        while True:
            decoded = self._next_decoded(self._decoded)
            plan, self._state = self._in_flight.popleft()
            self.skipped.update(decoded.skipped)
            if decoded.pixels_BCTHW is not None:
                return decoded.batch(self._device)
            first_epoch = plan.epoch if first_epoch is None else first_epoch
            if plan.epoch > first_epoch + 1:
                reason = next(iter(decoded.skipped.values()))
                raise UserError(f"no clip of epoch {first_epoch + 1} could be read; the last: {reason}")

    def state_dict(self) -> dict:
        """The state after the last batch handed out, whatever has been decoded ahead; JSON-ready."""
        return self._state

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state` was taken; what has been decoded ahead is dropped."""
        self._sampler.load_state_dict(state)
        self._state = self._sampler.state_dict()
        self.close()

    def close(self) -> None:
        """Stop the workers and drop what they have decoded ahead; iterating starts new ones.  The state is kept."""
        self._decoded = None  # DataLoader's iterator stops its workers when it goes
        self._in_flight.clear()
        self._sampler.load_state_dict(self._state)

    def _start(self) -> Iterator[_Decoded]:
        several = self._workers > 0
        return iter(
            DataLoader(
                _Decoding(self._clips, self._sampler.seed, self._sampler.fps_max),
                sampler=self._recorded_plans(),
                batch_size=None,
                num_workers=self._workers,
                prefetch_factor=self._prefetch if several else None,
                pin_memory=self._device.type == "cuda",
                collate_fn=_unchanged,
                worker_init_fn=_leave_process_group,
                generator=torch.Generator(),  # the default one would draw from the run's own random stream
            )
        )

    def _recorded_plans(self) -> Iterator[BatchPlan]:
        """The sampler's plans, each noted together with the state that follows it."""
        for plan in self._sampler:
            self._in_flight.append((plan, self._sampler.state_dict()))
            yield plan

    def _next_decoded(self, decoded: Iterator[_Decoded]) -> _Decoded:
        try:
            return next(decoded)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            paths = sorted({self._clips[index].path for plan, _ in self._in_flight for index in plan.indices})
            shown = ", ".join(paths[:8]) + (f" and {len(paths) - 8} more" if len(paths) > 8 else "")
            raise UserError(f"a loader worker died while decoding one of {shown}: drop the broken one") from error


class EvaluationBatches:
    """A fixed list of batches, decoded anew each time it is iterated; see `evaluation_batches`.

    Files that cannot be read are left out with a warning that names them.
    """

    def __init__(self, decoding: _Decoding, plans: list[BatchPlan]):
        self._decoding, self._plans = decoding, plans

    def __len__(self) -> int:
        return len(self._plans)

    def __iter__(self) -> Iterator[Batch]:
        for plan in self._plans:
            decoded = self._decoding[plan]
            for reason in decoded.skipped.values():
                warnings.warn(f"left out of an evaluation: {reason}", stacklevel=2)
            if decoded.pixels_BCTHW is not None:
                yield decoded.batch(torch.device("cpu"))


def evaluation_batches(
    clips: ClipIndex,
    buckets: BucketTable,
    *,
    multiple: int,
    batch_size: int | None = None,
    fps_max: float = 24,
    limit: int | None = None,
) -> EvaluationBatches:
    """One pass over (the first `limit`) clips that fit, always the same: in order, from their first frames.

    Each clip takes the first bucket that fits and has a positive chance.  batch_size replaces that of the buckets.
    Raises UserError when no clip fits.
    """
    _require_fitting(clips, buckets, multiple=multiple, fps_max=fps_max)
    listed, bucket_of_N = assign(clips, buckets, None, multiple=multiple, fps_max=fps_max)
    if limit is not None:
        bucket_of_N[np.flatnonzero(bucket_of_N >= 0)[limit:]] = -1
    plans = []
    for number in np.unique(bucket_of_N[bucket_of_N >= 0]):
        members = np.flatnonzero(bucket_of_N == number).tolist()
        step = batch_size or listed[number].batch_size
        for first in range(0, len(members), step):
            indices = tuple(members[first : first + step])
            plans.append(BatchPlan(bucket=listed[number], indices=indices, epoch=0))
    return EvaluationBatches(_Decoding(clips, None, fps_max), plans)


@dataclass(frozen=True, kw_only=True)
class _Decoded:
    """What a worker sends: a batch with uint8 pixels, None if no clip of it could be read."""

    plan: BatchPlan
    pixels_BCTHW: Tensor | None
    text: list[str]
    fps: Tensor
    motion: list[float | None]
    paths: list[str]
    skipped: dict[str, str]

    def pin_memory(self) -> _Decoded:
        """Called by DataLoader."""
        return self if self.pixels_BCTHW is None else replace(self, pixels_BCTHW=self.pixels_BCTHW.pin_memory())

    def batch(self, device: torch.device) -> Batch:
        assert self.pixels_BCTHW is not None
        return Batch(
            video_BCTHW=to_signed(self.pixels_BCTHW.to(device, non_blocking=True)),
            text=self.text,
            fps=self.fps,
            motion=self.motion,
            paths=self.paths,
            plan=self.plan,
        )


class _Decoding(Dataset):
    """plan -> decoded batch; runs in the workers.  seed=None takes first frames."""

    def __init__(self, clips: ClipIndex, seed: int | None, fps_max: float):
        self._clips, self._seed, self._fps_max = clips, seed, fps_max

    def __getitem__(self, plan: BatchPlan) -> _Decoded:
        draw = None if self._seed is None else Draw(seed=self._seed, epoch=plan.epoch)
        pixels, records, skipped = [], [], {}
        for slot, index in enumerate(plan.indices):
            repeat = plan.indices[:slot].count(index)
            record = self._clips[index]
            try:
                pixels.append(decode_clip(record, plan.bucket, draw, index, repeat, fps_max=self._fps_max))
            except UserError as error:
                skipped[record.path] = str(error)
            except Exception as error:
                raise RuntimeError(f"{record.path}: {type(error).__name__} while decoding: {error}") from error
            else:
                records.append(record)
        return _Decoded(
            plan=plan,
            pixels_BCTHW=torch.stack(pixels) if pixels else None,
            text=[record.text for record in records],
            fps=torch.tensor([thinned_fps(record.fps, self._fps_max) for record in records]),
            motion=[record.score_vmafmotion for record in records],
            paths=[record.path for record in records],
            skipped=skipped,
        )


def _require_fitting(clips: ClipIndex, buckets: BucketTable, *, multiple: int, fps_max: float) -> dict[str, int]:
    """The misfits, if they are not all there is."""
    reasons = misfits(clips, buckets, multiple=multiple, fps_max=fps_max)
    if sum(reasons.values()) == len(clips):
        said = "; ".join(f"{count} {reason}" for reason, count in reasons.items()) or "the index is empty"
        wanted = "; ".join(f"{resolution} at {sorted(by_frames)} frames" for resolution, by_frames in buckets.items())
        raise UserError(f"no clip fits a bucket ({said}): add clips or change data.buckets (now {wanted or 'none'})")
    return reasons


def _unchanged(decoded: Any) -> Any:
    return decoded


def _leave_process_group(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM go to the whole group; the trainer must get to save first, and then ends us."""
    os.setpgrp()
