"""Attention in Triton, forward and backward: plain, or with norm and rotation of q and k as tiles are loaded.

    S = scale * q k^T;   P = softmax_T(S);   out = P v;   lse = logsumexp_T(S)

Forward: one pass over the keys with a running maximum m and sum l of each query's row, in base 2, where exp is one
instruction: p = 2^(c s - m) with c = scale * log2(e) and s = q k^T. Backward, from out and lse, which may be those of a
longer row of which k and v are a part:

    delta = rowsum(dout * out) - dlse;   P = exp(S - lse);   dS = P * (dout v^T - delta)
    dq = scale * dS k;   dk = scale * dS^T q;   dv = P^T dout

Each gradient is summed by the one program that owns its rows. For dk and dv that program computes S^T = k q^T and
dP^T = v dout^T themselves, so that P^T and dS^T are operands as they lie in registers: no accumulator is transposed,
which Triton before 3.7.1 gets wrong on Hopper. The price: 7 products where atomics on dq would need 5.

With norm and rotation (`rope_`), q and k are the raw halves of a projection of one or two streams, normalised, weighted
and rotated in registers, rounded once, exactly as by `qk_norm_rope`. The forward is one launch. The backward's first
kernel, which reads dout and out for delta, also writes the rotated q and k, since the matrix kernels would make them
again for each pair of tiles; gradients go through rotation and norm in the epilogues, from raw rows read once more.

Shapes      B batch; S query tokens; T key tokens; H heads; K channels of a head; K2 = K / 2.  q, dq, out, dout
            [B, S, H, K];  k, v, dk, dv [B, T, H, K];  lse, dlse, delta [B, H, S];  qkv [B, T, 3, H, K] per stream;
            scales [K];  cos, sin [S, K2] or [B, S, K2], S = T = tokens of all streams, in their order.
Numerics    products of bfloat16 or float16 summed in float32; softmax in float32; P and dS rounded to the dtype of q
            where they are operands. float32 inputs: float32 products, on no tensor core. float64 in float64. `wide`
            results are not rounded to the dtype of q. lse is a natural logarithm in float32. A row without keys has
            out 0 and lse -inf, and a row with lse -inf has no gradient. The backward makes P again from lse: an error
            of some roundings of lse, relative, which matters in float32 at logits of hundreds.
Envelope    bfloat16, float16, float32; float64 in the interpreter. K even, 16 to 128, a power of two or not; B and H
            up to 65,535; scale above 0; sm_80 or later. Any strides with contiguous channels; what has others is
            copied, and so are two streams whose strides of tokens and heads differ.
Traffic     compute bound: 4 B H S T K flops forward, 10 backward (14 done).
Determinism every sum has one order, without atomics: bitwise equal over runs.
Source      FlashAttention-2 (arXiv 2307.08691); the online softmax of arXiv 1805.02867. Norm and rotation as in
            `qk_norm_rope`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opensora_fast.kernels import launch
from opensora_fast.kernels.launch import jit, tl
from opensora_fast.kernels.qk_norm_rope import ScalePair, norm_and_rotate, unrotate_and_differentiate

MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 128
MAX_GRID = 65535  # programs along each axis of a grid but the first
MIN_CAPABILITY = (8, 0)


# Tile choice.


@dataclass(frozen=True)
class Tile:
    """A program owns `rows` rows of its result and reads `columns` rows of the other side at a time."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Tiles:
    """Of the kernels of one call: `queries` is dq's, `keys` that of dk and dv, `prepare` that of delta's."""

    forward: Tile
    queries: Tile
    keys: Tile
    prepare: Tile


def choose_tiles(K: int, element_bytes: int, *, fused: bool = False, shared: int = 227 << 10) -> Tiles:
    """Pure. fused: the forward rotates tiles; shared: bytes that a block of the device can have.

    Modelled from what the compiler reports for sm_90, not measured on a GPU. Two groups of 4 warps share each tile of
    the other side, of which two are in shared memory, one in use and one on its way. At K = 128 in bfloat16, registers
    of a thread (255 is all it can have) and shared memory of a block:

        forward  128 x 128   254, 160 KiB; with rotation 128 x 64, 234 and 144 KiB: raw halves and tables beside out
        dq       128 x 64    202 to 211, 128 KiB
        dk, dv   128 x 64    255, 129 KiB: two results of 64 registers; with 64 x 64 and 4 warps 300 bytes spill

    Heads between 64 and 128 channels need masks beside these, and tiles of 32 queries for dk and dv, 234 registers.
    What still spills there, some 300 bytes, is heads of no multiple of 8 channels, whose rows are not read 16 bytes at
    a time either.

    Where a block has less than 200 KiB (163 on sm_80; 99 on sm_86, sm_89 and sm_120), operands are registers too: tiles
    have half as many columns, need 80 KiB, and spill 128 bytes at most. 4- and 8-byte numbers are multiplied without
    tensor cores: 32 x 16 is what leaves their products in registers.
    """
    prepare = Tile(rows=32, columns=0, num_warps=4, num_stages=1)
    if element_bytes > 2:
        small = Tile(rows=32, columns=16, num_warps=8, num_stages=1)
        return Tiles(forward=small, queries=small, keys=small, prepare=prepare)
    columns = 64 if shared >= 200 << 10 else 32
    half = Tile(rows=128, columns=columns, num_warps=8, num_stages=2)
    whole = Tile(rows=128, columns=2 * columns, num_warps=8, num_stages=2)
    keys = dataclasses.replace(half, columns=32) if 64 < K < 128 else half
    return Tiles(forward=half if fused else whole, queries=half, keys=keys, prepare=prepare)


# Seconds for one element of q, derived below, but for those of launches.
PASS_SECONDS = 8 / 3.5e12
AGAIN_SECONDS = 0.36e-12  # for each tile of QUERY_ROWS queries
LAUNCH_SECONDS = 8e-6
QUERY_ROWS = 128


