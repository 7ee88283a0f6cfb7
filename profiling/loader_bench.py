"""`opensora-fast bench loader`: batches of real clips, against a plain DataLoader with the same decoder.

The baseline's workers decode with the same functions and return float32 in [-1, 1], which is what most trainers do.
Then what a training step waits for its batch, and the memory of the trainer and its workers over many batches.

    opensora-fast bench loader [--workers 2] [--rounds 5] [--batches 2000] [--out rows.jsonl] [--html FILE]
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from opensora_fast.arguments import Parser
from opensora_fast.errors import UserError
from opensora_fast.profiling.ledger import Row
from opensora_fast.profiling.machine import this_machine
from opensora_fast.profiling.runtime_report import Chart, Claim, finish, row, with_claims
from opensora_fast.profiling.svg_chart import Line, line_chart
from opensora_fast.profiling.timing import Timing
from opensora_fast.train.buckets import BucketTable, Draw
from opensora_fast.train.dataset import decode_clip
from opensora_fast.train.demo_data import source_folder
from opensora_fast.train.index import ClipIndex, index_folder, read_index
from opensora_fast.train.loader import BatchPlan, BucketSampler, ClipLoader
from opensora_fast.video_io import to_signed

SOURCES = ("bikes.mp4", "bigbuckbunny.mp4")  # 640 x 272 and 1280 x 720; the demo's third is smaller than 256px
BUCKETS: BucketTable = {"256px": {33: (1.0, 2)}}
SHORT_BUCKETS: BucketTable = {"256px": {5: (1.0, 2)}}  # many batches in little time, to watch the memory
MULTIPLE, FPS_MAX, PREFETCH, SEED = 16, 30, 2, 0
WARM_UP = 4  # batches that do not count: workers start, pools fill
BATCHES = 24  # of one turn: the few that were decoded before its clock starts, of either loader, weigh little
SAMPLE_EVERY = 20  # batches between two looks at the memory


def main(argv: list[str]) -> int:
    """Returns 0 when everything was measured, whatever the figures."""
    parser = Parser(prog="opensora-fast bench loader", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="of each loader (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each loader (%(default)s)")
    parser.add_argument("--batches", type=int, default=2000, help="over which the memory is watched (%(default)s)")
    parser.add_argument("--step_seconds", type=float, default=0.5, help="of a computing step (%(default)s)")
    parser.add_argument("--out", type=Path, help="append the rows to this JSONL file")
    parser.add_argument("--html", type=Path, help="write a page with bars and the memory over the batches")
    options = parser.parse_args(argv)
    if options.workers < 1 or options.rounds < 2 or options.batches < 10 * SAMPLE_EVERY or options.step_seconds <= 0:
        raise UserError(
            f"--workers {options.workers} --rounds {options.rounds} --batches {options.batches} --step_seconds "
            f"{options.step_seconds}: use 1, 2, {10 * SAMPLE_EVERY} and something above 0, or more"
        )
    with tempfile.TemporaryDirectory(prefix="loader-bench-") as folder, Progress(transient=True) as progress:
        clips = _source_clips(Path(folder))
        task = progress.add_task("loaders", total=2 * options.rounds + 1 + options.batches // SAMPLE_EVERY)

        def advance() -> None:
            progress.advance(task)

        ours, plain = frames_per_second(clips, options.workers, options.rounds, advance)
        waits = waiting(clips, options.workers, options.step_seconds)
        advance()
        memory = memory_over(clips, options.workers, options.batches, advance)
    rows, chart = _told(ours, plain, waits, memory, options.step_seconds)
    note = (
        f"{', '.join(SOURCES)} at 256px, {options.workers} workers; {options.rounds} turns of {BATCHES} batches of "
        f"2 x 33 frames each; the memory is the trainer's and its workers' own share (PSS)"
    )
    finish(rows, title="Loader", note=note, charts=[chart], out=options.out, html=options.html)
    return 0


def frames_per_second(
    clips: ClipIndex, workers: int, rounds: int, advance: Callable[[], None]
) -> tuple[list[float], list[float]]:
    """Seconds of each turn of BATCHES batches: ours, and the plain loader's. Only one has workers at a time."""
    ours, plain = [], []
    for _ in range(rounds):
        with_ours = ClipLoader(clips, _sampler(clips, BUCKETS), workers=workers, prefetch=PREFETCH)
        ours.append(_seconds_of(iter(with_ours), lambda batch: batch.video_BCTHW))
        with_ours.close()
        advance()
        dataset = PlainClips(clips, workers)
        loader = DataLoader(dataset, batch_size=None, num_workers=workers, prefetch_factor=PREFETCH)
        plain.append(_seconds_of(iter(loader), lambda video_BCTHW: video_BCTHW))
        del loader
        advance()
    return ours, plain


def _seconds_of(batches: Iterator, video: Callable) -> float:
    for _ in range(WARM_UP):
        next(batches)
    begun = time.perf_counter()
    for _ in range(BATCHES):
        _touch(video(next(batches)))
    return time.perf_counter() - begun


