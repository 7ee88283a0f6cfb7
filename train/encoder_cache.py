"""`opensora-fast data cache RECIPE --out DIR`: encode clips and prompts once, for training to read.

    clips -> autoencoder -> latents and references of the recipe's conditions
    prompts -> T5 -> text tokens;   prompts -> CLIP -> vectors

One encoder is in memory at a time. What is encoded is listed before (`cache_plan`), each thing once, and goes to shards
that appear whole or not at all (`cache_store`): what a run that was killed has published stays, and the same command
goes on behind it, with the same batches and so the same bits. Clips that cannot be read, whose file is not as large as
the index says, or whose latent is not finite, are dropped; each later run tries them again. DIR/report.json says what
was dropped and why, lists the shards, and names the torch and the decoder of the last run.

A cache can be made elsewhere too: `cache_settings` and `cache_store` describe its files.

Shapes   B clips, T frames, H height, W width in pixels; C channels.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import gc
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from opensora_fast.arguments import Parser
from opensora_fast.checkpoint_folder import load_autoencoder
from opensora_fast.errors import UserError
from opensora_fast.train.cache_encoding import PROMPT_VALUES, EncodingWork
from opensora_fast.train.cache_plan import CachePlan, plan_cache
from opensora_fast.train.cache_settings import FILE, CacheSettings, read_settings, require_same, settings_of
from opensora_fast.train.cache_store import (
    KINDS,
    REPORT,
    Dropped,
    make_folder,
    open_tables,
    publish_file,
    remove_unfinished,
    shard_paths,
    write_text,
)
from opensora_fast.train.config import DiffusionRecipe, Recipe, recipe_to_dict
from opensora_fast.train.diffusion_inputs import require_latent_channels
from opensora_fast.train.launch import choose_device, override, require_autoencoder, require_one_process
from opensora_fast.train.recipes import RECIPES, find_recipe
from opensora_fast.train.stand_ins import resolve_autoencoder, resolve_data, resolve_text
from opensora_fast.video_decoder import choose_decoder

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class CacheReport:
    """What a cache holds of what its recipe reads."""

    pairs: int
    """Clips in buckets, equal ones counted as often as they occur."""
    latents: int
    prompts_asked: int
    prompts: int
    dropped: list[Dropped]
    unplaced: list[tuple[str, str]]
    """(path, reason) of each clip that no bucket takes."""
    shards: dict[str, int]
    """Bytes by name."""
    made: int
    """Rows that this run has added."""


def main(argv: list[str]) -> int:
    """Returns 0 when the cache holds all that can be encoded. Raises UserError for bad input."""
    parser = Parser(
        prog="opensora-fast data cache",
        description="Encode a recipe's clips and prompts once; train with --data.cache DIR. The same command goes on "
        "with a cache that was interrupted.",
        epilog="Every field of the recipe is an option too: --section.field value.",
    )
    parser.add_argument("recipe", help=", ".join(name for name in RECIPES if name != "demo_ae"))
    parser.add_argument("--out", required=True, type=Path, help="folder of the cache")
    parser.add_argument("--shard_gib", type=_positive, default=1.0, help="size of a shard (default: 1)")
    parser.add_argument("--prompts_at_once", type=_count, default=16, help="prompts in one batch (default: 16)")
    known, overrides = parser.parse_known_args(argv)
    recipe = override(find_recipe(known.recipe), overrides)
    report = cache_encoders(
        recipe,
        known.out,
        shard_bytes=int(known.shard_gib * GIB),
        prompts_at_once=known.prompts_at_once,
        console=Console(),
    )
    _print(report, known.out, Console())
    return 0


def cache_encoders(
    recipe: Recipe,
    out: Path,
    *,
    shard_bytes: int = GIB,
    prompts_at_once: int = 16,
    console: Console | None = None,
) -> CacheReport:
    """Make the cache of a recipe, or go on with it. `console` shows progress.

    Raises UserError for a recipe that cannot be cached, a folder that holds a cache made with other settings, a damaged
    shard, and a folder in which another process is at work.
    """
    diffusion = _require_cacheable(recipe)
    try:
        make_folder(out)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"--out {out}: {error.filename} is a file; name a folder for the cache") from error
    with _alone_in(out):
        remove_unfinished(out, (FILE, REPORT))
        diffusion = _resolved(diffusion, out)
        device = choose_device(diffusion.loop.device)
        settings = _settle(diffusion, out, device)
        multiple = settings.layout.compression[1] * diffusion.model.patch_size
        plan = plan_cache(diffusion.data, multiple=multiple)
        with _progress(console) as progress:
            work = EncodingWork(diffusion, settings, plan, out, shard_bytes, prompts_at_once, device, progress)
            made = work.latents()
            _free(device)
            for kind in PROMPT_VALUES:
                made += work.prompts(kind)
                _free(device)
        report = _report(plan, settings, out, made)
        publish_file(out / REPORT, lambda unfinished: write_text(unfinished, _report_text(report, diffusion)))
        return report


def _require_cacheable(recipe: Recipe) -> DiffusionRecipe:
    require_one_process()
    if not isinstance(recipe, DiffusionRecipe):
        raise UserError(f"recipe {recipe.name} trains an autoencoder, which reads pixels: cache a diffusion recipe")
    if recipe.data.cache is not None:
        raise UserError(f"data.cache={recipe.data.cache}: a cache is made from clips; leave this option out")
    require_autoencoder(recipe)
    return recipe


def _resolved(recipe: DiffusionRecipe, out: Path) -> DiffusionRecipe:
    """The recipe with files in place of what it leaves open; stand-ins are made in `out`."""
    recipe = dataclasses.replace(recipe, data=resolve_data(recipe.data, out))
    widths = {"t5_dim": recipe.model.context_in_dim, "clip_dim": recipe.model.vec_in_dim}
    recipe = dataclasses.replace(recipe, text=resolve_text(recipe.text, out, **widths))
    return resolve_autoencoder(recipe, out)


def _settle(recipe: DiffusionRecipe, out: Path, device: torch.device) -> CacheSettings:
    """The cache's settings, which are this recipe's; stored when the cache is new."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if (out / FILE).exists():
        there = read_settings(out)
        require_same(settings_of(recipe, there.layout, dtype), there, out)
        return there
    autoencoder = load_autoencoder(recipe_to_dict(recipe)["autoencoder"], torch.device("cpu"), dtype)
    require_latent_channels(autoencoder, recipe.model)
    settings = settings_of(recipe, autoencoder, dtype)
    publish_file(out / FILE, lambda unfinished: write_text(unfinished, settings.to_text()))
    return settings


