"""Attention by the libraries: cuDNN, FlashAttention where it is installed, and PyTorch's own on the CPU.

Every one takes and gives what `attention_reference` does, in the dtype of q: out [B, S, H, K], contiguous, and lse
[B, H, S], natural, float32 (float64 for float64), contiguous.

cuDNN           by its own operator, never by the order in which `scaled_dot_product_attention` tries kernels, and never
                with a mask. Tensors are copied where their base or strides are not of whole 16 bytes, on which cuDNN
                faults, or where heads lie outside of tokens: its plans are kept by the layout of q, k and v alone, and
                out and dout always have the one layout here.
FlashAttention  4 (`flash_attn.cute`, from 4.0.0b36 on), 3 (`flash_attn_interface`) or 2 (`flash_attn`), the newest that
                is installed and runs on the device. Imported at the first call.
cpu_flash       PyTorch's tiled attention on the CPU. Of float16 and bfloat16 its lse is off by some 5e-5 (measured; its
                exponential is an approximation there), a tenth of what their rounding does to out.

The gradient of lse, where a library's backward has no place for it: K is padded by 8 channels,

    out' = (out | 1 1 1 0 ..),   dout' = (dout | -a -b -c 0 ..),   q, k, v padded with zeros,   a + b + c = dlse

and the backward's rowsum(dout' * out') = rowsum(dout * out) - dlse is what it subtracts from dP, which is what a
gradient of lse does. a, b and c are dlse in pieces of q's dtype: of bfloat16 three make up float32. A float16 is
infinite above 65,504: with a gradient of lse the CPU computes in float32 then, and the GPU libraries refuse.

Determinism     Forwards and cpu_flash are bitwise repeatable. The backward of cuDNN and FlashAttention sums dq in any
                order; under `torch.use_deterministic_algorithms` cuDNN refuses, and FlashAttention keeps an order.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType

import torch
from packaging.version import Version
from torch import Tensor

CUDNN_MAX_HEAD_DIM = 128
CUDNN_RAGGED = "TORCH_CUDNN_SDPA_AVOID_RECOMPILE"  # PyTorch's own switch
FLASH_MAX_HEAD_DIM = 256
HALF_DTYPES = (torch.bfloat16, torch.float16)
PADDED_CHANNELS = 8  # what the gradient of lse adds to K
LSE_PIECES = 3
ALIGNMENT = 16  # bytes

Capability = tuple[int, int] | None  # of the device, (9, 0) for sm_90; None where there is none to ask
Backward = Callable[..., tuple[Tensor, Tensor, Tensor]]


def capability(device: torch.device) -> Capability:
    """That of a CUDA device, of the current one where it has no index."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


# The gradient of lse by padding.


def backward_with_dlse(
    backward: Backward,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    dlse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`backward`, which knows no gradient of lse, made to take it: K grows by 8 where there is one."""
    if dlse is None:
        return backward(dout, q, k, v, out, lse, scale)
    K = q.shape[-1]
    ones = out.new_ones(*out.shape[:-1], LSE_PIECES)
    dout = torch.cat((dout, *(-piece[..., None] for piece in _pieces(dlse.transpose(1, 2), dout.dtype))), dim=-1)
    padded = [torch.nn.functional.pad(x, (0, K + PADDED_CHANNELS - x.shape[-1])) for x in (dout, q, k, v)]
    out = torch.nn.functional.pad(torch.cat((out, ones), dim=-1), (0, PADDED_CHANNELS - LSE_PIECES))
    dq, dk, dv = (x[..., :K].contiguous() for x in backward(*padded, out, lse, scale))
    return dq, dk, dv


def _pieces(x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Tensors of `dtype` whose sum is x: each is what the ones before it left over, rounded."""
    pieces = []
    for _ in range(LSE_PIECES):
        pieces.append(x.to(dtype))
        x = x - pieces[-1]
    return pieces


# PyTorch's own, on the CPU. The libraries below want heads before tokens; they take the strides and copy nothing.


def cpu_flash_forward(q_BSHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse)."""
    q, k, v = (x.transpose(1, 2) for x in (q_BSHK, k_BTHK, v_BTHK))
    out_BHSK, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    return out_BHSK.transpose(1, 2).contiguous(), lse.contiguous()


def cpu_flash_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    *,
    dlse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv)."""
    dtype = q.dtype
    if dlse is not None and dtype == torch.float16:
        dout, q, k, v, out = (x.float() for x in (dout, q, k, v, out))
    gradients = backward_with_dlse(_cpu_flash_backward, dout, q, k, v, out, lse, scale, dlse)
    dq, dk, dv = (x.to(dtype) for x in gradients)
    return dq, dk, dv


def _cpu_flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (x.transpose(1, 2) for x in (dout, q, k, v, out))
    gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *tensors, lse, 0.0, False, scale=scale
    )
    dq, dk, dv = (x.transpose(1, 2).contiguous() for x in gradients)
    return dq, dk, dv


# cuDNN.


