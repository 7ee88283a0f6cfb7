"""Pixel-shuffle residual shortcuts: space moves into channels with a group mean, or channels into space with repeats.

Let R = rt * rs * rs, let k = ((c * rt + it) * rs + ih) * rs + iw (c slowest) be the expanded channel of the pixel
(t * rt + it, h * rs + ih, w * rs + iw) of channel c, and G the number of consecutive expanded channels in a group:

    pixel_unshuffle_mean_add   out[m, t, h, w] = h[m, t, h, w] + 1/G sum_{g < G} x[pixel of k = m * G + g]
    pixel_shuffle_repeat_add   out[pixel of k] = h[pixel of k] + x[k // G, t, h, w]

Backward, both being linear: dh = dout itself (no copy), and each one's dx is the other's index map:

    pixel_unshuffle_mean_add   dx[pixel of k]  = 1/G dout[k // G, t, h, w]
    pixel_shuffle_repeat_add   dx[m, t, h, w]  = sum_{g < G} dout[pixel of k = m * G + g]

Shapes      small [B, M, T, H, W];  large [B, C, T * rt, H * rs, W * rs];  G = C * R / M.  The backward saves nothing.
Numerics    float32, bfloat16, float16 in and out, sums in float32, rounded once. float64 has no native kernel.
Envelope    rt, rs in {1, 2}, rs from the shapes; M divides C * R; h and x of one dtype and device. Contiguous and
            channels_last_3d are taken as they are; the output has h's layout, an x of another is copied to it first.
Traffic     forward 2 h + x, backward h + x elements: memory bound -> the target is bytes/s (cost()).
Determinism one thread sums an output element, in one order: bitwise equal over runs and thread counts.
Source      DC-AE, residual autoencoding (Chen et al. 2024, arXiv:2410.10733, section 3.1), and its temporal form in
            Open-Sora 2.0. Unlike the composite of unshuffle, mean and add, it makes one pass and no intermediate.
Device code below for Triton; csrc/pixel_shuffle.h (index arithmetic, both devices), pixel_shuffle_cpu.cpp,
            pixel_shuffle.cu
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opensora_fast.kernels import backend, extension, launch
from opensora_fast.kernels.cost import Cost
from opensora_fast.kernels.launch import jit, tl

NATIVE = {"cpu": "host", "cuda": "cuda"}
NATIVE_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


# Reference: every axis spelt out, in float32 (float64 for float64); its autograd is the oracle of the backward.


def space_to_channel_reference(
    base_BMTHW: Tensor | None,
    large_BCTHW: Tensor,
    channels: int,
    scale: float,
    spatial_factor: int,
    temporal_factor: int,
) -> Tensor:
    """base + scale * (sum over groups of consecutive expanded channels of `large`), `channels` channels."""
    rs, rt = spatial_factor, temporal_factor
    B, C, T, H, W = large_BCTHW.shape
    t, h, w = T // rt, H // rs, W // rs
    wide = torch.promote_types(large_BCTHW.dtype, torch.float32)
    split = large_BCTHW.to(wide).reshape(B, C, t, rt, h, rs, w, rs)
    groups = split.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(B, channels, C * rt * rs * rs // channels, t, h, w)
    out = groups.sum(dim=2) * scale
    if base_BMTHW is not None:
        out = base_BMTHW.to(wide) + out
    return out.to(large_BCTHW.dtype)


def channel_to_space_reference(
    base_BCTHW: Tensor | None,
    small_BMTHW: Tensor,
    channels: int,
    scale: float,
    spatial_factor: int,
    temporal_factor: int,
) -> Tensor:
    """base + scale * (repeated channels of `small`, moved out into space and time), `channels` channels."""
    rs, rt = spatial_factor, temporal_factor
    B, M, t, h, w = small_BMTHW.shape
    wide = torch.promote_types(small_BMTHW.dtype, torch.float32)
    repeated = small_BMTHW.to(wide).repeat_interleave(channels * rt * rs * rs // M, dim=1)
    split = repeated.reshape(B, channels, rt, rs, rs, t, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4)
    out = split.reshape(B, channels, t * rt, h * rs, w * rs) * scale
    if base_BCTHW is not None:
        out = base_BCTHW.to(wide) + out
    return out.to(small_BMTHW.dtype)


# Choice of the tile, then of the implementation.


@dataclass(frozen=True)
class Tile:
    """How lines of the small tensor (its channels where they are last, else a row) meet runs of the large one.

    A line is made of periods: S elements of it and L of each run, a contiguous piece of the large tensor; S or L is 1.
    Each of the S elements belongs to `taps` runs. A program does `rows` neighbouring lines, `block` periods of each.
    paired: there are such runs. Otherwise a tap is one large element, found by its index alone: S = L = 1, taps = G.
    """

    paired: bool
    S: int
    L: int
    taps: int
    rows: int
    block: int
    num_warps: int = 4


# Modelled, not yet measured on a GPU: 1,024 elements of a tap are one 16-byte access of bfloat16 for each of 128
# threads. With several taps, and the base, that is enough in flight; a lone tap takes two accesses.
TILE_ELEMENTS = 1024
MAX_RUN = 16  # L beyond this would leave fewer than 64 periods to a program


def choose_tile(
    group: int, spatial_factor: int, temporal_factor: int, channels_last: bool, lines: int, line: int
) -> Tile:
    """Pure. lines: how many neighbours a line has, itself included; line: the number of its elements."""
    positions = temporal_factor * spatial_factor**2
    paired, S, L, taps = False, 1, 1, group
    if not channels_last and group % spatial_factor == 0:
        paired, L, taps = True, spatial_factor, group // spatial_factor
    elif channels_last and positions % group == 0:
        paired, S = True, positions // group
    elif channels_last and group % positions == 0 and group // positions in (1, 2, 4, 8, MAX_RUN):
        paired, L, taps = True, group // positions, positions
    elements = TILE_ELEMENTS * (2 if taps == 1 else 1)
    block = min(launch.power_of_two(line // S), elements // (S * L))
    rows = min(launch.power_of_two(lines), elements // (S * L * block))
    return Tile(paired, S, L, taps, rows, block)


def missing_backends(dtype: torch.dtype, device_type: str) -> dict[str, str]:
    """The backends for tensors on `device_type`, each with why it cannot run; an empty reason means that it can."""
    missing = {"reference": ""}
    if native := NATIVE.get(device_type):
        missing[native] = (
            extension.load().missing[native] if dtype in NATIVE_DTYPES else f"{dtype} has no native kernel"
        )
    return missing | {"triton": launch.missing(device_type)}


def choose(shape: Sequence[int], dtype: torch.dtype, device_type: str, missing: Mapping[str, str]) -> tuple[str, str]:
    """(backend, reason); pure. Native kernels first, until Triton's are measured against them."""
    name = NATIVE.get(device_type)
    if name is None:
        return "reference", f"there is no native kernel for {device_type} tensors"
    if not missing[name]:
        return name, "one fused pass over memory"
    if device_type == "cuda" and not missing["triton"]:
        return "triton", f"one fused pass over memory; {missing[name]}"
    return "reference", missing[name]


