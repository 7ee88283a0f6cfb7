"""A copy of the training state that a save in the background may take its time with.

    state --copy--> one of two arenas of host memory --> writer

An arena is taken once, when the state's names, dtypes and shapes are known, and made anew only when these change. In it
every tensor is row-major, begins at a page, and owns its last page. Two arenas: while one is written from, the next
save fills the other; a third waits for the first to be free.

On the CPU several threads copy before `stage` returns. From a CUDA device the copies are put on a stream of their own,
behind what the current stream was given so far, into pinned memory: `stage` returns at once, and `order_update` keeps
the optimiser's next step behind the copies. The writer waits for them in `Staged.wait`.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.tensor import DTensor

from opensora_fast.checkpoint_reader import PAGE, paged
from opensora_fast.host_memory import HostMemory, copy

ARENAS = 2
_SETTING = "the copies of the state that checkpoints are written from"
MOST_THREADS = 8


class Spec(NamedTuple):
    """What a tensor needs of an arena; of a DTensor, its local shard."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Arena:
    """Memory for states of one layout."""

    def __init__(self) -> None:
        self.layout: list[Spec] | None = None
        self.views: dict[str, Tensor] = {}
        self._memory: HostMemory | None = None

    def lay_out(self, layout: list[Spec], device: torch.device) -> None:
        """Take the memory anew when the layout is another one. Raises UserError, and has none then."""
        if self.layout == layout:
            return
        self.close()
        bytes = sum(paged(spec.bytes) for spec in layout)
        self._memory = HostMemory(max(bytes, PAGE), device=device, setting=_SETTING)
        whole, start = self._memory.tensor, 0
        for spec in layout:
            self.views[spec.name] = whole[start : start + spec.bytes].view(spec.dtype).view(spec.shape)
            start += paged(spec.bytes)
        self.layout = layout

    def close(self) -> None:
        self.layout, self.views = None, {}
        if self._memory is not None:
            self._memory.close()
            self._memory = None


class Staged(dict[str, Tensor]):
    """Staged tensors by name. Their arena is free again after `release()`, or when this object is gone."""

    copied: torch.cuda.Event | None = None
    release: weakref.finalize

    def wait(self) -> None:
        """Return when the tensors have their values."""
        if self.copied is not None:
            self.copied.synchronize()


class Stager(AsyncStager):
    """Stages states that live on `device`. `stage` is for one thread, `release` for any.

    Beneath `dcp.async_save` the storage writer begins with `synchronize_staging`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._arenas = [Arena() for _ in range(ARENAS)]
        self._free = list(self._arenas)
        self._changed = threading.Condition()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied: torch.cuda.Event | None = None
        self._ordered = True

    @property
    def busy(self) -> bool:
        """Whether `stage` would have to wait."""
        return not self._free

    def prepare(self, state: Mapping[str, Tensor]) -> None:
        """Take the memory for states like this one. Raises UserError when it cannot be had."""
        layout = _layout(state)
        with self._changed:
            self._changed.wait_for(lambda: len(self._free) == ARENAS)
            for arena in self._arenas:
                arena.lay_out(layout, self._device)

    def stage(self, state_dict: Mapping[str, Any]) -> Staged:
        """A copy of the state: CPU tensors are copied when this returns, a device's when the result's `wait` does.

        Waits while both arenas are in use. DTensors keep their placement. Raises UserError as `prepare`.
        """
        staged = Staged()
        with self._changed:
            self._changed.wait_for(lambda: self._free)
            arena = self._free.pop(0)
            staged.release = weakref.finalize(staged, self._give_back, arena)
            staged.release.atexit = False
        try:
            arena.lay_out(_layout(state_dict), self._device)
            self._copy(state_dict, arena)
            staged.copied = self._copied
            staged.update((name, _placed(tensor, arena.views[name])) for name, tensor in state_dict.items())
        except BaseException:
            staged.release()
            raise
        return staged

    def order_update(self) -> None:
        """Keep whatever the current stream is given from now on behind the copies of the last `stage`."""
        if self._copied is not None and not self._ordered:
            torch.cuda.current_stream(self._device).wait_event(self._copied)
            self._ordered = True

    def synchronize_staging(self) -> None:
        """Return when the last `stage` has copied everything."""
        if self._copied is not None:
            self._copied.synchronize()

    def close(self) -> None:
        """Give the memory back. Nothing that was staged may be in use."""
        self.synchronize_staging()  # a save that failed early has not waited for its copies
        for arena in self._arenas:
            arena.close()

    def _copy(self, state: Mapping[str, Any], arena: Arena) -> None:
        sources = {name: _local(tensor) for name, tensor in state.items()}
        if self._stream is None:
            pieces = []
            for name, source in sources.items():
                if source.is_contiguous():
                    pieces.append((arena.views[name].data_ptr(), source.data_ptr(), source.nbytes))
                else:
                    arena.views[name].copy_(source)
            copy(pieces, threads=min(MOST_THREADS, torch.get_num_threads()))
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                for name, source in sources.items():
                    arena.views[name].copy_(source, non_blocking=True)
                    if source.is_cuda:
                        source.record_stream(self._stream)
                copied = torch.cuda.Event(blocking=True)  # the writer sleeps until then
                copied.record()
                self._copied, self._ordered = copied, False

    def _give_back(self, arena: Arena) -> None:
        with self._changed:
            self._free.append(arena)
            self._changed.notify_all()


def _layout(state: Mapping[str, Tensor]) -> list[Spec]:
    locals_ = ((name, _local(tensor)) for name, tensor in state.items())
    return [Spec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in locals_]


def _local(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _placed(tensor: Tensor, view: Tensor) -> Tensor:
    """The staged tensor in the place of `tensor`: a DTensor's shard stays on the host, whatever its mesh is of."""
    if isinstance(tensor, DTensor):
        return DTensor(view, tensor._spec, requires_grad=False)
    return view
