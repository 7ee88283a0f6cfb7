"""Attention as one op, and with norm and rotation of q and k before it, by whichever candidate fits.

    attention        S = scale * q k^T;   out = softmax(S) v;   lse = logsumexp(S)
    rope_attention   q, k = rope(rms_norm(raw q, raw k)), and then the same with scale = K^-1/2

Backward, from the lse and out of the forward, P = exp(S - lse) and D = rowsum(dout * out) - dlse:

    dP = dout v^T;   dS = P * (dP - D);   dq = scale * dS k;   dk = scale * dS^T q;   dv = P^T dout

and with norm and rotation their backward after it. Attention is full: no mask. Streams of `rope_attention` are
attended to together, in the order in which they are given: text, then video.

Candidates  reference  `attention_reference`: PyTorch, a block of queries at a time
            cpu_flash  PyTorch's tiled attention on the CPU
            cudnn      cuDNN by its own operator
            flash      FlashAttention 4, 3 or 2, where one is installed
            triton     `attention_triton`: this project's, which can norm and rotate tiles as it loads them
            gluon      `attention_gluon`: this project's for Hopper, only where it is asked for by name
Shapes      B batch, S query tokens, T key tokens (of a stream: its tokens), H heads, K channels of a head, K2 = K / 2.
            q, out [B, S, H, K];  k, v [B, T, H, K];  lse [B, H, S];  qkv [B, T, 3, H, K] per stream;  scales [K];
            cos, sin [S, K2] or [B, S, K2], S of all streams;  out of `rope_attention` joint, or one for each stream.
Numerics    q, k, v and out in the dtype of the inputs, softmax, lse and sums in float32 (float64 for float64).
Envelope    float32, bfloat16, float16, float64; K 1 to 256, channels contiguous; `rope_attention` that of
            `qk_norm_rope`. Each candidate has its own, and `choose` passes over those that it leaves out.
Gradients   in q, k, v and lse. A backward that takes no gradient of lse gets it in 8 more channels, exactly
            (`attention_libraries`); where they would not do (cuDNN: K over 120, or float16) that call's backward is
            triton's. Without a gradient of lse none of this happens.
Replaced    such a backward, and cuDNN for a lone query or key: by triton, or by the reference where triton cannot.
            It is told once. Of no queries or no keys everything is the reference's.
Saved       attention: q, k, v, out, lse. rope_attention: every stream's qkv, the scales, the tables, out and lse, 4 U
            (U = one [B, S, H * K] tensor), where keeping q, k and v as well would be 7 U of a double block and 6 of a
            single one. The price is one more pass of norm and rotation, 2 % of the attention's time at 8,960 tokens
            (modelled, not measured).
Determinism bitwise equal over runs: reference, cpu_flash, triton, and every forward. Not the backward of cudnn, flash
            and gluon, which add dq in any order; under `torch.use_deterministic_algorithms` cudnn and gluon refuse and
            flash takes its slower, ordered form.
Source      Open-Sora 2.0 (arXiv 2503.09642, section 3.2); FlashAttention-2 (arXiv 2307.08691) for the backward.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from opensora_fast.kernels import (
    attention_gluon,
    attention_triton,
    backend,
    finite_watch,
    launch,
    qk_norm_rope,
)
from opensora_fast.kernels import attention_libraries as libraries
from opensora_fast.kernels.attention_reference import attention_backward_reference, attention_reference
from opensora_fast.kernels.cost import Cost
from opensora_fast.kernels.qk_norm_rope import ScalePair

MIN_HEAD_DIM, MAX_HEAD_DIM = 1, 256


# Choice of the candidate.


def missing_backends(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> dict[str, str]:
    """The candidates for q of `shape` [B, S, H, K], each with why it cannot run; an empty reason means that it can."""
    device = torch.device(device)
    found = {"reference": ""}
    if device.type == "cpu":
        found["cpu_flash"] = ""
    elif device.type == "cuda":
        capability = libraries.capability(device)
        found["cudnn"] = libraries.missing_cudnn(shape, dtype, capability)
        found["flash"] = libraries.missing_flash(shape, dtype, capability)
    found["triton"] = attention_triton.missing(shape, dtype, device.type)
    if device.type != "cpu":
        found["gluon"] = attention_gluon.missing(shape, dtype, device.type)
    return found


def choose(
    shape: Sequence[int],
    dtype: torch.dtype,
    device_type: str,
    missing: Mapping[str, str],
    flash: str = "FlashAttention",
) -> tuple[str, str]:
    """(candidate, reason); pure. Never gluon, which no GPU has shown to be correct yet. flash: its name and version."""
    if device_type == "cpu":
        return "cpu_flash", "CPU tensors: PyTorch's tiled attention, which returns the log-sum-exp"
    if device_type != "cuda":
        return "reference", f"there is no attention kernel for {device_type} tensors"
    if dtype == torch.float64:
        return "reference", "float64 is for checking gradients"
    if not missing["cudnn"]:
        told = ["fastest published forward and backward on H200; not yet measured here"]
        if libraries.missing_dlse("cudnn", shape[-1], dtype, None):
            told.append(f"a gradient of lse is {_replacement(missing)}'s")
        if not missing["gluon"]:
            told.append("gluon by name alone, until a GPU has shown it to be correct")
        return "cudnn", "; ".join(told)
    if not missing["flash"]:
        return "flash", f"{flash}; {missing['cudnn']}"
    if not missing["triton"]:
        return "triton", f"{missing['cudnn']}; {missing['flash']}"
    return "reference", _why_none_is_fast(missing)


def _why_none_is_fast(missing: Mapping[str, str]) -> str:
    return "; ".join(missing[name] for name in ("cudnn", "flash", "triton") if missing.get(name))


def _replacement(missing: Mapping[str, str]) -> str:
    """The candidate of a call that the selected one cannot take."""
    return "reference" if missing["triton"] else "triton"


def selected(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> tuple[str, str]:
    """(candidate, reason) of a call with such a q, with OPENSORA_FAST_BACKEND obeyed."""
    return _selected(shape, dtype, torch.device(device))[0]


def _selected(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> tuple[tuple[str, str], Mapping[str, str]]:
    """The same, and what `missing_backends` says."""
    missing = missing_backends(shape, dtype, device)
    flash = libraries.flash_name(libraries.capability(device))
    return backend.select("attention", choose(shape, dtype, device.type, missing, flash), missing), missing


class Selection(NamedTuple):
    """The candidate of a call, and what `missing_backends` says of all: found once and passed on."""

    name: str
    missing: Mapping[str, str]


def _select(shape: Sequence[int], x: Tensor) -> Selection:
    """For q of `shape`, of the dtype and on the device of x."""
    choice, missing = _selected(shape, x.dtype, x.device)
    return Selection(backend.announced("attention", choice, {"all": _why_none_is_fast(missing)}), missing)


def _candidate(selection: Selection, q: Tensor, k: Tensor, *, with_dlse: bool = False) -> str:
    """Of one call: the selected one wherever it can. On nothing all but the reference fail."""
    name, missing = selection
    if not (q.numel() and k.numel()):
        return "reference"
    refused = ""
    if name == "cudnn" and 1 in (q.shape[1], k.shape[1]):
        refused = "cuDNN refuses a lone query or key, or has given NaN for it"
    elif with_dlse:
        refused = libraries.missing_dlse(name, q.shape[-1], q.dtype, libraries.capability(q.device))
    if not refused:
        return name
    reasons = "; ".join(filter(None, (refused, missing["triton"])))
    backend.warn_once(f"attention runs {_replacement(missing)}, not {name}: {reasons}")
    return _replacement(missing)


# By the selected candidate, for use within other ops.


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, wide: bool = False, selection: Selection | None = None
) -> tuple[Tensor, Tensor]:
    """(out [B, S, H, K], lse [B, H, S]), contiguous. wide: out in float32 from all but cudnn and flash."""
    name = _candidate(selection or _select(q.shape, q), q, k)
    if name == "reference":
        return attention_reference(q, k, v, scale, wide=wide)
    if name == "triton":
        return attention_triton.attention_forward(q, k, v, scale, wide=wide)
    if name == "gluon":
        out, lse = attention_gluon.attention_forward(q, k, v, scale, wide=wide)
    else:
        run = getattr(libraries, f"{name}_forward")
        out, lse = run(*_operands(name, wide, q, k, v), scale)
    finite_watch.observe("attention", name, "log-sum-exp", lse)
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    *,
    dlse: Tensor | None = None,
    wide: bool = False,
    selection: Selection | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), contiguous, by the lse and out that are given; `wide` as in the forward.

    With the lse and out of a longer row of keys: the share of these keys in dq, and their dk and dv.
    """
    name = _candidate(selection or _select(q.shape, q), q, k, with_dlse=dlse is not None)
    saved = (dout, q, k, v, out)
    if name == "reference":
        return attention_backward_reference(*saved, lse, scale, dlse=dlse, wide=wide)
    if name == "triton":
        return attention_triton.attention_backward(*saved, lse, scale, dlse=dlse, wide=wide)
    if name == "gluon":
        return attention_gluon.attention_backward(*saved, lse, scale, dlse=dlse, wide=wide)
    q, k, v, dout, out = _operands(name, wide, q, k, v, dout, out)
    run = getattr(libraries, f"{name}_backward")
    return run(dout, q, k, v, out, lse, scale, dlse=dlse)


