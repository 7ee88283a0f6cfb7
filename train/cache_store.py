"""The shards of a cache: safetensors files of equal rows, found by key, checked by CRC32C as they are read.

    DIR/cache.json                      what the rows were made with; see `cache_settings`
    DIR/KIND-00000.safetensors, ...     KIND is latents, t5 or clip
    DIR/report.json                     what was dropped and why, and the bytes of each shard; written last

A shard of N rows holds

    keys        U8 [N, 16]              see `cache_plan`
    crc32c      I64 [N, V]              of a row's key and value, for each of the V values in the order of their names
    latents:    latent [N, C, t, h, w], and of each piece that conditions need head-F or tail-F, F its pixel frames
    t5:         txt [N, L, D]
    clip:       vec [N, D]
    metadata    "cache": the identity of cache.json; "dropped": JSON [[key in hexadecimal, path, reason], ...], the
                clips that were to be in this shard and have no row in any

A shard is written beside its place, synced, renamed, and its folder synced: it appears whole or not at all, and is
never changed. So what the shards hold is all that a cache knows, and an interrupted one goes on after its last shard.

B latents, C channels, t, h, w latent size, L text tokens, D features.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from opensora_fast.conditions import Piece
from opensora_fast.errors import UserError
from opensora_fast.native import native
from opensora_fast.safetensors_file import Header, TensorSpec, read_header, write_file
from opensora_fast.train.cache_plan import KEY

Kind = Literal["latents", "t5", "clip"]
KINDS: tuple[Kind, ...] = ("latents", "t5", "clip")
LATENT = "latent"
REPORT = "report.json"
UNFINISHED = ".tmp"
_REMEDY = "delete it and run `opensora-fast data cache` again, which makes what is missing"


class Dropped(NamedTuple):
    """A clip without a row. key: 32 hexadecimal digits."""

    key: str
    path: str
    reason: str


class RowSpec(NamedTuple):
    """A value of a row."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Shard:
    """A shard that has been opened: its header and keys are read and fit together."""

    path: Path
    header: Header
    keys_N: np.ndarray
    dropped: list[Dropped]

    @property
    def values(self) -> list[str]:
        return sorted(self.header.entries.keys() - {"keys", "crc32c"})

    def spec(self, name: str) -> RowSpec:
        """Raises UserError when the shard has no such value."""
        if name not in self.header.entries:
            raise UserError(f"{self.path} has no {name}: {_REMEDY}")
        entry = self.header.entries[name]
        return RowSpec(entry.dtype, entry.shape[1:])

    def read(self, row: int, name: str, out: Tensor) -> None:
        """Fill `out`, contiguous and in host memory, with a value of a row.

        Raises UserError naming the shard when it cannot be read, is cut, or does not match its checksum.
        """
        spec = self.spec(name)
        if spec != (out.dtype, tuple(out.shape)):
            raise UserError(
                f"{self.path}: {name} is {spec}, {(out.dtype, tuple(out.shape))} in other shards: {_REMEDY}"
            )
        with _naming(self.path), open(self.path, "rb", buffering=0) as file:
            _read_into(file, _place(self.header, name, row), _content(out))
            stored = np.zeros(1, np.int64)
            column = self.values.index(name)
            _read_into(file, _place(self.header, "crc32c", row) + 8 * column, stored.view(np.uint8).data)
        if _checksum(self.keys_N[row], out) != stored[0]:
            raise UserError(f"{self.path} is damaged (row {row}: {name} does not match its checksum): {_REMEDY}")


