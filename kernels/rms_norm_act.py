"""RMS norm over the channels of a video, with residual, activation and zero padding; and SiLU with zero padding.

    channel_rms_norm   y = pad(act(z)),   z = n * weight + bias + residual
                       n = x * rstd,      rstd = 1 / sqrt(mean_C(x^2) + eps)
    silu_pad           y = pad(x * s(x)),  s(x) = 1 / (1 + exp(-x))

pad puts `pad` zeros on both ends of T, H and W; act is none, SiLU or ReLU. Backward, dy without its padding:

    dz = dy * act'(z),   h = dz * weight,   dx = rstd * (h - n * mean_C(h * n)),   dresidual = dz
    dweight = sum_BTHW(dz * n),   dbias = sum_BTHW(dz)
    silu'(x) = s(x) * (1 + x * (1 - s(x))),   relu'(0) = 0

Shapes      x, residual, dx, dresidual [B, C, T, H, W];  y, dy [B, C, T + 2 pad, H + 2 pad, W + 2 pad];
            weight, bias [C];  rstd [B, T, H, W], float32.
Numerics    float32 inside (float64 for float64), rounded once to x's dtype; eps inside the root.
Envelope    float32, bfloat16, float16, float64; C <= 4096; weight, bias and residual of x's dtype and device. y has x's
            layout: channels_last_3d is the fast one; contiguous is right, but its tiles reach over C with a large
            stride. x is copied if it is neither; residual and dy are copied to x's layout if they have another.
Traffic     n elements of x, q of y: forward n + q, and n for a residual; backward 3n, and for a residual before an act
            2n. Memory bound -> the target is bytes/s (cost()).
Determinism dweight and dbias in two stages, one partial per program, as many programs as the shape says, no atomics:
            bitwise equal over runs.
Saved       x, rstd, weight; with an act also bias and residual. silu_pad saves x. y and z are never saved.
Source      Zhang & Sennrich 2019 (arXiv:1910.07467), at the places where DC-AE (arXiv:2410.10733) norms its channels.
            Unlike the composite it makes one pass each way, and its gradients keep the layout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from opensora_fast.kernels import backend, launch
from opensora_fast.kernels.cost import Cost
from opensora_fast.kernels.launch import jit, tl

ACTS = (None, "silu", "relu")
MAX_CHANNELS = 4096


# References: what runs on the CPU, so few passes over memory; autograd of the forward is the oracle of the backward.


def channel_rms_norm_reference(
    x_BCTHW: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    residual_BCTHW: Tensor | None,
    eps: float,
    act: str | None,
    pad: int,
) -> tuple[Tensor, Tensor]:
    """(y, rstd)."""
    x = _widened(x_BCTHW)
    weight_C, bias_C = _widened(weight_C), _widened(bias_C)
    rstd_BTHW = (_channel_mean(x * x) + eps).rsqrt()
    residual = None if residual_BCTHW is None else _widened(residual_BCTHW)
    y = _activated(_affine(x, rstd_BTHW, weight_C, bias_C, residual), act).to(x_BCTHW.dtype)
    return _padded(y, pad), rstd_BTHW


def channel_rms_norm_backward_reference(
    dy_BCTHW: Tensor,
    x_BCTHW: Tensor,
    weight_C: Tensor,
    rstd_BTHW: Tensor,
    bias_C: Tensor | None,
    residual_BCTHW: Tensor | None,
    act: str | None,
    pad: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias, dresidual); bias and residual are only read if there is an act.

    dresidual is empty without a residual, and without an act: then it is dy.

    With p = dz * x, which needs no n, dweight = sum(rstd * p) and dx = rstd * h - x * rstd^3 * mean_C(p * weight).
    """
    x, wide_weight_C = _widened(x_BCTHW), _widened(weight_C)
    dz = _widened(_unpadded(dy_BCTHW, pad))
    if act is not None:
        assert bias_C is not None
        residual = None if residual_BCTHW is None else _widened(residual_BCTHW)
        dz = _act_backward(dz, _affine(x, rstd_BTHW, wide_weight_C, _widened(bias_C), residual), act)
    p = dz * x
    mean_BTHW = _channel_mean(p, wide_weight_C)
    dweight_C = _token_sum(p, rstd_BTHW)
    dbias_C = dz.sum(dim=(0, 2, 3, 4))
    dx = torch.mul(dz, _spread(wide_weight_C), out=p).mul_(rstd_BTHW.unsqueeze(1))
    dx.addcmul_(x, (mean_BTHW * rstd_BTHW.pow(3)).unsqueeze(1), value=-1)
    dresidual = x_BCTHW.new_empty(0) if act is None or residual_BCTHW is None else dz.to(x_BCTHW.dtype)
    return dx.to(x_BCTHW.dtype), dweight_C.to(weight_C.dtype), dbias_C.to(weight_C.dtype), dresidual


