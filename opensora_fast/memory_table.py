"""The table of predicted peak memory per setting: released sizes, 129 frames with the Hunyuan autoencoder, bfloat16.

Made in a few seconds without weights and without a GPU (`memory_prediction`); the text encoders are those of the
release, T5-v1.1-XXL and CLIP-L, whose sizes are written down here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from opensora_fast.config import MMDIT_PRESETS, HunyuanVAEConfig
from opensora_fast.hunyuan_vae import HunyuanVAE
from opensora_fast.memory_plan import GIB, budget_for
from opensora_fast.memory_prediction import (
    MemorySettings,
    SamplingShape,
    TextNeeds,
    activation_bytes,
    add_weights,
    meta_model,
)
from opensora_fast.sampling_settings import SamplingSettings

RESOLUTIONS = ("256px", "768px")
# bfloat16 bytes of T5-v1.1-XXL's encoder and CLIP-L's text model, and of their activations for one prompt of 512 and
# 77 tokens: what TextNeeds.of gives for these architectures.
RELEASED_TEXT = TextNeeds(weights=9_770_729_472, work=96_604_160)
SETTINGS = {
    "everything on the GPU": MemorySettings(),
    "modulation precomputed": MemorySettings(modulation="precomputed"),
    "modulation precomputed; text encoders, autoencoder while used": MemorySettings(
        text="while_used", autoencoder="while_used", modulation="precomputed"
    ),
    "these and fp8": MemorySettings(text="while_used", autoencoder="while_used", modulation="precomputed", fp8=True),
    "these (no fp8) and blocks streamed": MemorySettings(
        text="while_used", autoencoder="while_used", modulation="precomputed", blocks="streamed"
    ),
}


@dataclass(frozen=True)
class MemoryRow:
    """One setting at one resolution: bytes at the peak of each phase."""

    name: str
    settings: MemorySettings
    resolution: str
    predicted: dict[str, int]

    @property
    def peak(self) -> int:
        return max(self.predicted.values())

    @property
    def budget(self) -> int:
        """The least `--memory-budget` that allows it."""
        return budget_for(self.peak)


def memory_table(
    *, condition: str = "i2v_head", aspect_ratio: str = "16:9", resolutions: Sequence[str] = RESOLUTIONS
) -> list[MemoryRow]:
    """A row per resolution and setting, of one video with 129 frames; an image given is the most that is asked for.

    Raises UserError where diffusers, of whose parts the autoencoder is made, is not installed.
    """
    config, dtype = MMDIT_PRESETS["open-sora-v2"], torch.bfloat16
    model = meta_model(config, dtype)
    with torch.device("meta"):
        autoencoder = HunyuanVAE(HunyuanVAEConfig(use_spatial_tiling=True)).to(dtype).eval().requires_grad_(False)
    rows = []
    for resolution in resolutions:
        settings = SamplingSettings(resolution=resolution, aspect_ratio=aspect_ratio, frames=129)
        activations = activation_bytes(
            config, autoencoder, SamplingShape(settings=settings, condition=condition), dtype
        )
        for name, memory in SETTINGS.items():
            predicted = add_weights(activations, model, autoencoder, RELEASED_TEXT, memory)
            rows.append(MemoryRow(name, memory, resolution, predicted))
    return rows


def memory_markdown(rows: Sequence[MemoryRow]) -> str:
    """The rows as a table: GiB in each phase, the peak, and the budget that allows it."""
    phases = list(rows[0].predicted)
    lines = [
        f"| resolution | setting | {' | '.join(phases)} | peak GiB | --memory-budget |",
        f"|---|---|{'---:|' * (len(phases) + 2)}",
    ]
    for row in rows:
        cells = [f"{row.predicted[phase] / GIB:.1f}" for phase in phases]
        budget = f"{math.ceil(row.budget / GIB)}GiB"
        lines.append(f"| {row.resolution} | {row.name} | {' | '.join(cells)} | {row.peak / GIB:.1f} | {budget} |")
    return "\n".join(lines) + "\n"
