"""The transformer's blocks through torch.compile: one compilation for each class of block and each shape.

All blocks of a class run one compiled function that takes the block as its argument, so that 57 blocks cost two
compilations and not 57. Shapes are static: a step's number of passes, the video's size and the text's length each make
a shape of their own. What is compiled is `forward` alone; hooks of a block run before it as ever, and its modulation
comes as an argument.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch._dynamo
from torch import nn

from opensora_fast.mmdit import DoubleBlock, MMDiT, SingleBlock

SHAPES = 64  # that one process may compile for; PyTorch's own limit of 8 is less than three passes in three ratios


def compile_blocks(model: MMDiT, *, backend: str | Callable[..., Any] = "inductor") -> None:
    """Let `model` run compiled blocks from now on; each shape is compiled when it is first met.

    `backend` is torch.compile's. The number of shapes that PyTorch compiles one function for is raised to `SHAPES`
    for the whole process; beyond it the call fails, as it does where a block cannot be compiled whole: nothing runs
    uncompiled in silence.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SHAPES)
    forwards: dict[type[nn.Module], Callable[..., Any]] = {
        kind: torch.compile(kind.forward, fullgraph=True, dynamic=False, backend=backend)
        for kind in (DoubleBlock, SingleBlock)
    }
    for block in (*model.double_blocks, *model.single_blocks):
        block.forward = MethodType(forwards[type(block)], block)
