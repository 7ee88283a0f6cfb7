"""The two shortcuts against slices and PyTorch's own unshuffle: every layout, dtype and kind of group, both ways."""

import itertools
import multiprocessing
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from opensora_fast.kernels import pixel_shuffle
from opensora_fast.kernels.pixel_shuffle import channel_repeat_to_space_add, space_to_channel_mean_add

CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last_3d


@dataclass(frozen=True)
class Sizes:
    """C channels of the large tensor, G expanded channels in a group; B and THW are the small tensor's."""

    B: int
    C: int
    G: int
    THW: tuple[int, int, int]
    rs: int = 2
    rt: int = 1

    @property
    def small(self):
        return (self.B, self.C * self.rt * self.rs**2 // self.G, *self.THW)

    @property
    def large(self):
        T, H, W = self.THW
        return (self.B, self.C, T * self.rt, H * self.rs, W * self.rs)

    @property
    def factors(self):
        return dict(spatial_factor=self.rs, temporal_factor=self.rt)


# One for each way that a group can lie among the expanded channels, as the device code tells them apart; then sizes
# that cross the boundaries of its units (128 periods on the CPU, 16 bytes on the GPU), and the empty batch.
SIZES = {
    "G<R": Sizes(2, 3, 2, (2, 3, 5)),
    "G=R": Sizes(1, 5, 4, (3, 1, 7)),
    "G>R": Sizes(2, 6, 8, (1, 3, 5)),
    "G=1": Sizes(1, 3, 1, (2, 3, 5)),
    "G=3": Sizes(1, 6, 3, (1, 2, 5)),
    "temporal": Sizes(2, 4, 4, (2, 3, 5), rt=2),
    "temporal-only": Sizes(1, 4, 8, (2, 3, 5), rs=1, rt=2),
    "no-shuffle": Sizes(2, 24, 8, (1, 3, 5), rs=1),
    "no-shuffle-odd": Sizes(1, 15, 5, (1, 3, 5), rs=1),
    "long-row": Sizes(1, 2, 2, (1, 2, 131)),
    "many-channels": Sizes(1, 264, 2, (1, 2, 3)),
    "vectors": Sizes(1, 16, 2, (2, 3, 16)),
    "empty": Sizes(0, 4, 2, (1, 2, 3)),
}
each_size = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype).removeprefix("torch.")
)
each_function = pytest.mark.parametrize("down", [True, False], ids=["space_to_channel", "channel_to_space"])


def shifts(sizes):
    return itertools.product(range(sizes.rt), range(sizes.rs), range(sizes.rs))


def by_slices(main, x, sizes, down):
    """Both functions from strided slices alone, in the dtype of the inputs."""
    rt, rs = sizes.rt, sizes.rs
    if down:
        expanded = torch.stack([x[:, :, it::rt, ih::rs, iw::rs] for it, ih, iw in shifts(sizes)], dim=2).flatten(1, 2)
        return main + expanded.unflatten(1, (main.shape[1], sizes.G)).mean(dim=2)
    expanded = x.repeat_interleave(sizes.G, dim=1).unflatten(1, (sizes.C, rt * rs * rs))
    shuffled = torch.zeros_like(main)
    for index, (it, ih, iw) in enumerate(shifts(sizes)):
        shuffled[:, :, it::rt, ih::rs, iw::rs] = expanded[:, :, index]
    return main + shuffled


def shortcut(main, x, sizes, down):
    return (space_to_channel_mean_add if down else channel_repeat_to_space_add)(main, x, **sizes.factors)


def inputs(sizes, down, dtype, device="cpu", layouts=(CONTIGUOUS, CONTIGUOUS)):
    generator = torch.Generator().manual_seed(0)
    shapes = (sizes.small, sizes.large) if down else (sizes.large, sizes.small)
    pairs = [(torch.randn(shape, generator=generator), layout) for shape, layout in zip(shapes, layouts, strict=True)]
    return [tensor.to(device, dtype).contiguous(memory_format=layout).requires_grad_() for tensor, layout in pairs]


def results(function, main, x, sizes, down, grad):
    """The output and both gradients."""
    out = function(main, x, sizes, down)
    return out.detach(), *torch.autograd.grad(out, (main, x), grad.to(out.dtype))


@each_function
@each_size
def test_reference_is_the_formula_of_slices(sizes, down):
    main, x = inputs(sizes, down, torch.float64)
    assert torch.allclose(shortcut(main, x, sizes, down), by_slices(main, x, sizes, down), rtol=1e-14, atol=1e-14)


