"""Video and image files in and out, through PyAV; importing this takes no torch, which decoding does without.

Reading decodes only what is asked for: seek to the key frame before the range, decode until the last wanted frame.
Frame i is the i-th frame in display order.  Its time is looked up in the stream's own list of times, so streams that
start late, are reordered (B-frames) or run at a varying rate give the same frames as decoding from the beginning.

Shapes   T frames, H height, W width, C = 3 channels (RGB).  Decoded frames are uint8 [T, H, W, C]; the model's are
         float32 [C, T, H, W] in [-1, 1].  Times are integers in units of the stream's time base.
Scaling  a triangle filter that widens when shrinking ("bilinear, antialiased").  Clips usually shrink 3 to 8 times,
         where plain bilinear interpolation reads 4 of 9 to 64 source pixels and turns fine texture into flicker that
         a model would learn.  With `cover`, swscale scales while it converts YUV to RGB: 49 frames of 720p to 256px
         take 0.07 s and 10 MB instead of 0.90 s and 135 MB through full-size RGB (one core); the two agree within
         0.3 of 255 on average.
Pixels   are taken as square, and rotation flags (phone videos) are applied.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from opensora_fast.errors import UserError
from opensora_fast.frame_sizes import centre, covering_size
from opensora_fast.video_decoder import TORCHCODEC_FORMATS, DecoderName, decode_with_torchcodec

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream
    from torch import Tensor

Allocate = Callable[[int, int, int], np.ndarray]
"""(frames, height, width) -> uint8 [frames, h, w, 3] to be filled; where h or w is smaller, the centre is kept."""

OnStage = Callable[[str], None]
"""Told "open", "seek" and "decode" as each begins."""


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What a file holds.  fps in frames per second and duration in seconds, both 0 for a still image (num_frames 1)."""

    num_frames: int
    height: int
    width: int
    fps: float
    duration: float


def probe(path: str | Path) -> VideoInfo:
    """Measure a video or an image; decodes its first frame only.

    Frames are counted from the container's index where that is complete, otherwise by walking its packets.
    Raises UserError for a file that is missing, is not a video or image, or whose first frame does not decode.
    """
    with _open(path) as (container, stream):
        num_frames = len(_frame_times(container, stream) or _packet_times(container, stream))
        container.seek(0)
        first = next(container.decode(stream), None)
        if num_frames == 0 or first is None:
            raise UserError(f"{path}: holds no frame; re-encode it or leave it out")
        height, width = _shown_size(first)
        if num_frames == 1:
            return VideoInfo(num_frames=1, height=height, width=width, fps=0.0, duration=0.0)
        if not stream.average_rate:
            raise UserError(f"{path}: states no frame rate; re-encode it with one")
        fps = float(stream.average_rate)
        return VideoInfo(num_frames=num_frames, height=height, width=width, fps=fps, duration=num_frames / fps)


def new_array(frames: int, height: int, width: int) -> np.ndarray:
    """The `Allocate` that takes memory of its own."""
    return np.empty((frames, height, width, 3), np.uint8)


def ignore_stage(stage: str) -> None:
    """The `OnStage` of who is not interested."""


def read_clip(
    path: str | Path,
    start: int,
    num_frames: int,
    interval: int = 1,
    *,
    cover: tuple[int, int] | None = None,
    decoder: DecoderName = "PyAV",
    allocate: Allocate = new_array,
    on_stage: OnStage = ignore_stage,
) -> np.ndarray:
    """Frames start, start + interval, ... of a video: uint8 [num_frames, H, W, 3], the array that `allocate` gave.

    cover: (height, width); frames come scaled, in their own ratio, to the smallest size that covers it (see module).
    decoder: see `video_decoder`; torchcodec is not used for a stream without a time for each frame.
    Raises UserError for an unreadable file, for frames past its end, and for a damaged frame inside the range.
    """
    if start < 0 or num_frames < 1 or interval < 1:
        raise UserError(
            f"{path}: cannot read {num_frames} frames from {start} at interval {interval}: "
            "start must be at least 0, the others at least 1"
        )
    wanted = range(start, start + num_frames * interval, interval)
    on_stage("open")
    with _open(path) as (container, stream):
        on_stage("seek")
        times = _frame_times(container, stream)
        if times is None:
            frames: Iterable[tuple[int | None, VideoFrame]] = enumerate(_decode_all(container, stream))
            slots = {index: slot for slot, index in enumerate(wanted)}
        else:
            if wanted[-1] >= len(times):
                raise UserError(f"{path}: frame {wanted[-1]} was asked for but it has {len(times)}; shorten the range")
            if decoder == "torchcodec" and any(name in container.format.name for name in TORCHCODEC_FORMATS):
                assert stream.time_base is not None  # every demuxed stream has one
                on_stage("decode")
                pictures_THWC = decode_with_torchcodec(
                    path,
                    [times[index] for index in wanted],
                    stream.time_base,
                    even=isinstance(times, range),
                    cover=cover,
                )
                clip_THWC = allocate(*pictures_THWC.shape[:3])
                clip_THWC[:] = centre(pictures_THWC, *clip_THWC.shape[1:3])
                return clip_THWC
            frames = ((frame.pts, frame) for frame in _decode_from(container, stream, times[start], times[0]))
            slots = {times[index]: slot for slot, index in enumerate(wanted)}
        return _collect(path, frames, slots, cover, allocate, on_stage)


