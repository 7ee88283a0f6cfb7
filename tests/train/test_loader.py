"""The sampler's laws for any data set and number of ranks, exact resumption, and files that fail.

Sampler tests need no files. Loader tests use a few videos of one grey level per frame, so that pixels tell the frame.
"""

import json
import multiprocessing
import os
import signal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opensora_fast.errors import UserError
from opensora_fast.train import dataset
from opensora_fast.train.index import ClipIndex, ClipRecord, index_folder, read_index
from opensora_fast.train.loader import BucketSampler, ClipLoader, evaluation_batches
from opensora_fast.video_io import write_image, write_video

TABLE = {"96px": {1: (1.0, 3), 5: (1.0, 2), 9: (1.0, 4)}, "64px": {5: (1.0, 3)}}


KINDS = [(1, 96, 96, 0.0), (12, 96, 96, 24.0), (12, 80, 160, 24.0), (6, 160, 96, 20.0), (20, 64, 80, 30.0)]


def clips_of(kinds):
    """An index of clips that do not exist: frames, height, width, fps by position in KINDS."""
    return ClipIndex.from_records(
        ClipRecord(path=f"/{i}", text="", num_frames=frames, height=height, width=width, fps=fps)
        for i, (frames, height, width, fps) in enumerate(KINDS[kind] for kind in kinds)
    )


def sampler(clips, *, seed=0, rank=0, world_size=1, table=TABLE):
    return BucketSampler(clips, table, multiple=16, seed=seed, rank=rank, world_size=world_size)


def epoch_of(one, epoch):
    plans = []
    for plan in one:
        if plan.epoch > epoch:
            return plans
        if plan.epoch == epoch:
            plans.append(plan)


data_sets = st.lists(st.integers(0, 4), min_size=1, max_size=40).map(clips_of)


@given(clips=data_sets, seed=st.integers(0, 5))
def test_an_epoch_covers_all_but_the_leftovers_of_each_bucket(clips, seed):
    plans = epoch_of(sampler(clips, seed=seed), 0)
    by_bucket = {}
    for plan in plans:
        assert len(plan.indices) == plan.bucket.batch_size
        by_bucket.setdefault(plan.bucket, []).extend(plan.indices)
    placed = {index for indices in by_bucket.values() for index in indices}
    assert len(placed) == sum(len(set(indices)) for indices in by_bucket.values())
    for bucket, indices in by_bucket.items():
        assert len(set(indices)) == len(indices) or len(indices) == bucket.batch_size
    left_over = len(clips) - len(placed)
    assert left_over <= sum(bucket.batch_size - 1 for bucket in by_bucket)


