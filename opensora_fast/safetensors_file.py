"""Safetensors files: a header that is not trusted, rows read in parallel, files written one tensor at a time.

    bytes 0 to 8        N, the length of the header: unsigned, little-endian, at most 100,000,000
    bytes 8 to 8 + N    JSON, {name: {"dtype": "F32", "shape": [...], "data_offsets": [begin, end]}}, and optionally
                        "__metadata__": {string: string}; padded with spaces
    from byte 8 + N     the tensors, row-major and little-endian, one behind the other without gap or overlap; offsets
                        count from here

A sharded checkpoint is a folder of such files with one STEM.safetensors.index.json: {"metadata": {"total_size": bytes},
"weight_map": {name: file}}.

The format carries no checksums, so what reading can find is a file that is cut, extended or garbled in its header.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from opensora_fast.errors import UserError
from opensora_fast.native import native

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
METADATA = "__metadata__"
LONGEST_HEADER = 100_000_000  # bytes; other readers refuse more, too
MOST_ELEMENTS = 2**63 - 1  # of a tensor, and of its strides
MOST_DIMENSIONS = 64  # of a tensor that PyTorch can work with
READ_CHUNK = 2**22  # bytes; what is not read to its place passes through a few buffers of this size


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in its file: `bytes` from byte `start` of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    bytes: int


@dataclass(frozen=True)
class Header:
    entries: dict[str, Entry]
    metadata: dict[str, str]
    file_bytes: int


class TensorSpec(NamedTuple):
    """What a file is to hold under a name."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def parse_header(content: bytes, file_bytes: int, where: Path | str) -> Header:
    """The header of a file of `file_bytes` bytes whose first ones are `content`: at least the length and the JSON.

    `where` names the file in messages. Raises UserError, and nothing else, for whatever is no safetensors file: every
    tensor of a header that is returned lies inside the file, has the size of its shape, and shares no byte.
    """
    length = _header_bytes(content, file_bytes, where)
    if len(content) < 8 + length:
        _refuse(where, f"its header should have {length} bytes and has {len(content) - 8}")
    try:
        fields = json.loads(
            str(content[8 : 8 + length], "utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_number
        )
    except (ValueError, RecursionError) as error:
        _refuse(where, f"its header is no JSON, {_short(str(error) or type(error).__name__)}")
    if not isinstance(fields, dict):
        _refuse(where, "its header is no JSON object")
    metadata = fields.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _refuse(where, f"its {METADATA} does not map strings to strings")
    entries = {name: _entry(name, value, 8 + length, where) for name, value in fields.items()}
    end, last = 8 + length, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].bytes)):
        if entry.start != end:
            _refuse(where, f"tensor {_short(name)} begins at byte {entry.start}, but {last} ends at byte {end}")
        end, last = entry.start + entry.bytes, f"tensor {_short(name)}"
    if end != file_bytes:
        _refuse(where, f"it has {file_bytes} bytes, and its header describes {end}")
    return Header(entries, metadata, file_bytes)