def missing_cudnn(shape: Sequence[int], dtype: torch.dtype, device: Capability) -> str:
    """Why cuDNN cannot take q of `shape` [B, S, H, K], "" when it can."""
    K = shape[-1]
    if not torch.backends.cudnn.is_available():
        return "this PyTorch has no cuDNN"
    if device is not None and device < (8, 0):
        return f"cuDNN attention wants sm_80 or later, not sm_{device[0]}{device[1]}"
    if dtype not in HALF_DTYPES:
        return f"cuDNN attention takes bfloat16 and float16, not {dtype}"
    if K % 8 or K > CUDNN_MAX_HEAD_DIM:
        return f"cuDNN attention takes heads of a multiple of 8 channels up to {CUDNN_MAX_HEAD_DIM}, not {K}"
    if os.environ.get(CUDNN_RAGGED) == "1":
        return f"{CUDNN_RAGGED}=1 changes the layout of cuDNN's log-sum-exp: unset it"
    if torch.are_deterministic_algorithms_enabled():
        return "torch.use_deterministic_algorithms is on, and cuDNN sums dq in any order"
    return ""


def cudnn_forward(q_BSHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse)."""
    q, k, v = (_laid_out(x).transpose(1, 2) for x in (q_BSHK, k_BTHK, v_BTHK))
    out_BHSK, lse_BHS1 = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=scale)[:2]
    return out_BHSK.transpose(1, 2).contiguous(), lse_BHS1.reshape(q.shape[:3]).contiguous()


def cudnn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    *,
    dlse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv); with `dlse` K is at most 120, and float16 infinite above 65,504."""
    return backward_with_dlse(_cudnn_backward, dout, q, k, v, out, lse, scale, dlse)


def _cudnn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse_BHS: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    S, T = q.shape[1], k.shape[1]
    tensors = [_laid_out(x).transpose(1, 2) for x in (dout.contiguous(), q, k, v, out.contiguous())]
    unused = torch.zeros((), dtype=torch.int64, device=q.device)  # the dropout's seed and offset
    gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *tensors, lse_BHS[..., None], unused, unused, None, None, None, S, T, 0.0, False, scale=scale
    )
    dq, dk, dv = (x.transpose(1, 2).contiguous() for x in gradients)
    return dq, dk, dv


def _laid_out(x_BSHK: Tensor) -> Tensor:
    """x itself where the GPU libraries can take its place and strides in memory, else a copy."""
    strides = x_BSHK.stride()
    whole = (x_BSHK.storage_offset(), *strides[:3])
    aligned = not any(number * x_BSHK.element_size() % ALIGNMENT for number in whole)
    in_order = list(strides) == sorted(strides, reverse=True)
    return x_BSHK if aligned and in_order else x_BSHK.clone(memory_format=torch.contiguous_format)


# FlashAttention. Its own autograd is passed by: the functions below it take and give the log-sum-exp.


@dataclass(frozen=True, kw_only=True)
class FlashGeneration:
    """One FlashAttention: its package and module, the devices that it runs on, and how its two functions are called.

    forward(module, q, k, v, scale) -> (out, lse);  backward(module, dout, q, k, v, out, lse, scale) -> (dq, dk, dv),
    with dlse as one more argument where it `takes_dlse`.
    """

    distribution: str
    oldest: Version  # whose functions take the arguments below
    module: str
    devices: tuple[tuple[int, int], tuple[int, int]]
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    takes_dlse: bool = False


