"""Norm, rotation and attention as one op: what a block keeps of its attention is its own qkv projection.

    q, k = rope(rms_norm(raw q, raw k));   S = q k^T / sqrt(K);   P = softmax(S);   out = P v;   lse = logsumexp(S)

Backward, after q and k have been made again from the projection (`qk_norm_rope`, one pass over memory):

    dP = dout v^T;   dS = P * (dP - rowsum(dout * out));   dq = dS k / sqrt(K);   dk = dS^T q / sqrt(K);   dv = P^T dout

and then the backward of norm and rotation. Attention is full (no mask), over all tokens of all streams, in the order
in which the streams are given: text, then video.

Shapes      B batch, T tokens of a stream, S tokens of all, H heads, K channels of a head, K2 = K / 2.
            qkv [B, T, 3, H, K] per stream;  scales [K];  cos, sin [S, K2] or [B, S, K2];  out [B, S, H, K], or
            one [B, T, H, K] per stream.
Numerics    q, k, v and out in the dtype of qkv, softmax and sums in float32 (float64 for float64).
Envelope    that of `qk_norm_rope`; cuDNN further wants bfloat16 or float16 and K a multiple of 8, at most 128.
Saved       every stream's qkv, the scales, the tables, out and lse: 4 U (U = one [B, S, H * K] tensor), where keeping
            q, k and v as well would be 7 U of a double block and 6 of a single one. The price is one more pass of norm
            and rotation, 2 % of the attention's time at 8,960 tokens (modelled, not measured).
Determinism as the backend's: the CPU one is bitwise repeatable.
Source      Open-Sora 2.0 (arXiv 2503.09642, section 3.2); FlashAttention-2 (arXiv 2307.08691) for the backward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from opensora_fast.kernels import backend, qk_norm_rope
from opensora_fast.kernels.cost import Cost

CUDNN_DTYPES = (torch.bfloat16, torch.float16)
CUDNN_MAX_HEAD_DIM = 128


# Reference: the formula, with the matrix of scores written out.


def attention_reference(q_BSHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor) -> tuple[Tensor, Tensor]:
    """(out [B, S, H, K], lse [B, H, S]); computed in float32 (float64 for float64)."""
    wide = torch.promote_types(q_BSHK.dtype, torch.float32)
    q_BHSK, k_BHSK, v_BHSK = (x.to(wide).transpose(1, 2) for x in (q_BSHK, k_BSHK, v_BSHK))
    scores_BHSS = q_BHSK @ k_BHSK.transpose(-1, -2) * q_BSHK.shape[-1] ** -0.5
    out_BHSK = scores_BHSS.softmax(dim=-1) @ v_BHSK
    return out_BHSK.transpose(1, 2).contiguous().to(q_BSHK.dtype), scores_BHSS.logsumexp(dim=-1)


def attention_backward_reference(
    dout_BSHK: Tensor, q_BSHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, out_BSHK: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), each [B, S, H, K] in the dtype of q."""
    wide, scale = torch.promote_types(q_BSHK.dtype, torch.float32), q_BSHK.shape[-1] ** -0.5
    dout, q, k, v, out = (x.to(wide).transpose(1, 2) for x in (dout_BSHK, q_BSHK, k_BSHK, v_BSHK, out_BSHK))
    p_BHSS = (q @ k.transpose(-1, -2) * scale).softmax(dim=-1)
    ds_BHSS = p_BHSS * (dout @ v.transpose(-1, -2) - (dout * out).sum(dim=-1, keepdim=True))
    gradients = (ds_BHSS @ k * scale, ds_BHSS.transpose(-1, -2) @ q * scale, p_BHSS.transpose(-1, -2) @ dout)
    dq, dk, dv = (x.transpose(1, 2).to(q_BSHK.dtype) for x in gradients)
    return dq, dk, dv


# Choice of the implementation.


