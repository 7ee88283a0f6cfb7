"""What ranks that share a sequence send each other: the agreement on sizes, the all-to-all, the messages of a ring.

The ranks are a mesh of `ring` rows and `ulysses` columns, rank = row * ulysses + column; either axis may be 1 long.
Every exchange is one batch of point-to-point messages, of which NCCL makes one kernel on its own stream: waiting for it
makes the current stream wait, not the host. A message is a piece that lies whole in memory at both ends, so that
nothing is packed or unpacked on the way; one that is empty is sent by nobody and awaited by nobody. The price is their
number, which the host posts one by one: in an all-to-all one for every tensor, peer and batch item, q, k, v of 13 items
on 4 ranks in 117 sends and as many receives. `context_plan` counts them.

    all-to-all   column p holds T_p tokens of all heads, [U, B, T_p, h, K] with the heads of column u in group u, as
                 `qk_norm_rope` writes them. to_sequence gives it its own heads of all tokens, [B, S, h, K], S = sum of
                 T_p; to_heads is the inverse. Each batch item is a message of its own, [T_p, h, K], in place.

Shapes      B batch, T tokens of this rank, S tokens of a row, H heads, K channels, U columns, h = H / U.
Errors      ContextParallelError on every rank where sizes do not agree; and where an exchange fails, on each rank that
            waits for one that died or left: at once with gloo, or after the group's timeout. With NCCL it is the
            group's watchdog that ends the process, after the timeout. Errors that are not of an exchange pass as they
            are.
Source      DeepSpeed-Ulysses (arXiv 2309.14509); Ring Attention (arXiv 2310.01889).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from opensora_fast.kernels import launch


class ContextParallelError(RuntimeError):
    """Ranks disagree on what they hold, or an exchange between them failed."""


@dataclass(frozen=True)
class Axis:
    """This rank's place on one axis of the mesh; without a group it is alone."""

    group: Any = None
    rank: int = 0
    size: int = 1


def axis_of(group_name: str) -> Axis:
    """The axis of the process group that is registered under this name; "" is one rank."""
    if not group_name:
        return Axis()
    resolve: Any = c10d._resolve_process_group  # newer PyTorch types its argument otherwise
    group = resolve(group_name)
    return Axis(group, group.rank(), group.size())


@dataclass(frozen=True)
class Mesh:
    """Both axes."""

    ulysses: Axis = field(default_factory=Axis)
    ring: Axis = field(default_factory=Axis)

    @property
    def size(self) -> int:
        return self.ulysses.size * self.ring.size

    @property
    def rank(self) -> int:
        return self.ring.rank * self.ulysses.size + self.ulysses.rank

    def column_lengths(self, lengths: Sequence[int]) -> list[int]:
        """Tokens of every rank of this rank's row, which the all-to-all is over."""
        first = self.ring.rank * self.ulysses.size
        return list(lengths[first : first + self.ulysses.size])

    def row_lengths(self, lengths: Sequence[int]) -> list[int]:
        """Tokens of every row, which the ring is over."""
        return [sum(lengths[first : first + self.ulysses.size]) for first in range(0, self.size, self.ulysses.size)]


# Agreement.

AGREED = ("batch items", "heads", "channels in a head")