def favours_fusion(B: int, S: int, H: int, K: int) -> bool:
    """Whether norm and rotation belong in the forward kernel, or in a pass before it; pure. Modelled, not measured.

    A pass before it reads and writes q and k, 8 bytes for an element of both, at 3.5 TB/s 2.3 ps. It is two launches
    (text, video), which a device with little to do feels as about 8 us. In the kernel each tile of 128 queries rotates
    every k again. An element of k and its like of v are 4 bytes from the second-level cache and 512 flops, 1.09 ps at
    470 TFLOP/s, a rate known to be reachable. The two float32 tables make that 8 bytes, 1.45 ps at 5.5 TB/s, under
    which the rotation's 7 instructions (0.24 ps) hide. So each tile of queries costs 0.36 ps an element more, and
    fusion pays up to 6 tiles (768 tokens) of a large batch and up to 11 (1,408) of one sample of 24 heads. It also
    needs no memory for the rotated q and k.
    """
    elements = B * S * H * K
    again = elements * -(-S // QUERY_ROWS) * AGAIN_SECONDS
    return again <= elements * PASS_SECONDS + LAUNCH_SECONDS


def missing(shape: Sequence[int], dtype: torch.dtype, device_type: str) -> str:
    """Why attention of q of `shape` [B, S, H, K] cannot run here, "" when it can."""
    B, _, H, K = shape
    if reason := launch.missing(device_type):
        return reason
    if dtype not in launch.DTYPES:
        return f"Triton attention takes bfloat16, float16 and float32, not {dtype}"
    if K % 2 or not MIN_HEAD_DIM <= K <= MAX_HEAD_DIM:
        return f"Triton attention takes heads of an even number of channels, {MIN_HEAD_DIM} to {MAX_HEAD_DIM}, not {K}"
    if max(B, H) > MAX_GRID:
        return f"Triton attention takes up to {MAX_GRID} samples and heads, not {B} and {H}"
    if device_type == "cuda":
        if dtype == torch.float64:
            return "Triton attention takes float64 in the interpreter only"
        if torch.cuda.is_available() and torch.cuda.get_device_capability() < MIN_CAPABILITY:
            return (
                f"Triton attention needs sm_80 or later, not sm_{''.join(map(str, torch.cuda.get_device_capability()))}"
            )
    return ""


# Device code. A program's tile lies in one stream: the tiles of the first stream come first, then those of the second
# (pointers with a 1), whose tokens are `tokens1`, 0 where there is one stream. `first_query` and `first_key` count the
# tokens of all streams.
# `DOT` is what the operands of a product are converted to: the dtype of q itself, but in the interpreter, where it is
# what can be multiplied there.


@jit
def _program():
    """(tile, head, batch): the tiles of a head one after the other, so that its k and v stay in the cache."""
    return tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)


@jit
def _place(tile, tokens, ROWS: tl.constexpr):
    """(whether a tile is of the second stream, its first token there), `tokens` being the first stream's."""
    tiles = tl.cdiv(tokens, ROWS)
    second = tile >= tiles
    return second, (tile - tl.where(second, tiles, 0)) * ROWS


@jit
def _key_blocks(keys, tokens1, COLUMNS: tl.constexpr, STREAMS: tl.constexpr, OVERRUN: tl.constexpr):
    """(first, end) for a loop over blocks of keys: all that are whole, or one for each stream that has an overrun."""
    if OVERRUN:
        begin = tl.where(keys % COLUMNS > 0, 0, 1)
        end = 1
        if STREAMS == 2:
            end = tl.where(tokens1 % COLUMNS > 0, 2, 1)
    else:
        begin = 0
        end = keys // COLUMNS + tokens1 // COLUMNS
    return begin, end