def missing_backends(shape: Sequence[int], dtype: torch.dtype, device_type: str) -> dict[str, str]:
    """The backends for q of `shape` [B, S, H, K], each with why it cannot run; an empty reason means that it can."""
    if device_type == "cpu":
        return {"reference": "", "cpu_flash": ""}
    if device_type != "cuda":
        return {"reference": ""}
    K = shape[-1]
    cudnn = ""
    if not torch.backends.cudnn.is_available():
        cudnn = "this PyTorch has no cuDNN"
    elif dtype not in CUDNN_DTYPES:
        cudnn = f"cuDNN attention takes bfloat16 and float16, not {dtype}"
    elif K % 8 or K > CUDNN_MAX_HEAD_DIM:
        cudnn = f"cuDNN attention takes heads of a multiple of 8 channels up to {CUDNN_MAX_HEAD_DIM}, not {K}"
    return {"reference": "", "cudnn": cudnn}


def choose(shape: Sequence[int], dtype: torch.dtype, device_type: str, missing: Mapping[str, str]) -> tuple[str, str]:
    """(backend, reason); pure. cuDNN by name: PyTorch's own order would take a kernel half as fast on Hopper."""
    if device_type == "cpu":
        return "cpu_flash", "CPU tensors: PyTorch's tiled attention, which returns the log-sum-exp"
    if device_type != "cuda":
        return "reference", f"there is no attention kernel for {device_type} tensors"
    if missing["cudnn"]:
        return "reference", missing["cudnn"]
    return "cudnn", "fastest published forward and backward on H200; not yet measured here"


def selected(shape: Sequence[int], dtype: torch.dtype, device_type: str) -> tuple[str, str]:
    """(backend, reason) of a call with such a q, with OPENSORA_FAST_BACKEND obeyed."""
    missing = missing_backends(shape, dtype, device_type)
    return backend.select("attention", choose(shape, dtype, device_type, missing), missing)


def _backend(q_BSHK: Tensor) -> str:
    shape, dtype, device_type = q_BSHK.shape, q_BSHK.dtype, q_BSHK.device.type
    missing = missing_backends(shape, dtype, device_type)
    return backend.announced("attention", selected(shape, dtype, device_type), missing)


# Launchers. The libraries want heads before positions; they take the strides and copy nothing.


def _forward(q_BSHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor) -> tuple[Tensor, Tensor]:
    name = _backend(q_BSHK)
    if name == "reference" or not q_BSHK.numel():  # the libraries fail on what is empty
        return attention_reference(q_BSHK, k_BSHK, v_BSHK)
    q, k, v = (x.transpose(1, 2) for x in (q_BSHK, k_BSHK, v_BSHK))
    if name == "cpu_flash":
        out_BHSK, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    else:
        out_BHSK, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:2]
    return out_BHSK.transpose(1, 2).contiguous(), lse.contiguous()


def _backward(
    dout_BSHK: Tensor, q_BSHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, out_BSHK: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    name = _backend(q_BSHK)
    if name == "reference" or not q_BSHK.numel():
        return attention_backward_reference(dout_BSHK, q_BSHK, k_BSHK, v_BSHK, out_BSHK)
    # cuDNN's plans are cached by the strides of q, k and v: dout may only have the one layout.
    dout_BSHK = dout_BSHK.contiguous()
    dout, q, k, v, out = (x.transpose(1, 2) for x in (dout_BSHK, q_BSHK, k_BSHK, v_BSHK, out_BSHK))
    if name == "cpu_flash":
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, False
        )
    else:
        S = q.shape[2]
        unused = torch.zeros((), dtype=torch.int64, device=q.device)  # the dropout's seed and offset
        gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            dout, q, k, v, out, lse, unused, unused, None, None, None, S, S, 0.0, False
        )
    dq, dk, dv = (x.transpose(1, 2) for x in gradients)
    return dq, dk, dv


