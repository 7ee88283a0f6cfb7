"""The models of a `ModelFolder` with their weights, where they compute and where they wait.

Without a memory budget all of them are on the device.  With one, `memory_plan` says which wait in host memory; FLUX
then always does.  Of several ranks the first alone has the text encoders, and all spread the tiles of the autoencoder.
The transformer comes last: what can go wrong with the others is told first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from opensora_fast.autoencoder import Autoencoder
from opensora_fast.block_streaming import host_model, stream_blocks, weight_bytes
from opensora_fast.checkpoint_folder import load_autoencoder, load_mmdit, load_text_encoders
from opensora_fast.compiled_blocks import compile_blocks
from opensora_fast.errors import UserError
from opensora_fast.flux import FluxImages, flux_files
from opensora_fast.memory_plan import choose_memory, parse_bytes
from opensora_fast.memory_prediction import MemorySettings, SamplingShape, TextNeeds, meta_model
from opensora_fast.mmdit import MMDiT
from opensora_fast.model_folder import ModelFolder, autoencoder_layout
from opensora_fast.parameter_source import open_parameters
from opensora_fast.phases import Phases
from opensora_fast.released import load_mmdit_from
from opensora_fast.sampling_ranks import SamplingRanks
from opensora_fast.sampling_settings import SamplingSettings, output_size
from opensora_fast.tensorrt import compile_decoder, compile_text_encoder, require_tensorrt
from opensora_fast.text import PromptEncoding, SharedTextEncoders
from opensora_fast.tiling import BatchedTiles
from opensora_fast.weight_files import WeightFiles

Made = TypeVar("Made")
Wanted = Sequence[tuple[SamplingSettings, str]]
"""What is going to be made: settings and conditions."""


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How models are loaded; see `VideoPipeline.from_pretrained`."""

    device: torch.device | str | None = None
    dtype: torch.dtype | None = None
    memory_budget: str | int | None = None
    fp8: bool = False
    compile: bool = False
    tensorrt: bool = False


@dataclass(frozen=True, kw_only=True)
class LoadedModels:
    """What a video is made with. `notes` are lines for the person who waits: what was chosen, and at what price."""

    model: MMDiT
    autoencoder: Autoencoder
    text: PromptEncoding
    flux: FluxImages | None = None
    notes: tuple[str, ...] = ()
    most_pixels: int | None = None  # frames x height x width that the memory budget is planned for, one video at a time


@dataclass(frozen=True)
class MemoryChoice:
    """Where weights wait, and why; `settings` None: all are on the device, as they are."""

    settings: MemorySettings | None = None
    notes: tuple[str, ...] = ()


def load_models(
    parts: ModelFolder, options: LoadOptions, wanted: Wanted, ranks: SamplingRanks | None = None
) -> LoadedModels:
    """Load every part. A memory budget is planned for all of `wanted`, one video at a time.

    Raises UserError, on every rank, for options that do not go together and a budget too small, before anything is
    loaded; for weights that are missing, damaged or of another architecture; where the host has too little memory.
    """
    device, dtype = _place(options, ranks)
    memory = by_the_first(ranks, lambda: choose(parts, options, wanted))
    settings = memory.settings or MemorySettings()
    phases = Phases(device)
    if options.memory_budget is not None and device.type == "cuda":
        _limit(parse_bytes(options.memory_budget), device)

    def load_text() -> PromptEncoding:
        away = settings.text == "while_used"
        encoders = load_text_encoders(parts.text, torch.device("cpu") if away else device, dtype)
        if options.tensorrt:
            compile_text_encoder(encoders)
        return phases.text(encoders) if away else encoders

    def load_autoencoder_part() -> Autoencoder:
        away = settings.autoencoder == "while_used"
        autoencoder = load_autoencoder(parts.autoencoder, torch.device("cpu") if away else device, dtype)
        tiles = BatchedTiles(settings.tile_batch)
        autoencoder.run_tiles = tiles if ranks is None else ranks.tiles_over(tiles)
        if options.tensorrt:
            compile_decoder(autoencoder, sorted(_latents(parts, autoencoder, wanted)))
        return phases.autoencoder(autoencoder) if away else autoencoder

    text = load_text() if ranks is None else SharedTextEncoders.load(load_text, ranks)
    autoencoder = _on_all(ranks, load_autoencoder_part)
    flux = None
    if (folder := parts.flux) is not None:
        away = memory.settings is not None
        flux = _on_all(ranks, lambda: _load_flux(folder, text, phases, device, dtype, away=away))
    model, notes = _on_all(ranks, lambda: _load_transformer(parts, memory.settings, device, dtype))
    if options.compile:
        compile_blocks(model)
    return LoadedModels(
        model=model,
        autoencoder=autoencoder,
        text=text,
        flux=flux,
        notes=(*memory.notes, *notes),
        most_pixels=None if options.memory_budget is None else _most_pixels(parts, autoencoder, wanted),
    )


def choose(parts: ModelFolder, options: LoadOptions, wanted: Wanted) -> MemoryChoice:
    """Where the weights are going to wait; nothing of them is read.

    Raises UserError for options that do not go together, for a budget that is no number of bytes or too small.
    """
    _, dtype = _place(options, None)
    if options.tensorrt:
        if options.memory_budget is not None:
            raise UserError("--tensorrt with --memory-budget: engines keep weights of their own; drop one of the two")
        require_tensorrt()
    if options.memory_budget is None:
        choice = MemoryChoice(MemorySettings(fp8=True)) if options.fp8 else MemoryChoice()
    else:
        choice = _planned(parts, parse_bytes(options.memory_budget), dtype, wanted, fp8=options.fp8)
    if options.compile and choice.settings and (choice.settings.fp8 or choice.settings.blocks == "streamed"):
        raise UserError(
            "--compile: blocks whose weights are streamed or in 8 bits run as they are; drop --compile, or raise the "
            "memory budget and drop --fp8"
        )
    return choice


