"""Reads a checkpoint's tensors, and believes no byte of it before its chunk matched the checksum of the manifest.

    CheckpointReader   whole tensors by name, and the check of a whole checkpoint
    VerifiedReader     the same beneath torch.distributed.checkpoint, which plans what each rank reads

Both turn what is wanted into requests: rows of a piece, and the tensor that they fill. Where the file's bytes are the
tensor's bytes they are read to their place. Everything else (a device's memory, another dtype or layout, a part of
rows) passes through one of two slots of host memory, which is pinned for a CUDA device: while one is copied out of, the
other is filled.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from opensora_fast.errors import UserError
from opensora_fast.manifest import (
    CheckpointError,
    DamagedError,
    FileRecord,
    Manifest,
    Piece,
    is_lost,
    read_manifest,
)
from opensora_fast.native import native

FileSystem = Any  # _C.FileSystem, which has no Python declaration

PAGE = 4096
_SLOT_CHUNKS = 4  # bytes of a slot, in chunks
_FILES_AT_ONCE = 64  # that are open; a process may often have 1,024


class MisfitError(CheckpointError):
    """The checkpoint is whole, and has not the tensors that were asked for."""


@dataclass(frozen=True)
class Request:
    """Rows of a piece, and what they fill.

    `rows` [n, ...] is a box of the file: row-major from byte `start`. `target` has the shape `rows` once this was
    narrowed in its dimensions behind the first to `offsets` and the target's sizes.
    """

    file: int
    start: int
    rows: tuple[int, ...]
    dtype: torch.dtype
    offsets: tuple[int, ...]
    target: Tensor

    @property
    def bytes(self) -> int:
        return math.prod(self.rows) * self.dtype.itemsize

    @property
    def direct(self) -> bool:
        """Whether the file's bytes are the target's."""
        target = self.target
        same = target.dtype == self.dtype and target.shape == self.rows
        return same and target.device.type == "cpu" and target.is_contiguous()


class CheckpointReader:
    """One checkpoint. Raises ManifestError when its manifest cannot be believed."""

    def __init__(self, step_folder: Path, *, files: FileSystem | None = None) -> None:
        self.step_folder = step_folder
        self.manifest: Manifest = read_manifest(step_folder)
        self._files: FileSystem = files or native().FileSystem()
        self._indices = {file.name: index for index, file in enumerate(self.manifest.files)}

    def read(self, tensors: dict[str, Tensor], *, whole: bool = False) -> None:
        """Fill tensors in place, each a whole one of the checkpoint; another dtype than the stored one is converted to.

        whole: also check the chunks that hold nothing of these tensors.
        Raises MisfitError naming what the checkpoint lacks, DamagedError naming the file and the bytes that are
        damaged, and UserError with the system's reason when it cannot be read now.
        """
        self.check_fit(tensors)
        requests = []
        for name, tensor in tensors.items():
            record = self.manifest.tensors[name]
            for piece in record.pieces:
                box = tensor.detach()
                for dimension, (offset, size) in enumerate(zip(piece.offsets, piece.sizes, strict=True)):
                    box = box.narrow(dimension, offset, size)
                requests.append(self.request(piece, record.dtype, (0,) * len(piece.sizes), box))
        self.fill(requests, whole=whole)

    def check_fit(self, tensors: dict[str, Tensor]) -> None:
        """Raises MisfitError when one of the tensors is not in the checkpoint, or has another shape there."""
        stored = self.manifest.tensors
        missing = sorted(tensors.keys() - stored.keys())
        if missing:
            more = f" and {len(missing) - 1} more" if missing[1:] else ""
            raise MisfitError(f"checkpoint {self.step_folder} lacks {missing[0]}{more}")
        for name, tensor in tensors.items():
            if stored[name].shape != tuple(tensor.shape):
                raise MisfitError(
                    f"checkpoint {self.step_folder} is of another architecture: {name} is {stored[name].shape}, "
                    f"{tuple(tensor.shape)} is asked for"
                )

    def verify(self, on_file: Callable[[str], None] | None = None) -> list[str]:
        """What is wrong with each data file, and from which byte on: one line a file, none when all is well.

        on_file: called with each file's name before it is read.
        """
        problems = []
        for index, file in enumerate(self.manifest.files):
            if on_file is not None:
                on_file(file.name)
            try:
                self._read_pieces([], verify=[index])
            except DamagedError as error:
                problems.append(error.problem)
            except UserError as error:
                problems.append(str(error))
        return problems

    def request(self, piece: Piece, dtype: torch.dtype, offsets: tuple[int, ...], target: Tensor) -> Request:
        """For the box of `piece` that begins at `offsets` in it and has the target's sizes."""
        if not piece.sizes:
            return Request(self._indices[piece.file], piece.start, (1,), dtype, (), target.view(1))
        row_bytes = math.prod(piece.sizes[1:]) * dtype.itemsize
        start = piece.start + offsets[0] * row_bytes
        return Request(
            self._indices[piece.file], start, (target.shape[0], *piece.sizes[1:]), dtype, offsets[1:], target
        )

    def fill(self, requests: list[Request], *, whole: bool = False) -> None:
        """Read what was requested. Raises UserError as `read`."""
        direct = [request for request in requests if request.direct]
        pieces = [(request.file, request.start, request.bytes, request.target.data_ptr()) for request in direct]
        if whole:
            pieces += [(file, offset, 1, 0) for file, offset in self._untouched(requests)]  # at 0: verified only
        self._read_pieces(pieces)
        self._fill_through_slots([request for request in requests if not request.direct])

    def _fill_through_slots(self, requests: list[Request]) -> None:
        if not requests:
            return
        slot_bytes = _SLOT_CHUNKS * self.manifest.chunk_bytes
        batches = list(_batches(requests, slot_bytes, self.manifest.chunk_bytes))
        largest = max(sum(paged(part.bytes) for part in batch) for batch in batches)
        device = next((request.target.device for request in requests if request.target.device.type == "cuda"), None)
        slots = [
            torch.empty(largest + PAGE, dtype=torch.uint8, pin_memory=device is not None)
            for _ in range(min(2, len(batches)))
        ]
        stream = torch.cuda.Stream(device) if device else None
        emptied: list[torch.cuda.Event | None] = [None] * len(slots)
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(device))
        try:
            for number, batch in enumerate(batches):
                turn = number % len(slots)
                if (event := emptied[turn]) is not None:
                    event.synchronize()
                slot, place, pieces, views = slots[turn], -slots[turn].data_ptr() % PAGE, [], []
                for part in batch:
                    view = slot[place : place + part.bytes]
                    pieces.append((part.file, part.start, part.bytes, view.data_ptr()))
                    views.append(view.view(part.dtype).view(part.rows))
                    place += paged(part.bytes)
                self._read_pieces(pieces)
                with torch.cuda.stream(stream):
                    for part, view in zip(batch, views, strict=True):
                        for dimension, offset in enumerate(part.offsets, start=1):
                            view = view.narrow(dimension, offset, part.target.shape[dimension])
                        part.target.copy_(view, non_blocking=True)
                if stream is not None:
                    emptied[turn] = event = torch.cuda.Event(blocking=True)
                    event.record(stream)
        finally:  # before the slots are given back, and what else fills these tensors after a failure
            if stream is not None:
                stream.synchronize()

    def _untouched(self, requests: list[Request]) -> Iterator[tuple[int, int]]:
        """File and first byte of each chunk that no request reads."""
        chunk = self.manifest.chunk_bytes
        touched = {
            (request.file, number)
            for request in requests
            if request.bytes
            for number in range(request.start // chunk, (request.start + request.bytes - 1) // chunk + 1)
        }
        for index, file in enumerate(self.manifest.files):
            for number in range(len(file.crc32c)):
                if (index, number) not in touched:
                    yield index, number * chunk

    def _read_pieces(self, pieces: list[tuple[int, int, int, int]], *, verify: Sequence[int] = ()) -> None:
        """Fill memory with pieces (file, offset, bytes, address); of the files `verify`, check all there is."""
        by_file: dict[int, list[tuple[int, int, int]]] = {index: [] for index in verify}
        for file, start, bytes, address in pieces:
            by_file.setdefault(file, []).append((start, bytes, address))
        indices = sorted(by_file)
        for first in range(0, len(indices), _FILES_AT_ONCE):
            group = indices[first : first + _FILES_AT_ONCE]
            of_group = [(number, *piece) for number, index in enumerate(group) for piece in by_file[index]]
            records = [self.manifest.files[index] for index in group]
            self._read_files(records, of_group, verify_all=bool(verify))

    def _read_files(
        self, records: list[FileRecord], pieces: list[tuple[int, int, int, int]], *, verify_all: bool
    ) -> None:
        corruption = native().Corruption
        files = [(str(self.step_folder / file.name), file.bytes, list(file.crc32c)) for file in records]
        try:
            self._files.read_pieces(
                files, pieces, chunk_bytes=self.manifest.chunk_bytes, threads=_threads(), verify_all=verify_all
            )
        except corruption as error:
            raise DamagedError(f"{self.step_folder}: {error.args[0]}") from error
        except OSError as error:
            what = str(error.filename or "its files").removeprefix(f"{self.step_folder}/")
            if is_lost(error):
                raise DamagedError(f"{self.step_folder}: {what} cannot be read ({error.strerror})") from error
            raise UserError(
                f"checkpoint {self.step_folder} cannot be read now ({error.strerror}: {what}): mend that, then run "
                "again"
            ) from error


class VerifiedReader(StorageReader):
    """Beneath `torch.distributed.checkpoint.load`, on any number of ranks: each reads its part with `reader`."""

    def __init__(self, reader: CheckpointReader) -> None:
        self._reader = reader

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        """The checkpoint is that of the reader."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        described: dict[str, STORAGE_TYPES] = {}
        for name, record in self._reader.manifest.tensors.items():
            boxes = [ChunkStorageMetadata(torch.Size(p.offsets), torch.Size(p.sizes)) for p in record.pieces]
            described[name] = TensorStorageMetadata(TensorProperties(record.dtype), torch.Size(record.shape), boxes)
        return Metadata(described)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._pieces = {
            (name, piece.offsets): piece
            for name, record in self._reader.manifest.tensors.items()
            for piece in record.pieces
        }

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        requests, targets = [], []
        for item in plan.items:
            assert item.type == LoadItemType.TENSOR, f"{item.storage_index.fqn} is no tensor"
            name, offset = item.storage_index.fqn, item.storage_index.offset
            assert offset is not None
            target = planner.resolve_tensor(item).detach()
            dtype = self._reader.manifest.tensors[name].dtype
            requests.append(
                self._reader.request(self._pieces[name, tuple(offset)], dtype, tuple(item.storage_offsets), target)
            )
            targets.append((item, target))
        self._reader.fill(requests)
        for item, target in targets:
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return False  # the reader is named, not found by a path


def _batches(requests: list[Request], slot_bytes: int, chunk_bytes: int) -> Iterator[list[Request]]:
    """Requests, cut between rows where they are long, in groups that fit a slot; a chunk is seldom in two groups."""
    batch: list[Request] = []
    room = slot_bytes
    for request in sorted(requests, key=lambda request: (request.file, request.start)):
        for part in _cut(request, room, slot_bytes, chunk_bytes):
            if batch and paged(part.bytes) > room:
                yield batch
                batch, room = [], slot_bytes
            batch.append(part)
            room -= paged(part.bytes)
    if batch:
        yield batch


def _cut(request: Request, room: int, slot_bytes: int, chunk_bytes: int) -> Iterator[Request]:
    """The request in parts of whole rows: the first within `room`, where it holds a row, the others within a slot."""
    rows, flat = request.rows, request
    if request.target.is_contiguous() and request.target.shape == rows:
        flat = replace(request, rows=(math.prod(rows),), offsets=(), target=request.target.view(-1))
    row_bytes = math.prod(flat.rows[1:]) * flat.dtype.itemsize
    first = 0
    while first < flat.rows[0]:
        start, left = flat.start + first * row_bytes, (flat.rows[0] - first) * row_bytes
        count = flat.rows[0] - first
        if left > room:  # end with a chunk, so that none is read twice: in this slot, or else in the next
            end = (start + room) // chunk_bytes * chunk_bytes
            if end <= start:
                end = (start + slot_bytes) // chunk_bytes * chunk_bytes
            count = min(count, max(1, (end - start) // row_bytes))
        yield replace(flat, start=start, rows=(count, *flat.rows[1:]), target=flat.target.narrow(0, first, count))
        first += count
        room = slot_bytes


def paged(bytes: int) -> int:
    """Bytes of the pages that hold as many."""
    return -(-bytes // PAGE) * PAGE


def _threads() -> int:
    return max(1, min(8, torch.get_num_threads()))
