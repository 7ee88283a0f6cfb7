"""What the trainer and the sampler ask of a video autoencoder, whichever one it is.

Shapes  B batch, C channels, T frames, H and W pixels; t, h, w the latent counts of the last three.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from opensora_fast.errors import UserError


class LatentLayout(Protocol):
    """How latents relate to videos."""

    @property
    def latent_channels(self) -> int:
        """C of a latent."""

    @property
    def compression(self) -> tuple[int, int, int]:
        """Frames, rows and columns of pixels to one latent."""

    @property
    def causal(self) -> bool:
        """True: the first latent is a lone frame (4k + 1 frames). False: every latent holds `compression[0]` frames."""


class Autoencoder(LatentLayout, Protocol):
    """A video autoencoder. Videos are in [-1, 1]; latents have about unit standard deviation."""

    def encode(self, video_BCTHW: Tensor) -> Tensor:
        """The latent of a video; [B, C, t, h, w]."""

    def decode(self, latent_BCTHW: Tensor) -> Tensor:
        """The video of a latent; [B, 3, T, H, W]."""

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(t, h, w) of a video of this size; `UserError` naming the nearest sizes where none fits."""

    def frames_of(self, latent_frames: int) -> int:
        """T of the video that `decode` gives for t latent frames."""


@dataclass(frozen=True, kw_only=True)
class StoredLayout:
    """The layout of latents whose autoencoder is not at hand; see `LatentLayout`."""

    latent_channels: int
    compression: tuple[int, int, int]
    causal: bool


def require_multiple(name: str, value: int, compression: int, also: str = "") -> None:
    """Raises UserError naming the nearest sizes unless the compression divides a size; `also` names another one."""
    below = value // compression * compression
    if value <= 0 or value != below:
        nearest = f"{below} or {below + compression}" if below > 0 else f"{also}{compression}"
        raise UserError(
            f"{name}={value} does not fit the autoencoder: use {nearest} ({also}a multiple of {compression})"
        )
