"""Weight files: every form read alike, nothing read before it is asked for, and every way to be wrong in one line."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from opensora_fast.errors import UserError
from opensora_fast.safetensors_file import SafetensorsFiles, TensorSpec
from opensora_fast.weight_files import WeightFiles

TENSORS = {
    "matrix": torch.randn(11, 5, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "vector": torch.arange(7.0),
    "number": torch.tensor(3.0, dtype=torch.float64),
    "none": torch.empty(0, 4),
}


def write_shards(folder: Path, shards: dict[str, dict[str, torch.Tensor]], index: str = "model") -> Path:
    folder.mkdir()
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    weight_map = {key: name for name, tensors in shards.items() for key in tensors}
    (folder / f"{index}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture(params=["file", "shards", "folder", "pt", "pth", "old pt"])
def stored(request, tmp_path) -> Path:
    """The same tensors in each form."""
    path = tmp_path / "weights"
    match request.param:
        case "file":
            path = path.with_suffix(".safetensors")
            save_file(TENSORS, path)
        case "shards":
            keys = list(TENSORS)
            write_shards(path, {f"{i}.safetensors": {k: TENSORS[k] for k in keys[i::2]} for i in range(2)})
        case "folder":
            path.mkdir()
            save_file(TENSORS, path / "diffusion_pytorch_model.safetensors")
        case _:
            path = path.with_suffix(f".{request.param.split()[-1]}")
            torch.save(TENSORS, path, _use_new_zipfile_serialization="old" not in request.param)
    return path


def test_every_form_is_read_alike(stored):
    files = WeightFiles.open(stored)
    assert files.path == stored
    assert files.specs == {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in TENSORS.items()}
    for name, expected in TENSORS.items():
        assert torch.equal(files.read(name), expected)
        assert files.read(name).dtype == expected.dtype
    assert torch.equal(files.read_rows("matrix", 3, 9), TENSORS["matrix"][3:9])
    assert files.read_rows("matrix", 11, 11).shape == (0, 5)

    filled = {
        "matrix": torch.empty(11, 5, dtype=torch.bfloat16),
        "vector": torch.empty(7, dtype=torch.float16),  # converted to
        "number": torch.empty((), dtype=torch.float64),
        "none": torch.empty(0, 4),
    }
    files.fill(filled)
    assert all(torch.equal(filled[name], TENSORS[name].to(filled[name].dtype)) for name in TENSORS)
    turned = torch.empty(5, 11, dtype=torch.bfloat16).t()
    files.fill({"matrix": turned})
    assert torch.equal(turned, TENSORS["matrix"])


def test_what_is_not_there_is_named(stored):
    files = WeightFiles.open(stored)
    for ask, said in (
        (lambda: files.read("lost"), "lack lost"),
        (lambda: files.read_rows("lost", 0, 1), "lack lost"),
        (lambda: files.fill({"vector": torch.empty(8)}), r"vector is \[7\], expected \[8\]"),
        (lambda: files.read_rows("matrix", 3, 12), r"matrix is \[11, 5\]: rows 3 to 12 are not in it"),
        (lambda: files.read_rows("matrix", 3, 2), "rows 3 to 2 are not in it"),
        (lambda: files.read_rows("number", 0, 0), r"number is \[\]"),
    ):
        with pytest.raises(UserError, match=said) as refusal:
            ask()
        assert str(stored) in str(refusal.value)
        assert "\n" not in str(refusal.value)


def test_opening_reads_headers_and_rows_read_their_bytes(tmp_path, monkeypatch):
    """Of the data no byte is read but those of the rows that are asked for: the others may be damaged."""
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.zeros(1000, 4), "b": torch.ones(1000, 4)}, path)
    reads = []
    read = SafetensorsFiles.read
    monkeypatch.setattr(
        SafetensorsFiles, "read", lambda self, rows: (reads.extend(row.target.nbytes for row in rows), read(self, rows))
    )
    files = WeightFiles.open(path)
    assert not reads
    files.read_rows("b", 10, 12)
    assert reads == [2 * 4 * 4]


def test_metadata_is_that_of_the_files_or_the_folders_configuration(tmp_path):
    folder = write_shards(tmp_path / "folder", {"1.safetensors": {"a": torch.zeros(1)}})
    (folder / "config.json").write_text('{"_class_name": "Model"}')
    assert WeightFiles.open(folder).metadata == {"config": '{"_class_name": "Model"}'}
    save_file({"a": torch.zeros(1)}, folder / "1.safetensors", metadata={"format": "pt", "config": "{}"})
    assert WeightFiles.open(folder).metadata == {"format": "pt", "config": "{}"}
    assert WeightFiles.open(folder / "1.safetensors").metadata["config"] == "{}"
    torch.save({}, folder / "a.pt")
    assert WeightFiles.open(folder / "a.pt").metadata == {}


@pytest.mark.parametrize("index", [True, False])
def test_side_files_are_part_of_a_folder(tmp_path, index):
    folder = write_shards(tmp_path / "folder", {"1.safetensors": {"a": torch.zeros(1)}})
    if not index:
        (folder / "model.safetensors.index.json").unlink()
    save_file({"b": torch.ones(2)}, folder / "opensora_fast_biases.safetensors")
    files = WeightFiles.open(folder)
    assert list(files.specs) == ["a", "b"]
    assert torch.equal(files.read("b"), torch.ones(2))
    save_file({"a": torch.ones(2)}, folder / "opensora_fast_biases.safetensors")
    with pytest.raises(UserError, match="tensor 'a' is in another file, too"):
        WeightFiles.open(folder)


def test_folders_that_are_not_clear_are_refused(tmp_path):
    shards = {f"{i}.safetensors": {f"t{i}": torch.zeros(3)} for i in range(30)}

    def folder(name: str) -> Path:
        return write_shards(tmp_path / name, shards)

    def index(folder: Path, content: object) -> None:
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    (tmp_path / "empty").mkdir()
    (folder("no index") / "model.safetensors.index.json").unlink()
    shutil.copy(folder("two") / "model.safetensors.index.json", tmp_path / "two" / "other.safetensors.index.json")
    for i in range(25):
        (tmp_path / "two").joinpath(f"{i}.safetensors").unlink()
    for i in range(25):
        (folder("torn") if i == 0 else tmp_path / "torn").joinpath(f"{i}.safetensors").unlink()
    index(folder("lost"), {"weight_map": {"gone": "1.safetensors"}})
    index(folder("outside"), {"weight_map": {"t": "../1.safetensors"}})
    index(folder("numbers"), {"weight_map": {"t": 3}})
    index(folder("list"), ["weight_map"])
    os.truncate(folder("cut") / "7.safetensors", 60)

    for name, said in {
        "empty": "holds 0 files .* and 0 .safetensors files",
        "no index": "holds 0 files .* and 30 .safetensors files",
        "two": "holds 2 files",
        "torn": "lacks 0.safetensors, .* and 5 more, which its index names",
        "lost": "lack gone, which the index names",
        "outside": "names the file '../1.safetensors'",
        "numbers": "names the file 3",
        "list": "is damaged",
        "cut": "7.safetensors is damaged",
    }.items():
        with pytest.raises(UserError, match=said) as refusal:
            WeightFiles.open(tmp_path / name)
        assert name in str(refusal.value)
        assert "\n" not in str(refusal.value)


class Payload:
    ran = False

    def __reduce__(self):
        return setattr, (Payload, "ran", True)


def test_pickles_of_anything_but_tensors_are_refused(tmp_path):
    for name, content in {
        "code": {"a": Payload()},
        "nested": {"model": {"a": torch.zeros(1)}},
        "list": [torch.zeros(1)],
        "numbered": {1: torch.zeros(1)},
        "sparse": {"a": torch.eye(3).to_sparse()},
        "meta": {"a": torch.zeros(3, device="meta")},
    }.items():
        torch.save(content, tmp_path / f"{name}.pt")
        said = "pickled code, which is not run" if name == "code" else "not a flat state dict"
        with pytest.raises(UserError, match=said) as refusal:
            WeightFiles.open(tmp_path / f"{name}.pt")
        assert f"{name}.pt" in str(refusal.value)
    assert not Payload.ran


@pytest.mark.parametrize("form", ["zip", "old"])
def test_a_pickle_that_is_cut_anywhere_is_refused(tmp_path, form):
    path = tmp_path / "weights.pt"
    torch.save({"a": torch.randn(300)}, path, _use_new_zipfile_serialization=form == "zip")
    whole = path.read_bytes()
    for bytes in range(0, len(whole) - 1, 97):
        path.write_bytes(whole[:bytes])
        # an old one that ends in the name of a function names another, which is no tensor's
        with pytest.raises(UserError, match=r"weights.pt (are damaged|are no file of tensors|hold pickled code)"):
            WeightFiles.open(path)