def silu_pad_reference(x_BCTHW: Tensor, pad: int) -> Tensor:
    return _padded(F.silu(_widened(x_BCTHW)).to(x_BCTHW.dtype), pad)


def silu_pad_backward_reference(dy_BCTHW: Tensor, x_BCTHW: Tensor, pad: int) -> Tensor:
    return _act_backward(_widened(_unpadded(dy_BCTHW, pad)), _widened(x_BCTHW), "silu").to(x_BCTHW.dtype)


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _spread(parameter_C: Tensor) -> Tensor:
    return parameter_C.view(1, -1, 1, 1, 1)


def _affine(x: Tensor, rstd_BTHW: Tensor, weight_C: Tensor, bias_C: Tensor, residual: Tensor | None) -> Tensor:
    n = x * rstd_BTHW.unsqueeze(1)
    if residual is None:
        return torch.addcmul(_spread(bias_C), n, _spread(weight_C))
    return torch.addcmul(residual, n, _spread(weight_C)).add_(_spread(bias_C))


def _activated(z: Tensor, act: str | None) -> Tensor:
    return F.silu(z) if act == "silu" else F.relu(z) if act == "relu" else z


def _act_backward(dy: Tensor, z: Tensor, act: str) -> Tensor:
    if act == "silu":
        return torch.ops.aten.silu_backward(dy, z)
    return torch.ops.aten.threshold_backward(dy, z, 0)


def _padded(y: Tensor, pad: int) -> Tensor:
    return F.pad(y, (pad,) * 6) if pad else y


def _unpadded(dy: Tensor, pad: int) -> Tensor:
    return dy[:, :, pad:-pad, pad:-pad, pad:-pad] if pad else dy


def _channel_mean(x_BCTHW: Tensor, weight_C: Tensor | None = None) -> Tensor:
    """[B, T, H, W]: mean_C(x * weight), without a weight mean_C(x); a matrix product where channels are last."""
    B, C, *thw = x_BCTHW.shape
    if _layout(x_BCTHW) == torch.channels_last_3d:
        each_C = x_BCTHW.new_full((C,), 1 / C) if weight_C is None else weight_C / C
        return (x_BCTHW.permute(0, 2, 3, 4, 1).reshape(-1, C) @ each_C).view(B, *thw)
    return (x_BCTHW if weight_C is None else x_BCTHW * _spread(weight_C)).mean(dim=1)


def _token_sum(x_BCTHW: Tensor, weight_BTHW: Tensor) -> Tensor:
    """[C]: sum over B, T, H and W of x * weight; row by row, since one long product would lose digits."""
    B, C, T, H, W = x_BCTHW.shape
    if _layout(x_BCTHW) == torch.channels_last_3d:
        rows = x_BCTHW.permute(0, 2, 3, 4, 1).reshape(B * T * H, W, C)
        return (weight_BTHW.reshape(B * T * H, 1, W) @ rows).sum(dim=(0, 1))
    return (x_BCTHW * weight_BTHW.unsqueeze(1)).sum(dim=(0, 2, 3, 4))


# Choice of the tile, then of the implementation.


