"""Buckets: which clip is trained at which size and length.

A table {resolution: {frames: (probability, batch size)}} lists the kinds of batch.  A clip takes the first that fits,
from the largest area and, within it, the most frames down:

    resolutions of more than 1.25 times the clip's area are passed over
    an image (1 frame) fits `1`; a video fits the first count of more than 1 with count <= num_frames // interval
    what fits is taken with its probability; otherwise the search goes on at the next lower resolution
    a probability may be a pair (take, shorten): `shorten` is the chance of passing over this count for a shorter one

The frame size is the one of the resolution's table whose aspect ratio is nearest to the clip's height / width.
A clip above fps_max frames per second is thinned: interval = ceil(fps / fps_max), new fps = floor(fps / interval).

Every draw is a function of (seed, epoch, position in the index) alone.
Shapes   N clips.   Source: Open-Sora 2.0, released bucket sampler (rules) and arXiv 2503.09642 tables 5 and 6 (tables).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from opensora_fast.errors import UserError
from opensora_fast.resolutions import area, sizes
from opensora_fast.train.index import ClipIndex

BucketTable = dict[str, dict[int, tuple[float | tuple[float, float], int]]]
"""{resolution: {frames: (probability or (take, shorten), batch size)}}"""

LEAST_AREA = 0.8
"""Share of a resolution's area that a clip must have: training on blown-up pixels teaches blur."""


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """One kind of batch: sizes in pixels."""

    resolution: str
    aspect_ratio: str
    frames: int
    height: int
    width: int
    batch_size: int

    def __str__(self) -> str:
        return f"{self.resolution} {self.aspect_ratio} {self.frames}f"


def validate_buckets(table: BucketTable) -> None:
    """Raises UserError naming the first entry of a bucket table that makes no sense; an empty table passes."""
    for resolution, by_frames in table.items():
        area(resolution)
        for frames, (probability, batch_size) in by_frames.items():
            name = f"bucket {resolution!r}: {{{frames}: ({probability}, {batch_size})}}"
            if frames < 1:
                raise UserError(f"{name}: a clip has at least 1 frame; change {frames}")
            if batch_size < 1:
                raise UserError(f"{name}: a batch has at least 1 clip; change {batch_size}")
            take, shorten = _chances(probability)
            if not (0 <= take <= 1 and 0 <= shorten < 1):
                raise UserError(f"{name}: chances lie in [0, 1], that of shortening below 1; change {probability}")


def frame_interval(fps: np.ndarray | float, fps_max: float) -> np.ndarray:
    """Every how many frames of a clip one is kept; 1 for an image (fps 0)."""
    return np.maximum(np.ceil(np.asarray(fps) / fps_max), 1).astype(np.int64)


