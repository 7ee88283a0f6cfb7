"""Which clips make the next batch: in order, without end, cheap, and no file is opened.

An epoch assigns every clip to a bucket, shuffles, and cuts each bucket into batches; what is left over waits for the
next epoch's shuffle.  A bucket with too few clips for one batch is filled by repeating them, from other starts, so that
a small data set trains too.

Batches are numbered through all epochs: the order has no end, and does not depend on the number of ranks.  At step s
rank r of R takes batch s * R + r, so one step may take the last batches of an epoch and the first of the next, and none
is left out or taken twice.  A state says how many batches all ranks have taken together; it resumes on any number of
ranks, and which clips have been seen depends on that count alone.

A batch of which no file can be read is replaced by one of its `stand_ins`, the batches that follow it in the epoch's
order.  The state takes no notice: every batch keeps its number, and which clips an epoch shows stays a matter of the
clips alone.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from opensora_fast.errors import UserError
from opensora_fast.train.buckets import Bucket, BucketTable, Draw, assign, misfits, validate_buckets
from opensora_fast.train.index import ClipIndex


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """One batch before decoding: positions in the index, and the size that its clips are brought to."""

    bucket: Bucket
    indices: tuple[int, ...]
    epoch: int
    place: int = 0
    """in the epoch's order of batches"""


