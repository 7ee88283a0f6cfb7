"""A transformer larger than the GPU: its blocks' weights come from pinned host memory while the block before computes.

    part         weights of 11.9B       where they can be
    blocks       8.7B                   on the device; streamed: two slots of the largest block; in 8 bits, either way
    modulation   3.2B (27 %)            on the device; streamed when `MMDiT.modulation` runs: once for all steps of a
                                        video, whose blocks then take precomputed vectors
    the rest     0.1B                   on the device

Streamed weights lie in pinned memory, those of a block side by side, so that one copy brings them (`weight_ring`). A
streamed model gives bit for bit what it gives otherwise; in 8 bits (`fp8_weights`) it does not, and `fp8_error` says by
how much. On the CPU the same happens with plain copies.

`host_model` makes a model whose weights lie where they will be streamed from, for a loader to fill in place, so that
they are never in host memory twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from opensora_fast.config import MMDiTConfig
from opensora_fast.copy_stream import copy_stream
from opensora_fast.errors import UserError
from opensora_fast.fp8_weights import ErrorSum, Fp8Error, Fp8Form
from opensora_fast.host_memory import HostMemory, available_bytes
from opensora_fast.mmdit import MMDiT
from opensora_fast.packed_weights import PackedWeights, Place, weight_places
from opensora_fast.weight_ring import Unit, WeightRing

Home = Literal["resident", "streamed"]
_SETTING = "--memory-budget"  # what makes weights be streamed
_GIB = 2**30


def host_model(
    config: MMDiTConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    fp8: bool = False,
    blocks: Home = "streamed",
    modulation: Home = "streamed",
) -> MMDiT:
    """A model without values, whose parameters lie where `stream_blocks` with the same arguments wants them.

    Streamed ones are in memory pinned for `device`, resident ones on it; blocks for 8 bits in ordinary host memory,
    which goes block by block as they are converted. Frozen, for evaluation.
    Raises UserError when the host has too little memory.
    """
    with torch.device("meta"):
        model = MMDiT(config).to(dtype).eval().requires_grad_(False)
    parts = _Parts(model)
    streamed = ([] if blocks == "resident" or fp8 else parts.blocks) + (
        [] if modulation == "resident" else parts.modulations
    )
    _check_host(sum(part.weights.bytes for part in streamed))
    for part in streamed:
        memory = _pinned(part.weights.bytes, device)
        part.weights.hang(part.weights.views(memory))
    for place in weight_places(model):
        if place.tensor.is_meta:
            home = torch.device("cpu") if fp8 and parts.in_block(place) else device
            place.hang(_parameter(torch.empty_like(place.tensor, device=home)))
    return model


def stream_blocks(
    model: MMDiT,
    device: torch.device,
    *,
    fp8: bool = False,
    blocks: Home = "streamed",
    modulation: Home = "streamed",
) -> StreamedBlocks:
    """Let `model` run on `device` with little of it there: part by part as the arguments say.

    `model` has its weights, anywhere: from `host_model` they are taken as they lie, otherwise moved, block by block.
    fp8: the matrices of the blocks (not of the modulation) are kept in 8 bits, wherever they are.
    The model must then be run without gradients. Raises UserError when the host has too little memory.
    """
    parts = _Parts(model)
    errors = ErrorSum()
    rings = []
    block_units = []
    for part in parts.blocks:
        if fp8:
            block_units.append(_in_8_bits(part, device, errors, streamed=blocks == "streamed"))
        elif blocks == "streamed":
            block_units.append(_streamed(part, device))
    if block_units:
        rings.append(WeightRing(block_units, device, copy_stream(device), wrap=True, copied=blocks == "streamed"))
    if modulation == "streamed" and parts.modulations:
        units = [_streamed(part, device) for part in parts.modulations]
        rings.append(WeightRing(units, device, copy_stream(device)))
    streamed = {place.module for part in parts.blocks for place in part.places} if block_units else set()
    if modulation == "streamed":
        streamed |= {part.module for part in parts.modulations}
    for place in weight_places(model):
        if place.module not in streamed:
            place.hang(_parameter(place.tensor.to(device)))
    return StreamedBlocks(rings, errors.total() if fp8 else None)


class StreamedBlocks:
    """A model's weights that come and go. `fp8_error` is None where every weight is exact."""

    def __init__(self, rings: Sequence[WeightRing], fp8_error: Fp8Error | None) -> None:
        self._rings = rings
        self.fp8_error = fp8_error

    def close(self) -> None:
        """Stop, and give up the device memory. May be called again.

        What was streamed stays in host memory and what was resident on the device: the model runs again only after
        another `stream_blocks`. Weights kept in 8 bits are gone: such a model has to be loaded anew.
        """
        for ring in self._rings:
            ring.close()


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of a model's weights under `stream_blocks`."""

    resident: int  # on the device at all times; the slots are from the first call on
    modulating: int  # on the device beside them while `MMDiT.modulation` runs
    host: int  # pinned


