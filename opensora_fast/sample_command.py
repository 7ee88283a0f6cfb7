"""`opensora-fast sample`: prompts become video or image files.

    sample --checkpoint ckpts --prompt "rain" --out rain.mp4              one file
    sample --checkpoint ckpts --prompts prompts.csv --out videos          a file of requests, one result each

What can be known is checked before any weights are loaded: files, names, sizes, and what is already there.  Every
result carries its request as JSON in its `comment`; the same request on the same machine makes the same file again.  A
second run of a file of requests leaves alone what is there of the same request, and says which files are of another.
Results appear whole or not at all; a request that fails does not stop the others, and makes the exit code 1.

Of several ranks (--nproc, or torchrun) the first reads and writes files, prints and decides; all compute.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opensora_fast.autoencoder import Autoencoder
from opensora_fast.conditions import reference_frames
from opensora_fast.config import config_from_dict
from opensora_fast.errors import UserError
from opensora_fast.loaded_models import LoadOptions, by_the_first, choose, load_models
from opensora_fast.model_folder import ModelFolder, autoencoder_layout, find_model
from opensora_fast.pipeline import VideoPipeline
from opensora_fast.process_group import joined, leave, relaunch
from opensora_fast.reference_pixels import clip_range
from opensora_fast.sample_options import SETTING_OPTIONS, check_options, parser
from opensora_fast.sample_progress import SampleProgress
from opensora_fast.sample_requests import BrokenRow, SampleRequest, given_files, read_requests, repeated
from opensora_fast.sampling_ranks import AgreedError, SamplingRanks
from opensora_fast.sampling_settings import SamplingSettings, output_size
from opensora_fast.video_io import probe, read_image_metadata, read_video_metadata, write_image, write_video


@dataclass(frozen=True)
class _Job:
    """A request, where its result goes, and what the result says of itself."""

    request: SampleRequest
    out: Path
    size: tuple[int, int]
    record: dict[str, Any]


@dataclass(frozen=True)
class _Plan:
    """What there is to do; `failed` are (name, reason) of requests that cannot be met."""

    jobs: list[_Job]
    done: list[Path]  # results of an earlier run
    failed: list[tuple[str, str]]


def main(argv: list[str]) -> int:
    """Returns 0 when every result is there, 1 when some requests of a file of them failed.

    Raises UserError for a request that cannot be met, and where none of a file can be; argparse exits with 2.
    """
    options = parser().parse_args(argv)
    check_options(options)
    if options.nproc is not None and dist.is_torchelastic_launched():
        raise UserError(f"--nproc {options.nproc}: torchrun has started the processes already; drop --nproc")
    if options.nproc is not None and options.nproc > 1:
        _check(options)  # told here, once and before anything is started
        return relaunch(options.nproc, argv)
    with joined() as ranks:
        code = _run(options, ranks)
    return leave(code)


def _check(options: argparse.Namespace) -> None:
    """Raise UserError for what can be known before weights are loaded."""
    parts = _find(options)
    plan = _plan(options, parts)
    if plan.jobs:
        choose(parts, _load_options(options), _wanted(plan))


def _load_options(options: argparse.Namespace) -> LoadOptions:
    return LoadOptions(
        memory_budget=options.memory_budget, fp8=options.fp8, compile=options.compile, tensorrt=options.tensorrt
    )


def _wanted(plan: _Plan) -> list[tuple[SamplingSettings, str]]:
    return [(job.request.settings, job.request.given.condition) for job in plan.jobs]


def _run(options: argparse.Namespace, ranks: SamplingRanks | None) -> int:
    parts = by_the_first(ranks, lambda: _find(options))
    first = ranks is None or ranks.rank == 0
    plan = by_the_first(ranks, lambda: _plan(options, parts))
    progress = SampleProgress(len(plan.jobs), shown=first)
    for name, reason in plan.failed:
        progress.say(f"{name}: {reason}")
    if not plan.jobs:
        return _summary(progress, plan, made=0, failed=plan.failed)
    failed = list(plan.failed)
    made = 0
    try:
        with progress:
            models = load_models(parts, _load_options(options), _wanted(plan), ranks)
            for note in models.notes:
                progress.say(note)
            pipe = VideoPipeline(models, flux_resolution=options.flux_resolution, ranks=ranks)
            for job in plan.jobs:
                try:
                    _make(pipe, job, options.preview_every, ranks, progress)
                except (UserError, OSError, RuntimeError) as error:
                    if options.prompts is None or (ranks is not None and not isinstance(error, AgreedError)):
                        raise
                    reason = " ".join(str(error).split())
                    failed.append((job.request.name, reason))
                    progress.say(f"{job.request.name}: {reason}")
                    progress.ended()
                else:
                    made += 1
                    frames, (height, width) = job.request.settings.frames, job.size
                    progress.ended(f"{job.out}: {frames} frames of {width} x {height} from {parts.path}")
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the GPU's memory is full ({' '.join(str(error).split())[:100]}): name what it has with --memory-budget, "
            "such as --memory-budget 24GiB, or ask for a smaller video"
        ) from error
    except KeyboardInterrupt:
        if options.prompts is not None:
            progress.say(f"stopped after {made} of {len(plan.jobs)}; what is there is whole, the same command goes on")
        raise
    return _summary(progress, plan, made, failed) if options.prompts else 0


def _make(
    pipe: VideoPipeline, job: _Job, preview_every: int | None, ranks: SamplingRanks | None, progress: SampleProgress
) -> None:
    """Sample one request and write its file."""
    request, settings = job.request, job.request.settings
    given = request.given
    progress.begin(request.name, settings.steps, painting=_painted(job))
    head, tail = pipe.references(given.condition, settings, image=given.image, last=given.last, video=given.video)

    def preview(step: int, latent_BCTHW: Tensor) -> None:
        if preview_every and step % preview_every == 0 and step < settings.steps:
            middle = latent_BCTHW.shape[2] // 2
            picture = pipe.models.autoencoder.decode(latent_BCTHW[:, :, [middle]])[0, :, :1]
            by_the_first(ranks, lambda: write_image(job.out.with_suffix(".preview.png"), picture.float().clamp(-1, 1)))

    video_B3FHW = pipe.make(
        [request.prompt],
        settings,
        condition=given.condition,
        head=head,
        tail=tail,
        negative_prompts=None if request.negative_prompt is None else [request.negative_prompt],
        on_step=progress.step,
        on_latent=preview if preview_every else None,
        on_paint=progress.painted,
    )
    by_the_first(ranks, lambda: _write(job, video_B3FHW[0]))


def _painted(job: _Job) -> bool:
    return "flux" in job.record


def _write(job: _Job, video_3FHW: Tensor) -> None:
    metadata = {"comment": json.dumps(job.record)}
    if job.request.settings.frames == 1:
        write_image(job.out, video_3FHW, metadata)
    else:
        write_video(job.out, video_3FHW, job.request.settings.fps, metadata)


def _summary(progress: SampleProgress, plan: _Plan, made: int, failed: Sequence[tuple[str, str]]) -> int:
    parts = [f"{made} made"]
    if plan.done:
        parts.append(f"{len(plan.done)} were there")
    if failed:
        parts.append(f"{len(failed)} failed: {', '.join(name for name, _ in failed)}")
    progress.say("; ".join(parts))
    return 1 if failed else 0


def _find(options: argparse.Namespace) -> ModelFolder:
    return find_model(
        options.checkpoint,
        weights=options.weights,
        t5=options.t5,
        clip=options.clip,
        autoencoder=options.autoencoder,
        flux=options.flux,
    )


def _plan(options: argparse.Namespace, parts: ModelFolder) -> _Plan:
    """What there is to do. Raises UserError for a request on the command line that cannot be met."""
    plan = _Plan([], [], [])
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
                job = _job(options, parts, layout, sample)
                if options.prompts is not None and _is_there(job):
                    plan.done.append(job.out)
                else:
                    plan.jobs.append(job)
            except (UserError, OSError) as error:  # OSError: no name that a file can have
                _fail(options, plan, sample.name, error)
    return plan


def _fail(options: argparse.Namespace, plan: _Plan, name: str, error: Exception) -> None:
    """A request of the command line that cannot be met is an error; one of a file is noted."""
    if options.prompts is None:
        raise error
    plan.failed.append((name, str(error)))


def _requests(options: argparse.Namespace, parts: ModelFolder) -> Sequence[SampleRequest | BrokenRow]:
    chosen = {field: getattr(options, field) for field, _, _ in SETTING_OPTIONS.values()}
    settings = parts.defaults | {field: value for field, value in chosen.items() if value is not None}
    if options.resolution or options.aspect_ratio:
        settings |= {name: chosen[name] for name in ("height", "width")}  # not those of the recipe
    painted = parts.flux is not None
    if options.prompts is not None:
        return read_requests(
            options.prompts,
            settings,
            condition=options.condition,
            negative_prompt=options.negative_prompt,
            painted=painted,
        )
    given = given_files(options.condition, options.image, options.last, options.video, painted=painted)
    return [
        SampleRequest(
            name=options.out.stem,
            prompt=options.prompt,
            negative_prompt=options.negative_prompt,
            given=given,
            settings=config_from_dict(SamplingSettings, settings),
        )
    ]


def _job(options: argparse.Namespace, parts: ModelFolder, layout: Autoencoder, request: SampleRequest) -> _Job:
    """Check a request against the models and the files that it names."""
    settings, given = request.settings, request.given
    out = _output_file(options, request)
    size = output_size(parts.config, layout, settings, given.condition)
    for name in ("image", "last"):
        if name in given.files():
            probe(given.files()[name])
    if given.video is not None:
        head, tail = reference_frames(given.condition, layout)
        clip_range(given.video, head or tail, settings.fps, "head" if head else "tail")
    record: dict[str, Any] = {
        "prompt": request.prompt,
        "checkpoint": str(parts.path),
        "weights": options.weights,
        "condition": given.condition,
        **{name: str(path) for name, path in given.files().items()},
        **dataclasses.asdict(settings),
    }
    if request.negative_prompt is not None:
        record["negative_prompt"] = request.negative_prompt
    if parts.flux is not None and given.image is None and given.condition in ("i2v_head", "i2v_loop"):
        record |= {"flux": str(parts.flux), "flux_resolution": options.flux_resolution}
    record |= {name: True for name in ("fp8", "tensorrt") if getattr(options, name)}
    return _Job(request, out, size, record)


def _output_file(options: argparse.Namespace, request: SampleRequest) -> Path:
    frames = request.settings.frames
    suffix, kind = (".png", "an image") if frames == 1 else (".mp4", "a video")
    if options.prompts is not None:
        return options.out / f"{request.name}{suffix}"
    if options.out.suffix != suffix:
        raise UserError(f"--out {options.out}: {kind} (frames={frames}) is written as {suffix}; end the name with that")
    return options.out.with_name(f"{request.name}{suffix}")


def _is_there(job: _Job) -> bool:
    """Whether the result is there. Raises UserError where another file has its place."""
    if not job.out.exists():
        return False
    read = read_image_metadata if job.out.suffix == ".png" else read_video_metadata
    try:
        found = json.loads(read(job.out).get("comment", ""))
    except (UserError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{job.out}: is there and does not say of which request; move it, or choose another --out")
    wanted = json.loads(json.dumps(job.record))
    for name in (*wanted, *found):
        if found.get(name) != wanted.get(name):
            raise UserError(
                f"{job.out}: is there of another request ({name}={found.get(name)!r}, not {wanted.get(name)!r}); "
                "move it, or choose another --out"
            )
    return True