@dataclass(frozen=True, kw_only=True)
class _Epoch:
    """An epoch's batches: number b, of bucket buckets[bucket_of_batch[b]], begins at members[first_of_batch[b]]."""

    number: int
    buckets: list[Bucket]
    members: np.ndarray
    bucket_of_batch: np.ndarray
    first_of_batch: np.ndarray
    order: np.ndarray

    def plan(self, place: int) -> BatchPlan:
        batch = self.order[place]
        bucket = self.buckets[self.bucket_of_batch[batch]]
        first = self.first_of_batch[batch]
        indices = tuple(self.members[first : first + bucket.batch_size].tolist())
        return BatchPlan(bucket=bucket, indices=indices, epoch=self.number, place=int(place))


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
        self.table, self.multiple, self.seed, self.fps_max = buckets, multiple, seed, fps_max
        self._clips = clips
        self._rank, self._world_size = rank, world_size
        self._inputs = self._digest()
        self._orders: dict[int, _Epoch] = {}
        self._go_to(0, 0)

    def __iter__(self) -> Iterator[BatchPlan]:
        return self

    def __next__(self) -> BatchPlan:
        epoch, place = self._epoch, self._handed_out + self._rank
        while place >= len(self._order(epoch).order):
            place -= len(self._order(epoch).order)
            epoch += 1
        plan = self._order(epoch).plan(place)
        self._go_to(self._epoch, self._handed_out + self._world_size)
        return plan

    def stand_ins(self, plan: BatchPlan) -> Iterator[BatchPlan]:
        """What may take the place of `plan`: all other batches of its epoch, from the one behind it in the order on."""
        epoch = self._orders.get(plan.epoch) or self._order_of(plan.epoch)
        for step in range(1, len(epoch.order)):
            yield epoch.plan((plan.place + step) % len(epoch.order))

    def state_dict(self) -> dict:
        """What all ranks have taken, when each has made as many steps: `handed_out` batches of `epoch`, all before it.

        JSON-ready, and the same on every rank and for every number of ranks that took as many batches.
        """
        return {"epoch": self._epoch, "handed_out": self._handed_out, "inputs": self._inputs}

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state` was taken.

        When clips, buckets or seed differ from those of the state, its epoch's order no longer exists: that epoch is
        left unfinished, with a warning.
        """
        if state["inputs"] == self._inputs:
            self._go_to(state["epoch"], state["handed_out"])
        else:
            self._go_to(state["epoch"] + 1, 0)
            warnings.warn(
                f"clips, buckets or seed differ from those of the saved state: epoch {state['epoch']} is left "
                f"unfinished and training goes on with epoch {state['epoch'] + 1}",
                stacklevel=2,
            )

    def _go_to(self, epoch: int, handed_out: int) -> None:
        """Behind the first `handed_out` batches from `epoch` on; named by the earliest epoch that has so many."""
        while handed_out > len(self._order(epoch).order):
            handed_out -= len(self._order(epoch).order)
            epoch += 1
        self._epoch, self._handed_out = epoch, handed_out
        self._orders = {number: order for number, order in self._orders.items() if number >= epoch}

    def _order(self, number: int) -> _Epoch:
        """That of an epoch that is not behind the state; kept until it is."""
        if number not in self._orders:
            self._orders[number] = self._order_of(number)
        return self._orders[number]

    def _order_of(self, number: int) -> _Epoch:
        draw = Draw(seed=self.seed, epoch=number)
        buckets, bucket_of_N = assign(self._clips, self.table, draw, multiple=self.multiple, fps_max=self.fps_max)
        shuffled = draw.of("clips").permutation(len(self._clips))
        shuffled = shuffled[bucket_of_N[shuffled] >= 0]
        grouped = shuffled[np.argsort(bucket_of_N[shuffled], kind="stable")]
        members: list[np.ndarray] = [np.zeros(0, np.int64)]
        bucket_of_batch: list[np.ndarray] = [np.zeros(0, np.int64)]
        used, starts = np.unique(bucket_of_N[grouped], return_index=True)
        for bucket, clips in zip(used, np.split(grouped, starts[1:]), strict=False):
            batches = max(1, len(clips) // buckets[bucket].batch_size)
            members.append(np.resize(clips, batches * buckets[bucket].batch_size))  # repeats where there are too few
            bucket_of_batch.append(np.full(batches, bucket))
        buckets_used = np.concatenate(bucket_of_batch)
        batch_sizes = np.array([bucket.batch_size for bucket in buckets])[buckets_used]
        return _Epoch(
            number=number,
            buckets=buckets,
            members=np.concatenate(members),
            bucket_of_batch=buckets_used,
            first_of_batch=np.cumsum(batch_sizes) - batch_sizes,
            order=draw.of("batches").permutation(len(batch_sizes)),
        )

    def _digest(self) -> str:
        """Of everything that the order depends on."""
        settings = [self.seed, self.table, self.multiple, self.fps_max]
        digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8)
        for column in (self._clips.num_frames, self._clips.height, self._clips.width, self._clips.fps):
            digest.update(np.ascontiguousarray(column).tobytes())
        return digest.hexdigest()


def evaluation_plans(
    clips: ClipIndex,
    buckets: BucketTable,
    *,
    multiple: int,
    batch_size: int | None = None,
    fps_max: float = 24,
    limit: int | None = None,
) -> list[BatchPlan]:
    """One pass over (the first `limit`) clips that fit, always the same: in order, for a draw of None.

    Each clip takes the first bucket that fits and has a positive chance.  batch_size replaces that of the buckets.
    Raises UserError when no clip fits.
    """
    _require_fitting(clips, buckets, multiple=multiple, fps_max=fps_max)
    listed, bucket_of_N = assign(clips, buckets, None, multiple=multiple, fps_max=fps_max)
    if limit is not None:
        bucket_of_N[np.flatnonzero(bucket_of_N >= 0)[limit:]] = -1
    plans: list[BatchPlan] = []
    for number in np.unique(bucket_of_N[bucket_of_N >= 0]):
        members = np.flatnonzero(bucket_of_N == number).tolist()
        step = batch_size or listed[number].batch_size
        for first in range(0, len(members), step):
            indices = tuple(members[first : first + step])
            plans.append(BatchPlan(bucket=listed[number], indices=indices, epoch=0, place=len(plans)))
    return plans


def _require_fitting(clips: ClipIndex, buckets: BucketTable, *, multiple: int, fps_max: float) -> dict[str, int]:
    """The misfits, if they are not all there is."""
    reasons = misfits(clips, buckets, multiple=multiple, fps_max=fps_max)
    if sum(reasons.values()) == len(clips):
        said = "; ".join(f"{count} {reason}" for reason, count in reasons.items()) or "the index is empty"
        wanted = "; ".join(f"{resolution} at {sorted(by_frames)} frames" for resolution, by_frames in buckets.items())
        raise UserError(f"no clip fits a bucket ({said}): add clips or change data.buckets (now {wanted or 'none'})")
    return reasons
