"""From a record to pixels: the frames of one clip at its bucket's size.

A video gives a run of `frames` frames, `interval` apart, whose start is drawn anew each epoch; an image gives itself.
Only that run is decoded.  Pixels stay uint8 until they are on the training device: a quarter of the bytes to pass
between processes and over the bus.

Shapes   C = 3, T frames, H height, W width.   Source: Open-Sora 2.0, released data loading (random crop in time, centre
crop in space); here the interval is kept exactly, where the released code spreads the frames unevenly over the crop.
"""

from __future__ import annotations

from torch import Tensor

from opensora_fast.train.buckets import Bucket, Draw, frame_interval
from opensora_fast.train.index import ClipRecord
from opensora_fast.video_io import read_clip, read_image, resize_crop_uint8


def decode_clip(record: ClipRecord, bucket: Bucket, draw: Draw | None, *keys: int, fps_max: float) -> Tensor:
    """uint8 [C, T, H, W] in the bucket's size.

    keys: with `draw` they decide the start (position in the index, and which time it is used, where a batch repeats a
    clip); draw=None starts at the first frame.
    Raises UserError naming the file when it cannot be read.
    """
    size = (bucket.height, bucket.width)
    if bucket.frames == 1:
        return resize_crop_uint8(read_image(record.path, cover=size), size)
    interval = int(frame_interval(record.fps, fps_max))
    spare = record.num_frames - bucket.frames * interval
    start = 0 if draw is None else int(draw.of("start", *keys).integers(spare + 1))
    return resize_crop_uint8(read_clip(record.path, start, bucket.frames, interval, cover=size), size)
