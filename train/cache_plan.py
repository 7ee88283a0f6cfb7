"""What a cache of encoded clips has to hold for a data section, and the keys that its rows are found by.

Latents are wanted for every clip of `data.index` at the size and length of every bucket that some epoch can put it in,
and for the held-out clips at those of their evaluation. A training clip has one start per bucket, drawn from the
recipe's seed (the uncached loader draws a new one each epoch); a held-out clip starts at its first frame. Embeddings
are wanted for every prompt of these clips, and for the empty one.

A key is 128 bits of BLAKE2b. A clip's is of its name in the index (relative to the index's folder where it lies below
that, so that clips and index can be moved together), the file's size in bytes, and its frames, height, width and rate;
a latent's also of the bucket's frames and size and of the kind of start; a prompt's of its text, frame rate and motion
included. So the order of an index, batch sizes and chances may change, clips that are equal share a row, and a cache
serves any recipe whose keys it holds.

The bytes are the index's. Where it does not have them the file is asked, each time that a key is made; 0 stands for a
file that is not there. Two folders whose files have equal names have different keys unless even the bytes of a file
agree, and a file that was replaced has another one as soon as its folder is indexed again. Files of equal name,
measures and bytes count as one, whatever they show.

N clips, P latents or prompts.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from opensora_fast.errors import UserError
from opensora_fast.prompts import with_suffix
from opensora_fast.train.buckets import Bucket, assign, reachable_pairs, thinned_fps, unplaced
from opensora_fast.train.config import DataSection
from opensora_fast.train.index import ClipIndex, ClipRecord, read_index

KEY = np.dtype([("high", "<u8"), ("low", "<u8")])
_AT_ONCE = 2**16  # clips that are Python objects at a time


@dataclass(frozen=True, kw_only=True)
class Clips:
    """One index. drawn: whether its clips start at a drawn frame (training) or at their first (held-out)."""

    index: Path
    clips: ClipIndex
    drawn: bool
    keys_N: np.ndarray

    @classmethod
    def read(cls, index: str, *, drawn: bool) -> Clips:
        """Raises UserError when the index cannot be read."""
        clips = read_index(Path(index))
        return cls(index=Path(index), clips=clips, drawn=drawn, keys_N=clip_keys(clips, Path(index).parent.resolve()))

    def latent_keys(self, positions_P: np.ndarray, bucket: Bucket) -> np.ndarray:
        """Of these clips in this bucket: KEY [P]."""
        start = "drawn" if self.drawn else "first"
        (variant,) = _keys([f"{bucket.frames} frames of {bucket.height} x {bucket.width}, {start} start"])
        found_P = self.keys_N[positions_P]
        return _pairs(found_P["high"] ^ variant["high"], found_P["low"] ^ variant["low"])


@dataclass(frozen=True, kw_only=True)
class LatentGroup:
    """Latents to be made of one size and length, each once."""

    bucket: Bucket
    """One of those with this size and length: the one with the smallest batch."""
    keys_P: np.ndarray
    source_P: np.ndarray
    """Position of the clip's index in the plan's sources."""
    clip_P: np.ndarray
    """Position of the clip in that index."""


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    sources: list[Clips]
    groups: list[LatentGroup]
    fps_max: float
    pairs: int
    """Clips in buckets, equal ones counted as often as they occur."""
    prompt_keys_P: np.ndarray
    """Of each prompt once; the first is the empty one's."""
    prompt_source_P: np.ndarray
    prompt_clip_P: np.ndarray
    """A clip with this prompt; -1 for the empty one."""
    prompts_asked: int
    """As many as clips are used, equal ones counted as often as they occur."""
    misfits: list[dict[str, np.ndarray]]
    """Of each source, the clips that no bucket takes, by reason."""

    def record(self, group: LatentGroup, position: int) -> ClipRecord:
        return self.sources[group.source_P[position]].clips[int(group.clip_P[position])]

    def prompt(self, position: int) -> str:
        clip = int(self.prompt_clip_P[position])
        if clip < 0:
            return ""
        return clip_prompts(self.sources[self.prompt_source_P[position]].clips[clip : clip + 1], self.fps_max)[0]

    def unplaced(self) -> list[tuple[str, str]]:
        """(path, reason) of each clip that no bucket takes."""
        return [
            (path, reason)
            for source, misfits in zip(self.sources, self.misfits, strict=True)
            for reason, positions in misfits.items()
            for path in source.clips.take(positions).column("path")
        ]


