"""The batches that a recipe's data section stands for: endless ones to train on, a fixed pass over held-out clips."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from opensora_fast.autoencoder import Autoencoder
from opensora_fast.errors import UserError
from opensora_fast.train.bucket_sampler import BucketSampler
from opensora_fast.train.config import DataSection
from opensora_fast.train.index import read_index
from opensora_fast.train.loader import Batch, ClipLoader, evaluation_batches


def training_feed(
    data: DataSection,
    autoencoder: Autoencoder,
    *,
    multiple: int,
    seed: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> ClipLoader:
    """Batches of `data.index` for this autoencoder, pixels in `dtype`; sides divide by `multiple`.

    Raises UserError for an unusable index or bucket table, for frame counts that the autoencoder cannot take, and for
    memory that cannot be had or is too small.
    """
    assert data.index is not None
    for frames in {frames for by_frames in data.buckets.values() for frames in by_frames}:
        autoencoder.latent_shape(frames, multiple, multiple)
    clips = read_index(Path(data.index))
    with _naming(data.index):
        sampler = BucketSampler(clips, data.buckets, multiple=multiple, seed=seed, fps_max=data.fps_max)
    for cause, count in sampler.misfits.items():
        print(f"{data.index}: {count} of {len(clips)} clips are not used: {cause}")
    loader = ClipLoader(
        clips,
        sampler,
        workers=data.workers,
        prefetch=data.prefetch,
        pinned_gib=data.pinned_gib,
        device=device,
        dtype=dtype,
        slow_batch_s=data.slow_batch_s,
        batch_timeout_s=data.batch_timeout_s,
    )
    print(loader.describe())
    return loader


def fixed_feed(index: str | None, data: DataSection, *, multiple: int, clips: int | None = None) -> Iterable[Batch]:
    """The same pass each time over (the first `clips` that fit of) an index; nothing without one."""
    if index is None:
        return []
    with _naming(index):
        return evaluation_batches(
            read_index(Path(index)),
            data.buckets,
            multiple=multiple,
            fps_max=data.fps_max,
            limit=clips,
            workers=data.workers,
            slow_clip_s=data.slow_batch_s,
            clip_timeout_s=data.batch_timeout_s,
        )


@contextmanager
def _naming(index: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"{index}: {error}") from error
