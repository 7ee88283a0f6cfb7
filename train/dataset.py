"""From a record to pixels: the frames of one clip, at the smallest size that covers its bucket's.

A video gives a run of `frames` frames, `interval` apart, whose start is drawn anew each epoch; an image gives itself.
Only that run is decoded.  What is to be read is settled where the index is, in the trainer; a worker is told no more
than a `ClipRequest`, and needs neither the index nor torch, so that it starts in a quarter of a second.  Pixels stay
uint8 until the batch is laid out: a quarter of the bytes to pass between processes.

Shapes   C = 3, T frames, H height, W width.   Source: Open-Sora 2.0, released data loading (random crop in time, centre
crop in space); here the interval is kept exactly, where the released code spreads the frames unevenly over the crop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from opensora_fast.train.buckets import Bucket, Draw, frame_interval
from opensora_fast.video_decoder import DecoderName, choose_decoder
from opensora_fast.video_io import Allocate, OnStage, ignore_stage, new_array, read_clip, read_image

if TYPE_CHECKING:
    from torch import Tensor

    from opensora_fast.train.index import ClipRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipRequest:
    """Frames start, start + interval, ... of a file, to cover height x width pixels."""

    path: str
    start: int
    frames: int
    interval: int
    height: int
    width: int


def clip_request(record: ClipRecord, bucket: Bucket, draw: Draw | None, *keys: int, fps_max: float) -> ClipRequest:
    """What to read of a clip for its bucket.

    keys: with `draw` they decide the start (position in the index, and which time it is used, where a batch repeats a
    clip); draw=None starts at the first frame.
    """
    interval = int(frame_interval(record.fps, fps_max)) if bucket.frames > 1 else 1
    spare = record.num_frames - bucket.frames * interval
    start = 0
    if draw is not None and bucket.frames > 1:
        start = int(draw.of("start", *keys).integers(spare + 1))
    return ClipRequest(
        path=record.path,
        start=start,
        frames=bucket.frames,
        interval=interval,
        height=bucket.height,
        width=bucket.width,
    )


def read_request(
    request: ClipRequest, *, decoder: DecoderName, allocate: Allocate = new_array, on_stage: OnStage = ignore_stage
) -> np.ndarray:
    """The frames, covering the size asked for: uint8 [T, H, W, 3], in the array that `allocate` gives.

    Raises UserError naming the file when it cannot be read.
    """
    size = (request.height, request.width)
    if request.frames == 1:
        return read_image(request.path, cover=size, allocate=allocate, on_stage=on_stage)
    return read_clip(
        request.path,
        request.start,
        request.frames,
        request.interval,
        cover=size,
        decoder=decoder,
        allocate=allocate,
        on_stage=on_stage,
    )


def decode_clip(record: ClipRecord, bucket: Bucket, draw: Draw | None, *keys: int, fps_max: float) -> Tensor:
    """uint8 [C, T, H, W] in the bucket's size, decoded in this process; arguments as of `clip_request`.

    Raises UserError naming the file when it cannot be read.
    """
    import torch

    request = clip_request(record, bucket, draw, *keys, fps_max=fps_max)
    pixels_THWC = read_request(request, decoder=choose_decoder().name, allocate=exactly(request))
    return torch.from_numpy(pixels_THWC).permute(3, 0, 1, 2).contiguous()


def exactly(request: ClipRequest) -> Allocate:
    """An `allocate` that keeps the centre of the size asked for."""
    return lambda frames, height, width: new_array(frames, request.height, request.width)
