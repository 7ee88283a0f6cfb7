"""Attention in plain PyTorch, a block of queries at a time: the oracle of every other candidate.

    S = scale * q k^T;   lse = logsumexp_T(S);   out = softmax_T(S) v

Backward, with the lse and out that it is given:

    P = exp(S - lse);   D = rowsum_K(dout * out) - dlse;   dS = P * (dout v^T - D)
    dq = scale * dS k;   dk = scale * dS^T q;   dv = P^T dout

Given the lse and out of a longer row of keys, and a part of those keys, the backward gives that part's share of dq and
its dk and dv.

Shapes      B batch, S query tokens, T key tokens, H heads, K channels of a head.
            q, out, dq [B, S, H, K];  k, v, dk, dv [B, T, H, K];  lse, dlse [B, H, S].
Numerics    float32 (float64 for float64) inside; the results in the dtype of q, or with `wide` in that wider one.
            lse is wide always, natural, and -inf without keys (T = 0, where out is 0). In the backward a row with lse
            -inf has no gradient. Autocast changes nothing.
Memory      what is quadratic in tokens is held for `BLOCK_ELEMENTS` scores at once, three such blocks in the backward.
Determinism no atomics; bitwise equal over runs at one number of threads.
Source      FlashAttention-2 (arXiv 2307.08691) for the backward by lse.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 24  # 64 MiB of float32


def attention_reference(
    q_BSHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, scale: float | None = None, *, wide: bool = False
) -> tuple[Tensor, Tensor]:
    """(out, lse); scale is K^-1/2 by default."""
    compute = torch.promote_types(q_BSHK.dtype, torch.float32)
    scale = q_BSHK.shape[-1] ** -0.5 if scale is None else scale
    q_BHSK, k_BHTK, v_BHTK = (_heads_first(x, compute) for x in (q_BSHK, k_BTHK, v_BTHK))
    outs, lses = [], []
    with torch.autocast(q_BSHK.device.type, enabled=False):
        for rows in _query_blocks(q_BHSK, k_BHTK):
            scores_BHRT = (q_BHSK[:, :, rows] @ k_BHTK.mT) * scale
            lses.append(scores_BHRT.logsumexp(dim=-1))
            outs.append((scores_BHRT.softmax(dim=-1) @ v_BHTK).transpose(1, 2))
    out_dtype = compute if wide else q_BSHK.dtype
    return torch.cat(outs, dim=1).to(out_dtype).contiguous(), torch.cat(lses, dim=2)


def attention_backward_reference(
    dout_BSHK: Tensor,
    q_BSHK: Tensor,
    k_BTHK: Tensor,
    v_BTHK: Tensor,
    out_BSHK: Tensor,
    lse_BHS: Tensor,
    scale: float | None = None,
    *,
    dlse: Tensor | None = None,
    wide: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), contiguous."""
    compute = torch.promote_types(q_BSHK.dtype, torch.float32)
    scale = q_BSHK.shape[-1] ** -0.5 if scale is None else scale
    dout, q, k, v = (_heads_first(x, compute) for x in (dout_BSHK, q_BSHK, k_BTHK, v_BTHK))
    d_BHS = (dout * out_BSHK.to(compute).transpose(1, 2)).sum(dim=-1)
    if dlse is not None:
        d_BHS = d_BHS - dlse
    lse_BHS = lse_BHS.masked_fill(lse_BHS == -torch.inf, torch.inf)  # then P is 0
    dq_blocks, dk, dv = [], torch.zeros_like(k), torch.zeros_like(v)
    with torch.autocast(q_BSHK.device.type, enabled=False):
        for rows in _query_blocks(q, k):
            p_BHRT = ((q[:, :, rows] @ k.mT) * scale - lse_BHS[:, :, rows, None]).exp()
            dv += p_BHRT.mT @ dout[:, :, rows]
            ds_BHRT = p_BHRT * (dout[:, :, rows] @ v.mT - d_BHS[:, :, rows, None])
            dq_blocks.append(ds_BHRT @ k * scale)
            dk += ds_BHRT.mT @ q[:, :, rows] * scale
    out_dtype = compute if wide else q_BSHK.dtype
    dq, dk, dv = (x.transpose(1, 2).to(out_dtype).contiguous() for x in (torch.cat(dq_blocks, dim=2), dk, dv))
    return dq, dk, dv


def _heads_first(x_BSHK: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, H, S, K], contiguous: a product over strided heads would copy its operands for every block of queries."""
    return x_BSHK.to(dtype).transpose(1, 2).contiguous()


def _query_blocks(q_BHSK: Tensor, k_BHTK: Tensor) -> Iterator[slice]:
    """Ranges of queries that are all of them together; one empty range where there are none."""
    B, H, S, _ = q_BHSK.shape
    rows = max(1, BLOCK_ELEMENTS // max(1, B * H * k_BHTK.shape[2]))
    return (slice(start, start + rows) for start in range(0, max(1, S), rows))
