"""Cases of what surrounds a model in training: the mixed latent and its target, the loss, the optimiser's step.

Shapes  B batch, C channels, T, H, W of the latent; N tokens, D channels of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from opensora_fast.kernels import adamw as adamw_op
from opensora_fast.kernels import flow_mix as flow_mix_op
from opensora_fast.kernels.cost import Cost
from opensora_fast.profiling.case import Case, Input, Size, by_name
from opensora_fast.profiling.cases_transformer import sequences

BF16, FP32 = torch.bfloat16, torch.float32
SIGMA_MIN = 1e-5
SETTINGS: dict[str, Any] = dict(lr=5e-5, beta1=0.9, beta2=0.95, eps=1e-15, weight_decay=0.0)
MAX_NORM, EMA_DECAY, STEP = 1.0, 0.99, 1000


# Interpolation and loss.


def _mixed(x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    t = t.view(-1, *(1,) * (x0.dim() - 1))
    x_t = (1 - t) * x0 + (1 - (1 - SIGMA_MIN) * (1 - t)) * noise
    return x_t, (1 - SIGMA_MIN) * noise - x0


def _loss(prediction: Tensor, target: Tensor) -> Tensor:
    wide = torch.promote_types(prediction.dtype, torch.float32)
    return F.mse_loss(prediction.to(wide), target.to(wide))


def flow_mix(size: Size) -> list[Case]:
    op, model = flow_mix_op, size.model()
    cases = []
    for tokens in sequences(size):
        latent = (tokens.batch, model.latent_channels, tokens.video, model.patch_size, model.patch_size)
        inputs = {name: Input(shape=latent, dtype=FP32, gradient=False) for name in ("x0", "noise")}
        inputs["t"] = Input(shape=latent[:1], dtype=FP32, fill="unit", gradient=False)
        cases.append(
            Case(
                op="flow_mix",
                name=f"flow_mix {tokens.stage}",
                dtype=FP32,
                inputs=inputs,
                function=by_name(op.flow_mix, ["x0", "noise", "t"], sigma_min=SIGMA_MIN),
                composite=_mixed,
                cost=partial(op.cost, latent, FP32),
                backend=partial(op.selected, latent, FP32),
                modes=("forward",),
            )
        )
        shape = (tokens.batch, tokens.video, model.in_channels)
        for dtype in (BF16, FP32):
            cases.append(
                Case(
                    op="flow_mix",
                    name=f"velocity_loss {tokens.stage}",
                    dtype=dtype,
                    inputs={
                        "prediction": Input(shape=shape, dtype=dtype),
                        "target": Input(shape=shape, dtype=dtype, gradient=False),
                    },
                    function=by_name(op.velocity_loss, ["prediction", "target"]),
                    composite=_loss,
                    cost=partial(op.cost, shape, dtype, function="velocity_loss"),
                    backend=partial(op.selected, shape, dtype),
                )
            )
    return cases


# One step of the optimiser over the parameters of a block.

LISTS = ("master", "weight", "gradient", "first", "second", "ema")


def _lists(inputs: dict[str, Tensor]) -> list[list[Tensor]]:
    return [[tensor for name, tensor in inputs.items() if name.startswith(f"{of}_")] for of in LISTS]


def _step(**inputs: Tensor) -> list[Tensor]:
    masters, weights, gradients, first, second, ema = _lists(inputs)
    of_ema: dict[str, Any] = {"ema_decay": EMA_DECAY} if ema else {}
    adamw_op.adamw_step(
        masters,
        weights or masters,
        gradients,
        first,
        second,
        ema,
        **SETTINGS,
        step=STEP,
        gradient_norm=inputs["norm"],
        max_norm=MAX_NORM,
        **of_ema,
    )
    return [*masters, *weights, *first, *second, *ema]


def _torch_step(*, fused: bool = False, **inputs: Tensor) -> list[Tensor]:
    """Clip, torch's AdamW over all tensors at once, average, round: a pass over memory each."""
    masters, weights, gradients, first, second, ema = _lists(inputs)
    factor = torch.clamp(MAX_NORM / (inputs["norm"] + 1e-6), max=1.0)
    clipped = list(torch._foreach_mul([gradient.to(masters[0].dtype) for gradient in gradients], factor))
    device = masters[0].device if fused else torch.device("cpu")
    counts = [torch.tensor(float(STEP - 1), device=device) for _ in masters]
    torch_adamw(
        masters,
        clipped,
        first,
        second,
        [],
        counts,
        amsgrad=False,
        maximize=False,
        foreach=not fused,
        fused=fused,
        **SETTINGS,
    )
    if ema:
        torch._foreach_lerp_(ema, masters, 1 - EMA_DECAY)
    if weights:
        torch._foreach_copy_(weights, masters)
    return [*masters, *weights, *first, *second, *ema]


def _step_cost(total: int, dtype: torch.dtype, averaged: bool, mode: str) -> Cost:
    return adamw_op.cost(total, dtype, BF16 if dtype == BF16 else None, ema=averaged)


def _fused() -> Callable[..., list[Tensor]]:
    return partial(_torch_step, fused=True)


def adamw(size: Size) -> list[Case]:
    model = size.model(linear=True)
    D, M = model.hidden_size, model.mlp_size
    shapes = [(3 * D, D), (M, D), (M,), (D,)]  # qkv, the MLP's first matrix, and two biases
    total = sum(torch.Size(shape).numel() for shape in shapes)
    cases = []
    for dtype, averaged in ((BF16, True), (BF16, False), (FP32, True)):
        wanted = [("master", FP32, "weight"), ("gradient", dtype, "modulation")]
        wanted += [("first", FP32, "modulation"), ("second", FP32, "square")]
        wanted += [("weight", BF16, "weight")] if dtype == BF16 else []
        wanted += [("ema", FP32, "weight")] if averaged else []
        inputs = {
            f"{name}_{index}": Input(shape=shape, dtype=of, fill=fill, gradient=False)
            for name, of, fill in wanted
            for index, shape in enumerate(shapes)
        }
        inputs["norm"] = Input(shape=(), dtype=FP32, fill="around_one", gradient=False)
        words = "bf16 copies" if dtype == BF16 else "fp32 weights"
        cases.append(
            Case(
                op="adamw",
                name=f"adamw_step {total / 1e6:.3g}M, {words}{', ema' if averaged else ''}",
                dtype=dtype,
                inputs=inputs,
                function=_step,
                composite=_torch_step,
                cost=partial(_step_cost, total, dtype, averaged),
                backend=partial(adamw_op.selected, (total,), FP32),
                modes=("step",),
                mutates=True,
                baselines={"fused": _fused},
            )
        )
    return cases
