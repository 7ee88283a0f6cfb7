"""Attention over a sequence that ranks share: all-to-all over heads (Ulysses), a ring over keys, or both.

    ulysses   q, k, v: heads -> sequence;  out, lse = attention(q, k, v) of h heads;  out, lse: sequence -> heads
    ring      block r of k and v passes every rank;  (out, lse) = merge over r of attention(q, k_r, v_r)
    hybrid    the all-to-all within each row of the mesh of ranks, the ring over the rows

Backward: every block of the ring gets the global out and lse, so that with D = rowsum(dout * out)

    P_r = exp(scale q k_r^T - lse);   dS_r = P_r * (dout v_r^T - D)
    dq = scale sum_r dS_r k_r;   dk_r = scale sum over ranks of dS_r^T q;   dv_r = sum over ranks of P_r^T dout

are sums of what each block gives alone; dk_r and dv_r travel on with the block, and end with its owner.

Tokens may be shared out in any way: full attention does not see their order, and norm and rotation come before any
exchange. A rank of text and video holds a part of either, and neither need divide evenly; a rank may hold none.

Shapes      B batch; T tokens of this rank, of all its streams; S tokens of a row of the mesh; H heads; K channels of a
            head; U columns of the mesh (the all-to-all), R rows (the ring), P = U R ranks; h = H / U.
            q, k, v, out [B, T, H, K];  qkv of a stream [B, T, 3, H, K];  kept lse [B, T, H], float32.
Numerics    ulysses: those of `attention` on one rank. ring: partial results, log-sum-exps and gradients summed in
            float32 (float64 for float64) and rounded once, where the backend of `attention` gives a block's results
            as wide; dk and dv travel in float32.
Messages    U' is one [B, T, H, K] tensor. ulysses: q, k, v in one exchange and out, lse in one; backward q, k, v, out,
            dout, lse in one and dq, dk, dv in one: 4 U' (1 - 1/U) sent forward, 8 backward. q, k, v and their gradients
            leave and arrive as the kernels write and read them; out is copied once into [B, T, H, K], and in the
            backward out and dout once into groups of heads. ring: R - 1 steps of k and v (2 U'), in the backward also R
            of dk and dv in float32 (4 U'), each posted before the attention of the block at hand and awaited after it.
            v could leave while q and k are normalised: at 76,544 tokens on 4 ranks that would hide at most 0.2 ms of
            105 (modelled) for one more message, so that it does not pay.
Saved       what `attention` saves, of this rank's tokens: 4 U' and lse. What was exchanged is made and sent again.
Envelope    that of `attention` and `qk_norm_rope`; U divides H, the ring takes any number of heads. ValueError else.
Determinism as the attention's: blocks come in a fixed order.
Source      DeepSpeed-Ulysses (arXiv 2309.14509); Ring Attention (arXiv 2310.01889); USP (arXiv 2405.07719) for both on
            a mesh. Unlike the rings in use, no partial sum is rounded to 16 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from opensora_fast.kernels import attention, lse_merge, qk_norm_rope
from opensora_fast.kernels.context_exchange import (
    Axis,
    Mesh,
    Pending,
    agree,
    axis_of,
    check_lengths,
    exchange,
    to_heads,
    to_sequence,
)
from opensora_fast.kernels.context_exchange import ContextParallelError as ContextParallelError
from opensora_fast.kernels.context_plan import ContextPlan as ContextPlan
from opensora_fast.kernels.context_plan import choose_context_parallel as choose_context_parallel


@dataclass(frozen=True)
class ContextParallel:
    """The ranks that share a sequence, and how: `None` for an axis of one rank.

    lengths: tokens of every rank (of all streams together), where they are known; else each call gathers them first,
    for which the host waits for the device. They are trusted: `agree_lengths` makes sure of them.
    """

    ulysses: ProcessGroup | None
    ring: ProcessGroup | None
    lengths: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name, group in (("ulysses", self.ulysses), ("ring", self.ring)):
            if group is not None:
                _require_group(name, group)

    @property
    def size(self) -> int:
        """Ranks that share the sequence."""
        return _size(self.ulysses) * _size(self.ring)

    @property
    def rank(self) -> int:
        """This rank's place in `lengths`: ring rank * size of ulysses + ulysses rank."""
        return _rank(self.ring) * _size(self.ulysses) + _rank(self.ulysses)

    def with_lengths(self, lengths: Sequence[int]) -> ContextParallel:
        """The same ranks for another sequence."""
        return replace(self, lengths=tuple(lengths))


