"""The transformer blocks as eager PyTorch writes them: what fused blocks are counted, timed and tested against.

Both take a block of `opensora_fast.mmdit`, its inputs and modulation, and use that block's weights. Numerics are the
fused ops' own: float32 inside each norm, rotation and modulation (float64 for float64), rounded once at its end.

Shapes    B batch; L, N, S text, video, all tokens; D hidden size; H heads; K channels of a head; M hidden size of the
          MLP; rope is (cos, sin), each [B, S, K / 2].
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from opensora_fast.mmdit import EPS, AdaLN, DoubleBlock, DoubleModulation, Rope, SingleBlock, Stream, StreamModulation


def double_block(
    block: DoubleBlock, img_BND: Tensor, txt_BLD: Tensor, rope: Rope, modulation: Tensor | DoubleModulation
) -> tuple[Tensor, Tensor]:
    """What `block(img, txt, rope, modulation)` computes."""
    if isinstance(modulation, Tensor):
        modulation = block.modulate(modulation)
    qkv = [_project(block.txt, txt_BLD, modulation.txt), _project(block.img, img_BND, modulation.img)]
    attention_BSD = _rope_attention(qkv, [block.txt.qk_scale, block.img.qk_scale], rope)
    txt_attention, img_attention = attention_BSD.split((txt_BLD.shape[1], img_BND.shape[1]), dim=1)
    return (
        _update(block.img, img_BND, img_attention, modulation.img),
        _update(block.txt, txt_BLD, txt_attention, modulation.txt),
    )


def single_block(block: SingleBlock, x_BSD: Tensor, rope: Rope, modulation: Tensor | AdaLN) -> Tensor:
    """What `block(x, rope, modulation)` computes."""
    if isinstance(modulation, Tensor):
        modulation = block.modulate(modulation)
    qkv, hidden_BSM = block.qkv_mlp(_modulated_norm(x_BSD, modulation)).split(block.sizes, dim=-1)
    attention_BSD = _rope_attention([qkv.unflatten(-1, (3, -1, block.head_dim))], [block.qk_scale], rope)
    branch_BSD = block.proj(torch.cat((attention_BSD, F.gelu(hidden_BSM, approximate="tanh")), dim=-1))
    return x_BSD + modulation.gate_BD[:, None] * branch_BSD


def _project(stream: Stream, x_BTD: Tensor, modulation: StreamModulation) -> Tensor:
    return stream.qkv(_modulated_norm(x_BTD, modulation.attention)).unflatten(-1, (3, -1, stream.head_dim))


def _update(stream: Stream, x_BTD: Tensor, attention_BTD: Tensor, modulation: StreamModulation) -> Tensor:
    x_BTD = x_BTD + modulation.attention.gate_BD[:, None] * stream.proj(attention_BTD)
    hidden_BTM = F.gelu(stream.mlp_in(_modulated_norm(x_BTD, modulation.mlp)), approximate="tanh")
    return x_BTD + modulation.mlp.gate_BD[:, None] * stream.mlp_out(hidden_BTM)


def _modulated_norm(x_BTD: Tensor, adaln: AdaLN) -> Tensor:
    normed_BTD = F.layer_norm(_widened(x_BTD), x_BTD.shape[-1:], eps=EPS)
    y_BTD = (1 + _widened(adaln.scale_BD)[:, None]) * normed_BTD + _widened(adaln.shift_BD)[:, None]
    return y_BTD.to(x_BTD.dtype)


def _rope_attention(streams_qkv: Sequence[Tensor], qk_scales: Sequence[Tensor], rope: Rope) -> Tensor:
    normed = [_qk_norm(qkv[:, :, :2], scale_2K) for qkv, scale_2K in zip(streams_qkv, qk_scales, strict=True)]
    q_BSHK, k_BSHK = rotate(torch.cat(normed, dim=1), rope).to(streams_qkv[0].dtype).unbind(2)
    v_BSHK = torch.cat([qkv[:, :, 2] for qkv in streams_qkv], dim=1)
    q_BHSK, k_BHSK, v_BHSK = (x.transpose(1, 2) for x in (q_BSHK, k_BSHK, v_BSHK))
    attention_BHSK = F.scaled_dot_product_attention(q_BHSK, k_BHSK, v_BHSK)
    return attention_BHSK.transpose(1, 2).flatten(2)


def _qk_norm(qk_BT2HK: Tensor, scale_2K: Tensor) -> Tensor:
    wide = _widened(qk_BT2HK)
    return wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + EPS) * _widened(scale_2K)[:, None]


def rotate(qk_BS2HK: Tensor, rope: Rope) -> Tensor:
    """Rotate the channel pairs (i, i + K / 2) of every head by the angle of its position."""
    cos, sin = (table_BSK2[:, :, None, None] for table_BSK2 in rope)
    first, second = qk_BS2HK.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
