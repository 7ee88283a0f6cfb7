"""What the tensors of a checkpoint say of its configuration, so that released files need none beside them.

What the weights tell of themselves counts (`told_config`): a tensor that does not agree with it is found by those that
load the weights, under its own name. What they do not tell is as in the released models where the width is theirs.
Otherwise sizes are read off names and shapes; where several tensors say the same the most of them count, so that one of
a wrong shape is found as well. The last blocks of a model of another width may then be missing without being missed,
and a size that one tensor alone says is believed. What no shape says has the value of the released models.

Source  names and shapes of the released checkpoints; diffusers' FluxTransformer2DModel and AutoencoderKLHunyuanVideo.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, Literal, NamedTuple

from opensora_fast.config import HunyuanVAEConfig, MMDiTConfig, VideoDCAEConfig
from opensora_fast.errors import UserError
from opensora_fast.safetensors_file import TensorSpec
from opensora_fast.told_config import told_config, told_mmdit

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
TITLES: dict[Kind | None, str] = {
    "mmdit": "a transformer",
    "mmdit_diffusers": "a transformer",
    "hunyuan_vae": "a Hunyuan VAE",
    "video_dc_ae": "a Video DC-AE",
    "flux_ae": "FLUX's image autoencoder",
    None: "no weights that are known here",
}
VAE_KINDS: dict[Kind, VaeKind] = {"hunyuan_vae": "hunyuan", "video_dc_ae": "video_dc_ae"}
VAE_CLASS = "AutoencoderKLHunyuanVideo"  # of diffusers

# The released models of this width have these sizes, too.
RELEASED_WIDTH = 3072
RELEASED_SIZES = ("depth", "depth_single_blocks", "vec_in_dim", "context_in_dim", "num_heads", "mlp_ratio")
RELEASED_PATCHES = {64: 2, 128: 1}  # by the channels of a token
RELEASED_HUNYUAN = asdict(HunyuanVAEConfig(use_spatial_tiling=True))
# How the released Video DC-AE is used: no tensor says it. The scale is that of its training; the released sampling
# leaves it out, which cannot match what the transformer was trained on.
RELEASED_DC_AE: dict[str, Any] = {"scaling_factor": 0.493, "use_spatial_tiling": True, "use_temporal_tiling": True}


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
    Raises UserError naming the tensor without which a size is unknown, or blocks that are told and missing; for an
    autoencoder's tensors; and as `told_config`.
    """
    kind = kind_of(specs) or "mmdit"
    if kind not in CLAIMS:
        raise UserError(f"they are of {TITLES[kind]}, not of a transformer: name other ones")
    claims, told = CLAIMS[kind], told_mmdit(metadata)
    said = {name: _said(specs, name, claims[name], told) for name in ("hidden_size", "in_channels")} | told
    hidden_size, in_channels = said["hidden_size"], said["in_channels"]
    if hidden_size == RELEASED_WIDTH:
        released = {name: getattr(MMDiTConfig(), name) for name in RELEASED_SIZES}
        if in_channels in RELEASED_PATCHES:
            released["patch_size"] = RELEASED_PATCHES[in_channels]
        said = released | said
    said |= {name: _said(specs, name, claims[name], said) for name in ("vec_in_dim", "context_in_dim")}
    if "num_heads" not in said:
        said["num_heads"] = max(hidden_size // _size(specs, "num_heads", claims["head_dim"]), 1)
    inferred: dict[str, Any]
    if kind == "mmdit":
        blocks, single_blocks = "double_blocks", "single_blocks"
        cond_channels = _vote(specs, claims["cond_channels"])
        fused = any(re.search(r"_attn\.qkv\.|single_blocks\.\d+\.linear1\.", name) for name in specs)
        inferred = {
            "cond_embed": any(name.startswith("cond_in.") for name in specs),
            "guidance_embed": any(name.startswith("guidance_in.") for name in specs),
            "qkv_bias": any(re.search(r"_attn\.(qkv|[qkv]_proj)\.bias$", name) for name in specs),
            "fused_qkv": fused,
            "use_liger_rope": not fused,
        }
    else:
        blocks, single_blocks = "transformer_blocks", "single_transformer_blocks"
        cond_channels = (_vote(specs, claims["all_channels"]) or in_channels) - in_channels
        inferred = {
            "cond_embed": cond_channels > 0,
            "guidance_embed": any(name.startswith("time_text_embed.guidance_embedder.") for name in specs),
            "qkv_bias": True,
        }
        said |= {"fused_qkv": True, "use_liger_rope": False}
    for name, blocks_name in (("depth", blocks), ("depth_single_blocks", single_blocks)):
        inferred[name] = _depth(specs, name, blocks_name, said.get(name))
    inferred["qkv_bias"] = inferred["qkv_bias"] or inferred["depth"] == 0
    if "patch_size" not in said:
        inferred["patch_size"] = _patch_size(in_channels, cond_channels)
    if "mlp_ratio" not in said:
        inferred["mlp_ratio"] = _mlp_ratio(specs, claims, hidden_size)
    if "axes_dim" not in said:
        inferred["axes_dim"] = _axes_dim(hidden_size // max(said["num_heads"], 1))
    return asdict(MMDiTConfig()) | inferred | said


def assumed_fields(specs: Specs, metadata: Mapping[str, str], form: Mapping[str, Any]) -> frozenset[str]:
    """The fields of a transformer's form that no tensor says and the weights do not tell: they have released values."""
    unsaid = {"axes_dim", "theta", "use_liger_rope"} | (set() if form["cond_embed"] else {"patch_size"})
    if kind_of(specs) == "mmdit_diffusers":  # whose class has them built in
        unsaid -= {"theta", "use_liger_rope"}
    return frozenset(unsaid - told_mmdit(metadata).keys())


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
    told = told_config(metadata, RELEASED_HUNYUAN, VAE_CLASS)
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
    sizes: dict[str, Any] = {
        "latent_channels": _said(specs, "latent_channels", latent_channels, told),
        "block_out_channels": told.get("block_out_channels") or tuple(widths),
    }
    layers_per_block = told.get("layers_per_block")
    if sizes["block_out_channels"] == RELEASED_HUNYUAN["block_out_channels"] and layers_per_block is None:
        layers_per_block = RELEASED_HUNYUAN["layers_per_block"]
    resnets = r"encoder\.down_blocks\.\d+\.resnets"
    sizes["layers_per_block"] = _depth(specs, "layers_per_block", resnets, layers_per_block)
    return RELEASED_HUNYUAN | sizes | told


def _dc_ae_form(specs: Specs, metadata: Mapping[str, str]) -> dict[str, Any]:
    told = told_config(metadata, asdict(VideoDCAEConfig()))
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
        Claim(r"decoder\.project_out\.op_list\.2\.conv\.weight", 0, 5),
    ]
    latent = [
        Claim(r"encoder\.project_out\.main\.op_list\.0\.conv\.bias", 0, 1),
        Claim(r"encoder\.project_out\.main\.op_list\.0\.conv\.weight", 0, 5),
        Claim(r"decoder\.project_in\.main\.conv\.weight", 1, 5),
    ]
    heads = [Claim(r"(encoder|decoder)\.stages\.\d+\.op_list\.\d+\.context_module\.main\.aggreg\.0\.1\.weight", 1, 5)]
    form |= {
        "in_channels": _said(specs, "in_channels", image, told),
        "latent_channels": _said(specs, "latent_channels", latent, told),
        "heads_dim": _vote(specs, heads) or VideoDCAEConfig().heads_dim,
    }
    released = asdict(VideoDCAEConfig())  # of whose sizes are all that nothing tells where its widths are these
    if all(form[name] == released[name] for name in ("latent_channels", "encoder_widths", "decoder_widths")):
        told = released | told
    for name in ("encoder_depths", "decoder_depths"):
        for stage, (found, wanted) in enumerate(zip(form[name], told.get(name, ()), strict=False)):
            _require_blocks(f"{name}[{stage}]", rf"{name[:7]}.stages.{stage}.op_list", found, wanted)
    unsaid = {name: value for name, value in released.items() if name not in form}
    unsaid["temporal_downsample"] = tuple(stages - 3 <= stage < stages - 1 for stage in range(stages))
    return form | unsaid | told


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
        raise UserError(
            f"heads have {head_dim} channels, and no tensor says how many rotate with time, height and width: say "
            "axes_dim in NAME.json beside the file, or in config.json of the folder"
        )
    return head_dim // 8, head_dim // 16 * 7, head_dim // 16 * 7


def _patch_size(in_channels: int, cond_channels: int | None) -> int:
    """From the mask's channels in a condition."""
    mask_channels = (cond_channels or 0) - in_channels
    if mask_channels > 0 and math.isqrt(mask_channels) ** 2 == mask_channels:
        return math.isqrt(mask_channels)
    return MMDiTConfig().patch_size


def _blocks(specs: Specs, prefix: str) -> int:
    """How many there are of PREFIX.0, PREFIX.1 and so on."""
    found = (re.match(rf"{prefix}\.(\d+)\.", name) for name in specs)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _depth(specs: Specs, field: str, prefix: str, told: int | None) -> int:
    """How many blocks there should be: as many as there are where nothing tells. Raises UserError for fewer."""
    found = _blocks(specs, prefix)
    if told is None:
        return found
    _require_blocks(field, prefix.replace(r"\d+", "N").replace("\\", ""), found, told)
    return told


def _require_blocks(field: str, prefix: str, found: int, wanted: int) -> None:
    if found < wanted:
        raise UserError(
            f"{field} is {wanted}, and the tensors {prefix}.{found} to {prefix}.{wanted - 1} are missing: download the "
            "weights again; whole ones of another size say so in their metadata, or in NAME.json beside them"
        )


def _said(specs: Specs, field: str, claims: list[Claim], told: Mapping[str, Any]) -> int:
    """What is told, else what tensors say; raises UserError when neither does."""
    return told[field] if field in told else _size(specs, field, claims)


def _size(specs: Specs, field: str, claims: list[Claim]) -> int:
    """Raises UserError when no tensor says it."""
    size = _vote(specs, claims)
    if size is None:
        tensor = claims[0].names.replace(r"\d+", "0").replace("\\", "")
        raise UserError(f"no tensor says {field}, as {tensor} would: download the weights again, or name whole ones")
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
