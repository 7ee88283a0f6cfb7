"""What to sample: the request's sizes and scales, and the frame size that they stand for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from opensora_fast.autoencoder import Autoencoder
from opensora_fast.conditions import condition_frames
from opensora_fast.config import MMDiTConfig
from opensora_fast.errors import UserError
from opensora_fast.resolutions import video_size


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """What to make and how. Raises UserError for values out of range; whether sizes suit the models, `sample` says."""

    resolution: str = "256px"
    aspect_ratio: str = "16:9"
    height: int | None = None  # pixels; with width, in place of resolution and aspect_ratio
    width: int | None = None
    frames: int = 129
    fps: int = 24
    steps: int = 50
    guidance: float = 7.5  # of the text; 1 is none
    guidance_image: float = 3.0  # of the condition; 1 is none
    motion_score: float | None = 4.0  # None: no word about motion, as a model trained without scores expects
    seed: int = 0
    oscillate_text: bool = True
    oscillate_image: bool = True
    dynamic_image_guidance: bool = True  # i2v: guidance_image grows from 1 at the first latent frame to the last

    def __post_init__(self) -> None:
        for name in ("frames", "fps", "steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: must be at least 1")
        for name, other in (("height", "width"), ("width", "height")):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value}: must be at least 1")
            if value is not None and getattr(self, other) is None:
                raise UserError(f"{name}={value} without {other}: give both, or a resolution and an aspect ratio")
        if self.motion_score is not None and self.motion_score < 0:
            raise UserError(f"motion_score={self.motion_score}: must not be negative; useful values are 1 to 15")
        for name in ("guidance", "guidance_image", "motion_score"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise UserError(f"{name}={value}: must be a finite number")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed={self.seed}: must be from 0 to 2**63 - 1")


def output_size(
    config: MMDiTConfig, autoencoder: Autoencoder, settings: SamplingSettings, condition: str = "t2v"
) -> tuple[int, int]:
    """(height, width) in pixels that the settings stand for with these models.

    Raises UserError for unknown names, for a height or width that is no whole number of tokens, for a number of frames
    that the autoencoder does not give back, and for a condition that the model does not take or that leaves nothing of
    so few frames to make.
    """
    if condition != "t2v" and not config.cond_embed:
        raise UserError(f"condition {condition!r}: this model takes no image or video (cond_embed=False); drop it")
    multiple = autoencoder.compression[1] * config.patch_size
    if settings.height is not None and settings.width is not None:
        size = settings.height, settings.width
        for name, value in zip(("height", "width"), size, strict=True):
            _check_multiple(name, value, multiple)
    else:
        size = video_size(settings.resolution, settings.aspect_ratio, multiple, training=False)
    latent_frames, _, _ = autoencoder.latent_shape(settings.frames, *size)
    if autoencoder.frames_of(latent_frames) < settings.frames:
        raise UserError(
            f"frames={settings.frames}: the autoencoder decodes them to {autoencoder.frames_of(latent_frames)}; "
            f"use 1, or at least {settings.frames + autoencoder.compression[0]}"
        )
    if latent_frames == 1 and condition != "t2v":
        raise UserError(f"frames={settings.frames}: an image cannot begin or end with one; make a video")
    condition_frames(condition, latent_frames, autoencoder.causal)
    return size


def _check_multiple(name: str, value: int, multiple: int) -> None:
    below = value // multiple * multiple
    if value != below:
        nearest = f"{below} and {below + multiple}" if below else str(multiple)
        raise UserError(
            f"{name}={value}: must be a multiple of {multiple}, the pixels of a token's side; the nearest: {nearest}"
        )
