"""The transformer's weights under the names and in the order of diffusers' FluxTransformer2DModel.

That class is of the same architecture, so a translation renames tensors and moves rows, and nothing is computed:

    rotation        it rotates the channel pairs (2i, 2i + 1) of a head, we (i, i + K/2): q, k and the scales of their
                    norms are reordered inside every head, as for FLUX
    attention       q, k, v (and the MLP of a single block) are tensors of their own
    final layer     its norm's rows are scale, shift; ours are shift, scale

with one exception. It has no `cond_in`, the linear of the masked reference latents. But img_in(x) + cond_in(c) is one
linear of the channels (x, c), and its input may be wider than its output. So a model with cond_embed is written with
`in_channels` = tokens' channels + condition's, in this order, and `out_channels` = tokens' channels: whoever calls it
passes both behind each other. The two biases become their sum, the only thing that is computed. So that it can be
undone, both lie beside the weights, in a file that diffusers does not read, with the sum that they belong to:

    opensora_fast_biases.safetensors    img_in.bias [D], cond_in.bias [D], written_x_embedder.bias [D]

Read without that file, img_in has the whole bias and cond_in none, which is the same model.

Shapes  C channels of a token; D hidden size; K channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from opensora_fast.attention_rows import StateDict, reorder_heads, rotary_rows, split_rows
from opensora_fast.config import HunyuanVAEConfig, MMDiTConfig
from opensora_fast.errors import UserError
from opensora_fast.mmdit import MMDiT
from opensora_fast.released_form import VAE_CLASS
from opensora_fast.safetensors_file import TensorSpec
from opensora_fast.streamed_loading import Segment
from opensora_fast.told_config import MMDIT_CLASS
from opensora_fast.weight_files import BIASES_FILE, WeightFiles

BIASES = ("img_in.bias", "cond_in.bias")
WRITTEN_SUM = "written_x_embedder.bias"

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
                f"--to diffusers: {field}={getattr(config, field)!r}, but {MMDIT_CLASS} has {value!r} built in: use "
                "--to released"
            )
    return {
        "_class_name": MMDIT_CLASS,
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


def diffusers_vae_config(config: HunyuanVAEConfig) -> dict[str, Any]:
    """The config.json of AutoencoderKLHunyuanVideo for this autoencoder, whose tensors have the class's own names.

    How it is tiled is nothing that the class keeps; `HunyuanVAE` reads it from the files' own metadata. Raises
    UserError naming the field that the class has no place for.
    """
    if config.shift_factor != 0:
        raise UserError(
            f"--to diffusers: shift_factor={config.shift_factor!r}, but {VAE_CLASS} shifts nothing: use --to released"
        )
    stages = len(config.block_out_channels)
    return {
        "_class_name": VAE_CLASS,
        "latent_channels": config.latent_channels,
        "block_out_channels": list(config.block_out_channels),
        "down_block_types": ["HunyuanVideoDownBlock3D"] * stages,
        "up_block_types": ["HunyuanVideoUpBlock3D"] * stages,
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.norm_num_groups,
        "scaling_factor": config.scaling_factor,
        "spatial_compression_ratio": config.spatial_compression,
        "temporal_compression_ratio": config.temporal_compression,
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


def biases_file(part: Mapping[str, Tensor], config: MMDiTConfig) -> StateDict:
    """The tensors of BIASES_FILE, from our two biases as they are written: what `to_diffusers` adds up."""
    (written,) = to_diffusers(part, config).values()
    return {**part, WRITTEN_SUM: written}


def check_biases(files: WeightFiles) -> None:
    """Raises UserError when the two biases beside the weights belong to others: the ones or the others were changed.

    The tensors are there, and have the shapes that they should.
    """
    image, condition, written, summed = (files.read(name) for name in (*BIASES, WRITTEN_SUM, "x_embedder.bias"))
    if not (_same(image + condition, written) and _same(written, summed)):
        raise UserError(
            f"{files.path}/{BIASES_FILE}: its biases are not those in x_embedder.bias, one or the other was changed "
            "since: remove this file, and img_in has the whole bias"
        )


def _same(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first, second)


def diffusers_shapes(config: MMDiTConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of this layout, side file excepted, and its shape."""
    with torch.device("meta"):
        ours = MMDiT(config).state_dict()
    parts = [to_diffusers({name: ours[name] for name in part}, config) for part in diffusers_parts(ours)]
    return {key: tuple(tensor.shape) for part in parts for key, tensor in part.items()}


def diffusers_segments(name: str, config: MMDiTConfig, specs: Mapping[str, TensorSpec]) -> list[Segment]:
    """Our parameter `name`, as rows of these tensors: the exact inverse of `to_diffusers`.

    The tensors have the shapes of `diffusers_shapes`; those of the side file are used where `specs` has them.
    """
    D, C = config.hidden_size, config.in_channels
    match name.split("."):
        case ["img_in" | "cond_in", "bias"] if name in specs:
            return [Segment(name, 0, D)]
        case ["cond_in", "bias"]:
            return [Segment(None, 0, D)]
        case ["img_in", "weight"] if config.cond_embed:
            return [Segment("x_embedder.weight", 0, D, columns=(0, C))]
        case ["cond_in", "weight"]:
            return [Segment("x_embedder.weight", 0, D, columns=(C, C + config.cond_channels))]
        case ["final_layer", "modulation", _]:
            (key,) = _keys(name)
            return [Segment(key, D, D), Segment(key, 0, D)]
    rotary, segments = rotary_rows(name, config), []
    for number, key in enumerate(_keys(name)):
        turned = (config.head_dim // 2, 2) if rotary and number < 2 else None  # queries, then keys
        segments.append(Segment(key, 0, specs[key].shape[0], head_shape=turned))
    return segments


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
