"""Batches without end from a cache: the order and the state of `ClipLoader`, without decoding and encoding.

A thread reads rows into pinned memory, some batches ahead, and sends each batch to the device on a stream of its own:
the trainer's stream waits for an event, nobody for the device. Without a GPU the memory's tensors are the batch.

A clip that has no row because it was dropped is left out; a batch of which nothing remains is replaced by the next of
the epoch's order, as `bucket_sampler` says, so that the state does not depend on what was dropped.

B clips, T frames, H height, W width in pixels.
"""

from __future__ import annotations

import itertools
import math
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from queue import SimpleQueue

import torch
from torch import Tensor

from opensora_fast.errors import UserError
from opensora_fast.host_memory import HostMemory
from opensora_fast.train.bucket_sampler import BatchPlan, BucketSampler, evaluation_plans
from opensora_fast.train.buckets import reachable, thinned_fps
from opensora_fast.train.cache_plan import Clips, plan_cache
from opensora_fast.train.cache_reader import EncodedBatch, EncoderCache, Rows, RowSpecs, size_of
from opensora_fast.train.cache_settings import conditions_of
from opensora_fast.train.cache_store import REPORT
from opensora_fast.train.config import DataSection, DiffusionRecipe
from opensora_fast.train.loader import Batch
from opensora_fast.train.pinned_pool import PinnedPool, block_bytes

_GIB = 2**30
_SPARE = 2  # batches in memory beside those read ahead
_LEAST_BATCHES = 3  # the one that is trained on, the next one, and as much again for gaps between them
_POLL_S = 0.1  # how soon a reader that waits for memory sees that it is to stop


def cached_feeds(
    cache: EncoderCache, recipe: DiffusionRecipe, *, multiple: int, device: torch.device
) -> tuple[CachedLoader, Iterable[Batch]]:
    """Endless batches to train on, and a fixed pass over held-out clips. `multiple`: what sides of frames divide by.

    Raises UserError when the cache lacks what they read, or the memory cannot be had.
    """
    data, conditions = recipe.data, conditions_of(recipe)
    plan = plan_cache(data, multiple=multiple)
    cache.require(plan, recipe)
    specs = cache.specs(plan.groups, conditions)
    if not specs:
        raise UserError(
            f"data.cache={cache.folder} holds no clip: all were dropped, {REPORT} there says why; mend them"
        )
    train, *heldout = plan.sources
    sampler = BucketSampler(train.clips, data.buckets, multiple=multiple, seed=recipe.loop.seed, fps_max=data.fps_max)
    for cause, count in sampler.misfits.items():
        print(f"{data.index}: {count} of {len(train.clips)} clips are not used: {cause}")
    loader = CachedLoader(cache, train, sampler, specs, data, device=device)
    print(loader.describe())
    batches = [
        CachedEvaluation(
            cache,
            source,
            evaluation_plans(source.clips, data.buckets, multiple=multiple, fps_max=data.fps_max),
            specs,
        )
        for source in heldout
    ]
    return loader, batches[0] if batches else []


