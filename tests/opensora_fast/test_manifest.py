"""The manifest: what is written is read, and nothing else is believed."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opensora_fast.manifest import (
    MANIFEST,
    FileRecord,
    Manifest,
    ManifestError,
    Piece,
    TensorRecord,
    crc32c,
    parse_manifest,
    read_manifest,
    sealed,
)

WHERE = Path("step-7/manifest.json")


def manifest() -> Manifest:
    """A matrix in two pieces and a number, in two files of two chunks and one."""
    return Manifest(
        step=7,
        chunk_bytes=4096,
        files=(FileRecord("rank-0-1.bin", 8000, (1, 2**32 - 1)), FileRecord("rank-1-1.bin", 4096, (0,))),
        tensors={
            "model.weight": TensorRecord(
                torch.bfloat16,
                (6, 4),
                (Piece((0, 0), (2, 4), "rank-0-1.bin", 4096), Piece((2, 0), (4, 4), "rank-1-1.bin", 0)),
            ),
            "updates.weight": TensorRecord(torch.float32, (), (Piece((), (), "rank-0-1.bin", 0),)),
            "model.empty": TensorRecord(torch.float32, (0, 3), ()),
        },
        world={"ranks": 2},
        versions={"torch": "2.11"},
        recipe={"name": "näme", "lr": 1e-5},
        progress={"step": 7},
    )


def changed(*path_and_value: object) -> bytes:
    """The manifest with the field at a path set (None: removed), and a right checksum."""
    *path, value = path_and_value
    fields = json.loads(manifest().to_bytes())
    inner = fields
    for key in path[:-1]:
        inner = inner[key]
    if value is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    del fields["crc32c"]
    return sealed(json.dumps(fields).encode()[1:])


def test_checksums_are_castagnoli() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(b"") == 0


def test_what_is_written_is_read(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_bytes(manifest().to_bytes())
    assert read_manifest(tmp_path) == manifest()


def test_the_checksum_comes_first_and_covers_the_rest() -> None:
    content = manifest().to_bytes()
    assert content[:12] == b'{"crc32c": "'
    assert int(content[12:20], 16) == crc32c(content[23:])
    assert json.loads(content)["format"] == 1


@given(st.integers(0), st.integers(0, 7))
def test_any_flipped_bit_is_found(place: int, bit: int) -> None:
    content = bytearray(manifest().to_bytes())
    content[place % len(content)] ^= 1 << bit
    with pytest.raises(ManifestError, match="checksum"):
        parse_manifest(bytes(content), WHERE)


@given(st.integers(0))
def test_any_truncation_is_found(length: int) -> None:
    content = manifest().to_bytes()
    with pytest.raises(ManifestError):
        parse_manifest(content[: length % len(content)], WHERE)


@given(st.binary(max_size=200))
def test_nothing_but_a_manifest_error_comes_of_any_bytes(rest: bytes) -> None:
    for content in (rest, sealed(rest), sealed(b'"format": 1, ' + rest)):
        with pytest.raises(ManifestError):
            parse_manifest(content, WHERE)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
PATHS = [
    *[
        (key,)
        for key in ("format", "step", "chunk_bytes", "files", "tensors", "world", "versions", "recipe", "progress")
    ],
    *[("files", 0, key) for key in ("name", "bytes", "crc32c")],
    *[("tensors", "model.weight", key) for key in ("dtype", "shape", "pieces")],
    *[("tensors", "model.weight", "pieces", 1, key) for key in ("offsets", "sizes", "file", "start")],
]


@given(st.sampled_from(PATHS), JSON.filter(lambda value: value is not None))
def test_a_field_of_any_value_is_read_or_refused(path: tuple, value: object) -> None:
    try:
        parsed = parse_manifest(changed(*path, value), WHERE)
    except ManifestError:
        return
    assert isinstance(parsed, Manifest)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("format", 2), r"format 2 is newer than this version reads \(1\): update opensora-fast"),
        (("format", 0), "format 0"),
        (("format", True), "format True"),
        (("step", -1), "step is -1"),
        (("step", None), "other keys"),
        (("surplus", 1), "other keys"),
        (("recipe", []), "recipe is no object"),
        (("files", 0, "name", "../rank-0-1.bin"), "rank-RANK-NUMBER.bin"),
        (("files", 0, "name", "/etc/passwd"), "rank-RANK-NUMBER.bin"),
        (("files", 0, "name", "rank-1-1.bin"), "names a file twice"),
        (("files", 0, "bytes", 8193), "2 checksums"),
        (("files", 0, "crc32c", ["00000001", "xyz"]), "hexadecimal"),
        (("tensors", "model.weight", "dtype", "object"), "unknown dtype"),
        (("tensors", "model.weight", "shape", [6, -4]), "is -4"),
        (("tensors", "model.weight", "shape", [6, 5]), "overlap, or do not cover"),
        (("tensors", "model.weight", "pieces", []), "overlap, or do not cover"),
        (("tensors", "model.weight", "pieces", 1, "offsets", [1, 0]), "overlap, or do not cover"),
        (("tensors", "model.weight", "pieces", 1, "offsets", [3, 0]), "outside its tensor"),
        (("tensors", "model.weight", "pieces", 1, "offsets", [2]), "other dimensions"),
        (("tensors", "model.weight", "pieces", 1, "start", 4090), "outside rank-1-1.bin"),
        (("tensors", "model.weight", "pieces", 1, "file", "rank-9-9.bin"), "is not listed"),
        (("tensors", "model.empty", "shape", [0, 2**62, 2**62]), "too large"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_is_named(change: tuple, message: str) -> None:
    with pytest.raises(ManifestError, match=message) as raised:
        parse_manifest(changed(*change), WHERE)
    assert str(raised.value).startswith(str(WHERE))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "rest",
    [
        b'"format": 1, "format": 1}',
        b'"recipe": ' + b"[" * 100_000,
        b'"recipe": ' + b'{"a": ' * 100_000,
        b'"step": ' + b"9" * 10_000 + b"}",
        b'"step": "\xff"}',
    ],
    ids=["duplicate key", "deep lists", "deep objects", "long number", "no text"],
)
def test_hostile_json_is_refused(rest: bytes) -> None:
    with pytest.raises(ManifestError, match="no JSON"):
        parse_manifest(sealed(rest), WHERE)


def test_pieces_may_be_any_boxes_that_fill_the_tensor() -> None:
    quarters = [(row, column) for row in (0, 3) for column in (0, 2)]
    pieces = [
        {"offsets": [row, column], "sizes": [3, 2], "file": "rank-0-1.bin", "start": 0} for row, column in quarters
    ]
    parsed = parse_manifest(changed("tensors", "model.weight", "pieces", pieces), WHERE)
    assert len(parsed.tensors["model.weight"].pieces) == 4
    pieces[3]["offsets"] = [3, 0]
    with pytest.raises(ManifestError, match="overlap"):
        parse_manifest(changed("tensors", "model.weight", "pieces", pieces), WHERE)


def test_a_folder_without_one_is_named(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"manifest\.json: not readable \(No such file"):
        read_manifest(tmp_path)
