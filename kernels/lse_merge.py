"""Two attention results of the same queries over different keys, made into the result over all of these keys.

    m = max(lse_a, lse_b);   w_x = exp(lse_x - m) for x in a, b
    lse = m + log(w_a + w_b);   out = (w_a out_a + w_b out_b) / (w_a + w_b)

No exponent is above 0, so nothing overflows whatever the log-sum-exps are. A block without keys is out = 0 and
lse = -inf; merged with another it changes nothing, and two of them are such a block again. Up to rounding the merge is
commutative and associative: any order of blocks gives one result.

Shapes      B batch, S query tokens, H heads, K channels.  out_a, out_b, out [B, S, H, K];  lse_a, lse_b, lse [B, H, S].
Numerics    out_a and out_b in any dtype each, so that a sum in float32 takes a block in bfloat16; lse float32. Computed
            and returned in float32 (all of it in float64 where out_a or out_b is). Merge wide results and round once.
Envelope    float32, bfloat16, float16, float64; any K; any strides with contiguous channels, others are copied.
Traffic     out_a, out_b and both lse read, out and lse written, each once: memory bound -> the target is bytes/s.
Determinism no reduction over programs: bitwise equal over runs.
Backward    none: attention over blocks gives each block the merged out and lse (FlashAttention-2, section 3.1.2), so
            that no gradient goes through a merge. One that is asked for is refused by name.
Source      Milakov and Gimelshein 2018 (arXiv 1805.02867); Liu et al. 2023 (Ring Attention, arXiv 2310.01889). Unlike
            the composite of sigmoids and softplus it is one pass over memory, and defined where both blocks are empty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opensora_fast.kernels import backend, launch
from opensora_fast.kernels.cost import Cost
from opensora_fast.kernels.launch import jit, tl

# Reference.


def lse_merge_reference(
    out_a_BSHK: Tensor, lse_a_BHS: Tensor, out_b_BSHK: Tensor, lse_b_BHS: Tensor
) -> tuple[Tensor, Tensor]:
    """(out, lse), contiguous."""
    wide = _wide(out_a_BSHK, out_b_BSHK)
    lse_a, lse_b = lse_a_BHS.to(wide), lse_b_BHS.to(wide)
    largest = torch.maximum(lse_a, lse_b)
    base = largest.masked_fill(largest == -torch.inf, 0)  # -inf - -inf would be NaN
    w_a, w_b = (lse_a - base).exp(), (lse_b - base).exp()
    total = w_a + w_b
    lse = (base + total.log()).contiguous()
    share_a, share_b = ((w / total.masked_fill(total == 0, 1)).transpose(1, 2)[..., None] for w in (w_a, w_b))
    out = torch.addcmul(out_a_BSHK.to(wide) * share_a, out_b_BSHK.to(wide), share_b)
    return out.contiguous(), lse


def _wide(out_a: Tensor, out_b: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(out_a.dtype, out_b.dtype), torch.float32)


# Tile choice.


@dataclass(frozen=True)
class Tile:
    """A program merges `tokens` rows of one head, each padded to `block_k` channels."""

    tokens: int
    block_k: int
    num_warps: int


def choose_tile(K: int) -> Tile:
    """16 elements of either block to a thread of 4 warps: rows of 128 channels in float32 are whole lines of memory.

    Modelled, not yet measured on a GPU: 8 loads of 16 bytes in flight a thread cover the latency, and 16 tokens of one
    head read their log-sum-exps, which lie side by side, in whole sectors.
    """
    block_k = launch.power_of_two(K)
    return Tile(tokens=max(1, 2048 // block_k), block_k=block_k, num_warps=4)


# Choice of the implementation.


def missing_backends(dtype: torch.dtype, device_type: str) -> dict[str, str]:
    """The backends for tensors on `device_type`, each with why it cannot run; an empty reason means that it can."""
    return {"reference": "", "triton": launch.missing(device_type)}


def choose(shape: Sequence[int], dtype: torch.dtype, device_type: str, missing: Mapping[str, str]) -> tuple[str, str]:
    """(backend, reason); pure."""
    if device_type == "cpu":
        return "reference", "CPU tensors: PyTorch's own kernels"
    return ("reference", missing["triton"]) if missing["triton"] else ("triton", "one fused pass over memory")


def selected(shape: Sequence[int], dtype: torch.dtype, device_type: str) -> tuple[str, str]:
    """(backend, reason) of a call on such a block, with OPENSORA_FAST_BACKEND obeyed."""
    missing = missing_backends(dtype, device_type)
    return backend.select("lse_merge", choose(shape, dtype, device_type, missing), missing)


def _backend(out: Tensor) -> str:
    device_type = out.device.type
    selection = selected(out.shape, out.dtype, device_type)
    return backend.announced("lse_merge", selection, missing_backends(out.dtype, device_type))


# Device code. A program is a head of a batch item and a block of tokens.


@jit
def _merge_kernel(
    out_a_ptr, lse_a_ptr, out_b_ptr, lse_b_ptr, out_ptr, lse_ptr,
    S, H, token_blocks,
    out_a_stride_b, out_a_stride_s, out_a_stride_h,
    out_b_stride_b, out_b_stride_s, out_b_stride_h,
    K: tl.constexpr, TOKENS: tl.constexpr, BLOCK_K: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    batch, head = program // token_blocks // H, program // token_blocks % H
    s = program % token_blocks * TOKENS + tl.arange(0, TOKENS)  # [tokens]
    k = tl.arange(0, BLOCK_K)
    mask_s = s < S
    mask = mask_s[:, None] & (k < K)[None, :]  # [tokens, channels]

    lse_offset = (batch * H + head) * S + s
    lse_a = tl.load(lse_a_ptr + lse_offset, mask=mask_s, other=0.0).to(COMPUTE)
    lse_b = tl.load(lse_b_ptr + lse_offset, mask=mask_s, other=0.0).to(COMPUTE)
    largest = tl.maximum(lse_a, lse_b)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    w_a, w_b = tl.exp(lse_a - base), tl.exp(lse_b - base)
    total = w_a + w_b
    divisor = tl.where(total == 0, 1.0, total)
    tl.store(lse_ptr + lse_offset, tl.where(total == 0, float("-inf"), base + tl.log(divisor)), mask=mask_s)

    a_offset = batch * out_a_stride_b + s[:, None] * out_a_stride_s + head * out_a_stride_h + k[None, :]
    b_offset = batch * out_b_stride_b + s[:, None] * out_b_stride_s + head * out_b_stride_h + k[None, :]
    out_a = tl.load(out_a_ptr + a_offset, mask=mask, other=0.0).to(COMPUTE)
    out_b = tl.load(out_b_ptr + b_offset, mask=mask, other=0.0).to(COMPUTE)
    out = out_a * (w_a / divisor)[:, None] + out_b * (w_b / divisor)[:, None]
    tl.store(out_ptr + ((batch * S + s[:, None]) * H + head) * K + k[None, :], out, mask=mask)


# Launcher.


def triton_lse_merge(
    out_a_BSHK: Tensor, lse_a_BHS: Tensor, out_b_BSHK: Tensor, lse_b_BHS: Tensor
) -> tuple[Tensor, Tensor]:
    """(out, lse), contiguous."""
    B, S, H, K = out_a_BSHK.shape
    tile, wide = choose_tile(K), _wide(out_a_BSHK, out_b_BSHK)
    out_a, out_b = (x if x.stride(-1) == 1 else x.contiguous() for x in (out_a_BSHK, out_b_BSHK))
    out = torch.empty((B, S, H, K), dtype=wide, device=out_a.device)
    lse = torch.empty((B, H, S), dtype=wide, device=out_a.device)
    token_blocks = -(-S // tile.tokens)
    launch.launch(
        _merge_kernel,
        (B * H * token_blocks,),
        num_warps=tile.num_warps,
        out_a_ptr=out_a,
        lse_a_ptr=lse_a_BHS.contiguous(),
        out_b_ptr=out_b,
        lse_b_ptr=lse_b_BHS.contiguous(),
        out_ptr=out,
        lse_ptr=lse,
        S=S,
        H=H,
        token_blocks=token_blocks,
        **{f"out_a_stride_{axis}": stride for axis, stride in zip("bsh", out_a.stride()[:3], strict=True)},
        **{f"out_b_stride_{axis}": stride for axis, stride in zip("bsh", out_b.stride()[:3], strict=True)},
        K=K,
        TOKENS=tile.tokens,
        BLOCK_K=tile.block_k,
        COMPUTE=launch.compute_type(wide),
    )
    return out, lse


def forward(out_a_BSHK: Tensor, lse_a_BHS: Tensor, out_b_BSHK: Tensor, lse_b_BHS: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) by the selected backend; for use within other ops."""
    merge = triton_lse_merge if _backend(out_a_BSHK) == "triton" else lse_merge_reference
    return merge(out_a_BSHK, lse_a_BHS, out_b_BSHK, lse_b_BHS)


