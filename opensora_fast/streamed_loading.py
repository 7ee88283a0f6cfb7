"""Weights from files to where they are used, a few rows at a time: no second copy of a model in host memory.

A parameter of ours is a stack of segments: rows of stored tensors, some of them reordered inside every head. Segments
are cut into blocks of at most BLOCK_BYTES. A block whose bytes are the parameter's goes from the file straight to its
place. Others, those for a device, of another dtype or to be reordered, pass through one of two slots of host memory:
while one is copied out of, the other is filled. For a CUDA device the slots are pinned and the copies run on a stream
of their own. So the host holds two slots, whatever the model's size.

Of a DTensor only the rows of the local shard are read (with the rest of the heads that it cuts, where heads are
reordered).

Shapes  K channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from opensora_fast.safetensors_file import Rows
from opensora_fast.weight_files import WeightFiles

BLOCK_BYTES = 2**25  # of a slot
ALIGNMENT = 64  # bytes, of a block in a slot


OnBytes = Callable[[int], None]


def no_report(count: int) -> None:
    """Of bytes that were read."""


class Segment(NamedTuple):
    """Rows of the stored tensor `key`, from `start`, as the next rows of a parameter.

    rows        how many; None: all that follow.
    head_shape  the channels of every head, seen as this [X, Y], are transposed: (K / 2, 2) turns interleaved pairs into
                half-split ones. None leaves the rows as they are.
    columns     the first column that is taken, and the one behind the last; None takes all.
    key None    rows of zeros, of which nothing is stored.
    """

    key: str | None
    start: int = 0
    rows: int | None = None
    head_shape: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None

    @property
    def unit(self) -> int:
        """Rows that stay together."""
        return math.prod(self.head_shape) if self.head_shape else 1


class Target(NamedTuple):
    """A parameter to fill, and the segments whose rows it is. Its leading axes may be several that count the rows."""

    parameter: Tensor
    segments: Sequence[Segment]


@dataclass(frozen=True)
class _Block:
    """Rows to read, and what they fill once reordered and narrowed to `skip` and the target's rows."""

    segment: Segment
    key: str
    start: int  # of the stored tensor
    rows: int
    skip: int
    target: Tensor
    columns: tuple[tuple[int, int], ...]  # offset and size per axis behind the first

    def place(self, stored: Tensor) -> None:
        """Copy what was read (on whatever device) to where it belongs."""
        if self.segment.head_shape:
            stored = stored.unflatten(0, (-1, *self.segment.head_shape)).transpose(1, 2).flatten(0, 2)
        stored = stored[self.skip : self.skip + self.target.shape[0]]
        for axis, (offset, size) in enumerate(self.columns, start=1):
            stored = stored.narrow(axis, offset, size)
        self.target.copy_(stored, non_blocking=True)


@torch.no_grad()
def load_segments(files: WeightFiles, targets: Iterable[Target], *, on_bytes: OnBytes = no_report) -> None:
    """Fill parameters, on any device and of any dtype, from their segments.

    The rows of a parameter's segments are those of the parameter, seen with its leading axes merged into one where it
    has more axes than its stored tensor. `on_bytes` is called with the bytes that were read, as reading goes on.
    Raises UserError when a file cannot be read; the parameters then hold anything.
    """
    blocks = (block for target in targets for block in _blocks(files, target))
    slots: dict[torch.device, _Slots] = {}
    try:
        for batch in _batches(files, blocks):
            direct = [block for block in batch if _in_place(files, block)]
            if direct:
                files.read_into([Rows(block.key, block.start, block.target) for block in direct])
            others: dict[torch.device, list[_Block]] = {}
            for block in batch:
                if not _in_place(files, block):
                    others.setdefault(block.target.device, []).append(block)
            for device, of_device in others.items():
                if device not in slots:
                    slots[device] = _Slots(device)
                slots[device].pass_on(files, of_device)
            on_bytes(sum(_bytes(files, block) for block in batch))
    finally:  # before the slots are given back
        for in_use in slots.values():
            in_use.finish()


@cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    """One for all that is loaded: what its temporaries took is kept for later ones of this stream alone."""
    return torch.cuda.Stream(device)


