"""The global random generators of a rank as tensors, so that a checkpoint can hold them.

    rng.RANK.torch    rng.RANK.cuda (of the current device)    rng.RANK.numpy    rng.RANK.python

All uint8; none is pickled. They are taken last, after everything that might draw, and given back last. A checkpoint of
fewer ranks has nothing for the others, which keep what they were seeded with.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

PREFIX = "rng."
_WORDS = 624  # of the Mersenne twister, which both NumPy's and Python's global generator are
_TWISTER = struct.Struct(f"<{_WORDS}IIB7xd")  # words, position, whether a Gaussian number waits, that number


def capture(rank: int = 0) -> dict[str, Tensor]:
    """The state of this rank's generators, copied."""
    state = {"torch": torch.get_rng_state(), "numpy": _bytes(_numpy()), "python": _bytes(_python())}
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return {f"{PREFIX}{rank}.{name}": tensor for name, tensor in state.items()}


def restore(state: Mapping[str, Tensor], rank: int = 0) -> None:
    """Set the generators of this rank that `state` holds; others stay as they are."""
    for name, tensor in state.items():
        match name.removeprefix(f"{PREFIX}{rank}."):
            case "torch":
                torch.set_rng_state(tensor)
            case "cuda":
                torch.cuda.set_rng_state(tensor)
            case "numpy":
                *words, position, waits, gaussian = _TWISTER.unpack(tensor.numpy().tobytes())
                np.random.set_state(("MT19937", np.array(words, np.uint32), position, waits, gaussian))
            case "python":
                *words, position, waits, gaussian = _TWISTER.unpack(tensor.numpy().tobytes())
                random.setstate((3, (*words, position), gaussian if waits else None))


def _numpy() -> bytes:
    _, words, position, waits, gaussian = np.random.get_state(legacy=True)
    return _TWISTER.pack(*np.asarray(words).tolist(), position, waits, gaussian)


def _python() -> bytes:
    version, (*words, position), gaussian = random.getstate()
    assert version == 3
    return _TWISTER.pack(*words, position, gaussian is not None, gaussian or 0.0)


def _bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)
