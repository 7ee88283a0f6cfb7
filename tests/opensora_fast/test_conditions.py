"""Which latent frames are given, how they are drawn, and that they are encoded alone and together."""

from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch

from opensora_fast.conditions import (
    CONDITIONS,
    condition_frames,
    condition_tokens,
    draw_condition,
    encoded_pieces,
    possible,
    reference_frames,
    sampling_condition,
    stored_condition,
    training_condition,
)
from opensora_fast.errors import UserError

# name -> given latent frames of a 129-frame clip (33 latents, causal) and of a 128-frame clip (32 latents, non-causal)
GIVEN = {
    "t2v": ([], []),
    "i2v_head": ([0], [0]),
    "i2v_tail": ([32], [31]),
    "i2v_loop": ([0, 32], [0, 31]),
    "v2v_head": (range(9), range(8)),
    "v2v_tail": (range(24, 33), range(24, 32)),
    "v2v_head_easy": (range(17), range(16)),
    "v2v_tail_easy": (range(16, 33), range(16, 32)),
}


@dataclass
class MeanColour:
    """An autoencoder that keeps each latent frame's mean over the frames it stands for, and counts its calls."""

    causal: bool
    latent_channels: int = 3
    compression: tuple[int, int, int] = (4, 2, 2)
    encoded: list[tuple[int, ...]] = field(default_factory=list)

    def encode(self, video):
        self.encoded.append(tuple(video.shape))
        pooled = torch.nn.functional.avg_pool3d(video, (1, 2, 2))
        first, rest = (pooled[:, :, :1], pooled[:, :, 1:]) if self.causal else (pooled[:, :, :0], pooled)
        rest = rest if video.shape[2] == 1 else torch.nn.functional.avg_pool3d(rest, (4, 1, 1))
        return torch.cat([first, rest], dim=2)


def ramp(batch, frames, size=4):
    """Clips whose every frame has its own value, none of them 0."""
    values = torch.arange(1.0, batch * frames + 1).view(batch, 1, frames, 1, 1)
    return values.expand(batch, 3, frames, size, size).contiguous()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", CONDITIONS)
def test_given_frames(name, causal):
    frames = range(33 if causal else 32)
    given = [index for part in condition_frames(name, len(frames), causal) for index in frames[part]]
    assert given == list(GIVEN[name][0 if causal else 1])
    assert condition_frames(name, 1, causal) == ()


def test_a_condition_leaves_something_to_make():
    assert [possible("v2v_head", frames, True) for frames in (1, 33, 37)] == [False, False, True]
    assert [possible("v2v_tail_easy", frames, False) for frames in (64, 68)] == [False, True]
    assert [possible("i2v_loop", frames, True) for frames in (5, 9)] == [False, True]
    assert possible("t2v", 1, True)
    assert possible("v2v_head", 20, True, temporal_compression=2)
    with pytest.raises(UserError, match="'v2v_head' gives 9 latent frames of a clip that has 9"):
        condition_frames("v2v_head", 9, True)
    with pytest.raises(UserError, match="'i2v' is not known: choose one of t2v"):
        possible("i2v", 33, True)


def test_draws_follow_the_weights_and_never_change_them():
    weights = {"t2v": 1.0, "i2v_head": 5.0, "i2v_loop": 1.0, "v2v_head": 1.0, "i2v_tail": 0.0}
    before = dict(weights)
    generator = torch.Generator().manual_seed(0)
    short = Counter(draw_condition(weights, 17, True, generator) for _ in range(2000))
    long = Counter(draw_condition(weights, 129, True, generator) for _ in range(2000))
    assert weights == before
    assert set(short) == {"t2v", "i2v_head", "i2v_loop"}
    assert short["t2v"] / 2000 == pytest.approx(1 / 7, abs=0.03)
    assert long["v2v_head"] / 2000 == pytest.approx(1 / 8, abs=0.03)
    assert long["i2v_head"] / 2000 == pytest.approx(5 / 8, abs=0.04)
    assert draw_condition({"v2v_head": 1.0}, 17, True, generator) == "t2v"


