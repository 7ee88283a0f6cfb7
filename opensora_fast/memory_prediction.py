"""How much GPU memory a request will take in each of its phases, known before any weights are read.

    text      prompts to vectors           weights at hand + the encoders' own needs
    encode    given images to latents      weights at hand + pixels, tiles and latents
    denoise   the steps                    weights at hand + modulation of all steps + one model call of all passes
    decode    latent to video              weights at hand + latents, tiles and the video

The activations are counted (`peak_memory`) while the real `sampling.sample` runs on tensors without data, for two steps
with the modulation of all: whatever the code comes to do, the prediction follows. The weights are those that
`block_streaming.weight_bytes` says for the settings. What kernels and libraries take for themselves is not in it;
`memory_plan` leaves room for that. Of several ranks each needs less than is predicted here for one.

Shapes   B videos, C channels, F pixel frames, T latent frames, H, W pixels or latents, L text tokens, D features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map

from opensora_fast.autoencoder import Autoencoder
from opensora_fast.block_streaming import Home, weight_bytes
from opensora_fast.conditions import reference_frames
from opensora_fast.config import MMDiTConfig
from opensora_fast.errors import UserError
from opensora_fast.mmdit import MMDiT, Modulation
from opensora_fast.packed_weights import weight_places
from opensora_fast.peak_memory import LiveBytes
from opensora_fast.sampling import sample
from opensora_fast.sampling_settings import SamplingSettings, output_size
from opensora_fast.tiling import BatchedTiles, Network

PHASES = ("text", "encode", "denoise", "decode")
_STEPS = 2  # that are run: the second has everything that later ones have

Stay = Literal["resident", "while_used"]
Fake = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class MemorySettings:
    """What is on the GPU when. None of it but `fp8` changes the video."""

    text: Stay = "resident"  # while_used: in pinned host memory but for their phase
    autoencoder: Stay = "resident"
    blocks: Home = "resident"  # streamed: one block ahead, from pinned host memory, in every step
    modulation: Literal["resident", "precomputed"] = "resident"  # precomputed: its matrices pass by once per video
    fp8: bool = False  # the blocks' matrices in 8 bits
    tile_batch: int = 1  # tiles of the autoencoder in one call

    def stream_arguments(self) -> dict[str, Any]:
        """What `host_model` and `stream_blocks` are told."""
        modulation: Home = "streamed" if self.modulation == "precomputed" else "resident"
        return {"fp8": self.fp8, "blocks": self.blocks, "modulation": modulation}

    def __str__(self) -> str:
        parts = [f"{name} {getattr(self, name).replace('_', ' ')}" for name in ("text", "autoencoder", "blocks")]
        return ", ".join([*parts, f"modulation {self.modulation}", *(["fp8"] if self.fp8 else [])])


@dataclass(frozen=True, kw_only=True)
class SamplingShape:
    """What one call of `sample` makes."""

    settings: SamplingSettings
    condition: str = "t2v"
    videos: int = 1
    text_tokens: int = 512


@dataclass(frozen=True)
class TextNeeds:
    """Bytes of the text encoders: their weights, and what they take beside them for the prompts of a call."""

    weights: int
    work: int

    @classmethod
    def of(cls, t5: nn.Module, clip: nn.Module, *, videos: int, max_length_t5: int, max_length_clip: int) -> TextNeeds:
        """Of transformers' models, which may be on the meta device, in the dtype that they will have."""
        work = []
        for model, length in ((t5, max_length_t5), (clip, max_length_clip)):
            with _without_data(model) as fake, torch.no_grad(), LiveBytes() as live:
                model(input_ids=fake(torch.zeros(videos, length, dtype=torch.int64)))
            work.append(live.peak)
        return cls(module_bytes(t5) + module_bytes(clip), max(work))

    @classmethod
    def of_folders(
        cls, t5: Path, clip: Path, dtype: torch.dtype, *, videos: int, max_length_t5: int, max_length_clip: int
    ) -> TextNeeds:
        """Of two folders, of which only the configurations are read. Raises UserError where that fails."""
        try:
            transformers = import_module("transformers")
        except ImportError as error:
            raise UserError(
                f"the text encoders need transformers ({error}): run pip install 'opensora-fast[text]'"
            ) from error
        models = []
        for folder, name in ((t5, "T5"), (clip, "CLIP")):
            if not (folder / "config.json").is_file():
                raise UserError(f"text encoder folder {folder} has no config.json: name one that holds a {name}")
            config_class = {"T5": transformers.T5Config, "CLIP": transformers.CLIPTextConfig}[name]
            try:
                config = config_class.from_pretrained(folder, local_files_only=True)
            except (OSError, ValueError) as error:
                reason = " ".join(str(error).split())
                raise UserError(f"text encoder folder {folder} has no configuration of a {name}: {reason}") from error
            model_class = {"T5": transformers.T5EncoderModel, "CLIP": transformers.CLIPTextModel}[name]
            with torch.device("meta"):
                models.append(model_class(config).to(dtype).eval())
        return cls.of(*models, videos=videos, max_length_t5=max_length_t5, max_length_clip=max_length_clip)


