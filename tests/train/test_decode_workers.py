"""Clips decoded by other processes: the right pixels in the right slot, and nobody left behind however things end.

A file that never opens is a pipe that nobody writes to: a worker hangs in it until it is killed.
"""

import contextlib
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from opensora_fast.errors import UserError
from opensora_fast.frame_sizes import covering_size
from opensora_fast.host_memory import HostMemory
from opensora_fast.train import decode_worker, decode_workers
from opensora_fast.train.buckets import Bucket
from opensora_fast.train.dataset import ClipRequest
from opensora_fast.train.decode_watch import STAGES, StatusBoard
from opensora_fast.train.decode_workers import DecodeWorkers, Job, decode_in_order, slot_bytes
from opensora_fast.train.pinned_pool import PinnedPool, block_bytes
from opensora_fast.video_decoder import choose_decoder
from opensora_fast.video_io import read_clip, resize_crop_uint8, write_video

BUCKET = Bucket(resolution="64px", aspect_ratio="1:1", frames=4, height=32, width=32, batch_size=1)
DECODER = choose_decoder().name


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Paths of videos of noise: one that covers the bucket exactly, one much wider, a broken one, one that hangs."""
    folder = tmp_path_factory.mktemp("clips")
    generator = torch.Generator().manual_seed(1)
    for name, width in (("square", 48), ("wide", 480)):
        write_video(folder / f"{name}.mp4", torch.rand(3, 12, 48, width, generator=generator) * 2 - 1, 24)
    (folder / "broken.mp4").write_text("no video")
    os.mkfifo(folder / "stuck.mp4")
    return folder


def request(path, start=0):
    size = {"height": BUCKET.height, "width": BUCKET.width}
    return ClipRequest(path=str(path), start=start, frames=BUCKET.frames, interval=2, **size)


def expected(path, start=0):
    frames_THWC = read_clip(path, start, BUCKET.frames, 2, cover=(BUCKET.height, BUCKET.width), decoder=DECODER)
    return resize_crop_uint8(frames_THWC, (BUCKET.height, BUCKET.width)).permute(1, 2, 3, 0).numpy()


class Slots:
    """Memory for jobs, and the workers that fill it."""

    def __init__(self, workers, jobs=16):
        size = slot_bytes(BUCKET.frames, BUCKET.height, BUCKET.width)
        self._bytes = size
        memory = HostMemory(jobs * block_bytes(size), shared=True)
        self._pool = PinnedPool(memory, largest=size, setting="slots")
        self.workers = DecodeWorkers(workers, memory, decoder=DECODER)

    def submit(self, path, start=0):
        job = Job(request=request(path, start), slot=self._pool.take(self._bytes, timeout=0))
        self.workers.submit(job)
        return job

    def finish(self, *jobs):
        while not all(job.finished for job in jobs):
            self.workers.poll(None)

    def kill_worker(self):
        """The one there is; another has its place afterwards."""
        (process,) = self.workers.processes
        os.kill(process, signal.SIGKILL)
        while self.workers.processes == [process]:
            self.workers.poll(None)

    def wait_for_stage(self, job, stage):
        while not any(seen is job and sight and sight.stage == stage for seen, sight in self.workers.sights()):
            self.workers.poll(0.01)


@pytest.fixture
def slots():
    opened = []

    def make(workers=1):
        opened.append(Slots(workers))
        return opened[-1]

    yield make
    for each in opened:
        each.workers.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_each_job_gets_its_own_pixels(clips, slots, workers):
    one = slots(workers)
    jobs = [one.submit(clips / f"{name}.mp4", start) for start in range(4) for name in ("square", "wide")]
    one.finish(*jobs)
    for job in jobs:
        np.testing.assert_array_equal(job.result(), expected(job.request.path, job.request.start))


def test_a_clip_that_covers_more_than_its_slot_holds_is_cut_by_the_worker(clips):
    shape = covering_size(48, 480, (BUCKET.height, BUCKET.width))
    for room, kept in ((4 * 3 * shape[0] * shape[1], shape), (slot_bytes(4, 32, 32), (32, 32))):
        slot = np.zeros(room, np.uint8)
        stages = []
        answer = decode_worker.decode(request(clips / "wide.mp4"), slot, "PyAV", stages.append)
        assert answer == ("done", *kept)
        assert stages == ["open", "seek", "decode"]
        frames_THWC = slot[: 4 * 3 * kept[0] * kept[1]].reshape(4, *kept, 3)
        crop = resize_crop_uint8(frames_THWC, (32, 32)).permute(1, 2, 3, 0).numpy()
        whole = read_clip(clips / "wide.mp4", 0, 4, 2, cover=(32, 32))
        np.testing.assert_array_equal(crop, resize_crop_uint8(whole, (32, 32)).permute(1, 2, 3, 0).numpy())


def test_a_file_that_cannot_be_read_is_a_reason_and_not_an_end(clips, slots):
    one = slots()
    broken, good = one.submit(clips / "broken.mp4"), one.submit(clips / "square.mp4")
    one.finish(broken, good)
    assert "broken.mp4: cannot be read" in broken.skipped
    assert isinstance(broken.result(), UserError)
    assert good.skipped is None


def test_a_mistake_of_ours_is_raised_with_the_file(clips):
    wrong = ClipRequest(path=str(clips / "square.mp4"), start=0, frames=4, interval="two", height=32, width=32)
    kind, what = decode_worker.decode(wrong, np.zeros(10**5, np.uint8), "PyAV", lambda stage: None)
    assert kind == "fault"
    assert "square.mp4: TypeError while decoding: " in what


def test_a_dead_worker_is_replaced_and_its_clip_tried_once_more(clips, slots):
    one = slots()
    stuck, behind = one.submit(clips / "stuck.mp4"), one.submit(clips / "square.mp4")
    ended = []
    for _ in range(2):
        one.wait_for_stage(stuck, "open")
        ended += one.workers.processes
        os.kill(ended[-1], signal.SIGKILL)
        while one.workers.processes == ended[-1:]:
            one.workers.poll(None)
    one.finish(stuck, behind)
    assert stuck.skipped == (
        f"{clips / 'stuck.mp4'}: two loader workers died of it (killed by SIGKILL in stage open, killed by SIGKILL in "
        "stage open); replace it"
    )
    np.testing.assert_array_equal(behind.result(), expected(clips / "square.mp4"))
    assert len({*ended, *one.workers.processes}) == 3


def test_a_worker_that_dies_without_a_clip_costs_none(clips, slots):
    one = slots()
    first = one.submit(clips / "square.mp4")
    one.finish(first)
    (process,) = one.workers.processes
    os.kill(process, signal.SIGKILL)
    jobs = [one.submit(clips / "square.mp4", start) for start in range(4)]
    one.finish(*jobs)
    assert all(not job.deaths and job.skipped is None for job in jobs)


def test_a_worker_that_cannot_start_is_an_error_and_no_endless_loop(slots, monkeypatch, clips):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    one = slots()
    job = one.submit(clips / "square.mp4")
    with pytest.raises(RuntimeError, match=r"worker could not start \(exit status 1\); its messages are above"):
        one.finish(job)


def test_workers_that_die_idle_over_and_over_are_an_error(slots):
    one = slots()
    for _ in range(3):
        one.kill_worker()
    with pytest.raises(RuntimeError, match=r"could not start \(killed by SIGKILL\)"):
        one.kill_worker()


def test_workers_that_die_behind_finished_work_are_replaced_each_time(clips, slots):
    one = slots()
    for _ in range(6):
        one.finish(one.submit(clips / "square.mp4"))
        one.kill_worker()


def no_process(*arguments, **options):
    raise BlockingIOError(11, "Resource temporarily unavailable")


def test_a_worker_that_cannot_be_replaced_is_one_clear_error_and_closes_nobody_else_s_file(slots, monkeypatch):
    one = slots()
    monkeypatch.setattr(subprocess, "Popen", no_process)
    with pytest.raises(UserError, match=r"--data\.workers=1: the system does not start worker 1 \(.*able\): lower"):
        one.kill_worker()
    others = [os.open(os.devnull, os.O_RDONLY) for _ in range(8)]  # they get the numbers that were given up
    for _ in range(2):
        one.workers.close()
    for other in others:
        os.close(other)


@pytest.mark.parametrize("failing", ["Popen", "pidfd_open"])
def test_workers_of_which_one_cannot_start_are_all_ended(monkeypatch, failing):
    made, memory = [], HostMemory(2**20, shared=True)
    owner = subprocess if failing == "Popen" else os
    real_start, real = subprocess.Popen, getattr(owner, failing)

    def start(*arguments, **options):
        made.append(real_start(*arguments, **options))
        return made[-1]

    calls = iter((real if failing == "pidfd_open" else start, no_process))
    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(owner, failing, lambda *arguments, **options: next(calls)(*arguments, **options))
    before = os.listdir("/proc/self/fd")
    with pytest.raises(UserError, match=r"--data\.workers=3: the system does not start worker 2"):
        DecodeWorkers(3, memory, decoder=DECODER)
    assert os.listdir("/proc/self/fd") == before
    assert len(made) == (1 if failing == "Popen" else 2)
    assert all(process.returncode == -signal.SIGKILL for process in made)


def test_what_is_seen_may_be_asked_for_while_jobs_come_and_go(clips, slots):
    one = slots()
    job = one.submit(clips / "stuck.mp4")
    jobs = one.workers._jobs

    class Number(int):
        """Another job comes when this one is looked up."""

        def __hash__(self):
            if looking:
                jobs[len(jobs) + 100] = job
            return super().__hash__()

    looking = False
    jobs.update({Number(number): job for number in range(50, 60)})
    looking = True
    assert len(one.workers.sights()) == 11


def test_a_job_is_withdrawn_unless_a_worker_has_it(clips, slots):
    one = slots()
    stuck, next_to_it, waiting, behind = (one.submit(clips / f"{name}.mp4") for name in ["stuck"] + ["square"] * 3)
    assert [one.workers.withdraw(job) for job in (stuck, next_to_it, waiting, waiting)] == [False, False, True, False]
    for _ in range(2):
        one.wait_for_stage(stuck, "open")
        one.kill_worker()
    one.finish(stuck, next_to_it, behind)
    assert not waiting.finished
    assert one.workers.withdraw(behind)


def test_closing_ends_a_worker_that_hangs(clips, slots):
    one = slots(2)
    stuck = one.submit(clips / "stuck.mp4")
    one.wait_for_stage(stuck, "open")
    processes = one.workers.processes
    one.workers.close()
    assert not any(os.path.exists(f"/proc/{process}") for process in processes)


TRAINER = """
import sys
from opensora_fast.train.decode_workers import DecodeWorkers, Job, slot_bytes
from opensora_fast.train.dataset import ClipRequest
from opensora_fast.host_memory import HostMemory
from opensora_fast.train.pinned_pool import PinnedPool

