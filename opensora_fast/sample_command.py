"""`opensora-fast sample`: prompts become video or image files.

    sample --checkpoint ckpts --prompt "rain" --out rain.mp4              one file
    sample --checkpoint ckpts --prompts prompts.csv --out videos          a file of requests, one result each

What can be known is checked before any weights are loaded: files, names, sizes, whether results can be written, and
what is already there.  Every result carries its request as JSON in its `comment` (`result_files`); the same request on
the same machine makes the same file again.  A second run of a file of requests leaves alone what is there of the same
request, and says which files are of another, or not whole.  Results appear whole or not at all; a request that fails
does not stop the others, and makes the exit code 1.

Of several ranks (--nproc, or torchrun) the first reads and writes files, prints and decides; all compute.  What fails
on each rank alike, or on the first alone while it reads or writes, is that request's failure; another error ends the
ranks, since those that wait in an exchange cannot be told of it.
"""

from __future__ import annotations

import argparse
import json
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from opensora_fast.errors import UserError
from opensora_fast.loaded_models import LoadOptions, choose, load_models
from opensora_fast.model_folder import ModelFolder
from opensora_fast.pipeline import VideoPipeline
from opensora_fast.process_group import joined, leave, relaunch
from opensora_fast.prompts import with_suffix
from opensora_fast.sample_options import check_options, parser
from opensora_fast.sample_plan import PREVIEW, SampleJob, SamplePlan, find_parts, plan_requests
from opensora_fast.sample_progress import SampleProgress
from opensora_fast.sampling_ranks import SamplingRanks, by_the_first, on_all
from opensora_fast.sampling_settings import SamplingSettings
from opensora_fast.text import cut_notes
from opensora_fast.video_io import write_image, write_video


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
    parts = find_parts(options)
    plan = plan_requests(options, parts)
    if plan.jobs:
        choose(parts, _load_options(options), _wanted(plan))


def _load_options(options: argparse.Namespace) -> LoadOptions:
    return LoadOptions(
        memory_budget=options.memory_budget,
        previews=options.preview_every is not None,
        flux_resolution=options.flux_resolution,
        fp8=options.fp8,
        compile=options.compile,
        tensorrt=options.tensorrt,
    )


def _wanted(plan: SamplePlan) -> list[tuple[SamplingSettings, str]]:
    return [(job.request.settings, job.request.given.condition) for job in plan.jobs]


def _run(options: argparse.Namespace, ranks: SamplingRanks | None) -> int:
    parts = by_the_first(ranks, lambda: find_parts(options))
    first = ranks is None or ranks.rank == 0
    plan = by_the_first(ranks, lambda: plan_requests(options, parts))
    progress = SampleProgress(len(plan.jobs), shown=first)
    for name, reason in plan.failed:
        progress.say(f"{name}: {reason}")
    if not plan.jobs:
        return _summary(progress, plan, made=0, failed=plan.failed)
    for note in by_the_first(ranks, lambda: _cut_prompts(parts, plan)):
        progress.say(note)
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
                    on_all(ranks, partial(_make, pipe, job, options.preview_every, ranks, progress))
                except Exception as error:
                    if options.prompts is None or (ranks is not None and not isinstance(error, UserError)):
                        raise
                    if not isinstance(error, UserError | OSError | torch.OutOfMemoryError):
                        progress.say("".join(traceback.format_exception(error)))
                    reason = _reason(error)
                    failed.append((job.request.name, reason))
                    progress.say(f"{job.request.name}: {reason}")
                    progress.ended()
                else:
                    made += 1
                    frames, (height, width) = job.request.settings.frames, job.size
                    what = "a picture" if frames == 1 else f"{frames} frames"
                    progress.ended(f"{job.out}: {what} of {width} x {height} from {parts.path}")
    except torch.OutOfMemoryError as error:
        raise UserError(_reason(error)) from error
    except KeyboardInterrupt:
        if options.prompts is not None:
            progress.say(f"stopped after {made} of {len(plan.jobs)}; what is there is whole, the same command goes on")
        raise
    return _summary(progress, plan, made, failed) if options.prompts else 0


def _cut_prompts(parts: ModelFolder, plan: SamplePlan) -> list[str]:
    """A line for each prompt that is too long to be read as a whole, with the words on motion that follow it."""
    prompts = []
    for request in (job.request for job in plan.jobs):
        settings = request.settings
        prompts.append(with_suffix(request.prompt, 0 if settings.frames == 1 else settings.fps, settings.motion_score))
        prompts.append(request.negative_prompt or "")
    return cut_notes(Path(parts.text["t5"]), parts.text["max_length_t5"], prompts)


def _reason(error: Exception) -> str:
    """An error as one line."""
    line = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"the GPU's memory is full ({line[:100]}): name what it has with --memory-budget, such as "
            "--memory-budget 24GiB, or ask for a smaller video"
        )
    return line


def _make(
    pipe: VideoPipeline,
    job: SampleJob,
    preview_every: int | None,
    ranks: SamplingRanks | None,
    progress: SampleProgress,
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
            by_the_first(
                ranks, lambda: write_image(job.out.with_suffix(f"{PREVIEW}.png"), picture.float().clamp(-1, 1))
            )

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


def _painted(job: SampleJob) -> bool:
    return "flux" in job.record


def _write(job: SampleJob, video_3FHW: Tensor) -> None:
    metadata = {"comment": json.dumps(job.record)}
    if job.request.settings.frames == 1:
        write_image(job.out, video_3FHW, metadata)
    else:
        write_video(job.out, video_3FHW, job.request.settings.fps, metadata)


def _summary(progress: SampleProgress, plan: SamplePlan, made: int, failed: Sequence[tuple[str, str]]) -> int:
    parts = [f"{made} made"]
    if plan.done:
        parts.append(f"{len(plan.done)} were there")
    if failed:
        parts.append(f"{len(failed)} failed: {', '.join(name for name, _ in failed)}")
    progress.say("; ".join(parts))
    return 1 if failed else 0
