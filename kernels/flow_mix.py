"""The two ends of the velocity loss: noised latents with their target, and the mean squared error with its gradient.

    flow_mix        x_t = (1 - t) x_0 + (1 - (1 - s)(1 - t)) x_1;   v = d x_t / d t = (1 - s) x_1 - x_0
    velocity_loss   loss = mean (p - v)^2;   backward  dp = dloss * 2/n (p - v)

x_0 data, x_1 ~ N(0, 1) noise, t = 1 pure noise, s = SIGMA_MIN, p the prediction of v and n its number of elements.

Shapes      x_0, x_1, x_t, v [B, ...] of any rank, t [B];  p [...] and its target alike.  n elements.
Numerics    in fp32, or fp64 for fp64; each output rounded once. The loss is fp32 (fp64). 2/n (p - v) is computed with
            it, rounded to p's dtype and multiplied by dloss there: exact where dloss is a power of two. In fp16 it
            underflows where n is many millions: use bf16.
Envelope    float32, bfloat16, float16, float64; flow_mix: x_0 and x_1 alike; velocity_loss: the target may have another
            dtype than p (in training fp32). What is not contiguous is copied. flow_mix has no derivative, nor has the
            target; velocity_loss has a first one.
Traffic     flow_mix 4 n elements; the loss reads p and v and writes dp: memory bound -> the target is bytes/s (cost()).
Determinism partial sums of programs whose number depends on n alone, added in one order: bitwise equal over runs.
Saved       dp alone, in p's dtype: neither p nor v is kept.
Source      Open-Sora 2.0 (arXiv:2503.09642) section 4.2, with the sign and the s of its released code. Unlike the eager
            composite, no intermediate of either function is stored.
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

SIGMA_MIN = 1e-5


# Reference: in float32 (float64 for float64); the loss's autograd is the oracle of its backward.


def flow_mix_reference(
    x0: Tensor, noise: Tensor, t_B: Tensor, sigma_min: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(x_t, v) in `dtype`."""
    wide = torch.promote_types(x0.dtype, torch.float32)
    x0, noise = x0.to(wide), noise.to(wide)
    left = 1 - t_B.to(wide).view(-1, *[1] * (x0.dim() - 1))
    x_t = torch.addcmul(x0 * left, noise, 1 - (1 - sigma_min) * left)
    return x_t.to(dtype), torch.sub(noise * (1 - sigma_min), x0).to(dtype)


def velocity_loss_reference(prediction: Tensor, target: Tensor) -> Tensor:
    """The mean squared error, a scalar."""
    wide = _wide(prediction)
    return F.mse_loss(prediction.to(wide), target.to(wide))


def velocity_loss_gradient_reference(prediction: Tensor, target: Tensor) -> Tensor:
    """The derivative of the loss in the prediction's dtype."""
    wide = _wide(prediction)
    difference = torch.sub(prediction.to(wide), target.to(wide))
    return difference.mul_(2 / max(prediction.numel(), 1)).to(prediction.dtype)


def _wide(prediction: Tensor) -> torch.dtype:
    return torch.promote_types(prediction.dtype, torch.float32)


# Tile choice, and choice of the implementation.


@dataclass(frozen=True)
class Tile:
    block: int
    num_warps: int
    programs: int = 0  # of a reduction, at most


def choose_tile() -> Tile:
    """Sixteen elements a thread; in a reduction, eight programs for each of an H200's 132 multiprocessors.

    Modelled (enough loads in flight to cover the memory's latency), not yet measured on a GPU.
    """
    return Tile(block=2048, num_warps=4, programs=8 * 132)


def missing_backends(dtype: torch.dtype, device_type: str) -> dict[str, str]:
    """The backends for tensors on `device_type`, each with why it cannot run; an empty reason means that it can."""
    return {"reference": "", "triton": launch.missing(device_type)}


def choose(shape: Sequence[int], dtype: torch.dtype, device_type: str, missing: Mapping[str, str]) -> tuple[str, str]:
    """(backend, reason); pure."""
    if device_type == "cpu":
        return "reference", "CPU tensors: PyTorch's own kernels"
    return ("triton", "one pass over memory") if not missing["triton"] else ("reference", missing["triton"])


def selected(shape: Sequence[int], dtype: torch.dtype, device_type: str) -> tuple[str, str]:
    """(backend, reason) of a call on such a tensor, with OPENSORA_FAST_BACKEND obeyed."""
    missing = missing_backends(dtype, device_type)
    return backend.select("flow_mix", choose(shape, dtype, device_type, missing), missing)


