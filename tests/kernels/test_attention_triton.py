"""Attention in Triton against float64 and the same formula in the dtype of its inputs: both forms, both ways."""

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from opensora_fast.kernels import attention_triton as op
from opensora_fast.kernels import launch
from opensora_fast.kernels.attention_triton import Tile, Tiles
from opensora_fast.kernels.qk_norm_rope import qk_norm_rope_reference

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(bool(launch.missing("cuda")), reason=launch.missing("cuda"))

# Rows and columns that divide one another in no kernel, and several tiles of every short sequence.
SMALL = Tiles(
    forward=Tile(32, 16, 4, 1), queries=Tile(16, 32, 4, 1), keys=Tile(64, 16, 4, 1), prepare=Tile(16, 0, 4, 1)
)
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype).removeprefix("torch.")
)


@pytest.fixture(autouse=True)
def _runs_here(device):
    if reason := launch.missing(device.type):
        pytest.skip(reason)


def attend(q, k, v, scale):
    """The formula, in the dtype of its inputs; lse in float32 at least."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) * scale
    out = scores.softmax(dim=-1) @ v
    return out.transpose(1, 2), scores.to(torch.promote_types(scores.dtype, torch.float32)).logsumexp(dim=-1)


def differentiated(function, inputs, gradients, dtype):
    """Outputs of the function and the inputs' gradients, all computed in `dtype`."""
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    outputs = function(*leaves)
    used = [(out, gradient.to(out.dtype)) for out, gradient in zip(outputs, gradients, strict=True) if out.numel()]
    d_leaves = torch.autograd.grad([out for out, _ in used], leaves, [gradient for _, gradient in used])
    return [*(out.detach() for out in outputs), *d_leaves]


