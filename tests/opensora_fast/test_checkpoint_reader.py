"""Reading a checkpoint that no writer had a hand in: its files are laid out here, byte by byte."""

import os
import resource
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from opensora_fast.checkpoint_reader import CheckpointReader, MisfitError, VerifiedReader
from opensora_fast.errors import UserError
from opensora_fast.manifest import MANIFEST, FileRecord, Manifest, ManifestError, Piece, TensorRecord, crc32c

CHUNK = 4096
WHOLE: dict[str, Tensor] = {
    "matrix": torch.randn(90, 70, generator=torch.Generator().manual_seed(1)),
    "half": torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(2)).bfloat16(),
    "number": torch.tensor(3.5),
    "flags": torch.tensor([True, False, True]),
    "empty": torch.zeros(0, 7),
}
BOXES = {  # offsets and sizes; a tensor that is not here has one piece
    "matrix": [((0, 0), (40, 70)), ((40, 0), (50, 30)), ((40, 30), (50, 40))],
    "half": [((0, 0, 0), (5, 4, 2)), ((0, 0, 2), (5, 4, 1))],
}


@pytest.fixture
def step_folder(tmp_path: Path) -> Path:
    """WHOLE in two files: tensors at odd places, pieces of one tensor in both files."""
    images = {"rank-0-1.bin": bytearray(b"\1" * 12), "rank-1-1.bin": bytearray()}
    tensors = {}
    for name, tensor in WHOLE.items():
        pieces = []
        boxes = BOXES.get(name, [((0,) * tensor.dim(), tuple(tensor.shape))])
        for number, (offsets, sizes) in enumerate(boxes if tensor.numel() else []):
            file = f"rank-{number % 2}-1.bin"
            box = tensor[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]
            pieces.append(Piece(offsets, sizes, file, len(images[file])))
            images[file] += bytes(box.contiguous().flatten().view(torch.uint8).tolist())
        tensors[name] = TensorRecord(tensor.dtype, tuple(tensor.shape), tuple(pieces))
    records = []
    for name, content in images.items():
        content += b"\2" * (3 * CHUNK)  # chunks that hold nothing
        (tmp_path / name).write_bytes(content)
        checksums = tuple(crc32c(bytes(content[at : at + CHUNK])) for at in range(0, len(content), CHUNK))
        records.append(FileRecord(name, len(content), checksums))
    manifest = Manifest(3, CHUNK, tuple(records), tensors, {"ranks": 2}, {}, {"name": "test"}, {"step": 3})
    (tmp_path / MANIFEST).write_bytes(manifest.to_bytes())
    return tmp_path


def poisoned() -> dict[str, Tensor]:
    return {name: torch.full_like(tensor, 1) for name, tensor in WHOLE.items()}


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 16
    path.write_bytes(content)


def test_tensors_come_back_from_any_pieces(step_folder: Path) -> None:
    tensors = poisoned()
    CheckpointReader(step_folder).read(tensors)
    for name, tensor in WHOLE.items():
        assert torch.equal(tensors[name], tensor), name


@pytest.mark.parametrize("size", [1, 7, 90])
def test_other_layouts_and_dtypes_are_filled_too(step_folder: Path, size: int) -> None:
    """Through slots of host memory, which are small here: rows are cut at every place."""
    room = torch.zeros(90 * size, 70)
    tensors = {
        "matrix": room[::size],
        "half": torch.zeros(3, 4, 5, dtype=torch.float64).permute(2, 1, 0),
        "number": torch.zeros((), dtype=torch.float64),
        "flags": torch.zeros(6, dtype=torch.bool)[::2],
    }
    CheckpointReader(step_folder).read(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, WHOLE[name].to(tensor.dtype)), name


def test_through_torch_distributed_checkpoint(step_folder: Path) -> None:
    tensors = poisoned()
    dcp.load(tensors, storage_reader=VerifiedReader(CheckpointReader(step_folder)), no_dist=True)
    for name, tensor in WHOLE.items():
        assert torch.equal(tensors[name], tensor), name


@pytest.mark.parametrize("target", ["as it is", "transposed"])
def test_damage_is_never_handed_out(step_folder: Path, target: str) -> None:
    flip(step_folder / "rank-0-1.bin", CHUNK + 5)
    tensor = torch.zeros(90, 70) if target == "as it is" else torch.zeros(70, 90).t()
    with pytest.raises(UserError, match=r"rank-0-1\.bin.* 4096 .*8192"):
        CheckpointReader(step_folder).read({"matrix": tensor})


