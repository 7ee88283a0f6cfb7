"""A second opinion on the ceilings: CuPy's own allocator, copy and kernels, beside PyTorch's, on the same GPU.

Copy: a device-to-device copy and a kernel that moves 16 bytes a thread, bytes read and written counted. Launch: what
the host takes to queue an empty kernel, over a row of them. Where the copies disagree by more than 3 %, this says so:
one of the two then measures something else than it seems to.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from opensora_fast.errors import UserError
from opensora_fast.profiling import ledger
from opensora_fast.profiling.ledger import Row
from opensora_fast.profiling.machine import Machine, gpu_state, this_machine
from opensora_fast.profiling.timing import Timing, interleaved

COPY_BYTES = 4 << 30  # per buffer
DISAGREEMENT = 0.03
LAUNCHES = 1000
THREADS = 256
COPY_SOURCE = r"""
extern "C" __global__ void copy16(const uint4* __restrict__ source, uint4* __restrict__ target, long long size) {
    long long stride = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < size; i += stride) target[i] = source[i];
}
extern "C" __global__ void nothing() {}
"""


def missing() -> str:
    """Why this cannot run here, "" when it can."""
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed: pip install -e '.[cupy]'"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return ""


def disagreement(seconds: dict[str, float]) -> str:
    """A line about the fastest and the slowest copy where they differ by more than 3 %, else ""."""
    fast, slow = min(seconds, key=lambda name: seconds[name]), max(seconds, key=lambda name: seconds[name])
    part = seconds[slow] / seconds[fast] - 1
    return f"copies disagree: {slow} takes {part:.1%} longer than {fast}" if part > DISAGREEMENT else ""


def copies(num_bytes: int) -> dict[str, Callable[[], Any]]:
    """The same copy by PyTorch, by CuPy and by a kernel of CuPy's, each between two buffers of its own allocator."""
    import cupy

    source = torch.randint(-128, 128, (num_bytes,), dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    random = cupy.random.default_rng(0)
    cupy_source = random.integers(0, 2**32, size=num_bytes // 4, dtype=cupy.uint32)
    cupy_target = cupy.empty_like(cupy_source)
    kernel = cupy.RawModule(code=COPY_SOURCE).get_function("copy16")
    blocks = 8 * cupy.cuda.runtime.getDeviceProperties(0)["multiProcessorCount"]

    def by_cupy() -> None:
        with _torch_stream():
            cupy.copyto(cupy_target, cupy_source)

    def by_kernel() -> None:
        with _torch_stream():
            kernel((blocks,), (THREADS,), (cupy_source, cupy_target, num_bytes // 16))

    return {"torch": lambda: target.copy_(source), "cupy": by_cupy, "cupy kernel": by_kernel}


def _torch_stream() -> Any:
    """CuPy on the stream whose events are read."""
    import cupy

    return cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)


def launch_timings(repeats: int = 10) -> dict[str, Timing]:
    """Seconds of host time per launch of an empty kernel, by CuPy and by PyTorch (which allocates and dispatches)."""
    import cupy

    nothing = cupy.RawModule(code=COPY_SOURCE).get_function("nothing")
    small = torch.randn(1, device="cuda")
    calls: dict[str, Callable[[], Any]] = {
        "cupy kernel": lambda: nothing((1,), (1,), ()),
        "torch": lambda: small.add_(1.0),
    }
    timings = {}
    for name, call in calls.items():
        taken = []
        for _ in range(repeats + 1):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(LAUNCHES):
                call()
            taken.append((time.perf_counter() - begin) / LAUNCHES)
        torch.cuda.synchronize()
        timings[name] = Timing.of(taken[1:])
    return timings


def main(out: Path | None) -> int:
    """Measure, print, append rows; returns the exit code. UserError where there is no CuPy or no GPU."""
    if reason := missing():
        raise UserError(f"--yardstick cannot run here: {reason}")
    device, machine = torch.device("cuda"), this_machine()
    timings = interleaved(copies(COPY_BYTES), device, seconds=1.0)
    launches = launch_timings()
    for name, timing in timings.items():
        print(f"copy of {COPY_BYTES >> 30} GiB by {name}: {2 * COPY_BYTES / timing.p50 / 1e12:.2f} TB/s")
    for name, timing in launches.items():
        print(f"launch by {name}: {1e6 * timing.p50:.1f} us of host time")
    print(disagreement({name: timing.p50 for name, timing in timings.items()}) or "the copies agree within 3 %")
    if out is not None:
        rows = [_row("copy", f"{COPY_BYTES >> 30} GiB", of, timings[of], 2 * COPY_BYTES, machine) for of in timings]
        rows += [_row("launch", "an empty kernel, host time", of, launches[of], 0, machine) for of in launches]
        ledger.append(out, rows)
    return 0


def _row(op: str, case: str, provider: str, timing: Timing, num_bytes: int, machine: Machine) -> Row:
    return {
        "schema": ledger.SCHEMA,
        "op": op,
        "case": case,
        "provider": provider,
        "mode": "full",
        "shapes": {},
        "dtype": "int8",
        "status": "timed",
        **dataclasses.asdict(timing),
        "unit": "s",
        "bytes": num_bytes,
        "flops": 0,
        "bytes_per_second": num_bytes / timing.p50,
        "flops_per_second": 0.0,
        "device": machine.device("cuda"),
        "torch": machine.torch,
        "triton": machine.triton,
        "driver": machine.driver,
        "commit": machine.commit,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **gpu_state(),
    }