def _backend(x: Tensor) -> str:
    arguments = x.dtype, x.device.type
    return backend.announced("flow_mix", selected(x.shape, *arguments), missing_backends(*arguments))


# Device code.


@jit
def _mix_kernel(
    x0_ptr,
    noise_ptr,
    t_ptr,
    x_t_ptr,
    velocity_ptr,
    sample,  # elements
    blocks,  # in a sample
    SHARE: tl.constexpr,  # of the noise in the velocity, 1 - s
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    b = program // blocks
    element = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = element < sample
    offset = b * sample + element
    left = 1.0 - tl.load(t_ptr + b).to(COMPUTE)
    x0 = tl.load(x0_ptr + offset, mask=mask, other=0.0).to(COMPUTE)
    noise = tl.load(noise_ptr + offset, mask=mask, other=0.0).to(COMPUTE)
    tl.store(x_t_ptr + offset, left * x0 + (1.0 - SHARE * left) * noise, mask=mask)
    tl.store(velocity_ptr + offset, SHARE * noise - x0, mask=mask)


@jit
def _loss_kernel(
    prediction_ptr,
    target_ptr,
    gradient_ptr,
    partial_ptr,
    size,
    blocks,  # of a program
    WITH_GRADIENT: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    scale = tl.full((), 2.0, COMPUTE) / size
    total = tl.zeros([BLOCK], COMPUTE)
    for block in range(0, blocks):
        offset = (program * blocks + block) * BLOCK + tl.arange(0, BLOCK)
        mask = offset < size
        prediction = tl.load(prediction_ptr + offset, mask=mask, other=0.0).to(COMPUTE)
        difference = prediction - tl.load(target_ptr + offset, mask=mask, other=0.0).to(COMPUTE)
        total += difference * difference
        if WITH_GRADIENT:
            tl.store(gradient_ptr + offset, difference * scale, mask=mask)
    tl.store(partial_ptr + program, tl.sum(total))


# Launchers.


def triton_flow_mix_forward(
    x0: Tensor, noise: Tensor, t_B: Tensor, sigma_min: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(x_t, v): a program per block of one sample."""
    tile = choose_tile()
    x0, noise = x0.contiguous(), noise.contiguous()
    x_t, velocity = (torch.empty(x0.shape, dtype=dtype, device=x0.device) for _ in range(2))
    sample = math.prod(x0.shape[1:])
    blocks = -(-sample // tile.block)
    launch.launch(
        _mix_kernel,
        (x0.shape[0] * blocks,),
        num_warps=tile.num_warps,
        x0_ptr=x0,
        noise_ptr=noise,
        t_ptr=t_B.contiguous(),
        x_t_ptr=x_t,
        velocity_ptr=velocity,
        sample=sample,
        blocks=blocks,
        SHARE=1 - sigma_min,
        COMPUTE=launch.compute_type(x0.dtype),
        BLOCK=tile.block,
    )
    return x_t, velocity


def triton_velocity_loss_forward(prediction: Tensor, target: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """(loss, 2/n (p - v) or an empty tensor): partial sums of contiguous runs, then their sum."""
    tile = choose_tile()
    prediction, target = prediction.contiguous(), target.contiguous()
    size = prediction.numel()
    gradient = torch.empty(prediction.shape if with_gradient else (0,), dtype=prediction.dtype, device=target.device)
    blocks = max(1, -(-size // (tile.block * tile.programs)))
    programs = max(1, -(-size // (tile.block * blocks)))
    partial = torch.empty(programs, dtype=_wide(prediction), device=prediction.device)
    launch.launch(
        _loss_kernel,
        (programs,),
        num_warps=tile.num_warps,
        prediction_ptr=prediction,
        target_ptr=target,
        gradient_ptr=gradient,
        partial_ptr=partial,
        size=size,
        blocks=blocks,
        WITH_GRADIENT=with_gradient,
        COMPUTE=launch.compute_type(prediction.dtype),
        BLOCK=tile.block,
    )
    return partial.sum() / size if size else partial.sum() * math.nan, gradient


# Ops. flow_mix has no autograd: a backward through it is refused by name.


@torch.library.custom_op("opensora_fast::flow_mix", mutates_args=())
def _flow_mix(x0: Tensor, noise: Tensor, t_B: Tensor, sigma_min: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    run = triton_flow_mix_forward if _backend(x0) == "triton" else flow_mix_reference
    x_t, velocity = run(x0, noise, t_B, sigma_min, dtype)
    return x_t.contiguous(), velocity.contiguous()


@_flow_mix.register_fake
def _fake_flow_mix(x0, noise, t_B, sigma_min, dtype):
    x_t, velocity = (torch.empty(x0.shape, dtype=dtype, device=x0.device) for _ in range(2))
    return x_t, velocity


@torch.library.custom_op("opensora_fast::velocity_loss", mutates_args=())
def _velocity_loss(prediction: Tensor, target: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
    if _backend(prediction) == "triton":
        return triton_velocity_loss_forward(prediction, target, with_gradient)
    loss = velocity_loss_reference(prediction, target)
    if not with_gradient:
        return loss, prediction.new_empty(0)
    return loss, velocity_loss_gradient_reference(prediction, target).contiguous()


@_velocity_loss.register_fake
def _fake_velocity_loss(prediction, target, with_gradient):
    gradient = prediction.new_empty(prediction.shape if with_gradient else (0,))
    return torch.empty((), dtype=_wide(prediction), device=prediction.device), gradient


def _save(ctx, inputs, output):
    _, _, with_gradient = inputs
    if with_gradient:
        ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _velocity_loss_backward(ctx, d_loss, _):
    (gradient,) = ctx.saved_tensors
    return gradient * d_loss.to(gradient.dtype), None, None


_velocity_loss.register_autograd(_velocity_loss_backward, setup_context=_save)


# Public functions.


def _check_dtype(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in launch.DTYPES:
        raise ValueError(f"{name} is {tensor.dtype}; it must be float32, bfloat16, float16 or float64")


def _check_like(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    if tensor.shape != like.shape or tensor.device != like.device:
        raise ValueError(
            f"{name} is {tuple(tensor.shape)} on {tensor.device}; "
            f"it must be like {like_name}, {tuple(like.shape)} on {like.device}"
        )


def flow_mix(
    x0: Tensor, noise: Tensor, t_B: Tensor, *, sigma_min: float = SIGMA_MIN, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """(x_t, v): the point of each sample's path at its time, and the velocity there, which a model should predict.

    x0, noise: [B, ...], of one dtype.  t_B: [B], any floating dtype.  The outputs are contiguous, in x0's dtype or in
    `dtype`. No derivative. ValueError names the argument that is outside of this. Open-Sora 2.0, section 4.2.
    """
    _check_dtype("x0", x0)
    if x0.dim() == 0:
        raise ValueError("x0 is a scalar; its first axis must be the batch")
    _check_like("noise", noise, "x0", x0)
    if noise.dtype != x0.dtype:
        raise ValueError(f"noise is {noise.dtype}; it must be x0's {x0.dtype}")
    _check_dtype("t", t_B)
    if t_B.shape != x0.shape[:1] or t_B.device != x0.device:
        raise ValueError(
            f"t is {tuple(t_B.shape)} on {t_B.device}; it must be a time per sample, ({x0.shape[0]},) on {x0.device}"
        )
    if dtype is not None and dtype not in launch.DTYPES:
        raise ValueError(f"dtype is {dtype}; it must be float32, bfloat16, float16 or float64")
    return _flow_mix(x0, noise, t_B, sigma_min, x0.dtype if dtype is None else dtype)


def velocity_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error, a scalar in fp32 (fp64 for an fp64 prediction).

    prediction, target: of one shape, each float32, bfloat16, float16 or float64. Differentiable in the prediction,
    once: where that is asked for, the gradient is computed in the same pass, and is all that is saved. ValueError names
    the argument that is outside of this. Open-Sora 2.0, section 4.2.
    """
    _check_dtype("prediction", prediction)
    _check_dtype("target", target)
    _check_like("target", target, "prediction", prediction)
    if target.requires_grad:
        raise ValueError("target requires a gradient; detach it")
    return _velocity_loss(prediction, target, prediction.requires_grad and torch.is_grad_enabled())[0]


def cost(
    shape: Sequence[int],
    dtype: torch.dtype,
    mode: str,
    *,
    function: str = "flow_mix",
    target: torch.dtype | None = None,
) -> Cost:
    """Cost of `function`. mode "forward": of velocity_loss with its gradient; "backward": that one's scaling.

    `target`: dtype of velocity_loss's target, or of flow_mix's outputs; the same as `dtype` unless given.
    """
    n, other = math.prod(shape), (target or dtype).itemsize
    if function == "flow_mix":
        if mode != "forward":
            raise ValueError(f"mode is {mode!r}; flow_mix has only a forward")
        return Cost(flops=5 * n, bytes=n * 2 * (dtype.itemsize + other))
    if mode == "forward":
        return Cost(flops=4 * n, bytes=n * (2 * dtype.itemsize + other))
    return Cost(flops=n, bytes=2 * n * dtype.itemsize)
