"""The processes that sample together: one for every GPU, started here or by torchrun, and how they leave.

`opensora-fast sample --nproc 8 ...` runs `torchrun --standalone --nproc-per-node 8 -m opensora_fast.cli sample ...`, by
a launcher that is a child of its own (`relaunch`, `rank_launcher`). Each of its ranks enters `joined`, which gives it
the `SamplingRanks`, and ends with `leave`: threads of gloo may abort an interpreter that finalises after all work is
done, and would turn success into a failure.

Tensors of the CPU travel by gloo, those of a GPU by NCCL, in the same groups.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist

from opensora_fast.errors import UserError
from opensora_fast.kernels.backend import BackendError
from opensora_fast.kernels.context_exchange import ContextParallelError, named_failure
from opensora_fast.sampling_ranks import AgreedError, SamplingRanks

# Ranks wait this long for one that loads weights, compiles, or writes a long video.
TIMEOUT = timedelta(minutes=60)

# Seconds in which the rank that failed first is the one that the launcher hears of.
_FIRST_FAILURE = 30.0

_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_BAD_INPUT, _INTERRUPTED = 2, 130  # the exit codes of a command that a UserError or Ctrl-C ended

_owned = False  # whether this process has joined a group that ends with it


@contextmanager
def joined() -> Iterator[SamplingRanks | None]:
    """This process among those that torchrun started, or None where it is alone.

    Initialises the process group, with this rank's GPU as the current device (without GPUs ranks share out the
    threads), and at the end waits for all ranks and destroys it; a group that is there already is used and left as it
    is, once this rank's GPU is the current device. An error that all ranks agreed on (`SamplingRanks.agree`) ends them
    all with exit code 2 once rank 0 has told it. Another error ends this rank at once, and the launcher then the
    others: they may be waiting for it in an exchange, where NCCL would wait for them in turn if this process were to
    clean up. Raises UserError where this node has fewer GPUs than ranks, and where a group that is there has no way for
    tensors of the CPU.
    """
    if dist.is_initialized():
        yield SamplingRanks(_device_in_group()) if dist.get_world_size() > 1 else None
        return
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield None
        return
    device = _device(int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    global _owned
    _owned = True
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    agreed = False
    try:
        with named_failure(dist.group.WORLD, "the ranks' work"):
            yield SamplingRanks(device)
    except AgreedError as error:
        agreed = True
        if dist.get_rank() == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
    except BaseException as error:
        leave(_told(error))
    dist.barrier()  # after an error too: a rank that leaves earlier has the launcher end rank 0
    dist.destroy_process_group()
    if agreed:
        leave(_BAD_INPUT)


def _told(error: BaseException) -> int:
    """Tell of an error on this rank; the exit code that stands for it."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, KeyboardInterrupt):
        if dist.get_rank() == 0:
            print("interrupted", file=sys.stderr)
        return _INTERRUPTED
    if isinstance(error, ContextParallelError):  # another rank has left: its launcher ends this one, unless far away
        time.sleep(_FIRST_FAILURE)
    if isinstance(error, UserError | OSError | BackendError | ContextParallelError):
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return _BAD_INPUT
    traceback.print_exception(error)
    return 1


def leave(code: int) -> int:
    """`code`, for a process that is alone; a rank that has `joined` ends here with it as its exit code."""
    if not _owned:
        return code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def relaunch(nproc: int, argv: Sequence[str]) -> int:
    """Run `opensora-fast sample` with these arguments on `nproc` processes of this machine; the exit code of `launch`.

    `argv` are the arguments of `sample`; its own --nproc is dropped from them. Raises UserError when `nproc` is below 1
    or above the number of GPUs, if there are any.
    """
    if nproc < 1:
        raise UserError(f"--nproc {nproc}: must be at least 1")
    gpus = torch.cuda.device_count()
    if 0 < gpus < nproc:
        raise UserError(f"--nproc {nproc}: this machine has {gpus} GPUs; use at most --nproc {gpus}")
    return launch(nproc, ["-m", "opensora_fast.cli", "sample", *_without_nproc(argv)])


def launch(nproc: int, program: Sequence[str]) -> int:
    """Run a Python program on `nproc` ranks as a child: "-m" and a module or a file, then its arguments.

    The exit code is 0 where all ranks end with 0, else that of the first that does not. A rank that dies ends the
    others. A signal that interrupts or ends this process is passed on, once, and the child is waited for: 130 after
    Ctrl-C.
    """
    received: list[int] = []
    child: subprocess.Popen | None = None

    def pass_on(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        if child is not None and len(received) == 1:  # a second one would stop the launcher while it ends its ranks
            child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in _PASSED_ON}
    try:
        # In a session of its own, so that Ctrl-C does not reach the launcher or its ranks from the terminal as well.
        command = [sys.executable, "-m", "opensora_fast.rank_launcher", str(nproc), *program]
        child = subprocess.Popen(command, start_new_session=True)
        if received:
            child.send_signal(received[0])
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        return 128 + received[0]
    return code if code >= 0 else 128 - code


def _without_nproc(argv: Sequence[str]) -> list[str]:
    kept: list[str] = []
    words = iter(argv)
    for word in words:
        if word == "--nproc":
            next(words, None)
        elif not word.startswith("--nproc="):
            kept.append(word)
    return kept


def _device_in_group() -> torch.device:
    """This rank's device, made the current one, where somebody else has initialised the process group."""
    assert dist.group.WORLD is not None
    if "cpu" not in {device.type for device in dist.group.WORLD._device_types}:
        raise UserError(
            "the process group has no backend for the CPU, by which ranks agree: initialise it with "
            'dist.init_process_group("cpu:gloo,cuda:nccl")'
        )
    local_rank = os.environ.get("LOCAL_RANK")
    if local_rank is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    else:
        device = _device(int(local_rank or 0))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _device(local_rank: int) -> torch.device:
    """The GPU of this number, or the only one that the launcher shows to this rank; without GPUs the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if gpus == 1 and _one_is_shown():
        return torch.device("cuda", 0)
    if local_rank >= gpus:
        raise UserError(f"rank {local_rank} of this node has no GPU: there are {gpus}; start at most that many ranks")
    return torch.device("cuda", local_rank)


def _one_is_shown() -> bool:
    """Whether a launcher has chosen one GPU for this process."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return bool(shown) and "," not in shown
