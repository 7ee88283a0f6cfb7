"""Who can do a call besides us: the eager composite, torch.compile of it, the libraries that are installed, and those
of our own backends that an op passed over.

A library is imported when it is asked for. Whether it computes what the composite does is checked before it is timed,
as our own op is, so that a library that changed its mind is named and not timed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch

from opensora_fast.errors import UserError
from opensora_fast.kernels import backend
from opensora_fast.profiling.case import Case, Outputs

# provider -> the module that it needs, and the command that adds it
LIBRARIES = {
    "liger": ("liger_kernel", "pip install liger-kernel"),
    "quack": ("quack", "pip install quack-kernels"),
    "cudnn": ("torch", ""),
    "fused": ("torch", ""),  # torch's own fused optimiser
}
CANDIDATES = ("flash", "triton", "gluon")  # backends of an op of ours, by their names there
PROVIDERS = ("ours", "eager", "compile", *LIBRARIES, *CANDIDATES)
FOR_GPUS = ("compile", *CANDIDATES)  # timed on a CPU only where they are asked for


def missing(provider: str, device_type: str) -> str:
    """Why a provider cannot run here, "" when it can."""
    if provider in ("ours", "eager", *CANDIDATES):  # what a candidate lacks depends on the call
        return ""
    if provider == "compile":
        if device_type == "cuda" and importlib.util.find_spec("triton") is None:
            return "torch.compile needs Triton on a GPU: pip install 'triton>=3.6'"
        return ""
    module, command = LIBRARIES[provider]
    if importlib.util.find_spec(module) is None:
        return f"{module} is not installed: {command}"
    if provider == "fused":
        return ""
    if device_type != "cuda":
        return "runs on CUDA tensors only"
    if provider == "cudnn" and not torch.backends.cudnn.is_available():
        return "this torch has no cuDNN"
    return ""


def choose(asked: str | None, device_type: str) -> tuple[list[str], dict[str, str]]:
    """The providers to time and, of those that were to be timed and cannot run, why.

    asked: names with commas between them; None takes all that are installed, on a CPU without torch.compile, which is
    slow to compile there, and without the candidates, which are for GPUs. UserError for a name that is no provider.
    """
    if asked is None:
        names: Sequence[str] = [name for name in PROVIDERS if device_type == "cuda" or name not in FOR_GPUS]
    else:
        names = list(dict.fromkeys(filter(None, (name.strip() for name in asked.split(",")))))
    for name in names:
        if name not in PROVIDERS:
            raise UserError(f"--providers {name!r} is not known: choose from {', '.join(PROVIDERS)}")
    reasons = {name: missing(name, device_type) for name in names}
    return [name for name in names if not reasons[name]], {name: why for name, why in reasons.items() if why}


def within(provider: str, case: Case) -> AbstractContextManager[None]:
    """What every call of a case by a provider is made in, forward and backward."""
    return backend.forced({case.op: provider} if provider in case.candidates else {})


def function(provider: str, case: Case, device_type: str) -> Callable[..., Outputs] | None:
    """The call of a case by a provider; None when it has no such call, or is the candidate that the op chooses anyway.

    Raises BackendError for a candidate that cannot run the case here.
    """
    if provider in CANDIDATES:
        if provider not in case.candidates or case.backend(device_type)[0] == provider:
            return None
        with within(provider, case):
            case.backend(device_type)
        return case.function
    if provider == "ours":
        return case.function
    if provider == "eager":
        return case.composite
    if provider == "compile":
        return None if case.mutates else _compiled(case.composite)
    make = case.baselines.get(provider)
    return None if make is None else make()


def _compiled(composite: Callable[..., Outputs]) -> Callable[..., Outputs]:
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False  # the backward is timed many times on one forward
    torch._dynamo.reset()
    return torch.compile(composite, dynamic=False)
