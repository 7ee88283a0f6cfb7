"""How much GPU memory a request will take in each of its phases, known before any weights are read.

    text      prompts to vectors           weights at hand + the encoders' own needs
    picture   FLUX's, where there is one   weights at hand + its own steps and decoding
    encode    given images to latents      weights at hand + pixels, tiles and latents
    denoise   the steps                    weights at hand + modulation of all steps + one model call of all passes, or
                                           a preview and the autoencoder
    decode    latent to video              weights at hand + latents, tiles and the video

The activations are counted (`peak_memory`) while the real `sampling.sample` runs on tensors without data, for two steps
with the modulation of all: whatever the code comes to do, the prediction follows. The weights are those that
`block_streaming.weight_bytes` says for the settings. What kernels and libraries take for themselves is not in it;
`memory_plan` leaves room for that. Of several ranks each needs less than is predicted here for one.

Shapes   B videos, C channels, F pixel frames, T latent frames, H, W pixels or latents, L text tokens, D features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from opensora_fast.block_streaming import Home, weight_bytes
from opensora_fast.conditions import reference_frames
from opensora_fast.config import MMDiTConfig
from opensora_fast.errors import UserError
from opensora_fast.flux import FluxImages, flux_files
from opensora_fast.flux_autoencoder import FluxAutoencoder, diffusers_config, released_config
from opensora_fast.memory_stand_ins import (
    STEPS,
    DatalessModel,
    DatalessText,
    Laps,
    PhasedAutoencoder,
    tiles_as_predicted,
    without_data,
)
from opensora_fast.mmdit import MMDiT
from opensora_fast.packed_weights import weight_places
from opensora_fast.parameter_source import open_parameters
from opensora_fast.peak_memory import LiveBytes
from opensora_fast.resolutions import ASPECT_RATIOS
from opensora_fast.sampling import sample
from opensora_fast.sampling_settings import SamplingSettings, output_size
from opensora_fast.weight_files import WeightFiles

PHASES = ("text", "encode", "denoise", "decode")

Stay = Literal["resident", "while_used"]


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
    previews: bool = False  # one latent frame is decoded between steps


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
            with without_data(model) as fake, torch.no_grad(), LiveBytes() as live:
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


@dataclass(frozen=True)
class PictureNeeds:
    """Bytes of FLUX where its blocks are streamed and its autoencoder waits on the host: those of its weights that stay
    on the device, and what making a picture takes beside them."""

    resident: int
    work: int

    @classmethod
    def of(
        cls,
        config: MMDiTConfig,
        autoencoder: FluxAutoencoder,
        dtype: torch.dtype,
        *,
        resolution: str,
        steps: int,
        text_tokens: int,
    ) -> PictureNeeds:
        """Of one picture of the resolution, in the aspect ratio that takes most. `autoencoder`: in the dtype that it
        will have, maybe on the meta device. Raises UserError where `FluxImages` does.
        """
        model, few = meta_model(config, dtype), meta_model(_few_blocks(config), dtype)
        weights = weight_bytes(model)
        with without_data(nn.ModuleList([model, few, autoencoder])) as fake, LiveBytes() as live:
            with live.paused():
                like = fake(torch.empty((), dtype=dtype))
            laps = Laps(live)
            flux = FluxImages(
                DatalessModel(model, few, steps, fake, laps),  # type: ignore[arg-type]  # what FluxImages asks of it
                PhasedAutoencoder(autoencoder, laps),  # type: ignore[arg-type]  # the same: decode and the sizes
                DatalessText(config, text_tokens, like),
            )
            ratio = max(ASPECT_RATIOS, key=lambda ratio: math.prod(flux.size(resolution, ratio)))
            flux.image([""], resolution=resolution, aspect_ratio=ratio, steps=min(steps, STEPS))
            laps.end("decode")
        peaks = laps.peaks
        decode = peaks["decode"] + module_bytes(autoencoder)
        return cls(weights.resident, max(peaks["modulation"] + weights.modulating, peaks["denoise"], decode))

    @classmethod
    def of_folder(
        cls, folder: Path, dtype: torch.dtype, *, resolution: str, steps: int, text_tokens: int
    ) -> PictureNeeds:
        """Of a FLUX folder, of which no weights are read. Raises UserError naming what is missing or of no FLUX."""
        transformer, autoencoder = flux_files(folder)
        config: Any = open_parameters(transformer).config
        of = diffusers_config(autoencoder) if autoencoder.is_dir() else released_config(WeightFiles.open(autoencoder))
        with torch.device("meta"):
            layout = FluxAutoencoder(of).to(dtype).eval().requires_grad_(False)
        return cls.of(config, layout, dtype, resolution=resolution, steps=steps, text_tokens=text_tokens)


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
    activations: dict[str, int],
    model: MMDiT,
    autoencoder: nn.Module,
    text: TextNeeds,
    settings: MemorySettings,
    picture: PictureNeeds | None = None,
) -> dict[str, int]:
    """What `predict` gives, from `activation_bytes` for the settings' tile_batch and the model on the meta device.

    With a `picture` there is a phase of that name, and what FLUX keeps on the device is in all of them.
    """
    weights = weight_bytes(model, **settings.stream_arguments())
    resident = weights.resident
    work = {phase: activations[phase] for phase in PHASES}
    if picture is not None:
        resident += picture.resident
        work["picture"] = picture.work
    away = settings.autoencoder == "while_used"
    if activations["preview"]:
        preview = activations["preview"] + away * module_bytes(autoencoder)
        work["denoise"] = max(work["denoise"], preview)
    work["denoise"] = max(work["denoise"], activations["modulation"] + weights.modulating)
    work["text"] += text.work
    for phase in work:
        work[phase] += resident
        if settings.text == "resident" or phase == "text":
            work[phase] += text.weights
        if not away or phase in ("encode", "decode"):
            work[phase] += module_bytes(autoencoder)
    return work


def activation_bytes(
    model_config: MMDiTConfig, autoencoder: Any, shape: SamplingShape, dtype: torch.dtype, *, tile_batch: int = 1
) -> dict[str, int]:
    """The peak of what is not weights: in each phase but the encoders' own in "text", in "modulation", in which the
    modulation of all steps is computed, and in "preview" (0 without)."""
    model, few = meta_model(model_config, dtype), meta_model(_few_blocks(model_config), dtype)
    settings = shape.settings
    parts = nn.ModuleList([model, few, autoencoder])
    with without_data(parts) as fake, tiles_as_predicted(autoencoder, tile_batch):
        size = output_size(model_config, autoencoder, settings, shape.condition)
        pixels = [
            fake(torch.empty(shape.videos, 3, frames, *size)) if frames else None
            for frames in reference_frames(shape.condition, autoencoder)
        ]
        with LiveBytes() as live:
            live.hold(each for each in pixels if each is not None)
            with live.paused():
                like = fake(torch.empty((), dtype=dtype))
            laps = Laps(live)

            def preview(step: int, latent_BCTHW: Tensor) -> None:
                laps.end("denoise")
                autoencoder.decode(latent_BCTHW[:, :, :1])
                laps.end("preview")

            sample(
                DatalessModel(model, few, settings.steps, fake, laps),  # type: ignore[arg-type]  # what sample asks of a model
                PhasedAutoencoder(autoencoder, laps),
                DatalessText(model_config, shape.text_tokens, like),
                [""] * shape.videos,
                replace(settings, steps=min(settings.steps, STEPS)),
                condition=shape.condition,
                head_BCFHW=pixels[0],
                tail_BCFHW=pixels[1],
                on_latent=preview if shape.previews else None,
            )
            laps.end("decode")
    return {name: laps.peaks[name] for name in (*PHASES, "modulation", "preview")}


def _few_blocks(config: MMDiTConfig) -> MMDiTConfig:
    return replace(config, depth=min(config.depth, 2), depth_single_blocks=min(config.depth_single_blocks, 2))


def meta_model(config: MMDiTConfig, dtype: torch.dtype) -> MMDiT:
    """The transformer without memory."""
    with torch.device("meta"):
        return MMDiT(config).to(dtype).eval().requires_grad_(False)


def module_bytes(module: nn.Module) -> int:
    """Bytes of its parameters and buffers; what several places share counts once."""
    return sum({id(place.tensor): place.tensor.nbytes for place in weight_places(module)}.values())
