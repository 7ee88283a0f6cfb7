"""What a checkpoint holds: step-N/manifest.json, one JSON object that is never trusted before its checksum was right.

    {"crc32c": "9ae0daaf",         of all bytes behind this first pair, in eight hexadecimal digits
     "format": 1, "step": 200, "chunk_bytes": 16777216,
     "files": [{"name": "rank-0-1.bin", "bytes": 50331648, "crc32c": ["e3069283", ...]}, ...],
     "tensors": {"model.x.weight": {"dtype": "float32", "shape": [8, 4], "pieces": [
         {"offsets": [0, 0], "sizes": [4, 4], "file": "rank-0-1.bin", "start": 4096}, ...]}, ...},
     "world": {"ranks": 2}, "versions": {"torch": "2.11.0"}, "recipe": {...}, "progress": {...}}

A chunk is the bytes [i * chunk_bytes, (i + 1) * chunk_bytes) of a file, the last one shorter; each has its CRC32C. A
piece is a box of a tensor (offsets and sizes, an entry per dimension), row-major and little-endian from byte `start` of
a file. The pieces of a tensor cover it and do not overlap. Data files are rank-RANK-NUMBER.bin, beside the manifest.
"""

from __future__ import annotations

import errno
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from opensora_fast.errors import UserError
from opensora_fast.native import native

FORMAT = 1
MANIFEST = "manifest.json"
FILE_NAME = "rank-{}-{}.bin"
FILE_RULE = re.compile(r"rank-([0-9]{1,9})-([0-9]{1,9})\.bin")
_CHECKSUM_PAIR = re.compile(rb'\{"crc32c": "([0-9a-f]{8})", ')
_HEX = re.compile(r"[0-9a-f]{8}")
_LARGEST = 2**63 - 1
_MOST_DIMENSIONS = 64

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
        *(torch.bool, torch.complex64, torch.complex128),
    )
}


# The system's words for what is gone or broken on the disk. Others (no permission, no descriptors) may pass.
_LOST = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO, errno.EUCLEAN, errno.EBADMSG)


class CheckpointError(UserError):
    """A checkpoint that is of no use to whoever asked. `problem` is the message without its remedy."""

    @property
    def problem(self) -> str:
        return self.args[0]

    def __str__(self) -> str:
        return f"{self.problem}: name another checkpoint"


class DamagedError(CheckpointError):
    """Some of the checkpoint is gone, or not what was written."""


class ManifestError(UserError):
    """The manifest cannot be read, is damaged, or has a newer format."""


class DamagedManifestError(ManifestError, DamagedError):
    """The manifest is gone, or not what was written."""


class NewerFormatError(ManifestError):
    """The manifest is whole, and of a format that this version does not read."""


@dataclass(frozen=True)
class FileRecord:
    name: str
    bytes: int
    crc32c: tuple[int, ...]  # one per chunk


@dataclass(frozen=True)
class Piece:
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]  # none is 0
    file: str
    start: int  # byte of the file


@dataclass(frozen=True)
class TensorRecord:
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]  # none for a tensor without elements

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Manifest:
    step: int
    chunk_bytes: int
    files: tuple[FileRecord, ...]
    tensors: dict[str, TensorRecord]
    world: dict
    versions: dict
    recipe: dict
    progress: dict

    def to_bytes(self) -> bytes:
        """The content of manifest.json."""
        rest = {
            "format": FORMAT,
            "step": self.step,
            "chunk_bytes": self.chunk_bytes,
            "files": [
                {"name": file.name, "bytes": file.bytes, "crc32c": [f"{crc:08x}" for crc in file.crc32c]}
                for file in self.files
            ],
            "tensors": {name: _described(tensor) for name, tensor in self.tensors.items()},
            "world": self.world,
            "versions": self.versions,
            "recipe": self.recipe,
            "progress": self.progress,
        }
        return sealed(json.dumps(rest).encode()[1:])


def sealed(rest: bytes) -> bytes:
    """A manifest with its checksum in front; `rest` is the JSON object without its opening brace."""
    return b'{"crc32c": "%08x", ' % crc32c(rest) + rest


