"""The channel norm and SiLU with what they fuse, against PyTorch's ops: both layouts, both backends."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from opensora_fast.kernels import launch, rms_norm_act
from opensora_fast.kernels.rms_norm_act import channel_rms_norm, silu_pad

OP = "rms_norm_act"
CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last_3d
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

# (shape, act, residual, pad): an odd one, two that cross tiles (rows, then channels), one token, one channel, none.
NORMS = {
    "plain": ((2, 5, 2, 3, 3), None, False, 0),
    "residual": ((2, 12, 2, 3, 7), None, True, 0),
    "residual-pad": ((1, 6, 2, 3, 2), None, True, 1),
    "relu-pad": ((2, 8, 1, 2, 3), "relu", False, 1),
    "silu-residual": ((1, 72, 2, 3, 5), "silu", True, 0),
    "silu-residual-pad": ((1, 7, 1, 2, 3), "silu", True, 2),
    "many-rows": ((1, 4, 3, 20, 21), None, True, 0),
    "many-channels": ((1, 2050, 1, 1, 3), None, False, 0),
    "one-token": ((1, 16, 1, 1, 1), "relu", True, 0),
    "one-channel": ((2, 1, 1, 2, 3), "silu", True, 1),
    "empty": ((0, 4, 2, 2, 2), "silu", True, 1),
    "no-frames": ((1, 4, 0, 2, 2), None, True, 1),
}
each_norm = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
each_layout = pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST], ids=["contiguous", "channels_last"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def composite(x, weight, bias, residual, act, pad, eps=1e-5):
    """What one would write without the op."""
    n = x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + eps)
    y = n * weight.view(-1, 1, 1, 1) + bias.view(-1, 1, 1, 1)
    y = y if residual is None else y + residual
    y = F.silu(y) if act == "silu" else F.relu(y) if act == "relu" else y
    return F.pad(y, (pad,) * 6)


def silu_composite(x, pad):
    return F.pad(F.silu(x), (pad,) * 6)


def ours(x, weight, bias, residual, act, pad):
    return channel_rms_norm(x, weight, bias, residual=residual, act=act, pad=pad)


def randn(*shape, seed, dtype, device="cpu", layout=CONTIGUOUS):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    return values.contiguous(memory_format=layout) if values.dim() == 5 else values


def inputs(shape, residual, dtype, device="cpu", layout=CONTIGUOUS):
    kind = dict(dtype=dtype, device=device)
    x = randn(*shape, seed=0, layout=layout, **kind)
    weight, bias = 1 + randn(shape[1], seed=1, **kind) / 2, randn(shape[1], seed=2, **kind)
    tensors = [x, weight, bias] + ([randn(*shape, seed=3, layout=layout, **kind)] if residual else [])
    return [tensor.requires_grad_() for tensor in tensors]


def padded(shape, pad):
    return (*shape[:2], *(extent + 2 * pad for extent in shape[2:]))


def results(function, tensors, grad, *arguments):
    out = function(*tensors, *(() if len(tensors) != 3 else (None,)), *arguments)
    return out.detach(), *torch.autograd.grad(out, tensors, grad.to(out.dtype))


def doubled(tensors):
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def assert_sum_as_exact(name, found, same, exact, terms):
    """As `assert_as_exact`, with the rounding of a sum in any order: it grows as the root of the number of terms."""
    rounding = torch.finfo(found.dtype).eps * max(terms, 1) ** 0.5 * exact.abs().max()
    error, allowed = (found.double() - exact).abs().max(), 2 * (same.double() - exact).abs().max() + rounding
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


@each_dtype
@each_layout
@each_norm
def test_norm_and_its_gradients(norm, layout, dtype, place, assert_as_exact):
    shape, act, residual, pad = norm
    tensors = inputs(shape, residual, dtype, place, layout)
    grad = randn(*padded(shape, pad), seed=4, dtype=dtype, device=place, layout=layout)
    found = results(ours, tensors, grad, act, pad)
    same = results(composite, tensors, grad, act, pad)
    exact = results(composite, doubled(tensors), grad.double(), act, pad)
    if dtype == torch.float64:  # the composite is then as exact as can be, and the order of a sum shows
        for one, other in zip(found, exact, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    else:
        names = ["y", "dx", "dweight", "dbias", "dresidual"][: len(found)]
        for name, one, other, best in zip(names, found, same, exact, strict=True):
            if best.dim() == 1:
                assert_sum_as_exact(name, one, other, best, terms=grad[:, 0].numel())
            else:
                assert_as_exact(name, one, other, best)
    assert all(t.is_contiguous(memory_format=layout) for t in found[:2]) or not tensors[0].numel()


@each_dtype
@each_layout
@pytest.mark.parametrize("pad", [0, 1, 2])
@pytest.mark.parametrize("shape", [(2, 5, 2, 1, 3), (1, 8, 1, 1, 300), (0, 4, 2, 2, 2)], ids=str)
def test_silu_and_its_gradient(shape, pad, layout, dtype, place, assert_as_exact):
    x = randn(*shape, seed=0, dtype=dtype, device=place, layout=layout).mul_(3).requires_grad_()
    grad = randn(*padded(shape, pad), seed=1, dtype=dtype, device=place, layout=layout)
    found = results(lambda x, pad: silu_pad(x, pad=pad), [x], grad, pad)
    same = results(silu_composite, [x], grad, pad)
    exact = results(silu_composite, doubled([x]), grad.double(), pad)
    for name, *three in zip(("y", "dx"), found, same, exact, strict=True):
        if dtype == torch.float64:
            torch.testing.assert_close(three[0], three[2], rtol=1e-13, atol=1e-13)
        else:
            assert_as_exact(name, *three)
    assert found[0].is_contiguous(memory_format=layout) or not found[0].numel()


@each_layout
def test_inputs_of_any_strides_and_layouts(layout, place):
    shape = (2, 6, 1, 2, 5)
    x, weight, bias, residual = (t.detach() for t in inputs(shape, True, torch.float32, place))
    strided = [torch.stack([t, t], dim=-1)[..., 0] for t in (x, residual)]
    other = residual.contiguous(memory_format=layout)
    expected = channel_rms_norm(x, weight, bias, residual=residual)
    torch.testing.assert_close(channel_rms_norm(strided[0], weight, bias, residual=strided[1]), expected)
    torch.testing.assert_close(channel_rms_norm(x, weight, bias, residual=other), expected)
    torch.testing.assert_close(silu_pad(strided[0], pad=1), silu_pad(x, pad=1))
    x.requires_grad_()
    grad = randn(*shape, seed=5, dtype=torch.float32, device=place)
    gradients = [
        torch.autograd.grad(channel_rms_norm(x, weight, bias), x, g)[0]
        for g in (grad, grad.contiguous(memory_format=layout), grad[:1].expand_as(grad), grad[:1].repeat(2, 1, 1, 1, 1))
    ]
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(gradients[2], gradients[3])


@each_layout
@pytest.mark.parametrize(("act", "pad"), [(None, 1), ("silu", 0), ("relu", 1)])
def test_gradcheck(act, pad, layout, place):
    x, weight, bias, residual = inputs((1, 3, 1, 1, 2), True, torch.float64, place, layout)
    call = lambda x, w, b, r: channel_rms_norm(x, w, b, residual=r, act=act, pad=pad)  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, weight, bias, residual), fast_mode=True)
    assert torch.autograd.gradcheck(lambda x: silu_pad(x, pad=pad), (x,), fast_mode=True)


@pytest.mark.parametrize(("act", "pad", "with_residual"), [(None, 0, False), ("silu", 1, True)])
def test_opcheck(act, pad, with_residual, place):
    x, weight, bias, *residual = inputs((2, 4, 1, 2, 3), with_residual, torch.float32, place, CHANNELS_LAST)
    residual = residual[0] if residual else None
    torch.library.opcheck(rms_norm_act._channel_rms_norm, (x, weight, bias, residual, 1e-5, act, pad))
    dy = randn(*padded(x.shape, pad), seed=1, dtype=torch.float32, device=place, layout=CHANNELS_LAST)
    rstd = torch.rand(2, 1, 2, 3, device=place)
    saved = [t if t is None else t.detach() for t in (dy, x, weight, rstd, bias, residual)]
    torch.library.opcheck(rms_norm_act._channel_rms_norm_backward, (*saved, act, pad))
    torch.library.opcheck(rms_norm_act._silu_pad, (x, pad))
    torch.library.opcheck(rms_norm_act._silu_pad_backward, (dy, x.detach(), pad))


@each_layout
def test_compiles_into_one_node_each(layout, place):
    tensors = inputs((2, 4, 1, 2, 3), True, torch.float32, place, layout)
    graphs = []

    def aot_eager(graph, example_inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    def loss(x, weight, bias, residual):
        return silu_pad(channel_rms_norm(x, weight, bias, residual=residual, act="silu"), pad=1).square().sum()

    torch._dynamo.reset()
    eager = torch.autograd.grad(loss(*tensors), tensors)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend=aot_eager)(*tensors), tensors)
    assert all(torch.equal(*pair) for pair in zip(compiled, eager, strict=True))
    called = [str(node.target) for node in graphs[0].graph.nodes if "opensora_fast" in str(node.target)]
    assert len(graphs) == 1
    assert [name.split(".")[1] for name in called] == ["channel_rms_norm", "silu_pad"]


@each_layout
def test_bitwise_equal_over_two_runs(layout, place):
    tensors = inputs((1, 12, 3, 10, 11), True, torch.bfloat16, place, layout)
    grad = randn(1, 12, 3, 10, 11, seed=4, dtype=torch.bfloat16, device=place, layout=layout)
    runs = [results(ours, tensors, grad, "silu", 0) for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


def test_gradients_only_where_they_are_wanted(place):
    x, weight, bias = inputs((1, 4, 1, 2, 2), False, torch.float32, place)
    (dx,) = torch.autograd.grad(channel_rms_norm(x, weight.detach(), bias.detach()).sum(), x)
    assert dx.isfinite().all()
    with torch.no_grad():
        assert not channel_rms_norm(x, weight, bias).requires_grad


def test_an_unpadded_residual_without_an_act_gets_the_gradient_itself():
    x, weight, bias, residual = inputs((1, 4, 1, 2, 2), True, torch.float32)
    grad = torch.randn(x.shape)
    (dresidual,) = torch.autograd.grad(channel_rms_norm(x, weight, bias, residual=residual), residual, grad)
    assert dresidual.data_ptr() == grad.data_ptr()


def test_saves_no_more_than_it_says():
    for act, expected in ((None, 3), ("silu", 5)):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=saved: to.append(t) or t, lambda t: t):
            channel_rms_norm(
                *(tensors := inputs((1, 4, 1, 2, 2), True, torch.float32))[:3], residual=tensors[3], act=act
            )
        assert len(saved) == expected
        assert sum(t.dim() == 5 for t in saved) == (1 if act is None else 2)


@each_layout
def test_norms_of_one_and_zero_are_identities(layout, place):
    """Without an affine the mean square is 1; a weight of zero leaves the residual; the two functions agree."""
    x, weight, bias, residual = (t.detach() for t in inputs((2, 6, 1, 2, 3), True, torch.float32, place, layout))
    n = channel_rms_norm(x, torch.ones_like(weight), torch.zeros_like(bias), eps=1e-12)
    torch.testing.assert_close(n.square().mean(dim=1), torch.ones_like(n[:, 0]))
    zero = torch.zeros_like(weight)
    assert torch.equal(channel_rms_norm(x, zero, zero, residual=residual), residual)
    both = channel_rms_norm(x, weight, bias, act="silu", pad=1)
    torch.testing.assert_close(both, silu_pad(channel_rms_norm(x, weight, bias), pad=1))
    torch.testing.assert_close(
        channel_rms_norm(x * 1000, weight, bias, eps=0.0), channel_rms_norm(x, weight, bias, eps=0.0)
    )


def test_extreme_values(place):
    x = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], device=place).view(1, 5, 1, 1, 1).requires_grad_()
    y = silu_pad(x, pad=0)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert y.flatten().tolist() == [0, 0, 0, 100, 1e4]
    assert dx.flatten().tolist() == [0, 0, 0.5, 1, 1]


@given(
    st.tuples(st.integers(1, 2), st.integers(1, 9), *[st.integers(1, 3)] * 3),
    st.sampled_from(rms_norm_act.ACTS),
    st.booleans(),
    st.integers(0, 2),
    st.sampled_from([CONTIGUOUS, CHANNELS_LAST]),
)
@settings(max_examples=12)
def test_triton_is_the_reference(shape, act, with_residual, pad, layout):
    """The two candidates' own functions, whatever is selected: forward, and every gradient."""
    if reason := launch.missing("cpu"):
        pytest.skip(reason)
    x, weight, bias, *residual = (t.detach() for t in inputs(shape, with_residual, torch.float32, layout=layout))
    residual = residual[0] if residual else None
    arguments = (x, weight, bias, residual, 1e-5, act, pad)
    y, rstd = rms_norm_act.channel_rms_norm_reference(*arguments)
    for found, expected in zip(rms_norm_act.triton_channel_rms_norm_forward(*arguments), (y, rstd), strict=True):
        torch.testing.assert_close(found, expected)
    backward = (y.cos(), x, weight, rstd, bias, residual, act, pad)
    for found, expected in zip(
        rms_norm_act.triton_channel_rms_norm_backward(*backward),
        rms_norm_act.channel_rms_norm_backward_reference(*backward),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"x": torch.zeros(1, 4, 2, 2)}, "x has 4 dimensions"),
        ({"x": torch.zeros(1, 4, 1, 1, 1).long()}, "x is torch.int64"),
        ({"x": torch.zeros(1, 4097, 1, 1, 1)}, "x has 4097 channels"),
        ({"weight": torch.zeros(5)}, "weight has shape"),
        ({"bias": torch.zeros(4).double()}, "bias is torch.float64"),
        ({"residual": torch.zeros(1, 4, 1, 1, 2)}, "residual has shape"),
        ({"residual": torch.zeros(1, 4, 1, 1, 1).half()}, "residual is torch.float16"),
        ({"act": "gelu"}, "act is 'gelu'"),
        ({"pad": -1}, "pad is -1"),
    ],
)
def test_outside_of_the_envelope(changes, named):
    good = {"x": torch.zeros(1, 4, 1, 1, 1), "weight": torch.zeros(4), "bias": torch.zeros(4)}
    call = good | changes
    with pytest.raises(ValueError, match=named):
        channel_rms_norm(call.pop("x"), call.pop("weight"), call.pop("bias"), **call)
    if changes.keys() & {"pad"} or ("x" in changes and "channels" not in named):
        with pytest.raises(ValueError, match=named):
            silu_pad((good | changes)["x"], pad=changes.get("pad", 0))


