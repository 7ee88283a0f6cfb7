"""A trained model as it lies on disk, for whoever reads one: the sampler, the next stage, a resumed run.

    RUN/recipe.json, RUN/LATEST ("step-N"), RUN/step-N/{manifest.json, rank-R-I.bin}

Tensors are flat: `model.NAME` (fp32 masters), `ema.NAME` where a moving average was kept, and the optimiser's moments.
The recipe's sections that are read here: `model` (MMDiTConfig), `autoencoder` (`kind`, `config`, and for diffusion runs
`weights`: the run, checkpoint or file that holds them), `text` (`t5`, `clip`, `max_length_t5`, `max_length_clip`),
`sampling_defaults`.
"""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from opensora_fast.checkpoint_reader import CheckpointReader
from opensora_fast.config import HunyuanVAEConfig, MMDiTConfig, VideoDCAEConfig, config_from_dict
from opensora_fast.dc_ae import VideoDCAE
from opensora_fast.errors import UserError
from opensora_fast.hunyuan_vae import HunyuanVAE
from opensora_fast.manifest import MANIFEST, read_manifest
from opensora_fast.mmdit import MMDiT
from opensora_fast.released import load_dc_ae_from, load_hunyuan_vae_from, naming
from opensora_fast.released_form import TITLES, VAE_CLASS, VAE_KINDS, kind_of
from opensora_fast.text import TextEncoders
from opensora_fast.told_config import told_config
from opensora_fast.weight_files import WeightFiles

RECIPE = "recipe.json"  # of a run
STEP_FOLDER = "step-{}"
_AUTOENCODERS: dict[str, str] = {kind: TITLES[tensors] for tensors, kind in VAE_KINDS.items()}
_STEP_RULE = re.compile(r"step-(0|[1-9][0-9]*)")
Weights = Literal["ema", "model"]


def step_of(folder: Path) -> int | None:
    """The step whose checkpoint has this name when it is published; None for other names."""
    match = _STEP_RULE.fullmatch(folder.name)
    return int(match[1]) if match else None


def step_folders(run: Path) -> list[Path]:
    """The published checkpoints of a run, oldest first."""
    found = [(step, path) for path in run.glob("step-*") if (step := step_of(path)) is not None and path.is_dir()]
    return [path for _, path in sorted(found)]


def is_run(path: Path) -> bool:
    """Whether `path` is a run, finished or not, or a step folder; other weights that lie in it are not what it is."""
    return path.is_dir() and ((path / MANIFEST).is_file() or (path / RECIPE).is_file() or len(step_folders(path)) > 0)


def find_checkpoint(path: Path) -> Path:
    """The step folder that `path` stands for: itself, or the newest of a run. Raises UserError when there is none."""
    if not path.is_dir():
        raise UserError(f"checkpoint {path}: no such folder; name a run or one of its step-N folders")
    if (path / MANIFEST).is_file():
        return path
    folders = step_folders(path)
    if not folders:
        raise UserError(f"checkpoint {path}: holds no finished checkpoint; train it further, or name another folder")
    return folders[-1]


def read_recipe(step_folder: Path) -> dict:
    """The recipe that the checkpoint's weights belong to. Raises ManifestError when it cannot be read."""
    return read_manifest(step_folder).recipe


def best_weights(reader: CheckpointReader) -> Weights:
    """The moving average where the checkpoint has one, otherwise the last weights."""
    return "ema" if any(name.startswith("ema.") for name in reader.manifest.tensors) else "model"


def load_mmdit(step_folder: Path, weights: Weights | None, device: torch.device, dtype: torch.dtype) -> MMDiT:
    """The transformer of a checkpoint, for evaluation. `weights` None takes the moving average if there is one."""
    reader = CheckpointReader(step_folder)
    recipe = reader.manifest.recipe
    if "model" not in recipe:
        raise UserError(
            f"checkpoint {step_folder} (recipe {recipe.get('name')}) holds no transformer: name a diffusion run"
        )
    with torch.device("meta"):
        model = MMDiT(config_from_dict(MMDiTConfig, recipe["model"]))
    _fill(model, reader, weights, device, dtype)
    return model.eval().requires_grad_(False)


