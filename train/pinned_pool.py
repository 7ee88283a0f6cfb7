"""Batches' memory: blocks of one arena that is there from the start.

A pool gives out blocks and takes each back when the last reference to it dies: the `Block`, or any tensor or view that
was made of it, in whatever thread, by the garbage collector, or because the consumer failed. It never asks the system
for more. When no block is free, `take` waits for one to come back; requests are served in their order, so that whoever
takes blocks in the order in which they are used up never waits in vain.

A block takes one of eight sizes for each doubling, at least a page: `block_bytes` of what was asked for. Room for n
batches of b bytes is n * block_bytes(b).

A forked child gets no blocks, and what it does with its copies of these objects changes nothing for the parent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opensora_fast.errors import UserError
from opensora_fast.host_memory import HostMemory
from opensora_fast.native import native

_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class PoolStatistics:
    """Bytes are those of whole blocks."""

    capacity: int
    in_use: int
    peak: int
    """most that was ever in use"""
    taken: int
    """blocks handed out"""
    returned: int
    """blocks that came back"""
    waits: int
    """requests that were not served at once and had the time to wait"""
    wait_seconds: float
    """what those waited, together; of requests that have ended"""


class Block:
    """`bytes` of the pool, at a multiple of 4096 from the arena's begin. Goes back when it and its tensors are gone."""

    def __init__(self, block: Any):
        self._block = block
        self.address: int = block.address
        self.offset: int = block.offset
        self.bytes: int = block.bytes

    def tensor(self, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        """A contiguous tensor over the block's first bytes, of whatever values are there. It keeps the block.

        Raises ValueError when it would be empty or larger than the block.
        """
        count = math.prod(shape)
        if not 0 < count * dtype.itemsize <= self.bytes:
            raise ValueError(f"a {dtype} tensor of shape {tuple(shape)} does not fit a block of {self.bytes} bytes")
        return torch.frombuffer(self._block, dtype=dtype, count=count).view(*shape)


class PinnedPool:
    """Blocks of `memory`, which the pool alone uses from now on.

    largest: bytes of the largest block that will be asked for.  setting: what the user changes to make the pool larger.
    Raises UserError when the largest block does not fit.
    """

    def __init__(self, memory: HostMemory, *, largest: int, setting: str):
        self._pool = native().PinnedPool(memory.native)
        self._setting = setting
        self._require_room(largest)

    def take(self, bytes: int, *, timeout: float | None) -> Block | None:
        """A block; None when none comes free within `timeout` seconds (None: wait for as long as it takes).

        Other threads run meanwhile, and Ctrl-C ends the wait. Raises UserError when the pool is smaller.
        """
        self._require_room(bytes)
        block = self._pool.take(bytes, timeout=timeout)
        return None if block is None else Block(block)

    def statistics(self) -> PoolStatistics:
        return PoolStatistics(**self._pool.statistics())

    def _require_room(self, bytes: int) -> None:
        need, capacity = block_bytes(bytes), self._pool.capacity
        if need > capacity:
            raise UserError(
                f"{self._setting}: a batch needs {need / _GIB:.3f} GiB of the pool ({need} bytes), which has "
                f"{capacity / _GIB:.3f} GiB: raise {self._setting} to {math.ceil(need / _GIB * 1000) / 1000} or more"
            )


def block_bytes(bytes: int) -> int:
    """What a block of `bytes` takes of a pool: `bytes` rounded up by at most an eighth, or to whole pages."""
    if bytes <= 0:
        raise ValueError(f"bytes={bytes}: a block has at least one byte")
    return native().PinnedPool.block_bytes(bytes)