memory = HostMemory(2**20, shared=True)
pool = PinnedPool(memory, largest=2**16, setting="slots")
workers = DecodeWorkers(2, memory, decoder="PyAV")
clip = ClipRequest(path=sys.argv[1], start=0, frames=1, interval=1, height=32, width=32)
job = Job(request=clip, slot=pool.take(2**16, timeout=0))
workers.submit(job)
while not any(sight and sight.stage == "open" for _, sight in workers.sights()):
    workers.poll(0.01)
print(*workers.processes, flush=True)
workers.poll(None)
"""


def test_a_killed_trainer_leaves_no_worker_behind(clips):
    """Neither the one that waits for work, nor the one that hangs in a decoder."""
    trainer = subprocess.Popen([sys.executable, "-P", "-c", TRAINER, str(clips / "stuck.mp4")], stdout=subprocess.PIPE)
    workers = [os.pidfd_open(int(word)) for word in trainer.stdout.readline().split()]
    assert len(workers) == 2
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    for worker in workers:
        assert decode_workers.wait([worker], 30), "a worker has outlived the trainer"
        os.close(worker)


def test_no_descriptor_and_no_process_is_left(clips, slots):
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(2):
        one = Slots(1)
        one.finish(one.submit(clips / "square.mp4"))
        one.workers.close()
        with contextlib.suppress(ChildProcessError):
            assert os.waitpid(-1, os.WNOHANG)[0] == 0
        del one
    assert len(set(os.listdir("/proc/self/fd")) - before) == 0


def test_decoding_in_order_gives_every_clip_and_every_reason(clips):
    names = ["square", "broken", "wide"] * 4
    requests = (request(clips / f"{name}.mp4", start) for start, name in enumerate(names[:9]))
    results = list(decode_in_order(requests, buckets=[BUCKET], workers=2))
    assert len(results) == 9
    for start, (name, result) in enumerate(zip(names, results, strict=False)):
        if name == "broken":
            assert isinstance(result, UserError)
        elif start + 7 <= 12:
            np.testing.assert_array_equal(result, expected(clips / f"{name}.mp4", start))
        else:
            assert "frame" in str(result)
    assert list(decode_in_order([], buckets=[BUCKET], workers=1)) == []


def test_the_board_is_seen_by_who_attaches():
    board = StatusBoard(3)
    worker = StatusBoard(3, os.dup(board.descriptor))
    assert board.look(1).job is None
    worker.begin(1, 7)
    for stage in STAGES:
        worker.enter(1, stage)
        sight = board.look(1)
        assert (sight.job, sight.stage) == (7, stage)
        assert 0 <= sight.seconds < 60
    assert board.look(0).job is board.look(2).job is None
    worker.finish(1)
    assert board.look(1).job is None
    worker.begin(1, 8)
    sight = board.look(1)
    assert (sight.job, sight.stage) == (8, "open"), "not the stage that the job before has ended in"
    worker.close()
    board.close()


def test_workers_import_no_torch_for_pyav():
    code = "import sys, opensora_fast.train.decode_worker; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
