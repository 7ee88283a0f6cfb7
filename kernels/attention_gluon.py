"""Attention for Hopper in Gluon: one warp loads, two warpgroups multiply, and each hides its softmax under a product.

    S = scale * q k^T;   lse = logsumexp_T(S);   out = softmax_T(S) v

Backward, by the lse and out that are given, with D = rowsum_K(dout * out) - dlse:

    P = exp(S - lse);   dS = P * (dout v^T - D);   dq = scale * dS k;   dk = scale * dS^T q;   dv = P^T dout

Forward     A block of threads owns 128 queries of one head: consumers 0 and 1, four warps each, 64 queries each. The
            producer, one warp, brings K and V by TMA, tile after tile, last tile first: only the first one that
            arrives can be cut short by the end of the keys. A consumer's step i, each product asynchronous:

                tensor cores   S(i+1) = Q K^T | out += P(i) V      |
                other units                   | softmax of S(i+1)  | out *= alpha

            Both consumers issue in turns, so that the one's products run under the other's softmax too:

                consumer 0     products | softmax  | products | softmax
                consumer 1     softmax  | products | softmax  | products

Backward    A block owns 128 keys of one head, consumer c their half c, and goes through the queries, 64 at a time. It
            computes S^T = K Q^T, so that P^T and dS^T are in registers as the products for dv and dk want them. dk and
            dv stay in registers. dS^T also goes to shared memory, where both consumers read all of it: each makes one
            half of dq's channels, which TMA adds to a float32 tensor.

                tensor cores   S^T | dP^T - D | dv += P^T dout | dk += dS^T Q | dq = dS K
                other units        | P^T      | dS^T           |              | store of the dq before

            The accumulator of dP^T starts at -D: the subtraction is free, and D needs no registers of its own later.

Barriers    An mbarrier counts arrivals and bytes; a phase ends when both are complete. The waiter of the n-th use of
            one of STAGES buffers waits for parity n % 2; who fills a buffer for the first time does not wait.

                forward    q_full[c]            1, the producer and its bytes   Q of consumer c is there
                           k_full, v_full[s]    1, the producer and its bytes   a tile is there
                           k_empty, v_empty[s]  2, the consumers                nobody reads the tile any more
                           turn[c]              1, the other consumer           c may issue its products
                backward   kv_full              1, the producer and its bytes   K and V are there
                           full[s]              1, the producer and its bytes   Q, dout, lse and D of 64 queries are
                           empty[s]             2, the consumers                nobody reads them any more
                           ds_full[s]           2, the consumers                both halves of dS^T are written

            dS^T has two buffers, and no barrier says when one is free: who passes ds_full of step i knows that the
            other has written dS^T(i), so that its product with dS^T(i-1), waited for before that, is done.
Shapes      B batch, S query tokens, T key tokens, H heads, K channels of a head.
            q, out, dq [B, S, H, K];  k, v, dk, dv [B, T, H, K];  lse, dlse [B, H, S] float32.
Numerics    bfloat16 or float16 in; products accumulate in float32, P and dS are rounded to the inputs' dtype for their
            second product, all else is float32. `wide` gives float32 results, which are rounded once less. A row with
            lse -inf has no gradient.
Envelope    compute capability 9.x, K = 128, scale > 0, B and H up to 65,535; S and T are arbitrary. TMA wants
            contiguous channels, other strides of a multiple of 16 bytes and an aligned start; what has none is copied.
Registers   24 for a thread of the producer, 240 for one of the consumers, which the forward fills with S 64, out 64
            and P 32, and the backward with dk 64, dv 64, S^T, dP^T (later dq) 32 each, P^T and dS^T 16 each.
Shared      160 KB forward: Q 32, K and V 2 x 32 each. 193 KB backward: K, V, 2 x (Q, dout), 2 x dS^T, dq 32 each.
Determinism out, lse, dk and dv are bitwise equal over runs. dq is not: key tiles add to it in any order. Under
            `torch.use_deterministic_algorithms` `missing` refuses.
Proved      On CPU: both kernels compile for sm_90a without a spill (`bench --aot`); and this very source, run under
            stand-ins for the hardware's asynchrony (tests/kernels/gluon_emulator.py), gives the right numbers in
            hundreds of orders of its threads, and hangs in none. No GPU has run them: that the layouts agree with the
            hardware, and the speed, are not proved.
Source      FlashAttention-3 (arXiv 2407.08608) for the schedule, FlashAttention-2 (arXiv 2307.08691) for the backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from opensora_fast.kernels import launch
from opensora_fast.kernels.launch import jit, tl

try:
    from triton._C.libtriton import ir
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language._core import builtin
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
except ImportError as error:
    _MISSING = f"Gluon cannot be imported ({error}); `pip install 'triton>=3.6'` adds it"
else:
    _MISSING = ""

DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIM = 128
MAX_GRID = 65535  # blocks along each axis of a grid but the first
CAPABILITY = 9  # wgmma exists on no other
LOG2_E = 1 / math.log(2)


# One machine code for all sizes: knowing what divides them would change the allocation of registers, which is tight.
SIZES = ("queries", "keys", "heads", "query_tiles")


def gluon_jit(function: Callable) -> Any:
    """`gluon.jit`; where Gluon is missing, the function itself, which nothing then calls."""
    return function if _MISSING else gluon.jit(function, do_not_specialize=SIZES)


def missing(shape_of_q: Sequence[int], dtype: torch.dtype, device_type: str) -> str:
    """Why these kernels cannot run (within `launch.recorded()`: be listed) on such tensors, "" when they can."""
    if _MISSING:
        return _MISSING
    if dtype not in DTYPES:
        return f"the Gluon attention takes bfloat16 and float16, not {dtype}"
    B, _, H, K = shape_of_q
    if K != HEAD_DIM:
        return f"the Gluon attention takes heads of {HEAD_DIM} channels, not {K}"
    if max(B, H) > MAX_GRID:
        return f"the Gluon attention takes up to {MAX_GRID} samples and heads, not {B} and {H}"
    if torch.are_deterministic_algorithms_enabled():
        return "torch.use_deterministic_algorithms is on, and the Gluon attention sums dq in any order"
    if device_type == "cpu":
        return "Gluon has no interpreter: its kernels do not run on CPU tensors"
    if device_type != "cuda":
        return launch.missing(device_type)
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if major != CAPABILITY:
        return f"the Gluon attention needs compute capability {CAPABILITY}.x, this GPU has {major}.{minor}"
    return ""


# Tiles. A warpgroup multiplies 64 rows at once. 128 keys of the forward and 64 queries of the backward are the most
# columns of S that leave room in 240 registers for what is accumulated and for the operand that is in flight.

ROWS = 64  # of a consumer
FORWARD_KEYS = 128
BACKWARD_QUERIES = 64
STAGES = 2


# Device code, forward. `tiles` and `barriers` are tuples of shared memory, `who` is 0 or 1 of the consumers.


@gluon_jit
def _matrix(tile):
    """A tile as TMA moves it, [1, 1, rows, columns], as the matrix [rows, columns]: the same bytes, swizzled alike."""
    rows: gl.constexpr = tile.shape[-2]
    columns: gl.constexpr = tile.shape[-1]
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([rows, columns], tile.dtype)
    return tile._reinterpret(tile.dtype, [rows, columns], layout)


@gluon_jit
def _allocate_barriers(number: gl.constexpr, count: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [number, 1], mbarrier.MBarrierLayout())
    for index in gl.static_range(number):
        mbarrier.init(barriers.index(index), count=count)
    return barriers


@gluon_jit
def _forward_kernel(
    q_desc,
    k_desc,
    v_desc,
    out_ptr,
    lse_ptr,
    queries,
    keys,
    heads,
    scale_log2,
    STAGES: gl.constexpr,
):
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [2] + q_desc.block_type.shape, q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + k_desc.block_type.shape, k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES] + v_desc.block_type.shape, v_desc.layout)
    q_full = _allocate_barriers(2, count=1)
    k_full = _allocate_barriers(STAGES, count=1)
    k_empty = _allocate_barriers(STAGES, count=2)
    v_full = _allocate_barriers(STAGES, count=1)
    v_empty = _allocate_barriers(STAGES, count=2)
    turn = _allocate_barriers(2, count=1)
    tiles = (q_smem, k_smem, v_smem)
    barriers = (q_full, k_full, k_empty, v_full, v_empty, turn)

    first_query = gl.program_id(0) * (2 * q_smem.shape[-2])
    head = gl.program_id(1)
    batch = gl.program_id(2)
    outputs = (out_ptr, lse_ptr, batch, head, first_query, queries, heads)
    gl.warp_specialize(
        [
            (_forward_consumer, (0, tiles, barriers, outputs, keys, scale_log2)),
            (_forward_consumer, (1, tiles, barriers, outputs, keys, scale_log2)),
            (_forward_producer, ((q_desc, k_desc, v_desc), tiles, barriers, batch, head, first_query, keys)),
        ],
        worker_num_warps=[4, 1],
        worker_num_regs=[240, 24],
    )


@gluon_jit
def _forward_producer(descs, tiles, barriers, batch, head, first_query, keys):
    q_desc, k_desc, v_desc = descs
    q_smem, k_smem, v_smem = tiles
    q_full, k_full, k_empty, v_full, v_empty, _ = barriers
    rows: gl.constexpr = q_smem.shape[-2]
    stages: gl.constexpr = k_smem.shape[0]
    tile_keys: gl.constexpr = k_smem.shape[-2]
    for who in gl.static_range(2):
        bar = q_full.index(who)
        mbarrier.expect(bar, q_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(q_desc, [batch, head, first_query + who * rows, 0], bar, q_smem.index(who))
    steps = gl.cdiv(keys, tile_keys)
    for step in range(steps):
        stage = step % stages
        parity = step // stages & 1
        where = [batch, head, (steps - 1 - step) * tile_keys, 0]
        mbarrier.wait(k_empty.index(stage), parity ^ 1)
        mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(k_desc, where, k_full.index(stage), k_smem.index(stage))
        mbarrier.wait(v_empty.index(stage), parity ^ 1)
        mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(v_desc, where, v_full.index(stage), v_smem.index(stage))


@gluon_jit
def _forward_consumer(who: gl.constexpr, tiles, barriers, outputs, keys, scale_log2):
    q_smem, k_smem, v_smem = tiles
    q_full, k_full, k_empty, v_full, v_empty, turn = barriers
    out_ptr, lse_ptr, batch, head, first_query, queries, heads = outputs
    rows: gl.constexpr = q_smem.shape[-2]
    stages: gl.constexpr = k_smem.shape[0]
    tile_keys: gl.constexpr = k_smem.shape[-2]
    K: gl.constexpr = q_smem.shape[-1]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, tile_keys, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, out_layout)
    steps = gl.cdiv(keys, tile_keys)

    # The first tile, which may hold fewer keys than it has room for.
    q = _matrix(q_smem.index(who))
    no_s = gl.zeros([rows, tile_keys], gl.float32, s_layout)
    mbarrier.wait(q_full.index(who), 0)
    mbarrier.wait(k_full.index(0), 0)
    s = warpgroup_mma(q, _matrix(k_smem.index(0)).permute((1, 0)), no_s, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(k_empty.index(0))
    key = (steps - 1) * tile_keys + gl.arange(0, tile_keys, gl.SliceLayout(0, s_layout))
    s = gl.where((key < keys)[None, :], s, float("-inf"))
    maximum = gl.max(s, 1) * scale_log2
    p_wide = gl.exp2(s * scale_log2 - maximum[:, None])
    total = gl.sum(p_wide, 1)
    p = gl.convert_layout(p_wide.to(q_smem.dtype), p_layout)
    out = gl.zeros([rows, K], gl.float32, out_layout)
    mbarrier.wait(k_full.index(1 % stages), 1 // stages & 1, pred=steps > 1)

    for step in range(1, steps):
        stage = step % stages
        v_stage = (step - 1) % stages
        # Consumer 0 has the first turn: it waits for the parity that a fresh barrier already shows as complete.
        mbarrier.wait(turn.index(who), (step ^ who) & 1)
        s = warpgroup_mma(q, _matrix(k_smem.index(stage)).permute((1, 0)), no_s, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(v_stage), (step - 1) // stages & 1)
        out = warpgroup_mma(p, _matrix(v_smem.index(v_stage)), out, is_async=True)
        mbarrier.arrive(turn.index(1 - who))

        s = warpgroup_mma_wait(1, deps=[s])
        mbarrier.arrive(k_empty.index(stage))
        new_maximum = gl.maximum(maximum, gl.max(s, 1) * scale_log2)
        alpha = gl.exp2(maximum - new_maximum)
        maximum = new_maximum
        p_wide = gl.exp2(s * scale_log2 - maximum[:, None])
        total = total * alpha + gl.sum(p_wide, 1)

        # The next step's wait for K stands here and not where K is used: ptxas would move the wait for the product up
        # to the other one, in front of the softmax, and it moves nothing across the loop of a wait for a barrier.
        mbarrier.wait(k_full.index((step + 1) % stages), (step + 1) // stages & 1, pred=step + 1 < steps)
        out = warpgroup_mma_wait(0, deps=[out])
        mbarrier.arrive(v_empty.index(v_stage))
        out = out * gl.convert_layout(alpha, row_layout)[:, None]
        p = gl.convert_layout(p_wide.to(q_smem.dtype), p_layout)

    v_stage = (steps - 1) % stages
    mbarrier.wait(v_full.index(v_stage), (steps - 1) // stages & 1)
    out = warpgroup_mma(p, _matrix(v_smem.index(v_stage)), out, is_async=True)
    out = warpgroup_mma_wait(0, deps=[out])

    total = gl.convert_layout(total, row_layout)
    maximum = gl.convert_layout(maximum, row_layout)
    query = first_query + who * rows + gl.arange(0, rows, row_layout)
    lse = (maximum + gl.log2(total)) * 0.6931471805599453  # ln 2
    gl.store(lse_ptr + (batch.to(gl.int64) * heads + head) * queries + query, lse, mask=query < queries)
    _store_rows(out_ptr, out * (1 / total)[:, None], batch, head, heads, first_query + who * rows, queries, out_layout)


@gluon_jit
def _store_rows(ptr, tile, batch, head, heads, first, tokens, layout: gl.constexpr):
    """A tile [rows, K] of one head into a contiguous [B, tokens, H, K], from token `first` on, cut at the last one."""
    rows: gl.constexpr = tile.shape[0]
    K: gl.constexpr = tile.shape[1]
    token = gl.arange(0, rows, gl.SliceLayout(1, layout))
    channel = gl.arange(0, K, gl.SliceLayout(0, layout))
    base = ptr + ((batch.to(gl.int64) * tokens + first) * heads + head) * K
    offset = (token * heads * K)[:, None] + channel[None, :]
    gl.store(base + offset, tile.to(ptr.dtype.element_ty), mask=(first + token < tokens)[:, None])


# Device code, backward.


if not _MISSING:

    @builtin
    def _async_add_shared_to_global(tensor_desc, coord, src, _semantic=None):
        """Adds shared memory to the tensor by TMA; `tma.store_wait` waits until the memory has been read."""
        coord = _semantic._convert_to_ir_values(coord, require_i64=False)
        kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
        _semantic.builder.create_async_tma_reduce(kind, tensor_desc.handle, coord, src.handle)


@jit
def _row_terms_kernel(
    dout_ptr,
    out_ptr,
    lse_ptr,
    dlse_ptr,
    terms_ptr,
    queries,
    tiles,
    heads,
    dout_stride_b,
    dout_stride_s,
    dout_stride_h,
    out_stride_b,
    out_stride_s,
    out_stride_h,
    K: tl.constexpr,
    ROWS: tl.constexpr,
):
    """log2(e) * lse and -D of ROWS queries of a head; inf instead of lse where it is -inf or no query is: P is 0."""
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64)
    query = program % tiles * ROWS + tl.arange(0, ROWS)
    batch, head = row // heads, row % heads
    exists = query < queries
    k = tl.arange(0, K)[None, :]
    token = query.to(tl.int64)[:, None]
    dout_offset = batch * dout_stride_b + token * dout_stride_s + head * dout_stride_h + k
    out_offset = batch * out_stride_b + token * out_stride_s + head * out_stride_h + k
    dout = tl.load(dout_ptr + dout_offset, mask=exists[:, None], other=0).to(tl.float32)
    out = tl.load(out_ptr + out_offset, mask=exists[:, None], other=0).to(tl.float32)
    minus_d = -tl.sum(dout * out, axis=1)
    if dlse_ptr is not None:
        minus_d += tl.load(dlse_ptr + row * queries + query, mask=exists, other=0)
    lse = tl.load(lse_ptr + row * queries + query, mask=exists, other=float("inf"))
    term_ptr = terms_ptr + program.to(tl.int64) * (2 * ROWS) + tl.arange(0, ROWS)
    tl.store(term_ptr, tl.where(lse == float("-inf"), float("inf"), lse * 1.4426950408889634))
    tl.store(term_ptr + ROWS, minus_d)


@gluon_jit
def _backward_kernel(
    q_desc,
    dout_desc,
    k_desc,
    v_desc,
    terms_desc,
    dq_desc,
    dk_ptr,
    dv_ptr,
    query_tiles,
    keys,
    heads,
    scale,
    scale_log2,
    STAGES: gl.constexpr,
):
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [STAGES] + q_desc.block_type.shape, q_desc.layout)
    dout_smem = gl.allocate_shared_memory(q_desc.dtype, [STAGES] + q_desc.block_type.shape, q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, k_desc.block_type.shape, k_desc.layout)
    v_smem = gl.allocate_shared_memory(k_desc.dtype, k_desc.block_type.shape, k_desc.layout)
    terms_smem = gl.allocate_shared_memory(gl.float32, [STAGES] + terms_desc.block_type.shape, terms_desc.layout)
    ds_shape: gl.constexpr = [k_smem.shape[-2], q_smem.shape[-2]]  # dS^T: keys by queries
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for(ds_shape, q_desc.dtype)
    ds_smem = gl.allocate_shared_memory(q_desc.dtype, [STAGES] + ds_shape, ds_layout)
    dq_smem = gl.allocate_shared_memory(gl.float32, [2] + dq_desc.block_type.shape, dq_desc.layout)
    kv_full = _allocate_barriers(1, count=1)
    full = _allocate_barriers(STAGES, count=1)
    empty = _allocate_barriers(STAGES, count=2)
    ds_full = _allocate_barriers(STAGES, count=2)
    descs = (q_desc, dout_desc, k_desc, v_desc, terms_desc)
    tiles = (q_smem, dout_smem, k_smem, v_smem, terms_smem)
    barriers = (kv_full, full, empty, ds_full)

    first_key = gl.program_id(0) * k_smem.shape[-2]
    head = gl.program_id(1)
    batch = gl.program_id(2)
    outputs = (dq_desc, dk_ptr, dv_ptr, batch, head, first_key, keys, heads)
    scratch = (ds_smem, dq_smem)
    gl.warp_specialize(
        [
            (_backward_consumer, (0, tiles, scratch, barriers, outputs, query_tiles, scale, scale_log2)),
            (_backward_consumer, (1, tiles, scratch, barriers, outputs, query_tiles, scale, scale_log2)),
            (_backward_producer, (descs, tiles, barriers, batch, head, first_key, query_tiles)),
        ],
        worker_num_warps=[4, 1],
        worker_num_regs=[240, 24],
    )


@gluon_jit
def _backward_producer(descs, tiles, barriers, batch, head, first_key, query_tiles):
    q_desc, dout_desc, k_desc, v_desc, terms_desc = descs
    q_smem, dout_smem, k_smem, v_smem, terms_smem = tiles
    kv_full, full, empty, _ = barriers
    stages: gl.constexpr = q_smem.shape[0]
    tile_queries: gl.constexpr = q_smem.shape[-2]
    stage_bytes: gl.constexpr = 2 * q_desc.block_type.nbytes + terms_desc.block_type.nbytes
    mbarrier.expect(kv_full.index(0), 2 * k_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(k_desc, [batch, head, first_key, 0], kv_full.index(0), k_smem)
    tma.async_copy_global_to_shared(v_desc, [batch, head, first_key, 0], kv_full.index(0), v_smem)
    for step in range(query_tiles):
        stage = step % stages
        bar = full.index(stage)
        where = [batch, head, step * tile_queries, 0]
        mbarrier.wait(empty.index(stage), (step // stages & 1) ^ 1)
        mbarrier.expect(bar, stage_bytes)
        tma.async_copy_global_to_shared(q_desc, where, bar, q_smem.index(stage))
        tma.async_copy_global_to_shared(dout_desc, where, bar, dout_smem.index(stage))
        tma.async_copy_global_to_shared(terms_desc, [batch, head, step, 0], bar, terms_smem.index(stage))


@gluon_jit
def _backward_consumer(who: gl.constexpr, tiles, scratch, barriers, outputs, query_tiles, scale, scale_log2):
    q_smem, dout_smem, k_smem, v_smem, terms_smem = tiles
    ds_smem, dq_smem = scratch
    kv_full, full, empty, ds_full = barriers
    dq_desc, dk_ptr, dv_ptr, batch, head, first_key, keys, heads = outputs
    stages: gl.constexpr = q_smem.shape[0]
    tile_queries: gl.constexpr = q_smem.shape[-2]
    rows: gl.constexpr = k_smem.shape[-2] // 2
    K: gl.constexpr = q_smem.shape[-1]
    half_K: gl.constexpr = K // 2
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, tile_queries, 16])
    dk_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, half_K, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, dk_layout, 2)
    query_layout: gl.constexpr = gl.SliceLayout(0, s_layout)
    terms_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([2 * tile_queries], gl.float32)
    k = _matrix(k_smem).slice(who * rows, rows, dim=0)
    v = _matrix(v_smem).slice(who * rows, rows, dim=0)
    k_half = _matrix(k_smem).slice(who * half_K, half_K, dim=1)
    no_s = gl.zeros([rows, tile_queries], gl.float32, s_layout)
    no_dq = gl.zeros([tile_queries, half_K], gl.float32, dq_layout)
    dk = gl.zeros([rows, K], gl.float32, dk_layout)
    dv = gl.zeros([rows, K], gl.float32, dk_layout)
    key = first_key + who * rows + gl.arange(0, rows, gl.SliceLayout(1, s_layout))
    exists = (key < keys)[:, None]

    mbarrier.wait(kv_full.index(0), 0)
    for step in range(query_tiles):
        stage = step % stages
        parity = step // stages & 1
        q = _matrix(q_smem.index(stage))
        dout = _matrix(dout_smem.index(stage))
        mbarrier.wait(full.index(stage), parity)
        terms = terms_smem.index(stage)._reinterpret(gl.float32, [2 * tile_queries], terms_layout)
        minus_d = terms.slice(tile_queries, tile_queries).load(query_layout)
        minus_d = gl.where(exists, minus_d[None, :], 0.0)
        s = warpgroup_mma(k, q.permute((1, 0)), no_s, use_acc=False, is_async=True)
        dp = warpgroup_mma(v, dout.permute((1, 0)), minus_d, is_async=True)
        lse_log2 = terms.slice(0, tile_queries).load(query_layout)

        # Without the choice, a key that does not exist has P = exp(-lse), which overflows, and its 0 in K makes NaN.
        s = warpgroup_mma_wait(1, deps=[s])
        p = gl.where(exists, gl.exp2(s * scale_log2 - lse_log2[None, :]), 0.0)
        dv = warpgroup_mma(gl.convert_layout(p.to(q_smem.dtype), p_layout), dout, dv, is_async=True)
        dp = warpgroup_mma_wait(1, deps=[dp])
        ds = (p * dp).to(q_smem.dtype)

        ds_both = ds_smem.index(stage)
        ds_both.slice(who * rows, rows, dim=0).store(ds)
        fence_async_shared()
        mbarrier.arrive(ds_full.index(stage))
        dk = warpgroup_mma(gl.convert_layout(ds, p_layout), q, dk, is_async=True)
        mbarrier.wait(ds_full.index(stage), parity)
        dq = warpgroup_mma(ds_both.permute((1, 0)), k_half, no_dq, use_acc=False, is_async=True)
        dv, dk = warpgroup_mma_wait(1, deps=[dv, dk])
        mbarrier.arrive(empty.index(stage))

        tma.store_wait(0)
        dq = warpgroup_mma_wait(0, deps=[dq])
        _matrix(dq_smem.index(who)).store(dq)
        fence_async_shared()
        where = [batch, head, step * tile_queries, who * half_K]
        _async_add_shared_to_global(dq_desc, where, dq_smem.index(who))

    tma.store_wait(0)
    _store_rows(dk_ptr, dk * scale, batch, head, heads, first_key + who * rows, keys, dk_layout)
    _store_rows(dv_ptr, dv, batch, head, heads, first_key + who * rows, keys, dk_layout)


# Launchers.


def attention_forward(
    q_BSHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, scale: float, *, wide: bool = False
) -> tuple[Tensor, Tensor]:
    """(out [B, S, H, K], lse [B, H, S]), contiguous; out in the dtype of q, or with `wide` in float32."""
    _check(q_BSHK, k_BTHK, v_BTHK, scale)
    B, S, H, K = q_BSHK.shape
    T, device = k_BTHK.shape[1], q_BSHK.device
    out = torch.empty((B, S, H, K), dtype=torch.float32 if wide else q_BSHK.dtype, device=device)
    lse = torch.empty((B, H, S), dtype=torch.float32, device=device)
    if not T:
        return out.zero_(), lse.fill_(-math.inf)
    if out.numel():
        launch.launch(
            _forward_kernel,
            (-(-S // (2 * ROWS)), H, B),
            q_desc=_descriptor(q_BSHK, ROWS),
            k_desc=_descriptor(k_BTHK, FORWARD_KEYS),
            v_desc=_descriptor(v_BTHK, FORWARD_KEYS),
            out_ptr=out,
            lse_ptr=lse,
            queries=S,
            keys=T,
            heads=H,
            scale_log2=scale * LOG2_E,
            STAGES=STAGES,
        )
    return out, lse


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
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), contiguous, in the dtype of q, or with `wide` in float32; from the lse and out that are given."""
    _check(q_BSHK, k_BTHK, v_BTHK, scale)
    B, S, H, K = q_BSHK.shape
    T, device = k_BTHK.shape[1], q_BSHK.device
    dtype = torch.float32 if wide else q_BSHK.dtype
    dq_sum = torch.zeros((B, S, H, K), dtype=torch.float32, device=device)
    if not dq_sum.numel() or not T:
        return (
            dq_sum.to(dtype),
            k_BTHK.new_zeros((B, T, H, K), dtype=dtype),
            v_BTHK.new_zeros((B, T, H, K), dtype=dtype),
        )
    dk, dv = (torch.empty((B, T, H, K), dtype=dtype, device=device) for _ in range(2))
    query_tiles = -(-S // BACKWARD_QUERIES)
    terms = _row_terms(dout_BSHK, out_BSHK, lse_BHS, dlse, query_tiles)
    launch.launch(
        _backward_kernel,
        (-(-T // (2 * ROWS)), H, B),
        q_desc=_descriptor(q_BSHK, BACKWARD_QUERIES),
        dout_desc=_descriptor(dout_BSHK.to(q_BSHK.dtype), BACKWARD_QUERIES),
        k_desc=_descriptor(k_BTHK, 2 * ROWS),
        v_desc=_descriptor(v_BTHK, 2 * ROWS),
        terms_desc=_descriptor(terms.transpose(1, 2), 1),
        dq_desc=_descriptor(dq_sum, BACKWARD_QUERIES, K // 2),
        dk_ptr=dk,
        dv_ptr=dv,
        query_tiles=query_tiles,
        keys=T,
        heads=H,
        scale=scale,
        scale_log2=scale * LOG2_E,
        STAGES=STAGES,
    )
    dq = dq_sum if wide else torch.empty((B, S, H, K), dtype=dtype, device=device)
    return torch.mul(dq_sum, scale, out=dq), dk, dv


def _row_terms(dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None, tiles: int) -> Tensor:
    """[B, H, tiles, 2 * queries of a tile]: log2(e) * lse, then -D."""
    B, S, H, K = out.shape
    dout, out = (x if x.stride(-1) == 1 else x.contiguous() for x in (dout, out))
    terms = torch.empty((B, H, tiles, 2 * BACKWARD_QUERIES), dtype=torch.float32, device=out.device)
    launch.launch(
        _row_terms_kernel,
        (B * H * tiles,),
        dout_ptr=dout,
        out_ptr=out,
        lse_ptr=lse.contiguous(),
        dlse_ptr=None if dlse is None else dlse.contiguous(),
        terms_ptr=terms,
        queries=S,
        tiles=tiles,
        heads=H,
        **dict(zip(("dout_stride_b", "dout_stride_s", "dout_stride_h"), dout.stride()[:3], strict=True)),
        **dict(zip(("out_stride_b", "out_stride_s", "out_stride_h"), out.stride()[:3], strict=True)),
        K=K,
        ROWS=BACKWARD_QUERIES,
    )
    return terms


def _check(q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    """ValueError names what the kernels cannot take."""
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; all must be bfloat16, or all float16")
    if q.shape[-1] != HEAD_DIM:
        raise ValueError(f"q is {list(q.shape)}; the Gluon attention takes {HEAD_DIM} channels in a head")
    if scale <= 0:
        raise ValueError(f"scale is {scale}; it must be positive")


def _descriptor(x_BSHK: Tensor, rows: int, channels: int | None = None) -> Any:
    """What TMA needs to move tiles [rows, channels] of one head; a tensor whose strides it cannot take is copied."""
    B, S, H, K = x_BSHK.shape
    step = 16 // x_BSHK.element_size()
    strides = [stride for stride, size in zip(x_BSHK.stride(), x_BSHK.shape, strict=True) if size > 1]
    aligned = x_BSHK.data_ptr() % 16 == 0 and all(stride > 0 and stride % step == 0 for stride in strides[:-1])
    if not aligned or x_BSHK.stride(-1) != 1:
        x_BSHK = x_BSHK.clone(memory_format=torch.contiguous_format)
    stride_b, stride_s, stride_h = (
        stride if size > 1 else K  # of what there is only one, any will do
        for stride, size in zip(x_BSHK.stride()[:3], x_BSHK.shape[:3], strict=True)
    )
    block = [1, 1, rows, channels or K]
    layout = gl.NVMMASharedLayout.get_default_for(block, _gluon_type(x_BSHK.dtype))
    return TensorDescriptor(x_BSHK, [B, H, S, K], [stride_b, stride_h, stride_s, 1], block, layout)


def _gluon_type(dtype: torch.dtype) -> Any:
    return {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}[dtype]
