"""HunyuanVideo's causal video autoencoder, which Open-Sora 2.0 was trained with: 4 x 8 x 8, 16 channels.

Shapes  B batch, C channels, T frames, H and W pixels (or latents: 8x fewer in space, 4k + 1 frames to k + 1 latents);
        in attention N = T * H * W tokens.

diffusers' encoder and decoder, with three of their parts computed in another way and to the same numbers:

- A frame attends to itself and those before it. There is one call of attention per frame, over the keys so far, instead
  of one over all pairs of tokens under a mask: half of the work, and no N x N mask, which is 2.3 GB for one tile of the
  released size.
- A convolution whose padded input would have more than CHUNK elements runs over a few frames at a time. At 129 frames
  of 256 x 256 pixels the decoder's largest input has 2^31 elements, more than the padding of a GPU can address, and the
  padded copy is never there as a whole.
- Upsampling writes its result once, in place of two parts that are concatenated.

Parameter names are the released ones. Latents are the mode of the posterior, shifted and scaled as released.
diffusers is imported when the first model is made, not before.
Source: HunyuanVideo (arXiv 2412.03603) and the released configuration of Open-Sora 2.0.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora_fast.autoencoder import require_multiple
from opensora_fast.config import HunyuanVAEConfig
from opensora_fast.errors import UserError
from opensora_fast.tiling import BatchedTiles, Network, TileRunner, Tiles, tile_video

# Elements of a convolution's padded input or output. Beside the padded piece and its result cuDNN may take workspace
# for both once more in the layout of its tensor cores; nothing predicts that, and in pieces of half a GiB (bfloat16) it
# is small. Smaller pieces would read the frames that two of them share too often.
CHUNK = 2**28
LOG_VARIANCE_RANGE = (-30.0, 20.0)


def diffusers_blocks() -> ModuleType:
    """diffusers' parts of this autoencoder. Raises UserError where it is not installed, or has none."""
    try:
        return import_module("diffusers.models.autoencoders.autoencoder_kl_hunyuan_video")
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"the Hunyuan autoencoder needs diffusers ({reason}): run pip install 'opensora-fast[diffusers]'"
        ) from error


class CausalConv3d(nn.Module):
    """Padded with copies of the edges: half a kernel around each frame, the rest of time in front of the first."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.conv: nn.Conv3d = source.conv

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        """At most CHUNK elements at a time, and at least one frame."""
        (kernel, rows, columns), stride = self.conv.kernel_size, self.conv.stride[0]
        B, C, T, H, W = x_BCTHW.shape
        frames_out = (T - 1) // stride + 1
        padded_frame = B * max(C, self.conv.out_channels) * (H + rows - 1) * (W + columns - 1)
        step = max((CHUNK // padded_frame - kernel) // stride + 1, 1)
        around = (columns // 2, columns // 2, rows // 2, rows // 2)
        out_BCTHW: Tensor | None = None
        for first in range(0, frames_out, step):
            last = min(first + step, frames_out)
            start, stop = first * stride - (kernel - 1), (last - 1) * stride + 1
            piece_BCTHW = x_BCTHW[:, :, max(start, 0) : stop]
            if kernel > 1:
                piece_BCTHW = F.pad(piece_BCTHW, (*around, max(-start, 0), 0), mode="replicate")
            piece_BCTHW = self.conv(piece_BCTHW)
            if last - first == frames_out:
                return piece_BCTHW
            if out_BCTHW is None:
                out_BCTHW = piece_BCTHW.new_empty(B, piece_BCTHW.shape[1], frames_out, *piece_BCTHW.shape[3:])
            out_BCTHW[:, :, first:last] = piece_BCTHW
        assert out_BCTHW is not None
        return out_BCTHW


class CausalUpsample(nn.Module):
    """Each pixel repeated (time, rows, columns) times, the first frame only in space; then a convolution."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.conv = CausalConv3d(source.conv)
        self.factor: tuple[int, int, int] = tuple(source.upsample_factor)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        time, rows, columns = self.factor
        B, C, T, H, W = x_BCTHW.shape
        out_BCTHW = x_BCTHW.new_empty(B, C, 1 + time * (T - 1), rows * H, columns * W)
        for source, target, repeat in (
            (x_BCTHW[:, :, :1], out_BCTHW[:, :, :1], 1),
            (x_BCTHW[:, :, 1:], out_BCTHW[:, :, 1:], time),
        ):
            frames = source.shape[2]
            copies = target.view(B, C, frames, repeat, H, rows, W, columns)
            copies.copy_(source[:, :, :, None, :, None, :, None])
        return self.conv(out_BCTHW)