def _flash_4_forward(module: ModuleType, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = module._flash_attn_fwd(q, k, v, softmax_scale=scale, return_lse=True)
    return out, lse


def _flash_4_backward(module, dout, q, k, v, out, lse, scale, dlse):
    deterministic = torch.are_deterministic_algorithms_enabled()
    return module._flash_attn_bwd(q, k, v, out, dout, lse, softmax_scale=scale, deterministic=deterministic, dlse=dlse)


def _flash_3_forward(module: ModuleType, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = module._flash_attn_forward(q, k, v, softmax_scale=scale)
    return out, lse


def _flash_3_backward(module, dout, q, k, v, out, lse, scale):
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    deterministic = torch.are_deterministic_algorithms_enabled()
    module._flash_attn_backward(
        dout, q, k, v, out, lse, dq=dq, dk=dk, dv=dv, softmax_scale=scale, deterministic=deterministic
    )
    return dq, dk, dv


FULL_ATTENTION = {  # version 2 has no defaults for them
    "dropout_p": 0.0,
    "causal": False,
    "window_size_left": -1,
    "window_size_right": -1,
    "softcap": 0.0,
    "alibi_slopes": None,
}


def _flash_2_forward(module: ModuleType, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = module._flash_attn_forward(q, k, v, softmax_scale=scale, return_softmax=False, **FULL_ATTENTION)
    return out, lse


def _flash_2_backward(module, dout, q, k, v, out, lse, scale):
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    deterministic = torch.are_deterministic_algorithms_enabled()
    module._flash_attn_backward(
        dout, q, k, v, out, lse, dq, dk, dv, softmax_scale=scale, deterministic=deterministic, **FULL_ATTENTION
    )
    return dq, dk, dv


FLASH_GENERATIONS = (
    FlashGeneration(
        distribution="flash-attn-4",
        oldest=Version("4.0.0b36"),
        module="flash_attn.cute.interface",
        devices=((9, 0), (12, 9)),
        forward=_flash_4_forward,
        backward=_flash_4_backward,
        takes_dlse=True,
    ),
    FlashGeneration(
        distribution="flash-attn-3",
        oldest=Version("3.0.0b1"),
        module="flash_attn_interface",
        devices=((9, 0), (9, 9)),
        forward=_flash_3_forward,
        backward=_flash_3_backward,
    ),
    FlashGeneration(
        distribution="flash-attn",
        oldest=Version("2.7"),
        module="flash_attn.flash_attn_interface",
        devices=((8, 0), (12, 9)),
        forward=_flash_2_forward,
        backward=_flash_2_backward,
    ),
)
INSTALL_FLASH = "`pip install -e '.[flash]'` adds version 4, from 4.0.0b36 on"


@functools.cache
def installed_version(distribution: str) -> Version | None:
    """Of a package, None where it is not installed."""
    try:
        return Version(metadata.version(distribution))
    except metadata.PackageNotFoundError:
        return None


def flash_generation(device: Capability) -> FlashGeneration | None:
    """The newest FlashAttention that is installed and runs on the device."""
    for generation in FLASH_GENERATIONS:
        first, last = generation.devices
        version = installed_version(generation.distribution)
        if version and generation.oldest <= version and (device is None or first <= device <= last):
            return generation
    return None


def missing_flash(shape: Sequence[int], dtype: torch.dtype, device: Capability) -> str:
    """Why FlashAttention cannot take q of `shape` [B, S, H, K], "" when it can."""
    K, limit = shape[-1], FLASH_MAX_HEAD_DIM if device is None or device < (10, 0) else 128
    if dtype not in HALF_DTYPES:
        return f"FlashAttention takes bfloat16 and float16, not {dtype}"
    if K % 8 or limit < K:
        return f"FlashAttention takes heads of a multiple of 8 channels up to {limit}, not {K}"
    if flash_generation(device) is None:
        where = "" if device is None else f" for sm_{device[0]}{device[1]}"
        return f"no FlashAttention{where} is installed; {INSTALL_FLASH}"
    return ""


def missing_dlse(name: str, K: int, dtype: torch.dtype, device: Capability) -> str:
    """Why the backward of library `name` cannot take a gradient of lse for heads of K channels, "" when it can."""
    if name == "flash" and (generation := flash_generation(device)) and generation.takes_dlse:
        return ""
    limit = {"cudnn": CUDNN_MAX_HEAD_DIM, "flash": FLASH_MAX_HEAD_DIM}.get(name)
    if limit is None:
        return ""
    if dtype == torch.float16:
        return f"{name} takes the gradient of lse in channels of q's dtype, and float16 is infinite above 65,504"
    if limit >= K + PADDED_CHANNELS:
        return ""
    return f"{name} takes the gradient of lse in {PADDED_CHANNELS} more channels, and {limit} in all; a head has {K}"


def flash_name(device: Capability) -> str:
    """Package and version of what `flash` runs."""
    generation = flash_generation(device)
    return f"{generation.distribution} {installed_version(generation.distribution)}" if generation else "none"


def _loaded_flash(device: torch.device) -> tuple[FlashGeneration, ModuleType]:
    generation = flash_generation(capability(device))
    if generation is None:
        raise ValueError(f"no FlashAttention is installed; {INSTALL_FLASH}")
    try:
        return generation, importlib.import_module(generation.module)
    except ImportError as error:
        raise ValueError(
            f"{generation.distribution} is installed and cannot be imported ({error}): reinstall it, or force another "
            "backend, OPENSORA_FAST_BACKEND=attention:triton"
        ) from error


def _current(device: torch.device) -> AbstractContextManager:
    """Within, the GPU is the current one, whose streams and code FlashAttention takes."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def flash_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse)."""
    generation, module = _loaded_flash(q.device)
    with _current(q.device):
        out, lse = generation.forward(module, _laid_out(q), _laid_out(k), _laid_out(v), scale)
    return out.contiguous(), lse.contiguous()


def flash_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    *,
    dlse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv); `dlse` as of cuDNN, K at most 248; version 4's backward takes it as it is."""
    generation, module = _loaded_flash(q.device)
    run = functools.partial(generation.backward, module)
    dout, q, k, v, out = (_laid_out(x) for x in (dout, q, k, v, out))
    with _current(q.device):
        if generation.takes_dlse:
            gradients = run(dout, q, k, v, out, lse, scale, None if dlse is None else dlse.contiguous())
        else:
            gradients = backward_with_dlse(run, dout, q, k, v, out, lse, scale, dlse)
    dq, dk, dv = (x.contiguous() for x in gradients)
    return dq, dk, dv
