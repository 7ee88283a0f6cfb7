"""Cases of the diffusion transformer's ops: the sequences of the three stages through the released model's widths.

Shapes  B batch, T tokens of a stream, S tokens of all, D channels, H heads, K head channels, M hidden channels, O out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from opensora_fast.kernels import attention as attention_op
from opensora_fast.kernels import gated_linear as gated_linear_op
from opensora_fast.kernels import gated_residual as gated_residual_op
from opensora_fast.kernels import gelu as gelu_op
from opensora_fast.kernels import lse_merge as lse_merge_op
from opensora_fast.kernels import modulated_norm as modulated_norm_op
from opensora_fast.kernels import qk_norm_rope as qk_norm_rope_op
from opensora_fast.kernels.cost import Cost
from opensora_fast.profiling.case import Case, Input, Size, by_name
from opensora_fast.resolutions import area
from opensora_fast.train.recipes import STAGE1_BUCKETS

BF16, FP32 = torch.bfloat16, torch.float32
TEXT_TOKENS = 512
PATCH_PIXELS = (8 * 2) ** 2  # one token: the autoencoder halves each side three times, the patch once more
RANKS = 4  # that share a clip in stage 3, each with a quarter of its text and of its video
EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What a transformer is given at once: `text` tokens, then `video` tokens, in each of `batch` sequences."""

    stage: str
    batch: int
    text: int
    video: int

    @property
    def all(self) -> int:
        return self.text + self.video