class FrameCausalAttention(nn.Module):
    """One head over the tokens of all frames up to the own one, around a residual; normed over all frames first."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.group_norm: nn.GroupNorm = source.group_norm
        self.to_q: nn.Linear = source.to_q
        self.to_k: nn.Linear = source.to_k
        self.to_v: nn.Linear = source.to_v
        self.to_out: nn.ModuleList = source.to_out

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        x_BNC = self.group_norm(x_BCTHW).flatten(2).transpose(1, 2)
        out_BNC = frame_causal_attention(self.to_q(x_BNC), self.to_k(x_BNC), self.to_v(x_BNC), frames=x_BCTHW.shape[2])
        return x_BCTHW + self.to_out[0](out_BNC).transpose(1, 2).reshape(x_BCTHW.shape)


def frame_causal_attention(q_BNC: Tensor, k_BNC: Tensor, v_BNC: Tensor, *, frames: int) -> Tensor:
    """Attention of one head in which the tokens of a frame, N / frames in a row, see no later frame; [B, N, C]."""
    in_frame = q_BNC.shape[1] // frames
    out_BHNC = [
        F.scaled_dot_product_attention(
            q_BNC[:, None, seen - in_frame : seen], k_BNC[:, None, :seen], v_BNC[:, None, :seen]
        )
        for seen in range(in_frame, frames * in_frame + 1, in_frame)
    ]
    return torch.cat(out_BHNC, dim=2).squeeze(1)


class CausalMidBlock(nn.Module):
    """A residual block, then attention and a residual block, as often as configured."""

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.resnets: nn.ModuleList = source.resnets
        self.attentions = nn.ModuleList(FrameCausalAttention(attention) for attention in source.attentions)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        first, *others = self.resnets
        x_BCTHW = first(x_BCTHW)
        for attention, resnet in zip(self.attentions, others, strict=True):
            x_BCTHW = resnet(attention(x_BCTHW))
        return x_BCTHW


OWN_PARTS = {
    "HunyuanVideoCausalConv3d": CausalConv3d,
    "HunyuanVideoUpsampleCausal3D": CausalUpsample,
    "HunyuanVideoMidBlock3D": CausalMidBlock,
}


def with_own_parts(network: nn.Module) -> nn.Module:
    """`network` itself, with diffusers' modules of these kinds replaced by ours, which take over their parameters."""
    for name, child in network.named_children():
        own = OWN_PARTS.get(type(child).__name__)
        if own is not None:
            child = own(child)
            setattr(network, name, child)
        with_own_parts(child)
    return network


