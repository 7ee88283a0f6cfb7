"""Layer norm modulated by vectors of the conditioning (adaLN), alone and with the linear layer that follows it.

    xhat = (x - mean) * rstd,   mean = mean_D(x),   rstd = 1 / sqrt(mean_D((x - mean)^2) + eps)
    modulated_norm              y   = xhat * (1 + scale) + shift
    modulated_norm_linear       out = y W^T + bias

Backward, with g = dy * (1 + scale) and, where there is a linear, dy = dout W:

    dx     = rstd * (g - mean_D(g) - xhat * mean_D(g * xhat))
    dscale = sum_T(dy * xhat)       dshift = sum_T(dy)
    dW     = dout^T y               dbias  = sum_BT(dout)       y computed again by the pass that makes dx

Shapes      B batch, T tokens, D channels, O output features.  x, y, dx [B, T, D];  shift, scale [B, D];
            mean, rstd [B, T];  W [O, D];  bias [O];  out [B, T, O].
Numerics    float32, bfloat16, float16 in and out; statistics and sums in float32, each result rounded once (y before
            the product with W too). float64 is computed in float64.
Envelope    1 <= D <= 8192; one dtype, one device. x and dy are read with any strides of B and T, a shift or scale with
            any stride of B (a chunk of one wider linear's output); whatever has a strided last axis is copied first.
            Outputs are contiguous.
Traffic     forward x + y, backward dy + x + dx elements (+ y with a linear): memory bound -> the target is bytes/s
            (cost()). A row of x is read once: it stays in registers from its statistics to its result.
Determinism dshift and dscale in two stages, no atomics: a program sums a run of rows of one batch item, then a second
            kernel sums those partial sums in their order. Runs depend on the shape alone: bitwise reproducible.
Saved       x, scale, mean, rstd; with a linear shift and W as well. Never y.
Source      Peebles and Xie 2023 (DiT, arXiv:2212.09748, adaLN), Ba et al. 2016 (layer norm). Unlike the composite of
            norm, multiply and add, no normalised tensor is written or kept, and y is not kept for W's gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from opensora_fast.kernels import backend, launch
from opensora_fast.kernels.cost import Cost
from opensora_fast.kernels.launch import jit, tl

MAX_D = 8192


# Reference: PyTorch's own layer norm in float32 (float64 for float64), of which 1 + scale and shift are the weight and
# bias within one batch item; its autograd is the oracle of the backward.

CPU_PIECE = 1 << 17  # elements that a thread takes at once, so that temporaries stay in its cache


def widened(x: Tensor) -> Tensor:
    """x in the dtype that references compute in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def pieces(x_BTD: Tensor) -> Iterator[tuple[int, slice]]:
    """(batch item, tokens) of blocks of rows that together are x."""
    B, T, D = x_BTD.shape
    step = max(1, CPU_PIECE * torch.get_num_threads() // D) if x_BTD.device.type == "cpu" else max(1, T)
    return ((item, slice(start, start + step)) for item in range(B) for start in range(0, T, step))


def modulated_norm_reference(
    x_BTD: Tensor, shift_BD: Tensor, scale_BD: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd)."""
    y, (mean, rstd) = contiguous_like(x_BTD), statistics_like(x_BTD)
    weight, bias = 1 + widened(scale_BD), widened(shift_BD)
    for item, t in pieces(x_BTD):
        x = widened(x_BTD[item, t])
        y[item, t], piece_mean, piece_rstd = torch.native_layer_norm(x, x.shape[-1:], weight[item], bias[item], eps)
        mean[item, t], rstd[item, t] = piece_mean[:, 0], piece_rstd[:, 0]
    return y, mean, rstd


def modulated_norm_backward_reference(
    dy_BTD: Tensor, x_BTD: Tensor, scale_BD: Tensor, mean_BT: Tensor, rstd_BT: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dshift, dscale)."""
    dx, weight = contiguous_like(x_BTD), 1 + widened(scale_BD)
    dshift, dscale = torch.zeros_like(weight), torch.zeros_like(weight)
    for item, t in pieces(x_BTD):
        dx[item, t], piece_dscale, piece_dshift = norm_backward_piece(
            dy_BTD[item, t], x_BTD[item, t], weight[item], mean_BT[item, t], rstd_BT[item, t]
        )
        dscale[item] += piece_dscale
        dshift[item] += piece_dshift
    return dx, dshift.to(scale_BD.dtype), dscale.to(scale_BD.dtype)


def norm_backward_piece(
    dy_TD: Tensor, x_TD: Tensor, weight_D: Tensor, mean_T: Tensor, rstd_T: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias) of rows of a layer norm, wide."""
    return torch.ops.aten.native_layer_norm_backward(
        widened(dy_TD).contiguous(),
        widened(x_TD).contiguous(),
        x_TD.shape[-1:],
        mean_T[:, None],
        rstd_T[:, None],
        weight_D,
        weight_D,  # stands for the bias, whose value no gradient depends on
        [True, True, True],
    )


# Tile choice. Constants are modelled for an H200 from registers and bytes in flight, not yet measured on a GPU.

SMS = 132
FORWARD_WARPS = 20  # resident on one SM, by the registers of the compiled kernel at D = 3072: 96 a thread
BACKWARD_WARPS = 12  # likewise: 157, with y 167, of the 168 that three programs of 4 warps leave each thread
MAX_FORWARD_ROWS = 8  # amortises the modulation's loads; longer runs would only lengthen the tail of the last programs
MIN_BACKWARD_ROWS = 4  # so that partial sums, two float32 rows a program, stay below the rows they come from
SUM_ROWS, SUM_COLUMNS = 64, 32  # a tile of the second stage: 16 float32 a thread, whole sectors of 128 bytes


@dataclass(frozen=True)
class Tile:
    """How a row is cut into blocks that a program holds in registers, and the rows into one run per program."""

    block: int  # elements, a power of two: 8 to a thread, so that 16-bit dtypes move 16 bytes at a time
    num_warps: int
    rows: int  # consecutive rows of one batch item that a program takes
    programs: int  # of one batch item
    stages: int  # rows under way: the next ones are copied to shared memory while one is computed


def choose_tile(
    shape: Sequence[int], warps: int, *, stages: int, min_rows: int = 1, max_rows: int | None = None
) -> Tile:
    """The tile for rows of `shape` [B, T, D], when `warps` of the kernel fit an SM. Pure.

    A row gets the fewest warps that leave a thread three blocks of it at most: at D = 3072 that is 4 warps and three
    blocks of 1024 with no idle lane, where one block of 4096 would idle a quarter of them. All programs are resident
    together unless max_rows says otherwise; what hides the latency of memory is the rows under way, not their number.
    Up to D = 6144 no kernel spills in 16 and 32 bits; above it the backward of the residual and norm together does.
    """
    B, T, D = shape
    num_warps = next(count for count in (1, 2, 4, 8, 16) if 3 * 256 * count >= D)
    block = min(256 * num_warps, launch.power_of_two(D))
    item_programs = max(1, SMS * warps // num_warps // max(1, B))
    rows = max(min_rows, math.ceil(T / item_programs))
    rows = rows if max_rows is None else min(rows, max_rows)
    return Tile(block=block, num_warps=num_warps, rows=rows, programs=math.ceil(T / rows), stages=stages)


def stages(x: Tensor, wanted: int) -> int:
    """`wanted`, or none under way in float64, which is for checking gradients: its rows would not fit shared memory."""
    return 1 if x.dtype == torch.float64 else wanted


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
    return backend.select("modulated_norm", choose(shape, dtype, device_type, missing), missing)


def _backend(x: Tensor) -> str:
    device_type = x.device.type
    selection = selected(x.shape, x.dtype, device_type)
    return backend.announced("modulated_norm", selection, missing_backends(x.dtype, device_type))


# Device code. A row is a tuple of blocks [BLOCK] in registers, zero beyond D.


@jit
def load_row(row_ptr, D: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr):
    """The D elements from row_ptr on, in COMPUTE."""
    row: tl.tuple = ()
    for block in tl.static_range((D + BLOCK - 1) // BLOCK):
        d = block * BLOCK + tl.arange(0, BLOCK)
        part = tl.load(row_ptr + d) if (block + 1) * BLOCK <= D else tl.load(row_ptr + d, mask=d < D, other=0.0)
        row = row + (part.to(COMPUTE),)
    return row


@jit
def store_row(row_ptr, row, D: tl.constexpr, BLOCK: tl.constexpr):
    for block in tl.static_range((D + BLOCK - 1) // BLOCK):
        d = block * BLOCK + tl.arange(0, BLOCK)
        if (block + 1) * BLOCK <= D:
            tl.store(row_ptr + d, row[block])
        else:
            tl.store(row_ptr + d, row[block], mask=d < D)


@jit
def zero_row(D: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr):
    row: tl.tuple = ()
    for _ in tl.static_range((D + BLOCK - 1) // BLOCK):
        row = row + (tl.zeros((BLOCK,), COMPUTE),)
    return row


@jit
def row_statistics(x, D: tl.constexpr, BLOCK: tl.constexpr, EPS: tl.constexpr):
    """(mean, rstd) of a row: the variance from deviations, which cancels nothing."""
    BLOCKS: tl.constexpr = (D + BLOCK - 1) // BLOCK
    total = x[0]
    for block in tl.static_range(1, BLOCKS):
        total += x[block]
    mean = tl.sum(total, 0) / D
    squares = tl.zeros_like(total)
    for block in tl.static_range(BLOCKS):
        deviation = x[block] - mean
        if (block + 1) * BLOCK > D:
            deviation = tl.where(block * BLOCK + tl.arange(0, BLOCK) < D, deviation, 0.0)
        squares += deviation * deviation
    return mean, tl.rsqrt(tl.sum(squares, 0) / D + EPS)


@jit
def modulate_row(x, mean, rstd, shift, scale, D: tl.constexpr, BLOCK: tl.constexpr):
    y: tl.tuple = ()
    for block in tl.static_range((D + BLOCK - 1) // BLOCK):
        y = y + ((x[block] - mean) * rstd * (1 + scale[block]) + shift[block],)
    return y


@jit
def norm_gradient_row(dy, x, scale, mean, rstd, dshift, dscale, D: tl.constexpr, BLOCK: tl.constexpr):
    """(dx of a row, dshift + its dy, dscale + its dy * xhat)."""
    BLOCKS: tl.constexpr = (D + BLOCK - 1) // BLOCK
    sum_g, sum_gx = tl.zeros_like(x[0]), tl.zeros_like(x[0])
    xhat: tl.tuple = ()
    g: tl.tuple = ()
    dshift_next: tl.tuple = ()
    dscale_next: tl.tuple = ()
    for block in tl.static_range(BLOCKS):
        xhat = xhat + ((x[block] - mean) * rstd,)
        g = g + (dy[block] * (1 + scale[block]),)
        sum_g += g[block]
        sum_gx += g[block] * xhat[block]
        dshift_next = dshift_next + (dshift[block] + dy[block],)
        dscale_next = dscale_next + (dscale[block] + dy[block] * xhat[block],)
    # Joined, the two sums cross the warps together: half the barriers.
    total_g, total_gx = tl.split(tl.sum(tl.join(sum_g, sum_gx), 0))
    dx: tl.tuple = ()
    for block in tl.static_range(BLOCKS):
        dx = dx + (rstd * (g[block] - total_g / D - xhat[block] * (total_gx / D)),)
    return dx, dshift_next, dscale_next


@jit
def run_of_rows(T, rows, programs):
    """(batch item, first row, row after the last) of this program, in int64."""
    program = tl.program_id(0).to(tl.int64)
    first = program % programs * rows
    return program // programs, first, tl.minimum(first + rows, T)


@jit
def _forward_kernel(
    x_ptr, shift_ptr, scale_ptr, y_ptr, mean_ptr, rstd_ptr,
    T, rows, programs, x_stride_b, x_stride_t, shift_stride_b, scale_stride_b,
    D: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    batch, first, last = run_of_rows(T, rows, programs)
    shift = load_row(shift_ptr + batch * shift_stride_b, D, BLOCK, COMPUTE)
    scale = load_row(scale_ptr + batch * scale_stride_b, D, BLOCK, COMPUTE)
    for t in tl.range(first, last, num_stages=STAGES):
        x = load_row(x_ptr + batch * x_stride_b + t * x_stride_t, D, BLOCK, COMPUTE)
        mean, rstd = row_statistics(x, D, BLOCK, EPS)
        row = batch * T + t
        store_row(y_ptr + row * D, modulate_row(x, mean, rstd, shift, scale, D, BLOCK), D, BLOCK)
        tl.store(mean_ptr + row, mean)
        tl.store(rstd_ptr + row, rstd)


@jit
def _backward_kernel(
    dy_ptr, x_ptr, shift_ptr, scale_ptr, mean_ptr, rstd_ptr, dx_ptr, y_ptr, partial_ptr,
    T, rows, programs, dy_stride_b, dy_stride_t, x_stride_b, x_stride_t, shift_stride_b, scale_stride_b,
    D: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, COMPUTE: tl.constexpr, WITH_Y: tl.constexpr,
):  # fmt: skip
    batch, first, last = run_of_rows(T, rows, programs)
    scale = load_row(scale_ptr + batch * scale_stride_b, D, BLOCK, COMPUTE)
    dshift, dscale = zero_row(D, BLOCK, COMPUTE), zero_row(D, BLOCK, COMPUTE)
    for t in tl.range(first, last, num_stages=STAGES):
        dy = load_row(dy_ptr + batch * dy_stride_b + t * dy_stride_t, D, BLOCK, COMPUTE)
        x = load_row(x_ptr + batch * x_stride_b + t * x_stride_t, D, BLOCK, COMPUTE)
        row = batch * T + t
        mean, rstd = tl.load(mean_ptr + row), tl.load(rstd_ptr + row)
        if WITH_Y:
            shift = load_row(shift_ptr + batch * shift_stride_b, D, BLOCK, COMPUTE)
            store_row(y_ptr + row * D, modulate_row(x, mean, rstd, shift, scale, D, BLOCK), D, BLOCK)
        dx, dshift, dscale = norm_gradient_row(dy, x, scale, mean, rstd, dshift, dscale, D, BLOCK)
        store_row(dx_ptr + row * D, dx, D, BLOCK)
    partial_ptr += tl.program_id(0).to(tl.int64) * 2 * D
    store_row(partial_ptr, dshift, D, BLOCK)
    store_row(partial_ptr + D, dscale, D, BLOCK)


@jit
def _sum_partials_kernel(
    partial_ptr, out0_ptr, out1_ptr, out2_ptr, programs, batch_stride,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(0) // ((D + COLUMNS - 1) // COLUMNS)).to(tl.int64)
    d = tl.program_id(0) % ((D + COLUMNS - 1) // COLUMNS) * COLUMNS + tl.arange(0, COLUMNS)
    which = tl.program_id(1)
    count = tl.num_programs(1)
    p = tl.arange(0, ROWS)
    partial_ptr += batch * batch_stride + (p * count + which)[:, None] * D + d[None, :]
    total = tl.zeros((ROWS, COLUMNS), COMPUTE)
    for start in tl.range(0, programs, ROWS, num_stages=3):
        mask = (start + p < programs)[:, None] & (d < D)[None, :]
        total += tl.load(partial_ptr + start * count * D, mask=mask, other=0.0)
    total = tl.sum(total, 0)
    out_offset = batch * D + d
    if which == 0:
        tl.store(out0_ptr + out_offset, total, mask=d < D)
    elif which == 1:
        tl.store(out1_ptr + out_offset, total, mask=d < D)
    else:
        tl.store(out2_ptr + out_offset, total, mask=d < D)


# Launchers.


def with_contiguous_rows(x: Tensor) -> Tensor:
    """x itself when its last axis is contiguous, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def statistics_like(x_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """Empty mean and rstd [B, T]."""
    wide = torch.promote_types(x_BTD.dtype, torch.float32)
    mean, rstd = (torch.empty(x_BTD.shape[:2], dtype=wide, device=x_BTD.device) for _ in range(2))
    return mean, rstd


def contiguous_like(x: Tensor) -> Tensor:
    """Empty and contiguous, whatever the strides of x."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def sum_partials(partial_BPND: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The sums over P, one tensor [B, D] for each n < N <= 3."""
    B, P, N, D = partial_BPND.shape
    outs = [torch.empty((B, D), dtype=dtype, device=partial_BPND.device) for _ in range(N)]
    rows = min(SUM_ROWS, max(8, launch.power_of_two(P)))
    launch.launch(
        _sum_partials_kernel,
        (B * math.ceil(D / SUM_COLUMNS), N),
        num_warps=max(1, min(4, rows * SUM_COLUMNS // 256)),
        partial_ptr=partial_BPND,
        out0_ptr=outs[0],
        out1_ptr=outs[min(1, N - 1)],
        out2_ptr=outs[-1],
        programs=P,
        batch_stride=P * N * D,
        D=D,
        ROWS=rows,
        COLUMNS=SUM_COLUMNS,
        COMPUTE=launch.compute_type(partial_BPND.dtype),
    )
    return outs


def triton_forward(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd)."""
    x, shift, scale = (with_contiguous_rows(tensor) for tensor in (x, shift, scale))
    B, T, D = x.shape
    y, (mean, rstd) = contiguous_like(x), statistics_like(x)
    tile = choose_tile(x.shape, FORWARD_WARPS, stages=stages(x, 2), max_rows=MAX_FORWARD_ROWS)
    launch.launch(
        _forward_kernel,
        (B * tile.programs,),
        num_warps=tile.num_warps,
        x_ptr=x,
        shift_ptr=shift,
        scale_ptr=scale,
        y_ptr=y,
        mean_ptr=mean,
        rstd_ptr=rstd,
        T=T,
        rows=tile.rows,
        programs=tile.programs,
        x_stride_b=x.stride(0),
        x_stride_t=x.stride(1),
        shift_stride_b=shift.stride(0),
        scale_stride_b=scale.stride(0),
        D=D,
        EPS=eps,
        BLOCK=tile.block,
        STAGES=tile.stages,
        COMPUTE=launch.compute_type(x.dtype),
    )
    return y, mean, rstd


def triton_backward(dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dshift, dscale)."""
    return _triton_backward(dy, x, None, scale, mean, rstd)[:3]


def triton_backward_with_y(
    dy: Tensor, x: Tensor, shift: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dshift, dscale, y): the same pass also writes what the forward returned."""
    return _triton_backward(dy, x, shift, scale, mean, rstd)


def _triton_backward(
    dy: Tensor, x: Tensor, shift: Tensor | None, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with_y, shift = shift is not None, scale if shift is None else shift
    dy, x, shift, scale = (with_contiguous_rows(tensor) for tensor in (dy, x, shift, scale))
    B, T, D = x.shape
    dx = contiguous_like(x)
    y = contiguous_like(x) if with_y else dx
    tile = choose_tile(x.shape, BACKWARD_WARPS, stages=stages(x, 3), min_rows=MIN_BACKWARD_ROWS)
    partial = torch.empty((B, tile.programs, 2, D), dtype=mean.dtype, device=x.device)
    launch.launch(
        _backward_kernel,
        (B * tile.programs,),
        num_warps=tile.num_warps,
        dy_ptr=dy,
        x_ptr=x,
        shift_ptr=shift,
        scale_ptr=scale,
        mean_ptr=mean,
        rstd_ptr=rstd,
        dx_ptr=dx,
        y_ptr=y,
        partial_ptr=partial,
        T=T,
        rows=tile.rows,
        programs=tile.programs,
        dy_stride_b=dy.stride(0),
        dy_stride_t=dy.stride(1),
        x_stride_b=x.stride(0),
        x_stride_t=x.stride(1),
        shift_stride_b=shift.stride(0),
        scale_stride_b=scale.stride(0),
        D=D,
        BLOCK=tile.block,
        STAGES=tile.stages,
        COMPUTE=launch.compute_type(x.dtype),
        WITH_Y=with_y,
    )
    dshift, dscale = sum_partials(partial, scale.dtype)
    return dx, dshift, dscale, y


# Ops.


@torch.library.custom_op("opensora_fast::modulated_norm", mutates_args=())
def _modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(x)(x, shift, scale, eps)


def _forward(x: Tensor):
    return triton_forward if _backend(x) == "triton" else modulated_norm_reference


@_modulated_norm.register_fake
def _fake_modulated_norm(x, shift, scale, eps):
    return contiguous_like(x), *statistics_like(x)


@torch.library.custom_op("opensora_fast::modulated_norm_backward", mutates_args=())
def _modulated_norm_backward(
    dy: Tensor, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(x)(dy, x, scale, mean, rstd)


def _backward(x: Tensor):
    return triton_backward if _backend(x) == "triton" else modulated_norm_backward_reference


@_modulated_norm_backward.register_fake
def _fake_modulated_norm_backward(dy, x, scale, mean, rstd):
    return contiguous_like(x), contiguous_like(scale), contiguous_like(scale)


def _save(ctx, inputs, output):
    x, _, scale, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, scale, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _gradients(ctx, dy, *_):
    if dy is None:
        return None, None, None, None
    return *_modulated_norm_backward(dy, *ctx.saved_tensors), None


_modulated_norm.register_autograd(_gradients, setup_context=_save)


@torch.library.custom_op("opensora_fast::modulated_norm_linear", mutates_args=())
def _modulated_norm_linear(
    x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor | None, sizes: list[int], eps: float
) -> list[Tensor]:
    """One output for each of `sizes`, which sum to the features of the linear; then mean and rstd."""
    y, mean, rstd = _forward(x)(x, shift, scale, eps)
    biases = [None] * len(sizes) if bias is None else bias.split(sizes)
    return [*map(F.linear, [y] * len(sizes), weight.split(sizes), biases), mean, rstd]


@_modulated_norm_linear.register_fake
def _fake_modulated_norm_linear(x, shift, scale, weight, bias, sizes, eps):
    return [*(x.new_empty((*x.shape[:2], size)) for size in sizes), *statistics_like(x)]


@torch.library.custom_op("opensora_fast::modulated_norm_linear_backward", mutates_args=())
def _modulated_norm_linear_backward(
    douts: list[Tensor],
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    norm_wanted: bool,
    weight_wanted: bool,
    bias_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dshift, dscale, dweight, dbias); those not wanted are empty."""
    dx, dshift, dscale, y = x.new_empty(0), x.new_empty(0), x.new_empty(0), None
    if norm_wanted:
        dy = linear_input_gradient(douts, weight)
        if weight_wanted and _backend(x) == "triton":
            dx, dshift, dscale, y = triton_backward_with_y(dy, x, shift, scale, mean, rstd)
        else:
            dx, dshift, dscale = _backward(x)(dy, x, scale, mean, rstd)
        del dy
    if weight_wanted and y is None:
        y = _forward(x)(x, shift, scale, eps)[0]
    dweight, dbias = linear_parameter_gradients(douts, y, x, bias_wanted)
    return dx, dshift, dscale, dweight, dbias


@_modulated_norm_linear_backward.register_fake
def _fake_modulated_norm_linear_backward(
    douts, x, shift, scale, weight, mean, rstd, eps, norm_wanted, weight_wanted, bias_wanted
):
    wanted = (norm_wanted, norm_wanted, norm_wanted, weight_wanted, bias_wanted)
    shapes = (x.shape, scale.shape, scale.shape, weight.shape, weight.shape[:1])
    return tuple(x.new_empty(shape if want else 0) for shape, want in zip(shapes, wanted, strict=True))


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def linear_input_gradient(douts: Sequence[Tensor], weight: Tensor) -> Tensor:
    """dy of outs = y W^T cut into pieces, contiguous: one product a piece, each added to the one before."""
    weights = weight.split([dout.shape[-1] for dout in douts])
    dy = _rows(douts[0]) @ weights[0]
    for dout, piece in zip(douts[1:], weights[1:], strict=True):
        dy.addmm_(_rows(dout), piece)
    return dy.view(*douts[0].shape[:-1], weight.shape[1])


def linear_parameter_gradients(
    douts: Sequence[Tensor], y: Tensor | None, like: Tensor, bias_wanted: bool
) -> tuple[Tensor, Tensor]:
    """(dW, dbias) of outs = y W^T + bias cut into pieces: dW empty without y, dbias if not wanted."""
    sizes = [dout.shape[-1] for dout in douts]
    dweight = like.new_empty(0) if y is None else like.new_empty(sum(sizes), y.shape[-1])
    dbias = like.new_empty(sum(sizes) if bias_wanted else 0)
    if y is not None:
        for dout, piece in zip(douts, dweight.split(sizes), strict=True):
            torch.mm(_rows(dout).t(), _rows(y), out=piece)
    if bias_wanted:
        for dout, piece in zip(douts, dbias.split(sizes), strict=True):
            torch.sum(_rows(dout), 0, out=piece)
    return dweight, dbias


def _save_linear(ctx, inputs, output):
    x, shift, scale, weight, _, ctx.sizes, ctx.eps = inputs
    ctx.save_for_backward(x, shift, scale, weight, *output[-2:])
    ctx.set_materialize_grads(False)


def _linear_gradients(ctx, gradients):
    norm_wanted, (weight_wanted, bias_wanted) = any(ctx.needs_input_grad[:3]), ctx.needs_input_grad[3:5]
    douts, saved = gradients[:-2], ctx.saved_tensors
    if all(dout is None for dout in douts):
        return (None,) * 7
    x = saved[0]
    douts = [
        x.new_zeros(*x.shape[:2], size) if dout is None else dout for dout, size in zip(douts, ctx.sizes, strict=True)
    ]
    d_inputs = _modulated_norm_linear_backward(douts, *saved, ctx.eps, norm_wanted, weight_wanted, bias_wanted)
    return *only_needed(ctx, d_inputs), None, None


def only_needed(ctx, gradients: Sequence[Tensor]) -> list[Tensor | None]:
    """None in place of gradients that were not asked for, some of which are empty."""
    needed = ctx.needs_input_grad[: len(gradients)]
    return [grad if need else None for grad, need in zip(gradients, needed, strict=True)]


_modulated_norm_linear.register_autograd(_linear_gradients, setup_context=_save_linear)


# Public functions.


def check_envelope(rows: Mapping[str, Tensor], vectors: Mapping[str, Tensor]) -> None:
    """ValueError naming the argument unless `rows` are all like the first, [B, T, D], and `vectors` are [B, D]."""
    first, x = next(iter(rows.items()))
    if x.dim() != 3:
        raise ValueError(f"{first} has {x.dim()} dimensions; it must be [batch, tokens, channels]")
    B, T, D = x.shape
    if x.dtype not in launch.DTYPES:
        raise ValueError(f"{first} is {x.dtype}; it must be float32, bfloat16, float16 or float64")
    if not 1 <= D <= MAX_D:
        raise ValueError(f"{first} has {D} channels; they must be 1 to {MAX_D}")
    for expected, tensors in (((B, T, D), rows), ((B, D), vectors)):
        for name, tensor in tensors.items():
            if tensor.shape != expected:
                raise ValueError(
                    f"{name} is {list(tensor.shape)}; with {first} {[B, T, D]} it must be {list(expected)}"
                )
            check_alike(name, tensor, first, x)


def check_linear(weight: Tensor, bias: Tensor | None, first: str, x: Tensor) -> None:
    """ValueError naming the argument unless weight is [O, D] and bias None or [O]."""
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"weight is {list(weight.shape)}; it must be [output features, {x.shape[-1]}], as {first} has it"
        )
    check_alike("weight", weight, first, x)
    if bias is not None:
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias is {list(bias.shape)}; it must be {[weight.shape[0]]}, as weight has it")
        check_alike("bias", bias, first, x)


def check_alike(name: str, tensor: Tensor, first: str, x: Tensor) -> None:
    if tensor.dtype != x.dtype or tensor.device != x.device:
        raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}; cast it to {first}'s {x.dtype} on {x.device}")


def modulated_norm(x_BTD: Tensor, shift_BD: Tensor, scale_BD: Tensor, *, eps: float = 1e-6) -> Tensor:
    """layer_norm(x) * (1 + scale) + shift.

    x: [B, T, D], D at most 8192.  shift, scale: [B, D]. All float32, bfloat16, float16 or float64, on one device.
    Returns [B, T, D], contiguous. Differentiable in all three, once. ValueError names the argument that is outside of
    this. DiT, adaLN.
    """
    check_envelope({"x": x_BTD}, {"shift": shift_BD, "scale": scale_BD})
    return _modulated_norm(x_BTD, shift_BD, scale_BD, eps)[0]


def modulated_norm_linear(
    x_BTD: Tensor, shift_BD: Tensor, scale_BD: Tensor, weight_OD: Tensor, bias_O: Tensor | None, *, eps: float = 1e-6
) -> Tensor:
    """linear(modulated_norm(x, shift, scale), weight, bias), which keeps x for the backward but not the norm's output.

    x: [B, T, D], D at most 8192.  shift, scale: [B, D].  weight: [O, D].  bias: [O] or None. All float32, bfloat16,
    float16 or float64, on one device. Returns [B, T, O], contiguous. Differentiable in all five, once. ValueError names
    the argument that is outside of this. DiT, adaLN.
    """
    check_envelope({"x": x_BTD}, {"shift": shift_BD, "scale": scale_BD})
    check_linear(weight_OD, bias_O, "x", x_BTD)
    return _modulated_norm_linear(x_BTD, shift_BD, scale_BD, weight_OD, bias_O, [weight_OD.shape[0]], eps)[0]


def modulated_norm_split_linear(
    x_BTD: Tensor,
    shift_BD: Tensor,
    scale_BD: Tensor,
    weight_OD: Tensor,
    bias_O: Tensor | None,
    *,
    sizes: Sequence[int],
    eps: float = 1e-6,
) -> list[Tensor]:
    """modulated_norm_linear with its features cut into pieces of `sizes`, each contiguous [B, T, size].

    A split of the one result would hand the backward of the linear a joint gradient that has to be put together first,
    7 U written and read in a single block, where this adds one product to the other: 2 U.
    """
    check_envelope({"x": x_BTD}, {"shift": shift_BD, "scale": scale_BD})
    check_linear(weight_OD, bias_O, "x", x_BTD)
    if sum(sizes) != weight_OD.shape[0] or min(sizes, default=0) < 1:
        raise ValueError(
            f"sizes is {list(sizes)}; they must be positive and sum to weight's {weight_OD.shape[0]} features"
        )
    return _modulated_norm_linear(x_BTD, shift_BD, scale_BD, weight_OD, bias_O, list(sizes), eps)[:-2]


def cost(shape: Sequence[int], dtype: torch.dtype, mode: str, *, out_features: int | None = None) -> Cost:
    """Cost for x of `shape` [B, T, D]; mode is "forward" or "backward".

    With out_features it is that of modulated_norm_linear with a bias: the norm's own traffic and its products', since
    what a product reads or writes has to pass through memory. float32 statistics count as 4 bytes (float64: 8).
    """
    B, T, D = shape
    rows, vectors, size = B * T * D, B * D, dtype.itemsize
    statistics = 2 * B * T * torch.promote_types(dtype, torch.float32).itemsize
    if mode == "forward":
        flops, elements = 8 * rows, 2 * rows + 2 * vectors
    else:
        flops, elements = 14 * rows, 3 * rows + 3 * vectors
    if out_features is not None:
        out, weight, bias = B * T * out_features, out_features * D, out_features
        product = 2 * out * D
        if mode == "forward":
            flops, elements = flops + product + out, elements + rows + weight + bias + out
        else:  # y written and read; dy written (its reading is counted); W read; dW and dbias written; dout read
            flops = flops + 2 * rows + 2 * product + out
            elements = elements + 3 * rows + vectors + 2 * weight + bias + out
    return Cost(flops=flops, bytes=elements * size + statistics)
