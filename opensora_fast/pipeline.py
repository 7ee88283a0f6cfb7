"""`VideoPipeline`: a video model in Python, called the way that users of diffusers expect.

    pipe = VideoPipeline.from_pretrained("ckpts")
    video = pipe("rain on a roof", num_frames=129, seed=1).frames[0]        # [F, H, W, 3], floats in [0, 1]
    video = pipe("the fox turns its head", image="fox.png").frames[0]      # begins with the image

`opensora-fast sample` is this and a command line around it (`sample_command`).

Shapes   B videos, F frames, H, W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from opensora_fast.conditions import reference_frames
from opensora_fast.errors import UserError
from opensora_fast.flow import sampling_schedule
from opensora_fast.loaded_models import LoadedModels, LoadOptions, load_models
from opensora_fast.model_folder import find_model
from opensora_fast.pipeline_arguments import (
    OutputType,
    as_output,
    check_types,
    checked_device,
    checked_dtype,
    one_each,
    stacked,
)
from opensora_fast.reference_pixels import clip_pixels, image_pixels
from opensora_fast.resolutions import ASPECT_RATIOS
from opensora_fast.sample_requests import check_text, condition_of, flux_paints
from opensora_fast.sampling import sample
from opensora_fast.sampling_ranks import by_the_first
from opensora_fast.sampling_settings import SamplingSettings, output_size

if TYPE_CHECKING:
    from PIL.Image import Image

    from opensora_fast.checkpoint_folder import Weights
    from opensora_fast.reference_pixels import Visual
    from opensora_fast.sampling_ranks import SamplingRanks

SHORTEST_GIVEN = 8  # frames of a video that an image can begin, with every autoencoder


class VideoPipelineOutput(NamedTuple):
    """What a call gives: `frames` of B videos, also as item 0, in the form that was asked for.

    "np": float32 [B, F, H, W, 3] in [0, 1].  "pt": float32 [B, F, 3, H, W] in [0, 1].  "pil": B lists of F images.
    """

    frames: np.ndarray | Tensor | list[list[Image]]


class VideoPipeline:
    """Prompts, images and videos to videos."""

    def __init__(
        self,
        models: LoadedModels,
        *,
        defaults: SamplingSettings | None = None,
        flux_resolution: str = "768px",
        ranks: SamplingRanks | None = None,
    ) -> None:
        """`defaults`: what a call does not say. `ranks`: the processes that each make the same calls together."""
        self.models = models
        self.defaults = defaults or SamplingSettings()
        self._flux_resolution = flux_resolution
        self._ranks = ranks

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        weights: Weights | None = None,
        t5: str | Path | None = None,
        clip: str | Path | None = None,
        autoencoder: str | Path | None = None,
        flux: str | Path | None = None,
        flux_resolution: str = "768px",
        memory_budget: str | int | None = None,
        largest: SamplingSettings | None = None,
        fp8: bool = False,
        compile: bool = False,
        tensorrt: bool = False,
        ranks: SamplingRanks | None = None,
    ) -> VideoPipeline:
        """The pipeline of a run, one of its step folders, a released folder or a released weights file.

        Args:
            device, dtype: default: the GPU in bfloat16 where there is one, else the CPU in float32. torch_dtype is
                dtype, as diffusers has it.
            weights: of a run: "ema" (its moving average; the default where there is one) or "model".
            t5, clip, autoencoder: folders or files in place of those that `path` names or that lie beside it.
            flux: a FLUX.1-dev folder: a prompt without an image begins with one that FLUX makes at `flux_resolution`.
            memory_budget: bytes, or "24GiB", of GPU memory to stay within; planned for videos as large as `largest`
                (default: the defaults of the model).
            fp8: keep the matrices of the blocks in 8 bits; this changes results.
            compile: compile the blocks; the first video waits for it.  tensorrt: run the decoder through TensorRT.
            ranks: the processes that work together (`process_group.joined`); each makes the same calls.

        Raises UserError for anything that is missing or does not fit, naming the file and the remedy.
        """
        if dtype is not None and torch_dtype is not None:
            raise UserError("dtype and torch_dtype: give one of them")
        place, kind = checked_device(device), checked_dtype(dtype or torch_dtype)
        parts = find_model(
            Path(path),
            weights=weights,
            t5=_path(t5),
            clip=_path(clip),
            autoencoder=_path(autoencoder),
            flux=_path(flux),
        )
        defaults = SamplingSettings(**parts.defaults)
        planned = largest or defaults
        given = parts.config.cond_embed and planned.frames >= SHORTEST_GIVEN
        models = load_models(
            parts,
            LoadOptions(
                device=place,
                dtype=kind,
                memory_budget=memory_budget,
                flux_resolution=flux_resolution,
                fp8=fp8,
                compile=compile,
                tensorrt=tensorrt,
            ),
            [(planned, "i2v_head" if given else "t2v")],
            ranks,
        )
        return cls(models, defaults=defaults, flux_resolution=flux_resolution, ranks=ranks)

    @property
    def device(self) -> torch.device:
        """Where the videos are computed."""
        return self.models.model.device

    def to(self, device: torch.device | str) -> VideoPipeline:
        """This pipeline, which stays where it was loaded. Raises UserError for another device."""
        wanted = checked_device(device)
        if wanted is not None and (wanted.type != self.device.type or wanted.index not in (None, self.device.index)):
            raise UserError(f"device {wanted}: the weights are on {self.device}; load with from_pretrained(device=...)")
        return self

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        image: Visual | Sequence[Visual] | None = None,
        last_image: Visual | Sequence[Visual] | None = None,
        video: Visual | None = None,
        condition: str | None = None,
        height: int | None = None,
        width: int | None = None,
        resolution: str | None = None,
        aspect_ratio: str | None = None,
        num_frames: int | None = None,
        frames_per_second: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_scale_image: float | None = None,
        motion_score: float | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        settings: SamplingSettings | None = None,
        output_type: OutputType = "np",
        callback_on_step_end: Callable[[VideoPipeline, int, float, dict[str, Tensor]], Any] | None = None,
    ) -> VideoPipelineOutput:
        """Videos of the prompts; what is not given comes from `settings`, which defaults to `self.defaults`.

        Args:
            negative_prompt: what guidance steers away from, one for all prompts or one each; default: nothing.
            image, last_image: the picture that the videos begin or end with: a path, a PIL image, an array [H, W, 3]
                or a tensor [3, H, W] (uint8, or floating point in [0, 1]); or a list of them, one for each prompt.
            video: the frames that the videos go on from, or lead to, in the same forms.
            condition: how they are used, a name of `conditions.CONDITIONS`; default: as what is given says.
            num_frames, height, width: in frames and pixels. height and width replace resolution and aspect_ratio.
            frames_per_second: what the prompt says of the rate; a video file is read at up to this rate.
            guidance_scale, guidance_scale_image: of the prompt and of the given picture or video; 1 is none.
            seed: video b is drawn from seed + b.  generator: one, which draws the seed and goes on by it.
            output_type: see `VideoPipelineOutput`.
            callback_on_step_end: called after every step with this pipeline, the step from 0, the time that the step
                began at (1 noise, 0 video), and {"latents": the clean latent [B, C, T, H, W] that it predicts}. An
                exception of it ends the call; what it returns is not used.

        Raises UserError for values that do not fit the models or one another.
        """
        if generator is not None:
            if seed is not None:
                raise UserError("seed and generator: give one of them")
            if not isinstance(generator, torch.Generator):
                raise UserError("generator: pass one for the call; video b is drawn from the seed that it draws + b")
            seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        given: dict[str, Any] = {
            "height": height,
            "width": width,
            "resolution": resolution,
            "aspect_ratio": aspect_ratio,
            "frames": num_frames,
            "fps": frames_per_second,
            "steps": num_inference_steps,
            "guidance": guidance_scale,
            "guidance_image": guidance_scale_image,
            "motion_score": motion_score,
            "seed": seed,
        }
        check_types(given)
        base = settings or self.defaults
        if (resolution or aspect_ratio) and not height and not width:
            base = replace(base, height=None, width=None)
        settings = replace(base, **{name: value for name, value in given.items() if value is not None})
        if output_type not in ("np", "pt", "pil"):
            raise UserError(f"output_type={output_type!r}: use 'np', 'pt' or 'pil'")
        if not isinstance(prompt, str | Sequence):
            raise UserError(f"prompt={prompt!r}: must be text, or a list of texts")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise UserError("prompt is an empty list: pass at least one")
        negative_prompts = [negative_prompt] if isinstance(negative_prompt, str) else negative_prompt
        for name, texts in (("prompt", prompts), ("negative_prompt", negative_prompts or [])):
            for text in texts:
                if not isinstance(text, str):
                    raise UserError(f"{name}={text!r}: must be text, or a list of texts")
                check_text(name, text)
        painted = self.models.flux is not None and flux_paints(
            condition, settings.frames, image=image is not None, video=video is not None
        )
        there = {
            name
            for name, is_there in (
                ("image", painted or image is not None),
                ("last", last_image is not None),
                ("video", video is not None),
            )
            if is_there
        }
        condition = condition_of(there, condition)
        pictures = {"image": one_each("image", image, prompts), "last": one_each("last_image", last_image, prompts)}
        each = [
            self.references(condition, settings, image=begins, last=ends, video=video)
            for begins, ends in zip(pictures["image"], pictures["last"], strict=False)
        ]
        head, tail = (stacked([pair[place] for pair in each]) for place in (0, 1))
        on_latent = None
        if callback_on_step_end is not None:
            times = self._times(settings, condition)

            def on_latent(step: int, latent_BCTHW: Tensor) -> None:
                callback_on_step_end(self, step - 1, times[step - 1], {"latents": latent_BCTHW})

        video_B3FHW = self.make(
            prompts,
            settings,
            condition=condition,
            head=head,
            tail=tail,
            negative_prompts=negative_prompts,
            on_latent=on_latent,
        )
        return VideoPipelineOutput(as_output(video_B3FHW, output_type))

    def make(
        self,
        prompts: Sequence[str],
        settings: SamplingSettings,
        *,
        condition: str = "t2v",
        head: Tensor | None = None,
        tail: Tensor | None = None,
        negative_prompts: Sequence[str] | None = None,
        on_step: Callable[[int], None] | None = None,
        on_latent: Callable[[int, Tensor], None] | None = None,
        on_paint: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Videos [B, 3, F, H, W] float32 in [-1, 1], from what `references` gave; see `sampling.sample`.

        A condition that begins with one image and has no `head` gets it from FLUX; `on_paint` is told of its steps.
        """
        models = self.models
        height, width = output_size(models.model.config, models.autoencoder, settings, condition)
        if models.most_pixels is not None and (
            len(prompts) > 1 or settings.frames * height * width > models.most_pixels
        ):
            raise UserError(
                f"{len(prompts)} x {settings.frames} frames of {width} x {height}: the memory budget is for one "
                f"video of {models.most_pixels} pixels in all; name the largest when loading (largest=)"
            )
        if head is None and condition in ("i2v_head", "i2v_loop") and models.flux is not None:
            head = self._painted(prompts, settings, condition, on_paint)
        return sample(
            models.model,
            models.autoencoder,
            models.text,
            prompts,
            settings,
            condition=condition,
            head_BCFHW=_for_each(head, len(prompts)),
            tail_BCFHW=_for_each(tail, len(prompts)),
            negative_prompts=negative_prompts,
            ranks=self._ranks,
            on_step=on_step,
            on_latent=on_latent,
        )

    def references(
        self,
        condition: str,
        settings: SamplingSettings,
        *,
        image: Visual | None = None,
        last: Visual | None = None,
        video: Visual | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """What a video begins and ends with, each [1, 3, F, H, W] in [-1, 1] at its size, or None.

        Read by the first rank, for all. Raises UserError, on all, for what cannot be read or is too short.
        """
        size = output_size(self.models.model.config, self.models.autoencoder, settings, condition)

        def read() -> tuple[Tensor | None, Tensor | None]:
            if video is not None:
                head, tail = reference_frames(condition, self.models.autoencoder)
                end: Literal["head", "tail"] = "head" if head else "tail"
                pixels_13FHW = clip_pixels(video, head or tail, settings.fps, size, end)[None]
                return (pixels_13FHW, None) if head else (None, pixels_13FHW)
            begins, ends = (None if picture is None else image_pixels(picture, size)[None] for picture in (image, last))
            return begins, ends

        return by_the_first(self._ranks, read)

    def _painted(
        self, prompts: Sequence[str], settings: SamplingSettings, condition: str, on_step: Callable[[int], None] | None
    ) -> Tensor:
        """FLUX's picture of each prompt, [B, 3, 1, H, W] at the size of the video."""
        assert self.models.flux is not None
        height, width = output_size(self.models.model.config, self.models.autoencoder, settings, condition)
        images_B3HW = self.models.flux.image(
            prompts,
            resolution=self._flux_resolution,
            aspect_ratio=nearest_ratio(height, width),
            steps=settings.steps,
            seed=settings.seed,
            on_step=on_step,
            ranks=self._ranks,
        )
        pictures = ((images_B3HW + 1) / 2).clamp(0, 1)
        return torch.stack([image_pixels(picture_3HW, (height, width)) for picture_3HW in pictures])

    def _times(self, settings: SamplingSettings, condition: str) -> list[float]:
        size = output_size(self.models.model.config, self.models.autoencoder, settings, condition)
        frames, rows, columns = self.models.autoencoder.latent_shape(settings.frames, *size)
        tokens = rows * columns // self.models.model.config.patch_size**2
        return sampling_schedule(settings.steps, tokens, frames).tolist()


def nearest_ratio(height: int, width: int) -> str:
    """The named aspect ratio that is nearest to a frame's."""

    def distance(name: str) -> float:
        across, down = map(float, name.split(":"))
        return abs(math.log(width / height * down / across))

    return min(ASPECT_RATIOS, key=distance)


def _for_each(pixels: Tensor | None, count: int) -> Tensor | None:
    return pixels if pixels is None else pixels.expand(count, -1, -1, -1, -1)


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)
