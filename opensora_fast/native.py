"""The native module, for the code above the kernels that cannot do without it: files, checksums, memory, collation."""

from __future__ import annotations

from types import ModuleType

from opensora_fast.errors import UserError
from opensora_fast.kernels import extension


def native() -> ModuleType:
    """`opensora_fast._C`. Raises UserError, with the command that builds it, when it was not built."""
    loaded = extension.load()
    if loaded.module is None:
        raise UserError(loaded.missing["host"])
    return loaded.module
