"""The thin model layer: MMDiT, autoencoders, flow matching, sampling and the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opensora_fast.pipeline import VideoPipeline

__all__ = ["VideoPipeline"]


def __getattr__(name: str) -> object:
    """`VideoPipeline`, imported when it is first asked for: the command line's other answers do without torch."""
    if name == "VideoPipeline":
        from opensora_fast.pipeline import VideoPipeline

        return VideoPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
