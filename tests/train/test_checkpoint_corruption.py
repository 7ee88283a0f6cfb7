"""Damage to a checkpoint's files is found by `verify` and by resume, which takes the checkpoint before it."""

import errno
import importlib.util
import os
import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from opensora_fast.checkpoint_reader import CheckpointReader
from opensora_fast.errors import UserError
from opensora_fast.manifest import ManifestError, parse_manifest

spec = importlib.util.spec_from_file_location("crash_host", Path(__file__).with_name("crash_host.py"))
crash_host = importlib.util.module_from_spec(spec)
spec.loader.exec_module(crash_host)
states = crash_host.load("saved_states.py")

KINDS = ("bit", "truncated", "zeroed", "longer")


@dataclass(frozen=True)
class Damage:
    kind: str
    file: Path
    at: int
    """byte where it begins"""
    content: bytes
    """the damaged file's"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    states.save_steps(str(tmp_path / "run"), [[1], [2]])
    return tmp_path / "run"


def _damage(files: list[Path], seed: int) -> Damage:
    """One that changes the file, over files evenly, since the small one tells how to read the others."""
    choice = random.Random(seed)
    while True:
        file, kind = choice.choice(files), choice.choice(KINDS)
        content = bytearray(file.read_bytes())
        at = choice.randrange(len(content))
        if kind == "bit":
            content[at] ^= 1 << choice.randrange(8)
        elif kind == "truncated":
            del content[at:]
        elif kind == "zeroed":
            length = min(len(content) - at, choice.choice([1, 16, 512, 4096, 20000]))
            content[at : at + length] = bytes(length)
        else:
            at = len(content)
            content += choice.randbytes(choice.choice([1, 512, 4096]))
        if content != file.read_bytes():
            return Damage(kind, file, at, bytes(content))


def _found_by_verify(folder: Path) -> str:
    try:
        return "\n".join(CheckpointReader(folder).verify(None))
    except UserError as error:
        return str(error)


def _restored(run: Path, script=None):
    """What resume takes, and the tensors that it filled."""
    tensors = states.tensors_of(-1)
    folder = states.RunFolder(run, keep=states.KEEP, files=states.C.FileSystem(script))
    restored = folder.restore(tensors, states.RECIPE, states.architecture)
    folder.close()
    assert restored is not None
    return restored, tensors


@pytest.mark.parametrize("count", [150, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_damage_is_found_by_verify_and_by_resume(run: Path, count: int) -> None:
    newest = run / "step-2"
    files = sorted(newest.iterdir())
    assert len(files) >= 2
    for seed in range(count):
        damage = _damage(files, seed)
        told = f"seed {seed}: {damage.kind} at byte {damage.at} of {damage.file.name}"
        whole = damage.file.read_bytes()
        damage.file.write_bytes(damage.content)

        found = _found_by_verify(newest)
        assert damage.file.name in found, f"{told}, verify says {found!r}"

        tensors, reader = states.tensors_of(-1), states.RunFolder(run, keep=states.KEEP)
        if seed % 2:  # found, also where nothing is read that is wanted
            del tensors["first_moment.weight"]
        restored = reader.restore(tensors, states.RECIPE, states.architecture)
        reader.close()
        assert restored is not None, told
        assert restored.progress == states.progress_of(1), told
        assert not states.difference(tensors, states.tensors_of(1)), told
        assert len(restored.damaged) == 1, told
        assert damage.file.name in restored.damaged[0], f"{told}, resume says {restored.damaged}"
        assert "\n" not in restored.damaged[0], told
        if damage.kind == "bit" and damage.file.suffix == ".bin":
            chunk = str(damage.at // states.CHUNK_BYTES * states.CHUNK_BYTES)
            assert chunk in found, f"{told}, verify says {found!r}"
            assert chunk in restored.damaged[0], f"{told}, resume says {restored.damaged}"

        assert (run / "LATEST").read_text() == "step-1", told
        (moved,) = run.glob("step-2.*")
        moved.rename(newest)
        damage.file.write_bytes(whole)
        (run / "LATEST").write_text("step-2")
    assert not states.broken(run, 2)


def test_every_flipped_bit_of_a_manifest_is_found(run: Path) -> None:
    content = (run / "step-2" / "manifest.json").read_bytes()
    assert parse_manifest(content, run / "step-2").step == 2
    for bit in range(len(content) * 8):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            parse_manifest(bytes(flipped), run / "step-2")
        except ManifestError:
            continue
        pytest.fail(
            f"bit {bit % 8} of byte {bit // 8}: {content[bit // 8 :][:1]!r} read as {flipped[bit // 8 :][:1]!r}"
        )


@pytest.mark.parametrize("name", ["manifest.json", "data"])
def test_a_missing_file_is_found(run: Path, name: str) -> None:
    newest = run / "step-2"
    file = newest / name if name != "data" else next(newest.glob("*.bin"))
    file.unlink()
    assert file.name in _found_by_verify(newest)
    restored, _ = _restored(run)
    assert restored.progress == states.progress_of(1)
    assert file.name in restored.damaged[0]


@pytest.mark.parametrize("action", ["fail", "short"])
def test_reads_that_are_interrupted_or_short_are_continued(run: Path, action: str) -> None:
    for at in range(12):
        script = states.C.CallScript(at=at, action=action, error=errno.EINTR, times=3)
        restored, tensors = _restored(run, script)
        assert restored.progress == states.progress_of(2), at
        assert not restored.damaged
        assert not states.difference(tensors, states.tensors_of(2)), at


def test_a_disk_that_cannot_read_is_named_with_the_systems_reason(run: Path) -> None:
    script = states.C.CallScript(at=1, action="fail", error=errno.EIO)
    restored, tensors = _restored(run, script)
    assert restored.progress == states.progress_of(1)
    assert not states.difference(tensors, states.tensors_of(1))
    assert "step-2" in restored.damaged[0]
    assert ".bin" in restored.damaged[0]
    assert os.strerror(errno.EIO) in restored.damaged[0]


def test_files_of_another_checkpoint_in_its_place_are_found(run: Path) -> None:
    for file in (run / "step-1").glob("*.bin"):
        (run / "step-2" / file.name).write_bytes(file.read_bytes())
    assert _found_by_verify(run / "step-2")
    restored, _ = _restored(run)
    assert restored.progress == states.progress_of(1)


def test_when_every_checkpoint_is_damaged_resume_refuses_and_touches_none(run: Path) -> None:
    for folder in states.step_folders(run):
        file = next(folder.glob("*.bin"))
        file.write_bytes(file.read_bytes()[:-1])
    before = sorted(path.name for path in run.iterdir())
    with pytest.raises(UserError, match="--fresh"):
        states.RunFolder(run, keep=states.KEEP).restore(states.tensors_of(-1), states.RECIPE, states.architecture)
    assert sorted(path.name for path in run.iterdir()) == before
