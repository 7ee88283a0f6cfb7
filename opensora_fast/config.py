"""Architectures as data: one frozen dataclass per model, and the named diffusion transformers.

A configuration says what a model computes and nothing about how it is run. Lists (as JSON gives them) become tuples,
so that every instance can be hashed and compared.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

from opensora_fast.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")

BLOCK_TYPES = ("ResBlock", "EViTS5_GLU")


@dataclass(frozen=True, kw_only=True)
class MMDiTConfig:
    """The diffusion transformer; the defaults are the released Open-Sora 2.0 model (256px and 768px).

    Raises UserError for sizes that do not fit together.
    """

    in_channels: int = 64  # of a token: latent channels * patch_size**2
    vec_in_dim: int = 768  # pooled CLIP embedding
    context_in_dim: int = 4096  # T5 embedding of one text token
    hidden_size: int = 3072
    mlp_ratio: float = 4.0
    num_heads: int = 24
    depth: int = 19  # double blocks: text and video have their own weights
    depth_single_blocks: int = 38
    axes_dim: tuple[int, ...] = (16, 56, 56)  # channels of a head that rotate with time, height and width
    theta: int = 10000
    qkv_bias: bool = True  # of the double blocks; single blocks always have it
    guidance_embed: bool = False  # distilled guidance (FLUX-dev)
    cond_embed: bool = True  # takes masked reference latents (image- and video-to-video)
    patch_size: int = 2

    def __post_init__(self) -> None:
        _freeze_lists(self)
        for name in ("in_channels", "vec_in_dim", "context_in_dim", "hidden_size", "num_heads", "theta", "patch_size"):
            _require(self, name, getattr(self, name) > 0, "must be positive")
        for name in ("depth", "depth_single_blocks"):
            _require(self, name, getattr(self, name) >= 0, "must not be negative")
        _require(self, "mlp_ratio", 0 < self.mlp_ratio < math.inf, "must be positive and finite")
        _require(
            self,
            "hidden_size",
            self.hidden_size % self.num_heads == 0,
            f"must be a multiple of num_heads={self.num_heads}",
        )
        _require(
            self,
            "axes_dim",
            len(self.axes_dim) == 3 and all(dim > 0 and dim % 2 == 0 for dim in self.axes_dim),
            "must be three positive even numbers: time, height, width",
        )
        _require(
            self,
            "axes_dim",
            sum(self.axes_dim) == self.head_dim,
            f"must sum to hidden_size / num_heads = {self.head_dim}",
        )
        _require(
            self,
            "in_channels",
            self.in_channels % self.patch_size**2 == 0,
            f"must be a multiple of patch_size**2 = {self.patch_size**2}",
        )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def mlp_size(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def latent_channels(self) -> int:
        return self.in_channels // self.patch_size**2

    @property
    def cond_channels(self) -> int:
        """Channels of a condition token: the patch of the mask, then the patch of the reference latent."""
        return self.in_channels + self.patch_size**2


@dataclass(frozen=True, kw_only=True)
class VideoDCAEConfig:
    """The deep-compression video autoencoder; the defaults are the released f32t4c128.

    Stage i of the encoder runs its blocks, then halves height and width (and time where `temporal_downsample[i]`) on
    the way to stage i + 1; the decoder mirrors it. Raises UserError for lengths or widths that do not fit together.
    """

    in_channels: int = 3
    latent_channels: int = 128
    encoder_widths: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    decoder_widths: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    encoder_depths: tuple[int, ...] = (2, 2, 2, 3, 3, 3)
    decoder_depths: tuple[int, ...] = (3, 3, 3, 3, 3, 3)
    encoder_block_types: tuple[str, ...] = ("ResBlock",) * 3 + ("EViTS5_GLU",) * 3
    decoder_block_types: tuple[str, ...] = ("ResBlock",) * 3 + ("EViTS5_GLU",) * 3
    temporal_downsample: tuple[bool, ...] = (False, False, False, True, True, False)
    heads_dim: int = 32  # channels of one linear-attention head
    scaling_factor: float | None = None  # standard deviation of the latents: encode divides by it, decode multiplies
    use_spatial_tiling: bool = False
    use_temporal_tiling: bool = False
    spatial_tile_size: int = 256  # pixels
    temporal_tile_size: int = 32  # frames
    tile_overlap_factor: float = 0.25

    def __post_init__(self) -> None:
        _freeze_lists(self)
        for name in ("in_channels", "latent_channels", "heads_dim"):
            _require(self, name, getattr(self, name) > 0, "must be positive")
        stages = len(self.encoder_widths)
        _require(self, "encoder_widths", stages >= 2, "must name at least two stages")
        for name in (
            "decoder_widths",
            "encoder_depths",
            "decoder_depths",
            "encoder_block_types",
            "decoder_block_types",
            "temporal_downsample",
        ):
            _require(self, name, len(getattr(self, name)) == stages, f"must have one entry per stage, {stages} in all")
        _require(self, "temporal_downsample", not self.temporal_downsample[-1], "must end in False: no stage follows")
        for side in ("encoder", "decoder"):
            self._check_stages(f"{side}_widths", f"{side}_block_types")
        scale = self.scaling_factor
        _require(self, "scaling_factor", scale is None or 0 < scale < math.inf, "must be positive and finite")
        _require(self, "tile_overlap_factor", 0 <= self.tile_overlap_factor < 1, "must be in [0, 1)")
        self._check_tile("spatial")
        self._check_tile("temporal")

    @property
    def spatial_compression(self) -> int:
        return 2 ** (len(self.encoder_widths) - 1)

    @property
    def temporal_compression(self) -> int:
        return 2 ** sum(self.temporal_downsample)

    def _check_stages(self, widths_name: str, types_name: str) -> None:
        widths, types = getattr(self, widths_name), getattr(self, types_name)
        _require(self, types_name, set(types) <= set(BLOCK_TYPES), f"must hold only {' or '.join(BLOCK_TYPES)}")
        _require(
            self,
            widths_name,
            all(width > 0 for width in widths)
            and all(w % self.heads_dim == 0 for w, t in zip(widths, types, strict=True) if t == "EViTS5_GLU"),
            f"must be positive, and multiples of heads_dim={self.heads_dim} where the stage is EViTS5_GLU",
        )
        # The shortcuts have no weights: they average or repeat whole groups of channels.
        for fine, coarse, temporal in zip(widths[:-1], widths[1:], self.temporal_downsample[:-1], strict=True):
            factor = 8 if temporal else 4
            _require(self, widths_name, fine * factor % coarse == 0, f"must have {coarse} divide {fine} * {factor}")
        _require(
            self,
            widths_name,
            widths[-1] % self.latent_channels == 0,
            f"must end in a multiple of latent_channels={self.latent_channels}",
        )

    def _check_tile(self, axis: str) -> None:
        name, unit = f"{axis}_tile_size", getattr(self, f"{axis}_compression")
        size, used = getattr(self, name), getattr(self, f"use_{axis}_tiling")
        _require(
            self, name, not used or (size > 0 and size % unit == 0), f"must be a multiple of the compression, {unit}"
        )


@dataclass(frozen=True, kw_only=True)
class HunyuanVAEConfig:
    """HunyuanVideo's causal video autoencoder, 4 x 8 x 8; the defaults are the released one (246M parameters).

    Field names of the tiling are the released ones. Raises UserError for sizes that do not fit together.
    """

    latent_channels: int = 16
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)  # of the encoder's stages; the decoder mirrors them
    layers_per_block: int = 2  # of the encoder; the decoder has one more
    norm_num_groups: int = 32
    scaling_factor: float = 0.476986  # 1 / standard deviation of the latents: encode multiplies by it, decode divides
    shift_factor: float = 0.0  # mean of the latents
    use_spatial_tiling: bool = False
    use_temporal_tiling: bool = False  # changes results: time is encoded and decoded in pieces that are cross-faded
    sample_size: int = 256  # pixels of a tile
    sample_tsize: int = 64  # frames of a tile, beside the first one
    tile_overlap_factor: float = 0.25

    def __post_init__(self) -> None:
        _freeze_lists(self)
        for name in ("latent_channels", "layers_per_block", "norm_num_groups"):
            _require(self, name, getattr(self, name) > 0, "must be positive")
        _require(self, "block_out_channels", len(self.block_out_channels) == 4, "must have four entries")
        _require(
            self,
            "block_out_channels",
            all(width > 0 and width % self.norm_num_groups == 0 for width in self.block_out_channels),
            f"must be positive multiples of norm_num_groups={self.norm_num_groups}",
        )
        _require(self, "scaling_factor", 0 < self.scaling_factor < math.inf, "must be positive and finite")
        _require(self, "shift_factor", -math.inf < self.shift_factor < math.inf, "must be finite")
        _require(self, "tile_overlap_factor", 0 <= self.tile_overlap_factor < 1, "must be in [0, 1)")
        for name, compression in (
            ("sample_size", self.spatial_compression),
            ("sample_tsize", self.temporal_compression),
        ):
            size = getattr(self, name)
            rule = f"must be a multiple of the compression, {compression}"
            _require(self, name, size > 0 and size % compression == 0, rule)

    @property
    def spatial_compression(self) -> int:
        return 8

    @property
    def temporal_compression(self) -> int:
        return 4


AutoencoderConfig = VideoDCAEConfig | HunyuanVAEConfig


def config_from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """The `cls` with these fields, defaults for absent ones. Raises UserError for a key that is no field of `cls`."""
    known = [field.name for field in fields(cls)]
    for key in values:
        if key not in known:
            raise UserError(f"{cls.__name__} has no field {key!r}: use one of {', '.join(known)}")
    return cls(**values)


def _freeze_lists(config: Any) -> None:
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, list):
            object.__setattr__(config, field.name, tuple(value))


def _require(config: Any, name: str, holds: bool, rule: str) -> None:
    if not holds:
        raise UserError(f"{type(config).__name__}: {name}={getattr(config, name)!r} {rule}")


MMDIT_PRESETS: dict[str, MMDiTConfig] = {
    "open-sora-v2": MMDiTConfig(),
    "open-sora-v2-dcae": MMDiTConfig(in_channels=128, patch_size=1),
    "flux-dev": MMDiTConfig(guidance_embed=True, cond_embed=False),
    "tiny": MMDiTConfig(
        in_channels=16,
        vec_in_dim=32,
        context_in_dim=48,
        hidden_size=64,
        num_heads=2,
        depth=1,
        depth_single_blocks=2,
        axes_dim=(4, 14, 14),
    ),
}
