"""The passes that fill a cache: each encodes what has no row yet, and publishes shards of it.

    EncodingWork.latents()        clips that are decoded by worker processes ahead of the autoencoder
    EncodingWork.prompts(kind)    T5 or CLIP

A pass loads its encoder and holds the only reference to it. Shards end with whole batches, and batches are cut from a
list that does not depend on interruptions, so that neither do the rows' bits: equal batches give equal bits, and
other ones may differ in the last. A batch of latents is up to `batch_size` clips of the bucket, and for references as
many pieces of one end; a batch of prompts is `prompts_at_once`.

Shapes   B clips, T frames, H height, W width in pixels; C channels.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from opensora_fast.autoencoder import Autoencoder
from opensora_fast.checkpoint_folder import load_autoencoder
from opensora_fast.conditions import encoded_pieces
from opensora_fast.errors import UserError
from opensora_fast.text import PromptEncoder, load_clip, load_t5
from opensora_fast.train.buckets import Draw
from opensora_fast.train.cache_plan import KEY, CachePlan, LatentGroup, file_bytes
from opensora_fast.train.cache_settings import CacheSettings
from opensora_fast.train.cache_store import LATENT, Dropped, RowTable, ShardWriter, open_tables, piece_name
from opensora_fast.train.config import DiffusionRecipe, recipe_to_dict
from opensora_fast.train.dataset import ClipRequest, clip_request
from opensora_fast.train.decode_workers import decode_in_order
from opensora_fast.train.diffusion_inputs import require_text_width
from opensora_fast.train.index import ClipRecord
from opensora_fast.video_io import to_signed

PromptKind = Literal["t5", "clip"]
PROMPT_VALUES: dict[PromptKind, str] = {"t5": "txt", "clip": "vec"}


@dataclass(kw_only=True)
class _Shard:
    """Rows on their way to a shard."""

    writer: ShardWriter
    bytes: int = 0
    keys: list[np.ndarray] = field(default_factory=list)
    values: dict[str, list[Tensor]] = field(default_factory=dict)
    dropped: list[Dropped] = field(default_factory=list)
    published: int = 0  # rows

    def add(self, keys_B: np.ndarray, values: dict[str, Tensor], dropped: Sequence[Dropped] = ()) -> None:
        self.dropped += dropped
        if not len(keys_B):
            return
        self.keys.append(keys_B)
        for name, value in values.items():
            on_host = value.contiguous().cpu()
            self.values.setdefault(name, []).append(on_host)
            self.bytes += on_host.nbytes

    def publish(self) -> None:
        if self.keys or self.dropped:
            keys = np.concatenate([np.zeros(0, KEY), *self.keys])
            self.writer.publish(keys, {name: torch.cat(parts) for name, parts in self.values.items()}, self.dropped)
            self.published += len(keys)
        self.bytes, self.keys, self.values, self.dropped = 0, [], {}, []


@dataclass(frozen=True)
class _Batch:
    """Clips of one group that are encoded together. last: of its group, whose shard ends with it."""

    group: LatentGroup
    positions: list[int]
    last: bool


@dataclass
class EncodingWork:
    """The three passes over what is missing; each returns how many rows it has added."""

    recipe: DiffusionRecipe
    settings: CacheSettings
    plan: CachePlan
    out: Path
    shard_bytes: int
    prompts_at_once: int
    device: torch.device
    progress: Progress

    def latents(self) -> int:
        table = open_tables(self.out, self.settings.identity())["latents"]
        fresh, again = _missing(self.plan, table)
        total = sum(len(group.keys_P) for group in self.plan.groups)
        todo = sum(len(batch.positions) for batch in [*fresh, *again])
        task = self.progress.add_task("latents", total=total, completed=total - todo)
        if not todo:
            return 0
        section = recipe_to_dict(self.recipe)["autoencoder"]
        autoencoder = load_autoencoder(section, self.device, self.settings.torch_dtype)
        for group in self.plan.groups:
            autoencoder.latent_shape(group.bucket.frames, group.bucket.height, group.bucket.width)
        shard = _Shard(writer=ShardWriter(self.out, "latents", self.settings.identity()))
        with closing(self._decoded([*fresh, *again])) as decoded:
            for batches in (fresh, again):
                for batch in batches:
                    self._encode_clips(autoencoder, batch, decoded, shard)
                    self.progress.advance(task, len(batch.positions))
                    if batches is again and not shard.keys:
                        shard.dropped.clear()  # an earlier shard says so
                    if batch.last or shard.bytes >= self.shard_bytes:
                        shard.publish()
        return shard.published

    def prompts(self, kind: PromptKind) -> int:
        table = open_tables(self.out, self.settings.identity())[kind]
        keys = self.plan.prompt_keys_P
        missing = np.flatnonzero(table.find(keys) < 0)
        name = f"{PROMPT_VALUES[kind]} embeddings"
        task = self.progress.add_task(name, total=len(keys), completed=len(keys) - len(missing))
        if not len(missing):
            return 0
        encoder = self._prompt_encoder(kind)
        shard = _Shard(writer=ShardWriter(self.out, kind, self.settings.identity()))
        for first in range(0, len(missing), self.prompts_at_once):
            positions = missing[first : first + self.prompts_at_once]
            prompts = [self.plan.prompt(position) for position in positions]
            values = encoder(prompts)
            require_text_width(kind, values.shape[-1], self.recipe.model)
            for prompt, finite in zip(prompts, _finite(values), strict=True):
                if not finite:
                    raise UserError(
                        f"text.{kind} gives a value that is not finite for {prompt!r}: name another encoder"
                    )
            shard.add(keys[positions], {PROMPT_VALUES[kind]: values})
            self.progress.advance(task, len(positions))
            if shard.bytes >= self.shard_bytes:
                shard.publish()
        shard.publish()
        return shard.published

    def _prompt_encoder(self, kind: PromptKind) -> PromptEncoder:
        text, device, dtype = self.recipe.text, self.device, self.settings.torch_dtype
        if kind == "t5":
            return load_t5(Path(str(text.t5)), max_length=text.max_length_t5, device=device, dtype=dtype)
        return load_clip(Path(str(text.clip)), max_length=text.max_length_clip, device=device, dtype=dtype)

    def _decoded(self, batches: list[_Batch]) -> Generator[np.ndarray | UserError, None, None]:
        """uint8 [T, H, W, C] of each clip in turn, or why there is none. The one place where clips are decoded."""
        requests = (self._request(batch.group, position) for batch in batches for position in batch.positions)
        buckets = {batch.group.bucket for batch in batches}
        data = self.recipe.data
        yield from decode_in_order(
            requests,
            buckets=buckets,
            workers=data.workers,
            slow_s=data.slow_batch_s,
            limit_s=data.batch_timeout_s,
        )

    def _request(self, group: LatentGroup, position: int) -> ClipRequest:
        drawn = self.plan.sources[group.source_P[position]].drawn
        draw = Draw(seed=self.settings.seed, epoch=0) if drawn else None
        keys = (int(part) for part in group.keys_P[position].item())
        record = self.plan.record(group, position)
        return clip_request(record, group.bucket, draw, *keys, fps_max=self.settings.fps_max)

    def _encode_clips(
        self, autoencoder: Autoencoder, batch: _Batch, decoded: Iterator[np.ndarray | UserError], shard: _Shard
    ) -> None:
        clips, kept, dropped = [], [], []

        def drop(position: int, reason: str) -> None:
            path = self.plan.record(batch.group, position).path
            key = batch.group.keys_P[position].tobytes().hex()
            dropped.append(Dropped(key, path, reason.removeprefix(f"{path}: ")))

        for position in batch.positions:
            pixels = next(decoded)
            if isinstance(pixels, UserError):
                drop(position, str(pixels))
            elif replaced := _replaced(self.plan.record(batch.group, position)):
                drop(position, replaced)
            else:
                clips.append(torch.from_numpy(pixels))
                kept.append(position)
        values: dict[str, Tensor] = {}
        if clips:
            values = encode_clips(autoencoder, torch.stack(clips).to(self.device), self.settings.conditions)
            finite = torch.stack([_finite(value) for value in values.values()]).all(0)
            for position, good in zip(kept, finite.tolist(), strict=True):
                if not good:
                    drop(position, "the autoencoder's latent is not finite")
            values = {name: value[finite] for name, value in values.items()}
            kept = [position for position, good in zip(kept, finite.tolist(), strict=True) if good]
        shard.add(batch.group.keys_P[kept], values, dropped)


@torch.no_grad()
def encode_clips(autoencoder: Autoencoder, pixels_BTHWC: Tensor, conditions: Sequence[str]) -> dict[str, Tensor]:
    """Latent and references of uint8 clips, by the names that they have in a shard."""
    video_BCTHW = to_signed(pixels_BTHWC.permute(0, 4, 1, 2, 3).contiguous())
    values = {LATENT: autoencoder.encode(video_BCTHW)}
    for piece in encoded_pieces(conditions, autoencoder, video_BCTHW.shape[2]):
        values[piece_name(piece)] = autoencoder.encode(piece.of(video_BCTHW).contiguous())
    return values


def _replaced(record: ClipRecord) -> str:
    """What tells that the file is not the one that was indexed, and whose key the row would have; or nothing."""
    size = file_bytes(record.path)
    if record.bytes is None or record.bytes == size:
        return ""
    return f"it has {size} bytes, {record.bytes} when it was indexed: make the index again"


def _missing(plan: CachePlan, table: RowTable) -> tuple[list[_Batch], list[_Batch]]:
    """Batches of the latents without a row: those never tried, and those that were dropped.

    The former are cut where they were before an interruption: shards end with whole batches.
    """
    fresh, again = [], []
    for group in plan.groups:
        positions = np.flatnonzero(table.find(group.keys_P) < 0).tolist()
        tried = {position for position in positions if table.reason(group.keys_P[position]) is not None}
        fresh += _batches(group, [position for position in positions if position not in tried])
        again += _batches(group, sorted(tried))
    return fresh, again


def _batches(group: LatentGroup, positions: list[int]) -> list[_Batch]:
    size = group.bucket.batch_size
    firsts = range(0, len(positions), size)
    return [_Batch(group, positions[first : first + size], first == firsts[-1]) for first in firsts]


def _finite(value_B: Tensor) -> Tensor:
    """Whether all of an item is: bool [B] in host memory."""
    return value_B.isfinite().flatten(1).all(1).cpu()
