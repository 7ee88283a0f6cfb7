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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from opensora_fast.autoencoder import Autoencoder, LatentLayout
from opensora_fast.errors import UserError
from opensora_fast.positions import patchify


@dataclass(frozen=True)
class _Given:
    """Latent frames given at each end, beside the lone first one that a causal autoencoder adds to a video."""

    head: int = 0
    tail: int = 0


class Piece(NamedTuple):
    """The `frames` pixel frames that a clip begins or ends with, encoded by themselves for a condition."""

    end: Literal["head", "tail"]
    frames: int

    def of(self, pixels_CFHW: Tensor) -> Tensor:
        """These frames of [..., F, H, W]."""
        frames = slice(0, self.frames) if self.end == "head" else slice(-self.frames, None)
        return pixels_CFHW[..., frames, :, :]


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


def encoded_pieces(names: Iterable[str], layout: LatentLayout, frames: int) -> list[Piece]:
    """What `training_condition` encodes beside the whole clip of `frames` pixel frames, for any of these conditions.

    Names that are not possible for so short a clip need nothing. Raises UserError for an unknown name.
    """
    latent_frames = (frames - 1) // layout.compression[0] + 1
    pieces = set()
    for name in names:
        if possible(name, frames, layout.causal, layout.compression[0]):
            given = condition_frames(name, latent_frames, layout.causal)
            pieces |= {piece for of in given if (piece := _piece(layout, of)) is not None}
    return sorted(pieces)


def training_condition(
    autoencoder: Autoencoder, video_BCFHW: Tensor, latent_BCTHW: Tensor, names: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Mask and reference of every sample of a batch, `names[b]` being the condition of sample b.

    `video_BCFHW` [B, 3, F, H, W] in [-1, 1] is the batch that `latent_BCTHW` encodes; both results have the latent's
    dtype and device. Pieces of equal length are encoded in one call for the whole batch, so a mixed batch costs at
    most three calls. A piece's last bits may depend on what it is encoded with. Raises UserError where
    `condition_frames` does.
    """

    def encode(places: list[tuple[int, Piece]]) -> Iterable[Tensor]:
        return autoencoder.encode(torch.stack([piece.of(video_BCFHW[sample]) for sample, piece in places]))

    return _condition(autoencoder, latent_BCTHW, names, encode)


def stored_condition(
    layout: LatentLayout, latent_BCTHW: Tensor, names: Sequence[str], references: Mapping[Piece, Tensor]
) -> tuple[Tensor, Tensor]:
    """`training_condition` from pieces that have been encoded before: `references` [B, C, t, H, W] of every piece.

    The same bits where the pieces were encoded in equal batches; else equal within rounding, as for `i2v_loop`, whose
    head and tail are encoded in one call. `references` needs what `encoded_pieces` lists. Raises UserError where
    `condition_frames` does.
    """

    def look_up(places: list[tuple[int, Piece]]) -> Iterable[Tensor]:
        return (references[piece][sample] for sample, piece in places)

    return _condition(layout, latent_BCTHW, names, look_up)


def _condition(
    layout: LatentLayout,
    latent_BCTHW: Tensor,
    names: Sequence[str],
    encode: Callable[[list[tuple[int, Piece]]], Iterable[Tensor]],
) -> tuple[Tensor, Tensor]:
    """`encode` gives the latents of pieces of equal length, each with the sample that it is of."""
    mask_B1THW, reference_BCTHW = torch.zeros_like(latent_BCTHW[:, :1]), torch.zeros_like(latent_BCTHW)
    by_length: dict[int, list[tuple[int, slice, Piece]]] = defaultdict(list)
    for sample, name in enumerate(names):
        for given in condition_frames(name, latent_BCTHW.shape[2], layout.causal):
            mask_B1THW[sample, :, given] = 1
            piece = _piece(layout, given)
            if piece is None:
                reference_BCTHW[sample, :, given] = latent_BCTHW[sample, :, given]
            else:
                by_length[piece.frames].append((sample, given, piece))
    for places in by_length.values():
        latents = encode([(sample, piece) for sample, _, piece in places])
        for (sample, given, _), latent_CTHW in zip(places, latents, strict=True):
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
        end = _end(given)
        pixels_BCFHW = head_BCFHW if end == "head" else tail_BCFHW
        needed = _pixel_frames(autoencoder, given.stop - given.start)
        if pixels_BCFHW is None or pixels_BCFHW.shape[2] < needed:
            there = 0 if pixels_BCFHW is None else pixels_BCFHW.shape[2]
            raise UserError(f"condition {name!r} needs {needed} frames at the {end} and got {there}")
        mask_B1THW[:, :, given] = 1
        piece_BCFHW = Piece(end, needed).of(pixels_BCFHW).to(noise_BCTHW)
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


def _end(given: slice) -> Literal["head", "tail"]:
    """The end of a clip that its latent frames `given` are at."""
    return "head" if given.start == 0 else "tail"


def _piece(layout: LatentLayout, given: slice) -> Piece | None:
    """What is encoded for these latent frames; None where frames of the clip's own latent serve."""
    frames = _pixel_frames(layout, given.stop - given.start)
    return None if frames > 1 and not layout.causal else Piece(_end(given), frames)


def _pixel_frames(layout: LatentLayout, latent_frames: int) -> int:
    """Pixel frames that encode to so many latent frames; a single image encodes to one."""
    if latent_frames <= 1:
        return latent_frames
    temporal = layout.compression[0]
    return (latent_frames - 1) * temporal + 1 if layout.causal else latent_frames * temporal
