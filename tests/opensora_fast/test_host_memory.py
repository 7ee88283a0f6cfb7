"""Host memory: what is asked for is there, goes with its last user, and many copies are as one."""

import contextlib
import faulthandler
import gc
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opensora_fast import host_memory
from opensora_fast.errors import UserError
from opensora_fast.host_memory import HostMemory, copy

MIB = 2**20
HUGE_PAGE = 2 * MIB


def mapped(address: int) -> dict[str, int]:
    """KiB by name of the mapping that holds `address`, from the system's own table; empty if there is none."""
    fields: dict[str, int] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if not first.endswith(":"):
            begin, end = (int(bound, 16) for bound in first.split("-"))
            inside = begin <= address < end
        elif inside and line.endswith(" kB"):
            fields[first[:-1]] = int(line.split()[1])
    return fields


def in_child(body) -> int:
    """What a forked child ends with: 0 when `body()` is true, 1 when not, 2 when it raises, minus a signal."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()  # one of them is meant to die
        code = 2
        with contextlib.suppress(BaseException):
            code = 0 if body() else 1
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("size", [1, 4096, 3 * MIB + 5, 70 * MIB])
def test_memory_is_zero_aligned_and_there(size, shared):
    memory = HostMemory(size, shared=shared)
    assert memory.bytes == size
    assert memory.address % HUGE_PAGE == 0
    tensor = memory.tensor
    assert tensor.dtype == torch.uint8
    assert tensor.shape == (size,)
    assert tensor.data_ptr() == memory.address
    assert not tensor.any()
    tensor.fill_(7)
    assert (memory.tensor == 7).all()


@pytest.mark.parametrize("shared", [False, True])
def test_all_pages_are_in_memory_before_the_first_use(shared):
    memory = HostMemory(21 * MIB, shared=shared)
    assert mapped(memory.address)["Rss"] == 21 * 1024


def test_memory_goes_with_its_last_tensor():
    memory = HostMemory(4 * MIB)
    address = memory.address
    view = memory.tensor[MIB:].view(torch.float32)[5:]
    memory.close()
    memory.close()
    view.fill_(1.5)
    assert view.sum() == 1.5 * view.numel()
    assert mapped(address)
    del view
    assert not mapped(address)
    with pytest.raises(ValueError, match="closed"):
        _ = memory.tensor


def test_memory_goes_with_its_last_reference():
    memory = HostMemory(4 * MIB)
    address = memory.address
    del memory
    assert not mapped(address)


def test_shared_memory_is_the_same_in_another_process():
    memory = HostMemory(3 * MIB, shared=True)
    memory.tensor[MIB] = 5
    program = f"""