def agree(mesh: Mesh, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> list[int]:
    """The tokens of every rank of the mesh, gathered, once all else of `shape` [B, T, H, K] and dtype is alike.

    ContextParallelError on every rank, with the rank, its value and what most have; without a majority, what each has.
    """
    B, T, H, K = shape
    if dtype not in launch.DTYPES:
        raise ValueError(f"dtype is {dtype}; it must be float32, bfloat16, float16 or float64")
    row = torch.tensor([B, H, K, launch.DTYPES.index(dtype), T], device=device)
    rows = _gathered(mesh.ring, _gathered(mesh.ulysses, row)).view(mesh.size, -1).tolist()
    for column, name in enumerate((*AGREED, "dtype")):
        values: list[Any] = [launch.DTYPES[one[column]] if name == "dtype" else one[column] for one in rows]
        expected, count = Counter(values).most_common(1)[0]
        if count == mesh.size:
            continue
        if 2 * count > mesh.size:
            rank = next(rank for rank, value in enumerate(values) if value != expected)
            found = f"rank {rank} of the {mesh.size} that share a sequence holds {name} {values[rank]}; "
            found += f"most hold {expected}"
        else:
            each = ", ".join(f"rank {rank} {value}" for rank, value in enumerate(values))
            found = f"the {mesh.size} ranks that share a sequence hold different {name}: {each}"
        raise ContextParallelError(f"{found}: give every rank a shard of the same batch (this is rank {mesh.rank})")
    return [one[-1] for one in rows]


def check_lengths(mesh: Mesh, lengths: Sequence[int], tokens: int) -> list[int]:
    """`lengths`; ContextParallelError where they are not for this mesh or not for this rank's tokens.

    That the other ranks were given the same ones is trusted.
    """
    if len(lengths) != mesh.size:
        raise ContextParallelError(f"lengths has {len(lengths)} entries; {mesh.size} ranks share the sequence")
    if lengths[mesh.rank] != tokens:
        raise ContextParallelError(
            f"rank {mesh.rank} of the {mesh.size} that share a sequence holds {tokens} tokens; lengths expects "
            f"{lengths[mesh.rank]} there: agree on them when the batch is drawn (agree_lengths)"
        )
    return list(lengths)


def _gathered(axis: Axis, row: Tensor) -> Tensor:
    if axis.size == 1:
        return row[None]
    rows = [torch.empty_like(row) for _ in range(axis.size)]
    with named_failure(axis.group, "sizes"):
        dist.all_gather(rows, row, group=axis.group)
    return torch.stack(rows)


# Messages.

Message = tuple[int, Tensor]  # a peer's rank on the axis, and what it gets or where its own arrives


@dataclass(frozen=True)
class Pending:
    """An exchange under way. It keeps its tensors alive."""

    axis: Axis
    what: str
    works: list[Any]
    tensors: list[Tensor]

    def wait(self) -> None:
        """Whatever is launched after this finds the messages there; their buffers may be used again."""
        with named_failure(self.axis.group, self.what):
            for work in self.works:
                work.wait()
        self.works.clear()
        self.tensors.clear()


def exchange(axis: Axis, what: str, sends: Sequence[Message], receives: Sequence[Message]) -> Pending:
    """Post contiguous messages; those from one rank to another arrive in the order in which both list them."""
    operations = [
        dist.P2POp(function, tensor, group=axis.group, group_peer=peer)
        for function, messages in ((dist.isend, sends), (dist.irecv, receives))
        for peer, tensor in messages
        if tensor.numel()
    ]
    works: list[Any] = []
    if operations:
        with named_failure(axis.group, what):
            works = dist.batch_isend_irecv(operations)
    return Pending(axis, what, works, [tensor for _, tensor in (*sends, *receives)])


@contextmanager
def named_failure(group: Any, what: str) -> Iterator[None]:
    """Around collectives over `group`: what they fail with names the ranks, what was under way and the likely cause."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or any(words in str(error) for words in WORDS_OF_GLOO)):
            raise
        ranks = dist.get_process_group_ranks(group)
        raise ContextParallelError(
            f"the exchange of {what} failed on rank {ranks[group.rank()]} in the group of ranks {ranks}: another of "
            f"them has probably died, left, or is still busy after the group's timeout; read its log first ({error})"
        ) from error


# gloo raises plain RuntimeErrors, known by the place in its source, or in a pair that timed out before by these words.
WORDS_OF_GLOO = ("/gloo/", "pair closure")


# All-to-all.


def to_sequence(axis: Axis, what: str, grouped: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
    """From [U, B, T, h, K], contiguous, to [B, S, h, K]: this column's heads of the row's tokens, all in one exchange.

    lengths: tokens of every column.
    """
    if axis.size == 1:
        return [x_UBThK[0] for x_UBThK in grouped]
    whole = [x.new_empty(x.shape[1], sum(lengths), *x.shape[3:]) for x in grouped]
    pieces = [x_BShK.split(list(lengths), dim=1) for x_BShK in whole]
    peers = [rank for rank in range(axis.size) if rank != axis.rank]
    sends = [(peer, item) for peer in peers for x_UBThK in grouped for item in x_UBThK[peer]]
    receives = [(peer, item) for peer in peers for of_ranks in pieces for item in of_ranks[peer]]
    pending = exchange(axis, what, sends, receives)
    for x_UBThK, of_ranks in zip(grouped, pieces, strict=True):
        of_ranks[axis.rank].copy_(x_UBThK[axis.rank])
    pending.wait()
    return whole


def to_heads(axis: Axis, what: str, whole: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
    """From [B, S, h, K], contiguous, to [U, B, T, h, K]: all heads of this rank's tokens. The inverse."""
    if axis.size == 1:
        return [x_BShK[None] for x_BShK in whole]
    grouped = [x.new_empty(axis.size, x.shape[0], lengths[axis.rank], *x.shape[2:]) for x in whole]
    pieces = [x_BShK.split(list(lengths), dim=1) for x_BShK in whole]
    peers = [rank for rank in range(axis.size) if rank != axis.rank]
    sends = [(peer, item) for peer in peers for of_ranks in pieces for item in of_ranks[peer]]
    receives = [(peer, item) for peer in peers for x_UBThK in grouped for item in x_UBThK[peer]]
    pending = exchange(axis, what, sends, receives)
    for x_UBThK, of_ranks in zip(grouped, pieces, strict=True):
        x_UBThK[axis.rank].copy_(of_ranks[axis.rank])
    pending.wait()
    return grouped
