"""Which tokens of a sequence each rank of a context-parallel group holds, and what the ranks do with them together.

    rank r of P holds [text_r | video_r], the r-th of P consecutive parts of the text and of the video

A length that P does not divide gives the first ranks one token more. Nothing is padded, so a rank may hold no text, or
nothing at all. Attention is full and positions are rotated before ranks exchange anything, so the order in which the
ranks' tokens stand in the joint sequence does not matter.

A rank that dies or hangs while others wait for it ends them with a ContextParallelError.

Shapes  x [B, N, ...]: B batch, N tokens.  P ranks of a `ContextParallel`, numbered ring * size of ulysses + ulysses.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from opensora_fast.errors import UserError
from opensora_fast.kernels.context_exchange import named_failure
from opensora_fast.kernels.context_parallel import ContextParallel


def shard_lengths(tokens: int, ranks: int) -> tuple[int, ...]:
    """Tokens of every rank."""
    share, more = divmod(tokens, ranks)
    return tuple(share + (rank < more) for rank in range(ranks))


def joint_lengths(text: int, video: int, ranks: int) -> tuple[int, ...]:
    """Tokens of every rank, text and video together: what `ContextParallel.with_lengths` takes."""
    return tuple(map(sum, zip(shard_lengths(text, ranks), shard_lengths(video, ranks), strict=True)))


def shard(x: Tensor, rank: int, ranks: int, *, dim: int = 1) -> Tensor:
    """The part of `x` that `rank` holds, a view."""
    lengths = shard_lengths(x.shape[dim], ranks)
    return x.narrow(dim, sum(lengths[:rank]), lengths[rank])


@torch.no_grad()
def gather(local: Tensor, tokens: int, context: ContextParallel, *, dim: int = 1) -> Tensor:
    """The whole of which each rank has `shard(whole, rank, P, dim=dim)`, on every rank; without a gradient.

    `tokens` is the length of the whole. Raises UserError where this rank's part is not of the length that it should be.
    """
    lengths = shard_lengths(tokens, context.size)
    if local.shape[dim] != lengths[context.rank]:
        raise UserError(
            f"rank {context.rank} holds {local.shape[dim]} tokens, expected {lengths[context.rank]} of {tokens}: "
            "pass what sequence_shards.shard gave this rank"
        )
    local_N = local.movedim(dim, 0)
    parts = local_N.new_zeros(max(lengths), *local_N.shape[1:])  # equally long: what all backends can gather
    parts[: len(local_N)] = local_N
    for group in axes(context):
        gathered = [torch.empty_like(parts) for _ in range(group.size())]
        with named_failure(group, "the ranks' parts of a whole"):
            dist.all_gather(gathered, parts, group=group)
        parts = torch.cat(gathered)
    starts = range(0, len(parts), max(lengths)) if len(parts) else [0] * context.size
    whole = torch.cat([parts[start : start + length] for start, length in zip(starts, lengths, strict=True)])
    return whole.movedim(0, dim)


def broadcast(x: Tensor, source: int, context: ContextParallel) -> None:
    """Fill the contiguous `x` of every rank with that of rank `source`."""
    for group, group_source in hops(source, context):
        with named_failure(group, f"what rank {source} of the context has"):
            dist.broadcast(x, group=group, group_src=group_source)


def hops(source: int, context: ContextParallel) -> list[tuple[dist.ProcessGroup, int]]:
    """The broadcasts that this rank takes part in, in turn, to hear from `source`: (group, the source's rank in it)."""
    size = context.ulysses.size() if context.ulysses is not None else 1
    ring, ulysses = divmod(source, size)
    along_ring = [(context.ring, ring)] if context.ring is not None and context.rank % size == ulysses else []
    along_ulysses = [(context.ulysses, ulysses)] if context.ulysses is not None else []
    return along_ring + along_ulysses


def total(part: Tensor, context: ContextParallel) -> Tensor:
    """The sum of `part` over the ranks, whose gradient is that of this rank's own part.

    So a loss that is the sum of the ranks' parts has its value on each of them, and leaves there the part of the
    parameters' gradients that `train.gradient_reduction` adds up.
    """
    return _Total.apply(part, context)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, part: Tensor, context: ContextParallel) -> Tensor:
        value = part.clone()
        for group in axes(context):
            with named_failure(group, "the ranks' parts of a sum"):
                dist.all_reduce(value, group=group)
        return value

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def axes(context: ContextParallel) -> list[dist.ProcessGroup]:
    """The process groups that make up the context's, the inner one first; none where it is a single rank."""
    return [group for group in (context.ulysses, context.ring) if group is not None]
