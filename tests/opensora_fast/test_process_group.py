"""Real processes that sample together: started by torchrun, joined, and gone afterwards with the right exit code."""

import os
import select
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from opensora_fast import process_group
from opensora_fast.errors import UserError
from opensora_fast.process_group import joined, launch, relaunch

PROGRAM = """
import os, signal, sys
import torch
import torch.distributed as dist
from opensora_fast.errors import UserError
from opensora_fast.process_group import joined, leave

what, folder = sys.argv[1:]
with joined() as ranks:
    print(f"rank {ranks.rank} of {ranks.size}", flush=True)
    if what == "agree":
        ranks.agree(UserError("no such file") if ranks.rank == 1 else None)
    if what == "raise" and ranks.rank == 1:
        raise UserError("no memory on rank 1")
    if what == "break" and ranks.rank == 1:
        raise ZeroDivisionError("a bug")
    if what == "die" and ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "wait":
        with open(f"{folder}/pids", "w") as pids:
            print(os.getpid(), file=pids)
        while True:
            signal.pause()
    whole = [torch.empty(3) for _ in range(ranks.size)]
    dist.all_gather(whole, torch.full((3,), float(ranks.rank)))
    assert torch.stack(whole)[:, 0].tolist() == list(range(ranks.size))
sys.exit(leave(3 if what == "fail" else 0))
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return [str(path)]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_ranks_meet_work_and_leave(program, tmp_path, capfd):
    assert launch(3, [*program, "work", str(tmp_path)]) == 0
    printed = capfd.readouterr().out
    assert all(f"rank {rank} of 3" in printed for rank in range(3))


@pytest.mark.slow
def test_success_stays_success(program, tmp_path):
    assert [launch(4, [*program, "work", str(tmp_path)]) for _ in range(10)] == [0] * 10


@pytest.mark.slow
def test_a_failure_is_told(program, tmp_path):
    assert launch(2, [*program, "fail", str(tmp_path)]) == 3


@pytest.mark.slow
def test_torchrun_starts_the_same_ranks(program, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*torchrun, *program, "work", str(tmp_path)], capture_output=True, text=True, check=True)
    assert "rank 1 of 2" in done.stdout


def test_a_rank_that_dies_ends_the_others(program, tmp_path, capfd):
    assert launch(2, [*program, "die", str(tmp_path)]) == 128 + signal.SIGKILL
    assert "error: rank 1 was ended by SIGKILL" in capfd.readouterr().err


def test_an_agreed_error_is_one_line(program, tmp_path, capfd):
    assert launch(2, [*program, "agree", str(tmp_path)]) == 2
    told = capfd.readouterr().err.splitlines()
    assert [line for line in told if "Gloo" not in line] == ["error: no such file"]


@pytest.mark.parametrize(
    ("what", "code", "line"),
    [("raise", 2, "error: no memory on rank 1"), ("break", 1, "ZeroDivisionError: a bug")],
)
def test_an_error_of_one_rank_ends_those_that_wait_for_it(what, code, line, program, tmp_path, capfd):
    """The other rank is in an exchange, which fails with the connection: the launcher ends it before it tells that."""
    assert launch(2, [*program, what, str(tmp_path)]) == code
    told = [each for each in capfd.readouterr().err.splitlines() if "Gloo" not in each]
    assert told[-1] == line
    assert what == "break" or told == [line]


def test_ctrl_c_reaches_every_rank(program, tmp_path):
    """The command is a process of its own, as in a shell."""
    os.mkfifo(tmp_path / "pids")
    call = "import sys; from opensora_fast.process_group import launch; sys.exit(launch(2, sys.argv[1:]))"
    command = subprocess.Popen([sys.executable, "-c", call, *program, "wait", str(tmp_path)])
    fifo = os.open(tmp_path / "pids", os.O_RDWR)  # no end of file between one rank and the next
    try:
        told = b""
        while told.count(b"\n") < 2:
            ready, _, _ = select.select([fifo], [], [], 120)
            assert ready, "the ranks did not start"
            told += os.read(fifo, 4096)
        command.send_signal(signal.SIGINT)
        assert command.wait(120) == 130
        assert not any(alive(int(pid)) for pid in told.split())
    finally:
        os.close(fifo)
        command.kill()


def test_one_process_is_not_joined(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    with joined() as ranks:
        assert ranks is None


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="--nproc 3: this machine has 2 GPUs; use at most --nproc 2"):
        relaunch(3, [])
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="rank 2 of this node has no GPU: there are 2"), joined():
        pass


@pytest.fixture
def gpus(monkeypatch):
    """Eight of them; what is made the current one."""
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 5)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return current


def group_of(monkeypatch, *devices):
    """Of two nodes with eight ranks each; this is the first of the second."""
    world = SimpleNamespace(_device_types=[torch.device(device) for device in devices])
    there = SimpleNamespace(
        is_initialized=lambda: True,
        get_world_size=lambda: 16,
        get_rank=lambda: 8,
        group=SimpleNamespace(WORLD=world),
    )
    monkeypatch.setattr(process_group, "dist", there)
    monkeypatch.setattr(process_group, "SamplingRanks", lambda device: device)


@pytest.mark.parametrize(("local_rank", "index"), [("3", 3), (None, 5)])
def test_a_group_that_is_there_is_used_on_the_gpu_of_this_node(local_rank, index, gpus, monkeypatch):
    group_of(monkeypatch, "cpu", "cuda")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    with joined() as ranks:
        assert ranks == torch.device("cuda", index)
    assert gpus == [torch.device("cuda", index)]


def test_a_group_without_the_cpu_is_refused(gpus, monkeypatch):
    group_of(monkeypatch, "cuda")
    with pytest.raises(UserError, match="no backend for the CPU.*cpu:gloo,cuda:nccl"), joined():
        pass


def test_a_rank_may_be_shown_its_own_gpu_alone(gpus, monkeypatch):
    group_of(monkeypatch, "cpu", "cuda")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with joined() as ranks:
        assert ranks == torch.device("cuda", 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(UserError, match="rank 3 of this node has no GPU: there are 1"), joined():
        pass


def test_no_ranks_are_refused():
    with pytest.raises(UserError, match="--nproc 0: must be at least 1"):
        relaunch(0, [])


def test_relaunch_passes_the_request_on(monkeypatch):
    started = []
    monkeypatch.setattr(process_group, "launch", lambda nproc, program: started.append((nproc, program)) or 7)
    assert relaunch(2, ["--prompt", "rain", "--nproc", "2", "--seed", "1", "--nproc=2"]) == 7
    assert started == [(2, ["-m", "opensora_fast.cli", "sample", "--prompt", "rain", "--seed", "1"])]
