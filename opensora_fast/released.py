"""Released checkpoints: reading their files, turning their tensors into ours, and back without changing a bit.

A released MMDiT comes in four layouts, named by two fields of its configuration:

    fused_qkv       True: `qkv` and `linear1` hold q, k, v (and the MLP) as rows of one matrix.  False: one tensor each.
    use_liger_rope  True: heads rotate the channel pairs (i, i + K/2), half-split.  False: (2i, 2i + 1), interleaved.

Ours is fused and half-split, under other names, so each of our parameters is a stack of rows of released tensors, some
of them reordered inside every head. Reordering q, k and the scales of their norms together leaves every q k^T as it is.

Shapes  D hidden size; K channels of a head.
"""

import json
import pickle
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from opensora_fast.config import MMDiTConfig, VideoDCAEConfig, config_from_dict
from opensora_fast.dc_ae import VideoDCAE
from opensora_fast.errors import UserError
from opensora_fast.mmdit import MMDiT
from opensora_fast.safetensors_file import read_files

StateDict = dict[str, Tensor]
Config = TypeVar("Config", MMDiTConfig, VideoDCAEConfig)

# What the released code assumes where its configuration is silent; other absent fields have our own defaults.
RELEASED_DEFAULTS = {"cond_embed": False, "fused_qkv": True, "use_liger_rope": False}

# Our layer -> theirs, for the layers of a block that are one matrix in every layout but under another name.
STREAM_LAYERS = {"modulation": "mod.lin", "qkv": "attn.qkv", "proj": "attn.proj", "mlp_in": "mlp.0", "mlp_out": "mlp.2"}
SINGLE_LAYERS = {"modulation": "modulation.lin", "qkv_mlp": "linear1", "proj": "linear2"}


