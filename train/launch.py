"""`opensora-fast train RECIPE --out DIR`: from words to a running loop.

Reads the options, checks what the run needs before any work, puts the parts together, and trains.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
from pathlib import Path

import torch

from opensora_fast.arguments import Parser
from opensora_fast.errors import UserError
from opensora_fast.hunyuan_vae import diffusers_blocks
from opensora_fast.train.autoencoder_loop import train_autoencoder
from opensora_fast.train.checkpoint import RunFolder
from opensora_fast.train.config import AutoencoderRecipe, DiffusionRecipe, Recipe
from opensora_fast.train.diffusion import train_diffusion
from opensora_fast.train.recipes import RECIPES, find_recipe
from opensora_fast.train.stand_ins import resolve_data


def main(argv: list[str]) -> int:
    """Returns 0 when the steps are done, 130 when interrupted with the state saved. Raises UserError for bad input."""
    parser = Parser(
        prog="opensora-fast train",
        epilog="Every field of the recipe is an option too: --section.field value (--list shows them all).",
    )
    parser.add_argument("recipe", help=", ".join(RECIPES))
    parser.add_argument(
        "--out", required=True, type=Path, help="run folder; training resumes from its newest good checkpoint"
    )
    parser.add_argument("--steps", type=int, help="the same as --loop.steps")
    parser.add_argument("--fresh", action="store_true", help="delete the run in --out and start over")
    parser.add_argument("--list", action="store_true", help="print the recipe's fields and values, and stop")
    known, overrides = parser.parse_known_args(argv)
    if known.steps is not None:
        overrides += ["--loop.steps", str(known.steps)]
    recipe = override(find_recipe(known.recipe), ["--help"] if known.list else overrides)
    return run_recipe(recipe, known.out, fresh=known.fresh)


def override(recipe: Recipe, words: list[str]) -> Recipe:
    """The recipe with `--section.field value` options applied. Raises UserError with tyro's complaint as one line."""
    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                type(recipe),
                default=recipe,
                args=words,
                # a section's configuration keeps the class that the recipe gives it
                config=(tyro.conf.AvoidSubcommands,),
                use_underscores=True,
                prog=f"opensora-fast train {recipe.name}",
            )
    except SystemExit as leaving:
        if not leaving.code:
            raise
        lines = [line for line in said.getvalue().splitlines() if not line.startswith("╭")]
        complaint = " ".join(re.sub("[│╰╯─]+", " ", " ".join(lines)).split())
        raise UserError(complaint.split(" Argument helptext")[0].split(" For full helptext")[0]) from None


def run_recipe(recipe: Recipe, out: Path, *, fresh: bool = False) -> int:
    """Train `recipe` in the run folder `out`. Returns the exit code. Raises UserError for bad input."""
    check_supported(recipe)
    device = choose_device(recipe.loop.device)
    saving = recipe.checkpoint
    run = RunFolder(out, saving.keep, on_failure=saving.on_failure, chunk_bytes=saving.chunk_mib * 2**20)
    with contextlib.closing(run):
        recipe = dataclasses.replace(recipe, data=resolve_data(recipe.data, out))
        if isinstance(recipe, DiffusionRecipe):
            done = train_diffusion(recipe, run, device, fresh=fresh)
        else:
            done = train_autoencoder(recipe, run, device, fresh=fresh)
    print(f"done: {out}" if done else f"interrupted, state saved: {out} (the same command goes on from here)")
    return 0 if done else 130


def check_supported(recipe: Recipe) -> None:
    """Raises UserError when this version cannot run the recipe on this machine, before any work."""
    require_one_process()
    if isinstance(recipe, AutoencoderRecipe):
        if recipe.data.cache is not None:
            raise UserError(f"data.cache={recipe.data.cache}: {recipe.name} trains on pixels; leave this option out")
        return
    if recipe.data.cache is None:
        require_autoencoder(recipe)
    if recipe.follows and recipe.init_weights is None:
        raise UserError(
            f"init_weights is not set: {recipe.name} goes on from {recipe.follows}; name its run with --init_weights "
            "DIR, or start from nothing with --follows None"
        )
    if recipe.parallel.context_parallel > 1:
        raise UserError(
            f"parallel.context_parallel={recipe.parallel.context_parallel}: this version trains on one device; use 1"
        )


def require_autoencoder(recipe: DiffusionRecipe) -> None:
    """Raises UserError naming the option or the installation that a Hunyuan autoencoder lacks."""
    section = recipe.autoencoder
    if section.kind != "hunyuan":
        return
    if section.weights is None:
        raise UserError(
            f"autoencoder.weights is not set: recipe {recipe.name} encodes with the Hunyuan autoencoder; name its "
            "hunyuan_vae.safetensors with --autoencoder.weights FILE, or a latent cache with --data.cache DIR"
        )
    diffusers_blocks()


def require_one_process() -> None:
    """Raises UserError under a launcher of several processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("WORLD_SIZE is above 1: this version works on one device; start one process, without torchrun")


def choose_device(name: str) -> torch.device:
    """The device that `loop.device` names. Raises UserError for "cuda" without a device."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("loop.device=cuda: no CUDA device is visible; use --loop.device cpu")
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)