@given(clips=data_sets, world_size=st.integers(1, 5))
def test_ranks_share_an_epoch_in_equal_numbers_without_overlap(clips, world_size):
    alone = epoch_of(sampler(clips), 1)
    shares = [epoch_of(sampler(clips, rank=rank, world_size=world_size), 1) for rank in range(world_size)]
    steps = max(1, len(alone) // world_size)
    assert [len(share) for share in shares] == [steps] * world_size
    together = [plan for step in zip(*shares, strict=True) for plan in step]
    expected = alone[: steps * world_size] or alone
    assert together == [expected[i % len(alone)] for i in range(steps * world_size)]


@given(clips=data_sets, before=st.integers(0, 30), world_size=st.integers(1, 3), data=st.data())
def test_a_state_resumes_the_order_after_any_batch(clips, before, world_size, data):
    rank = data.draw(st.integers(0, world_size - 1))
    straight = sampler(clips, seed=3, rank=rank, world_size=world_size)
    for _ in range(before):
        next(straight)
    resumed = sampler(clips, seed=3, rank=rank, world_size=world_size)
    resumed.load_state_dict(json.loads(json.dumps(straight.state_dict())))
    assert [next(resumed) for _ in range(12)] == [next(straight) for _ in range(12)]


def test_a_state_resumes_on_another_number_of_ranks():
    clips = clips_of([0, 1, 2, 3, 4] * 12)
    alone = epoch_of(sampler(clips), 0)
    pair = [sampler(clips, rank=rank, world_size=2) for rank in range(2)]
    begun = [next(rank) for _ in range(3) for rank in pair]
    assert begun == alone[:6]
    four = [sampler(clips, rank=rank, world_size=4) for rank in range(4)]
    for rank in four:
        rank.load_state_dict(pair[0].state_dict())
    assert [next(rank) for rank in four] == alone[6:10]


def test_epochs_and_seeds_shuffle():
    clips = clips_of([1] * 40)
    orders = [
        [plan.indices for plan in epoch_of(sampler(clips, seed=seed), epoch)]
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert len({str(order) for order in orders}) == 3
    assert orders[0] == [plan.indices for plan in epoch_of(sampler(clips), 0)]


def test_a_state_of_other_clips_starts_the_next_epoch_and_says_so():
    one = sampler(clips_of([1] * 40))
    next(one)
    for other in (sampler(clips_of([1] * 39 + [2])), sampler(clips_of([1] * 40), seed=1)):
        with pytest.warns(UserWarning, match="epoch 0 is left unfinished"):
            other.load_state_dict(one.state_dict())
        assert next(other).epoch == 1


def test_unlikely_buckets_leave_epochs_empty_without_ending_the_run():
    plans = [next(sampler(clips_of([1]), table={"96px": {5: (0.2, 1)}})) for _ in range(3)]
    assert plans[0].epoch > 0 or plans[0].indices == (0,)


def test_no_clip_that_fits_is_refused_with_the_reasons():
    with pytest.raises(UserError, match=r"1 smaller than 0.8 .*; 2 videos shorter .*256px at \[5, 65\]"):
        sampler(clips_of([4, 1, 1]), table={"96px": {33: (1.0, 1)}, "256px": {5: (1.0, 1), 65: (1.0, 1)}})
    with pytest.raises(UserError, match="the index is empty"):
        sampler(clips_of([]))
    with pytest.raises(UserError, match="now none"):
        sampler(clips_of([1]), table={})
    assert sampler(clips_of([1, 4]), table={"96px": {5: (1.0, 1)}}).misfits == {
        "smaller than 0.8 of every resolution's area": 1
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six videos of 30 frames at 25 frames per second, frame i of grey level 8 * i, two images, and a broken file."""
    folder = tmp_path_factory.mktemp("clips")
    grey = ((torch.arange(30) * 8 / 127.5 - 1)[None, :, None, None]).expand(3, 30, 64, 96)
    for name in "abcdef":
        write_video(folder / f"{name}.mp4", grey, 25)
        (folder / f"{name}.txt").write_text(f"clip {name}")
    for name in "gh":
        write_image(folder / f"{name}.png", torch.zeros(3, 64, 96))
    write_video(folder / "z.mp4", grey, 25)
    index_folder(folder, folder / "index.parquet")
    (folder / "z.mp4").write_text("broken since it was indexed")
    return folder


GREY_TABLE = {"64px": {5: (1.0, 2), 1: (1.0, 2)}}


def loader(folder, *, workers=0, seed=0, table=GREY_TABLE):
    clips = read_index(folder / "index.parquet")
    return ClipLoader(clips, BucketSampler(clips, table, multiple=16, seed=seed), workers=workers)


def same(a, b):
    return torch.equal(a.video_BCTHW, b.video_BCTHW) and (a.plan, a.text, a.paths) == (b.plan, b.text, b.paths)


def test_batches_hold_the_right_frames(folder):
    starts = set()
    for _, batch in zip(range(14), loader(folder), strict=False):
        count, bucket = len(batch.paths), batch.plan.bucket
        assert batch.video_BCTHW.shape == (count, 3, bucket.frames, bucket.height, bucket.width)
        assert batch.video_BCTHW.dtype == torch.float32
        assert batch.motion == [None] * count
        levels_BT = ((batch.video_BCTHW.mean((1, 3, 4)) + 1) * 127.5 / 8).round()
        if bucket.frames == 1:
            assert batch.fps.tolist() == [0.0] * count
            continue
        assert batch.fps.tolist() == [12.0] * count
        assert batch.text == [f"clip {os.path.basename(path)[0]}" for path in batch.paths]
        starts |= set(levels_BT[:, 0].tolist())
        assert torch.equal(levels_BT - levels_BT[:, :1], torch.arange(0.0, 10, 2).expand(count, 5))
    assert len(starts) > 5
    assert min(starts) >= 0
    assert max(starts) <= 20


def test_worker_processes_give_the_same_batches_as_none(folder):
    inline, forked = loader(folder), loader(folder, workers=2)
    for _ in range(9):
        assert same(next(inline), next(forked))
    # Ctrl-C in the trainer's terminal must not reach them
    assert all(os.getpgid(worker.pid) != os.getpgrp() for worker in multiprocessing.active_children())
    assert forked.state_dict() == inline.state_dict()
    assert forked.skipped == inline.skipped
    forked.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_the_state_counts_batches_handed_out_and_not_those_ahead(folder, workers):
    straight = [batch for _, batch in zip(range(11), loader(folder), strict=False)]
    stopped = loader(folder, workers=workers)
    for _ in range(6):
        next(stopped)
    state = json.loads(json.dumps(stopped.state_dict()))
    stopped.close()
    assert stopped.state_dict() == state
    resumed = loader(folder, workers=workers)
    resumed.load_state_dict(state)
    for expected in straight[6:]:
        assert same(next(resumed), expected)
    resumed.close()
    assert same(next(stopped), straight[6])
    stopped.close()


def test_a_broken_file_is_left_out_and_named(folder):
    one = loader(folder)
    batches = [next(one) for _ in range(10)]
    path = f"{folder}/z.mp4"
    assert list(one.skipped) == [path]
    assert "cannot be read" in one.skipped[path]
    assert not any(path in batch.paths for batch in batches)
    short = [batch for batch in batches if len(batch.paths) < len(batch.plan.indices)]
    assert all(len(batch.paths) == len(batch.video_BCTHW) == 1 for batch in short)


def test_a_batch_of_which_nothing_remains_is_passed_over(folder):
    clips = read_index(folder / "index.parquet")
    one = ClipLoader(clips, BucketSampler(clips, {"64px": {5: (1.0, 1)}}, multiple=16, seed=0))
    assert all(len(next(one).paths) == 1 for _ in range(14))
    assert list(one.skipped) == [f"{folder}/z.mp4"]


def test_an_epoch_that_gives_nothing_ends_the_run(folder):
    clips = read_index(folder / "index.parquet")[-1:]
    one = ClipLoader(clips, BucketSampler(clips, GREY_TABLE, multiple=16, seed=0))
    with pytest.raises(UserError, match=r"no clip of epoch 1 could be read; the last: .*z\.mp4"):
        next(one)


def test_repeats_that_fill_a_small_bucket_start_elsewhere(folder):
    clips = read_index(folder / "index.parquet")[:1]
    batch = next(ClipLoader(clips, BucketSampler(clips, {"64px": {5: (1.0, 4)}}, multiple=16, seed=0)))
    assert batch.plan.indices == (0, 0, 0, 0)
    assert len({float(clip.mean()) for clip in batch.video_BCTHW}) > 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_fault_in_decoding_names_the_file(folder, monkeypatch, workers):
    def fail(*_, **__):
        raise ZeroDivisionError("no")

    monkeypatch.setattr(dataset, "read_clip", fail)
    with pytest.raises(RuntimeError, match=r"[a-f]\.mp4: ZeroDivisionError while decoding: no"):
        next(loader(folder, workers=workers, table={"64px": {5: (1.0, 1)}}))


def test_a_worker_that_dies_is_reported_with_the_files(folder, monkeypatch):
    monkeypatch.setattr(dataset, "read_clip", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match=r"a loader worker died while decoding one of /.*\.mp4"):
        next(loader(folder, workers=1, table={"64px": {5: (1.0, 1)}}))


def test_the_run_s_random_stream_is_left_alone(folder):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    next(loader(folder))
    assert torch.equal(torch.rand(3), expected)


def test_evaluation_is_the_same_pass_every_time(folder):
    clips = read_index(folder / "index.parquet")[:8]
    table = {"64px": {5: (0.5, 4), 1: (1.0, 1)}}
    batches = evaluation_batches(clips, table, multiple=16)
    first, second = list(batches), list(batches)
    assert all(same(a, b) for a, b in zip(first, second, strict=True))
    assert sorted(len(batch.paths) for batch in first) == [1, 1, 2, 4]
    assert sorted(path for batch in first for path in batch.paths) == [record.path for record in clips]
    videos = torch.cat([batch.video_BCTHW for batch in first if batch.plan.bucket.frames == 5])
    assert ((videos[:, :, 0].mean((1, 2, 3)) + 1) * 127.5).round().tolist() == [0.0] * 6
    assert len(evaluation_batches(clips, table, multiple=16, batch_size=8)) == 2
    assert [len(evaluation_batches(clips, table, multiple=16, batch_size=1, limit=limit)) for limit in (0, 3)] == [0, 3]
    with pytest.warns(UserWarning, match=r"z\.mp4: cannot be read"):
        rest = list(evaluation_batches(read_index(folder / "index.parquet"), table, multiple=16))
    assert all("z.mp4" not in path for batch in rest for path in batch.paths)
