"""The pool: blocks never overlap, all come back, nothing grows, and whoever waits is served."""

import contextlib
import gc
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from opensora_fast.errors import UserError
from opensora_fast.host_memory import HostMemory
from opensora_fast.train.pinned_pool import Block, PinnedPool, block_bytes

PAGE, MIB = 4096, 2**20
SETTING = "--data.pinned_gib"


def pool_of(bytes: int) -> PinnedPool:
    return PinnedPool(HostMemory(bytes), largest=1, setting=SETTING)


def until(condition) -> None:
    """Returns when the other thread has come so far."""
    while not condition():
        os.sched_yield()


def start(body) -> threading.Thread:
    thread = threading.Thread(target=body)
    thread.start()
    return thread


class Arena(RuleBasedStateMachine):
    """Takes and drops blocks at random, against a list of what is held."""

    @initialize(pages=st.integers(1, 400), spare=st.integers(0, PAGE - 1))
    def make(self, pages: int, spare: int) -> None:
        self.capacity = pages * PAGE
        memory = HostMemory(self.capacity + spare)
        self.base = memory.address
        self.pool = PinnedPool(memory, largest=PAGE, setting=SETTING)
        self.held: list[tuple[int, int, int, list[Block | Tensor]]] = []  # offset, bytes taken, mark, references
        self.taken = self.returned = self.peak = 0

    def gaps(self) -> list[int]:
        ends = [0, *sorted(offset + taken for offset, taken, _, _ in self.held)]
        begins = [*sorted(offset for offset, _, _, _ in self.held), self.capacity]
        return [begin - end for begin, end in zip(begins, ends, strict=True)]

    @rule(bytes=st.one_of(st.integers(1, 10 * PAGE), st.integers(1, 500 * PAGE)), mark=st.integers(0, 255))
    def take(self, bytes: int, mark: int) -> None:
        need = block_bytes(bytes)
        if need > self.capacity:
            with pytest.raises(UserError, match=SETTING):
                self.pool.take(bytes, timeout=0)
            return
        block = self.pool.take(bytes, timeout=0)
        if block is None:
            assert need > max(self.gaps())
            return
        assert (block.bytes, block.address) == (bytes, self.base + block.offset)
        assert block.offset % PAGE == 0
        block.tensor(torch.uint8, (bytes,)).fill_(mark)
        self.held.append((block.offset, need, mark, [block]))
        self.taken += 1
        self.peak = max(self.peak, sum(taken for _, taken, _, _ in self.held))

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 10**6), part=st.floats(0, 1))
    def make_a_view(self, which: int, part: float) -> None:
        *_, references = self.held[which % len(self.held)]
        reference = references[-1]
        if isinstance(reference, Block):
            references.append(reference.tensor(torch.uint8, (reference.bytes,)))
        else:
            references.append(reference[int(part * (reference.numel() - 1)) :])

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 10**6), reference=st.integers(0, 10**6))
    def drop(self, which: int, reference: int) -> None:
        index = which % len(self.held)
        _, _, mark, references = self.held[index]
        last = references.pop(reference % len(references))
        tensor = last if isinstance(last, Tensor) else last.tensor(torch.uint8, (last.bytes,))
        assert (tensor == mark).all()
        if not references:
            del self.held[index]
            self.returned += 1

    @invariant()
    def what_is_held_does_not_overlap(self) -> None:
        assert all(gap >= 0 for gap in self.gaps())

    @invariant()
    def bytes_are_conserved(self) -> None:
        now = self.pool.statistics()
        assert now.capacity == self.capacity
        assert now.in_use == sum(taken for _, taken, _, _ in self.held)
        assert (now.taken, now.returned, now.waits, now.peak) == (self.taken, self.returned, 0, self.peak)

    def teardown(self) -> None:
        self.held.clear()
        assert self.pool.statistics().in_use == 0
        sizes = {block_bytes(pages * PAGE) for pages in range(1, self.capacity // PAGE + 1)}
        assert self.pool.take(max(size for size in sizes if size <= self.capacity), timeout=0) is not None


TestArena = Arena.TestCase
TestArena.settings = settings(max_examples=150, stateful_step_count=40)


@given(bytes=st.integers(1, 2**40))
def test_blocks_have_eight_sizes_for_each_doubling(bytes):
    taken = block_bytes(bytes)
    assert bytes <= taken
    assert taken % PAGE == 0
    assert taken <= max(bytes * 9 / 8, bytes + PAGE - 1)
    assert block_bytes(taken) == taken
    assert block_bytes(bytes + 1) >= taken
    if taken >= 8 * PAGE:
        assert taken % 2 ** (taken.bit_length() - 4) == 0


def test_a_batch_that_does_not_fit_is_refused_with_the_setting():
    memory = HostMemory(MIB)
    with pytest.raises(UserError) as refusal:
        PinnedPool(memory, largest=3 * MIB, setting=SETTING)
    assert str(refusal.value) == (
        "--data.pinned_gib: a batch needs 0.003 GiB of the pool (3145728 bytes), which has 0.001 GiB: "
        "raise --data.pinned_gib to 0.003 or more"
    )
    pool = PinnedPool(memory, largest=MIB, setting=SETTING)
    with pytest.raises(UserError, match=SETTING):
        pool.take(MIB + 1, timeout=None)
    assert pool.take(MIB, timeout=None) is not None


def test_a_block_makes_tensors():
    block = pool_of(MIB).take(1000, timeout=None)
    ints = block.tensor(torch.int32, (10, 25))
    ints.copy_(torch.arange(250).view(10, 25))
    assert ints.data_ptr() == block.address
    assert block.tensor(torch.bfloat16, [500]).view(torch.int16)[2] == 1
    for dtype, shape in ((torch.float32, (251,)), (torch.uint8, (0, 3)), (torch.uint8, (-1000,))):
        with pytest.raises(ValueError, match="does not fit"):
            block.tensor(dtype, shape)
    with pytest.raises(ValueError, match="bytes=0"):
        block_bytes(0)


@pytest.mark.parametrize(
    "keep",
    [
        lambda block: block,
        lambda block: block.tensor(torch.float32, (2, 3)),
        lambda block: block.tensor(torch.float32, (2, 3)).transpose(0, 1)[1:, 1].detach(),
        lambda block: block.tensor(torch.float32, (2, 3)).numpy()[1],
        lambda block: memoryview(block.tensor(torch.uint8, (2, 3)).numpy()),
        lambda block: torch.zeros(2, 3, requires_grad=True).mul(
            block.tensor(torch.float32, (2, 3))
        ),  # for its gradient
    ],
    ids=["block", "tensor", "view", "array", "memoryview", "graph"],
)
def test_a_block_comes_back_with_the_last_that_refers_to_it(keep):
    pool = pool_of(MIB)
    kept = keep(pool.take(100, timeout=None))
    assert pool.statistics().returned == 0
    del kept
    assert pool.statistics().returned == 1
    assert pool.statistics().in_use == 0


def test_a_block_and_its_pool_outlive_the_pool_and_the_memory():
    memory = HostMemory(MIB)
    pool = PinnedPool(memory, largest=MIB, setting=SETTING)
    tensor = pool.take(MIB, timeout=None).tensor(torch.uint8, (MIB,))
    memory.close()
    del memory, pool
    tensor.fill_(3)
    assert (tensor == 3).all()


def test_a_block_comes_back_when_its_consumer_fails():
    pool = pool_of(MIB)

    def consume(tensor: Tensor) -> None:
        kept = tensor.view(2, -1)
        raise ArithmeticError(f"of {kept.shape}")

    for _ in range(5):
        with contextlib.suppress(ArithmeticError):
            consume(pool.take(MIB, timeout=0).tensor(torch.uint8, (MIB,)))
    assert pool.statistics().returned == 5


def test_the_garbage_collector_brings_blocks_back():
    pool = pool_of(MIB)
    gc.disable()
    try:
        cycle = [pool.take(MIB, timeout=0).tensor(torch.uint8, (5,))]
        cycle.append(cycle)
        del cycle
        assert pool.take(MIB, timeout=0) is None
        gc.collect()
        assert pool.take(MIB, timeout=0) is not None
    finally:
        gc.enable()


def test_other_threads_bring_blocks_back():
    pool = pool_of(16 * MIB)
    blocks = [pool.take(PAGE, timeout=0).tensor(torch.uint8, (1,)) for _ in range(400)]
    threads = [start(lambda own=blocks[i::4]: own.clear()) for i in range(4)]
    blocks.clear()
    for thread in threads:
        thread.join()
    del thread, threads
    gc.collect()
    assert pool.statistics().returned == 400
    assert pool.take(16 * MIB, timeout=0) is not None


def test_who_waits_gets_the_block_that_comes_back():
    pool = pool_of(MIB)
    block = pool.take(MIB, timeout=None)
    offsets = []
    thread = start(lambda: offsets.append(pool.take(MIB, timeout=None).offset))
    until(lambda: pool.statistics().waits == 1)  # and this thread runs: the lock is free
    assert offsets == []
    del block
    thread.join()
    assert offsets == [0]
    statistics = pool.statistics()
    assert (statistics.taken, statistics.returned, statistics.waits) == (2, 2, 1)
    assert statistics.wait_seconds > 0


def test_a_large_request_is_not_passed_over():
    pool = pool_of(4 * MIB)
    blocks = [pool.take(MIB, timeout=0) for _ in range(4)]
    order: list[str] = []
    large = start(lambda: order.append(f"large at {pool.take(3 * MIB, timeout=None).offset}"))
    until(lambda: pool.statistics().waits == 1)
    blocks.pop(1)
    assert pool.take(MIB, timeout=0) is None  # there is room, but it is not its turn
    del blocks[1:]
    large.join()
    assert order == [f"large at {MIB}"]
    assert pool.take(MIB, timeout=0) is not None


def test_who_gives_up_lets_the_next_pass():
    pool = pool_of(2 * MIB)
    kept = pool.take(MIB, timeout=0)
    taken: list[Block | None] = []
    first = start(lambda: taken.append(pool.take(2 * MIB, timeout=0.2)))
    until(lambda: pool.statistics().waits == 1)
    block = pool.take(MIB, timeout=None)
    first.join()
    assert taken == [None]
    assert {kept.offset, block.offset} == {0, MIB}


def test_waiting_ends_with_the_timeout():
    pool = pool_of(MIB)
    block = pool.take(MIB, timeout=None)
    for timeout in (-1, 0, 0.06):
        assert pool.take(1, timeout=timeout) is None
    statistics = pool.statistics()
    assert (statistics.waits, statistics.taken) == (1, 1)
    assert statistics.wait_seconds >= 0.06
    assert block.bytes == MIB


def test_ctrl_c_ends_the_wait():
    pool = pool_of(MIB)
    block = pool.take(MIB, timeout=None)

    def interrupt() -> None:
        until(lambda: pool.statistics().waits == 1)
        os.kill(os.getpid(), signal.SIGINT)

    thread = start(interrupt)
    with pytest.raises(KeyboardInterrupt):
        pool.take(MIB, timeout=None)
    thread.join()
    del block
    assert pool.take(MIB, timeout=0) is not None


def test_a_forked_child_changes_nothing():
    pool = pool_of(2 * MIB)
    block = pool.take(MIB, timeout=None)
    tensor = block.tensor(torch.uint8, (MIB,)).fill_(7)
    waiting = start(lambda: pool.take(2 * MIB, timeout=None))
    until(lambda: pool.statistics().waits == 1)
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            try:
                pool.take(1, timeout=0)
            except RuntimeError:
                del block, tensor
                del pool
                gc.collect()
                os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    statistics = pool.statistics()
    assert (statistics.in_use, statistics.taken, statistics.returned) == (MIB, 1, 0)
    assert (tensor == 7).all()
    del block, tensor
    waiting.join()
    assert pool.statistics().in_use == 0


def test_ten_thousand_handles_leave_nothing_behind():
    pool = pool_of(8 * MIB)

    def holdings() -> dict[str, int]:
        gc.collect()
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        threads, descriptors = len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))
        return {"threads": threads, "descriptors": descriptors, "bytes": resident}

    def use(count: int) -> None:
        held: list[Tensor] = []
        for number in range(count):
            block = pool.take(1 + number * 7919 % (600 * 1024), timeout=0)
            while block is None:
                held.pop(number % len(held))
                block = pool.take(1 + number * 7919 % (600 * 1024), timeout=0)
            held.append(block.tensor(torch.uint8, (block.bytes,))[:1])

    use(2_000)
    before = holdings()
    use(10_000)
    after = holdings()
    statistics = pool.statistics()
    assert statistics.taken == statistics.returned == 12_000
    assert (statistics.capacity, statistics.in_use) == (8 * MIB, 0)
    assert (after["threads"], after["descriptors"]) == (before["threads"], before["descriptors"])
    assert after["bytes"] - before["bytes"] < MIB  # a hundred bytes for each handle would show


def test_threads_share_the_pool():
    pool = pool_of(2 * MIB)
    wrong: list[str] = []

    def work(seed: int) -> None:
        sizes = torch.randint(1, MIB, (150,), generator=torch.Generator().manual_seed(seed)).tolist()
        for size in sizes:
            tensor = pool.take(size, timeout=None).tensor(torch.uint8, (size,)).fill_(seed)
            if not (tensor == seed).all():
                wrong.append(f"{size} of thread {seed}")
            del tensor

    threads = [start(lambda seed=seed: work(seed)) for seed in range(5)]
    for thread in threads:
        thread.join()
    statistics = pool.statistics()
    assert wrong == []
    assert statistics.taken == statistics.returned == 5 * 150
    assert statistics.peak <= statistics.capacity
