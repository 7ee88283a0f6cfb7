"""Visual conditions: which latent frames of a clip are given to the model, and as what.

    t2v              nothing
    i2v_head         the first latent frame
    i2v_tail         the last latent frame
    i2v_loop         the first and the last
    v2v_head         the first 9 latent frames (33 frames); non-causal autoencoder: 8 (32 frames)
    v2v_tail         the last 9 or 8
    v2v_head_easy    the first 17 latent frames (65 frames); non-causal autoencoder: 16 (64 frames)
    v2v_tail_easy    the last 17 or 16

What is given is encoded by itself, because that is all there is at sampling time: a latent frame of the whole clip
would leak what comes after it.  A condition is possible when it leaves at least one latent frame to make; a lone
latent frame (an image) has none.

Shapes   B batch, C latent channels, T latent frames, H, W latent rows and columns, F pixel frames, N tokens.
         mask [B, 1, T, H, W] is 1 where the reference [B, C, T, H, W] is given; the reference is 0 elsewhere.
Source   Open-Sora 2.0 (arXiv 2503.09642) section 5.1 and its released code, which reuses frames of the clip's own
         latent for the non-causal autoencoder's v2v conditions; so does this file, in training.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opensora_fast.autoencoder import Autoencoder
from opensora_fast.errors import UserError
from opensora_fast.positions import patchify


@dataclass(frozen=True)
class _Given:
    """Latent frames given at each end, beside the lone first one that a causal autoencoder adds to a video."""

    head: int = 0
    tail: int = 0


CONDITIONS: dict[str, _Given] = {
    "t2v": _Given(),
    "i2v_head": _Given(head=1),
    "i2v_tail": _Given(tail=1),
    "i2v_loop": _Given(head=1, tail=1),
    "v2v_head": _Given(head=8),
    "v2v_tail": _Given(tail=8),
    "v2v_head_easy": _Given(head=16),
    "v2v_tail_easy": _Given(tail=16),
}
"""Every condition by name."""


def condition_frames(name: str, latent_frames: int, causal: bool) -> tuple[slice, ...]:
    """The latent frames that `name` gives, as slices of range(latent_frames).

    None for t2v, and none for images (latent_frames 1). Raises UserError for an unknown name, and for a condition that
    leaves nothing of so short a clip to make.
    """
    head, tail = _given_frames(name, causal)
    if latent_frames == 1:
        return ()
    if head + tail >= latent_frames:
        raise UserError(
            f"condition {name!r} gives {head + tail} latent frames of a clip that has {latent_frames}: "
            "use more frames or another condition"
        )
    ends = slice(0, head), slice(latent_frames - tail, latent_frames)
    return tuple(end for end in ends if end.stop > end.start)


def possible(name: str, frames: int, causal: bool, temporal_compression: int = 4) -> bool:
    """Whether a clip of `frames` pixel frames can have this condition. Raises UserError for an unknown name."""
    latent_frames = (frames - 1) // temporal_compression + 1
    given = sum(_given_frames(name, causal))
    return given == 0 or given < latent_frames


def draw_condition(
    weights: Mapping[str, float], frames: int, causal: bool, generator: torch.Generator, temporal_compression: int = 4
) -> str:
    """A condition for a clip of `frames` pixel frames, drawn by weight among those that are possible for it.

    The weight of t2v is the condition dropout. A clip that is too short for every weighted condition gets t2v.
    Raises UserError for an unknown name.
    """
    names = [name for name in weights if possible(name, frames, causal, temporal_compression) and weights[name] > 0]
    if not names:
        return "t2v"
    odds = torch.tensor([weights[name] for name in names], dtype=torch.float64, device=generator.device)
    return names[int(torch.multinomial(odds, 1, generator=generator))]


def reference_frames(name: str, autoencoder: Autoencoder) -> tuple[int, int]:
    """How many pixel frames `name` needs of the beginning and of the end of a clip."""
    head, tail = (_pixel_frames(autoencoder, count) for count in _given_frames(name, autoencoder.causal))
    return head, tail


def training_condition(
    autoencoder: Autoencoder, video_BCFHW: Tensor, latent_BCTHW: Tensor, names: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Mask and reference of every sample of a batch, `names[b]` being the condition of sample b.

    `video_BCFHW` [B, 3, F, H, W] in [-1, 1] is the batch that `latent_BCTHW` encodes; both results have the latent's
    dtype and device. Pieces of equal length are encoded in one call for the whole batch, so a mixed batch costs at
    most three calls. Raises UserError where `condition_frames` does.
    """
    pieces: dict[int, list[tuple[int, slice]]] = defaultdict(list)  # pixel frames -> (sample, its latent frames)
    for sample, name in enumerate(names):
        for given in condition_frames(name, latent_BCTHW.shape[2], autoencoder.causal):
            pieces[_pixel_frames(autoencoder, given.stop - given.start)].append((sample, given))

    mask_B1THW, reference_BCTHW = torch.zeros_like(latent_BCTHW[:, :1]), torch.zeros_like(latent_BCTHW)
    for num_frames, places in pieces.items():
        if num_frames > 1 and not autoencoder.causal:
            latents = [latent_BCTHW[sample, :, given] for sample, given in places]
        else:
            clips = [_end(video_BCFHW[sample], given, num_frames) for sample, given in places]
            latents = list(autoencoder.encode(torch.stack(clips)).to(latent_BCTHW))
        for (sample, given), latent_CTHW in zip(places, latents, strict=True):
            mask_B1THW[sample, :, given] = 1
            reference_BCTHW[sample, :, given] = latent_CTHW
    return mask_B1THW, reference_BCTHW


