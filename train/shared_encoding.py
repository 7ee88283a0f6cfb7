"""Encoding a batch once for all ranks that share it: each takes a part of the clips and prompts, and sends its results.

The frozen encoders are a good part of a step, and every rank of a context-parallel group needs all of their results.
Items are dealt out by cost, dearest first, each to the rank with the least so far: with one clip, the autoencoder and
the text encoders work on different ranks at the same time. Each rank encodes all of its items first; then every part
is broadcast from its owner, as it is, so that all ranks hold the same values. Where a rank dies meanwhile, the others
end with a ContextParallelError.

Source    longest-processing-time-first scheduling (Graham 1969).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from opensora_fast.autoencoder import Autoencoder
from opensora_fast.errors import UserError
from opensora_fast.kernels.context_exchange import named_failure
from opensora_fast.kernels.context_parallel import ContextParallel
from opensora_fast.sequence_shards import broadcast, gather, hops

# Dealing out needs to know roughly how much dearer one item is than another. Estimates for the encoders that the
# released model was trained with: Hunyuan's autoencoder takes 79 TFLOP for 129 frames of 256 x 256 pixels, and T5-XXL
# two for each of 4.8e9 weights and 512 tokens of a prompt.
FLOPS_PER_PIXEL = 79e12 / (129 * 256 * 256)
FLOPS_PER_PROMPT = 2 * 4.8e9 * 512

Layout = list[tuple[tuple[int, ...], torch.dtype]]  # shape of one item and dtype, of every result of an encoder


@dataclass(frozen=True, kw_only=True)
class Work:
    """`count` items for one encoder. `encode(items)` gives tensors that have these items along their first axis.

    count: at least 1. cost: of one item, in the unit of all works that are dealt out together. signature: works with
    equal ones have results that are alike in all but their number, so that ranks need to agree on their shapes only
    once.
    """

    signature: tuple
    count: int
    cost: float
    encode: Callable[[slice], tuple[Tensor, ...]]

    def __post_init__(self) -> None:
        if self.count < 1:  # nobody would have results, whose shapes the others need
            raise ValueError(f"the work {self.signature} has count={self.count}; leave it out")


def deal(works: Sequence[Work], ranks: int) -> list[list[slice]]:
    """The items of each work that each rank encodes: consecutive, in the order of the ranks, and possibly none."""
    counts = [[0] * ranks for _ in works]
    load = [0.0] * ranks
    for number in sorted(range(len(works)), key=lambda number: -works[number].cost):
        for _ in range(works[number].count):
            rank = min(range(ranks), key=load.__getitem__)
            counts[number][rank] += 1
            load[rank] += works[number].cost
    return [[slice(*ends) for ends in pairwise(accumulate(row, initial=0))] for row in counts]


class SharedEncoding:
    """Runs works over the ranks of `context`, or all of them here without one; remembers what shapes were agreed on."""

    def __init__(self, context: ContextParallel | None, device: torch.device) -> None:
        self.context = context
        self.device = device
        self._layouts: dict[tuple, Layout] = {}

    def __call__(self, works: Sequence[Work]) -> list[tuple[Tensor, ...]]:
        """The results of every work for all of its items. All ranks must pass works that are alike."""
        if self.context is None:
            return [work.encode(slice(0, work.count)) for work in works]
        context, dealt = self.context, []
        for work, items in zip(works, deal(works, self.context.size), strict=True):
            owners = {rank: of for rank, of in enumerate(items) if of.stop > of.start}
            dealt.append((work, owners, work.encode(owners[context.rank]) if context.rank in owners else ()))
        return [self._exchange(*one, context) for one in dealt]

    def _exchange(
        self, work: Work, owners: dict[int, slice], mine: tuple[Tensor, ...], context: ContextParallel
    ) -> tuple[Tensor, ...]:
        if work.signature not in self._layouts:
            layout = [(tuple(part.shape[1:]), part.dtype) for part in mine]
            self._layouts[work.signature] = _agree(layout, min(owners), context)
        results = tuple(
            torch.empty(work.count, *shape, dtype=dtype, device=self.device)
            for shape, dtype in self._layouts[work.signature]
        )
        for rank, of in owners.items():
            for number, whole in enumerate(results):
                if rank == context.rank:
                    whole[of].copy_(mine[number])
                broadcast(whole[of], rank, context)
        return results


def _agree(layout: Layout, source: int, context: ContextParallel) -> Layout:
    """The layout that rank `source` has."""
    box = [layout]
    for group, group_source in hops(source, context):
        with named_failure(group, "the shapes of encoded items"):
            dist.broadcast_object_list(box, group=group, group_src=group_source)
    return box[0]


@dataclass(frozen=True)
class SharedAutoencoder:
    """An autoencoder whose clips are encoded by all ranks together; the rest of it is as it was."""

    autoencoder: Autoencoder
    sharing: SharedEncoding

    @property
    def latent_channels(self) -> int:
        return self.autoencoder.latent_channels

    @property
    def compression(self) -> tuple[int, int, int]:
        return self.autoencoder.compression

    @property
    def causal(self) -> bool:
        return self.autoencoder.causal

    def encode(self, video_BCTHW: Tensor) -> Tensor:
        """All ranks must call it alike."""
        ((latent_BCTHW,),) = self.sharing([clips_work(self.autoencoder, video_BCTHW)])
        return latent_BCTHW

    def decode(self, latent_BCTHW: Tensor) -> Tensor:
        return self.autoencoder.decode(latent_BCTHW)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        return self.autoencoder.latent_shape(frames, height, width)

    def frames_of(self, latent_frames: int) -> int:
        return self.autoencoder.frames_of(latent_frames)


def clips_work(autoencoder: Autoencoder, video_BCTHW: Tensor) -> Work:
    """The latents of a batch of clips."""
    B, _, frames, height, width = video_BCTHW.shape
    return Work(
        signature=("autoencoder", frames, height, width),
        count=B,
        cost=FLOPS_PER_PIXEL * frames * height * width,
        encode=lambda items: (autoencoder.encode(video_BCTHW[items]),),
    )


def require_alike(name: str, value: str, context: ContextParallel, device: torch.device) -> None:
    """Raise UserError on every rank unless all have the same `value`, naming the first that differs from rank 0."""
    digest = int.from_bytes(hashlib.blake2b(value.encode(), digest_size=8).digest(), signed=True)
    digests_1P = gather(torch.tensor([[digest]], device=device), context.size, context)
    (digests,) = digests_1P.tolist()
    for rank, other in enumerate(digests):
        if other != digests[0]:
            raise UserError(
                f"rank {rank} of a context-parallel group has another {name} than rank 0: ranks that share a sequence "
                "must be given the same batch, seed and model"
            )
