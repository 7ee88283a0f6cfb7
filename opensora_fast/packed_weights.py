"""Weights side by side in one run of bytes, so that one copy moves them all, and views of them in their modules.

Bytes lie as the tensors do in memory: a weight in channels_last keeps its strides. What several modules share is there
once, and stays shared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

ALIGNMENT = 256  # bytes; what a CUDA allocation is aligned to, so that kernels load as wide as from their own tensors


class Place(NamedTuple):
    """Where a weight hangs: a parameter or a buffer of a module."""

    module: nn.Module
    name: str

    @property
    def tensor(self) -> Tensor:
        tensor = getattr(self.module, self.name)
        assert isinstance(tensor, Tensor)
        return tensor

    def hang(self, tensor: Tensor) -> None:
        """Put a tensor here as it is: nothing is copied, and whoever held the one before keeps it."""
        kind = self.module._parameters if self.name in self.module._parameters else self.module._buffers
        kind[self.name] = tensor  # type: ignore[assignment]  # a Parameter where there was one: see PackedWeights.views


class PackedWeights:
    """The layout of the weights of some places, and the way to hang other tensors there."""

    def __init__(self, places: Iterable[Place]) -> None:
        self._places: list[list[Place]] = []  # of each tensor
        self.tensors: list[Tensor] = []
        index_of: dict[int, int] = {}
        for place in places:
            tensor = place.tensor
            if id(tensor) not in index_of:
                index_of[id(tensor)] = len(self.tensors)
                self.tensors.append(tensor)
                self._places.append([])
            self._places[index_of[id(tensor)]].append(place)
        self._strides = [_packed_stride(tensor) for tensor in self.tensors]
        self._offsets, self.bytes = packed_offsets([tensor.nbytes for tensor in self.tensors])

    def views(self, memory: Tensor) -> list[Tensor]:
        """The tensors, read from `memory` (uint8, at least `bytes`): parameters without gradients, or buffers."""
        views = []
        for tensor, stride, offset in zip(self.tensors, self._strides, self._offsets, strict=True):
            flat = memory[offset : offset + tensor.nbytes].view(tensor.dtype)
            view = flat.as_strided(tensor.shape, stride, flat.storage_offset())
            views.append(nn.Parameter(view, requires_grad=False) if isinstance(tensor, nn.Parameter) else view)
        return views

    @torch.no_grad()
    def pack(self, memory: Tensor) -> list[Tensor]:
        """Copy the tensors into `memory` and hang the views of it in their place, one by one; returns the views."""
        views = self.views(memory)
        for i, (view, tensor) in enumerate(zip(views, self.tensors, strict=True)):
            view.copy_(tensor)
            self.replace(i, view)
        return views

    def replace(self, i: int, tensor: Tensor) -> None:
        """Hang another tensor of the same shape, strides and dtype for the i-th, which is kept alive no longer."""
        self.tensors[i] = tensor
        for place in self._places[i]:
            place.hang(tensor)

    def hang(self, tensors: Sequence[Tensor]) -> None:
        """Hang these tensors, one for each of `self.tensors`, in their modules."""
        for tensor, places in zip(tensors, self._places, strict=True):
            for place in places:
                place.hang(tensor)

    def memory(self) -> Tensor | None:
        """The bytes (uint8) that the tensors are views of already, in this layout; None when they lie elsewhere."""
        first = self.tensors[0]
        storage, start = first.untyped_storage(), first.storage_offset() * first.itemsize
        for tensor, stride, offset in zip(self.tensors, self._strides, self._offsets, strict=True):
            same = tensor.untyped_storage()._cdata == storage._cdata
            if not same or tensor.storage_offset() * tensor.itemsize != start + offset or tensor.stride() != stride:
                return None
        return torch.empty(0, dtype=torch.uint8, device=first.device).set_(storage, start, (self.bytes,), (1,))


def weight_places(module: nn.Module) -> Iterator[Place]:
    """Every parameter and buffer below a module, those shared by several places at each of them."""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                yield Place(child, name)
        for name, buffer in child._buffers.items():
            if buffer is not None:
                yield Place(child, name)


def packed_offsets(sizes: Iterable[int]) -> tuple[list[int], int]:
    """(where each of these many bytes begins, bytes in all)."""
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += math.ceil(size / ALIGNMENT) * ALIGNMENT
    return offsets, end


def _packed_stride(tensor: Tensor) -> tuple[int, ...]:
    """The strides of a copy that leaves no gaps: the tensor's own where it has none."""
    return torch.empty_like(tensor, device="meta").stride()  # preserves any dense layout