class CachedLoader:
    """Iterates batches of `sampler`'s plans, without end; `specs` are `EncoderCache.specs` of its clips.

    skipped: {path: reason} of clips without a row that were to be in a batch.
    The tensors of a batch lie in memory that is used again when the last of them is gone.
    Raises UserError when the memory cannot be had, when no clip of an epoch has a row, and naming a shard that is
    damaged or cannot be read. These last two come in the batch's turn, and again from every call after that, until the
    loader is closed or its state is loaded.
    """

    def __init__(
        self,
        cache: EncoderCache,
        source: Clips,
        sampler: BucketSampler,
        specs: dict[tuple[int, int, int], RowSpecs],
        data: DataSection,
        *,
        device: torch.device | str = "cpu",
        say: Callable[[str], None] = print,
    ):
        self.skipped: dict[str, str] = {}
        self._cache, self._source, self._sampler, self._data, self._say = cache, source, sampler, data, say
        self._device = torch.device(device)
        self._specs = specs
        self._null = cache.null()
        self._pool, self._bytes = self._take_memory()
        self._state = sampler.state_dict()
        self._ahead: deque[_Planned] = deque()
        self._reader: _Reader | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._reader is None:
            self._reader = _Reader(self._cache, self._specs, self._null, self._pool, self._device)
            self._close_reader = weakref.finalize(self, self._reader.close)
        self._read_ahead(self._reader)
        planned = self._ahead[0]
        encoded = self._waited_for(planned, self._reader)
        self._ahead.popleft()
        self._read_ahead(self._reader)
        self._state = planned.state
        self.skipped.update(planned.skipped)
        return _batch(planned.rows, encoded, self._sampler.fps_max)

    def state_dict(self) -> dict:
        """The state after the last batch handed out, whatever has been read ahead; JSON-ready."""
        return self._state

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state` was taken; what has been read ahead is dropped."""
        self.close()
        self._sampler.load_state_dict(state)
        self._state = self._sampler.state_dict()

    def close(self) -> None:
        """Stop reading and drop what has been read ahead; iterating starts anew. The state is kept."""
        if self._reader is not None:
            self._close_reader()
            self._reader = None
            self._ahead.clear()
            self._sampler.load_state_dict(self._state)

    def describe(self) -> str:
        """What is read, and into how much memory; one line."""
        kind = "pinned memory" if self._device.type == "cuda" else "memory"
        return f"batches are read from {self._cache.folder} into {self._bytes / 2**20:.1f} MiB of {kind}"

    def _take_memory(self) -> tuple[PinnedPool, int]:
        sampler, given = self._sampler, self._data.pinned_gib
        setting = "--data.pinned_gib" if given else "--data.prefetch or the batch sizes of --data.buckets"
        buckets = reachable(self._source.clips, sampler.table, multiple=sampler.multiple, fps_max=sampler.fps_max)
        sizes = [(self._specs.get(size_of(bucket)), bucket.batch_size) for bucket in buckets]
        largest = max(block_bytes(specs.bytes(count)) for specs, count in sizes if specs is not None)
        size = int(given * _GIB) or (self._data.prefetch + _SPARE) * largest
        if size < _LEAST_BATCHES * largest:
            enough = math.ceil(_LEAST_BATCHES * largest / _GIB * 10_000) / 10_000
            raise UserError(
                f"data.pinned_gib={given:g}: the largest batch takes {largest / _GIB:.4f} GiB, and {_LEAST_BATCHES} "
                f"must fit; raise {setting} to {enough} or more"
            )
        return PinnedPool(
            HostMemory(size, device=self._device, setting=setting), largest=largest, setting=setting
        ), size

    def _read_ahead(self, reader: _Reader) -> None:
        while len(self._ahead) < self._data.prefetch:
            plan = next(self._sampler)
            planned = self._planned(plan, self._sampler.state_dict())
            if planned.failure is None:
                reader.submit(planned)
            self._ahead.append(planned)

    def _planned(self, plan: BatchPlan, state: dict) -> _Planned:
        """`plan`, or what stands in for it where none of its clips has a row; a failure where nothing can."""
        skipped: dict[str, str] = {}
        for candidate in itertools.chain([plan], self._sampler.stand_ins(plan)):
            rows = self._cache.rows(self._source, candidate)
            skipped |= rows.dropped
            if rows.records:
                return _Planned(rows, state, skipped)
        planned, (path, reason) = _Planned(rows, state, skipped), next(iter(skipped.items()))
        planned.fail(
            UserError(
                f"no clip of epoch {plan.epoch + 1} is in the cache {self._cache.folder}; {path} is not: {reason}"
            )
        )
        return planned

    def _waited_for(self, planned: _Planned, reader: _Reader) -> EncodedBatch:
        """The batch; a long wait is reported once, and ends with the limit."""
        slow, limit = self._data.slow_batch_s, self._data.batch_timeout_s
        if slow < limit and not planned.done.wait(slow):
            self._say(f"a batch is late, {slow:g} s so far: {reader.doing}")
        if not planned.done.wait(max(0.0, limit - slow) if slow < limit else limit):
            raise UserError(
                f"no batch came within data.batch_timeout_s={limit:g}: {reader.doing}; mend that, or raise "
                "--data.batch_timeout_s"
            )
        return planned.result()


class CachedEvaluation:
    """A fixed list of batches from a cache; dropped clips are left out with a warning that names them."""

    def __init__(
        self,
        cache: EncoderCache,
        source: Clips,
        plans: list[BatchPlan],
        specs: dict[tuple[int, int, int], RowSpecs],
    ):
        self._cache, self._source, self._plans, self._specs = cache, source, plans, specs
        self._null = cache.null()

    def __len__(self) -> int:
        return len(self._plans)

    def __iter__(self) -> Iterator[Batch]:
        for plan in self._plans:
            rows = self._cache.rows(self._source, plan)
            for path, reason in rows.dropped.items():
                warnings.warn(f"left out of an evaluation: {path}: {reason}", stacklevel=2)
            if rows.records:
                specs = self._specs[size_of(plan.bucket)]
                memory = torch.empty(specs.bytes(len(rows.records)), dtype=torch.uint8)
                yield _batch(rows, self._cache.read(rows, specs, self._null, memory), self._cache.settings.fps_max)


class _Planned:
    """A batch on its way: what it is of, the state behind it, and when `done` the batch or why there is none."""

    def __init__(self, rows: Rows, state: dict, skipped: dict[str, str]):
        self.rows, self.state, self.skipped = rows, state, skipped
        self.done = threading.Event()
        self.encoded: EncodedBatch | None = None
        self.copied: torch.cuda.Event | None = None
        self.failure: BaseException | None = None

    def fail(self, failure: BaseException) -> None:
        self.failure = failure
        self.done.set()

    def result(self) -> EncodedBatch:
        """For use on the current stream."""
        if self.failure is not None:
            raise self.failure
        assert self.encoded is not None
        if self.copied is not None:
            stream = torch.cuda.current_stream(self.encoded.latent_BCTHW.device)
            stream.wait_event(self.copied)
            for tensor in self.encoded.tensors():
                tensor.record_stream(stream)  # its memory is the copying stream's: not to be reused too early
        return self.encoded


class _Reader:
    """The thread that reads batches, in the order in which they are submitted."""

    def __init__(
        self,
        cache: EncoderCache,
        specs: dict[tuple[int, int, int], RowSpecs],
        null: tuple[Tensor, Tensor],
        pool: PinnedPool,
        device: torch.device,
    ):
        self.doing = "nothing was asked for yet"
        self._cache, self._specs, self._pool, self._device = cache, specs, pool, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._null = (null[0].to(device), null[1].to(device))
        self._on_the_way: deque[tuple[torch.cuda.Event, Tensor]] = deque()
        self._submitted: SimpleQueue[_Planned | None] = SimpleQueue()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="cache reader", daemon=True)
        self._thread.start()

    def submit(self, planned: _Planned) -> None:
        self._submitted.put(planned)

    def close(self) -> None:
        """Fail what has not been read."""
        self._stopping = True
        self._submitted.put(None)
        if threading.current_thread() is not self._thread:  # where a garbage collection there finds the loader
            self._thread.join()

    def _run(self) -> None:
        while (planned := self._submitted.get()) is not None:
            try:
                self._read(planned)
                planned.done.set()
            except BaseException as failure:
                planned.fail(failure)
            del planned  # or its memory would be kept until the next one comes
        for copied, _ in self._on_the_way:  # their memory is about to be used for something else
            copied.synchronize()

    def _read(self, planned: _Planned) -> None:
        specs = self._specs[size_of(planned.rows.plan.bucket)]
        memory = self._memory(specs.bytes(len(planned.rows.records)))
        encoded = self._cache.read(planned.rows, specs, self._null, memory, self._tell)
        if self._stream is None:
            planned.encoded = encoded
            return
        self.doing = "copying to the device"
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            planned.encoded = encoded.to(self._device)
            planned.copied = self._stream.record_event()
        self._on_the_way.append((planned.copied, memory))

    def _memory(self, size: int) -> Tensor:
        """Raises RuntimeError when it is time to stop."""
        self.doing = "waiting for memory, all of which the batches in use hold"
        while not self._stopping:
            while self._on_the_way and self._on_the_way[0][0].query():
                self._on_the_way.popleft()
            block = self._pool.take(size, timeout=_POLL_S)
            if block is not None:
                return block.tensor(torch.uint8, [size])
        raise RuntimeError("the loader was closed before the batch was read")

    def _tell(self, path: Path) -> None:
        self.doing = f"reading {path}"


def _batch(rows: Rows, encoded: EncodedBatch, fps_max: float) -> Batch:
    bucket = rows.plan.bucket
    # pixels without memory: their shape is all that is asked for
    shape = (len(rows.records), 3, bucket.frames, bucket.height, bucket.width)
    return Batch(
        video_BCTHW=torch.empty(shape, device="meta"),
        text=[record.text for record in rows.records],
        fps=torch.tensor([thinned_fps(record.fps, fps_max) for record in rows.records]),
        motion=[record.score_vmafmotion for record in rows.records],
        paths=[record.path for record in rows.records],
        plan=rows.plan,
        encoded=encoded,
    )