def selected(shape: Sequence[int], dtype: torch.dtype, device_type: str) -> tuple[str, str]:
    """(backend, reason) of a call on such a tensor, with OPENSORA_FAST_BACKEND obeyed."""
    missing = missing_backends(dtype, device_type)
    return backend.select("pixel_shuffle", choose(shape, dtype, device_type, missing), missing)


# Device code. T, H, W and M are the small tensor's. Strides are a sample's, a channel's, a frame's, a row's and a
# column's, in elements. Tiles are [ROWS, BLOCK * S] of the small tensor, [ROWS, BLOCK * L, S] of the large one.


@jit
def _place(T, H, W, M, CHANNELS_LAST: tl.constexpr, S: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's sample, channel, frame, row, first line and first period.

    Channels last, lines are the pixels of a row, and periods lie along M; contiguous, they are the rows of a frame,
    and periods lie along W. What varies within the tile is 0 here.
    """
    lines, periods = (W, M // S) if CHANNELS_LAST else (H, W)
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(periods, BLOCK)
    period = program % blocks * BLOCK
    program = program // blocks
    blocks = tl.cdiv(lines, ROWS)
    line = program % blocks * ROWS
    program = program // blocks
    if CHANNELS_LAST:
        return program // H // T, program * 0, program // H % T, program % H, line, period
    else:
        return program // T // M, program // T % M, program % T, program * 0, line, period


@jit
def _small_tile(
    b,
    m,
    t,
    h,
    line,
    period,
    H,
    W,
    M,
    stride_b,
    stride_c,
    stride_t,
    stride_h,
    stride_w,
    CHANNELS_LAST: tl.constexpr,
    S: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Offsets and mask."""
    line = line + tl.arange(0, ROWS)[:, None]
    element = period * S + tl.arange(0, BLOCK * S)[None, :]
    offset = b * stride_b + t * stride_t
    if CHANNELS_LAST:
        return offset + h * stride_h + line * stride_w + element * stride_c, (line < W) & (element < M)
    else:
        return offset + m * stride_c + line * stride_h + element * stride_w, (line < H) & (element < W)


@jit
def _expanded(k, SPATIAL: tl.constexpr, TEMPORAL: tl.constexpr):
    """Large channel, and the frame, row and column in a pixel, of expanded channel k."""
    column = k % SPATIAL
    row = k // SPATIAL % SPATIAL
    frame = k // (SPATIAL * SPATIAL) % TEMPORAL
    return k // (SPATIAL * SPATIAL * TEMPORAL), frame, row, column


@jit
def _large_tile(
    b,
    m,
    t,
    h,
    line,
    period,
    tap,
    H,
    W,
    M,
    stride_b,
    stride_c,
    stride_t,
    stride_h,
    stride_w,
    GROUP: tl.constexpr,
    SPATIAL: tl.constexpr,
    TEMPORAL: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PAIRED: tl.constexpr,
    S: tl.constexpr,
    L: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Offsets and mask of one tap."""
    line = line + tl.arange(0, ROWS)[:, None, None]
    element = period * L + tl.arange(0, BLOCK * L)[None, :, None]  # of a run
    if CHANNELS_LAST:
        mask = (line < W) & (element < M // S * L)
        m, w = element, line
    else:
        mask = (line < H) & (element < W * L)
        h, w = line, element
    if not PAIRED:
        c, frame, row, column = _expanded(m * GROUP + tap, SPATIAL, TEMPORAL)
        w = w * SPATIAL + column
    elif not CHANNELS_LAST:
        c, frame, row, _ = _expanded(m * GROUP + tap * L, SPATIAL, TEMPORAL)
    else:
        c = element
        first = tl.arange(0, S)[None, None, :] * GROUP if S > 1 else 0
        _, frame, row, column = _expanded(first + tap, SPATIAL, TEMPORAL)
        w = w * SPATIAL + column
    t, h = t * TEMPORAL + frame, h * SPATIAL + row
    return b * stride_b + c * stride_c + t * stride_t + h * stride_h + w * stride_w, mask


@jit
def _space_to_channel_kernel(
    base_ptr,
    large_ptr,
    out_ptr,
    T,
    H,
    W,
    M,
    out_b,
    out_c,
    out_t,
    out_h,
    out_w,
    large_b,
    large_c,
    large_t,
    large_h,
    large_w,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    SPATIAL: tl.constexpr,
    TEMPORAL: tl.constexpr,
    HAS_BASE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PAIRED: tl.constexpr,
    S: tl.constexpr,
    L: tl.constexpr,
    TAPS: tl.constexpr,
    UNROLL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    b, m, t, h, line, period = _place(T, H, W, M, CHANNELS_LAST, S, ROWS, BLOCK)
    total = tl.zeros([ROWS, BLOCK * L, S], COMPUTE)
    for first in range(0, TAPS, UNROLL):
        for i in tl.static_range(UNROLL):
            at, inside = _large_tile(
                b, m, t, h, line, period, first + i, H, W, M, large_b, large_c, large_t, large_h, large_w,
                GROUP, SPATIAL, TEMPORAL, CHANNELS_LAST, PAIRED, S, L, ROWS, BLOCK,
            )  # fmt: skip
            total += tl.load(large_ptr + at, mask=inside, other=0).to(COMPUTE)
    if L > 1:
        out = tl.sum(tl.reshape(total, [ROWS, BLOCK, L]), axis=2) * SCALE
    else:
        out = tl.reshape(total, [ROWS, BLOCK * S]) * SCALE
    offset, mask = _small_tile(
        b, m, t, h, line, period, H, W, M, out_b, out_c, out_t, out_h, out_w, CHANNELS_LAST, S, ROWS, BLOCK
    )  # fmt: skip
    if HAS_BASE:
        out += tl.load(base_ptr + offset, mask=mask, other=0).to(COMPUTE)
    tl.store(out_ptr + offset, out, mask=mask)


@jit
def _channel_to_space_kernel(
    base_ptr,
    small_ptr,
    out_ptr,
    T,
    H,
    W,
    M,
    small_b,
    small_c,
    small_t,
    small_h,
    small_w,
    out_b,
    out_c,
    out_t,
    out_h,
    out_w,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    SPATIAL: tl.constexpr,
    TEMPORAL: tl.constexpr,
    HAS_BASE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PAIRED: tl.constexpr,
    S: tl.constexpr,
    L: tl.constexpr,
    TAPS: tl.constexpr,
    UNROLL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    b, m, t, h, line, period = _place(T, H, W, M, CHANNELS_LAST, S, ROWS, BLOCK)
    offset, mask = _small_tile(
        b, m, t, h, line, period, H, W, M, small_b, small_c, small_t, small_h, small_w, CHANNELS_LAST, S, ROWS, BLOCK
    )  # fmt: skip
    value = tl.load(small_ptr + offset, mask=mask, other=0).to(COMPUTE) * SCALE
    value = tl.broadcast_to(tl.reshape(value, [ROWS, BLOCK, S]), [ROWS, BLOCK, S * L])
    value = tl.reshape(value, [ROWS, BLOCK * L, S])
    for first in range(0, TAPS, UNROLL):
        for i in tl.static_range(UNROLL):
            at, inside = _large_tile(
                b, m, t, h, line, period, first + i, H, W, M, out_b, out_c, out_t, out_h, out_w,
                GROUP, SPATIAL, TEMPORAL, CHANNELS_LAST, PAIRED, S, L, ROWS, BLOCK,
            )  # fmt: skip
            out = value
            if HAS_BASE:
                out += tl.load(base_ptr + at, mask=inside, other=0).to(COMPUTE)
            tl.store(out_ptr + at, out, mask=inside)


# Launchers: allocate, settle the layout, hand pointers over.


def _layout(tensor: Tensor) -> torch.memory_format:
    if not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last_3d):
        return torch.channels_last_3d
    return torch.contiguous_format


def _empty_out(base: Tensor | None, source: Tensor, channels: int, thw: Sequence[int]) -> Tensor:
    return torch.empty(
        (source.shape[0], channels, *thw),
        dtype=source.dtype,
        device=source.device,
        memory_format=_layout(source if base is None else base),
    )


def triton_forward(
    function: str,
    base: Tensor | None,
    source: Tensor,
    out: Tensor,
    scale: float,
    spatial_factor: int,
    temporal_factor: int,
) -> Tensor:
    """Fill `out` by `function`, "space_to_channel" or "channel_to_space"; base and source have its layout."""
    down = function == "space_to_channel"
    small, large = (out, source) if down else (source, out)
    B, M, T, H, W = small.shape
    group = large.shape[1] * temporal_factor * spatial_factor**2 // max(M, 1)
    channels_last = _layout(out) == torch.channels_last_3d
    lines, line, others = (W, M, T * H) if channels_last else (H, W, M * T)
    tile = choose_tile(group, spatial_factor, temporal_factor, channels_last, lines, line)
    blocks = -(-lines // tile.rows) * -(-(line // tile.S) // tile.block)
    pointers = {"large_ptr" if down else "small_ptr": source, "base_ptr": source if base is None else base}
    strides = {
        f"{prefix}_{axis}": stride
        for prefix, tensor in (("out", out), ("large" if down else "small", source))
        for axis, stride in zip("bcthw", tensor.stride(), strict=True)
    }
    arguments: dict[str, Any] = pointers | strides
    launch.launch(
        _space_to_channel_kernel if down else _channel_to_space_kernel,
        (B * others * blocks if out.numel() else 0,),
        num_warps=tile.num_warps,
        **arguments,
        out_ptr=out,
        T=T,
        H=H,
        W=W,
        M=M,
        SCALE=scale,
        GROUP=group,
        SPATIAL=spatial_factor,
        TEMPORAL=temporal_factor,
        HAS_BASE=base is not None,
        CHANNELS_LAST=channels_last,
        PAIRED=tile.paired,
        S=tile.S,
        L=tile.L,
        TAPS=tile.taps,
        UNROLL=math.gcd(tile.taps, 8),
        ROWS=tile.rows,
        BLOCK=tile.block,
        COMPUTE=launch.compute_type(out.dtype),
    )
    return out


def _run(
    function: str,
    base: Tensor | None,
    source: Tensor,
    out: Tensor,
    scale: float,
    spatial_factor: int,
    temporal_factor: int,
) -> Tensor:
    """Fill `out` with the selected backend's `function`, which is "space_to_channel" or "channel_to_space"."""
    missing = missing_backends(source.dtype, source.device.type)
    selection = selected(source.shape, source.dtype, source.device.type)
    name = backend.announced("pixel_shuffle", selection, missing)
    if name == "reference":
        return out.copy_(REFERENCES[function](base, source, out.shape[1], scale, spatial_factor, temporal_factor))
    if out.numel() == 0:
        return out
    layout = _layout(out)
    source = source.contiguous(memory_format=layout)
    base = None if base is None else base.contiguous(memory_format=layout)
    if name == "triton":
        return triton_forward(function, base, source, out, scale, spatial_factor, temporal_factor)
    small, large = (out, source) if function == "space_to_channel" else (source, out)
    arguments = dict(
        out=out.data_ptr(),
        base=0 if base is None else base.data_ptr(),
        source=source.data_ptr(),
        dtype=NATIVE_DTYPES[source.dtype],
        channels_last=layout == torch.channels_last_3d,
        batch=out.shape[0],
        small_channels=small.shape[1],
        large_channels=large.shape[1],
        small_thw=tuple(small.shape[2:]),
        spatial_factor=spatial_factor,
        temporal_factor=temporal_factor,
        scale=scale,
    )
    native = extension.load().module
    if name == "host":
        getattr(native, f"{function}_cpu")(**arguments, threads=torch.get_num_threads())
    else:
        with torch.cuda.device(source.device):
            getattr(native, f"{function}_cuda")(**arguments, stream=torch.cuda.current_stream().cuda_stream)
    return out


REFERENCES = {"space_to_channel": space_to_channel_reference, "channel_to_space": channel_to_space_reference}


# Ops: each is the other's backward, so derivatives of every order come from these two.


@torch.library.custom_op("opensora_fast::space_to_channel", mutates_args=())
def _space_to_channel(
    base: Tensor | None, large: Tensor, channels: int, scale: float, spatial_factor: int, temporal_factor: int
) -> Tensor:
    out = _fake_space_to_channel(base, large, channels, scale, spatial_factor, temporal_factor)
    return _run("space_to_channel", base, large, out, scale, spatial_factor, temporal_factor)


@_space_to_channel.register_fake
def _fake_space_to_channel(base, large, channels, scale, spatial_factor, temporal_factor):
    T, H, W = large.shape[2:]
    return _empty_out(base, large, channels, (T // temporal_factor, H // spatial_factor, W // spatial_factor))


@torch.library.custom_op("opensora_fast::channel_to_space", mutates_args=())
def _channel_to_space(
    base: Tensor | None, small: Tensor, channels: int, scale: float, spatial_factor: int, temporal_factor: int
) -> Tensor:
    out = _fake_channel_to_space(base, small, channels, scale, spatial_factor, temporal_factor)
    return _run("channel_to_space", base, small, out, scale, spatial_factor, temporal_factor)


@_channel_to_space.register_fake
def _fake_channel_to_space(base, small, channels, scale, spatial_factor, temporal_factor):
    T, H, W = small.shape[2:]
    return _empty_out(base, small, channels, (T * temporal_factor, H * spatial_factor, W * spatial_factor))


def _save(ctx, inputs, output):
    base, source, _, ctx.scale, ctx.spatial_factor, ctx.temporal_factor = inputs
    ctx.has_base, ctx.source_channels = base is not None, source.shape[1]


def _backward_through(transpose):
    def backward(ctx, grad):
        d_source = None
        if ctx.needs_input_grad[1]:
            d_source = transpose(None, grad, ctx.source_channels, ctx.scale, ctx.spatial_factor, ctx.temporal_factor)
        return grad if ctx.has_base else None, d_source, None, None, None, None

    return backward


_space_to_channel.register_autograd(_backward_through(_channel_to_space), setup_context=_save)
_channel_to_space.register_autograd(_backward_through(_space_to_channel), setup_context=_save)


# Public functions.


def _checked_factors(small: Tensor, large: Tensor, small_name: str, large_name: str, temporal: int) -> tuple[int, int]:
    """(G, spatial factor) of the envelope, or ValueError naming the argument outside of it."""
    if temporal not in (1, 2):
        raise ValueError(f"temporal is {temporal}; it must be 1 or 2")
    for name, tensor in ((small_name, small), (large_name, large)):
        if tensor.dim() != 5:
            raise ValueError(f"{name} has {tensor.dim()} dimensions; it must be [batch, channels, time, height, width]")
        if tensor.dtype not in launch.DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}; it must be float32, bfloat16, float16 or float64")
    if small.dtype != large.dtype or small.device != large.device:
        raise ValueError(
            f"x must match h's dtype and device; {small_name} is {small.dtype} on {small.device}, "
            f"{large_name} is {large.dtype} on {large.device}"
        )
    B, M, T, H, W = small.shape
    spatial = 1 if large.shape[3:] == small.shape[3:] else 2
    expected = (B, T * temporal, H * spatial, W * spatial)
    if (large.shape[0], *large.shape[2:]) != expected:
        raise ValueError(
            f"{large_name} has (batch, time, height, width) {(large.shape[0], *large.shape[2:])}; "
            f"it must be {expected}, {small_name}'s with time times {temporal} and space times 1 or 2"
        )
    expanded = large.shape[1] * temporal * spatial**2
    if M == 0 or expanded == 0 or expanded % M:
        raise ValueError(
            f"{small_name} has {M} channels; they must divide the {expanded} expanded channels of {large_name}"
        )
    return expanded // M, spatial


def pixel_unshuffle_mean_add(h_BMTHW: Tensor, x_BCTHW: Tensor, *, temporal: int) -> Tensor:
    """The downsampling shortcut: h + the group means of x with its space (and time) moved into channels.

    h: [B, M, T, H, W], the convolution's branch.  x: [B, C, T * temporal, H * rs, W * rs], the block's input.
    temporal and rs are 1 or 2, rs is found from the shapes, and M divides C * temporal * rs * rs. Both float32,
    bfloat16, float16 or float64, on one device. Returns h's shape, dtype and layout. Differentiable in both.
    ValueError names the argument that is outside of this. DC-AE, section 3.1.
    """
    group, spatial = _checked_factors(h_BMTHW, x_BCTHW, "h", "x", temporal)
    return _space_to_channel(h_BMTHW, x_BCTHW, h_BMTHW.shape[1], 1 / group, spatial, temporal)


def pixel_shuffle_repeat_add(h_BCTHW: Tensor, x_BMTHW: Tensor, *, temporal: int) -> Tensor:
    """The upsampling shortcut: h + x with its channels repeated and moved out into space (and time).

    h: [B, C, T * temporal, H * rs, W * rs], the convolution's branch.  x: [B, M, T, H, W], the block's input.
    temporal and rs are 1 or 2, rs is found from the shapes, and M divides C * temporal * rs * rs. Both float32,
    bfloat16, float16 or float64, on one device. Returns h's shape, dtype and layout. Differentiable in both.
    ValueError names the argument that is outside of this. DC-AE, section 3.1.
    """
    _, spatial = _checked_factors(x_BMTHW, h_BCTHW, "x", "h", temporal)
    return _channel_to_space(h_BCTHW, x_BMTHW, h_BCTHW.shape[1], 1.0, spatial, temporal)


def cost(h_shape: Sequence[int], x_shape: Sequence[int], dtype: torch.dtype, mode: str) -> Cost:
    """Cost of either function; mode is "forward" or "backward" (x's gradient: h's is free)."""
    h, x = math.prod(h_shape), math.prod(x_shape)
    if mode == "forward":
        return Cost(flops=max(h, x) + h, bytes=(2 * h + x) * dtype.itemsize)
    return Cost(flops=max(h, x), bytes=(h + x) * dtype.itemsize)