def weight_bytes(
    model: MMDiT, *, fp8: bool = False, blocks: Home = "streamed", modulation: Home = "streamed"
) -> WeightBytes:
    """What `stream_blocks` will take. `model` may be on the meta device, in the dtype that it will have."""
    parts = _Parts(model)
    plain = [part.weights.bytes for part in parts.blocks]
    stored = [part.form().bytes for part in parts.blocks] if fp8 else plain
    modulations = [part.weights.bytes for part in parts.modulations]
    resident = host = modulating = 0
    if blocks == "resident":
        resident += sum(stored) if fp8 else parts.bytes(parts.blocks)
    else:
        resident += 2 * max(stored, default=0)
        host += sum(stored)
    if fp8:
        resident += max(plain, default=0)
    if modulation == "resident":
        resident += parts.bytes(parts.modulations)
    else:
        modulating += 2 * max(modulations, default=0)
        host += sum(modulations)
    resident += sum(place.tensor.nbytes for place in weight_places(model)) - parts.bytes(
        parts.blocks + parts.modulations
    )
    return WeightBytes(resident, modulating, host)


class _Part:
    """What is brought to the device together: a block without its modulation, or one modulation matrix and its bias."""

    def __init__(self, module: nn.Module, places: Sequence[Place], names: Mapping[int, str]) -> None:
        self.module = module
        self.places = list(places)
        self.names = [names[id(place.tensor)] for place in places]
        self.weights = PackedWeights(places)

    def form(self) -> Fp8Form:
        """In 8 bits: every matrix of a linear layer."""
        return Fp8Form(
            self.weights.tensors, [isinstance(p.module, nn.Linear) and p.name == "weight" for p in self.places]
        )


class _Parts:
    """An MMDiT's blocks and modulations, each in the order in which they run."""

    def __init__(self, model: MMDiT) -> None:
        self.blocks: list[_Part] = []
        self.modulations: list[_Part] = []
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for block in (*model.double_blocks, *model.single_blocks):
            modulations = [module for name, module in block.named_modules() if name.rpartition(".")[2] == "modulation"]
            self.modulations += [_Part(module, list(weight_places(module)), names) for module in modulations]
            places = [place for place in weight_places(block) if place.module not in modulations]
            self.blocks.append(_Part(block, places, names))

    def in_block(self, place: Place) -> bool:
        return any(place in part.places for part in self.blocks)

    @staticmethod
    def bytes(parts: Sequence[_Part]) -> int:
        """Of the weights alone, without the gaps of a packed layout."""
        return sum(tensor.nbytes for part in parts for tensor in part.weights.tensors)


def _streamed(part: _Part, device: torch.device) -> Unit:
    """The part in pinned memory, where `host_model` may have put it already."""
    stored = part.weights.memory()
    if stored is None or stored.device.type != "cpu" or (device.type == "cuda" and not stored.is_pinned()):
        stored = _pinned(part.weights.bytes, device)
        part.weights.pack(stored)
    return Unit(part.module, part.weights, stored)


def _in_8_bits(part: _Part, device: torch.device, errors: ErrorSum, *, streamed: bool) -> Unit:
    """The part converted on the device, weight by weight; its exact weights are let go."""
    form = part.form()
    stored = torch.empty(form.bytes, dtype=torch.uint8, device=device)
    for i, weight in enumerate(list(part.weights.tensors)):
        name = part.names[i]
        errors.add(name, *form.store(i, weight.to(device), stored, name=name))
        part.weights.replace(i, _parameter(torch.empty_like(weight, device="meta")))
        del weight
    if streamed:
        pinned = _pinned(form.bytes, device)
        pinned.copy_(stored)
        stored = pinned
    return Unit(part.module, part.weights, stored, form)


def _pinned(bytes: int, device: torch.device) -> Tensor:
    return HostMemory(bytes, device=device, setting=_SETTING).tensor


def _check_host(bytes: int) -> None:
    available = available_bytes()
    if available is not None and bytes > available:
        raise UserError(
            f"{_SETTING}: {bytes / _GIB:.1f} GiB of weights would be streamed from host memory, of which "
            f"{available / _GIB:.1f} GiB are free: raise the budget, or free memory"
        )


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
