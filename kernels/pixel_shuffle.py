"""Pixel-shuffle residual shortcuts: space moves into channels with a group mean, or channels into space with repeats.

Let R = rt * rs * rs, let k = ((c * rt + it) * rs + ih) * rs + iw (c slowest) be the expanded channel of the pixel
(t * rt + it, h * rs + ih, w * rs + iw) of channel c, and G the number of consecutive expanded channels in a group:

    space_to_channel_mean_add     out[m, t, h, w] = main[m, t, h, w] + 1/G sum_{g < G} x[pixel of k = m * G + g]
    channel_repeat_to_space_add   out[pixel of k] = main[pixel of k] + x[k // G, t, h, w]

Backward, both being linear: dmain = dout itself (no copy), and each one's dx is the other's index map:

    space_to_channel_mean_add     dx[pixel of k]  = 1/G dout[k // G, t, h, w]
    channel_repeat_to_space_add   dx[m, t, h, w]  = sum_{g < G} dout[pixel of k = m * G + g]

Shapes      small [B, M, T, H, W];  large [B, C, T * rt, H * rs, W * rs];  G = C * R / M.  The backward saves nothing.
Numerics    float32, bfloat16, float16 in and out, sums in float32, rounded once; float64 goes to the reference.
Envelope    rt, rs in {1, 2}; M divides C * R; main and x of one dtype and device. Contiguous and channels_last_3d are
            taken as they are; the output has main's layout, and an x of another layout is copied to it first.
Traffic     forward 2 main + x, backward main + x elements: memory bound -> the target is bytes/s (cost()).
Determinism one thread sums an output element, in one order: bitwise equal over runs and thread counts.
Source      DC-AE, residual autoencoding (Chen et al. 2024, arXiv:2410.10733, section 3.1), and its temporal form in
            Open-Sora 2.0. Unlike the composite of unshuffle, mean and add, it makes one pass and no intermediate.
Device code csrc/pixel_shuffle.h (index arithmetic, both devices), pixel_shuffle_cpu.cpp, pixel_shuffle.cu
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from opensora_fast.kernels import backend, extension
from opensora_fast.kernels.cost import Cost

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


# Choice of the implementation.


def missing_backends(dtype: torch.dtype, device_type: str) -> dict[str, str]:
    """The backends for tensors on `device_type`, each with why it cannot run; an empty reason means that it can."""
    missing = {"reference": ""}
    if native := NATIVE.get(device_type):
        missing[native] = (
            extension.load().missing[native] if dtype in NATIVE_DTYPES else f"{dtype} has no native kernel"
        )
    return missing


def choose(shape: Sequence[int], dtype: torch.dtype, device_type: str, missing: Mapping[str, str]) -> tuple[str, str]:
    """(backend, reason); pure. One native kernel covers every shape and dtype of the envelope but float64."""
    name = NATIVE.get(device_type)
    if name is None:
        return "reference", f"there is no native kernel for {device_type} tensors"
    return (name, "one fused pass over memory") if not missing[name] else ("reference", missing[name])


def selected(shape: Sequence[int], dtype: torch.dtype, device_type: str) -> tuple[str, str]:
    """(backend, reason) of a call on such a tensor, with OPENSORA_FAST_BACKEND obeyed."""
    missing = missing_backends(dtype, device_type)
    return backend.select("pixel_shuffle", choose(shape, dtype, device_type, missing), missing)


# Launcher: allocate, settle the layout, hand pointers over.


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
    small, large = (out, source) if function == "space_to_channel" else (source, out)
    source = source.contiguous(memory_format=layout)
    base = None if base is None else base.contiguous(memory_format=layout)
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


def _checked_group(
    small: Tensor, large: Tensor, small_name: str, large_name: str, spatial_factor: int, temporal_factor: int
) -> int:
    """G of the envelope, or ValueError naming the argument outside of it."""
    for name, factor in (("spatial_factor", spatial_factor), ("temporal_factor", temporal_factor)):
        if factor not in (1, 2):
            raise ValueError(f"{name} is {factor}; it must be 1 or 2")
    for name, tensor in ((small_name, small), (large_name, large)):
        if tensor.dim() != 5:
            raise ValueError(f"{name} has {tensor.dim()} dimensions; it must be [batch, channels, time, height, width]")
        if tensor.dtype not in (*NATIVE_DTYPES, torch.float64):
            raise ValueError(f"{name} is {tensor.dtype}; it must be float32, bfloat16, float16 or float64")
    if small.dtype != large.dtype or small.device != large.device:
        raise ValueError(
            f"x must match main's dtype and device; {small_name} is {small.dtype} on {small.device}, "
            f"{large_name} is {large.dtype} on {large.device}"
        )
    B, M, T, H, W = small.shape
    expected = (B, T * temporal_factor, H * spatial_factor, W * spatial_factor)
    if (large.shape[0], *large.shape[2:]) != expected:
        raise ValueError(
            f"{large_name} has (batch, time, height, width) {(large.shape[0], *large.shape[2:])}; "
            f"it must be {expected}, {small_name}'s times the factors"
        )
    expanded = large.shape[1] * temporal_factor * spatial_factor**2
    if M == 0 or expanded == 0 or expanded % M:
        raise ValueError(
            f"{small_name} has {M} channels; they must divide the {expanded} expanded channels of {large_name}"
        )
    return expanded // M


def space_to_channel_mean_add(
    main_BMTHW: Tensor, x_BCTHW: Tensor, *, spatial_factor: int = 2, temporal_factor: int = 1
) -> Tensor:
    """The downsampling shortcut: main + the group means of x with its space (and time) moved into channels.

    main: [B, M, T, H, W], the convolution's branch.  x: [B, C, T * rt, H * rs, W * rs], the block's input; M divides
    C * rt * rs * rs. Both float32, bfloat16, float16 or float64, on one device. Returns main's shape, dtype and layout.
    Differentiable in both. ValueError names the argument that is outside of this. DC-AE, section 3.1.
    """
    group = _checked_group(main_BMTHW, x_BCTHW, "main", "x", spatial_factor, temporal_factor)
    return _space_to_channel(main_BMTHW, x_BCTHW, main_BMTHW.shape[1], 1 / group, spatial_factor, temporal_factor)


def channel_repeat_to_space_add(
    main_BCTHW: Tensor, x_BMTHW: Tensor, *, spatial_factor: int = 2, temporal_factor: int = 1
) -> Tensor:
    """The upsampling shortcut: main + x with its channels repeated and moved out into space (and time).

    main: [B, C, T * rt, H * rs, W * rs], the convolution's branch.  x: [B, M, T, H, W], the block's input; M divides
    C * rt * rs * rs. Both float32, bfloat16, float16 or float64, on one device. Returns main's shape, dtype and layout.
    Differentiable in both. ValueError names the argument that is outside of this. DC-AE, section 3.1.
    """
    _checked_group(x_BMTHW, main_BCTHW, "x", "main", spatial_factor, temporal_factor)
    return _channel_to_space(main_BCTHW, x_BMTHW, main_BCTHW.shape[1], 1.0, spatial_factor, temporal_factor)


def cost(main_shape: Sequence[int], x_shape: Sequence[int], dtype: torch.dtype, mode: str) -> Cost:
    """Cost of either function; mode is "forward" or "backward" (x's gradient: main's is free)."""
    main, x = math.prod(main_shape), math.prod(x_shape)
    if mode == "forward":
        return Cost(flops=max(main, x) + main, bytes=(2 * main + x) * dtype.itemsize)
    return Cost(flops=max(main, x), bytes=(main + x) * dtype.itemsize)