def read_header(path: Path) -> Header:
    """The header of a file, of which nothing else is read. Raises UserError when it is damaged or cannot be read."""
    try:
        with open(path, "rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            content = file.read(8)
            content += file.read(_header_bytes(content, file_bytes, path))
    except OSError as error:
        raise _unreadable(path, error) from error
    return parse_header(content, file_bytes, path)


class Rows(NamedTuple):
    """What to read of a stored tensor: as many rows of its first axis, from `start`, as `target` has.

    `target` is contiguous host memory of the stored dtype. A tensor without axes is read whole, from 0.
    """

    name: str
    start: int
    target: Tensor


class SafetensorsFiles:
    """Some files as one: their headers are read when it is made, of their data only what is asked for.

    Raises UserError when a file is damaged, cannot be read, or holds a tensor of another one.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.headers = {path: read_header(path) for path in paths}
        self.specs: dict[str, TensorSpec] = {}
        self._places: dict[str, tuple[Path, Entry]] = {}
        for path in paths:
            for name, entry in self.headers[path].entries.items():
                if name in self.specs:
                    _refuse(path, f"tensor {_short(name)} is in another file, too")
                self.specs[name] = TensorSpec(entry.dtype, entry.shape)
                self._places[name] = path, entry

    def read(self, wanted: Sequence[Rows]) -> None:
        """Fill the targets; the files are read side by side, no byte of them beyond what is wanted.

        Raises UserError when a file is not what its header said, or cannot be read.
        """
        module = native()
        numbers: dict[Path, int] = {}
        pieces: list[tuple[int, int, int, int]] = []
        for name, start, target in wanted:
            path, entry = self._places[name]
            assert (target.dtype, target.device.type, target.is_contiguous()) == (entry.dtype, "cpu", True), name
            row_bytes = math.prod(entry.shape[1:]) * entry.dtype.itemsize
            assert target.nbytes + start * row_bytes <= entry.bytes, f"{name} has no rows up to there"
            if target.nbytes:
                number = numbers.setdefault(path, len(numbers))
                pieces.append((number, entry.start + start * row_bytes, target.nbytes, target.data_ptr()))
        files: list[tuple[str, int, list[int]]] = [(str(path), self.headers[path].file_bytes, []) for path in numbers]
        try:  # through the page cache, which the ranks of a machine share
            module.FileSystem().read_pieces(files, pieces, chunk_bytes=READ_CHUNK, direct=False)
        except module.Corruption as error:
            raise UserError(f"{error.args[1]} is damaged ({error.args[0]}): download or copy it again") from error
        except OSError as error:
            raise _unreadable(Path(error.filename or next(iter(numbers))), error) from error


def write_file(
    path: Path, specs: Mapping[str, TensorSpec], tensors: Iterator[tuple[str, Tensor]], metadata: Mapping[str, str]
) -> None:
    """Write and sync a new file of the tensors of `specs`, taken from `tensors` one by one in the order of `specs`.

    `tensors` may hold more, which stay in it. Raises OSError as the system gives it; the file is then not whole.
    """
    with open(path, "xb") as file:
        file.write(header_content(specs, metadata))
        for expected, spec in specs.items():
            name, tensor = next(tensors)
            assert (name, tensor.dtype, tuple(tensor.shape)) == (expected, *spec), f"{name} in place of {expected}"
            file.write(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
            del tensor
        file.flush()
        os.fsync(file.fileno())


def write_shards(
    folder: Path,
    stem: str,
    specs: Mapping[str, TensorSpec],
    tensors: Iterator[tuple[str, Tensor]],
    metadata: Mapping[str, str],
    shard_bytes: int,
) -> None:
    """Write and sync STEM-00001-of-N.safetensors and so on, and their index, in a folder that exists.

    No shard has more than `shard_bytes` bytes of tensors unless a single tensor has. Raises as `write_file` does.
    """
    shards = split(specs, shard_bytes)
    names = [f"{stem}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_file(folder / name, shard, tensors, metadata)
    index = {
        "metadata": {"total_size": sum(spec.bytes for spec in specs.values())},
        "weight_map": {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard},
    }
    write_json(folder / f"{stem}.safetensors.index.json", index)


def write_json(path: Path, value: dict) -> None:
    """Write and sync a new JSON file. Raises OSError as the system gives it."""
    with open(path, "x") as file:
        json.dump(value, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def split(specs: Mapping[str, TensorSpec], shard_bytes: int) -> list[dict[str, TensorSpec]]:
    """The tensors in order, cut into runs of at most `shard_bytes` bytes, or of one tensor that is larger."""
    shards: list[dict[str, TensorSpec]] = [{}]
    filled = 0
    for name, spec in specs.items():
        if shards[-1] and filled + spec.bytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = spec
        filled += spec.bytes
    return shards


def header_content(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """What a file of these tensors begins with; the tensors follow in this order."""
    fields: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    end = 0
    for name, spec in specs.items():
        begin, end = end, end + spec.bytes
        fields[name] = {"dtype": NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [begin, end]}
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are as aligned as the file
    return len(text).to_bytes(8, "little") + text


def _header_bytes(content: bytes, file_bytes: int, where: Path | str) -> int:
    if min(len(content), file_bytes) < 8:
        _refuse(where, f"it has {min(len(content), file_bytes)} bytes, fewer than the 8 of a header's length")
    length = int.from_bytes(content[:8], "little")
    if length > LONGEST_HEADER:
        _refuse(where, f"its header would have {length} bytes, more than the {LONGEST_HEADER} that are allowed")
    if 8 + length > file_bytes:
        _refuse(where, f"its header would have {length} bytes, and the file has {file_bytes}")
    return length


def _entry(name: str, value: Any, data_start: int, where: Path | str) -> Entry:
    def refuse(what: str) -> NoReturn:
        _refuse(where, f"tensor {_short(name)} {what}")

    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        refuse("has other fields than dtype, shape and data_offsets")
    code, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(code, str):
        refuse(f"has the dtype {_short(code)}, which is no name")
    if code not in DTYPES:
        raise UserError(
            f"{where}: tensor {_short(name)} has the dtype {_short(code)}, which this version does not read (it reads "
            f"{', '.join(DTYPES)}): convert the file, or update opensora-fast"
        )
    if not _sizes(shape) or len(shape) > MOST_DIMENSIONS or math.prod(max(size, 1) for size in shape) > MOST_ELEMENTS:
        refuse(f"has the shape {_short(shape)}")
    dtype = DTYPES[code]
    if not _sizes(offsets) or len(offsets) != 2:
        refuse(f"has the data_offsets {_short(offsets)}")
    size = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != size:
        refuse(f"of {size} bytes has the data_offsets {_short(offsets)}")
    return Entry(dtype, tuple(shape), data_start + offsets[0], size)


def _sizes(value: Any) -> bool:
    """Whether it is a list of numbers that may be sizes or offsets; true and 1.0 are none."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= MOST_ELEMENTS for item in value)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def _no_number(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number of JSON")


def _short(value: Any) -> str:
    """A value of the file on one short line; what is not printable is escaped."""
    text = value if isinstance(value, str) else reprlib.repr(value)
    return ascii(text if len(text) <= 80 else f"{text[:80]}...")


def _refuse(where: Path | str, what: str) -> NoReturn:
    raise UserError(f"{where} is damaged ({what}): download or copy it again")


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path} cannot be read ({error.strerror or error}): check the file and its folder's permissions")
