"""The two shortcuts against slices and PyTorch's unshuffle: every backend, layout, dtype and kind of group."""

import itertools
import multiprocessing
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from opensora_fast.kernels import pixel_shuffle
from opensora_fast.kernels.pixel_shuffle import pixel_shuffle_repeat_add, pixel_unshuffle_mean_add

OP = "pixel_shuffle"
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
    return (pixel_unshuffle_mean_add if down else pixel_shuffle_repeat_add)(main, x, temporal=sizes.rt)


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
    assert torch.equal(pixel_unshuffle_mean_add(torch.zeros_like(frames), x, temporal=1), frames)
    assert torch.equal(pixel_shuffle_repeat_add(torch.zeros_like(x), frames, temporal=1), x)


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


def each_combination():
    """Sizes, layouts and dtypes that meet every kind of period; the interpreter takes seconds for what is left out."""
    for name, sizes in SIZES.items():
        for layout, dtype in itertools.product((CONTIGUOUS, CHANNELS_LAST), (torch.float32, torch.bfloat16)):
            known = (
                name in ("G=1", "temporal-only", "no-shuffle-odd", "long-row", "many-channels")
                and dtype != torch.float32
            )
            if not known and not (name == "many-channels" and layout == CONTIGUOUS):
                layout_name = "contiguous" if layout == CONTIGUOUS else "channels_last"
                yield pytest.param(sizes, layout, dtype, id=f"{name}-{layout_name}-{str(dtype).removeprefix('torch.')}")


@pytest.mark.parametrize(("sizes", "layout", "dtype"), each_combination())
@each_function
def test_every_other_backend(down, sizes, layout, dtype, place, assert_as_exact):
    main, x = inputs(sizes, down, dtype, place, (layout, layout))
    grad = torch.randn(main.shape, generator=torch.Generator().manual_seed(1)).to(place, dtype)
    grad = grad.contiguous(memory_format=layout)
    found = results(shortcut, main, x, sizes, down, grad)
    same = results(by_slices, main, x, sizes, down, grad)
    exact = results(by_slices, *(t.detach().double().requires_grad_() for t in (main, x)), sizes, down, grad.double())
    for name, *tensors in zip(("out", "d_main", "d_x"), found, same, exact, strict=True):
        assert_as_exact(name, *tensors)
    assert found[0].is_contiguous(memory_format=layout) or not main.numel()


@each_function
def test_other_backends_take_strides_and_mixed_layouts(down, place):
    sizes = SIZES["temporal"]
    main, x = (tensor.detach() for tensor in inputs(sizes, down, torch.float32, place))
    expected = shortcut(main, x, sizes, down)
    strided = [torch.stack([t, t], dim=-1)[..., 0] for t in (main, x)]
    last = [t.contiguous(memory_format=CHANNELS_LAST) for t in (main, x)]
    for others in (strided, last, (main, last[1]), (last[0], x)):
        torch.testing.assert_close(shortcut(*others, sizes, down), expected)


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
def test_gradients_of_every_order_in_float64(down, place):
    sizes = Sizes(1, 2, 4, (1, 1, 2), rt=2)
    main, x = inputs(sizes, down, torch.float64, place)
    fast = dict(fast_mode=True)
    assert torch.autograd.gradcheck(lambda main, x: shortcut(main, x, sizes, down), (main, x), **fast)
    assert torch.autograd.gradgradcheck(lambda main, x: shortcut(main, x.square(), sizes, down), (main, x), **fast)


@pytest.mark.parametrize("with_base", [True, False], ids=["base", "no-base"])
@each_function
def test_opcheck(down, with_base, place):
    sizes = Sizes(1, 2, 2, (1, 2, 1), rt=2)
    main, x = inputs(sizes, down, torch.float32, place)
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


@each_function
def test_compiles_into_one_node(down, place):
    sizes = Sizes(1, 2, 2, (1, 2, 1), rt=2)
    main, x = inputs(sizes, down, torch.float32, place, (CHANNELS_LAST, CHANNELS_LAST))
    graphs = []

    def aot_eager(graph, example_inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    def loss(main, x):
        return shortcut(main, x, sizes, down).square().sum()

    torch._dynamo.reset()
    eager = torch.autograd.grad(loss(main, x), (main, x))
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend=aot_eager)(main, x), (main, x))
    assert all(torch.equal(*pair) for pair in zip(compiled, eager, strict=True))
    assert len([node for node in graphs[0].graph.nodes if "opensora_fast" in str(node.target)]) == 1


@st.composite
def any_sizes(draw):
    rs, rt, C = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2])), draw(st.integers(1, 8))
    expanded = C * rt * rs * rs
    group = draw(st.sampled_from([g for g in range(1, expanded + 1) if expanded % g == 0]))
    return Sizes(draw(st.integers(1, 2)), C, group, draw(st.tuples(*[st.integers(1, 6)] * 3)), rs, rt)


