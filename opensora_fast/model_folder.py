"""What a path to sample from holds: a run of `opensora-fast train`, or released weights, and where their parts lie.

    RUN or RUN/step-N                        its recipe names the autoencoder and the text encoders
    ckpts/                                   the folder that the released weights come in:
        Open_Sora_v2.safetensors             or Open_Sora_v2_Video_DC_AE.safetensors
        hunyuan_vae.safetensors              or F32T4C128_AE.safetensors
        google/t5-v1_1-xxl/                  openai/clip-vit-large-patch14/
        flux1-dev.safetensors                flux1-dev-ae.safetensors      (for pictures, where asked for)
    a weights file, or a folder of shards    a transformer in the released layout or in diffusers'; its other parts lie
                                             beside the file, or in the folder that holds the shards' folder

Weights are known by their tensors, not by their names, so renamed and exported files serve as well.  Others that lie
there, a LoRA or a damaged file, do no harm, and are named where a part is not found.  Of the files only the headers are
read here, and each part that is not found is named with the option that gives it.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from opensora_fast.checkpoint_folder import Weights, find_checkpoint, is_run, read_recipe
from opensora_fast.config import HunyuanVAEConfig, MMDiTConfig, VideoDCAEConfig, config_from_dict
from opensora_fast.dc_ae import VideoDCAE
from opensora_fast.errors import UserError
from opensora_fast.flux import flux_files
from opensora_fast.hunyuan_vae import HunyuanVAE
from opensora_fast.parameter_source import parameters_of
from opensora_fast.released import naming
from opensora_fast.released_form import RELEASED_DC_AE, TITLES, VAE_KINDS, Kind, kind_of, vae_form
from opensora_fast.told_config import told_config
from opensora_fast.weight_files import BIASES_FILE, WeightFiles

T5_FOLDER, CLIP_FOLDER = Path("google/t5-v1_1-xxl"), Path("openai/clip-vit-large-patch14")
_MMDIT_KINDS: tuple[Kind, ...] = ("mmdit", "mmdit_diffusers")
_T5_TOKENS, _CLIP_TOKENS = 512, 77  # what the released models were trained with


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """A video model's parts; nothing of their weights has been read."""

    path: Path  # of the transformer: a step folder of a run, or weights
    is_run: bool
    config: MMDiTConfig
    autoencoder: dict[str, Any]  # kind, weights and config, as in a recipe
    text: dict[str, Any]  # t5, clip and their lengths, as in a recipe
    defaults: dict[str, Any] = field(default_factory=dict)  # of SamplingSettings
    weights: Weights | None = None  # which of a run's; None: the moving average where there is one
    flux: Path | None = None  # a FLUX.1-dev folder


def find_model(
    path: Path,
    *,
    weights: Weights | None = None,
    t5: Path | None = None,
    clip: Path | None = None,
    autoencoder: Path | None = None,
    flux: Path | None = None,
) -> ModelFolder:
    """The parts of the model at `path`; the other arguments take the place of parts that it names or that lie there.

    Raises UserError for what is no model to sample videos with, and for a part that is missing, is there twice or
    does not fit the transformer; each message names the option that helps.
    """
    for option, folder in (("t5", t5), ("clip", clip)):
        if folder is not None and not folder.is_dir():
            raise UserError(
                f"--{option} {folder}: no such folder; name one that holds the text encoder and its tokenizer"
            )
    if not path.exists():
        raise UserError(
            f"checkpoint {path}: does not exist; name a run, one of its step-N folders, or released weights"
        )
    if is_run(path):
        model = _run(find_checkpoint(path), t5, clip, autoencoder)
    else:
        model = _released(path, t5, clip, autoencoder)
    channels = model.autoencoder["config"].get("latent_channels")
    if channels is not None and channels != model.config.latent_channels:
        raise UserError(
            f"autoencoder {model.autoencoder['weights']}: its latents have {channels} channels and {model.path} makes "
            f"{model.config.latent_channels}; name the autoencoder that belongs to it with --autoencoder"
        )
    _check_text_width("t5", model.text["t5"], "d_model", model.config.context_in_dim)
    _check_text_width("clip", model.text["clip"], "hidden_size", model.config.vec_in_dim)
    if flux is not None:
        flux_files(flux)
    if weights is not None and not model.is_run:
        raise UserError(f"--weights {weights}: is for runs, and {model.path} holds one set of weights; drop it")
    return replace(model, weights=weights, flux=flux)


