"""The sampler's laws for any data set and number of ranks, exact resumption, and files that fail.

Sampler tests need no files. Loader tests use a few videos of one grey level per frame, so that pixels tell the frame.
"""

import dataclasses
import gc
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import weakref
from collections import deque
from itertools import islice
from multiprocessing.connection import wait
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opensora_fast import host_memory
from opensora_fast.errors import UserError
from opensora_fast.train import batch_pipeline, decode_workers, diffusion_inputs
from opensora_fast.train.bucket_sampler import BucketSampler
from opensora_fast.train.config import DataSection
from opensora_fast.train.index import ClipIndex, ClipRecord, index_folder, read_index
from opensora_fast.train.loader import ClipLoader, evaluation_batches
from opensora_fast.train.recipes import find_recipe
from opensora_fast.video_decoder import choose_decoder
from opensora_fast.video_io import read_clip, resize_crop, write_image, write_video

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


@given(
    clips=data_sets,
    segments=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 12)), max_size=4),
    seed=st.integers(0, 3),
)
def test_the_batches_seen_and_their_order_depend_on_no_number_of_ranks(clips, segments, seed):
    """segments: (ranks, steps) one after the other, each resuming the state that the one before left."""
    state = None
    seen = []
    for world_size, steps in segments:
        ranks = [sampler(clips, seed=seed, rank=rank, world_size=world_size) for rank in range(world_size)]
        for one in ranks:
            if state is not None:
                one.load_state_dict(state)
        seen += [next(one) for _ in range(steps) for one in ranks]
        states = [json.loads(json.dumps(one.state_dict())) for one in ranks]
        assert all(each == states[0] for each in states)
        state = states[0]
    alone = sampler(clips, seed=seed)
    assert seen == [next(alone) for _ in seen]
    assert state is None or state == alone.state_dict()


@given(clips=data_sets, world_size=st.integers(1, 5))
def test_an_epoch_is_shown_whole_whoever_shares_it(clips, world_size):
    alone = epoch_of(sampler(clips), 1)
    ranks = [sampler(clips, rank=rank, world_size=world_size) for rank in range(world_size)]
    together = []
    while not together or together[-1].epoch < 2:
        together += [next(one) for one in ranks]
    assert [plan for plan in together if plan.epoch == 1] == alone


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


@given(clips=data_sets, world_size=st.integers(1, 3), steps=st.integers(0, 20))
def test_a_batch_s_stand_ins_are_the_rest_of_its_epoch_whoever_asks(clips, world_size, steps):
    one = sampler(clips, rank=world_size - 1, world_size=world_size)
    plan = next(one)
    alone = epoch_of(sampler(clips), plan.epoch)
    for _ in range(steps):
        next(one)  # it may be epochs ahead by the time the batch is found to be empty
    state = one.state_dict()
    at = alone.index(plan)
    assert list(one.stand_ins(plan)) == alone[at + 1 :] + alone[:at]
    assert one.state_dict() == state


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


@pytest.fixture
def open_loader(folder):
    """open_loader(...) -> ClipLoader, closed at the end of the test."""
    opened = []

    def make(*, clips=None, workers=1, seed=0, table=GREY_TABLE, rank=0, world_size=1, **options):
        clips = read_index(folder / "index.parquet") if clips is None else clips
        plans = BucketSampler(clips, table, multiple=16, seed=seed, rank=rank, world_size=world_size)
        opened.append(ClipLoader(clips, plans, workers=workers, **options))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def taken(batches, count):
    """Copies: a batch's memory is used again, and a loader waits for who keeps too many."""
    return [dataclasses.replace(batch, video_BCTHW=batch.video_BCTHW.clone()) for batch in islice(batches, count)]


def same(a, b):
    return torch.equal(a.video_BCTHW, b.video_BCTHW) and (a.plan, a.text, a.paths) == (b.plan, b.text, b.paths)


def wait_until(condition):
    """Ends when it is true, however slow the machine."""
    pause = threading.Event()
    while not condition():
        pause.wait(0.01)


