"""Tiling: plans cover everything, and cross-fades of tiles that agree give back what the tiles agree on."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opensora_fast.errors import UserError
from opensora_fast.tiling import T_AXIS, BatchedTiles, Tiles, tile_video

COMPRESSION = 4
one_by_one = BatchedTiles()


def tiles(size: int, overlap: int, *, decoding: bool = True, shortest: int = 1, lead: bool = False) -> Tiles:
    per_latent_in, per_latent_out = (1, COMPRESSION) if decoding else (COMPRESSION, 1)
    return Tiles(
        size=size,
        overlap=overlap,
        shortest=shortest,
        per_latent_in=per_latent_in,
        per_latent_out=per_latent_out,
        lead=lead,
    )


@st.composite
def plans(draw, decoding=None, lead=False):
    size = draw(st.integers(2, 9))
    overlap = draw(st.integers(0, size - 1))
    decoding = draw(st.booleans()) if decoding is None else decoding
    shortest = draw(st.integers(1, 2))
    lead = draw(st.booleans()) if lead is None else lead
    return tiles(size, overlap, decoding=decoding, shortest=shortest, lead=lead)


@settings(max_examples=100)
@given(plan=plans(lead=None), latents=st.integers(1, 60))
def test_plan_covers_every_latent_and_ends_at_the_last(plan, latents):
    spans = plan.spans(latents * plan.per_latent_in + plan.lead)
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
    torch.testing.assert_close(tile_video(decode, latent, one_by_one, time=plan), decode(latent))


@settings(max_examples=60)
@given(plan=plans(decoding=False), rows=st.integers(1, 20), columns=st.integers(1, 20))
def test_encoding_in_space_gives_what_one_piece_gives_where_tiles_agree(plan, rows, columns):
    video = torch.randn(1, 1, 1, rows * COMPRESSION, columns * COMPRESSION)
    encode = lambda x: torch.nn.functional.avg_pool3d(x, (1, COMPRESSION, COMPRESSION))  # noqa: E731
    torch.testing.assert_close(tile_video(encode, video, one_by_one, space=plan), encode(video))


def causal_decode(latent):
    """The first latent is one frame, each other one COMPRESSION frames; a frame knows the latent before its own."""
    earlier = torch.cat([latent[:, :, :1], latent[:, :, :-1]], dim=T_AXIS)
    first, others = (2 * latent + earlier).split([1, latent.shape[T_AXIS] - 1], dim=T_AXIS)
    return torch.cat([first, others.repeat_interleave(COMPRESSION, dim=T_AXIS)], dim=T_AXIS)


def causal_encode(video):
    return video[:, :, ::COMPRESSION]


@settings(max_examples=60)
@given(time=plans(decoding=True, lead=True), space=plans(decoding=True), latents=st.integers(2, 30))
def test_causal_decoding_in_time_and_space_gives_what_one_piece_gives(time, space, latents):
    """The lone sample that a later tile begins with is of no use there, and is dropped."""
    latent = torch.randn(1, 2, latents, 5, 12, generator=torch.Generator().manual_seed(latents))

    def decode(z):
        return causal_decode(z).repeat_interleave(COMPRESSION, dim=3).repeat_interleave(COMPRESSION, dim=4)

    torch.testing.assert_close(tile_video(decode, latent, one_by_one, time=time, space=space), decode(latent))


@settings(max_examples=60)
@given(plan=plans(decoding=False, lead=True), latents=st.integers(2, 30))
def test_causal_encoding_in_time_gives_what_one_piece_gives(plan, latents):
    video = torch.randn(1, 1, COMPRESSION * (latents - 1) + 1, 1, 1)
    torch.testing.assert_close(tile_video(causal_encode, video, one_by_one, time=plan), causal_encode(video))


def test_a_causal_tile_of_nothing_but_the_sample_that_is_dropped_is_not_run():
    """The released tiles of 16 latents every 12: at 12k + 1 latents the released code runs one more, and drops it."""
    assert tiles(16, 4, lead=True).spans(25) == [(0, 16), (12, 24)]
    assert tiles(16, 4, lead=True).spans(26) == [(0, 16), (12, 25), (24, 25)]


@settings(max_examples=60)
@given(latents=st.integers(2, 40))
def test_no_frames_are_lost_to_a_lone_last_latent(latents):
    """The released tiles, 8 latents every 6: at 6k + 1 the last one would hold a lone latent, decoded to one frame."""

    def decode(latent):
        return latent if latent.shape[T_AXIS] == 1 else latent.repeat_interleave(COMPRESSION, dim=T_AXIS)

    latent = torch.randn(1, 1, latents, 1, 1)
    tiled = tile_video(decode, latent, one_by_one, time=tiles(8, 2, shortest=2))
    torch.testing.assert_close(tiled, decode(latent))


def test_cross_fade_is_linear_from_the_earlier_tile_to_the_later():
    values = iter((0.0, 1.0))
    video = tile_video(
        lambda z: torch.full((1, 1, 4 * z.shape[T_AXIS], 1, 1), next(values)),
        torch.zeros(1, 1, 5, 1, 1),
        one_by_one,
        time=tiles(3, 1, shortest=2),
    )
    assert video.flatten().tolist() == [0.0] * 8 + [0.0, 0.25, 0.5, 0.75] + [1.0] * 8


def test_where_four_tiles_meet_a_tile_fades_in_from_above_and_then_from_the_finished_left():
    weights = iter(torch.eye(4))  # channel i of the result is the weight of tile i
    video = tile_video(
        lambda z: next(weights).view(1, 4, 1, 1, 1).expand(1, 4, 1, 8, 8),
        torch.zeros(1, 4, 1, 3, 3),
        lambda apply, tiles: [apply(tile) for tile in tiles],  # in their order, whatever their shape
        space=tiles(2, 1, shortest=2),
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


@pytest.mark.parametrize(
    ("samples", "compression", "size", "overlap"), [(256, 8, 32, 8), (64, 4, 16, 4), (32, 4, 8, 2), (8, 8, 1, 0)]
)
def test_tiles_of_pixels_and_frames_are_whole_latents(samples, compression, size, overlap):
    for encoding, per_latent in ((True, (compression, 1)), (False, (1, compression))):
        plan = Tiles.of(samples, compression, 0.25, encoding=encoding)
        assert (plan.size, plan.overlap, plan.per_latent_in, plan.per_latent_out) == (size, overlap, *per_latent)


@settings(max_examples=60)
@given(widths=st.lists(st.integers(1, 4), max_size=20), batch=st.integers(1, 6))
def test_tiles_of_one_shape_are_stacked_and_results_keep_their_order(widths, batch):
    calls = []

    def apply(x):
        calls.append(tuple(x.shape))
        return 2 * x

    given_tiles = [torch.full((2, 1, 1, 1, width), float(number)) for number, width in enumerate(widths)]
    results = BatchedTiles(batch)(apply, given_tiles)
    assert all(torch.equal(result, 2 * tile) for result, tile in zip(results, given_tiles, strict=True))
    assert all(shape[0] <= 2 * batch for shape in calls)
    assert len(calls) == sum(-(-widths.count(width) // batch) for width in set(widths))


def test_every_tile_of_a_call_is_run_at_once():
    """So that they can be spread over devices: a runner sees the tiles of time and space together."""
    seen = []

    def run(apply, tiles):
        seen.append(len(tiles))
        return [apply(tile) for tile in tiles]

    space = tiles(2, 1, shortest=2)
    latent = torch.randn(1, 1, 9, 3, 4)
    decode = lambda z: causal_decode(z).repeat_interleave(4, dim=3).repeat_interleave(4, dim=4)  # noqa: E731
    tile_video(decode, latent, run, time=tiles(4, 0, lead=True), space=space)
    assert seen == [2 * 2 * 3]


def test_a_batch_of_no_tiles_is_refused():
    with pytest.raises(UserError, match="tile_batch=0"):
        BatchedTiles(0)
