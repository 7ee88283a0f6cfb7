"""The ranks that sample one request together: who computes which prediction, and what they tell each other.

    step    P ranks = g groups of P / g; the passes of a step are dealt out to the groups, and within a group the
            ranks share every sequence (context parallel). g is the largest that loses nothing: with p passes a step
            costs ceil(p / g) g / P of a pass on one rank, which is least where g divides both p and P. So guidance
            that needs one pass of a step leaves no rank idle: all of them share its sequence.
    text    encoded by rank 0, which alone loads the encoders.
    tiles   of the autoencoder are dealt out so that all ranks have about as much, and every rank gets all results.

World rank = group * (P / g) + rank in the group's `ContextParallel`. All ranks make the same calls in the same order.
Objects travel by gloo, tensors by the backend of their device.

Shapes   B videos, N tokens of a whole video, n of this rank, C channels of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from opensora_fast.errors import UserError
from opensora_fast.kernels.context_exchange import named_failure
from opensora_fast.kernels.context_parallel import ContextParallel, choose_context_parallel
from opensora_fast.sequence_shards import shard_lengths
from opensora_fast.tiling import BatchedTiles, TileRunner

# An exchange takes milliseconds, but ranks may compile for minutes before it.
EXCHANGE_TIMEOUT = timedelta(minutes=20)

Value = TypeVar("Value")
Lines = tuple[tuple[int, ...], ...]  # ranks of every group of a partition of the world


class AgreedError(UserError):
    """A UserError that every rank raises."""


def by_the_first(ranks: SamplingRanks | None, act: Callable[[], Value]) -> Value:
    """What `act` gives on the first rank, on all of them; its UserError or OSError too, as an AgreedError."""
    if ranks is None:
        return act()
    result: Value | None = None
    failure: Exception | None = None
    if ranks.rank == 0:
        try:
            result = act()
        except (UserError, OSError) as error:
            failure = error
    ranks.agree(failure)
    return ranks.share(result)


def on_all(ranks: SamplingRanks | None, act: Callable[[], Value]) -> Value:
    """What `act` gives on each rank; where one raises a UserError or OSError, all raise an AgreedError.

    It may raise them where the other ranks do so too, or come to an `agree` next; other errors end all of them.
    """
    if ranks is None:
        return act()
    results: list[Value] = []
    failure: Exception | None = None
    try:
        results.append(act())
    except AgreedError:  # the others know
        raise
    except (UserError, OSError) as error:
        failure = error
    ranks.agree(failure)
    return results[0]


@dataclass(frozen=True)
class PassPlan:
    """How a step's passes are spread: `my_passes` are the positions of those that this rank's group computes."""

    groups: int
    my_passes: range
    context: ContextParallel | None  # the ranks of this group; None for a rank that is alone in it


class SamplingRanks:
    """This rank and the others of the default process group, which must be initialised. Every rank makes one alike."""

    def __init__(self, device: torch.device) -> None:
        """`device` holds the tensors of this rank. Makes the process groups of every way to split the ranks."""
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.device = device
        self._groups: dict[Lines, dist.ProcessGroup] = {}
        self._contexts: dict[tuple[int, int], ContextParallel | None] = {}
        for members in _divisors(self.size):
            for ulysses in _divisors(members):
                self._contexts[ulysses, members // ulysses] = self._context(ulysses, members // ulysses)

    def plan(
        self, passes: int, *, tokens: int, heads: int, batch: int = 1, channels: int = 128, element_bytes: int = 2
    ) -> PassPlan:
        """How to compute `passes` predictions of a step, each for `batch` sequences of `tokens` (text and video)."""
        groups = split(passes, self.size)
        members = self.size // groups
        each = passes // groups
        first = self.rank // members * each
        mesh = choose_context_parallel(
            tokens, heads, members, batch=batch * each, channels=channels, element_bytes=element_bytes
        )
        return PassPlan(groups, range(first, first + each), self._contexts[mesh.ulysses, mesh.ring])

    def total(self, part_BnC: Tensor, tokens: int, plan: PassPlan) -> Tensor:
        """The sum over the groups of `plan` of what each has of the whole: [B, N, C], with the same bits on every rank.

        `part_BnC` are the tokens that `sequence_shards.shard` gives this rank among its group.
        """
        members = self.size // plan.groups
        lengths = shard_lengths(tokens, members)
        batch, _, channels = part_BnC.shape
        padded = part_BnC.new_zeros(batch, max(lengths), channels)  # equally long: what all backends can gather
        padded[:, : part_BnC.shape[1]] = part_BnC
        gathered = [torch.empty_like(padded) for _ in range(self.size)]
        with named_failure(dist.group.WORLD, "the ranks' parts of a step"):
            dist.all_gather(gathered, padded)
        whole = [sum(gathered[place + members :: members], gathered[place]) for place in range(members)]
        return torch.cat([part[:, :length] for part, length in zip(whole, lengths, strict=True)], dim=1)

    def share(self, value: Value | None) -> Value:
        """The picklable value that rank 0 has, on every rank; what the others pass is ignored."""
        box = [value if self.rank == 0 else None]
        with named_failure(dist.group.WORLD, "a value of rank 0"):
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        shared: Any = box[0]
        return shared

    def share_tensor(self, tensor: Tensor | None, source: int = 0) -> Tensor:
        """The tensor of rank `source`, on every rank's device; what the others pass is ignored."""
        head = [(tensor.shape, tensor.dtype) if tensor is not None and self.rank == source else None]
        with named_failure(dist.group.WORLD, f"the shape of a tensor of rank {source}"):
            dist.broadcast_object_list(head, src=source, device=torch.device("cpu"))
        if head[0] is None:
            raise ValueError(f"rank {source} shares its tensor and has none")
        return self.broadcast(tensor, *head[0], source)

    def broadcast(self, tensor: Tensor | None, shape: torch.Size, dtype: torch.dtype, source: int) -> Tensor:
        """`share_tensor` where every rank knows the shape and the dtype."""
        if tensor is None or self.rank != source:
            shared = torch.empty(shape, dtype=dtype, device=self.device)
        else:
            shared = tensor.to(self.device).contiguous()
        with named_failure(dist.group.WORLD, f"a tensor of rank {source}"):
            dist.broadcast(shared, src=source)
        return shared

    def agree(self, error: Exception | None) -> None:
        """Raise the first error that any rank has, on all of them; nothing where none has one."""
        messages: list[str | None] = [None] * self.size
        with named_failure(dist.group.WORLD, "errors"):
            dist.all_gather_object(messages, None if error is None else str(error))
        for message in messages:
            if message is not None:
                raise AgreedError(message) from error

    @property
    def tiles(self) -> TileRunner:
        """Runs an autoencoder's tiles on all ranks, each one at a time."""
        return self.tiles_over(BatchedTiles())

    def tiles_over(self, local: TileRunner) -> TileRunner:
        """A runner that deals tiles out to the ranks, where `local` runs them; every rank gets all results.

        All ranks call it with the same tiles; a lone tile is run by each. An error of one rank ends the call on all.
        """
        return _SpreadTiles(self, local)

    def _context(self, ulysses: int, ring: int) -> ContextParallel | None:
        if ulysses * ring == 1:
            return None
        mesh_GRU = torch.arange(self.size).view(-1, ring, ulysses)
        rows, columns = mesh_GRU.flatten(0, 1), mesh_GRU.transpose(1, 2).flatten(0, 1)
        return ContextParallel(self._group(rows), self._group(columns))

    def _group(self, lines: Tensor) -> dist.ProcessGroup | None:
        """This rank's group of a partition; meshes that have a partition in common share its groups."""
        if lines.shape[1] == 1:
            return None
        key: Lines = tuple(map(tuple, lines.tolist()))
        if key not in self._groups:
            group, _ = dist.new_subgroups_by_enumeration(lines.tolist(), timeout=EXCHANGE_TIMEOUT)
            self._groups[key] = group
        return self._groups[key]


