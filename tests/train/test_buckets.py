"""Bucket assignment against the rule written out clip by clip, and the tables that are refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opensora_fast.errors import UserError
from opensora_fast.train.buckets import (
    Draw,
    assign,
    frame_interval,
    misfits,
    reachable,
    reachable_pairs,
    thinned_fps,
    unplaced,
    validate_buckets,
)
from opensora_fast.train.index import ClipIndex, ClipRecord


def clip(num_frames=60, height=272, width=640, fps=25.0):
    return ClipRecord(path="/x", text="", num_frames=num_frames, height=height, width=width, fps=fps)


def placed(record, table, draw=None):
    """The bucket of one clip, or None."""
    buckets, [number] = assign(ClipIndex.from_records([record]), table, draw, multiple=16, fps_max=24)
    return buckets[number] if number >= 0 else None


@pytest.mark.parametrize(
    ("fps", "interval", "thinned"),
    [(16.0, 1, 16.0), (23.976, 1, 23.976), (24.0, 1, 24.0), (25.0, 2, 12.0), (29.97, 2, 14.0), (30.0, 2, 15.0)]
    + [(60.0, 3, 20.0), (0.0, 1, 0.0)],
)
def test_frame_rates(fps, interval, thinned):
    assert frame_interval(fps, 24) == interval
    assert thinned_fps(fps, 24) == thinned


def test_the_largest_area_and_the_most_frames_come_first():
    table = {"96px": {5: (1.0, 8), 17: (1.0, 4), 33: (1.0, 2)}, "256px": {33: (1.0, 1), 17: (1.0, 1), 1: (1.0, 9)}}
    assert (placed(clip(66), table).resolution, placed(clip(66), table).frames) == ("256px", 33)
    assert placed(clip(65), table).frames == 17  # 32 of its 65 frames are left at 12 frames per second
    assert (placed(clip(33), table).resolution, placed(clip(33), table).frames) == ("96px", 5)
    assert placed(clip(9), table) is None
    assert placed(clip(1, fps=0.0), table).frames == 1
    assert placed(clip(66, height=100, width=200), table).resolution == "96px"
    assert placed(clip(66, height=40, width=40), table) is None


def test_eight_tenths_of_the_area_are_enough():
    table = {"256px": {1: (1.0, 1)}}
    assert placed(clip(1, 4, 13108, 0.0), table) is not None
    assert placed(clip(1, 4, 13107, 0.0), table) is None  # 0.8 * 65536 = 52428.8


@pytest.mark.parametrize(
    ("height", "width", "ratio", "size"),
    [(272, 640, "2.39:1", (160, 400)), (720, 1280, "16:9", (192, 336)), (640, 272, "1:2.39", (400, 160))]
    + [(300, 310, "1:1", (256, 256)), (256, 9000, "2.39:1", (160, 400))],
)
def test_the_nearest_aspect_ratio(height, width, ratio, size):
    bucket = placed(clip(10, height, width), {"256px": {5: (1.0, 1)}})
    assert (bucket.aspect_ratio, (bucket.height, bucket.width)) == (ratio, size)


def test_a_suffix_forces_the_ratio():
    assert placed(clip(10), {"256px_ar1:1": {5: (1.0, 1)}}).height == 256


def by_the_rule(record, table, draw, position, count):
    """The rule of the module, one clip at a time: (resolution, frames) or None."""
    levels = {"256px": 65536, "96px": 9216}
    for level, resolution in enumerate(name for name in levels if name in table):
        if record.height * record.width < 0.8 * levels[resolution]:
            continue
        for frames in sorted(table[resolution], reverse=True):
            chance, _ = table[resolution][frames]
            take, shorten = chance if isinstance(chance, tuple) else (chance, 0)
            thinning = 2 if record.fps > 24 else 1
            fits = frames == 1 if record.num_frames == 1 else 1 < frames <= record.num_frames // thinning
            if not fits or (shorten and draw.of("shorten", level, frames).random(count)[position] < shorten):
                continue
            if draw.of("take", level).random(count)[position] < take:
                return resolution, frames
            break
    return None


chances = st.sampled_from([0.0, 0.3, 0.7, 1.0]) | st.tuples(st.sampled_from([0.5, 1.0]), st.sampled_from([0.2, 0.6]))
by_frames = st.dictionaries(st.sampled_from([1, 5, 9, 17]), st.tuples(chances, st.integers(1, 4)), max_size=4)
records = st.builds(
    clip,
    num_frames=st.sampled_from([1, 4, 5, 12, 20, 40]),
    height=st.sampled_from([64, 96, 256]),
    width=st.sampled_from([96, 180, 300]),
    fps=st.sampled_from([24.0, 25.0]),
)


@given(
    rows=st.lists(records, min_size=1, max_size=12),
    table=st.dictionaries(st.sampled_from(["96px", "256px"]), by_frames, min_size=1),
    seed=st.integers(0, 99),
)
def test_assignment_follows_the_rule(rows, table, seed):
    draw = Draw(seed=seed, epoch=3)
    buckets, numbers = assign(ClipIndex.from_records(rows), table, draw, multiple=16, fps_max=24)
    for position, number in enumerate(numbers):
        found = (buckets[number].resolution, buckets[number].frames) if number >= 0 else None
        assert found == by_the_rule(rows[position], table, draw, position, len(rows))


def test_draws_depend_on_seed_epoch_and_position_alone():
    many = ClipIndex.from_records([clip(20)] * 400)
    table = {"256px": {9: (0.5, 1)}, "96px": {9: (0.5, 1)}}

    def resolutions(clips, seed, epoch):
        buckets, numbers = assign(clips, table, Draw(seed=seed, epoch=epoch), multiple=16, fps_max=24)
        return [buckets[number].resolution if number >= 0 else None for number in numbers]

    first = resolutions(many, 1, 0)
    assert first == resolutions(many, 1, 0)
    assert first[:50] == resolutions(many[:50], 1, 0)
    assert first != resolutions(many, 2, 0)
    assert first != resolutions(many, 1, 1)
    share = [first.count(name) / 400 for name in ("256px", "96px", None)]
    np.testing.assert_allclose(share, [0.5, 0.25, 0.25], atol=0.08)


chances = st.sampled_from([0.0, 0.5, 1.0, (1.0, 0.5), (0.5, 0.5), (0.0, 0.5)])
tables = st.dictionaries(
    st.sampled_from(["256px", "96px", "64px"]),
    st.dictionaries(st.sampled_from([1, 5, 9, 17]), st.tuples(chances, st.just(2)), max_size=3),
    max_size=3,
)


@given(
    tables, st.lists(st.sampled_from([clip(1, fps=0.0), clip(20), clip(40), clip(40, 80, 80)]), min_size=1, max_size=4)
)
def test_the_pairs_of_all_epochs_are_known_beforehand(table, rows):
    clips = ClipIndex.from_records(rows)
    options = {"multiple": 16, "fps_max": 24}
    buckets, clip_P, bucket_P = reachable_pairs(clips, table, **options)
    pairs = list(zip(clip_P.tolist(), bucket_P.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)
    seen = set()
    for epoch in range(60):
        listed, bucket_of_N = assign(clips, table, Draw(seed=0, epoch=epoch), **options)
        assert listed == buckets
        seen |= {(position, bucket) for position, bucket in enumerate(bucket_of_N.tolist()) if bucket >= 0}
    assert seen <= set(pairs)
    rare = {chance for by_frames in table.values() for chance, _ in by_frames.values()} - {0.0, 1.0}
    assert seen == set(pairs) or len(rare) > 0
    never = {position for positions in unplaced(clips, table, **options).values() for position in positions.tolist()}
    assert never == set(range(len(rows))) - set(clip_P.tolist())
    assert reachable(clips, table, **options) == [buckets[position] for position in sorted(set(bucket_P.tolist()))]


def test_every_pair_comes_up_in_some_epoch():
    table = {"256px": {17: ((0.5, 0.5), 2), 9: (0.5, 2)}, "96px": {17: (0.0, 2), 9: ((1.0, 0.5), 2), 5: (1.0, 2)}}
    clips = ClipIndex.from_records([clip(40), clip(20), clip(20, 80, 80)])
    _, clip_P, bucket_P = reachable_pairs(clips, table, multiple=16, fps_max=24)
    seen = set()
    for epoch in range(200):
        _, bucket_of_N = assign(clips, table, Draw(seed=0, epoch=epoch), multiple=16, fps_max=24)
        seen |= {(position, bucket) for position, bucket in enumerate(bucket_of_N.tolist()) if bucket >= 0}
    assert seen == set(zip(clip_P.tolist(), bucket_P.tolist(), strict=True))


def test_misfits_are_counted_by_reason():
    clips = ClipIndex.from_records(
        [clip(66), clip(20), clip(1, fps=0.0), clip(1, fps=0.0), clip(66, height=32, width=32)]
    )
    assert misfits(clips, {"256px": {33: (0.5, 1)}}, multiple=16, fps_max=24) == {
        "smaller than 0.8 of every resolution's area": 1,
        "images without a bucket of 1 frame": 2,
        "videos shorter than every bucket": 1,
    }


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        ({"256": {1: (1.0, 1)}}, "resolution '256' is not known"),
        ({"256px": {0: (1.0, 1)}}, "bucket '256px': {0: .*at least 1 frame"),
        ({"256px": {1: (1.0, 0)}}, "at least 1 clip; change 0"),
        ({"256px": {1: (1.1, 1)}}, "change 1.1"),
        ({"256px": {5: ((0.5, 1.0), 1)}}, r"change \(0.5, 1.0\)"),
    ],
)
def test_a_bad_table_is_refused(table, complaint):
    with pytest.raises(UserError, match=complaint):
        validate_buckets(table)