def load_autoencoder(section: dict, device: torch.device, dtype: torch.dtype) -> VideoDCAE | HunyuanVAE:
    """The autoencoder of a recipe's `autoencoder` section, for evaluation, in its convolutions' memory format.

    `section["weights"]` is a run or checkpoint, whose own configuration counts, or released weights of the `kind` that
    the section says, whose configuration is that of `released_autoencoder_config`. Raises UserError for weights that
    are none or others, and for a Hunyuan autoencoder without diffusers.
    """
    path = Path(section["weights"])
    if not is_run(path):
        return _load_released_autoencoder(path, section, device, dtype).channels_last().eval().requires_grad_(False)
    step_folder = find_checkpoint(path)
    reader = CheckpointReader(step_folder)
    recipe = reader.manifest.recipe
    if "model" in recipe or "autoencoder" not in recipe:
        raise UserError(
            f"checkpoint {step_folder} (recipe {recipe.get('name')}) holds no autoencoder: name an autoencoder run"
        )
    _require_kind("video_dc_ae", section, step_folder)
    config = config_from_dict(VideoDCAEConfig, recipe["autoencoder"]["config"])
    if config.scaling_factor is None:
        raise UserError(f"checkpoint {step_folder} is of an unfinished autoencoder run: train it to its last step")
    with torch.device("meta"):
        model = VideoDCAE(config)
    _fill(model, reader, None, device, dtype)
    return model.channels_last().eval().requires_grad_(False)


def _load_released_autoencoder(
    path: Path, section: dict, device: torch.device, dtype: torch.dtype
) -> VideoDCAE | HunyuanVAE:
    files = WeightFiles.open(path)
    kind = kind_of(files.specs)
    found = VAE_KINDS.get(kind) if kind else None
    if found is not None:  # what is none of the two is told by its tensors
        _require_kind(found, section, path)
    load = load_hunyuan_vae_from if section["kind"] == "hunyuan" else load_dc_ae_from
    return load(files, device=device, dtype=dtype, released_config=released_autoencoder_config(files, section))


def released_autoencoder_config(files: WeightFiles, section: dict) -> dict[str, Any]:
    """The configuration that released weights are read with: what they say of themselves, else the section's `config`.

    Exported weights say all of it, as a run does: their scale belongs to their latents. Those of a download say
    nothing. Raises UserError naming the file when what it says is damaged.
    """
    hunyuan = section["kind"] == "hunyuan"
    like = asdict(HunyuanVAEConfig() if hunyuan else VideoDCAEConfig())
    with naming(files):
        told = told_config(files.metadata, like, VAE_CLASS if hunyuan else None)
    return section["config"] | {field: value for field, value in told.items() if value is not None}


def _require_kind(found: str, section: dict, path: Path) -> None:
    """Raises UserError where the recipe says another autoencoder than the weights are of."""
    expected = section.get("kind", found)
    if found != expected:
        raise UserError(
            f"autoencoder.weights={path} holds {_AUTOENCODERS[found]} and the recipe's autoencoder is "
            f"{_AUTOENCODERS[expected]}: name weights of that one"
        )


def load_text_encoders(section: dict, device: torch.device, dtype: torch.dtype) -> TextEncoders:
    """The text encoders that a recipe's `text` section names."""
    return TextEncoders.from_folders(
        Path(section["t5"]),
        Path(section["clip"]),
        max_length_t5=section["max_length_t5"],
        max_length_clip=section["max_length_clip"],
        device=device,
        dtype=dtype,
    )


def _fill(
    model: nn.Module, reader: CheckpointReader, weights: Weights | None, device: torch.device, dtype: torch.dtype
) -> None:
    """Give a model on the meta device its weights, a few at a time: the host never holds those of another device."""
    weights = weights or best_weights(reader)
    model.to(dtype).to_empty(device=device)
    reader.read({f"{weights}.{name}": tensor.detach() for name, tensor in model.state_dict().items()})
