"""`opensora-fast sample`: a trained checkpoint and a prompt become a video or an image file.

The request's names, sizes and files are checked before the transformer is loaded.  The file carries the request as JSON
in its `comment`; the same request on the same machine makes the same file again.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from opensora_fast.arguments import Parser
from opensora_fast.autoencoder import Autoencoder
from opensora_fast.checkpoint_folder import (
    find_checkpoint,
    load_autoencoder,
    load_mmdit,
    load_text_encoders,
    read_recipe,
)
from opensora_fast.conditions import reference_frames
from opensora_fast.config import MMDiTConfig, config_from_dict
from opensora_fast.errors import UserError
from opensora_fast.sampling import sample
from opensora_fast.sampling_settings import SamplingSettings, output_size
from opensora_fast.video_io import probe, read_clip, read_image, resize_crop, write_image, write_video

# option -> (field of SamplingSettings, help)
_SETTINGS = {
    "--resolution": ("resolution", "area by name: 256px is that of 256 x 256 pixels"),
    "--aspect-ratio": ("aspect_ratio", "width:height, such as 16:9"),
    "--frames": ("frames", "frames to make; 1 makes an image"),
    "--fps": ("fps", "frames per second"),
    "--steps": ("steps", "steps from noise to video"),
    "--guidance": ("guidance", "how strongly the prompt guides; 1 is no guidance"),
    "--guidance-image": ("guidance_image", "how strongly a given image or video guides; 1 is no guidance"),
    "--motion-score": ("motion_score", "how much moves, from 1 to 15"),
    "--seed": ("seed", "another seed makes another video"),
}


def main(argv: list[str]) -> int:
    """Returns 0 when the file is written. Raises UserError for a request that cannot be met; argparse exits with 2."""
    options = _parser().parse_args(argv)
    step_folder = find_checkpoint(options.checkpoint)
    recipe = read_recipe(step_folder)
    if "model" not in recipe:
        raise UserError(f"checkpoint {step_folder} holds no diffusion transformer: name a diffusion run")
    settings = _settings(options, recipe.get("sampling_defaults", {}))
    _prepare_output(options.out, settings.frames)
    condition = _condition(options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    autoencoder = load_autoencoder(recipe["autoencoder"], device, dtype)
    size = output_size(config_from_dict(MMDiTConfig, recipe["model"]), autoencoder, settings, condition)
    head_BCFHW, tail_BCFHW = _references(options, condition, autoencoder, settings.fps, size)
    text = load_text_encoders(recipe["text"], device, dtype)
    model = load_mmdit(step_folder, options.weights, device, dtype)
    with _progress_bar(settings.steps) as on_step:
        video_BCTHW = sample(
            model,
            autoencoder,
            text,
            [options.prompt],
            settings,
            condition=condition,
            head_BCFHW=head_BCFHW,
            tail_BCFHW=tail_BCFHW,
            on_step=on_step,
        )
    _write(options.out, video_BCTHW[0], settings, _request(options, step_folder, condition))
    print(f"{options.out}: {settings.frames} frames of {size[1]} x {size[0]} from {step_folder}")
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="opensora-fast sample", description="Make a video (.mp4, H.264) or an image (.png) from a prompt."
    )
    parser.add_argument(
        "--checkpoint", required=True, type=Path, help="a run of `opensora-fast train`, or one step-N of it"
    )
    parser.add_argument("--prompt", required=True, help="what to show")
    parser.add_argument("--out", required=True, type=Path, help="file to write: .mp4, or .png with --frames 1")
    parser.add_argument("--image", type=Path, help="image that the video begins with")
    parser.add_argument("--last", type=Path, help="image that the video ends with")
    parser.add_argument(
        "--video", type=Path, help="video whose first 33 frames (32 with a Video DC-AE) the result begins with"
    )
    parser.add_argument(
        "--weights", choices=("ema", "model"), help="moving average or last weights; default: ema where kept"
    )
    defaults = SamplingSettings()
    for option, (field, purpose) in _SETTINGS.items():
        value = getattr(defaults, field)
        parser.add_argument(
            option, dest=field, type=type(value), help=f"{purpose} (default: the checkpoint's recipe, else {value})"
        )
    return parser


def _settings(options: argparse.Namespace, defaults: dict) -> SamplingSettings:
    chosen = {field: getattr(options, field) for field, _ in _SETTINGS.values()}
    given = {field: value for field, value in chosen.items() if value is not None}
    return config_from_dict(SamplingSettings, defaults | given)


def _prepare_output(out: Path, frames: int) -> None:
    suffix, kind = (".png", "an image") if frames == 1 else (".mp4", "a video")
    if out.suffix != suffix:
        raise UserError(f"--out {out}: {kind} (frames={frames}) is written as {suffix}; end the name with that")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; choose another folder") from error


def _condition(options: argparse.Namespace) -> str:
    """The condition's name for the files given; each of them is looked for."""
    if options.video and (options.image or options.last):
        raise UserError("--video cannot be combined with --image or --last; give one or the other")
    for option in ("image", "last", "video"):
        path = getattr(options, option)
        if path and not path.is_file():
            raise UserError(f"--{option} {path}: no such file")
    if options.video:
        return "v2v_head"
    names = {(False, False): "t2v", (True, False): "i2v_head", (False, True): "i2v_tail", (True, True): "i2v_loop"}
    return names[bool(options.image), bool(options.last)]


def _references(
    options: argparse.Namespace, condition: str, autoencoder: Autoencoder, fps: int, size: tuple[int, int]
) -> tuple[Tensor | None, Tensor | None]:
    """What the video begins and ends with, each [1, 3, F, H, W] in [-1, 1] at its size, or None."""
    if options.video:
        head_frames, _ = reference_frames(condition, autoencoder)
        return resize_crop(_first_frames(options.video, head_frames, fps, size), size)[None], None
    head, tail = (
        resize_crop(read_image(path, cover=size), size)[None] if path else None
        for path in (options.image, options.last)
    )
    return head, tail


def _first_frames(path: Path, num_frames: int, fps: int, size: tuple[int, int]) -> np.ndarray:
    """The first frames of a video as uint8 [F, H, W, 3], thinned out as in training to at most `fps` per second."""
    info = probe(path)
    interval = max(1, math.ceil(info.fps / fps))
    if info.num_frames < (num_frames - 1) * interval + 1:
        raise UserError(
            f"--video {path}: {info.num_frames} frames at {info.fps:g} per second are not the {num_frames} at {fps} "
            "that are needed; give a longer video"
        )
    return read_clip(path, 0, num_frames, interval, cover=size)


def _request(options: argparse.Namespace, step_folder: Path, condition: str) -> dict[str, object]:
    files = {name: str(getattr(options, name)) for name in ("image", "last", "video") if getattr(options, name)}
    return {
        "prompt": options.prompt,
        "checkpoint": str(step_folder),
        "weights": options.weights,
        "condition": condition,
        **files,
    }


def _write(out: Path, video_CTHW: Tensor, settings: SamplingSettings, request: dict[str, object]) -> None:
    metadata = {"comment": json.dumps(request | dataclasses.asdict(settings))}
    if settings.frames == 1:
        write_image(out, video_CTHW, metadata)
    else:
        write_video(out, video_CTHW, settings.fps, metadata)


@contextmanager
def _progress_bar(steps: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr where that is a terminal; yields what to call with the number of steps done."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("sampling", total=steps)
        yield lambda done: bar.update(task, completed=done)
