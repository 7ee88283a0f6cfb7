"""Overlapping tiles: run an autoencoder over a video that is too large for it in one piece.

Shapes  B batch, C channels, T frames, H and W pixels; each of T, H, W counts samples on one side of the network and
        latents on the other, `per_latent_in` and `per_latent_out` samples to a latent.

A tile begins every size - overlap latents.  In an overlap of n output samples, sample k is (1 - k/n) of the earlier
tile and k/n of the later one.  A tile fades in from neighbours that are finished themselves: from above, then from the
left; time is blended last, between finished frames.  The order matters where four tiles meet, and is the released one
(Open-Sora 2.0, `blend_v`, `blend_h` and `blend_t` of its DC-AE).  Two things differ from the released tiling:

- Strides are whole latents.  The released code truncates strides in pixels and in latents separately, and unless the
  overlap is a whole number of latents its pieces do not line up.  Where they do, both agree.
- A last tile of fewer than `shortest` latents is merged into the tile before it.  In time a lone latent decodes to one
  frame, so with tiles of 8 latents every 6 the released code loses three frames at 6k + 1 latents.  With any overlap
  merging is free: the tile before already reaches the end.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

T_AXIS, H_AXIS, W_AXIS = 2, 3, 4


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """How one axis is cut into tiles. `size`, `overlap` and `shortest` count latents."""

    size: int
    overlap: int
    per_latent_in: int
    per_latent_out: int
    shortest: int = 1

    def needed(self, samples_in: int) -> bool:
        """Whether an axis of this many input samples is longer than one tile."""
        return samples_in > self.size * self.per_latent_in

    def spans(self, samples_in: int) -> list[tuple[int, int]]:
        """(start, stop) of every tile, in latents; together they cover [0, samples_in / per_latent_in)."""
        latents = samples_in // self.per_latent_in
        starts = list(range(0, latents, self.size - self.overlap))
        if len(starts) > 1 and latents - starts[-1] < self.shortest:
            starts.pop()
        stops = [min(start + self.size, latents) for start in starts[:-1]] + [latents]
        return list(zip(starts, stops, strict=True))

    def take(self, x: Tensor, axis: int, span: tuple[int, int]) -> Tensor:
        """The input of one tile."""
        start, stop = span
        return x.narrow(axis, start * self.per_latent_in, (stop - start) * self.per_latent_in)

    def join(self, tiles: list[Tensor], axis: int, spans: list[tuple[int, int]]) -> Tensor:
        """Finished output tiles, each cut where the next one begins, in one tensor."""
        lengths = [
            (after[0] - before[0]) * self.per_latent_out for before, after in zip(spans, spans[1:], strict=False)
        ]
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


def tile_time(apply: Callable[[Tensor], Tensor], x_BCTHW: Tensor, tiles: Tiles) -> Tensor:
    """`apply` over tiles of T, cross-faded."""
    spans = tiles.spans(x_BCTHW.shape[T_AXIS])
    finished: list[Tensor] = []
    for span in spans:
        tile = apply(tiles.take(x_BCTHW, T_AXIS, span))
        finished.append(tiles.fade(finished[-1], tile, T_AXIS) if finished else tile)
    return tiles.join(finished, T_AXIS, spans)


def tile_space(apply: Callable[[Tensor], Tensor], x_BCTHW: Tensor, tiles: Tiles) -> Tensor:
    """`apply` over square tiles of H and W, cross-faded; both axes are cut the same way."""
    rows, columns = tiles.spans(x_BCTHW.shape[H_AXIS]), tiles.spans(x_BCTHW.shape[W_AXIS])
    strips: list[Tensor] = []
    above: list[Tensor] = []
    for row in rows:
        strip = tiles.take(x_BCTHW, H_AXIS, row)
        finished: list[Tensor] = []
        for j, column in enumerate(columns):
            tile = apply(tiles.take(strip, W_AXIS, column))
            if above:
                tile = tiles.fade(above[j], tile, H_AXIS)
            if finished:
                tile = tiles.fade(finished[-1], tile, W_AXIS)
            finished.append(tile)
        strips.append(tiles.join(finished, W_AXIS, columns))
        above = finished
    return tiles.join(strips, H_AXIS, rows)
