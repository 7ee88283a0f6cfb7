"""The modulated norm and the linear that it may own, against the composite that one would write in PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from opensora_fast.kernels import launch, modulated_norm
from opensora_fast.kernels.modulated_norm import (
    Tile,
    choose_tile,
    modulated_norm_linear,
    modulated_norm_split_linear,
)
from opensora_fast.kernels.modulated_norm import modulated_norm as norm

OP = "modulated_norm"
EPS = 1e-6

# [B, T, D]: D of a partial block, of two and of three blocks with a tail, of three whole ones (as the presets have it);
# T of several programs with an incomplete last one; no batch and no tokens.
SHAPES = [(2, 5, 72), (2, 9, 257), (1, 3, 600), (1, 6, 3072), (0, 3, 8), (2, 0, 8)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype).removeprefix("torch.")
)


def composite(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale[:, None]) + shift[:, None]


def composite_linear(x, shift, scale, weight, bias):
    return F.linear(composite(x, shift, scale), weight, bias)


def randn(shape, dtype, device, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def inputs(shape, dtype, device, out_features=None):
    B, _, D = shape
    shapes = [shape, (B, D), (B, D)] + ([] if out_features is None else [(out_features, D), (out_features,)])
    return [randn(shape, dtype, device, seed).requires_grad_() for seed, shape in enumerate(shapes)]


def results(function, tensors, grad):
    """The output and the gradients of all tensors."""
    tensors = [tensor.detach().to(grad.dtype).requires_grad_() for tensor in tensors]
    out = function(*tensors)
    return out.detach(), *torch.autograd.grad(out, tensors, grad)


def assert_results(assert_as_exact, ours_function, composite_function, tensors, grad, names):
    ours = results(ours_function, tensors, grad)
    same = results(composite_function, tensors, grad)
    exact = results(composite_function, tensors, grad.double())
    for name, *values in zip(names, ours, same, exact, strict=True):
        assert_as_exact(name, *values)
    assert ours[0].is_contiguous()


NAMES = ("out", "d_x", "d_shift", "d_scale", "d_weight", "d_bias")


@each_dtype
@each_shape
def test_forward_and_gradients(shape, dtype, place, assert_as_exact):
    tensors = inputs(shape, dtype, place)
    assert_results(assert_as_exact, norm, composite, tensors, randn(shape, dtype, place, 9), NAMES[:4])


@each_dtype
@pytest.mark.parametrize("shape", [(2, 5, 72), (1, 3, 600), (0, 3, 8), (2, 0, 8)])
def test_with_linear_forward_and_gradients(shape, dtype, place, assert_as_exact):
    tensors = inputs(shape, dtype, place, out_features=24)
    grad = randn((*shape[:2], 24), dtype, place, 9)
    assert_results(assert_as_exact, modulated_norm_linear, composite_linear, tensors, grad, NAMES)


@pytest.mark.parametrize("used", [(0, 1, 2), (1,)], ids=["all", "one"])
def test_split_linear_is_the_linear_in_pieces(used, place, assert_as_exact):
    sizes = (5, 16, 3)

    def pieces(function):
        def joined(*tensors):
            outs = function(*tensors)
            return torch.cat([outs[number] for number in used], dim=-1)

        return joined

    def split(*tensors):
        outs = modulated_norm_split_linear(*tensors, sizes=sizes)
        assert all(out.is_contiguous() for out in outs)
        return outs

    tensors = inputs((2, 5, 72), torch.float32, place, out_features=24)
    grad = randn((2, 5, sum(sizes[number] for number in used)), torch.float32, place, 9)
    expected = pieces(lambda *tensors: composite_linear(*tensors).split(sizes, dim=-1))
    assert_results(assert_as_exact, pieces(split), expected, tensors, grad, NAMES)


def test_split_sizes_outside_of_the_envelope():
    tensors = [tensor.detach() for tensor in inputs((2, 5, 24), torch.float32, "cpu", out_features=7)]
    for sizes in ((3, 3), (0, 7), ()):
        with pytest.raises(ValueError, match="sizes is"):
            modulated_norm_split_linear(*tensors, sizes=sizes)


def test_linear_without_bias_and_with_frozen_parts(place):
    x, shift, scale, weight, bias = (tensor.detach() for tensor in inputs((2, 5, 24), torch.float32, place, 7))
    tensors = dict(x=x, shift=shift, scale=scale, weight=weight, bias=bias)
    grad = randn((2, 5, 7), torch.float32, place, 9)

    def gradients(function, wanted, with_bias):
        leaves = {name: tensor.clone().requires_grad_(name in wanted) for name, tensor in tensors.items()}
        leaves["bias"] = leaves["bias"] if with_bias else None
        function(*leaves.values()).backward(grad)
        return {name: leaf.grad for name, leaf in leaves.items() if leaf is not None}

    for wanted in (("x", "shift", "scale"), ("weight",), ("bias",), ("x",), ("scale", "weight")):
        for with_bias in (True, False):
            if wanted == ("bias",) and not with_bias:
                continue
            ours = gradients(modulated_norm_linear, wanted, with_bias)
            expected = gradients(composite_linear, wanted, with_bias)
            assert {name for name, grad in ours.items() if grad is not None} == set(wanted)
            for name in wanted:
                torch.testing.assert_close(ours[name], expected[name], rtol=1e-4, atol=1e-5)


def test_gradients_of_float64(place):
    assert torch.autograd.gradcheck(norm, inputs((2, 3, 5), torch.float64, place), fast_mode=True)
    assert torch.autograd.gradcheck(modulated_norm_linear, inputs((2, 3, 5), torch.float64, place, 4), fast_mode=True)


def test_many_programs_and_a_second_stage_of_several_tiles(place, assert_as_exact, monkeypatch):
    monkeypatch.setattr(modulated_norm, "MIN_BACKWARD_ROWS", 1)  # 9 programs, where 4 rows each would leave 3
    monkeypatch.setattr(modulated_norm, "SUM_ROWS", 4)
    shape = (2, 9, 40)
    tensors = inputs(shape, torch.float32, place)
    assert_results(assert_as_exact, norm, composite, tensors, randn(shape, torch.float32, place, 9), NAMES[:4])


def test_long_sums_stay_exact_in_bfloat16(place, assert_as_exact):
    shape = (1, 70, 8)
    tensors = inputs(shape, torch.bfloat16, place)
    assert_results(assert_as_exact, norm, composite, tensors, randn(shape, torch.bfloat16, place, 9), NAMES[:4])


def test_without_modulation_it_is_layer_norm(place):
    x = randn((2, 5, 72), torch.float32, place, 0)
    zero = torch.zeros(2, 72, device=place)
    torch.testing.assert_close(norm(x, zero, zero), F.layer_norm(x, (72,), eps=EPS))


def test_a_constant_added_to_a_row_changes_nothing(place):
    x, shift, scale = (tensor.detach() for tensor in inputs((2, 5, 72), torch.float32, place))
    moved = x + randn((2, 5, 1), torch.float32, place, 7)
    torch.testing.assert_close(norm(moved, shift, scale), norm(x, shift, scale), rtol=1e-4, atol=1e-5)


def test_far_from_zero_the_variance_does_not_cancel(place):
    x, shift, scale = (tensor.detach() for tensor in inputs((1, 3, 257), torch.float32, place))
    x = 1000 + x  # squares of a million, of which float32 keeps no digit of the variance
    exact = composite(x.double(), shift.double(), scale.double())
    torch.testing.assert_close(norm(x, shift, scale).double(), exact, rtol=1e-3, atol=1e-3)


def test_reference_backward_is_the_autograd_of_the_reference(monkeypatch):
    monkeypatch.setattr(modulated_norm, "CPU_PIECE", 48)  # two rows, of five
    x, shift, scale = inputs((2, 5, 24), torch.float64, "cpu")
    dy = randn((2, 5, 24), torch.float64, "cpu", 9)
    y, mean, rstd = modulated_norm.modulated_norm_reference(x, shift, scale)
    torch.testing.assert_close(y, composite(x, shift, scale))
    expected = torch.autograd.grad(y, (x, shift, scale), dy)
    with torch.no_grad():
        ours = modulated_norm.modulated_norm_backward_reference(dy, x, scale, mean, rstd)
    torch.testing.assert_close(ours, expected)


def test_views_of_wider_buffers(place):
    B, T, D = 2, 5, 24
    x = randn((T, B, D + 8), torch.float32, place, 0).transpose(0, 1)[..., 4:-4]
    shift, _, scale = randn((B, 3 * D), torch.float32, place, 1).chunk(3, dim=-1)
    grad = randn((B, D, T), torch.float32, place, 2).transpose(1, 2)
    strided = randn((B, T, D, 2), torch.float32, place, 0)[..., 0]
    for view in (x, strided):
        ours = results(norm, (view, shift, scale), grad)
        contiguous = results(norm, [t.contiguous() for t in (view, shift, scale)], grad.contiguous())
        for pair in zip(ours, contiguous, strict=True):  # on a GPU, alignment may change the order of a row's sums
            torch.testing.assert_close(*pair)
    leaf = x.detach().requires_grad_()
    norm(leaf, shift, scale).sum().backward()  # a gradient of stride 0
    expected = results(norm, (x, shift, scale), torch.ones(B, T, D, device=place))[1]
    torch.testing.assert_close(leaf.grad, expected)


def test_of_one_channel_only_the_shift_is_left(place):
    tensors = inputs((2, 5, 1), torch.float32, place)
    y, d_x, d_shift, d_scale = results(norm, tensors, torch.ones(2, 5, 1, device=place))
    assert torch.equal(y, tensors[1].detach()[:, None].expand(2, 5, 1))
    assert torch.equal(d_shift, torch.full_like(d_shift, 5))
    for zero in (d_x, d_scale):  # roundings, times rstd = 1000
        torch.testing.assert_close(zero, torch.zeros_like(zero), atol=2e-3, rtol=0)


def test_bitwise_equal_over_runs(place):
    tensors = inputs((2, 9, 72), torch.bfloat16, place)
    grad = randn((2, 9, 72), torch.bfloat16, place, 9)
    first, second = results(norm, tensors, grad), results(norm, tensors, grad)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_opcheck(dtype):
    x, shift, scale, weight, bias = inputs((2, 5, 24), dtype, "cpu", out_features=7)
    y, mean, rstd = (tensor.detach() for tensor in modulated_norm._modulated_norm(x, shift, scale, EPS))
    detached = [tensor.detach() for tensor in (x, shift, scale, weight)]
    dout = randn((2, 5, 7), dtype, "cpu", 9)
    torch.library.opcheck(modulated_norm._modulated_norm, (x, shift, scale, EPS))
    torch.library.opcheck(modulated_norm._modulated_norm_backward, (y, *detached[:1], detached[2], mean, rstd))
    torch.library.opcheck(modulated_norm._modulated_norm_linear, (x, shift, scale, weight, bias, [7], EPS))
    torch.library.opcheck(modulated_norm._modulated_norm_linear, (x, shift, scale, weight, None, [2, 5], EPS))
    for wanted in ((True, True, True), (True, False, False), (False, True, False)):
        arguments = ([dout], *detached, mean, rstd, EPS, *wanted)
        torch.library.opcheck(modulated_norm._modulated_norm_linear_backward, arguments)


@pytest.mark.parametrize("linear", [False, True], ids=["alone", "linear"])
def test_compiles_into_one_graph_with_one_node(linear, place):
    tensors = inputs((2, 5, 24), torch.float32, place, 7 if linear else None)
    function, name = (modulated_norm_linear, "modulated_norm_linear") if linear else (norm, "modulated_norm")
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    def loss(*tensors):
        return function(tensors[0] * 2, *tensors[1:]).square().sum()

    torch._dynamo.reset()
    torch.compile(loss, fullgraph=True, backend=backend)(*tensors)
    nodes = [node for graph in graphs for node in graph.graph.nodes if "opensora_fast" in str(node.target)]
    assert [str(node.target) for node in nodes] == [f"opensora_fast.{name}.default"]

    eager = torch.autograd.grad(loss(*tensors), tensors)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*tensors), tensors)
    assert all(torch.equal(*pair) for pair in zip(compiled, eager, strict=True))


@pytest.mark.parametrize("linear", [False, True], ids=["alone", "linear"])
def test_what_is_saved_for_the_backward(linear, place):
    tensors = inputs((2, 5, 24), torch.float32, place, 7 if linear else None)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        (modulated_norm_linear if linear else norm)(*tensors)
    x, shift, scale, *weight = (tensor.data_ptr() for tensor in tensors)
    inputs_saved = {x, scale, shift, weight[0]} if linear else {x, scale}
    statistics = [tensor for tensor in saved if tensor.data_ptr() not in inputs_saved]
    assert {tensor.data_ptr() for tensor in saved} >= inputs_saved
    assert [(tuple(tensor.shape), tensor.dtype) for tensor in statistics] == [((2, 5), torch.float32)] * 2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(x=torch.zeros(5, 24)), "x has 2 dimensions"),
        (dict(x=torch.zeros(2, 5, 24, dtype=torch.int64)), "x is torch.int64"),
        (dict(x=torch.zeros(2, 5, 0)), "x has 0 channels"),
        (dict(x=torch.zeros(2, 5, 8193)), "x has 8193 channels"),
        (dict(shift=torch.zeros(1, 24)), r"shift is \[1, 24\]"),
        (dict(scale=torch.zeros(2, 1, 24)), r"scale is \[2, 1, 24\]"),
        (dict(scale=torch.zeros(2, 24).double()), "scale is torch.float64"),
        (dict(shift=torch.zeros(2, 24, device="meta")), "shift is .* on meta"),
        (dict(weight=torch.zeros(7, 23)), r"weight is \[7, 23\]"),
        (dict(weight=torch.zeros(7, 24).half()), "weight is torch.float16"),
        (dict(bias=torch.zeros(8)), r"bias is \[8\]"),
        (dict(bias=torch.zeros(7).half()), "bias is torch.float16"),
    ],
)
def test_outside_of_the_envelope(change, named):
    good = dict(
        x=torch.zeros(2, 5, 24),
        shift=torch.zeros(2, 24),
        scale=torch.zeros(2, 24),
        weight=torch.zeros(7, 24),
        bias=torch.zeros(7),
    )
    modulated_norm_linear(*good.values())
    changed = good | change
    with pytest.raises(ValueError, match=named):
        modulated_norm_linear(*changed.values())
    if not change.keys() & {"weight", "bias"}:
        with pytest.raises(ValueError, match=named):
            norm(changed["x"], changed["shift"], changed["scale"])


def test_choice_says_why():
    able, unable = {"reference": "", "triton": ""}, {"reference": "", "triton": "no Triton"}
    shape = (1, 2, 3)
    assert modulated_norm.choose(shape, torch.float32, "cpu", able)[0] == "reference"
    assert modulated_norm.choose(shape, torch.float32, "cuda", able) == ("triton", "one fused pass over memory")
    assert modulated_norm.choose(shape, torch.float32, "cuda", unable) == ("reference", "no Triton")
    assert modulated_norm.missing_backends(torch.float32, "cuda").keys() == able.keys()


@given(
    st.tuples(st.integers(0, 2000), st.integers(0, 100_000), st.integers(1, 8192)),
    st.integers(4, 64),
    st.integers(1, 8),
    st.none() | st.integers(8, 16),
)
@settings(max_examples=200)
def test_tiles_cover_every_row_and_fit_the_registers(shape, warps, min_rows, max_rows):
    B, T, D = shape
    tile = choose_tile(shape, warps, stages=2, min_rows=min_rows, max_rows=max_rows)
    assert tile.rows * tile.programs >= T > tile.rows * (tile.programs - 1) or T == tile.programs == 0
    assert tile.block == launch.power_of_two(tile.block)
    assert -(-D // tile.block) <= 3
    assert tile.block <= 8 * 32 * tile.num_warps
    resident = modulated_norm.SMS * warps // tile.num_warps
    assert max_rows or B * tile.programs <= max(B, resident)


def test_tile_of_the_released_model():
    expected = Tile(block=1024, num_warps=4, rows=68, programs=132, stages=3)
    assert choose_tile((3, 8960, 3072), modulated_norm.BACKWARD_WARPS, stages=3, min_rows=4) == expected


def test_launches_without_data_or_a_gpu():
    x = torch.empty(2, 1_000_000, 3072, dtype=torch.bfloat16, device="meta")  # more than 2^31 elements
    vector = torch.empty(2, 3072, dtype=torch.bfloat16, device="meta")
    with launch.recorded() as launches:
        y, mean, rstd = modulated_norm.triton_forward(x, vector, vector, EPS)
        modulated_norm.triton_backward_with_y(y, x, vector, vector, mean, rstd)
    assert [record.kernel.__name__ for record in launches] == [
        "_forward_kernel",
        "_backward_kernel",
        "_sum_partials_kernel",
    ]
    assert y.shape == x.shape


def test_cost_counts_every_tensor_once():
    shape, out_features = (2, 10, 64), 48
    rows, vectors, statistics = 2 * 10 * 64 * 2, 2 * 64 * 2, 2 * 2 * 10 * 4
    weight, bias, out = 48 * 64 * 2, 48 * 2, 2 * 10 * 48 * 2

    def cost_bytes(mode, **kwargs):
        return modulated_norm.cost(shape, torch.bfloat16, mode, **kwargs).bytes

    assert cost_bytes("forward") == 2 * rows + 2 * vectors + statistics
    assert cost_bytes("backward") == 3 * rows + 3 * vectors + statistics
    linear = cost_bytes("forward", out_features=out_features) - cost_bytes("forward")
    assert linear == rows + weight + bias + out
    linear = cost_bytes("backward", out_features=out_features) - cost_bytes("backward")
    assert linear == 3 * rows + vectors + 2 * weight + bias + out
    flops = [
        modulated_norm.cost(shape, torch.bfloat16, mode, out_features=48).flops for mode in ("forward", "backward")
    ]
    assert min(flops) > 2 * 2 * 10 * 64 * 48
