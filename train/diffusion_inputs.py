"""What a diffusion run reads: encoders and clips, or a cache in place of both.

Raises UserError for encoders, clips or a cache that do not fit the recipe.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch

from opensora_fast.autoencoder import Autoencoder, LatentLayout
from opensora_fast.checkpoint_folder import load_autoencoder, load_text_encoders
from opensora_fast.config import MMDiTConfig
from opensora_fast.errors import UserError
from opensora_fast.text import TextEncoders
from opensora_fast.train.cache_reader import EncoderCache
from opensora_fast.train.cache_settings import adopt
from opensora_fast.train.cached_loader import cached_feeds
from opensora_fast.train.config import DiffusionRecipe, recipe_to_dict
from opensora_fast.train.feeds import fixed_feed, training_feed
from opensora_fast.train.loader import Batch, Batches
from opensora_fast.train.stand_ins import resolve_autoencoder, resolve_text


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionInputs:
    """What a run reads; `recipe` names the files that were chosen where it left something open."""

    recipe: DiffusionRecipe
    autoencoder: Autoencoder | None
    text: TextEncoders | None
    layout: LatentLayout
    loader: Batches
    heldout: Iterable[Batch]


def clip_inputs(recipe: DiffusionRecipe, run: Path, device: torch.device, dtype: torch.dtype) -> DiffusionInputs:
    """Encoders, and clips that are decoded; stand-ins for what the recipe leaves open are made in `run`."""
    recipe = resolve_autoencoder(recipe, run)
    text_widths = {"t5_dim": recipe.model.context_in_dim, "clip_dim": recipe.model.vec_in_dim}
    recipe = dataclasses.replace(recipe, text=resolve_text(recipe.text, run, **text_widths))
    autoencoder, text = load_encoders(recipe, device, dtype)
    multiple = autoencoder.compression[1] * recipe.model.patch_size
    return DiffusionInputs(
        recipe=recipe,
        autoencoder=autoencoder,
        text=text,
        layout=autoencoder,
        loader=training_feed(
            # in the autoencoder's dtype: it would round the pixels itself, and half of the memory is enough
            recipe.data,
            autoencoder,
            multiple=multiple,
            seed=recipe.loop.seed,
            device=device,
            dtype=dtype,
        ),
        heldout=fixed_feed(recipe.data.heldout_index, recipe.data, multiple=multiple),
    )


def cached_inputs(
    recipe: DiffusionRecipe, cache: EncoderCache, device: torch.device, dtype: torch.dtype
) -> DiffusionInputs:
    """Rows of a cache; its encoders are loaded only where samples are asked for."""
    recipe = adopt(recipe, cache.settings, cache.folder)
    layout = cache.settings.layout
    autoencoder, text = None, None
    if recipe.validation.prompts and recipe.validation.sample_every:
        autoencoder, text = load_encoders(recipe, device, dtype)
    multiple = layout.compression[1] * recipe.model.patch_size
    loader, heldout = cached_feeds(cache, recipe, multiple=multiple, device=device)
    return DiffusionInputs(
        recipe=recipe, autoencoder=autoencoder, text=text, layout=layout, loader=loader, heldout=heldout
    )


def load_encoders(
    recipe: DiffusionRecipe, device: torch.device, dtype: torch.dtype
) -> tuple[Autoencoder, TextEncoders]:
    """Both, if they fit the model. Raises UserError when one is not named or cannot be loaded."""
    described = recipe_to_dict(recipe)
    for section, name in (("autoencoder", "weights"), ("text", "t5"), ("text", "clip")):
        if described[section][name] is None:
            raise UserError(
                f"{section}.{name} is not set, and samples are asked for: name it with --{section}.{name}, or train "
                "without samples (--validation.sample_every 0)"
            )
    autoencoder = load_autoencoder(described["autoencoder"], device, dtype)
    require_latent_channels(autoencoder, recipe.model)
    text = load_text_encoders(described["text"], device, dtype)
    null_txt_1LD, null_vec_1D = text.null()
    require_text_width("t5", null_txt_1LD.shape[-1], recipe.model)
    require_text_width("clip", null_vec_1D.shape[-1], recipe.model)
    return autoencoder, text


def require_latent_channels(layout: LatentLayout, model: MMDiTConfig) -> None:
    """Raises UserError unless latents have as many channels as the model takes."""
    if layout.latent_channels != model.latent_channels:
        raise UserError(
            f"autoencoder.weights gives {layout.latent_channels} channels, model.in_channels / patch_size^2 is "
            f"{model.latent_channels}: name another one"
        )


def require_text_width(name: Literal["t5", "clip"], width: int, model: MMDiTConfig) -> None:
    """Raises UserError unless the embeddings of a text encoder have as many features as the model takes."""
    field = {"t5": "context_in_dim", "clip": "vec_in_dim"}[name]
    if width != getattr(model, field):
        raise UserError(
            f"text.{name} gives {width} channels, model.{field} is {getattr(model, field)}: name another one"
        )