def test_channel_order_is_pixel_unshuffle_of_every_frame():
    x = torch.randn(2, 3, 4, 6, 10)
    frames = F.pixel_unshuffle(x.transpose(1, 2).flatten(0, 1), 2).unflatten(0, (2, 4)).transpose(1, 2)
    assert torch.equal(space_to_channel_mean_add(torch.zeros_like(frames), x), frames)
    assert torch.equal(channel_repeat_to_space_add(torch.zeros_like(x), frames), x)


@pytest.mark.parametrize(
    "layouts",
    list(itertools.product((CONTIGUOUS, CHANNELS_LAST), repeat=2)),
    ids=["contiguous", "x-channels_last", "main-channels_last", "channels_last"],
)
@each_dtype
@each_size
@each_function
def test_forward_and_gradients(down, sizes, dtype, layouts, device, assert_as_exact):
    main, x = inputs(sizes, down, dtype, device, layouts)
    grad = torch.randn(main.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    ours = results(shortcut, main, x, sizes, down, grad)
    same = results(by_slices, main, x, sizes, down, grad)
    exact = results(by_slices, *(t.detach().double().requires_grad_() for t in (main, x)), sizes, down, grad.double())
    for name, *tensors in zip(("out", "d_main", "d_x"), ours, same, exact, strict=True):
        assert_as_exact(name, *tensors)
    assert ours[0].is_contiguous(memory_format=layouts[0]) or not main.numel()


@each_dtype
@each_function
def test_views_that_start_anywhere(down, dtype, device):
    sizes = SIZES["vectors"]
    main, x = (tensor.detach() for tensor in inputs(sizes, down, dtype, device))
    shifted = [torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in (main, x)]
    assert torch.equal(shortcut(*shifted, sizes, down), shortcut(main, x, sizes, down))
    strided = torch.stack([x, x], dim=-1)[..., 0]
    assert torch.equal(shortcut(main, strided, sizes, down), shortcut(main, x, sizes, down))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_every_16_bit_number_converts_as_in_pytorch(dtype, device):
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(1, 1, 1, 1, -1).to(device)
    scale = 0.7501  # most products lie between two numbers
    ours = pixel_shuffle._channel_to_space(None, numbers, 1, scale, 1, 1)
    expected = (numbers.float() * torch.tensor(scale)).to(dtype)
    assert torch.equal(ours.isnan(), expected.isnan())
    assert torch.equal(ours.nan_to_num(), expected.nan_to_num())


def test_main_gets_the_gradient_itself():
    main, x = inputs(SIZES["G<R"], True, torch.float32)
    grad = torch.randn(main.shape)
    d_main, _ = torch.autograd.grad(shortcut(main, x, SIZES["G<R"], True), (main, x), grad)
    assert d_main.data_ptr() == grad.data_ptr()


@each_function
def test_gradients_of_every_order_in_float64(down):
    sizes = Sizes(1, 2, 4, (1, 1, 2), rt=2)
    main, x = inputs(sizes, down, torch.float64)
    assert torch.autograd.gradcheck(lambda main, x: shortcut(main, x, sizes, down), (main, x))
    assert torch.autograd.gradgradcheck(lambda main, x: shortcut(main, x.square(), sizes, down), (main, x))


@pytest.mark.parametrize("with_base", [True, False], ids=["base", "no-base"])
@each_function
def test_opcheck(down, with_base):
    sizes = SIZES["temporal"]
    main, x = inputs(sizes, down, torch.float32)
    op = pixel_shuffle._space_to_channel if down else pixel_shuffle._channel_to_space
    torch.library.opcheck(op, (main if with_base else None, x, main.shape[1], 0.25, sizes.rs, sizes.rt))


@pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST], ids=["contiguous", "channels_last"])
@each_function
def test_compiles_into_one_graph(down, layout, device):
    sizes = SIZES["temporal"]
    main, x = inputs(sizes, down, torch.float32, device, (layout, layout))

    def loss(main, x):
        return shortcut(main * 2, x, sizes, down).square().sum()

    eager = torch.autograd.grad(loss(main, x), (main, x))
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(main, x), (main, x))
    for ours, expected in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, expected)


@st.composite
def any_sizes(draw):
    rs, rt, C = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2])), draw(st.integers(1, 8))
    expanded = C * rt * rs * rs
    group = draw(st.sampled_from([g for g in range(1, expanded + 1) if expanded % g == 0]))
    return Sizes(draw(st.integers(1, 2)), C, group, draw(st.tuples(*[st.integers(1, 6)] * 3)), rs, rt)


