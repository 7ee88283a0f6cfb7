"""What `opensora-fast bench` times: for each op, shapes like the released models' and the eager form one would write.

Shapes   B batch, C channels, T frames, H, W rows and columns.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from opensora_fast.kernels import pixel_shuffle
from opensora_fast.kernels.cost import Cost


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call to time. `function` and `composite` take the tensors named in `shapes`, in that order, and agree.

    cost: mode ("forward" or "backward") -> Cost.  backend: device type -> (backend, reason).
    """

    op: str
    name: str
    dtype: torch.dtype
    layout: torch.memory_format
    shapes: Mapping[str, tuple[int, ...]]
    function: Callable[..., Tensor]
    composite: Callable[..., Tensor]
    cost: Callable[[str], Cost]
    backend: Callable[[str], tuple[str, str]]

    def inputs(self, device: torch.device) -> list[Tensor]:
        """Random leaves that ask for gradients."""
        generator = torch.Generator(device).manual_seed(0)
        tensors = [torch.randn(shape, device=device, generator=generator) for shape in self.shapes.values()]
        return [tensor.to(self.dtype, memory_format=self.layout).requires_grad_() for tensor in tensors]


def _expand(x_BCTHW: Tensor, rs: int, rt: int) -> Tensor:
    """[B, C, T, H, W] -> [B, C * rt * rs * rs, T / rt, H / rs, W / rs]."""
    shifts = product(range(rt), range(rs), range(rs))
    return torch.stack([x_BCTHW[:, :, it::rt, ih::rs, iw::rs] for it, ih, iw in shifts], dim=2).flatten(1, 2)


def _down_composite(main: Tensor, x: Tensor, *, spatial_factor: int, temporal_factor: int) -> Tensor:
    """The eager form: unshuffle, group, mean, add."""
    return main + _expand(x, spatial_factor, temporal_factor).unflatten(1, (main.shape[1], -1)).mean(dim=2)


def _up_composite(main: Tensor, x: Tensor, *, spatial_factor: int, temporal_factor: int) -> Tensor:
    """The eager form: repeat, shuffle, add."""
    rs, rt = spatial_factor, temporal_factor
    (B, C), (t, h, w) = main.shape[:2], x.shape[2:]
    repeated = x.repeat_interleave(C * rt * rs * rs // x.shape[1], dim=1)
    return main + repeated.view(B, C, rt, rs, rs, t, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(main.shape)


def _pixel_shuffle(dtype: torch.dtype, layout: torch.memory_format, *, down: bool, rt: int) -> Case:
    large, small = (1, 128, 16, 128, 128), (1, 256, 16 // rt, 64, 64)
    shapes = {"main": small, "x": large} if down else {"main": large, "x": small}
    name = "space_to_channel_mean_add" if down else "channel_repeat_to_space_add"
    composite = _down_composite if down else _up_composite
    factors: dict[str, Any] = dict(spatial_factor=2, temporal_factor=rt)
    return Case(
        op="pixel_shuffle",
        name=f"{name} {rt}x2x2",
        dtype=dtype,
        layout=layout,
        shapes=shapes,
        function=partial(getattr(pixel_shuffle, name), **factors),
        composite=partial(composite, **factors),
        cost=partial(pixel_shuffle.cost, shapes["main"], shapes["x"], dtype),
        backend=partial(pixel_shuffle.selected, shapes["x"], dtype),
    )


CASES: dict[str, list[Case]] = {
    "pixel_shuffle": [
        _pixel_shuffle(dtype, layout, down=down, rt=rt)
        for dtype, layout, rt, down in product(
            (torch.bfloat16, torch.float32), (torch.contiguous_format, torch.channels_last_3d), (1, 2), (True, False)
        )
    ],
}
