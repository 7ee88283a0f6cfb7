"""The memory of a loader, all of it taken before the first batch: slots to decode into, room to lay batches out in.

Clips decoded ahead wait in slots as uint8, in memory that the workers share; batches lie in memory that is pinned for
the device. Both are sized from the buckets that some clip of the index can reach, so that the largest batch always
fits, and neither grows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from opensora_fast.errors import UserError
from opensora_fast.host_memory import HostMemory
from opensora_fast.train.bucket_sampler import BucketSampler
from opensora_fast.train.buckets import Bucket, reachable
from opensora_fast.train.decode_workers import slot_bytes
from opensora_fast.train.index import ClipIndex
from opensora_fast.train.pinned_pool import PinnedPool, block_bytes

_GIB = 2**30
_PINNED = "--data.pinned_gib"
_WORKERS, _PREFETCH = "--data.workers", "--data.prefetch"
_BATCH_SIZES, _SIZES = "the batch sizes of --data.buckets", "the resolutions or frames of --data.buckets"
_LEAST_BATCHES = 3
"""The batch that is trained on, the next one, and as much again: wherever the one lies, a gap is left for the other."""


@dataclass(frozen=True, kw_only=True)
class BatchMemory:
    """slots: pool over `shared`, which workers map.  batches: pool over memory that is pinned for a CUDA device."""

    shared: HostMemory
    slots: PinnedPool
    batches: PinnedPool
    pinned_bytes: int


def take_memory(
    clips: ClipIndex,
    sampler: BucketSampler,
    *,
    workers: int,
    prefetch: int,
    pinned_gib: float,
    device: torch.device,
    dtype: torch.dtype,
) -> BatchMemory:
    """Memory for `prefetch` batches ahead of the trainer and for what `workers` decode meanwhile.

    pinned_gib: GiB to lay batches out in; 0 for as much as is needed, prefetch + 2 of the largest batch.
    Raises UserError when the largest batch does not fit, or the system does not give the memory.
    """
    buckets = reachable(clips, sampler.table, multiple=sampler.multiple, fps_max=sampler.fps_max)
    largest = max(map(_batch_elements, buckets)) * dtype.itemsize
    least = _LEAST_BATCHES * block_bytes(largest)
    pinned_bytes = int(pinned_gib * _GIB) or (prefetch + 2) * block_bytes(largest)
    if pinned_bytes < least:
        enough = math.ceil(least / _GIB * 10_000) / 10_000
        raise UserError(
            f"data.pinned_gib={pinned_gib:g}: the largest batch takes {largest / _GIB:.4f} GiB, and {_LEAST_BATCHES} "
            f"must fit; raise {_PINNED} to {enough} or more, or lower the batch sizes of --data.buckets"
        )
    shared_bytes, shared_setting = max(_slots_of(bucket, workers, prefetch) for bucket in buckets)
    shared = HostMemory(shared_bytes, shared=True, setting=shared_setting)
    pinned_setting = _PINNED if pinned_gib else _either(_PREFETCH if prefetch > 1 else None, _BATCH_SIZES)
    pinned = HostMemory(pinned_bytes, device=device, setting=pinned_setting)
    return BatchMemory(
        shared=shared,
        slots=PinnedPool(shared, largest=max(map(_slot_bytes, buckets)), setting=shared_setting),
        batches=PinnedPool(pinned, largest=largest, setting=_PINNED),
        pinned_bytes=pinned_bytes,
    )


def _slots_of(bucket: Bucket, workers: int, prefetch: int) -> tuple[int, str]:
    """Bytes of slots that batches of one bucket need, and the settings that make them fewer."""
    own = _BATCH_SIZES if bucket.batch_size > 1 else _SIZES
    slots, setting = max(
        # Two for each clip of a batch: a gap is left for every one, however what came before it lies.
        (2 * bucket.batch_size, own),
        (prefetch * bucket.batch_size, _either(_PREFETCH if prefetch > 1 else None, own)),
        (2 * workers + bucket.batch_size, _either(_WORKERS if workers > 1 else None, own)),
    )
    return slots * block_bytes(_slot_bytes(bucket)), setting


def _either(setting: str | None, other: str) -> str:
    return f"{setting} or {other}" if setting else other


def _batch_elements(bucket: Bucket) -> int:
    return bucket.batch_size * 3 * bucket.frames * bucket.height * bucket.width


def _slot_bytes(bucket: Bucket) -> int:
    return slot_bytes(bucket.frames, bucket.height, bucket.width)