@given(any_sizes(), st.sampled_from([CONTIGUOUS, CHANNELS_LAST]), st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_the_two_are_adjoint_and_inverse(sizes, layout, random):
    """<mean(x), y> * G = <x, repeat(y)>, and the mean of repeats is what was repeated."""
    integers = torch.Generator().manual_seed(random.randrange(2**31))
    x = torch.randint(-8, 9, sizes.large, generator=integers).float().contiguous(memory_format=layout)
    y = torch.randint(-8, 9, sizes.small, generator=integers).float().contiguous(memory_format=layout)
    mean = pixel_unshuffle_mean_add(torch.zeros_like(y), x, temporal=sizes.rt)
    repeat = pixel_shuffle_repeat_add(torch.zeros_like(x), y, temporal=sizes.rt)
    torch.testing.assert_close((x * repeat).sum(), (mean * sizes.G * y).sum(), rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(pixel_unshuffle_mean_add(torch.zeros_like(y), repeat, temporal=sizes.rt), y)


@pytest.mark.parametrize(
    ("main", "x", "temporal", "named"),
    [
        ((1, 4, 1, 2, 2), (1, 4, 2, 4), 1, "x has 4 dimensions"),
        ((1, 4, 1, 2, 2), (1, 4, 1, 4, 5), 1, "x has .* 5"),
        ((1, 4, 1, 2, 2), (1, 4, 1, 2, 4), 1, "x has "),
        ((2, 4, 1, 2, 2), (1, 4, 1, 4, 4), 1, "x has "),
        ((1, 4, 1, 2, 2), (1, 4, 1, 4, 4), 2, "x has "),
        ((1, 5, 1, 2, 2), (1, 4, 1, 4, 4), 1, "h has 5 channels"),
        ((1, 4, 1, 2, 2), (1, 4, 1, 6, 6), 1, "space times 1 or 2"),
        ((1, 4, 1, 2, 2), (1, 4, 1, 4, 4), 0, "temporal is 0"),
    ],
)
def test_outside_of_the_envelope(main, x, temporal, named):
    with pytest.raises(ValueError, match=named):
        pixel_unshuffle_mean_add(torch.zeros(main), torch.zeros(x), temporal=temporal)


def test_dtypes_outside_of_the_envelope():
    main, x = torch.zeros(1, 4, 1, 2, 2), torch.zeros(1, 4, 1, 4, 4)
    with pytest.raises(ValueError, match="x must match h's dtype"):
        pixel_unshuffle_mean_add(main, x.half(), temporal=1)
    with pytest.raises(ValueError, match="h is torch.int64"):
        pixel_shuffle_repeat_add(x.long(), main, temporal=1)


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
    everything = {"cuda": "", "triton": "", "reference": ""}
    assert pixel_shuffle.choose(shape, torch.float32, "cuda", everything)[0] == "cuda"
    name, reason = pixel_shuffle.choose(shape, torch.float32, "cuda", everything | {"cuda": "not built"})
    assert (name, "not built" in reason) == ("triton", True)
    nothing = {"cuda": "not built", "triton": "not installed", "reference": ""}
    assert pixel_shuffle.choose(shape, torch.float32, "cuda", nothing) == ("reference", "not built")
    missing = {"host": "not built", "triton": "", "reference": ""}
    assert pixel_shuffle.choose(shape, torch.float32, "cpu", missing) == ("reference", "not built")
    assert pixel_shuffle.choose(shape, torch.float32, "mps", {"reference": ""})[1].endswith("for mps tensors")


def test_tiles_of_the_released_model():
    """(G, temporal factor, M) of every shortcut: all are paired, and a tap is 16 bytes of bfloat16 for every thread."""
    for group, temporal, channels in ((2, 1, 256), (2, 1, 512), (4, 1, 512), (4, 2, 1024), (8, 2, 1024), (2, 1, 1024)):
        tile = pixel_shuffle.choose_tile(group, 2, temporal, True, 16, channels)
        assert tile.paired
        assert tile.rows * tile.block * tile.S * tile.L == 32 * tile.num_warps * 8
        assert tile.taps * tile.S == 4 * temporal
    project = pixel_shuffle.choose_tile(8, 1, 1, True, 8, 128)
    assert (project.paired, project.S, project.L, project.taps) == (True, 1, 8, 1)
    assert not pixel_shuffle.choose_tile(3, 2, 1, True, 8, 8).paired


@each_function
def test_cost_counts_every_tensor_once(down):
    main, x = inputs(SIZES["G<R"], down, torch.bfloat16)
    forward = pixel_shuffle.cost(main.shape, x.shape, torch.bfloat16, "forward")
    backward = pixel_shuffle.cost(main.shape, x.shape, torch.bfloat16, "backward")
    assert forward.bytes == 2 * main.nbytes + x.nbytes
    assert backward.bytes == main.nbytes + x.nbytes
    assert 0 < backward.flops < forward.flops
