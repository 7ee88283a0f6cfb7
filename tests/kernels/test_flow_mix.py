"""The path and its velocity, and the loss with its gradient, against PyTorch's own composites."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from opensora_fast.kernels import flow_mix as op
from opensora_fast.kernels import launch
from opensora_fast.kernels.flow_mix import SIGMA_MIN, flow_mix, velocity_loss

OP = "flow_mix"
# odd, a sample of more than one block, one element a sample, only a batch, no samples, no elements
SHAPES = [(2, 3, 2, 5, 7), (3, 2049), (4, 1), (5,), (0, 3), (2, 0)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)


def _pair(shape, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2)]


def _times(batch, device):
    return torch.rand(batch, generator=torch.Generator().manual_seed(1)).to(device)


def _eager(x0, noise, t):
    """The composite, in the dtype of its inputs."""
    t = t.to(x0.dtype).view(-1, *[1] * (x0.dim() - 1))
    return (1 - t) * x0 + (1 - (1 - SIGMA_MIN) * (1 - t)) * noise, (1 - SIGMA_MIN) * noise - x0


@each_dtype
@each_shape
def test_mix_is_the_formula(place, shape, dtype, assert_as_exact):
    x0, noise = _pair(shape, dtype, place)
    t = _times(shape[0], place)
    exact = _eager(x0.double(), noise.double(), t)
    for name, ours, same, e in zip(("x_t", "v"), flow_mix(x0, noise, t), _eager(x0, noise, t), exact, strict=True):
        assert_as_exact(name, ours, same, e)
        assert ours.is_contiguous()


def test_ends_of_the_path(place):
    x0, noise = _pair((2, 9), torch.float64, place)
    x_t, _ = flow_mix(x0, noise, torch.tensor([0.0, 1.0], device=place))
    torch.testing.assert_close(x_t[0], x0[0] + SIGMA_MIN * noise[0], rtol=1e-15, atol=1e-15)
    assert torch.equal(x_t[1], noise[1])


@settings(max_examples=20)
@given(t=st.floats(0, 1), step=st.floats(-1, 1))
def test_velocity_is_the_slope_anywhere(t, step):
    x0, noise = _pair((1, 7), torch.float64, "cpu")
    before, velocity = flow_mix(x0, noise, torch.tensor([t], dtype=torch.float64))
    after, _ = flow_mix(x0, noise, torch.tensor([t + step], dtype=torch.float64))
    torch.testing.assert_close(after - before, step * velocity, rtol=0, atol=1e-14)


def test_no_sigma_is_a_straight_mean(place):
    x0, noise = _pair((2, 5), torch.float32, place)
    x_t, velocity = flow_mix(x0, noise, torch.full((2,), 0.5, device=place), sigma_min=0.0)
    assert torch.equal(x_t, 0.5 * x0 + 0.5 * noise)
    assert torch.equal(velocity, noise - x0)


def test_outputs_may_have_another_dtype_than_inputs(place):
    x0, noise = _pair((2, 5), torch.bfloat16, place)
    wide = flow_mix(x0, noise, _times(2, place), dtype=torch.float32)
    narrow = flow_mix(x0, noise, _times(2, place))
    for a, b in zip(wide, narrow, strict=True):
        assert (a.dtype, b.dtype) == (torch.float32, torch.bfloat16)
        assert torch.equal(a.bfloat16(), b)


def test_strided_inputs_are_read_by_index(place):
    x0, noise = _pair((3, 4, 5), torch.float32, place)
    t = _times(6, place)[::2]
    turned = flow_mix(x0.transpose(1, 2), noise.transpose(1, 2), t)
    straight = flow_mix(x0, noise, t.contiguous())
    assert all(torch.equal(a, b.transpose(1, 2)) for a, b in zip(turned, straight, strict=True))


def test_mix_has_no_derivative(place):
    x0, noise = _pair((2, 3), torch.float32, place)
    with pytest.raises(RuntimeError):
        flow_mix(x0.requires_grad_(), noise, _times(2, place))[0].sum().backward()


@each_dtype
@each_shape
def test_loss_and_its_gradient_are_mse_loss(place, shape, dtype, assert_as_exact):
    prediction, target = _pair(shape, dtype, place)
    prediction.requires_grad_()
    loss = velocity_loss(prediction, target)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    if prediction.numel() == 0:
        assert loss.isnan()
        return
    (gradient,) = torch.autograd.grad(4 * loss, prediction)
    exact = F.mse_loss(prediction.double(), target.double())
    same = F.mse_loss(prediction.to(loss.dtype), target.to(loss.dtype))
    assert_as_exact("loss", loss, same, exact)
    (same_gradient,) = torch.autograd.grad(4 * F.mse_loss(prediction, target), prediction)
    assert_as_exact("gradient", gradient, same_gradient, *torch.autograd.grad(4 * exact, prediction))


def test_loss_of_a_bf16_prediction_uses_all_of_an_fp32_target(place):
    prediction, target = _pair((4, 33), torch.float32, place)
    prediction = prediction.bfloat16().requires_grad_()
    loss = velocity_loss(prediction, target)
    torch.testing.assert_close(loss, F.mse_loss(prediction.float(), target), rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(loss, prediction)
    assert torch.equal(gradient, (2 / 132 * (prediction.float() - target)).bfloat16())


def test_loss_of_nothing_to_predict_is_zero(place):
    prediction = torch.randn(3, 5, device=place).requires_grad_()
    loss = velocity_loss(prediction, prediction.detach())
    loss.backward()
    assert loss == 0
    assert not prediction.grad.any()


@pytest.mark.parametrize("asks", [True, False])
def test_loss_saves_a_gradient_only_where_one_is_asked_for(place, asks):
    saved = []
    prediction, target = _pair((4, 5), torch.bfloat16, place)
    prediction.requires_grad_()
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
        torch.set_grad_enabled(asks),
    ):
        velocity_loss(prediction, target)
    assert [(t.shape, t.dtype) for t in saved] == ([((4, 5), torch.bfloat16)] if asks else [])


# Two programs and a rest; more programs than there may be would need an array too large for a test.
def test_partial_sums_cover_everything_once(place):
    size = 2 * op.choose_tile().block + 3
    target = torch.zeros(size, device=place)
    prediction = torch.ones(size, device=place).requires_grad_()
    loss = velocity_loss(prediction, target)
    loss.backward()
    assert loss == 1
    assert torch.equal(prediction.grad, torch.full_like(prediction, 2 / size))


def test_programs_are_bounded_and_cover_any_size():
    tile = op.choose_tile()
    for size in (1, tile.block, tile.block * tile.programs, tile.block * tile.programs + 1, 10**9, 10**11):
        with launch.recorded() as launches:
            op.triton_velocity_loss_forward(*(torch.empty(size, device="meta") for _ in range(2)), True)
        (one,) = launches
        assert one.grid[0] <= tile.programs
        assert (one.grid[0] - 1) * one.arguments["blocks"] * tile.block < size
        assert size <= one.grid[0] * one.arguments["blocks"] * tile.block


def test_gradcheck(place):
    prediction, target = _pair((3, 4), torch.float64, place)
    assert torch.autograd.gradcheck(lambda p: velocity_loss(p, target), prediction.requires_grad_())


def test_two_runs_are_bitwise_equal(place):
    prediction, target = _pair((3, 4099), torch.bfloat16, place)
    prediction.requires_grad_()
    runs = []
    for _ in range(2):
        loss = velocity_loss(prediction, target)
        mixed = flow_mix(prediction.detach(), target, _times(3, place))
        runs.append((loss.detach(), *torch.autograd.grad(loss, prediction), *mixed))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_opcheck(place):
    x0, noise = _pair((2, 3, 5), torch.float32, place)
    torch.library.opcheck(op._flow_mix, (x0, noise, _times(2, place), SIGMA_MIN, torch.bfloat16))
    torch.library.opcheck(op._velocity_loss, (x0.clone().requires_grad_(), noise, True))
    torch.library.opcheck(op._velocity_loss, (x0, noise, False))


def test_compiled_equals_eager_with_a_node_per_op(place):
    nodes = []

    def backend(graph, inputs):
        nodes.extend(str(node.target) for node in graph.graph.nodes if "opensora_fast" in str(node.target))
        return graph

    def step(x0, noise, t, weight):
        x_t, velocity = flow_mix(x0, noise, t)
        return velocity_loss(x_t * weight, velocity)

    x0, noise = _pair((2, 3, 5), torch.float32, place)
    t, weight = _times(2, place), torch.full((5,), 0.3, device=place, requires_grad=True)
    eager = step(x0, noise, t, weight)
    torch.compile(step, fullgraph=True, backend=backend)(x0, noise, t, weight)
    assert len(nodes) == 2, nodes
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(x0, noise, t, weight)
    assert torch.equal(eager, compiled)
    assert torch.equal(*(torch.autograd.grad(loss, weight)[0] for loss in (eager, compiled)))


def test_errors_name_the_argument():
    x, t = torch.zeros(2, 3), torch.zeros(2)
    for call, named in (
        (lambda: flow_mix(x.long(), x, t), "x0 is torch.int64"),
        (lambda: flow_mix(t.sum(), t.sum(), t), "x0 is a scalar"),
        (lambda: flow_mix(x, x[:1], t), r"noise is \(1, 3\)"),
        (lambda: flow_mix(x, x.double(), t), "noise is torch.float64"),
        (lambda: flow_mix(x, x, torch.zeros(3)), r"t is \(3,\)"),
        (lambda: flow_mix(x, x, t.long()), "t is torch.int64"),
        (lambda: flow_mix(x, x, t, dtype=torch.int8), "dtype is torch.int8"),
        (lambda: velocity_loss(x.long(), x), "prediction is torch.int64"),
        (lambda: velocity_loss(x, x[:1]), r"target is \(1, 3\)"),
        (lambda: velocity_loss(x, x.clone().requires_grad_()), "target requires a gradient"),
    ):
        with pytest.raises(ValueError, match=named):
            call()


def test_choice_and_its_reason():
    works = {"reference": "", "triton": ""}
    assert op.choose((1,), torch.float32, "cpu", works)[0] == "reference"
    assert op.choose((1,), torch.float32, "cuda", works)[0] == "triton"
    assert op.choose((1,), torch.float32, "cuda", {"reference": "", "triton": "none"}) == ("reference", "none")


def test_cost_counts_every_tensor_once():
    shape, n = (2, 3, 5), 30
    assert op.cost(shape, torch.bfloat16, "forward").bytes == 4 * n * 2
    assert op.cost(shape, torch.float32, "forward", target=torch.bfloat16).bytes == n * (2 * 4 + 2 * 2)
    loss = dict(function="velocity_loss", target=torch.float32)
    assert op.cost(shape, torch.bfloat16, "forward", **loss).bytes == n * (2 + 4 + 2)
    assert op.cost(shape, torch.bfloat16, "backward", **loss).bytes == n * 4
    with pytest.raises(ValueError, match="backward"):
        op.cost(shape, torch.float32, "backward")
