"""AdamW over many tensors in one pass: unscale, clip, update, rounded copy, moving average; the host never waits.

Per element, with g = c * gradient, n the number of the update, and c from device memory:

    m = b1 m + (1 - b1) g;   v = b2 v + (1 - b2) g^2
    w = (1 - lr * weight_decay) w - lr / (1 - b1^n) * m / (sqrt(v / (1 - b2^n)) + eps)
    weight = round(w);       ema = ema + (1 - ema_decay) (w - ema)
    c = scale * min(1, max_norm / (scale * gradient_norm + 1e-6))

A scale or norm that is not finite makes the step nothing at all: no tensor changes, nor does its count of updates.

Shapes      lists with an entry per tensor: master, moments and average fp32 of one shape; weight, gradient like it.
Numerics    all of it in fp32, the corrections 1 - b^n in fp64; a weight is rounded once. Like torch.optim.AdamW to fp32
            rounding, but that a bf16 gradient is clipped in fp32.
Envelope    fp32 masters; bf16, fp16 or fp32 weights and gradients; contiguous or channels last, all of a tensor alike
            (a gradient of another layout is copied). No derivative.
Traffic     per element 24 bytes of master and moments, the gradient, the weight and 8 of the average: memory bound ->
            the target is bytes/s (cost()).
Determinism no element meets another: bitwise equal over runs, thread counts and partitions.
Source      Loshchilov & Hutter 2019 (arXiv:1711.05101); the corrections of Kingma & Ba 2015. Unlike the composite of
            scaling, clipping, torch.optim.AdamW, copies and averages, state passes through the processor once.
Device code csrc/adamw.h (arithmetic, both devices), adamw_cpu.cpp, adamw.cu (many tensors a launch), and here in
            Triton, one launch per tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from opensora_fast.kernels import backend, extension, launch
from opensora_fast.kernels.cost import Cost
from opensora_fast.kernels.launch import jit, tl

NATIVE = {"cpu": "host", "cuda": "cuda"}
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
LAYOUTS = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What one step does to every tensor. `gradient_*` are fp32 scalars on the device, None where there are none."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int = 0  # for groups without counts
    gradient_norm: Tensor | None = None
    max_norm: float = math.inf
    gradient_scale: Tensor | None = None
    ema_decay: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Group:
    """The tensors of a step whose weights and gradients agree in dtype; None where there is nothing of a kind."""

    masters: Sequence[Tensor]
    weights: Sequence[Tensor] | None
    gradients: Sequence[Tensor]
    first_moments: Sequence[Tensor]
    second_moments: Sequence[Tensor]
    ema: Sequence[Tensor] | None
    counts: Sequence[Tensor] | None


# Reference: one tensor after another, each value chosen on the device between the old and the new.


def adamw_reference(group: Group, options: Options) -> None:
    """The step in plain torch, in place."""
    device = group.masters[0].device
    one = torch.ones((), device=device)
    scale = one if options.gradient_scale is None else options.gradient_scale
    norm = scale * (one if options.gradient_norm is None else options.gradient_norm)
    proceeds = norm.isfinite() & scale.isfinite()
    factor = scale * (options.max_norm / (norm + 1e-6)).clamp(max=1)
    for i, master in enumerate(group.masters):
        first, second = group.first_moments[i], group.second_moments[i]
        n = one * options.step if group.counts is None else group.counts[i] + 1
        corrections = [-torch.expm1(n.double() * math.log(beta)) for beta in (options.beta1, options.beta2)]
        step_size, root = (options.lr / corrections[0]).float(), corrections[1].sqrt().float()
        g = group.gradients[i].float() * factor
        new_first = torch.lerp(first, g, 1 - options.beta1)
        new_second = (second * options.beta2).addcmul_(g, g, value=1 - options.beta2)
        kept = master * (1 - options.lr * options.weight_decay)
        new_master = kept - step_size * new_first / (new_second.sqrt() / root + options.eps)
        pairs = [(first, new_first), (second, new_second), (master, new_master)]
        if group.weights is not None:
            pairs.append((group.weights[i], new_master.to(group.weights[i].dtype)))
        if group.ema is not None:
            pairs.append((group.ema[i], torch.lerp(group.ema[i], new_master, 1 - options.ema_decay)))
        if group.counts is not None:
            pairs.append((group.counts[i], n))
        for old, new in pairs:
            old.copy_(torch.where(proceeds, new, old))


# Tile choice, and choice of the implementation.


@dataclass(frozen=True)
class Tile:
    block: int
    num_warps: int


def choose_tile() -> Tile:
    """Eight elements a thread: 16 bytes of bf16, twice 16 of fp32. Modelled, not yet measured on a GPU."""
    return Tile(block=1024, num_warps=4)


def missing_backends(dtype: torch.dtype, device_type: str) -> dict[str, str]:
    """The backends for masters on `device_type`, each with why it cannot run; an empty reason means that it can."""
    missing = {"reference": "", "triton": launch.missing(device_type)}
    if native := NATIVE.get(device_type):
        missing[native] = extension.load().missing[native]
    return missing


def choose(shape: Sequence[int], dtype: torch.dtype, device_type: str, missing: Mapping[str, str]) -> tuple[str, str]:
    """(backend, reason); pure. `shape` is (elements of all tensors,)."""
    if device_type == "cpu":
        # 2026-11, 1e7 elements on one core of a Xeon: 1.00 of the time of torch's fused AdamW alone, 0.68 with clipping
        # and an average, 0.34 with bf16 weights and gradients too.
        return ("host", "one fused pass over memory") if not missing["host"] else ("reference", missing["host"])
    if device_type == "cuda":
        if not missing["cuda"]:
            return "cuda", "many tensors a launch; not yet timed against Triton"
        return ("triton", missing["cuda"]) if not missing["triton"] else ("reference", missing["triton"])
    return "reference", f"there is no kernel for {device_type} tensors"


def selected(shape: Sequence[int], dtype: torch.dtype, device_type: str) -> tuple[str, str]:
    """(backend, reason) of a step on such masters, with OPENSORA_FAST_BACKEND obeyed."""
    missing = missing_backends(dtype, device_type)
    return backend.select("adamw", choose(shape, dtype, device_type, missing), missing)


# Device code.


@jit
def _step_kernel(
    master_ptr,
    weight_ptr,
    gradient_ptr,
    first_ptr,
    second_ptr,
    ema_ptr,
    count_ptr,
    norm_ptr,
    scale_ptr,
    size,
    lr,
    keep,
    first_share,
    second_share,
    eps,
    ema_share,
    max_norm,
    log_beta1,
    log_beta2,
    step,
    COPIES: tl.constexpr,
    AVERAGES: tl.constexpr,
    COUNTS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    factor = tl.full((), 1.0, tl.float32)
    norm = tl.full((), 0.0, tl.float32)
    if HAS_SCALE:
        factor = tl.load(scale_ptr)
    if HAS_NORM:
        norm = tl.load(norm_ptr) * factor
    finite = (norm - norm) + (factor - factor) == 0.0
    factor *= tl.minimum(1.0, max_norm / (norm + 1e-6))
    n = tl.load(count_ptr).to(tl.float64) + 1.0 if COUNTS else tl.full((), 1.0, tl.float64) * step
    step_size = (lr / (1.0 - tl.exp(n * log_beta1))).to(tl.float32)
    root_factor = (1.0 / tl.sqrt(1.0 - tl.exp(n * log_beta2))).to(tl.float32)

    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < tl.where(finite, size, 0)
    g = tl.load(gradient_ptr + offset, mask=mask, other=0.0).to(tl.float32) * factor
    first = tl.load(first_ptr + offset, mask=mask, other=0.0)
    second = tl.load(second_ptr + offset, mask=mask, other=0.0)
    master = tl.load(master_ptr + offset, mask=mask, other=0.0)
    first += first_share * (g - first)
    second = (1.0 - second_share) * second + second_share * (g * g)
    master = keep * master - step_size * first / (tl.sqrt(second) * root_factor + eps)
    tl.store(first_ptr + offset, first, mask=mask)
    tl.store(second_ptr + offset, second, mask=mask)
    tl.store(master_ptr + offset, master, mask=mask)
    if COPIES:
        tl.store(weight_ptr + offset, master, mask=mask)
    if AVERAGES:
        ema = tl.load(ema_ptr + offset, mask=mask, other=0.0)
        tl.store(ema_ptr + offset, ema + ema_share * (master - ema), mask=mask)


# Launchers.


def triton_step(group: Group, options: Options) -> None:
    """A launch per tensor; a pointer that a kernel has no use for is the master's."""
    tile = choose_tile()
    for i, master in enumerate(group.masters):
        launch.launch(
            _step_kernel,
            (-(-master.numel() // tile.block),),
            num_warps=tile.num_warps,
            master_ptr=master,
            weight_ptr=master if group.weights is None else group.weights[i],
            gradient_ptr=group.gradients[i],
            first_ptr=group.first_moments[i],
            second_ptr=group.second_moments[i],
            ema_ptr=master if group.ema is None else group.ema[i],
            count_ptr=master if group.counts is None else group.counts[i],
            norm_ptr=master if options.gradient_norm is None else options.gradient_norm,
            scale_ptr=master if options.gradient_scale is None else options.gradient_scale,
            size=master.numel(),
            lr=options.lr,
            keep=1 - options.lr * options.weight_decay,
            first_share=1 - options.beta1,
            second_share=1 - options.beta2,
            eps=options.eps,
            ema_share=1 - options.ema_decay,
            max_norm=options.max_norm,
            log_beta1=math.log(options.beta1),
            log_beta2=math.log(options.beta2),
            step=float(options.step),
            COPIES=group.weights is not None,
            AVERAGES=group.ema is not None,
            COUNTS=group.counts is not None,
            HAS_NORM=options.gradient_norm is not None,
            HAS_SCALE=options.gradient_scale is not None,
            BLOCK=tile.block,
        )
    if group.counts is not None:  # after all that read them
        one = torch.ones((), device=group.masters[0].device)
        scale = one if options.gradient_scale is None else options.gradient_scale
        norm = scale if options.gradient_norm is None else options.gradient_norm * scale
        proceeds = (norm.isfinite() & scale.isfinite()).float().view(())
        torch._foreach_add_(list(group.counts), [proceeds] * len(group.counts))


def native_step(group: Group, options: Options) -> None:
    """`opensora_fast._C` on the CPU or a GPU: a few launches for all tensors."""
    device = group.masters[0].device
    nothing = [0] * len(group.masters)

    def addresses(tensors: Sequence[Tensor] | None) -> list[int]:
        return nothing if tensors is None else [tensor.data_ptr() for tensor in tensors]

    arguments = dict(
        masters=addresses(group.masters),
        weights=addresses(group.weights),
        gradients=addresses(group.gradients),
        first_moments=addresses(group.first_moments),
        second_moments=addresses(group.second_moments),
        ema=addresses(group.ema),
        counts=addresses(group.counts),
        sizes=[master.numel() for master in group.masters],
        gradient_dtype=DTYPES[group.gradients[0].dtype],
        weight_dtype=DTYPES[torch.float32 if group.weights is None else group.weights[0].dtype],
        lr=options.lr,
        beta1=options.beta1,
        beta2=options.beta2,
        eps=options.eps,
        weight_decay=options.weight_decay,
        ema_decay=options.ema_decay,
        max_norm=options.max_norm,
        step=float(options.step),
        gradient_norm=0 if options.gradient_norm is None else options.gradient_norm.data_ptr(),
        gradient_scale=0 if options.gradient_scale is None else options.gradient_scale.data_ptr(),
    )
    native = extension.load().module
    assert native is not None
    if device.type == "cpu":
        native.adamw_cpu(**arguments, threads=torch.get_num_threads())
        return
    with torch.cuda.device(device):
        scalars = torch.empty(4 * len(group.masters), dtype=torch.float32, device=device)
        stream = torch.cuda.current_stream().cuda_stream
        native.adamw_cuda(**arguments, scalars=scalars.data_ptr(), stream=stream)


STEPS = {"reference": adamw_reference, "triton": triton_step, "host": native_step, "cuda": native_step}


# Public functions.


def _layout(tensor: Tensor) -> torch.memory_format | None:
    """The first memory format in which the tensor is dense, if there is one."""
    return next((layout for layout in LAYOUTS if tensor.is_contiguous(memory_format=layout)), None)


def _check_tensor(name: str, tensor: Tensor, master: Tensor, layout: torch.memory_format | None) -> None:
    """Raise for what is wrong with a tensor of a master that is dense in `layout`; None if any layout will do."""
    copy = name.startswith(("weights", "gradients"))
    if tensor.dtype not in (DTYPES if copy else (torch.float32,)):
        raise ValueError(f"{name} is {tensor.dtype}; it must be float32{', bfloat16 or float16' if copy else ''}")
    if tensor.shape != master.shape or tensor.device != master.device:
        raise ValueError(
            f"{name} is {tuple(tensor.shape)} on {tensor.device}; "
            f"it must be its master's {tuple(master.shape)} on {master.device}"
        )
    if layout is not None and not tensor.is_contiguous(memory_format=layout):
        raise ValueError(f"{name} has strides {tensor.stride()}; its master has {master.stride()}")


def _check_scalar(name: str, scalar: Tensor | None, device: torch.device) -> None:
    if scalar is None or (scalar.dtype == torch.float32 and scalar.numel() == 1 and scalar.device == device):
        return
    raise ValueError(
        f"{name} is {scalar.dtype} {tuple(scalar.shape)} on {scalar.device}; it must be one float32 on {device}"
    )


@torch.no_grad()
def adamw_step(
    masters: Sequence[Tensor],
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    first_moments: Sequence[Tensor],
    second_moments: Sequence[Tensor],
    ema: Sequence[Tensor] = (),
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int | Tensor,
    gradient_norm: Tensor | None = None,
    max_norm: float | None = None,
    gradient_scale: Tensor | None = None,
    ema_decay: float | None = None,
) -> None:
    """Update masters, weights, moments and averages in place; the host waits for nothing.

    masters: fp32; moments and `ema` (empty, or one each) likewise.  weights: bf16, fp16 or fp32 copies, or the masters
    themselves (the same objects).  gradients: bf16, fp16 or fp32; None leaves a tensor alone.  step: number of this
    update, from 1, or fp32 [number of tensors], the updates that each has had, which are counted on.
    gradient_norm: norm of all gradients as they are.  max_norm: what it is clipped to (needs gradient_norm).
    gradient_scale: multiplies the gradients before anything else, and the norm with them. Both are fp32 scalars on the
    device: where one is not finite, nothing changes. ValueError names the argument that is outside of this.
    Loshchilov & Hutter 2019.
    """
    number = len(masters)
    lists = dict(weights=weights, gradients=gradients, first_moments=first_moments, second_moments=second_moments)
    if len(ema) or ema_decay is not None:
        lists["ema"] = ema
        if ema_decay is None:
            raise ValueError("ema_decay is None; averages need one")
    for name, tensors in lists.items():
        if len(tensors) != number:
            raise ValueError(f"{name} has {len(tensors)} tensors; there are {number} masters")
    if number == 0:
        return
    device = masters[0].device
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 < beta < 1:
            raise ValueError(f"{name} is {beta}; it must lie between 0 and 1")
    if max_norm is not None and gradient_norm is None:
        raise ValueError("gradient_norm is None; max_norm needs it")
    _check_scalar("gradient_norm", gradient_norm, device)
    _check_scalar("gradient_scale", gradient_scale, device)
    if isinstance(step, Tensor):
        if step.dtype != torch.float32 or step.shape != (number,) or step.device != device:
            raise ValueError(
                f"step is {step.dtype} {tuple(step.shape)} on {step.device}; counts are float32 ({number},) on {device}"
            )
    elif step < 1:
        raise ValueError(f"step is {step}; the first update is number 1")
    counts = step.unbind() if isinstance(step, Tensor) else None

    rows = []
    state_names = [name for name in lists if name not in ("weights", "gradients")]
    states = zip(*(lists[name] for name in state_names), strict=True)
    for i, (master, weight, gradient, state) in enumerate(zip(masters, weights, gradients, states, strict=True)):
        if gradient is None:
            continue
        if master.device != device:
            raise ValueError(f"masters[{i}] is on {master.device}; masters[0] is on {device}")
        layout = _layout(master)
        if layout is None:
            raise ValueError(f"masters[{i}] has strides {master.stride()}; it must be contiguous or channels last")
        _check_tensor(f"masters[{i}]", master, master, layout)
        _check_tensor(f"weights[{i}]", weight, master, layout)
        _check_tensor(f"gradients[{i}]", gradient, master, None)
        for name, tensor in zip(state_names, state, strict=True):
            _check_tensor(f"{name}[{i}]", tensor, master, layout)
        gradient = gradient.contiguous(memory_format=layout)
        rows.append((weight is not master, weight.dtype, gradient.dtype, i, gradient))

    total = sum(masters[i].numel() for *_, i, _ in rows)
    missing = missing_backends(torch.float32, device.type)
    name = backend.announced("adamw", selected((total,), torch.float32, device.type), missing)
    options = Options(
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        step=0 if isinstance(step, Tensor) else step,
        gradient_norm=gradient_norm,
        max_norm=math.inf if max_norm is None else max_norm,
        gradient_scale=gradient_scale,
        ema_decay=1.0 if ema_decay is None else ema_decay,
    )
    for (copies, _, _), members in groupby(sorted(rows, key=_kind), key=_kind):
        chosen = list(members)
        indices = [i for *_, i, _ in chosen]
        group = Group(
            masters=[masters[i] for i in indices],
            weights=[weights[i] for i in indices] if copies else None,
            gradients=[gradient for *_, gradient in chosen],
            first_moments=[first_moments[i] for i in indices],
            second_moments=[second_moments[i] for i in indices],
            ema=[ema[i] for i in indices] if len(ema) else None,
            counts=None if counts is None else [counts[i] for i in indices],
        )
        STEPS[name](group, options)
        if name != "reference":  # autograd should know that these have changed
            torch.autograd.graph.increment_version([*group.masters, *(group.weights or ())])


def _kind(row: tuple) -> tuple[bool, str, str]:
    copies, weight_dtype, gradient_dtype, *_ = row
    return copies, str(weight_dtype), str(gradient_dtype)


def cost(
    elements: int,
    gradient_dtype: torch.dtype,
    weight_dtype: torch.dtype | None = None,
    *,
    ema: bool = False,
    mode: str = "forward",
) -> Cost:
    """Cost of a step; `weight_dtype` is that of rounded copies, None where the masters are the weights."""
    if mode != "forward":
        raise ValueError(f"mode is {mode!r}; a step has only a forward")
    copy = 0 if weight_dtype is None else weight_dtype.itemsize
    per_element = 3 * 2 * 4 + gradient_dtype.itemsize + copy + (2 * 4 if ema else 0)
    return Cost(flops=(16 + 3 * ema) * elements, bytes=per_element * elements)