def load_released_mmdit(state_dict: Mapping[str, Tensor], released_config: Mapping[str, Any]) -> MMDiT:
    """The model of a released checkpoint, in the dtype and on the device of its tensors.

    `released_config` has the released field names: those of the architecture and of the layout are read, others
    ignored, and absent ones are as the released code assumes. Tensors that need no rearranging are taken over, not
    copied.
    Raises UserError naming every tensor that is missing, unexpected or of another shape.
    """
    released = RELEASED_DEFAULTS | dict(released_config)
    with torch.device("meta"):
        model = MMDiT(_architecture(MMDiTConfig, released))
    _check_tensors(state_dict, to_released_state_dict(model, released))
    ours = {}
    for name, parameter in model.state_dict().items():
        pieces = [state_dict[key] for key in _released_names(name, released["fused_qkv"])]
        rows = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        if not released["use_liger_rope"]:
            rows = reorder_heads(rows, rotary_rows(name, model.config), (model.config.head_dim // 2, 2))
        ours[name] = rows.view(parameter.shape)
    model.load_state_dict(ours, assign=True)
    return model


def load_released_dc_ae(state_dict: Mapping[str, Tensor], released_config: Mapping[str, Any]) -> VideoDCAE:
    """The Video DC-AE of a released checkpoint, in the dtype and on the device of its tensors, which it takes over.

    Of `released_config` the fields of VideoDCAEConfig are read, others ignored.
    Raises UserError naming every tensor that is missing, unexpected or of another shape.
    """
    with torch.device("meta"):
        model = VideoDCAE(_architecture(VideoDCAEConfig, released_config))
    _check_tensors(state_dict, model.state_dict())
    model.load_state_dict(state_dict, assign=True)
    return model


def to_released_state_dict(model: MMDiT | VideoDCAE, released_config: Mapping[str, Any]) -> StateDict:
    """The weights under their released names, in the layout of `released_config`: the exact inverse of loading them.

    Of `released_config` only `fused_qkv` and `use_liger_rope` are read. Tensors share memory with the model unless
    heads had to be reordered. On the meta device it lists names and shapes.
    """
    if isinstance(model, VideoDCAE):
        return model.state_dict()
    theirs: StateDict = {}
    for name, parameter in model.state_dict().items():
        theirs |= to_released(name, parameter, model.config, released_config)
    return theirs


def to_released(name: str, parameter: Tensor, config: MMDiTConfig, released_config: Mapping[str, Any]) -> StateDict:
    """One parameter of an MMDiT as the released tensors that hold its rows; of all it is `to_released_state_dict`."""
    released = RELEASED_DEFAULTS | dict(released_config)
    rows = parameter.flatten() if name.endswith("qk_scale") else parameter
    rotary = rotary_rows(name, config)
    if not released["use_liger_rope"]:
        rows = reorder_heads(rows, rotary, (2, config.head_dim // 2))
    return split_rows(rows, _released_names(name, released["fused_qkv"]), rotary)


def read_weights(path: Path | str) -> StateDict:
    """Every tensor of a checkpoint, on the CPU, in the stored dtypes. Pickled code is never run.

    `path` is a .safetensors file, a folder of shards with one *.safetensors.index.json, or a .pt or .pth file holding
    a flat state dict. Raises UserError when it does not exist, is damaged or incomplete, or holds anything but tensors.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"weights {path} do not exist: pass a .safetensors, .pt or .pth file, or a folder of shards")
    if path.is_dir():
        return _read_shards(path)
    if path.suffix == ".safetensors":
        return read_files([path])
    if path.suffix in (".pt", ".pth"):
        return _read_pickle(path)
    raise UserError(f"weights {path} have the suffix {path.suffix!r}: pass a .safetensors, .pt or .pth file")


def _released_names(name: str, fused_qkv: bool) -> list[str]:
    """The released tensors whose rows, stacked in this order, are our MMDiT parameter `name`."""
    match name.split("."):
        case ["double_blocks", i, stream, "qk_scale"]:
            return [f"double_blocks.{i}.{stream}_attn.norm.{kind}_norm.scale" for kind in ("query", "key")]
        case ["double_blocks", i, stream, "qkv", leaf] if not fused_qkv:
            return [f"double_blocks.{i}.{stream}_attn.{kind}_proj.{leaf}" for kind in ("q", "k", "v")]
        case ["double_blocks", i, stream, layer, leaf]:
            return [f"double_blocks.{i}.{stream}_{STREAM_LAYERS[layer]}.{leaf}"]
        case ["single_blocks", i, "qk_scale"]:
            return [f"single_blocks.{i}.norm.{kind}_norm.scale" for kind in ("query", "key")]
        case ["single_blocks", i, "qkv_mlp", leaf] if not fused_qkv:
            return [f"single_blocks.{i}.{kind}.{leaf}" for kind in ("q_proj", "k_proj", "v_mlp")]
        case ["single_blocks", i, layer, leaf]:
            return [f"single_blocks.{i}.{SINGLE_LAYERS[layer]}.{leaf}"]
        case ["final_layer", "modulation", leaf]:
            return [f"final_layer.adaLN_modulation.1.{leaf}"]
    return [name]


def rotary_rows(name: str, config: MMDiTConfig) -> int:
    """How many rows of our parameter `name`, from the first, are channels of rotated heads: queries, then keys."""
    match name.split("."):
        case [*_, "qk_scale"]:
            return 2 * config.head_dim
        case [*_, "qkv" | "qkv_mlp", _]:
            return 2 * config.hidden_size
    return 0


def reorder_heads(rows: Tensor, rotary: int, head_shape: tuple[int, int]) -> Tensor:
    """Transpose the order of the channels, seen as `head_shape`, in every head of the first `rotary` rows.

    (K/2, 2) turns interleaved pairs into half-split ones, (2, K/2) turns them back.
    """
    if not rotary:
        return rows
    heads = rows[:rotary].unflatten(0, (-1, *head_shape)).transpose(1, 2).flatten(0, 2)
    return torch.cat((heads, rows[rotary:]))


def split_rows(rows: Tensor, keys: list[str], rotary: int) -> StateDict:
    """One tensor as several: all but the last are as tall as the queries, which are half of the `rotary` rows."""
    ends = [rotary // 2 * i for i in range(1, len(keys))]
    return dict(zip(keys, rows.tensor_split(ends), strict=True))


def _architecture(config_class: type[Config], released: Mapping[str, Any]) -> Config:
    names = {field.name for field in fields(config_class)}
    return config_from_dict(config_class, {key: value for key, value in released.items() if key in names})


def _check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    missing = [key for key in expected if key not in found]
    unexpected = [key for key in found if key not in expected]
    misshapen = [
        f"{key} is {list(found[key].shape)}, expected {list(expected[key].shape)}"
        for key in expected
        if key in found and found[key].shape != expected[key].shape
    ]
    groups = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    problems = "; ".join(f"{len(keys)} {group}: {', '.join(keys)}" for group, keys in groups.items() if keys)
    if problems:
        raise UserError(f"weights do not fit released_config ({problems}): correct its sizes or its layout fields")


def _read_shards(folder: Path) -> StateDict:
    indices = list(folder.glob("*.safetensors.index.json"))
    if len(indices) != 1:
        raise UserError(f"folder {folder} holds {len(indices)} files *.safetensors.index.json: exactly one is needed")
    try:
        shard_of: dict[str, str] = json.loads(indices[0].read_text())["weight_map"]
        shards = {name: folder / name for name in sorted(set(shard_of.values()))}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"index {indices[0]} is damaged, {error!r}: download it again") from error
    absent = [name for name, shard in shards.items() if not shard.is_file()]
    if absent:
        raise UserError(f"folder {folder} lacks {', '.join(absent)}, which its index names: download them again")
    tensors = read_files(list(shards.values()))
    lost = [key for key in shard_of if key not in tensors]
    if lost:
        raise UserError(f"the shards of {folder} lack {', '.join(lost)}, which the index names: download them again")
    return tensors


def _read_pickle(path: Path) -> StateDict:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "unsupported global" in str(error).lower():
            raise UserError(f"weights {path} hold pickled code, which is not run: save the tensors alone") from error
        raise UserError(f"weights {path} are no file of tensors: download or convert it again") from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise UserError(
            f"weights {path} are damaged, {type(error).__name__}: download or copy the file again"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise UserError(f"weights {path} are not a flat state dict: save the dict of names and tensors alone")
    return tensors
