"""What one block of the transformer keeps for its backward, moves through memory and launches: fused and eager.

    saved    bytes of the distinct storages that autograd holds after the forward, without parameters and the rotation
             tables, which all blocks share; in U, one bfloat16 tensor [B, T, D] of the block's tokens
    moved    bytes that the kernels of forward and backward read and write, each argument once
    kernels  how many there are: Triton launches, and PyTorch's operators that are no views or allocations
    seconds  the sum over them of max(bytes / copy rate, flops / rate of such products) of a `Hardware`: modelled, not
             measured, and without what a launch costs

All four are counted on fake tensors of full size, which hold no data, with the Triton kernels that a GPU would get.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from opensora_fast.config import MMDIT_PRESETS, MMDiTConfig
from opensora_fast.kernels import backend, launch
from opensora_fast.mmdit import DoubleBlock, Rope, SingleBlock
from opensora_fast.profiling import eager_block
from opensora_fast.profiling.console import print_table
from opensora_fast.profiling.hardware import H200, Hardware

KINDS = ("double", "single")
TRITON_OPS = ("modulated_norm", "gated_residual", "gated_linear", "qk_norm_rope", "gelu", "rms_norm_act")
REFERENCE_OPS = ("pixel_shuffle",)  # a CUDA kernel's launch cannot be listed: counted as PyTorch's operators


@dataclass(frozen=True, kw_only=True)
class BlockCall:
    """A block with its inputs: (video, text) tokens of a double block, all tokens of a single one."""

    kind: str
    block: DoubleBlock | SingleBlock
    inputs: Sequence[Tensor]
    rope: Rope
    vec_BD: Tensor

    def fused(self) -> Sequence[Tensor]:
        outputs = self.block(*self.inputs, self.rope, self.block.modulate(self.vec_BD))
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def eager(self) -> Sequence[Tensor]:
        if isinstance(self.block, DoubleBlock):
            img_BND, txt_BLD = self.inputs
            return eager_block.double_block(self.block, img_BND, txt_BLD, self.rope, self.block.modulate(self.vec_BD))
        (x_BSD,) = self.inputs
        return (eager_block.single_block(self.block, x_BSD, self.rope, self.block.modulate(self.vec_BD)),)

    @property
    def unit(self) -> int:
        """U in bytes, of all tokens of the block."""
        return sum(x.nbytes for x in self.inputs)


def block_call(kind: str, config: MMDiTConfig, *, batch: int, text: int, video: int, dtype: torch.dtype) -> BlockCall:
    """A block of `kind` with random weights and inputs for `batch` clips of that many tokens, on the default device."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # modules of fake tensors cannot be converted afterwards
    try:
        block = (DoubleBlock if kind == "double" else SingleBlock)(config)
    finally:
        torch.set_default_dtype(default)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    tokens = (video, text) if kind == "double" else (video + text,)
    inputs = [torch.randn(batch, T, config.hidden_size).to(dtype).requires_grad_() for T in tokens]
    angle = torch.randn(batch, video + text, config.head_dim // 2)
    vec_BD = torch.randn(batch, config.hidden_size).to(dtype)
    return BlockCall(kind=kind, block=block, inputs=inputs, rope=(angle.cos(), angle.sin()), vec_BD=vec_BD)


def saved_bytes(call: BlockCall, forward: Callable[[], Sequence[Tensor]]) -> int:
    """Bytes that autograd keeps between `forward` and its backward, each storage once, without what blocks share."""
    shared = {tensor.untyped_storage()._cdata for tensor in (*call.block.parameters(), *call.rope)}
    storages: dict[int, tuple[Tensor, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in shared:
            storages[storage._cdata] = (tensor, storage.nbytes())  # the tensor keeps the address from being reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = forward()
    del outputs
    return sum(nbytes for _, nbytes in storages.values())


@dataclass(kw_only=True)
class Traffic:
    """What the kernels of a forward and its backward read and write, how many they are, how long they should take."""

    bytes: int = 0
    kernels: int = 0
    seconds: float = 0.0


class _Counting(TorchDispatchMode):
    """Adds every kernel to `total`. Our ops are entered: their Triton launches are listed, not run."""

    def __init__(self, hardware: Hardware) -> None:
        super().__init__()
        self.hardware = hardware
        self.total = Traffic()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name
        if name.startswith("opensora_fast::"):
            names = dict.fromkeys(TRITON_OPS, "triton") | dict.fromkeys(REFERENCE_OPS, "reference")
            with self, backend.forced(names), launch.recorded() as launches:
                result = OPDEFS[name]._init_fn(*args, **kwargs)
            for one in launches:
                self._add(one.arguments, 0.0)
            return result
        if not name.startswith("aten::"):
            return func(*args, **kwargs)
        with self:  # what PyTorch itself writes in terms of other operators is counted as those
            if (result := func.decompose(*args, **kwargs)) is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if not _is_free(func):
            self._add((args, kwargs, result), self._product_seconds(func, args, kwargs, result))
        return result

    def _add(self, arguments: object, product_seconds: float) -> None:
        moved = sum(leaf.nbytes for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor))
        self.total.kernels += 1
        self.total.bytes += moved
        self.total.seconds += max(moved / self.hardware.copy_bytes, product_seconds)

    def _product_seconds(self, func, args, kwargs, result) -> float:
        if "scaled_dot_product" in func._schema.name:
            backward = func._schema.name.endswith("backward")
            B, H, S, K = args[backward].shape
            products, rate = (
                (5, self.hardware.attention_backward_flops) if backward else (2, self.hardware.attention_forward_flops)
            )
            return products * 2 * B * H * S * S * K / rate
        if func._schema.name == "aten::convolution":
            flops = flop_registry[torch.ops.aten.convolution](*args, **kwargs, out_val=result)
            pointwise = math.prod(args[1].shape[2:]) == 1  # a matrix product
            return flops / (self.hardware.matmul_flops if pointwise else self.hardware.convolution_flops)
        out_of_place = func._schema.name.removeprefix("aten::").removesuffix("_")
        if count := flop_registry.get(getattr(torch.ops.aten, out_of_place, None)):
            return count(*args, **kwargs, out_val=result) / self.hardware.matmul_flops
        return 0.0


def _is_free(func) -> bool:
    """Views, allocations and questions about a tensor, which touch no memory."""
    schema = func._schema
    view = any(returned.alias_info is not None and not returned.alias_info.is_write for returned in schema.returns)
    tensor = any("Tensor" in str(returned.type) for returned in schema.returns)
    return view or not tensor or schema.name.startswith(("aten::empty", "aten::new_empty"))


def traffic(forward: Callable[[], Sequence[Tensor]], hardware: Hardware = H200) -> Traffic:
    """Of `forward` and of the backward of its outputs, on fake tensors."""
    with _Counting(hardware) as counting:
        outputs = forward()
        torch.autograd.backward(outputs, [torch.empty_like(out) for out in outputs])
    return counting.total


@contextmanager
def forward_traffic(hardware: Hardware = H200) -> Iterator[Traffic]:
    """What runs within, on fake tensors, is added to the traffic that this gives."""
    with _Counting(hardware) as counting:
        yield counting.total


@dataclass(frozen=True, kw_only=True)
class Row:
    """One block in one form: "fused" is the model's own, "eager" that of `eager_block`."""

    kind: str
    form: str
    saved_units: float
    saved_bytes: int
    traffic: Traffic


def rows(config: MMDiTConfig, *, batch: int, text: int, video: int) -> Iterator[Row]:
    """Every kind of block in both forms."""
    with FakeTensorMode():
        for kind in KINDS:
            call = block_call(kind, config, batch=batch, text=text, video=video, dtype=torch.bfloat16)
            for form, forward in (("eager", call.eager), ("fused", call.fused)):
                saved = saved_bytes(call, forward)
                yield Row(
                    kind=kind,
                    form=form,
                    saved_units=saved / call.unit,
                    saved_bytes=saved,
                    traffic=traffic(forward),
                )


SHAPES = {  # name -> (batch, text tokens, video tokens)
    "3 clips of 129 frames at 256px": (3, 512, 8448),
    "45 images at 256px": (45, 512, 256),
}


def table(config: MMDiTConfig, shape: tuple[int, int, int]) -> list[list[str]]:
    """The rows of one shape as text: block, kept, moved, kernels, modelled time."""
    batch, text, video = shape
    return [
        [
            f"{row.kind}, {row.form}",
            f"{row.saved_units:.1f} U, {row.saved_bytes / 1e9:.2f} GB",
            f"{row.traffic.bytes / 1e9:.1f} GB",
            str(row.traffic.kernels),
            f"{row.traffic.seconds * 1e3:.1f} ms",
        ]
        for row in rows(config, batch=batch, text=text, video=video)
    ]


def main() -> int:
    """Print both shapes' tables for the 11.9B model; returns 0."""
    for name, shape in SHAPES.items():
        print_table(
            ("block", "kept for the backward", "moved", "kernels", f"modelled on an {H200.name}"),
            table(MMDIT_PRESETS["open-sora-v2"], shape),
            title=f"{name}; nothing was run",
            left=("block",),
        )
    return 0