def by_the_first(ranks: SamplingRanks | None, act: Callable[[], Made]) -> Made:
    """What `act` gives on the first rank, on all of them; its UserError too."""
    if ranks is None:
        return act()
    result: Made | None = None
    failure = None
    if ranks.rank == 0:
        try:
            result = act()
        except UserError as error:
            failure = error
    ranks.agree(failure)
    return ranks.share(result)


def _on_all(ranks: SamplingRanks | None, act: Callable[[], Made]) -> Made:
    """What `act` gives on each rank; where one raises a UserError, all do."""
    if ranks is None:
        return act()
    results: list[Made] = []
    failure = None
    try:
        results.append(act())
    except UserError as error:
        failure = error
    ranks.agree(failure)
    return results[0]


def _place(options: LoadOptions, ranks: SamplingRanks | None) -> tuple[torch.device, torch.dtype]:
    if ranks is not None:
        device = ranks.device
    else:
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return device, options.dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)


def _planned(parts: ModelFolder, budget: int, dtype: torch.dtype, wanted: Wanted, *, fp8: bool) -> MemoryChoice:
    """The fastest settings that fit; what FLUX keeps on the device is taken off the budget first."""
    tokens = parts.text["max_length_t5"]
    needs = TextNeeds.of_folders(
        Path(parts.text["t5"]),
        Path(parts.text["clip"]),
        dtype,
        videos=1,
        max_length_t5=tokens,
        max_length_clip=parts.text["max_length_clip"],
    )
    flux_bytes = 0
    if parts.flux is not None:
        config: Any = open_parameters(flux_files(parts.flux)[0]).config
        flux_bytes = weight_bytes(meta_model(config, dtype)).resident
        if flux_bytes >= budget:
            raise UserError(f"memory budget of {budget} bytes: FLUX alone keeps {flux_bytes}; raise it, or drop --flux")
    plan = choose_memory(
        budget - flux_bytes,
        parts.config,
        autoencoder_layout(parts.autoencoder).to(dtype),
        needs,
        _largest([SamplingShape(settings=settings, condition=name, text_tokens=tokens) for settings, name in wanted]),
        dtype,
        fp8=fp8,
    )
    return MemoryChoice(plan.settings, (f"memory: {plan.reason}",))


def _largest(shapes: Sequence[SamplingShape]) -> list[SamplingShape]:
    """One of each size; the prompts, seeds and scales of requests do not change what they take."""
    distinct: dict[tuple[Any, ...], SamplingShape] = {}
    for shape in shapes:
        settings = shape.settings
        size = (settings.resolution, settings.aspect_ratio, settings.height, settings.width, settings.frames)
        kind = (*size, shape.condition, settings.steps)
        distinct.setdefault(kind, shape)
    return list(distinct.values())


def _limit(budget: int, device: torch.device) -> None:
    """Let PyTorch's allocator take no more than the budget."""
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total), device)


def _load_transformer(
    parts: ModelFolder, settings: MemorySettings | None, device: torch.device, dtype: torch.dtype
) -> tuple[MMDiT, tuple[str, ...]]:
    """The transformer, and what is to be told of it."""
    if settings is None:
        return _read_transformer(parts, device, dtype), ()
    arguments = settings.stream_arguments()
    if parts.is_run:
        model = load_mmdit(parts.path, parts.weights, torch.device("cpu"), dtype)
    else:
        model = host_model(parts.config, dtype, device, **arguments)
        load_mmdit_from(WeightFiles.open(parts.path), into=model)
    streamed = stream_blocks(model, device, **arguments)
    return model, () if streamed.fp8_error is None else (f"8-bit weights: {streamed.fp8_error}",)


def _read_transformer(parts: ModelFolder, device: torch.device, dtype: torch.dtype) -> MMDiT:
    if parts.is_run:
        return load_mmdit(parts.path, parts.weights, device, dtype)
    return load_mmdit_from(WeightFiles.open(parts.path), device=device, dtype=dtype)


def _load_flux(
    folder: Path, text: PromptEncoding, phases: Phases, device: torch.device, dtype: torch.dtype, *, away: bool
) -> FluxImages:
    if not away:
        return FluxImages.from_folder(folder, text=text, device=device, dtype=dtype)
    flux = FluxImages.from_folder(folder, text=text, device="cpu", dtype=dtype)
    stream_blocks(flux.model, device)
    autoencoder: Any = phases.autoencoder(flux.autoencoder)  # type: ignore[arg-type]  # decodes images, not videos
    return FluxImages(flux.model, autoencoder, text)


def _most_pixels(parts: ModelFolder, autoencoder: Autoencoder, wanted: Wanted) -> int:
    return max(
        settings.frames * math.prod(output_size(parts.config, autoencoder, settings, condition))
        for settings, condition in wanted
    )


def _latents(parts: ModelFolder, autoencoder: Autoencoder, wanted: Wanted) -> set[tuple[int, ...]]:
    """The shapes [B, C, t, h, w] that are going to be decoded."""
    shapes: set[tuple[int, ...]] = set()
    for settings, condition in wanted:
        size = output_size(parts.config, autoencoder, settings, condition)
        shapes.add((1, autoencoder.latent_channels, *autoencoder.latent_shape(settings.frames, *size)))
    return shapes
