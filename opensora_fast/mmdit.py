"""The diffusion transformer of Open-Sora 2.0: the velocity of noised video tokens, given time, text and frames.

    img ─ img_in (+ cond_in) ─┐                      ┌─ txt ─┐
                              ├─ double blocks (19) ─┤       ├─ single blocks (38) ─ drop text ─ final layer ─ velocity
    txt ─ txt_in ─────────────┘                      └─ img ─┘
    time, pooled text ─ embedders ─ SiLU ─ one linear per block: shift, scale and gate of its norms and residuals

The mathematics is that of the released model. The parameters are laid out for few, large matrix products: one for q, k
and v (and the MLP of a single block), rotation by half-split pairs (i, i + K/2). `released.py` translates checkpoints.

Shapes    B batch; N video tokens; L text tokens; S = L + N, text first; C channels of a video token; D hidden size;
          H heads; K channels of a head; K2 = K / 2; M hidden size of the MLP; R rows of a modulation.
Ranks     With a `ContextParallel`, N and L count this rank's tokens and S = L + N; attention alone meets the others'.
Numerics  Weights, activations and the residual stream have one dtype; inputs are cast to it. In float32 (float64 for a
          float64 model): norm statistics, modulation, rotation and its angles, the timestep embedding.
Source    Open-Sora 2.0 (arXiv 2503.09642, section 3.2), Stable Diffusion 3 (arXiv 2403.03206) and FLUX.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from opensora_fast.config import MMDiTConfig
from opensora_fast.errors import UserError
from opensora_fast.kernels import attention, context_parallel
from opensora_fast.kernels.context_parallel import ContextParallel
from opensora_fast.kernels.gated_linear import gelu_linear_gated_residual
from opensora_fast.kernels.gated_residual import gated_residual_modulated_norm_linear
from opensora_fast.kernels.modulated_norm import modulated_norm_linear, modulated_norm_split_linear
from opensora_fast.positions import rope_cos_sin

EPS = 1e-6  # of every norm
TIME_CHANNELS = 256  # of the sinusoidal embedding of time and guidance

Rope = tuple[Tensor, Tensor]  # cos_BSK2, sin_BSK2


class AdaLN(NamedTuple):
    """What surrounds one residual branch: x + gate * branch((1 + scale) * norm(x) + shift)."""

    shift_BD: Tensor
    scale_BD: Tensor
    gate_BD: Tensor


class StreamModulation(NamedTuple):
    attention: AdaLN
    mlp: AdaLN

    @classmethod
    def of(cls, linear_B6D: Tensor) -> "StreamModulation":
        chunks = linear_B6D.chunk(6, dim=-1)
        return cls(attention=AdaLN(*chunks[:3]), mlp=AdaLN(*chunks[3:]))


class DoubleModulation(NamedTuple):
    img: StreamModulation
    txt: StreamModulation


class FinalModulation(NamedTuple):
    shift_BD: Tensor
    scale_BD: Tensor


@dataclass(frozen=True)
class Modulation:
    """The modulation of every block for R pairs of (time, pooled text): 27 % of the weights, but no sequence axis.

    Kept as the linear layers give it: choosing rows takes one kernel for each of them and not for each of their chunks.
    """

    img_R6D: list[Tensor]  # of the double blocks
    txt_R6D: list[Tensor]
    single_R3D: list[Tensor]
    final_R2D: Tensor

    def rows(self, index_B: Tensor) -> "Modulation":
        """The modulation of a batch whose item b has the pair `index_B[b]` (int64 [B], values below R)."""
        return Modulation(
            [linear[index_B] for linear in self.img_R6D],
            [linear[index_B] for linear in self.txt_R6D],
            [linear[index_B] for linear in self.single_R3D],
            self.final_R2D[index_B],
        )

    def double(self, block: int) -> DoubleModulation:
        """That of a double block, in views."""
        return DoubleModulation(StreamModulation.of(self.img_R6D[block]), StreamModulation.of(self.txt_R6D[block]))

    def single(self, block: int) -> AdaLN:
        """That of a single block, in views."""
        return AdaLN(*self.single_R3D[block].chunk(3, dim=-1))

    def final(self) -> FinalModulation:
        """That of the final layer, in views."""
        return FinalModulation(*self.final_R2D.chunk(2, dim=-1))


class MMDiT(nn.Module):
    """The whole model. Construction initialises the weights for training from scratch; see `forward` for the shapes."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.config = config
        self.img_in = nn.Linear(config.in_channels, D)
        self.cond_in = nn.Linear(config.cond_channels, D) if config.cond_embed else None
        self.txt_in = nn.Linear(config.context_in_dim, D)
        self.time_in = Embedder(TIME_CHANNELS, D)
        self.vector_in = Embedder(config.vec_in_dim, D)
        self.guidance_in = Embedder(TIME_CHANNELS, D) if config.guidance_embed else None
        self.double_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.depth))
        self.single_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.depth_single_blocks))
        self.final_layer = FinalLayer(config)
        self.initialize_weights()

    @property
    def device(self) -> torch.device:
        """Where the model computes: the device of its input layer, whatever its blocks' weights are stored on."""
        return self.img_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.img_in.weight.dtype

    def initialize_weights(self) -> None:
        """Xavier matrices, zero biases; every block starts as the identity and the model predicts zero velocity."""
        for name, parameter in self.named_parameters():
            initialize_parameter(name, parameter)

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y_vec: Tensor,
        cond: Tensor | None = None,
        guidance: Tensor | None = None,
        *,
        modulation: Modulation | None = None,
        checkpoint_double: int = 0,
        checkpoint_single: int = 0,
        context: ContextParallel | None = None,
    ) -> Tensor:
        """Velocity [B, N, C] of the noised tokens, in the dtype of the weights.

        Args (floating point of any width):
            img: noised video tokens [B, N, C].                  txt: T5 embedding [B, L, context_in_dim].
            img_ids: (time, row, column) [B, N, 3].              txt_ids: zeros [B, L, 3].
            timesteps: 1 is noise, 0 is data [B].                y_vec: pooled CLIP embedding [B, vec_in_dim].
            cond: packed (mask, reference latent) [B, N, C + patch_size**2]; None is all zeros, nothing given.
            guidance: scale of a guidance-distilled model [B]; required by it and refused by others.
            modulation: from `self.modulation`, one row per item; timesteps, y_vec and guidance are then unused.
            checkpoint_double, checkpoint_single: so many blocks, from the first, keep no activations and run again in
                the backward; beyond the depth means all.
            context: the ranks that share each sequence. img, img_ids, txt, txt_ids and cond are then this rank's tokens
                of it (`sequence_shards.shard`; there may be none), and so is the velocity; the other arguments are
                alike on all ranks. A gradient of a parameter is this rank's part of a sum over the ranks. Without
                lengths (`agree_lengths`) the ranks ask each other in every block, and the host waits for the device.

        Raises UserError naming an argument that is missing, refused or misshapen.
        """
        self._check_inputs(img, img_ids, txt, txt_ids, timesteps, y_vec, cond, modulation)
        dtype = self.dtype
        if modulation is None:  # each block computes its own, so that sharded or recomputed weights are met only there
            vec_BD = self._condition(timesteps, y_vec, guidance)

        ids_BS3 = torch.cat((txt_ids, img_ids), dim=1)
        cos, sin = rope_cos_sin(ids_BS3, self.config.axes_dim, self.config.theta)
        wide = torch.promote_types(dtype, torch.float32)
        rope = cos.to(wide), sin.to(wide)
        img_BND = self.img_in(img.to(dtype))
        if self.cond_in is not None:
            cond = img.new_zeros(*img.shape[:2], self.config.cond_channels) if cond is None else cond
            img_BND = img_BND + self.cond_in(cond.to(dtype))
        txt_BLD = self.txt_in(txt.to(dtype))

        for i, block in enumerate(self.double_blocks):
            run = recomputed(block) if i < checkpoint_double else block
            img_BND, txt_BLD = run(img_BND, txt_BLD, rope, modulation.double(i) if modulation else vec_BD, context)

        x_BSD = torch.cat((txt_BLD, img_BND), dim=1)
        for i, block in enumerate(self.single_blocks):
            run = recomputed(block) if i < checkpoint_single else block
            x_BSD = run(x_BSD, rope, modulation.single(i) if modulation else vec_BD, context)

        return self.final_layer(x_BSD[:, txt_BLD.shape[1] :], modulation.final() if modulation else vec_BD)

    def modulation(self, timesteps: Tensor, y_vec: Tensor, guidance: Tensor | None = None) -> Modulation:
        """Every block's modulation for R pairs: timesteps [R], y_vec [R, vec_in_dim], guidance [R] or None.

        Sampling calls it once per video with the distinct pairs of all steps, and gives each item of a step's batch
        its row with `Modulation.rows`.
        """
        vec_RD = self._condition(timesteps, y_vec, guidance)
        streams = [cast(Stream, stream) for block in self.double_blocks for stream in (block.img, block.txt)]
        double_R6D = [stream.modulation(vec_RD) for stream in streams]  # img and txt of a block, then of the next
        return Modulation(
            img_R6D=double_R6D[::2],
            txt_R6D=double_R6D[1::2],
            single_R3D=[cast(SingleBlock, block).modulation(vec_RD) for block in self.single_blocks],
            final_R2D=self.final_layer.modulation(vec_RD),
        )

    def _condition(self, timesteps: Tensor, y_vec: Tensor, guidance: Tensor | None) -> Tensor:
        """SiLU of the sum of the embedded time, pooled text and guidance [B, D]: what every modulation is linear in."""
        dtype = self.dtype
        vec_BD = self.time_in(sinusoids(timesteps).to(dtype)) + self.vector_in(y_vec.to(dtype))
        if self.guidance_in is not None:
            if guidance is None:
                raise UserError("guidance=None, but this model has guidance_embed=True: pass a scale per item, [B]")
            _check_shape("guidance", guidance, tuple(timesteps.shape), "pass one scale per item")
            vec_BD = vec_BD + self.guidance_in(sinusoids(guidance).to(dtype))
        elif guidance is not None:
            raise UserError("guidance was given, but this model has guidance_embed=False: leave guidance=None")
        return F.silu(vec_BD)

    def _check_inputs(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y_vec: Tensor,
        cond: Tensor | None,
        modulation: Modulation | None,
    ) -> None:
        config = self.config
        _check_shape("img", img, ("B", "N", config.in_channels), "pack the latent with positions.patchify")
        B, N, _ = img.shape
        _check_shape("img_ids", img_ids, (B, N, 3), "pass (time, row, column) of every token of img")
        _check_shape("txt", txt, (B, "L", config.context_in_dim), "pass one T5 embedding per item of img")
        _check_shape("txt_ids", txt_ids, (B, txt.shape[1], 3), "pass zeros, one row per token of txt")
        if cond is not None:
            if not config.cond_embed:
                raise UserError("cond was given, but this model has cond_embed=False: leave cond=None")
            _check_shape("cond", cond, (B, N, config.cond_channels), "pack (mask, reference latent) with patchify")
        if modulation is None:
            _check_shape("timesteps", timesteps, (B,), "pass one time per item of img")
            _check_shape("y_vec", y_vec, (B, config.vec_in_dim), "pass one pooled CLIP embedding per item of img")
        else:
            rows = (B, 2 * config.hidden_size)
            _check_shape("modulation", modulation.final_R2D, rows, "select one row per item with Modulation.rows")


