"""What `opensora-fast sample` is going to make: requests checked against the models and files that they name.

Nothing of the weights is read.  Each job has the record that its result will carry (`result_files`).
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from opensora_fast.autoencoder import Autoencoder
from opensora_fast.checkpoint_folder import find_checkpoint, is_run
from opensora_fast.conditions import reference_frames
from opensora_fast.config import config_from_dict
from opensora_fast.errors import UserError
from opensora_fast.flux import flux_files, image_multiple
from opensora_fast.model_folder import ModelFolder, autoencoder_layout, find_model
from opensora_fast.pipeline import nearest_ratio
from opensora_fast.reference_pixels import clip_frames
from opensora_fast.resolutions import video_size
from opensora_fast.result_files import digest, is_there, weights_state
from opensora_fast.sample_options import SETTING_OPTIONS, make_folder
from opensora_fast.sample_requests import (
    BrokenRow,
    Given,
    SampleRequest,
    flux_paints,
    given_files,
    read_requests,
    repeated,
)
from opensora_fast.sampling_settings import SamplingSettings, output_size
from opensora_fast.video_io import probe

PREVIEW = ".preview"  # in front of the ending of a preview's name


@dataclass(frozen=True)
class SampleJob:
    """A request, where its result goes, and what the result says of itself."""

    request: SampleRequest
    out: Path
    size: tuple[int, int]
    record: dict[str, Any]


@dataclass(frozen=True)
class SamplePlan:
    """What there is to do; `failed` are (name, reason) of requests that cannot be met."""

    jobs: list[SampleJob]
    done: list[Path]  # results of an earlier run
    failed: list[tuple[str, str]]


def find_parts(options: argparse.Namespace) -> ModelFolder:
    """The parts of the model that the options name; see `find_model`."""
    return find_model(
        options.checkpoint,
        weights=options.weights,
        t5=options.t5,
        clip=options.clip,
        autoencoder=options.autoencoder,
        flux=options.flux,
    )


def plan_requests(options: argparse.Namespace, parts: ModelFolder) -> SamplePlan:
    """What there is to do. Raises UserError for a request on the command line that cannot be met."""
    plan = SamplePlan([], [], [])
    make_folder(options)
    record = _Record(options, parts)
    layout = autoencoder_layout(parts.autoencoder)
    for request in _requests(options, parts):
        if isinstance(request, BrokenRow):
            plan.failed.append((request.name, str(request.error)))
            continue
        try:
            samples = repeated(request, options.num_samples)
        except UserError as error:
            samples = []
            _fail(options, plan, request.name, error)
        for sample in samples:
            try:
                job = _job(options, parts, layout, sample, record)
                if options.prompts is not None and is_there(job.out, job.record):
                    plan.done.append(job.out)
                else:
                    plan.jobs.append(job)
            except (UserError, OSError) as error:  # OSError: no name that a file can have
                _fail(options, plan, sample.name, error)
    return plan


def _fail(options: argparse.Namespace, plan: SamplePlan, name: str, error: Exception) -> None:
    """A request of the command line that cannot be met is an error; one of a file is noted."""
    if options.prompts is None:
        raise error
    plan.failed.append((name, str(error)))


def _requests(options: argparse.Namespace, parts: ModelFolder) -> Sequence[SampleRequest | BrokenRow]:
    chosen = {field: getattr(options, field) for field, _, _ in SETTING_OPTIONS.values()}
    settings = parts.defaults | {field: value for field, value in chosen.items() if value is not None}
    if options.resolution or options.aspect_ratio:
        settings |= {name: chosen[name] for name in ("height", "width")}  # not those of the recipe
    flux = parts.flux is not None
    if options.prompts is not None:
        return read_requests(
            options.prompts,
            settings,
            condition=options.condition,
            negative_prompt=options.negative_prompt,
            flux=flux,
        )
    chosen_settings = config_from_dict(SamplingSettings, settings)
    has = {name: getattr(options, name) is not None for name in ("image", "video")}
    if flux and not flux_paints(options.condition, chosen_settings.frames, **has):
        raise UserError(
            "--flux makes the image that a video begins with: drop --image, --video, --frames 1 and a --condition but "
            "i2v_head and i2v_loop, or drop --flux"
        )
    given = given_files(options.condition, options.image, options.last, options.video, painted=flux)
    return [
        SampleRequest(
            name=options.out.stem,
            prompt=options.prompt,
            negative_prompt=options.negative_prompt,
            given=given,
            settings=chosen_settings,
        )
    ]


class _Record:
    """What results say of the models and files that they are made with; each is looked at once."""

    def __init__(self, options: argparse.Namespace, parts: ModelFolder) -> None:
        autoencoder = Path(parts.autoencoder["weights"])
        models = {
            "checkpoint": parts.path,
            "autoencoder": find_checkpoint(autoencoder) if is_run(autoencoder) else autoencoder,
            "t5": Path(parts.text["t5"]),
            "clip": Path(parts.text["clip"]),
        }
        switches = {name: True for name in ("fp8", "tensorrt") if getattr(options, name)}
        self.models = _states(models) | {"weights": options.weights} | switches
        self.flux: dict[str, Any] = {}
        if parts.flux is not None:
            transformer, small = flux_files(parts.flux)
            self.flux = _states({"flux": transformer, "flux_autoencoder": small})
            self.flux |= {"flux_resolution": options.flux_resolution}
            self.flux_multiple = image_multiple(parts.flux)
        self._digest = cache(digest)

    def files(self, given: Given) -> dict[str, str]:
        """Of the files that a request gives."""
        places = {name: str(path.resolve()) for name, path in given.files().items()}
        return places | {f"{name}_contents": self._digest(path) for name, path in given.files().items()}


def _states(weights: dict[str, Path]) -> dict[str, Any]:
    places = {name: str(path.resolve()) for name, path in weights.items()}
    return places | {f"{name}_contents": weights_state(path) for name, path in weights.items()}


def _job(
    options: argparse.Namespace,
    parts: ModelFolder,
    layout: Autoencoder,
    request: SampleRequest,
    known: _Record,
) -> SampleJob:
    """Check a request against the models and the files that it names."""
    settings, given = request.settings, request.given
    out = _output_file(options, request)
    size = output_size(parts.config, layout, settings, given.condition)
    for name in ("image", "last"):
        if name in given.files():
            probe(given.files()[name])
    if given.video is not None:
        head, tail = reference_frames(given.condition, layout)
        clip_frames(given.video, head or tail, settings.fps, "head" if head else "tail")
    record: dict[str, Any] = {
        "prompt": request.prompt,
        **known.models,
        "condition": given.condition,
        **known.files(given),
        **dataclasses.asdict(settings),
    }
    if request.negative_prompt is not None:
        record["negative_prompt"] = request.negative_prompt
    if parts.flux is not None and given.image is None and given.condition in ("i2v_head", "i2v_loop"):
        video_size(options.flux_resolution, nearest_ratio(*size), known.flux_multiple, training=True)
        record |= known.flux
    return SampleJob(request, out, size, record)


def _output_file(options: argparse.Namespace, request: SampleRequest) -> Path:
    frames = request.settings.frames
    suffix, kind = (".png", "an image") if frames == 1 else (".mp4", "a video")
    if options.prompts is None and options.out.suffix != suffix:
        raise UserError(f"--out {options.out}: {kind} (frames={frames}) is written as {suffix}; end the name with that")
    folder = options.out.parent if options.prompts is None else options.out
    out = folder / f"{request.name}{suffix}"
    if request.name.endswith(PREVIEW):
        raise UserError(f"{out}: names that end in {PREVIEW} are those of previews; choose another")
    if out.is_dir():
        raise UserError(f"{out}: is a folder; choose another name for the result")
    return out