def delay(loader):
    """What its next batch waits for."""
    iter(loader)
    return loader._pipeline.where()


def alive(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_batches_hold_the_right_frames(open_loader):
    starts = set()
    for batch in taken(open_loader(), 14):
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_batch_is_bitwise_what_decoding_here_gives(tmp_path, open_loader, dtype):
    generator = torch.Generator().manual_seed(0)
    sizes = {"wide": (64, 112), "square": (80, 80), "strip": (48, 480)}  # strip covers far more than its bucket keeps
    for name, (height, width) in sizes.items():
        write_video(tmp_path / f"{name}.mp4", torch.rand(3, 5, height, width, generator=generator) * 2 - 1, 24)
    index_folder(tmp_path, tmp_path / "index.parquet")
    clips = read_index(tmp_path / "index.parquet")
    for batch in taken(open_loader(clips=clips, table={"64px": {5: (1.0, 1)}}, dtype=dtype), 3):
        size = (batch.plan.bucket.height, batch.plan.bucket.width)
        pixels_THWC = read_clip(batch.paths[0], 0, 5, cover=size, decoder=choose_decoder().name)
        expected = resize_crop(pixels_THWC, size)
        assert torch.equal(batch.video_BCTHW[0], expected.to(dtype))


def test_neither_batches_nor_state_depend_on_the_number_of_workers(open_loader):
    one, several = open_loader(workers=1, prefetch=1), open_loader(workers=3, prefetch=4)
    for a, b in zip(taken(one, 9), taken(several, 9), strict=True):
        assert same(a, b)
    assert one.state_dict() == several.state_dict()
    assert one.skipped == several.skipped


def test_workers_are_out_of_ctrl_c_s_way_and_end_with_the_loader(open_loader):
    one = open_loader(workers=2)
    next(one)
    processes = one.worker_processes
    assert len(processes) == 2
    assert all(os.getpgid(process) not in (os.getpgrp(), os.getpgid(os.getppid())) for process in processes)
    one.close()
    assert not any(map(alive, processes))


TRAINER = """
import sys
from opensora_fast.train.bucket_sampler import BucketSampler
from opensora_fast.train.index import read_index
from opensora_fast.train.loader import ClipLoader
from opensora_fast.train.loop import Interrupt

clips = read_index(sys.argv[1])
loader = ClipLoader(clips, BucketSampler(clips, {"64px": {5: (1.0, 2)}}, multiple=16, seed=0), workers=2)
with Interrupt() as interrupt:
    while not interrupt.requested:
        batch = next(loader)
        if loader.worker_processes:
            print(*loader.worker_processes, flush=True)
next(loader)
print("saved", flush=True)
sys.exit(130)
"""


@pytest.mark.parametrize(
    "signalled", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)], ids=lambda number: number.name
)
def test_a_signal_to_the_trainer_s_group_lets_it_save_and_leaves_nobody_behind(folder, signalled):
    trainer = subprocess.Popen(
        [sys.executable, "-P", "-c", TRAINER, str(folder / "index.parquet")],
        stdout=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    workers = [os.pidfd_open(int(word)) for word in trainer.stdout.readline().split()]
    assert len(workers) == 2
    os.killpg(trainer.pid, signalled)
    said, _ = trainer.communicate()
    assert said.splitlines()[-1] == "saved", "the workers were hit by the signal, too"
    assert trainer.returncode == 130
    for worker in workers:
        assert wait([worker], 30), "a worker has outlived the trainer"
        os.close(worker)


def test_a_loader_that_is_dropped_ends_its_workers_and_thread(open_loader, folder):
    clips = read_index(folder / "index.parquet")
    one = ClipLoader(clips, BucketSampler(clips, GREY_TABLE, multiple=16, seed=0), workers=1)
    next(one)
    (process,) = one.worker_processes
    gone = weakref.ref(one)
    del one
    gc.collect()
    assert gone() is None
    assert not alive(process)
    assert "batch pipeline" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("workers", [1, 2])
def test_the_state_counts_batches_handed_out_and_not_those_ahead(open_loader, workers):
    straight = taken(open_loader(), 11)
    stopped = open_loader(workers=workers)
    taken(stopped, 6)
    state = json.loads(json.dumps(stopped.state_dict()))
    stopped.close()
    assert stopped.state_dict() == state
    resumed = open_loader(workers=workers)
    resumed.load_state_dict(state)
    for batch, expected in zip(taken(resumed, 5), straight[6:], strict=True):
        assert same(batch, expected)
    resumed.close()
    assert same(taken(stopped, 1)[0], straight[6])


def test_a_broken_file_is_left_out_and_named(open_loader, folder):
    one = open_loader()
    batches = taken(one, 10)
    path = f"{folder}/z.mp4"
    assert list(one.skipped) == [path]
    assert "cannot be read" in one.skipped[path]
    assert not any(path in batch.paths for batch in batches)
    short = [batch for batch in batches if len(batch.paths) < len(batch.plan.indices)]
    assert all(len(batch.paths) == len(batch.video_BCTHW) == 1 for batch in short)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_batch_of_which_nothing_remains_shifts_no_rank_against_the_others(open_loader, folder, world_size):
    """Each rank's n-th batch is its n-th plan or, where that is the broken file's, the plan behind it in the order."""
    table = {"64px": {5: (1.0, 1)}}
    clips = read_index(folder / "index.parquet")
    broken = next(i for i in range(len(clips)) if clips[i].path.endswith("z.mp4"))
    order = epoch_of(BucketSampler(clips, table, multiple=16, seed=0), 0)
    steps = len(order) // world_size
    for rank in range(world_size):
        one = open_loader(table=table, rank=rank, world_size=world_size)
        for step, batch in enumerate(taken(one, steps)):
            place = step * world_size + rank
            own = order[place]
            expected = order[(place + 1) % len(order)] if own.indices == (broken,) else own
            assert batch.plan == expected
            assert batch.paths == [clips[expected.indices[0]].path]
        assert one.state_dict()["handed_out"] == steps * world_size
        assert set(one.skipped) <= {f"{folder}/z.mp4"}


def test_an_epoch_that_gives_nothing_ends_the_run(open_loader, folder):
    with pytest.raises(UserError, match=r"no clip of epoch 1 could be read; the last: .*z\.mp4"):
        next(open_loader(clips=read_index(folder / "index.parquet")[-1:]))


def test_repeats_that_fill_a_small_bucket_start_elsewhere(open_loader, folder):
    one = open_loader(clips=read_index(folder / "index.parquet")[:1], table={"64px": {5: (1.0, 4)}})
    batch = next(one)
    assert batch.plan.indices == (0, 0, 0, 0)
    assert len({float(clip.mean()) for clip in batch.video_BCTHW}) > 1


def test_a_mistake_of_ours_ends_the_run_and_names_the_file(open_loader, monkeypatch):
    def mistaken(*arguments, **options):
        return dataclasses.replace(batch_pipeline_request(*arguments, **options), interval="two")

    batch_pipeline_request = batch_pipeline.clip_request
    monkeypatch.setattr(batch_pipeline, "clip_request", mistaken)
    with pytest.raises(RuntimeError, match=r"[a-f]\.mp4: TypeError while decoding: "):
        next(open_loader(table={"64px": {5: (1.0, 1)}}))


@pytest.mark.parametrize(("workers", "prefetch"), [(1, 1), (3, 4)])
def test_a_mistake_of_ours_comes_behind_all_batches_before_it(open_loader, folder, monkeypatch, workers, prefetch):
    clips, table = read_index(folder / "index.parquet")[:6], {"64px": {5: (1.0, 1)}}
    order = epoch_of(sampler(clips, table=table), 0)
    wrong = clips[order[4].indices[0]].path
    right_request = batch_pipeline.clip_request

    def request(record, *arguments, **options):
        made = right_request(record, *arguments, **options)
        return dataclasses.replace(made, interval="two") if record.path == wrong else made

    monkeypatch.setattr(batch_pipeline, "clip_request", request)
    one = open_loader(clips=clips, table=table, workers=workers, prefetch=prefetch)
    assert [batch.plan for batch in taken(one, 4)] == order[:4]
    for _ in range(2):
        with pytest.raises(RuntimeError, match=re.escape(wrong)):
            next(one)
    assert one.state_dict()["handed_out"] == 4


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    """Clips of three lengths, and of each length some that cannot be read; and their table."""
    folder = tmp_path_factory.mktemp("sizes")
    for frames in (9, 5):
        write_video(folder / f"{frames}.mp4", torch.rand(3, frames, 64, 64) * 2 - 1, 24)
    for name in ("broken.png", "broken.mp4"):
        (folder / name).write_text("neither image nor video")
    listed = [("broken.png", 1)] * 3 + [("9.mp4", 9)] * 5 + [("5.mp4", 5)] * 4 + [("broken.mp4", 9), ("broken.mp4", 5)]
    clips = ClipIndex.from_records(
        ClipRecord(
            path=f"{folder}/{name}", text="", num_frames=frames, height=64, width=64, fps=0.0 if frames == 1 else 24.0
        )
        for name, frames in listed
    )
    return clips, {"64px": {9: (1.0, 1), 5: (1.0, 2), 1: (1.0, 1)}}


def readable(clips, plan):
    return [clips[index].path for index in plan.indices if "broken" not in clips[index].path]


@pytest.mark.parametrize("workers", [1, 3])
def test_stand_ins_of_any_size_get_the_slots_of_batches_behind_them(open_loader, sizes, workers):
    clips, table = sizes
    orders = {seed: epoch_of(sampler(clips, seed=seed, table=table), 0) for seed in range(60)}
    small_first = [seed for seed, order in orders.items() if order[0].bucket.frames == 1 < order[1].bucket.frames]
    for seed in small_first[:3]:
        order, one = orders[seed], open_loader(clips=clips, table=table, workers=workers, seed=seed, batch_timeout_s=60)
        for plan, batch in zip(order, taken(one, len(order)), strict=True):
            there = [plan, *sampler(clips, seed=seed, table=table).stand_ins(plan)]
            expected = next(each for each in there if readable(clips, each))
            assert batch.plan == expected
            assert batch.paths == readable(clips, expected)
        one.close()
    assert len(small_first) >= 3


def test_a_batch_that_waits_for_slots_says_so_and_names_what_holds_them(open_loader, sizes, tmp_path):
    """An image that cannot be read; behind it only clips that hang, and hold all slots."""
    clips, table = sizes
    os.mkfifo(tmp_path / "stuck.mp4")
    hanging = [dataclasses.replace(clips[3], path=str(tmp_path / "stuck.mp4"), text=str(i)) for i in range(5)]
    clips = ClipIndex.from_records([clips[0], *hanging])
    table = {"64px": {9: (1.0, 1), 1: (1.0, 1)}}
    seed = next(seed for seed in range(60) if next(sampler(clips, seed=seed, table=table)).indices == (0,))
    one = open_loader(clips=clips, table=table, seed=seed, slow_batch_s=0.1, batch_timeout_s=0.2, say=lambda line: None)
    wait_until(lambda: "wait for slots" in delay(one).reason)
    with pytest.raises(
        UserError,
        match=r"stuck\.mp4: 1 of 1 clips wait for slots that later ones hold; the workers are at \S*stuck\.mp4 in "
        r"stage open for \d+ s; leave the file out, or raise",
    ):
        next(one)


def test_no_file_is_blamed_while_workers_are_started(open_loader, monkeypatch):
    begin = threading.Event()
    one = open_loader(slow_batch_s=0.1, batch_timeout_s=0.2, say=lambda line: None)
    start = batch_pipeline.BatchPipeline._run
    monkeypatch.setattr(batch_pipeline.BatchPipeline, "_run", lambda pipeline: begin.wait() and start(pipeline))
    with pytest.raises(UserError, match=r"the workers are being started; raise --data\.batch_timeout_s$"):
        next(one)
    begin.set()


def test_a_consumer_that_keeps_every_batch_is_told_what_it_waits_for(open_loader):
    said, kept = [], []
    one = open_loader(prefetch=1, slow_batch_s=0.1, batch_timeout_s=1.0, say=said.append)

    def ready():
        iter(one)
        return one._pipeline._has_next()

    def starved():  # for a moment also where memory is on its way
        return "still hold all pinned memory" in delay(one).reason

    def keep_all():
        while True:
            wait_until(lambda: ready() or starved())
            kept.append(next(one))

    with pytest.raises(UserError, match=r"=1: .*hold all pinned memory; keep fewer batches, or raise --data.pinned"):
        keep_all()
    assert len(kept) >= 3
    assert "a batch is late, 0.1 s so far" in said[-1]
    kept.clear()
    wait_until(ready)
    assert len(next(one).paths) > 0


def test_a_consumer_that_keeps_as_much_as_there_is_room_for_gets_the_same_batches(open_loader):
    """Decoded batches wait for memory then, those of which a file is missing like all others."""
    straight, kept = taken(open_loader(), 16), deque(maxlen=2)
    one = open_loader(prefetch=1, workers=2)
    for expected in straight:
        kept.append(next(one))
        assert same(kept[-1], expected)
    assert any(len(batch.paths) < len(batch.plan.indices) for batch in straight)


@pytest.fixture
def stuck(folder, tmp_path):
    """An index of one good clip and one whose file is a pipe that nobody writes to: opening it never returns."""
    records = read_index(folder / "index.parquet")
    os.mkfifo(tmp_path / "stuck.mp4")
    return ClipIndex.from_records([records[0], dataclasses.replace(records[1], path=str(tmp_path / "stuck.mp4"))])


def test_a_decoder_that_hangs_is_named_with_its_stage_and_ends_the_run(open_loader, stuck):
    said = []
    limits = {"slow_batch_s": 0.1, "batch_timeout_s": 0.2, "say": said.append}
    one = open_loader(clips=stuck, table={"64px": {5: (1.0, 2)}}, workers=2, **limits)
    wait_until(lambda: re.fullmatch(r"[^,]*stuck\.mp4 in stage open for \d+ s", delay(one).reason))
    with pytest.raises(UserError, match=r"timeout_s=0\.2: [^,]*stuck\.mp4 in stage open for \d+ s; leave the file out"):
        next(one)
    assert len(said) == 1
    assert "stuck.mp4 in stage open" in said[0]


def test_a_clip_that_kills_its_workers_is_tried_again_then_skipped(open_loader, stuck):
    one = open_loader(clips=stuck, table={"64px": {5: (1.0, 1)}}, prefetch=2)
    killed = []

    def kill_whoever_is_stuck():
        while len(killed) < 2:
            wait_until(lambda: set(one.worker_processes) - set(killed) and "stuck.mp4 in stage" in delay(one).reason)
            killed.extend(set(one.worker_processes) - set(killed))
            os.kill(killed[-1], signal.SIGKILL)

    iter(one)
    killer = threading.Thread(target=kill_whoever_is_stuck, daemon=True)
    killer.start()
    batches = taken(one, 2)  # an epoch: the clip itself, and its stand-in for the other
    killer.join()
    assert [batch.paths for batch in batches] == [[stuck[0].path]] * 2
    (reason,) = one.skipped.values()
    assert "two loader workers died of it (killed by SIGKILL in stage open, killed by SIGKILL in stage open)" in reason


def test_the_run_s_random_stream_is_left_alone(open_loader):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    next(open_loader())
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"workers": 0}, r"data\.workers=0: .*use 1 or more"),
        ({"prefetch": 0}, r"data\.prefetch=0: use 1 or more"),
        ({"pinned_gib": 1e-4}, r"data\.pinned_gib=0\.0001: .*raise --data\.pinned_gib to 0\.00\d+ or more"),
    ],
    ids=str,
)
def test_useless_settings_are_refused_before_anything_starts(open_loader, options, complaint):
    with pytest.raises(UserError, match=complaint):
        open_loader(**options)