def split(passes: int, ranks: int) -> int:
    """Groups of ranks for a step: g divides `ranks`, is at most `passes` and has the least ceil(passes / g) g / ranks.

    Of equals the most groups, which exchange the least. One group loses nothing, so that g divides `passes` too.
    """
    if passes < 1:
        raise ValueError(f"passes={passes}; a step has at least 1")
    return min((g for g in _divisors(ranks) if g <= passes), key=lambda g: (-(-passes // g) * g, -g))


def deal(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Which of the pieces of these sizes each rank takes: the largest first, each by whoever has least by then."""
    loads = [0] * ranks
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        rank = loads.index(min(loads))
        dealt[rank].append(index)
        loads[rank] += sizes[index]
    return dealt


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


class _SpreadTiles:
    """A `TileRunner` over ranks; see `SamplingRanks.tiles_over`."""

    def __init__(self, ranks: SamplingRanks, local: TileRunner) -> None:
        self._ranks = ranks
        self._local = local

    def __call__(self, apply: Callable[[Tensor], Tensor], tiles: list[Tensor]) -> list[Tensor]:
        if len(tiles) == 1:
            return self._local(apply, tiles)
        ranks = self._ranks
        dealt = deal([tile.numel() for tile in tiles], ranks.size)
        mine: list[Tensor] = []
        failure: Exception | None = None
        try:
            mine = self._local(apply, [tiles[index] for index in dealt[ranks.rank]])
        except Exception as error:  # told to the ranks that would wait for the results
            failure = error
        reports: list[Any] = [None] * ranks.size
        report: Any = [(x.shape, x.dtype) for x in mine]
        if failure is not None:
            report = f"{type(failure).__name__}: {' '.join(str(failure).split())}"
        with named_failure(dist.group.WORLD, "the sizes of tiles"):
            dist.all_gather_object(reports, report)
        failed = [f"rank {rank}: {report}" for rank, report in enumerate(reports) if isinstance(report, str)]
        if failed:
            raise AgreedError(f"tiles of the autoencoder failed on {'; '.join(failed)}") from failure
        results: dict[int, Tensor] = {}
        for source, indexes in enumerate(dealt):
            for place, index in enumerate(indexes):
                shape, dtype = reports[source][place]
                results[index] = ranks.broadcast(mine[place] if source == ranks.rank else None, shape, dtype, source)
        return [results[index] for index in range(len(tiles))]
