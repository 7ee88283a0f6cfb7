"""GELU in its tanh form, with the bias in front of it; and linears that make their own activated input again.

With z = x + bias,  u = sqrt(2/pi) (z + 0.044715 z^3)  and  s = (1 + tanh u) / 2 = 1 / (1 + exp(-2u)):

    gelu(z) = z s                                             gelu'(z) = s + 2 z s (1 - s) du/dz
    gelu_tanh              y = gelu(x + bias)                 dx = dy gelu'(x + bias);  dbias = sum over rows of dx
    gelu_linear            y = gelu(h) W^T + b                da = dy W;  dh = da gelu'(h);  dW = dy^T gelu(h)
    attention_gelu_linear  y = [attention | gelu(h)] W^T + b  [dattention | da] = dy W;  dW = dy^T [attention | gelu(h)]

The linears keep their input from before the activation; a plain linear behind a GELU keeps the activated one as well,
and behind a concatenation the joined one. Their backward makes it again, for dW, in the pass that computes dh.

`attention_gelu_linear` fills one joined buffer and multiplies once. Two products, the second added to the first, move
as much: with U a tensor of D channels and M = 4 D, one buffer is 5 U read and 5 U written to fill it, 5 U read and 1 U
written by the product; two products save the 2 U of copying the attention, and write, read and write the result, 2 U
more, with one rounding more in between.

Shapes      B batch; T, S tokens; D channels of attention; M hidden channels; O output channels; gelu_tanh takes any
            shape [..., M].  bias [M];  weight [O, M], or [O, D + M], and its bias [O].
Numerics    float32, bfloat16, float16 in and out, GELU in float32, rounded once; float64 in float64. The products are
            PyTorch's, of the rounded activated input.
Envelope    the tensors of a call have one dtype and device. Rows with one stride between them and contiguous channels
            are taken as they are, so a slice of a wider projection is not copied; other layouts are copied first.
Traffic     elements: GELU reads x and writes y; its backward reads dy and x and writes dx, in the linears also the
            activated input. Memory bound -> the target is bytes/s (cost()).
Determinism the bias gradient is reduced in two stages, without atomics: bitwise equal over runs.
Saved       gelu_tanh: x, bias.  gelu_linear: h, weight.  attention_gelu_linear: attention, h, weight.
Source      Hendrycks and Gimpel 2016 (arXiv 1606.08415, section 2).
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

# Reference: PyTorch's own GELU, which computes in float32 (float64 for float64). Its autograd is the oracle.


def gelu_reference(x: Tensor, bias: Tensor | None = None, attention: Tensor | None = None) -> Tensor:
    """gelu(x + bias), behind the channels of `attention`."""
    activated = F.gelu(_biased(x, bias), approximate="tanh").to(x.dtype)
    return activated if attention is None else torch.cat((attention, activated), dim=-1)


def gelu_backward_reference(
    dy: Tensor,
    x: Tensor,
    bias: Tensor | None = None,
    attention: Tensor | None = None,
    with_output: bool = False,
    reuse_dy: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(dx, the output again, dbias): None without `with_output` and without a bias.

    `dy` has x's channels alone; with `reuse_dy` its memory may become that of dx.
    """
    z = _biased(x, bias)
    dz = torch.ops.aten.gelu_backward(dy.to(z.dtype), z, approximate="tanh")
    dbias = None if bias is None else (dz.new_ones(dz.shape[:-1]).flatten() @ dz.flatten(0, -2)).to(bias.dtype)
    return dz.to(x.dtype), gelu_reference(x, bias, attention) if with_output else None, dbias


