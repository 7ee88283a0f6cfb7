"""Large host memory that is taken once: where checkpoints are staged, clips decoded and batches laid out.

    HostMemory   one mapping: zero, all of it in memory from the start, in 2 MiB pages where the system gives them
    copy         many copies at once, with several threads and without the interpreter's lock

Memory for a CUDA device is registered with the driver once, when it is made, so that copies to and from the device are
asynchronous and no step pays for it again. Shared memory is a memfd: its descriptor goes to another process, which maps
the same bytes with `HostMemory.attach`.

A forked child does not have private memory (touching it there ends the child), and whatever it does with its copies of
these objects, the parent's memory stays.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opensora_fast.errors import UserError
from opensora_fast.native import native

_GIB = 2**30
_CPU = torch.device("cpu")
_MAX_THREADS = 16  # more do not make pages faster
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every context


class HostMemory:
    """`bytes` of memory, at an address that is a multiple of 2 MiB.

    device: a CUDA device pins the memory for it.  shared: another process can map it.
    setting: what the user changes when the memory cannot be had, as in "--data.pinned_gib".
    Lives until `close()` and until the last tensor made of it is gone.
    Raises UserError when the system, or the driver, does not give the memory.
    """

    def __init__(self, bytes: int, *, device: torch.device = _CPU, shared: bool = False, setting: str = ""):
        module = native()
        if bytes <= 0:
            raise UserError(f"{_asked(bytes, setting)}: ask for at least one byte")
        available = available_bytes()
        if available is not None and bytes > available:
            raise UserError(f"{_asked(bytes, setting)}, but {available / _GIB:.2f} GiB are free: {_remedy(setting)}")
        try:
            memory = module.HostMemory(bytes=bytes, shared=shared, threads=_threads())
        except OSError as error:
            raise UserError(f"{_asked(bytes, setting)}, but {error.strerror}: {_remedy(setting)}") from error
        if device.type == "cuda":
            _register(memory, device, setting)
        self._hold(memory)

    @classmethod
    def attach(cls, descriptor: int, bytes: int, *, device: torch.device = _CPU, setting: str = "") -> HostMemory:
        """Map another process's shared memory. `descriptor` stays the caller's, who may close it at once.

        A CUDA device pins this mapping for it, whoever else has. Raises UserError when it is not the descriptor of that
        much shared memory, or the driver does not pin it.
        """
        attached = cls.__new__(cls)
        try:
            memory = native().HostMemory.attach(descriptor, bytes)
        except (OSError, ValueError) as error:
            raise UserError(f"descriptor {descriptor} cannot be mapped as {bytes} bytes of memory ({error})") from error
        if device.type == "cuda":
            _register(memory, device, setting)
        attached._hold(memory)
        return attached

    def _hold(self, memory: Any) -> None:
        self._memory = memory
        self.address: int = memory.address
        self.bytes: int = memory.bytes

    @property
    def native(self) -> Any:
        """The `_C.HostMemory`. Raises ValueError when closed."""
        if self._memory is None:
            raise ValueError("the memory is closed")
        return self._memory

    @property
    def tensor(self) -> Tensor:
        """All of it as uint8 [bytes]. It and every view of it keep the memory."""
        return torch.frombuffer(self.native, dtype=torch.uint8)

    @property
    def descriptor(self) -> int:
        """For `attach`, after it was passed to another process. It is closed with the memory."""
        if self.native.descriptor < 0:
            raise ValueError("the memory is not shared")
        return self.native.descriptor

    def close(self) -> None:
        """Give the memory up: it goes now, or with the last tensor made of it. May be called again."""
        self._memory = None


def copy(pieces: Sequence[tuple[int, int, int]], *, threads: int) -> None:
    """Copy each (destination address, source address, bytes); `threads` share all the bytes evenly.

    No piece may overlap the destination of another. The interpreter's lock is free meanwhile.
    """
    if threads < 1:
        raise ValueError(f"threads={threads}: use 1 or more")
    native().copy_pieces(pieces, threads=threads)


def available_bytes() -> int | None:
    """What can be taken without swapping or being killed: of the machine, and of the control group. None if unknown."""
    limits = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(int(line.split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):
        limits += _group_limits(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup").read_text())
    return min(limits, default=None)


def _group_limits(root: Path, membership: str) -> list[int]:
    """Free bytes of the control group (version 2) that "0::/path" names, and of those around it."""
    limits = []
    for line in membership.splitlines():
        number, controllers, path = line.split(":", 2)
        if number != "0" or controllers:
            continue
        folder = root / path.lstrip("/")
        for group in (folder, *folder.parents):
            if not group.is_relative_to(root):
                break
            with contextlib.suppress(OSError, ValueError):  # "max", or the root group, which has no limit
                limit = int((group / "memory.max").read_text())
                used = int((group / "memory.current").read_text())
                statistics = dict(entry.split() for entry in (group / "memory.stat").read_text().splitlines())
                # File pages are given up when memory is asked for.
                limits.append(limit - used + int(statistics["inactive_file"]) + int(statistics["active_file"]))
    return limits


def _threads() -> int:
    return min(len(os.sched_getaffinity(0)), _MAX_THREADS)


def _register(memory: Any, device: torch.device, setting: str) -> None:
    with torch.cuda.device(device):
        driver: Any = torch.cuda.cudart()
        status = driver.cudaHostRegister(memory.address, memory.bytes, _PORTABLE)
    if int(status) != 0:
        raise UserError(
            f"{_asked(memory.bytes, setting)}, but CUDA cannot pin it ({driver.cudaGetErrorString(status)}): "
            f"{_remedy(setting)}"
        )
    address = memory.address
    # The answer does not matter: a driver that is shutting down has taken the memory back already.
    memory.before_release(lambda: driver.cudaHostUnregister(address))


def _asked(bytes: int, setting: str) -> str:
    return f"{setting or 'memory'}: {bytes} bytes ({bytes / _GIB:.2f} GiB) of host memory are asked for"


def _remedy(setting: str) -> str:
    return f"lower {setting}, or free memory" if setting else "free memory"