def test_training_encodes_the_given_frames_alone_and_one_kind_at_a_time():
    autoencoder = MeanColour(causal=True)
    video = ramp(batch=5, frames=41)
    latent = autoencoder.encode(video)
    autoencoder.encoded.clear()
    names = ["t2v", "i2v_head", "i2v_loop", "v2v_tail", "i2v_tail"]
    mask, reference = training_condition(autoencoder, video, latent, names)

    assert autoencoder.encoded == [(4, 3, 1, 4, 4), (1, 3, 33, 4, 4)]
    given = [sorted(i for part in condition_frames(name, 11, True) for i in range(11)[part]) for name in names]
    assert [mask[b].amax(dim=(0, 2, 3)).nonzero().flatten().tolist() for b in range(5)] == given
    assert (reference * (1 - mask) == 0).all()
    assert (reference[1, :, 0] == video[1, 0, 0, 0, 0]).all()
    assert (reference[2, :, 0] == video[2, 0, 0, 0, 0]).all()
    assert (reference[2, :, -1] == video[2, 0, -1, 0, 0]).all()
    torch.testing.assert_close(reference[3, :, 2:], autoencoder.encode(video[3:4, :, -33:])[0])
    assert (reference[4, :, -1] == video[4, 0, -1, 0, 0]).all()


def test_the_non_causal_autoencoder_reuses_the_latent_for_videos_only():
    autoencoder = MeanColour(causal=False)
    video = ramp(batch=2, frames=40)
    latent = autoencoder.encode(video)
    autoencoder.encoded.clear()
    _, reference = training_condition(autoencoder, video, latent, ["v2v_head", "i2v_head"])
    assert autoencoder.encoded == [(1, 3, 1, 4, 4)]
    assert torch.equal(reference[0, :, :8], latent[0, :, :8])
    assert (reference[1, :, 0] == video[1, 0, 0, 0, 0]).all()


@pytest.mark.parametrize(
    ("causal", "frames"), [(True, 1), (True, 33), (True, 129), (False, 1), (False, 32), (False, 128)]
)
def test_pieces_that_were_encoded_before_give_the_same_condition(causal, frames):
    autoencoder = MeanColour(causal)
    names = [name for name in CONDITIONS if possible(name, frames, causal)]
    video = ramp(len(names), frames)
    latent = autoencoder.encode(video)
    autoencoder.encoded.clear()
    expected = training_condition(autoencoder, video, latent, names)
    lengths = {shape[2] for shape in autoencoder.encoded}
    pieces = encoded_pieces(CONDITIONS, autoencoder, frames)
    assert {piece.frames for piece in pieces} == (lengths if frames > 1 else set())
    references = {piece: autoencoder.encode(piece.of(video)) for piece in pieces}
    for ours, theirs in zip(stored_condition(autoencoder, latent, names, references), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_images_are_given_nothing():
    autoencoder = MeanColour(causal=True)
    image = ramp(batch=2, frames=1)
    mask, reference = training_condition(autoencoder, image, autoencoder.encode(image), ["i2v_head", "t2v"])
    assert not mask.any()
    assert not reference.any()


@pytest.mark.parametrize("causal", [True, False])
def test_sampling_takes_the_outer_frames_of_what_it_is_given(causal):
    autoencoder = MeanColour(causal=causal)
    video = ramp(batch=2, frames=80)
    noise = torch.zeros(2, 3, 20, 2, 2)
    for name, frames in (("v2v_head", 33 if causal else 32), ("v2v_tail", 33 if causal else 32)):
        assert frames in reference_frames(name, autoencoder)
        mask, reference = sampling_condition(autoencoder, name, noise, video, video)
        piece = video[:, :, :frames] if name == "v2v_head" else video[:, :, -frames:]
        frames_given = mask[0, 0, :, 0, 0].bool()
        torch.testing.assert_close(reference[:, :, frames_given], autoencoder.encode(piece))
    with pytest.raises(UserError, match="'i2v_loop' needs 1 frames at the tail and got 0"):
        sampling_condition(autoencoder, "i2v_loop", noise, video, None)


def test_condition_tokens_put_the_mask_first():
    mask, reference = torch.ones(1, 1, 2, 4, 4), torch.full((1, 3, 2, 4, 4), 7.0)
    tokens = condition_tokens(mask, reference, patch_size=2)
    assert tokens.shape == (1, 8, 16)
    assert (tokens[..., :4] == 1).all()
    assert (tokens[..., 4:] == 7).all()
