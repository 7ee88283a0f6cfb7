"""Gated residual of adaLN blocks, alone, with the modulated norm that follows it, and with that norm's linear layer.

    gated_residual                       x_new = x + gate * h
    gated_residual_modulated_norm        x_new, y = xhat * (1 + scale) + shift,   xhat = (x_new - mean) * rstd
    gated_residual_modulated_norm_linear x_new, out = y W^T + bias

mean and rstd are those of modulated_norm.py, of x_new. Backward of the residual alone, with dx_new its gradient:

    dx = dx_new (itself, no copy)     dh = gate * dx      dgate = sum_T(dx * h)

and followed by the norm, with g = dy * (1 + scale) and, where there is a linear, dy = dout W:

    dx     = dx_new + rstd * (g - mean_D(g) - xhat * mean_D(g * xhat))          dh, dgate as above
    dscale = sum_T(dy * xhat)         dshift = sum_T(dy)
    dW     = dout^T y                 dbias  = sum_BT(dout)       y computed again by the pass that makes dx

Shapes      B batch, T tokens, D channels, O output features.  x, h, x_new, y and their gradients [B, T, D];
            gate, shift, scale [B, D];  mean, rstd [B, T];  W [O, D];  bias [O];  out [B, T, O].
Numerics    float32, bfloat16, float16 in and out; statistics and sums in float32, each result rounded once. The norm
            is that of the rounded x_new, so that the fused op equals the two in turn. float64 is computed in float64.
Envelope    1 <= D <= 8192; one dtype, one device. Tensors [B, T, D] are read with any strides of B and T, vectors
            [B, D] with any stride of B; whatever has a strided last axis is copied first. Outputs are contiguous.
Traffic     residual: forward x + h + x_new, backward dx + h + dh elements. With the norm: forward x + h + x_new + y,
            backward dx_new + dy + x + h + dx + dh (+ y with a linear): memory bound -> the target is bytes/s (cost()).
Determinism dgate, dshift and dscale in two stages, no atomics: a program sums a run of rows of one batch item, then a
            second kernel sums those partial sums in their order. Runs depend on the shape alone: bitwise reproducible.
Saved       h, gate; with the norm x, h, gate, scale, mean, rstd; with its linear shift and W as well. Never x_new nor
            y: x_new is computed again from x and h, which its own readers need not keep either.
Source      Peebles and Xie 2023 (DiT, arXiv:2212.09748, adaLN-Zero). Unlike the composite, x_new is normalised while in
            registers, and the backward makes five gradients in one pass over four tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from opensora_fast.kernels import backend, launch
from opensora_fast.kernels.cost import Cost
from opensora_fast.kernels.launch import jit, tl
from opensora_fast.kernels.modulated_norm import (
    Tile,
    check_envelope,
    check_linear,
    choose_tile,
    contiguous_like,
    linear_input_gradient,
    linear_parameter_gradients,
    load_row,
    modulate_row,
    modulated_norm_reference,
    norm_backward_piece,
    norm_gradient_row,
    only_needed,
    pieces,
    row_statistics,
    run_of_rows,
    stages,
    statistics_like,
    store_row,
    sum_partials,
    widened,
    with_contiguous_rows,
    zero_row,
)
from opensora_fast.kernels.modulated_norm import cost as modulated_norm_cost

# Reference: addcmul and mul compute in float32 inside and round once; autograd is the oracle of the backward.


def gated_residual_reference(x_BTD: Tensor, h_BTD: Tensor, gate_BD: Tensor) -> Tensor:
    """x + gate * h."""
    return torch.addcmul(x_BTD, gate_BD[:, None], h_BTD).contiguous()


def gated_residual_backward_reference(dx_BTD: Tensor, h_BTD: Tensor, gate_BD: Tensor) -> tuple[Tensor, Tensor]:
    """(dh, dgate)."""
    dgate = torch.zeros_like(widened(gate_BD))
    for item, t in pieces(h_BTD):
        dgate[item] += (widened(dx_BTD[item, t]) * widened(h_BTD[item, t])).sum(0)
    return (dx_BTD * gate_BD[:, None]).contiguous(), dgate.to(gate_BD.dtype)


def gated_residual_modulated_norm_reference(
    x_BTD: Tensor, h_BTD: Tensor, gate_BD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x_new, y, mean, rstd)."""
    x_new = gated_residual_reference(x_BTD, h_BTD, gate_BD)
    return x_new, *modulated_norm_reference(x_new, shift_BD, scale_BD, eps)


