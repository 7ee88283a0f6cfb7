"""The merge of attention over two sets of keys: against attention over both, and its laws."""

import functools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opensora_fast.kernels import lse_merge as op
from opensora_fast.kernels.lse_merge import lse_merge

OP = "lse_merge"
# a tile of tokens and less, more and not a power of two channels, one of everything, nothing
SHAPES = [(2, 17, 3, 128), (1, 5, 2, 96), (1, 1, 1, 1), (2, 300, 1, 8), (1, 0, 2, 4), (0, 3, 2, 4)]
EPS = torch.finfo(torch.float64).eps


def attention(q, k, v):
    """(out, lse) in the dtype of q; over no keys an empty block."""
    scores = torch.einsum("bqhk,bthk->bhqt", q, k)
    out = torch.einsum("bhqt,bthk->bqhk", scores.softmax(-1), v)
    return out, scores.logsumexp(-1)


def block(shape, seed, dtype=torch.float64, device="cpu", spread=1.0):
    B, S, H, K = shape
    generator = torch.Generator().manual_seed(seed)
    out = torch.randn(B, S, H, K, generator=generator, dtype=torch.float64)
    lse = spread * torch.randn(B, H, S, generator=generator, dtype=torch.float64)
    return out.to(device, dtype), lse.to(device, torch.promote_types(dtype, torch.float32))


def empty_block(shape, dtype=torch.float64, device="cpu"):
    B, S, H, K = shape
    wide = torch.promote_types(dtype, torch.float32)
    lse = torch.full((B, H, S), -torch.inf, dtype=wide, device=device)
    return torch.zeros(B, S, H, K, dtype=dtype, device=device), lse


def formula(out_a, lse_a, out_b, lse_b):
    """The plain softmax over two, in the dtype that it is given."""
    weights = torch.stack((lse_a, lse_b)).softmax(0).transpose(2, 3)[..., None]
    return weights[0] * out_a + weights[1] * out_b, torch.logaddexp(lse_a, lse_b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_merge_is_the_formula(place, shape, dtype, assert_as_exact):
    blocks = block(shape, 0, torch.promote_types(dtype, torch.float32), place), block(shape, 1, dtype, place)
    merged = lse_merge(*blocks[0], *blocks[1])
    wide = torch.promote_types(dtype, torch.float32)
    same = formula(*(tensor.to(wide) for one in blocks for tensor in one))
    exact = formula(*(tensor.double() for one in blocks for tensor in one))
    for name, ours, theirs, e in zip(("out", "lse"), merged, same, exact, strict=True):
        assert_as_exact(name, ours, theirs, e)
        assert ours.is_contiguous()


@pytest.mark.parametrize("keys", [(3, 4), (0, 5), (5, 0), (1, 1)], ids=str)
def test_merge_is_attention_over_both_sets_of_keys(place, keys):
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, n, 3, 8, generator=generator).double().to(place) for n in (5, sum(keys), sum(keys)))
    parts = [attention(q, *pair) for pair in zip(k.split(keys, 1), v.split(keys, 1), strict=True)]
    for ours, expected in zip(lse_merge(*parts[0], *parts[1]), attention(q, k, v), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.filterwarnings("ignore:overflow encountered in subtract")  # to -inf, as it should
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lse", [-1e4, 0.0, 1e4, 88.8, -88.8, 3.3e38, -3.3e38])
def test_extreme_log_sum_exps(place, lse, dtype):
    shape = (1, 4, 2, 8)
    (out_a, _), (out_b, _) = (block(shape, seed, dtype, place) for seed in (0, 1))
    level = torch.full((1, 2, 4), lse, device=place)
    out, merged = lse_merge(out_a, level, out_b, level)
    torch.testing.assert_close(out, (out_a.float() + out_b.float()) / 2, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(merged, level + torch.tensor(2.0).log().to(place))
    # The other block far above or below: the one alone.
    for low, high in ((level, torch.full_like(level, 3.4e38)), (torch.full_like(level, -3.4e38), level)):
        for flipped in (False, True):
            blocks = [(out_a, low), (out_b, high)]
            out, merged = lse_merge(*(t for one in (reversed(blocks) if flipped else blocks) for t in one))
            if (high - low > 200).all():
                assert torch.equal(out, out_b.float())
                assert torch.equal(merged, high)
            assert torch.isfinite(out).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_empty_blocks_change_nothing(place, dtype):
    shape = (2, 5, 3, 8)
    one, empty = block(shape, 0, dtype, place, spread=50.0), empty_block(shape, dtype, place)
    for pair in ((one, empty), (empty, one)):
        out, lse = lse_merge(*pair[0], *pair[1])
        assert torch.equal(out, one[0].to(out.dtype))
        assert torch.equal(lse, one[1])
    out, lse = lse_merge(*empty, *empty)
    assert not out.any()
    assert (lse == -torch.inf).all()


# Laws. Blocks in float64: what is left of a difference is rounding, of values of the blocks' own size.

seeds = st.integers(0, 2**31)
spreads = st.sampled_from([0.1, 1.0, 30.0, 1e4])


@st.composite
def blocks(draw, count):
    """`count` blocks of one shape, some empty."""
    shape = (
        draw(st.integers(1, 2)),
        draw(st.integers(1, 5)),
        draw(st.integers(1, 3)),
        draw(st.sampled_from([1, 4, 7])),
    )
    seed, spread = draw(seeds), draw(spreads)
    empty = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    return [empty_block(shape) if hole else block(shape, seed + i, spread=spread) for i, hole in enumerate(empty)]


def merged(*parts):
    return functools.reduce(lambda a, b: lse_merge(*a, *b), parts)


def assert_equal_within_rounding(ours, theirs, parts):
    """16 roundings of the blocks' size: a few merges of a few operations each, and exponents off by theirs."""
    size = max(out.abs().max() for out, _ in parts)
    levels = torch.stack([lse for _, lse in parts])
    level = levels[levels.isfinite()].abs().max() if levels.isfinite().any() else torch.tensor(0.0)
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=float(16 * EPS * size * (1 + level)))
    torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=float(16 * EPS * (1 + level)))


