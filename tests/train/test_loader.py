"""The sampler's laws for any data set and number of ranks, exact resumption, and files that fail.

Sampler tests need no files. Loader tests use a few videos of one grey level per frame, so that pixels tell the frame.
"""

import dataclasses
import gc
import json
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

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opensora_fast.errors import UserError
from opensora_fast.train import batch_pipeline
from opensora_fast.train.bucket_sampler import BucketSampler
from opensora_fast.train.index import ClipIndex, ClipRecord, index_folder, read_index
from opensora_fast.train.loader import ClipLoader, evaluation_batches
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


@given(clips=data_sets, world_size=st.integers(1, 3), steps=st.integers(0, 20))
def test_a_batch_s_stand_ins_are_the_rest_of_its_epoch_whoever_asks(clips, world_size, steps):
    alone = epoch_of(sampler(clips), 0)
    one = sampler(clips, rank=world_size - 1, world_size=world_size)
    plan = next(one)
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


def test_a_consumer_that_keeps_every_batch_is_told_what_it_waits_for(open_loader):
    said = []
    one = open_loader(prefetch=1, slow_batch_s=1.0, batch_timeout_s=4.0, say=said.append)
    kept = []
    with pytest.raises(UserError, match=r"within data\.batch_timeout_s=4: .*still hold all pinned memory"):
        kept.extend(one)
    assert len(kept) >= 3
    assert "a batch is late, 1 s so far" in said[-1]
    kept.clear()
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
    limits = {"slow_batch_s": 1.0, "batch_timeout_s": 2.0, "say": said.append}
    one = open_loader(clips=stuck, table={"64px": {5: (1.0, 2)}}, workers=2, **limits)
    with pytest.raises(UserError, match=r"timeout_s=2: [^,]*stuck\.mp4 in stage open for \d+ s; leave the"):
        next(one)
    assert len(said) == 1
    assert "stuck.mp4 in stage open" in said[0]


def test_a_clip_that_kills_its_workers_is_tried_again_then_skipped(open_loader, stuck):
    one = open_loader(clips=stuck, table={"64px": {5: (1.0, 1)}}, prefetch=2)
    killed = []

    def kill_whoever_is_stuck():
        while len(killed) < 2:
            for process in set(one.worker_processes) - set(killed):
                if "stuck.mp4 in stage open" in one._pipeline.where():
                    killed.append(process)
                    os.kill(process, signal.SIGKILL)

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
    one = open_loader(slow_batch_s=1.0, batch_timeout_s=4.0, say=lambda line: None)
    with pytest.raises(UserError, match=r"/[a-f]\.mp4(, \S+)? in stage collate for \d+ s"):
        next(one)


def test_opening_and_closing_leaves_nothing(open_loader):
    def left():
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    one = open_loader()
    next(one)
    one.close()
    before = left()
    for _ in range(3):
        next(one)
        one.close()
    assert left() == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_the_device_equal_those_on_the_host(open_loader):
    here, there = open_loader(), open_loader(device="cuda")
    for expected, batch in zip(taken(here, 12), taken(there, 12), strict=True):
        assert batch.video_BCTHW.is_cuda
        assert same(expected, dataclasses.replace(batch, video_BCTHW=batch.video_BCTHW.cpu()))


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
