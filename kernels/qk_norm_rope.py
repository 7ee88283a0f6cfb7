"""RMS norm of every head of q and k, and rotation by position, from the projections into joint text-and-video buffers.

For a head x = (a | b) of K channels, a and b its halves, and the angles of its token (one for each pair a_i, b_i):

    rstd = (mean_K(x^2) + eps)^-1/2;   n = x * rstd;   (a' | b') = n * scale
    y    = (a' cos - b' sin | b' cos + a' sin);   v is copied

Backward, with dy = (da | db):

    dn     = (da cos + db sin | db cos - da sin)             the rotation by the opposite angle, in front of the scale
    dscale = sum over B, T, H of dn * n;   g = dn * scale;   dx = rstd * (g - n * mean_K(g * n));   dv is copied

Nothing is divided by a scale: a scale of 0 has its gradient.

Shapes      B batch; T tokens of a stream; S tokens of all streams, in their order (text, video); H heads; K channels
            of a head; K2 = K / 2; G head groups.  qkv [B, T, 3, H, K] per stream;  scales [K];  cos, sin [S, K2] or
            [B, S, K2];  q, k, v [B, S, H, K], or [G, B, S, H / G, K] for G > 1, where group g is what an all-to-all
            over heads sends to rank g.
Numerics    float32, bfloat16, float16 in and out; the tables and all arithmetic in float32, rounded once at the end.
            float64 computes in float64 and has float64 tables.
Envelope    K even, 2 to 256, a power of two or not; G divides H; scales and qkv of one dtype, all on one device. qkv
            has any strides with contiguous channels: a slice of a wider projection is not copied. The tables have any
            batch and token stride. Gradients whose strides differ, or whose channels lie apart, are copied first.
Traffic     elements of [B, S, H, K]: forward q, k (and v) read and written; backward q, k and their gradients (and
            v's) read, the gradient of qkv, all three slots, written. Memory bound -> the target is bytes/s (cost()).
Determinism the scales' gradients are reduced in two stages, without atomics: bitwise equal over runs.
Saved       the streams' qkv, the scales and the tables; rstd is computed again.
Source      Stable Diffusion 3 (arXiv 2403.03206, section 5.3.2) for the norm, RoFormer (arXiv 2104.09864) for the
            rotation. One launch for each stream instead of norm, rotation, and two concatenations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opensora_fast.kernels import backend, launch
from opensora_fast.kernels.cost import Cost
from opensora_fast.kernels.launch import jit, tl

MIN_HEAD_DIM, MAX_HEAD_DIM = 2, 256
ScalePair = tuple[Tensor, Tensor]  # of q and of k


# Reference: float32 (float64 for float64). Its autograd is the oracle of the backward.

# Elements of q and k that a thread takes at once, so that temporaries stay in its cache. At 2,048 tokens of 24 heads
# 2^18 is as good within noise, 2^16 30 % slower, all at once 60 % slower (one x86 core).
CPU_PIECE = 1 << 19


def qk_norm_rope_reference(
    streams: Sequence[Tensor],
    scales: Sequence[ScalePair],
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
    head_groups: int = 1,
    with_v: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(q, k, v) of all streams, v None without `with_v`."""
    K2 = cos.shape[-1]
    q, k, v = _empty_outputs(streams, head_groups, with_v)
    wide_scales = _wide_scales(scales)
    for index, where, tokens in _pieces(streams):
        cos_T, sin_T = _tables(cos, sin, tokens)
        wide = _widened(streams[index][:, where, :2])
        first, second = (wide * _rstd(wide, eps) * wide_scales[index]).chunk(2, dim=-1)
        halves = (
            torch.addcmul(first * cos_T, second, sin_T, value=-1),
            torch.addcmul(second * cos_T, first, sin_T),
        )
        for slot, out in enumerate((q, k)):
            for channels, half in zip((slice(None, K2), slice(K2, None)), halves, strict=True):
                _group_heads(out, tokens)[..., channels] = _split_heads(half[:, :, slot], head_groups)
        if v is not None:
            _group_heads(v, tokens)[...] = _split_heads(streams[index][:, where, 2], head_groups)
    return q, k, v