def plan_cache(data: DataSection, *, multiple: int) -> CachePlan:
    """What training and evaluation with this data section read. `multiple`: what sides of a frame divide by.

    Raises UserError for an index that cannot be read, and when no clip of one fits a bucket.
    """
    assert data.index is not None
    sources = [Clips.read(data.index, drawn=True)]
    if data.heldout_index is not None:
        sources.append(Clips.read(data.heldout_index, drawn=False))
    by_size: dict[tuple[int, int, int], list[tuple[Bucket, int, np.ndarray]]] = {}
    keys, places, asked, pairs = [prompt_keys([""])], [np.array([(0, -1)])], 0, 0
    misfits = []
    for number, source in enumerate(sources):
        buckets, clip_P, bucket_P = _pairs_of(source, data, multiple)
        misfits.append(unplaced(source.clips, data.buckets, multiple=multiple, fps_max=data.fps_max))
        if not len(clip_P):
            said = "; ".join(f"{len(positions)} {reason}" for reason, positions in misfits[-1].items())
            raise UserError(
                f"{source.index}: no clip fits a bucket ({said or 'it is empty'}): add clips or change data.buckets"
            )
        for place in np.unique(bucket_P):
            bucket, members_P = buckets[place], clip_P[bucket_P == place]
            by_size.setdefault((bucket.frames, bucket.height, bucket.width), []).append((bucket, number, members_P))
        used = np.unique(clip_P)
        keys += [prompt_keys(clip_prompts(part, data.fps_max)) for part in _parts(source.clips, used)]
        places.append(np.stack([np.full(len(used), number), used], 1))
        asked, pairs = asked + len(used), pairs + len(clip_P)
    keys_P, place_P2 = np.concatenate(keys), np.concatenate(places)
    firsts = np.sort(np.unique(keys_P, return_index=True)[1])
    return CachePlan(
        sources=sources,
        groups=[_group(by_size[size], sources) for size in sorted(by_size)],
        fps_max=data.fps_max,
        pairs=pairs,
        prompt_keys_P=keys_P[firsts],
        prompt_source_P=place_P2[firsts, 0],
        prompt_clip_P=place_P2[firsts, 1],
        prompts_asked=asked,
        misfits=misfits,
    )


def clip_keys(clips: ClipIndex, folder: Path) -> np.ndarray:
    """KEY [N]; `folder` is the index's."""
    below = f"{folder}/"
    keys = [np.zeros(0, KEY)]
    for part in _parts(clips, np.arange(len(clips))):
        columns = (part.column(name) for name in ("path", "bytes", "num_frames", "height", "width", "fps"))
        keys.append(
            _keys(
                f"{path.removeprefix(below)}\n{file_bytes(path) if size is None else size} {f} {h} {w} {fps!r}"
                for path, size, f, h, w, fps in zip(*columns, strict=True)
            )
        )
    return np.concatenate(keys)


def file_bytes(path: str) -> int:
    """0 where there is no file."""
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def prompt_keys(prompts: Iterable[str]) -> np.ndarray:
    """KEY [P]"""
    return _keys(prompts)


def clip_prompts(clips: ClipIndex, fps_max: float) -> list[str]:
    """What the text encoders are given for each clip."""
    rates = [thinned_fps(fps, fps_max) for fps in clips.fps.tolist()]
    motions = clips.column("score_vmafmotion")
    return prompts_of(clips.column("text"), rates, motions)


def prompts_of(texts: Sequence[str], fps: Sequence[float], motions: Sequence[float | None]) -> list[str]:
    """Captions with the sentence about frame rate and motion; rates are rounded to float32, as batches hold them."""
    rounded = np.asarray(fps, np.float32).tolist()
    return [with_suffix(text, rate, motion) for text, rate, motion in zip(texts, rounded, motions, strict=True)]


def _pairs_of(source: Clips, data: DataSection, multiple: int) -> tuple[list[Bucket], np.ndarray, np.ndarray]:
    if source.drawn:
        return reachable_pairs(source.clips, data.buckets, multiple=multiple, fps_max=data.fps_max)
    buckets, bucket_of_N = assign(source.clips, data.buckets, None, multiple=multiple, fps_max=data.fps_max)
    clip_P = np.flatnonzero(bucket_of_N >= 0)
    return buckets, clip_P, bucket_of_N[clip_P]


def _group(members: list[tuple[Bucket, int, np.ndarray]], sources: list[Clips]) -> LatentGroup:
    keys_P = np.concatenate([sources[number].latent_keys(clip_P, bucket) for bucket, number, clip_P in members])
    source_P = np.concatenate([np.full(len(clip_P), number) for _, number, clip_P in members])
    clip_P = np.concatenate([clip_P for *_, clip_P in members])
    _, firsts = np.unique(keys_P, return_index=True)
    firsts.sort()
    return LatentGroup(
        bucket=min((bucket for bucket, *_ in members), key=lambda bucket: bucket.batch_size),
        keys_P=keys_P[firsts],
        source_P=source_P[firsts],
        clip_P=clip_P[firsts],
    )


def _parts(clips: ClipIndex, positions: np.ndarray) -> Iterator[ClipIndex]:
    """The clips at these positions, in order, some at a time."""
    for begin in range(0, len(positions), _AT_ONCE):
        yield clips.take(positions[begin : begin + _AT_ONCE])


def _keys(names: Iterable[str]) -> np.ndarray:
    joined = b"".join(hashlib.blake2b(name.encode(), digest_size=KEY.itemsize).digest() for name in names)
    return np.frombuffer(joined, KEY)


def _pairs(high_P: np.ndarray, low_P: np.ndarray) -> np.ndarray:
    keys_P = np.empty(len(high_P), KEY)
    keys_P["high"], keys_P["low"] = high_P, low_P
    return keys_P