def predict(
    model_config: MMDiTConfig,
    autoencoder: nn.Module,
    text: TextNeeds,
    settings: MemorySettings,
    shape: SamplingShape,
    dtype: torch.dtype,
) -> dict[str, int]:
    """Bytes at the peak of each phase. `autoencoder` may be on the meta device, in the dtype that it will have.

    Raises UserError where `sample` does for such a request.
    """
    activations = activation_bytes(model_config, autoencoder, shape, dtype, tile_batch=settings.tile_batch)
    return add_weights(activations, meta_model(model_config, dtype), autoencoder, text, settings)


def add_weights(
    activations: dict[str, int], model: MMDiT, autoencoder: nn.Module, text: TextNeeds, settings: MemorySettings
) -> dict[str, int]:
    """What `predict` gives, from `activation_bytes` for the settings' tile_batch and the model on the meta device."""
    weights = weight_bytes(model, **settings.stream_arguments())
    bytes = dict.fromkeys(PHASES, weights.resident)
    for phase in PHASES:
        if settings.text == "resident" or phase == "text":
            bytes[phase] += text.weights
        if settings.autoencoder == "resident" or phase in ("encode", "decode"):
            bytes[phase] += module_bytes(autoencoder)
    work = activations | {
        "text": activations["text"] + text.work,
        "denoise": max(activations["denoise"], activations["modulation"] + weights.modulating),
    }
    return {phase: bytes[phase] + work[phase] for phase in PHASES}


def activation_bytes(
    model_config: MMDiTConfig, autoencoder: Any, shape: SamplingShape, dtype: torch.dtype, *, tile_batch: int = 1
) -> dict[str, int]:
    """The peak of what is not weights: in each phase but the encoders' own in "text", and in "modulation", in which
    the modulation of all steps is computed."""
    model = meta_model(model_config, dtype)
    settings = shape.settings
    few = meta_model(
        replace(
            model_config, depth=min(model_config.depth, 2), depth_single_blocks=min(model_config.depth_single_blocks, 2)
        ),
        dtype,
    )
    parts = nn.ModuleList([model, few, autoencoder])
    with _without_data(parts) as fake, _tiles_as_predicted(autoencoder, tile_batch):
        size = output_size(model_config, autoencoder, settings, shape.condition)
        pixels = [
            fake(torch.empty(shape.videos, 3, frames, *size)) if frames else None
            for frames in reference_frames(shape.condition, autoencoder)
        ]
        with LiveBytes() as live:
            live.hold(each for each in pixels if each is not None)
            with live.paused():
                like = fake(torch.empty((), dtype=dtype))
            laps = _Laps(live)
            sample(
                _Model(model, few, settings.steps, fake, laps),  # type: ignore[arg-type]  # what sample asks of a model
                _Autoencoder(autoencoder, laps),
                _Text(model_config, shape.text_tokens, like),
                [""] * shape.videos,
                replace(settings, steps=min(settings.steps, _STEPS)),
                condition=shape.condition,
                head_BCFHW=pixels[0],
                tail_BCFHW=pixels[1],
            )
            laps.end("decode")
    return laps.peaks


def meta_model(config: MMDiTConfig, dtype: torch.dtype) -> MMDiT:
    """The transformer without memory."""
    with torch.device("meta"):
        return MMDiT(config).to(dtype).eval().requires_grad_(False)


def module_bytes(module: nn.Module) -> int:
    """Bytes of its parameters and buffers; what several places share counts once."""
    return sum({id(place.tensor): place.tensor.nbytes for place in weight_places(module)}.values())


class _Laps:
    """The peak of every stretch of a run."""

    def __init__(self, live: LiveBytes) -> None:
        self.live = live
        self.peaks = dict.fromkeys((*PHASES, "modulation"), 0)

    def end(self, name: str) -> None:
        self.peaks[name] = max(self.peaks[name], self.live.peak)
        self.live.peak = self.live.now


class _Text:
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


class _Model:
    """The transformer without data: the modulation of all steps and blocks, and few blocks, for none keeps anything."""

    def __init__(self, model: MMDiT, few_blocks: MMDiT, steps: int, fake: Fake, laps: _Laps) -> None:
        self._model = model
        self._few_blocks = few_blocks
        self._repeats = -(-steps // _STEPS)
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
        times_R, vectors_RD = self._without_data((timesteps, y_vec))
        modulation = self._model.modulation(times_R.repeat(self._repeats), vectors_RD.repeat(self._repeats, 1))
        self._laps.end("modulation")
        return modulation

    def _without_data(self, tree: Any) -> Any:
        """The same with tensors that have no data; those with data go on to count in their place."""
        with self._laps.live.paused():
            return tree_map(lambda leaf: self._fake(leaf) if isinstance(leaf, Tensor) else leaf, tree)


class _Autoencoder:
    """The autoencoder, which says when the steps are over."""

    def __init__(self, autoencoder: Autoencoder, laps: _Laps) -> None:
        self._autoencoder = autoencoder
        self._laps = laps

    def __getattr__(self, name: str) -> Any:
        return getattr(self._autoencoder, name)

    def decode(self, latent_BCTHW: Tensor) -> Tensor:
        self._laps.end("denoise")
        return self._autoencoder.decode(latent_BCTHW)


class _EndsOfBatches:
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
def _without_data(module: nn.Module) -> Iterator[Fake]:
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
def _tiles_as_predicted(autoencoder: Any, batch: int) -> Iterator[None]:
    runner = autoencoder.run_tiles
    autoencoder.run_tiles = _EndsOfBatches(batch)
    try:
        yield
    finally:
        autoencoder.run_tiles = runner