def qk_norm_rope_backward_reference(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor | None,
    streams: Sequence[Tensor],
    scales: Sequence[ScalePair],
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
    head_groups: int = 1,
) -> tuple[list[Tensor], list[ScalePair]]:
    """The gradient of every stream's qkv, contiguous, v's part zero without `dv`; and of every pair of scales."""
    d_streams = [torch.empty(stream.shape, dtype=stream.dtype, device=stream.device) for stream in streams]
    wide_scales = _wide_scales(scales)
    d_scales = [torch.zeros_like(scale_2K) for scale_2K in wide_scales]
    for index, where, tokens in _pieces(streams):
        cos_T, sin_T = (table.squeeze(-3) for table in _tables(cos, sin, tokens))
        d_stream = d_streams[index][:, where]
        for slot, dy in enumerate((dq, dk)):
            scale_K = wide_scales[index][slot, 0]
            first, second = _widened(_join_heads(_group_heads(dy, tokens))).chunk(2, dim=-1)
            dn = torch.cat(
                (
                    torch.addcmul(first * cos_T, second, sin_T),
                    torch.addcmul(second * cos_T, first, sin_T, value=-1),
                ),
                dim=-1,
            )
            wide = _widened(streams[index][:, where, slot])
            rstd = _rstd(wide, eps)
            n = wide * rstd
            product = dn * n
            d_scales[index][slot, 0] += _sum_of_rows(product)
            mean = (product @ scale_K)[..., None] / scale_K.shape[0]
            d_stream[:, :, slot] = torch.addcmul(dn.mul_(scale_K), n, mean, value=-1).mul_(rstd)
        d_stream[:, :, 2] = 0 if dv is None else _join_heads(_group_heads(dv, tokens))
    return d_streams, [
        (d_scale_2K[0, 0].to(pair[0].dtype, copy=True), d_scale_2K[1, 0].to(pair[1].dtype, copy=True))
        for d_scale_2K, pair in zip(d_scales, scales, strict=True)
    ]


