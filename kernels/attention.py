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
            (`attention_libraries`); where there is no room for them (cuDNN: K over 120) that call's backward is
            triton's. Without a gradient of lse none of this happens.
Saved       attention: q, k, v, out, lse. rope_attention: every stream's qkv, the scales, the tables, out and lse, 4 U
            (U = one [B, S, H * K] tensor), where keeping q, k and v as well would be 7 U of a double block and 6 of a
            single one. The price is one more pass of norm and rotation, 2 % of the attention's time at 8,960 tokens
            (modelled, not measured).
Determinism bitwise equal over runs: reference, cpu_flash, triton, and every forward. Not the backward of cudnn, flash
            and gluon, which add dq in any order; under `torch.use_deterministic_algorithms` cudnn is passed over and
            flash takes its slower, ordered form.
Source      Open-Sora 2.0 (arXiv 2503.09642, section 3.2); FlashAttention-2 (arXiv 2307.08691) for the backward.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

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


def missing_backends(shape: Sequence[int], dtype: torch.dtype, device_type: str) -> dict[str, str]:
    """The candidates for q of `shape` [B, S, H, K], each with why it cannot run; an empty reason means that it can."""
    found = {"reference": ""}
    if device_type == "cpu":
        found["cpu_flash"] = ""
    elif device_type == "cuda":
        device = libraries.capability()
        found["cudnn"] = libraries.missing_cudnn(shape, dtype, device)
        found["flash"] = libraries.missing_flash(shape, dtype, device)
    found["triton"] = attention_triton.missing(shape, dtype, device_type)
    if device_type != "cpu":
        found["gluon"] = attention_gluon.missing(shape, dtype, device_type)
    return found


def choose(shape: Sequence[int], dtype: torch.dtype, device_type: str, missing: Mapping[str, str]) -> tuple[str, str]:
    """(candidate, reason); pure. Never gluon, which no GPU has shown to be correct yet."""
    if device_type == "cpu":
        return "cpu_flash", "CPU tensors: PyTorch's tiled attention, which returns the log-sum-exp"
    if device_type != "cuda":
        return "reference", f"there is no attention kernel for {device_type} tensors"
    if dtype == torch.float64:
        return "reference", "float64 is for checking gradients"
    if not missing["cudnn"]:
        told = ["fastest published forward and backward on H200; not yet measured here"]
        of_lse, _ = choose_backward("cudnn", shape[-1], missing, with_dlse=True)
        if of_lse != "cudnn":
            told.append(f"a gradient of lse is {of_lse}'s")
        if not missing["gluon"]:
            told.append("gluon by name alone, until a GPU has shown it to be correct")
        return "cudnn", "; ".join(told)
    if not missing["flash"]:
        return "flash", f"{libraries.flash_name(libraries.capability())}; {missing['cudnn']}"
    if not missing["triton"]:
        return "triton", f"{missing['cudnn']}; {missing['flash']}"
    return "reference", missing["triton"]


def choose_backward(name: str, K: int, missing: Mapping[str, str], *, with_dlse: bool) -> tuple[str, str]:
    """(candidate, reason) of the backward of a call whose forward runs on `name`; the same one wherever it can."""
    refused = libraries.missing_dlse(name, K, libraries.capability()) if with_dlse else ""
    if not refused:
        return name, "as the forward"
    return ("reference", missing["triton"]) if missing["triton"] else ("triton", refused)


def selected(shape: Sequence[int], dtype: torch.dtype, device_type: str) -> tuple[str, str]:
    """(candidate, reason) of a call with such a q, with OPENSORA_FAST_BACKEND obeyed."""
    missing = missing_backends(shape, dtype, device_type)
    return backend.select("attention", choose(shape, dtype, device_type, missing), missing)


def _backend(shape: Sequence[int], x: Tensor) -> str:
    """For q of `shape`, of the dtype and on the device of x."""
    missing = missing_backends(shape, x.dtype, x.device.type)
    return backend.announced("attention", selected(shape, x.dtype, x.device.type), missing)


def _backward_backend(q_BSHK: Tensor, *, with_dlse: bool) -> str:
    missing = missing_backends(q_BSHK.shape, q_BSHK.dtype, q_BSHK.device.type)
    choice = choose_backward(_backend(q_BSHK.shape, q_BSHK), q_BSHK.shape[-1], missing, with_dlse=with_dlse)
    return backend.announced("attention", choice, missing)


# By the selected candidate, for use within other ops.


