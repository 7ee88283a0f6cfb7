"""Video DC-AE: a deep-compression autoencoder of residual convolutions and linear attention (Open-Sora 2.0).

Shapes  B batch, C channels, T frames, H and W pixels (or latents: 32x fewer in space, 4x in time as released);
        in attention n heads of D channels, and N = T * H * W tokens.

The encoder halves space (and time where the configuration says so) at the end of each stage but the last; the decoder
mirrors it. Every change of resolution or width has a parameter-free shortcut around it, which moves space into channels
and averages, or repeats channels and moves them into space (DC-AE, arXiv 2410.10733, section 3.1). Convolutions are
zero-padded on all sides, time included: nothing is causal, and there is no KL and no quantisation.

A single image is a video of one frame: time is then neither down- nor upsampled. Parameter names are the released ones.
Runs in either memory format, that of its weights: `model.to(memory_format=torch.channels_last_3d)`.
"""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora_fast.autoencoder import require_multiple
from opensora_fast.config import VideoDCAEConfig
from opensora_fast.depthwise_conv import DepthwiseConv3d
from opensora_fast.errors import UserError
from opensora_fast.kernels.pixel_shuffle import pixel_shuffle_repeat_add, pixel_unshuffle_mean_add
from opensora_fast.kernels.rms_norm_act import channel_rms_norm, silu_pad
from opensora_fast.tiling import BatchedTiles, TileRunner, Tiles, tile_video

INIT_STD = 0.02
PADDED_AHEAD = {"cuda"}  # the devices on which `silu_conv` writes the padding itself


def conv3d(
    in_channels: int,
    out_channels: int,
    kernel_size: int = 3,
    *,
    stride: tuple[int, int, int] = (1, 1, 1),
    bias: bool = True,
) -> nn.Conv3d:
    """Zero-padded by half the kernel on all six sides."""
    return nn.Conv3d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=bias)


def silu_conv(x_BCTHW: Tensor, conv: nn.Conv3d) -> Tensor:
    """conv(SiLU(x)). Where the device is in PADDED_AHEAD, the pass that computes SiLU also writes conv's zero padding.

    Not on the CPU, whose convolutions pad for nothing: there (2, 16, 8, 48, 80), forward and backward, would take 24.5
    instead of 20.8 ms on one core of an AMD EPYC (Zen 4). Not yet measured on a GPU.
    """
    pad = pad_ahead(x_BCTHW, conv)
    return unpadded(conv, silu_pad(x_BCTHW, pad=pad)) if pad else conv(F.silu(x_BCTHW))


def pad_ahead(x_BCTHW: Tensor, conv: nn.Conv3d) -> int:
    """The zeros on each side that the op before the convolution should write; 0 leaves them to the convolution."""
    return int(conv.padding[0]) if x_BCTHW.device.type in PADDED_AHEAD else 0


def unpadded(conv: nn.Conv3d, x_BCTHW: Tensor) -> Tensor:
    """The convolution of an x that already has its padding."""
    return F.conv3d(x_BCTHW, conv.weight, conv.bias, conv.stride, groups=conv.groups)


