"""Tiling: plans cover everything, and cross-fades of tiles that agree give back what the tiles agree on."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opensora_fast.tiling import T_AXIS, Tiles, tile_space, tile_time

COMPRESSION = 4


def tiles(size: int, overlap: int, *, decoding: bool = True, shortest: int = 1) -> Tiles:
    per_latent_in, per_latent_out = (1, COMPRESSION) if decoding else (COMPRESSION, 1)
    return Tiles(
        size=size, overlap=overlap, shortest=shortest, per_latent_in=per_latent_in, per_latent_out=per_latent_out
    )


@st.composite
def plans(draw, decoding=None):
    size = draw(st.integers(2, 9))
    overlap = draw(st.integers(0, size - 1))
    decoding = draw(st.booleans()) if decoding is None else decoding
    return tiles(size, overlap, decoding=decoding, shortest=draw(st.integers(1, 2)))


@settings(max_examples=60)
@given(plan=plans(), latents=st.integers(1, 60))
def test_plan_covers_every_latent_and_ends_at_the_last(plan, latents):
    spans = plan.spans(latents * plan.per_latent_in)
    assert spans[0][0] == 0
    assert spans[-1][1] == latents
    for (start, stop), (next_start, _) in zip(spans, spans[1:], strict=False):
        assert start < next_start <= stop
    if len(spans) > 1:
        assert spans[-1][1] - spans[-1][0] >= plan.shortest
        assert max(stop - start for start, stop in spans) <= plan.size + (plan.overlap == 0)


@settings(max_examples=60)
@given(plan=plans(decoding=True), latents=st.integers(1, 30))
def test_decoding_in_time_gives_what_one_piece_gives_where_tiles_agree(plan, latents):
    latent = torch.randn(2, 1, latents, 1, 2, generator=torch.Generator().manual_seed(latents))
    decode = lambda z: z.repeat_interleave(COMPRESSION, dim=T_AXIS)  # noqa: E731
    torch.testing.assert_close(tile_time(decode, latent, plan), decode(latent))


@settings(max_examples=60)
@given(plan=plans(decoding=False), rows=st.integers(1, 20), columns=st.integers(1, 20))
def test_encoding_in_space_gives_what_one_piece_gives_where_tiles_agree(plan, rows, columns):
    video = torch.randn(1, 1, 1, rows * COMPRESSION, columns * COMPRESSION)
    encode = lambda x: torch.nn.functional.avg_pool3d(x, (1, COMPRESSION, COMPRESSION))  # noqa: E731
    torch.testing.assert_close(tile_space(encode, video, plan), encode(video))


@settings(max_examples=60)
@given(latents=st.integers(2, 40))
def test_no_frames_are_lost_to_a_lone_last_latent(latents):
    """The released tiles, 8 latents every 6: at 6k + 1 the last one would hold a lone latent, decoded to one frame."""

    def decode(latent):
        return latent if latent.shape[T_AXIS] == 1 else latent.repeat_interleave(COMPRESSION, dim=T_AXIS)

    latent = torch.randn(1, 1, latents, 1, 1)
    torch.testing.assert_close(tile_time(decode, latent, tiles(8, 2, shortest=2)), decode(latent))


def test_cross_fade_is_linear_from_the_earlier_tile_to_the_later():
    values = iter((0.0, 1.0))
    latent = torch.zeros(1, 1, 5, 1, 1)
    video = tile_time(
        lambda z: torch.full((1, 1, 4 * z.shape[T_AXIS], 1, 1), next(values)), latent, tiles(3, 1, shortest=2)
    )
    assert video.flatten().tolist() == [0.0] * 8 + [0.0, 0.25, 0.5, 0.75] + [1.0] * 8


def test_where_four_tiles_meet_a_tile_fades_in_from_above_and_then_from_the_finished_left():
    weights = iter(torch.eye(4))  # channel i of the result is the weight of tile i
    video = tile_space(
        lambda z: next(weights).view(1, 4, 1, 1, 1).expand(1, 4, 1, 8, 8),
        torch.zeros(1, 4, 1, 3, 3),
        tiles(2, 1, shortest=2),
    )
    y = x = 0.5  # two pixels into the four of each overlap
    above_faded = torch.tensor([1 - x, x, 0, 0])
    left_faded = torch.tensor([1 - y, 0, y, 0])
    last = torch.tensor([0, 0, 0, 1])
    expected = (1 - x) * left_faded + x * ((1 - y) * above_faded + y * last)
    torch.testing.assert_close(video[0, :, 0, 6, 6], expected)
    torch.testing.assert_close(video.sum(dim=1), torch.ones(1, 1, 12, 12))


@pytest.mark.parametrize(("samples", "needed"), [(32, False), (36, True)])
def test_an_axis_is_tiled_only_when_it_is_longer_than_one_tile(samples, needed):
    assert tiles(8, 2, decoding=False).needed(samples) is needed