def test_choose_says_why():
    shape = (1, 4, 1, 4, 4)
    assert rms_norm_act.choose(shape, torch.bfloat16, "cuda", {"reference": "", "triton": ""})[0] == "triton"
    missing = {"reference": "", "triton": "no Triton"}
    assert rms_norm_act.choose(shape, torch.bfloat16, "cuda", missing) == ("reference", "no Triton")
    assert rms_norm_act.choose(shape, torch.bfloat16, "cpu", missing)[0] == "reference"
    assert rms_norm_act.selected(shape, torch.float32, "cpu")[0] == "reference"


@pytest.mark.parametrize("channels", [1, 3, 8, 96, 128, 256, 512, 1024, 1536, 4096])
def test_tiles_hold_all_channels_and_fill_warps(channels):
    for backward, limit in ((False, 32), (True, 16)):
        tile = rms_norm_act.choose_tile(channels, backward=backward)
        assert channels <= tile.block_c < 2 * max(channels, 1)
        assert tile.rows * tile.block_c <= 32 * tile.num_warps * limit  # elements of a thread
        assert tile.num_warps <= 16


def test_programs_come_from_the_shape():
    assert [rms_norm_act.choose_programs(blocks) for blocks in (0, 1, 10**6)] == [0, 1, rms_norm_act.MAX_PROGRAMS]


@pytest.mark.parametrize(("act", "residual", "pad"), list(itertools.product((None, "silu"), (False, True), (0, 1))))
def test_cost_counts_every_tensor_once(act, residual, pad):
    tensors = [t.detach() for t in inputs((2, 4, 1, 2, 3), residual, torch.bfloat16)]
    y, rstd = rms_norm_act.channel_rms_norm_reference(*tensors[:3], tensors[3] if residual else None, 1e-5, act, pad)
    how = dict(act=act, residual=residual, pad=pad)
    forward = rms_norm_act.cost(tensors[0].shape, torch.bfloat16, "forward", **how)
    assert forward.bytes == sum(t.nbytes for t in (*tensors, y, rstd))
    backward = rms_norm_act.cost(tensors[0].shape, torch.bfloat16, "backward", **how)
    x, vector = tensors[0].nbytes, tensors[1].nbytes
    with_act = 0 if act is None else 2 * residual * x + vector
    assert backward.bytes == 3 * x + 3 * vector + rstd.nbytes + with_act
    assert 0 < forward.flops < backward.flops
    silu = rms_norm_act.cost(tensors[0].shape, torch.bfloat16, "forward", function="silu_pad", pad=pad)
    assert silu.bytes == x + y.nbytes
