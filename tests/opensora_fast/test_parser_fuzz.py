"""What strangers may hand us: manifests, safetensors headers and shard indices of any content are refused in one line.

Three kinds of content: any bytes; the bytes of a good one with some changed; a good one with parts of its JSON replaced
by other JSON, which a reader finds in well-formed files of liars. A manifest gets the right checksum each time.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from opensora_fast.errors import UserError
from opensora_fast.manifest import FileRecord, Manifest, Piece, TensorRecord, parse_manifest, sealed
from opensora_fast.released import read_weights
from opensora_fast.safetensors_file import TensorSpec, header_content, parse_header

QUICK, FULL = 1_000, 20_000
SPECS = {
    "a.weight": TensorSpec(torch.float32, (3, 4)),
    "a.bias": TensorSpec(torch.bfloat16, (4,)),
    "scalar": TensorSpec(torch.int64, ()),
    "empty": TensorSpec(torch.uint8, (0, 7)),
}
HEADER = header_content(SPECS, {"format": "pt"})
DATA_BYTES = sum(spec.bytes for spec in SPECS.values())
MANIFEST = Manifest(
    step=7,
    chunk_bytes=64,
    files=(FileRecord("rank-0-1.bin", 100, (1, 2)), FileRecord("rank-1-1.bin", 64, (3,))),
    tensors={
        "model.weight": TensorRecord(
            torch.float32,
            (4, 3),
            (Piece((0, 0), (2, 3), "rank-0-1.bin", 0), Piece((2, 0), (2, 3), "rank-1-1.bin", 8)),
        ),
        "updates": TensorRecord(torch.int64, (), (Piece((), (), "rank-0-1.bin", 24),)),
        "empty": TensorRecord(torch.bfloat16, (0, 3), ()),
    },
    world={"ranks": 2},
    versions={"torch": "2.13"},
    recipe={"name": "tiny", "model": {"depth": 1}},
    progress={"step": 7},
)
REST = MANIFEST.to_bytes()[len(sealed(b"")) :]

NUMBERS = st.one_of(
    st.integers(),
    st.sampled_from([0, 1, -1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, 10**40, -(2**63)]),
    st.floats(),
)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def paths(value: Any, path: tuple = ()) -> list[tuple]:
    """Where every part of a JSON value lies in it."""
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, part in below for found in paths(part, (*path, key)))]


def at(value: Any, path: tuple | list) -> Any:
    for step in path:
        value = value[step]
    return value


@st.composite
def altered_json(draw: Callable, good: Any) -> str:
    """The JSON of `good` with up to three parts changed a little, replaced, removed, moved, or there twice."""
    value = [copy.deepcopy(good)]
    for _ in range(draw(st.integers(1, 3))):
        places = paths(value)[1:]
        kind = draw(st.sampled_from(["nudge", "replace", "remove", "move", "rename"]))
        numbers = [place for place in places if isinstance(at(value, place), int)]
        *path, key = draw(st.sampled_from(numbers if kind == "nudge" and numbers else places))
        holder = at(value, path)
        match kind:
            case "nudge" if numbers:
                holder[key] += draw(st.sampled_from([-64, -8, -2, -1, 1, 2, 8, 64]))
            case "replace":
                holder[key] = draw(JSON)
            case "remove" if path:
                del holder[key]
            case "move":
                holder[key] = copy.deepcopy(at(value, draw(st.sampled_from(places))))
            case "rename" if isinstance(holder, dict):
                holder[draw(st.text(max_size=4) | st.sampled_from(["__metadata__", "a.bias"]))] = holder.pop(key)
    text = json.dumps(value[0])
    if draw(st.booleans()) and text.startswith("{") and text != "{}":  # its first part is there twice
        text = text[:-1] + ", " + text[1:]
    return text


@st.composite
def altered_bytes(draw: Callable, good: bytes) -> bytes:
    """Up to five places of `good` cut out and filled with other bytes."""
    content = bytearray(good)
    for _ in range(draw(st.integers(1, 5))):
        start = draw(st.integers(0, len(content)))
        content[start : start + draw(st.integers(0, 12))] = draw(st.binary(max_size=12))
    return bytes(content)


def with_length(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


HEADERS = st.one_of(
    st.tuples(st.binary(max_size=200), st.integers(0, 2**64)),
    st.tuples(altered_bytes(HEADER), st.integers(0, 1000)),
    st.tuples(altered_bytes(HEADER[8:]).map(with_length), st.integers(0, DATA_BYTES)),
    *[st.tuples(altered_json(json.loads(HEADER[8:])).map(str.encode).map(with_length), st.just(DATA_BYTES))] * 4,
)
MANIFESTS = st.one_of(
    st.binary(max_size=200),
    st.binary(max_size=200).map(sealed),
    altered_bytes(MANIFEST.to_bytes()),
    altered_bytes(REST).map(sealed),
    *[altered_json(json.loads(b"{" + REST)).map(lambda text: sealed(text.encode()[1:]))] * 4,
)
DEEP = b"[" * 200_000
NESTED = "[" * 900 + "]" * 900  # JSON is read to this depth, but hardly deeper


def fuzz(check: Callable, strategy: st.SearchStrategy, *examples: Any, count: int) -> None:
    """Run `check` on `count` draws, and on the examples."""
    run = given(strategy)(check)
    for value in examples:
        run = example(value)(run)
    settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), derandomize=count <= QUICK)(
        run
    )()


def assert_one_line(error: UserError) -> None:
    message = str(error)
    assert "\n" not in message
    assert len(message) < 1000, message
    message.encode()  # can be printed


def check_header(content_and_data: tuple[bytes, int]) -> None:
    content, data_bytes = content_and_data
    file_bytes = len(content) + data_bytes
    try:
        header = parse_header(content, file_bytes, "weights.safetensors")
    except UserError as error:
        assert_one_line(error)
        return
    spans = sorted((entry.start, entry.start + entry.bytes) for entry in header.entries.values())
    begin = 8 + int.from_bytes(content[:8], "little")
    assert [start for start, _ in spans] == [begin, *(end for _, end in spans)][: len(spans)]
    assert (spans[-1][1] if spans else begin) == file_bytes
    for entry in header.entries.values():
        empty = torch.empty(entry.shape, dtype=entry.dtype, device="meta")
        assert empty.numel() * empty.element_size() == entry.bytes
    assert all(isinstance(value, str) for value in header.metadata.values())


def check_manifest(content: bytes) -> None:
    try:
        manifest = parse_manifest(content, Path("step-7/manifest.json"))
    except UserError as error:
        assert_one_line(error)
        return
    sizes = {file.name: file.bytes for file in manifest.files}
    assert all("/" not in name for name in sizes)
    for file in manifest.files:
        assert len(file.crc32c) == -(-file.bytes // manifest.chunk_bytes)
    for record in manifest.tensors.values():
        whole = torch.zeros(record.shape, dtype=torch.uint8, device="cpu" if record.bytes < 2**20 else "meta")
        for piece in record.pieces:
            box = whole
            for dimension, (offset, size) in enumerate(zip(piece.offsets, piece.sizes, strict=True)):
                box = box.narrow(dimension, offset, size)
            box += 1
            assert piece.start >= 0
            assert piece.start + box.numel() * record.dtype.itemsize <= sizes[piece.file]
        assert whole.is_meta or bool((whole == 1).all())  # each element is in one piece


def fuzz_headers(count: int) -> None:
    fuzz(
        check_header,
        HEADERS,
        (with_length(DEEP), 0),
        (with_length(b'{"a": ' + DEEP), 0),
        (with_length(f'{{"a": {{"dtype": "F32", "shape": {NESTED}, "data_offsets": [0, 0]}}}}'.encode()), 0),
        (with_length(b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 0]}}'), 0),
        (with_length(b'{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 0]}}'), 0),
        count=count,
    )


def fuzz_manifests(count: int) -> None:
    text = REST.decode()
    fuzz(
        check_manifest,
        MANIFESTS,
        sealed(DEEP),
        sealed(b'"format": ' + DEEP),
        *(sealed(text.replace('"step": 7', f'"step": {value}').encode()) for value in (NESTED, "9" * 5000, "NaN")),
        sealed(text.replace("[4, 3]", NESTED).encode()),
        sealed(text.replace("[4, 3]", "[9223372036854775807, 9223372036854775807]").encode()),
        sealed(text.replace("rank-0-1.bin", "../../etc/x").encode()),
        count=count,
    )


def test_the_good_ones_are_read():
    header = parse_header(HEADER, len(HEADER) + DATA_BYTES, "weights.safetensors")
    assert {name: TensorSpec(entry.dtype, entry.shape) for name, entry in header.entries.items()} == SPECS
    assert parse_manifest(MANIFEST.to_bytes(), Path("manifest.json")) == MANIFEST


def test_any_header_is_read_or_refused():
    fuzz_headers(QUICK)


def test_any_manifest_is_read_or_refused():
    fuzz_manifests(QUICK)


def test_any_shard_index_is_read_or_refused(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    (tmp_path / "1.safetensors").write_bytes(HEADER + bytes(DATA_BYTES))
    good = {"metadata": {"total_size": DATA_BYTES}, "weight_map": dict.fromkeys(SPECS, "1.safetensors")}

    def check(content: bytes) -> None:
        index.write_bytes(content)
        try:
            assert read_weights(tmp_path).keys() <= SPECS.keys()
        except UserError as error:
            assert_one_line(error)

    strategy = altered_bytes(json.dumps(good).encode()) | altered_json(good).map(str.encode)
    fuzz(check, strategy, json.dumps(good).encode(), DEEP, b'{"weight_map": ' + DEEP, count=QUICK // 4)


@pytest.mark.slow
def test_any_header_is_read_or_refused_in_full():
    fuzz_headers(FULL)


@pytest.mark.slow
def test_any_manifest_is_read_or_refused_in_full():
    fuzz_manifests(FULL)