def random(*shape, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(device, dtype)


def qkv_of(B, S, T, H, K, dtype, device):
    """q, k, v as parts of wider projections."""
    q = random(B, S, 3, H, K, dtype=dtype, device=device)[:, :, 0]
    k, v = random(B, T, 3, H, K, dtype=dtype, device=device, seed=1).unbind(2)[1:]
    return q, k, v


def check_attention(assert_as_exact, q, k, v, *, tiles, scale=None, dlse=True):
    """out, lse and all gradients; `same` has the roundings of q's dtype, and lse those of float32."""
    B, S, H, K = q.shape
    dtype, device = q.dtype, q.device
    scale = scale or K**-0.5
    wide = torch.promote_types(dtype, torch.float32)
    dout = random(B, H, S, K, dtype=dtype, device=device, seed=2).transpose(1, 2)
    d_lse = random(B, S, H, dtype=wide, device=device, seed=3).transpose(1, 2) * dlse
    out, lse = op.attention_forward(q, k, v, scale, tiles=tiles)
    ours = [out, lse, *op.attention_backward(dout, q, k, v, out, lse, scale, dlse=d_lse if dlse else None, tiles=tiles)]

    def run(dtype):
        return differentiated(lambda *x: attend(*x, scale), (q, k, v), (dout, d_lse), dtype)

    exact, same = run(torch.float64), run(dtype)
    same[1] = run(wide)[1]
    for name, *results in zip(("out", "lse", "dq", "dk", "dv"), ours, same, exact, strict=True):
        assert_as_exact(name, *results)


# S and T that fill tiles of 128 with 0, 1, 64 and 127 left; heads of every kind of channels.
SHAPES = {
    "whole": (1, 128, 256, 1, 64),
    "one-over": (1, 129, 65, 1, 128),
    "half": (1, 192, 129, 1, 96),
    "one-short": (1, 255, 128, 1, 36),
    "one-query": (2, 1, 7, 2, 16),
    "few": (2, 5, 40, 3, 48),
}


def dtypes_of(shapes, each):
    """Every shape in bfloat16, those named in `each` in float16 too, and in float32, which is slow for the others."""
    return [
        pytest.param(
            shape,
            dtype,
            id=f"{name}-{str(dtype).removeprefix('torch.')}",
            marks=[pytest.mark.slow] * (dtype == torch.float32 and name not in each),
        )
        for name, shape in shapes.items()
        for dtype in (torch.float32, torch.bfloat16, *[torch.float16] * (name in each))
    ]


@pytest.mark.parametrize(("shape", "dtype"), dtypes_of(SHAPES, {"one-over", "few"}))
def test_is_as_exact_as_pytorch(shape, dtype, device, assert_as_exact) -> None:
    check_attention(assert_as_exact, *qkv_of(*shape, dtype, device), tiles=SMALL)


@pytest.mark.parametrize("K", [64, 128])
def test_with_the_tiles_of_a_gpu(K, device, assert_as_exact) -> None:
    check_attention(assert_as_exact, *qkv_of(1, 191, 257, 1, K, torch.bfloat16, device), tiles=None, dlse=False)


ADVERSARIES = {
    "large-logits": lambda q, k, v: (20 * q, k, v),
    "equal-keys": lambda q, k, v: (q, k[:, :1].expand_as(k).clone(), v),
    "equal-rows": lambda q, k, v: tuple(x[:, :1].expand_as(x).clone() for x in (q, k, v)),
    # exp(lse) is infinite in float32, or 0; in the second case 2^-lse would be what a missing key or query adds.
    "lse-above": lambda q, k, v: (q.abs() + 4, k.abs() + 4, v),
    "lse-below": lambda q, k, v: (q.abs() + 4, -k.abs() - 4, v),
    "one-key-counts": lambda q, k, v: (q, torch.cat((k[:, :-1], 40 * q[:, :1].sign()), dim=1), v),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("change", ADVERSARIES.values(), ids=ADVERSARIES)
def test_is_as_exact_on_adversarial_inputs(change, dtype, device, assert_as_exact) -> None:
    q, k, v = change(*qkv_of(1, 37, 45, 1, 64, dtype, device))
    check_attention(assert_as_exact, q, k, v, tiles=SMALL)


@pytest.mark.parametrize("change", ADVERSARIES.values(), ids=ADVERSARIES)
def test_float32_errs_by_roundings_of_lse(change, device) -> None:
    """P is made again from lse: its error is a few roundings of lse, which the formula with softmax does not have."""
    q, k, v = change(*qkv_of(1, 37, 45, 1, 64, torch.float32, device))
    dout = random(1, 37, 1, 64, dtype=q.dtype, device=device, seed=2)
    out, lse = op.attention_forward(q, k, v, 0.125, tiles=SMALL)
    ours = [out, lse, *op.attention_backward(dout, q, k, v, out, lse, 0.125, tiles=SMALL)]
    run = functools.partial(differentiated, lambda *x: attend(*x, 0.125), (q, k, v), (dout, 0 * lse))
    rounding = torch.finfo(torch.float32).eps * max(1, float(lse.abs().max()))
    for mine, same, exact in zip(ours, run(torch.float32), run(torch.float64), strict=True):
        size = max(1, float(exact.abs().max()))  # of the terms of a gradient, where they cancel
        allowed = 2 * (same.double() - exact).abs().max() + rounding * size
        assert (mine.double() - exact).abs().max() <= allowed


def test_logits_near_the_end_of_float32(device) -> None:
    """q k^T up to 2e38: the one key that counts has all of P, and nothing is NaN."""
    q = torch.full((1, 3, 1, 64), 1.25e18, device=device)
    k = torch.stack([q[:, 0] * weight for weight in (0.5, 2.0, -2.0, 1.0)], dim=1)
    v = random(1, 4, 1, 64, dtype=torch.float32, device=device)
    out, lse = op.attention_forward(q, k, v, 1.0, tiles=SMALL)
    assert torch.equal(out, v[:, 1:2].expand_as(out))
    torch.testing.assert_close(lse, torch.full_like(lse, 64 * 2 * 1.25e18**2), rtol=1e-6, atol=0)


def test_another_scale(device, assert_as_exact) -> None:
    q, k, v = qkv_of(1, 20, 33, 2, 32, torch.float32, device)
    check_attention(assert_as_exact, q, k, v, tiles=SMALL, scale=0.5)
    with pytest.raises(ValueError, match="scale is -0.5; .* negate q"):
        op.attention_forward(q, k, v, -0.5)


@pytest.mark.parametrize("layout", ["heads-first", "expanded", "channels-apart", "float32"])
def test_takes_dout_of_any_layout(layout, device) -> None:
    q, k, v = qkv_of(2, 9, 5, 2, 32, torch.bfloat16, device)
    out, lse = op.attention_forward(q, k, v, 0.2, tiles=SMALL)
    dout = {
        "heads-first": lambda: random(2, 2, 9, 32, dtype=q.dtype, device=device).transpose(1, 2),
        "expanded": lambda: random(1, 1, 1, 1, dtype=q.dtype, device=device).expand_as(out),
        "channels-apart": lambda: random(2, 9, 32, 2, dtype=q.dtype, device=device).transpose(2, 3),
        "float32": lambda: random(2, 9, 2, 32, dtype=q.dtype, device=device).float(),
    }[layout]()
    ours = op.attention_backward(dout, q, k, v, out, lse, 0.2, tiles=SMALL)
    plain = op.attention_backward(dout.to(q.dtype).contiguous(), q, k, v, out, lse, 0.2, tiles=SMALL)
    assert all(map(torch.equal, ours, plain))


@pytest.mark.parametrize(("S", "stride"), [(3, 2**30), (18, 2**27)], ids=["within-a-tile", "between-tiles"])
def test_tokens_beyond_2_31_elements(S, stride, device) -> None:
    """Of memory that is set aside only where it is written."""
    if device.type != "cpu":
        pytest.skip("would take the memory")
    flat = torch.from_numpy(np.empty((S - 1) * stride + 128, dtype=np.int16)).view(torch.bfloat16)
    apart = [flat[slot * 32 :].as_strided((1, S, 1, 32), (0, stride, 32, 1)) for slot in range(4)]
    for slot, x in enumerate(apart):
        x.copy_(random(1, S, 1, 32, dtype=x.dtype, device=device, seed=slot))

    def run(q, k, v, dout):
        out, lse = op.attention_forward(q, k, v, 0.2, tiles=SMALL)
        return [out, lse, *op.attention_backward(dout, q, k, v, out, lse, 0.2, tiles=SMALL)]

    assert all(map(torch.equal, run(*apart), run(*(x.contiguous() for x in apart))))


def test_wide_results_are_not_rounded(device) -> None:
    q, k, v = qkv_of(1, 21, 40, 2, 64, torch.bfloat16, device)
    dout = random(1, 21, 2, 64, dtype=q.dtype, device=device)
    (out, lse), (wide, wide_lse) = (
        op.attention_forward(q, k, v, 0.1, wide=wide, tiles=SMALL) for wide in (False, True)
    )
    assert wide.dtype == torch.float32
    assert torch.equal(wide.to(q.dtype), out)
    assert torch.equal(wide_lse, lse)
    narrow, wide = (
        op.attention_backward(dout, q, k, v, out, lse, 0.1, wide=wide, tiles=SMALL) for wide in (False, True)
    )
    assert {x.dtype for x in wide} == {torch.float32}
    assert all(torch.equal(one.to(q.dtype), other) for one, other in zip(wide, narrow, strict=True))


def test_a_part_of_the_keys_gives_its_part_of_the_gradients(device) -> None:
    """From out and lse of the whole row: the parts' dq add up, dk and dv are the whole's."""
    q, k, v = qkv_of(1, 33, 50, 2, 32, torch.float64, device) if device.type == "cpu" else (None,) * 3
    if q is None:
        pytest.skip("float64 is for the interpreter")
    dout, dlse = random(1, 33, 2, 32, dtype=q.dtype, device=device), random(1, 2, 33, dtype=q.dtype, device=device)
    out, lse = op.attention_forward(q, k, v, 0.2, tiles=SMALL)
    whole = op.attention_backward(dout, q, k, v, out, lse, 0.2, dlse=dlse, tiles=SMALL)
    parts = [
        op.attention_backward(dout, q, k[:, some], v[:, some], out, lse, 0.2, dlse=dlse, tiles=SMALL)
        for some in (slice(0, 17), slice(17, None))
    ]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0])
    for slot in (1, 2):
        torch.testing.assert_close(torch.cat([part[slot] for part in parts], dim=1), whole[slot])


