"""Seconds of a video by phase, measured: the real models of a case with random weights, one phase after the other.

A step of denoising waits for the device at its end. Steps with equally many passes of guidance take equally long, so
that of each number a few are timed and stand for the rest.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from opensora_fast.errors import UserError
from opensora_fast.flow import sampling_schedule
from opensora_fast.mmdit import MMDiT
from opensora_fast.profiling.sample_cases import Result, SampleCase, TextSizes
from opensora_fast.sampling import denoise
from opensora_fast.sampling_ranks import SamplingRanks


class _Enough(Exception):
    """So many steps were timed."""


class Measurement:
    """Measures cases on a device, with random weights that are made for each phase."""

    def __init__(self, device: torch.device, ranks: SamplingRanks | None) -> None:
        self._device = device
        self._ranks = ranks
        self._dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def result(self, case: SampleCase, timed_steps: int) -> Result:
        """Each phase by itself, its models alone on the device; a phase whose package is missing is told."""
        seconds, missing = {}, {}
        timed_steps = min(timed_steps, case.steps - 1) or 1
        phases: dict[str, Callable[[], float]] = {
            "text": lambda: self.text_seconds(case),
            "denoise": lambda: self.denoise_seconds(case, timed_steps),
            "decode": lambda: self.decode_seconds(case),
        }
        for name, measure in phases.items():
            try:
                seconds[name] = measure()
            except UserError as error:
                missing[name] = str(error)
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
        return Result(case, seconds, missing, timed_steps)

    @torch.no_grad()
    def text_seconds(self, case: SampleCase) -> float:
        """Both encoders on one prompt, then on the empty one."""
        t5, clip = _text_models(case.models.t5, case.models.clip)
        encoders = [
            (self._random(model), sizes.tokens) for model, sizes in ((t5, case.models.t5), (clip, case.models.clip))
        ]
        ids = [torch.randint(3, 40, (1, tokens), device=self._device) for _, tokens in encoders]

        def encode() -> None:
            for _ in range(2):
                for (model, _), of in zip(encoders, ids, strict=True):
                    model(input_ids=of)

        encode()
        return self._seconds(encode)

    def denoise_seconds(self, case: SampleCase, timed_steps: int) -> float:
        """Of all steps, each as long as the median of those timed with as many passes.

        The modulation that is computed before them is not counted: reading a quarter of the weights once.
        """
        config = case.config
        with torch.device("meta"):
            model = MMDiT(config)
        model = self._random(model)
        generator = torch.Generator(self._device).manual_seed(0)

        def features(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=self._device, dtype=self._dtype)

        text = case.models.t5.tokens
        passes, settings = case.passes(), case.settings
        ends: list[float] = []

        def on_step(done: int) -> None:
            self._wait()
            ends.append(time.perf_counter())
            if done > timed_steps:
                raise _Enough

        self._wait()
        begun = time.perf_counter()
        with suppress(_Enough):
            denoise(
                model,
                features(1, config.latent_channels, *case.latent_thw).float(),
                timesteps=sampling_schedule(case.steps, case.video_tokens // case.latent_thw[0], case.latent_thw[0]),
                txt=features(1, text, config.context_in_dim),
                vec=features(1, config.vec_in_dim),
                null_txt=features(1, text, config.context_in_dim),
                null_vec=features(1, config.vec_in_dim),
                mask=None,
                reference=None,
                guidance_txt=settings.guidance,
                guidance_img=settings.guidance_image,
                oscillate_txt=settings.oscillate_text,
                oscillate_img=settings.oscillate_image,
                dynamic_img_guidance=False,
                ranks=self._ranks,
                on_step=on_step,
            )
        return whole_video([end - start for start, end in zip([begun, *ends], ends, strict=False)], passes)

    @torch.no_grad()
    def decode_seconds(self, case: SampleCase) -> float:
        """Of one latent, its tiles on all ranks."""
        with torch.device("meta"):
            autoencoder = case.models.autoencoder()
        autoencoder = self._random(autoencoder).channels_last()
        if self._ranks is not None:
            autoencoder.run_tiles = self._ranks.tiles
        shape = (1, autoencoder.latent_channels, *case.latent_thw)
        latent_BCTHW = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self._device, self._dtype)
        autoencoder.decode(latent_BCTHW)
        return self._seconds(lambda: autoencoder.decode(latent_BCTHW))

    def _random(self, model: Any) -> Any:
        """A model of the meta device on ours, in our dtype, with random weights: zeros would be faster than data."""
        model = model.to(self._dtype).to_empty(device=self._device).eval().requires_grad_(False)
        generator = torch.Generator(self._device).manual_seed(0)
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                if tensor.is_floating_point():
                    tensor.normal_(generator=generator).div_(max(tensor[0].numel(), 1) ** 0.5 if tensor.ndim else 1)
                else:  # positions of an embedding
                    tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape))
        return model

    def _seconds(self, work: Callable[[], object]) -> float:
        self._wait()
        begun = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - begun

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def whole_video(steps: Sequence[float], passes: Sequence[int]) -> float:
    """Seconds of all steps, from those of the first ones, the very first of which warms up and is not counted.

    A number of passes that was not timed takes as long for each pass as those that were.
    """
    timed: dict[int, list[float]] = {}
    for seconds, number in zip(steps[1:] or steps, passes[1:] or passes, strict=False):
        timed.setdefault(number, []).append(seconds)
    medians = {number: statistics.median(of) for number, of in timed.items()}
    each = statistics.median(seconds / number for number, seconds in medians.items())
    return sum(medians.get(number, number * each) for number in passes)


def _text_models(t5: TextSizes, clip: TextSizes) -> tuple[nn.Module, nn.Module]:
    """Encoders of these sizes without weights."""
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            f"the text encoders need transformers ({error}): run pip install 'opensora-fast[text]'"
        ) from error
    with torch.device("meta"):
        return (
            transformers.T5EncoderModel(
                transformers.T5Config(
                    d_model=t5.width,
                    d_kv=t5.head_channels,
                    d_ff=t5.mlp,
                    num_heads=t5.heads,
                    num_layers=t5.layers,
                    feed_forward_proj="gated-gelu" if t5.gated else "relu",
                )
            ),
            transformers.CLIPTextModel(
                transformers.CLIPTextConfig(
                    hidden_size=clip.width,
                    intermediate_size=clip.mlp,
                    num_attention_heads=clip.heads,
                    num_hidden_layers=clip.layers,
                    max_position_embeddings=clip.tokens,
                )
            ),
        )