def _norm_and_rotate(
    streams: list[Tensor], scales: list[Tensor], cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, S, H, K] of all streams; a lone stream's v is a view of its projection."""
    joint = len(streams) > 1
    q_BSHK, k_BSHK, v_BSHK = qk_norm_rope.forward_streams(streams, _pairs(scales), cos, sin, eps, 1, with_v=joint)
    return q_BSHK, k_BSHK, v_BSHK if v_BSHK is not None else streams[0][:, :, 2]


def _pairs(scales: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(scales[::2], scales[1::2], strict=True))


# Op. `scales` are (q, k) of the first stream, then of the second.


@torch.library.custom_op("opensora_fast::rope_attention", mutates_args=())
def _rope_attention(
    streams: list[Tensor], scales: list[Tensor], cos: Tensor, sin: Tensor, eps: float, split: bool
) -> list[Tensor]:
    """out [B, S, H, K], or with `split` each stream's part of it, contiguous; then lse."""
    out_BSHK, lse = _forward(*_norm_and_rotate(streams, scales, cos, sin, eps))
    return [*(_split(out_BSHK, streams) if split else [out_BSHK]), lse]


@_rope_attention.register_fake
def _(streams, scales, cos, sin, eps, split):
    B, _, _, H, K = streams[0].shape
    q_BSHK = streams[0].new_empty(B, sum(stream.shape[1] for stream in streams), H, K)
    if _backend(q_BSHK) == "reference" or not q_BSHK.numel():
        wide = torch.promote_types(q_BSHK.dtype, torch.float32)
        out_BSHK, lse = torch.empty_like(q_BSHK), q_BSHK.new_empty(B, H, q_BSHK.shape[1], dtype=wide)
    else:
        out_BSHK, lse = _forward(q_BSHK, q_BSHK, q_BSHK)
    return [*(_split(out_BSHK, streams) if split else [out_BSHK]), lse]


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
    q_BSHK, k_BSHK, v_BSHK = _norm_and_rotate(streams, scales, cos, sin, eps)
    dout_BSHK, out_BSHK = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1) for parts in (douts, outs))
    dq, dk, dv = _backward(dout_BSHK, q_BSHK, k_BSHK, v_BSHK, out_BSHK, lse)
    d_streams, d_pairs = qk_norm_rope.backward_streams(dq, dk, dv, streams, _pairs(scales), cos, sin, eps, 1)
    return [*d_streams, *(d_scale for pair in d_pairs for d_scale in pair)]


@_rope_attention_backward.register_fake
def _(douts, streams, scales, cos, sin, outs, lse, eps):
    return [*(stream.new_empty(stream.shape) for stream in streams), *(torch.empty_like(scale) for scale in scales)]


def _save(ctx, inputs, output):
    streams, scales, cos, sin, ctx.eps, _ = inputs
    ctx.num_streams = len(streams)
    ctx.save_for_backward(cos, sin, *streams, *scales, *output)


def _differentiate(ctx, gradients):
    cos, sin, *saved = ctx.saved_tensors
    num_inputs = 3 * ctx.num_streams
    inputs, (*outs, lse) = saved[:num_inputs], saved[num_inputs:]
    streams, scales = inputs[: ctx.num_streams], inputs[ctx.num_streams :]
    d_inputs = _rope_attention_backward(gradients[:-1], streams, scales, cos, sin, outs, lse, ctx.eps)
    return d_inputs[: ctx.num_streams], d_inputs[ctx.num_streams :], None, None, None, None


_rope_attention.register_autograd(_differentiate, setup_context=_save)


# Public functions.


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


def cost(B: int, S: int, H: int, K: int, dtype: torch.dtype, mode: str) -> Cost:
    """Cost of `rope_attention`, v included; the backward counts its five products and the norm and rotation twice."""
    tensor = B * S * H * K
    lse = B * H * S * torch.promote_types(dtype, torch.float32).itemsize
    product = 2 * B * H * S * S * K
    if mode == "forward":
        return Cost(flops=2 * product, bytes=4 * tensor * dtype.itemsize + lse)
    return Cost(flops=5 * product, bytes=8 * tensor * dtype.itemsize + lse)