def _free(device: torch.device) -> None:
    """What the last pass has left."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _report(plan: CachePlan, settings: CacheSettings, out: Path, made: int) -> CacheReport:
    tables = open_tables(out, settings.identity())
    latents, dropped = 0, []
    for group in plan.groups:
        rows = tables["latents"].find(group.keys_P)
        latents += int((rows >= 0).sum())
        keys = [group.keys_P[position].tobytes().hex() for position in np.flatnonzero(rows < 0)]
        dropped += [tables["latents"].dropped[key] for key in keys]
    return CacheReport(
        pairs=plan.pairs,
        latents=latents,
        prompts_asked=plan.prompts_asked,
        prompts=len(plan.prompt_keys_P),
        dropped=dropped,
        unplaced=plan.unplaced(),
        shards={path.name: path.stat().st_size for kind in KINDS for path in shard_paths(out, kind)},
        made=made,
    )


def _report_text(report: CacheReport, recipe: DiffusionRecipe) -> str:
    lists = {
        "dropped": [{"path": path, "reason": reason} for _, path, reason in report.dropped],
        "unplaced": [{"path": path, "reason": reason} for path, reason in report.unplaced],
    }
    versions = {"torch": torch.__version__, "decoder": choose_decoder().reason}
    fields = {"recipe": recipe_to_dict(recipe), "versions": versions} | dataclasses.asdict(report) | lists
    return json.dumps(fields, indent=2) + "\n"


def _print(report: CacheReport, out: Path, console: Console) -> None:
    size = sum(report.shards.values()) / GIB
    console.print(
        f"{out}: {report.latents} latents of {report.pairs} clips in buckets, {report.prompts} prompts of "
        f"{report.prompts_asked} clips, {size:.3f} GiB in {len(report.shards)} shards; {report.made} rows are new",
        highlight=False,
        soft_wrap=True,
    )
    left_out = [(path, f"no bucket takes it: {reason}") for path, reason in report.unplaced]
    left_out += [(path, reason) for _, path, reason in report.dropped]
    if not left_out:
        return
    table = Table("dropped", "reason", "as", title=f"{len(left_out)} in all; {out / REPORT} lists them")
    example = {reason: path for path, reason in reversed(left_out)}
    for reason, count in Counter(reason for _, reason in left_out).most_common():
        table.add_row(str(count), escape(reason), escape(example[reason]))
    console.print(table)


@contextlib.contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """Raises UserError when another process makes this cache."""
    with open(out / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{out}: another process makes this cache: wait for it, or use another --out") from error
        yield


def _progress(console: Console | None) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console, disable=console is None)


def _positive(word: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(word) < math.inf:
            return float(word)
    raise argparse.ArgumentTypeError(f"{word!r}: use a number above 0")


def _count(word: str) -> int:
    with contextlib.suppress(ValueError):
        if int(word) >= 1:
            return int(word)
    raise argparse.ArgumentTypeError(f"{word!r}: use 1 or more")
