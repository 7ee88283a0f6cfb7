"""Which library decodes video: torchcodec where it can be loaded, PyAV otherwise.

Files are opened and their frames' times looked up with PyAV either way.  torchcodec then decodes and scales the frames
shown at those times, in C++; a frame that it shows at another time than the one asked for, as happens with damaged
files, is an error and never training data.  It does not tell frames that were patched up where data was missing;
PyAV's frames do.  Images are PyAV's in any case, and so are streams without a time for each frame and containers
without an index: in these (transport streams) torchcodec misses the first frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from opensora_fast.errors import UserError
from opensora_fast.frame_sizes import covering_size

DecoderName = Literal["torchcodec", "PyAV"]

TORCHCODEC_FORMATS = ("mp4", "matroska")
"""FFmpeg's names of the containers that torchcodec reads; each is part of a longer one."""


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A choice, and why it was made."""

    name: DecoderName
    reason: str


@lru_cache(maxsize=1)
def choose_decoder() -> Decoder:
    """Tries to load torchcodec, once."""
    try:
        import torchcodec.decoders
    except ModuleNotFoundError:
        return Decoder(name="PyAV", reason="torchcodec is not installed")
    except (ImportError, OSError, RuntimeError) as error:
        complaint = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        return Decoder(name="PyAV", reason=f"torchcodec cannot be loaded: {complaint}")
    return Decoder(name="torchcodec", reason=f"torchcodec {torchcodec.__version__} is installed")


def decode_with_torchcodec(
    path: str | Path, times: Sequence[int], time_base: Fraction, *, even: bool, cover: tuple[int, int] | None
) -> np.ndarray:
    """The frames shown at `times` (ascending, in units of `time_base`): uint8 [T, H, W, 3], upright.

    even: all frames of the file are equally long, so that torchcodec need not read it through to find one.
    cover: (height, width), as in `video_io.read_clip`.
    Raises UserError naming the file when a frame does not decode, or comes with another time.
    """
    from torchcodec.decoders import VideoDecoder
    from torchcodec.transforms import Resize

    seconds = np.array([float(time * time_base) for time in times])
    tick = float(time_base)
    try:
        transforms = []
        if cover:
            shown = VideoDecoder(str(path), seek_mode="approximate").metadata
            if not shown.height or not shown.width:
                raise UserError(f"{path}: states no frame size; re-encode it or leave it out")
            transforms = [Resize(covering_size(shown.height, shown.width, cover))]
        decoder = VideoDecoder(
            str(path),
            dimension_order="NHWC",
            num_ffmpeg_threads=1,  # a loader runs one decoder per core
            seek_mode="approximate" if even else "exact",
            transforms=transforms,
        )
        batch = decoder.get_frames_played_at((seconds + tick / 4).tolist())  # inside the frame, whatever is rounded
    except (RuntimeError, IndexError, ValueError) as error:
        complaint = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: cannot be read: {complaint}; replace it or leave it out") from error
    if np.abs(batch.pts_seconds.numpy() - seconds).max() > tick / 2:
        raise UserError(f"{path}: a frame of the range asked for is damaged; replace it or leave it out")
    return batch.data.numpy()
