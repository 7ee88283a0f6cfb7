"""A cache as training reads it: what it holds for a data section, and batches of its rows.

Opening reads cache.json and the header and keys of every shard; rows are read as they are needed, each checked by its
CRC32C. A clip that was dropped when the cache was made is left out of its batches, like a file that cannot be read.

B clips, C latent channels, t, h, w latent size, L text tokens, D features.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from opensora_fast.conditions import Piece, encoded_pieces
from opensora_fast.errors import UserError
from opensora_fast.train.bucket_sampler import BatchPlan
from opensora_fast.train.buckets import Bucket, thinned_fps
from opensora_fast.train.cache_plan import CachePlan, Clips, LatentGroup, prompt_keys, prompts_of
from opensora_fast.train.cache_settings import CacheSettings, read_settings
from opensora_fast.train.cache_store import LATENT, REPORT, Kind, RowSpec, RowTable, open_tables, piece_name
from opensora_fast.train.config import DiffusionRecipe
from opensora_fast.train.index import ClipRecord

ALIGNMENT = 64  # bytes, of each tensor of a batch
ADVICE = "run `opensora-fast data cache` with the same options, which adds what is missing"


@dataclass(frozen=True, kw_only=True)
class EncodedBatch:
    """What the encoders give for a batch, in their dtype."""

    latent_BCTHW: Tensor
    txt_BLD: Tensor
    vec_BD: Tensor
    null_txt_1LD: Tensor
    """Of the empty prompt."""
    null_vec_1D: Tensor
    references: Mapping[Piece, Tensor]
    """[B, C, t, h, w] of every piece that a condition of the recipe is made of."""

    def to(self, device: torch.device) -> EncodedBatch:
        """Itself where it is there already; from pinned memory, asynchronously."""
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in _TENSORS}
        references = {piece: value.to(device, non_blocking=True) for piece, value in self.references.items()}
        return replace(self, **moved, references=references)

    def tensors(self) -> list[Tensor]:
        return [*(getattr(self, name) for name in _TENSORS), *self.references.values()]


_TENSORS = ("latent_BCTHW", "txt_BLD", "vec_BD", "null_txt_1LD", "null_vec_1D")


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Where the clips of a batch are found that have a row."""

    plan: BatchPlan
    records: list[ClipRecord]
    latents: list[int]
    t5: list[int]
    clip: list[int]
    dropped: dict[str, str]
    """(path: reason) of the others."""


