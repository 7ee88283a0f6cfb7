"""Clips as a page embeds them: the file as a data URI, and still frames that show it all at one glance.

T frames, H height, W width, C = 3 channels (RGB, uint8).
"""

from __future__ import annotations

import json
from base64 import b64encode
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from opensora_fast.errors import UserError
from opensora_fast.video_io import VideoInfo, probe, read_clip, read_video_metadata, resize_crop, write_image

STRIP_FRAMES = 8
STRIP_HEIGHT = 144  # pixels; smaller clips keep their size


@dataclass(frozen=True, kw_only=True)
class Clip:
    name: str
    info: VideoInfo
    video_uri: str
    frame_uris: list[str]  # PNGs, evenly spaced from the first frame on
    settings: dict[str, Any]  # how it was generated; empty when the file does not say

    @property
    def size(self) -> str:
        info = self.info
        return f"{info.width} × {info.height} pixels, {info.num_frames} frames at {info.fps:g} frames/s"


@dataclass(frozen=True)
class Reconstruction:
    name: str
    original: Clip
    reconstruction: Clip


def read_samples(folder: Path) -> list[Clip]:
    """The .mp4 files of a folder by name; none when there is no such folder. Raises UserError for an unreadable one."""
    return [_read(path) for path in sorted(folder.glob("*.mp4"))]


def read_reconstructions(folder: Path) -> list[Reconstruction]:
    """Pairs NAME-original.mp4 and NAME-reconstruction.mp4. Raises UserError when a file of a pair cannot be read."""
    pairs = []
    for original in sorted(folder.glob("*-original.mp4")):
        name = original.name.removesuffix("-original.mp4")
        pairs.append(Reconstruction(name, _read(original), _read(original.with_name(f"{name}-reconstruction.mp4"))))
    return pairs


def _read(path: Path) -> Clip:
    info = probe(path)
    return Clip(
        name=path.stem,
        info=info,
        video_uri=_data_uri("video/mp4", path),
        frame_uris=_frame_uris(path, info),
        settings=_settings(path),
    )


def _settings(path: Path) -> dict[str, Any]:
    comment = read_video_metadata(path).get("comment")
    if comment is None:
        return {}
    try:
        settings = json.loads(comment)
    except json.JSONDecodeError:
        settings = None
    if not isinstance(settings, dict):
        raise UserError(f"{path}: its comment holds no settings of `opensora-fast sample`; move the file elsewhere")
    return settings


def _frame_uris(path: Path, info: VideoInfo) -> list[str]:
    count = min(STRIP_FRAMES, info.num_frames)
    interval = (info.num_frames - 1) // (count - 1) if count > 1 else 1
    cover = (STRIP_HEIGHT, round(info.width * STRIP_HEIGHT / info.height)) if info.height > STRIP_HEIGHT else None
    frames_THWC = read_clip(path, 0, count, interval, cover=cover)
    video_CTHW = resize_crop(frames_THWC, frames_THWC.shape[1:3])
    with TemporaryDirectory() as folder:
        picture = Path(folder) / "frame.png"
        uris = []
        for image_CHW in video_CTHW.unbind(1):
            write_image(picture, image_CHW)
            uris.append(_data_uri("image/png", picture))
    return uris


def _data_uri(media_type: str, path: Path) -> str:
    return f"data:{media_type};base64,{b64encode(path.read_bytes()).decode()}"