def _biased(x: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return x
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.to(wide) + bias.to(wide)


# Tile choice.


@dataclass(frozen=True)
class Tile:
    """A program holds `rows` x `columns`; where it sums over rows it does so for `steps` tiles, one below the other."""

    rows: int
    columns: int
    num_warps: int
    steps: int


def choose_tile(columns: int, element_bytes: int, sums: bool) -> Tile:
    """Two 16-byte accesses per thread and tensor; 1,024 columns divide the 3,072 and 12,288 channels of the presets.

    Modelled, not yet measured on a GPU: 64 rows of bfloat16 (at 1,024 columns) share one partial sum, 1 % of the
    traffic, and leave thousands of programs to balance.
    """
    num_warps = 4
    elements = num_warps * 32 * 2 * 16 // element_bytes
    block = min(1024, elements, launch.power_of_two(columns))
    return Tile(rows=elements // block, columns=block, num_warps=num_warps, steps=32 if sums else 1)


# Choice of the implementation.


def missing_backends(dtype: torch.dtype, device_type: str) -> dict[str, str]:
    """The backends for tensors on `device_type`, each with why it cannot run; an empty reason means that it can."""
    return {"reference": "", "triton": launch.missing(device_type)}


def choose(shape: Sequence[int], dtype: torch.dtype, device_type: str, missing: Mapping[str, str]) -> tuple[str, str]:
    """(backend, reason); pure."""
    if device_type == "cpu":
        return "reference", "CPU tensors: PyTorch's own kernels"
    if missing["triton"]:
        return "reference", missing["triton"]
    return "triton", "one pass over memory, the backward's activated input included"


def selected(shape: Sequence[int], dtype: torch.dtype, device_type: str) -> tuple[str, str]:
    """(backend, reason) of a call on such a tensor, with OPENSORA_FAST_BACKEND obeyed."""
    missing = missing_backends(dtype, device_type)
    return backend.select("gelu", choose(shape, dtype, device_type, missing), missing)


def _backend(x: Tensor) -> str:
    dtype, device_type = x.dtype, x.device.type
    return backend.announced("gelu", selected(x.shape, dtype, device_type), missing_backends(dtype, device_type))


# Device code. The first `copy_blocks` blocks of columns copy the attention, the others activate. Indices are divided in
# 32 bits, which is several times faster, and multiplied by strides in 64.


@jit
def _forward_kernel(
    x_ptr,
    bias_ptr,
    attention_ptr,
    y_ptr,
    rows,
    x_columns,
    attention_columns,
    x_stride,
    attention_stride,
    y_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WITH_BIAS: tl.constexpr,
    WITH_ATTENTION: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    program = tl.program_id(0)
    copy_blocks = tl.cdiv(attention_columns, COLUMNS) if WITH_ATTENTION else 0
    blocks = copy_blocks + tl.cdiv(x_columns, COLUMNS)
    block = program % blocks
    row = (program // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    if WITH_ATTENTION and block < copy_blocks:
        column = block * COLUMNS + tl.arange(0, COLUMNS)[None, :]  # [1, COLUMNS]
        mask = (row < rows) & (column < attention_columns)
        tl.store(
            y_ptr + row * y_stride + column,
            tl.load(attention_ptr + row * attention_stride + column, mask=mask),
            mask=mask,
        )
    else:
        column = (block - copy_blocks) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        mask = (row < rows) & (column < x_columns)
        z = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0).to(COMPUTE)
        if WITH_BIAS:
            z += tl.load(bias_ptr + row * 0 + column, mask=mask, other=0).to(COMPUTE)
        sigmoid, _ = _sigmoids(z)
        tl.store(y_ptr + row * y_stride + (attention_columns + column), z * sigmoid, mask=mask)


@jit
def _sigmoids(z):
    """s and 1 - s of the formulas; 1 - s without the digits that its subtraction would lose.

    exp(-2u) is a power of two, 2.302... = 2 sqrt(2/pi) log2(e), held below the largest float32.
    """
    power = tl.exp2(tl.minimum(z * (-2.302208198144325 - 0.1029432395800235 * (z * z)), 126.0))
    sigmoid = 1 / (1 + power)
    return sigmoid, power * sigmoid


@jit
def _backward_kernel(
    dy_ptr,
    x_ptr,
    bias_ptr,
    attention_ptr,
    dx_ptr,
    y_ptr,
    partial_ptr,
    rows,
    x_columns,
    attention_columns,
    dy_stride,
    x_stride,
    attention_stride,
    dx_stride,
    y_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    WITH_BIAS: tl.constexpr,
    WITH_ATTENTION: tl.constexpr,
    WITH_OUTPUT: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    program = tl.program_id(0)
    copy_blocks = tl.cdiv(attention_columns, COLUMNS) if WITH_ATTENTION else 0
    blocks = copy_blocks + tl.cdiv(x_columns, COLUMNS)
    block = program % blocks
    first_row = (program // blocks).to(tl.int64) * (ROWS * STEPS) + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    if WITH_ATTENTION and block < copy_blocks:
        column = block * COLUMNS + tl.arange(0, COLUMNS)[None, :]  # [1, COLUMNS]
        for step in range(STEPS):
            row = first_row + step * ROWS
            mask = (row < rows) & (column < attention_columns)
            tl.store(
                y_ptr + row * y_stride + column,
                tl.load(attention_ptr + row * attention_stride + column, mask=mask),
                mask=mask,
            )
    else:
        column = (block - copy_blocks) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        dbias = tl.zeros((ROWS, COLUMNS), COMPUTE)
        for step in range(STEPS):
            row = first_row + step * ROWS
            mask = (row < rows) & (column < x_columns)
            z = tl.load(x_ptr + row * x_stride + column, mask=mask, other=0).to(COMPUTE)
            dy = tl.load(dy_ptr + row * dy_stride + column, mask=mask, other=0).to(COMPUTE)
            if WITH_BIAS:
                z += tl.load(bias_ptr + row * 0 + column, mask=mask, other=0).to(COMPUTE)
            sigmoid, complement = _sigmoids(z)
            value = z * sigmoid
            dz = dy * (sigmoid + value * complement * (1.5957691216057308 + 0.21406444881780076 * (z * z)))
            tl.store(dx_ptr + row * dx_stride + column, dz, mask=mask)
            if WITH_OUTPUT:
                tl.store(y_ptr + row * y_stride + (attention_columns + column), value, mask=mask)
            dbias += dz
        if WITH_BIAS:  # partial [programs over rows, x_columns]
            column = block * COLUMNS + tl.arange(0, COLUMNS)
            partial_ptr += (program // blocks).to(tl.int64) * x_columns
            tl.store(partial_ptr + column, tl.sum(dbias, axis=0), mask=column < x_columns)


@jit
def _sum_kernel(
    partial_ptr, dbias_ptr, partials, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, COMPUTE: tl.constexpr
):
    """partial [partials, columns] summed over its rows."""
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), COMPUTE)
    for start in range(0, partials, ROWS):
        row = (start + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        mask = (row < partials) & (column[None, :] < columns)
        total += tl.load(partial_ptr + row * columns + column[None, :], mask=mask, other=0)
    tl.store(dbias_ptr + column, tl.sum(total, axis=0), mask=column < columns)


# Launchers. Tensors are [rows, channels], rows with any stride.


def triton_forward(x: Tensor, bias: Tensor | None = None, attention: Tensor | None = None) -> Tensor:
    """gelu(x + bias), behind the channels of `attention`."""
    rows, M = x.shape
    D = 0 if attention is None else attention.shape[1]
    y = torch.empty((rows, D + M), dtype=x.dtype, device=x.device)
    tile = choose_tile(M, x.element_size(), sums=False)
    launch.launch(
        _forward_kernel,
        (-(-rows // tile.rows) * (-(-D // tile.columns) - (-M // tile.columns)),),
        num_warps=tile.num_warps,
        x_ptr=x,
        bias_ptr=bias,
        attention_ptr=attention,
        y_ptr=y,
        rows=rows,
        x_columns=M,
        attention_columns=D,
        x_stride=x.stride(0),
        attention_stride=0 if attention is None else attention.stride(0),
        y_stride=D + M,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        WITH_BIAS=bias is not None,
        WITH_ATTENTION=D > 0,
        COMPUTE=launch.compute_type(x.dtype),
    )
    return y


def triton_backward(
    dy: Tensor,
    x: Tensor,
    bias: Tensor | None = None,
    attention: Tensor | None = None,
    with_output: bool = False,
    reuse_dy: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(dx, the output again, dbias): None without `with_output` and without a bias.

    `dy` has x's channels alone; with `reuse_dy` its memory becomes that of dx.
    """
    rows, M = x.shape
    D = 0 if attention is None or not with_output else attention.shape[1]
    tile = choose_tile(M, x.element_size(), sums=bias is not None)
    row_blocks = -(-rows // (tile.rows * tile.steps))
    wide = torch.promote_types(x.dtype, torch.float32)
    dx = dy if reuse_dy else torch.empty((rows, M), dtype=x.dtype, device=x.device)
    y = torch.empty((rows, D + M), dtype=x.dtype, device=x.device) if with_output else None
    partial = None if bias is None else torch.empty((row_blocks, M), dtype=wide, device=x.device)
    launch.launch(
        _backward_kernel,
        (row_blocks * (-(-D // tile.columns) - (-M // tile.columns)),),
        num_warps=tile.num_warps,
        dy_ptr=dy,
        x_ptr=x,
        bias_ptr=bias,
        attention_ptr=attention,
        dx_ptr=dx,
        y_ptr=y,
        partial_ptr=partial,
        rows=rows,
        x_columns=M,
        attention_columns=D,
        dy_stride=dy.stride(0),
        x_stride=x.stride(0),
        attention_stride=0 if attention is None else attention.stride(0),
        dx_stride=dx.stride(0),
        y_stride=D + M,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        STEPS=tile.steps,
        WITH_BIAS=bias is not None,
        WITH_ATTENTION=D > 0,
        WITH_OUTPUT=with_output,
        COMPUTE=launch.compute_type(x.dtype),
    )
    if bias is None or partial is None:
        return dx, y, None
    dbias = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
    columns = 32  # whole lines of memory, and hundreds of programs
    launch.launch(
        _sum_kernel,
        (-(-M // columns),),
        num_warps=4,
        partial_ptr=partial,
        dbias_ptr=dbias,
        partials=row_blocks,
        columns=M,
        ROWS=64,
        COLUMNS=columns,
        COMPUTE=launch.compute_type(x.dtype),
    )
    return dx, y, dbias


def as_rows(x: Tensor) -> Tensor:
    """x as [rows, channels] with contiguous channels; copied only where one stride does not lead from row to row."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def forward_rows(x: Tensor, bias: Tensor | None, attention: Tensor | None) -> Tensor:
    """[attention |] gelu(x + bias) of [rows, channels] by the selected backend; for use within other ops."""
    forward = triton_forward if _backend(x) == "triton" else gelu_reference
    return forward(x, bias, attention)


def backward_rows(
    dy: Tensor, x: Tensor, bias: Tensor | None, attention: Tensor | None, with_output: bool, reuse_dy: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(dx, the output again, dbias) as in `triton_backward`, by the selected backend; for use within other ops."""
    backward = triton_backward if _backend(x) == "triton" else gelu_backward_reference
    return backward(dy, x, bias, attention, with_output, reuse_dy)


# Ops. The second serves both linears.


@torch.library.custom_op("opensora_fast::gelu_tanh", mutates_args=())
def _gelu_tanh(x: Tensor, bias: Tensor | None) -> Tensor:
    return forward_rows(as_rows(x), bias, None).view(x.shape)


@_gelu_tanh.register_fake
def _(x, bias):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("opensora_fast::gelu_tanh_backward", mutates_args=())
def _gelu_tanh_backward(dy: Tensor, x: Tensor, bias: Tensor | None) -> list[Tensor]:
    dx, _, dbias = backward_rows(as_rows(dy), as_rows(x), bias, None, with_output=False, reuse_dy=False)
    return [dx.view(x.shape)] if dbias is None else [dx.view(x.shape), dbias]


@_gelu_tanh_backward.register_fake
def _(dy, x, bias):
    inputs = (x,) if bias is None else (x, bias)
    return [torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in inputs]


def _save_gelu(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate_gelu(ctx, dy):
    dx, *dbias = _gelu_tanh_backward(dy, *ctx.saved_tensors)
    return dx, dbias[0] if dbias else None


_gelu_tanh.register_autograd(_differentiate_gelu, setup_context=_save_gelu)


@torch.library.custom_op("opensora_fast::gelu_linear", mutates_args=())
def _gelu_linear(hidden: Tensor, weight: Tensor, bias: Tensor, attention: Tensor | None) -> Tensor:
    joined = forward_rows(as_rows(hidden), None, None if attention is None else as_rows(attention))
    return F.linear(joined, weight, bias).view(*hidden.shape[:-1], weight.shape[0])


@_gelu_linear.register_fake
def _(hidden, weight, bias, attention):
    return torch.empty((*hidden.shape[:-1], weight.shape[0]), dtype=hidden.dtype, device=hidden.device)


@torch.library.custom_op("opensora_fast::gelu_linear_backward", mutates_args=())
def _gelu_linear_backward(
    dy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    attention: Tensor | None,
    needs_inputs: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> list[Tensor]:
    """Those that are needed of dhidden and dattention (if there is one), dweight, dbias."""
    dy_rows, hidden_rows = as_rows(dy), as_rows(hidden)
    attention_rows = None if attention is None else as_rows(attention)
    joined, gradients = None, []
    if needs_inputs:
        D = 0 if attention is None else attention.shape[-1]
        d_activated = dy_rows @ weight[:, D:]
        d_hidden, joined, _ = backward_rows(
            d_activated, hidden_rows, None, attention_rows, with_output=needs_weight, reuse_dy=True
        )
        gradients.append(d_hidden.view(hidden.shape))
        if attention is not None:
            gradients.append((dy_rows @ weight[:, :D]).view(attention.shape))
    if needs_weight:
        joined = forward_rows(hidden_rows, None, attention_rows) if joined is None else joined
        gradients.append(dy_rows.mT @ joined)
    if needs_bias:
        gradients.append(dy_rows.sum(dim=0))
    return gradients


@_gelu_linear_backward.register_fake
def _(dy, hidden, weight, attention, needs_inputs, needs_weight, needs_bias):
    shapes = []
    if needs_inputs:
        shapes += [hidden.shape] if attention is None else [hidden.shape, attention.shape]
    if needs_weight:
        shapes.append(weight.shape)
    if needs_bias:
        shapes.append(weight.shape[:1])
    return [torch.empty(shape, dtype=hidden.dtype, device=hidden.device) for shape in shapes]


def _save_linear(ctx, inputs, output):
    hidden, weight, _, attention = inputs
    ctx.save_for_backward(hidden, weight, attention)


def _differentiate_linear(ctx, dy):
    hidden, weight, attention = ctx.saved_tensors
    needs_hidden, needs_weight, needs_bias, needs_attention = ctx.needs_input_grad
    needs_inputs = needs_hidden or needs_attention
    gradients = iter(_gelu_linear_backward(dy, hidden, weight, attention, needs_inputs, needs_weight, needs_bias))
    d_hidden = next(gradients) if needs_inputs else None
    d_attention = next(gradients) if needs_inputs and attention is not None else None
    return d_hidden, next(gradients) if needs_weight else None, next(gradients) if needs_bias else None, d_attention


_gelu_linear.register_autograd(_differentiate_linear, setup_context=_save_linear)


# Public functions.


def _check(name: str, tensor: Tensor, shape: Sequence[int | str], like: Tensor) -> None:
    """`shape` has a letter where any size will do, and "..." in front for any leading ones."""
    leading = shape[0] == "..."
    wanted = shape[1:] if leading else shape
    sizes = tensor.shape[tensor.dim() - len(wanted) :] if leading else tensor.shape
    fits = len(sizes) == len(wanted) <= tensor.dim() and all(
        isinstance(size, str) or size == given for size, given in zip(wanted, sizes, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} is {list(tensor.shape)}; it must be [{', '.join(map(str, shape))}]")
    if tensor.dtype not in launch.DTYPES or tensor.dtype != like.dtype or tensor.device != like.device:
        raise ValueError(
            f"{name} is {tensor.dtype} on {tensor.device}; it must be float32, bfloat16, float16 or float64, and as "
            f"all arguments are, {like.dtype} on {like.device}"
        )


def gelu_tanh(x: Tensor, bias_M: Tensor | None = None) -> Tensor:
    """gelu(x + bias) in the tanh form, rounded once.

    x: [..., M], float32, bfloat16, float16 or float64; bias: [M] in the same dtype. Returns a contiguous tensor of x's
    shape. Differentiable in both. ValueError names the argument that is outside of this. Hendrycks and Gimpel 2016.
    """
    _check("x", x, ("...", "M"), x)
    if bias_M is not None:
        _check("bias", bias_M, x.shape[-1:], x)
        bias_M = bias_M.contiguous()
    return _gelu_tanh(x, bias_M)


def gelu_linear(hidden_BTM: Tensor, weight_OM: Tensor, bias_O: Tensor) -> Tensor:
    """The linear of gelu(hidden), [B, T, O]; keeps hidden and the weight for the backward, not gelu(hidden).

    hidden: [..., M];  weight: [O, M];  bias: [O];  one dtype of float32, bfloat16, float16 and float64. Differentiable
    in all. ValueError names the argument that is outside of this.
    """
    _check("hidden", hidden_BTM, ("...", "M"), hidden_BTM)
    _check("weight", weight_OM, ("O", hidden_BTM.shape[-1]), hidden_BTM)
    _check("bias", bias_O, weight_OM.shape[:1], hidden_BTM)
    return _gelu_linear(hidden_BTM, weight_OM, bias_O, None)


def attention_gelu_linear(attention_BSD: Tensor, hidden_BSM: Tensor, weight_OJ: Tensor, bias_O: Tensor) -> Tensor:
    """The linear of [attention | gelu(hidden)], [B, S, O]; keeps attention, hidden and the weight for the backward.

    attention: [..., D];  hidden: [..., M], which may be a slice of a wider projection;  weight: [O, J = D + M];
    bias: [O];  one dtype of float32, bfloat16, float16 and float64. Differentiable in all. ValueError names the
    argument that is outside of this.
    """
    _check("hidden", hidden_BSM, ("...", "M"), hidden_BSM)
    _check("attention", attention_BSD, (*hidden_BSM.shape[:-1], "D"), hidden_BSM)
    _check("weight", weight_OJ, ("O", attention_BSD.shape[-1] + hidden_BSM.shape[-1]), hidden_BSM)
    _check("bias", bias_O, weight_OJ.shape[:1], hidden_BSM)
    return _gelu_linear(hidden_BSM, weight_OJ, bias_O, attention_BSD)


def cost(rows: int, M: int, dtype: torch.dtype, mode: str, *, bias: bool = False) -> Cost:
    """Cost of `gelu_tanh` over `rows` rows of M channels; mode is "forward" or "backward"."""
    vectors = 0 if not bias else M if mode == "forward" else 2 * M
    tensors, flops = (2, 10) if mode == "forward" else (3, 20)
    return Cost(flops=flops * rows * M, bytes=(tensors * rows * M + vectors) * dtype.itemsize)


def linear_cost(rows: int, M: int, features: int, dtype: torch.dtype, mode: str, *, D: int = 0) -> Cost:
    """Cost of `gelu_linear`, and with the D channels of attention of `attention_gelu_linear`."""
    inputs, weights, output = rows * (D + M), features * (D + M) + features, rows * features
    product = 2 * inputs * features
    if mode == "forward":
        return Cost(flops=product + 10 * rows * M, bytes=(inputs + weights + output) * dtype.itemsize)
    moved = 2 * inputs + 2 * weights - features + output  # the bias itself is not needed
    return Cost(flops=2 * product + 20 * rows * M + output, bytes=moved * dtype.itemsize)