def parse_manifest(content: bytes, where: Path) -> Manifest:
    """The manifest with this content; `where` names it in messages. Raises ManifestError, whatever the content is."""
    pair = _CHECKSUM_PAIR.match(content)
    if pair is None:
        _fail(where, "it does not begin with its checksum")
    if int(pair[1], 16) != crc32c(content[pair.end() :]):
        _fail(where, "it does not match its checksum")
    try:
        fields = json.loads(content, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        _fail(where, f"it is no JSON ({' '.join(str(error).split())[:100]})")
    try:
        return _manifest(fields, where)
    except _Wrong as wrong:
        _fail(where, str(wrong))


def read_manifest(step_folder: Path) -> Manifest:
    """The manifest of a checkpoint. Raises ManifestError."""
    path = step_folder / MANIFEST
    try:
        content = path.read_bytes()
    except OSError as error:
        problem = f"{path}: not readable ({error.strerror})"
        if is_lost(error):
            raise DamagedManifestError(problem) from error
        raise ManifestError(f"{problem}: mend that, then run again") from error
    return parse_manifest(content, path)


def is_lost(error: OSError) -> bool:
    """Whether the system says that what it was asked for is gone or broken; if not, it may be read another time."""
    return error.errno in _LOST


def crc32c(content: bytes) -> int:
    """CRC32C (Castagnoli) of bytes in memory."""
    values = np.frombuffer(content, np.uint8)
    return native().crc32c(values.ctypes.data, values.size)


class _Wrong(Exception):
    """What is wrong with a field, in words that follow the file's name."""


def _fail(where: Path, problem: str) -> NoReturn:
    raise DamagedManifestError(f"{where}: {problem}")


def _unique(pairs: list[tuple[str, Any]]) -> dict:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice")
    return found


def _described(tensor: TensorRecord) -> dict:
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": tensor.shape,
        "pieces": [
            {"offsets": piece.offsets, "sizes": piece.sizes, "file": piece.file, "start": piece.start}
            for piece in tensor.pieces
        ],
    }


def _manifest(fields: Any, where: Path) -> Manifest:
    version = fields.get("format") if isinstance(fields, dict) else None
    if isinstance(version, int) and version > FORMAT:
        raise NewerFormatError(
            f"{where}: format {version!r:.20} is newer than this version reads ({FORMAT}): update opensora-fast"
        )
    keys = ("crc32c", "format", "step", "chunk_bytes", "files", "tensors", "world", "versions", "recipe", "progress")
    _, _, step, chunk_bytes, files, tensors, world, versions, recipe, progress = _values(fields, keys, "the manifest")
    if version != FORMAT or isinstance(version, bool):
        raise _Wrong(f"format {version!r:.80} is none")
    chunk_bytes = _number(chunk_bytes, "chunk_bytes", least=1)
    file_records = tuple(_file(file, chunk_bytes, f"files[{i}]") for i, file in enumerate(_list(files, "files")))
    sizes = {file.name: file.bytes for file in file_records}
    if len(sizes) != len(file_records):
        raise _Wrong("it names a file twice")
    for name, value in (("tensors", tensors), ("world", world), ("versions", versions), ("recipe", recipe)):
        _object(value, name)
    return Manifest(
        step=_number(step, "step"),
        chunk_bytes=chunk_bytes,
        files=file_records,
        tensors={name: _tensor(tensor, sizes, f"tensor {name!r:.200}") for name, tensor in tensors.items()},
        world=world,
        versions=versions,
        recipe=recipe,
        progress=_object(progress, "progress"),
    )