def test_of_one_key(device) -> None:
    """P is 1 whatever q and k are, and only dlse reaches them."""
    q, k, v = qkv_of(2, 3, 1, 2, 16, torch.float32, device)
    dout, dlse = random(2, 3, 2, 16, dtype=q.dtype, device=device), random(2, 2, 3, dtype=q.dtype, device=device)
    out, lse = op.attention_forward(q, k, v, 0.25)
    assert torch.equal(out, v.expand_as(out))
    torch.testing.assert_close(lse, torch.einsum("bshk,bthk->bhs", q, k) * 0.25)
    dq, dk, dv = op.attention_backward(dout, q, k, v, out, lse, 0.25, dlse=dlse)
    weight = 0.25 * dlse.transpose(1, 2)[..., None]
    torch.testing.assert_close(dq, weight * k, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dk, (weight * q).sum(dim=1, keepdim=True), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dv, dout.sum(dim=1, keepdim=True), rtol=1e-5, atol=1e-5)


def test_without_keys_queries_or_batch(device) -> None:
    for B, S, T in ((2, 5, 0), (2, 0, 5), (0, 3, 4), (1, 0, 0)):
        q, k, v = qkv_of(B, S, T, 2, 32, torch.bfloat16, device)
        out, lse = op.attention_forward(q, k, v, 0.2)
        assert torch.equal(out, torch.zeros_like(q))
        assert torch.equal(lse, torch.full((B, 2, S), float("-inf"), device=device))
        gradients = op.attention_backward(torch.ones_like(out), q, k, v, out, lse, 0.2)
        for x, gradient in zip((q, k, v), gradients, strict=True):
            assert torch.equal(gradient, torch.zeros_like(x))


