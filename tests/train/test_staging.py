"""Copies of a state in arenas: what they hold, when they are free, and on which stream they are made."""

import gc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.staging import AsyncStager

from opensora_fast.checkpoint_reader import PAGE, CheckpointReader
from opensora_fast.errors import UserError
from opensora_fast.kernels import extension
from opensora_fast.manifest import MANIFEST
from opensora_fast.train import staging
from opensora_fast.train.checkpoint_writer import ImageWriter
from opensora_fast.train.staging import Stager

CPU = torch.device("cpu")
C = extension.load().module


def state(seed: int = 0) -> dict[str, Tensor]:
    """Tensors of several dtypes and layouts: strided, channels last, a number, a parameter, none at all."""
    generator = torch.Generator().manual_seed(seed)
    convolution = torch.randn(4, 3, 2, 5, 5, generator=generator).to(memory_format=torch.channels_last_3d)
    return {
        "transposed": torch.randn(70, 33, generator=generator).t(),
        "convolution": convolution,
        "half": torch.randn(9, 7, generator=generator).bfloat16(),
        "number": torch.randn((), generator=generator),
        "parameter": torch.nn.Parameter(torch.randn(5, generator=generator)),
        "view": torch.randn(3000, 3, generator=generator)[1:-1],
        "empty": torch.zeros(0, 3),
    }


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def same(staged: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return staged.keys() == expected.keys() and all(torch.equal(staged[name], t) for name, t in expected.items())


def test_a_copy_starts_at_a_page_and_is_row_major() -> None:
    stager = Stager(CPU)
    tensors = state()
    staged = stager.stage(tensors)
    assert same(staged, copies(tensors))
    for name, tensor in staged.items():
        assert tensor.is_contiguous()
        assert not tensor.requires_grad
        assert tensor.data_ptr() % PAGE == 0 or not tensor.numel(), name
    addresses = sorted(tensor.data_ptr() for tensor in staged.values() if tensor.numel())
    assert len({address // PAGE for address in addresses}) == len(addresses)


def test_later_changes_do_not_reach_the_copy() -> None:
    stager, tensors = Stager(CPU), state()
    staged, expected = stager.stage(tensors), copies(tensors)
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.zero_()
    assert same(staged, expected)


def test_two_arenas_are_used_in_turn_and_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    memory = staging.HostMemory
    monkeypatch.setattr(staging, "HostMemory", lambda *args, **options: taken.append(args) or memory(*args, **options))
    stager = Stager(CPU)
    stager.prepare(state())
    stager.prepare(state(1))
    assert len(taken) == 2
    seen = set()
    for step in range(5):
        tensors = state(step)
        staged = stager.stage(tensors)
        assert same(staged, copies(tensors))
        seen.add(staged["half"].data_ptr())
        staged.release()
    assert len(seen) == 2
    assert len(taken) == 2
    stager.stage(state() | {"another": torch.zeros(3)}).release()
    assert len(taken) == 3


def test_a_third_waits_until_one_is_released() -> None:
    stager, first = Stager(CPU), state(1)
    held = [stager.stage(first), stager.stage(state(2))]
    assert stager.busy
    with ThreadPoolExecutor(1) as pool:
        third = pool.submit(stager.stage, state(3))
        assert same(held[0], copies(first))
        assert not third.done()
        held[1].release()
        held[1].release()  # only once
        assert same(third.result(60), copies(state(3)))
    assert stager.busy
    assert same(held[0], copies(first))


def test_an_arena_is_free_when_nobody_has_the_copy() -> None:
    stager = Stager(CPU)
    for _ in range(5):
        staged = stager.stage(state())
        del staged
        gc.collect()
    assert not stager.busy


def test_a_copy_that_fails_frees_its_arena() -> None:
    stager = Stager(CPU)
    for _ in range(3):
        with pytest.raises(NotImplementedError):
            stager.stage({"meta": torch.zeros(2, 3, device="meta").t()})
    assert not stager.busy
    stager.stage(state()).release()


def test_what_fails_behind_the_copy_frees_its_arena_once(monkeypatch: pytest.MonkeyPatch) -> None:
    stager = Stager(CPU)

    def refuse(tensor: Tensor, view: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(staging, "_placed", refuse)
        with pytest.raises(KeyboardInterrupt):
            stager.stage(state())
    gc.collect()
    held = [stager.stage(state(seed)) for seed in (1, 2)]
    assert stager.busy
    assert held[0]["half"].data_ptr() != held[1]["half"].data_ptr()


def test_memory_that_cannot_be_had_is_one_line() -> None:
    stager = Stager(CPU)
    huge = torch.zeros(1).expand(2**50)
    with pytest.raises(UserError, match="bytes .*of host memory are asked for") as raised:
        stager.prepare({"huge": huge})
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError):
        stager.stage({"huge": huge})
    assert same(stager.stage(state()), copies(state()))


def test_it_serves_torch_distributed_checkpoint(tmp_path: Path) -> None:
    """`dcp.async_save` with this stager and this writer."""
    stager = Stager(CPU)
    assert isinstance(stager, AsyncStager)
    tensors = state(5)
    expected = copies(tensors)
    writer = ImageWriter(
        tmp_path,
        5,
        files=C.FileSystem(),
        chunk_bytes=PAGE,
        keep=1,
        progress={},
        recipe={},
        rank=0,
        ranks=1,
        ready=stager.synchronize_staging,
        say=lambda line: None,
    )
    future = dcp.async_save(tensors, storage_writer=writer, async_stager=stager, no_dist=True)
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.zero_()
    future.result()
    assert (tmp_path / "step-5" / MANIFEST).is_file()
    found = {name: torch.ones_like(tensor) for name, tensor in expected.items()}
    CheckpointReader(tmp_path / "step-5").read(found)
    assert same(found, expected)


def test_nothing_that_was_not_staged_is_written(tmp_path: Path) -> None:
    writer = ImageWriter(
        tmp_path, 1, files=C.FileSystem(), chunk_bytes=PAGE, keep=1, progress={}, recipe={}, rank=0, ranks=1,
        ready=lambda: None, say=lambda line: None,
    )  # fmt: skip
    odd = torch.zeros(2 * PAGE, dtype=torch.uint8)
    odd = odd[-odd.data_ptr() % PAGE + 1 :]
    with pytest.raises(dcp.api.CheckpointException, match="begins at no page"):
        dcp.save({"odd": odd}, storage_writer=writer, no_dist=True)
    writer.abandon()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestOnADevice:
    def test_copies_are_ordered_before_the_update(self) -> None:
        """The copy sees what was computed before `stage`, and an update after `order_update` does not reach it."""
        stager = Stager(torch.device("cuda"))
        weight = torch.zeros(64, 2**20, device="cuda")
        stager.prepare({"weight": weight})
        for step in range(1, 4):
            torch.cuda._sleep(50_000_000)
            weight.fill_(step)
            staged = stager.stage({"weight": weight})
            stager.order_update()
            weight.fill_(-1)
            staged.wait()
            assert staged["weight"].eq(step).all()
            staged.release()

    def test_stage_does_not_wait_for_the_device(self) -> None:
        stager = Stager(torch.device("cuda"))
        weight = torch.ones(2**20, device="cuda")
        stager.prepare({"weight": weight})
        torch.cuda._sleep(2_000_000_000)
        busy = torch.cuda.current_stream().record_event()
        staged = stager.stage({"weight": weight})
        assert not busy.query()
        staged.wait()
        assert busy.query()
        assert staged["weight"].eq(1).all()

    def test_the_arenas_are_pinned(self) -> None:
        staged = Stager(torch.device("cuda")).stage({"weight": torch.ones(3, device="cuda"), "host": torch.ones(2)})
        staged.wait()
        assert staged["weight"].is_pinned()
        assert staged["host"].eq(1).all()
