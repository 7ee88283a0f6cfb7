"""Cases of the video autoencoder's ops: the released model on one of its tiles, 32 frames of 256 x 256 pixels.

Shapes  B batch, C channels, T frames, H, W rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from opensora_fast.config import VideoDCAEConfig
from opensora_fast.kernels import pixel_shuffle as pixel_shuffle_op
from opensora_fast.kernels import rms_norm_act as rms_norm_act_op
from opensora_fast.profiling.case import Case, Input, Size, by_name, channels_last

BF16, FP32 = torch.bfloat16, torch.float32
EPS = 1e-5
Shape = tuple[int, int, int, int, int]


def stages(size: Size) -> Iterator[tuple[Shape, bool]]:
    """(shape of what a stage of the encoder works on, whether time is halved after it); the decoder mirrors it."""
    config = VideoDCAEConfig()
    t, h, w = size.video
    for width, halves_time in zip(config.encoder_widths, config.temporal_downsample, strict=True):
        yield (1, width, t, h, w), halves_time
        t, h, w = t // (2 if halves_time else 1), h // 2, w // 2


def _is_preset(number: int, layout: str, dtype: torch.dtype) -> bool:
    """What the presets train in, and of the contiguous layout one stage, which is every kernel of it."""
    return dtype == BF16 and (layout == "channels_last_3d" or number == 0)


def _layouts() -> tuple[tuple[str, torch.dtype], ...]:
    """(layout, dtype): channels last is how the model is trained; the demo and float32 run contiguous."""
    return (
        ("channels_last_3d", BF16),
        ("contiguous_format", BF16),
        ("channels_last_3d", FP32),
        ("contiguous_format", FP32),
    )


def _video(shape: Shape, dtype: torch.dtype, layout: str) -> Input:
    return Input(shape=shape, dtype=dtype, strides=channels_last(shape) if layout == "channels_last_3d" else None)


# Norm over channels, and the activation before a convolution.


def _norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    n = (wide * (wide.square().mean(dim=1, keepdim=True) + EPS).rsqrt()).to(x.dtype)
    return n * weight.view(1, -1, 1, 1, 1) + bias.view(1, -1, 1, 1, 1)


def _norm_residual(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return residual + _norm(x, weight, bias)


def _norm_relu_pad(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.pad(F.relu(_norm(x, weight, bias)), (1,) * 6)


def _op_norm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return rms_norm_act_op.channel_rms_norm(x, weight, bias, residual=residual, eps=EPS)


def _silu_pad(x: Tensor) -> Tensor:
    return F.pad(F.silu(x), (1,) * 6)


def _liger_norm() -> Callable[..., Tensor]:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    def call(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        n = LigerRMSNormFunction.apply(x.movedim(1, -1), weight, EPS, 0.0, "none", False)
        return residual + (n + bias).movedim(-1, 1)

    return call


def _quack_norm() -> Callable[..., Tensor]:
    from quack import rmsnorm

    def call(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        rows = x.movedim(1, -1)
        n = rmsnorm(rows.reshape(-1, rows.shape[-1]), weight, bias=bias, eps=EPS).view(rows.shape)
        return residual + n.movedim(-1, 1)

    return call


def rms_norm_act(size: Size) -> list[Case]:
    op = rms_norm_act_op
    cases = []
    for number, (shape, _) in enumerate(stages(size)):
        for layout, dtype in _layouts():
            x = {"x": _video(shape, dtype, layout)}
            parameters = {
                name: Input(shape=(shape[1],), dtype=dtype, fill=fill)
                for name, fill in (("weight", "around_one"), ("bias", "modulation"))
            }
            timed = number in (0, 2, 4) and (layout, dtype) != ("contiguous_format", BF16)
            common: dict[str, Any] = dict(
                op="rms_norm_act",
                dtype=dtype,
                layout=layout,
                preset=_is_preset(number, layout, dtype),
                timed=timed,
                backend=partial(op.selected, shape, dtype),
            )
            last = layout == "channels_last_3d"
            cases.append(
                Case(
                    name=f"channel_rms_norm + residual, stage {number}",
                    inputs=x | parameters | {"residual": _video(shape, dtype, layout)},
                    function=_op_norm,
                    composite=_norm_residual,
                    cost=partial(op.cost, shape, dtype, residual=True),
                    baselines={"liger": _liger_norm, "quack": _quack_norm} if last else {},
                    **common,
                )
            )
            if number == len(VideoDCAEConfig().encoder_widths) - 1:
                continue  # its blocks have no 3x3x3 convolution after an activation of their own
            cases.append(
                Case(
                    name=f"silu_pad, stage {number}",
                    inputs=x,
                    function=by_name(op.silu_pad, ["x"], pad=1),
                    composite=_silu_pad,
                    cost=partial(op.cost, shape, dtype, function="silu_pad", pad=1),
                    **common,
                )
            )
    cases.append(_norm_relu(size))
    return cases


def _norm_relu(size: Size) -> Case:
    """What the decoder ends in: norm, ReLU and the padding of the last convolution."""
    shape, _ = next(stages(size))
    return Case(
        op="rms_norm_act",
        name="channel_rms_norm + relu + pad, stage 0",
        dtype=BF16,
        layout="channels_last_3d",
        inputs={
            "x": _video(shape, BF16, "channels_last_3d"),
            "weight": Input(shape=(shape[1],), dtype=BF16, fill="around_one"),
            "bias": Input(shape=(shape[1],), dtype=BF16, fill="modulation"),
        },
        function=by_name(rms_norm_act_op.channel_rms_norm, ["x", "weight", "bias"], eps=EPS, act="relu", pad=1),
        composite=_norm_relu_pad,
        cost=partial(rms_norm_act_op.cost, shape, BF16, act="relu", pad=1),
        backend=partial(rms_norm_act_op.selected, shape, BF16),
    )


# The shortcuts between stages.


def _expand(x_BCTHW: Tensor, rs: int, rt: int) -> Tensor:
    """[B, C, T, H, W] -> [B, C * rt * rs * rs, T / rt, H / rs, W / rs]."""
    shifts = product(range(rt), range(rs), range(rs))
    return torch.stack([x_BCTHW[:, :, it::rt, ih::rs, iw::rs] for it, ih, iw in shifts], dim=2).flatten(1, 2)


def _down(h: Tensor, x: Tensor) -> Tensor:
    """The eager form: unshuffle, group, mean, add."""
    rs, rt = x.shape[-1] // h.shape[-1], x.shape[2] // h.shape[2]
    return h + _expand(x, rs, rt).unflatten(1, (h.shape[1], -1)).mean(dim=2)


def _up(h: Tensor, x: Tensor) -> Tensor:
    """The eager form: repeat, shuffle, add."""
    rs, rt = h.shape[-1] // x.shape[-1], h.shape[2] // x.shape[2]
    (B, C), (t, height, width) = h.shape[:2], x.shape[2:]
    repeated = x.repeat_interleave(C * rt * rs * rs // x.shape[1], dim=1)
    return h + repeated.view(B, C, rt, rs, rs, t, height, width).permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(h.shape)


def pixel_shuffle(size: Size) -> list[Case]:
    config, all_stages = VideoDCAEConfig(), list(stages(size))
    steps = [(shape, all_stages[number + 1][0]) for number, (shape, _) in enumerate(all_stages[:-1])]
    last = all_stages[-1][0]
    steps.append(
        (last, (1, config.latent_channels, *last[2:]))
    )  # the encoder's end; the decoder begins with its mirror
    cases = []
    for number, (large, small) in enumerate(steps):
        temporal = large[2] // small[2]
        factors = f"{temporal}x{large[3] // small[3]}x{large[4] // small[4]}"
        for (layout, dtype), down in product(_layouts(), (True, False)):
            h, x = (small, large) if down else (large, small)
            name = "pixel_unshuffle_mean_add" if down else "pixel_shuffle_repeat_add"
            cases.append(
                Case(
                    op="pixel_shuffle",
                    name=f"{name} {factors}, stage {number}",
                    dtype=dtype,
                    layout=layout,
                    inputs={"h": _video(h, dtype, layout), "x": _video(x, dtype, layout)},
                    function=by_name(getattr(pixel_shuffle_op, name), ["h", "x"], temporal=temporal),
                    composite=_down if down else _up,
                    cost=partial(pixel_shuffle_op.cost, h, x, dtype),
                    backend=partial(pixel_shuffle_op.selected, x, dtype),
                    preset=_is_preset(number, layout, dtype),
                    timed=number in (0, 3) and (layout, dtype) != ("contiguous_format", BF16),
                )
            )
    return cases
