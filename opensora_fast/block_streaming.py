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
they are never in host memory twice. Several ranks of a machine have them there once in all (`shared_streaming`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
SETTING = "--memory-budget"  # what makes weights be streamed
_GIB = 2**30


class PinnedPieces:
    """Where weights wait on the host: memory pinned for a device, a piece for each block or modulation matrix.

    shared: other processes can map the pieces, by the descriptors that `of` finds.
    """

    def __init__(self, device: torch.device, *, shared: bool = False) -> None:
        self._device = device
        self._shared = shared
        self._pieces: dict[int, HostMemory] = {}  # the shared ones by address

    def take(self, bytes: int) -> Tensor:
        """A piece: uint8 [bytes]. Raises UserError when the host has too little memory."""
        memory = HostMemory(bytes, device=self._device, shared=self._shared, setting=SETTING)
        if self._shared:
            self._pieces[memory.address] = memory
        return memory.tensor

    def of(self, piece: Tensor) -> HostMemory | None:
        """The shared memory of a piece that was taken; None for other tensors."""
        return self._pieces.get(piece.data_ptr())

    def take_in(self, weights: PackedWeights) -> Tensor:
        """The piece in which weights lie, or the one into which they are moved."""
        stored = weights.memory()
        if stored is not None and stored.device.type == "cpu":
            pinned = self._device.type != "cuda" or stored.is_pinned()
            if pinned and (not self._shared or self.of(stored) is not None):
                return stored
        stored = self.take(weights.bytes)
        weights.pack(stored)
        return stored


def host_model(
    config: MMDiTConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    fp8: bool = False,
    blocks: Home = "streamed",
    modulation: Home = "streamed",
    pieces: PinnedPieces | None = None,
) -> MMDiT:
    """A model without values, whose parameters lie where `stream_blocks` with the same arguments wants them.

    Streamed ones are in memory pinned for `device`, resident ones on it; blocks for 8 bits in ordinary host memory,
    which goes block by block as they are converted. Frozen, for evaluation.
    Raises UserError when the host has too little memory.
    """
    with torch.device("meta"):
        model = MMDiT(config).to(dtype).eval().requires_grad_(False)
    parts = _Parts(model)
    modulations = [] if modulation == "resident" else parts.modulations
    on_host = modulations + (parts.blocks if fp8 or blocks == "streamed" else [])
    check_host(sum(part.weights.bytes for part in on_host))
    pieces = pieces or PinnedPieces(device)
    for part in modulations if fp8 else on_host:
        part.weights.hang(part.weights.views(pieces.take(part.weights.bytes)))
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
    pieces: PinnedPieces | None = None,
) -> StreamedBlocks:
    """Let `model` run on `device` with little of it there: part by part as the arguments say.

    `model` has its weights, anywhere: from `host_model` they are taken as they lie, otherwise moved, block by block.
    fp8: the matrices of the blocks (not of the modulation) are kept in 8 bits, wherever they are.
    The model must then be run without gradients. Raises UserError when the host has too little memory.
    """
    errors = ErrorSum()
    pieces = pieces or PinnedPieces(device)

    def unit(part: _Part, in_8_bits: bool) -> Unit:
        if in_8_bits:
            return _in_8_bits(part, device, errors, pieces if blocks == "streamed" else None)
        return Unit(part.module, part.weights, pieces.take_in(part.weights))

    streamed = _stream(model, device, unit, lambda tensor: tensor.to(device), fp8, blocks, modulation)
    streamed.fp8_error = errors.total() if fp8 else None
    return streamed