@given(any_sizes(), st.sampled_from([CONTIGUOUS, CHANNELS_LAST]), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_the_two_are_adjoint_and_inverse(sizes, layout, random):
    """<mean(x), y> * G = <x, repeat(y)>, and the mean of repeats is what was repeated."""
    integers = torch.Generator().manual_seed(random.randrange(2**31))
    x = torch.randint(-8, 9, sizes.large, generator=integers).float().contiguous(memory_format=layout)
    y = torch.randint(-8, 9, sizes.small, generator=integers).float().contiguous(memory_format=layout)
    mean = space_to_channel_mean_add(torch.zeros_like(y), x, **sizes.factors)
    repeat = channel_repeat_to_space_add(torch.zeros_like(x), y, **sizes.factors)
    torch.testing.assert_close((x * repeat).sum(), (mean * sizes.G * y).sum(), rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(space_to_channel_mean_add(torch.zeros_like(y), repeat, **sizes.factors), y)


@pytest.mark.parametrize(
    ("main", "x", "factors", "named"),
    [
        ((1, 4, 1, 2, 2), (1, 4, 2, 4), {}, "x has 4 dimensions"),
        ((1, 4, 1, 2, 2), (1, 4, 1, 4, 5), {}, "x has .* 5"),
        ((2, 4, 1, 2, 2), (1, 4, 1, 4, 4), {}, "x has "),
        ((1, 5, 1, 2, 2), (1, 4, 1, 4, 4), {}, "main has 5 channels"),
        ((1, 4, 1, 2, 2), (1, 4, 1, 6, 6), {"spatial_factor": 3}, "spatial_factor is 3"),
        ((1, 4, 1, 2, 2), (1, 4, 1, 4, 4), {"temporal_factor": 0}, "temporal_factor is 0"),
    ],
)
def test_outside_of_the_envelope(main, x, factors, named):
    with pytest.raises(ValueError, match=named):
        space_to_channel_mean_add(torch.zeros(main), torch.zeros(x), **factors)


def test_dtypes_outside_of_the_envelope():
    main, x = torch.zeros(1, 4, 1, 2, 2), torch.zeros(1, 4, 1, 4, 4)
    with pytest.raises(ValueError, match="x must match main's dtype"):
        space_to_channel_mean_add(main, x.half())
    with pytest.raises(ValueError, match="main is torch.int64"):
        channel_repeat_to_space_add(x.long(), main)


@pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST], ids=["contiguous", "channels_last"])
@each_function
def test_bitwise_equal_over_runs_and_threads(down, layout):
    sizes = Sizes(2, 6, 3, (4, 32, 33))  # several pieces for each of three threads
    main, x = inputs(sizes, down, torch.bfloat16, layouts=(layout, layout))
    threads = torch.get_num_threads()
    try:
        outs = []
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            outs.append(shortcut(main, x, sizes, down))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_works_in_a_forked_process_after_threads_were_started():
    sizes = Sizes(1, 16, 16, (4, 32, 32))  # an output that PyTorch itself fills on one thread: its own pool hangs there
    main, x = (tensor.detach() for tensor in inputs(sizes, True, torch.float32))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        shortcut(main, x, sizes, True)
        child = multiprocessing.get_context("fork").Process(target=shortcut, args=(main, x, sizes, True))
        child.start()
    finally:
        torch.set_num_threads(threads)
    child.join(timeout=30)
    alive = child.is_alive()
    child.kill()
    assert not alive, "the forked process hangs"
    assert child.exitcode == 0


def test_the_native_kernel_is_the_default(native):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert pixel_shuffle.selected((1, 4, 1, 4, 4), dtype, "cpu")[0] == "host"
    assert pixel_shuffle.selected((1, 4, 1, 4, 4), torch.float64, "cpu")[0] == "reference"


def test_choose_says_why():
    shape = (1, 4, 1, 4, 4)
    assert pixel_shuffle.choose(shape, torch.float32, "cuda", {"cuda": "", "reference": ""})[0] == "cuda"
    assert pixel_shuffle.choose(shape, torch.float32, "cpu", {"host": "not built", "reference": ""}) == (
        "reference",
        "not built",
    )
    assert pixel_shuffle.choose(shape, torch.float32, "mps", {"reference": ""})[1].endswith("for mps tensors")


@each_function
def test_cost_counts_every_tensor_once(down):
    main, x = inputs(SIZES["G<R"], down, torch.bfloat16)
    forward = pixel_shuffle.cost(main.shape, x.shape, torch.bfloat16, "forward")
    backward = pixel_shuffle.cost(main.shape, x.shape, torch.bfloat16, "backward")
    assert forward.bytes == 2 * main.nbytes + x.nbytes
    assert backward.bytes == main.nbytes + x.nbytes
    assert 0 < backward.flops < forward.flops