def _operands(library: str, wide: bool, q: Tensor, *others: Tensor) -> list[Tensor]:
    """In one dtype, q's; only the CPU's library takes wide ones, and gives wide results for them."""
    dtype = torch.promote_types(q.dtype, torch.float32) if wide and library == "cpu_flash" else q.dtype
    return [x.to(dtype) for x in (q, *others)]


def forward_streams(
    streams: Sequence[Tensor], scales: Sequence[ScalePair], cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(out [B, S, H, K] of all streams, lse [B, H, S]) from their projections."""
    shape = _joint_shape(streams)
    selection = _select(shape, streams[0])
    if selection.name == "triton" and 0 not in shape and attention_triton.favours_fusion(*shape):
        return attention_triton.rope_attention_forward(streams, scales, cos, sin, eps)
    q_BSHK, k_BSHK, v_BSHK = _norm_and_rotate(streams, scales, cos, sin, eps)
    return forward(q_BSHK, k_BSHK, v_BSHK, q_BSHK.shape[-1] ** -0.5, selection=selection)


def backward_streams(
    dout_BSHK: Tensor,
    streams: Sequence[Tensor],
    scales: Sequence[ScalePair],
    cos: Tensor,
    sin: Tensor,
    out_BSHK: Tensor,
    lse_BHS: Tensor,
    eps: float,
) -> tuple[list[Tensor], list[ScalePair]]:
    """The gradient of every stream's projection and of every pair of scales; triton's at any length in one pass."""
    shape = _joint_shape(streams)
    selection = _select(shape, streams[0])
    if selection.name == "triton" and 0 not in shape:
        return attention_triton.rope_attention_backward(dout_BSHK, streams, scales, cos, sin, out_BSHK, lse_BHS, eps)
    q_BSHK, k_BSHK, v_BSHK = _norm_and_rotate(streams, scales, cos, sin, eps)
    saved = (dout_BSHK, q_BSHK, k_BSHK, v_BSHK, out_BSHK, lse_BHS)
    gradients = backward(*saved, q_BSHK.shape[-1] ** -0.5, selection=selection)
    d_streams, d_scales = qk_norm_rope.backward_streams(*gradients, streams, scales, cos, sin, eps, 1)
    observe_gradients(streams, d_scales, selection.name)
    return d_streams, d_scales


def observe_gradients(streams: Sequence[Tensor], d_scales: Sequence[ScalePair], name: str = "") -> None:
    """Let the finite watch see dq and dk of the streams: in the gradients of the scales, their sums over all tokens.

    name: of the candidate that gave them, the selected one if it is left out.
    """
    name = name or _select(_joint_shape(streams), streams[0]).name
    finite_watch.observe("attention", name, "gradients of q and k", *(x for pair in d_scales for x in pair))


def _joint_shape(streams: Sequence[Tensor]) -> tuple[int, int, int, int]:
    """[B, S, H, K] of q of all streams."""
    B, _, _, H, K = streams[0].shape
    return B, sum(stream.shape[1] for stream in streams), H, K


def _norm_and_rotate(
    streams: Sequence[Tensor], scales: Sequence[ScalePair], cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, S, H, K] of all streams; a lone stream's v is a view of its projection."""
    joint = len(streams) > 1
    q_BSHK, k_BSHK, v_BSHK = qk_norm_rope.forward_streams(streams, scales, cos, sin, eps, 1, with_v=joint)
    return q_BSHK, k_BSHK, v_BSHK if v_BSHK is not None else streams[0][:, :, 2]


def _pairs(scales: Sequence[Tensor]) -> list[ScalePair]:
    return list(zip(scales[::2], scales[1::2], strict=True))


# Op.


@torch.library.custom_op("opensora_fast::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return forward(q, k, v, scale)


@_attention.register_fake
def _(q, k, v, scale):
    return q.new_empty(q.shape), _empty_lse(q, q.shape)


def _empty_lse(x: Tensor, shape: Sequence[int]) -> Tensor:
    """For q of `shape`, on the device of x."""
    B, S, H, _ = shape
    return x.new_empty(B, H, S, dtype=torch.promote_types(x.dtype, torch.float32))


@torch.library.custom_op("opensora_fast::attention_backward", mutates_args=())
def _attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, dlse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return backward(dout, q, k, v, out, lse, scale, dlse=dlse)


@_attention_backward.register_fake
def _(dout, q, k, v, out, lse, scale, dlse):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_attention(ctx, inputs, output):
    q, k, v, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.set_materialize_grads(False)  # the gradient of lse is work, and mostly there is none


def _differentiate_attention(ctx, dout, dlse):
    q, k, v, out, lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    return *_attention_backward(dout, q, k, v, out, lse, ctx.scale, dlse), None


_attention.register_autograd(_differentiate_attention, setup_context=_save_attention)


# Op with norm and rotation. `scales` are (q, k) of the first stream, then of the second.


@torch.library.custom_op("opensora_fast::rope_attention", mutates_args=())
def _rope_attention(
    streams: list[Tensor], scales: list[Tensor], cos: Tensor, sin: Tensor, eps: float, split: bool
) -> list[Tensor]:
    """out [B, S, H, K], or with `split` each stream's part of it, contiguous; then lse."""
    out_BSHK, lse_BHS = forward_streams(streams, _pairs(scales), cos, sin, eps)
    return [*(_split(out_BSHK, streams) if split else [out_BSHK]), lse_BHS]


@_rope_attention.register_fake
def _(streams, scales, cos, sin, eps, split):
    B, S, H, K = _joint_shape(streams)
    tokens = [stream.shape[1] for stream in streams] if split else [S]
    outs = [streams[0].new_empty(B, T, H, K) for T in tokens]
    return [*outs, _empty_lse(streams[0], (B, S, H, K))]


def _split(joint_BSHK: Tensor, streams: Sequence[Tensor]) -> list[Tensor]:
    parts = joint_BSHK.split([stream.shape[1] for stream in streams], dim=1)
    return [part.clone(memory_format=torch.contiguous_format) for part in parts]


@torch.library.custom_op("opensora_fast::rope_attention_backward", mutates_args=())
def _rope_attention_backward(
    douts: list[Tensor],
    streams: list[Tensor],
    scales: list[Tensor],
    cos: Tensor,
    sin: Tensor,
    outs: list[Tensor],
    lse: Tensor,
    eps: float,
) -> list[Tensor]:
    dout_BSHK, out_BSHK = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1) for parts in (douts, outs))
    d_streams, d_pairs = backward_streams(dout_BSHK, streams, _pairs(scales), cos, sin, out_BSHK, lse, eps)
    return [*d_streams, *(d_scale for pair in d_pairs for d_scale in pair)]