def read_image(
    path: str | Path,
    *,
    cover: tuple[int, int] | None = None,
    allocate: Allocate = new_array,
    on_stage: OnStage = ignore_stage,
) -> np.ndarray:
    """One picture: uint8 [1, H, W, 3]; the first frame if the file is a video.  Transparency is dropped.

    cover, allocate and on_stage as in read_clip.  Raises UserError for an unreadable file.
    """
    on_stage("open")
    with _open(path) as (container, stream):
        return _collect(path, enumerate(container.decode(stream)), {0: 0}, cover, allocate, on_stage)


def resize_crop(frames_THWC: np.ndarray, size: tuple[int, int]) -> Tensor:
    """Scale frames, in their own ratio, until they cover size = (height, width), and cut its centre out.

    uint8 [T, H, W, 3] -> float32 [3, T, height, width] in [-1, 1].  Bilinear with antialiasing (see module).
    """
    return to_signed(resize_crop_uint8(frames_THWC, size))


def resize_crop_uint8(frames_THWC: np.ndarray, size: tuple[int, int]) -> Tensor:
    """`resize_crop` before its last step, a quarter of the bytes: uint8 [3, T, height, width]."""
    import torch
    import torch.nn.functional as F

    height, width = size
    scaled_height, scaled_width = covering_size(frames_THWC.shape[1], frames_THWC.shape[2], size)
    frames_TCHW = torch.from_numpy(frames_THWC).permute(0, 3, 1, 2)
    if (scaled_height, scaled_width) != frames_THWC.shape[1:3]:
        # uint8 in, uint8 out: torch's vectorised path, 60 times faster than float32 and at most one grey level away.
        frames_TCHW = F.interpolate(frames_TCHW, (scaled_height, scaled_width), mode="bilinear", antialias=True)
    top, left = (scaled_height - height) // 2, (scaled_width - width) // 2
    return frames_TCHW[:, :, top : top + height, left : left + width].transpose(0, 1).contiguous()