def test_the_pinned_memory_that_the_refusal_names_is_enough(open_loader):
    with pytest.raises(UserError) as refusal:
        open_loader(pinned_gib=1e-4)
    enough = float(re.search(r"to (\S+) or more", str(refusal.value))[1])
    assert len(taken(open_loader(pinned_gib=enough), 8)) == 8


def test_it_says_who_decodes_and_why(open_loader):
    assert re.fullmatch(
        r"2 workers decode with (PyAV|torchcodec) \(torchcodec .+\) into [\d.]+ MiB; "
        r"batches are laid out in [\d.]+ MiB of memory",
        open_loader(workers=2).describe(),
    )


def test_a_batch_that_is_not_laid_out_is_reported_as_such(open_loader, monkeypatch):
    class Never:
        def submit(self, clips, out):
            return self

        def wait(self, timeout):
            return False

        def close(self):
            pass

    monkeypatch.setattr(batch_pipeline, "Collator", Never)
    one = open_loader(slow_batch_s=0.1, batch_timeout_s=0.2, say=lambda line: None)
    wait_until(lambda: "in stage collate" in delay(one).reason)
    with pytest.raises(
        UserError, match=r"/[a-f]\.mp4(, \S+)? in stage collate for \d+ s; raise --data\.batch_timeout_s"
    ):
        next(one)