def test_a_row_without_keys_has_no_gradient(device) -> None:
    """As a rank has it whose keys are not all of a row's: lse is -inf and there are keys all the same."""
    q, k, v = qkv_of(1, 3, 20, 1, 32, torch.float32, device)
    out, lse = op.attention_forward(q, k, v, 0.2)
    lse[..., 1] = float("-inf")
    dq, dk, dv = op.attention_backward(torch.ones_like(out), q, k, v, out, lse, 0.2)
    assert torch.equal(dq[:, 1], torch.zeros_like(dq[:, 1]))
    rest = [0, 2]
    expected = op.attention_backward(torch.ones_like(out)[:, rest], q[:, rest], k, v, out[:, rest], lse[..., rest], 0.2)
    for ours, other in zip((dq[:, rest], dk, dv), expected, strict=True):
        torch.testing.assert_close(ours, other)


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        out, lse = op.attention_forward(q, k, v, 0.3, tiles=SMALL)
        ctx.save_for_backward(q, k, v, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        return op.attention_backward(dout, *ctx.saved_tensors, 0.3, dlse=dlse, tiles=SMALL)


class RopeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, cos, sin, *inputs):
        streams, scales = inputs[:2], inputs[2:]
        out, lse = op.rope_attention_forward(streams, pairs(scales), cos, sin, 1e-6, tiles=SMALL)
        ctx.save_for_backward(cos, sin, out, lse, *inputs)
        return out

    @staticmethod
    def backward(ctx, dout):
        cos, sin, out, lse, *inputs = ctx.saved_tensors
        d_streams, d_scales = op.rope_attention_backward(
            dout, inputs[:2], pairs(inputs[2:]), cos, sin, out, lse, 1e-6, tiles=SMALL
        )
        return None, None, *d_streams, *(d_scale for pair in d_scales for d_scale in pair)


def test_gradients_by_differences(device) -> None:
    if device.type != "cpu":
        pytest.skip("float64 is for the interpreter")
    leaves = [x.clone().requires_grad_() for x in qkv_of(1, 3, 2, 1, 16, torch.float64, device)]
    assert torch.autograd.gradcheck(Attention.apply, leaves, fast_mode=True)
    streams, scales, cos, sin = rope_inputs(1, (1, 2), 1, 16, torch.float64, device)
    leaves = [x.clone().requires_grad_() for x in (*streams, *scales)]
    assert torch.autograd.gradcheck(RopeAttention.apply, (cos, sin, *leaves), fast_mode=True)


# With norm and rotation.


def pairs(scales):
    return list(zip(scales[::2], scales[1::2], strict=True))


