"""The residual step that keeps no branch: against the composite, against the ops that keep it, and when it is taken."""

import pytest
import torch
import torch.nn.functional as F

from opensora_fast.kernels import gated_linear
from opensora_fast.kernels.gated_linear import gelu_linear_gated_residual

OP = "gated_linear"
NAMES = ("out", "d_x", "d_hidden", "d_weight", "d_bias", "d_gate", "d_attention")
each_attention = pytest.mark.parametrize("A", [0, 6], ids=["mlp", "joined"])


@pytest.fixture(autouse=True)
def every_sequence_is_long(monkeypatch):
    monkeypatch.setattr(gated_linear, "LONG_TOKENS", 0)


def inputs(B, T, D, M, A, dtype, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (B, T, D), "hidden": (B, T, M), "weight": (D, A + M), "bias": (D,), "gate": (B, D)}
    shapes |= {"attention": (B, T, A)} if A else {}
    random = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    random["weight"] /= (A + M) ** 0.5
    return [tensor.to(device, dtype).requires_grad_() for tensor in random.values()]


def ours(x, hidden, weight, bias, gate, attention=None):
    return gelu_linear_gated_residual(x, hidden, weight, bias, gate, attention_BTA=attention)


def composite(x, hidden, weight, bias, gate, attention=None):
    activated = F.gelu(hidden, approximate="tanh")
    joined = activated if attention is None else torch.cat((attention, activated), dim=-1)
    return x + gate[:, None] * F.linear(joined, weight, bias)


@each_attention
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 7, 12, 40), (1, 3, 5, 300), (3, 0, 4, 8)], ids=str)
def test_forward_and_gradients(shape, dtype, A, place, assert_as_exact):
    leaves = inputs(*shape, A, dtype, place)
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    grad = torch.randn(shape[:3], generator=torch.Generator().manual_seed(1)).to(place, dtype)
    results = []
    for function, tensors in ((ours, leaves), (composite, leaves), (composite, exact_leaves)):
        out = function(*tensors)
        results.append((out.detach(), *torch.autograd.grad(out, tensors, grad.to(out.dtype))))
    for name, *tensors in zip(NAMES, *results, strict=False):
        assert_as_exact(name, *tensors)


@each_attention
def test_gradients_of_float64(A, place):
    assert torch.autograd.gradcheck(ours, inputs(2, 3, 4, 5, A, torch.float64, place))


@each_attention
def test_equals_the_ops_that_keep_the_branch(A, monkeypatch):
    leaves = inputs(2, 7, 12, 40, A, torch.float64)
    dropped = ours(*leaves)
    d_dropped = torch.autograd.grad(dropped.sin().sum(), leaves)
    monkeypatch.setattr(gated_linear, "LONG_TOKENS", 8)
    kept = ours(*leaves)
    for one, other in zip(d_dropped, torch.autograd.grad(kept.sin().sum(), leaves), strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(dropped, kept)


@each_attention
def test_keeps_its_inputs_alone_and_not_x(A):
    leaves = inputs(2, 7, 12, 40, A, torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        ours(*leaves)
    assert {tensor.data_ptr() for tensor in kept} == {leaf.data_ptr() for leaf in leaves[1:]}


@each_attention
def test_opcheck(A):
    x, hidden, weight, bias, gate, *attention = inputs(2, 3, 4, 8, A, torch.float32)
    arguments = (hidden, weight, bias, gate, *(attention or [None]))
    torch.library.opcheck(gated_linear._gelu_linear_gated_residual, (x, *arguments))
    detached = [None if tensor is None else tensor.detach() for tensor in arguments]
    torch.library.opcheck(gated_linear._gelu_linear_gated_residual_backward, (torch.randn(2, 3, 4), *detached))


def test_compiles_into_one_node(place):
    leaves = inputs(2, 3, 4, 8, 0, torch.float32, place)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    eager = torch.autograd.grad(ours(*leaves).sum(), leaves)
    for one, other in zip(torch.autograd.grad(compiled(*leaves).sum(), leaves), eager, strict=True):
        assert torch.equal(one, other)


def test_bitwise_equal_over_runs(place):
    leaves = inputs(2, 7, 12, 40, 6, torch.bfloat16, place)
    runs = [torch.autograd.grad(ours(*leaves).float().square().sum(), leaves) for _ in range(2)]
    assert all(map(torch.equal, *runs))


def test_strided_dx_and_gate_are_taken(place):
    x, hidden, weight, bias, _ = inputs(2, 3, 4, 8, 0, torch.float32, place)
    chunks = torch.randn(2, 12, device=place, requires_grad=True)
    out = ours(x, hidden, weight, bias, chunks.chunk(3, dim=-1)[1])
    grad = torch.randn(2, 4, 3, device=place).mT
    expected = composite(x, hidden, weight, bias, chunks.chunk(3, dim=-1)[1])
    leaves = (x, hidden, weight, bias, chunks)
    for one, other in zip(
        torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_long_sequences_in_small_batches_drop_the_branch(monkeypatch):
    monkeypatch.undo()
    for shape, drops in (
        ((3, 8448), True),
        ((1, 19136), True),
        ((3, 512), False),
        ((45, 256), False),
        ((9, 8448), False),
    ):
        decided, reason = gated_linear.drops_branch(*shape)
        assert decided is drops
        assert reason


@pytest.mark.parametrize("long", [True, False], ids=["long", "short"])
@pytest.mark.parametrize("name", ["x", "hidden", "weight", "bias", "gate", "attention"])
def test_outside_of_the_envelope(name, long, monkeypatch):
    monkeypatch.setattr(gated_linear, "LONG_TOKENS", 0 if long else 8)
    names = ("x", "hidden", "weight", "bias", "gate", "attention")
    arguments = {key: leaf.detach() for key, leaf in zip(names, inputs(2, 3, 4, 8, 6, torch.float32), strict=True)}
    ours(*arguments.values())
    tensor = arguments[name]
    for wrong in (tensor[0], tensor.int(), torch.cat((tensor, tensor))):
        with pytest.raises(ValueError, match=r"(x|hidden|weight|bias|gate|attention) (is|has) "):
            ours(*(arguments | {name: wrong}).values())


def test_reference_is_the_composite():
    leaves = [leaf.detach() for leaf in inputs(2, 3, 4, 8, 6, torch.float64)]
    reference = gated_linear.gelu_linear_gated_residual_reference(*leaves)
    torch.testing.assert_close(reference, composite(*leaves), rtol=1e-12, atol=1e-12)


def test_choose_says_why():
    assert gated_linear.selected((1, 2, 3), torch.float32, "cpu")[0] == "reference"
    assert gated_linear.choose((1, 2, 3), torch.bfloat16, "cuda", {"triton": ""})[0] == "triton"
    assert gated_linear.choose((1, 2, 3), torch.bfloat16, "cuda", {"triton": "not here"}) == ("reference", "not here")


def test_cost_counts_every_tensor_once():
    B, D, J = 2, 4, 8
    g, weight, gate = B * D * J * 2, D * J * 2, B * D * 2
    assert gated_linear.cost(B, D, J, torch.bfloat16).bytes == g + 2 * weight + gate + B * D * 4