def _video_tokens(resolution: str, frames: int) -> int:
    return ((frames - 1) // 4 + 1) * area(resolution) // PATCH_PIXELS


def sequences(size: Size) -> list[Tokens]:
    """The longest clips and the images of stages 1 and 2, and one rank's part of the longest clip of stage 3."""
    clips = Tokens(
        stage="256px clips",
        batch=STAGE1_BUCKETS["256px"][129][1],
        text=TEXT_TOKENS,
        video=_video_tokens("256px", 129),
    )
    images = Tokens(
        stage="256px images", batch=STAGE1_BUCKETS["256px"][1][1], text=TEXT_TOKENS, video=_video_tokens("256px", 1)
    )
    rank = Tokens(stage="768px rank", batch=1, text=TEXT_TOKENS // RANKS, video=_video_tokens("768px", 129) // RANKS)
    return [
        Tokens(
            stage=of.stage,
            batch=of.batch,
            text=max(1, of.text // size.divide_tokens),
            video=max(1, of.video // size.divide_tokens),
        )
        for of in (clips, images, rank)
    ]


def _each(size: Size) -> Iterator[tuple[Tokens, torch.dtype]]:
    """bfloat16 for every stage, float32 for the first."""
    first, *others = sequences(size)
    yield from ((first, BF16), (first, FP32), *((tokens, BF16) for tokens in others))


def _lengths(tokens: Tokens) -> Iterator[tuple[int, bool]]:
    """(tokens, whether to time them): all together as in the single blocks, and each stream as in the double ones."""
    yield from ((tokens.all, True), (tokens.text, False), (tokens.video, False))


def _rows(dtype: torch.dtype, B: int, T: int, D: int) -> Input:
    return Input(shape=(B, T, D), dtype=dtype)


def _vector(dtype: torch.dtype, B: int, D: int, chunks: int = 3) -> Input:
    """One of the modulation's chunks: rows of a wider buffer."""
    return Input(shape=(B, D), dtype=dtype, fill="modulation", strides=(chunks * D, 1))


def _linear(dtype: torch.dtype, out: int, width: int) -> dict[str, Input]:
    return {
        "weight": Input(shape=(out, width), dtype=dtype, fill="weight"),
        "bias": Input(shape=(out,), dtype=dtype, fill="modulation"),
    }


def _case(op: Any, name: str, inputs: dict[str, Input], **of: Any) -> Case:
    first = next(iter(inputs.values()))
    return Case(
        op=op.__name__.rsplit(".", 1)[-1],
        name=name,
        dtype=first.dtype,
        preset=first.dtype == BF16,
        inputs=inputs,
        backend=partial(op.selected, first.shape, first.dtype),
        **of,
    )


# Modulated norm.


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale[:, None]) + shift[:, None]


def _modulated_linear(x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(_modulated(x, shift, scale), weight, bias)


def _liger_layer_norm() -> Callable[..., Tensor]:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return lambda x, shift, scale: LigerLayerNormFunction.apply(x, 1 + scale[0], shift[0], EPS)


def modulated_norm(size: Size) -> list[Case]:
    cases = []
    op, D = modulated_norm_op, size.model().hidden_size
    for tokens, dtype in _each(size):
        for T, timed in _lengths(tokens):
            inputs = {"x": _rows(dtype, tokens.batch, T, D)}
            inputs |= {name: _vector(dtype, tokens.batch, D) for name in ("shift", "scale")}
            cases.append(
                _case(
                    op,
                    f"modulated_norm {tokens.stage}",
                    inputs,
                    function=by_name(op.modulated_norm, list(inputs), eps=EPS),
                    composite=_modulated,
                    cost=partial(op.cost, inputs["x"].shape, dtype),
                    baselines={"liger": _liger_layer_norm} if tokens.batch == 1 else {},
                    timed=timed,
                )
            )
    model = size.model(linear=True)
    D, out = model.hidden_size, 3 * model.hidden_size + model.mlp_size  # the single blocks' joint projection
    for tokens in sequences(size):
        inputs = {"x": _rows(BF16, tokens.batch, tokens.all, D)}
        inputs |= {name: _vector(BF16, tokens.batch, D) for name in ("shift", "scale")} | _linear(BF16, out, D)
        cases.append(
            _case(
                op,
                f"modulated_norm_linear {tokens.stage}",
                inputs,
                function=by_name(op.modulated_norm_linear, list(inputs), eps=EPS),
                composite=_modulated_linear,
                cost=partial(op.cost, inputs["x"].shape, BF16, out_features=out),
                matrix=True,
            )
        )
    return cases


# Gated residual, alone and with the norm that follows it.


def _gated(x: Tensor, h: Tensor, gate: Tensor) -> Tensor:
    return x + gate[:, None] * h


def _gated_modulated(x: Tensor, h: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    x_new = _gated(x, h, gate)
    return x_new, _modulated(x_new, shift, scale)


def _gated_modulated_linear(
    x: Tensor, h: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    x_new, y = _gated_modulated(x, h, gate, shift, scale)
    return x_new, F.linear(y, weight, bias)


def gated_residual(size: Size) -> list[Case]:
    cases = []
    op, D = gated_residual_op, size.model().hidden_size
    for tokens, dtype in _each(size):
        for T, timed in _lengths(tokens):
            inputs = {name: _rows(dtype, tokens.batch, T, D) for name in ("x", "h")}
            inputs["gate"] = _vector(dtype, tokens.batch, D)
            shape = inputs["x"].shape
            cases.append(
                _case(
                    op,
                    f"gated_residual {tokens.stage}",
                    inputs,
                    function=by_name(op.gated_residual, list(inputs)),
                    composite=_gated,
                    cost=partial(op.cost, shape, dtype),
                    timed=timed,
                )
            )
            inputs = inputs | {name: _vector(dtype, tokens.batch, D) for name in ("shift", "scale")}
            cases.append(
                _case(
                    op,
                    f"gated_residual_modulated_norm {tokens.stage}",
                    inputs,
                    function=by_name(op.gated_residual_modulated_norm, list(inputs), eps=EPS),
                    composite=_gated_modulated,
                    cost=partial(op.cost, shape, dtype, norm=True),
                    timed=timed,
                )
            )
    model = size.model(linear=True)
    D, M = model.hidden_size, model.mlp_size  # the double blocks' MLP, video stream
    for tokens in sequences(size):
        inputs = {name: _rows(BF16, tokens.batch, tokens.video, D) for name in ("x", "h")}
        inputs |= {name: _vector(BF16, tokens.batch, D) for name in ("gate", "shift", "scale")} | _linear(BF16, M, D)
        cases.append(
            _case(
                op,
                f"gated_residual_modulated_norm_linear {tokens.stage}",
                inputs,
                function=by_name(op.gated_residual_modulated_norm_linear, list(inputs), eps=EPS),
                composite=_gated_modulated_linear,
                cost=partial(op.cost, inputs["x"].shape, BF16, norm=True, out_features=M),
                matrix=True,
            )
        )
    return cases


# Norm and rotation of queries and keys, and attention.


def _rotated(x_BSHK: Tensor, cos_SK2: Tensor, sin_SK2: Tensor) -> Tensor:
    wide = torch.promote_types(x_BSHK.dtype, torch.float32)
    a, b = x_BSHK.to(wide).chunk(2, dim=-1)
    cos, sin = cos_SK2[:, None], sin_SK2[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x_BSHK.dtype)


def _head_norm(x: Tensor, scale_K: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], scale_K, EPS)


def _norm_rope(qkv: Tensor, q_scale: Tensor, k_scale: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    q, k = (_head_norm(qkv[:, :, index], scale) for index, scale in enumerate((q_scale, k_scale)))
    return _rotated(q, cos, sin), _rotated(k, cos, sin)


def _joint_norm_rope(
    txt_qkv: Tensor,
    img_qkv: Tensor,
    txt_q_scale: Tensor,
    txt_k_scale: Tensor,
    img_q_scale: Tensor,
    img_k_scale: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.cat([_head_norm(txt_qkv[:, :, 0], txt_q_scale), _head_norm(img_qkv[:, :, 0], img_q_scale)], dim=1)
    k = torch.cat([_head_norm(txt_qkv[:, :, 1], txt_k_scale), _head_norm(img_qkv[:, :, 1], img_k_scale)], dim=1)
    v = torch.cat([txt_qkv[:, :, 2], img_qkv[:, :, 2]], dim=1)
    return _rotated(q, cos, sin), _rotated(k, cos, sin), v


def _grouped(composite: Callable[..., Sequence[Tensor]], groups: int, **inputs: Tensor) -> list[Tensor]:
    """The layout of an exchange over heads: [groups, B, S, H / groups, K]."""
    if groups == 1:
        return list(composite(**inputs))
    split = [x.unflatten(2, (groups, -1)).permute(2, 0, 1, 3, 4) for x in composite(**inputs)]
    return [x.contiguous() for x in split]


def _liger_norm_rope() -> Callable[..., list[Tensor]]:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction

    def norm(x: Tensor, scale: Tensor) -> Tensor:
        return LigerRMSNormFunction.apply(x, scale, EPS, 0.0, "none", False)

    def call(qkv: Tensor, q_scale: Tensor, k_scale: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
        q, k = (norm(x, scale).transpose(1, 2) for x, scale in ((qkv[:, :, 0], q_scale), (qkv[:, :, 1], k_scale)))
        doubled = [torch.cat([table, table], dim=-1)[None] for table in (cos, sin)]
        return [x.transpose(1, 2) for x in LigerRopeFunction.apply(q, k, *doubled)]

    return call


def _joint_inputs(tokens: Tokens, dtype: torch.dtype, H: int, K: int) -> dict[str, Input]:
    inputs = {
        name: Input(shape=(tokens.batch, T, 3, H, K), dtype=dtype)
        for name, T in (("txt_qkv", tokens.text), ("img_qkv", tokens.video))
    }
    names = ("txt_q_scale", "txt_k_scale", "img_q_scale", "img_k_scale")
    inputs |= {name: Input(shape=(K,), dtype=dtype, fill="around_one") for name in names}
    return inputs | _tables(tokens, K)


def _single_inputs(tokens: Tokens, dtype: torch.dtype, H: int, K: int, M: int) -> dict[str, Input]:
    row = 3 * H * K + M  # of the single blocks' joint projection
    strides = (tokens.all * row, row, H * K, K, 1)
    inputs = {"qkv": Input(shape=(tokens.batch, tokens.all, 3, H, K), dtype=dtype, strides=strides)}
    inputs |= {name: Input(shape=(K,), dtype=dtype, fill="around_one") for name in ("q_scale", "k_scale")}
    return inputs | _tables(tokens, K)


def _tables(tokens: Tokens, K: int) -> dict[str, Input]:
    return {
        name: Input(shape=(tokens.all, K // 2), dtype=FP32, fill=fill, gradient=False)
        for name, fill in (("cos", "cosine"), ("sin", "sine"))
    }


def qk_norm_rope(size: Size) -> list[Case]:
    cases = []
    op, model = qk_norm_rope_op, size.model()
    H, K, M = model.num_heads, model.head_dim, model.mlp_size
    for tokens, dtype in _each(size):
        groups = [1, RANKS] if tokens.stage == "768px rank" and H % RANKS == 0 else [1]
        for G in groups:
            layout = "" if G == 1 else f" for {G} ranks"
            inputs = _joint_inputs(tokens, dtype, H, K)
            cases.append(
                _case(
                    op,
                    f"joint_qk_norm_rope {tokens.stage}{layout}",
                    inputs,
                    function=by_name(op.joint_qk_norm_rope, list(inputs), eps=EPS, head_groups=G),
                    composite=partial(_grouped, _joint_norm_rope, G),
                    cost=partial(op.cost, tokens.batch, tokens.all, H, K, dtype, with_v=True, streams=2),
                )
            )
            inputs = _single_inputs(tokens, dtype, H, K, M)
            cases.append(
                _case(
                    op,
                    f"qk_norm_rope {tokens.stage}{layout}",
                    inputs,
                    function=by_name(op.qk_norm_rope, list(inputs), eps=EPS, head_groups=G),
                    composite=partial(_grouped, _norm_rope, G),
                    cost=partial(op.cost, tokens.batch, tokens.all, H, K, dtype, with_v=False),
                    baselines={"liger": _liger_norm_rope} if G == 1 else {},
                )
            )
    return cases


def _attended(**inputs: Tensor) -> Tensor:
    return _attention(*_joint_norm_rope(**inputs))


def _single_attended(qkv: Tensor, **inputs: Tensor) -> Tensor:
    q, k = _norm_rope(qkv, **inputs)
    return _attention(q, k, qkv[:, :, 2])


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, S, H, K] each."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()


def _pinned_to_cudnn(composite: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The eager form with cuDNN's attention, which PyTorch's own order does not take."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def call(**inputs: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return composite(**inputs)

    return call


CANDIDATES = ("flash", "triton", "gluon")  # of attention on a GPU, beside cuDNN


def _products(size: Size) -> list[tuple[str, tuple[int, int, int, int]]]:
    """(stage, [B, S, H, K]) of attention alone; of a clip on several ranks all tokens, with a part of the heads."""
    model = size.model()
    clips, images, rank = sequences(size)
    large = Tokens(
        stage="768px images",
        batch=STAGE1_BUCKETS["768px"][1][1],
        text=images.text,
        video=max(1, _video_tokens("768px", 1) // size.divide_tokens),
    )
    shapes = [(of.stage, (of.batch, of.all, model.num_heads, model.head_dim)) for of in (clips, images, large)]
    gathered = (1, RANKS * rank.all, max(1, model.num_heads // RANKS), model.head_dim)
    return [*shapes, (f"768px clip, heads of one of {RANKS} ranks", gathered)]


def _attention_case(
    name: str,
    shape: tuple[int, int, int, int],
    function: Callable[..., Tensor],
    composite: Callable[..., Tensor],
    inputs: Any,
) -> Case:
    """shape: [B, S, H, K] of all streams together."""
    return Case(
        op="attention",
        name=name,
        dtype=BF16,
        inputs=inputs,
        function=function,
        composite=composite,
        cost=partial(attention_op.cost, *shape, BF16),
        backend=partial(attention_op.selected, shape, BF16),
        matrix=True,
        baselines={"cudnn": partial(_pinned_to_cudnn, composite)},
        candidates=CANDIDATES,
        exact=torch.float32,  # in float64 PyTorch would write out the scores
    )


def _alone(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention_op.attention(q, k, v)[0]


def attention(size: Size) -> list[Case]:
    """Alone, without a gradient of the log-sum-exp, and with norm and rotation as the blocks call it."""
    cases = []
    op, model = attention_op, size.model()
    H, K, M = model.num_heads, model.head_dim, model.mlp_size
    for stage, shape in _products(size):
        inputs = {name: Input(shape=shape, dtype=BF16) for name in ("q", "k", "v")}
        cases.append(_attention_case(f"attention {stage}", shape, _alone, _attention, inputs))
    for tokens in sequences(size):
        forms: list[tuple[str, Any, Any, dict[str, Input]]] = [
            ("rope_attention", op.rope_attention, _attended, _joint_inputs(tokens, BF16, H, K)),
            (
                "single_rope_attention",
                op.single_rope_attention,
                _single_attended,
                _single_inputs(tokens, BF16, H, K, M),
            ),
        ]
        for name, function, composite, inputs in forms:
            call = by_name(function, list(inputs), eps=EPS)
            shape = (tokens.batch, tokens.all, H, K)
            cases.append(_attention_case(f"{name} {tokens.stage}", shape, call, composite, inputs))
    return cases


# The sum of a ring's blocks.


def _merged(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    share = torch.sigmoid(lse_b - lse_a).transpose(1, 2)[..., None]
    return out_a + share * (out_b.to(out_a.dtype) - out_a), torch.logaddexp(lse_a, lse_b)


def lse_merge(size: Size) -> list[Case]:
    op, model = lse_merge_op, size.model()
    B, S, H, K = shape = (1, sequences(size)[-1].all, model.num_heads, model.head_dim)
    lse = Input(shape=(B, H, S), dtype=FP32, gradient=False)
    inputs = {
        "out_a": Input(shape=shape, dtype=FP32, gradient=False),
        "lse_a": lse,
        "out_b": Input(shape=shape, dtype=BF16, gradient=False),
        "lse_b": lse,
    }
    return [
        Case(
            op="lse_merge",
            name="lse_merge 768px rank",
            dtype=BF16,
            inputs=inputs,
            function=by_name(op.lse_merge, list(inputs)),
            composite=_merged,
            cost=partial(op.cost, *shape, BF16),
            backend=partial(op.selected, shape, BF16),
            modes=("forward",),
        )
    ]


# GELU, alone and with the projection that follows it.


def _gelu(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias, approximate="tanh")


def _gelu_linear(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(F.gelu(h, approximate="tanh"), weight, bias)


def _attention_gelu_linear(attention: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(torch.cat([attention, F.gelu(hidden, approximate="tanh")], dim=-1), weight, bias)


def gelu(size: Size) -> list[Case]:
    cases = []
    op, M = gelu_op, size.model().mlp_size
    for tokens, dtype in _each(size):
        inputs = {
            "x": _rows(dtype, tokens.batch, tokens.all, M),
            "bias": Input(shape=(M,), dtype=dtype, fill="modulation"),
        }
        cases.append(
            _case(
                op,
                f"gelu_tanh {tokens.stage}",
                inputs,
                function=by_name(op.gelu_tanh, list(inputs)),
                composite=_gelu,
                cost=partial(op.cost, tokens.batch * tokens.all, M, dtype, bias=True),
            )
        )
    model = size.model(linear=True)
    D, M = model.hidden_size, model.mlp_size
    for tokens, single in product(sequences(size), (False, True)):
        T = tokens.all if single else tokens.video
        function: Callable[..., Tensor]
        composite: Callable[..., Tensor]
        if single:
            row = 3 * D + M
            hidden = Input(shape=(tokens.batch, tokens.all, M), dtype=BF16, strides=(tokens.all * row, row, 1))
            inputs = {"attention": _rows(BF16, tokens.batch, tokens.all, D), "hidden": hidden} | _linear(BF16, D, D + M)
            function, composite, name = op.attention_gelu_linear, _attention_gelu_linear, "attention_gelu_linear"
        else:
            inputs = {"h": _rows(BF16, tokens.batch, tokens.video, M)} | _linear(BF16, D, M)
            function, composite, name = op.gelu_linear, _gelu_linear, "gelu_linear"
        cases.append(
            _case(
                op,
                f"{name} {tokens.stage}",
                inputs,
                function=by_name(function, list(inputs)),
                composite=composite,
                cost=partial(op.linear_cost, tokens.batch * T, M, D, BF16, D=D if single else 0),
                matrix=True,
            )
        )
    return cases


# The same projection with the residual that follows it.


def _gated_linear(x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, gate: Tensor) -> Tensor:
    return _gated(x, _gelu_linear(hidden, weight, bias), gate)


def _attention_gated_linear(
    x: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, attention: Tensor
) -> Tensor:
    return _gated(x, _attention_gelu_linear(attention, hidden, weight, bias), gate)


def _op_gated_linear(attention: Tensor | None = None, **inputs: Tensor) -> Tensor:
    names = ("x", "hidden", "weight", "bias", "gate")
    call = gated_linear_op.gelu_linear_gated_residual
    return call(*(inputs[name] for name in names), attention_BTA=attention)


def _gated_linear_cost(B: int, T: int, D: int, M: int, A: int, mode: str) -> Cost:
    """The products and their inputs, and the residual; or, in the backward that drops the branch, the sums over G."""
    parts = [gelu_op.linear_cost(B * T, M, D, BF16, mode, D=A)]
    if mode == "backward" and gated_linear_op.drops_branch(B, T)[0]:
        parts.append(gated_linear_op.cost(B, D, A + M, BF16))
    else:
        parts.append(gated_residual_op.cost((B, T, D), BF16, mode))
    return Cost(flops=sum(part.flops for part in parts), bytes=sum(part.bytes for part in parts))


def gated_linear(size: Size) -> list[Case]:
    cases = []
    op, model = gated_linear_op, size.model(linear=True)
    D, M = model.hidden_size, model.mlp_size
    for tokens, single in product(sequences(size), (False, True)):
        B, T, A = tokens.batch, tokens.all if single else tokens.video, D if single else 0
        row = 3 * D + M
        inputs = {
            "x": _rows(BF16, B, T, D),
            "hidden": Input(shape=(B, T, M), dtype=BF16, strides=(T * row, row, 1) if single else None),
            **_linear(BF16, D, A + M),
            "gate": _vector(BF16, B, D),
        }
        if single:
            inputs["attention"] = _rows(BF16, B, T, D)
        cases.append(
            _case(
                op,
                f"gelu_linear_gated_residual {tokens.stage}, {'single' if single else 'double'} block",
                inputs,
                function=_op_gated_linear,
                composite=_attention_gated_linear if single else _gated_linear,
                cost=partial(_gated_linear_cost, B, T, D, M, A),
                matrix=True,
            )
        )
    return cases
