"""Copies to a device beside what it computes, ordered by events both ways.

Where there is no such stream (the CPU) a copy is done when it is asked for, and there is nothing to wait for.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

Event = Any  # a torch.cuda.Event; None on the CPU


class CopyStream(Protocol):
    """How a ring of weights moves bytes, and how the computing stream and the copies wait for each other."""

    def mark(self) -> Event:
        """An event of the computing stream: everything asked of it so far."""

    def copy(self, destination: Tensor, source: Tensor, *, after: Event) -> Event:
        """Copy once `after`, an event of the computing stream, has happened; the event of its completion."""

    def wait(self, event: Event) -> None:
        """Let the computing stream do nothing further before the event. The host does not wait."""

    def drain(self) -> None:
        """Let the host wait for every copy."""


class CudaCopyStream:
    """A CUDA stream of its own. Sources are pinned host memory, and must stay until `drain`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def mark(self) -> Event:
        return torch.cuda.current_stream(self._device).record_event()

    def copy(self, destination: Tensor, source: Tensor, *, after: Event) -> Event:
        self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            destination.copy_(source, non_blocking=True)
        return self._stream.record_event()

    def wait(self, event: Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(event)

    def drain(self) -> None:
        self._stream.synchronize()


class ImmediateCopies:
    """Copies on the CPU."""

    def mark(self) -> Event:
        return None

    def copy(self, destination: Tensor, source: Tensor, *, after: Event) -> Event:
        destination.copy_(source)

    def wait(self, event: Event) -> None:
        pass

    def drain(self) -> None:
        pass


def copy_stream(device: torch.device) -> CopyStream:
    return CudaCopyStream(device) if device.type == "cuda" else ImmediateCopies()