@_rope_attention_backward.register_fake
def _(douts, streams, scales, cos, sin, outs, lse, eps):
    return [*(stream.new_empty(stream.shape) for stream in streams), *(torch.empty_like(scale) for scale in scales)]


def _save(ctx, inputs, output):
    streams, scales, cos, sin, ctx.eps, _ = inputs
    ctx.num_streams = len(streams)
    ctx.save_for_backward(cos, sin, *streams, *scales, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, gradients):
    cos, sin, *saved = ctx.saved_tensors
    num_inputs = 3 * ctx.num_streams
    inputs, (*outs, lse) = saved[:num_inputs], saved[num_inputs:]
    streams, scales = inputs[: ctx.num_streams], inputs[ctx.num_streams :]
    douts = [torch.zeros_like(out) if d is None else d for out, d in zip(outs, gradients[:-1], strict=True)]
    d_inputs = _rope_attention_backward(douts, streams, scales, cos, sin, outs, lse, ctx.eps)
    return d_inputs[: ctx.num_streams], d_inputs[ctx.num_streams :], None, None, None, None


_rope_attention.register_autograd(_differentiate, setup_context=_save)


# Public functions.


def attention(q_BSHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, *, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """(out [B, S, H, K], lse [B, H, S]): full attention of S queries to T keys, and its natural log-sum-exp.

    q: [B, S, H, K].  k, v: [B, T, H, K], T as S or not. One dtype of float32, bfloat16, float16 and float64, channels
    contiguous, K up to 256. scale: K^-1/2 by default. Differentiable in q, k and v through both results; keeps all
    five. ValueError names an argument outside of the envelope.
    """
    check_qkv(q_BSHK, k_BTHK, v_BTHK)
    return _attention(q_BSHK, k_BTHK, v_BTHK, check_scale(scale, q_BSHK.shape[-1]))


def check_scale(scale: float | None, K: int) -> float:
    """`scale`, by default that of K channels; ValueError where it is none."""
    if scale is None:
        return K**-0.5
    if isinstance(scale, Tensor):
        raise ValueError("scale is a tensor; it must be a number: call .item()")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale is {scale}; it must be above 0 and finite")
    return scale


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """ValueError names an argument outside of the envelope."""
    for name, x, tokens in (("q", q, "query tokens"), ("k", k, "key tokens"), ("v", v, "key tokens")):
        if x.dim() != 4:
            raise ValueError(f"{name} is {list(x.shape)}; it must be [batch, {tokens}, heads, channels]")
        if x.dtype not in launch.DTYPES or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} is {x.dtype} on {x.device}; it must be float32, bfloat16, float16 or float64, "
                f"and as q is, {q.dtype} on {q.device}"
            )
        if (x.shape[0], *x.shape[2:]) != (q.shape[0], *q.shape[2:]):
            B, _, H, K = q.shape
            raise ValueError(f"{name} is {list(x.shape)}; it must be [{B}, {tokens}, {H}, {K}], as q is")
        if x.stride(-1) != 1:
            raise ValueError(f"{name} has stride {x.stride(-1)} between channels; it must be 1: call .contiguous()")
    if v.shape != k.shape:
        raise ValueError(f"v is {list(v.shape)}; it must be {list(k.shape)}, as k is")
    if not MIN_HEAD_DIM <= q.shape[-1] <= MAX_HEAD_DIM:
        raise ValueError(f"q has {q.shape[-1]} channels in a head; it must be {MIN_HEAD_DIM} to {MAX_HEAD_DIM}")