def stream_as_stored(
    model: MMDiT,
    device: torch.device,
    stored: Callable[[int], Tensor],
    resident: Callable[[Tensor], Tensor],
    *,
    fp8: bool = False,
    blocks: Home = "streamed",
    modulation: Home = "streamed",
) -> StreamedBlocks:
    """`stream_blocks` for a model of the meta device whose weights are stored already, as those of another are.

    `stored(bytes)` gives what the other's `StreamedBlocks.stored` has, one after the other (uint8 [bytes]), and
    `resident(tensor)` in their order the tensors of its `StreamedBlocks.resident`, each like the one given.
    """

    def unit(part: _Part, in_8_bits: bool) -> Unit:
        if in_8_bits:
            form = part.form()
            return Unit(part.module, part.weights, stored(form.bytes), form)
        memory = stored(part.weights.bytes)
        for i, view in enumerate(part.weights.views(memory)):
            part.weights.replace(i, view)
        return Unit(part.module, part.weights, memory)

    return _stream(model, device, unit, resident, fp8, blocks, modulation)


def _stream(
    model: MMDiT,
    device: torch.device,
    unit: Callable[[_Part, bool], Unit],
    resident: Callable[[Tensor], Tensor],
    fp8: bool,
    blocks: Home,
    modulation: Home,
) -> StreamedBlocks:
    """Hang rings around the parts, with what `unit` makes of each, and `resident` of all other weights."""
    parts = _Parts(model)
    rings, units = [], []
    if fp8 or blocks == "streamed":
        units = [unit(part, fp8) for part in parts.blocks]
        if units:
            rings.append(WeightRing(units, device, copy_stream(device), wrap=True, copied=blocks == "streamed"))
    if modulation == "streamed" and parts.modulations:
        modulations = [unit(part, False) for part in parts.modulations]
        rings.append(WeightRing(modulations, device, copy_stream(device)))
        units = units + modulations
    streamed = (
        {place.module for part in parts.blocks for place in part.places} if fp8 or blocks == "streamed" else set()
    )
    if modulation == "streamed":
        streamed |= {part.module for part in parts.modulations}
    others = [place for place in weight_places(model) if place.module not in streamed]
    for place in others:
        place.hang(_parameter(resident(place.tensor)))
    return StreamedBlocks(rings, [unit.stored for unit in units], [place.tensor for place in others])


class StreamedBlocks:
    """A model's weights that come and go, as they are `stored`, and those that are `resident` on the device.

    `fp8_error` is None where every weight is exact.
    """

    def __init__(self, rings: Sequence[WeightRing], stored: list[Tensor], resident: list[Tensor]) -> None:
        self._rings = rings
        self.stored = stored
        self.resident = resident
        self.fp8_error: Fp8Error | None = None

    def close(self) -> None:
        """Stop, and give up the device memory. May be called again.

        What was streamed stays in host memory and what was resident on the device: the model runs again only after
        another `stream_blocks`. Weights kept in 8 bits are gone: such a model has to be loaded anew.
        """
        for ring in self._rings:
            ring.close()
        self.stored, self.resident = [], []


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


def _in_8_bits(part: _Part, device: torch.device, errors: ErrorSum, pieces: PinnedPieces | None) -> Unit:
    """The part converted on the device, weight by weight, and kept there or in a piece; exact weights are let go."""
    form = part.form()
    stored = torch.empty(form.bytes, dtype=torch.uint8, device=device)
    for i, weight in enumerate(list(part.weights.tensors)):
        name = part.names[i]
        errors.add(name, *form.store(i, weight.to(device), stored, name=name))
        part.weights.replace(i, _parameter(torch.empty_like(weight, device="meta")))
        del weight
    if pieces is not None:
        pinned = pieces.take(form.bytes)
        pinned.copy_(stored)
        stored = pinned
    return Unit(part.module, part.weights, stored, form)


def check_host(bytes: int) -> None:
    """Raise UserError where the host has not so many bytes for weights."""
    available = available_bytes()
    if available is not None and bytes > available:
        raise UserError(
            f"{SETTING}: {bytes / _GIB:.1f} GiB of weights would be streamed from host memory, of which "
            f"{available / _GIB:.1f} GiB are free: raise the budget, or free memory"
        )


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