@dataclass(frozen=True)
class Tile:
    """One program's piece: `rows` neighbouring tokens with all their channels, in `block_c` columns."""

    rows: int
    block_c: int
    num_warps: int


# Modelled, not yet measured on a GPU. A warp's 16-byte loads of bfloat16 cover 256 elements. 4,096 elements on 4 warps
# are four such loads for each tensor and thread; the backward, with a second tensor and two sums, takes half of that.
FORWARD_ELEMENTS, BACKWARD_ELEMENTS = 4096, 2048
MAX_PROGRAMS = 4 * 132  # of the norm's backward, which keeps sums: all resident at once on an H200
SILU_BLOCK = 2048


def choose_tile(channels: int, *, backward: bool) -> Tile:
    """Pure. As many tokens as fit; many channels take more warps rather than more registers."""
    block_c = launch.power_of_two(channels)
    elements = BACKWARD_ELEMENTS if backward else FORWARD_ELEMENTS
    return Tile(max(elements // block_c, 1), block_c, 4 * max(block_c // elements, 1))


def choose_programs(blocks: int) -> int:
    """Programs that share the backward's blocks: from the shape alone, so that sums have one order everywhere."""
    return min(blocks, MAX_PROGRAMS)


def missing_backends(dtype: torch.dtype, device_type: str) -> dict[str, str]:
    """The backends for tensors on `device_type`, each with why it cannot run; an empty reason means that it can."""
    return {"reference": "", "triton": launch.missing(device_type)}


def choose(shape: Sequence[int], dtype: torch.dtype, device_type: str, missing: Mapping[str, str]) -> tuple[str, str]:
    """(backend, reason); pure. One kernel covers every shape and dtype of the envelope."""
    if device_type == "cpu":
        return "reference", "CPU tensors: PyTorch's own kernels"
    return ("triton", "one fused pass over memory") if not missing["triton"] else ("reference", missing["triton"])


def selected(shape: Sequence[int], dtype: torch.dtype, device_type: str) -> tuple[str, str]:
    """(backend, reason) of a call on such a tensor, with OPENSORA_FAST_BACKEND obeyed."""
    missing = missing_backends(dtype, device_type)
    return backend.select("rms_norm_act", choose(shape, dtype, device_type, missing), missing)


def _backend(x: Tensor) -> str:
    selection = selected(x.shape, x.dtype, x.device.type)
    return backend.announced("rms_norm_act", selection, missing_backends(x.dtype, x.device.type))


# Device code. A line is a row of W tokens; without padding a sample is one line, and channels last the whole tensor.


@jit
def _offsets(b, t, h, w, c, T, H, W, C, CHANNELS_LAST: tl.constexpr):
    """Of channels c [1, BLOCK_C] of the tokens w [ROWS, 1] of a line, in a dense [B, C, T, H, W]."""
    last = (((b * T + t) * H + h) * W + w) * C + c
    return last if CHANNELS_LAST else (((b * C + c) * T + t) * H + h) * W + w


@jit
def _sigmoid(z):
    return 1 / (1 + tl.exp(-z))


@jit
def _norm_forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    rstd_ptr,
    T,
    H,
    W,
    C,
    blocks,
    EPS: tl.constexpr,
    ACT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    PAD: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    padded_t, padded_h, padded_w = T + 2 * PAD, H + 2 * PAD, W + 2 * PAD
    program = tl.program_id(0).to(tl.int64)
    line = program // blocks
    to_w = (program % blocks) * ROWS + tl.arange(0, ROWS)[:, None]  # [ROWS, 1], in the padded line
    to_h = line % padded_h
    to_t = line // padded_h % padded_t
    b = line // padded_h // padded_t
    t, h, w = to_t - PAD, to_h - PAD, to_w - PAD
    c = tl.arange(0, BLOCK_C)[None, :]
    mask_c = c < C
    inside = (t >= 0) & (t < T) & (h >= 0) & (h < H) & (w >= 0) & (w < W)  # [ROWS, 1]
    mask = inside & mask_c

    offset = _offsets(b, t, h, w, c, T, H, W, C, CHANNELS_LAST)
    x = tl.load(x_ptr + offset, mask=mask, other=0).to(COMPUTE)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / C + EPS)  # [ROWS, 1]
    tl.store(rstd_ptr + ((b * T + t) * H + h) * W + w, rstd, mask=inside)
    weight = tl.load(weight_ptr + c, mask=mask_c, other=0).to(COMPUTE)
    bias = tl.load(bias_ptr + c, mask=mask_c, other=0).to(COMPUTE)
    y = x * rstd * weight + bias
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + offset, mask=mask, other=0).to(COMPUTE)
    if ACT == "silu":
        y *= _sigmoid(y)
    if ACT == "relu":
        y = tl.maximum(y, 0, propagate_nan=tl.PropagateNan.ALL)
    to = _offsets(b, to_t, to_h, to_w, c, padded_t, padded_h, padded_w, C, CHANNELS_LAST)
    tl.store(y_ptr + to, tl.where(inside, y, 0), mask=(to_w < padded_w) & mask_c)