def to_signed(pixels: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [-1, 1], any shape."""
    return pixels.float() / 127.5 - 1


def write_video(path: str | Path, video_CTHW: Tensor, fps: float, metadata: Mapping[str, str] | None = None) -> None:
    """Write an .mp4 (H.264, yuv420p, BT.709, crf 18, index in front); equal input gives equal bytes.

    video_CTHW: float [3, T, H, W] in [-1, 1], H and W even.  metadata: any names, among them "title" and "comment";
    `read_video_metadata` gives them back.  The file appears whole or not at all.
    Raises UserError for another suffix, a size that H.264 cannot take, or a folder that cannot be written.
    """
    import av
    from av.video.reformatter import ColorRange, Colorspace

    path = Path(path)
    if path.suffix != ".mp4":
        raise UserError(f"{path}: videos are written as .mp4; change the name's ending")
    height, width = video_CTHW.shape[2:]
    if video_CTHW.shape[1] < 1 or height % 2 or width % 2:
        raise UserError(f"{path}: H.264 takes one frame or more of even height and width, not {list(video_CTHW.shape)}")
    rate = Fraction(fps).limit_denominator(1001)
    # use_metadata_tags: without it the muxer drops every name but the handful that iTunes knows.
    options = {"movflags": "faststart+use_metadata_tags", "fflags": "bitexact"}
    with replacing(path) as part, av.open(part, "w", format="mp4", options=options) as container:
        container.metadata.update(metadata or {})
        # Without mbtree: its vector code reads past narrow pictures, and the bytes would depend on what memory held.
        stream = container.add_stream("libx264", rate=rate, options={"crf": "18", "x264-params": "mbtree=0"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        coder = stream.codec_context
        coder.thread_count = 1  # x264's rate control depends on the number of threads, and so would the bytes
        coder.colorspace, coder.color_range = Colorspace.ITU709, ColorRange.MPEG
        coder.color_primaries = coder.color_trc = 1  # BT.709 in both of FFmpeg's tables
        for index, picture_HWC in enumerate(_to_uint8(video_CTHW)):
            frame = av.VideoFrame.from_ndarray(picture_HWC, format="rgb24").reformat(
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                interpolation=_SCALER,
                threads=1,
            )
            frame.pts, frame.time_base = index, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def read_video_metadata(path: str | Path) -> dict[str, str]:
    """The names and values that a container carries, among them those given to `write_video`."""
    with _open(path) as (container, _):
        return dict(container.metadata)


def write_image(path: str | Path, image_CHW: Tensor, metadata: Mapping[str, str] | None = None) -> None:
    """Write a .png with UTF-8 text records (iTXt).

    image_CHW: float [3, H, W] in [-1, 1]; a video of one frame, [3, 1, H, W], is taken too.
    Raises UserError for another suffix, another shape, or a folder that cannot be written.
    """
    path = Path(path)
    image_CTHW = image_CHW.unsqueeze(1) if image_CHW.ndim == 3 else image_CHW
    if path.suffix != ".png" or image_CTHW.shape[:2] != (3, 1):
        raise UserError(f"{path}: images are written as .png from [3, H, W], not {list(image_CHW.shape)}")
    picture_HWC = _to_uint8(image_CTHW)[0]
    height, width, _ = picture_HWC.shape
    rows = b"".join(b"\0" + row.tobytes() for row in picture_HWC)  # filter type 0 in front of each row
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))]  # 8 bits, RGB
    chunks += [(b"iTXt", name.encode() + b"\0\0\0\0\0" + value.encode()) for name, value in (metadata or {}).items()]
    chunks += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    with replacing(path) as part, open(part, "wb") as file:
        file.write(_PNG)
        for kind, data in chunks:
            file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))


def read_image_metadata(path: str | Path) -> dict[str, str]:
    """The UTF-8 text records of a .png, among them those given to `write_image`. Raises UserError for another file."""
    path = Path(path)
    try:
        data = path.read_bytes()
        if data[:8] != _PNG:
            raise UserError(f"{path}: is no .png; replace it or leave it out")
        found, place = {}, 8
        while place < len(data):
            length, kind = struct.unpack(">I4s", data[place : place + 8])
            body = data[place + 8 : place + 8 + length]
            name, _, rest = body.partition(b"\0")
            if kind == b"iTXt" and rest[:4] == bytes(4):  # not compressed, no language, no translated name
                found[name.decode()] = rest[4:].decode()
            place += 12 + length
    except (OSError, struct.error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); replace it or leave it out") from error
    return found


_PNG = b"\x89PNG\r\n\x1a\n"

# SWS_BILINEAR | FULL_CHR_H_INT | ACCURATE_RND | BITEXACT: the triangle filter, full-width chroma, same bits on any CPU.
_SCALER = 0x2 | 0x2000 | 0x40000 | 0x80000


@contextmanager
def _open(path: str | Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """A file and its first video stream; whatever FFmpeg reports inside becomes a UserError that names the file."""
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UserError(f"{path}: holds no video stream; give a video or image file")
            stream = container.streams.video[0]
            # One thread, since a loader runs one decoder per core: 49 frames of 720p from a random place take 0.24 CPU
            # seconds with one thread, 0.25 with thread_type AUTO, and on two busy cores as long by the clock.
            stream.codec_context.thread_count = 1
            yield container, stream
    except (av.FFmpegError, OSError) as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}; replace it or leave it out") from error


@contextmanager
def replacing(path: Path) -> Iterator[str]:
    """The name of an unfinished file beside `path`, which takes its place when all went well.

    Raises UserError when it cannot be written.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        yield str(part)
        part.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}; choose another place") from error
    finally:
        part.unlink(missing_ok=True)


def _frame_times(container: InputContainer, stream: VideoStream) -> Sequence[int] | None:
    """Display time of every frame, ascending; None where the stream does not give each frame a time of its own."""
    return _times_from_index(stream) or _times_from_packets(container, stream)