def gated_residual_modulated_norm_backward_reference(
    dx_new_BTD: Tensor,
    dy_BTD: Tensor,
    x_BTD: Tensor,
    h_BTD: Tensor,
    gate_BD: Tensor,
    scale_BD: Tensor,
    mean_BT: Tensor,
    rstd_BT: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dh, dgate, dshift, dscale)."""
    dx_BTD, dh_BTD = contiguous_like(x_BTD), contiguous_like(h_BTD)
    weight, gate = 1 + widened(scale_BD), widened(gate_BD)
    dgate, dshift, dscale = (torch.zeros_like(gate) for _ in range(3))
    for item, t in pieces(x_BTD):
        h = h_BTD[item, t]
        x_new = torch.addcmul(x_BTD[item, t], gate_BD[item], h)
        dx, piece_dscale, piece_dshift = norm_backward_piece(
            dy_BTD[item, t], x_new, weight[item], mean_BT[item, t], rstd_BT[item, t]
        )
        dx_BTD[item, t] = dx.add_(dx_new_BTD[item, t])
        dh_BTD[item, t] = dx * gate[item]
        dgate[item] += (dx * widened(h)).sum(0)
        dshift[item] += piece_dshift
        dscale[item] += piece_dscale
    dtype = gate_BD.dtype
    return dx_BTD, dh_BTD, dgate.to(dtype), dshift.to(dtype), dscale.to(dtype)


# Tile choice: modulated_norm.py's. Constants are modelled for an H200 from registers and bytes in flight, not yet
# measured on a GPU.

FORWARD_WARPS = 40  # resident on one SM, by the registers of the compiled kernel at D = 3072: 48 a thread
BACKWARD_WARPS = 12  # 66 registers would allow 28, but every program more adds a row of partial sums
PAIR_FORWARD_WARPS = 12  # 167 registers
PAIR_BACKWARD_WARPS = 8  # 248 registers, 24 kB on their way to each of two programs
MAX_FORWARD_ROWS = 8  # as in modulated_norm.py
MIN_BACKWARD_ROWS = 4


# Choice of the implementation.


def missing_backends(dtype: torch.dtype, device_type: str) -> dict[str, str]:
    """The backends for tensors on `device_type`, each with why it cannot run; an empty reason means that it can."""
    return {"reference": "", "triton": launch.missing(device_type)}


def choose(shape: Sequence[int], dtype: torch.dtype, device_type: str, missing: Mapping[str, str]) -> tuple[str, str]:
    """(backend, reason); pure."""
    if device_type == "cpu":
        return "reference", "CPU tensors: PyTorch's own kernels"
    return ("reference", missing["triton"]) if missing["triton"] else ("triton", "one fused pass over memory")


def selected(shape: Sequence[int], dtype: torch.dtype, device_type: str) -> tuple[str, str]:
    """(backend, reason) of a call on such a tensor, with OPENSORA_FAST_BACKEND obeyed."""
    missing = missing_backends(dtype, device_type)
    return backend.select("gated_residual", choose(shape, dtype, device_type, missing), missing)


def _backend(x: Tensor) -> str:
    device_type = x.device.type
    selection = selected(x.shape, x.dtype, device_type)
    return backend.announced("gated_residual", selection, missing_backends(x.dtype, device_type))


# Device code. A row is a tuple of blocks [BLOCK] in registers, zero beyond D; modulated_norm.py has its functions.


@jit
def residual_row(x, h, gate, D: tl.constexpr, BLOCK: tl.constexpr):
    """x + gate * h of one row."""
    row: tl.tuple = ()
    for block in tl.static_range((D + BLOCK - 1) // BLOCK):
        row = row + (x[block] + gate[block] * h[block],)
    return row


@jit
def rounded_row(row, DTYPE: tl.constexpr, COMPUTE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """What a reader sees once `row` has been stored in DTYPE."""
    rounded: tl.tuple = ()
    for block in tl.static_range((D + BLOCK - 1) // BLOCK):
        rounded = rounded + (row[block].to(DTYPE).to(COMPUTE),)
    return rounded


@jit
def sum_row(a, b, D: tl.constexpr, BLOCK: tl.constexpr):
    row: tl.tuple = ()
    for block in tl.static_range((D + BLOCK - 1) // BLOCK):
        row = row + (a[block] + b[block],)
    return row


@jit
def branch_gradient_row(dx, h, gate, dgate, D: tl.constexpr, BLOCK: tl.constexpr):
    """(dh of a row, dgate + its dx * h)."""
    dh: tl.tuple = ()
    dgate_next: tl.tuple = ()
    for block in tl.static_range((D + BLOCK - 1) // BLOCK):
        dh = dh + (dx[block] * gate[block],)
        dgate_next = dgate_next + (dgate[block] + dx[block] * h[block],)
    return dh, dgate_next


@jit
def _residual_forward_kernel(
    x_ptr, h_ptr, gate_ptr, x_new_ptr,
    T, rows, programs, x_stride_b, x_stride_t, h_stride_b, h_stride_t, gate_stride_b,
    D: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    batch, first, last = run_of_rows(T, rows, programs)
    gate = load_row(gate_ptr + batch * gate_stride_b, D, BLOCK, COMPUTE)
    for t in tl.range(first, last, num_stages=STAGES):
        x = load_row(x_ptr + batch * x_stride_b + t * x_stride_t, D, BLOCK, COMPUTE)
        h = load_row(h_ptr + batch * h_stride_b + t * h_stride_t, D, BLOCK, COMPUTE)
        store_row(x_new_ptr + (batch * T + t) * D, residual_row(x, h, gate, D, BLOCK), D, BLOCK)


@jit
def _residual_backward_kernel(
    dx_ptr, h_ptr, gate_ptr, dh_ptr, partial_ptr,
    T, rows, programs, dx_stride_b, dx_stride_t, h_stride_b, h_stride_t, gate_stride_b,
    D: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    batch, first, last = run_of_rows(T, rows, programs)
    gate = load_row(gate_ptr + batch * gate_stride_b, D, BLOCK, COMPUTE)
    dgate = zero_row(D, BLOCK, COMPUTE)
    for t in tl.range(first, last, num_stages=STAGES):
        dx = load_row(dx_ptr + batch * dx_stride_b + t * dx_stride_t, D, BLOCK, COMPUTE)
        h = load_row(h_ptr + batch * h_stride_b + t * h_stride_t, D, BLOCK, COMPUTE)
        dh, dgate = branch_gradient_row(dx, h, gate, dgate, D, BLOCK)
        store_row(dh_ptr + (batch * T + t) * D, dh, D, BLOCK)
    store_row(partial_ptr + tl.program_id(0).to(tl.int64) * D, dgate, D, BLOCK)


@jit
def _pair_forward_kernel(
    x_ptr, h_ptr, gate_ptr, shift_ptr, scale_ptr, x_new_ptr, y_ptr, mean_ptr, rstd_ptr,
    T, rows, programs, x_stride_b, x_stride_t, h_stride_b, h_stride_t, gate_stride_b, shift_stride_b, scale_stride_b,
    D: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    batch, first, last = run_of_rows(T, rows, programs)
    gate = load_row(gate_ptr + batch * gate_stride_b, D, BLOCK, COMPUTE)
    shift = load_row(shift_ptr + batch * shift_stride_b, D, BLOCK, COMPUTE)
    scale = load_row(scale_ptr + batch * scale_stride_b, D, BLOCK, COMPUTE)
    for t in tl.range(first, last, num_stages=STAGES):
        x = load_row(x_ptr + batch * x_stride_b + t * x_stride_t, D, BLOCK, COMPUTE)
        h = load_row(h_ptr + batch * h_stride_b + t * h_stride_t, D, BLOCK, COMPUTE)
        x_new = rounded_row(residual_row(x, h, gate, D, BLOCK), x_ptr.dtype.element_ty, COMPUTE, D, BLOCK)
        mean, rstd = row_statistics(x_new, D, BLOCK, EPS)
        row = batch * T + t
        store_row(x_new_ptr + row * D, x_new, D, BLOCK)
        store_row(y_ptr + row * D, modulate_row(x_new, mean, rstd, shift, scale, D, BLOCK), D, BLOCK)
        tl.store(mean_ptr + row, mean)
        tl.store(rstd_ptr + row, rstd)


@jit
def _pair_backward_kernel(
    dx_new_ptr, dy_ptr, x_ptr, h_ptr, gate_ptr, shift_ptr, scale_ptr, mean_ptr, rstd_ptr,
    dx_ptr, dh_ptr, y_ptr, partial_ptr,
    T, rows, programs, dx_new_stride_b, dx_new_stride_t, dy_stride_b, dy_stride_t, x_stride_b, x_stride_t,
    h_stride_b, h_stride_t, gate_stride_b, shift_stride_b, scale_stride_b,
    D: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, COMPUTE: tl.constexpr, WITH_Y: tl.constexpr,
):  # fmt: skip
    batch, first, last = run_of_rows(T, rows, programs)
    gate = load_row(gate_ptr + batch * gate_stride_b, D, BLOCK, COMPUTE)
    scale = load_row(scale_ptr + batch * scale_stride_b, D, BLOCK, COMPUTE)
    dgate, dshift = zero_row(D, BLOCK, COMPUTE), zero_row(D, BLOCK, COMPUTE)
    dscale = zero_row(D, BLOCK, COMPUTE)
    for t in tl.range(first, last, num_stages=STAGES):
        x = load_row(x_ptr + batch * x_stride_b + t * x_stride_t, D, BLOCK, COMPUTE)
        h = load_row(h_ptr + batch * h_stride_b + t * h_stride_t, D, BLOCK, COMPUTE)
        dy = load_row(dy_ptr + batch * dy_stride_b + t * dy_stride_t, D, BLOCK, COMPUTE)
        dx_new = load_row(dx_new_ptr + batch * dx_new_stride_b + t * dx_new_stride_t, D, BLOCK, COMPUTE)
        row = batch * T + t
        mean, rstd = tl.load(mean_ptr + row), tl.load(rstd_ptr + row)
        x_new = rounded_row(residual_row(x, h, gate, D, BLOCK), x_ptr.dtype.element_ty, COMPUTE, D, BLOCK)
        if WITH_Y:
            shift = load_row(shift_ptr + batch * shift_stride_b, D, BLOCK, COMPUTE)
            store_row(y_ptr + row * D, modulate_row(x_new, mean, rstd, shift, scale, D, BLOCK), D, BLOCK)
        through_norm, dshift, dscale = norm_gradient_row(dy, x_new, scale, mean, rstd, dshift, dscale, D, BLOCK)
        dx = sum_row(dx_new, through_norm, D, BLOCK)
        dh, dgate = branch_gradient_row(dx, h, gate, dgate, D, BLOCK)
        store_row(dx_ptr + row * D, dx, D, BLOCK)
        store_row(dh_ptr + row * D, dh, D, BLOCK)
    partial_ptr += tl.program_id(0).to(tl.int64) * 3 * D
    store_row(partial_ptr, dgate, D, BLOCK)
    store_row(partial_ptr + D, dshift, D, BLOCK)
    store_row(partial_ptr + 2 * D, dscale, D, BLOCK)


# Launchers.


def _strides(**tensors: Tensor) -> dict[str, int]:
    """The kernels' stride arguments: of B and T for [B, T, D], of B for [B, D]."""
    return {
        f"{name}_stride_{axis}": tensor.stride(index)
        for name, tensor in tensors.items()
        for index, axis in enumerate("bt"[: tensor.dim() - 1])
    }