def rope_inputs(B, tokens, H, K, dtype, device, table_batch=False):
    """Streams, flat scales, cos, sin."""
    wide = torch.promote_types(dtype, torch.float32)
    streams = [random(B, T, 3, H, K, dtype=dtype, device=device, seed=i) for i, T in enumerate(tokens)]
    scales = [
        (1 + 0.2 * random(K, dtype=torch.float64, device=device, seed=i)).to(dtype) for i in range(2 * len(tokens))
    ]
    angles = 3 * random(*[B] * table_batch, sum(tokens), K // 2, dtype=torch.float64, device=device)
    return streams, scales, angles.cos().to(wide), angles.sin().to(wide)


def chain(streams, scales, cos, sin, eps=1e-6):
    """out and lse, one step after the other, each in the dtype of its inputs but for the tables'."""
    cos, sin = (table[..., None, None, :] for table in (cos, sin))
    normed = []
    for qkv, pair in zip(streams, pairs(scales), strict=True):
        wide = qkv[:, :, :2].to(cos.dtype)
        norm = (wide * (wide.square().mean(dim=-1, keepdim=True) + eps).rsqrt()).to(qkv.dtype)
        normed.append(norm * torch.stack(pair)[:, None])
    first, second = torch.cat(normed, dim=1).to(cos.dtype).chunk(2, dim=-1)
    q, k = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(streams[0].dtype).unbind(2)
    return attend(q, k, torch.cat([qkv[:, :, 2] for qkv in streams], dim=1), q.shape[-1] ** -0.5)


# B, tokens of each stream, H, K, whether the tables have a batch.
ROPE_SHAPES = {
    "joint": (2, (17, 33), 1, 64, True),
    "single": (1, (97,), 1, 128, False),
    "odd-head": (1, (32, 33), 1, 36, False),
    "wide-head": (1, (5, 64), 1, 96, False),
    "no-text": (1, (0, 40), 2, 48, False),
    "one-each": (2, (1, 1), 3, 16, True),
}


@pytest.mark.parametrize(("shape", "dtype"), dtypes_of(ROPE_SHAPES, {"joint"}))
def test_rope_attention_is_as_exact_as_pytorch(shape, dtype, device, assert_as_exact) -> None:
    check_rope_attention(assert_as_exact, *rope_inputs(*shape[:-1], dtype, device, shape[-1]))


@pytest.mark.parametrize("tokens", [(20,), (5, 20)], ids=["one-stream", "two-streams"])
def test_keys_past_the_end_add_nothing_to_the_gradient_of_their_scale(tokens, device, assert_as_exact) -> None:
    """Where lse is below -88, 2^-lse is infinite, which is P of such a key."""
    streams, _, cos, sin = rope_inputs(1, tokens, 1, 32, torch.bfloat16, device)
    streams = [1 + 0.05 * stream for stream in streams]
    scales = [torch.full((32,), scale, dtype=torch.bfloat16, device=device) for scale in (6, -6)] * len(tokens)
    check_rope_attention(assert_as_exact, streams, scales, torch.ones_like(cos), torch.zeros_like(sin))


def check_rope_attention(assert_as_exact, streams, scales, cos, sin):
    """out and all gradients."""
    B, _, _, H, K = streams[0].shape
    dtype = streams[0].dtype
    tokens = sum(stream.shape[1] for stream in streams)
    dout = random(B, H, tokens, K, dtype=dtype, device=cos.device, seed=9).transpose(1, 2)
    out, lse = op.rope_attention_forward(streams, pairs(scales), cos, sin, 1e-6, tiles=SMALL)
    d_streams, d_scales = op.rope_attention_backward(
        dout, streams, pairs(scales), cos, sin, out, lse, 1e-6, tiles=SMALL
    )
    ours = [out, *d_streams, *(d_scale for pair in d_scales for d_scale in pair)]

    def run(dtype):
        tables = [table.to(torch.promote_types(dtype, torch.float32)) for table in (cos, sin)]

        def function(*inputs):
            return chain(inputs[: len(streams)], inputs[len(streams) :], *tables)[:1]

        return differentiated(function, (*streams, *scales), (dout,), dtype)

    exact, same = run(torch.float64), run(dtype)
    names = ["out", *(f"d_stream {i}" for i in range(len(streams))), *(f"d_scale {i}" for i in range(len(scales)))]
    for name, *results in zip(names, ours, same, exact, strict=True):
        assert_as_exact(name, *results)


@each_dtype
def test_rope_attention_is_attention_after_norm_and_rotation(dtype, device) -> None:
    """Both forms within one rounding of out, and in float32 of q and k, which logits have K of."""
    streams, scales, cos, sin = rope_inputs(1, (30, 110), 1, 64, dtype, device)
    out, lse = op.rope_attention_forward(streams, pairs(scales), cos, sin, 1e-6)
    q, k, v = qk_norm_rope_reference(streams, pairs(scales), cos, sin)
    after, lse_after = op.attention_forward(q, k, v, 64**-0.5)
    rounding = max(torch.finfo(dtype).eps, 64**0.5 * torch.finfo(torch.float32).eps)
    torch.testing.assert_close(out, after, rtol=0, atol=rounding * float(after.abs().max()))
    torch.testing.assert_close(lse, lse_after, rtol=0, atol=rounding)


def test_streams_and_tables_have_any_strides(device) -> None:
    streams, scales, cos, sin = rope_inputs(2, (3, 7), 2, 32, torch.bfloat16, device)
    dout = random(2, 10, 2, 32, dtype=torch.bfloat16, device=device)

    def run(streams, cos, sin):
        out, lse = op.rope_attention_forward(streams, pairs(scales), cos, sin, 1e-6, tiles=SMALL)
        gradients = op.rope_attention_backward(dout, streams, pairs(scales), cos, sin, out, lse, 1e-6, tiles=SMALL)
        return [out, lse, *gradients[0], *(d_scale for pair in gradients[1] for d_scale in pair)]

    def sliced(stream):
        B, T = stream.shape[:2]
        wider = torch.cat((stream.reshape(B, T, -1), stream.new_zeros(B, T, 40)), dim=-1)
        return wider[..., :192].unflatten(-1, (3, 2, 32))

    plain = run(streams, cos, sin)
    for others in ([sliced(stream) for stream in streams], [streams[0], sliced(streams[1])]):
        apart = run(others, cos.T.contiguous().T, sin)
        assert all(map(torch.equal, plain, apart))


def test_a_stream_of_one_token_has_any_stride(device) -> None:
    """PyTorch calls it contiguous whatever that stride is, and the other stream is read with its own."""
    streams, scales, cos, sin = rope_inputs(1, (1, 6), 1, 32, torch.bfloat16, device)
    stepped = [streams[0].repeat_interleave(7, dim=1)[:, ::7], streams[1]]

    def run(streams):
        out, lse = op.rope_attention_forward(streams, pairs(scales), cos, sin, 1e-6, tiles=SMALL)
        gradients = op.rope_attention_backward(out, streams, pairs(scales), cos, sin, out, lse, 1e-6, tiles=SMALL)
        return [out, lse, *gradients[0], *(d_scale for pair in gradients[1] for d_scale in pair)]

    assert all(map(torch.equal, run(stepped), run(streams)))


def test_the_forward_is_one_launch_and_nothing_runs_twice(device) -> None:
    streams, scales, cos, sin = rope_inputs(1, (3, 4), 2, 32, torch.bfloat16, torch.device("meta"))
    with launch.recorded() as launches:
        out, lse = op.rope_attention_forward(streams, pairs(scales), cos, sin, 1e-6)
        assert len(launches) == 1
        d_streams, d_scales = op.rope_attention_backward(out, streams, pairs(scales), cos, sin, out, lse, 1e-6)
    assert [of.kernel.fn.__name__ for of in launches] == [
        "_forward_kernel",
        "_prepare_kernel",
        "_keys_kernel",
        "_queries_kernel",
        "_scales_kernel",
    ]
    assert (out.shape, lse.shape) == ((1, 7, 2, 32), (1, 2, 7))
    assert [x.shape for x in d_streams] == [x.shape for x in streams]
    assert [[x.shape for x in pair] for pair in d_scales] == [[(32,), (32,)]] * 2


def test_is_bitwise_repeatable(device) -> None:
    streams, scales, cos, sin = rope_inputs(1, (9, 37), 1, 64, torch.bfloat16, device)

    def run():
        out, lse = op.rope_attention_forward(streams, pairs(scales), cos, sin, 1e-6, tiles=SMALL)
        gradients = op.rope_attention_backward(out, streams, pairs(scales), cos, sin, out, lse, 1e-6, tiles=SMALL)
        q, k, v = streams[1].unbind(2)
        plain, plain_lse = op.attention_forward(q, k, v, 0.1, tiles=SMALL)
        plain_gradients = op.attention_backward(plain, q, k, v, plain, plain_lse, 0.1, tiles=SMALL)
        return [out, lse, *gradients[0], *(x for pair in gradients[1] for x in pair), plain, *plain_gradients]

    assert all(map(torch.equal, run(), run()))


# Choices.


def test_what_is_outside_of_the_envelope_is_named(monkeypatch) -> None:
    shape = (1, 8, 2, 64)
    with launch.recorded():
        assert op.missing(shape, torch.bfloat16, "cuda") == ""
        assert all(op.missing((1, 8, 2, K), torch.float16, "cuda") == "" for K in (16, 36, 96, 128))
        assert "float64 in the interpreter only" in op.missing(shape, torch.float64, "cuda")
        assert "not torch.int8" in op.missing(shape, torch.int8, "cuda")
        for B, H in ((65536, 1), (1, 65536)):
            told = f"up to 65535 samples and heads, not {B} and {H}"
            assert told in op.missing((B, 8, H, 64), torch.bfloat16, "cuda")
        assert op.missing((65535, 8, 65535, 64), torch.bfloat16, "cuda") == ""
        for K in (8, 37, 256):
            assert f"even number of channels, 16 to 128, not {K}" in op.missing((1, 8, 2, K), torch.bfloat16, "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with launch.recorded():
        assert "sm_80 or later, not sm_75" in op.missing(shape, torch.float16, "cuda")
    assert "no mps device" in op.missing(shape, torch.bfloat16, "mps")


def test_fusion_is_for_short_sequences() -> None:
    assert all(op.favours_fusion(B, 768, 24, 128) for B in (1, 45))
    assert op.favours_fusion(1, 1152, 24, 128)
    assert not any(op.favours_fusion(B, 8960, 24, 128) for B in (1, 3))
    assert not op.favours_fusion(13, 2816, 24, 128)
    assert not op.favours_fusion(1, 76544, 6, 128)


def test_tiles_fit_the_device() -> None:
    """On a small device no kernel has more columns than 64; what is not a tensor core's has small tiles."""
    for K in range(16, 130, 2):
        for fused in (False, True):
            large, small = (op.choose_tiles(K, 2, fused=fused, shared=shared) for shared in (227 << 10, 99 << 10))
            for kernel in ("forward", "queries", "keys"):
                tile, other = getattr(large, kernel), getattr(small, kernel)
                assert dataclasses.replace(tile, columns=other.columns) == other
                assert 32 <= other.columns <= min(64, tile.columns)
        assert op.choose_tiles(K, 4) == op.choose_tiles(K, 8, fused=True)


COMPILE = """
import sys, tempfile
from pathlib import Path
import torch
from opensora_fast.kernels import attention_triton as op, launch
from opensora_fast.profiling import aot

aot.ARCHITECTURE, shared = int(sys.argv[1]), int(sys.argv[2]) << 10
aot.GPU_NAME = f"sm_{aot.ARCHITECTURE}"

def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")

streams, pair = [empty(3, 512, 3, 24, 128), empty(3, 8448, 3, 24, 128)], (empty(128), empty(128))
rope = [pair, pair], *[empty(8960, 64, dtype=torch.float32)] * 2
q = empty(3, 8960, 24, 128)
with launch.recorded() as launches:
    tiles = op.choose_tiles(128, 2, shared=shared)
    out, lse = op.attention_forward(q, q, q, 0.1, tiles=tiles)
    op.attention_backward(out, q, q, q, out, lse, 0.1, tiles=tiles)
    tiles = op.choose_tiles(128, 2, fused=True, shared=shared)
    out, lse = op.rope_attention_forward(streams, *rope, 1e-6, tiles=tiles)
    op.rope_attention_backward(out, streams, *rope, out, lse, 1e-6, tiles=tiles)
version, ptxas = next(iter(aot.find_ptxas().items()))
with tempfile.TemporaryDirectory() as folder:
    for kernel in map(aot.kernel_of, launches):
        made = aot.assemble(kernel, aot.compile_kernel(kernel), version, ptxas, Path(folder), disassembled=False)
        assert made.shared <= shared, (kernel.label, made.shared)
        assert made.spilled <= 128, (kernel.label, made.spilled)
        assert float not in map(type, kernel.values.values()), f"{kernel.label}: compiled again for every such number"
        print(kernel.name)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "shared"), [(80, 163), (86, 99)])
def test_compiles_for_the_devices_before_hopper(architecture, shared, device, tmp_path) -> None:
    """Within the KiB of shared memory that a block has there, almost without spills; for sm_90 see `bench --aot`."""
    if device.type != "cpu":
        pytest.skip("needs no device")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-P", "-c", COMPILE, str(architecture), str(shared)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(done.stdout.split()) == 9
