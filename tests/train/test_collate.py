"""Collation: the bits of the formula, in the right places, and no thread or tensor let go too early."""

import contextlib
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opensora_fast.host_memory import HostMemory
from opensora_fast.train.collate import ClipPixels, Collator
from opensora_fast.train.pinned_pool import PinnedPool
from opensora_fast.video_io import to_signed

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def collators():
    made = [Collator(), Collator(threads=3)]
    yield made
    for collator in made:
        collator.close()


def pixels(*shape: int) -> Tensor:
    return torch.randint(256, (*shape, 3), dtype=torch.uint8)


def clip(frames_THWC: Tensor, top: int = 0, left: int = 0) -> ClipPixels:
    frames, height, width, _ = frames_THWC.shape
    return ClipPixels(frames_THWC.data_ptr(), height, width, frames, top, left)


def expected(clips: list[tuple[Tensor, int, int]], size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    windows = [frames[:, top : top + size[0], left : left + size[1]] for frames, top, left in clips]
    return to_signed(torch.stack(windows).permute(0, 4, 1, 2, 3)).to(dtype)


def same_bits(left: Tensor, right: Tensor) -> bool:
    bits = [tensor.clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8) for tensor in (left, right)]
    return left.shape == right.shape and torch.equal(*bits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_value_has_the_bits_of_the_formula(collators, dtype):
    values = torch.arange(256, dtype=torch.uint8).view(1, 2, 128, 1).repeat(1, 1, 1, 3)
    out = torch.empty(1, 3, 1, 2, 128, dtype=dtype)
    assert collators[0].submit([clip(values)], out).wait(None)
    formula = (torch.arange(256).float() / 127.5 - 1).to(dtype)
    for channel in range(3):
        assert same_bits(out[0, channel].flatten(), formula)


@settings(max_examples=120)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), which=st.integers(0, 1))
def test_batches_have_the_bits_of_the_formula(collators, data, dtype, which):
    batch, frames, height = (data.draw(st.integers(1, 4)) for _ in range(3))
    width = data.draw(st.one_of(st.integers(1, 70), st.sampled_from([256, 320, 1280]), st.integers(250, 600)))
    clips = []
    for _ in range(batch):
        top, left, below, right = (data.draw(st.integers(0, 5)) for _ in range(4))
        clips.append((pixels(frames, top + height + below, left + width + right), top, left))
    # One element more on either side: nothing is written there, and rows begin at any alignment.
    before = data.draw(st.integers(1, 20))
    count = batch * 3 * frames * height * width
    room = torch.full((before + count + 9,), 77, dtype=dtype)
    out = room[before : before + count].view(batch, 3, frames, height, width)
    ticket = collators[which].submit([clip(*source) for source in clips], out)
    assert ticket.wait(None)
    assert ticket.wait(0)
    assert same_bits(out, expected(clips, (height, width), dtype))
    assert (room[:before] == 77).all()
    assert (room[before + count :] == 77).all()


def test_batches_that_are_submitted_at_once_are_all_made(collators):
    sources = [pixels(9, 40 + number, 64) for number in range(20)]
    outs = [torch.empty(1, 3, 9, 40, 64) for _ in sources]
    for collator in collators:
        for out in outs:
            out.fill_(5)
        tickets = [collator.submit([clip(source)], out) for source, out in zip(sources, outs, strict=True)]
        assert all(ticket.wait(None) for ticket in reversed(tickets))
        for source, out in zip(sources, outs, strict=True):
            assert same_bits(out, expected([(source, 0, 0)], (40, 64), torch.float32))


def test_a_batch_is_made_in_the_pool_and_its_block_comes_back(collators):
    shape = (2, 3, 5, 32, 48)
    pool = PinnedPool(HostMemory(2**20), largest=2**20, setting="--data.pinned_gib")
    source = pixels(5, 32, 48)
    for _ in range(3):
        block = pool.take(2 * 3 * 5 * 32 * 48 * 2, timeout=0)
        ticket = collators[0].submit([clip(source), clip(source)], block.tensor(torch.bfloat16, shape))
        del block
        assert ticket.wait(None)
        assert pool.statistics().in_use > 0  # the ticket keeps it
        del ticket
        assert pool.statistics().in_use == 0


