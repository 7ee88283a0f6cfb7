"""From noise to video: guided Euler steps along the learnt flow, and everything around them.

One step needs up to three predictions: c with text and condition, u1 with the empty prompt and the condition, u2 with
neither.
    v = u2 + g_image (u1 - u2) + g_text (c - u1) = g_text c + (g_image - g_text) u1 + (1 - g_image) u2
A prediction whose coefficient is 0 is not computed; without a condition u1 is u2 and their coefficients add.  The
guidance scales oscillate to 1 in every other step after the first ten, so 50 steps take 80 passes for text-to-video
and 110 for image-to-video where the direct form takes 150, with the same result.  The passes of a step are one batch,
and each distinct (time, vector) is modulated once.

Shapes   B videos, R rows of a model call (B per pass), C latent channels, T latent frames, H, W latent rows and
         columns, F pixel frames, N video tokens, L text tokens, D features.
Numerics The state and the guidance are fp32 (fp64 for fp64 noise); the model casts what it gets to its own dtype.
Source   Open-Sora 2.0 (arXiv 2503.09642) section 5.2 and the released sampler, with two deviations: the state is not
         bf16, and the given latent frames are kept for every video of a batch, not only for the first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opensora_fast.autoencoder import Autoencoder
from opensora_fast.conditions import condition_tokens, sampling_condition
from opensora_fast.config import MMDiTConfig
from opensora_fast.errors import UserError
from opensora_fast.flow import sampling_schedule
from opensora_fast.guidance import Guidance
from opensora_fast.mmdit import MMDiT
from opensora_fast.positions import patchify, position_ids_THW, unpatchify
from opensora_fast.prompts import with_suffix
from opensora_fast.sampling_settings import SamplingSettings, output_size
from opensora_fast.text import TextEncoders


@torch.no_grad()
def sample(
    model: MMDiT,
    autoencoder: Autoencoder,
    text: TextEncoders,
    prompts: Sequence[str],
    settings: SamplingSettings,
    *,
    condition: str = "t2v",
    head_BCFHW: Tensor | None = None,
    tail_BCFHW: Tensor | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Videos of the prompts: [B, 3, frames, height, width] fp32 in [-1, 1]; frames = 1 makes images.

    The model's device and dtype are used. Video b is drawn from seed + b alone: it does not depend on the device's
    generator or on its neighbours' noise. `condition` is a name of `conditions.CONDITIONS`; the pixels it needs are
    `head_BCFHW` and `tail_BCFHW`, in [-1, 1] at the size of the video (`output_size`). `on_step` is called with the
    number of steps done. Raises UserError for sizes that the autoencoder or the model cannot take, and for a
    condition without its pixels.
    """
    size = output_size(model.config, autoencoder, settings, condition)
    latent_thw = autoencoder.latent_shape(settings.frames, *size)
    noise_BCTHW = _noise(settings.seed, (len(prompts), model.config.latent_channels, *latent_thw))
    noise_BCTHW = noise_BCTHW.to(next(model.parameters()).device)
    mask_B1THW, reference_BCTHW = sampling_condition(autoencoder, condition, noise_BCTHW, head_BCFHW, tail_BCFHW)
    fps = 0 if settings.frames == 1 else settings.fps
    txt_BLD, vec_BD = text.encode([with_suffix(prompt, fps, settings.motion_score) for prompt in prompts])
    null_txt_1LD, null_vec_1D = text.null()
    tokens_per_frame = latent_thw[1] * latent_thw[2] // model.config.patch_size**2
    latent_BCTHW = denoise(
        model,
        noise_BCTHW,
        timesteps=sampling_schedule(settings.steps, tokens_per_frame, latent_thw[0]),
        txt=txt_BLD,
        vec=vec_BD,
        null_txt=null_txt_1LD,
        null_vec=null_vec_1D,
        mask=mask_B1THW,
        reference=reference_BCTHW,
        guidance_txt=settings.guidance,
        guidance_img=settings.guidance_image,
        oscillate_txt=settings.oscillate_text,
        oscillate_img=settings.oscillate_image,
        dynamic_img_guidance=settings.dynamic_image_guidance and condition.startswith("i2v"),
        on_step=on_step,
    )
    latent_BCTHW = torch.where(mask_B1THW.bool(), reference_BCTHW, latent_BCTHW)
    video_BCFHW = autoencoder.decode(latent_BCTHW)
    return video_BCFHW[:, :, : settings.frames].float().clamp(-1, 1)