def _require_group(name: str, group: object) -> None:
    """PyTorch gives a number for the group that a rank does not belong to."""
    if not isinstance(group, ProcessGroup):
        raise ValueError(f"{name} is {group}; it must be a process group of this rank's: context_of makes them")


def _size(group: ProcessGroup | None) -> int:
    return 1 if group is None else group.size()


def _rank(group: ProcessGroup | None) -> int:
    return 0 if group is None else group.rank()


def _name(group: ProcessGroup | None) -> str:
    return "" if group is None else group.group_name


# The ring: what a rank does with one block, and the passing of blocks.

Partial = tuple[Tensor, Tensor]  # out and lse over the keys so far


def merge_block(total: Partial | None, q_BSHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, scale: float) -> Partial:
    """`total` with one more block of keys, in float32 (float64)."""
    part = attention.forward(q_BSHK, k_BTHK, v_BTHK, scale, wide=True)
    return part if total is None else lse_merge.forward(*total, *part)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _ring_forward(axis: Axis, lengths: Sequence[int], q: Tensor, block: list[Tensor], scale: float) -> Partial:
    """(out [B, S, h, K] in the dtype of q, lse [B, h, S]) over the blocks of all rows, of `lengths` tokens.

    block: k and v, a list whose place the others' take in turn, so that nobody keeps what has left.
    """
    if axis.size == 1:
        return attention.forward(q, block[0], block[1], scale)
    block[:] = [x.contiguous() for x in block]
    total = None
    for step in range(axis.size):
        arriving: list[Tensor] = []
        if step < axis.size - 1:
            arriving = _empty_block(block, lengths[(axis.rank - step - 1) % axis.size], q.dtype)
        pending = _pass_on(axis, f"k and v in step {step}", block if arriving else [], arriving)
        total = merge_block(total, q, block[0], block[1], scale)
        pending.wait()
        block[:] = arriving
    assert total is not None
    return total[0].to(q.dtype), total[1]


