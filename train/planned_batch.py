"""One batch on its way to the trainer, from its plan to its tensor, and what it waits for meanwhile.

stage   queued     its clips wait for slots and workers, or are being decoded
        collate    decoded: waits for pinned memory, or is being laid out there
        copy       laid out: waits for its copy to the device, or is ready
        failed     cannot be made
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from opensora_fast.train.bucket_sampler import BatchPlan
from opensora_fast.train.collate import Ticket
from opensora_fast.train.decode_watch import Sight
from opensora_fast.train.decode_workers import Job
from opensora_fast.train.index import ClipRecord

_NAMED = 3  # files that a report names
_LIMIT = "raise --data.batch_timeout_s"


@dataclass(frozen=True, kw_only=True)
class Delay:
    """What a batch waits for (files, stages and seconds), and what the user can do about it; a line each."""

    reason: str
    remedy: str = _LIMIT


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
    failure: Exception | None = None
    """why there is no such batch"""
    ready: bool = False
    """to be handed out, or its failure raised"""
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

    def delay(self, sights: list[tuple[Job, Sight | None]]) -> Delay:
        """Why it is not ready, while all before it are; sights: of all jobs that are not finished."""
        files = _listed([record.path for record in self.records])
        if self.stage == "collate" and self.video_BCTHW is None:
            return Delay(
                reason=f"{files}: decoded, but the batches before still hold all pinned memory",
                remedy="keep fewer batches, or raise --data.pinned_gib",
            )
        if self.stage != "queued":
            return Delay(reason=f"{files} in stage {self.stage} for {time.monotonic() - self.since:.0f} s")
        if not self.undecoded:
            return Delay(reason=f"{files}: decoded, to be laid out next")
        own, missing = set(self.jobs), len(self.records) - len(self.jobs)
        begun = [(job, sight) for job, sight in sights if sight]
        at_own = [_seen(job, sight) for job, sight in begun if job in own]
        others = [_seen(job, sight) for job, sight in begun if job not in own]
        remedy = f"leave the file out, or {_LIMIT}" if begun else _LIMIT
        if at_own:
            return Delay(reason=_listed(at_own), remedy=remedy)
        waits = f"{missing} of {len(self.records)} clips wait for slots that later ones hold" if missing else "queued"
        meanwhile = f"; the workers are at {_listed(others)}" if others else ""
        return Delay(reason=f"{files}: {waits}{meanwhile}", remedy=remedy)


def _seen(job: Job, sight: Sight) -> str:
    return f"{job.request.path} in stage {sight.stage} for {sight.seconds:.0f} s"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
