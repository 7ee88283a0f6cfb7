"""The gated residual, alone and with the norm and linear that follow it, against the composites one would write."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from opensora_fast.kernels import gated_residual, launch, modulated_norm
from opensora_fast.kernels.gated_residual import gated_residual as residual
from opensora_fast.kernels.gated_residual import (
    gated_residual_modulated_norm,
    gated_residual_modulated_norm_linear,
)

OP = "gated_residual"
EPS = 1e-6
OUT_FEATURES = 7


def composite_residual(x, h, gate):
    return x + gate[:, None] * h


def composite_norm(x, h, gate, shift, scale):
    x_new = composite_residual(x, h, gate)
    return x_new, F.layer_norm(x_new, x.shape[-1:], eps=EPS) * (1 + scale[:, None]) + shift[:, None]


def composite_linear(x, h, gate, shift, scale, weight, bias):
    x_new, y = composite_norm(x, h, gate, shift, scale)
    return x_new, F.linear(y, weight, bias)


@dataclass(frozen=True)
class Function:
    """One function of the file: its first `inputs` of INPUTS, and the names of what it returns."""

    ours: object
    composite: object
    op: str
    inputs: int
    outputs: tuple[str, ...]


INPUTS = ("x", "h", "gate", "shift", "scale", "weight", "bias")
RESIDUAL = Function(residual, composite_residual, "gated_residual", 3, ("x_new",))
NORM = Function(gated_residual_modulated_norm, composite_norm, "gated_residual_modulated_norm", 5, ("x_new", "y"))
LINEAR = Function(
    gated_residual_modulated_norm_linear, composite_linear, "gated_residual_modulated_norm_linear", 7, ("x_new", "out")
)
each_function = pytest.mark.parametrize("function", [RESIDUAL, NORM, LINEAR], ids=["alone", "norm", "linear"])
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype).removeprefix("torch.")
)

# [B, T, D] as in the modulated norm's tests.
SHAPES = [(2, 5, 72), (2, 9, 257), (1, 3, 600), (1, 5, 3072), (0, 3, 8), (2, 0, 8)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))


def randn(shape, dtype, device, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def inputs(function, shape, dtype, device):
    B, _, D = shape
    shapes = [shape, shape, (B, D), (B, D), (B, D), (OUT_FEATURES, D), (OUT_FEATURES,)][: function.inputs]
    return [randn(shape, dtype, device, seed).requires_grad_() for seed, shape in enumerate(shapes)]


def grads(function, shape, dtype, device):
    """Random gradients of the outputs."""
    last = OUT_FEATURES if function is LINEAR else shape[2]
    return [randn((*shape[:2], size), dtype, device, seed) for seed, size in ((8, shape[2]), (9, last))][
        : len(function.outputs)
    ]


def outputs_of(call, tensors):
    outs = call(*tensors)
    return list(outs) if isinstance(outs, tuple) else [outs]


def results(call, tensors, output_grads):
    """The outputs and the gradients of all tensors."""
    tensors = [tensor.detach().to(output_grads[0].dtype).requires_grad_() for tensor in tensors]
    outs = outputs_of(call, tensors)
    return [out.detach() for out in outs] + list(torch.autograd.grad(outs, tensors, output_grads))


def assert_results(assert_as_exact, function, tensors, output_grads):
    ours = results(function.ours, tensors, output_grads)
    same = results(function.composite, tensors, output_grads)
    exact = results(function.composite, tensors, [grad.double() for grad in output_grads])
    names = [*function.outputs, *(f"d_{name}" for name in INPUTS[: function.inputs])]
    for name, *values in zip(names, ours, same, exact, strict=True):
        assert_as_exact(name, *values)
    assert all(out.is_contiguous() for out in ours[: len(function.outputs)])


@each_dtype
@each_shape
@each_function
def test_forward_and_gradients(function, shape, dtype, place, assert_as_exact):
    tensors = inputs(function, shape, dtype, place)
    assert_results(assert_as_exact, function, tensors, grads(function, shape, dtype, place))


@each_function
def test_gradients_of_float64(function, place):
    assert torch.autograd.gradcheck(function.ours, inputs(function, (2, 3, 5), torch.float64, place), fast_mode=True)


@each_function
def test_many_programs_and_a_second_stage_of_several_tiles(function, place, assert_as_exact, monkeypatch):
    monkeypatch.setattr(gated_residual, "MIN_BACKWARD_ROWS", 1)
    monkeypatch.setattr(modulated_norm, "SUM_ROWS", 4)
    shape = (2, 9, 40)
    tensors = inputs(function, shape, torch.float32, place)
    assert_results(assert_as_exact, function, tensors, grads(function, shape, torch.float32, place))


@pytest.mark.parametrize("function", [NORM, LINEAR], ids=["norm", "linear"])
@pytest.mark.parametrize("used", [0, 1])
def test_one_of_the_two_outputs_used(function, used, place):
    shape = (2, 5, 24)
    tensors = inputs(function, shape, torch.float32, place)
    grad = grads(function, shape, torch.float32, place)[used]

    def gradients(call):
        out = call(*tensors)[used]
        return torch.autograd.grad(out, tensors, grad, allow_unused=True)

    for ours, expected in zip(gradients(function.ours), gradients(function.composite), strict=True):
        assert (ours is None) == (expected is None)
        if ours is not None:
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_linear_without_bias_and_with_frozen_parts(place):
    shape = (2, 5, 24)
    tensors = dict(
        zip(INPUTS, (tensor.detach() for tensor in inputs(LINEAR, shape, torch.float32, place)), strict=True)
    )
    output_grads = grads(LINEAR, shape, torch.float32, place)

    def gradients(call, wanted, with_bias):
        leaves = {name: tensor.clone().requires_grad_(name in wanted) for name, tensor in tensors.items()}
        leaves["bias"] = leaves["bias"] if with_bias else None
        outs = [
            (out, grad) for out, grad in zip(call(*leaves.values()), output_grads, strict=True) if out.requires_grad
        ]
        torch.autograd.backward(*zip(*outs, strict=True))
        return {name: leaf.grad for name, leaf in leaves.items() if leaf is not None}

    for wanted in (("x", "h", "gate", "shift", "scale"), ("weight",), ("x", "bias"), ("x",), ("gate", "weight")):
        for with_bias in (True,) if "bias" in wanted else (True, False):
            ours = gradients(LINEAR.ours, wanted, with_bias)
            expected = gradients(LINEAR.composite, wanted, with_bias)
            for name, grad in expected.items():
                assert (ours[name] is None) == (grad is None), name
                if grad is not None:
                    torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_fused_it_equals_the_two_ops_in_turn(dtype, place, set_backend):
    name = gated_residual.selected((2, 5, 72), dtype, place.type)[0]
    set_backend(f"gated_residual:{name},modulated_norm:{name}")
    x, h, gate, shift, scale = inputs(NORM, (2, 5, 72), dtype, place)
    x_new, y = gated_residual_modulated_norm(x, h, gate, shift, scale)
    expected = residual(x, h, gate)
    assert torch.equal(x_new, expected)
    rounding = torch.finfo(dtype).eps  # a compiler may contract the two kernels' products and sums differently
    torch.testing.assert_close(
        y, modulated_norm.modulated_norm(expected, shift, scale), rtol=rounding, atol=4 * rounding
    )


def test_reference_backward_is_the_autograd_of_the_reference(monkeypatch):
    monkeypatch.setattr(modulated_norm, "CPU_PIECE", 48)  # two rows, of five
    x, h, gate, shift, scale = tensors = inputs(NORM, (2, 5, 24), torch.float64, "cpu")
    dx_new, dy = grads(NORM, (2, 5, 24), torch.float64, "cpu")
    x_new, y, mean, rstd = gated_residual.gated_residual_modulated_norm_reference(*tensors)
    expected = torch.autograd.grad((x_new, y), tensors, (dx_new, dy))
    with torch.no_grad():
        backward = gated_residual.gated_residual_modulated_norm_backward_reference
        ours = backward(dx_new, dy, x, h, gate, scale, mean, rstd)
    torch.testing.assert_close(ours, expected)

    expected = torch.autograd.grad(gated_residual.gated_residual_reference(x, h, gate), (h, gate), dx_new)
    with torch.no_grad():
        torch.testing.assert_close(gated_residual.gated_residual_backward_reference(dx_new, h, gate), expected)


def test_a_closed_gate_changes_nothing(place):
    x, h, gate = (tensor.detach() for tensor in inputs(RESIDUAL, (2, 5, 72), torch.bfloat16, place))
    assert torch.equal(residual(x, h, torch.zeros_like(gate)), x)


def test_residual_gets_the_gradient_itself():
    x, h, gate = inputs(RESIDUAL, (2, 5, 72), torch.float32, "cpu")
    grad = torch.randn(2, 5, 72)
    (d_x,) = torch.autograd.grad(residual(x, h, gate), x, grad)
    assert d_x.data_ptr() == grad.data_ptr()


@each_function
def test_views_of_wider_buffers(function, place):
    B, T, D = shape = (2, 5, 24)
    tensors = [tensor.detach() for tensor in inputs(function, shape, torch.float32, place)]
    x, h = randn((T, 2, B, D + 8), torch.float32, place, 0).permute(1, 2, 0, 3)[..., 4:-4].unbind()
    vectors = randn((B, 3 * D), torch.float32, place, 1).chunk(3, dim=-1)[: max(0, function.inputs - 2)]
    views = [x, h, *vectors, *tensors[2 + len(vectors) :]]
    output_grads = grads(function, shape, torch.float32, place)
    contiguous = results(function.ours, [view.contiguous() for view in views], output_grads)
    strided = [torch.stack([view, view], dim=-1)[..., 0] for view in views[:-2]] + views[-2:]
    transposed = [grad.transpose(0, 2).contiguous().transpose(0, 2) for grad in output_grads]
    for call in ((views, transposed), (strided, output_grads)):
        for pair in zip(results(function.ours, *call), contiguous, strict=True):
            torch.testing.assert_close(*pair)


@each_function
def test_bitwise_equal_over_runs(function, place):
    shape = (2, 9, 72)
    arguments = (
        function.ours,
        inputs(function, shape, torch.bfloat16, place),
        grads(function, shape, torch.bfloat16, place),
    )
    assert all(torch.equal(*pair) for pair in zip(results(*arguments), results(*arguments), strict=True))


def test_opcheck():
    shape = (2, 5, 24)
    check = torch.library.opcheck
    x, h, gate, shift, scale, weight, bias = tensors = inputs(LINEAR, shape, torch.bfloat16, "cpu")
    plain = [tensor.detach() for tensor in tensors]
    dx_new, dout = grads(LINEAR, shape, torch.bfloat16, "cpu")
    mean, rstd = (tensor.detach() for tensor in gated_residual._gated_residual_modulated_norm(*tensors[:5], EPS)[2:])

    check(gated_residual._gated_residual, (x, h, gate))
    check(gated_residual._gated_residual_backward, (dx_new, *plain[1:3]))
    check(gated_residual._gated_residual_modulated_norm, (x, h, gate, shift, scale, EPS))
    x, h, gate, shift, scale, weight, _ = plain
    dy = torch.randn_like(x)
    check(
        gated_residual._gated_residual_modulated_norm_backward,
        (dx_new, dy, x, h, gate, scale, mean, rstd),
    )
    check(gated_residual._gated_residual_modulated_norm_linear, (*tensors, EPS))
    check(gated_residual._gated_residual_modulated_norm_linear, (*tensors[:6], None, EPS))
    for wanted in ((True, True), (False, False)):
        arguments = (dx_new, dout, x, h, gate, shift, scale, weight, mean, rstd, EPS, *wanted)
        check(gated_residual._gated_residual_modulated_norm_linear_backward, arguments)


@each_function
def test_compiles_into_one_graph_with_one_node(function, place):
    tensors = inputs(function, (2, 5, 24), torch.float32, place)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    def loss(*tensors):
        return sum(out.square().sum() for out in outputs_of(function.ours, (tensors[0] * 2, *tensors[1:])))

    torch._dynamo.reset()
    torch.compile(loss, fullgraph=True, backend=backend)(*tensors)
    nodes = [node for graph in graphs for node in graph.graph.nodes if "opensora_fast" in str(node.target)]
    assert [str(node.target) for node in nodes] == [f"opensora_fast.{function.op}.default"]

    eager = torch.autograd.grad(loss(*tensors), tensors)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*tensors), tensors)
    assert all(torch.equal(*pair) for pair in zip(compiled, eager, strict=True))


@pytest.mark.parametrize(
    ("function", "names"),
    [(RESIDUAL, "h gate"), (NORM, "x h gate scale"), (LINEAR, "x h gate shift scale weight")],
    ids=["alone", "norm", "linear"],
)
def test_what_is_saved_for_the_backward(function, names, place):
    tensors = inputs(function, (2, 5, 24), torch.float32, place)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        function.ours(*tensors)
    inputs_by_pointer = {tensor.data_ptr(): name for tensor, name in zip(tensors, INPUTS, strict=False)}
    assert {inputs_by_pointer.get(tensor.data_ptr(), "statistics") for tensor in saved} - {"statistics"} == set(
        names.split()
    )
    made = [tensor for tensor in saved if tensor.data_ptr() not in inputs_by_pointer]
    statistics = [] if function is RESIDUAL else [((2, 5), torch.float32)] * 2
    assert [(tuple(tensor.shape), tensor.dtype) for tensor in made] == statistics


@each_function
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(x=torch.zeros(5, 24)), "x has 2 dimensions"),
        (dict(x=torch.zeros(2, 5, 24).int()), "x is torch.int32"),
        (dict(x=torch.zeros(2, 5, 8193)), "x has 8193 channels"),
        (dict(h=torch.zeros(2, 4, 24)), r"h is \[2, 4, 24\]"),
        (dict(h=torch.zeros(2, 5, 24).half()), "h is torch.float16"),
        (dict(gate=torch.zeros(1, 24)), r"gate is \[1, 24\]"),
        (dict(shift=torch.zeros(24)), r"shift is \[24\]"),
        (dict(scale=torch.zeros(2, 24, device="meta")), "scale is .* on meta"),
        (dict(weight=torch.zeros(24)), r"weight is \[24\]"),
        (dict(bias=torch.zeros(8)), r"bias is \[8\]"),
    ],
)
def test_outside_of_the_envelope(function, change, named):
    good = dict(zip(INPUTS, inputs(function, (2, 5, 24), torch.float32, "cpu"), strict=False))
    if not change.keys() <= good.keys():
        return
    with pytest.raises(ValueError, match=named):
        function.ours(*(good | change).values())


def test_choice_says_why():
    able, unable = {"reference": "", "triton": ""}, {"reference": "", "triton": "no Triton"}
    shape = (1, 2, 3)
    assert gated_residual.choose(shape, torch.float32, "cpu", able)[0] == "reference"
    assert gated_residual.choose(shape, torch.float32, "cuda", able) == ("triton", "one fused pass over memory")
    assert gated_residual.choose(shape, torch.float32, "cuda", unable) == ("reference", "no Triton")
    assert gated_residual.missing_backends(torch.float32, "cuda").keys() == able.keys()


def test_launches_without_data_or_a_gpu():
    x = torch.empty(2, 1_000_000, 3072, dtype=torch.bfloat16, device="meta")  # more than 2^31 elements
    vector = torch.empty(2, 3072, dtype=torch.bfloat16, device="meta")
    with launch.recorded() as launches:
        x_new = gated_residual.triton_gated_residual_forward(x, x, vector)
        gated_residual.triton_gated_residual_backward(x_new, x, vector)
        _, y, mean, rstd = gated_residual.triton_gated_residual_modulated_norm_forward(x, x, *[vector] * 3, EPS)
        gated_residual.triton_gated_residual_modulated_norm_backward(x_new, y, x, x, vector, vector, mean, rstd)
    assert [record.kernel.__name__ for record in launches] == [
        "_residual_forward_kernel",
        "_residual_backward_kernel",
        "_sum_partials_kernel",
        "_pair_forward_kernel",
        "_pair_backward_kernel",
        "_sum_partials_kernel",
    ]


def test_cost_counts_every_tensor_once():
    shape, out_features = (2, 10, 64), 48
    rows, vectors, statistics = 2 * 10 * 64 * 2, 2 * 64 * 2, 2 * 2 * 10 * 4
    weight, bias, out = 48 * 64 * 2, 48 * 2, 2 * 10 * 48 * 2

    def cost_bytes(mode, **kwargs):
        return gated_residual.cost(shape, torch.bfloat16, mode, **kwargs).bytes

    assert cost_bytes("forward") == 3 * rows + vectors
    assert cost_bytes("backward") == 3 * rows + 2 * vectors
    assert cost_bytes("forward", norm=True) == 4 * rows + 3 * vectors + statistics
    assert cost_bytes("backward", norm=True) == 6 * rows + 5 * vectors + statistics
    linear = cost_bytes("forward", out_features=out_features) - cost_bytes("forward", norm=True)
    assert linear == rows + weight + bias + out
    linear = cost_bytes("backward", out_features=out_features) - cost_bytes("backward", norm=True)
    assert linear == 3 * rows + vectors + 2 * weight + bias + out