def _pieces(streams: Sequence[Tensor]) -> Iterator[tuple[int, slice, slice]]:
    """(stream, its tokens, their places among those of all) of blocks that together are all tokens."""
    for index, (stream, tokens) in enumerate(zip(streams, _token_ranges(streams), strict=True)):
        B, T, _, H, K = stream.shape
        on_cpu = stream.device.type == "cpu"
        step = max(1, CPU_PIECE * torch.get_num_threads() // max(1, 2 * B * H * K)) if on_cpu else max(1, T)
        for start in range(0, T, step):
            stop = min(start + step, T)
            yield index, slice(start, stop), slice(tokens.start + start, tokens.start + stop)


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _wide_scales(scales: Sequence[ScalePair]) -> list[Tensor]:
    """Of each stream [2, 1, K]."""
    return [_widened(torch.stack(tuple(pair)))[:, None] for pair in scales]


def _tables(cos: Tensor, sin: Tensor, tokens: slice) -> tuple[Tensor, Tensor]:
    """The stream's rows, to be broadcast over [B, T, 2, H, K2]."""
    cos_T, sin_T = (table[..., tokens, None, None, :] for table in (cos, sin))
    return cos_T, sin_T


def _rstd(wide: Tensor, eps: float) -> Tensor:
    """[..., 1]. The norm is one pass over memory where squares and their mean are three."""
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return (norm.square() / wide.shape[-1] + eps).rsqrt()


def _sum_of_rows(x: Tensor) -> Tensor:
    """[..., K] -> [K], as a product with ones: many times the speed of `sum` on CPU."""
    rows = x.reshape(-1, x.shape[-1])
    return rows.new_ones(rows.shape[0]) @ rows


def _token_ranges(streams: Sequence[Tensor]) -> list[slice]:
    """Where each stream's tokens lie among those of all."""
    ranges, start = [], 0
    for stream in streams:
        ranges.append(slice(start, start + stream.shape[1]))
        start += stream.shape[1]
    return ranges


def _empty_outputs(streams: Sequence[Tensor], head_groups: int, with_v: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    B, _, _, H, K = streams[0].shape
    S = sum(stream.shape[1] for stream in streams)
    shape = (B, S, H, K) if head_groups == 1 else (head_groups, B, S, H // head_groups, K)

    def empty():
        return torch.empty(shape, dtype=streams[0].dtype, device=streams[0].device)

    return empty(), empty(), empty() if with_v else None


def _group_heads(joint: Tensor, tokens: slice) -> Tensor:
    """A joint tensor's tokens as [G, B, T, H / G, K]."""
    return (joint if joint.dim() == 5 else joint[None])[:, :, tokens]


def _split_heads(x_BTHK: Tensor, head_groups: int) -> Tensor:
    """The same as [G, B, T, H / G, K]."""
    return x_BTHK.unflatten(2, (head_groups, -1)).movedim(2, 0) if head_groups > 1 else x_BTHK[None]


def _join_heads(x_GBTHK: Tensor) -> Tensor:
    """The inverse."""
    return x_GBTHK.movedim(0, 2).flatten(2, 3) if x_GBTHK.shape[0] > 1 else x_GBTHK[0]


# Tile choice.


@dataclass(frozen=True)
class Tile:
    """A program holds `tokens` x `heads` rows of `block_k2` channel pairs, for q, k and v alike.

    steps: so many tiles, one after the other, share one partial sum of the scales' gradients.
    """

    tokens: int
    heads: int
    block_k2: int
    num_warps: int
    steps: int


def choose_tile(tokens: int, heads_per_group: int, K: int, element_bytes: int) -> Tile:
    """One 16-byte access per thread and half of a head; `heads` divides a group, so that a program is in one group.

    Modelled, not yet measured on a GPU: 4 warps keep 6 loads of 16 bytes in flight per thread, a few times what the
    latency of memory asks for; up to 8 heads that lie side by side share the rows of the tables; after 8 steps the
    partial sums are below 1 % of the traffic, and thousands of programs are left to balance. Fewer steps, a power of
    two, where that covers all tokens of the stream.
    """
    num_warps = 4
    block_k2 = launch.power_of_two(K // 2)
    rows = max(1, num_warps * 32 * 16 // element_bytes // block_k2)
    heads = min(heads_per_group & -heads_per_group, rows, 8)
    steps = min(8, launch.power_of_two(-(-tokens // (rows // heads))))
    return Tile(tokens=rows // heads, heads=heads, block_k2=block_k2, num_warps=num_warps, steps=steps)


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
    return "triton", "one pass over memory for each stream"


def selected(shape: Sequence[int], dtype: torch.dtype, device_type: str) -> tuple[str, str]:
    """(backend, reason) of a call on such a qkv, with OPENSORA_FAST_BACKEND obeyed."""
    missing = missing_backends(dtype, device_type)
    return backend.select("qk_norm_rope", choose(shape, dtype, device_type, missing), missing)


def _backend(qkv: Tensor) -> str:
    dtype, device_type = qkv.dtype, qkv.device.type
    return backend.announced(
        "qk_norm_rope", selected(qkv.shape, dtype, device_type), missing_backends(dtype, device_type)
    )


# Device code. Rows are (token, head), heads fastest; a row's halves are two tiles, so that pairs meet in one thread.
# What rows share, scales and tables, is loaded by each of them: the cache answers, and no layout is converted.
# Indices are divided in 32 bits, which is several times faster, and multiplied by strides in 64.


@jit
def _forward_kernel(
    qkv_ptr,
    q_scale_ptr,
    k_scale_ptr,
    cos_ptr,
    sin_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    tokens,
    first_token,
    head_blocks,
    heads_per_group,
    qkv_stride_b,
    qkv_stride_t,
    qkv_stride_slot,
    qkv_stride_h,
    table_stride_b,
    table_stride_t,
    out_stride_g,
    out_stride_b,
    out_stride_t,
    out_stride_h,
    eps,
    K2: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_K2: tl.constexpr,
    WITH_V: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    program = tl.program_id(0)
    block = program // head_blocks
    token_blocks = tl.cdiv(tokens, TOKENS)
    first_head = program % head_blocks * HEADS
    group = (first_head // heads_per_group).to(tl.int64)
    batch = (block // token_blocks).to(tl.int64)
    row = tl.arange(0, TOKENS * HEADS)[:, None]
    token = (block % token_blocks).to(tl.int64) * TOKENS + row // HEADS  # [rows, 1]
    head = first_head.to(tl.int64) + row % HEADS
    k2 = tl.arange(0, BLOCK_K2)[None, :]
    mask = (token < tokens) & (k2 < K2)  # [rows, K2]

    qkv_offset = batch * qkv_stride_b + token * qkv_stride_t + head * qkv_stride_h + k2
    table_offset = batch * table_stride_b + (first_token + token) * table_stride_t + k2
    out_offset = batch * out_stride_b + (first_token + token) * out_stride_t + k2
    out_offset += group * out_stride_g + (head - group * heads_per_group) * out_stride_h

    q_first = tl.load(qkv_ptr + qkv_offset, mask=mask, other=0)
    q_second = tl.load(qkv_ptr + qkv_offset + K2, mask=mask, other=0)
    k_first = tl.load(qkv_ptr + qkv_offset + qkv_stride_slot, mask=mask, other=0)
    k_second = tl.load(qkv_ptr + qkv_offset + qkv_stride_slot + K2, mask=mask, other=0)
    if WITH_V:
        v_first = tl.load(qkv_ptr + qkv_offset + 2 * qkv_stride_slot, mask=mask)
        v_second = tl.load(qkv_ptr + qkv_offset + 2 * qkv_stride_slot + K2, mask=mask)
    cos = tl.load(cos_ptr + table_offset, mask=mask, other=0)
    sin = tl.load(sin_ptr + table_offset, mask=mask, other=0)

    q_first, q_second = norm_and_rotate(q_first, q_second, q_scale_ptr, row * 0 + k2, mask, cos, sin, eps, K2, COMPUTE)
    tl.store(q_ptr + out_offset, q_first, mask=mask)
    tl.store(q_ptr + out_offset + K2, q_second, mask=mask)
    k_first, k_second = norm_and_rotate(k_first, k_second, k_scale_ptr, row * 0 + k2, mask, cos, sin, eps, K2, COMPUTE)
    tl.store(k_ptr + out_offset, k_first, mask=mask)
    tl.store(k_ptr + out_offset + K2, k_second, mask=mask)
    if WITH_V:
        tl.store(v_ptr + out_offset, v_first, mask=mask)
        tl.store(v_ptr + out_offset + K2, v_second, mask=mask)


@jit
def norm_and_rotate(first, second, scale_ptr, channel, mask, cos, sin, eps, K2: tl.constexpr, COMPUTE: tl.constexpr):
    first, second = first.to(COMPUTE), second.to(COMPUTE)
    rstd = tl.rsqrt(tl.sum(first * first + second * second, axis=1, keep_dims=True) / (2 * K2) + eps)  # [rows, 1]
    first = first * rstd * tl.load(scale_ptr + channel, mask=mask, other=0).to(COMPUTE)
    second = second * rstd * tl.load(scale_ptr + channel + K2, mask=mask, other=0).to(COMPUTE)
    return first * cos - second * sin, second * cos + first * sin


@jit
def _backward_kernel(
    dq_ptr,
    dk_ptr,
    dv_ptr,
    qkv_ptr,
    q_scale_ptr,
    k_scale_ptr,
    cos_ptr,
    sin_ptr,
    d_qkv_ptr,
    partial_ptr,
    tokens,
    first_token,
    head_blocks,
    heads_per_group,
    dy_stride_g,
    dy_stride_b,
    dy_stride_t,
    dy_stride_h,
    qkv_stride_b,
    qkv_stride_t,
    qkv_stride_slot,
    qkv_stride_h,
    table_stride_b,
    table_stride_t,
    d_qkv_stride_b,
    d_qkv_stride_t,
    d_qkv_stride_slot,
    eps,
    K2: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_K2: tl.constexpr,
    STEPS: tl.constexpr,
    WITH_V: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    program = tl.program_id(0)
    block = program // head_blocks
    token_blocks = tl.cdiv(tokens, TOKENS * STEPS)
    first_head = program % head_blocks * HEADS
    group = (first_head // heads_per_group).to(tl.int64)
    batch = (block // token_blocks).to(tl.int64)
    row = tl.arange(0, TOKENS * HEADS)[:, None]
    first_row_token = (block % token_blocks).to(tl.int64) * (TOKENS * STEPS) + row // HEADS  # [rows, 1]
    head = first_head.to(tl.int64) + row % HEADS
    k2 = tl.arange(0, BLOCK_K2)[None, :]
    channel = row * 0 + k2  # [rows, K2]

    d_q_scale_first = tl.zeros((TOKENS * HEADS, BLOCK_K2), COMPUTE)
    d_q_scale_second = tl.zeros((TOKENS * HEADS, BLOCK_K2), COMPUTE)
    d_k_scale_first = tl.zeros((TOKENS * HEADS, BLOCK_K2), COMPUTE)
    d_k_scale_second = tl.zeros((TOKENS * HEADS, BLOCK_K2), COMPUTE)
    for step in range(STEPS):
        token = first_row_token + step * TOKENS
        mask = (token < tokens) & (k2 < K2)  # [rows, K2]
        dy_offset = batch * dy_stride_b + (first_token + token) * dy_stride_t + k2
        dy_offset += group * dy_stride_g + (head - group * heads_per_group) * dy_stride_h
        qkv_offset = batch * qkv_stride_b + token * qkv_stride_t + head * qkv_stride_h + k2
        table_offset = batch * table_stride_b + (first_token + token) * table_stride_t + k2
        d_qkv_offset = batch * d_qkv_stride_b + token * d_qkv_stride_t + head * (2 * K2) + k2

        cos = tl.load(cos_ptr + table_offset, mask=mask, other=0)
        sin = tl.load(sin_ptr + table_offset, mask=mask, other=0)
        dq_first = tl.load(dq_ptr + dy_offset, mask=mask, other=0)
        dq_second = tl.load(dq_ptr + dy_offset + K2, mask=mask, other=0)
        q_first = tl.load(qkv_ptr + qkv_offset, mask=mask, other=0)
        q_second = tl.load(qkv_ptr + qkv_offset + K2, mask=mask, other=0)
        dk_first = tl.load(dk_ptr + dy_offset, mask=mask, other=0)
        dk_second = tl.load(dk_ptr + dy_offset + K2, mask=mask, other=0)
        k_first = tl.load(qkv_ptr + qkv_offset + qkv_stride_slot, mask=mask, other=0)
        k_second = tl.load(qkv_ptr + qkv_offset + qkv_stride_slot + K2, mask=mask, other=0)
        if WITH_V:
            dv_first = tl.load(dv_ptr + dy_offset, mask=mask)
            dv_second = tl.load(dv_ptr + dy_offset + K2, mask=mask)
        else:
            dv_first = tl.zeros((TOKENS * HEADS, BLOCK_K2), COMPUTE)
            dv_second = dv_first

        dq_first, dq_second, sum_first, sum_second = unrotate_and_differentiate(
            dq_first, dq_second, q_first, q_second, q_scale_ptr, channel, mask, cos, sin, eps, K2, COMPUTE
        )
        d_q_scale_first += sum_first
        d_q_scale_second += sum_second
        tl.store(d_qkv_ptr + d_qkv_offset, dq_first, mask=mask)
        tl.store(d_qkv_ptr + d_qkv_offset + K2, dq_second, mask=mask)
        dk_first, dk_second, sum_first, sum_second = unrotate_and_differentiate(
            dk_first, dk_second, k_first, k_second, k_scale_ptr, channel, mask, cos, sin, eps, K2, COMPUTE
        )
        d_k_scale_first += sum_first
        d_k_scale_second += sum_second
        tl.store(d_qkv_ptr + d_qkv_offset + d_qkv_stride_slot, dk_first, mask=mask)
        tl.store(d_qkv_ptr + d_qkv_offset + d_qkv_stride_slot + K2, dk_second, mask=mask)
        tl.store(d_qkv_ptr + d_qkv_offset + 2 * d_qkv_stride_slot, dv_first, mask=mask)
        tl.store(d_qkv_ptr + d_qkv_offset + 2 * d_qkv_stride_slot + K2, dv_second, mask=mask)

    # partial [2, programs, 2 * K2]: of q's scale, then of k's
    column = tl.arange(0, BLOCK_K2)
    q_partial_ptr = partial_ptr + program.to(tl.int64) * (2 * K2) + column
    k_partial_ptr = q_partial_ptr + tl.num_programs(0).to(tl.int64) * (2 * K2)
    tl.store(q_partial_ptr, tl.sum(d_q_scale_first, axis=0), mask=column < K2)
    tl.store(q_partial_ptr + K2, tl.sum(d_q_scale_second, axis=0), mask=column < K2)
    tl.store(k_partial_ptr, tl.sum(d_k_scale_first, axis=0), mask=column < K2)
    tl.store(k_partial_ptr + K2, tl.sum(d_k_scale_second, axis=0), mask=column < K2)


@jit
def unrotate_and_differentiate(
    dy_first,
    dy_second,
    x_first,
    x_second,
    scale_ptr,
    channel,
    mask,
    cos,
    sin,
    eps,
    K2: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """dx and dn * n, each as two halves."""
    dy_first, dy_second = dy_first.to(COMPUTE), dy_second.to(COMPUTE)
    dn_first, dn_second = dy_first * cos + dy_second * sin, dy_second * cos - dy_first * sin
    x_first, x_second = x_first.to(COMPUTE), x_second.to(COMPUTE)
    rstd = tl.rsqrt(tl.sum(x_first * x_first + x_second * x_second, axis=1, keep_dims=True) / (2 * K2) + eps)
    n_first, n_second = x_first * rstd, x_second * rstd
    g_first = dn_first * tl.load(scale_ptr + channel, mask=mask, other=0).to(COMPUTE)
    g_second = dn_second * tl.load(scale_ptr + channel + K2, mask=mask, other=0).to(COMPUTE)
    mean = tl.sum(g_first * n_first + g_second * n_second, axis=1, keep_dims=True) / (2 * K2)  # [rows, 1]
    dx_first, dx_second = rstd * (g_first - n_first * mean), rstd * (g_second - n_second * mean)
    return dx_first, dx_second, dn_first * n_first, dn_second * n_second


@jit
def _sum_kernel(
    partial_ptr,
    d_q_scale_ptr,
    d_k_scale_ptr,
    partials,
    K,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """partial [2, partials, K] summed over its rows, into q's scale and k's."""
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(K, COLUMNS)
    column = program % blocks * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), COMPUTE)
    for start in range(0, partials, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        mask = (row < partials) & (column[None, :] < K)
        total += tl.load(partial_ptr + (program // blocks * partials + row) * K + column[None, :], mask=mask, other=0)
    d_scale = tl.sum(total, axis=0)
    tl.store(d_q_scale_ptr + column, d_scale, mask=(column < K) & (program < blocks))
    tl.store(d_k_scale_ptr + column, d_scale, mask=(column < K) & (program >= blocks))


# Launchers: allocate, settle strides, one launch for each stream.


def triton_forward(
    streams: Sequence[Tensor],
    scales: Sequence[ScalePair],
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
    head_groups: int = 1,
    with_v: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(q, k, v) of all streams, v None without `with_v`."""
    q, k, v = _empty_outputs(streams, head_groups, with_v)
    cos, sin = _same_strides(cos, sin)
    out_strides = _joint_strides(q)
    for stream, (q_scale, k_scale), where in zip(streams, scales, _token_ranges(streams), strict=True):
        B, T, _, H, K = stream.shape
        tile = choose_tile(T, H // head_groups, K, stream.element_size())
        head_blocks = H // tile.heads
        launch.launch(
            _forward_kernel,
            (B * -(-T // tile.tokens) * head_blocks,),
            num_warps=tile.num_warps,
            qkv_ptr=stream,
            q_scale_ptr=q_scale,
            k_scale_ptr=k_scale,
            cos_ptr=cos,
            sin_ptr=sin,
            q_ptr=q,
            k_ptr=k,
            v_ptr=v,
            tokens=T,
            first_token=where.start,
            head_blocks=head_blocks,
            heads_per_group=H // head_groups,
            **_qkv_strides(stream),
            **_table_strides(cos),
            **{f"out_stride_{axis}": stride for axis, stride in out_strides.items()},
            eps=eps,
            K2=K // 2,
            TOKENS=tile.tokens,
            HEADS=tile.heads,
            BLOCK_K2=tile.block_k2,
            WITH_V=with_v,
            COMPUTE=launch.compute_type(stream.dtype),
        )
    return q, k, v


def triton_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor | None,
    streams: Sequence[Tensor],
    scales: Sequence[ScalePair],
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
    head_groups: int = 1,
) -> tuple[list[Tensor], list[ScalePair]]:
    """The gradient of every stream's qkv, contiguous, v's part zero without `dv`; and of every pair of scales."""
    dq, dk, *rest = _same_strides(dq, dk) if dv is None else _same_strides(dq, dk, dv)
    cos, sin = _same_strides(cos, sin)
    dy_strides = _joint_strides(dq)
    d_streams, d_scales = [], []
    for stream, (q_scale, k_scale), where in zip(streams, scales, _token_ranges(streams), strict=True):
        B, T, _, H, K = stream.shape
        tile = choose_tile(T, H // head_groups, K, stream.element_size())
        head_blocks = H // tile.heads
        programs = B * -(-T // (tile.tokens * tile.steps)) * head_blocks
        compute = torch.promote_types(stream.dtype, torch.float32)
        d_stream = torch.empty(stream.shape, dtype=stream.dtype, device=stream.device)
        partial = torch.empty((2, programs, K), dtype=compute, device=stream.device)
        launch.launch(
            _backward_kernel,
            (programs,),
            num_warps=tile.num_warps,
            dq_ptr=dq,
            dk_ptr=dk,
            dv_ptr=rest[0] if rest else None,
            qkv_ptr=stream,
            q_scale_ptr=q_scale,
            k_scale_ptr=k_scale,
            cos_ptr=cos,
            sin_ptr=sin,
            d_qkv_ptr=d_stream,
            partial_ptr=partial,
            tokens=T,
            first_token=where.start,
            head_blocks=head_blocks,
            heads_per_group=H // head_groups,
            **{f"dy_stride_{axis}": stride for axis, stride in dy_strides.items()},
            **_qkv_strides(stream),
            **_table_strides(cos),
            d_qkv_stride_b=3 * T * H * K,
            d_qkv_stride_t=3 * H * K,
            d_qkv_stride_slot=H * K,
            eps=eps,
            K2=K // 2,
            TOKENS=tile.tokens,
            HEADS=tile.heads,
            BLOCK_K2=tile.block_k2,
            STEPS=tile.steps,
            WITH_V=dv is not None,
            COMPUTE=launch.compute_type(stream.dtype),
        )
        d_streams.append(d_stream)
        d_scales.append(_launch_sum(partial, q_scale, k_scale))
    return d_streams, d_scales


def _launch_sum(partial: Tensor, q_scale: Tensor, k_scale: Tensor) -> ScalePair:
    """The second stage. 32 bytes of a row for each program: enough programs, and whole sectors of memory."""
    K = partial.shape[2]
    columns, num_warps = 8, 8
    d_q_scale = torch.empty(q_scale.shape, dtype=q_scale.dtype, device=q_scale.device)
    d_k_scale = torch.empty(k_scale.shape, dtype=k_scale.dtype, device=k_scale.device)
    launch.launch(
        _sum_kernel,
        (2 * -(-K // columns),),
        num_warps=num_warps,
        partial_ptr=partial,
        d_q_scale_ptr=d_q_scale,
        d_k_scale_ptr=d_k_scale,
        partials=partial.shape[1],
        K=K,
        ROWS=512,
        COLUMNS=columns,
        COMPUTE=launch.compute_type(partial.dtype),
    )
    return d_q_scale, d_k_scale


def _same_strides(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors themselves if one set of strides with contiguous channels serves all, else contiguous copies."""
    strides = {tensor.stride() for tensor in tensors}
    if len(strides) == 1 and tensors[0].stride(-1) == 1:
        return tensors
    return tuple(tensor.contiguous() for tensor in tensors)


def _joint_strides(joint: Tensor) -> dict[str, int]:
    group_stride = joint.stride(0) if joint.dim() == 5 else 0
    return dict(zip("gbth", (group_stride, *joint.stride()[-4:-1]), strict=True))


def _qkv_strides(qkv: Tensor) -> dict[str, int]:
    names = ("qkv_stride_b", "qkv_stride_t", "qkv_stride_slot", "qkv_stride_h")
    return dict(zip(names, qkv.stride()[:-1], strict=True))


def _table_strides(table: Tensor) -> dict[str, int]:
    return {"table_stride_b": table.stride(0) if table.dim() == 3 else 0, "table_stride_t": table.stride(-2)}


def forward_streams(
    streams: Sequence[Tensor],
    scales: Sequence[ScalePair],
    cos: Tensor,
    sin: Tensor,
    eps: float,
    head_groups: int,
    with_v: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(q, k, v) of all streams by the selected backend, v None without `with_v`; for use within other ops."""
    forward = triton_forward if _backend(streams[0]) == "triton" else qk_norm_rope_reference
    return forward(streams, scales, cos, sin, eps, head_groups, with_v)


def backward_streams(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor | None,
    streams: Sequence[Tensor],
    scales: Sequence[ScalePair],
    cos: Tensor,
    sin: Tensor,
    eps: float,
    head_groups: int,
) -> tuple[list[Tensor], list[ScalePair]]:
    """What the streams and the scales get, by the selected backend; v's part is zero without `dv`."""
    backward = triton_backward if _backend(streams[0]) == "triton" else qk_norm_rope_backward_reference
    return backward(dq, dk, dv, streams, scales, cos, sin, eps, head_groups)


# Op. `scales` are (q, k) of the first stream, then of the second; the results are q, k and, with `with_v`, v.


@torch.library.custom_op("opensora_fast::qk_norm_rope", mutates_args=())
def _qk_norm_rope(
    streams: list[Tensor], scales: list[Tensor], cos: Tensor, sin: Tensor, eps: float, head_groups: int, with_v: bool
) -> list[Tensor]:
    outputs = forward_streams(streams, _pairs(scales), cos, sin, eps, head_groups, with_v)
    return [out for out in outputs if out is not None]


@_qk_norm_rope.register_fake
def _(streams, scales, cos, sin, eps, head_groups, with_v):
    return [out for out in _empty_outputs(streams, head_groups, with_v) if out is not None]


@torch.library.custom_op("opensora_fast::qk_norm_rope_backward", mutates_args=())
def _qk_norm_rope_backward(
    gradients: list[Tensor],
    streams: list[Tensor],
    scales: list[Tensor],
    cos: Tensor,
    sin: Tensor,
    eps: float,
    head_groups: int,
) -> list[Tensor]:
    dq, dk = gradients[:2]
    dv = gradients[2] if len(gradients) > 2 else None
    d_streams, d_scales = backward_streams(dq, dk, dv, streams, _pairs(scales), cos, sin, eps, head_groups)
    return [*d_streams, *(d_scale for pair in d_scales for d_scale in pair)]


@_qk_norm_rope_backward.register_fake
def _(gradients, streams, scales, cos, sin, eps, head_groups):
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (*streams, *scales)]


def _pairs(scales: Sequence[Tensor]) -> list[ScalePair]:
    return list(zip(scales[::2], scales[1::2], strict=True))


def _save(ctx, inputs, output):
    streams, scales, cos, sin, ctx.eps, ctx.head_groups, _ = inputs
    ctx.num_streams = len(streams)
    ctx.save_for_backward(*streams, *scales, cos, sin)


def _differentiate(ctx, gradients):
    *inputs, cos, sin = ctx.saved_tensors
    streams, scales = inputs[: ctx.num_streams], inputs[ctx.num_streams :]
    d_inputs = _qk_norm_rope_backward(gradients, streams, scales, cos, sin, ctx.eps, ctx.head_groups)
    return d_inputs[: ctx.num_streams], d_inputs[ctx.num_streams :], None, None, None, None, None


_qk_norm_rope.register_autograd(_differentiate, setup_context=_save)


# Public functions.


def check_streams(
    streams: Sequence[Tensor], scales: Sequence[ScalePair], cos: Tensor, sin: Tensor, head_groups: int = 1
) -> None:
    """ValueError names the first argument that is outside of the envelope."""
    prefixes = ("txt_", "img_") if len(streams) > 1 else ("",)
    B, _, _, H, K = streams[0].shape if streams[0].dim() == 5 else (0,) * 5
    dtype, device = streams[0].dtype, streams[0].device
    for prefix, qkv, pair in zip(prefixes, streams, scales, strict=True):
        if qkv.dim() != 5 or qkv.shape[2] != 3:
            raise ValueError(f"{prefix}qkv is {list(qkv.shape)}; it must be [batch, tokens, 3, heads, channels]")
        if (qkv.shape[0], *qkv.shape[3:]) != (B, H, K):
            raise ValueError(f"{prefix}qkv is {list(qkv.shape)}; it must be [{B}, tokens, 3, {H}, {K}], as txt_qkv is")
        if qkv.dtype not in launch.DTYPES or qkv.dtype != dtype or qkv.device != device:
            raise ValueError(
                f"{prefix}qkv is {qkv.dtype} on {qkv.device}; it must be float32, bfloat16, float16 or float64, "
                f"and as all streams are, {dtype} on {device}"
            )
        if qkv.stride(-1) != 1:
            raise ValueError(
                f"{prefix}qkv has stride {qkv.stride(-1)} between channels; it must be 1: call .contiguous()"
            )
        for name, scale in zip(("q_scale", "k_scale"), pair, strict=True):
            if tuple(scale.shape) != (K,) or not scale.is_contiguous():
                raise ValueError(f"{prefix}{name} is {list(scale.shape)}; it must be [{K}], contiguous")
            if scale.dtype != dtype or scale.device != device:
                raise ValueError(
                    f"{prefix}{name} is {scale.dtype} on {scale.device}; it must be {dtype} on {device}, as qkv is"
                )
    if K % 2 or not MIN_HEAD_DIM <= K <= MAX_HEAD_DIM:
        raise ValueError(
            f"{prefixes[0]}qkv has {K} channels in a head; it must be an even number "
            f"from {MIN_HEAD_DIM} to {MAX_HEAD_DIM}"
        )
    if head_groups < 1 or H % head_groups:
        raise ValueError(f"head_groups is {head_groups}; it must divide the {H} heads")
    wide, S = torch.promote_types(dtype, torch.float32), sum(qkv.shape[1] for qkv in streams)
    for name, table in (("cos", cos), ("sin", sin)):
        if tuple(table.shape) not in ((S, K // 2), (B, S, K // 2)) or table.shape != cos.shape:
            raise ValueError(
                f"{name} is {list(table.shape)}; it must be [{S}, {K // 2}] or [{B}, {S}, {K // 2}], "
                f"one row for each token of all streams, cos and sin alike"
            )
        if table.dtype != wide or table.device != device:
            raise ValueError(f"{name} is {table.dtype} on {table.device}; it must be {wide} on {device}")


def joint_qk_norm_rope(
    txt_qkv_BT3HK: Tensor,
    img_qkv_BT3HK: Tensor,
    txt_q_scale_K: Tensor,
    txt_k_scale_K: Tensor,
    img_q_scale_K: Tensor,
    img_k_scale_K: Tensor,
    cos_SK2: Tensor,
    sin_SK2: Tensor,
    *,
    eps: float = 1e-6,
    head_groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [B, S, H, K] of text and video, text first: q and k normalised by head and rotated.

    qkv of each stream: [B, T, 3, H, K], channels contiguous, float32, bfloat16, float16 or float64; the norms' weights
    [K] in the same dtype. cos and sin: [S, K / 2] or [B, S, K / 2], float32 (float64 for float64), S = all tokens.
    head_groups: G > 1 gives [G, B, S, H / G, K] instead. Differentiable in all but the tables. ValueError names the
    argument that is outside of this. Stable Diffusion 3, section 5.3.2, and RoFormer.
    """
    streams = [txt_qkv_BT3HK, img_qkv_BT3HK]
    scales = [txt_q_scale_K, txt_k_scale_K, img_q_scale_K, img_k_scale_K]
    check_streams(streams, _pairs(scales), cos_SK2, sin_SK2, head_groups)
    q, k, v = _qk_norm_rope(streams, scales, cos_SK2, sin_SK2, eps, head_groups, True)
    return q, k, v


def qk_norm_rope(
    qkv_BS3HK: Tensor,
    q_scale_K: Tensor,
    k_scale_K: Tensor,
    cos_SK2: Tensor,
    sin_SK2: Tensor,
    *,
    eps: float = 1e-6,
    head_groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """q and k of tokens that share one projection, as in the single blocks; v stays the view `qkv[:, :, 2]`.

    qkv: [B, S, 3, H, K], which may be a slice of a wider projection. The rest as in `joint_qk_norm_rope`. Through this
    op the gradient of v's part of qkv is zero.
    """
    scales = [q_scale_K, k_scale_K]
    check_streams([qkv_BS3HK], _pairs(scales), cos_SK2, sin_SK2, head_groups)
    q, k = _qk_norm_rope([qkv_BS3HK], scales, cos_SK2, sin_SK2, eps, head_groups, False)
    return q, k


def cost(
    B: int,
    S: int,
    H: int,
    K: int,
    dtype: torch.dtype,
    mode: str,
    *,
    with_v: bool = True,
    table_batch: int = 1,
    streams: int = 1,
) -> Cost:
    """Cost of a call over S tokens in all; mode is "forward" or "backward". table_batch: B for tables [B, S, K / 2]."""
    tensor = math.prod((B, S, H, K))
    wide = torch.promote_types(dtype, torch.float32)
    shared = table_batch * S * K * wide.itemsize + 2 * streams * K * dtype.itemsize
    if mode == "forward":
        return Cost(flops=2 * 8 * tensor, bytes=(6 if with_v else 4) * tensor * dtype.itemsize + shared)
    written = 2 * streams * K * dtype.itemsize
    return Cost(flops=2 * 18 * tensor, bytes=(8 if with_v else 7) * tensor * dtype.itemsize + shared + written)