@jit
def _key_place(block, keys, tokens1, COLUMNS: tl.constexpr, OVERRUN: tl.constexpr):
    """(whether a block is of the second stream, its first token there)."""
    if OVERRUN:
        second = block == 1
        start = tl.where(second, tokens1, keys) // COLUMNS * COLUMNS
    else:
        second = block >= keys // COLUMNS
        start = (block - tl.where(second, keys // COLUMNS, 0)) * COLUMNS
    return second, start


@jit
def _channels(K: tl.constexpr, BLOCK_K: tl.constexpr, HALVES: tl.constexpr):
    """The channels of a tile's columns, and which columns have one. HALVES: each half of a head fills one of a tile."""
    column = tl.arange(0, BLOCK_K)[None, :]
    mask = column < K
    if HALVES and BLOCK_K != K:
        mask = column % (BLOCK_K // 2) < K // 2
        column = column // (BLOCK_K // 2) * (K // 2) + column % (BLOCK_K // 2)
    return column, mask


@jit
def _at(ptr, stride, token):
    return ptr + tl.cast(token, tl.int64) * stride


@jit
def _load_rows(
    ptr,
    stride,
    rows,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HALVES: tl.constexpr,
    OVERRUN: tl.constexpr,
):
    """[ROWS, BLOCK_K], 0 from `rows` on; without OVERRUN there are as many as that."""
    row = tl.arange(0, ROWS)[:, None]
    channel, mask = _channels(K, BLOCK_K, HALVES)
    ptrs = ptr + row.to(tl.int64) * stride + channel
    if OVERRUN:
        return tl.load(ptrs, mask=(row < rows) & mask, other=0)
    elif BLOCK_K != K:
        return tl.load(ptrs, mask=mask, other=0)
    else:
        return tl.load(ptrs)


@jit
def _load_halves(ptr, stride, rows, ROWS: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, OVERRUN: tl.constexpr):
    """Both halves of rows, each [ROWS, BLOCK_K / 2]; the channels in a half, and which there are."""
    row = tl.arange(0, ROWS)[:, None]
    k2 = row * 0 + tl.arange(0, BLOCK_K // 2)[None, :]
    mask = k2 < K // 2
    if OVERRUN:
        mask &= row < rows
    ptrs = ptr + row.to(tl.int64) * stride + k2
    return tl.load(ptrs, mask=mask, other=0), tl.load(ptrs + K // 2, mask=mask, other=0), k2, mask


@jit
def _load_rotated(
    ptr,
    stride,
    rows,
    scale_ptr,
    cos_ptr,
    sin_ptr,
    table_stride,
    eps,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERRUN: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """`_load_rows` with HALVES, of raw rows: normalised, rotated and rounded. The tables' first row is the tile's."""
    first, second, k2, mask = _load_halves(ptr, stride, rows, ROWS, K, BLOCK_K, OVERRUN)
    table = tl.arange(0, ROWS)[:, None].to(tl.int64) * table_stride + k2
    cos = tl.load(cos_ptr + table, mask=mask, other=0)
    sin = tl.load(sin_ptr + table, mask=mask, other=0)
    first, second = norm_and_rotate(first, second, scale_ptr, k2, mask, cos, sin, eps, K // 2, COMPUTE)
    halves = tl.join(first.to(ptr.dtype.element_ty), second.to(ptr.dtype.element_ty))  # [ROWS, BLOCK_K / 2, 2]
    return tl.reshape(tl.permute(halves, (0, 2, 1)), (ROWS, BLOCK_K))


@jit
def _store_rows(ptr, x, stride, rows, ROWS: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, HALVES: tl.constexpr):
    row = tl.arange(0, ROWS)[:, None]
    channel, mask = _channels(K, BLOCK_K, HALVES)
    tl.store(ptr + row.to(tl.int64) * stride + channel, x, mask=(row < rows) & mask)


@jit
def _attend(
    q,
    k,
    v,
    maximum,
    total,
    acc,
    columns,
    scale_2,
    OVERRUN: tl.constexpr,
    COMPUTE: tl.constexpr,
    DOT: tl.constexpr,
):
    """One tile of keys more, of which `columns` are tokens: the running maximum, sum and unnormalised out."""
    scores = tl.dot(q, tl.trans(k.to(DOT)), input_precision="ieee", out_dtype=COMPUTE)
    if OVERRUN:
        scores = tl.where(tl.arange(0, k.shape[0])[None, :] < columns, scores, float("-inf"))
    above = tl.maximum(maximum, tl.max(scores, axis=1) * scale_2)
    finite = tl.where(above == float("-inf"), 0.0, above)  # of a row of -inf: -inf - -inf would be NaN
    p = tl.math.exp2(scores * scale_2 - finite[:, None])
    shrink = tl.math.exp2(maximum - finite)
    total = total * shrink + tl.sum(p, axis=1)
    acc = tl.dot(p.to(v.dtype).to(DOT), v.to(DOT), acc * shrink[:, None], input_precision="ieee", out_dtype=COMPUTE)
    return above, total, acc


@jit
def _forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    q1_ptr,
    k1_ptr,
    v1_ptr,
    q_scale_ptr,
    k_scale_ptr,
    q1_scale_ptr,
    k1_scale_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    lse_ptr,
    heads,
    queries,
    keys,
    tokens1,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    k_stride_b,
    k_stride_t,
    k_stride_h,
    v_stride_b,
    v_stride_t,
    v_stride_h,
    stride1_b,
    table_stride_b,
    table_stride_t,
    eps,
    scale_2,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STREAMS: tl.constexpr,
    ROPE: tl.constexpr,
    STAGES: tl.constexpr,
    COMPUTE: tl.constexpr,
    DOT: tl.constexpr,
):
    tile, head, batch = _program()
    second, start = _place(tile, queries, ROWS)
    first_query = start + tl.where(second, queries, 0)
    rows = tl.where(second, tokens1, queries) - start
    q_ptr += batch * q_stride_b + head * q_stride_h
    k_ptr += batch * k_stride_b + head * k_stride_h
    v_ptr += batch * v_stride_b + head * v_stride_h
    if STREAMS == 2:
        q_ptr = tl.where(second, q1_ptr + (batch * stride1_b + head * q_stride_h), q_ptr)
        k1_ptr += batch * stride1_b + head * k_stride_h
        v1_ptr += batch * stride1_b + head * v_stride_h
        q_scale_ptr = tl.where(second, q1_scale_ptr, q_scale_ptr)
    q_ptr = _at(q_ptr, q_stride_t, start)
    if ROPE:
        cos_ptr += batch * table_stride_b
        sin_ptr += batch * table_stride_b
        cos, sin = _at(cos_ptr, table_stride_t, first_query), _at(sin_ptr, table_stride_t, first_query)
        q = _load_rotated(
            q_ptr, q_stride_t, rows, q_scale_ptr, cos, sin, table_stride_t, eps, ROWS, K, BLOCK_K, True, COMPUTE
        )
    else:
        q = _load_rows(q_ptr, q_stride_t, rows, ROWS, K, BLOCK_K, False, True)
    q = q.to(DOT)

    maximum = tl.full((ROWS,), float("-inf"), COMPUTE)
    total = tl.zeros((ROWS,), COMPUTE)
    acc = tl.zeros((ROWS, BLOCK_K), COMPUTE)
    for OVERRUN in tl.static_range(2):
        begin, end = _key_blocks(keys, tokens1, COLUMNS, STREAMS, OVERRUN)
        for block in tl.range(begin, end, num_stages=1 if OVERRUN else STAGES):
            second, start = _key_place(block, keys, tokens1, COLUMNS, OVERRUN)
            first_key, columns, k_base, v_base, k_scale = start, keys - start, k_ptr, v_ptr, k_scale_ptr
            if STREAMS == 2:
                first_key, columns = start + tl.where(second, keys, 0), tl.where(second, tokens1, keys) - start
                k_base, v_base = tl.where(second, k1_ptr, k_ptr), tl.where(second, v1_ptr, v_ptr)
                k_scale = tl.where(second, k1_scale_ptr, k_scale_ptr)
            k_base, v_base = _at(k_base, k_stride_t, start), _at(v_base, v_stride_t, start)
            if ROPE:
                cos, sin = _at(cos_ptr, table_stride_t, first_key), _at(sin_ptr, table_stride_t, first_key)
                k = _load_rotated(
                    k_base,
                    k_stride_t,
                    columns,
                    k_scale,
                    cos,
                    sin,
                    table_stride_t,
                    eps,
                    COLUMNS,
                    K,
                    BLOCK_K,
                    OVERRUN,
                    COMPUTE,
                )
            else:
                k = _load_rows(k_base, k_stride_t, columns, COLUMNS, K, BLOCK_K, False, OVERRUN)
            v = _load_rows(v_base, v_stride_t, columns, COLUMNS, K, BLOCK_K, False, OVERRUN)
            maximum, total, acc = _attend(q, k, v, maximum, total, acc, columns, scale_2, OVERRUN, COMPUTE, DOT)

    S = queries + tokens1
    out_ptr = _at(out_ptr + (batch * S * heads + head) * K, heads * K, first_query)
    _store_rows(out_ptr, acc / tl.where(total > 0, total, 1)[:, None], heads * K, rows, ROWS, K, BLOCK_K, False)
    lse = (maximum + tl.math.log2(total)) * 0.6931471805599453  # log(2)
    row = tl.arange(0, ROWS)
    tl.store(lse_ptr + (batch * heads + head) * S + first_query + row, lse, mask=row < rows)


# The backward. lse in base 2 and delta have room for whole blocks of queries, [B, H, padded], with 0 past the last one:
# no load of them is masked. There P is 1, and meets a dout of 0.


@jit
def _prepare_kernel(
    dout_ptr,
    out_ptr,
    lse_ptr,
    dlse_ptr,
    lse_2_ptr,
    delta_ptr,
    q_ptr,
    k_ptr,
    q1_ptr,
    k1_ptr,
    q_scale_ptr,
    k_scale_ptr,
    q1_scale_ptr,
    k1_scale_ptr,
    cos_ptr,
    sin_ptr,
    rotated_q_ptr,
    rotated_k_ptr,
    heads,
    queries,
    tokens1,
    padded,
    dout_stride_b,
    dout_stride_t,
    dout_stride_h,
    out_stride_b,
    out_stride_t,
    out_stride_h,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    stride1_b,
    table_stride_b,
    table_stride_t,
    eps,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    STREAMS: tl.constexpr,
    ROPE: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """lse_2 and delta; with ROPE also q and k of all streams [B, S, H, K] as the forward rotated them."""
    tile, head, batch = _program()
    second, start = _place(tile, queries, ROWS)
    first_query = start + tl.where(second, queries, 0)
    rows = tl.where(second, tokens1, queries) - start
    S = queries + tokens1

    dout_ptr = _at(dout_ptr + batch * dout_stride_b + head * dout_stride_h, dout_stride_t, first_query)
    out_ptr = _at(out_ptr + batch * out_stride_b + head * out_stride_h, out_stride_t, first_query)
    dout = _load_rows(dout_ptr, dout_stride_t, rows, ROWS, K, BLOCK_K, False, True).to(COMPUTE)
    out = _load_rows(out_ptr, out_stride_t, rows, ROWS, K, BLOCK_K, False, True).to(COMPUTE)
    delta = tl.sum(dout * out, axis=1)
    row = tl.arange(0, ROWS)
    row_offset = (batch * heads + head) * S + first_query + row
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + row_offset, mask=row < rows, other=0)
    lse = tl.load(lse_ptr + row_offset, mask=row < rows, other=0)
    lse_2 = tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634)  # log2(e)
    start_offset = (batch * heads + head) * padded
    tl.store(lse_2_ptr + start_offset + first_query + row, lse_2, mask=row < rows)
    tl.store(delta_ptr + start_offset + first_query + row, delta, mask=row < rows)
    if tile == tl.num_programs(0) - 1:
        for first in range(S, padded, ROWS):
            tl.store(lse_2_ptr + start_offset + first + row, tl.zeros((ROWS,), COMPUTE), mask=first + row < padded)
            tl.store(delta_ptr + start_offset + first + row, tl.zeros((ROWS,), COMPUTE), mask=first + row < padded)

    if ROPE:
        offset, offset1 = batch * q_stride_b + head * q_stride_h, batch * stride1_b + head * q_stride_h
        q_ptr += offset
        k_ptr += offset
        if STREAMS == 2:
            q_ptr, k_ptr = tl.where(second, q1_ptr + offset1, q_ptr), tl.where(second, k1_ptr + offset1, k_ptr)
            q_scale_ptr = tl.where(second, q1_scale_ptr, q_scale_ptr)
            k_scale_ptr = tl.where(second, k1_scale_ptr, k_scale_ptr)
        q_ptr, k_ptr = _at(q_ptr, q_stride_t, start), _at(k_ptr, q_stride_t, start)
        cos = _at(cos_ptr + batch * table_stride_b, table_stride_t, first_query)
        sin = _at(sin_ptr + batch * table_stride_b, table_stride_t, first_query)
        rotated = ((batch * S + first_query) * heads + head) * K
        q = _load_rotated(
            q_ptr, q_stride_t, rows, q_scale_ptr, cos, sin, table_stride_t, eps, ROWS, K, BLOCK_K, True, COMPUTE
        )
        _store_rows(rotated_q_ptr + rotated, q, heads * K, rows, ROWS, K, BLOCK_K, True)
        k = _load_rotated(
            k_ptr, q_stride_t, rows, k_scale_ptr, cos, sin, table_stride_t, eps, ROWS, K, BLOCK_K, True, COMPUTE
        )
        _store_rows(rotated_k_ptr + rotated, k, heads * K, rows, ROWS, K, BLOCK_K, True)


@jit
def _store_gradient(
    d_ptr,
    d,
    d_stride,
    raw_ptr,
    raw_stride,
    rows,
    scale_ptr,
    cos_ptr,
    sin_ptr,
    table_stride,
    partial_ptr,
    eps,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROPE: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The gradient of rows of q or k; with ROPE of the raw rows, and a part of the scale's."""
    if ROPE:
        d_first, d_second = tl.split(tl.permute(tl.reshape(d, (ROWS, 2, BLOCK_K // 2)), (0, 2, 1)))
        first, second, k2, mask = _load_halves(raw_ptr, raw_stride, rows, ROWS, K, BLOCK_K, True)
        row = tl.arange(0, ROWS)[:, None].to(tl.int64)
        cos = tl.load(cos_ptr + row * table_stride + k2, mask=mask, other=0)
        sin = tl.load(sin_ptr + row * table_stride + k2, mask=mask, other=0)
        d_first, d_second, part_first, part_second = unrotate_and_differentiate(
            d_first, d_second, first, second, scale_ptr, k2, mask, cos, sin, eps, K // 2, COMPUTE
        )
        tl.store(d_ptr + row * d_stride + k2, d_first, mask=mask)
        tl.store(d_ptr + row * d_stride + k2 + K // 2, d_second, mask=mask)
        # Of a key past the last one P is 2^-lse, which overflows, and its gradient NaN.
        part_first, part_second = tl.where(mask, part_first, 0), tl.where(mask, part_second, 0)
        column = tl.arange(0, BLOCK_K // 2)
        tl.store(partial_ptr + column, tl.sum(part_first, axis=0), mask=column < K // 2)
        tl.store(partial_ptr + column + K // 2, tl.sum(part_second, axis=0), mask=column < K // 2)
    else:
        _store_rows(d_ptr, d, d_stride, rows, ROWS, K, BLOCK_K, False)


@jit
def _keys_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    v1_ptr,
    dout_ptr,
    lse_2_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    dk1_ptr,
    dv1_ptr,
    raw_ptr,
    raw1_ptr,
    scale_ptr,
    scale1_ptr,
    cos_ptr,
    sin_ptr,
    partial_ptr,
    heads,
    queries,
    keys,
    tokens1,
    padded,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    k_stride_b,
    k_stride_t,
    k_stride_h,
    v_stride_b,
    v_stride_t,
    v_stride_h,
    stride1_b,
    dout_stride_b,
    dout_stride_t,
    dout_stride_h,
    d_stride_b,
    d_stride_t,
    d_stride1_b,
    table_stride_b,
    table_stride_t,
    eps,
    scale,
    scale_2,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STREAMS: tl.constexpr,
    ROPE: tl.constexpr,
    STAGES: tl.constexpr,
    COMPUTE: tl.constexpr,
    DOT: tl.constexpr,
):
    """dk and dv of ROWS keys; what comes out for those past the last one is not stored."""
    tile, head, batch = _program()
    second, start = _place(tile, keys, ROWS)
    first_key = start + tl.where(second, keys, 0)
    rows = tl.where(second, tokens1, keys) - start
    S = queries + tokens1
    q_ptr += batch * q_stride_b + head * q_stride_h
    dout_ptr += batch * dout_stride_b + head * dout_stride_h
    k_ptr = _at(k_ptr + batch * k_stride_b + head * k_stride_h, k_stride_t, first_key)
    v_ptr += batch * v_stride_b + head * v_stride_h
    lse_2_ptr += (batch * heads + head) * padded
    delta_ptr += (batch * heads + head) * padded
    if STREAMS == 2:
        v_ptr = tl.where(second, v1_ptr + (batch * stride1_b + head * v_stride_h), v_ptr)

    k = _load_rows(k_ptr, k_stride_t, rows, ROWS, K, BLOCK_K, ROPE, True).to(DOT)
    v = _load_rows(_at(v_ptr, v_stride_t, start), v_stride_t, rows, ROWS, K, BLOCK_K, False, True).to(DOT)
    dk = tl.zeros((ROWS, BLOCK_K), COMPUTE)
    dv = tl.zeros((ROWS, BLOCK_K), COMPUTE)
    for first_query in tl.range(0, S, COLUMNS, num_stages=STAGES):
        columns = S - first_query
        q_base, dout_base = _at(q_ptr, q_stride_t, first_query), _at(dout_ptr, dout_stride_t, first_query)
        q = _load_rows(q_base, q_stride_t, columns, COLUMNS, K, BLOCK_K, ROPE, True)
        dout = _load_rows(dout_base, dout_stride_t, columns, COLUMNS, K, BLOCK_K, False, True)
        column = tl.arange(0, COLUMNS)
        lse_2 = tl.load(lse_2_ptr + first_query + column)
        delta = tl.load(delta_ptr + first_query + column)
        scores_t = tl.dot(k, tl.trans(q.to(DOT)), input_precision="ieee", out_dtype=COMPUTE)
        p_t = tl.math.exp2(scores_t * scale_2 - lse_2[None, :])
        dv = tl.dot(p_t.to(dout.dtype).to(DOT), dout.to(DOT), dv, input_precision="ieee", out_dtype=COMPUTE)
        dp_t = tl.dot(v, tl.trans(dout.to(DOT)), input_precision="ieee", out_dtype=COMPUTE)
        ds_t = p_t * (dp_t - delta[None, :])
        dk = tl.dot(ds_t.to(q.dtype).to(DOT), q.to(DOT), dk, input_precision="ieee", out_dtype=COMPUTE)

    if STREAMS == 2:
        dk_ptr, dv_ptr = tl.where(second, dk1_ptr, dk_ptr), tl.where(second, dv1_ptr, dv_ptr)
    d_offset = batch * tl.where(second, d_stride1_b, d_stride_b) + head * K
    _store_rows(_at(dv_ptr + d_offset, d_stride_t, start), dv, d_stride_t, rows, ROWS, K, BLOCK_K, False)
    if ROPE:
        raw_ptr += batch * v_stride_b + head * v_stride_h
        if STREAMS == 2:
            raw_ptr = tl.where(second, raw1_ptr + (batch * stride1_b + head * v_stride_h), raw_ptr)
            scale_ptr = tl.where(second, scale1_ptr, scale_ptr)
        raw_ptr = _at(raw_ptr, v_stride_t, start)
        cos_ptr = _at(cos_ptr + batch * table_stride_b, table_stride_t, first_key)
        sin_ptr = _at(sin_ptr + batch * table_stride_b, table_stride_t, first_key)
        # [tiles, B, H, K]: the parts of each stream's scale together
        partial_ptr += ((tile * tl.num_programs(2) + batch) * heads + head) * K
    _store_gradient(
        _at(dk_ptr + d_offset, d_stride_t, start),
        dk * scale,
        d_stride_t,
        raw_ptr,
        v_stride_t,
        rows,
        scale_ptr,
        cos_ptr,
        sin_ptr,
        table_stride_t,
        partial_ptr,
        eps,
        ROWS,
        K,
        BLOCK_K,
        ROPE,
        COMPUTE,
    )


@jit
def _queries_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    v1_ptr,
    dout_ptr,
    lse_2_ptr,
    delta_ptr,
    dq_ptr,
    dq1_ptr,
    raw_ptr,
    raw1_ptr,
    scale_ptr,
    scale1_ptr,
    cos_ptr,
    sin_ptr,
    partial_ptr,
    heads,
    queries,
    keys,
    tokens1,
    padded,
    q_stride_b,
    q_stride_t,
    q_stride_h,
    k_stride_b,
    k_stride_t,
    k_stride_h,
    v_stride_b,
    v_stride_t,
    v_stride_h,
    stride1_b,
    dout_stride_b,
    dout_stride_t,
    dout_stride_h,
    d_stride_b,
    d_stride_t,
    d_stride1_b,
    table_stride_b,
    table_stride_t,
    eps,
    scale,
    scale_2,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STREAMS: tl.constexpr,
    ROPE: tl.constexpr,
    STAGES: tl.constexpr,
    COMPUTE: tl.constexpr,
    DOT: tl.constexpr,
):
    """dq of ROWS queries."""
    tile, head, batch = _program()
    second, start = _place(tile, queries, ROWS)
    first_query = start + tl.where(second, queries, 0)
    rows = tl.where(second, tokens1, queries) - start
    d_offset = batch * tl.where(second, d_stride1_b, d_stride_b) + head * K
    q_ptr = _at(q_ptr + batch * q_stride_b + head * q_stride_h, q_stride_t, first_query)
    dout_ptr = _at(dout_ptr + batch * dout_stride_b + head * dout_stride_h, dout_stride_t, first_query)
    k_ptr += batch * k_stride_b + head * k_stride_h
    v_ptr += batch * v_stride_b + head * v_stride_h
    if STREAMS == 2:
        v1_ptr += batch * stride1_b + head * v_stride_h
        dq_ptr = tl.where(second, dq1_ptr, dq_ptr)

    q = _load_rows(q_ptr, q_stride_t, rows, ROWS, K, BLOCK_K, ROPE, True).to(DOT)
    dout = _load_rows(dout_ptr, dout_stride_t, rows, ROWS, K, BLOCK_K, False, True).to(DOT)
    row = tl.arange(0, ROWS)
    row_offset = (batch * heads + head) * padded + first_query + row
    lse_2 = tl.load(lse_2_ptr + row_offset, mask=row < rows, other=0)
    delta = tl.load(delta_ptr + row_offset, mask=row < rows, other=0)
    dq = tl.zeros((ROWS, BLOCK_K), COMPUTE)
    for OVERRUN in tl.static_range(2):
        begin, end = _key_blocks(keys, tokens1, COLUMNS, STREAMS, OVERRUN)
        for block in tl.range(begin, end, num_stages=1 if OVERRUN else STAGES):
            key_second, key = _key_place(block, keys, tokens1, COLUMNS, OVERRUN)
            first_key, columns, v_base = key, keys - key, v_ptr
            if STREAMS == 2:
                first_key, columns = key + tl.where(key_second, keys, 0), tl.where(key_second, tokens1, keys) - key
                v_base = tl.where(key_second, v1_ptr, v_ptr)
            k_base, v_base = _at(k_ptr, k_stride_t, first_key), _at(v_base, v_stride_t, key)
            k = _load_rows(k_base, k_stride_t, columns, COLUMNS, K, BLOCK_K, ROPE, OVERRUN)
            v = _load_rows(v_base, v_stride_t, columns, COLUMNS, K, BLOCK_K, False, OVERRUN)
            scores = tl.dot(q, tl.trans(k.to(DOT)), input_precision="ieee", out_dtype=COMPUTE)
            p = tl.math.exp2(scores * scale_2 - lse_2[:, None])
            if OVERRUN:
                p = tl.where(tl.arange(0, COLUMNS)[None, :] < columns, p, 0)
            dp = tl.dot(dout, tl.trans(v.to(DOT)), input_precision="ieee", out_dtype=COMPUTE)
            ds = p * (dp - delta[:, None])
            dq = tl.dot(ds.to(k.dtype).to(DOT), k.to(DOT), dq, input_precision="ieee", out_dtype=COMPUTE)

    if ROPE:
        raw_ptr += batch * v_stride_b + head * v_stride_h
        if STREAMS == 2:
            raw_ptr = tl.where(second, raw1_ptr + (batch * stride1_b + head * v_stride_h), raw_ptr)
            scale_ptr = tl.where(second, scale1_ptr, scale_ptr)
        raw_ptr = _at(raw_ptr, v_stride_t, start)
        cos_ptr = _at(cos_ptr + batch * table_stride_b, table_stride_t, first_query)
        sin_ptr = _at(sin_ptr + batch * table_stride_b, table_stride_t, first_query)
        # [tiles, B, H, K]: the parts of each stream's scale together
        partial_ptr += ((tile * tl.num_programs(2) + batch) * heads + head) * K
    _store_gradient(
        _at(dq_ptr + d_offset, d_stride_t, start),
        dq * scale,
        d_stride_t,
        raw_ptr,
        v_stride_t,
        rows,
        scale_ptr,
        cos_ptr,
        sin_ptr,
        table_stride_t,
        partial_ptr,
        eps,
        ROWS,
        K,
        BLOCK_K,
        ROPE,
        COMPUTE,
    )


@jit
def _scales_kernel(
    partial_ptr,
    d_q_scale_ptr,
    d_k_scale_ptr,
    d_q1_scale_ptr,
    d_k1_scale_ptr,
    q_rows,
    q1_rows,
    k_rows,
    k1_rows,
    K,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STREAMS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """partial [rows, K], those of q, of the second stream's q, of k and of its k, each summed into its scale."""
    blocks = tl.cdiv(K, COLUMNS)
    which = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    first, rows, d_scale_ptr = 0 * q_rows, q_rows, d_q_scale_ptr
    if STREAMS == 2:
        is_q1, is_k1 = which == 2, which == 3
        first = tl.where(is_q1, q_rows, tl.where(is_k1, q_rows + q1_rows + k_rows, first))
        rows = tl.where(is_q1, q1_rows, tl.where(is_k1, k1_rows, rows))
        d_scale_ptr = tl.where(is_q1, d_q1_scale_ptr, tl.where(is_k1, d_k1_scale_ptr, d_scale_ptr))
    first = tl.where(which == 1, q_rows + q1_rows, first)
    rows = tl.where(which == 1, k_rows, rows)
    d_scale_ptr = tl.where(which == 1, d_k_scale_ptr, d_scale_ptr)

    total = tl.zeros((ROWS, COLUMNS), COMPUTE)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        mask = (row < rows) & (column[None, :] < K)
        total += tl.load(partial_ptr + (first + row).to(tl.int64) * K + column[None, :], mask=mask, other=0)
    tl.store(d_scale_ptr + column, tl.sum(total, axis=0), mask=column < K)


# Launchers: allocate, settle strides. A call is given `tiles` by tests, whose small shapes then have several.


@dataclass(frozen=True)
class _Call:
    """`parts`: (q, k, v) of each stream, alike but for the first stride and the tokens where there are two."""

    parts: list[tuple[Tensor, Tensor, Tensor]]
    scale: float
    tiles: Tiles
    scales: Sequence[ScalePair] = ()
    cos: Tensor | None = None
    sin: Tensor | None = None
    eps: float = 0.0

    @property
    def rope(self) -> bool:
        return self.cos is not None

    @property
    def first(self) -> Tensor:
        return self.parts[0][0]

    @property
    def tokens(self) -> list[int]:
        """Queries of every stream."""
        return [q.shape[1] for q, _, _ in self.parts]

    def grid(self, rows: int, *, keys: bool = False) -> tuple[int, int, int]:
        """Of a kernel whose programs own so many rows each, of one head of one sample."""
        B, _, H, _ = self.first.shape
        return sum(-(-(k if keys else q).shape[1] // rows) for q, k, _ in self.parts), H, B

    def part(self, slot: int) -> tuple[Tensor, Tensor | None]:
        """q, k or v, by its slot: the first stream's and the second's."""
        return self.parts[0][slot], self.parts[1][slot] if len(self.parts) > 1 else None

    def sizes(self) -> dict[str, Any]:
        """What all three matrix kernels and the one before them are told."""
        tokens1 = self.tokens[1] if len(self.parts) > 1 else 0
        stride1_b = self.parts[1][0].stride(0) if len(self.parts) > 1 else 0
        table_stride_b = self.cos.stride(0) if self.cos is not None and self.cos.dim() == 3 else 0
        return {
            "cos_ptr": self.cos,
            "sin_ptr": self.sin,
            "heads": self.first.shape[2],
            "queries": self.tokens[0],
            "tokens1": tokens1,
            "stride1_b": stride1_b,
            "table_stride_b": table_stride_b,
            "table_stride_t": 0 if self.cos is None else self.cos.stride(-2),
            "eps": self.eps,
            "K": self.first.shape[3],
            "BLOCK_K": launch.power_of_two(self.first.shape[3]),
            "STREAMS": len(self.parts),
            "ROPE": self.rope,
            "COMPUTE": launch.compute_type(self.first.dtype),
        }

    def matrix_sizes(self, tile: Tile) -> dict[str, Any]:
        return self.sizes() | {
            "keys": self.parts[0][1].shape[1],
            "ROWS": tile.rows,
            "COLUMNS": tile.columns,
            "scale_2": self.scale * math.log2(math.e),
            "STAGES": tile.num_stages,
            "DOT": _operand_type(self.first.dtype),
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
        }

    def scale_pointers(self) -> dict[str, Any]:
        flat: list[Tensor | None] = [scale for pair in self.scales for scale in pair]
        flat += [None] * (4 - len(flat))
        names = ("q_scale_ptr", "k_scale_ptr", "q1_scale_ptr", "k1_scale_ptr")
        return dict(zip(names, flat, strict=True))


def _forward(call: _Call, wide: bool) -> tuple[Tensor, Tensor]:
    B, _, H, K = call.first.shape
    S, tile = sum(call.tokens), call.tiles.forward
    lse_type = torch.promote_types(call.first.dtype, torch.float32)
    out = torch.empty((B, S, H, K), dtype=lse_type if wide else call.first.dtype, device=call.first.device)
    lse = torch.empty((B, H, S), dtype=lse_type, device=call.first.device)
    (q, q1), (k, k1), (v, v1) = map(call.part, range(3))
    launch.launch(
        _forward_kernel,
        call.grid(tile.rows),
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        q1_ptr=q1,
        k1_ptr=k1,
        v1_ptr=v1,
        out_ptr=out,
        lse_ptr=lse,
        **call.scale_pointers(),
        **_strides(q=q, k=k, v=v),
        **call.matrix_sizes(tile),
    )
    return out, lse


def _backward(
    call: _Call,
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    gradients: Sequence[tuple[Tensor, Tensor, Tensor]],
) -> Tensor | None:
    """Writes the gradients of each stream's q, k and v; the parts of the scales' gradients, q's before k's."""
    B, _, H, K = call.first.shape
    tiles = call.tiles
    dout, out, lse = _channels_together(dout.to(call.first.dtype)), _channels_together(out), lse.contiguous()
    (raw_q, raw_q1), (raw_k, raw_k1), (v, v1) = map(call.part, range(3))
    padded = -(-sum(call.tokens) // tiles.keys.columns) * tiles.keys.columns
    lse_2, delta = (torch.empty((B, H, padded), dtype=lse.dtype, device=lse.device) for _ in range(2))
    scales = call.scale_pointers()
    q, k, partial = raw_q, raw_k, None
    if call.rope:
        q, k = (torch.empty(dout.shape, dtype=dout.dtype, device=dout.device) for _ in range(2))
        rows = math.prod(call.grid(tiles.queries.rows)) + math.prod(call.grid(tiles.keys.rows))
        partial = torch.empty((rows, K), dtype=lse.dtype, device=dout.device)
    launch.launch(
        _prepare_kernel,
        call.grid(tiles.prepare.rows),
        num_warps=tiles.prepare.num_warps,
        num_stages=tiles.prepare.num_stages,
        dout_ptr=dout,
        out_ptr=out,
        dlse_ptr=None if dlse is None else dlse.contiguous(),
        lse_ptr=lse,
        lse_2_ptr=lse_2,
        delta_ptr=delta,
        padded=padded,
        q_ptr=raw_q,
        k_ptr=raw_k,
        q1_ptr=raw_q1,
        k1_ptr=raw_k1,
        rotated_q_ptr=q,
        rotated_k_ptr=k,
        **scales,
        **_strides(dout=dout, out=out, q=raw_q),
        **call.sizes(),
        ROWS=tiles.prepare.rows,
    )
    (dq, dk, dv), (dq1, dk1, dv1) = gradients[0], gradients[1] if len(gradients) > 1 else (None, None, None)
    shared: dict[str, Any] = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "v1_ptr": v1,
        "dout_ptr": dout,
        "lse_2_ptr": lse_2,
        "delta_ptr": delta,
        "padded": padded,
        **_strides(q=q, k=k, v=v, dout=dout),
        "d_stride1_b": 0 if dq1 is None else dq1.stride(0),
        "scale": call.scale,
    }
    launch.launch(
        _keys_kernel,
        call.grid(tiles.keys.rows, keys=True),
        dk_ptr=dk,
        dv_ptr=dv,
        dk1_ptr=dk1,
        dv1_ptr=dv1,
        raw_ptr=raw_k,
        raw1_ptr=raw_k1,
        scale_ptr=scales["k_scale_ptr"],
        scale1_ptr=scales["k1_scale_ptr"],
        partial_ptr=None if partial is None else partial[math.prod(call.grid(tiles.queries.rows)) :],
        d_stride_b=dk.stride(0),
        d_stride_t=dk.stride(1),
        **shared,
        **call.matrix_sizes(tiles.keys),
    )
    launch.launch(
        _queries_kernel,
        call.grid(tiles.queries.rows),
        dq_ptr=dq,
        dq1_ptr=dq1,
        raw_ptr=raw_q,
        raw1_ptr=raw_q1,
        scale_ptr=scales["q_scale_ptr"],
        scale1_ptr=scales["q1_scale_ptr"],
        partial_ptr=partial,
        d_stride_b=dq.stride(0),
        d_stride_t=dq.stride(1),
        **shared,
        **call.matrix_sizes(tiles.queries),
    )
    return partial


def attention_forward(
    q_BSHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, scale: float, *, wide: bool = False, tiles: Tiles | None = None
) -> tuple[Tensor, Tensor]:
    """(out [B, S, H, K], lse [B, H, S]); with `wide` out in the type of lse, float32 (float64 for float64)."""
    return _forward(_plain_call(q_BSHK, k_BTHK, v_BTHK, scale, tiles), wide)


def attention_backward(
    dout_BSHK: Tensor,
    q_BSHK: Tensor,
    k_BTHK: Tensor,
    v_BTHK: Tensor,
    out_BSHK: Tensor,
    lse_BHS: Tensor,
    scale: float,
    *,
    dlse: Tensor | None = None,
    wide: bool = False,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), contiguous, in the dtype of q or with `wide` in that of lse.

    out and lse may be of longer rows, of which k and v are a part; dout is rounded to the dtype of q.
    """
    call = _plain_call(q_BSHK, k_BTHK, v_BTHK, scale, tiles)
    dtype = lse_BHS.dtype if wide else q_BSHK.dtype
    dq, dk, dv = (torch.empty(x.shape, dtype=dtype, device=x.device) for x in (q_BSHK, k_BTHK, v_BTHK))
    _backward(call, dout_BSHK, out_BSHK, lse_BHS, dlse, [(dq, dk, dv)])
    return dq, dk, dv


def rope_attention_forward(
    streams: Sequence[Tensor],
    scales: Sequence[ScalePair],
    cos: Tensor,
    sin: Tensor,
    eps: float,
    *,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """(out [B, S, H, K] of all streams, lse [B, H, S]) by one launch; arguments as those of `qk_norm_rope`."""
    return _forward(_rope_call(streams, scales, cos, sin, eps, tiles), False)


def rope_attention_backward(
    dout_BSHK: Tensor,
    streams: Sequence[Tensor],
    scales: Sequence[ScalePair],
    cos: Tensor,
    sin: Tensor,
    out_BSHK: Tensor,
    lse_BHS: Tensor,
    eps: float,
    *,
    tiles: Tiles | None = None,
) -> tuple[list[Tensor], list[ScalePair]]:
    """The gradient of every stream's qkv, contiguous, and of every pair of scales."""
    call = _rope_call(streams, scales, cos, sin, eps, tiles)
    d_streams = [torch.empty(stream.shape, dtype=stream.dtype, device=stream.device) for stream in streams]
    partial = _backward(call, dout_BSHK, out_BSHK, lse_BHS, None, [_slots(d_stream) for d_stream in d_streams])
    assert partial is not None
    return d_streams, _launch_scales(call, partial)


def _launch_scales(call: _Call, partial: Tensor) -> list[ScalePair]:
    """The second stage: 32 bytes of a row for each program, so that there are enough of them."""
    B, _, H, K = call.first.shape
    columns = 8
    d_scales = [(torch.empty_like(q_scale), torch.empty_like(k_scale)) for q_scale, k_scale in call.scales]
    d_q1_scale, d_k1_scale = d_scales[1] if len(d_scales) > 1 else (None, None)
    rows = [
        [B * H * -(-tokens // tile.rows) for tokens in (*call.tokens, 0)[:2]]
        for tile in (call.tiles.queries, call.tiles.keys)
    ]
    launch.launch(
        _scales_kernel,
        (2 * len(d_scales) * -(-K // columns),),
        num_warps=8,
        partial_ptr=partial,
        d_q_scale_ptr=d_scales[0][0],
        d_k_scale_ptr=d_scales[0][1],
        d_q1_scale_ptr=d_q1_scale,
        d_k1_scale_ptr=d_k1_scale,
        q_rows=rows[0][0],
        q1_rows=rows[0][1],
        k_rows=rows[1][0],
        k1_rows=rows[1][1],
        K=K,
        ROWS=512,
        COLUMNS=columns,
        STREAMS=len(d_scales),
        COMPUTE=launch.compute_type(partial.dtype),
    )
    return d_scales


def _plain_call(q: Tensor, k: Tensor, v: Tensor, scale: float, tiles: Tiles | None) -> _Call:
    if not scale > 0:
        raise ValueError(f"scale is {scale}; the Triton attention takes scales above 0: negate q instead")
    q, k, v = (_channels_together(x) for x in (q, k, v))
    return _Call(parts=[(q, k, v)], scale=scale, tiles=tiles or _tiles(q, fused=False))


def _rope_call(
    streams: Sequence[Tensor],
    scales: Sequence[ScalePair],
    cos: Tensor,
    sin: Tensor,
    eps: float,
    tiles: Tiles | None,
) -> _Call:
    if len({stream.stride()[1:] for stream in streams}) > 1 or streams[0].stride(-1) != 1:
        # Not `contiguous`, to which the strides of an axis of size 1 do not matter: of the other stream they do.
        streams = [stream.clone(memory_format=torch.contiguous_format) for stream in streams]
    if cos.stride() != sin.stride() or cos.stride(-1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    return _Call(
        parts=[_slots(stream) for stream in streams],
        scale=streams[0].shape[-1] ** -0.5,
        tiles=tiles or _tiles(streams[0], fused=True),
        scales=scales,
        cos=cos,
        sin=sin,
        eps=eps,
    )


def _slots(qkv_BT3HK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv_BT3HK.unbind(2)
    return q, k, v


def _tiles(x: Tensor, *, fused: bool) -> Tiles:
    """On a device that is not here, such as a meta tensor's, those of sm_90."""
    if x.device.type != "cuda":
        return choose_tiles(x.shape[-1], x.element_size(), fused=fused)
    properties = torch.cuda.get_device_properties(x.device)
    shared = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    return choose_tiles(x.shape[-1], x.element_size(), fused=fused, shared=shared)


def _operand_type(dtype: torch.dtype):
    """What operands of a product are: the interpreter cannot multiply bfloat16, and sums float16 in float16."""
    narrow = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    return launch.compute_type(dtype) if launch.INTERPRETED or dtype not in narrow else narrow[dtype]


def _channels_together(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(**tensors: Tensor) -> dict[str, int]:
    """The strides of [B, T, H, K] tensors by name and axis; channels lie together."""
    return {
        f"{name}_stride_{axis}": stride
        for name, tensor in tensors.items()
        for axis, stride in zip("bth", tensor.stride(), strict=False)
    }
