"""A step on every backend against torch.optim.AdamW in float64, and what a step must leave alone."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opensora_fast.kernels import adamw, launch
from opensora_fast.kernels.adamw import adamw_step

PLACES = ["reference-cpu", "host-cpu", "triton-cpu"]
PLACES += [pytest.param(name, marks=pytest.mark.gpu) for name in ("reference-cuda", "triton-cuda", "cuda-cuda")]
HYPER = dict(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)
# odd, empty, a scalar, more than one tile of the Triton kernel, one whose end is not 16-byte aligned, channels last
SHAPES = [(3, 5), (0,), (), (1030,), (8,), (2, 3, 2, 2, 2)]
LISTS = ("masters", "weights", "gradients", "first_moments", "second_moments", "ema")


@pytest.fixture(params=PLACES)
def place(request, set_backend):
    name, device = request.param.split("-")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if reason := adamw.missing_backends(torch.float32, device)[name]:
        pytest.skip(reason)
    set_backend(f"adamw:{name}")
    return torch.device(device)


def _tensors(device, weight_dtype, gradient_dtype, shapes=SHAPES):
    """The six lists; weights are the masters where no dtype is given."""
    generator = torch.Generator().manual_seed(0)

    def draw():
        tensors = [torch.randn(shape, generator=generator) for shape in shapes]
        return [t.to(memory_format=torch.channels_last_3d) if t.dim() == 5 else t for t in tensors]

    lists = {name: [tensor.to(device) for tensor in draw()] for name in LISTS}
    lists["second_moments"] = [tensor.square() for tensor in lists["second_moments"]]
    lists["gradients"] = [tensor.to(gradient_dtype) for tensor in lists["gradients"]]
    lists["weights"] = lists["masters"]
    if weight_dtype is not None:
        lists["weights"] = [torch.full_like(tensor, math.nan, dtype=weight_dtype) for tensor in lists["masters"]]
    return lists


def _copied(lists):
    copies = {name: [tensor.clone() for tensor in tensors] for name, tensors in lists.items()}
    if lists["weights"] is lists["masters"]:
        copies["weights"] = copies["masters"]
    return copies


def _torch_adamw(lists, counts, dtype, factor, ema_decay):
    """(masters, first moments, second moments, averages) after torch.optim.AdamW in `dtype`."""
    masters = [torch.nn.Parameter(master.to(dtype, copy=True)) for master in lists["masters"]]
    hyper = dict(HYPER, betas=(HYPER["beta1"], HYPER["beta2"]))
    del hyper["beta1"], hyper["beta2"]
    optimizer = torch.optim.AdamW(masters, foreach=False, **hyper)
    for i, master in enumerate(masters):
        master.grad = lists["gradients"][i].to(dtype) * factor
        optimizer.state[master] = dict(
            step=counts[i].cpu().clone(),
            exp_avg=lists["first_moments"][i].to(dtype, copy=True),
            exp_avg_sq=lists["second_moments"][i].to(dtype, copy=True),
        )
    optimizer.step()
    states = [optimizer.state[master] for master in masters]
    averages = [
        e.to(dtype) * ema_decay + m.detach() * (1 - ema_decay) for e, m in zip(lists["ema"], masters, strict=True)
    ]
    return [m.detach() for m in masters], [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states], averages


@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weight_dtype", [None, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_step_is_torch_adamw(place, weight_dtype, gradient_dtype, assert_as_exact):
    lists = _tensors(place, weight_dtype, gradient_dtype)
    counts = torch.arange(len(SHAPES), dtype=torch.float32, device=place)  # as if some had missed a step
    norm, scale, max_norm, decay = 40.0, 0.25, 2.0, 0.9
    factor = scale * max_norm / (norm * scale + 1e-6)
    exact = _torch_adamw(lists, counts, torch.float64, factor, decay)
    same = _torch_adamw(lists, counts, torch.float32, factor, decay)
    scalars = dict(gradient_norm=torch.tensor(norm, device=place), gradient_scale=torch.tensor(scale, device=place))
    adamw_step(**lists, **HYPER, step=counts, max_norm=max_norm, ema_decay=decay, **scalars)
    assert counts.tolist() == [i + 1 for i in range(len(SHAPES))]
    for i in range(len(SHAPES)):
        for name, s, e in zip(("masters", "first_moments", "second_moments", "ema"), same, exact, strict=True):
            assert_as_exact(f"{name}[{i}]", lists[name][i], s[i], e[i])
        assert torch.equal(lists["weights"][i], lists["masters"][i].to(lists["weights"][i].dtype))


def test_many_steps_of_a_given_number_follow_torch_adamw(place):
    lists = _tensors(place, torch.bfloat16, torch.float32, [(17,)])
    for name in ("first_moments", "second_moments"):
        lists[name][0].zero_()
    theirs = torch.nn.Parameter(lists["masters"][0].clone())
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    for step in range(1, 6):
        lists["gradients"][0].mul_(-0.7)
        theirs.grad = lists["gradients"][0].clone()
        optimizer.step()
        adamw_step(**dict(lists, ema=[]), **HYPER, step=step)
    torch.testing.assert_close(lists["masters"][0], theirs.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("spoilt", ["gradient_norm", "gradient_scale"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_step_that_is_not_finite_changes_nothing(place, spoilt, value):
    lists = _tensors(place, torch.bfloat16, torch.bfloat16, [(1030,), (3,)])
    lists["gradients"][0].fill_(math.nan)
    counts = torch.tensor([3.0, 4.0], device=place)
    before = _copied(lists)
    scalars = {name: torch.ones((), device=place) for name in ("gradient_norm", "gradient_scale")}
    scalars[spoilt].fill_(value)
    adamw_step(**lists, **HYPER, step=counts, max_norm=1.0, ema_decay=0.9, **scalars)
    assert counts.tolist() == [3.0, 4.0]
    for name, tensors in before.items():
        for old, new in zip(tensors, lists[name], strict=True):
            assert torch.equal(old.nan_to_num(), new.nan_to_num()), name


def test_a_norm_that_overflows_when_unscaled_counts_no_update(place):
    lists = _tensors(place, torch.bfloat16, torch.bfloat16, [(1030,), (3,)])
    counts, huge = torch.tensor([3.0, 4.0], device=place), torch.tensor(1e30, device=place)
    adamw_step(**lists, **HYPER, step=counts, max_norm=1.0, ema_decay=0.9, gradient_norm=huge, gradient_scale=huge)
    assert counts.tolist() == [3.0, 4.0]


def test_a_norm_below_its_limit_does_not_scale(place):
    clipped = _tensors(place, None, torch.float32)
    free = _copied(clipped)
    adamw_step(**dict(clipped, ema=[]), **HYPER, step=1, gradient_norm=torch.tensor(0.5, device=place), max_norm=1.0)
    adamw_step(**dict(free, ema=[]), **HYPER, step=1)
    assert all(torch.equal(a, b) for a, b in zip(clipped["masters"], free["masters"], strict=True))


def test_a_tensor_without_a_gradient_keeps_its_state_and_its_count(place):
    lists = _tensors(place, torch.bfloat16, torch.bfloat16, [(9,), (9,), (9,)])
    lists["gradients"][1] = None
    before = [lists[name][1].clone() for name in ("masters", "first_moments", "second_moments", "ema")]
    counts = torch.tensor([1.0, 2.0, 3.0], device=place)
    adamw_step(**lists, **HYPER, step=counts, ema_decay=0.9)
    assert counts.tolist() == [2.0, 2.0, 4.0]
    after = [lists[name][1] for name in ("masters", "first_moments", "second_moments", "ema")]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert lists["weights"][1].isnan().all()


def test_tensors_of_different_dtypes_go_together(place):
    lists = _tensors(place, torch.bfloat16, torch.float32, [(5,), (6,), (7,)])
    lists["weights"][1] = lists["masters"][1]
    lists["gradients"][2] = lists["gradients"][2].to(torch.bfloat16)
    alone = _copied(lists)
    alone["weights"][1] = alone["masters"][1]
    adamw_step(**lists, **HYPER, step=1, ema_decay=0.9)
    for i in range(3):
        adamw_step(**{name: [tensors[i]] for name, tensors in alone.items()}, **HYPER, step=1, ema_decay=0.9)
    for name in LISTS:
        assert all(torch.equal(a, b) for a, b in zip(lists[name], alone[name], strict=True)), name


def test_a_gradient_of_another_layout_is_read_by_index(place):
    lists = _tensors(place, None, torch.float32, [(4, 6)])
    turned = _copied(lists)
    turned["gradients"] = [lists["gradients"][0].t().contiguous().t()]
    for one in (lists, turned):
        adamw_step(**dict(one, ema=[]), **HYPER, step=1)
    assert torch.equal(lists["masters"][0], turned["masters"][0])


def test_two_runs_are_bitwise_equal(place):
    first = _tensors(place, torch.bfloat16, torch.bfloat16)
    second = _copied(first)
    for lists in (first, second):
        adamw_step(**lists, **HYPER, step=3, ema_decay=0.99)
    for name in LISTS[1:]:
        assert all(torch.equal(a, b) for a, b in zip(first[name], second[name], strict=True)), name


def test_without_gradients_and_decay_an_update_moves_by_momentum_alone(place):
    lists = _tensors(place, None, torch.float32, [(12,)])
    lists["gradients"][0].zero_()
    lists["first_moments"][0].zero_()
    before = lists["masters"][0].clone()
    adamw_step(**dict(lists, ema=[]), **dict(HYPER, weight_decay=0.0), step=1)
    assert torch.equal(lists["masters"][0], before)


# More than one piece of a thread (32768 elements), and every remainder of a vector; pieces must not depend on threads.
@settings(max_examples=12)
@given(size=st.integers(0, 70_000), offset=st.integers(0, 7))
def test_threads_and_alignment_change_no_bit(size, offset):
    if adamw.missing_backends(torch.float32, "cpu")["host"]:
        pytest.skip("no native module")
    results = []
    threads = torch.get_num_threads()
    for count, start in ((1, 0), (3, offset)):
        lists = {
            name: [torch.cat([torch.zeros(start), tensors[0]])[start:]]
            for name, tensors in _tensors("cpu", torch.float32, torch.float32, [(size,)]).items()
        }
        torch.set_num_threads(count)
        adamw_step(**lists, **HYPER, step=2, ema_decay=0.9)
        torch.set_num_threads(threads)
        results.append(lists)
    for name in LISTS:
        assert torch.equal(results[0][name][0], results[1][name][0]), name


def test_autograd_knows_that_weights_changed(place):
    weight = torch.randn(4, device=place, requires_grad=True)
    loss = (weight.square() * weight).sum()
    adamw_step(
        [weight], [weight], [torch.ones_like(weight)], *([torch.zeros_like(weight)] for _ in "mv"), **HYPER, step=1
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.gpu
def test_more_tensors_than_a_launch_takes(set_backend):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    shapes = [(1 + 37 * (i % 50),) for i in range(600)] + [(100_003,)]
    ours = _tensors("cuda", torch.bfloat16, torch.bfloat16, shapes)
    reference = _copied(ours)
    for name, lists in (("cuda", ours), ("reference", reference)):
        set_backend(f"adamw:{name}")
        counts = torch.zeros(len(shapes), device="cuda")
        adamw_step(**lists, **HYPER, step=counts, ema_decay=0.9)
        assert (counts == 1).all()
    for name in LISTS[:1] + LISTS[3:]:
        for a, b in zip(ours[name], reference[name], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_errors_name_the_argument():
    def step(changes=(), **options):
        lists = dict(_tensors("cpu", torch.bfloat16, torch.bfloat16, [(4,)]), **dict(changes))
        adamw_step(**lists, **{**HYPER, "step": 1, "ema_decay": 0.9, **options})

    four = torch.zeros(4)
    for changes, named in (
        (dict(masters=[four.double()]), r"masters\[0\] is torch.float64; it must be float32"),
        (dict(masters=[torch.zeros(8)[::2]]), r"masters\[0\] has strides \(2,\)"),
        (dict(gradients=[four.double()]), r"gradients\[0\] is torch.float64"),
        (dict(weights=[torch.zeros(5)]), r"weights\[0\] is \(5,\)"),
        (dict(ema=[four, four]), "ema has 2 tensors"),
        (dict(first_moments=[torch.zeros(8)[::2]]), r"first_moments\[0\] has strides \(2,\)"),
        (dict(second_moments=[four.bfloat16()]), r"second_moments\[0\] is torch.bfloat16"),
    ):
        with pytest.raises(ValueError, match=named):
            step(changes)
    for options, named in (
        (dict(step=0), "step is 0"),
        (dict(step=torch.zeros(2)), "step is torch.float32"),
        (dict(max_norm=1.0), "gradient_norm is None"),
        (dict(gradient_norm=torch.ones(2)), "gradient_norm is"),
        (dict(gradient_scale=torch.ones((), dtype=torch.float64)), "gradient_scale is"),
        (dict(beta1=1.0), "beta1 is 1.0"),
        (dict(ema_decay=None), "ema_decay is None"),
    ):
        with pytest.raises(ValueError, match=named):
            step(**options)


def test_choice_and_its_reason():
    works = {"reference": "", "host": "", "cuda": "", "triton": ""}
    broken = {**works, "host": "no build", "cuda": "no nvcc"}
    assert adamw.choose((1,), torch.float32, "cpu", works)[0] == "host"
    assert adamw.choose((1,), torch.float32, "cpu", broken) == ("reference", "no build")
    assert adamw.choose((1,), torch.float32, "cuda", works)[0] == "cuda"
    assert adamw.choose((1,), torch.float32, "cuda", broken) == ("triton", "no nvcc")
    assert adamw.choose((1,), torch.float32, "cuda", {**broken, "triton": "none"}) == ("reference", "none")
    assert adamw.choose((1,), torch.float32, "mps", {"reference": ""})[0] == "reference"


def test_triton_is_one_launch_per_tensor_on_any_device(set_backend):
    lists = {name: [t.to("meta") for t in tensors] for name, tensors in _tensors("cpu", None, torch.bfloat16).items()}
    group = adamw.Group(**dict(lists, weights=None, ema=None), counts=None)
    options = adamw.Options(**HYPER, step=1)
    with launch.recorded() as launches:
        adamw.triton_step(group, options)
    assert [one.grid for one in launches] == [(-(-math.prod(shape) // 1024),) for shape in SHAPES]


def test_cost_counts_every_tensor_once():
    assert adamw.cost(10, torch.float32).bytes == 10 * (6 * 4 + 4)
    assert adamw.cost(10, torch.bfloat16, torch.bfloat16, ema=True).bytes == 10 * (6 * 4 + 2 + 2 + 8)
    with pytest.raises(ValueError, match="backward"):
        adamw.cost(10, torch.float32, mode="backward")


def test_native_code_refuses_before_it_touches_memory(native):
    no_address = {name: [0] for name in ("masters", "weights", "gradients", "first_moments", "second_moments", "ema")}
    call = dict(no_address, counts=[0], sizes=[1], gradient_dtype="float32", weight_dtype="float32")
    call |= dict(HYPER, ema_decay=1.0, max_norm=1.0, step=1.0, gradient_norm=0, gradient_scale=0, threads=1)
    for wrong, named in (
        (dict(weight_dtype="float64"), "dtype is float64"),
        (dict(ema=[]), "an address per tensor"),
        (dict(sizes=[1, 2]), "a number per tensor"),
    ):
        with pytest.raises(ValueError, match=named):
            native.adamw_cpu(**call | wrong)