class RowTable:
    """The rows of one kind, from all of its shards; of a key that several hold, the first counts."""

    def __init__(self, shards: list[Shard]) -> None:
        self.shards = shards
        keys = np.concatenate([np.zeros(0, KEY), *(shard.keys_N for shard in shards)])
        starts = np.cumsum([0, *(len(shard.keys_N) for shard in shards)])
        self._keys_N, self._row_N = np.unique(keys, return_index=True)
        self._starts = starts
        self.dropped = {item.key: item for shard in shards for item in shard.dropped}
        for key in [bytes.fromhex(key) for key in self.dropped]:
            if self.find(np.frombuffer(key, KEY))[0] >= 0:  # it could be read the next time
                del self.dropped[key.hex()]
        self._dropped_keys = np.frombuffer(b"".join(map(bytes.fromhex, self.dropped)), KEY)

    def __len__(self) -> int:
        return len(self._keys_N)

    def find(self, keys_P: np.ndarray) -> np.ndarray:
        """The rows of these keys, -1 for those that are not there: int64 [P]."""
        if not len(self):
            return np.full(len(keys_P), -1)
        places = np.searchsorted(self._keys_N, keys_P).clip(max=len(self) - 1)
        return np.where(self._keys_N[places] == keys_P, self._row_N[places], -1)

    def unknown(self, keys_P: np.ndarray) -> np.ndarray:
        """The positions of the keys that have no row and were not dropped."""
        missing = np.flatnonzero(self.find(keys_P) < 0)
        return missing[~np.isin(keys_P[missing], self._dropped_keys)]

    def spec(self, row: int, name: str) -> RowSpec:
        return self._shard(row)[0].spec(name)

    def read(self, row: int, name: str, out: Tensor) -> None:
        """See `Shard.read`; `row` is of `find`."""
        shard, within = self._shard(row)
        shard.read(within, name, out)

    def path(self, row: int) -> Path:
        """The shard that a row is in."""
        return self._shard(row)[0].path

    def reason(self, key: np.void) -> str | None:
        """Why this clip has no row, if that is known."""
        item = self.dropped.get(key.tobytes().hex())
        return None if item is None else item.reason

    def _shard(self, row: int) -> tuple[Shard, int]:
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self.shards[number], row - int(self._starts[number])


def open_tables(folder: Path, identity: str) -> dict[Kind, RowTable]:
    """All shards of a cache. Raises UserError naming one that is damaged, of another cache, or cannot be read."""
    return {kind: RowTable([open_shard(path, identity) for path in shard_paths(folder, kind)]) for kind in KINDS}


def shard_paths(folder: Path, kind: Kind) -> list[Path]:
    """The shards of a kind, in the order in which they were made."""
    found = [path for path in folder.glob(f"{kind}-*.safetensors") if re.fullmatch(rf"{kind}-\d{{5,}}", path.stem)]
    return sorted(found, key=lambda path: int(path.stem.removeprefix(f"{kind}-")))


def open_shard(path: Path, identity: str) -> Shard:
    """Raises UserError when the file is damaged, cannot be read, or belongs to another cache."""
    header = read_header(path)
    if header.metadata.get("cache") != identity:
        raise UserError(f"{path} does not belong to the cache of this folder's cache.json: {_REMEDY}")
    entries = header.entries
    rows = entries["keys"].shape[0] if "keys" in entries and len(entries["keys"].shape) == 2 else -1
    values = len(entries) - 2
    expected = {"keys": (torch.uint8, (rows, KEY.itemsize)), "crc32c": (torch.int64, (rows, values))}
    for name, (dtype, shape) in expected.items():
        if rows < 0 or name not in entries or (entries[name].dtype, entries[name].shape) != (dtype, shape):
            raise UserError(f"{path} is damaged (it has no {name} that fit its rows): {_REMEDY}")
    if any(entry.shape[:1] != (rows,) for entry in entries.values()):
        raise UserError(f"{path} is damaged (its values differ in their numbers of rows): {_REMEDY}")
    keys_N = np.zeros(rows, KEY)
    with _naming(path), open(path, "rb", buffering=0) as file:
        if rows:
            _read_into(file, entries["keys"].start, keys_N.view(np.uint8).data)
    return Shard(path, header, keys_N, _parse_dropped(header.metadata.get("dropped", "[]"), path))