def _ring_backward(
    axis: Axis,
    lengths: Sequence[int],
    dout: Tensor,
    q: Tensor,
    block: list[Tensor],
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> list[Tensor]:
    """dq, dk and dv of this row's tokens in the dtype of q; `block` as in the forward."""
    if axis.size == 1:
        return list(attention.backward(dout, q, block[0], block[1], out, lse, scale))
    wide = _wide(q)
    block[:] = [x.contiguous() for x in block]
    total: list[Tensor] = []  # dq of the blocks until now; dk and dv of the last of them, by the ranks until now
    for step in range(axis.size):
        arriving: list[Tensor] = []
        if step < axis.size - 1:
            arriving = _empty_block(block, lengths[(axis.rank - step - 1) % axis.size], q.dtype)
        sums = _empty_block(block, block[0].shape[1], wide) if step else []
        leaving = (*(block if arriving else ()), *total[1:])
        pending = _pass_on(axis, f"k, v and their gradients in step {step}", leaving, [*arriving, *sums])
        del leaving
        parts = attention.backward(dout, q, block[0], block[1], out, lse, scale, wide=True)
        pending.wait()
        if step:
            total = [x.add_(part) for x, part in zip((total[0], *sums), parts, strict=True)]
        else:
            total = [part.to(wide) for part in parts]
        block[:] = arriving
        del parts, sums  # or they would be held beside those of the next step
    dq, *sums = total
    own = _empty_block(sums, lengths[axis.rank], wide)
    _pass_on(axis, "the gradients of k and v", sums, own).wait()
    return [x.to(q.dtype) for x in (dq, *own)]


def _pass_on(axis: Axis, what: str, leaving: Sequence[Tensor], arriving: Sequence[Tensor]) -> Pending:
    """Post what goes to the next rank of the ring, and what comes from the one before."""
    before, after = (axis.rank - 1) % axis.size, (axis.rank + 1) % axis.size
    return exchange(axis, what, [(after, x) for x in leaving], [(before, x) for x in arriving])


def _empty_block(like: Sequence[Tensor], tokens: int, dtype: torch.dtype) -> list[Tensor]:
    """As the k and v of `like`, or their gradients, for so many tokens."""
    return [x.new_empty((x.shape[0], tokens, *x.shape[2:]), dtype=dtype) for x in like]


# Both axes. What is grouped, [U, B, T, h, K], has the heads of column u in group u. It is let go once it was sent.


def _forward(mesh: Mesh, lengths: Sequence[int], grouped: Sequence[Tensor], scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse [U, B, T, h, 1]) of this rank's tokens, grouped, from q, k and v."""
    columns = mesh.column_lengths(lengths)
    q, *block = to_sequence(mesh.ulysses, "q, k and v", grouped, columns)
    del grouped
    out_BShK, lse_BhS = _ring_forward(mesh.ring, mesh.row_lengths(lengths), q, block, scale)
    lse_BSh1 = lse_BhS.transpose(1, 2).contiguous()[..., None]
    out, lse = to_heads(mesh.ulysses, "out and lse", [out_BShK, lse_BSh1], columns)
    return out, lse


def _backward(mesh: Mesh, lengths: Sequence[int], grouped: Sequence[Tensor], scale: float) -> list[Tensor]:
    """dq, dk and dv of this rank's tokens, grouped, from q, k, v, dout, out and lse [U, B, T, h, 1]."""
    columns = mesh.column_lengths(lengths)
    q, k, v, dout, out, lse_BSh1 = to_sequence(mesh.ulysses, "q, k, v, out, its gradient and lse", grouped, columns)
    del grouped
    block = [k, v]
    del k, v
    lse_BhS = lse_BSh1[..., 0].transpose(1, 2).contiguous()
    gradients = _ring_backward(mesh.ring, mesh.row_lengths(lengths), dout, q, block, out, lse_BhS, scale)
    del q, block, dout, out
    return to_heads(mesh.ulysses, "the gradients of q, k and v", [x.contiguous() for x in gradients], columns)


def _mesh(ulysses: str, ring: str) -> Mesh:
    return Mesh(axis_of(ulysses), axis_of(ring))


def _agreed(
    mesh: Mesh, shape: Sequence[int], dtype: torch.dtype, device: torch.device, lengths: Sequence[int] | None = None
) -> list[int]:
    """Tokens of every rank; `shape` [B, T, H, K] here. ValueError on all ranks when heads cannot be shared out."""
    _, T, H, _ = shape
    agreed = agree(mesh, shape, dtype, device) if lengths is None else check_lengths(mesh, lengths, T)
    if H % mesh.ulysses.size:
        raise ValueError(
            f"{H} heads cannot be shared out to {mesh.ulysses.size} ranks of ulysses: "
            f"use ring_attention, or a mesh whose ulysses axis divides {H}"
        )
    return agreed


def _group_heads(parts: Sequence[Tensor], groups: int) -> Tensor:
    """Streams [B, T, H, K] as one [U, B, T of all, h, K]; a lone stream of one group is a view where it can be."""
    grouped = [x_BTHK.unflatten(2, (groups, x_BTHK.shape[2] // groups)).movedim(2, 0) for x_BTHK in parts]
    return torch.cat(grouped, dim=2) if len(grouped) > 1 else grouped[0].contiguous()


def _join_heads(x_UBThK: Tensor, tokens: Sequence[int]) -> list[Tensor]:
    """The inverse: a contiguous [B, T, H, K] for every stream, of `tokens`, none a view of another's memory."""
    U, B, _, h, K = x_UBThK.shape
    if U == 1 and len(tokens) == 1:
        return [x_UBThK[0]]
    parts = [x_UBThK.new_empty(B, T, U * h, K) for T in tokens]
    for part, piece in zip(parts, x_UBThK.split(list(tokens), dim=2), strict=True):
        part.unflatten(2, (U, h)).copy_(piece.movedim(0, 2))
    return parts


# Ops. Groups go by their registered names, "" for an axis of one rank. Without lengths the ranks gather
# them; the op gives them back for its backward, as a tensor on the host.


@torch.library.custom_op("opensora_fast::context_attention", mutates_args=())
def _context_attention(
    q: Tensor, k: Tensor, v: Tensor, ulysses: str, ring: str, scale: float, lengths: list[int] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(out [B, T, H, K], lse [B, T, H], tokens of every rank [P])."""
    mesh = _mesh(ulysses, ring)
    lengths = _agreed(mesh, q.shape, q.dtype, q.device, lengths)
    out, lse = _forward(mesh, lengths, [_group_heads([x], mesh.ulysses.size) for x in (q, k, v)], scale)
    (out_BTHK,), (lse_BTH1,) = (_join_heads(x, q.shape[1:2]) for x in (out, lse))
    return out_BTHK, lse_BTH1[..., 0], torch.tensor(lengths)


@_context_attention.register_fake
def _(q, k, v, ulysses, ring, scale, lengths):
    lse_BTH = q.new_empty(q.shape[:3], dtype=_wide(q))
    return q.new_empty(q.shape), lse_BTH, torch.empty(_mesh(ulysses, ring).size, dtype=torch.int64, device="cpu")


@torch.library.custom_op("opensora_fast::context_attention_backward", mutates_args=())
def _context_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse_BTH: Tensor,
    lengths_P: Tensor,
    ulysses: str,
    ring: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    mesh = _mesh(ulysses, ring)
    tensors = (q, k, v, dout, out, lse_BTH[..., None])
    grouped = (_group_heads([x], mesh.ulysses.size) for x in tensors)
    gradients = _backward(mesh, lengths_P.tolist(), list(grouped), scale)
    (dq,), (dk,), (dv,) = (_join_heads(x, q.shape[1:2]) for x in gradients)
    return dq, dk, dv


@_context_attention_backward.register_fake
def _(dout, q, k, v, out, lse_BTH, lengths_P, ulysses, ring, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    q, k, v, ctx.ulysses, ctx.ring, ctx.scale, _ = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx, dout, _dlse, _dlengths):
    gradients = _context_attention_backward(dout, *ctx.saved_tensors, ctx.ulysses, ctx.ring, ctx.scale)
    return *gradients, None, None, None, None


_context_attention.register_autograd(_differentiate, setup_context=_save)


# With norm and rotation before the exchange, by the kernel that writes the groups of heads.


@torch.library.custom_op("opensora_fast::context_rope_attention", mutates_args=())
def _context_rope_attention(
    streams: list[Tensor],
    scales: list[Tensor],
    cos: Tensor,
    sin: Tensor,
    eps: float,
    ulysses: str,
    ring: str,
    lengths: list[int] | None,
) -> list[Tensor]:
    """out [B, T, H, K] of each stream, then lse [B, T of all, H], then the tokens of every rank [P]."""
    mesh = _mesh(ulysses, ring)
    B, _, _, H, K = streams[0].shape
    tokens = [stream.shape[1] for stream in streams]
    lengths = _agreed(mesh, (B, sum(tokens), H, K), streams[0].dtype, streams[0].device, lengths)
    out, lse = _forward(mesh, lengths, _norm_and_rotate(mesh, streams, scales, cos, sin, eps), K**-0.5)
    (lse_BTH1,) = _join_heads(lse, [sum(tokens)])
    return [*_join_heads(out, tokens), lse_BTH1[..., 0], torch.tensor(lengths)]


@_context_rope_attention.register_fake
def _(streams, scales, cos, sin, eps, ulysses, ring, lengths):
    B, _, _, H, K = streams[0].shape
    outs = [stream.new_empty(B, stream.shape[1], H, K) for stream in streams]
    lse_BTH = streams[0].new_empty(B, sum(stream.shape[1] for stream in streams), H, dtype=_wide(streams[0]))
    return [*outs, lse_BTH, torch.empty(_mesh(ulysses, ring).size, dtype=torch.int64, device="cpu")]


@torch.library.custom_op("opensora_fast::context_rope_attention_backward", mutates_args=())
def _context_rope_attention_backward(
    douts: list[Tensor],
    streams: list[Tensor],
    scales: list[Tensor],
    cos: Tensor,
    sin: Tensor,
    outs: list[Tensor],
    lse_BTH: Tensor,
    lengths_P: Tensor,
    eps: float,
    ulysses: str,
    ring: str,
) -> list[Tensor]:
    mesh = _mesh(ulysses, ring)
    U = mesh.ulysses.size
    gradients = _backward(
        mesh,
        lengths_P.tolist(),
        [
            *_norm_and_rotate(mesh, streams, scales, cos, sin, eps),
            *(_group_heads(parts, U) for parts in (douts, outs, [lse_BTH[..., None]])),
        ],
        streams[0].shape[-1] ** -0.5,
    )
    dq, dk, dv = gradients if U > 1 else (x[0] for x in gradients)
    d_streams, d_pairs = qk_norm_rope.backward_streams(dq, dk, dv, streams, _pairs(scales), cos, sin, eps, U)
    attention.observe_gradients(streams, d_pairs)
    return [*d_streams, *(d_scale for pair in d_pairs for d_scale in pair)]


@_context_rope_attention_backward.register_fake
def _(douts, streams, scales, cos, sin, outs, lse_BTH, lengths_P, eps, ulysses, ring):
    return [x.new_empty(x.shape) for x in (*streams, *scales)]


def _norm_and_rotate(
    mesh: Mesh, streams: list[Tensor], scales: list[Tensor], cos: Tensor, sin: Tensor, eps: float
) -> list[Tensor]:
    """q, k and v of all streams, grouped."""
    U = mesh.ulysses.size
    qkv = qk_norm_rope.forward_streams(streams, _pairs(scales), cos, sin, eps, U, with_v=True)
    return [x if U > 1 else x[None] for x in qkv if x is not None]


def _pairs(scales: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(scales[::2], scales[1::2], strict=True))


def _save_rope(ctx, inputs, output):
    streams, scales, cos, sin, ctx.eps, ctx.ulysses, ctx.ring, _ = inputs
    ctx.num_streams = len(streams)
    ctx.save_for_backward(cos, sin, *streams, *scales, *output)


def _differentiate_rope(ctx, gradients):
    cos, sin, *saved = ctx.saved_tensors
    num_streams = ctx.num_streams
    streams, scales, rest = saved[:num_streams], saved[num_streams : 3 * num_streams], saved[3 * num_streams :]
    *outs, lse_BTH, lengths_P = rest
    d_inputs = _context_rope_attention_backward(
        gradients[:num_streams], streams, scales, cos, sin, outs, lse_BTH, lengths_P, ctx.eps, ctx.ulysses, ctx.ring
    )
    return d_inputs[:num_streams], d_inputs[num_streams:], None, None, None, None, None, None


_context_rope_attention.register_autograd(_differentiate_rope, setup_context=_save_rope)


# Public functions.


def context_of(ulysses: int, ring: int, *, timeout_s: float = 60) -> ContextParallel:
    """This rank's context of `ulysses` x `ring` ranks, in new process groups. Every rank of the world calls it alike.

    The first ulysses * ring ranks of the world share a sequence, then the next as many, and of these consecutive ones
    an all-to-all: world rank = (number of the sequence * ring + ring rank) * ulysses + ulysses rank. An axis of one
    rank gets no group. ValueError where ulysses * ring does not divide the world.

    timeout_s: how long a rank waits for one that hangs. An exchange takes milliseconds, so that a minute names a lost
    rank soon, where PyTorch's own timeout leaves all others idle for 10 to 30 minutes. Ranks that may be busy for
    longer with something else, as a checkpoint or a compilation, need more.
    """
    world = dist.get_world_size()
    if min(ulysses, ring) < 1 or world % (ulysses * ring):
        raise ValueError(f"ulysses={ulysses} x ring={ring} does not divide the world of {world} ranks: choose others")
    mesh_GRU = torch.arange(world).view(-1, ring, ulysses)
    axes = []
    for lines in (mesh_GRU.flatten(0, 1), mesh_GRU.transpose(1, 2).flatten(0, 1)):
        group = None
        if lines.shape[1] > 1:
            group, _ = dist.new_subgroups_by_enumeration(lines.tolist(), timeout=timedelta(seconds=timeout_s))
        axes.append(group)
    return ContextParallel(*axes)


def agree_lengths(
    context: ContextParallel, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> ContextParallel:
    """`context` with the tokens of every rank, gathered: once a step, when the batch is drawn.

    shape: [B, T, H, K] of this rank's q, T of all its streams together. ContextParallelError, on every rank, where
    ranks disagree on anything but T; ValueError, on every rank, where the size of ulysses does not divide H. What is
    attended to until the next batch must then be of this shape and dtype: calls with lengths do not ask again, and
    where ranks break this their messages do not fit, which ends in a failed exchange, a wait for the group's timeout,
    or wrong results.
    """
    return context.with_lengths(_agreed(_mesh(*_names(context)), shape, dtype, device))


def ulysses_attention(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHK: Tensor,
    group: ProcessGroup,
    *,
    scale: float | None = None,
    lengths: Sequence[int] | None = None,
) -> Tensor:
    """Attention of this rank's tokens over those of all ranks of `group`, by an all-to-all: out [B, T, H, K].

    q, k, v: [B, T, H, K] of this rank, T >= 0 of its own. Differentiable. scale: K^-1/2 by default. lengths: T of every
    rank, if agreed before (`agree_lengths`), and then trusted; else each call gathers and checks them. ValueError where
    the group's size does not divide H, or this rank is not in the group. ContextParallelError, on every rank, where
    ranks disagree on anything but T; also where one dies.
    """
    _require_group("group", group)
    return _attend(q_BTHK, k_BTHK, v_BTHK, ContextParallel(group, None, _tuple(lengths)), scale)


def ring_attention(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHK: Tensor,
    group: ProcessGroup,
    *,
    scale: float | None = None,
    lengths: Sequence[int] | None = None,
) -> Tensor:
    """The same by a ring, for any number of heads."""
    _require_group("group", group)
    return _attend(q_BTHK, k_BTHK, v_BTHK, ContextParallel(None, group, _tuple(lengths)), scale)


def hybrid_attention(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHK: Tensor,
    ulysses_group: ProcessGroup,
    ring_group: ProcessGroup,
    *,
    scale: float | None = None,
    lengths: Sequence[int] | None = None,
) -> Tensor:
    """The same by an all-to-all in this rank's row of a mesh, and a ring over its column.

    lengths: of all ranks of the mesh, by ring rank * size of ulysses + ulysses rank.
    """
    _require_group("ulysses_group", ulysses_group)
    _require_group("ring_group", ring_group)
    return _attend(q_BTHK, k_BTHK, v_BTHK, ContextParallel(ulysses_group, ring_group, _tuple(lengths)), scale)


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
    context: ContextParallel,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """`attention.split_rope_attention` of this rank's text and video tokens over those of all ranks of `context`.

    All arguments but the weights are of this rank's tokens, of which either stream may have none; cos and sin of its
    text, then its video. The weights get this rank's part of their gradient: the sum over ranks is the whole.
    """
    streams, scales = [txt_qkv_BT3HK, img_qkv_BT3HK], [txt_q_scale_K, txt_k_scale_K, img_q_scale_K, img_k_scale_K]
    txt_BLHK, img_BNHK = _attend_with_rope(streams, scales, cos, sin, context, eps)
    return txt_BLHK, img_BNHK


def single_rope_attention(
    qkv_BT3HK: Tensor,
    q_scale_K: Tensor,
    k_scale_K: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    context: ContextParallel,
    eps: float = 1e-6,
) -> Tensor:
    """The same for tokens that share one projection: [B, T, 3, H, K] to [B, T, H, K]."""
    return _attend_with_rope([qkv_BT3HK], [q_scale_K, k_scale_K], cos, sin, context, eps)[0]


def _tuple(lengths: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if lengths is None else tuple(lengths)


def _attend(q: Tensor, k: Tensor, v: Tensor, context: ContextParallel, scale: float | None) -> Tensor:
    attention.check_qkv(q, k, v)
    if k.shape != q.shape:
        raise ValueError(f"k is {list(k.shape)}; it must be {list(q.shape)}, as q is: each rank has keys of its tokens")
    scale = attention.check_scale(scale, q.shape[-1])
    return _context_attention(q, k, v, *_names(context), scale, _lengths(context))[0]


def _attend_with_rope(
    streams: list[Tensor], scales: list[Tensor], cos: Tensor, sin: Tensor, context: ContextParallel, eps: float
) -> list[Tensor]:
    qk_norm_rope.check_streams(streams, _pairs(scales), cos, sin)
    results = _context_rope_attention(streams, scales, cos, sin, eps, *_names(context), _lengths(context))
    return results[: len(streams)]


def _names(context: ContextParallel) -> tuple[str, str]:
    return _name(context.ulysses), _name(context.ring)


def _lengths(context: ContextParallel) -> list[int] | None:
    return None if context.lengths is None else list(context.lengths)