def _times_from_index(stream: VideoStream) -> Sequence[int] | None:
    """Times from an mp4-like index, which is in memory once the file is open; None where it does not settle them.

    The index lists decoding times.  When those are evenly spaced so are the display times, from the stream's first on.
    """
    entries = stream.index_entries
    if "mp4" not in stream.container.format.name or stream.start_time is None:
        return None
    if len(entries) < 2 or len(entries) != stream.frames:
        return None
    first, second = entries[0].timestamp, entries[1].timestamp
    step = second - first
    if step < 1 or any(
        entry.is_discard or entry.timestamp != first + index * step for index, entry in enumerate(entries)
    ):
        return None
    return range(stream.start_time, stream.start_time + len(entries) * step, step)


def _times_from_packets(container: InputContainer, stream: VideoStream) -> Sequence[int] | None:
    # AVI stores no display times and MPEG program streams only some: FFmpeg guesses the rest, wrong where frames are
    # reordered or reading begins in the middle.
    if container.format.name in ("avi", "mpeg"):
        return None
    times = _packet_times(container, stream)
    distinct = {time for time in times if time is not None}
    return sorted(distinct) if len(distinct) == len(times) else None


def _packet_times(container: InputContainer, stream: VideoStream) -> list[int | None]:
    """Display times in file order; reads the file through but decodes nothing."""
    container.seek(0)
    return [packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard]


def _decode_all(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    container.seek(0)
    yield from container.decode(stream)


def _decode_from(container: InputContainer, stream: VideoStream, time: int, earliest: int) -> Iterator[VideoFrame]:
    """Frames in display order, starting from a key frame that is shown at `time` or before."""
    # Seeking compares decoding times, so the key frame found may be shown after `time`: then step back further.
    assert stream.time_base is not None  # every demuxed stream has one
    second = round(1 / stream.time_base)
    back = 0
    while time - back > earliest:
        container.seek(time - back, stream=stream)
        frames = container.decode(stream)
        first = next(frames, None)
        if first is not None and first.pts is not None and first.pts <= time:
            yield first
            yield from frames
            return
        back = 2 * back or second
    yield from _decode_all(container, stream)


def _collect(
    path: str | Path,
    frames: Iterable[tuple[int | None, VideoFrame]],
    slots: Mapping[int, int],
    cover: tuple[int, int] | None,
    allocate: Allocate,
    on_stage: OnStage,
) -> np.ndarray:
    """RGB of the frames whose key is in `slots` (key -> place in the result); stops at the last of them."""
    from av.video.reformatter import VideoReformatter

    scaler = VideoReformatter()  # one for the clip: it keeps its filter tables
    clip_THWC: np.ndarray | None = None
    filled = 0
    for number, (key, frame) in enumerate(frames):
        if number == 0:
            on_stage("decode")
        if key is None or key not in slots:
            continue
        slot = slots[key]
        if frame.is_corrupt:
            raise UserError(f"{path}: frame {slot} of the range asked for is damaged; replace it or leave it out")
        turns = _quarter_turns(frame)
        if clip_THWC is None:
            height, width = _shown_size(frame)
            if cover:
                height, width = covering_size(height, width, cover)
            clip_THWC = allocate(len(slots), height, width)
        rows, columns = (width, height) if turns % 2 else (height, width)
        plane = scaler.reformat(frame, columns, rows, "rgb24", interpolation=_SCALER, threads=1).planes[0]
        # A view: lines are padded in FFmpeg's memory, and the one copy made is that into the clip.
        lines = np.frombuffer(memoryview(plane), np.uint8).reshape(rows, plane.line_size)[:, : 3 * columns]
        upright_1HWC = np.rot90(lines.reshape(rows, columns, 3), turns)[None]
        clip_THWC[slot] = centre(upright_1HWC, *clip_THWC.shape[1:3])[0]
        filled += 1
        if filled == len(slots):
            return clip_THWC
    raise UserError(f"{path}: only {filled} of {len(slots)} frames decode; replace it or leave it out")


def _quarter_turns(frame: VideoFrame) -> int:
    """Counter-clockwise quarter turns that set a frame upright."""
    return round(frame.rotation / 90) % 4


def _shown_size(frame: VideoFrame) -> tuple[int, int]:
    return (frame.width, frame.height) if _quarter_turns(frame) % 2 else (frame.height, frame.width)


def _to_uint8(video_CTHW: Tensor) -> np.ndarray:
    """float [-1, 1] -> uint8 [T, H, W, 3], values outside cut off."""
    import torch

    video_THWC = video_CTHW.detach().float().permute(1, 2, 3, 0)
    return ((video_THWC + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).contiguous().cpu().numpy()
