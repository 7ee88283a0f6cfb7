"""The options of `opensora-fast sample`, and what they may be together."""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import NamedTemporaryFile

from opensora_fast.arguments import Parser
from opensora_fast.conditions import CONDITIONS
from opensora_fast.errors import UserError
from opensora_fast.sample_requests import check_text
from opensora_fast.sampling_settings import SamplingSettings

# option -> (field of SamplingSettings, type, help)
SETTING_OPTIONS = {
    "--resolution": ("resolution", str, "area by name: 256px is that of 256 x 256 pixels"),
    "--aspect-ratio": ("aspect_ratio", str, "width:height, such as 16:9"),
    "--height": ("height", int, "pixels; with --width, in place of --resolution and --aspect-ratio"),
    "--width": ("width", int, "pixels"),
    "--frames": ("frames", int, "frames to make; 1 makes an image"),
    "--fps": ("fps", int, "frames per second"),
    "--steps": ("steps", int, "steps from noise to video"),
    "--guidance": ("guidance", float, "how strongly the prompt guides; 1 is no guidance"),
    "--guidance-image": ("guidance_image", float, "how strongly a given image or video guides; 1 is no guidance"),
    "--motion-score": ("motion_score", float, "how much moves, from 1 to 15"),
    "--seed": ("seed", int, "another seed makes another video"),
}


def parser() -> Parser:
    """The command line's options; paths are Paths, and what is not given is None or False."""
    options = Parser(
        prog="opensora-fast sample",
        description="Make videos (.mp4, H.264) or images (.png) from prompts.",
        allow_abbrev=False,
    )
    what = options.add_argument_group("what to make")
    what.add_argument("--prompt", help="what to show")
    what.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="a .csv or .jsonl file with a request a row: text or prompt, and optionally neg, ref (the image or video "
        "that is given; two images separated by ';'), last, video, condition, name, and the settings below; what is "
        "made already is left alone",
    )
    what.add_argument(
        "--out",
        required=True,
        type=Path,
        help=".mp4, or .png with --frames 1; with --prompts the folder of the results",
    )
    what.add_argument("--negative-prompt", metavar="TEXT", help="what to keep away from")
    what.add_argument(
        "--num-samples",
        type=int,
        default=1,
        metavar="K",
        help="samples of each request: NAME_0, NAME_1, ..., a seed each",
    )
    what.add_argument("--image", type=Path, help="image that the video begins with")
    what.add_argument("--last", type=Path, help="image that the video ends with")
    what.add_argument(
        "--video", type=Path, help="video that the result goes on from (its first frames) or leads to (its last)"
    )
    what.add_argument(
        "--condition",
        help=f"how they are used: {', '.join(CONDITIONS)} (default: as the files say; of a video v2v_head, which gives "
        "its first 33 frames, 32 with a Video DC-AE; _easy: 65, or 64)",
    )
    defaults = SamplingSettings()
    for option, (field, kind, purpose) in SETTING_OPTIONS.items():
        value = getattr(defaults, field)
        default = "" if value is None else f" (default: the checkpoint's, else {value})"
        what.add_argument(option, dest=field, type=kind, help=purpose + default)

    model = options.add_argument_group("with which model")
    model.add_argument(
        "--checkpoint",
        required=True,
        type=Path,
        help="a run of `opensora-fast train` or one step-N of it; or released weights: their folder, or the "
        "transformer's file",
    )
    model.add_argument(
        "--weights", choices=("ema", "model"), help="of a run: moving average or last weights; default: ema where kept"
    )
    for option, purpose in (
        ("--t5", "folder of the T5 encoder"),
        ("--clip", "folder of the CLIP text encoder"),
        ("--autoencoder", "weights or run of the video autoencoder"),
    ):
        model.add_argument(option, type=Path, help=f"{purpose}, in place of the checkpoint's own")
    model.add_argument(
        "--flux",
        type=Path,
        metavar="DIR",
        help="FLUX.1-dev: makes the image that the video begins with (released or diffusers)",
    )
    model.add_argument("--flux-resolution", default="768px", metavar="NAME", help="area of that image (default: 768px)")

    how = options.add_argument_group("how")
    how.add_argument("--nproc", type=int, metavar="N", help="work on N GPUs of this machine together")
    how.add_argument(
        "--memory-budget",
        metavar="BYTES",
        help="stay within so much GPU memory, as 24GiB: what does not fit waits on the host",
    )
    how.add_argument("--fp8", action="store_true", help="keep the blocks' weights in 8 bits; changes the result")
    how.add_argument("--compile", action="store_true", help="compile the blocks: a wait before the first video")
    how.add_argument(
        "--tensorrt", action="store_true", help="decode and read prompts through TensorRT (extra tensorrt)"
    )
    how.add_argument(
        "--preview-every", type=int, metavar="K", help="write the middle frame as NAME.preview.png every K steps"
    )
    return options


def check_options(options: argparse.Namespace) -> None:
    """Raise UserError for options that do not go together."""
    for name in ("num_samples", "nproc", "preview_every"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    if (options.prompt is None) == (options.prompts is None):
        raise UserError("give --prompt for one request, or --prompts for a file of them")
    if options.prompt is not None and not options.prompt.strip():
        raise UserError("--prompt is empty: write what to show")
    for name in ("prompt", "negative_prompt"):
        check_text(f"--{name.replace('_', '-')}", getattr(options, name) or "")
    if options.prompts is not None:
        for name in ("image", "last", "video"):
            if getattr(options, name):
                raise UserError(
                    f"--{name} goes with --prompt; in {options.prompts} the columns ref, last and video name files"
                )
        if options.out.suffix in (".mp4", ".png") or options.out.is_file():
            raise UserError(f"--out {options.out}: is the folder of what --prompts makes; name a folder")


def make_folder(options: argparse.Namespace) -> None:
    """Make the folder of --out. Raises UserError where no file can be written in it."""
    folder = options.out if options.prompts is not None else options.out.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=folder, prefix=".", suffix=".part") as file:
            file.write(b"0")  # a disk that is full takes a name
            file.flush()
    except OSError as error:
        raise UserError(f"--out {options.out}: {error.strerror}; choose another folder") from error
