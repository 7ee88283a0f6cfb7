"""How many bytes of tensors are alive at once while code runs: counted from the operations, without a GPU.

Every storage that an operation makes counts from then until it is freed, rounded up as the CUDA allocator rounds small
blocks. Tensors may be real or without data (torch's FakeTensor), which is how the needs of a large model are predicted
in a moment and in little memory: the code that runs is the real one. What a kernel uses inside of itself is not seen,
and tensors on the meta device, which stand for no memory, are not counted.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

BLOCK = 512  # bytes; the CUDA caching allocator gives multiples of it


class LiveBytes(TorchDispatchMode):
    """`with LiveBytes() as live: ...` counts what is made on any device inside; then read `live.peak`.

    Tensors made before count only if they are given to `hold`. `now` is what is alive at this moment.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._paused = False
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count these too; a storage that several share counts once."""
        for tensor in tensors:
            if tensor.device.type == "meta":
                continue
            storage = tensor.untyped_storage()
            if storage in self._seen:
                continue
            self._seen.add(storage)
            size = -(-storage.nbytes() // BLOCK) * BLOCK
            weakref.finalize(storage, self._freed, size).atexit = False
            self.now += size
            self.peak = max(self.peak, self.now)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is made meanwhile never counts."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._paused:
            return func(*args, **(kwargs or {}))
        # What was there before is not counted, nor is a view of it.
        self._seen.update(tensor.untyped_storage() for tensor in _tensors((args, kwargs)))
        result = func(*args, **(kwargs or {}))
        self.hold(_tensors(result))
        return result

    def _freed(self, size: int) -> None:
        self.now -= size


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor))
