"""From noise to video: guided Euler steps along the learnt flow, and everything around them.

One step needs up to three predictions: c with text and condition, u1 with the empty (or negative) prompt and the
condition, u2 with neither.
    v = u2 + g_image (u1 - u2) + g_text (c - u1) = g_text c + (g_image - g_text) u1 + (1 - g_image) u2
A prediction whose coefficient is 0 is not computed; without a condition u1 is u2 and their coefficients add.  The
guidance scales oscillate to 1 in every other step after the first ten, so 50 steps take 80 passes for text-to-video
and 110 for image-to-video where the direct form takes 150, with the same result.  The passes of a step are one batch;
with several ranks they are dealt out to groups, which share each sequence (`sampling_ranks`).  The modulation of all
steps is computed before the first, once for each distinct (time, vector).

Shapes   B videos, R rows of a model call (B per pass), C latent channels, T latent frames, H, W latent rows and
         columns, F pixel frames, N video tokens, n those of this rank, L text tokens, D features, V text vectors.
Numerics The state and the guidance are fp32 (fp64 for fp64 noise); the model casts what it gets to its own dtype.
Source   Open-Sora 2.0 (arXiv 2503.09642) section 5.2 and the released sampler, from which this deviates: the state and
         the times are fp32, not bf16; every video has noise of its own, drawn on the CPU; the given latent frames are
         the mode of the posterior, not drawn from it, and kept for every video of a batch, not only for the first; the
         prompt ends as in training, "24 FPS, 4 motion score." (`prompts`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from opensora_fast.autoencoder import Autoencoder
from opensora_fast.conditions import condition_tokens, sampling_condition
from opensora_fast.config import MMDiTConfig
from opensora_fast.errors import UserError
from opensora_fast.flow import sampling_schedule
from opensora_fast.guidance import Guidance
from opensora_fast.kernels.context_parallel import ContextParallel
from opensora_fast.mmdit import MMDiT
from opensora_fast.modulation_schedule import ModulationSchedule
from opensora_fast.positions import patchify, position_ids_THW, unpatchify
from opensora_fast.prompts import with_suffix
from opensora_fast.sampling_ranks import PassPlan, SamplingRanks
from opensora_fast.sampling_settings import SamplingSettings, output_size
from opensora_fast.sequence_shards import joint_lengths, shard
from opensora_fast.text import PromptEncoding, SharedTextEncoders


@torch.no_grad()
def sample(
    model: MMDiT,
    autoencoder: Autoencoder,
    text: PromptEncoding | None,
    prompts: Sequence[str],
    settings: SamplingSettings,
    *,
    condition: str = "t2v",
    head_BCFHW: Tensor | None = None,
    tail_BCFHW: Tensor | None = None,
    negative_prompts: Sequence[str] | None = None,
    ranks: SamplingRanks | None = None,
    on_step: Callable[[int], None] | None = None,
    on_latent: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Videos of the prompts: [B, 3, frames, height, width] fp32 in [-1, 1]; frames = 1 makes images.

    The model's device and dtype are used. Video b is drawn from seed + b alone: it does not depend on the device's
    generator or on its neighbours' noise. `condition` is a name of `conditions.CONDITIONS`; the pixels it needs are
    `head_BCFHW` and `tail_BCFHW`, in [-1, 1] at the size of the video (`output_size`). `negative_prompts`, one for
    each prompt or one for all, is what guidance steers away from instead of the empty prompt; as in the released
    sampler no words on motion follow it. `on_step` is called with the number of steps done, `on_latent` with that
    and the clean latent [B, C, T, H, W] that the step predicts, the given frames in place.

    `ranks`: the processes that make these videos together. Each calls this with the same arguments and gets the same
    videos; `text` may be None on all but rank 0, which encodes for all of them. The callbacks are called on every
    rank. A decoder that works in tiles spreads them over the ranks where its `run_tiles` is `ranks.tiles`.

    Raises UserError for sizes that the autoencoder or the model cannot take, for a condition without its pixels, and
    for negative prompts of another number.
    """
    size = output_size(model.config, autoencoder, settings, condition)
    latent_thw = autoencoder.latent_shape(settings.frames, *size)
    noise_BCTHW = initial_noise(settings.seed, (len(prompts), model.config.latent_channels, *latent_thw)).to(
        model.device
    )
    fps = 0 if settings.frames == 1 else settings.fps
    suffixed = [with_suffix(prompt, fps, settings.motion_score) for prompt in prompts]
    txt_BLD, vec_BD, null_txt_BLD, null_vec_BD = _encode(_shared(text, ranks), suffixed, negative_prompts, model.device)
    mask_B1THW, reference_BCTHW = sampling_condition(autoencoder, condition, noise_BCTHW, head_BCFHW, tail_BCFHW)
    given_B1THW = mask_B1THW.bool()

    def show(step: int, latent_BCTHW: Tensor) -> None:
        if on_latent is not None:
            on_latent(step, torch.where(given_B1THW, reference_BCTHW, latent_BCTHW))

    tokens_per_frame = latent_thw[1] * latent_thw[2] // model.config.patch_size**2
    latent_BCTHW = denoise(
        model,
        noise_BCTHW,
        timesteps=sampling_schedule(settings.steps, tokens_per_frame, latent_thw[0]),
        txt=txt_BLD,
        vec=vec_BD,
        null_txt=null_txt_BLD,
        null_vec=null_vec_BD,
        mask=mask_B1THW,
        reference=reference_BCTHW,
        guidance_txt=settings.guidance,
        guidance_img=settings.guidance_image,
        oscillate_txt=settings.oscillate_text,
        oscillate_img=settings.oscillate_image,
        dynamic_img_guidance=settings.dynamic_image_guidance and condition.startswith("i2v"),
        ranks=ranks,
        on_step=on_step,
        on_latent=None if on_latent is None else show,
    )
    latent_BCTHW = torch.where(given_B1THW, reference_BCTHW, latent_BCTHW)
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
    embedded_guidance: float | None = None,
    ranks: SamplingRanks | None = None,
    on_step: Callable[[int], None] | None = None,
    on_latent: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """The latent [B, C, T, H, W] fp32 at the end of the flow that starts in `noise` [B, C, T, H, W].

    `model` is an MMDiT or a callable with its signature; one without a `config` is taken to have MMDiTConfig's patch
    size. `timesteps` [steps + 1] falls from 1 to 0. `txt` [B, L, D] and `vec` [B, D] are the prompts, `null_txt` and
    `null_vec` the empty (or negative) prompt for each video or one for all. `mask` [B, 1, T, H, W] is 1 where
    `reference` [B, C, T, H, W] is given; both None: text-to-video. `dynamic_img_guidance` lets image guidance grow
    over the latent frames, as released for i2v conditions. Given frames are not overwritten: the model sees them as
    its condition only. `embedded_guidance` is the scale that a guidance-distilled model (FLUX-dev) is given, at which
    guidance_txt is 1.

    `ranks`: the processes that compute this together, each called with the same arguments; all get the same latent,
    bit for bit. `on_step` is called with the number of steps done, `on_latent` with that and the clean latent that
    the step predicts, x_t - t v, on every rank.

    Raises UserError when only one of mask and reference is there, for fewer than two timesteps, and where the model
    refuses its inputs.
    """
    if (mask is None) != (reference is None):
        raise UserError("mask and reference belong together: pass both, or None for both")
    if len(timesteps) < 2:
        raise UserError(f"timesteps has length {len(timesteps)}: pass at least 2, falling from 1 to 0")
    state_BCTHW = noise.to(torch.promote_types(noise.dtype, torch.float32))
    times = timesteps.to(state_BCTHW)
    config = getattr(model, "config", MMDiTConfig())
    given_BNC = nothing_BNC = None
    if mask is not None and reference is not None and mask.any():
        given_BNC = condition_tokens(mask, reference * mask, config.patch_size)
        nothing_BNC = torch.zeros_like(given_BNC)
    batch, _, frames, _, _ = noise.shape
    null_txt = null_txt.expand(batch, -1, -1)
    vector_B = torch.arange(len(vec), device=noise.device)
    null_vector_B = (len(vec) + torch.arange(len(null_vec), device=noise.device)).expand(batch)
    passes = _Passes(
        model,
        config,
        state_BCTHW.shape,
        times[:-1],
        torch.cat([vec, null_vec]),
        {
            "text": _Pass(txt, vector_B, given_BNC),
            "condition": _Pass(null_txt, null_vector_B, given_BNC),
            "nothing": _Pass(null_txt, null_vector_B, nothing_BNC),
        },
        embedded_guidance,
        ranks,
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
    names, weights_SKT = guidance.table(conditioned=given_BNC is not None)
    needed_SK = weights_SKT.any(dim=-1).tolist()
    weights_SKT = weights_SKT.to(state_BCTHW)  # once: a copy from the host in a step would wait for the step before
    for step, needed_K in enumerate(needed_SK):
        needed = {name: weights_SKT[step, k] for k, name in enumerate(names) if needed_K[k]}
        velocity_BCTHW = passes.guided(needed, state_BCTHW, step)
        state_BCTHW = state_BCTHW + (times[step + 1] - times[step]) * velocity_BCTHW
        if on_latent is not None:
            on_latent(step + 1, state_BCTHW - times[step + 1] * velocity_BCTHW)
        if on_step is not None:
            on_step(step + 1)
    return state_BCTHW


@dataclass(frozen=True)
class _Pass:
    """What one prediction is conditioned on; `vector_B` are rows of the distinct pooled text vectors."""

    txt_BLD: Tensor
    vector_B: Tensor
    cond_BNC: Tensor | None


@dataclass(frozen=True)
class _Call:
    """What this rank's model calls for the same passes have in common; n of the N video tokens, L of the text's."""

    names: Sequence[str]  # of the passes that are this rank's
    plan: PassPlan
    ids_RN3: Tensor
    txt_RLD: Tensor
    txt_ids_RL3: Tensor
    vector_R: Tensor
    y_vec_RD: Tensor
    cond_RNC: Tensor | None
    context: ContextParallel | None


class _Passes:
    """A step's predictions as one model call on each rank; holds what stays the same from step to step."""

    def __init__(
        self,
        model: Callable[..., Tensor],
        config: MMDiTConfig,
        latent_shape: Sequence[int],
        time_S: Tensor,
        vectors_VD: Tensor,
        passes: Mapping[str, _Pass],
        embedded_guidance: float | None,
        ranks: SamplingRanks | None,
    ) -> None:
        self._model = model
        self._config = config
        self._batch, _, *self._latent_thw = latent_shape
        self._time_S = time_S
        self._vectors_VD = vectors_VD
        self._passes = passes
        self._ranks = ranks
        frames, rows, columns = self._latent_thw
        patch_size = config.patch_size
        self._img_ids_N3 = position_ids_THW(frames, rows // patch_size, columns // patch_size, time_S.device)
        self._guidance_V = None if embedded_guidance is None else time_S.new_full((len(vectors_VD),), embedded_guidance)
        self._calls: dict[tuple[str, ...], _Call] = {}  # by the names of a step's passes, those of all ranks
        self._schedule: ModulationSchedule | None = None
        if hasattr(model, "modulation"):
            self._schedule = ModulationSchedule.of(cast(MMDiT, model), time_S, vectors_VD, self._guidance_V)

    def guided(self, weights: Mapping[str, Tensor], state_BCTHW: Tensor, step: int) -> Tensor:
        """The sum of the named passes' velocities by weight: [B, C, T, H, W] in the state's dtype.

        The weights are [T], of the state's dtype and on its device.
        """
        names = tuple(weights)
        if names not in self._calls:
            self._calls[names] = self._new_call(names)
        call = self._calls[names]
        tokens, plan = len(self._img_ids_N3), call.plan
        place, members = (plan.context.rank, plan.context.size) if plan.context else (0, 1)
        velocities = self._velocities(call, patchify(state_BCTHW, self._config.patch_size), step)
        guided_BnC: Tensor | None = None
        for name, velocity_BnC in zip(call.names, velocities, strict=True):
            weight_N = weights[name].repeat_interleave(tokens // self._latent_thw[0])
            part_BnC = shard(weight_N, place, members, dim=0)[:, None] * velocity_BnC.to(state_BCTHW.dtype)
            guided_BnC = part_BnC if guided_BnC is None else guided_BnC + part_BnC
        assert guided_BnC is not None  # every rank has a pass
        guided_BNC = guided_BnC if self._ranks is None else self._ranks.total(guided_BnC, tokens, plan)
        frames, rows, columns = self._latent_thw
        return unpatchify(guided_BNC, self._config.patch_size, (frames, rows, columns))

    def _plan(self, passes: int) -> PassPlan:
        if self._ranks is None:
            return PassPlan(1, range(passes), None)
        text_tokens = next(iter(self._passes.values())).txt_BLD.shape[1]
        return self._ranks.plan(
            passes,
            tokens=text_tokens + len(self._img_ids_N3),
            heads=self._config.num_heads,
            batch=self._batch,
            channels=self._config.head_dim,
            element_bytes=getattr(self._model, "dtype", torch.float32).itemsize,
        )

    def _new_call(self, names: Sequence[str]) -> _Call:
        plan = self._plan(len(names))
        names = [names[index] for index in plan.my_passes]
        passes = [self._passes[name] for name in names]
        ids_RN3 = self._img_ids_N3.expand(len(passes) * self._batch, -1, -1)
        txt_RLD = _joined([each.txt_BLD for each in passes])
        vector_R = _joined([each.vector_B for each in passes])
        conds = [each.cond_BNC for each in passes if each.cond_BNC is not None]
        cond_RNC = _joined(conds) if conds else None
        context = plan.context
        if context is not None:
            place, members = context.rank, context.size
            context = context.with_lengths(joint_lengths(txt_RLD.shape[1], ids_RN3.shape[1], members))
            ids_RN3, txt_RLD = (shard(x, place, members) for x in (ids_RN3, txt_RLD))
            cond_RNC = None if cond_RNC is None else shard(cond_RNC, place, members)
        txt_ids_RL3 = torch.zeros(*txt_RLD.shape[:2], 3, device=txt_RLD.device)
        y_vec_RD = self._vectors_VD[vector_R]
        return _Call(names, plan, ids_RN3, txt_RLD, txt_ids_RL3, vector_R, y_vec_RD, cond_RNC, context)

    def _velocities(self, call: _Call, img_BNC: Tensor, step: int) -> Sequence[Tensor]:
        """One velocity [B, n, C] for every pass of the call, of this rank's tokens."""
        img_RNC = img_BNC.repeat(len(call.names), 1, 1)
        options: dict[str, Any] = {}
        if call.context is not None:
            img_RNC = shard(img_RNC, call.context.rank, call.context.size)
            options["context"] = call.context
        if self._schedule is not None:
            options["modulation"] = self._schedule.rows(step, call.vector_R)
        elif self._guidance_V is not None:
            options["guidance"] = self._guidance_V[call.vector_R]
        velocity_RnC = self._model(
            img_RNC,
            call.ids_RN3,
            call.txt_RLD,
            call.txt_ids_RL3,
            self._time_S[step].expand(len(img_RNC)),
            call.y_vec_RD,
            cond=call.cond_RNC,
            **options,
        )
        return velocity_RnC.split(self._batch)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _shared(text: PromptEncoding | None, ranks: SamplingRanks | None) -> PromptEncoding:
    """`text` for all ranks, which rank 0 alone needs to have."""
    if ranks is not None and not isinstance(text, SharedTextEncoders):
        return SharedTextEncoders(text, ranks)
    if text is None:
        raise ValueError("text=None: only ranks other than 0 may leave it to others")
    return text


def _encode(
    text: PromptEncoding, prompts: Sequence[str], negative_prompts: Sequence[str] | None, device: torch.device
) -> list[Tensor]:
    """txt [B, L, D] and vec [B, D] of the prompts, then of what guidance steers away from (B, or 1 for all)."""
    if negative_prompts is not None and len(negative_prompts) not in (1, len(prompts)):
        raise UserError(
            f"negative_prompts has {len(negative_prompts)} entries for {len(prompts)} prompts: "
            "give one for each, or one for all"
        )
    encoded = text.encode(list(prompts))
    away = text.encode(list(negative_prompts)) if negative_prompts and any(negative_prompts) else text.null()
    return [x.to(device) for x in (*encoded, *away)]


def initial_noise(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal fp32 of `shape` [B, ...]; item b from seed + b, on the CPU: the same for every device."""
    batch, *rest = shape
    return torch.stack(
        [torch.randn(rest, generator=torch.Generator().manual_seed(seed + item)) for item in range(batch)]
    )