def rope_attention(
    txt_qkv_BT3HK: Tensor,
    img_qkv_BT3HK: Tensor,
    txt_q_scale_K: Tensor,
    txt_k_scale_K: Tensor,
    img_q_scale_K: Tensor,
    img_k_scale_K: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float = 1e-6,
) -> Tensor:
    """Joint attention of text and video, text first: [B, S, H, K]. Normalises q and k, rotates, attends.

    qkv of each stream [B, T, 3, H, K], channels contiguous; the norms' weights [K]; cos and sin [S, K / 2] or
    [B, S, K / 2] in float32 (float64 for float64). Differentiable in all but the tables. ValueError names an argument
    outside of the envelope.
    """
    streams, scales = [txt_qkv_BT3HK, img_qkv_BT3HK], [txt_q_scale_K, txt_k_scale_K, img_q_scale_K, img_k_scale_K]
    return _attend(streams, scales, cos, sin, eps, split=False)[0]


def split_rope_attention(
    txt_qkv_BT3HK: Tensor,
    img_qkv_BT3HK: Tensor,
    txt_q_scale_K: Tensor,
    txt_k_scale_K: Tensor,
    img_q_scale_K: Tensor,
    img_k_scale_K: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """`rope_attention` as (text's part, video's part), each contiguous and kept once.

    A linear on a slice of the joint result would copy it, and keep the copy beside it.
    """
    streams, scales = [txt_qkv_BT3HK, img_qkv_BT3HK], [txt_q_scale_K, txt_k_scale_K, img_q_scale_K, img_k_scale_K]
    txt_BLHK, img_BNHK, _ = _attend(streams, scales, cos, sin, eps, split=True)
    return txt_BLHK, img_BNHK


def single_rope_attention(
    qkv_BS3HK: Tensor, q_scale_K: Tensor, k_scale_K: Tensor, cos: Tensor, sin: Tensor, *, eps: float = 1e-6
) -> Tensor:
    """The same for tokens that share one projection, as in the single blocks: [B, S, 3, H, K] to [B, S, H, K]."""
    return _attend([qkv_BS3HK], [q_scale_K, k_scale_K], cos, sin, eps, split=False)[0]


def _attend(
    streams: list[Tensor], scales: list[Tensor], cos: Tensor, sin: Tensor, eps: float, *, split: bool
) -> list[Tensor]:
    qk_norm_rope.check_streams(streams, _pairs(scales), cos, sin)
    return _rope_attention(streams, scales, cos, sin, eps, split)


def cost(B: int, S: int, H: int, K: int, dtype: torch.dtype, mode: str, *, key_tokens: int | None = None) -> Cost:
    """Cost of a call with S queries and as many keys, or `key_tokens`; the same with norm and rotation, v included.

    The backward counts its five products. Norm and rotation, and what a candidate computes again, are not counted.
    """
    T = S if key_tokens is None else key_tokens
    tensors = B * (S + T) * H * K * dtype.itemsize  # q and out, k and v: each pair has the tokens of both
    lse = B * H * S * torch.promote_types(dtype, torch.float32).itemsize
    product = 2 * B * H * S * T * K
    if mode == "forward":
        return Cost(flops=2 * product, bytes=2 * tensors + lse)
    return Cost(flops=5 * product, bytes=4 * tensors + lse)