def sampling_condition(
    autoencoder: Autoencoder, name: str, noise_BCTHW: Tensor, head_BCFHW: Tensor | None, tail_BCFHW: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Mask and reference for clips still to be made of `noise_BCTHW`, from the pixels that they begin and end with.

    `head_BCFHW` and `tail_BCFHW` [B, 3, F, H, W] in [-1, 1] hold one frame or more for i2v, and for v2v at least as
    many as the condition gives: the first frames of the head and the last of the tail are used. Both results are like
    the noise. Raises UserError when pixels that `name` needs are missing or too few, and where `condition_frames`
    does.
    """
    mask_B1THW, reference_BCTHW = torch.zeros_like(noise_BCTHW[:, :1]), torch.zeros_like(noise_BCTHW)
    for given in condition_frames(name, noise_BCTHW.shape[2], autoencoder.causal):
        end, pixels_BCFHW = ("head", head_BCFHW) if given.start == 0 else ("tail", tail_BCFHW)
        needed = _pixel_frames(autoencoder, given.stop - given.start)
        if pixels_BCFHW is None or pixels_BCFHW.shape[2] < needed:
            there = 0 if pixels_BCFHW is None else pixels_BCFHW.shape[2]
            raise UserError(f"condition {name!r} needs {needed} frames at the {end} and got {there}")
        mask_B1THW[:, :, given] = 1
        piece_BCFHW = _end(pixels_BCFHW, given, needed).to(noise_BCTHW)
        reference_BCTHW[:, :, given] = autoencoder.encode(piece_BCFHW).to(noise_BCTHW)
    return mask_B1THW, reference_BCTHW


def condition_tokens(mask_B1THW: Tensor, reference_BCTHW: Tensor, patch_size: int) -> Tensor:
    """The transformer's `cond` [B, N, (1 + C) * patch_size**2]: packed like a latent, the mask's features first."""
    return patchify(torch.cat([mask_B1THW, reference_BCTHW], dim=1), patch_size)


def _given_frames(name: str, causal: bool) -> tuple[int, int]:
    if name not in CONDITIONS:
        raise UserError(f"condition {name!r} is not known: choose one of {', '.join(CONDITIONS)}")
    given = CONDITIONS[name]
    head, tail = (count + 1 if causal and count > 1 else count for count in (given.head, given.tail))
    return head, tail


def _end(pixels_CFHW: Tensor, given: slice, num_frames: int) -> Tensor:
    """The first or last frames of [..., F, H, W], whichever end the latent frames `given` are at."""
    frames = slice(0, num_frames) if given.start == 0 else slice(-num_frames, None)
    return pixels_CFHW[..., frames, :, :]


def _pixel_frames(autoencoder: Autoencoder, latent_frames: int) -> int:
    """Pixel frames that encode to so many latent frames; a single image encodes to one."""
    if latent_frames <= 1:
        return latent_frames
    temporal = autoencoder.compression[0]
    return (latent_frames - 1) * temporal + 1 if autoencoder.causal else latent_frames * temporal