def test_chunks_without_tensors_are_checked_when_the_whole_is(step_folder: Path) -> None:
    size = (step_folder / "rank-1-1.bin").stat().st_size
    flip(step_folder / "rank-1-1.bin", size - 1)
    reader = CheckpointReader(step_folder)
    reader.read(poisoned())
    with pytest.raises(UserError, match=r"rank-1-1\.bin"):
        reader.read(poisoned(), whole=True)


def test_verify_names_each_damaged_file(step_folder: Path) -> None:
    reader = CheckpointReader(step_folder)
    seen: list[str] = []
    assert reader.verify(seen.append) == []
    assert seen == ["rank-0-1.bin", "rank-1-1.bin"]
    flip(step_folder / "rank-0-1.bin", 9)
    with open(step_folder / "rank-1-1.bin", "ab") as file:
        file.write(b"\0")
    first, second = reader.verify()
    assert f"{step_folder}: rank-0-1.bin: bytes 0 to 4096" in first
    assert "rank-1-1.bin" in second
    (step_folder / "rank-1-1.bin").unlink()
    assert "rank-1-1.bin cannot be read (No such file or directory)" in reader.verify()[1]


def test_what_does_not_fit_is_named(step_folder: Path) -> None:
    reader = CheckpointReader(step_folder)
    with pytest.raises(MisfitError, match=r"lacks other: name another checkpoint"):
        reader.read({"other": torch.zeros(1)})
    with pytest.raises(MisfitError, match=r"lacks more and 1 more: name another checkpoint"):
        reader.read({"other": torch.zeros(1), "more": torch.zeros(1)})
    with pytest.raises(MisfitError, match=r"another architecture: matrix is \(90, 70\), \(90, 71\) is asked for: name"):
        reader.read({"matrix": torch.zeros(90, 71)})


def test_a_damaged_manifest_is_not_read(step_folder: Path) -> None:
    flip(step_folder / MANIFEST, 50)
    with pytest.raises(ManifestError, match="checksum"):
        CheckpointReader(step_folder)


@pytest.mark.parametrize("whole", [False, True])
def test_more_files_than_a_process_may_open(tmp_path: Path, whole: bool) -> None:
    """A shard per file, as many ranks would write them."""
    count = 300
    expected = torch.arange(count * 3, dtype=torch.float32).view(count, 3)
    records, pieces = [], []
    for row in range(count):
        content = expected[row].numpy().tobytes()
        records.append(FileRecord(f"rank-{row}-1.bin", len(content), (crc32c(content),)))
        pieces.append(Piece((row, 0), (1, 3), records[-1].name, 0))
        (tmp_path / records[-1].name).write_bytes(content)
    tensors = {"w": TensorRecord(torch.float32, (count, 3), tuple(pieces))}
    (tmp_path / MANIFEST).write_bytes(Manifest(1, CHUNK, tuple(records), tensors, {}, {}, {}, {}).to_bytes())
    found = {"w": torch.zeros(count, 3)}
    slow = {"w": torch.zeros(3, count).t()}  # through slots
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 120, hard))
    try:
        reader = CheckpointReader(tmp_path)
        for tensors_found in (found, slow):
            reader.read(tensors_found, whole=whole)
        assert reader.verify() == []
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert torch.equal(found["w"], expected)
    assert torch.equal(slow["w"], expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_devices_memory_is_filled_through_pinned_slots(step_folder: Path) -> None:
    tensors = {name: tensor.cuda() for name, tensor in poisoned().items()}
    tensors["matrix"] = torch.zeros(70, 90, device="cuda").t()
    CheckpointReader(step_folder).read(tensors, whole=True)
    for name, tensor in WHOLE.items():
        assert torch.equal(tensors[name].cpu(), tensor), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_failed_read_leaves_no_copy_to_the_device_behind(step_folder: Path) -> None:
    flip(step_folder / "rank-1-1.bin", 0)
    matrix = torch.zeros(90, 70, device="cuda")
    with pytest.raises(UserError, match=r"rank-1-1\.bin"):
        CheckpointReader(step_folder).read({"matrix": matrix})
    with torch.cuda.stream(torch.cuda.Stream()):  # which waits for nothing
        matrix.fill_(5)
    torch.cuda.synchronize()
    assert matrix.eq(5).all()
