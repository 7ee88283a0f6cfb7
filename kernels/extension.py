"""Loads the native module `opensora_fast._C` once and remembers why, when it or a part of it cannot be used."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

BUILD_COMMAND = "pip install --no-deps -e . -v"


@dataclass(frozen=True, kw_only=True)
class Extension:
    """`module` is `_C` or None; `missing` says why its "host" and its "cuda" functions cannot run, "" when they can."""

    module: ModuleType | None
    missing: Mapping[str, str]


@functools.cache
def load() -> Extension:
    """Import `_C`, at most once in a process. Never raises: a machine without the build still has every reference."""
    try:
        module = import_module("opensora_fast._C")
    except ImportError as error:
        reason = f"opensora_fast._C cannot be imported ({error}); build it with `{BUILD_COMMAND}`"
        return Extension(module=None, missing={"host": reason, "cuda": reason})
    cuda = module.build_info()["cuda_missing"]
    if cuda:
        cuda = f"opensora_fast._C has no CUDA part: {cuda}; with nvcc on PATH, `{BUILD_COMMAND}` adds it"
    return Extension(module=module, missing={"host": "", "cuda": cuda})
