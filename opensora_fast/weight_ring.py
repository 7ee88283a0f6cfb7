"""Weights that are on the device only while their module runs: two slots, the next module's weights on the way.

    computing   | wait ready(i) | module i ............... | wait ready(i+1) | module i + 1 .......
    copies      | ............ copy i + 1 to the other slot, once module i - 1 is done with it ....

A module's pre-hook waits for its weights, asks for the next module's and hangs the slot's views in the module; its hook
marks the slot as free and hangs the resting weights again. Modules may run in any order: one whose weights were not
asked for is brought when it runs. Outputs must not need the weights again: no gradients.

Weights kept in 8 bits are written into a third buffer in the dtype of the model when their module runs.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from opensora_fast.copy_stream import CopyStream, Event
from opensora_fast.fp8_weights import Fp8Form
from opensora_fast.packed_weights import PackedWeights


@dataclass
class Unit:
    """The weights that come and go with one module's call."""

    module: nn.Module
    weights: PackedWeights  # hung while it does not run: host memory, or shapes alone (meta) where kept in 8 bits
    stored: Tensor  # uint8: what is copied, or in 8 bits on the device what is expanded
    form: Fp8Form | None = None  # None: stored as the weights are

    def __post_init__(self) -> None:
        self.resting = list(self.weights.tensors)


@dataclass(eq=False)
class _Slot:
    memory: Tensor
    used: Event  # the computing stream is done with what is in it
    ready: Event = None
    unit: int | None = None
    views: dict[int, list[Tensor]] = field(default_factory=dict)


class WeightRing:
    """Brings the weights of `units`, which run in this order, to `device`.

    wrap: the first is asked for when the last runs, and the slots stay; otherwise they go with the last.
    copied: what is stored has to be copied; otherwise (8 bits) it is on the device already and is expanded from there.
    `close` ends it.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        device: torch.device,
        copies: CopyStream,
        *,
        wrap: bool = False,
        copied: bool = True,
    ) -> None:
        self._units = list(units)
        self._device = device
        self._copies = copies
        self._wrap = wrap
        self._copied = copied
        self._slots: list[_Slot] = []
        self._running: dict[int, _Slot] = {}
        self._expanded: Tensor | None = None
        self._expanded_views: dict[int, list[Tensor]] = {}
        self._handles: list[Any] = []
        for i, unit in enumerate(self._units):
            enter, leave = partial(self._enter, i), partial(self._leave, i)
            self._handles.append(unit.module.register_forward_pre_hook(enter))
            self._handles.append(unit.module.register_forward_hook(leave, always_call=True))
        # A copy on its way must not outlive the memory at its ends.
        self._drained = weakref.finalize(self, copies.drain)
        self._drained.atexit = False

    def close(self) -> None:
        """Take the hooks off and give up the slots. The modules keep their resting weights. May be called again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._drained()
        self._slots, self._expanded, self._expanded_views = [], None, {}

    @torch.inference_mode(False)  # what is kept from one call serves later ones in any mode
    @torch.no_grad()
    def _enter(self, i: int, *_: Any) -> None:
        unit = self._units[i]
        slot = self._arrived(i) if self._copied else None
        if unit.form is None:
            assert slot is not None
            if i not in slot.views:
                slot.views[i] = unit.weights.views(slot.memory)
            unit.weights.hang(slot.views[i])
        else:
            unit.weights.hang(self._expand(i, unit.stored if slot is None else slot.memory, unit.form))

    def _leave(self, i: int, *_: Any) -> None:
        unit = self._units[i]
        unit.weights.hang(unit.resting)
        slot = self._running.pop(i, None)
        if slot is None:
            return
        slot.used = self._copies.mark()
        if not self._wrap and i == len(self._units) - 1:
            # The computing stream may use the memory for what comes next, once nothing is on its way there.
            for each in self._slots:
                if each.ready is not None:  # None: nothing ever was
                    self._copies.wait(each.ready)
            self._slots = []

    def _arrived(self, i: int) -> _Slot:
        """The slot with the weights of unit i, which the computing stream waits for; the next unit's are asked for."""
        if not self._slots:
            size = max(unit.stored.numel() for unit in self._units)
            self._slots = [
                _Slot(torch.empty(size, dtype=torch.uint8, device=self._device), self._copies.mark()) for _ in range(2)
            ]
        slot = next((slot for slot in self._slots if slot.unit == i), None) or self._bring(i, self._slots[0])
        self._running[i] = slot
        self._copies.wait(slot.ready)
        following = i + 1 if i + 1 < len(self._units) else 0
        if following != i and (following or self._wrap):
            other = self._slots[1 - self._slots.index(slot)]
            if other.unit != following:
                self._bring(following, other)
        return slot

    def _bring(self, i: int, slot: _Slot) -> _Slot:
        stored = self._units[i].stored
        slot.unit = None  # of none, should the copy fail
        slot.ready = self._copies.copy(slot.memory[: stored.numel()], stored, after=slot.used)
        slot.unit = i
        return slot

    def _expand(self, i: int, stored: Tensor, form: Fp8Form) -> list[Tensor]:
        """The weights in the model's dtype, in the one buffer for that: the computing stream orders its uses."""
        if self._expanded is None:
            size = max(unit.weights.bytes for unit in self._units)
            self._expanded = torch.empty(size, dtype=torch.uint8, device=self._device)
        if i not in self._expanded_views:
            self._expanded_views[i] = self._units[i].weights.views(self._expanded)
        form.expand(stored, self._expanded_views[i])
        return self._expanded_views[i]
