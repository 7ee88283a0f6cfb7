"""Overlapping tiles: run an autoencoder over a video that is too large for it in one piece.

Shapes  B batch, C channels, T frames, H and W pixels; each of T, H, W counts samples on one side of the network and
        latents on the other, `per_latent_in` and `per_latent_out` samples to a latent.

A tile begins every size - overlap latents.  In an overlap of n output samples, sample k is (1 - k/n) of the earlier
tile and k/n of the later one.  A tile fades in from neighbours that are finished themselves: from above, then from the
left; time is blended last, between finished frames.  The order matters where four tiles meet, and is the released one
(Open-Sora 2.0, `blend_v`, `blend_h` and `blend_t` of its autoencoders).  Three things differ from the released tiling:

- Strides are whole latents.  The released code truncates strides in pixels and in latents separately, and unless the
  overlap is a whole number of latents its pieces do not line up.  Where they do, both agree.
- A last tile of fewer than `shortest` latents is merged into the tile before it.  In time a lone latent of the DC-AE
  decodes to one frame, so with tiles of 8 latents every 6 the released code loses three frames at 6k + 1 latents.  With
  any overlap merging is free: the tile before already reaches the end.
- A last tile of a causal network that holds nothing but the sample before it, which is dropped, is not run.

All tiles of a call are cut before the first is run, and run by one call of a `TileRunner`, which may stack them or
spread them over devices; what they are joined to does not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from opensora_fast.errors import UserError

T_AXIS, H_AXIS, W_AXIS = 2, 3, 4

Network = Callable[[Tensor], Tensor]
TileRunner = Callable[[Network, list[Tensor]], list[Tensor]]
"""Runs a network on each of these inputs, [B, C, T, H, W] in several sizes; gives the outputs in their order."""

Span = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """How one axis is cut into tiles. `size`, `overlap` and `shortest` count latents.

    lead: the axis is time and the network is causal. The first latent is a lone sample and not counted here; a tile
    also takes the sample (of latents: the latent) before its own, and from a later tile's output that one is dropped.
    """

    size: int
    overlap: int
    per_latent_in: int
    per_latent_out: int
    shortest: int = 1
    lead: bool = False

    @classmethod
    def of(
        cls,
        samples: int,
        compression: int,
        overlap_factor: float,
        *,
        encoding: bool,
        shortest: int = 1,
        lead: bool = False,
    ) -> Tiles:
        """Tiles of this many pixels or frames for an encoder, or for a decoder; `compression` of them to a latent.

        The stride is the part of a tile that does not overlap, in whole latents, and one at least.
        """
        size = samples // compression
        stride = max(int(size * (1 - overlap_factor)), 1)
        per_latent_in, per_latent_out = (compression, 1) if encoding else (1, compression)
        return cls(
            size=size,
            overlap=size - stride,
            per_latent_in=per_latent_in,
            per_latent_out=per_latent_out,
            shortest=shortest,
            lead=lead,
        )

    def needed(self, samples_in: int) -> bool:
        """Whether an axis of this many input samples is longer than one tile."""
        return samples_in > self.size * self.per_latent_in

    def spans(self, samples_in: int) -> list[Span]:
        """(start, stop) of every tile, in latents; together they cover all of them."""
        latents = (samples_in - self.lead) // self.per_latent_in
        starts = list(range(0, latents, self.size - self.overlap))
        if len(starts) > 1 and latents - starts[-1] < self.shortest:
            starts.pop()
        stops = [min(start + self.size, latents) for start in starts[:-1]] + [latents]
        return list(zip(starts, stops, strict=True))

    def take(self, x: Tensor, axis: int, span: Span) -> Tensor:
        """The input of one tile."""
        start, stop = span
        return x.narrow(axis, start * self.per_latent_in, (stop - start) * self.per_latent_in + self.lead)

    def own(self, output: Tensor, axis: int, span: Span) -> Tensor:
        """The output of one tile without the sample that belongs to the tile before."""
        dropped = int(self.lead and span[0] > 0)
        return output.narrow(axis, dropped, output.shape[axis] - dropped)

    def joined(self, tiles: list[Tensor], axis: int, spans: list[Span]) -> Tensor:
        """All outputs of an axis, each faded in from the one before and cut where the next one begins."""
        finished = tiles[:1]
        for tile in tiles[1:]:
            finished.append(self.fade(finished[-1], tile, axis))
        return self.join(finished, axis, spans)

    def join(self, tiles: list[Tensor], axis: int, spans: list[Span]) -> Tensor:
        """Finished output tiles, each cut where the next one begins, in one tensor."""
        lengths = [(after[0] - before[0]) * self.per_latent_out for before, after in pairwise(spans)]
        if self.lead and lengths:
            lengths[0] += 1
        return torch.cat([tile.narrow(axis, 0, n) for tile, n in zip(tiles, lengths, strict=False)] + tiles[-1:], axis)

    def fade(self, earlier: Tensor, later: Tensor, axis: int) -> Tensor:
        """`later`, its first samples cross-faded from the last ones of `earlier`."""
        extent = min(earlier.shape[axis], later.shape[axis], self.overlap * self.per_latent_out)
        if extent == 0:
            return later
        weight = torch.arange(extent, device=later.device, dtype=torch.float32).div_(extent).to(later.dtype)
        weight = weight.view(-1, *[1] * (later.dim() - 1 - axis))
        ending = earlier.narrow(axis, earlier.shape[axis] - extent, extent)
        beginning, rest = later.split([extent, later.shape[axis] - extent], dim=axis)
        return torch.cat([torch.lerp(ending, beginning, weight), rest], dim=axis)


@dataclass(frozen=True)
class BatchedTiles:
    """The `TileRunner` of one device: tiles of one shape stacked along the batch, at most `batch` of them a call.

    Raises UserError for a batch below 1.
    """

    batch: int = 1

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise UserError(f"tile_batch={self.batch}: a call of the autoencoder takes at least 1 tile")

    def __call__(self, apply: Network, tiles: list[Tensor]) -> list[Tensor]:
        numbers_of: dict[torch.Size, list[int]] = {}
        for number, tile in enumerate(tiles):
            numbers_of.setdefault(tile.shape, []).append(number)
        outputs: dict[int, Tensor] = {}
        groups = [
            numbers[first : first + self.batch]
            for numbers in numbers_of.values()
            for first in range(0, len(numbers), self.batch)
        ]
        for together in groups:
            if len(together) == 1:
                outputs[together[0]] = apply(tiles[together[0]])
            else:
                stacked = apply(torch.cat([tiles[number] for number in together]))
                outputs |= zip(together, stacked.chunk(len(together)), strict=True)
        return [outputs[number] for number in range(len(tiles))]


def tile_video(
    apply: Network, x_BCTHW: Tensor, run_tiles: TileRunner, *, time: Tiles | None = None, space: Tiles | None = None
) -> Tensor:
    """`apply` over tiles of T (`time`), and of H and W (`space`, both cut the same way), cross-faded.

    An axis without Tiles stays whole; without any, `apply` is called as it is.
    """
    if time is None and space is None:
        return apply(x_BCTHW)
    T, H, W = x_BCTHW.shape[2:]
    times = time.spans(T) if time else []
    rows, columns = (space.spans(H), space.spans(W)) if space else ([], [])
    clips = [time.take(x_BCTHW, T_AXIS, span) for span in times] if time else [x_BCTHW]
    outputs = iter(run_tiles(apply, [tile for clip in clips for tile in _cut(clip, space, rows, columns)]))
    finished = []
    for number in range(len(clips)):
        tiles = [next(outputs) for _ in range(len(rows) * len(columns) or 1)]
        if time:
            tiles = [time.own(tile, T_AXIS, times[number]) for tile in tiles]
        finished.append(_join_space(tiles, space, rows, columns) if space else tiles[0])
    return time.joined(finished, T_AXIS, times) if time else finished[0]


def _cut(clip_BCTHW: Tensor, space: Tiles | None, rows: list[Span], columns: list[Span]) -> list[Tensor]:
    """The tiles of one clip, row by row."""
    if space is None:
        return [clip_BCTHW]
    strips = [space.take(clip_BCTHW, H_AXIS, row) for row in rows]
    return [space.take(strip, W_AXIS, column) for strip in strips for column in columns]


def _join_space(tiles: list[Tensor], space: Tiles, rows: list[Span], columns: list[Span]) -> Tensor:
    strips: list[Tensor] = []
    above: list[Tensor] = []
    for number in range(len(rows)):
        finished: list[Tensor] = []
        for j, tile in enumerate(tiles[number * len(columns) : (number + 1) * len(columns)]):
            if above:
                tile = space.fade(above[j], tile, H_AXIS)
            if finished:
                tile = space.fade(finished[-1], tile, W_AXIS)
            finished.append(tile)
        strips.append(space.join(finished, W_AXIS, columns))
        above = finished
    return space.join(strips, H_AXIS, rows)
