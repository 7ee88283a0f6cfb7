"""Which implementation of an op runs: what its `choose` says, unless OPENSORA_FAST_BACKEND says otherwise.

`OPENSORA_FAST_BACKEND=op:name[,op:name]`, where op is a file of this folder and covers all its functions; read once.
Within `forced(...)` it is what the caller says.
"""

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

VARIABLE = "OPENSORA_FAST_BACKEND"
NAMES = ("reference", "host", "cuda", "triton", "gluon", "cudnn", "flash", "cpu_flash")


class BackendError(ValueError):
    """A backend that was asked for by name is none, or cannot run the call; one line, for whoever asked."""


def parse_overrides(text: str) -> dict[str, str]:
    """Turn `op:name,op:name` into a dict; BackendError names the part that is no op of this package or no backend."""
    overrides = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        op, _, name = part.partition(":")
        if name not in NAMES:
            raise BackendError(f"{VARIABLE}: {part!r} is not op:name; the names are {', '.join(NAMES)}")
        if not _is_op(op):
            raise BackendError(f"{VARIABLE}: {op!r} in {part!r} is no op; an op is a file of opensora_fast/kernels")
        overrides[op] = name
    return overrides


def _is_op(name: str) -> bool:
    """Whether it is a file of this folder with backends to choose between."""
    module = f"opensora_fast.kernels.{name}"
    return (
        name.isidentifier()
        and importlib.util.find_spec(module) is not None
        and hasattr(importlib.import_module(module), "choose")
    )


@functools.cache
def overrides() -> dict[str, str]:
    """The overrides of this process's environment."""
    return parse_overrides(os.environ.get(VARIABLE, ""))


_forced: list[Mapping[str, str]] = []  # of the process: the backward of a GPU runs in a thread of autograd's own


@contextmanager
def forced(names: Mapping[str, str]) -> Iterator[None]:
    """Within, every op in `names` runs on the backend that it names there, or raises BackendError where it cannot."""
    _forced.append(names)
    try:
        yield
    finally:
        _forced.pop()


def select(op: str, choice: tuple[str, str], missing: Mapping[str, str]) -> tuple[str, str]:
    """Return (backend, reason): the override of `op` when there is one, else `choice`.

    missing: backend -> why it cannot run on this device and dtype, empty when it can. Raises BackendError when the
    override is not among the backends of this device or cannot run.
    """
    if name := next((names[op] for names in reversed(_forced) if op in names), None):
        setting = f"forced {op}:{name}"
    elif name := overrides().get(op):
        setting = f"{VARIABLE}={op}:{name}"
    else:
        return choice
    if name not in missing:
        others = ", ".join(missing)
        raise BackendError(f"{setting} does not exist for these tensors; choose one of {others} or unset it")
    if missing[name]:
        raise BackendError(f"{setting} cannot run: {missing[name]}; or unset it")
    return name, setting


def announced(op: str, selection: tuple[str, str], missing: Mapping[str, str]) -> str:
    """The backend of a selection; says so once when it is the reference because something faster cannot run."""
    name, reason = selection
    if name == "reference" and reason in missing.values():
        warn_once(f"{op} runs its slow reference: {reason}")
    return name


@functools.cache
def warn_once(message: str) -> None:
    """Say aloud, once in a process, that an op runs on something slower than it could."""
    warnings.warn(message, RuntimeWarning, stacklevel=2)