# Op. No autograd: a backward through it is refused by name.


@torch.library.custom_op("opensora_fast::lse_merge", mutates_args=())
def _lse_merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    return forward(out_a, lse_a, out_b, lse_b)


@_lse_merge.register_fake
def _(out_a, lse_a, out_b, lse_b):
    wide = _wide(out_a, out_b)
    return out_a.new_empty(out_a.shape, dtype=wide), lse_a.new_empty(lse_a.shape, dtype=wide)


# Public function.


def lse_merge(out_a_BSHK: Tensor, lse_a_BHS: Tensor, out_b_BSHK: Tensor, lse_b_BHS: Tensor) -> tuple[Tensor, Tensor]:
    """(out [B, S, H, K], lse [B, H, S]) over the keys of both blocks, in float32 (float64 if an out is), contiguous.

    A block without keys is out = 0, lse = -inf. No derivative. ValueError names the argument that is misshapen or of
    another dtype or device.
    """
    if out_a_BSHK.dim() != 4:
        raise ValueError(f"out_a is {list(out_a_BSHK.shape)}; it must be [batch, tokens, heads, channels]")
    B, S, H, _ = out_a_BSHK.shape
    tensors = {"out_a": out_a_BSHK, "lse_a": lse_a_BHS, "out_b": out_b_BSHK, "lse_b": lse_b_BHS}
    for name, tensor in tensors.items():
        expected = out_a_BSHK.shape if name.startswith("out") else (B, H, S)
        if tuple(tensor.shape) != tuple(expected):
            raise ValueError(f"{name} is {list(tensor.shape)}; it must be {list(expected)}, to suit out_a")
        if tensor.dtype not in launch.DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}; it must be float32, bfloat16, float16 or float64")
        if tensor.device != out_a_BSHK.device:
            raise ValueError(f"{name} is on {tensor.device}; it must be on {out_a_BSHK.device}, as out_a is")
    return _lse_merge(out_a_BSHK, lse_a_BHS, out_b_BSHK, lse_b_BHS)


def cost(B: int, S: int, H: int, K: int, dtype: torch.dtype, mode: str) -> Cost:
    """Cost of merging a block in `dtype` into a float32 (float64) sum; mode "forward" is the only one."""
    if mode != "forward":
        raise ValueError(f"mode is {mode!r}; lse_merge has only a forward")
    wide = torch.promote_types(dtype, torch.float32).itemsize
    elements, rows = B * S * H * K, B * S * H
    return Cost(flops=3 * elements + 10 * rows, bytes=elements * (2 * wide + dtype.itemsize) + 3 * rows * wide)