def _touch(video_BCTHW: Tensor) -> None:
    """Read every page, as a copy to a device would."""
    video_BCTHW.view(torch.uint8).flatten()[::4096].sum()


class PlainClips(IterableDataset):
    """What a trainer does without a loader of its own: every worker makes whole float32 batches."""

    def __init__(self, clips: ClipIndex, workers: int) -> None:
        self._clips, self._workers = clips, workers

    def __iter__(self) -> Iterator[Tensor]:
        info = torch.utils.data.get_worker_info()
        assert info is not None
        for number, plan in enumerate(_sampler(self._clips, BUCKETS)):
            if number % self._workers == info.id:
                yield self._batch(plan)

    def _batch(self, plan: BatchPlan) -> Tensor:
        draw = Draw(seed=SEED, epoch=plan.epoch)
        clips = [
            to_signed(decode_clip(self._clips[index], plan.bucket, draw, index, 0, fps_max=FPS_MAX))
            for index in plan.indices
        ]
        return torch.stack(clips)


def waiting(clips: ClipIndex, workers: int, step_seconds: float) -> list[float]:
    """The share of each step that is spent waiting for its batch, when a step computes for `step_seconds`."""
    loader = ClipLoader(clips, _sampler(clips, BUCKETS), workers=workers, prefetch=PREFETCH)
    batches, shares = iter(loader), []
    a = torch.rand(512, 512)
    for _ in range(WARM_UP):
        next(batches)
        _compute(a, step_seconds)
    for _ in range(2 * BATCHES):
        begun = time.perf_counter()
        next(batches)
        waited = time.perf_counter() - begun
        _compute(a, step_seconds)
        shares.append(waited / (time.perf_counter() - begun))
    loader.close()
    return shares


def _compute(a: Tensor, seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        torch.mm(a, a)


def memory_over(clips: ClipIndex, workers: int, batches: int, advance: Callable[[], None]) -> list[tuple[float, float]]:
    """(batch, MiB of the trainer and its workers) every SAMPLE_EVERY batches."""
    loader = ClipLoader(clips, _sampler(clips, SHORT_BUCKETS), workers=workers, prefetch=PREFETCH)
    taken, seen = iter(loader), []
    for number in range(batches):
        _touch(next(taken).video_BCTHW)
        if (number + 1) % SAMPLE_EVERY == 0:
            seen.append((number + 1.0, _own_memory_mib()))
            advance()
    loader.close()
    return seen


def _own_memory_mib() -> float:
    """Proportional set size of this process and all that descend from it: shared pages count once."""
    parents: dict[int, int] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(status.parent.name)] = int(status.read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError):  # it has ended
            continue
    family = {os.getpid()}
    while grown := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= grown
    total = 0
    for pid in family:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)
    return total / 1024


def _told(
    ours: list[float], plain: list[float], waits: list[float], memory: list[tuple[float, float]], step_seconds: float
) -> tuple[list[Row], Chart]:
    machine = this_machine()
    frames = BATCHES * sum(frames * size for by in BUCKETS.values() for frames, (_, size) in by.items())
    num_bytes = frames * 256 * 256 * 3 * 4  # nominal: 256px stands for that many pixels at any ratio
    settled = memory[len(memory) // 4 :]  # workers and pools fill at first
    slope = statistics.linear_regression(*zip(*settled, strict=True)).slope
    grown = slope * memory[-1][0] / statistics.median(mib for _, mib in settled)
    claims = [
        Claim(
            name="frames per second against a plain DataLoader",
            value=statistics.median(theirs / mine for mine, theirs in zip(ours, plain, strict=True)),
            aim=1.3,
            at_most=False,
            unit="x",
        ),
        Claim(
            name=f"data wait in a step of {step_seconds:g} s",
            value=100 * statistics.median(waits),
            aim=2,
            at_most=True,
            unit="%",
        ),
        Claim(
            name=f"memory, growth over {memory[-1][0]:.0f} batches (fitted slope)",
            value=100 * grown,
            aim=1,
            at_most=True,
            unit="%",
        ),
    ]
    case = f"{BATCHES} batches of 2 x 33 frames"
    rows = []
    for name, taken in (("ours", ours), ("plain DataLoader, float32 workers", plain)):
        timing = Timing.of(taken)
        made = row(machine, "cpu", "loader", case, name, timing, num_bytes, frames_per_second=frames / timing.p50)
        rows.append(with_claims(made, claims) | {"memory_mib": memory} if name == "ours" else made)
    line = Line(name="trainer and workers", style="main", points=memory)
    svg = line_chart([line], x_label="batches", y_label="MiB of memory", height=240, from_zero=True)
    return rows, Chart("Memory over the batches", svg)


def _sampler(clips: ClipIndex, buckets: BucketTable) -> BucketSampler:
    return BucketSampler(clips, buckets, multiple=MULTIPLE, seed=SEED, fps_max=FPS_MAX)


def _source_clips(folder: Path) -> ClipIndex:
    for name in SOURCES:
        (folder / name).symlink_to(source_folder() / name)
    index_folder(folder, folder / "clips.parquet")
    return read_index(folder / "clips.parquet")