def test_a_ticket_that_is_dropped_waits_for_the_work(collators):
    source = pixels(60, 128, 160)
    out = torch.empty(1, 3, 60, 128, 160)
    for collator in collators:
        out.fill_(5)
        collator.submit([clip(source)], out)
        assert same_bits(out, expected([(source, 0, 0)], (128, 160), torch.float32))


def test_closing_completes_the_work_and_ends_the_threads():
    before = len(os.listdir("/proc/self/task"))
    collator = Collator(threads=2)
    source = pixels(60, 128, 160)
    outs = [torch.empty(1, 3, 60, 128, 160) for _ in range(4)]
    tickets = [collator.submit([clip(source)], out) for out in outs]
    collator.close()
    collator.close()
    assert all(ticket.wait(0) for ticket in tickets)
    wanted = expected([(source, 0, 0)], (128, 160), torch.float32)
    assert all(same_bits(out, wanted) for out in outs)
    assert len(os.listdir("/proc/self/task")) == before
    with pytest.raises(RuntimeError, match="closed"):
        collator.submit([clip(source)], outs[0])


def test_collators_leave_nothing_behind():
    def holdings() -> tuple[int, int, int]:
        maps = len(Path("/proc/self/maps").read_text().splitlines())
        return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")), maps

    source, out = pixels(2, 8, 8), torch.empty(1, 3, 2, 8, 8)

    def use(count: int) -> None:
        for number in range(count):
            collator = Collator(threads=1 + number % 3)
            collator.submit([clip(source)], out)
            if number % 2:
                collator.close()

    use(10)
    before = holdings()
    use(100)
    threads, descriptors, maps = holdings()
    assert (threads, descriptors) == before[:2]
    assert maps <= before[2] + 10  # the allocator may map something of its own


def test_what_does_not_fit_is_refused(collators):
    collator, out = collators[0], torch.empty(1, 3, 4, 8, 10)
    good = pixels(4, 9, 12)
    assert collator.submit([clip(good, 1, 2)], out).wait(None)
    for bad in (clip(good, 2, 2), clip(good, 1, 3), clip(good, -1, 0), clip(good, 0, -1), clip(pixels(4, 7, 12))):
        with pytest.raises(ValueError, match="must cover the batch's height and width"):
            collator.submit([bad], out)
    with pytest.raises(ValueError, match="as many frames"):
        collator.submit([clip(pixels(3, 9, 12))], out)
    for shape in ((2, 3, 4, 8, 10), (1, 4, 4, 8, 10), (3, 4, 8, 10)):
        with pytest.raises(ValueError, match=r"contiguous CPU tensor \[1, 3, T, H, W\]"):
            collator.submit([clip(good)], torch.empty(shape))
    with pytest.raises(ValueError, match="contiguous"):
        collator.submit([clip(good)], torch.empty(1, 3, 4, 10, 8).transpose(3, 4))
    with pytest.raises(ValueError, match="float64"):
        collator.submit([clip(good)], out.double())
    with pytest.raises(ValueError, match="empty"):
        collator.submit([], torch.empty(0, 3, 4, 8, 10))
    with pytest.raises(ValueError, match="empty"):
        collator.submit([clip(good)], out[..., :0].contiguous())
    with pytest.raises(ValueError, match="threads=0"):
        Collator(threads=0)


def test_a_forked_child_goes_without_waiting(collators):
    collator, source = Collator(), pixels(60, 128, 160)
    out = torch.empty(1, 3, 60, 128, 160)
    ticket = collator.submit([clip(source)], out)
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            for call in (lambda: ticket.wait(None), lambda: collator.submit([clip(source)], out)):
                with pytest.raises(RuntimeError, match="forked"):
                    call()
            del ticket, call
            collator.close()
            del collator
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert ticket.wait(None)
    assert same_bits(out, expected([(source, 0, 0)], (128, 160), torch.float32))
    collator.close()