def test_opening_and_closing_leaves_nothing(open_loader):
    def left():
        gc.collect()  # what other tests have left closes its descriptors before the first count
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    one = open_loader()
    next(one)
    one.close()
    before = left()
    for _ in range(3):
        next(one)
        one.close()
    assert left() == before


@pytest.mark.parametrize("name", ["pinned_gib", "slow_batch_s", "batch_timeout_s"])
@pytest.mark.parametrize("value", [math.inf, math.nan, -1.0])
def test_settings_that_no_clock_or_memory_takes_are_refused(name, value):
    with pytest.raises(UserError, match=rf"^data\.{name}={re.escape(str(value))}: use (0|seconds)"):
        DataSection(**{name: value})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_diffusion_run_lays_batches_out_in_its_autoencoder_s_dtype(folder, tmp_path, monkeypatch, dtype):
    autoencoder = SimpleNamespace(compression=(4, 8, 8), latent_shape=lambda *size: size)
    monkeypatch.setattr(diffusion_inputs, "resolve_autoencoder", lambda recipe, run: recipe)
    monkeypatch.setattr(diffusion_inputs, "resolve_text", lambda text, run, **widths: text)
    monkeypatch.setattr(diffusion_inputs, "load_encoders", lambda *_: (autoencoder, None))
    data = DataSection(index=str(folder / "index.parquet"), buckets=GREY_TABLE, workers=1)
    recipe = dataclasses.replace(find_recipe("demo_stage1"), data=data)
    inputs = diffusion_inputs.clip_inputs(recipe, tmp_path, torch.device("cpu"), dtype)
    assert next(iter(inputs.loader)).video_BCTHW.dtype == dtype
    inputs.loader.close()


