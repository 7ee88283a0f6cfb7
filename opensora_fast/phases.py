"""Models that are on the GPU only while they are used: the text encoders before the steps, the autoencoder around them.

Their weights stay in pinned host memory, side by side, and come with one copy, which the GPU's stream waits for and the
host does not. Afterwards the GPU's copy is dropped: the weights on the host are what they were.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from opensora_fast.autoencoder import Autoencoder
from opensora_fast.host_memory import HostMemory
from opensora_fast.packed_weights import PackedWeights, weight_places
from opensora_fast.text import PromptEncoding, TextEncoders


@dataclass(eq=False)
class _Away:
    """A module whose weights are in host memory."""

    module: nn.Module  # kept alive, since it is known by its identity
    weights: PackedWeights
    host: Tensor  # uint8
    resting: list[Tensor]
    users: int = 0


class Phases:
    """Brings modules to `device` for as long as they are used. Not for several threads at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._away: dict[int, _Away] = {}

    def keep_away(self, module: nn.Module) -> None:
        """Move a module's weights into host memory pinned for the device, from which `use` brings them.

        Raises UserError when the host has too little memory.
        """
        if id(module) in self._away:
            return
        weights = PackedWeights(weight_places(module))
        host = HostMemory(weights.bytes, device=self._device, setting="--memory-budget").tensor
        resting = weights.pack(host)
        self._away[id(module)] = _Away(module, weights, host, resting)

    @contextmanager
    def use(self, *modules: nn.Module) -> Iterator[None]:
        """The modules that were kept away are on the device meanwhile; others stay as they are. May be nested."""
        with ExitStack() as stack:
            for module in modules:
                away = self._away.get(id(module))
                if away is not None:
                    stack.enter_context(self._brought(away))
            yield

    def text(self, encoders: TextEncoders) -> PromptEncoding:
        """The encoders, kept away but for each call."""
        for encoder in (encoders.t5, encoders.clip):
            self.keep_away(encoder.model)
        return _TextWhileUsed(encoders, self)

    def autoencoder(self, autoencoder: Autoencoder) -> Autoencoder:
        """The autoencoder, kept away but for each call."""
        self.keep_away(cast(nn.Module, autoencoder))
        return cast(Autoencoder, _AutoencoderWhileUsed(autoencoder, self))

    @contextmanager
    def _brought(self, away: _Away) -> Iterator[None]:
        if away.users == 0:
            # Copied on the stream that computes: memory and weights are used, and given up, in its order.
            there = torch.empty(away.host.numel(), dtype=torch.uint8, device=self._device)
            there.copy_(away.host, non_blocking=True)
            away.weights.hang(away.weights.views(there))
            del there
        away.users += 1
        try:
            yield
        finally:
            away.users -= 1
            if away.users == 0:
                away.weights.hang(away.resting)


class _TextWhileUsed:
    """A `PromptEncoding` whose encoders are on the device during a call."""

    def __init__(self, encoders: TextEncoders, phases: Phases) -> None:
        self._encoders = encoders
        self._phases = phases

    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        with self._phases.use(self._encoders.t5.model, self._encoders.clip.model):
            return self._encoders.encode(prompts)

    def null(self) -> tuple[Tensor, Tensor]:
        with self._phases.use(self._encoders.t5.model, self._encoders.clip.model):
            return self._encoders.null()


class _AutoencoderWhileUsed:
    """An `Autoencoder` that is on the device during a call."""

    def __init__(self, autoencoder: Autoencoder, phases: Phases) -> None:
        self._autoencoder = autoencoder
        self._phases = phases

    def __getattr__(self, name: str) -> Any:
        return getattr(self._autoencoder, name)

    def encode(self, video_BCTHW: Tensor) -> Tensor:
        with self._phases.use(cast(nn.Module, self._autoencoder)):
            return self._autoencoder.encode(video_BCTHW)

    def decode(self, latent_BCTHW: Tensor) -> Tensor:
        with self._phases.use(cast(nn.Module, self._autoencoder)):
            return self._autoencoder.decode(latent_BCTHW)