def autoencoder_layout(section: dict[str, Any]) -> VideoDCAE | HunyuanVAE:
    """The autoencoder of a recipe's section without its weights, on the meta device: it knows sizes.

    Raises UserError for a run that holds none, and for a Hunyuan autoencoder without diffusers.
    """
    path = Path(section["weights"])
    if is_run(path):
        section = _autoencoder_section(path)
    with torch.device("meta"):
        if section["kind"] == "hunyuan":
            return HunyuanVAE(config_from_dict(HunyuanVAEConfig, section["config"]))
        return VideoDCAE(config_from_dict(VideoDCAEConfig, section["config"]))


def _run(step_folder: Path, t5: Path | None, clip: Path | None, autoencoder: Path | None) -> ModelFolder:
    recipe = read_recipe(step_folder)
    if "model" not in recipe:
        raise UserError(f"checkpoint {step_folder} holds no diffusion transformer: name a diffusion run")
    text = dict(recipe["text"])
    for name, folder in (("t5", t5), ("clip", clip)):
        if folder is not None:
            text[name] = str(folder)
        if not text.get(name) or not Path(text[name]).is_dir():
            raise UserError(
                f"{step_folder}: its text encoder {text.get(name)} is no folder here; name it with --{name}"
            )
    section = _autoencoder_section(autoencoder) if autoencoder else recipe["autoencoder"]
    if not section.get("weights") or not Path(section["weights"]).exists():
        raise UserError(
            f"{step_folder}: its autoencoder {section.get('weights')} is not here; name one with --autoencoder"
        )
    return ModelFolder(
        path=step_folder,
        is_run=True,
        config=config_from_dict(MMDiTConfig, recipe["model"]),
        autoencoder=section,
        text=text,
        defaults=recipe.get("sampling_defaults", {}),
    )


def _released(path: Path, t5: Path | None, clip: Path | None, autoencoder: Path | None) -> ModelFolder:
    weights = _transformer_weights(path)
    config = _transformer_config(weights)
    places = [weights.parent] if weights.is_file() else [weights, weights.parent]
    section = (
        _autoencoder_section(autoencoder)
        if autoencoder
        else _autoencoder_beside(weights, places, config.latent_channels)
    )
    return ModelFolder(
        path=weights,
        is_run=False,
        config=config,
        autoencoder=section,
        text={
            "t5": str(t5 or _folder_beside("t5", T5_FOLDER, places)),
            "clip": str(clip or _folder_beside("clip", CLIP_FOLDER, places)),
            "max_length_t5": _T5_TOKENS,
            "max_length_clip": _CLIP_TOKENS,
        },
        defaults={} if section["kind"] == "hunyuan" else {"frames": 128},
    )


def _transformer_weights(path: Path) -> Path:
    """The weights file, or the folder of shards, of the video transformer at `path`."""
    if path.is_file():
        kind = kind_of(WeightFiles.open(path).specs)
        if kind not in _MMDIT_KINDS:
            raise UserError(f"checkpoint {path}: holds {TITLES[kind]}; name the file or folder of a video transformer")
        _refuse_flux(path, path)
        return path
    found, problems = _weights_in(path, _MMDIT_KINDS)
    videos: list[Path] = []
    pictures: list[Path] = []
    for weights in found:
        try:
            (pictures if _makes_pictures(weights) else videos).append(weights)
        except UserError as error:
            problems.insert(0, str(error))
    if len(videos) > 1:
        raise UserError(
            f"checkpoint {path}: holds {' and '.join(each.name for each in videos)}; name the one to use: {videos[0]}"
        )
    if not videos:
        if problems:
            raise UserError(f"checkpoint {path}: holds no whole video transformer: {_listed(problems)}")
        if pictures:
            _refuse_flux(path, pictures[0])
        raise UserError(
            f"checkpoint {path}: holds no video transformer; name a run with a finished checkpoint, or a folder with "
            "Open_Sora_v2.safetensors"
        )
    return videos[0]


def _refuse_flux(path: Path, weights: Path) -> None:
    if _makes_pictures(weights):
        raise UserError(
            f"checkpoint {path}: {weights.name} makes pictures (FLUX); pass its folder as --flux, with a video model "
            "such as Open_Sora_v2.safetensors"
        )