def thinned_fps(fps: float, fps_max: float) -> float:
    """Frames per second of a clip after thinning; unchanged below fps_max."""
    return fps if fps < fps_max else float(fps // frame_interval(fps, fps_max))


@dataclass(frozen=True, kw_only=True)
class Draw:
    """The randomness of one epoch."""

    seed: int
    epoch: int

    def of(self, purpose: str, *keys: int) -> np.random.Generator:
        """A generator of its own for each purpose and keys, whatever else has been drawn."""
        return np.random.default_rng([self.seed, self.epoch, zlib.crc32(purpose.encode()), *keys])


def assign(
    clips: ClipIndex, table: BucketTable, draw: Draw | None, *, multiple: int, fps_max: float
) -> tuple[list[Bucket], np.ndarray]:
    """The buckets of a table, and for every clip the position of its bucket in that list: int64 [N], -1 for none.

    multiple: what height and width must divide by (autoencoder's spatial compression x patch size).
    draw=None takes the first bucket that fits and has a positive chance.
    """
    buckets: list[Bucket] = []
    bucket_of_N = np.full(len(clips), -1)
    for level, of_level in enumerate(_levels(clips, table, multiple=multiple, fps_max=fps_max)):
        undecided_N = (bucket_of_N < 0) & of_level.large_N
        chance_N = np.zeros(len(clips)) if draw is None else draw.of("take", level).random(len(clips))
        for entry in of_level.entries:
            frames, take, shorten = entry.frames, entry.take, entry.shorten
            fits_N = undecided_N & of_level.fits(frames)
            if shorten:
                fits_N &= take > 0 if draw is None else draw.of("shorten", level, frames).random(len(clips)) >= shorten
            taken_N = fits_N & (chance_N < take)
            undecided_N &= ~fits_N
            bucket_of_N[taken_N] = len(buckets) + of_level.ratio_N[taken_N]
            buckets += entry.buckets
    return buckets, bucket_of_N


def reachable_pairs(
    clips: ClipIndex, table: BucketTable, *, multiple: int, fps_max: float
) -> tuple[list[Bucket], np.ndarray, np.ndarray]:
    """Every pair that some epoch can make: the buckets, and int64 [P] positions of clips and of their buckets.

    Pairs come bucket by bucket, within one in the order of the index. A clip may have several, or none.
    """
    buckets: list[Bucket] = []
    clips_of, buckets_of = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    open_N = np.ones(len(clips), bool)  # some draws of the levels so far leave the clip to the next one
    for of_level in _levels(clips, table, multiple=multiple, fps_max=fps_max):
        undecided_N, left_N = open_N & of_level.large_N, open_N & ~of_level.large_N
        for entry in of_level.entries:
            fits_N = undecided_N & of_level.fits(entry.frames)
            if entry.take > 0:
                clips_of.append(np.flatnonzero(fits_N))
                buckets_of.append(len(buckets) + of_level.ratio_N[fits_N])
            if entry.take < 1:
                left_N |= fits_N
            if not entry.shorten:
                undecided_N &= ~fits_N
            buckets += entry.buckets
        open_N = left_N | undecided_N
    clip_P, bucket_P = np.concatenate(clips_of), np.concatenate(buckets_of)
    order = np.lexsort((clip_P, bucket_P))
    return buckets, clip_P[order], bucket_P[order]


def unplaced(clips: ClipIndex, table: BucketTable, *, multiple: int, fps_max: float) -> dict[str, np.ndarray]:
    """The clips that no bucket can ever take, by reason: positions in the index; empty when all are of use."""
    unplaced_N = assign(clips, table, None, multiple=multiple, fps_max=fps_max)[1] < 0
    smallest = min(map(area, table), default=0)
    small_N = unplaced_N & (clips.height * clips.width < LEAST_AREA * smallest)
    still_N = unplaced_N & ~small_N & (clips.num_frames == 1)
    by_reason = {
        f"smaller than {LEAST_AREA} of every resolution's area": small_N,
        "images without a bucket of 1 frame": still_N,
        "videos shorter than every bucket": unplaced_N & ~small_N & ~still_N,
    }
    return {reason: np.flatnonzero(of_N) for reason, of_N in by_reason.items() if of_N.any()}


def reachable(clips: ClipIndex, table: BucketTable, *, multiple: int, fps_max: float) -> list[Bucket]:
    """The buckets that some epoch can put a clip of the index in: what memory must fit."""
    buckets, _, bucket_P = reachable_pairs(clips, table, multiple=multiple, fps_max=fps_max)
    return [buckets[position] for position in np.unique(bucket_P)]


def misfits(clips: ClipIndex, table: BucketTable, *, multiple: int, fps_max: float) -> dict[str, int]:
    """How many clips no bucket can ever take, by reason; empty when all are of use."""
    found = unplaced(clips, table, multiple=multiple, fps_max=fps_max)
    return {reason: len(positions) for reason, positions in found.items()}


@dataclass(frozen=True)
class _Entry:
    """A count of frames at one resolution; one bucket for each aspect ratio."""

    frames: int
    take: float
    shorten: float
    buckets: list[Bucket]


@dataclass(frozen=True)
class _Level:
    """One resolution, and what of the rules no draw decides. entries: in the order in which they are tried."""

    entries: list[_Entry]
    large_N: np.ndarray  # whether the clip's area is enough
    ratio_N: np.ndarray  # position of its aspect ratio in the buckets of an entry
    frames_N: np.ndarray  # frames after thinning
    image_N: np.ndarray

    def fits(self, frames: int) -> np.ndarray:
        """Whether a clip has so many frames: bool [N]."""
        return (self.frames_N >= frames) & (self.image_N == (frames == 1))


def _levels(clips: ClipIndex, table: BucketTable, *, multiple: int, fps_max: float) -> Iterator[_Level]:
    area_N, image_N = clips.height * clips.width, clips.num_frames == 1
    frames_N = np.maximum(clips.num_frames // frame_interval(clips.fps, fps_max), 1)  # an image stays one, at any fps
    for resolution in sorted(table, key=area, reverse=True):
        by_ratio = sizes(resolution, multiple, training=True)
        entries = []
        for frames in sorted(table[resolution], reverse=True):
            probability, batch_size = table[resolution][frames]
            buckets = [
                Bucket(
                    resolution=resolution,
                    aspect_ratio=aspect_ratio,
                    frames=frames,
                    height=height,
                    width=width,
                    batch_size=batch_size,
                )
                for aspect_ratio, (height, width) in by_ratio.items()
            ]
            entries.append(_Entry(frames, *_chances(probability), buckets))
        yield _Level(
            entries=entries,
            large_N=area_N >= LEAST_AREA * area(resolution),
            ratio_N=_nearest_ratio(clips, list(by_ratio)),
            frames_N=frames_N,
            image_N=image_N,
        )


def _chances(probability: float | tuple[float, float]) -> tuple[float, float]:
    """(take, shorten)"""
    return (probability, 0.0) if isinstance(probability, int | float) else probability


def _nearest_ratio(clips: ClipIndex, aspect_ratios: list[str]) -> np.ndarray:
    """Position in `aspect_ratios` (width:height) of the one nearest to each clip's height / width: int64 [N]."""
    ratios = np.array([float(height) / float(width) for width, height in (name.split(":") for name in aspect_ratios)])
    order = np.argsort(ratios)
    midpoints = (ratios[order][1:] + ratios[order][:-1]) / 2
    return order[np.searchsorted(midpoints, clips.height / clips.width)]
