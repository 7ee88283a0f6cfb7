"""The transformer's weights under the names and in the order of diffusers' FluxTransformer2DModel.

That class is of the same architecture, so a translation renames tensors and moves rows, and nothing is computed:

    rotation        it rotates the channel pairs (2i, 2i + 1) of a head, we (i, i + K/2): q, k and the scales of their
                    norms are reordered inside every head, as for FLUX
    attention       q, k, v (and the MLP of a single block) are tensors of their own
    final layer     its norm's rows are scale, shift; ours are shift, scale

with one exception. It has no `cond_in`, the linear of the masked reference latents. But img_in(x) + cond_in(c) is one
linear of the channels (x, c), and its input may be wider than its output. So a model with cond_embed is written with
`in_channels` = tokens' channels + condition's, in this order, and `out_channels` = tokens' channels: whoever calls it
passes both behind each other. The two biases become their sum; this sum is the only thing that cannot be undone.

Shapes  C channels of a token; D hidden size; K channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from opensora_fast.config import MMDiTConfig
from opensora_fast.errors import UserError
from opensora_fast.released import StateDict, reorder_heads, rotary_rows, split_rows

# What the class has no setting for.
FIXED = {"mlp_ratio": 4.0, "theta": 10000, "qkv_bias": True}

EMBEDDERS = {"time_in": "timestep", "guidance_in": "guidance", "vector_in": "text"}
EMBEDDER_LAYERS = {"in_layer": "linear_1", "out_layer": "linear_2"}
# By stream of a double block: text and video share one attention module, where the text's layers are the added ones.
STREAM_LAYERS = {
    "img": {"modulation": "norm1.linear", "proj": "attn.to_out.0", "mlp_in": "ff.net.0.proj", "mlp_out": "ff.net.2"},
    "txt": {
        "modulation": "norm1_context.linear",
        "proj": "attn.to_add_out",
        "mlp_in": "ff_context.net.0.proj",
        "mlp_out": "ff_context.net.2",
    },
}
QKV = {"img": ("to_q", "to_k", "to_v"), "txt": ("add_q_proj", "add_k_proj", "add_v_proj")}
NORMS = {"img": ("norm_q", "norm_k"), "txt": ("norm_added_q", "norm_added_k")}
SINGLE_LAYERS = {"modulation": "norm.linear", "proj": "proj_out"}
OUTER_LAYERS = {"img_in": "x_embedder", "txt_in": "context_embedder"}
FINAL_LAYERS = {"modulation": "norm_out.linear", "linear": "proj_out"}


def diffusers_config(config: MMDiTConfig) -> dict[str, Any]:
    """The config.json of FluxTransformer2DModel for this architecture.

    Raises UserError naming the field that the class has no place for.
    """
    for field, value in FIXED.items():
        if getattr(config, field) != value:
            raise UserError(
                f"--layout diffusers: {field}={getattr(config, field)!r}, but FluxTransformer2DModel has {value!r} "
                "built in: use --layout released"
            )
    return {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,  # of tokens, which are patches already
        "in_channels": config.in_channels + (config.cond_channels if config.cond_embed else 0),
        "out_channels": config.in_channels,
        "num_layers": config.depth,
        "num_single_layers": config.depth_single_blocks,
        "attention_head_dim": config.head_dim,
        "num_attention_heads": config.num_heads,
        "joint_attention_dim": config.context_in_dim,
        "pooled_projection_dim": config.vec_in_dim,
        "guidance_embeds": config.guidance_embed,
        "axes_dims_rope": list(config.axes_dim),
    }


def diffusers_parts(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Our parameters in the groups that `to_diffusers` needs together: one each, and those of img_in with cond_in's."""
    names = list(names)
    groups = [(name, name.replace("img_in.", "cond_in.")) if name.startswith("img_in.") else (name,) for name in names]
    return [tuple(name for name in group if name in names) for group in groups if not group[0].startswith("cond_in.")]


def to_diffusers(part: Mapping[str, Tensor], config: MMDiTConfig) -> StateDict:
    """One group of `diffusers_parts` as the tensors of FluxTransformer2DModel that hold its rows."""
    (name, rows), *condition = part.items()
    if condition:
        rows = torch.cat((rows, condition[0][1]), dim=1) if name.endswith("weight") else rows + condition[0][1]
    if name.startswith("final_layer.modulation."):
        rows = torch.cat(rows.chunk(2)[::-1])
    rows = rows.flatten() if name.endswith("qk_scale") else rows
    rotary = rotary_rows(name, config)
    return split_rows(reorder_heads(rows, rotary, (2, config.head_dim // 2)), _keys(name), rotary)


def _keys(name: str) -> list[str]:
    """The tensors of FluxTransformer2DModel whose rows, stacked in this order, are our parameter `name`."""
    match name.split("."):
        case ["double_blocks", i, stream, "qk_scale"]:
            return [f"transformer_blocks.{i}.attn.{norm}.weight" for norm in NORMS[stream]]
        case ["double_blocks", i, stream, "qkv", leaf]:
            return [f"transformer_blocks.{i}.attn.{layer}.{leaf}" for layer in QKV[stream]]
        case ["double_blocks", i, stream, layer, leaf]:
            return [f"transformer_blocks.{i}.{STREAM_LAYERS[stream][layer]}.{leaf}"]
        case ["single_blocks", i, "qk_scale"]:
            return [f"single_transformer_blocks.{i}.attn.{norm}.weight" for norm in NORMS["img"]]
        case ["single_blocks", i, "qkv_mlp", leaf]:
            layers = (*(f"attn.{layer}" for layer in QKV["img"]), "proj_mlp")
            return [f"single_transformer_blocks.{i}.{layer}.{leaf}" for layer in layers]
        case ["single_blocks", i, layer, leaf]:
            return [f"single_transformer_blocks.{i}.{SINGLE_LAYERS[layer]}.{leaf}"]
        case ["final_layer", layer, leaf]:
            return [f"{FINAL_LAYERS[layer]}.{leaf}"]
        case [embedder, layer, leaf]:
            return [f"time_text_embed.{EMBEDDERS[embedder]}_embedder.{EMBEDDER_LAYERS[layer]}.{leaf}"]
        case [layer, leaf]:
            return [f"{OUTER_LAYERS[layer]}.{leaf}"]
    raise AssertionError(f"no parameter of MMDiT: {name}")
