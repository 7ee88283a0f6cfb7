"""What `memory_prediction` gives the sampler in place of models: they compute nothing, and take the bytes of those.

Weights and results are torch's fake tensors, which have sizes and no data.

Shapes   B videos, C channels, T latent frames, H, W latents, L text tokens, D features, R (time, vector) pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map

from opensora_fast.autoencoder import Autoencoder
from opensora_fast.config import MMDiTConfig
from opensora_fast.mmdit import MMDiT, Modulation
from opensora_fast.packed_weights import weight_places
from opensora_fast.peak_memory import LiveBytes
from opensora_fast.tiling import BatchedTiles, Network

STEPS = 2  # that are run: the second has everything that later ones have

Fake = Callable[[Tensor], Tensor]


class Laps:
    """The peak of every stretch of a run, by name; 0 where there was none."""

    def __init__(self, live: LiveBytes) -> None:
        self.live = live
        self.peaks = Counter[str]()

    def end(self, name: str) -> None:
        self.peaks[name] = max(self.peaks[name], self.live.peak)
        self.live.peak = self.live.now


class DatalessText:
    """Embeddings of prompts, without data."""

    def __init__(self, config: MMDiTConfig, tokens: int, like: Tensor) -> None:
        self._config = config
        self._tokens = tokens
        self._like = like

    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        B, config = len(prompts), self._config
        txt_BLD = self._like.new_empty(B, self._tokens, config.context_in_dim)
        return txt_BLD, self._like.new_empty(B, config.vec_in_dim)

    def null(self) -> tuple[Tensor, Tensor]:
        return self.encode([""])


class DatalessModel:
    """The transformer without data: the modulation of all steps and blocks, and few blocks, for none keeps anything."""

    def __init__(self, model: MMDiT, few_blocks: MMDiT, steps: int, fake: Fake, laps: Laps) -> None:
        self._model = model
        self._few_blocks = few_blocks
        self._repeats = -(-steps // STEPS)
        self._fake = fake
        self._laps = laps
        self.config = model.config
        self.device = torch.device("cpu")
        self.dtype = model.dtype

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        args, kwargs = self._without_data((args, kwargs))
        return self._few_blocks(*args, **kwargs)

    def modulation(self, timesteps: Tensor, y_vec: Tensor, guidance: Tensor | None = None) -> Modulation:
        self._laps.end("encode")
        times_R, vectors_RD, scale_R = self._without_data((timesteps, y_vec, guidance))
        modulation = self._model.modulation(
            times_R.repeat(self._repeats),
            vectors_RD.repeat(self._repeats, 1),
            None if scale_R is None else scale_R.repeat(self._repeats),
        )
        self._laps.end("modulation")
        return modulation

    def _without_data(self, tree: Any) -> Any:
        """The same with tensors that have no data; those with data go on to count in their place."""
        with self._laps.live.paused():
            return tree_map(lambda leaf: self._fake(leaf) if isinstance(leaf, Tensor) else leaf, tree)


class PhasedAutoencoder:
    """The autoencoder, which says when the steps are over."""

    def __init__(self, autoencoder: Autoencoder, laps: Laps) -> None:
        self._autoencoder = autoencoder
        self._laps = laps

    def __getattr__(self, name: str) -> Any:
        return getattr(self._autoencoder, name)

    def decode(self, latent_BCTHW: Tensor) -> Tensor:
        self._laps.end("denoise")
        return self._autoencoder.decode(latent_BCTHW)


class EndsOfBatches:
    """A `TileRunner` that runs, of the calls of each size, the first and the last: between them nothing else happens
    than that one more result is there."""

    def __init__(self, batch: int) -> None:
        self._batched = BatchedTiles(batch)

    def __call__(self, apply: Network, tiles: list[Tensor]) -> list[Tensor]:
        calls = Counter[torch.Size]()
        self._batched(lambda x: calls.update([x.shape]) or x, tiles)
        done = Counter[torch.Size]()
        results: dict[torch.Size, Tensor] = {}

        def run(x: Tensor) -> Tensor:
            done[x.shape] += 1
            if done[x.shape] in (1, calls[x.shape]):
                results[x.shape] = apply(x)
                return results[x.shape]
            return torch.empty_like(results[x.shape])

        return self._batched(run, tiles)


@contextmanager
def without_data(module: nn.Module) -> Iterator[Fake]:
    """The module meanwhile has weights of the same sizes on the CPU, but without data. Yields what makes such tensors
    of others; of tensors that are so already, themselves."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        with mode:
            return torch.empty_like(tensor, device="cpu")

    places = list(weight_places(module))
    weights = [place.tensor for place in places]
    try:
        for place, weight in zip(places, weights, strict=True):
            empty = fake(weight)
            place.hang(nn.Parameter(empty, requires_grad=False) if isinstance(weight, nn.Parameter) else empty)
        yield fake
    finally:
        for place, weight in zip(places, weights, strict=True):
            place.hang(weight)


@contextmanager
def tiles_as_predicted(autoencoder: Any, batch: int) -> Iterator[None]:
    runner = autoencoder.run_tiles
    autoencoder.run_tiles = EndsOfBatches(batch)
    try:
        yield
    finally:
        autoencoder.run_tiles = runner