@jit
def _norm_backward_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    rstd_ptr,
    dx_ptr,
    dresidual_ptr,
    dweight_ptr,
    dbias_ptr,
    T,
    H,
    W,
    C,
    blocks,
    total_blocks,
    blocks_per_program,
    ACT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    PAD: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)[None, :]
    mask_c = c < C
    weight = tl.load(weight_ptr + c, mask=mask_c, other=0).to(COMPUTE)
    dweight = tl.zeros([ROWS, BLOCK_C], COMPUTE)
    dbias = tl.zeros([ROWS, BLOCK_C], COMPUTE)
    first = program * blocks_per_program
    for block in range(first, tl.minimum(first + blocks_per_program, total_blocks)):
        line = block // blocks
        w = (block % blocks) * ROWS + tl.arange(0, ROWS)
        h = line % H
        t = line // H % T
        b = line // H // T
        # A row of rstd of its own: in the tile's layout every thread would load one value eight times.
        rstd = tl.load(rstd_ptr + ((b * T + t) * H + h) * W + w, mask=w < W, other=0)[:, None]
        w = w[:, None]
        mask = (w < W) & mask_c
        offset = _offsets(b, t, h, w, c, T, H, W, C, CHANNELS_LAST)
        at = _offsets(b, t + PAD, h + PAD, w + PAD, c, T + 2 * PAD, H + 2 * PAD, W + 2 * PAD, C, CHANNELS_LAST)
        x = tl.load(x_ptr + offset, mask=mask, other=0).to(COMPUTE)
        dz = tl.load(dy_ptr + at, mask=mask, other=0).to(COMPUTE)
        n = x * rstd
        if ACT is not None:
            z = n * weight + tl.load(bias_ptr + c, mask=mask_c, other=0).to(COMPUTE)
            if HAS_RESIDUAL:
                z += tl.load(residual_ptr + offset, mask=mask, other=0).to(COMPUTE)
            if ACT == "silu":
                s = _sigmoid(z)
                dz *= s * (1 + z * (1 - s))
            else:
                dz = tl.where(z <= 0, 0, dz)
            if HAS_RESIDUAL:
                tl.store(dresidual_ptr + offset, dz, mask=mask)
        dweight += dz * n
        dbias += dz
        g = dz * weight
        dx = rstd * (g - n * (tl.sum(g * n, axis=1, keep_dims=True) / C))
        tl.store(dx_ptr + offset, dx, mask=mask)
    tl.store(dweight_ptr + program * C + c, tl.sum(dweight, axis=0, keep_dims=True), mask=mask_c)
    tl.store(dbias_ptr + program * C + c, tl.sum(dbias, axis=0, keep_dims=True), mask=mask_c)


# SiLU: lines of `inner` contiguous elements (W * C channels last, W contiguous), padded by `inner_pad` at either end.