@settings(max_examples=40)
@given(parts=blocks(3))
def test_associative(parts):
    a, b, c = parts
    assert_equal_within_rounding(merged(merged(a, b), c), merged(a, merged(b, c)), parts)


@settings(max_examples=40)
@given(parts=blocks(1))
def test_identity(parts):
    (a,) = parts
    hole = empty_block(a[0].shape)
    for ours in (merged(a, hole), merged(hole, a), merged(hole, a, hole)):
        assert all(map(torch.equal, ours, a))


@settings(max_examples=40)
@given(parts=st.integers(2, 6).flatmap(blocks), seed=seeds)
def test_any_order_of_blocks(parts, seed):
    order = random.Random(seed).sample(parts, len(parts))
    assert_equal_within_rounding(merged(*parts), merged(*order), parts)


def test_any_strides(place):
    shape = (2, 5, 3, 8)
    (out_a, lse_a), (out_b, lse_b) = (block(shape, seed, torch.float32, place) for seed in (0, 1))
    expected = lse_merge(out_a, lse_a, out_b, lse_b)
    heads_first = out_a.transpose(1, 2).contiguous().transpose(1, 2)
    tokens_first = lse_a.transpose(1, 2).contiguous().transpose(1, 2)
    channels_apart = out_b.transpose(1, 3).contiguous().transpose(1, 3)
    for ours, theirs in zip(lse_merge(heads_first, tokens_first, channels_apart, lse_b), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("out_a", torch.zeros(2, 3, 4)),
        ("lse_a", torch.zeros(1, 3, 2)),
        ("out_b", torch.zeros(1, 3, 2, 5)),
        ("out_b", torch.zeros(1, 3, 2, 4, dtype=torch.int32)),
        ("lse_b", torch.zeros(1, 2, 3, device="meta")),
    ],
)
def test_errors_name_the_argument(name, value):
    arguments = dict(
        zip(("out_a", "lse_a", "out_b", "lse_b"), (*block((1, 3, 2, 4), 0), *block((1, 3, 2, 4), 1)), strict=True)
    )
    with pytest.raises(ValueError, match=name):
        lse_merge(*(arguments | {name: value}).values())


def test_opcheck_and_one_node():
    arguments = (*block((1, 3, 2, 4), 0, torch.float32), *block((1, 3, 2, 4), 1, torch.bfloat16))
    torch.library.opcheck(op._lse_merge, arguments)
    compiled = torch.compile(lse_merge, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(*arguments), lse_merge(*arguments)))


def test_gradient_is_refused_by_name():
    arguments = (*block((1, 3, 2, 4), 0), *block((1, 3, 2, 4), 1))
    out, _ = lse_merge(arguments[0].requires_grad_(), *arguments[1:])
    with pytest.raises(RuntimeError, match="lse_merge"):
        out.sum().backward()


def test_choice_and_cost():
    assert op.choose((1, 2, 3, 4), torch.float32, "cpu", {"triton": ""})[0] == "reference"
    assert op.choose((1, 2, 3, 4), torch.float32, "cuda", {"triton": ""})[0] == "triton"
    assert op.choose((1, 2, 3, 4), torch.float32, "cuda", {"triton": "gone"}) == ("reference", "gone")
    cost = op.cost(2, 10, 3, 8, torch.bfloat16, "forward")
    assert cost.bytes == 2 * 10 * 3 * 8 * (4 + 4 + 2) + 3 * 2 * 10 * 3 * 4
    with pytest.raises(ValueError, match="backward"):
        op.cost(2, 10, 3, 8, torch.bfloat16, "backward")
