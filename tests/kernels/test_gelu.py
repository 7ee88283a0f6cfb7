"""GELU and the linears behind it against the chain of bias, GELU, concatenation and linear, both ways."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from opensora_fast.kernels import gelu as op
from opensora_fast.kernels.gelu import attention_gelu_linear, gelu_linear, gelu_tanh

OP = "gelu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))

# Odd sizes; one row of channels alone; more rows and columns than a program of the backward's sum holds; nothing.
SHAPES = {"odd": (2, 3, 37), "vector": (72,), "long": (35, 1100), "no-rows": (0, 2, 8), "no-channels": (3, 0)}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
each_bias = pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])

# Leading shape, D (None: no attention), M, O.
LINEARS = {
    "gelu": ((2, 5), None, 24, 7),
    "joined": ((2, 5), 9, 24, 7),
    "joined-wide": ((3,), 1100, 40, 8),
    "empty": ((0, 5), 4, 8, 3),
}
each_linear = pytest.mark.parametrize("sizes", LINEARS.values(), ids=LINEARS)


def leaves(*shapes, dtype, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def gelu_chain(x, bias=None):
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


def linear_chain(*tensors):
    *attention, hidden, weight, bias = tensors
    return F.linear(torch.cat((*attention, gelu_chain(hidden)), dim=-1), weight, bias)


def linear(*tensors):
    return (gelu_linear if len(tensors) == 3 else attention_gelu_linear)(*tensors)


def linear_leaves(sizes, dtype, device="cpu"):
    leading, D, M, O = sizes  # noqa: E741
    shapes = [] if D is None else [(*leading, D)]
    return leaves(*shapes, (*leading, M), (O, (D or 0) + M), (O,), dtype=dtype, device=device)


def results(function, tensors):
    """The output and the gradients of all tensors."""
    out = function(*tensors)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device, tensors[0].dtype)
    return out, *torch.autograd.grad(out, tensors, weights.to(out.dtype))


def exactly(tensors):
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


@each_bias
@each_dtype
@each_shape
def test_gelu_forward_and_gradients(shape, dtype, with_bias, place, assert_as_exact):
    tensors = leaves(shape, *([shape[-1:]] if with_bias else []), dtype=dtype, device=place)
    exact = exactly(tensors)
    compared = results(gelu_tanh, tensors), results(gelu_chain, tensors), results(gelu_chain, exact)
    for name, ours, same, exact in zip(("y", "dx", "dbias"), *compared, strict=False):
        assert ours.is_contiguous(), name
        assert_as_exact(name, ours, same, exact)


@each_dtype
@each_linear
def test_linear_forward_and_gradients(sizes, dtype, place, assert_as_exact):
    tensors = linear_leaves(sizes, dtype, place)
    exact = exactly(tensors)
    compared = results(linear, tensors), results(linear_chain, tensors), results(linear_chain, exact)
    names = ("y", "dattention", "dhidden", "dweight", "dbias")
    for name, ours, same, exact in zip(names if len(tensors) == 4 else (names[0], *names[2:]), *compared, strict=True):
        assert ours.is_contiguous(), name
        assert_as_exact(name, ours, same, exact)


@each_bias
def test_the_backward_is_the_autograd_of_the_reference(with_bias, place):
    tensors = leaves((3, 41), *([(41,)] if with_bias else []), dtype=torch.float64, device=place)
    for ours, expected in zip(results(gelu_tanh, tensors), results(op.gelu_reference, tensors), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("function", [gelu_tanh, gelu_linear, attention_gelu_linear])
def test_gradcheck(function, place):
    shapes = {
        gelu_tanh: [(2, 3), (3,)],
        gelu_linear: [(1, 2, 3), (2, 3), (2,)],
        attention_gelu_linear: [(1, 2, 2), (1, 2, 3), (2, 5), (2,)],
    }[function]
    assert torch.autograd.gradcheck(function, leaves(*shapes, dtype=torch.float64, device=place))


@each_bias
def test_opcheck_gelu(with_bias, place):
    x, bias = leaves((2, 2, 5), (5,), dtype=torch.float32, device=place)
    bias = bias if with_bias else None
    torch.library.opcheck(op._gelu_tanh, (x, bias))
    detached = None if bias is None else bias.detach()
    torch.library.opcheck(op._gelu_tanh_backward, (x.detach(), x.detach(), detached))


@pytest.mark.parametrize("with_attention", [True, False], ids=["joined", "gelu"])
def test_opcheck_linear(with_attention, place):
    *attention, hidden, weight, bias = linear_leaves(
        ((1, 2), 2 if with_attention else None, 4, 3), torch.float32, place
    )
    attention = attention[0] if attention else None
    torch.library.opcheck(op._gelu_linear, (hidden, weight, bias, attention))
    plain = [None if tensor is None else tensor.detach() for tensor in (hidden, weight, attention)]
    dy = torch.randn(1, 2, 3, device=place)
    for needs in ((True, True, True), (False, True, False)):
        torch.library.opcheck(op._gelu_linear_backward, (dy, *plain, *needs))


@pytest.mark.parametrize("function", [gelu_tanh, gelu_linear, attention_gelu_linear])
def test_compiles_into_one_node(function, place):
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    if function is gelu_tanh:
        tensors = leaves((2, 3, 8), (8,), dtype=torch.float32, device=place)
    else:
        sizes = LINEARS["gelu" if function is gelu_linear else "joined"]
        tensors = linear_leaves(sizes, torch.float32, place)
    compiled = results(torch.compile(function, fullgraph=True, backend=backend), tensors)
    calls = [node for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    assert len([node for node in calls if "opensora_fast" in str(node.target)]) == 1
    for got, expected in zip(compiled, results(function, tensors), strict=True):
        assert torch.equal(got, expected)


@each_dtype
def test_two_runs_are_bitwise_equal(dtype, place):
    runs = []
    for _ in range(2):
        gelu = results(gelu_tanh, leaves(SHAPES["long"], SHAPES["long"][-1:], dtype=dtype, device=place))
        runs.append((*gelu, *results(linear, linear_leaves(LINEARS["joined"], dtype, place))))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_limits(place):
    x = torch.tensor([[-1e4, -50.0, 0.0, 50.0, 1e4]], device=place, requires_grad=True)
    y = gelu_tanh(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    nearly = dict(rtol=0, atol=1e-26)
    torch.testing.assert_close(y, torch.tensor([[0.0, 0.0, 0.0, 50.0, 1e4]], device=place), **nearly)
    torch.testing.assert_close(slope, torch.tensor([[0.0, 0.0, 0.5, 1.0, 1.0]], device=place), **nearly)


def test_a_weight_of_ones_and_zeros_shows_the_joined_buffer(place):
    attention, hidden, _, _ = linear_leaves(LINEARS["joined"], torch.float32, place)
    eye = torch.eye(attention.shape[-1] + hidden.shape[-1], device=place)
    joined = attention_gelu_linear(attention, hidden, eye, eye.new_zeros(len(eye)))
    assert torch.equal(joined[..., : attention.shape[-1]], attention)
    torch.testing.assert_close(joined[..., attention.shape[-1] :], gelu_chain(hidden))


@given(x=st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=9), shift=st.floats(-5, 5, width=32))
@settings(max_examples=50)
def test_gelu_minus_its_mirror_is_the_identity_and_a_bias_is_a_shift(x, shift):
    x = torch.tensor(x, dtype=torch.float64)
    torch.testing.assert_close(gelu_tanh(x) - gelu_tanh(-x), x, rtol=1e-12, atol=1e-12)
    assert torch.equal(gelu_tanh(x, torch.full_like(x, shift)), gelu_tanh(x + shift))


def test_layouts(place):
    """Slices of a wider projection, transposed and expanded tensors, and rows without one stride."""
    (wide,) = leaves((2, 5, 50), dtype=torch.float32, device=place)
    views = {
        "slice": wide[..., 3:40],
        "strided": wide[..., ::2],
        "transposed": wide.transpose(1, 2),
        "no-one-stride": wide[:, :3, :7],
        "expanded": wide[:1, :1].expand(4, 3, 50),
    }
    for name, x in views.items():
        dy = torch.randn(x.mT.shape, generator=torch.Generator().manual_seed(2)).to(place).mT
        ours, expected = gelu_tanh(x), gelu_tanh(x.contiguous())
        torch.testing.assert_close(ours, expected, msg=lambda text, name=name: f"{name}: {text}")
        gradients = [torch.autograd.grad(y, wide, dy)[0] for y in (ours, expected)]
        torch.testing.assert_close(*gradients, msg=lambda text, name=name: f"{name}: {text}")


def test_the_hidden_of_a_wider_projection_is_not_copied(place):
    (wide,) = leaves((2, 5, 50), dtype=torch.float32, device=place)
    assert op.as_rows(wide[..., 3:40]).data_ptr() == wide[..., 3:].data_ptr()
    attention, weight, bias = leaves((2, 5, 6), (4, 43), (4,), dtype=torch.float32, device=place)
    expected = results(linear, [attention, wide[..., 3:40].detach().clone().requires_grad_(), weight, bias])
    hidden = wide[..., 3:40].detach().requires_grad_()
    assert hidden.stride() == (250, 50, 1)
    for got, wanted in zip(results(linear, [attention, hidden, weight, bias]), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
def test_only_what_is_asked_for_is_computed(kept, place):
    tensors = linear_leaves(LINEARS["joined"], torch.float32, place)
    expected = results(linear, tensors)[1 + kept]
    for index, tensor in enumerate(tensors):
        tensor.requires_grad_(index == kept)
    out = linear(*tensors)
    dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(place)
    (gradient,) = torch.autograd.grad(out, tensors[kept], dy)
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("name", ["gelu", "joined"])
def test_what_is_saved(name, place):
    tensors = linear_leaves(LINEARS[name], torch.float32, place)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        linear(*tensors)
    assert {tensor.data_ptr() for tensor in saved} == {tensor.data_ptr() for tensor in tensors[:-1]}


def test_choose_says_why():
    shape, missing = (3, 8960, 12288), {"reference": "", "triton": ""}
    assert op.choose(shape, torch.bfloat16, "cuda", missing)[0] == "triton"
    assert op.choose(shape, torch.bfloat16, "cuda", missing | {"triton": "no wheel"}) == ("reference", "no wheel")
    assert op.selected(shape, torch.bfloat16, "cpu")[0] == "reference"
    assert "CPU" in op.selected(shape, torch.bfloat16, "cpu")[1]


@pytest.mark.parametrize("element_bytes", [2, 4, 8])
@pytest.mark.parametrize("columns", [0, 1, 37, 1024, 12288])
def test_tiles_are_two_accesses_of_16_bytes(columns, element_bytes):
    tile = op.choose_tile(columns, element_bytes, sums=True)
    assert tile.rows * tile.columns * element_bytes == 2 * 16 * 32 * tile.num_warps
    assert tile.columns & (tile.columns - 1) == 0
    assert op.choose_tile(columns, element_bytes, sums=False).steps == 1


def test_the_envelope_names_the_argument():
    x, attention = torch.zeros(2, 3, 8), torch.zeros(2, 3, 4)
    weight, bias = torch.zeros(5, 12), torch.zeros(5)
    with pytest.raises(ValueError, match=r"x is \[\]"):
        gelu_tanh(torch.zeros(()))
    with pytest.raises(ValueError, match="x is torch.int64"):
        gelu_tanh(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"bias is \[7\]; it must be \[8\]"):
        gelu_tanh(x, torch.zeros(7))
    with pytest.raises(ValueError, match="bias is torch.float64"):
        gelu_tanh(x, torch.zeros(8).double())
    with pytest.raises(ValueError, match=r"weight is \[5, 12\]; it must be \[O, 8\]"):
        gelu_linear(x, weight, bias)
    with pytest.raises(ValueError, match=r"bias is \[4\]; it must be \[5\]"):
        attention_gelu_linear(attention, x, weight, bias[:4])
    with pytest.raises(ValueError, match=r"attention is \[2, 2, 4\]; it must be \[2, 3, D\]"):
        attention_gelu_linear(attention[:, :2], x, weight, bias)
    with pytest.raises(ValueError, match="weight is torch.bfloat16"):
        attention_gelu_linear(attention, x, weight.bfloat16(), bias)


def test_launches_without_reading_data():
    def meta(*shape):
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    hidden, attention, dy = meta(4480, 21504)[:, 9216:], meta(4480, 3072), meta(4480, 12288)
    with op.launch.recorded() as launches:
        op.triton_forward(hidden, None, attention)
        op.triton_backward(dy, hidden, None, attention, with_output=True)
        op.triton_backward(dy, hidden, meta(12288))
    names = [launch.kernel.__name__ for launch in launches]
    assert names == ["_forward_kernel", "_backward_kernel", "_backward_kernel", "_sum_kernel"]
    blocks = math.ceil(4480 / 2) * (12 + 3)
    assert [launch.grid for launch in launches[:2]] == [(blocks,), (blocks,)]


def test_cost_counts_every_tensor_once():
    R, D, M, O = 100, 8, 32, 16  # noqa: E741
    dtype = torch.bfloat16
    assert op.cost(R, M, dtype, "forward").bytes == 2 * (2 * R * M)
    assert op.cost(R, M, dtype, "backward", bias=True).bytes == 2 * (3 * R * M + 2 * M)
    inputs, weight = R * (D + M), O * (D + M)
    assert op.linear_cost(R, M, O, dtype, "forward", D=D).bytes == 2 * (inputs + weight + O + R * O)
    assert op.linear_cost(R, M, O, dtype, "backward", D=D).bytes == 2 * (2 * inputs + 2 * weight + O + R * O)
    assert op.linear_cost(R, M, O, dtype, "forward").flops == 2 * R * M * O + 10 * R * M
