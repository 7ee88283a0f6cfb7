"""What stays on the GPU and what comes and goes, so that a request fits a budget and is as fast as it can be in it.

Everything that can leave the GPU is copied back over the same link, so the fastest of the settings that fit is the one
that copies the fewest bytes per video: first the modulation matrices go (once per video), then the autoencoder, the
text encoders, and last the transformer's blocks, which pass by in every step. 8-bit weights change the video and are
taken only where they are asked for.

Of the budget a part is left to what is not predicted: `usable_bytes`.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from opensora_fast.block_streaming import Home, weight_bytes
from opensora_fast.config import MMDiTConfig
from opensora_fast.errors import UserError
from opensora_fast.memory_prediction import (
    MemorySettings,
    PictureNeeds,
    SamplingShape,
    Stay,
    TextNeeds,
    activation_bytes,
    add_weights,
    meta_model,
    module_bytes,
)
from opensora_fast.mmdit import MMDiT

GIB = 2**30
_UNITS = {"": 1, "B": 1} | {f"{prefix}B": 1000**i for i, prefix in enumerate("KMGT", 1)}
_UNITS |= {f"{prefix}iB": 1024**i for i, prefix in enumerate("KMGT", 1)}

# Left for the CUDA context and loaded kernels, library workspaces, and gaps between the allocator's blocks. An
# allowance, not a measurement.
CONTEXT = GIB
_GAPS = 0.05  # of the budget


@dataclass(frozen=True)
class MemoryPlan:
    """Settings under a budget; `predicted` are the bytes at the peak of each phase, `reason` says why these."""

    budget: int
    settings: MemorySettings
    predicted: dict[str, int]
    reason: str

    @property
    def peak(self) -> int:
        return max(self.predicted.values())


def parse_bytes(text: str | int) -> int:
    """Bytes of "24GiB", "24 GB" (10**9) or a number of bytes. Raises UserError for anything else, and for none."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", str(text))
    units = {unit.lower(): size for unit, size in _UNITS.items()}
    if match is None or match[2].lower() not in units:
        raise UserError(f"memory budget {text!r}: write a number and a unit, such as 24GiB or 24GB")
    bytes = int(float(match[1]) * units[match[2].lower()])
    if bytes < 1:
        raise UserError(f"memory budget {text!r}: must be more than nothing")
    return bytes


def usable_bytes(budget: int, *, on_gpu: bool = True) -> int:
    """What of a budget tensors may take."""
    return max(0, math.floor(budget * (1 - _GAPS)) - on_gpu * CONTEXT)


def budget_for(tensor_bytes: int, *, on_gpu: bool = True) -> int:
    """The least budget, in whole MiB, of which tensors may take so much."""
    return math.ceil((tensor_bytes + on_gpu * CONTEXT) / (1 - _GAPS) / 2**20) * 2**20


def choose_memory(
    budget: int,
    model_config: MMDiTConfig,
    autoencoder: Any,
    text: TextNeeds,
    shapes: Iterable[SamplingShape],
    dtype: torch.dtype,
    *,
    fp8: bool = False,
    picture: PictureNeeds | None = None,
    on_gpu: bool = True,
) -> MemoryPlan:
    """The fastest settings with which each of `shapes` fits `budget` bytes of the device's memory.

    `autoencoder` (a module; it may be on the meta device) is in the dtype that it will have. `picture`: what FLUX
    takes where it makes the first frame; its weights wait on the host in any setting. A plan's prediction is the
    largest over the shapes, phase by phase. Raises UserError naming the smallest budget that would do when none fits,
    and where `sample` does for such a request.
    """
    largest: dict[str, int] = {}
    steps = 1
    for shape in shapes:
        needs = activation_bytes(model_config, autoencoder, shape, dtype)
        largest = {phase: max(bytes, largest.get(phase, 0)) for phase, bytes in needs.items()}
        steps = max(steps, shape.settings.steps)
    model = meta_model(model_config, dtype)
    candidates = []
    for settings in every_setting(fp8=fp8):
        predicted = add_weights(largest, model, autoencoder, text, settings, picture)
        copied = copied_bytes(settings, model, module_bytes(autoencoder), text.weights, steps)
        candidates.append((copied, MemoryPlan(budget, settings, predicted, "")))
    candidates.sort(key=lambda candidate: (candidate[0], candidate[1].peak))
    usable = usable_bytes(budget, on_gpu=on_gpu)
    for i, (copied, plan) in enumerate(candidates):
        if plan.peak <= usable:
            faster = [other for _, other in candidates[:i]]
            return replace(plan, reason=_reason(plan, copied, faster, on_gpu))
    least = min((plan for _, plan in candidates), key=lambda plan: plan.peak)
    needed = _gib(budget_for(least.peak, on_gpu=on_gpu))
    raise UserError(
        f"memory budget {_gib(budget)}: the request needs {needed} at least, for {_phase(least)} with "
        f"{least.settings}: raise the budget, or ask for fewer frames or a lower resolution"
    )


def every_setting(*, fp8: bool) -> list[MemorySettings]:
    """All ways to spend less memory, on weights exact or (fp8) in 8 bits."""
    stays: tuple[Stay, ...] = ("resident", "while_used")
    homes: tuple[Home, ...] = ("resident", "streamed")
    modulations: tuple[Literal["resident", "precomputed"], ...] = ("resident", "precomputed")
    return [
        MemorySettings(text=text, autoencoder=autoencoder, blocks=blocks, modulation=modulation, fp8=fp8)
        for text, autoencoder, blocks, modulation in itertools.product(stays, stays, homes, modulations)
    ]


def copied_bytes(settings: MemorySettings, model: MMDiT, autoencoder_bytes: int, text_bytes: int, steps: int) -> int:
    """Bytes of weights that are copied to the GPU per video."""
    arguments = settings.stream_arguments()
    modulation = weight_bytes(model, **arguments | {"blocks": "resident"}).host
    blocks = weight_bytes(model, **arguments).host - modulation
    copied = modulation + steps * blocks
    if settings.autoencoder == "while_used":
        copied += autoencoder_bytes
    if settings.text == "while_used":
        copied += text_bytes
    return copied


def _reason(plan: MemoryPlan, copied: int, faster: list[MemoryPlan], on_gpu: bool) -> str:
    parts = [f"{plan.settings}: {_gib(plan.peak)} at most, in {_phase(plan)}, of {_gib(plan.budget)}"]
    if copied:
        parts.append(f"{_gib(copied)} of weights copied per video")
    if faster:
        next_best = min(faster, key=lambda other: other.peak)
        parts.append(f"what copies less needs a budget of {_gib(budget_for(next_best.peak, on_gpu=on_gpu))}")
    return "; ".join(parts)


def _phase(plan: MemoryPlan) -> str:
    return max(plan.predicted, key=plan.predicted.__getitem__)


def _gib(bytes: int) -> str:
    return f"{math.ceil(bytes / GIB * 100) / 100:.2f} GiB"
