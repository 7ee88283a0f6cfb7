"""A residual step whose branch is a linear of an activated input: long sequences keep neither activation nor branch.

    x_new = x + gate * (a W^T + bias),   a = gelu(hidden) or [attention | gelu(hidden)]

Backward, of one batch item: the branch itself is not needed, since the gate scales rows of the product.

    G = dx_new^T a,   s = sum_T(dx_new);                  dgate = sum_J(W * G) + bias * s
    dW = sum_B(gate * G),   dbias = sum_B(gate * s);      da = (gate * dx_new) W;   dx = dx_new

G costs no more arithmetic than dW alone, but is one [D, J] matrix for each item, to be written and read. Against the
products of that item, 6 T D J, that is 187 / T of their time on an H200 (modelled: 750 TFLOP/s, 4 TB/s): 2 % at 8,448
tokens, 73 % at 256. So sequences of `LONG_TOKENS` or more in batches of up to `MAX_ITEMS` drop the branch; others keep
it and run as `gelu_linear` or `attention_gelu_linear`, then `gated_residual`.

Shapes      B batch; T tokens; D channels; M hidden channels; A attention channels or 0; J = A + M.  x, dx [B, T, D];
            hidden [B, T, M];  attention [B, T, A];  W [D, J];  bias [D];  gate [B, D];  G [B, D, J].
Numerics    as of the ops that it is made of; G rounded to the inputs' dtype, its sums in float32 (float64 for float64).
Envelope    that of `gelu_linear` and `gated_residual`; all tensors of one dtype and device.
Traffic     of the sums: G and W read, dW written (cost()).
Determinism no atomics; every sum in one order: bitwise equal over runs.
Saved       hidden, attention, W, bias, gate; with the branch kept, the branch as well.
Source      the chain rule; adaLN-Zero gates of Peebles and Xie 2023 (arXiv:2212.09748).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from opensora_fast.kernels import backend, gelu, launch
from opensora_fast.kernels.cost import Cost
from opensora_fast.kernels.gated_residual import gated_residual
from opensora_fast.kernels.gelu import as_rows, attention_gelu_linear, gelu_linear
from opensora_fast.kernels.launch import jit, tl
from opensora_fast.kernels.modulated_norm import check_alike, check_envelope

LONG_TOKENS = 4096  # from where G costs less than 5 % of the products; modelled, not yet measured on a GPU
MAX_ITEMS = 8  # items that one pass over W sums


def drops_branch(batch: int, tokens: int) -> tuple[bool, str]:
    """Whether the branch is dropped, and why; pure."""
    if tokens < LONG_TOKENS:
        return False, f"{tokens} tokens are few: a weight gradient for each item would cost over 5 % of the products"
    if batch > MAX_ITEMS:
        return False, f"{batch} items are more than the {MAX_ITEMS} that one pass over the weight sums"
    return True, "long sequences: the weight gradient of each item gives the gate's gradient without the branch"


# Reference.


def gelu_linear_gated_residual_reference(
    x_BTD: Tensor, hidden_BTM: Tensor, weight_DJ: Tensor, bias_D: Tensor, gate_BD: Tensor, attention_BTA: Tensor | None
) -> Tensor:
    """The whole step in float32 (float64 for float64), rounded once; its autograd is the oracle."""
    wide = torch.promote_types(x_BTD.dtype, torch.float32)
    x, hidden, weight, bias, gate = (tensor.to(wide) for tensor in (x_BTD, hidden_BTM, weight_DJ, bias_D, gate_BD))
    activated = F.gelu(hidden, approximate="tanh")
    joined = activated if attention_BTA is None else torch.cat((attention_BTA.to(wide), activated), dim=-1)
    return (x + gate[:, None] * F.linear(joined, weight, bias)).to(x_BTD.dtype)


def gate_weight_reference(g_BDJ: Tensor, weight_DJ: Tensor, gate_BD: Tensor) -> tuple[Tensor, Tensor]:
    """(sum_B(gate * G) in G's dtype, sum_J(W * G) [B, D] in float32, for float64 in float64)."""
    wide = torch.promote_types(g_BDJ.dtype, torch.float32)
    g_BDJ, gate_BD1 = g_BDJ.to(wide), gate_BD[..., None].to(wide)
    return (g_BDJ * gate_BD1).sum(0).to(weight_DJ.dtype), (g_BDJ * weight_DJ.to(wide)).sum(-1)


# Tile choice.


@dataclass(frozen=True)
class Tile:
    """A program takes one row of W, `block` columns at a time."""

    block: int
    num_warps: int


def choose_tile(columns: int, element_bytes: int) -> Tile:
    """16 bytes a thread and tensor; 3,072 rows are programs enough. Modelled, not yet measured on a GPU."""
    return Tile(block=min(4 * 32 * 16 // element_bytes, launch.power_of_two(columns)), num_warps=4)


# Choice of the implementation.


def missing_backends(dtype: torch.dtype, device_type: str) -> dict[str, str]:
    """The backends for tensors on `device_type`, each with why it cannot run; an empty reason means that it can."""
    return {"reference": "", "triton": launch.missing(device_type)}


def choose(shape: Sequence[int], dtype: torch.dtype, device_type: str, missing: Mapping[str, str]) -> tuple[str, str]:
    """(backend, reason); pure."""
    if device_type == "cpu":
        return "reference", "CPU tensors: PyTorch's own kernels"
    return ("reference", missing["triton"]) if missing["triton"] else ("triton", "both sums in one pass over G")


def selected(shape: Sequence[int], dtype: torch.dtype, device_type: str) -> tuple[str, str]:
    """(backend, reason) of a call with such an x, with OPENSORA_FAST_BACKEND obeyed."""
    missing = missing_backends(dtype, device_type)
    return backend.select("gated_linear", choose(shape, dtype, device_type, missing), missing)


def _backend(x: Tensor) -> str:
    dtype, device_type = x.dtype, x.device.type
    selection = selected(x.shape, dtype, device_type)
    return backend.announced("gated_linear", selection, missing_backends(dtype, device_type))


# Device code.


@jit
def _gate_weight_kernel(
    g_ptr, weight_ptr, gate_ptr, dweight_ptr, product_ptr,
    D, J, weight_stride, gate_stride_b,
    BATCH: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    d = tl.program_id(0).to(tl.int64)
    products: tl.tuple = ()
    for _ in tl.static_range(BATCH):
        products = products + (tl.zeros((BLOCK,), COMPUTE),)
    for start in tl.range(0, J, BLOCK, num_stages=2):
        j = start + tl.arange(0, BLOCK)
        mask = j < J
        weight = tl.load(weight_ptr + d * weight_stride + j, mask=mask, other=0.0).to(COMPUTE)
        dweight = tl.zeros((BLOCK,), COMPUTE)
        next_products: tl.tuple = ()
        for b in tl.static_range(BATCH):
            g = tl.load(g_ptr + (b * D + d) * J + j, mask=mask, other=0.0).to(COMPUTE)
            dweight += g * tl.load(gate_ptr + b * gate_stride_b + d).to(COMPUTE)
            next_products = next_products + (products[b] + g * weight,)
        products = next_products
        tl.store(dweight_ptr + d * J + j, dweight, mask=mask)
    for b in tl.static_range(BATCH):
        tl.store(product_ptr + b * D + d, tl.sum(products[b], 0))


# Launcher.


def triton_gate_weight(g: Tensor, weight: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """(sum_B(gate * G), sum_J(W * G) [B, D] in float32 or float64)."""
    B, D, J = g.shape
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    gate = gate if gate.stride(1) == 1 else gate.contiguous()
    wide = torch.promote_types(g.dtype, torch.float32)
    dweight = torch.empty((D, J), dtype=g.dtype, device=g.device)
    product = torch.empty((B, D), dtype=wide, device=g.device)
    tile = choose_tile(J, g.element_size())
    launch.launch(
        _gate_weight_kernel,
        (D,),
        num_warps=tile.num_warps,
        g_ptr=g.contiguous(),
        weight_ptr=weight,
        gate_ptr=gate,
        dweight_ptr=dweight,
        product_ptr=product,
        D=D,
        J=J,
        weight_stride=weight.stride(0),
        gate_stride_b=gate.stride(0),
        BATCH=B,
        BLOCK=tile.block,
        COMPUTE=launch.compute_type(g.dtype),
    )
    return dweight, product


# Op.


def _activated(hidden: Tensor, attention: Tensor | None) -> Tensor:
    return gelu.forward_rows(as_rows(hidden), None, None if attention is None else as_rows(attention))


@torch.library.custom_op("opensora_fast::gelu_linear_gated_residual", mutates_args=())
def _gelu_linear_gated_residual(
    x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, attention: Tensor | None
) -> Tensor:
    return gated_residual(x, F.linear(_activated(hidden, attention), weight, bias).view(x.shape), gate)


@_gelu_linear_gated_residual.register_fake
def _(x, hidden, weight, bias, gate, attention):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("opensora_fast::gelu_linear_gated_residual_backward", mutates_args=())
def _gelu_linear_gated_residual_backward(
    dx: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, attention: Tensor | None
) -> list[Tensor]:
    """dhidden, dweight, dbias, dgate and, where there is attention, dattention."""
    B, T, D = dx.shape
    A = 0 if attention is None else attention.shape[-1]
    wide = torch.promote_types(dx.dtype, torch.float32)
    d_branch_rows = as_rows(dx * gate[:, None])
    d_hidden, activated, _ = gelu.backward_rows(
        d_branch_rows @ weight[:, A:],
        as_rows(hidden),
        None,
        None if attention is None else as_rows(attention),
        with_output=True,
        reuse_dy=True,
    )
    assert activated is not None  # as asked for
    g_BDJ = torch.bmm(dx.mT, activated.view(B, T, weight.shape[1]))
    gate_weight = triton_gate_weight if _backend(dx) == "triton" else gate_weight_reference
    dweight, product = gate_weight(g_BDJ, weight, gate)
    sums_BD = dx.sum(1, dtype=wide)
    gradients = [
        d_hidden.view(hidden.shape),
        dweight,
        (gate * sums_BD).sum(0).to(bias.dtype),
        (product + bias * sums_BD).to(gate.dtype),
    ]
    return gradients if attention is None else [*gradients, (d_branch_rows @ weight[:, :A]).view(attention.shape)]


@_gelu_linear_gated_residual_backward.register_fake
def _(dx, hidden, weight, bias, gate, attention):
    like = (hidden, weight, bias, gate) if attention is None else (hidden, weight, bias, gate, attention)
    return [torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in like]


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _differentiate(ctx, dx):
    gradients = _gelu_linear_gated_residual_backward(dx, *ctx.saved_tensors)
    return dx, *gradients, *([None] if len(gradients) == 4 else [])


_gelu_linear_gated_residual.register_autograd(_differentiate, setup_context=_save)


# Public function.


def gelu_linear_gated_residual(
    x_BTD: Tensor,
    hidden_BTM: Tensor,
    weight_DJ: Tensor,
    bias_D: Tensor,
    gate_BD: Tensor,
    *,
    attention_BTA: Tensor | None = None,
) -> Tensor:
    """x + gate * linear(gelu(hidden)), or of [attention | gelu(hidden)]; what it keeps depends on B and T alone.

    x: [B, T, D].  hidden: [B, T, M].  attention: [B, T, A] or None.  weight: [D, A + M].  bias: [D].  gate: [B, D]. One
    dtype of float32, bfloat16, float16 and float64, one device. Returns [B, T, D]. Differentiable in all. ValueError
    names the argument that is outside of this.
    """
    check_envelope({"x": x_BTD}, {"gate": gate_BD})
    B, T, D = x_BTD.shape
    widths = {"hidden": hidden_BTM} if attention_BTA is None else {"hidden": hidden_BTM, "attention": attention_BTA}
    for name, tensor in widths.items():
        if tensor.dim() != 3 or tensor.shape[:2] != (B, T):
            raise ValueError(f"{name} is {list(tensor.shape)}; with x {[B, T, D]} it must be [{B}, {T}, channels]")
        check_alike(name, tensor, "x", x_BTD)
    J = sum(tensor.shape[2] for tensor in widths.values())
    for name, tensor, shape in (("weight", weight_DJ, (D, J)), ("bias", bias_D, (D,))):
        if tensor.shape != shape:
            raise ValueError(
                f"{name} is {list(tensor.shape)}; with x and {' and '.join(widths)} it must be {list(shape)}"
            )
        check_alike(name, tensor, "x", x_BTD)
    if not drops_branch(B, T)[0]:
        if attention_BTA is None:
            branch_BTD = gelu_linear(hidden_BTM, weight_DJ, bias_D)
        else:
            branch_BTD = attention_gelu_linear(attention_BTA, hidden_BTM, weight_DJ, bias_D)
        return gated_residual(x_BTD, branch_BTD, gate_BD)
    return _gelu_linear_gated_residual(x_BTD, hidden_BTM, weight_DJ, bias_D, gate_BD, attention_BTA)


def cost(B: int, D: int, J: int, dtype: torch.dtype) -> Cost:
    """Cost of the pass over G that gives dW and the gate's gradient; the products cost what they cost anywhere."""
    wide = torch.promote_types(dtype, torch.float32).itemsize
    return Cost(flops=4 * B * D * J, bytes=((B + 2) * D * J + B * D) * dtype.itemsize + B * D * wide)