def _makes_pictures(weights: Path) -> bool:
    """FLUX takes no condition. A video model that takes none says so itself, as `checkpoint export` has it."""
    config = _transformer_config(weights)
    says = told_config(WeightFiles.open(weights).metadata, {"cond_embed": True})
    return config.guidance_embed or not (config.cond_embed or "cond_embed" in says)


def _transformer_config(weights: Path) -> MMDiTConfig:
    config = parameters_of(WeightFiles.open(weights)).config
    assert isinstance(config, MMDiTConfig)  # weights of another kind are not asked
    return config


def _weights_in(folder: Path, kinds: Collection[Kind]) -> tuple[list[Path], list[str]]:
    """The weights of these kinds in a folder: the folder itself where it holds shards, else files of it, by name.

    Also what is wrong with files that cannot be read.
    """
    sharded = any(folder.glob("*.safetensors.index.json"))
    files = [path for path in sorted(folder.glob("*.safetensors")) if path.is_file() and _is_visible(path)]
    found, problems = [], []
    for path in [folder] if sharded else files:
        try:
            if kind_of(WeightFiles.open(path).specs) in kinds:
                found.append(path)
        except UserError as error:
            problems.append(str(error))
    return [folder] if len(files) == 1 and found and (folder / "config.json").is_file() else found, problems


def _is_visible(path: Path) -> bool:
    return not path.name.startswith(".") and path.name != BIASES_FILE


def _listed(problems: list[str]) -> str:
    return "; ".join(problems[:3])


def _autoencoder_section(path: Path) -> dict[str, Any]:
    """A recipe's section for an autoencoder run, a weights file or a folder of them."""
    if not path.exists():
        raise UserError(f"--autoencoder {path}: does not exist; name an autoencoder's weights or run")
    if is_run(path):
        recipe = read_recipe(find_checkpoint(path))
        if "model" in recipe or "autoencoder" not in recipe:
            raise UserError(f"--autoencoder {path}: holds no autoencoder; name an autoencoder run")
        return recipe["autoencoder"] | {"kind": "video_dc_ae", "weights": str(path)}  # no other is trained here
    files = WeightFiles.open(path)
    kind = kind_of(files.specs)
    if kind not in VAE_KINDS:
        raise UserError(
            f"--autoencoder {path}: holds {TITLES[kind]}; name hunyuan_vae.safetensors or F32T4C128_AE.safetensors"
        )
    with naming(files):
        form, config = vae_form(files.specs, files.metadata)
        if form == "video_dc_ae":
            told = told_config(files.metadata, RELEASED_DC_AE | {"scaling_factor": None})
            config |= {name: value for name, value in RELEASED_DC_AE.items() if told.get(name) is None}
    return {"kind": form, "weights": str(path), "config": config}


def _autoencoder_beside(weights: Path, places: list[Path], channels: int) -> dict[str, Any]:
    fitting, problems = [], []
    for place in places:
        found, unread = _weights_in(place, VAE_KINDS.keys())
        problems += unread
        for path in found:
            try:
                section = _autoencoder_section(path)
            except UserError as error:
                problems.append(str(error))
                continue
            if section["config"]["latent_channels"] == channels:
                fitting.append(section)
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = " and ".join(section["weights"] for section in fitting)
        raise UserError(f"{weights}: both {names} lie beside it; name the autoencoder with --autoencoder")
    name = "hunyuan_vae.safetensors" if channels == 16 else "F32T4C128_AE.safetensors"
    why = f" ({_listed(problems)})" if problems else ""
    raise UserError(
        f"{weights}: no autoencoder of {channels} latent channels lies beside it{why}; put {name} there, or name it "
        "with --autoencoder"
    )


def _folder_beside(option: str, folder: Path, places: list[Path]) -> Path:
    for place in places:
        if (place / folder).is_dir():
            return place / folder
    raise UserError(f"{places[0] / folder}: no such folder; put the text encoder there, or name it with --{option}")


def _check_text_width(option: str, folder: str, key: str, width: int) -> None:
    """Raise UserError unless an encoder's configuration says that its features are `width` wide."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text())
        found = config.get("text_config", config).get(key)  # CLIP's may describe both of its towers
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path}: cannot be read as a configuration ({error}); name another folder with --{option}"
        ) from error
    if found != width:
        raise UserError(
            f"{path}: {key}={found}, and the transformer takes {width}; name the folder of its encoder with --{option}"
        )