def _file(fields: Any, chunk_bytes: int, what: str) -> FileRecord:
    name, size, checksums = _values(fields, ("name", "bytes", "crc32c"), what)
    if not isinstance(name, str) or not FILE_RULE.fullmatch(name):
        raise _Wrong(f"{what} has the name {name!r:.80}, and data files are rank-RANK-NUMBER.bin")
    size = _number(size, f"{name}'s bytes")
    checksums = _list(checksums, f"{name}'s crc32c")
    if len(checksums) != -(-size // chunk_bytes):
        raise _Wrong(f"{name} has {size} bytes in chunks of {chunk_bytes}, and {len(checksums)} checksums")
    if not all(isinstance(value, str) and _HEX.fullmatch(value) for value in checksums):
        raise _Wrong(f"{name} has a checksum that is not eight hexadecimal digits")
    return FileRecord(name, size, tuple(int(value, 16) for value in checksums))


def _tensor(fields: Any, file_bytes: dict[str, int], what: str) -> TensorRecord:
    dtype_name, shape, pieces = _values(fields, ("dtype", "shape", "pieces"), what)
    if not isinstance(dtype_name, str) or dtype_name not in _DTYPES:
        raise _Wrong(f"{what} has the unknown dtype {dtype_name!r:.80}")
    dtype, shape = _DTYPES[dtype_name], _numbers(shape, f"the shape of {what}")
    if math.prod(max(size, 1) for size in shape) * dtype.itemsize > _LARGEST:  # or its strides are
        raise _Wrong(f"{what} is too large")
    records = [
        _piece(piece, shape, dtype.itemsize, file_bytes, f"piece {i} of {what}")
        for i, piece in enumerate(_list(pieces, f"the pieces of {what}"))
    ]
    if sum(math.prod(piece.sizes) for piece in records) != math.prod(shape) or _overlapping(records):
        raise _Wrong(f"the pieces of {what} overlap, or do not cover it")
    return TensorRecord(dtype, shape, tuple(records))


def _piece(fields: Any, shape: tuple[int, ...], itemsize: int, file_bytes: dict[str, int], what: str) -> Piece:
    offsets, sizes, file, start = _values(fields, ("offsets", "sizes", "file", "start"), what)
    offsets, sizes = _numbers(offsets, f"the offsets of {what}"), _numbers(sizes, f"the sizes of {what}", least=1)
    if not len(offsets) == len(sizes) == len(shape):
        raise _Wrong(f"{what} has other dimensions than its tensor")
    if any(offset + size > whole for offset, size, whole in zip(offsets, sizes, shape, strict=True)):
        raise _Wrong(f"{what} lies outside its tensor")
    if not isinstance(file, str) or file not in file_bytes:
        raise _Wrong(f"{what} names the file {file!r:.80}, which is not listed")
    if _number(start, f"the start of {what}") + math.prod(sizes) * itemsize > file_bytes[file]:
        raise _Wrong(f"{what} lies outside {file}")
    return Piece(offsets, sizes, file, start)


def _overlapping(pieces: list[Piece]) -> bool:
    """Whether any two boxes overlap: a sweep along the dimension that most of them differ in."""
    if len(pieces) < 2:
        return False
    dimensions = range(len(pieces[0].offsets))
    along = max(dimensions, key=lambda d: len({piece.offsets[d] for piece in pieces}), default=None)
    if along is None:
        return True  # two pieces of one number
    reaching: list[Piece] = []
    for piece in sorted(pieces, key=lambda piece: piece.offsets[along]):
        reaching = [other for other in reaching if other.offsets[along] + other.sizes[along] > piece.offsets[along]]
        if any(_meet(piece, other, dimensions) for other in reaching):
            return True
        reaching.append(piece)
    return False


def _meet(one: Piece, other: Piece, dimensions: Iterable[int]) -> bool:
    return all(
        one.offsets[d] < other.offsets[d] + other.sizes[d] and other.offsets[d] < one.offsets[d] + one.sizes[d]
        for d in dimensions
    )


def _values(fields: Any, keys: tuple[str, ...], what: str) -> tuple[Any, ...]:
    """The values of exactly these keys."""
    given = _object(fields, what).keys()
    if given != set(keys):
        raise _Wrong(f"{what} has other keys than {', '.join(keys)}")
    return tuple(fields[key] for key in keys)


def _object(value: Any, what: str) -> dict:
    if not isinstance(value, dict):
        raise _Wrong(f"{what} is no object")
    return value


def _list(value: Any, what: str) -> list:
    if not isinstance(value, list):
        raise _Wrong(f"{what} is no list")
    return value


def _number(value: Any, what: str, *, least: int = 0) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _LARGEST:
        raise _Wrong(f"{what} is {value!r:.80}, no whole number from {least} to 2^63 - 1")
    return value


def _numbers(value: Any, what: str, *, least: int = 0) -> tuple[int, ...]:
    if len(_list(value, what)) > _MOST_DIMENSIONS:
        raise _Wrong(f"{what} has more than {_MOST_DIMENSIONS} entries")
    return tuple(_number(entry, what, least=least) for entry in value)