class ShardWriter:
    """Publishes shards of one kind, numbered after those that are there."""

    def __init__(self, folder: Path, kind: Kind, identity: str) -> None:
        self._folder, self._kind, self._identity = folder, kind, identity
        there = shard_paths(folder, kind)
        self._next = int(there[-1].stem.removeprefix(f"{kind}-")) + 1 if there else 0

    def publish(self, keys_N: np.ndarray, values: Mapping[str, Tensor], dropped: Sequence[Dropped] = ()) -> Path:
        """Write a shard of rows [N, ...] in host memory, durably. Raises OSError as the system gives it."""
        names = sorted(values)
        checksums = np.empty((len(keys_N), len(names)), np.int64)
        for row, key in enumerate(keys_N):
            checksums[row] = [_checksum(key, values[name][row]) for name in names]
        tensors = {
            "keys": torch.from_numpy(keys_N.view(np.uint8).reshape(len(keys_N), KEY.itemsize).copy()),
            "crc32c": torch.from_numpy(checksums),
            **{name: values[name] for name in names},
        }
        specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        path = self._folder / f"{self._kind}-{self._next:05}.safetensors"
        publish_file(
            path,
            lambda unfinished: write_file(
                unfinished,
                specs,
                iter(tensors.items()),
                {"cache": self._identity, "dropped": json.dumps([list(item) for item in dropped])},
            ),
        )
        self._next += 1
        return path


def piece_name(piece: Piece) -> str:
    """Of a reference's value in a shard."""
    return f"{piece.end}-{piece.frames}"


def remove_unfinished(folder: Path, files: Sequence[str]) -> None:
    """Delete what an interrupted process has left of shards, and of the `files` that it was writing."""
    for pattern in (*files, *(f"{kind}-*.safetensors" for kind in KINDS)):
        for path in folder.glob(f"{pattern}{UNFINISHED}"):
            path.unlink()


def publish_file(path: Path, write: Callable[[Path], None]) -> None:
    """Make `path` by `write(unfinished path)`, which syncs what it writes: whole or not at all, and durable on return.

    Raises OSError that names a file.
    """
    unfinished = path.with_name(f"{path.name}{UNFINISHED}")
    try:
        unfinished.unlink(missing_ok=True)
        write(unfinished)
        os.replace(unfinished, path)
        sync_folder(path.parent)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, error.filename or str(path)) from error


def write_text(path: Path, text: str) -> None:
    """A file of this text, synced."""
    with open(path, "x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def make_folder(folder: Path) -> None:
    """A folder and what is missing above it, durably."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _place(header: Header, name: str, row: int) -> int:
    """Where a row of a tensor begins in its file."""
    entry = header.entries[name]
    return entry.start + row * (entry.bytes // entry.shape[0])


def _content(tensor: Tensor) -> memoryview:
    return tensor.flatten().view(torch.uint8).numpy().data


def _read_into(file: io.FileIO, offset: int, out: memoryview) -> None:
    file.seek(offset)
    done = 0
    while done < len(out):
        read = file.readinto(out[done:])
        if not read:
            raise UserError(f"{file.name} is damaged (it ends at byte {offset + done}): {_REMEDY}")
        done += read


def _checksum(key: np.void, value: Tensor) -> int:
    name, crc32c = np.frombuffer(key.tobytes(), np.uint8), native().crc32c
    return crc32c(value.data_ptr(), value.nbytes, seed=crc32c(name.ctypes.data, name.nbytes))


def _parse_dropped(text: str, path: Path) -> list[Dropped]:
    try:
        found = [Dropped(*item) for item in json.loads(text)]
        if all(
            isinstance(part, str) and len(bytes.fromhex(item.key)) == KEY.itemsize for item in found for part in item
        ):
            return found
    except (TypeError, ValueError, RecursionError):
        pass
    raise UserError(f"{path} is damaged (its list of dropped clips is none): {_REMEDY}")


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): {_REMEDY}") from error
