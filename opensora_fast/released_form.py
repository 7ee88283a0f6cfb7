"""What the tensors of a checkpoint say of its configuration, so that released files need none beside them.

Sizes are read off names and shapes. Where several tensors say the same the most of them count, so that one of a wrong
shape is found by those that load the weights, under its own name. What no shape says comes from the file's metadata,
where its "config" is the configuration as JSON (`opensora-fast checkpoint export` writes it, and the config.json of a
diffusers folder is read as it), and otherwise has the value of the released models.

Source  names and shapes of the released checkpoints; diffusers' FluxTransformer2DModel and AutoencoderKLHunyuanVideo.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, Literal, NamedTuple

from opensora_fast.config import MMDiTConfig, VideoDCAEConfig
from opensora_fast.errors import UserError
from opensora_fast.safetensors_file import TensorSpec

Kind = Literal["mmdit", "mmdit_diffusers", "hunyuan_vae", "video_dc_ae", "flux_ae"]
VaeKind = Literal["hunyuan", "video_dc_ae"]
Specs = Mapping[str, TensorSpec]

KINDS: dict[Kind, str] = {
    "mmdit": r"(double_blocks|single_blocks)\.\d+\.",
    "mmdit_diffusers": r"(transformer_blocks|single_transformer_blocks)\.\d+\.attn\.",
    "hunyuan_vae": r"(encoder\.down_blocks|decoder\.up_blocks)\.\d+\.resnets\.\d+\.conv\d\.conv\.",
    "video_dc_ae": r"(encoder|decoder)\.stages\.\d+\.op_list\.",
    "flux_ae": r"(encoder\.down|decoder\.up)(\.\d+\.block|_blocks\.\d+\.resnets)\.",
}
AUTOENCODERS: dict[Kind, str] = {
    "hunyuan_vae": "a Hunyuan VAE",
    "video_dc_ae": "a Video DC-AE",
    "flux_ae": "FLUX's image autoencoder",
}
# What no shape says of each model, with values like those that a configuration may have: the released ones.
RELEASED_MMDIT: dict[str, Any] = {"theta": 10000, "axes_dim": (16, 56, 56), "patch_size": 2, "use_liger_rope": False}
DIFFUSERS_MMDIT: dict[str, Any] = {"axes_dims_rope": (16, 56, 56), "_class_name": "FluxTransformer2DModel"}
RELEASED_HUNYUAN: dict[str, Any] = {
    "norm_num_groups": 32,
    "scaling_factor": 0.476986,
    "shift_factor": 0.0,
    "use_spatial_tiling": True,
    "use_temporal_tiling": False,
    "sample_size": 256,
    "sample_tsize": 64,
    "tile_overlap_factor": 0.25,
}


class Claim(NamedTuple):
    """A size that tensors state: that of the axis `axis` of those of `ndim` axes whose whole names match `names`."""

    names: str
    axis: int
    ndim: int


# By layout, which tensors say what. The first of each is one tensor, which is named where there are none.
CLAIMS: dict[str, dict[str, list[Claim]]] = {
    "mmdit": {
        "hidden_size": [
            Claim(r"img_in\.bias", 0, 1),
            Claim(r"(txt_in|(time|vector|guidance)_in\.(in|out)_layer)\.bias", 0, 1),
            Claim(r"double_blocks\.\d+\.(img|txt)_attn\.proj\.bias|single_blocks\.\d+\.linear2\.bias", 0, 1),
        ],
        "in_channels": [
            Claim(r"img_in\.weight", 1, 2),
            Claim(r"final_layer\.linear\.weight", 0, 2),
            Claim(r"final_layer\.linear\.bias", 0, 1),
        ],
        "vec_in_dim": [Claim(r"vector_in\.in_layer\.weight", 1, 2)],
        "context_in_dim": [Claim(r"txt_in\.weight", 1, 2)],
        "head_dim": [
            Claim(r"single_blocks\.0\.norm\.query_norm\.scale", 0, 1),
            Claim(r".*\.(query|key)_norm\.scale", 0, 1),
        ],
        "mlp_size": [
            Claim(r"double_blocks\.\d+\.(img|txt)_mlp\.0\.bias", 0, 1),
            Claim(r"double_blocks\.\d+\.(img|txt)_mlp\.2\.weight", 1, 2),
        ],
        "mlp_size_and_hidden_size": [Claim(r"single_blocks\.\d+\.linear2\.weight", 1, 2)],
        "cond_channels": [Claim(r"cond_in\.weight", 1, 2)],
    },
    "mmdit_diffusers": {
        "hidden_size": [
            Claim(r"x_embedder\.bias", 0, 1),
            Claim(r"(context_embedder|time_text_embed\..*\.linear_[12])\.bias", 0, 1),
            Claim(r"(single_)?transformer_blocks\.\d+\.attn\.to_q\.bias", 0, 1),
        ],
        "in_channels": [Claim(r"proj_out\.weight", 0, 2), Claim(r"proj_out\.bias", 0, 1)],
        "vec_in_dim": [Claim(r"time_text_embed\.text_embedder\.linear_1\.weight", 1, 2)],
        "context_in_dim": [Claim(r"context_embedder\.weight", 1, 2)],
        "head_dim": [
            Claim(r"single_transformer_blocks\.0\.attn\.norm_q\.weight", 0, 1),
            Claim(r".*\.attn\.norm_(added_)?[qk]\.weight", 0, 1),
        ],
        "mlp_size": [
            Claim(r"single_transformer_blocks\.\d+\.proj_mlp\.bias", 0, 1),
            Claim(r"transformer_blocks\.\d+\.ff(_context)?\.net\.0\.proj\.bias", 0, 1),
        ],
        "all_channels": [Claim(r"x_embedder\.weight", 1, 2)],
    },
}


# What says the width of a stage of the Video DC-AE, by the kind of its blocks; the first, how many blocks it has.
DC_AE_LAYERS = {
    "ResBlock": [
        Claim(r"main\.conv2\.norm\.(weight|bias)", 0, 1),
        Claim(r"main\.conv1\.conv\.bias", 0, 1),
        Claim(r"main\.conv[12]\.conv\.weight", 0, 5),
        Claim(r"main\.conv[12]\.conv\.weight", 1, 5),
    ],
    "EViTS5_GLU": [
        Claim(r"context_module\.main\.proj\.norm\.(weight|bias)", 0, 1),
        Claim(r"local_module\.main\.point_conv\.norm\.(weight|bias)", 0, 1),
        Claim(r"context_module\.main\.proj\.conv\.weight|local_module\.main\.point_conv\.conv\.weight", 0, 5),
    ],
}


def kind_of(specs: Iterable[str]) -> Kind | None:
    """What a checkpoint with tensors of these names is; None for whatever is nothing of ours."""
    names = list(specs)
    return next((kind for kind, rule in KINDS.items() if any(re.match(rule, name) for name in names)), None)


def mmdit_form(specs: Specs, metadata: Mapping[str, str] = {}) -> dict[str, Any]:
    """The `released_config` of a transformer: every field of MMDiTConfig, `fused_qkv` and `use_liger_rope`.

    Of diffusers' layout it is the configuration of the model; the last two are those of FLUX's own file.
    Raises UserError naming the tensor without which a size is unknown, and for an autoencoder's tensors.
    """
    kind = kind_of(specs) or "mmdit"
    if kind in AUTOENCODERS:
        raise UserError(f"they are of {AUTOENCODERS[kind]}, not of a transformer: name other ones")
    claims, said = CLAIMS[kind], _said(metadata, RELEASED_MMDIT | DIFFUSERS_MMDIT)
    sizes = {
        field: _size(specs, field, claims[field])
        for field in ("in_channels", "vec_in_dim", "context_in_dim", "hidden_size")
    }
    hidden_size = sizes["hidden_size"]
    head_dim = _size(specs, "num_heads", claims["head_dim"])
    if kind == "mmdit":
        fused = any(re.search(r"_attn\.qkv\.|single_blocks\.\d+\.linear1\.", name) for name in specs)
        blocks, single_blocks = "double_blocks", "single_blocks"
        cond_channels = _vote(specs, claims["cond_channels"])
        cond_embed = any(name.startswith("cond_in.") for name in specs)
        guidance_embed = any(name.startswith("guidance_in.") for name in specs)
        qkv_bias = any(re.search(r"_attn\.(qkv|[qkv]_proj)\.bias$", name) for name in specs)
        half_split = said.get("use_liger_rope", not fused)
    else:
        fused, half_split, qkv_bias = True, False, True
        blocks, single_blocks = "transformer_blocks", "single_transformer_blocks"
        cond_channels = (_vote(specs, claims["all_channels"]) or sizes["in_channels"]) - sizes["in_channels"]
        cond_embed = cond_channels > 0
        guidance_embed = any(name.startswith("time_text_embed.guidance_embedder.") for name in specs)
    depth, depth_single_blocks = _blocks(specs, blocks), _blocks(specs, single_blocks)
    return asdict(MMDiTConfig()) | {
        **sizes,
        "mlp_ratio": _mlp_ratio(specs, claims, hidden_size),
        "num_heads": max(hidden_size // head_dim, 1),
        "depth": depth,
        "depth_single_blocks": depth_single_blocks,
        "axes_dim": said.get("axes_dim") or said.get("axes_dims_rope") or _axes_dim(head_dim),
        "theta": said.get("theta", MMDiTConfig().theta),
        "qkv_bias": qkv_bias or depth == 0,
        "guidance_embed": guidance_embed,
        "cond_embed": cond_embed,
        "patch_size": _patch_size(sizes["in_channels"], cond_channels, said),
        "fused_qkv": fused,
        "use_liger_rope": half_split,
    }


def vae_form(specs: Specs, metadata: Mapping[str, str] = {}) -> tuple[VaeKind, dict[str, Any]]:
    """Which autoencoder it is, and its configuration: every field of HunyuanVAEConfig or of VideoDCAEConfig.

    No shape says which stages of a Video DC-AE halve time: as in the released one, the last two of those that halve
    height and width (the only one of two stages). Nor does one say how many groups the norms of a Hunyuan VAE have: 32.
    Raises UserError naming the tensor without which a size is unknown, and for what is none of the two.
    """
    kind = kind_of(specs)
    if kind == "hunyuan_vae":
        return "hunyuan", _hunyuan_form(specs, metadata)
    if kind == "video_dc_ae":
        return "video_dc_ae", _dc_ae_form(specs, metadata)
    raise UserError("the tensors are neither a Hunyuan VAE's nor a Video DC-AE's: name the weights of one")


def _hunyuan_form(specs: Specs, metadata: Mapping[str, str]) -> dict[str, Any]:
    stages = range(_blocks(specs, r"encoder\.down_blocks"))
    layers = r"resnets\.\d+\.(conv\d\.conv|norm2)\.bias"
    widths = (
        _size(
            specs,
            f"block_out_channels[{stage}]",
            [
                Claim(rf"encoder\.down_blocks\.{stage}\.{layers}", 0, 1),
                Claim(rf"decoder\.up_blocks\.{len(stages) - 1 - stage}\.{layers}", 0, 1),
            ],
        )
        for stage in stages
    )
    latent_channels = [
        Claim(r"decoder\.conv_in\.conv\.weight", 1, 5),
        Claim(r"post_quant_conv\.weight", 0, 5),
        Claim(r"post_quant_conv\.bias", 0, 1),
    ]
    sizes = {
        "latent_channels": _size(specs, "latent_channels", latent_channels),
        "block_out_channels": tuple(widths),
        "layers_per_block": _blocks(specs, r"encoder\.down_blocks\.0\.resnets"),
    }
    return sizes | RELEASED_HUNYUAN | _said(metadata, RELEASED_HUNYUAN)


def _dc_ae_form(specs: Specs, metadata: Mapping[str, str]) -> dict[str, Any]:
    stages = _blocks(specs, r"encoder\.stages")
    form: dict[str, Any] = {}
    for side in ("encoder", "decoder"):
        widths, depths, types = [], [], []
        for stage in range(stages):
            block = rf"{side}\.stages\.{stage}\.op_list\.(\d+)"
            kind = "EViTS5_GLU" if any(re.match(rf"{block}\.context_module\.", name) for name in specs) else "ResBlock"
            layers = DC_AE_LAYERS[kind]
            claims = [layer._replace(names=rf"{block}\.({layer.names})") for layer in layers]
            found = (re.fullmatch(claims[0].names, name) for name in specs)
            widths.append(_vote(specs, claims) or _resampled_width(specs, side, stage))
            depths.append(len({match[1] for match in found if match}))
            types.append(kind)
        form |= {f"{side}_widths": tuple(widths), f"{side}_depths": tuple(depths), f"{side}_block_types": tuple(types)}
    image = [
        Claim(r"encoder\.project_in\.conv\.weight", 1, 5),
        Claim(r"decoder\.project_out\.op_list\.2\.conv\.bias", 0, 1),
    ]
    latent = [
        Claim(r"encoder\.project_out\.main\.op_list\.0\.conv\.bias", 0, 1),
        Claim(r"encoder\.project_out\.main\.op_list\.0\.conv\.weight", 0, 5),
        Claim(r"decoder\.project_in\.main\.conv\.weight", 1, 5),
    ]
    heads = [Claim(r"(encoder|decoder)\.stages\.\d+\.op_list\.\d+\.context_module\.main\.aggreg\.0\.1\.weight", 1, 5)]
    form |= {
        "in_channels": _size(specs, "in_channels", image),
        "latent_channels": _size(specs, "latent_channels", latent),
        "heads_dim": _vote(specs, heads) or VideoDCAEConfig().heads_dim,
    }
    unsaid = {field: value for field, value in asdict(VideoDCAEConfig()).items() if field not in form}
    unsaid["temporal_downsample"] = tuple(stages - 3 <= stage < stages - 1 for stage in range(stages))
    return form | unsaid | _said(metadata, unsaid)


def _resampled_width(specs: Specs, side: str, stage: int) -> int:
    """The width of a stage without blocks, from the convolution that leads from or to it."""
    block = rf"{side}\.stages\.{stage}\.op_list\.0\.main"
    claim = Claim(rf"{block}\.conv\.weight", 1, 5) if side == "encoder" else Claim(rf"{block}\.conv\.conv\.bias", 0, 1)
    return _size(specs, f"{side}_widths[{stage}]", [claim])


def _mlp_ratio(specs: Specs, claims: Mapping[str, list[Claim]], hidden_size: int) -> float:
    """The ratio of which `MMDiTConfig.mlp_size` makes exactly the size that the tensors have."""
    size = _vote(specs, claims["mlp_size"])
    if size is None and "mlp_size_and_hidden_size" in claims:
        size = _size(specs, "mlp_ratio", claims["mlp_size_and_hidden_size"]) - hidden_size
    if size is None or size <= 0:
        return MMDiTConfig().mlp_ratio
    ratio = size / hidden_size
    return ratio if int(hidden_size * ratio) == size else math.nextafter(ratio, math.inf)


def _axes_dim(head_dim: int) -> tuple[int, int, int]:
    """As in the released models: an eighth of a head rotates with time, the rest half with height, half with width."""
    if head_dim % 32:
        raise UserError(f"heads have {head_dim} channels, of which no tensor says axes_dim: pass released_config")
    return head_dim // 8, head_dim // 16 * 7, head_dim // 16 * 7


def _patch_size(in_channels: int, cond_channels: int | None, said: Mapping[str, Any]) -> int:
    """From the mask's channels in a condition; the patch size that diffusers' configuration says is of tokens."""
    mask_channels = (cond_channels or 0) - in_channels
    if mask_channels > 0 and math.isqrt(mask_channels) ** 2 == mask_channels:
        return math.isqrt(mask_channels)
    released = MMDiTConfig().patch_size
    return released if "_class_name" in said else said.get("patch_size", released)


def _blocks(specs: Specs, prefix: str) -> int:
    """How many there are of PREFIX.0, PREFIX.1 and so on."""
    found = (re.match(rf"{prefix}\.(\d+)\.", name) for name in specs)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _size(specs: Specs, field: str, claims: list[Claim]) -> int:
    """Raises UserError when no tensor says it."""
    size = _vote(specs, claims)
    if size is None:
        tensor = claims[0].names.replace(r"\d+", "0").replace("\\", "")
        raise UserError(f"no tensor says {field}, as {tensor} would: name a whole checkpoint, or pass released_config")
    return size


def _vote(specs: Specs, claims: list[Claim]) -> int | None:
    """The size that most of the tensors state, the first where as many state another; None: there are none."""
    votes: Counter[int] = Counter()
    for names, axis, ndim in claims:
        rule = re.compile(names)
        votes.update(
            spec.shape[axis]
            for name, spec in specs.items()
            if len(spec.shape) == ndim and spec.shape[axis] > 0 and rule.fullmatch(name)
        )
    return votes.most_common(1)[0][0] if votes else None


def _said(metadata: Mapping[str, str], like: Mapping[str, Any]) -> dict[str, Any]:
    """Of the configuration in a file's metadata the fields of `like`, whose values are of the types that are allowed.

    Raises UserError when it is no JSON object, or a field has a value of another type.
    """
    if "config" not in metadata:
        return {}
    try:
        config = json.loads(metadata["config"])
    except (ValueError, RecursionError) as error:
        raise UserError(f"the configuration in the weights' metadata is no JSON ({error}): write them again") from error
    if not isinstance(config, dict):
        raise UserError("the configuration in the weights' metadata is no JSON object: write them again")
    said = {field: config[field] for field in like if field in config}
    for field, value in said.items():
        if not _alike(value, like[field]):
            raise UserError(
                f"the configuration in the weights' metadata has {field}={reprlib.repr(value)}, where a value like "
                f"{json.dumps(like[field])} belongs: write them again"
            )
    return {field: tuple(value) if isinstance(value, list) else value for field, value in said.items()}


def _alike(value: Any, like: Any) -> bool:
    if isinstance(like, tuple):
        return isinstance(value, list) and all(_alike(item, like[0]) for item in value)
    if like is None or isinstance(like, float):
        return type(value) in (int, float) or (value is None and like is None)
    return type(value) is type(like)
