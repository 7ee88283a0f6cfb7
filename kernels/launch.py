"""Triton, where it is installed: the import, the decorator, the one way to launch, and a record of launches.

Every op file imports with and without Triton; what needs it is only reached when `missing()` is empty.

    @jit
    def _kernel(x_ptr, y_ptr, size, BLOCK: tl.constexpr, COMPUTE: tl.constexpr): ...

    launch(_kernel, (grid,), x_ptr=x, y_ptr=y, size=x.numel(), BLOCK=1024, COMPUTE=compute_type(x.dtype), num_warps=4)

Op files start with `from __future__ import annotations`: `tl.constexpr` is then not looked up where Triton is missing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as error:
    triton = tl = None
    _MISSING = f"Triton cannot be imported ({error}); `pip install 'triton>=3.6'` adds it"
else:
    _MISSING = ""

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as Triton itself decides, when a kernel is decorated
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

if INTERPRETED and triton is not None:
    from opensora_fast.kernels import interpreter

    interpreter.convert_bfloat16_as_hardware_does()


def power_of_two(size: int) -> int:
    """The least power of two that is not below `size`, at least 1: what a block of a kernel may be long."""
    return 1 << max(0, size - 1).bit_length()


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One recorded launch: `arguments` are the kernel's own by name, tensors on any device, meta included."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int


_record: ContextVar[list[Launch] | None] = ContextVar("_record", default=None)


def jit(function: Callable) -> Any:
    """`triton.jit`; where Triton is missing, the function itself, which nothing then calls."""
    return function if triton is None else triton.jit(function)


def missing(device_type: str) -> str:
    """Why Triton kernels cannot run (within `recorded()`: be listed) on tensors of this device, "" when they can."""
    if _MISSING or device_type == "cuda" or _record.get() is not None:
        return _MISSING
    if device_type != "cpu":
        return f"Triton has no {device_type} device here"
    return "" if INTERPRETED else "Triton runs on CPU tensors only in its interpreter: set TRITON_INTERPRET=1"


def compute_type(dtype: torch.dtype) -> Any:
    """What a kernel computes in: float64 for float64, so that gradients can be checked, else float32."""
    return tl.float64 if dtype == torch.float64 else tl.float32


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Within, launches are listed instead of run: what ahead-of-time compilation learns the kernels' arguments from."""
    launches: list[Launch] = []
    token = _record.set(launches)
    try:
        yield launches
    finally:
        _record.reset(token)


def launch(kernel: Any, grid: tuple[int, ...], *, num_warps: int = 4, num_stages: int = 3, **arguments: Any) -> None:
    """Run `kernel` over `grid` on the device of its tensors; an empty grid is no work."""
    if (record := _record.get()) is not None:
        record.append(Launch(kernel=kernel, grid=grid, arguments=arguments, num_warps=num_warps, num_stages=num_stages))
        return
    if 0 in grid:
        return
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](**arguments, num_warps=num_warps, num_stages=num_stages)