class Attention(NamedTuple):
    """Norm, rotation and attention of the two kinds of blocks, as in `kernels.attention`."""

    split_rope: Callable[..., tuple[Tensor, Tensor]]
    single_rope: Callable[..., Tensor]


def attention_over(context: ContextParallel | None) -> Attention:
    """Attention of tokens that are all here, or over those of all ranks of a context."""
    if context is None:
        return Attention(attention.split_rope_attention, attention.single_rope_attention)
    return Attention(
        partial(context_parallel.split_rope_attention, context=context),
        partial(context_parallel.single_rope_attention, context=context),
    )


class Embedder(nn.Module):
    """Linear, SiLU, linear: [B, in_channels] -> [B, D]."""

    def __init__(self, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_channels, hidden_size)
        self.out_layer = nn.Linear(hidden_size, hidden_size)

    def forward(self, x_BC: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x_BC)))


class DoubleBlock(nn.Module):
    """Text and video each through their own weights, meeting in one joint attention.

    Kept for the backward, by each stream of T tokens, in units of one [B, T, D] (M = 4 D):

        1  the block's input                    modulated_norm_linear, gated_residual_modulated_norm_linear
        3  qkv, from which q and k follow       split_rope_attention
        1  the attention's output               split_rope_attention, proj
        1  its projection, from which the       gated_residual_modulated_norm_linear
           middle residual follows
        4  the MLP before its activation        gelu_linear_gated_residual
       10  and the norms' statistics: norm outputs, GELU, q and k are made again in the backward. Short sequences also
           keep the MLP's output: 11 (`kernels.gated_linear` says when).
    """

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.img = Stream(config)
        self.txt = Stream(config)

    def modulate(self, vec_BD: Tensor) -> DoubleModulation:
        return DoubleModulation(img=self.img.modulate(vec_BD), txt=self.txt.modulate(vec_BD))

    def forward(
        self,
        img_BND: Tensor,
        txt_BLD: Tensor,
        rope: Rope,
        modulation: Tensor | DoubleModulation,
        context: ContextParallel | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`modulation` is the block's own, or the vector [B, D] to compute it from."""
        if isinstance(modulation, Tensor):
            modulation = self.modulate(modulation)
        txt_qkv = self.txt.project(txt_BLD, modulation.txt.attention)
        img_qkv = self.img.project(img_BND, modulation.img.attention)
        (txt_q_scale, txt_k_scale), (img_q_scale, img_k_scale) = self.txt.qk_scale, self.img.qk_scale
        cos, sin = rope
        txt_attention, img_attention = attention_over(context).split_rope(
            txt_qkv, img_qkv, txt_q_scale, txt_k_scale, img_q_scale, img_k_scale, cos, sin, eps=EPS
        )
        return (
            self.img.update(img_BND, img_attention.flatten(2), modulation.img),
            self.txt.update(txt_BLD, txt_attention.flatten(2), modulation.txt),
        )


class Stream(nn.Module):
    """One modality's weights in a double block: T tokens in, T tokens out."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        D, M = config.hidden_size, config.mlp_size
        self.head_dim = config.head_dim
        self.modulation = nn.Linear(D, 6 * D)
        self.qkv = nn.Linear(D, 3 * D, bias=config.qkv_bias)
        self.qk_scale = nn.Parameter(torch.ones(2, config.head_dim))
        self.proj = nn.Linear(D, D)
        self.mlp_in = nn.Linear(D, M)
        self.mlp_out = nn.Linear(M, D)

    def modulate(self, vec_BD: Tensor) -> StreamModulation:
        return StreamModulation.of(self.modulation(vec_BD))

    def project(self, x_BTD: Tensor, adaln: AdaLN) -> Tensor:
        """Queries, keys and values [B, T, 3, H, K]."""
        qkv = modulated_norm_linear(x_BTD, adaln.shift_BD, adaln.scale_BD, self.qkv.weight, self.qkv.bias, eps=EPS)
        return qkv.unflatten(-1, (3, -1, self.head_dim))

    def update(self, x_BTD: Tensor, attention_BTD: Tensor, modulation: StreamModulation) -> Tensor:
        """The two residual steps that follow attention: its projection, then the MLP."""
        attention, mlp = modulation
        x_BTD, hidden_BTM = gated_residual_modulated_norm_linear(
            x_BTD,
            self.proj(attention_BTD),
            attention.gate_BD,
            mlp.shift_BD,
            mlp.scale_BD,
            self.mlp_in.weight,
            self.mlp_in.bias,
            eps=EPS,
        )
        return gelu_linear_gated_residual(x_BTD, hidden_BTM, self.mlp_out.weight, self.mlp_out.bias, mlp.gate_BD)


class SingleBlock(nn.Module):
    """Text and video as one sequence; attention and MLP side by side under one norm and one residual.

    Kept for the backward, in units of one [B, S, D] (M = 4 D):

        1  the block's input                    modulated_norm_split_linear
        3  qkv, from which q and k follow       single_rope_attention
        4  the MLP before its activation        gelu_linear_gated_residual
        1  the attention's output               single_rope_attention, gelu_linear_gated_residual
        9  and the norm's statistics. Short sequences also keep the joint projection's output: 10.
    """

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        D, M = config.hidden_size, config.mlp_size
        self.head_dim = config.head_dim
        self.sizes = (3 * D, M)
        self.modulation = nn.Linear(D, 3 * D)
        self.qkv_mlp = nn.Linear(D, 3 * D + M)
        self.qk_scale = nn.Parameter(torch.ones(2, config.head_dim))
        self.proj = nn.Linear(D + M, D)

    def modulate(self, vec_BD: Tensor) -> AdaLN:
        return AdaLN(*self.modulation(vec_BD).chunk(3, dim=-1))

    def forward(
        self, x_BSD: Tensor, rope: Rope, modulation: Tensor | AdaLN, context: ContextParallel | None = None
    ) -> Tensor:
        """`modulation` is the block's own, or the vector [B, D] to compute it from."""
        if isinstance(modulation, Tensor):
            modulation = self.modulate(modulation)
        qkv, hidden_BSM = modulated_norm_split_linear(
            x_BSD,
            modulation.shift_BD,
            modulation.scale_BD,
            self.qkv_mlp.weight,
            self.qkv_mlp.bias,
            sizes=self.sizes,
            eps=EPS,
        )
        qkv_BS3HK = qkv.unflatten(-1, (3, -1, self.head_dim))
        (q_scale, k_scale), (cos, sin) = self.qk_scale, rope
        attention_BSHK = attention_over(context).single_rope(qkv_BS3HK, q_scale, k_scale, cos, sin, eps=EPS)
        return gelu_linear_gated_residual(
            x_BSD,
            hidden_BSM,
            self.proj.weight,
            self.proj.bias,
            modulation.gate_BD,
            attention_BTA=attention_BSHK.flatten(2),
        )


class FinalLayer(nn.Module):
    """Modulated norm and a linear to the channels of a video token."""

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__()
        self.modulation = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.linear = nn.Linear(config.hidden_size, config.in_channels)

    def modulate(self, vec_BD: Tensor) -> FinalModulation:
        return FinalModulation(*self.modulation(vec_BD).chunk(2, dim=-1))

    def forward(self, x_BND: Tensor, modulation: Tensor | FinalModulation) -> Tensor:
        if isinstance(modulation, Tensor):
            modulation = self.modulate(modulation)
        shift_BD, scale_BD = modulation
        return modulated_norm_linear(x_BND, shift_BD, scale_BD, self.linear.weight, self.linear.bias, eps=EPS)


@torch.no_grad()
def initialize_parameter(name: str, parameter: Tensor) -> None:
    """Give a parameter of an MMDiT, by its name in the model, the value that training from scratch begins with."""
    if name.endswith("qk_scale"):
        parameter.fill_(1)
    elif name.endswith("bias") or "modulation" in name or name.startswith(("cond_in", "final_layer")):
        parameter.zero_()
    else:
        nn.init.xavier_uniform_(parameter)


def sinusoids(time_B: Tensor) -> Tensor:
    """[cos | sin] of 1000 * time at 128 frequencies from 1 down to nearly 1/10000, float32 [B, 256]."""
    half = TIME_CHANNELS // 2
    exponents = torch.arange(half, dtype=torch.float32, device=time_B.device) / half
    angle = 1000 * time_B.float()[:, None] * 10000**-exponents
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


def recomputed(block: nn.Module) -> Callable[..., Any]:
    """`block`, keeping only its inputs for the backward. It draws no random numbers, so no generator state is saved."""
    return partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)


def _check_shape(name: str, tensor: Tensor, expected: tuple[int | str, ...], remedy: str) -> None:
    """`expected` has a letter where any size will do."""
    fits = len(expected) == tensor.ndim and all(
        isinstance(wanted, str) or size == wanted for size, wanted in zip(tensor.shape, expected, strict=True)
    )
    if not fits:
        raise UserError(f"{name} is {list(tensor.shape)}, expected [{', '.join(map(str, expected))}]: {remedy}")
