"""What a training run is: one frozen dataclass per concern, two recipes made of them.

Units: steps are optimiser steps, learning rates are per step, resolutions are named as in `opensora_fast.resolutions`.
Every field can be set from the command line as `--section.field value`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal

from opensora_fast.conditions import CONDITIONS
from opensora_fast.config import AutoencoderConfig, HunyuanVAEConfig, MMDiTConfig, VideoDCAEConfig
from opensora_fast.errors import UserError
from opensora_fast.sampling_settings import SamplingSettings
from opensora_fast.train.buckets import BucketTable, validate_buckets

_LONGEST_WAIT_S = 1e9  # the system's clocks take little more


def _require(good: bool, name: str, value: object, rule: str) -> None:
    if not good:
        raise UserError(f"{name}={value!r}: {rule}")


AUTOENCODER_CONFIGS: dict[str, type[AutoencoderConfig]] = {"video_dc_ae": VideoDCAEConfig, "hunyuan": HunyuanVAEConfig}


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """Clips: `index` and `heldout_index` are files of `opensora-fast data index`; "demo" prepares the demo's."""

    index: str | None = None
    heldout_index: str | None = None
    buckets: BucketTable = field(default_factory=dict)  # {resolution: {frames: (probability, batch size)}}
    fps_max: int = 24
    workers: int = 12  # processes that decode
    prefetch: int = 2  # batches laid out ahead of the one that is trained on
    pinned_gib: float = 0.0  # memory to lay batches out in; 0: as much as prefetch + 2 of the largest take
    slow_batch_s: float = 30.0  # seconds after which a batch that is waited for is reported, with file and stage
    batch_timeout_s: float = 600.0  # seconds after which the run stops for it
    cache: str | None = None  # a folder of `opensora-fast data cache`: training reads it instead of encoding

    def __post_init__(self) -> None:
        validate_buckets(self.buckets)
        _require(self.workers >= 1, "data.workers", self.workers, "clips are decoded by processes; use 1 or more")
        _require(self.prefetch >= 1, "data.prefetch", self.prefetch, "use 1 batch or more")
        _require(
            0 <= self.pinned_gib < math.inf, "data.pinned_gib", self.pinned_gib, "use 0 (as needed) or a number of GiB"
        )
        for name in ("slow_batch_s", "batch_timeout_s"):
            seconds = getattr(self, name)
            rule = f"use seconds above 0, and at most {_LONGEST_WAIT_S:g}"
            _require(0 < seconds <= _LONGEST_WAIT_S, f"data.{name}", seconds, rule)


@dataclass(frozen=True, kw_only=True)
class AutoencoderSection:
    """The frozen autoencoder of a diffusion run.

    `weights` is an autoencoder run or one of its checkpoints, or a file or folder of weights. What these say of their
    configuration counts; where they say nothing it is `config`, of the class that belongs to `kind`. Without weights,
    `untrained_seed` allows a randomly initialised Video DC-AE (a rehearsal of the machinery, never a result).
    """

    kind: Literal["video_dc_ae", "hunyuan"] = "video_dc_ae"
    weights: str | None = None
    config: AutoencoderConfig = VideoDCAEConfig()
    untrained_seed: int | None = None

    def __post_init__(self) -> None:
        expected = AUTOENCODER_CONFIGS[self.kind]
        _require(
            isinstance(self.config, expected),
            "autoencoder.kind",
            self.kind,
            f"its configuration is a {expected.__name__}, and this recipe has a {type(self.config).__name__}: leave it "
            "as it is, or train a recipe of the other autoencoder (stage1 to stage3: hunyuan; the others: video_dc_ae)",
        )
        _require(
            self.untrained_seed is None or self.kind == "video_dc_ae",
            "autoencoder.untrained_seed",
            self.untrained_seed,
            "the stand-in is a Video DC-AE; name weights with --autoencoder.weights PATH",
        )


