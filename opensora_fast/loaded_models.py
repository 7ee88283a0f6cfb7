"""The models of a `ModelFolder` with their weights, where they compute and where they wait.

Without a memory budget all of them are on the device.  With one, `memory_plan` says which wait in host memory; FLUX
then always does.  Of several ranks the first alone has the text encoders and reads the transformer, for all
(`shared_streaming`); all spread the tiles of the autoencoder.  The transformer comes last: what can go wrong with the
others is told first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opensora_fast.autoencoder import Autoencoder
from opensora_fast.block_streaming import PinnedPieces, host_model
from opensora_fast.checkpoint_folder import load_autoencoder, load_mmdit, load_text_encoders
from opensora_fast.compiled_blocks import compile_blocks
from opensora_fast.errors import UserError
from opensora_fast.flux import FluxImages, flux_files, read_autoencoder
from opensora_fast.memory_plan import CONTEXT, choose_memory, parse_bytes
from opensora_fast.memory_prediction import MemorySettings, PictureNeeds, SamplingShape, TextNeeds
from opensora_fast.mmdit import MMDiT
from opensora_fast.model_folder import ModelFolder, autoencoder_layout
from opensora_fast.parameter_source import open_parameters
from opensora_fast.phases import Phases
from opensora_fast.released import load_mmdit_from
from opensora_fast.sampling_ranks import SamplingRanks, by_the_first, on_all
from opensora_fast.sampling_settings import SamplingSettings, output_size
from opensora_fast.shared_streaming import load_streamed
from opensora_fast.tensorrt import compile_decoder, compile_text_encoder, require_tensorrt
from opensora_fast.text import PromptEncoding, SharedTextEncoders
from opensora_fast.tiling import BatchedTiles
from opensora_fast.weight_files import WeightFiles

Wanted = Sequence[tuple[SamplingSettings, str]]
"""What is going to be made: settings and conditions."""


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How models are loaded; see `VideoPipeline.from_pretrained`."""

    device: torch.device | str | None = None
    dtype: torch.dtype | None = None
    memory_budget: str | int | None = None
    previews: bool = False  # the budget is to allow for decoding a frame between steps
    flux_resolution: str = "768px"  # of FLUX's pictures, for the budget
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
    if device.type == "cuda":
        _limit(None if options.memory_budget is None else parse_bytes(options.memory_budget), device)

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
    autoencoder = on_all(ranks, load_autoencoder_part)
    flux = None
    if (folder := parts.flux) is not None:
        if options.memory_budget is not None:
            flux = _flux_while_used(folder, text, phases, device, dtype, ranks)
        else:
            flux = on_all(ranks, lambda: FluxImages.from_folder(folder, text=text, device=device, dtype=dtype))
    model, notes = _load_transformer(parts, settings, device, dtype, ranks)
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
    device, dtype = _place(options, None)
    if options.tensorrt:
        if options.memory_budget is not None:
            raise UserError("--tensorrt with --memory-budget: engines keep weights of their own; drop one of the two")
        require_tensorrt()
    if options.memory_budget is None:
        choice = MemoryChoice(MemorySettings(fp8=True)) if options.fp8 else MemoryChoice()
    else:
        choice = _planned(parts, options, parse_bytes(options.memory_budget), device, dtype, wanted)
    if options.compile and choice.settings and (choice.settings.fp8 or choice.settings.blocks == "streamed"):
        raise UserError(
            "--compile: blocks whose weights are streamed or in 8 bits run as they are; drop --compile, or raise the "
            "memory budget and drop --fp8"
        )
    return choice


def _place(options: LoadOptions, ranks: SamplingRanks | None) -> tuple[torch.device, torch.dtype]:
    if ranks is not None:
        device = ranks.device
    else:
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and device.index is None and torch.cuda.is_available():
            device = torch.device("cuda", torch.cuda.current_device())  # some calls take no GPU without its number
    return device, options.dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)


def _planned(
    parts: ModelFolder, options: LoadOptions, budget: int, device: torch.device, dtype: torch.dtype, wanted: Wanted
) -> MemoryChoice:
    """The fastest settings that fit."""
    tokens = parts.text["max_length_t5"]
    needs = TextNeeds.of_folders(
        Path(parts.text["t5"]),
        Path(parts.text["clip"]),
        dtype,
        videos=1,
        max_length_t5=tokens,
        max_length_clip=parts.text["max_length_clip"],
    )
    picture = None
    if parts.flux is not None:
        steps = max(settings.steps for settings, _ in wanted)
        picture = PictureNeeds.of_folder(
            parts.flux, dtype, resolution=options.flux_resolution, steps=steps, text_tokens=tokens
        )
    shapes = [
        SamplingShape(settings=settings, condition=name, text_tokens=tokens, previews=options.previews)
        for settings, name in wanted
    ]
    plan = choose_memory(
        budget,
        parts.config,
        autoencoder_layout(parts.autoencoder).to(dtype),
        needs,
        _largest(shapes),
        dtype,
        fp8=options.fp8,
        picture=picture,
        on_gpu=device.type == "cuda",
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


def _limit(budget: int | None, device: torch.device) -> None:
    """Let PyTorch's allocator take no more than the budget leaves it beside the context; None: all that there is."""
    fraction = 1.0
    if budget is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        fraction = min(1.0, (budget - CONTEXT) / total)
    torch.cuda.set_per_process_memory_fraction(fraction, device)


def _load_transformer(
    parts: ModelFolder,
    settings: MemorySettings,
    device: torch.device,
    dtype: torch.dtype,
    ranks: SamplingRanks | None,
) -> tuple[MMDiT, tuple[str, ...]]:
    """The transformer, and what is to be told of it."""
    arguments = settings.stream_arguments()
    streams = settings.fp8 or "streamed" in arguments.values()

    def load(pieces: PinnedPieces) -> MMDiT:
        if parts.is_run:
            return load_mmdit(parts.path, parts.weights, torch.device("cpu") if streams else device, dtype)
        model = host_model(parts.config, dtype, device, pieces=pieces, **arguments)
        return load_mmdit_from(WeightFiles.open(parts.path), into=model)

    model, fp8_error = load_streamed(load, parts.config, dtype, device, ranks, **arguments)
    return model, () if fp8_error is None else (f"8-bit weights: {fp8_error}",)


def _flux_while_used(
    folder: Path,
    text: PromptEncoding,
    phases: Phases,
    device: torch.device,
    dtype: torch.dtype,
    ranks: SamplingRanks | None,
) -> FluxImages:
    """FLUX with its blocks streamed, and its autoencoder on the device while it is used."""
    transformer, small = flux_files(folder)
    autoencoder = on_all(ranks, lambda: read_autoencoder(small, device="cpu", dtype=dtype))
    config: Any = open_parameters(transformer).config

    def load(pieces: PinnedPieces) -> MMDiT:
        return load_mmdit_from(WeightFiles.open(transformer), into=host_model(config, dtype, device, pieces=pieces))

    model, _ = load_streamed(load, config, dtype, device, ranks)
    away: Any = phases.autoencoder(autoencoder)  # type: ignore[arg-type]  # decodes images, not videos
    return FluxImages(model, away, text)


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
