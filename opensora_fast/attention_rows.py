"""Rows of attention's matrices: which belong to rotated heads, their order inside a head, and one matrix as several.

Checkpoints that rotate the channel pairs (2i, 2i + 1) of a head, interleaved, and ours, which rotates (i, i + K/2),
half-split, have the same rows in another order.

Shapes  K channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opensora_fast.config import MMDiTConfig

StateDict = dict[str, Tensor]


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
