"""Safetensors files against the format's own library, and headers that lie."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from opensora_fast import safetensors_file
from opensora_fast.errors import UserError
from opensora_fast.kernels import extension
from opensora_fast.safetensors_file import Rows, SafetensorsFiles, TensorSpec, parse_header, read_header, split

DTYPES = sorted(safetensors_file.DTYPES.items())


def filled(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    count = TensorSpec(dtype, shape).bytes
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).view(shape)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(found[name]) == bits(tensor), name


def specs_of(tensors: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
CONTENTS = st.dictionaries(
    st.text(min_size=1, max_size=8).filter(lambda name: name.isprintable() and name != "__metadata__"),
    st.tuples(st.sampled_from([dtype for _, dtype in DTYPES]), SHAPES),
    max_size=6,
)


def read_files(paths: list[Path]) -> dict[str, torch.Tensor]:
    """Every tensor of these files."""
    files = SafetensorsFiles(paths)
    tensors = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in files.specs.items()}
    files.read([Rows(name, 0, tensor) for name, tensor in tensors.items()])
    return tensors


@settings(max_examples=40)
@given(contents=CONTENTS, metadata=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2))
def test_what_is_written_is_what_the_library_reads_and_the_other_way_round(tmp_path_factory, contents, metadata):
    folder = tmp_path_factory.mktemp("files")
    tensors = {name: filled(*spec, seed) for seed, (name, spec) in enumerate(contents.items())}
    safetensors_file.write_file(folder / "ours", specs_of(tensors), iter(tensors.items()), metadata)
    assert_same(load_file(folder / "ours"), tensors)
    with safe_open(folder / "ours", "pt") as file:
        assert (file.metadata() or {}) == metadata
    assert read_header(folder / "ours").metadata == metadata

    save_file(tensors, folder / "theirs", metadata=metadata or None)
    for name in ("ours", "theirs"):
        assert_same(read_files([folder / name]), tensors)


def test_tensors_of_several_files_are_read_together_and_across_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_file, "READ_CHUNK", 4096)
    tensors = {f"tensor {i}": filled(torch.float32, (i * 37 % 11, 1 + i * 503), i) for i in range(12)}
    names = list(tensors)
    for index, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, tmp_path / f"{index}")
    assert_same(read_files([tmp_path / "0", tmp_path / "1"]), tensors)
    with pytest.raises(UserError, match="in another file, too"):
        read_files([tmp_path / "0", tmp_path / "0"])


@settings(max_examples=30)
@given(data=st.data(), rows=st.integers(0, 40), columns=st.integers(1, 7), dtype=st.sampled_from(DTYPES))
def test_any_rows_are_read_and_nothing_else(tmp_path_factory, data, rows, columns, dtype):
    dtype = dtype[1]
    folder = tmp_path_factory.mktemp("files")
    tensors = {name: filled(dtype, (rows, columns), seed) for seed, name in enumerate("ab")}
    save_file(tensors, folder / "file")
    stop = data.draw(st.integers(0, rows))
    start = data.draw(st.integers(0, stop))
    poison = filled(dtype, (rows + 2, columns), 9)  # a row of each side must stay
    target = poison.clone()[: stop - start + 2]
    SafetensorsFiles([folder / "file"]).read([Rows("b", start, target[1:-1])])
    assert bits(target[1:-1]) == bits(tensors["b"][start:stop])
    assert bits(target[:1]) == bits(poison[:1])
    assert bits(target[-1:]) == bits(poison[stop - start + 1 : stop - start + 2])


@settings(max_examples=50)
@given(sizes=st.lists(st.integers(0, 9), max_size=12), limit=st.integers(1, 12))
def test_shards_keep_order_and_limit(sizes, limit):
    specs = {str(index): TensorSpec(torch.uint8, (size,)) for index, size in enumerate(sizes)}
    shards = split(specs, limit)
    assert [name for shard in shards for name in shard] == list(specs)
    for shard in shards:
        filled_bytes = sum(spec.bytes for spec in shard.values())
        assert filled_bytes <= limit or max(spec.bytes for spec in shard.values()) > limit
    for shard, following in zip(shards, shards[1:], strict=False):  # none is begun before it must be
        assert sum(spec.bytes for spec in shard.values()) + next(iter(following.values())).bytes > limit


def test_shards_are_what_the_index_says(tmp_path):
    tensors = {f"t{i}": filled(torch.bfloat16, (3, 5 + i), i) for i in range(7)}
    safetensors_file.write_shards(tmp_path, "model", specs_of(tensors), iter(tensors.items()), {"format": "pt"}, 80)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(len(bits(tensor)) for tensor in tensors.values())}
    assert sorted({*index["weight_map"].values()}) == sorted(path.name for path in tmp_path.glob("*.safetensors"))
    for name, tensor in tensors.items():
        assert bits(load_file(tmp_path / index["weight_map"][name])[name]) == bits(tensor)


def test_a_writer_asks_for_one_tensor_after_the_other(tmp_path):
    """No tensor is asked for before the one before it is in the file, and none is kept."""
    written = tmp_path / "file"

    def produce() -> Iterator[tuple[str, torch.Tensor]]:
        for index in range(50):
            assert index == 0 or written.stat().st_size >= index * 2**20 - 2**20
            yield f"{index}", torch.full((2**18,), float(index))

    specs = {f"{index}": TensorSpec(torch.float32, (2**18,)) for index in range(50)}
    safetensors_file.write_file(written, specs, produce(), {})
    assert load_file(written)["49"][0] == 49


def file_of(fields: dict | list | str, data: int = 0) -> bytes:
    text = (fields if isinstance(fields, str) else json.dumps(fields)).encode()
    return len(text).to_bytes(8, "little") + text + bytes(data)


def tensor(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8), **more: object) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets} | more


LIES = {
    "nothing at all": (b"", "it has 0 bytes, fewer than the 8"),
    "half a length": (b"\1\0\0\0", "it has 4 bytes, fewer than the 8"),
    "a header longer than the file": ((50).to_bytes(8, "little") + b"{}", "would have 50 bytes, and the file has 10"),
    "a header of 2^60 bytes": ((2**60).to_bytes(8, "little") + b"{}", "more than the 100000000"),
    "no JSON": (file_of("{'a': 1}"), "is no JSON"),
    "no UTF-8": ((2).to_bytes(8, "little") + b"\xff\xfe", "is no JSON"),
    "no object": (file_of([1]), "no JSON object"),
    "NaN": (file_of('{"a": NaN}'), "NaN"),
    "a number of 10,000 digits": (file_of('{"a": ' + "9" * 10_000 + "}"), "is no JSON"),
    "a nest of 100,000 lists": (file_of('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"), "is no JSON"),
    "a name twice": (file_of('{"a": {}, "a": {}}'), "there twice"),
    "metadata of numbers": (file_of({"__metadata__": {"a": 1}}), "does not map strings to strings"),
    "no entry": (file_of({"a": 3}), "other fields"),
    "a field too many": (file_of({"a": tensor(more=1)}, 8), "other fields"),
    "a dtype that is a list": (file_of({"a": tensor(["F32"])}, 8), "which is no name"),
    "a negative size": (file_of({"a": tensor(shape=[-2])}, 8), "has the shape"),
    "a size that is true": (file_of({"a": tensor(shape=[True, 2])}, 8), "has the shape"),
    "a size that is 2.0": (file_of({"a": tensor(shape=[2.0])}, 8), "has the shape"),
    "a shape of 2^64 elements": (file_of({"a": tensor(shape=[2**32, 2**32])}, 8), "has the shape"),
    "no elements, yet strides of 2^80": (file_of({"a": tensor(shape=[0, 2**40, 2**40], offsets=[0, 0])}), "the shape"),
    "70 dimensions": (file_of({"a": tensor(shape=[1] * 70, offsets=[0, 4])}, 4), "has the shape"),
    "three offsets": (file_of({"a": tensor(offsets=[0, 8, 8])}, 8), "has the data_offsets"),
    "offsets that run backwards": (file_of({"a": tensor(offsets=[8, 0])}, 8), "of 8 bytes has the data_offsets"),
    "offsets of another size": (file_of({"a": tensor(offsets=[0, 4])}, 4), "of 8 bytes has the data_offsets"),
    "a gap": (file_of({"a": tensor(offsets=[4, 12])}, 12), "begins at byte .*, but the header ends at"),
    "an overlap": (file_of({"a": tensor(), "b": tensor(offsets=[4, 12])}, 12), "tensor 'b' begins at byte"),
    "bytes behind the last tensor": (file_of({"a": tensor()}, 9), "and its header describes"),
    "a file that is cut": (file_of({"a": tensor()}, 7), "and its header describes"),
    "a name of control characters": (file_of({"a\n\x1b[2J\ud800": tensor("?")}, 8), r"a\\n\\x1b\[2J\\ud800"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_one_line_that_says_how(lie, tmp_path):
    content, said = LIES[lie]
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    for read in (
        lambda: parse_header(content, len(content), path),
        lambda: read_header(path),
        lambda: read_files([path]),
    ):
        with pytest.raises(UserError, match=said) as refusal:
            read()
        message = str(refusal.value)
        assert str(path) in message
        assert message.isascii()
        assert message.isprintable()
        assert len(message) < 600


def test_a_dtype_that_is_not_read_is_no_damage():
    content = file_of({"scale": tensor("F8_E8M0", offsets=[0, 2])}, 2)
    with pytest.raises(UserError, match="weights: tensor 'scale' has the dtype 'F8_E8M0', which this") as refusal:
        parse_header(content, len(content), "weights")
    assert "damaged" not in str(refusal.value)
    assert "update opensora-fast" in str(refusal.value)


def test_a_header_that_is_not_all_there_is_refused():
    content = file_of({"a": tensor()}, 8)
    with pytest.raises(UserError, match="should have"):
        parse_header(content[:20], len(content), "weights")


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"absent cannot be read \(No such file"):
        read_files([tmp_path / "absent"])
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory"):
        read_header(tmp_path)


def test_a_file_cut_after_its_header_was_read_is_refused(tmp_path, monkeypatch):
    save_file({"a": torch.zeros(10_000)}, tmp_path / "file")
    trusted = read_header(tmp_path / "file")
    os.truncate(tmp_path / "file", 20_000)
    monkeypatch.setattr(safetensors_file, "read_header", lambda path: trusted)
    with pytest.raises(UserError, match="file is damaged"):
        read_files([tmp_path / "file"])


def test_without_the_native_module_reading_says_how_to_build_it(tmp_path, monkeypatch):
    save_file({"a": torch.zeros(1)}, tmp_path / "file")
    missing = extension.Extension(module=None, missing={"host": "not built", "cuda": "not built"})
    monkeypatch.setattr(extension, "load", lambda: missing)
    with pytest.raises(UserError, match="not built"):
        read_files([tmp_path / "file"])
