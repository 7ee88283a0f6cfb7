"""What `bench sample` makes: a text-to-video request of a named model, its shapes and passes, and what it may take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from opensora_fast.autoencoder import StoredLayout
from opensora_fast.config import MMDIT_PRESETS, HunyuanVAEConfig, MMDiTConfig, VideoDCAEConfig
from opensora_fast.dc_ae import VideoDCAE
from opensora_fast.errors import UserError
from opensora_fast.guidance import Guidance
from opensora_fast.hunyuan_vae import HunyuanVAE
from opensora_fast.resolutions import video_size
from opensora_fast.sampling_settings import SamplingSettings

PHASES = ("text", "denoise", "decode")
TARGETS = {("open-sora-v2", "768px", 129, 50, 1): 900.0, ("open-sora-v2", "768px", 129, 50, 8): 130.0}  # s, on H200


@dataclass(frozen=True, kw_only=True)
class TextSizes:
    """A transformer of a text encoder; `gated`: its MLP has three matrices in place of two."""

    layers: int
    width: int
    heads: int
    head_channels: int
    mlp: int
    tokens: int
    gated: bool = False

    @property
    def inner(self) -> int:
        return self.heads * self.head_channels


T5_XXL = TextSizes(layers=24, width=4096, heads=64, head_channels=64, mlp=10240, tokens=512, gated=True)
CLIP_L = TextSizes(layers=12, width=768, heads=12, head_channels=64, mlp=3072, tokens=77)
TINY_T5 = TextSizes(layers=2, width=48, heads=2, head_channels=24, mlp=96, tokens=16, gated=True)
TINY_CLIP = TextSizes(layers=2, width=32, heads=2, head_channels=16, mlp=64, tokens=16)

TINY_AUTOENCODER = VideoDCAEConfig(
    latent_channels=4,
    encoder_widths=(8, 8, 8, 8),
    decoder_widths=(8, 8, 8, 8),
    encoder_depths=(1, 1, 1, 1),
    decoder_depths=(1, 1, 1, 1),
    encoder_block_types=("ResBlock",) * 4,
    decoder_block_types=("ResBlock",) * 4,
    temporal_downsample=(True, True, False, False),
    heads_dim=4,
)


@dataclass(frozen=True, kw_only=True)
class Layout(StoredLayout):
    """What an autoencoder says of sizes, without the packages that it is built from."""

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(t, h, w) of a video of this size."""
        time, rows, columns = self.compression
        return frames // time + 1 if self.causal else max(frames // time, 1), height // rows, width // columns

    def frames_of(self, latent_frames: int) -> int:
        """Frames of the video that t latent frames decode to."""
        if self.causal or latent_frames == 1:
            return (latent_frames - 1) * self.compression[0] + 1
        return latent_frames * self.compression[0]


@dataclass(frozen=True, kw_only=True)
class Models:
    """The models of a name in `MMDIT_PRESETS`; `autoencoder` makes one with the tiles of the released sampler."""

    autoencoder: Callable[[], Any]
    layout: Layout
    frames: int  # of a video, where the request does not say
    t5: TextSizes = T5_XXL
    clip: TextSizes = CLIP_L


MODELS = {
    "open-sora-v2": Models(
        autoencoder=lambda: HunyuanVAE(HunyuanVAEConfig(use_spatial_tiling=True)),
        layout=Layout(latent_channels=16, compression=(4, 8, 8), causal=True),
        frames=129,
    ),
    "open-sora-v2-dcae": Models(
        autoencoder=lambda: VideoDCAE(VideoDCAEConfig(use_spatial_tiling=True, use_temporal_tiling=True)),
        layout=Layout(latent_channels=128, compression=(4, 32, 32), causal=False),
        frames=128,
    ),
    "tiny": Models(
        autoencoder=lambda: VideoDCAE(TINY_AUTOENCODER),
        layout=Layout(latent_channels=4, compression=(4, 8, 8), causal=False),
        frames=8,
        t5=TINY_T5,
        clip=TINY_CLIP,
    ),
}


@dataclass(frozen=True, kw_only=True)
class SampleCase:
    """One video by one model. Raises UserError for a model, a resolution or frames that are none."""

    model: str
    resolution: str
    frames: int
    steps: int
    gpus: int

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise UserError(f"--model {self.model}: no such model; choose one of {', '.join(MODELS)}")
        if self.gpus < 1:
            raise UserError(f"--gpus {self.gpus}: must be at least 1")
        made = self.layout.frames_of(self.latent_thw[0])
        if made != self.frames:
            raise UserError(f"--frames {self.frames}: the autoencoder of {self.model} gives {made} frames; use those")

    def __str__(self) -> str:
        gpus = f"{self.gpus} GPU{'s' * (self.gpus > 1)}"
        return f"{self.model}, {self.resolution}, {self.frames} frames, {self.steps} steps, {gpus}"

    @property
    def models(self) -> Models:
        return MODELS[self.model]

    @property
    def layout(self) -> Layout:
        return self.models.layout

    @property
    def config(self) -> MMDiTConfig:
        return MMDIT_PRESETS[self.model]

    @property
    def settings(self) -> SamplingSettings:
        return SamplingSettings(resolution=self.resolution, frames=self.frames, steps=self.steps)

    @property
    def target(self) -> float | None:
        """Seconds that it is to take at most, where that is said."""
        return TARGETS.get((self.model, self.resolution, self.frames, self.steps, self.gpus))

    @cached_property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        multiple = self.layout.compression[1] * self.config.patch_size
        return video_size(self.resolution, self.settings.aspect_ratio, multiple, training=False)

    @cached_property
    def latent_thw(self) -> tuple[int, int, int]:
        return self.layout.latent_shape(self.frames, *self.size)

    @property
    def video_tokens(self) -> int:
        frames, rows, columns = self.latent_thw
        return frames * rows * columns // self.config.patch_size**2

    def autoencoder(self) -> Any:
        """Without weights, in bfloat16. Raises UserError where a package that it is built from is missing."""
        with torch.device("meta"):
            return self.models.autoencoder().to(torch.bfloat16).eval().requires_grad_(False)

    def passes(self) -> list[int]:
        """How many predictions each step computes."""
        settings = self.settings
        guidance = Guidance(
            text=settings.guidance,
            image=settings.guidance_image,
            oscillate_text=settings.oscillate_text,
            oscillate_image=settings.oscillate_image,
            dynamic_image=False,
            num_steps=self.steps,
            latent_frames=self.latent_thw[0],
        )
        weights = (guidance.weights(step, conditioned=False) for step in range(self.steps))
        return [sum(bool(weight_T.any()) for weight_T in of.values()) for of in weights]


@dataclass(frozen=True)
class Result:
    """Seconds of a case by phase; a phase that has no figure is why in `missing`.

    `timed_steps` of each number of passes were measured; None: modelled.
    """

    case: SampleCase
    seconds: dict[str, float]
    missing: dict[str, str]
    timed_steps: int | None = None

    @property
    def total(self) -> float | None:
        return None if self.missing else sum(self.seconds.values())
