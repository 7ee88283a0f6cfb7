"""A transformer on several ranks: on one machine the first alone reads it, and what is streamed is on the host once.

    first rank    reads the weights and streams them as it would alone, from pinned memory that is shared
    the others    map that memory, pin it for their own GPU, and get from the first GPU what stays on a GPU

Across machines every rank reads for itself and has a copy of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from opensora_fast.block_streaming import (
    SETTING,
    Home,
    PinnedPieces,
    StreamedBlocks,
    check_host,
    stream_as_stored,
    stream_blocks,
    weight_bytes,
)
from opensora_fast.config import MMDiTConfig
from opensora_fast.errors import UserError
from opensora_fast.fp8_weights import Fp8Error
from opensora_fast.host_memory import HostMemory
from opensora_fast.mmdit import MMDiT
from opensora_fast.sampling_ranks import SamplingRanks, on_all

Piece = tuple[str, int] | None
"""Where another process finds shared memory, and its bytes; None: these weights are on the first rank's device."""


def load_streamed(
    load: Callable[[PinnedPieces], MMDiT],
    config: MMDiTConfig,
    dtype: torch.dtype,
    device: torch.device,
    ranks: SamplingRanks | None,
    *,
    fp8: bool = False,
    blocks: Home = "streamed",
    modulation: Home = "streamed",
) -> tuple[MMDiT, Fp8Error | None]:
    """The model that `load` reads, streamed (`stream_blocks`); every rank calls it.

    `load` gets where pinned weights go; for a model that is not there already they are moved. `config` and `dtype` are
    the model's. Raises UserError, on every rank, where `load` does on one and where a host has too little memory.
    """
    with torch.device("meta"):
        model = MMDiT(config).to(dtype).eval().requires_grad_(False)

    def alone(pieces: PinnedPieces) -> tuple[MMDiT, StreamedBlocks]:
        loaded = load(pieces)
        streamed = stream_blocks(loaded, device, fp8=fp8, blocks=blocks, modulation=modulation, pieces=pieces)
        return loaded, streamed

    if ranks is None:
        loaded, streamed = alone(PinnedPieces(device))
        return loaded, streamed.fp8_error
    neighbours = _ranks_here(ranks)
    if neighbours < ranks.size:
        told = weight_bytes(model, fp8=fp8, blocks=blocks, modulation=modulation)
        on_all(ranks, lambda: check_host(neighbours * told.host))
        loaded, streamed = on_all(ranks, lambda: alone(PinnedPieces(device)))
        return loaded, streamed.fp8_error

    pieces = PinnedPieces(device, shared=True)
    first = on_all(ranks, lambda: alone(pieces) if ranks.rank == 0 else None)
    found = ranks.share(
        None if first is None else ([_place(pieces, each) for each in first[1].stored], first[1].fp8_error)
    )
    places, fp8_error = found
    mapped = on_all(ranks, lambda: None if first else [place and _mapped(*place, device) for place in places])
    if first is not None:
        model, streamed = first
        on_device = [stored for stored, place in zip(streamed.stored, places, strict=True) if place is None]
        for tensor in (*on_device, *streamed.resident):
            ranks.broadcast(tensor.detach(), tensor.shape, tensor.dtype, 0)
        return model, fp8_error
    assert mapped is not None
    waiting = iter(mapped)

    def waiting_there(bytes: int) -> Tensor:
        piece = next(waiting)
        return ranks.broadcast(None, torch.Size([bytes]), torch.uint8, 0) if piece is None else piece

    stream_as_stored(
        model,
        device,
        waiting_there,
        lambda like: ranks.broadcast(None, like.shape, like.dtype, 0),
        fp8=fp8,
        blocks=blocks,
        modulation=modulation,
    )
    return model, fp8_error


def _ranks_here(ranks: SamplingRanks) -> int:
    """How many ranks can map this one's memory: those of this machine, or of this container."""
    here = Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")
    places: list[object] = [None] * ranks.size
    dist.all_gather_object(places, here)
    return places.count(here)


def _place(pieces: PinnedPieces, stored: Tensor) -> Piece:
    memory = pieces.of(stored)
    return None if memory is None else (f"/proc/{os.getpid()}/fd/{memory.descriptor}", memory.bytes)


def _mapped(path: str, bytes: int, device: torch.device) -> Tensor:
    """The first rank's memory, pinned for this device too."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise UserError(
            f"{SETTING}: a rank cannot map the first rank's memory ({error.strerror}): start all as one user"
        ) from error
    try:
        return HostMemory.attach(descriptor, bytes, device=device, setting=SETTING).tensor
    finally:
        os.close(descriptor)