class HunyuanVAE(nn.Module):
    """The autoencoder (an `opensora_fast.autoencoder.Autoencoder`). Raises UserError where diffusers is missing.

    `run_tiles` runs the tiles of a call; another `TileRunner` may be set in its place.
    """

    causal = True

    def __init__(self, config: HunyuanVAEConfig) -> None:
        blocks = diffusers_blocks()
        super().__init__()
        self.config = config
        channels = config.latent_channels
        sizes = {
            "block_out_channels": config.block_out_channels,
            "layers_per_block": config.layers_per_block,
            "norm_num_groups": config.norm_num_groups,
        }
        self.encoder = with_own_parts(blocks.HunyuanVideoEncoder3D(in_channels=3, out_channels=channels, **sizes))
        self.decoder = with_own_parts(blocks.HunyuanVideoDecoder3D(in_channels=channels, out_channels=3, **sizes))
        self.quant_conv = nn.Conv3d(2 * channels, 2 * channels, kernel_size=1)
        self.post_quant_conv = nn.Conv3d(channels, channels, kernel_size=1)
        self.run_tiles: TileRunner = BatchedTiles()

    @property
    def latent_channels(self) -> int:
        return self.config.latent_channels

    @property
    def compression(self) -> tuple[int, int, int]:
        """Frames, rows and columns of pixels to one latent; the first latent is a lone frame."""
        return self.config.temporal_compression, self.config.spatial_compression, self.config.spatial_compression

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(t, h, w) of the latent of such a video.

        Frames must be 4k + 1, height and width multiples of 8; UserError names the nearest that are.
        """
        time, space, _ = self.compression
        if frames < 1 or frames % time != 1:
            below = max(frames - 1, 0) // time * time + 1
            nearest = f"{below} or {below + time}" if frames > 1 else "1"
            raise UserError(f"frames={frames} does not fit the autoencoder: use {nearest} (4k + 1)")
        require_multiple("height", height, space)
        require_multiple("width", width, space)
        return frames // time + 1, height // space, width // space

    def frames_of(self, latent_frames: int) -> int:
        """Frames that `decode` gives: one of the first latent, four of each other."""
        return (latent_frames - 1) * self.config.temporal_compression + 1

    def channels_last(self) -> HunyuanVAE:
        """Itself: its blocks make what they are given contiguous, so weights in another format would gain nothing."""
        return self

    def encode(self, video_BCTHW: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Video in [-1, 1] to latent [B, C, t, h, w], shifted and scaled, in the weights' dtype.

        The mode of the posterior; with a generator, a sample of it. Tiled where the configuration asks for it: over
        time if T exceeds `sample_tsize`, and over space if H or W exceeds `sample_size`.
        Raises UserError for sizes outside of `latent_shape`.
        """
        self.latent_shape(*video_BCTHW.shape[2:])
        moments_BCTHW = self._tiled(self._moments, self._like_weights(video_BCTHW), encoding=True)
        latent_BCTHW, log_variance_BCTHW = moments_BCTHW.chunk(2, dim=1)
        if generator is not None:
            noise_BCTHW = torch.randn(latent_BCTHW.shape, generator=generator, device=generator.device)
            deviation_BCTHW = torch.exp(0.5 * log_variance_BCTHW.clamp(*LOG_VARIANCE_RANGE))
            latent_BCTHW = latent_BCTHW + deviation_BCTHW * noise_BCTHW.to(latent_BCTHW)
        return (latent_BCTHW - self.config.shift_factor) * self.config.scaling_factor

    def decode(self, latent_BCTHW: Tensor) -> Tensor:
        """Latent, as `encode` gives it, to a video of `frames_of(t)` frames, in the weights' dtype; tiled likewise."""
        latent_BCTHW = self._like_weights(latent_BCTHW) / self.config.scaling_factor + self.config.shift_factor
        return self._tiled(self._pixels, latent_BCTHW, encoding=False)

    def _moments(self, video_BCTHW: Tensor) -> Tensor:
        """Mean and log variance of the posterior, [B, 2C, t, h, w]."""
        return self.quant_conv(self.encoder(video_BCTHW))

    def _pixels(self, latent_BCTHW: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latent_BCTHW))

    def _like_weights(self, x_BCTHW: Tensor) -> Tensor:
        return x_BCTHW.to(self.quant_conv.weight.dtype)

    def _tiled(self, network: Network, x_BCTHW: Tensor, *, encoding: bool) -> Tensor:
        T, H, W = x_BCTHW.shape[2:]
        config, overlap = self.config, self.config.tile_overlap_factor
        space = Tiles.of(config.sample_size, config.spatial_compression, overlap, encoding=encoding)
        time = Tiles.of(config.sample_tsize, config.temporal_compression, overlap, encoding=encoding, lead=True)
        return tile_video(
            network,
            x_BCTHW,
            self.run_tiles,
            time=time if config.use_temporal_tiling and time.needed(T) else None,
            space=space if config.use_spatial_tiling and (space.needed(H) or space.needed(W)) else None,
        )
