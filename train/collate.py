"""Decoded clips become a batch, in C++ threads beside the interpreter: cropped, cast, brought to [-1, 1], laid out.

    uint8 [T, height, width, 3], per clip   ->   [B, 3, T, H, W]

The values are bitwise those of `pixels.float() / 127.5 - 1` in float32, rounded to nearest even for 16 bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from opensora_fast.native import native


class ClipPixels(NamedTuple):
    """uint8 [frames, height, width, 3] at `address`, of which the window that begins at (top, left) is taken.

    It belongs to the caller, who keeps it unchanged until the ticket is done.
    """

    address: int
    height: int
    width: int
    frames: int
    top: int
    left: int


class Ticket:
    """A batch that is being made. It keeps the batch's tensor; when it is dropped early, that waits for the work."""

    def __init__(self, work: Any, out: Tensor):
        self._work, self._out = work, out

    def wait(self, timeout: float | None) -> bool:
        """Whether the batch is complete within `timeout` seconds (None: waits for as long as it takes).

        Other threads run meanwhile, and Ctrl-C ends the wait. Raises RuntimeError in a forked child: no threads there.
        """
        return self._work.wait(timeout)

    def __del__(self) -> None:
        with contextlib.suppress(RuntimeError):  # of a forked child, which has nothing to wait for
            self._work.wait(None)  # before the tensor is let go


class Collator:
    """`threads` C++ threads that work on batches in the order of their submission, all on the same one."""

    def __init__(self, threads: int = 1):
        if threads < 1:
            raise ValueError(f"threads={threads}: use 1 or more")
        self._collator = native().Collator(threads=threads)

    def submit(self, clips: Sequence[ClipPixels], out: Tensor) -> Ticket:
        """Begin to fill `out`, a contiguous CPU tensor [B, 3, T, H, W] of float32, bfloat16 or float16, from B clips.

        Raises ValueError when a clip does not cover H x W from its (top, left) on or does not have T frames, or when
        `out` is of another kind; RuntimeError after `close()`.
        """
        if out.ndim != 5 or out.shape[:2] != (len(clips), 3) or not out.is_contiguous() or out.device.type != "cpu":
            is_now = f"{tuple(out.shape)} on {out.device}"
            raise ValueError(f"out must be a contiguous CPU tensor [{len(clips)}, 3, T, H, W]; it is {is_now}")
        dtype = str(out.dtype).removeprefix("torch.")
        return Ticket(self._collator.submit(clips, out=out.data_ptr(), thw=list(out.shape[2:]), dtype=dtype), out)

    def close(self) -> None:
        """Complete what was submitted and end the threads. May be called again."""
        self._collator.close()