@pytest.mark.parametrize(
    ("table", "options", "complaint"),
    [
        ({1: (1.0, 1)}, {"workers": 12}, "--data.workers or the resolutions or frames of --data.buckets"),
        ({5: (1.0, 2)}, {"workers": 12}, "--data.workers or the batch sizes of --data.buckets"),
        ({5: (1.0, 2)}, {"workers": 1, "prefetch": 4}, "--data.prefetch or the batch sizes of --data.buckets"),
        ({5: (1.0, 4)}, {"workers": 1}, "the batch sizes of --data.buckets"),
    ],
    ids=str,
)
def test_memory_for_clips_that_cannot_be_had_names_what_makes_it_less(
    folder, open_loader, monkeypatch, table, options, complaint
):
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 2**16)
    with pytest.raises(UserError, match=rf"^{complaint}: \d+ bytes .* are free: lower {complaint}, or free memory$"):
        open_loader(table={"64px": table}, **options)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({}, "--data.prefetch or the batch sizes of --data.buckets"),
        ({"prefetch": 1}, "the batch sizes of --data.buckets"),
        ({"pinned_gib": 1.0}, "--data.pinned_gib"),
    ],
    ids=str,
)
def test_pinned_memory_that_cannot_be_had_names_what_makes_it_less(open_loader, monkeypatch, options, complaint):
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 2**20)
    with pytest.raises(UserError, match=rf"^{complaint}: \d+ bytes .* are free: lower {complaint}, or free memory$"):
        open_loader(table={"64px": {5: (1.0, 2)}}, **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_the_device_equal_those_on_the_host(open_loader):
    here, there = open_loader(), open_loader(device="cuda")
    for expected, batch in zip(taken(here, 12), taken(there, 12), strict=True):
        assert batch.video_BCTHW.is_cuda
        assert same(expected, dataclasses.replace(batch, video_BCTHW=batch.video_BCTHW.cpu()))


def test_evaluation_leaves_out_a_clip_that_hangs_and_goes_on(stuck, monkeypatch, capsys):
    clock = [0.0]

    class Clocked(decode_workers.DecodeWorkers):
        """Time passes while the clip hangs, and however long it takes to start a worker, at no other time."""

        def poll(self, timeout, wake=None):
            sights = [sight for job, sight in self.sights() if job.request.path == stuck[1].path]
            clock[0] += any(sight is not None and sight.stage == "open" for sight in sights)
            return super().poll(min(timeout, 0.02), wake)

    monkeypatch.setattr(decode_workers, "DecodeWorkers", Clocked)
    monkeypatch.setattr(decode_workers, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    clips = ClipIndex.from_records([*stuck, stuck[0]])
    batches = evaluation_batches(clips, {"64px": {5: (1.0, 3)}}, multiple=16, slow_clip_s=30, clip_timeout_s=60)
    with pytest.warns(UserWarning, match=r"left out .*stuck\.mp4: not decoded within 60 s \(in stage open for \d+ s\)"):
        (batch,) = batches
    assert batch.paths == [stuck[0].path] * 2
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1
    assert re.fullmatch(r"a clip is late, 30 s so far: \S+/stuck\.mp4 in stage open for \d+ s", said[0])


def test_evaluation_leaves_out_a_clip_that_kills_its_workers(stuck, monkeypatch):
    class Killed(decode_workers.DecodeWorkers):
        def poll(self, timeout, wake=None):
            for job, sight in self.sights():
                if job.request.path == stuck[1].path and sight is not None and sight.stage == "open":
                    os.kill(self.processes[0], signal.SIGKILL)
            return super().poll(min(timeout, 0.05), wake)

    monkeypatch.setattr(decode_workers, "DecodeWorkers", Killed)
    with pytest.warns(
        UserWarning, match=r"left out .*stuck\.mp4: two loader workers died of it \(killed by SIGKILL in"
    ):
        (batch,) = evaluation_batches(stuck, {"64px": {5: (1.0, 3)}}, multiple=16)
    assert batch.paths == [stuck[0].path]


def test_evaluation_takes_more_workers_for_more_clips_and_leaves_none(folder, monkeypatch):
    started = []

    class Counted(decode_workers.DecodeWorkers):
        def __init__(self, count, *arguments, **options):
            super().__init__(count, *arguments, **options)
            started.extend(self.processes)

    monkeypatch.setattr(decode_workers, "DecodeWorkers", Counted)
    clips = read_index(folder / "index.parquet")[:8]
    one, several = (evaluation_batches(clips, GREY_TABLE, multiple=16, workers=workers) for workers in (1, 12))
    for batch, expected in zip(one, several, strict=True):
        assert same(batch, expected)
    assert len(started) == 1 + 2
    next(iter(several))  # and no more of the pass
    gc.collect()
    assert not any(map(alive, started))


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