class ChannelRMSNorm(nn.Module):
    """RMS norm over channels with its own weight (one at first) and bias (zero), both [C]; then an optional activation.

    What is added to it is part of the same pass. Under autocast everything is of the dtype of x.
    """

    def __init__(self, channels: int, eps: float = 1e-5, *, act: str | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps
        self.act = act

    def forward(self, x_BCTHW: Tensor, residual_BCTHW: Tensor | None = None, *, pad: int = 0) -> Tensor:
        weight_C, bias_C = self.weight.to(x_BCTHW.dtype), self.bias.to(x_BCTHW.dtype)
        residual_BCTHW = None if residual_BCTHW is None else residual_BCTHW.to(x_BCTHW.dtype)
        return channel_rms_norm(x_BCTHW, weight_C, bias_C, residual=residual_BCTHW, eps=self.eps, act=self.act, pad=pad)


class Conv(nn.Module):
    """An optional SiLU, then a convolution, then an optional norm, to which a residual may be added."""

    def __init__(self, conv: nn.Conv3d, *, silu: bool = False, norm: bool = False):
        super().__init__()
        self.conv = conv
        self.norm = ChannelRMSNorm(conv.out_channels) if norm else None
        self.silu = silu

    def forward(self, x_BCTHW: Tensor, residual_BCTHW: Tensor | None = None) -> Tensor:
        x_BCTHW = silu_conv(x_BCTHW, self.conv) if self.silu else self.conv(x_BCTHW)
        return x_BCTHW if self.norm is None else self.norm(x_BCTHW, residual_BCTHW)


class OpList(nn.Module):
    """Modules one after the other, under the released name `op_list`."""

    def __init__(self, *modules: nn.Module):
        super().__init__()
        self.op_list = nn.ModuleList(modules)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        for module in self.op_list:
            x_BCTHW = module(x_BCTHW)
        return x_BCTHW


class NormedOutput(OpList):
    """Norm with its activation, nothing, convolution: the norm writes the zeros around what the convolution reads."""

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        norm, _, output = self.op_list
        conv = cast(nn.Conv3d, output.conv)
        pad = pad_ahead(x_BCTHW, conv)
        return unpadded(conv, norm(x_BCTHW, pad=pad)) if pad else conv(norm(x_BCTHW))


class Residual(nn.Module):
    """x + main(x), where main ends in a norm that adds what it is told to: main(x, x)."""

    def __init__(self, main: nn.Module):
        super().__init__()
        self.main = main

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        return self.main(x_BCTHW, x_BCTHW)


class ResBlockMain(nn.Module):
    """Two convolutions with SiLU between; only the second is normed. Returns that plus the residual."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = Conv(conv3d(width, width))
        self.conv2 = Conv(conv3d(width, width, bias=False), silu=True, norm=True)

    def forward(self, x_BCTHW: Tensor, residual_BCTHW: Tensor) -> Tensor:
        return self.conv2(self.conv1(x_BCTHW), residual_BCTHW)


class LiteMLA(nn.Module):
    """ReLU linear attention over all of space and time, on the tokens themselves and on their 5x5x5 aggregates.

    Of each head's 3 * D channels the first D are q, then k, then v. Returns its output plus the residual.
    """

    def __init__(self, width: int, heads_dim: int):
        super().__init__()
        self.heads_dim = heads_dim
        self.qkv = Conv(conv3d(width, 3 * width, 1, bias=False))
        depthwise = DepthwiseConv3d(3 * width, 5, bias=False)
        per_projection = nn.Conv3d(3 * width, 3 * width, 1, groups=3 * width // heads_dim, bias=False)
        self.aggreg = nn.ModuleList([nn.Sequential(depthwise, per_projection)])
        self.proj = Conv(conv3d(2 * width, width, 1, bias=False), norm=True)

    def forward(self, x_BCTHW: Tensor, residual_BCTHW: Tensor) -> Tensor:
        qkv_BCTHW = self.qkv(x_BCTHW)
        qkv_BCTHW = torch.cat([qkv_BCTHW, *(scale(qkv_BCTHW) for scale in self.aggreg)], dim=1)
        B, C, T, H, W = qkv_BCTHW.shape
        heads = qkv_BCTHW.reshape(B, C // (3 * self.heads_dim), 3 * self.heads_dim, T * H * W)
        q, k, v = heads.chunk(3, dim=2)
        out_BCTHW = relu_linear_attention(q, k, v).reshape(B, C // 3, T, H, W)
        return self.proj(out_BCTHW.to(qkv_BCTHW.dtype, memory_format=memory_format(qkv_BCTHW)), residual_BCTHW)


def relu_linear_attention(q_BnDN: Tensor, k_BnDN: Tensor, v_BnDN: Tensor, eps: float = 1e-15) -> Tensor:
    """sum_m v_m (relu(k_m) . relu(q_n)) / (sum_m relu(k_m) . relu(q_n) + eps) at every token n, in O(N).

    Products in the inputs' dtype (float16 in float32: its sums overflow), the quotient and the result in float32
    or wider. Autocast is off inside.
    """
    with torch.autocast(device_type=q_BnDN.device.type, enabled=False):
        if q_BnDN.dtype == torch.float16:
            q_BnDN, k_BnDN, v_BnDN = q_BnDN.float(), k_BnDN.float(), v_BnDN.float()
        q_BnDN, k_BnND = F.relu(q_BnDN), F.relu(k_BnDN).transpose(-1, -2)
        numerator_BnDN = (v_BnDN @ k_BnND) @ q_BnDN
        denominator_Bn1N = k_BnND.sum(dim=-2, keepdim=True) @ q_BnDN
        wide = torch.promote_types(q_BnDN.dtype, torch.float32)
        return numerator_BnDN.to(wide) / (denominator_Bn1N.to(wide) + eps)


class GLUMBConv(nn.Module):
    """Gated inverted bottleneck: expand 4x twice, SiLU, depthwise 3x3x3, x * silu(gate), project, add the residual."""

    def __init__(self, width: int, expand: int = 4):
        super().__init__()
        hidden = expand * width
        self.inverted_conv = Conv(conv3d(width, 2 * hidden, 1))
        self.depth_conv = Conv(DepthwiseConv3d(2 * hidden, 3), silu=True)
        self.point_conv = Conv(conv3d(hidden, width, 1, bias=False), norm=True)

    def forward(self, x_BCTHW: Tensor, residual_BCTHW: Tensor) -> Tensor:
        x_BCTHW, gate_BCTHW = self.depth_conv(self.inverted_conv(x_BCTHW)).chunk(2, dim=1)
        return self.point_conv(x_BCTHW * F.silu(gate_BCTHW), residual_BCTHW)


class EViTBlock(nn.Module):
    """Global context by linear attention, then local context by a gated convolution (EViTS5_GLU)."""

    def __init__(self, width: int, heads_dim: int):
        super().__init__()
        self.context_module = Residual(LiteMLA(width, heads_dim))
        self.local_module = Residual(GLUMBConv(width))

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        return self.local_module(self.context_module(x_BCTHW))


class Shortcut(nn.Module):
    """main(x) joined to x by one of the parameter-free shortcuts of `kernels.pixel_shuffle`."""

    def __init__(self, main: nn.Module, join: Callable[..., Tensor], *, temporal: bool = False):
        super().__init__()
        self.main = main
        self.join = join
        self.temporal = temporal

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        h_BCTHW = self.main(x_BCTHW)  # under autocast narrower than x
        return self.join(h_BCTHW, x_BCTHW.to(h_BCTHW.dtype), temporal=temporal_factor(x_BCTHW, self.temporal))


def memory_format(x_BCTHW: Tensor) -> torch.memory_format:
    """The layout of x: channels_last_3d or contiguous."""
    channels_last = x_BCTHW.is_contiguous(memory_format=torch.channels_last_3d) and not x_BCTHW.is_contiguous()
    return torch.channels_last_3d if channels_last else torch.contiguous_format


def temporal_factor(x_BCTHW: Tensor, temporal: bool) -> int:
    """2 where time is resampled; an image (T = 1) stays one frame."""
    return 2 if temporal and x_BCTHW.shape[2] > 1 else 1


class InterpolateConv(nn.Module):
    """Nearest-neighbour doubling of space (and time), then a convolution."""

    def __init__(self, in_channels: int, out_channels: int, *, temporal: bool):
        super().__init__()
        self.conv = Conv(conv3d(in_channels, out_channels))
        self.temporal = temporal

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        scale = (float(temporal_factor(x_BCTHW, self.temporal)), 2.0, 2.0)
        return self.conv(F.interpolate(x_BCTHW, scale_factor=scale, mode="nearest"))


def downsample(in_channels: int, out_channels: int, *, temporal: bool) -> nn.Module:
    conv = Conv(conv3d(in_channels, out_channels, stride=(2 if temporal else 1, 2, 2)))
    return Shortcut(conv, pixel_unshuffle_mean_add, temporal=temporal)


def upsample(in_channels: int, out_channels: int, *, temporal: bool) -> nn.Module:
    conv = InterpolateConv(in_channels, out_channels, temporal=temporal)
    return Shortcut(conv, pixel_shuffle_repeat_add, temporal=temporal)


def blocks(block_type: str, width: int, depth: int, heads_dim: int) -> list[nn.Module]:
    if block_type == "ResBlock":
        return [Residual(ResBlockMain(width)) for _ in range(depth)]
    return [EViTBlock(width, heads_dim) for _ in range(depth)]


class Encoder(nn.Module):
    """Video to latent, unscaled."""

    def __init__(self, config: VideoDCAEConfig):
        super().__init__()
        widths, temporal = config.encoder_widths, config.temporal_downsample
        self.project_in = Conv(conv3d(config.in_channels, widths[0]))
        stages = []
        for i, (width, depth) in enumerate(zip(widths, config.encoder_depths, strict=True)):
            stage = blocks(config.encoder_block_types[i], width, depth, config.heads_dim)
            if i + 1 < len(widths):
                stage.append(downsample(width, widths[i + 1], temporal=temporal[i]))
            stages.append(OpList(*stage))
        self.stages = nn.ModuleList(stages)
        self.project_out = Shortcut(OpList(Conv(conv3d(widths[-1], config.latent_channels))), pixel_unshuffle_mean_add)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        x_BCTHW = self.project_in(x_BCTHW)
        for stage in self.stages:
            x_BCTHW = stage(x_BCTHW)
        return self.project_out(x_BCTHW)


class Decoder(nn.Module):
    """Latent, unscaled, to video. Stages are numbered as the encoder's, so they run from last to first."""

    def __init__(self, config: VideoDCAEConfig):
        super().__init__()
        widths, temporal = config.decoder_widths, config.temporal_downsample
        self.project_in = Shortcut(Conv(conv3d(config.latent_channels, widths[-1])), pixel_shuffle_repeat_add)
        stages = []
        for i, (width, depth) in enumerate(zip(widths, config.decoder_depths, strict=True)):
            stage = blocks(config.decoder_block_types[i], width, depth, config.heads_dim)
            if i + 1 < len(widths):
                stage.insert(0, upsample(widths[i + 1], width, temporal=temporal[i]))
            stages.append(OpList(*stage))
        self.stages = nn.ModuleList(stages)
        # The identity has the released number of the ReLU, which the norm's pass contains.
        norm, conv = ChannelRMSNorm(widths[0], act="relu"), Conv(conv3d(widths[0], config.in_channels))
        self.project_out = NormedOutput(norm, nn.Identity(), conv)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        x_BCTHW = self.project_in(x_BCTHW)
        for stage in reversed(self.stages):
            x_BCTHW = stage(x_BCTHW)
        return self.project_out(x_BCTHW)


class VideoDCAE(nn.Module):
    """The autoencoder (an `opensora_fast.autoencoder.Autoencoder`). Raises UserError for tiles it cannot cut.

    `run_tiles` runs the tiles of a call; another `TileRunner` may be set in its place.
    """

    causal = False

    def __init__(self, config: VideoDCAEConfig):
        super().__init__()
        if config.use_temporal_tiling and config.temporal_tile_size < 2 * config.temporal_compression:
            raise UserError(
                f"temporal_tile_size={config.temporal_tile_size} holds one latent, which decodes to one frame: "
                f"use {2 * config.temporal_compression} or more"
            )
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.run_tiles: TileRunner = BatchedTiles()
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """The released start: weights, those of the norms too, normal with standard deviation 0.02; biases zero.

        Norms near zero make every residual branch start near zero, so that the shortcuts carry the signal.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.trunc_normal_(parameter, std=INIT_STD)

    @property
    def latent_channels(self) -> int:
        return self.config.latent_channels

    @property
    def compression(self) -> tuple[int, int, int]:
        """Frames, rows and columns of pixels to one latent."""
        return self.config.temporal_compression, self.config.spatial_compression, self.config.spatial_compression

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """(t, h, w) of the latent of such a video.

        Frames must be 1 or a multiple of the temporal compression, height and width multiples of the spatial one;
        UserError names the nearest that are.
        """
        time, space, _ = self.compression
        if frames != 1:
            require_multiple("frames", frames, time, also="1 or ")
        require_multiple("height", height, space)
        require_multiple("width", width, space)
        return max(frames // time, 1), height // space, width // space

    def frames_of(self, latent_frames: int) -> int:
        """Frames that `decode` gives: 1 for a lone latent frame, which it takes for an image, otherwise all of them.

        So a video of exactly one latent frame (4 frames as released) comes back as one frame; longer ones round-trip.
        """
        return 1 if latent_frames == 1 else latent_frames * self.config.temporal_compression

    def channels_last(self) -> "VideoDCAE":
        """Itself, with weights in the memory format that convolutions are faster in on every device."""
        return self.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]  # torch's stubs lack it

    def reconstruct(self, video_BCTHW: Tensor) -> Tensor:
        """Decoder of encoder, untiled and unscaled: what training optimises. Sizes as in `latent_shape`."""
        self.latent_shape(*video_BCTHW.shape[2:])
        return self.decoder(self.encoder(self._like_weights(video_BCTHW)))

    def encode(self, video_BCTHW: Tensor) -> Tensor:
        """Video in [-1, 1] to latent [B, C, t, h, w], divided by `scaling_factor`, in the weights' dtype.

        Tiled where the configuration asks for it: over time if T exceeds the temporal tile, and over space if H or W
        exceeds the spatial one. Raises UserError for sizes outside of `latent_shape`.
        """
        self.latent_shape(*video_BCTHW.shape[2:])
        latent_BCTHW = self._tiled(self.encoder, self._like_weights(video_BCTHW), encoding=True)
        return latent_BCTHW if self.config.scaling_factor is None else latent_BCTHW / self.config.scaling_factor

    def decode(self, latent_BCTHW: Tensor) -> Tensor:
        """Latent, as `encode` gives it, to a video of `frames_of(t)` frames, in the weights' dtype; tiled likewise."""
        latent_BCTHW = self._like_weights(latent_BCTHW)
        if self.config.scaling_factor is not None:
            latent_BCTHW = latent_BCTHW * self.config.scaling_factor
        return self._tiled(self.decoder, latent_BCTHW, encoding=False)

    def _like_weights(self, x_BCTHW: Tensor) -> Tensor:
        """In the weights' dtype and layout: on the CPU a convolution follows the layout of its input alone."""
        weight = self.encoder.project_in.conv.weight
        return x_BCTHW.to(weight.dtype, memory_format=memory_format(weight))

    def _tiled(self, network: nn.Module, x_BCTHW: Tensor, *, encoding: bool) -> Tensor:
        T, H, W = x_BCTHW.shape[2:]
        config, overlap = self.config, self.config.tile_overlap_factor
        space = Tiles.of(config.spatial_tile_size, config.spatial_compression, overlap, encoding=encoding)
        # A lone latent at the end would be decoded as an image, to one frame.
        time = Tiles.of(config.temporal_tile_size, config.temporal_compression, overlap, encoding=encoding, shortest=2)
        return tile_video(
            network,
            x_BCTHW,
            self.run_tiles,
            time=time if config.use_temporal_tiling and time.needed(T) else None,
            space=space if config.use_spatial_tiling and (space.needed(H) or space.needed(W)) else None,
        )