class EncoderCache:
    """A folder of `opensora-fast data cache`. `open` makes one."""

    def __init__(self, folder: Path, settings: CacheSettings, tables: Mapping[Kind, RowTable]) -> None:
        self.folder, self.settings, self._tables = folder, settings, tables
        self._latents, self._t5, self._clip = (tables[kind] for kind in ("latents", "t5", "clip"))

    @classmethod
    def open(cls, folder: Path) -> EncoderCache:
        """Raises UserError when there is no cache, or one of its shards is missing, damaged or of another cache."""
        settings = read_settings(folder)
        for name, size in _listed_shards(folder / REPORT).items():
            there = (folder / name).stat().st_size if (folder / name).is_file() else None
            if there is None:
                raise UserError(f"{folder / name} is missing: {ADVICE}")
            if there != size:
                raise UserError(
                    f"{folder / name} is damaged ({there} bytes, {size} were written): delete it and {ADVICE}"
                )
        return cls(folder, settings, open_tables(folder, settings.identity()))

    def require(self, plan: CachePlan, recipe: DiffusionRecipe) -> None:
        """Raises UserError unless all that `plan` lists is there, dropped clips aside, and fits the recipe's model."""
        lacking = [self._latents.unknown(group.keys_P) for group in plan.groups]
        for group, positions in zip(plan.groups, lacking, strict=True):
            if len(positions):
                raise UserError(
                    f"data.cache={self.folder} lacks {sum(map(len, lacking))} of "
                    f"{sum(len(each.keys_P) for each in plan.groups)} latents that data.index, data.heldout_index "
                    f"and data.buckets ask for, as {plan.record(group, positions[0]).path} in {group.bucket}: {ADVICE}"
                )
        for kind, table in (("t5", self._t5), ("clip", self._clip)):
            missing = np.flatnonzero(table.find(plan.prompt_keys_P) < 0)
            if len(missing):
                raise UserError(
                    f"data.cache={self.folder} lacks {len(missing)} of {len(plan.prompt_keys_P)} prompts for "
                    f"text.{kind}, as {plan.prompt(missing[0])!r}: {ADVICE}"
                )
        model, found = recipe.model, self._text_specs()
        wanted = {"txt": (recipe.text.max_length_t5, model.context_in_dim), "vec": (model.vec_in_dim,)}
        for name, shape in wanted.items():
            if found[name].shape != shape:
                raise UserError(
                    f"data.cache={self.folder} has {name} of shape {found[name].shape}, and the model takes {shape}: "
                    "name another cache"
                )

    def rows(self, source: Clips, plan: BatchPlan) -> Rows:
        """The rows of a batch; of none, when all of its clips were dropped."""
        keys_B = source.latent_keys(np.asarray(plan.indices), plan.bucket)
        latents = self._latents.find(keys_B)
        records = [source.clips[index] for index in plan.indices]
        kept = np.flatnonzero(latents >= 0).tolist()
        dropped = {
            records[place].path: self._latents.reason(keys_B[place]) or "it is not in the cache"
            for place in np.flatnonzero(latents < 0)
        }
        records = [records[place] for place in kept]
        rates = [thinned_fps(record.fps, self.settings.fps_max) for record in records]
        motions = [record.score_vmafmotion for record in records]
        prompts = prompt_keys(prompts_of([record.text for record in records], rates, motions))
        return Rows(
            plan=plan,
            records=records,
            latents=latents[kept].tolist(),
            t5=self._t5.find(prompts).tolist(),
            clip=self._clip.find(prompts).tolist(),
            dropped=dropped,
        )

    def specs(self, groups: Iterable[LatentGroup], conditions: Sequence[str]) -> dict[tuple[int, int, int], RowSpecs]:
        """The values of a row, by the frames, height and width of the bucket."""
        found = {}
        for group in groups:
            rows = self._latents.find(group.keys_P)
            if (rows >= 0).any():
                bucket, row = group.bucket, int(rows[rows >= 0][0])
                pieces = encoded_pieces(conditions, self.settings.layout, bucket.frames)
                latents = {name: self._latents.spec(row, name) for name in (LATENT, *map(piece_name, pieces))}
                found[size_of(bucket)] = RowSpecs(pieces=pieces, values=latents | self._text_specs())
        return found

    def null(self) -> tuple[Tensor, Tensor]:
        """(txt [1, L, D], vec [1, D]) of the empty prompt."""
        specs, (key,) = self._text_specs(), [prompt_keys([""])]
        values = [torch.empty(1, *specs[name].shape, dtype=specs[name].dtype) for name in ("txt", "vec")]
        self._t5.read(int(self._t5.find(key)[0]), "txt", values[0][0])
        self._clip.read(int(self._clip.find(key)[0]), "vec", values[1][0])
        return values[0], values[1]

    def read(
        self,
        rows: Rows,
        specs: RowSpecs,
        null: tuple[Tensor, Tensor],
        memory: Tensor,
        at: Callable[[Path], None] = lambda path: None,
    ) -> EncodedBatch:
        """A batch in `memory`, uint8 of at least `specs.bytes(clips)`; `at` is told which file is read.

        Raises UserError naming the shard that cannot be read or is damaged.
        """
        count = len(rows.records)
        values = specs.place(memory, count)
        places = {"txt": (self._t5, rows.t5), "vec": (self._clip, rows.clip)}
        for name, value in values.items():
            table, of_batch = places.get(name, (self._latents, rows.latents))
            for row, out in zip(of_batch, value, strict=True):
                at(table.path(row))
                table.read(row, name, out)
        return EncodedBatch(
            latent_BCTHW=values[LATENT],
            txt_BLD=values["txt"],
            vec_BD=values["vec"],
            null_txt_1LD=null[0],
            null_vec_1D=null[1],
            references={piece: values[piece_name(piece)] for piece in specs.pieces},
        )

    def _text_specs(self) -> dict[str, RowSpec]:
        return {"txt": self._t5.spec(0, "txt"), "vec": self._clip.spec(0, "vec")}


@dataclass(frozen=True, kw_only=True)
class RowSpecs:
    """The values of one clip of a size; `values` by name, those of `pieces` among them."""

    pieces: list[Piece]
    values: dict[str, RowSpec]

    def bytes(self, count: int) -> int:
        """What so many clips take."""
        return sum(_aligned(count * _row_bytes(spec)) for spec in self.values.values())

    def place(self, memory: Tensor, count: int) -> dict[str, Tensor]:
        """[count, ...] tensors of every value, one behind the other in `memory`."""
        found, begin = {}, 0
        for name, spec in self.values.items():
            size = count * _row_bytes(spec)
            found[name] = memory[begin : begin + size].view(spec.dtype).view(count, *spec.shape)
            begin += _aligned(size)
        return found


def size_of(bucket: Bucket) -> tuple[int, int, int]:
    return bucket.frames, bucket.height, bucket.width


def _row_bytes(spec: RowSpec) -> int:
    return math.prod(spec.shape) * spec.dtype.itemsize


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _listed_shards(path: Path) -> dict[str, int]:
    """Bytes by name, from the report of the run that has last finished; nothing before one has."""
    try:
        shards = json.loads(path.read_text(encoding="utf-8"))["shards"]
        return {str(name): int(size) for name, size in shards.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())}): delete it and {ADVICE}") from error