def forward(
    q_BSHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, scale: float, *, wide: bool = False
) -> tuple[Tensor, Tensor]:
    """(out [B, S, H, K], lse [B, H, S]), contiguous. wide: out in float32 from all but cudnn and flash."""
    name = _backend(q_BSHK.shape, q_BSHK)
    if _is_for_the_reference(name, q_BSHK, k_BTHK):
        return attention_reference(q_BSHK, k_BTHK, v_BTHK, scale, wide=wide)
    if name == "triton":
        return attention_triton.attention_forward(q_BSHK, k_BTHK, v_BTHK, scale, wide=wide)
    if name == "gluon":
        return attention_gluon.attention_forward(q_BSHK, k_BTHK, v_BTHK, scale, wide=wide)
    run = getattr(libraries, f"{name}_forward")
    out_BSHK, lse_BHS = run(*_operands(name, wide, q_BSHK, k_BTHK, v_BTHK), scale)
    finite_watch.observe("attention", name, "log-sum-exp", lse_BHS)
    return out_BSHK, lse_BHS


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
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), contiguous, by the lse and out that are given; `wide` as in the forward.

    With the lse and out of a longer row of keys: the share of these keys in dq, and their dk and dv.
    """
    name = _backward_backend(q, with_dlse=dlse is not None)
    saved = (dout, q, k, v, out)
    if _is_for_the_reference(name, q, k):
        return attention_backward_reference(*saved, lse, scale, dlse=dlse, wide=wide)
    if name == "triton":
        return attention_triton.attention_backward(*saved, lse, scale, dlse=dlse, wide=wide)
    if name == "gluon":
        return attention_gluon.attention_backward(*saved, lse, scale, dlse=dlse, wide=wide)
    q, k, v, dout, out = _operands(name, wide, q, k, v, dout, out)
    run = getattr(libraries, f"{name}_backward")
    return run(dout, q, k, v, out, lse, scale, dlse=dlse)


def _is_for_the_reference(name: str, q: Tensor, k: Tensor) -> bool:
    """Also of nothing, which the others fail on; and of a lone key or query, where cuDNN refuses or has given NaN."""
    return name == "reference" or not (q.numel() and k.numel()) or (name == "cudnn" and 1 in (q.shape[1], k.shape[1]))


def _operands(library: str, wide: bool, q: Tensor, *others: Tensor) -> list[Tensor]:
    """In one dtype, q's; only the CPU's library takes wide ones, and gives wide results for them."""
    dtype = torch.promote_types(q.dtype, torch.float32) if wide and library == "cpu_flash" else q.dtype
    return [x.to(dtype) for x in (q, *others)]


def forward_streams(
    streams: Sequence[Tensor], scales: Sequence[ScalePair], cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(out [B, S, H, K] of all streams, lse [B, H, S]) from their projections."""
    if _takes_streams(streams) and attention_triton.favours_fusion(*_joint_shape(streams)):
        return attention_triton.rope_attention_forward(streams, scales, cos, sin, eps)
    q_BSHK, k_BSHK, v_BSHK = _norm_and_rotate(streams, scales, cos, sin, eps)
    return forward(q_BSHK, k_BSHK, v_BSHK, q_BSHK.shape[-1] ** -0.5)


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
    """The gradient of every stream's projection and of every pair of scales."""
    if _takes_streams(streams):
        return attention_triton.rope_attention_backward(dout_BSHK, streams, scales, cos, sin, out_BSHK, lse_BHS, eps)
    q_BSHK, k_BSHK, v_BSHK = _norm_and_rotate(streams, scales, cos, sin, eps)
    gradients = backward(dout_BSHK, q_BSHK, k_BSHK, v_BSHK, out_BSHK, lse_BHS, q_BSHK.shape[-1] ** -0.5)
    d_streams, d_scales = qk_norm_rope.backward_streams(*gradients, streams, scales, cos, sin, eps, 1)
    observe_gradients(streams, d_scales)
    return d_streams, d_scales


def observe_gradients(streams: Sequence[Tensor], d_scales: Sequence[ScalePair]) -> None:
    """Let the finite watch see dq and dk of the streams: in the gradients of the scales, their sums over all tokens."""
    name = _backend(_joint_shape(streams), streams[0])
    finite_watch.observe("attention", name, "gradients of q and k", *(x for pair in d_scales for x in pair))


def _takes_streams(streams: Sequence[Tensor]) -> bool:
    """Whether the candidate can apply norm and rotation itself; its backward then does so at any length."""
    shape = _joint_shape(streams)
    return 0 not in shape and _backend(shape, streams[0]) == "triton"


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
    _check(q_BSHK, k_BTHK, v_BTHK)
    scale = q_BSHK.shape[-1] ** -0.5 if scale is None else scale
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale is {scale}; it must be above 0 and finite")
    return _attention(q_BSHK, k_BTHK, v_BTHK, scale)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
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
