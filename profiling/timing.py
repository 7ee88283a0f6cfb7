"""Times several functions against each other in one process: interleaved rounds and percentiles.

Interleaving spreads clock changes and noisy neighbours over all of them, so their ratios hold where their times do not.
On a GPU each call starts with a cold L2 cache, behind a spin that lasts until its launches are queued: what is timed is
the GPU's work and not the host's.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

L2_FLUSH_BYTES = 256 << 20  # several times the largest L2 cache (H200: 50 MB)
MIN_ROUNDS, MAX_ROUNDS = 5, 200
SPIN_CYCLES_PER_SECOND = 2e9  # at least the clock of any GPU of today: a spin is at least as long as asked for
MAX_SPIN = 0.02  # seconds


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Percentiles of one function's time, in seconds, over `rounds` rounds."""

    p20: float
    p50: float
    p80: float
    rounds: int

    @classmethod
    def of(cls, seconds: list[float]) -> "Timing":
        tenths = statistics.quantiles(seconds, n=10, method="inclusive")
        return cls(p20=tenths[1], p50=tenths[4], p80=tenths[7], rounds=len(seconds))


def _on_cpu(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    result = function()
    seconds = time.perf_counter() - begin
    del result  # freeing the output is not part of the work
    return seconds


def _on_cuda(function: Callable[[], object], flush: torch.Tensor, spin: float) -> float:
    """Seconds between two events; the GPU flushes its cache and spins while the host queues the work."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    flush.random_()  # not zeros: they are written faster
    torch.cuda._sleep(int(spin * SPIN_CYCLES_PER_SECOND))
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _host_seconds(function: Callable[[], object]) -> float:
    """How long the host takes to queue a call, twice over."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    function()
    seconds = time.perf_counter() - begin
    torch.cuda.synchronize()
    return min(2 * seconds, MAX_SPIN)


def interleaved(
    functions: Mapping[str, Callable[[], object]], device: torch.device, *, seconds: float = 3.0
) -> dict[str, Timing]:
    """Call each function once a round, in turn, for about `seconds` (5 to 200 rounds, after 2 that do not count).

    The functions must not share outputs, and their inputs should be random: zeros run faster than data.
    """
    cuda = device.type == "cuda"
    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.uint8, device=device) if cuda else None
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for function in (*functions.values(), *functions.values()):
        function()
    spins = {name: _host_seconds(function) for name, function in functions.items()} if cuda else {}
    deadline = time.perf_counter() + seconds
    for round_number in range(MAX_ROUNDS):
        if round_number >= MIN_ROUNDS and time.perf_counter() > deadline:
            break
        for name, function in functions.items():
            taken[name].append(_on_cpu(function) if flush is None else _on_cuda(function, flush, spins[name]))
    return {name: Timing.of(times) for name, times in taken.items()}
