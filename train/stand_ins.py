"""What a recipe leaves open and a rehearsal fills in: the demo's clips, tiny text encoders, an untrained autoencoder.

Each is written into the run folder and the recipe is changed to its path: the stored recipe names real files, and
whoever reads it later (a resumed run, the sampler) needs to know nothing about stand-ins.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import shutil
from pathlib import Path

import torch

from opensora_fast.checkpoint_folder import find_checkpoint, step_folders
from opensora_fast.config import VideoDCAEConfig
from opensora_fast.dc_ae import VideoDCAE
from opensora_fast.errors import UserError
from opensora_fast.train.autoencoder_loop import latent_deviation
from opensora_fast.train.checkpoint import RunFolder
from opensora_fast.train.config import DataSection, DiffusionRecipe, TextSection
from opensora_fast.train.feeds import fixed_feed

DEMO = "demo"


def resolve_data(data: DataSection, run: Path) -> DataSection:
    """`data` with "demo" replaced by the demo's indexes. Raises UserError when no index is named."""
    if data.index is None:
        raise UserError("data.index is not set: name a file of `opensora-fast data index` with --data.index FILE")
    if DEMO not in (data.index, data.heldout_index):
        return data
    from opensora_fast.train.demo_data import prepare_demo_data

    demo = prepare_demo_data(run.resolve() / "data")
    return dataclasses.replace(
        data,
        index=str(demo.train_index) if data.index == DEMO else data.index,
        heldout_index=str(demo.heldout_index) if data.heldout_index == DEMO else data.heldout_index,
    )


def resolve_text(text: TextSection, run: Path, *, t5_dim: int, clip_dim: int) -> TextSection:
    """`text` with "demo" replaced by tiny random encoders of these widths. Raises UserError when one is not named."""
    for name, value in (("t5", text.t5), ("clip", text.clip)):
        if value is None:
            raise UserError(f"text.{name} is not set: name the text encoder's folder with --text.{name} DIR")
    folder = run.resolve() / f"text_encoders-{t5_dim}-{clip_dim}"
    if DEMO in (text.t5, text.clip) and not folder.exists():
        from opensora_fast.text import save_tiny_text_encoders

        unfinished = folder.with_name(f"{folder.name}.tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        save_tiny_text_encoders(unfinished, t5_dim=t5_dim, clip_dim=clip_dim, seed=0)
        unfinished.rename(folder)
    t5, clip = (
        str(folder / name if value == DEMO else Path(str(value)).resolve())
        for name, value in (("t5", text.t5), ("clip", text.clip))
    )
    return dataclasses.replace(text, t5=t5, clip=clip)


def resolve_autoencoder(recipe: DiffusionRecipe, run: Path) -> DiffusionRecipe:
    """The recipe with autoencoder weights. Raises UserError when there are none and no untrained one is allowed."""
    section = recipe.autoencoder
    if section.weights is not None:
        path = Path(section.weights).resolve()
        # the step, not the run: training the autoencoder further must not change it under this run
        return _with_weights(recipe, find_checkpoint(path) if path.is_dir() and step_folders(path) else path)
    if section.untrained_seed is None:
        raise UserError(
            "autoencoder.weights is not set: name an autoencoder run or a released file with --autoencoder.weights PATH"
        )
    described = f"{section.config} {section.untrained_seed}"
    folder = run.resolve() / f"untrained_autoencoder-{hashlib.blake2b(described.encode(), digest_size=4).hexdigest()}"
    print(f"autoencoder.weights is not set: using an untrained autoencoder (seed {section.untrained_seed}) in {folder}")
    if not (folder / "LATEST").exists():
        _save_untrained(recipe, section.untrained_seed, folder)
    return _with_weights(recipe, folder)


def _with_weights(recipe: DiffusionRecipe, weights: Path) -> DiffusionRecipe:
    return dataclasses.replace(recipe, autoencoder=dataclasses.replace(recipe.autoencoder, weights=str(weights)))


def _save_untrained(recipe: DiffusionRecipe, seed: int, folder: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        assert isinstance(recipe.autoencoder.config, VideoDCAEConfig)  # the section allows a seed to no other
        autoencoder = VideoDCAE(dataclasses.replace(recipe.autoencoder.config, scaling_factor=None))
    clips = fixed_feed(recipe.data.index, recipe.data, multiple=autoencoder.compression[1], clips=4)
    config = dataclasses.replace(autoencoder.config, scaling_factor=latent_deviation(autoencoder, clips))
    tensors = {f"model.{name}": tensor for name, tensor in autoencoder.state_dict().items()}
    with contextlib.closing(RunFolder(folder, keep=1)) as run:
        section = {"kind": "video_dc_ae", "config": dataclasses.asdict(config)}
        run.save(0, tensors, {}, {"name": "untrained", "autoencoder": section})
        run.wait()
