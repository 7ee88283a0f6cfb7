"""A case of the benchmark: named inputs, the op and its eager form on them, its cost, and who else can do the same."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from opensora_fast.config import MMDIT_PRESETS, MMDiTConfig
from opensora_fast.kernels.cost import Cost

Outputs = Tensor | Sequence[Tensor]

# What an input is filled with: (shape, device, generator) -> float32. Never zeros: they run faster than data.
FILLS: Mapping[str, Callable[..., Tensor]] = {
    "normal": lambda shape, **of: torch.randn(shape, **of),
    "weight": lambda shape, **of: torch.randn(shape, **of) / math.sqrt(shape[-1]),
    "modulation": lambda shape, **of: 0.3 * torch.randn(shape, **of),  # shift, scale and gate of a trained model
    "around_one": lambda shape, **of: 1 + 0.1 * torch.randn(shape, **of),  # weights of a norm
    "unit": lambda shape, **of: torch.rand(shape, **of),  # times of the flow
    "cosine": lambda shape, **of: torch.cos(2 * math.pi * torch.rand(shape, **of)),
    "sine": lambda shape, **of: torch.sin(2 * math.pi * torch.rand(shape, **of)),
    "square": lambda shape, **of: 1e-4 * torch.rand(shape, **of) + 1e-6,  # second moments
}


@dataclass(frozen=True, kw_only=True)
class Input:
    """A tensor to make. `strides` are those of a view into a wider buffer; None is contiguous."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    fill: str = "normal"
    strides: tuple[int, ...] | None = None
    gradient: bool = True

    def make(self, device: torch.device | str, generator: torch.Generator | None = None) -> Tensor:
        """The tensor, a leaf that asks for its gradient where there is one; on `meta`, no data."""
        if self.strides is None:
            out = torch.empty(self.shape, dtype=self.dtype, device=device)
        else:
            out = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=device)
        if out.device.type != "meta":
            out.copy_(FILLS[self.fill](self.shape, device=device, generator=generator))
        return out.requires_grad_(self.gradient)


def channels_last(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of [B, C, T, H, W] in channels_last_3d."""
    _, C, T, H, W = shape
    return (T * H * W * C, 1, H * W * C, W * C, C)


def by_name(function: Callable[..., Any], names: Sequence[str], **of: Any) -> Callable[..., Any]:
    """A function whose arguments carry their shapes in their names, called by the case's names, in this order."""
    return lambda **inputs: function(*(inputs[name] for name in names), **of)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call to time. `function` and `composite` take the inputs by name and agree in what they return.

    cost: mode -> Cost.  backend: device type -> (backend, reason).
    candidates: backends of the op that are timed beside the one that it chooses, each as a provider of its own.
    baselines: provider -> the same call by another library, made when asked for.
    """

    op: str
    name: str
    dtype: torch.dtype
    inputs: Mapping[str, Input]
    function: Callable[..., Outputs]
    composite: Callable[..., Outputs]
    cost: Callable[[str], Cost]
    backend: Callable[[str], tuple[str, str]]
    modes: tuple[str, ...] = ("forward", "backward")
    matrix: bool = False  # owns matrix products: bound by the larger of a copy and a product
    preset: bool = True  # a call that a preset's training makes: compiled ahead of time
    timed: bool = True
    mutates: bool = False  # writes into its inputs: each check starts from fresh ones
    baselines: Mapping[str, Callable[[], Callable[..., Outputs]]] = field(default_factory=dict)
    layout: str = "contiguous_format"
    exact: torch.dtype = torch.float64  # what `composite` is computed in to judge both
    candidates: tuple[str, ...] = ()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: of.shape for name, of in self.inputs.items()}

    def make(self, device: torch.device | str) -> dict[str, Tensor]:
        """Random inputs, the same at every call."""
        generator = None if torch.device(device).type == "meta" else torch.Generator(device).manual_seed(0)
        return {name: of.make(device, generator) for name, of in self.inputs.items()}


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much of the released models' shapes a case has: tokens are divided, `width` replaces the hidden size."""

    name: str
    divide_tokens: int
    width: int | None = None  # the preset's
    linear_width: int | None = None  # of the ops that own a matrix product
    video: tuple[int, int, int] = (32, 256, 256)  # frames, height, width that the autoencoder is given: one tile

    def model(self, *, linear: bool = False) -> MMDiTConfig:
        """The released transformer, narrowed; heads keep their channels."""
        released = MMDIT_PRESETS["open-sora-v2"]
        width = (self.linear_width if linear else None) or self.width or released.hidden_size
        return dataclasses.replace(released, hidden_size=width, num_heads=width // released.head_dim)


SIZES = {
    size.name: size
    for size in (
        Size(name="full", divide_tokens=1),
        Size(name="small", divide_tokens=64, linear_width=768, video=(4, 128, 128)),
        Size(name="tiny", divide_tokens=128, width=256, video=(4, 32, 32)),
    )
}