@jit
def _silu_pad_forward_kernel(
    x_ptr, y_ptr, T, H, inner, inner_pad, blocks, PAD: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr
):
    padded = inner + 2 * inner_pad
    program = tl.program_id(0).to(tl.int64)
    line = program // blocks
    to = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    h = line % (H + 2 * PAD) - PAD
    t = line // (H + 2 * PAD) % (T + 2 * PAD) - PAD
    outer = line // (H + 2 * PAD) // (T + 2 * PAD)
    inside = (t >= 0) & (t < T) & (h >= 0) & (h < H) & (to >= inner_pad) & (to < inner_pad + inner)
    x = tl.load(x_ptr + ((outer * T + t) * H + h) * inner + to - inner_pad, mask=inside, other=0).to(COMPUTE)
    tl.store(y_ptr + line * padded + to, x * _sigmoid(x), mask=to < padded)


@jit
def _silu_pad_backward_kernel(
    dy_ptr, x_ptr, dx_ptr, T, H, inner, inner_pad, blocks, PAD: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr
):
    padded = inner + 2 * inner_pad
    program = tl.program_id(0).to(tl.int64)
    line = program // blocks
    at = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = at < inner
    h = line % H
    t = line // H % T
    outer = line // H // T
    dy_line = (outer * (T + 2 * PAD) + t + PAD) * (H + 2 * PAD) + h + PAD
    x = tl.load(x_ptr + line * inner + at, mask=mask, other=0).to(COMPUTE)
    dy = tl.load(dy_ptr + dy_line * padded + inner_pad + at, mask=mask, other=0).to(COMPUTE)
    s = _sigmoid(x)
    tl.store(dx_ptr + line * inner + at, dy * (s * (1 + x * (1 - s))), mask=mask)


# Launchers: allocate, settle the layout, count lines.


def _layout(x: Tensor) -> torch.memory_format:
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last_3d):
        return torch.channels_last_3d
    return torch.contiguous_format


def _empty_like(x: Tensor, pad: int = 0) -> Tensor:
    shape = (*x.shape[:2], *(extent + 2 * pad for extent in x.shape[2:]))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_layout(x))


def _lines(x: Tensor, pad: int) -> tuple[int, int, int, int]:
    """B, T, H and W of the lines of x."""
    B, _, T, H, W = x.shape
    if pad:
        return B, T, H, W
    return (1, 1, 1, B * T * H * W) if _layout(x) == torch.channels_last_3d else (B, 1, 1, T * H * W)