@torch.no_grad()
def denoise(
    model: Callable[..., Tensor],
    noise: Tensor,
    *,
    timesteps: Tensor,
    txt: Tensor,
    vec: Tensor,
    null_txt: Tensor,
    null_vec: Tensor,
    mask: Tensor | None,
    reference: Tensor | None,
    guidance_txt: float,
    guidance_img: float,
    oscillate_txt: bool,
    oscillate_img: bool,
    dynamic_img_guidance: bool,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """The latent [B, C, T, H, W] fp32 at the end of the flow that starts in `noise` [B, C, T, H, W].

    `model` is an MMDiT or a callable with its signature; one without a `config` is taken to have MMDiTConfig's patch
    size. `timesteps` [steps + 1] falls from 1 to 0. `txt` [B, L, D] and `vec` [B, D] are the prompts, `null_txt` and
    `null_vec` the empty (or negative) prompt for each video or one for all. `mask` [B, 1, T, H, W] is 1 where
    `reference` [B, C, T, H, W] is given; both None: text-to-video. `dynamic_img_guidance` lets image guidance grow
    over the latent frames, as released for i2v conditions. Given frames are not overwritten: the model sees them as
    its condition only. `on_step` is called with the number of steps done.

    Raises UserError when only one of mask and reference is there, and where the model refuses its inputs.
    """
    if (mask is None) != (reference is None):
        raise UserError("mask and reference belong together: pass both, or None for both")
    state_BCTHW = noise.to(torch.promote_types(noise.dtype, torch.float32))
    patch_size = getattr(model, "config", MMDiTConfig()).patch_size
    given_BND = nothing_BND = None
    if mask is not None and reference is not None and mask.any():
        given_BND = condition_tokens(mask, reference * mask, patch_size)
        nothing_BND = torch.zeros_like(given_BND)
    batch, _, frames, rows, columns = noise.shape
    null_txt = null_txt.expand(batch, -1, -1)
    null_vector_B = (len(vec) + torch.arange(len(null_vec))).expand(batch)
    passes = _Passes(
        model,
        patch_size,
        (frames, rows, columns),
        torch.cat([vec, null_vec]),
        text=_Pass(txt, torch.arange(batch), given_BND),
        condition=_Pass(null_txt, null_vector_B, given_BND),
        nothing=_Pass(null_txt, null_vector_B, nothing_BND),
    )
    guidance = Guidance(
        text=guidance_txt,
        image=guidance_img,
        oscillate_text=oscillate_txt,
        oscillate_image=oscillate_img,
        dynamic_image=dynamic_img_guidance,
        num_steps=len(timesteps) - 1,
        latent_frames=frames,
    )
    times = timesteps.to(state_BCTHW)
    for step in range(guidance.num_steps):
        weights = guidance.weights(step, conditioned=given_BND is not None)
        needed = {name: weight_T for name, weight_T in weights.items() if weight_T.any()}
        velocities = passes.velocities(list(needed), state_BCTHW, times[step])
        guided_BCTHW = torch.zeros_like(state_BCTHW)
        for weight_T, velocity_BCTHW in zip(needed.values(), velocities, strict=True):
            guided_BCTHW += weight_T.to(state_BCTHW).view(-1, 1, 1) * velocity_BCTHW
        state_BCTHW = state_BCTHW + (times[step + 1] - times[step]) * guided_BCTHW
        if on_step is not None:
            on_step(step + 1)
    return state_BCTHW


@dataclass(frozen=True)
class _Pass:
    """What one prediction is conditioned on; `vector_B` are rows of the distinct pooled text vectors."""

    txt_BLD: Tensor
    vector_B: Tensor
    cond_BND: Tensor | None


class _Passes:
    """A step's predictions as one model call; holds what stays the same from step to step."""

    def __init__(
        self,
        model: Callable[..., Tensor],
        patch_size: int,
        latent_thw: tuple[int, int, int],
        vectors_RD: Tensor,
        **passes: _Pass,
    ) -> None:
        self._model = model
        self._patch_size = patch_size
        self._latent_thw = latent_thw
        self._vectors_RD = vectors_RD
        self._passes = passes
        frames, rows, columns = latent_thw
        self._img_ids_N3 = position_ids_THW(frames, rows // patch_size, columns // patch_size, vectors_RD.device)

    def velocities(self, names: Sequence[str], state_BCTHW: Tensor, time: Tensor) -> Sequence[Tensor]:
        """One velocity [B, C, T, H, W] for every named pass, in the state's dtype."""
        passes = [self._passes[name] for name in names]
        img_RND = patchify(state_BCTHW, self._patch_size).repeat(len(passes), 1, 1)
        txt_RLD = torch.cat([each.txt_BLD for each in passes])
        vector_R = torch.cat([each.vector_B for each in passes])
        conds = [each.cond_BND for each in passes if each.cond_BND is not None]
        velocity_RND = self._model(
            img_RND,
            self._img_ids_N3.expand(len(img_RND), -1, -1),
            txt_RLD,
            torch.zeros(*txt_RLD.shape[:2], 3, device=txt_RLD.device),
            time.expand(len(img_RND)),
            self._vectors_RD[vector_R],
            cond=torch.cat(conds) if conds else None,
            **self._shared_modulation(vector_R, time),
        )
        velocity_RCTHW = unpatchify(velocity_RND.to(state_BCTHW.dtype), self._patch_size, self._latent_thw)
        return velocity_RCTHW.split(len(state_BCTHW))

    def _shared_modulation(self, vector_R: Tensor, time: Tensor) -> dict[str, Any]:
        """The model's modulation of every row, computed once for equal rows, when the model can do that."""
        modulation = getattr(self._model, "modulation", None)
        if modulation is None:
            return {}
        distinct, row_R = vector_R.unique(return_inverse=True)
        shared = modulation(time.expand(len(distinct)), self._vectors_RD[distinct])
        return {"modulation": shared.rows(row_R.to(time.device))}


def _noise(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal fp32 of `shape` [B, ...]; item b from seed + b, on the CPU: the same for every device."""
    batch, *rest = shape
    return torch.stack(
        [torch.randn(rest, generator=torch.Generator().manual_seed(seed + item)) for item in range(batch)]
    )
