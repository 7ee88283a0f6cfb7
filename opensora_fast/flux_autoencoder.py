"""The image autoencoder of FLUX.1: diffusers' AutoencoderKL, and its weights under their released names.

Both layouts hold the same tensors; a translation renames them and computes nothing:

    levels      the released decoder numbers its resolutions from the finest, diffusers from the coarsest
    attention   the released projections are 1 x 1 convolutions [C, C, 1, 1], those of diffusers matrices [C, C]

Latents are (z - shift) * scale, z the mean of the posterior: nothing is drawn.

Shapes   B images, C latent channels, H, W pixels, h, w = H / 8, W / 8 latent rows and columns.
Source   FLUX.1's released `ae.safetensors` and configuration: 128 channels times 1, 2, 4, 4, two residual blocks a
         level, 16 latent channels, scale 0.3611, shift 0.1159.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from opensora_fast.attention_rows import StateDict
from opensora_fast.errors import UserError
from opensora_fast.released import check_tensors, naming
from opensora_fast.told_config import told_config
from opensora_fast.weight_files import WeightFiles

SCALE, SHIFT = 0.3611, 0.1159
NORM_GROUPS = 32
LAYERS = {"conv_shortcut": "nin_shortcut"}  # of a residual block, where the names differ
CLASS = "AutoencoderKL"  # of diffusers
# The fields of its configuration that are checked, with values like those that they may have.
FIELDS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 16,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "norm_num_groups": NORM_GROUPS,
    "scaling_factor": SCALE,
    "shift_factor": SHIFT,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}


class FluxAutoencoder(nn.Module):
    """Images in [-1, 1] to latents of about unit standard deviation, and back.

    `config` has the fields of diffusers' AutoencoderKL. Raises UserError when diffusers is not installed or refuses it.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        try:
            self.network: Any = _diffusers().AutoencoderKL.from_config(dict(config))
        except (TypeError, ValueError, IndexError, ArithmeticError, RuntimeError) as error:
            raise UserError(
                f"no AutoencoderKL has this configuration ({error}): take config.json as released"
            ) from error
        for field in ("norm_num_groups", "scaling_factor"):
            if self.network.config[field] <= 0:
                raise UserError(
                    f"FLUX's autoencoder: {field}={self.network.config[field]} must be above 0: take config.json as "
                    "released"
                )

    @classmethod
    def from_released(
        cls, files: WeightFiles, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> FluxAutoencoder:
        """The autoencoder of a file with the released names, for evaluation; sizes follow from its tensors.

        What they do not tell is as released, unless the file's metadata has a "config" (JSON, fields of AutoencoderKL).
        Raises UserError naming the file and every tensor that is missing, unexpected or of another shape.
        """
        config = released_config(files)
        with naming(files):
            model = cls._empty(config)
        return model._filled(files, model._released_names(), device, dtype)

    @classmethod
    def from_diffusers(
        cls, folder: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> FluxAutoencoder:
        """The autoencoder of a folder that diffusers wrote (config.json and weights); errors as of `from_released`."""
        config = diffusers_config(Path(folder))
        files = WeightFiles.open(Path(folder))
        with naming(files):
            model = cls._empty(config)
        return model._filled(files, {name: name for name in model._names()}, device, dtype)

    def released_state_dict(self) -> StateDict:
        """The weights under their released names and shapes, sharing memory: the exact inverse of loading them."""
        tensors = self.network.state_dict()
        return {released: _as_convolution(name, tensors[name]) for name, released in self._released_names().items()}

    @property
    def latent_channels(self) -> int:
        return self.network.config.latent_channels

    @property
    def compression(self) -> int:
        """Pixels to one latent on either side."""
        return compression_of(self.network.config)

    @torch.no_grad()
    def encode(self, image_BCHW: Tensor) -> Tensor:
        """[B, 3, H, W] to [B, C, h, w], in the weights' dtype."""
        config = self.network.config
        mean_BChw = self.network.encode(image_BCHW.to(self.network.dtype)).latent_dist.mode()
        return (mean_BChw - config.shift_factor) * config.scaling_factor

    @torch.no_grad()
    def decode(self, latent_BChw: Tensor) -> Tensor:
        """[B, C, h, w] to [B, 3, H, W], in the weights' dtype."""
        config = self.network.config
        return self.network.decode(
            latent_BChw.to(self.network.dtype) / config.scaling_factor + config.shift_factor
        ).sample

    @classmethod
    def _empty(cls, config: Mapping[str, Any]) -> FluxAutoencoder:
        with torch.device("meta"):
            return cls(config)

    def _names(self) -> list[str]:
        return list(self.network.state_dict())

    def _released_names(self) -> dict[str, str]:
        levels = len(self.network.config.block_out_channels)
        return {name: released_name(name, levels) for name in self._names()}

    def _filled(
        self, files: WeightFiles, keys: Mapping[str, str], device: torch.device | str, dtype: torch.dtype
    ) -> FluxAutoencoder:
        """This model, from the meta device, with the tensors of `files`; `keys` are their names by ours."""
        shapes = {name: tuple(tensor.shape) for name, tensor in self.network.state_dict().items()}
        expected = {
            key: shapes[name]
            if key == name
            else tuple(_as_convolution(name, torch.empty(shapes[name], device="meta")).shape)
            for name, key in keys.items()
        }
        check_tensors(files.specs, expected, files.path)
        tensors = {name: files.read(key).view(shapes[name]).to(device, dtype) for name, key in keys.items()}
        self.network.load_state_dict(tensors, assign=True)
        return self.eval().requires_grad_(False)


def compression_of(config: Mapping[str, Any]) -> int:
    """Pixels to one latent on either side, of an AutoencoderKL with these fields."""
    return 2 ** (len(config.get("block_out_channels", (64,))) - 1)


def diffusers_config(folder: Path) -> dict[str, Any]:
    """The fields of the AutoencoderKL that diffusers wrote here. Raises UserError where they are of no FLUX."""
    path = folder / "config.json"
    try:
        text = path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): download the folder again") from error
    try:
        told = told_config({"config": text}, FIELDS, CLASS)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    config = json.loads(text)
    if "_class_name" not in config:
        raise UserError(f"{path} is of no {CLASS}: name the folder vae/ of a FLUX model")
    if "shift_factor" not in told:
        raise UserError(f"{path} has no shift_factor, so it is not FLUX's: name the folder vae/ of a FLUX model")
    return config


def released_config(files: WeightFiles) -> dict[str, Any]:
    """The fields of AutoencoderKL that the released tensors stand for. Raises UserError where they are of no FLUX."""
    specs = files.specs
    with naming(files):
        told = told_config(files.metadata, FIELDS, CLASS)

    def shape(name: str) -> tuple[int, ...]:
        if name not in specs or len(specs[name].shape) != 4:
            raise UserError(f"weights {files.path} hold no autoencoder of FLUX: {name} is missing or no convolution")
        return specs[name].shape

    levels = len({key.split(".")[2] for key in specs if key.startswith("encoder.down.")})
    blocks = len({key.split(".")[4] for key in specs if key.startswith("encoder.down.0.block.")})
    widths = [shape(f"encoder.down.{level}.block.0.conv1.weight")[0] for level in range(max(levels, 1))]
    return {
        "in_channels": shape("encoder.conv_in.weight")[1],
        "out_channels": shape("decoder.conv_out.weight")[0],
        "latent_channels": shape("decoder.conv_in.weight")[1],
        "block_out_channels": widths,
        "layers_per_block": blocks,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "norm_num_groups": NORM_GROUPS,
        "scaling_factor": SCALE,
        "shift_factor": SHIFT,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    } | told


def released_name(name: str, levels: int) -> str:
    """The released name of a tensor of AutoencoderKL with so many resolutions."""
    match name.split("."):
        case [side, "mid_block", "resnets", block, layer, leaf]:
            return f"{side}.mid.block_{int(block) + 1}.{LAYERS.get(layer, layer)}.{leaf}"
        case [side, "mid_block", "attentions", "0", layer, *_, leaf]:
            return f"{side}.mid.attn_1.{ATTENTION[layer]}.{leaf}"
        case [side, ("down_blocks" | "up_blocks") as blocks, index, *rest]:
            level = int(index) if blocks == "down_blocks" else levels - 1 - int(index)
            path = f"{side}.{blocks.removesuffix('_blocks')}.{level}"
            match rest:
                case ["resnets", block, layer, leaf]:
                    return f"{path}.block.{block}.{LAYERS.get(layer, layer)}.{leaf}"
                case [sampler, "0", "conv", leaf]:
                    return f"{path}.{sampler.removesuffix('rs')}.conv.{leaf}"
        case [side, "conv_norm_out", leaf]:
            return f"{side}.norm_out.{leaf}"
        case [_, "conv_in" | "conv_out", _]:
            return name
    raise AssertionError(f"no tensor of FLUX's autoencoder: {name}")


def _as_convolution(name: str, tensor: Tensor) -> Tensor:
    """Of attention's projections the 1 x 1 convolution; other tensors as they are."""
    return tensor[..., None, None] if ".attentions." in name and tensor.ndim == 2 else tensor


def _diffusers() -> ModuleType:
    try:
        return import_module("diffusers")
    except ImportError as error:
        raise UserError(
            f"FLUX's autoencoder needs diffusers ({error}): run pip install 'opensora-fast[diffusers]'"
        ) from error