def _tiling(tile: Tile, x: Tensor) -> dict:
    """The arguments of every kernel here that the tile and the shape determine, and the number of warps."""
    return dict(
        num_warps=tile.num_warps,
        T=x.shape[1],
        rows=tile.rows,
        programs=tile.programs,
        D=x.shape[2],
        BLOCK=tile.block,
        STAGES=tile.stages,
        COMPUTE=launch.compute_type(x.dtype),
    )


def triton_gated_residual_forward(x: Tensor, h: Tensor, gate: Tensor) -> Tensor:
    """x_new."""
    x, h, gate = (with_contiguous_rows(tensor) for tensor in (x, h, gate))
    x_new = contiguous_like(x)
    tile = choose_tile(x.shape, FORWARD_WARPS, stages=stages(x, 2), max_rows=MAX_FORWARD_ROWS)
    launch.launch(
        _residual_forward_kernel,
        (len(x) * tile.programs,),
        x_ptr=x,
        h_ptr=h,
        gate_ptr=gate,
        x_new_ptr=x_new,
        **_strides(x=x, h=h, gate=gate),
        **_tiling(tile, x),
    )
    return x_new


def triton_gated_residual_backward(dx: Tensor, h: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """(dh, dgate)."""
    dx, h, gate = (with_contiguous_rows(tensor) for tensor in (dx, h, gate))
    B, _, D = h.shape
    dh = contiguous_like(h)
    tile = choose_tile(h.shape, BACKWARD_WARPS, stages=stages(h, 3), min_rows=MIN_BACKWARD_ROWS)
    wide = torch.promote_types(h.dtype, torch.float32)
    partial = torch.empty((B, tile.programs, 1, D), dtype=wide, device=h.device)
    launch.launch(
        _residual_backward_kernel,
        (B * tile.programs,),
        dx_ptr=dx,
        h_ptr=h,
        gate_ptr=gate,
        dh_ptr=dh,
        partial_ptr=partial,
        **_strides(dx=dx, h=h, gate=gate),
        **_tiling(tile, h),
    )
    (dgate,) = sum_partials(partial, gate.dtype)
    return dh, dgate


def triton_gated_residual_modulated_norm_forward(
    x: Tensor, h: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x_new, y, mean, rstd)."""
    x, h, gate, shift, scale = (with_contiguous_rows(tensor) for tensor in (x, h, gate, shift, scale))
    x_new, y, (mean, rstd) = contiguous_like(x), contiguous_like(x), statistics_like(x)
    tile = choose_tile(x.shape, PAIR_FORWARD_WARPS, stages=stages(x, 2), max_rows=MAX_FORWARD_ROWS)
    launch.launch(
        _pair_forward_kernel,
        (len(x) * tile.programs,),
        x_ptr=x,
        h_ptr=h,
        gate_ptr=gate,
        shift_ptr=shift,
        scale_ptr=scale,
        x_new_ptr=x_new,
        y_ptr=y,
        mean_ptr=mean,
        rstd_ptr=rstd,
        EPS=eps,
        **_strides(x=x, h=h, gate=gate, shift=shift, scale=scale),
        **_tiling(tile, x),
    )
    return x_new, y, mean, rstd


def triton_gated_residual_modulated_norm_backward(
    dx_new: Tensor, dy: Tensor, x: Tensor, h: Tensor, gate: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dh, dgate, dshift, dscale)."""
    return _triton_pair_backward(dx_new, dy, x, h, gate, None, scale, mean, rstd)[:5]


def triton_gated_residual_modulated_norm_backward_with_y(
    dx_new: Tensor,
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dh, dgate, dshift, dscale, y): the same pass also writes the y of the forward."""
    return _triton_pair_backward(dx_new, dy, x, h, gate, shift, scale, mean, rstd)


def _triton_pair_backward(
    dx_new: Tensor,
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    gate: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with_y, shift = shift is not None, scale if shift is None else shift
    dx_new, dy, x, h = (with_contiguous_rows(tensor) for tensor in (dx_new, dy, x, h))
    gate, shift, scale = (with_contiguous_rows(tensor) for tensor in (gate, shift, scale))
    B, _, D = x.shape
    dx, dh = contiguous_like(x), contiguous_like(x)
    y = contiguous_like(x) if with_y else dx
    tile = choose_tile(x.shape, PAIR_BACKWARD_WARPS, stages=stages(x, 2), min_rows=MIN_BACKWARD_ROWS)
    partial = torch.empty((B, tile.programs, 3, D), dtype=mean.dtype, device=x.device)
    launch.launch(
        _pair_backward_kernel,
        (B * tile.programs,),
        dx_new_ptr=dx_new,
        dy_ptr=dy,
        x_ptr=x,
        h_ptr=h,
        gate_ptr=gate,
        shift_ptr=shift,
        scale_ptr=scale,
        mean_ptr=mean,
        rstd_ptr=rstd,
        dx_ptr=dx,
        dh_ptr=dh,
        y_ptr=y,
        partial_ptr=partial,
        WITH_Y=with_y,
        **_strides(dx_new=dx_new, dy=dy, x=x, h=h, gate=gate, shift=shift, scale=scale),
        **_tiling(tile, x),
    )
    dgate, dshift, dscale = sum_partials(partial, scale.dtype)
    return dx, dh, dgate, dshift, dscale, y


# Ops.


@torch.library.custom_op("opensora_fast::gated_residual", mutates_args=())
def _gated_residual(x: Tensor, h: Tensor, gate: Tensor) -> Tensor:
    return (triton_gated_residual_forward if _backend(x) == "triton" else gated_residual_reference)(x, h, gate)


@_gated_residual.register_fake
def _fake_gated_residual(x, h, gate):
    return contiguous_like(x)


@torch.library.custom_op("opensora_fast::gated_residual_backward", mutates_args=())
def _gated_residual_backward(dx: Tensor, h: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    triton = _backend(h) == "triton"
    return (triton_gated_residual_backward if triton else gated_residual_backward_reference)(dx, h, gate)


@_gated_residual_backward.register_fake
def _fake_gated_residual_backward(dx, h, gate):
    return contiguous_like(h), contiguous_like(gate)


def _save(ctx, inputs, output):
    _, h, gate = inputs
    ctx.save_for_backward(h, gate)


def _gradients(ctx, dx_new):
    if not any(ctx.needs_input_grad[1:]):
        return dx_new, None, None
    return dx_new, *_gated_residual_backward(dx_new, *ctx.saved_tensors)


_gated_residual.register_autograd(_gradients, setup_context=_save)


@torch.library.custom_op("opensora_fast::gated_residual_modulated_norm", mutates_args=())
def _gated_residual_modulated_norm(
    x: Tensor, h: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _pair_forward(x)(x, h, gate, shift, scale, eps)


def _pair_forward(x: Tensor):
    triton = _backend(x) == "triton"
    return triton_gated_residual_modulated_norm_forward if triton else gated_residual_modulated_norm_reference


@_gated_residual_modulated_norm.register_fake
def _fake_gated_residual_modulated_norm(x, h, gate, shift, scale, eps):
    return contiguous_like(x), contiguous_like(x), *statistics_like(x)


@torch.library.custom_op("opensora_fast::gated_residual_modulated_norm_backward", mutates_args=())
def _gated_residual_modulated_norm_backward(
    dx_new: Tensor, dy: Tensor, x: Tensor, h: Tensor, gate: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _pair_backward(x)(dx_new, dy, x, h, gate, scale, mean, rstd)


def _pair_backward(x: Tensor):
    triton = _backend(x) == "triton"
    return triton_gated_residual_modulated_norm_backward if triton else gated_residual_modulated_norm_backward_reference


@_gated_residual_modulated_norm_backward.register_fake
def _fake_gated_residual_modulated_norm_backward(dx_new, dy, x, h, gate, scale, mean, rstd):
    return contiguous_like(x), contiguous_like(h), *(contiguous_like(gate) for _ in range(3))


def _save_pair(ctx, inputs, output):
    x, h, gate, _, scale, _ = inputs
    _, _, mean, rstd = output
    ctx.save_for_backward(x, h, gate, scale, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _pair_gradients(ctx, dx_new, dy, *_):
    x, h, gate, scale, mean, rstd = ctx.saved_tensors
    if dy is None:
        return *_residual_gradients(dx_new, h, gate), None, None, None
    dx_new = torch.zeros_like(x) if dx_new is None else dx_new
    return *_gated_residual_modulated_norm_backward(dx_new, dy, x, h, gate, scale, mean, rstd), None


def _residual_gradients(dx_new: Tensor | None, h: Tensor, gate: Tensor) -> tuple[Tensor | None, ...]:
    """(dx, dh, dgate) where nothing was asked of the norm that follows."""
    return (None, None, None) if dx_new is None else (dx_new, *_gated_residual_backward(dx_new, h, gate))


_gated_residual_modulated_norm.register_autograd(_pair_gradients, setup_context=_save_pair)


@torch.library.custom_op("opensora_fast::gated_residual_modulated_norm_linear", mutates_args=())
def _gated_residual_modulated_norm_linear(
    x: Tensor,
    h: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x_new, y, mean, rstd = _pair_forward(x)(x, h, gate, shift, scale, eps)
    return x_new, F.linear(y, weight, bias), mean, rstd


@_gated_residual_modulated_norm_linear.register_fake
def _fake_gated_residual_modulated_norm_linear(x, h, gate, shift, scale, weight, bias, eps):
    return contiguous_like(x), x.new_empty((*x.shape[:2], weight.shape[0])), *statistics_like(x)


@torch.library.custom_op("opensora_fast::gated_residual_modulated_norm_linear_backward", mutates_args=())
def _gated_residual_modulated_norm_linear_backward(
    dx_new: Tensor,
    dout: Tensor,
    x: Tensor,
    h: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    weight_wanted: bool,
    bias_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dh, dgate, dshift, dscale, dweight, dbias); the last two are empty when they are not wanted."""
    dy, y = linear_input_gradient([dout], weight), None
    if weight_wanted and _backend(x) == "triton":
        dx, dh, dgate, dshift, dscale, y = triton_gated_residual_modulated_norm_backward_with_y(
            dx_new, dy, x, h, gate, shift, scale, mean, rstd
        )
    else:
        dx, dh, dgate, dshift, dscale = _pair_backward(x)(dx_new, dy, x, h, gate, scale, mean, rstd)
        y = _pair_forward(x)(x, h, gate, shift, scale, eps)[1] if weight_wanted else None
    del dy
    dweight, dbias = linear_parameter_gradients([dout], y, x, bias_wanted)
    return dx, dh, dgate, dshift, dscale, dweight, dbias


@_gated_residual_modulated_norm_linear_backward.register_fake
def _fake_gated_residual_modulated_norm_linear_backward(
    dx_new, dout, x, h, gate, shift, scale, weight, mean, rstd, eps, weight_wanted, bias_wanted
):
    dweight, dbias = weight.shape if weight_wanted else 0, weight.shape[:1] if bias_wanted else 0
    return (
        contiguous_like(x),
        contiguous_like(h),
        *(contiguous_like(gate) for _ in range(3)),
        x.new_empty(dweight),
        x.new_empty(dbias),
    )


def _save_pair_linear(ctx, inputs, output):
    x, h, gate, shift, scale, weight, _, ctx.eps = inputs
    _, _, mean, rstd = output
    ctx.save_for_backward(x, h, gate, shift, scale, weight, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _pair_linear_gradients(ctx, dx_new, dout, *_):
    saved = ctx.saved_tensors  # read once: activation checkpointing gives each out a single time
    x, h, gate = saved[:3]
    if dout is None:
        return *_residual_gradients(dx_new, h, gate), *(None,) * 5
    dx_new = torch.zeros_like(x) if dx_new is None else dx_new
    gradients = _gated_residual_modulated_norm_linear_backward(
        dx_new, dout, *saved, ctx.eps, *ctx.needs_input_grad[5:7]
    )
    return *only_needed(ctx, gradients), None


_gated_residual_modulated_norm_linear.register_autograd(_pair_linear_gradients, setup_context=_save_pair_linear)


# Public functions.


def gated_residual(x_BTD: Tensor, h_BTD: Tensor, gate_BD: Tensor) -> Tensor:
    """x + gate * h, the end of a residual branch h.

    x, h: [B, T, D], D at most 8192.  gate: [B, D]. All float32, bfloat16, float16 or float64, on one device. Returns
    [B, T, D], contiguous. Differentiable in all three, once. ValueError names the argument that is outside of this.
    DiT, adaLN-Zero.
    """
    check_envelope({"x": x_BTD, "h": h_BTD}, {"gate": gate_BD})
    return _gated_residual(x_BTD, h_BTD, gate_BD)


def gated_residual_modulated_norm(
    x_BTD: Tensor, h_BTD: Tensor, gate_BD: Tensor, shift_BD: Tensor, scale_BD: Tensor, *, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """(x_new, y): x_new = gated_residual(x, h, gate) and y = modulated_norm(x_new, shift, scale), in one pass.

    x, h: [B, T, D], D at most 8192.  gate, shift, scale: [B, D]. All float32, bfloat16, float16 or float64, on one
    device. Returns two [B, T, D], contiguous. Differentiable in all five, once. ValueError names the argument that is
    outside of this. DiT, adaLN-Zero.
    """
    check_envelope({"x": x_BTD, "h": h_BTD}, {"gate": gate_BD, "shift": shift_BD, "scale": scale_BD})
    return _gated_residual_modulated_norm(x_BTD, h_BTD, gate_BD, shift_BD, scale_BD, eps)[:2]


def gated_residual_modulated_norm_linear(
    x_BTD: Tensor,
    h_BTD: Tensor,
    gate_BD: Tensor,
    shift_BD: Tensor,
    scale_BD: Tensor,
    weight_OD: Tensor,
    bias_O: Tensor | None,
    *,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """(x_new, linear(y, weight, bias)) of gated_residual_modulated_norm's x_new and y, neither kept for the backward.

    x, h: [B, T, D], D at most 8192.  gate, shift, scale: [B, D].  weight: [O, D].  bias: [O] or None. All float32,
    bfloat16, float16 or float64, on one device. Returns [B, T, D] and [B, T, O], contiguous. Differentiable in all
    seven, once. ValueError names the argument that is outside of this. DiT, adaLN-Zero.
    """
    check_envelope({"x": x_BTD, "h": h_BTD}, {"gate": gate_BD, "shift": shift_BD, "scale": scale_BD})
    check_linear(weight_OD, bias_O, "x", x_BTD)
    return _gated_residual_modulated_norm_linear(x_BTD, h_BTD, gate_BD, shift_BD, scale_BD, weight_OD, bias_O, eps)[:2]


def cost(
    shape: Sequence[int], dtype: torch.dtype, mode: str, *, norm: bool = False, out_features: int | None = None
) -> Cost:
    """Cost for x of `shape` [B, T, D]; mode is "forward" or "backward".

    norm: of gated_residual_modulated_norm. out_features: of that with its linear and a bias, counting the norm's own
    traffic and that of its products, since what a product reads or writes has to pass through memory.
    """
    B, T, D = shape
    rows, vectors, size = B * T * D, B * D, dtype.itemsize
    if mode == "forward":
        residual = Cost(flops=2 * rows, bytes=(3 * rows + vectors) * size)
    else:
        residual = Cost(flops=3 * rows, bytes=(3 * rows + 2 * vectors) * size)
    if not norm and out_features is None:
        return residual
    following = modulated_norm_cost(shape, dtype, mode, out_features=out_features)
    shared = rows * size if mode == "forward" else 0  # the norm does not read the x_new that is still in registers
    return Cost(flops=residual.flops + following.flops, bytes=residual.bytes + following.bytes - shared)
