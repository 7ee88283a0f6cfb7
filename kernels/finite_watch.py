"""Which op gave something that is not finite: flags that stay on the device until the loss is read.

Some libraries have been seen to give NaN silently: cuDNN's attention, for some lengths and some sizes of the scores.
The loss or the gradients of that step are then not finite either, and the step is skipped. What names the op, and the
way around it, is here:

    observe("attention", "cudnn", "log-sum-exp", lse)     in the op: the largest magnitude so far, kept on the device
    names, magnitudes = take(device)                      with the loss, in the one tensor that is read
    complaint(names, values)                              "" when all of them are finite

Nothing here waits for a device. What is observed is small: statistics, and gradients that are sums over all tokens.
No pass over a large tensor is made for it, so two things are not seen: the backward of plain attention, which has no
such sums, and NaN in the gradient of v alone. Their NaN still reaches the gradients' norm, and the step is skipped
without a word about where it came from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

WATCHED = frozenset({"cudnn", "flash", "gluon"})  # backends: libraries', and what no GPU has shown to be correct yet


class Name(NamedTuple):
    """What was observed, e.g. the log-sum-exp of attention on cudnn."""

    op: str
    backend: str
    what: str


_magnitudes: dict[torch.device, dict[Name, Tensor]] = {}


def observe(op: str, backend: str, what: str, *tensors: Tensor) -> None:
    """Keep the largest magnitude of `tensors`, which must not be empty; NaN where there is one."""
    if backend not in WATCHED:
        return
    of_device, name = _magnitudes.setdefault(tensors[0].device, {}), Name(op, backend, what)
    for x in tensors:
        magnitude = torch.linalg.vector_norm(x.detach(), math.inf, dtype=torch.float32)
        of_device[name] = torch.maximum(of_device[name], magnitude) if name in of_device else magnitude


def take(device: torch.device) -> tuple[list[Name], Tensor]:
    """(names, their magnitudes [names]) of what was observed since the last call."""
    nothing = torch.empty(0, device=device)
    observed = _magnitudes.pop(nothing.device, {})
    return list(observed), torch.stack(list(observed.values())) if observed else nothing


def complaint(names: Sequence[Name], magnitudes: Sequence[float]) -> str:
    """What was not finite and what to do about it, as one line; "" when all of it was finite."""
    broken = [name for name, magnitude in zip(names, magnitudes, strict=True) if not math.isfinite(magnitude)]
    if not broken:
        return ""
    told = ", ".join(f"{name.what} of {name.op} on {name.backend}" for name in broken)
    remedy = ",".join(sorted({f"{name.op}:triton" for name in broken}))
    return f"not finite: {told}; force another backend: OPENSORA_FAST_BACKEND={remedy}"
