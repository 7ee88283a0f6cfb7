"""Pixels that a video begins or ends with, from what the caller has: a file, a PIL image, an array or a tensor.

Every source is scaled until it covers the video's size, and its centre is cut out, by way of 8 bits a channel.

    path                  an image or a video file
    PIL image             or a list of them: frames
    numpy array           [H, W, 3] or [F, H, W, 3], uint8, or floating point in [0, 1]
    tensor                [3, H, W] or [F, 3, H, W], uint8, or floating point in [0, 1]

Shapes   F frames, H height, W width.  Results are float32 [3, F, height, width] in [-1, 1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from torch import Tensor

from opensora_fast.errors import UserError
from opensora_fast.video_io import probe, read_clip, read_image, resize_crop

if TYPE_CHECKING:
    from PIL.Image import Image

    Visual = str | Path | Image | np.ndarray | Tensor | Sequence[Image]


def image_pixels(image: Visual, size: tuple[int, int]) -> Tensor:
    """One picture, [3, 1, *size]. Raises UserError for a file that cannot be read and for what is no picture."""
    if isinstance(image, str | Path):
        return resize_crop(read_image(image, cover=size), size)
    frames_FHWC = _frames(image)
    if len(frames_FHWC) != 1:
        raise UserError(f"the image is {len(frames_FHWC)} frames: pass one picture, or a video as `video`")
    return resize_crop(frames_FHWC, size)


def clip_pixels(video: Visual, frames: int, fps: int, size: tuple[int, int], end: Literal["head", "tail"]) -> Tensor:
    """The first or last `frames` frames of a video, [3, frames, *size].

    Of a file the frames are taken that are nearest to `fps` a second, so that it keeps its speed; frames in memory are
    taken as they are. Raises UserError for a file that cannot be read, and for too few frames.
    """
    if isinstance(video, str | Path):
        wanted = clip_frames(video, frames, fps, end)
        first = wanted[0]
        frames_FHWC = read_clip(video, first, wanted[-1] - first + 1, cover=size)
        return resize_crop(frames_FHWC[[index - first for index in wanted]], size)
    frames_FHWC = _frames(video)
    if len(frames_FHWC) < frames:
        raise UserError(f"the video has {len(frames_FHWC)} frames of the {frames} that are needed; pass a longer one")
    return resize_crop(frames_FHWC[:frames] if end == "head" else frames_FHWC[-frames:], size)


def clip_frames(path: str | Path, frames: int, fps: int, end: Literal["head", "tail"]) -> list[int]:
    """Which frames `clip_pixels` takes of a file; the same errors, and only the first frame is decoded."""
    info = probe(path)
    step = info.fps / fps or 1.0  # 0: a picture
    offsets = [math.floor(index * step + 0.5) for index in range(frames)]
    if info.num_frames < offsets[-1] + 1:
        raise UserError(
            f"--video {path}: {info.num_frames} frames at {info.fps:g} per second are not the {frames} at {fps} "
            "that are needed; give a longer video"
        )
    start = 0 if end == "head" else info.num_frames - offsets[-1] - 1
    return [start + offset for offset in offsets]


def _frames(visual: object) -> np.ndarray:
    """uint8 [F, H, W, 3] of what lies in memory."""
    if hasattr(visual, "convert"):  # a PIL image
        return np.array(visual.convert("RGB"))[None]
    if isinstance(visual, list | tuple) and visual:
        pictures = [_frames(picture) for picture in visual]
        if len({picture.shape[1:] for picture in pictures}) > 1:
            raise UserError("the frames of the video differ in size: pass frames of one size")
        return np.concatenate(pictures)
    if isinstance(visual, Tensor):
        array = visual.detach().cpu()
        array = array.float() if array.is_floating_point() else array
        return _frames(array.movedim(-3, -1).numpy() if array.ndim in (3, 4) else array.numpy())
    if not isinstance(visual, np.ndarray):
        raise UserError(f"a {type(visual).__name__} is no picture: pass a path, a PIL image, an array or a tensor")
    array_FHWC = visual[None] if visual.ndim == 3 else visual
    if array_FHWC.ndim != 4 or array_FHWC.shape[-1] != 3 or 0 in array_FHWC.shape:
        raise UserError(
            f"pixels of shape {list(visual.shape)}: pass [H, W, 3] or [F, H, W, 3], a tensor with 3 before H and W"
        )
    if array_FHWC.dtype == np.uint8:
        return array_FHWC
    if not np.issubdtype(array_FHWC.dtype, np.floating):
        raise UserError(f"pixels of type {array_FHWC.dtype}: pass uint8, or floating point in [0, 1]")
    if not (array_FHWC.min() >= 0 and array_FHWC.max() <= 1):  # NaN is neither
        raise UserError(
            f"pixels from {array_FHWC.min():g} to {array_FHWC.max():g}: floating point pixels lie in [0, 1]"
        )
    return (array_FHWC * 255).round().astype(np.uint8)