def triton_channel_rms_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float, act: str | None, pad: int
) -> tuple[Tensor, Tensor]:
    """(y, rstd)."""
    layout = _layout(x)
    x = x.contiguous(memory_format=layout)
    residual = None if residual is None else residual.contiguous(memory_format=layout)
    y, rstd = _empty_like(x, pad), _empty_rstd(x)
    B, T, H, W = _lines(x, pad)
    tile = choose_tile(x.shape[1], backward=False)
    blocks = -(-(W + 2 * pad) // tile.rows)
    launch.launch(
        _norm_forward_kernel,
        (B * (T + 2 * pad) * (H + 2 * pad) * blocks if y.numel() else 0,),
        num_warps=tile.num_warps,
        x_ptr=x,
        weight_ptr=weight,
        bias_ptr=bias,
        residual_ptr=x if residual is None else residual,
        y_ptr=y,
        rstd_ptr=rstd,
        T=T,
        H=H,
        W=W,
        C=x.shape[1],
        blocks=blocks,
        EPS=eps,
        ACT=act,
        HAS_RESIDUAL=residual is not None,
        PAD=pad,
        CHANNELS_LAST=layout == torch.channels_last_3d,
        ROWS=tile.rows,
        BLOCK_C=tile.block_c,
        COMPUTE=launch.compute_type(x.dtype),
    )
    return y, rstd


def triton_channel_rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    act: str | None,
    pad: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias, dresidual), as `channel_rms_norm_backward_reference`."""
    layout = _layout(x)
    x, dy = x.contiguous(memory_format=layout), dy.contiguous(memory_format=layout)
    residual = None if residual is None else residual.contiguous(memory_format=layout)
    dx = _empty_like(x)
    dresidual = _empty_dresidual(x, residual, act)
    B, T, H, W = _lines(x, pad)
    C = x.shape[1]
    tile = choose_tile(C, backward=True)
    blocks = -(-W // tile.rows)
    total_blocks = B * T * H * blocks if x.numel() else 0
    programs = choose_programs(total_blocks)
    dweight = torch.empty((programs, C), dtype=rstd.dtype, device=x.device)
    dbias = torch.empty_like(dweight)
    launch.launch(
        _norm_backward_kernel,
        (programs,),
        num_warps=tile.num_warps,
        dy_ptr=dy,
        x_ptr=x,
        weight_ptr=weight,
        bias_ptr=weight if bias is None else bias,
        residual_ptr=x if residual is None else residual,
        rstd_ptr=rstd,
        dx_ptr=dx,
        dresidual_ptr=dresidual if dresidual.numel() else dx,
        dweight_ptr=dweight,
        dbias_ptr=dbias,
        T=T,
        H=H,
        W=W,
        C=C,
        blocks=blocks,
        total_blocks=total_blocks,
        blocks_per_program=-(-total_blocks // max(programs, 1)),
        ACT=act,
        HAS_RESIDUAL=residual is not None,
        PAD=pad,
        CHANNELS_LAST=layout == torch.channels_last_3d,
        ROWS=tile.rows,
        BLOCK_C=tile.block_c,
        COMPUTE=launch.compute_type(x.dtype),
    )
    return dx, dweight.sum(dim=0).to(weight.dtype), dbias.sum(dim=0).to(weight.dtype), dresidual


def triton_silu_pad_forward(x: Tensor, pad: int) -> Tensor:
    x = x.contiguous(memory_format=_layout(x))
    y = _empty_like(x, pad)
    outer, T, H, inner, inner_pad = _silu_lines(x, pad)
    blocks = -(-(inner + 2 * inner_pad) // SILU_BLOCK)
    launch.launch(
        _silu_pad_forward_kernel,
        (outer * (T + 2 * pad) * (H + 2 * pad) * blocks,),
        x_ptr=x,
        y_ptr=y,
        T=T,
        H=H,
        inner=inner,
        inner_pad=inner_pad,
        blocks=blocks,
        PAD=pad,
        BLOCK=SILU_BLOCK,
        COMPUTE=launch.compute_type(x.dtype),
    )
    return y


def triton_silu_pad_backward(dy: Tensor, x: Tensor, pad: int) -> Tensor:
    layout = _layout(x)
    x, dy = x.contiguous(memory_format=layout), dy.contiguous(memory_format=layout)
    dx = _empty_like(x)
    outer, T, H, inner, inner_pad = _silu_lines(x, pad)
    blocks = -(-inner // SILU_BLOCK)
    launch.launch(
        _silu_pad_backward_kernel,
        (outer * T * H * blocks,),
        dy_ptr=dy,
        x_ptr=x,
        dx_ptr=dx,
        T=T,
        H=H,
        inner=inner,
        inner_pad=inner_pad,
        blocks=blocks,
        PAD=pad,
        BLOCK=SILU_BLOCK,
        COMPUTE=launch.compute_type(x.dtype),
    )
    return dx


def _silu_lines(x: Tensor, pad: int) -> tuple[int, int, int, int, int]:
    """Outer extent, T, H, inner extent and its padding."""
    B, C, T, H, W = x.shape
    if not pad:
        return 1, 1, 1, x.numel(), 0
    if _layout(x) == torch.channels_last_3d:
        return B, T, H, W * C, pad * C
    return B * C, T, H, W, pad


def _empty_rstd(x: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.empty((x.shape[0], *x.shape[2:]), dtype=wide, device=x.device)


def _empty_dresidual(x: Tensor, residual: Tensor | None, act: str | None) -> Tensor:
    return x.new_empty(0) if act is None or residual is None else _empty_like(x)


# Ops: the norm and SiLU, each with its backward.


def _settled(out: Tensor, promised: Tensor) -> Tensor:
    """`out` with the strides of `promised`, an uninitialised tensor of its shape: a copy only if they differ."""
    return out if out.stride() == promised.stride() else promised.copy_(out)


@torch.library.custom_op("opensora_fast::channel_rms_norm", mutates_args=())
def _channel_rms_norm(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float, act: str | None, pad: int
) -> tuple[Tensor, Tensor]:
    if _backend(x) == "triton":
        return triton_channel_rms_norm_forward(x, weight, bias, residual, eps, act, pad)
    y, rstd = channel_rms_norm_reference(x, weight, bias, residual, eps, act, pad)
    return _settled(y, _empty_like(x, pad)), rstd.contiguous()


@_channel_rms_norm.register_fake
def _fake_channel_rms_norm(x, weight, bias, residual, eps, act, pad):
    return _empty_like(x, pad), _empty_rstd(x)


@torch.library.custom_op("opensora_fast::channel_rms_norm_backward", mutates_args=())
def _channel_rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    act: str | None,
    pad: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if _backend(x) == "triton":
        return triton_channel_rms_norm_backward(dy, x, weight, rstd, bias, residual, act, pad)
    dx, dweight, dbias, dresidual = channel_rms_norm_backward_reference(dy, x, weight, rstd, bias, residual, act, pad)
    return _settled(dx, _empty_like(x)), dweight, dbias, _settled(dresidual, _empty_dresidual(x, residual, act))


@_channel_rms_norm_backward.register_fake
def _fake_channel_rms_norm_backward(dy, x, weight, rstd, bias, residual, act, pad):
    return _empty_like(x), torch.empty_like(weight), torch.empty_like(weight), _empty_dresidual(x, residual, act)


def _save_norm(ctx, inputs, output):
    x, weight, bias, residual, _, ctx.act, ctx.pad = inputs
    rstd = output[1]
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)
    ctx.has_residual = residual is not None
    extra = () if ctx.act is None else (bias, residual)
    ctx.save_for_backward(x, weight, rstd, *extra)


def _norm_backward(ctx, dy, _):
    if dy is None:
        return (None,) * 7
    x, weight, rstd, bias, residual = (*ctx.saved_tensors, None, None)[:5]
    dx, dweight, dbias, dresidual = _channel_rms_norm_backward(dy, x, weight, rstd, bias, residual, ctx.act, ctx.pad)
    if ctx.act is None:
        dresidual = _unpadded(dy, ctx.pad)
    return dx, dweight, dbias, dresidual if ctx.has_residual else None, None, None, None


_channel_rms_norm.register_autograd(_norm_backward, setup_context=_save_norm)


@torch.library.custom_op("opensora_fast::silu_pad", mutates_args=())
def _silu_pad(x: Tensor, pad: int) -> Tensor:
    if _backend(x) == "triton":
        return triton_silu_pad_forward(x, pad)
    return _settled(silu_pad_reference(x, pad), _empty_like(x, pad))


@_silu_pad.register_fake
def _fake_silu_pad(x, pad):
    return _empty_like(x, pad)


@torch.library.custom_op("opensora_fast::silu_pad_backward", mutates_args=())
def _silu_pad_backward(dy: Tensor, x: Tensor, pad: int) -> Tensor:
    if _backend(x) == "triton":
        return triton_silu_pad_backward(dy, x, pad)
    return _settled(silu_pad_backward_reference(dy, x, pad), _empty_like(x))


@_silu_pad_backward.register_fake
def _fake_silu_pad_backward(dy, x, pad):
    return _empty_like(x)


def _save_silu(ctx, inputs, output):
    x, ctx.pad = inputs
    ctx.save_for_backward(x)


def _silu_backward(ctx, dy):
    (x,) = ctx.saved_tensors
    return _silu_pad_backward(dy, x, ctx.pad), None


_silu_pad.register_autograd(_silu_backward, setup_context=_save_silu)


# Public functions.


def _check_video(x_BCTHW: Tensor, pad: int) -> None:
    if x_BCTHW.dim() != 5:
        raise ValueError(f"x has {x_BCTHW.dim()} dimensions; it must be [batch, channels, time, height, width]")
    if x_BCTHW.dtype not in launch.DTYPES:
        raise ValueError(f"x is {x_BCTHW.dtype}; it must be float32, bfloat16, float16 or float64")
    if pad < 0:
        raise ValueError(f"pad is {pad}; it must be 0 or more")


def channel_rms_norm(
    x_BCTHW: Tensor,
    weight_C: Tensor,
    bias_C: Tensor,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    act: str | None = None,
    pad: int = 0,
) -> Tensor:
    """pad(act(RMS norm of x over C, times weight, plus bias, plus residual)).

    x, residual: [B, C, T, H, W].  weight, bias: [C].  All float32, bfloat16, float16 or float64, alike, on one device.
    act: None, "silu" or "relu".  pad: zeros on both ends of T, H and W.
    Returns [B, C, T + 2 pad, H + 2 pad, W + 2 pad] of x's dtype and layout. Differentiable once, in all four.
    ValueError names the argument that is outside of this. Zhang & Sennrich 2019; as in DC-AE.
    """
    _check_video(x_BCTHW, pad)
    channels = x_BCTHW.shape[1]
    if channels > MAX_CHANNELS:
        raise ValueError(f"x has {channels} channels; it must have at most {MAX_CHANNELS}")
    if act not in ACTS:
        raise ValueError(f"act is {act!r}; it must be None, 'silu' or 'relu'")
    expected = {"weight": (weight_C, (channels,)), "bias": (bias_C, (channels,)), "residual": (residual, x_BCTHW.shape)}
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {tuple(shape)}")
        if tensor.dtype != x_BCTHW.dtype or tensor.device != x_BCTHW.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}; it must be like x, {x_BCTHW.dtype} on {x_BCTHW.device}"
            )
    return _channel_rms_norm(x_BCTHW, weight_C.contiguous(), bias_C.contiguous(), residual, eps, act, pad)[0]


def silu_pad(x_BCTHW: Tensor, *, pad: int) -> Tensor:
    """SiLU of x, then `pad` zeros on both ends of T, H and W: what an unpadded convolution takes.

    x: [B, C, T, H, W], float32, bfloat16, float16 or float64.
    Returns [B, C, T + 2 pad, H + 2 pad, W + 2 pad] of x's dtype and layout. Differentiable once.
    ValueError names the argument that is outside of this.
    """
    _check_video(x_BCTHW, pad)
    return _silu_pad(x_BCTHW, pad)


def cost(
    shape: Sequence[int],
    dtype: torch.dtype,
    mode: str,
    *,
    function: str = "channel_rms_norm",
    residual: bool = False,
    act: str | None = None,
    pad: int = 0,
) -> Cost:
    """Cost of `function` on an x of this shape; mode is "forward" or "backward". The padding of dy is not read."""
    B, C, T, H, W = shape
    x = math.prod(shape)
    y = B * C * (T + 2 * pad) * (H + 2 * pad) * (W + 2 * pad)
    if function == "silu_pad":
        flops, elements = (4 * x, x + y) if mode == "forward" else (7 * x, 3 * x)
        return Cost(flops=flops, bytes=elements * dtype.itemsize)
    rstd = B * T * H * W * torch.promote_types(dtype, torch.float32).itemsize
    if mode == "forward":
        per_element = 5 + residual + (4 if act == "silu" else 1 if act else 0)
        return Cost(flops=per_element * x, bytes=(x * (1 + residual) + y + 2 * C) * dtype.itemsize + rstd)
    per_element = 11 + (9 + residual if act == "silu" else 3 + residual if act else 0)
    elements = x * (3 + (2 * residual if act else 0)) + C * (4 if act else 3)
    return Cost(flops=per_element * x, bytes=elements * dtype.itemsize + rstd)