class _Slots:
    """Two pieces of host memory that blocks pass through in turn, and the stream that empties them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._slots: list[Tensor | None] = [None, None]
        self._turn = 0
        self._stream: torch.cuda.Stream | None = None
        self._emptied: list[torch.cuda.Event | None] = [None, None]
        if device.type == "cuda":
            self._stream = _stream_of(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def pass_on(self, files: WeightFiles, blocks: list[_Block]) -> None:
        views, place = [], 0
        slot = self._empty(sum(_aligned(_bytes(files, block)) for block in blocks))
        for block in blocks:
            bytes, spec = _bytes(files, block), files.specs[block.key]
            views.append(slot[place : place + bytes].view(spec.dtype).view(block.rows, *spec.shape[1:]))
            place += _aligned(bytes)
        files.read_into([Rows(block.key, block.start, view) for block, view in zip(blocks, views, strict=True)])
        with torch.cuda.stream(self._stream):
            for block, view in zip(blocks, views, strict=True):
                block.place(view.to(self._device, non_blocking=True) if _changed(files, block) else view)
        if self._stream is not None:
            self._emptied[self._turn] = event = torch.cuda.Event(blocking=True)
            event.record(self._stream)
        self._turn = 1 - self._turn

    def finish(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()

    def _empty(self, bytes: int) -> Tensor:
        """The slot whose turn it is, with room for so many bytes, once nothing is copied out of it any more."""
        if (event := self._emptied[self._turn]) is not None:
            event.synchronize()
        slot = self._slots[self._turn]
        if slot is None or slot.nbytes < bytes:
            self._slots[self._turn] = None  # given back before another is taken
            slot = torch.empty(max(bytes, BLOCK_BYTES), dtype=torch.uint8, pin_memory=self._stream is not None)
            self._slots[self._turn] = slot
        return slot


def _blocks(files: WeightFiles, target: Target) -> Iterator[_Block]:
    """The local rows of a parameter, cut so that a block is small."""
    parameter, (offset, *inner) = _local(target.parameter.detach())
    stored_ndims = [len(files.spec(segment.key).shape) for segment in target.segments if segment.key is not None]
    merged = parameter.ndim - max(stored_ndims, default=parameter.ndim)  # axes that count rows with the first
    if merged:
        offset *= math.prod(target.parameter.shape[1 : 1 + merged])
        parameter, inner = parameter.view(-1, *parameter.shape[1 + merged :]), inner[merged:]
    rows_before, first, end = 0, offset, offset + parameter.shape[0]
    for segment in target.segments:
        rows = _rows(files, segment)
        low, high = max(first, rows_before), min(end, rows_before + rows)
        if low < high and segment.key is None:
            parameter[low - first : high - first].zero_()
        elif low < high:
            yield from _cut(files, segment, rows_before, low, high, parameter[low - first : high - first], inner)
        rows_before += rows
    assert rows_before >= end, "the segments have fewer rows than the parameter"


def _cut(
    files: WeightFiles, segment: Segment, before: int, low: int, high: int, target: Tensor, inner: Sequence[int]
) -> Iterator[_Block]:
    """Rows `low` to `high` of a parameter, in which the segment begins at row `before`."""
    assert segment.key is not None
    spec, unit, rows = files.spec(segment.key), segment.unit, _rows(files, segment)
    sizes = list(spec.shape[1:])
    shift = segment.columns[0] if segment.columns else 0
    columns = tuple(
        (offset + (shift if axis == 0 else 0), size)
        for axis, (offset, size) in enumerate(zip(inner, target.shape[1:], strict=True))
    )
    if all(column == (0, size) for column, size in zip(columns, sizes, strict=True)):
        columns = ()
    row_bytes = math.prod(sizes) * spec.dtype.itemsize
    step = max(BLOCK_BYTES // max(row_bytes, 1) // unit, 1) * unit
    begin = (low - before) // unit * unit  # of the segment
    while begin < high - before:
        stop = min(begin + step, rows)
        wanted = max(begin, low - before), min(stop, high - before)
        yield _Block(
            segment=segment,
            key=segment.key,
            start=segment.start + begin,
            rows=min(-(-(wanted[1] - begin) // unit) * unit, rows - begin),
            skip=wanted[0] - begin,
            target=target[wanted[0] + before - low : wanted[1] + before - low],
            columns=columns,
        )
        begin = stop


def _rows(files: WeightFiles, segment: Segment) -> int:
    if segment.rows is not None:
        return segment.rows
    assert segment.key is not None
    return files.spec(segment.key).shape[0] - segment.start


def _local(parameter: Tensor) -> tuple[Tensor, list[int]]:
    """What of a parameter is here, and where in each axis it begins."""
    if not isinstance(parameter, DTensor):
        return parameter, [0] * parameter.ndim
    _, offsets = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return parameter.to_local(), list(offsets)


def _batches(files: WeightFiles, blocks: Iterator[_Block]) -> Iterator[list[_Block]]:
    """The blocks in order, in groups of at most BLOCK_BYTES bytes, or of one that is larger."""
    batch: list[_Block] = []
    filled = 0
    for block in blocks:
        bytes = _aligned(_bytes(files, block))
        if batch and filled + bytes > BLOCK_BYTES:
            yield batch
            batch, filled = [], 0
        batch.append(block)
        filled += bytes
    if batch:
        yield batch


def _in_place(files: WeightFiles, block: _Block) -> bool:
    """Whether the file's bytes are the target's, where it lies."""
    return not _changed(files, block) and block.target.device.type == "cpu"


def _changed(files: WeightFiles, block: _Block) -> bool:
    """Whether the target's bytes are other ones, or in another order, than the file's."""
    same = block.target.dtype == files.specs[block.key].dtype and not block.columns and not block.segment.head_shape
    return not same or not block.target.is_contiguous()


def _bytes(files: WeightFiles, block: _Block) -> int:
    spec = files.specs[block.key]
    return block.rows * math.prod(spec.shape[1:]) * spec.dtype.itemsize


def _aligned(bytes: int) -> int:
    return -(-bytes // ALIGNMENT) * ALIGNMENT