from opensora_fast.host_memory import HostMemory
memory = HostMemory.attach({memory.descriptor}, {memory.bytes})
assert memory.tensor[{MIB}] == 5
memory.tensor[-1] = 6
"""
    subprocess.run([sys.executable, "-P", "-c", program], pass_fds=[memory.descriptor], check=True)
    assert memory.tensor[-1] == 6


def test_attached_memory_outlives_the_descriptor_and_the_maker():
    memory = HostMemory(MIB, shared=True)
    attached = HostMemory.attach(memory.descriptor, 1000)
    assert attached.bytes == 1000
    memory.tensor[999] = 9
    memory.close()
    assert attached.tensor[999] == 9
    again = HostMemory.attach(attached.descriptor, MIB)
    assert again.tensor[999] == 9


def test_nobody_can_shorten_shared_memory():
    memory = HostMemory(MIB, shared=True)
    with pytest.raises(PermissionError):
        os.ftruncate(memory.descriptor, 0)


def test_what_cannot_be_attached_is_one_line(tmp_path):
    memory = HostMemory(MIB, shared=True)
    with pytest.raises(UserError, match="fewer bytes"):
        HostMemory.attach(memory.descriptor, 2 * MIB)
    with pytest.raises(UserError, match="Bad file descriptor"):
        HostMemory.attach(987654, MIB)
    with pytest.raises(ValueError, match="not shared"):
        _ = HostMemory(MIB).descriptor


def test_too_much_is_refused_with_the_setting(monkeypatch):
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 3 * 2**30)
    with pytest.raises(UserError) as refusal:
        HostMemory(4 * 2**30 + 1, setting="--data.pinned_gib")
    assert str(refusal.value) == (
        "--data.pinned_gib: 4294967297 bytes (4.00 GiB) of host memory are asked for, but 3.00 GiB are free: "
        "lower --data.pinned_gib, or free memory"
    )
    monkeypatch.setattr(host_memory, "available_bytes", lambda: None)
    with pytest.raises(UserError, match="--data.pinned_gib: .*Cannot allocate memory: lower"):
        HostMemory(2**60, setting="--data.pinned_gib")
    for size in (0, -1):
        with pytest.raises(UserError, match=f"memory: {size} bytes"):
            HostMemory(size)


def test_what_is_free_is_known_here():
    assert 0 < host_memory.available_bytes() < 2**50


def test_the_tightest_control_group_counts(tmp_path):
    job = tmp_path / "slice" / "job"
    job.mkdir(parents=True)
    for folder, limit, used in ((job, "max", 100), (job.parent, "5000", 1000), (tmp_path, "9000", 2000)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text("anon 300\nactive_file 50\ninactive_file 7\n")
    limits = host_memory._group_limits(tmp_path, "4:cpu:/slice\n0::/slice/job\n")
    assert limits == [4057, 7057]
    assert host_memory._group_limits(tmp_path / "nothing", "0::/\n") == []


@settings(max_examples=60)
@given(data=st.data(), threads=st.integers(1, 4))
def test_copies_put_each_byte_where_it_belongs(data, threads):
    sizes = data.draw(st.lists(st.one_of(st.integers(0, 70), st.integers(0, 700_000)), max_size=8))
    gaps = data.draw(st.lists(st.integers(0, 130), min_size=len(sizes) + 1, max_size=len(sizes) + 1))
    source = torch.randint(256, (sum(sizes) + sum(gaps) + 1,), dtype=torch.uint8)
    target = torch.full_like(source, 251)
    expected = target.clone()
    pieces, at, end = [], 0, source.numel()
    for size, gap in zip(sizes, gaps, strict=False):
        at += gap
        begin = end - at - size  # the sources come in the opposite order
        pieces.append((target.data_ptr() + at, source.data_ptr() + begin, size))
        expected[at : at + size] = source[begin : begin + size]
        at += size
    copy(pieces, threads=threads)
    assert torch.equal(target, expected)


@pytest.mark.parametrize("threads", [1, 3])
def test_one_long_copy(threads):
    source = torch.randint(256, (19 * MIB + 3,), dtype=torch.uint8)
    memory = HostMemory(20 * MIB)
    copy([(memory.address + 5, source.data_ptr(), source.numel())], threads=threads)
    assert torch.equal(memory.tensor[5 : 5 + source.numel()], source)
    assert not memory.tensor[:5].any()
    assert not memory.tensor[5 + source.numel() :].any()


def test_no_copies_and_no_threads():
    copy([], threads=2)
    with pytest.raises(ValueError, match="threads=0"):
        copy([], threads=0)


def test_a_forked_child_leaves_the_memory_as_it_is():
    private, shared = HostMemory(4 * MIB), HostMemory(4 * MIB, shared=True)
    calls: list[str] = []
    private.native.before_release(lambda: calls.append("released"))
    private.tensor.fill_(3)
    shared.tensor.fill_(4)

    def drop() -> bool:
        private.close()
        shared.close()
        gc.collect()
        return calls == []

    assert in_child(drop) == 0
    assert in_child(lambda: private.tensor[0] == 3) == -signal.SIGSEGV
    assert in_child(lambda: shared.tensor.fill_(5)[0] == 5) == 0
    assert (private.tensor == 3).all()
    assert (shared.tensor == 5).all()
    assert calls == []
    private.close()
    assert calls == ["released"]


class Driver:
    """Stands in for the CUDA runtime: notes what is registered, and whether it was mapped when it was given back."""

    def __init__(self, status: int = 0):
        self.status = status
        self.calls: list[tuple] = []

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.calls.append(("register", address, size, flags))
        return self.status

    def cudaHostUnregister(self, address: int) -> int:
        self.calls.append(("unregister", address, bool(mapped(address))))
        return 0

    def cudaGetErrorString(self, status: int) -> str:
        return f"error {status}"


@pytest.fixture
def driver(monkeypatch):
    fake = Driver()
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(cudart=lambda: fake, device=lambda _: contextlib.nullcontext()))
    return fake


def test_memory_for_a_device_is_registered_once_and_given_back_before_it_goes(driver):
    memory = HostMemory(MIB, device=torch.device("cuda"))
    address, tensor = memory.address, memory.tensor
    memory.close()
    assert driver.calls == [("register", address, MIB, 1)]
    del tensor
    assert driver.calls[1:] == [("unregister", address, True)]


def test_another_mapping_is_registered_for_itself(driver):
    memory = HostMemory(MIB, shared=True)
    attached = HostMemory.attach(memory.descriptor, MIB, device=torch.device("cuda"))
    address = attached.address
    attached.tensor.fill_(7)
    assert bool((memory.tensor == 7).all())
    assert address != memory.address
    attached.close()
    assert driver.calls == [("register", address, MIB, 1), ("unregister", address, True)]
    driver.status = 2
    with pytest.raises(UserError, match=r"--memory-budget: .*CUDA cannot pin it"):
        HostMemory.attach(memory.descriptor, MIB, device=torch.device("cuda"), setting="--memory-budget")


def test_memory_that_cannot_be_pinned_is_refused(driver):
    driver.status = 2
    with pytest.raises(
        UserError, match=r"--data.pinned_gib: .*CUDA cannot pin it \(error 2\): lower --data.pinned_gib"
    ):
        HostMemory(MIB, device=torch.device("cuda"), setting="--data.pinned_gib")
    assert len(driver.calls) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shared", [False, True])
def test_device_copies_from_registered_memory(shared):
    memory = HostMemory(8 * MIB, device=torch.device("cuda"), shared=shared)
    source = torch.randint(256, (8 * MIB,), dtype=torch.uint8)
    copy([(memory.address, source.data_ptr(), source.numel())], threads=2)
    assert memory.tensor.is_pinned()
    there = memory.tensor.to("cuda", non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(there.cpu(), source)


def test_many_memories_leave_nothing_behind():
    def holdings() -> tuple[int, ...]:
        maps = len(Path("/proc/self/maps").read_text().splitlines())
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), maps

    def use(count: int) -> None:
        for i in range(count):
            memory = HostMemory(MIB + i, shared=i % 2 == 0)
            memory.tensor[i] = 1
            memory.close()

    use(20)
    before = holdings()
    use(300)
    descriptors, threads, maps = holdings()
    assert (descriptors, threads) == before[:2]
    assert maps <= before[2] + 10  # the allocator may map something of its own