@dataclass(frozen=True, kw_only=True)
class TextSection:
    """Text encoders: folders for transformers' `from_pretrained`; "demo" writes a tiny random pair into the run."""

    t5: str | None = None
    clip: str | None = None
    max_length_t5: int = 512
    max_length_clip: int = 77
    dropout: float = 0.316  # sqrt(0.1) per encoder: both are dropped for 10 % of the samples

    def __post_init__(self) -> None:
        _require(0 <= self.dropout <= 1, "text.dropout", self.dropout, "a probability lies between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class OptimizerSection:
    """AdamW on fp32 masters (paper section 4.2). `lr` lists (first step, rate); the last pair that has begun counts."""

    lr: tuple[tuple[int, float], ...] = ((0, 5e-5),)
    warmup_steps: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-15
    weight_decay: float = 0.0
    gradient_clip: float = 1.0
    ema_decay: float | None = None
    nonfinite_limit: int = 10  # skipped steps in a row before the run stops

    def __post_init__(self) -> None:
        _require(
            len(self.lr) > 0 and self.lr[0][0] == 0, "optimizer.lr", self.lr, "the first pair must begin at step 0"
        )
        _require(list(self.lr) == sorted(self.lr), "optimizer.lr", self.lr, "list the pairs by ascending step")
        _require(self.nonfinite_limit >= 1, "optimizer.nonfinite_limit", self.nonfinite_limit, "must be at least 1")
        _require(self.gradient_clip > 0, "optimizer.gradient_clip", self.gradient_clip, "must be positive")
        if self.ema_decay is not None:
            _require(
                0 < self.ema_decay < 1, "optimizer.ema_decay", self.ema_decay, "use a value between 0 and 1, or None"
            )


@dataclass(frozen=True, kw_only=True)
class LoopSection:
    steps: int
    seed: int = 42
    log_every: int = 10
    collect_every: int = 50  # steps between two runs of Python's garbage collector, the same on all ranks
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        _require(self.steps >= 1, "loop.steps", self.steps, "train at least one step")
        _require(self.log_every >= 1, "loop.log_every", self.log_every, "must be at least 1")
        _require(self.collect_every >= 1, "loop.collect_every", self.collect_every, "must be at least 1")


@dataclass(frozen=True, kw_only=True)
class CheckpointSection:
    """`on_failure`: whether a checkpoint that could not be written stops the run, or is said while it goes on."""

    every: int = 200
    keep: int = 20
    on_failure: Literal["stop", "go_on"] = "stop"
    chunk_mib: int = 16  # unit of checksums and of writing

    def __post_init__(self) -> None:
        _require(self.every >= 1, "checkpoint.every", self.every, "must be at least 1")
        _require(self.keep >= 1, "checkpoint.keep", self.keep, "keep at least the newest one")
        _require(
            1 <= self.chunk_mib <= 256, "checkpoint.chunk_mib", self.chunk_mib, "use 1 to 256; 16 suits most disks"
        )


@dataclass(frozen=True, kw_only=True)
class ValidationSection:
    """Held-out loss at fixed draws (0: only at both ends) and sample clips (0: none), every so many steps."""

    every: int = 0
    draws: int = 4  # noise draws per held-out clip
    sample_every: int = 0
    prompts: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ParallelSection:
    context_parallel: int = 1  # ranks that share one sequence
    checkpoint_double: int = 0  # first double blocks whose activations are recomputed
    checkpoint_single: int = 0  # first single blocks whose activations are recomputed


@dataclass(frozen=True, kw_only=True)
class DiffusionRecipe:
    """One stage of the video diffusion transformer's training."""

    name: str
    follows: str | None = None  # the recipe whose run `init_weights` has to name; None: may start from nothing
    # Training starts from these weights: a run or one of its checkpoints (its moving average where kept), FLUX.1-dev or
    # Open-Sora's in a released layout or diffusers'. `new_layers` says which layers may start anew, where they differ:
    # "none"; "auto", those that the weights lack or have for another autoencoder; "always", input and output layers.
    init_weights: str | None = None
    new_layers: Literal["none", "auto", "always"] = "none"
    model: MMDiTConfig
    autoencoder: AutoencoderSection
    text: TextSection
    data: DataSection
    condition_weights: dict[str, float] = field(default_factory=lambda: {"t2v": 1.0})
    optimizer: OptimizerSection = OptimizerSection()
    loop: LoopSection
    checkpoint: CheckpointSection = CheckpointSection()
    validation: ValidationSection = ValidationSection()
    parallel: ParallelSection = ParallelSection()
    sampling_defaults: SamplingSettings = SamplingSettings()  # of `opensora-fast sample` and of validation samples

    def __post_init__(self) -> None:
        for name, weight in self.condition_weights.items():
            _require(name in CONDITIONS, "condition_weights", name, f"use {', '.join(CONDITIONS)}")
            _require(weight >= 0, f"condition_weights.{name}", weight, "a weight cannot be negative")
        _require(
            sum(self.condition_weights.values()) > 0,
            "condition_weights",
            self.condition_weights,
            "one must be positive",
        )
        conditioned = any(weight > 0 for name, weight in self.condition_weights.items() if name != "t2v")
        _require(
            self.model.cond_embed or not conditioned,
            "model.cond_embed",
            self.model.cond_embed,
            "image and video conditions need a model with a condition embedding",
        )


@dataclass(frozen=True, kw_only=True)
class AutoencoderRecipe:
    """Training of a Video DC-AE (paper section 3; reconstruction phase)."""

    name: str
    autoencoder: AutoencoderSection
    data: DataSection
    optimizer: OptimizerSection = OptimizerSection()
    loop: LoopSection
    checkpoint: CheckpointSection = CheckpointSection()
    validation: ValidationSection = ValidationSection()

    def __post_init__(self) -> None:
        kind = self.autoencoder.kind
        _require(kind == "video_dc_ae", "autoencoder.kind", kind, "only a Video DC-AE is trained here")

    @property
    def architecture(self) -> VideoDCAEConfig:
        """The autoencoder that is trained."""
        assert isinstance(self.autoencoder.config, VideoDCAEConfig)
        return self.autoencoder.config


Recipe = DiffusionRecipe | AutoencoderRecipe


def recipe_to_dict(recipe: Recipe) -> dict:
    """The recipe as JSON-ready data."""
    return dataclasses.asdict(recipe)
