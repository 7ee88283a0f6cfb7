"""The configuration that weights tell of themselves: a JSON object, which counts where tensors leave a choice.

It is in the metadata of their files, under "config" (`opensora-fast checkpoint export` writes it); where it is not, in
the config.json of their folder, or in NAME.json beside NAME.safetensors (`WeightFiles` puts both there). Its fields are
ours, or those of diffusers' class, which it then names.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from opensora_fast.config import MMDiTConfig
from opensora_fast.errors import UserError

MOST = 2**20  # no field of any configuration is larger
MMDIT = asdict(MMDiTConfig()) | {"fused_qkv": False, "use_liger_rope": True}
MMDIT_CLASS = "FluxTransformer2DModel"
DIFFUSERS_MMDIT: dict[str, Any] = {
    "_class_name": MMDIT_CLASS,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "in_channels": 64,
    "out_channels": None,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
OURS = {
    "num_layers": "depth",
    "num_single_layers": "depth_single_blocks",
    "num_attention_heads": "num_heads",
    "joint_attention_dim": "context_in_dim",
    "pooled_projection_dim": "vec_in_dim",
    "guidance_embeds": "guidance_embed",
    "axes_dims_rope": "axes_dim",
}


def told_config(metadata: Mapping[str, str], like: Mapping[str, Any], class_name: str | None = None) -> dict[str, Any]:
    """The fields of `like` that are told, whose values are of the types that `like` has; others are passed over.

    class_name: what `_class_name` has to be where it is told.
    Raises UserError when it is no JSON object, of another class, or a field has a value of another type, none that is
    finite, or one beyond any size.
    """
    if "config" not in metadata:
        return {}
    try:
        config = json.loads(metadata["config"])
    except (ValueError, RecursionError) as error:
        raise UserError(f"their configuration is no JSON ({error}): download or write them again") from error
    if not isinstance(config, dict):
        raise UserError("their configuration is no JSON object: download or write them again")
    found = config.get("_class_name", class_name)
    if class_name is not None and found != class_name:
        raise UserError(
            f"their configuration is of the class {reprlib.repr(found)}, not of {class_name}: name weights of that"
        )
    told = {field: config[field] for field in like if field in config}
    for field, value in told.items():
        if not _alike(value, like[field]):
            raise UserError(
                f"their configuration has {field}={reprlib.repr(value)}, where a value like {json.dumps(like[field])} "
                "belongs: correct it, or download or write them again"
            )
    return {field: tuple(value) if isinstance(value, list) else value for field, value in told.items()}


def told_mmdit(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The fields of MMDiTConfig that are told, and `fused_qkv` and `use_liger_rope`. Raises UserError as above."""
    of_diffusers = "_class_name" in told_config(metadata, {"_class_name": MMDIT_CLASS})
    told = _of_diffusers(metadata) if of_diffusers else told_config(metadata, MMDIT)
    for field in ("hidden_size", "num_heads"):  # by which others are divided
        if told.get(field, 1) < 1:
            raise UserError(f"their configuration has {field}={told[field]}, which must be positive: correct it")
    return told


def _of_diffusers(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Diffusers' fields under our names."""
    theirs = told_config(metadata, DIFFUSERS_MMDIT, MMDIT_CLASS)
    ours = {name: theirs[field] for field, name in OURS.items() if field in theirs}
    if "attention_head_dim" in theirs and "num_attention_heads" in theirs:
        ours["hidden_size"] = theirs["attention_head_dim"] * theirs["num_attention_heads"]
    if "in_channels" in theirs:  # of a token, and of its condition behind them
        channels = int(theirs.get("out_channels") or theirs["in_channels"])
        ours |= {"in_channels": channels, "cond_embed": theirs["in_channels"] != channels}
        if ours["cond_embed"]:
            ours["patch_size"] = math.isqrt(max(theirs["in_channels"] - 2 * channels, 0))
            if ours["patch_size"] == 0 or 2 * channels + ours["patch_size"] ** 2 != theirs["in_channels"]:
                raise UserError(
                    f"their configuration has in_channels={theirs['in_channels']} of out_channels={channels}, where "
                    "the same or twice as many and a mask's square belong: name weights of a video model or of FLUX.1"
                )
    return ours


def _alike(value: Any, like: Any) -> bool:
    if isinstance(like, tuple):
        return isinstance(value, list) and all(_alike(item, like[0]) for item in value)
    if like is None and value is None:
        return True
    if isinstance(like, bool | str):
        return type(value) is type(like)
    types = (int,) if isinstance(like, int) else (int, float)
    return type(value) in types and abs(value) <= MOST  # neither an infinity nor NaN
