"""Seconds of a video by phase, measured: the real models of a case with random weights, one phase after the other.

The steps of a video are of as many kinds as guidance has numbers of passes, here 1 and 2. Those of a kind take equally
long, so that of each a few are timed, after one that warms up, and stand for all; each waits for the device at its end.
The modulation of all steps is timed as a whole.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from opensora_fast.errors import UserError
from opensora_fast.flow import sampling_schedule
from opensora_fast.mmdit import MMDiT
from opensora_fast.modulation_schedule import ModulationSchedule
from opensora_fast.profiling.sample_cases import Result, SampleCase, TextSizes
from opensora_fast.sampling import denoise
from opensora_fast.sampling_ranks import SamplingRanks


class Measurement:
    """Measures cases on a device, with random weights that are made for each phase."""

    def __init__(self, device: torch.device, ranks: SamplingRanks | None) -> None:
        self._device = device
        self._ranks = ranks
        self._dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def result(self, case: SampleCase, timed_steps: int) -> Result:
        """Each phase by itself, its models alone on the device; a phase whose package is missing is told.

        `timed_steps` are those of each kind.
        """
        seconds, missing = {}, {}
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

    @torch.no_grad()
    def denoise_seconds(self, case: SampleCase, timed_steps: int) -> float:
        """Of the modulation of all steps, and of the steps: those of each kind as long as the median of it."""
        config = case.config
        with torch.device("meta"):
            model = MMDiT(config)
        model = self._random(model)
        times = _schedule(case, case.steps)[:-1].to(self._device)
        vectors_VD = self._features(2, config.vec_in_dim)

        def modulate() -> None:
            ModulationSchedule.of(model, times, vectors_VD)

        modulate()
        kinds = Counter(case.passes())
        medians = {passes: statistics.median(self.step_seconds(model, case, passes, timed_steps)) for passes in kinds}
        return self._seconds(modulate) + sum(steps * medians[passes] for passes, steps in kinds.items())

    def step_seconds(self, model: MMDiT, case: SampleCase, passes: int, timed_steps: int) -> list[float]:
        """Of so many steps with 1 or 2 passes each, one after the other; one before them warms up.

        Steps of one kind alone: on several ranks the other kind has other shapes and exchanges.
        """
        config, text = case.config, case.models.t5.tokens
        ends: list[float] = []

        def on_step(done: int) -> None:
            self._wait()
            ends.append(time.perf_counter())

        denoise(
            model,
            self._features(1, config.latent_channels, *case.latent_thw).float(),
            timesteps=_schedule(case, timed_steps + 1),
            txt=self._features(1, text, config.context_in_dim),
            vec=self._features(1, config.vec_in_dim),
            null_txt=self._features(1, text, config.context_in_dim),
            null_vec=self._features(1, config.vec_in_dim),
            mask=None,
            reference=None,
            guidance_txt=1.0 if passes == 1 else case.settings.guidance,
            guidance_img=1.0,
            oscillate_txt=False,
            oscillate_img=False,
            dynamic_img_guidance=False,
            ranks=self._ranks,
            on_step=on_step,
        )
        return [end - start for start, end in pairwise(ends)]

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

    def _features(self, *shape: int) -> Tensor:
        """Random ones in our dtype."""
        generator = torch.Generator(self._device).manual_seed(0)
        return torch.randn(shape, generator=generator, device=self._device, dtype=self._dtype)

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


def _schedule(case: SampleCase, steps: int) -> Tensor:
    """Times [steps + 1] of a video of the case in so many steps."""
    return sampling_schedule(steps, case.video_tokens // case.latent_thw[0], case.latent_thw[0])


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
