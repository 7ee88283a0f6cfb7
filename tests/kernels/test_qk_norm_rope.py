"""Norm and rotation of q and k against the chain of norm, rotation and concatenation, in every layout and both ways."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opensora_fast.kernels import qk_norm_rope as op
from opensora_fast.kernels.qk_norm_rope import joint_qk_norm_rope, qk_norm_rope

OP = "qk_norm_rope"


@dataclass(frozen=True)
class Sizes:
    """B batch, tokens of each stream, H heads, K channels, G head groups; `table_batch`: the tables have a batch."""

    B: int
    tokens: tuple[int, ...]
    H: int
    K: int
    G: int = 1
    table_batch: bool = False


# Two streams and one; channels that are no power of two; heads of which a program takes all, some or one; a stream
# longer than what a program of the backward works through; nothing at all, or no text.
SIZES = {
    "joint": Sizes(2, (3, 5), 4, 32, table_batch=True),
    "groups": Sizes(1, (2, 5), 4, 48, G=2),
    "single": Sizes(1, (7,), 3, 72, table_batch=True),
    "single-groups": Sizes(2, (3,), 4, 64, G=4),
    "long": Sizes(2, (1, 19), 2, 256),
    "no-text": Sizes(1, (0, 4), 1, 128),
    "empty": Sizes(0, (2, 3), 2, 32),
}
each_size = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype).removeprefix("torch.")
)


def chain(streams, scales, cos, sin, eps=1e-6, head_groups=1):
    """q, k and, of two streams, v: one step after the other, each in the dtype of its inputs but for the tables'."""
    cos, sin = (table[..., None, None, :] for table in (cos, sin))
    normed = []
    for qkv, q_scale, k_scale in zip(streams, scales[::2], scales[1::2], strict=True):
        qk = qkv[:, :, :2]
        wide = qk.to(cos.dtype)
        norm = (wide * (wide.square().mean(dim=-1, keepdim=True) + eps).rsqrt()).to(qkv.dtype)
        normed.append(norm * torch.stack((q_scale, k_scale))[:, None])
    first, second = torch.cat(normed, dim=1).to(cos.dtype).chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(streams[0].dtype)
    outputs = list(rotated.unbind(2))
    if len(streams) > 1:
        outputs.append(torch.cat([qkv[:, :, 2] for qkv in streams], dim=1))
    if head_groups > 1:
        outputs = [torch.stack(out.chunk(head_groups, dim=2)) for out in outputs]
    return tuple(outputs)


def ours(streams, scales, cos, sin, eps=1e-6, head_groups=1):
    function = joint_qk_norm_rope if len(streams) > 1 else qk_norm_rope
    return function(*streams, *scales, cos, sin, eps=eps, head_groups=head_groups)


def inputs(sizes, dtype, device="cpu", seed=0):
    """Streams, scales (leaves that ask for gradients) and tables."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()

    streams = [leaf(sizes.B, T, 3, sizes.H, sizes.K) for T in sizes.tokens]
    scales = [leaf(sizes.K) for _ in range(2 * len(streams))]
    batch = (sizes.B,) if sizes.table_batch else ()
    angle = torch.rand(*batch, sum(sizes.tokens), sizes.K // 2, generator=generator, dtype=torch.float64) * 7
    wide = torch.promote_types(dtype, torch.float32)
    return streams, scales, angle.cos().to(device, wide), angle.sin().to(device, wide)


def exactly(tensors):
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def gradients(outputs, leaves, seed=1):
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(out.shape, generator=generator).to(out.device, out.dtype) for out in outputs]
    return torch.autograd.grad(outputs, leaves, weights)


def names(sizes):
    outputs = ("q", "k", "v")[: 3 if len(sizes.tokens) > 1 else 2]
    return (
        *outputs,
        *(f"d_stream{i}" for i in range(len(sizes.tokens))),
        *(f"d_scale{i}" for i in range(2 * len(sizes.tokens))),
    )


@each_dtype
@each_size
def test_forward_and_gradients(sizes, dtype, place, assert_as_exact):
    streams, scales, cos, sin = inputs(sizes, dtype, place)
    results = []
    for function, leaves, tables in (
        (ours, (streams, scales), (cos, sin)),
        (chain, (streams, scales), (cos, sin)),
        (chain, (exactly(streams), exactly(scales)), (cos.double(), sin.double())),
    ):
        outputs = function(*leaves, *tables, head_groups=sizes.G)
        results.append((*outputs, *gradients(outputs, [*leaves[0], *leaves[1]])))
    for name, got, same, exact in zip(names(sizes), *results, strict=True):
        assert got.is_contiguous(), name
        assert_as_exact(name, got, same, exact)


@pytest.mark.parametrize("sizes", [SIZES["joint"], SIZES["groups"]], ids=["joint", "groups"])
def test_the_backward_is_the_autograd_of_the_reference(sizes, place):
    streams, scales, cos, sin = inputs(sizes, torch.float64, place)
    reference = op.qk_norm_rope_reference(streams, op._pairs(scales), cos, sin, head_groups=sizes.G)
    outputs = ours(streams, scales, cos, sin, head_groups=sizes.G)
    for got, expected in zip(outputs, reference, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)
    leaves = [*streams, *scales]
    for got, expected in zip(gradients(outputs, leaves), gradients(reference, leaves), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", [(1, 1), (2,)], ids=["joint", "single"])
def test_gradcheck(tokens, place):
    streams, scales, cos, sin = inputs(Sizes(1, tokens, 1, 32), torch.float64, place)

    def function(*leaves):
        return ours(leaves[: len(tokens)], leaves[len(tokens) :], cos, sin)

    assert torch.autograd.gradcheck(function, (*streams, *scales), fast_mode=True)


@pytest.mark.parametrize("sizes", [Sizes(1, (1, 1), 2, 32, G=2), Sizes(1, (2,), 1, 32)], ids=["joint", "single"])
def test_opcheck(sizes, place):
    streams, scales, cos, sin = inputs(sizes, torch.float32, place)
    with_v = len(streams) > 1
    torch.library.opcheck(op._qk_norm_rope, (streams, scales, cos, sin, 1e-6, sizes.G, with_v))
    with torch.no_grad():
        outputs = [out.detach() for out in ours(streams, scales, cos, sin, head_groups=sizes.G)]
    plain = [[tensor.detach() for tensor in tensors] for tensors in (streams, scales)]
    torch.library.opcheck(op._qk_norm_rope_backward, (outputs, *plain, cos, sin, 1e-6, sizes.G))


@pytest.mark.parametrize("sizes", [SIZES["joint"], SIZES["single"]], ids=["joint", "single"])
def test_compiles_into_one_node(sizes, place):
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    streams, scales, cos, sin = inputs(sizes, torch.float32, place)
    outputs = torch.compile(ours, fullgraph=True, backend=backend)(streams, scales, cos, sin)
    calls = [node for graph in graphs for node in graph.graph.nodes if "opensora_fast" in str(node.target)]
    assert len(calls) == 1
    eager, leaves = ours(streams, scales, cos, sin), [*streams, *scales]
    for got, expected in zip(outputs, eager, strict=True):
        assert torch.equal(got, expected)
    for got, expected in zip(gradients(outputs, leaves), gradients(eager, leaves), strict=True):
        assert torch.equal(got, expected)


@each_dtype
def test_two_runs_are_bitwise_equal(dtype, place):
    sizes = SIZES["long"]
    runs = []
    for _ in range(2):
        streams, scales, cos, sin = inputs(sizes, dtype, place)
        outputs = ours(streams, scales, cos, sin)
        runs.append((*outputs, *gradients(outputs, [*streams, *scales])))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_groups_are_slices_of_the_heads(place):
    streams, scales, cos, sin = inputs(SIZES["groups"], torch.float32, place)
    whole = ours(streams, scales, cos, sin)
    for grouped, plain in zip(ours(streams, scales, cos, sin, head_groups=2), whole, strict=True):
        assert torch.equal(grouped, torch.stack(plain.chunk(2, dim=2)))


def test_angle_zero_is_the_norm_and_v_is_copied(place):
    streams, scales, cos, sin = inputs(SIZES["joint"], torch.float32, place)
    q, k, v = ours(streams, scales, torch.ones_like(cos), torch.zeros_like(sin))
    for slot, out in enumerate((q, k)):
        normed = [
            torch.nn.functional.rms_norm(qkv[:, :, slot], (32,), scale, 1e-6)
            for qkv, scale in zip(streams, scales[slot::2], strict=True)
        ]
        torch.testing.assert_close(out, torch.cat(normed, dim=1))
    assert torch.equal(v, torch.cat([qkv[:, :, 2] for qkv in streams], dim=1))


def test_scale_zero_has_a_gradient(place):
    streams, scales, cos, sin = inputs(SIZES["single"], torch.float64, place)
    zeros = [torch.zeros_like(scale).requires_grad_() for scale in scales]
    results = []
    for function in (ours, chain):
        outputs = function(streams, zeros, cos, sin)
        results.append(gradients(outputs, [*streams, *zeros]))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert results[0][-1].abs().min() > 0


def test_a_row_of_zeros_is_finite(place):
    streams, scales, cos, sin = inputs(SIZES["single"], torch.float32, place)
    qkv = (streams[0] * 0).detach().requires_grad_()
    outputs = ours([qkv], scales, cos, sin)
    assert all(not out.any() for out in outputs)
    assert all(grad.isfinite().all() for grad in gradients(outputs, [qkv, *scales]))


def test_slices_of_a_wider_projection_and_any_gradient(place):
    """A single block's q, k and v, tables that are expanded or strided, gradients in the layout of attention."""
    sizes = Sizes(2, (5,), 4, 32, table_batch=True)
    (qkv,), scales, cos, sin = inputs(sizes, torch.float32, place)
    expected = ours([qkv], scales, cos, sin)
    wider = torch.cat((qkv.flatten(2), qkv.flatten(2)[..., :7]), dim=-1).detach().requires_grad_()
    view = wider[..., : 3 * 4 * 32].unflatten(-1, (3, 4, 32))
    tables = [torch.stack((table, table), dim=2).flatten(1, 2)[:, ::2] for table in (cos, sin)]
    outputs = ours([view], scales, *tables)
    assert all(torch.equal(got, wanted) for got, wanted in zip(outputs, expected, strict=True))

    dq, dk = (torch.randn(2, 4, 5, 32, device=place).transpose(1, 2) for _ in range(2))
    plain = torch.autograd.grad(expected, [qkv, *scales], [dq.contiguous(), dk.contiguous()], retain_graph=True)
    strided = torch.autograd.grad(outputs, [wider, *scales], [dq, dk], retain_graph=True)
    mixed = torch.autograd.grad(outputs, [wider, *scales], [dq.contiguous(), dk], retain_graph=True)
    for got in (strided, mixed):
        torch.testing.assert_close(got[0], torch.nn.functional.pad(plain[0].flatten(2), (0, 7)), rtol=1e-6, atol=1e-6)
        for d_scale, wanted in zip(got[1:], plain[1:], strict=True):
            torch.testing.assert_close(d_scale, wanted, rtol=1e-5, atol=1e-5)
    assert not plain[0][:, :, 2].any()

    summed = torch.autograd.grad(expected[0].sum(), [qkv])[0]  # an expanded gradient, and none for k
    chained = torch.autograd.grad(chain([qkv], scales, cos, sin)[0].sum(), [qkv])[0]
    torch.testing.assert_close(summed, chained, rtol=1e-4, atol=1e-5)


def test_the_reference_is_the_same_in_pieces(monkeypatch):
    streams, scales, cos, sin = inputs(SIZES["joint"], torch.float64)
    runs = []
    for piece in (op.CPU_PIECE, 1):
        monkeypatch.setattr(op, "CPU_PIECE", piece)
        outputs = ours(streams, scales, cos, sin)
        runs.append((*outputs, *gradients(outputs, [*streams, *scales])))
    assert len(list(op._pieces(streams))) == sum(SIZES["joint"].tokens)
    for whole, pieces in zip(*runs, strict=True):
        torch.testing.assert_close(pieces, whole, rtol=1e-13, atol=1e-13)


def test_expanded_tables(place):
    streams, scales, cos, sin = inputs(Sizes(2, (1, 2), 1, 32), torch.float32, place)
    expanded = [table.expand(2, *table.shape) for table in (cos, sin)]
    both = ours(streams, scales, cos, sin), ours(streams, scales, *expanded)
    assert all(torch.equal(first, second) for first, second in zip(*both, strict=True))


def test_backward_of_the_streams_carries_the_gradient_of_v(place):
    sizes = SIZES["single-groups"]
    streams, scales, cos, sin = inputs(sizes, torch.float32, place)
    streams, pairs = [qkv.detach() for qkv in streams], op._pairs([scale.detach() for scale in scales])
    q, k, v = op.forward_streams(streams, pairs, cos, sin, 1e-6, sizes.G, with_v=True)
    assert torch.equal(v, torch.stack(streams[0][:, :, 2].chunk(sizes.G, dim=2)))
    (d_qkv,), (d_pair,) = op.backward_streams(q, k, v, streams, pairs, cos, sin, 1e-6, sizes.G)
    assert torch.equal(d_qkv[:, :, 2], streams[0][:, :, 2])
    (without,), _ = op.backward_streams(q, k, None, streams, pairs, cos, sin, 1e-6, sizes.G)
    assert torch.equal(without[:, :, :2], d_qkv[:, :, :2])
    assert not without[:, :, 2].any()
    assert [d_scale.shape for d_scale in d_pair] == [scale.shape for scale in pairs[0]]


@given(angle=st.floats(-20, 20), scale=st.floats(0.01, 100), seed=st.integers(0, 2**31))
@settings(max_examples=25)
def test_rotation_keeps_the_length_and_the_norm_forgets_the_scale_of_its_input(angle, scale, seed):
    (qkv,), _, cos, sin = inputs(Sizes(1, (2,), 2, 32), torch.float64, seed=seed)
    ones = [torch.ones(32, dtype=torch.float64)] * 2
    tables = [torch.full_like(cos, angle).cos(), torch.full_like(sin, angle).sin()]
    q, _ = ours([qkv.detach()], ones, *tables, eps=0.0)
    torch.testing.assert_close(q.square().mean(-1), torch.ones_like(q[..., 0]))
    scaled, _ = ours([qkv.detach() * scale], ones, *tables, eps=0.0)
    torch.testing.assert_close(scaled, q)


def test_choose_says_why():
    shape = (3, 8448, 3, 24, 128)
    missing = {"reference": "", "triton": ""}
    assert op.choose(shape, torch.bfloat16, "cuda", missing)[0] == "triton"
    assert op.choose(shape, torch.bfloat16, "cuda", missing | {"triton": "no wheel"}) == ("reference", "no wheel")
    name, reason = op.choose(shape, torch.bfloat16, "cpu", missing)
    assert name == "reference"
    assert "CPU" in reason
    assert op.selected(shape, torch.bfloat16, "cpu")[0] == "reference"


@pytest.mark.parametrize("element_bytes", [2, 4, 8])
@pytest.mark.parametrize(("heads", "K"), [(24, 128), (6, 128), (16, 72), (1, 256), (5, 32), (12, 96), (2, 34)])
def test_tiles_cover_a_group_in_whole_powers_of_two(heads, K, element_bytes):
    tile = op.choose_tile(8448, heads, K, element_bytes)
    assert tile.steps == 8
    assert op.choose_tile(1, heads, K, element_bytes).steps == 1
    assert heads % tile.heads == 0
    assert K // 2 <= tile.block_k2 < K
    for size in (tile.tokens, tile.heads, tile.block_k2):
        assert size & (size - 1) == 0
        assert size
    accesses = tile.tokens * tile.heads * tile.block_k2 * element_bytes / (tile.num_warps * 32 * 16)
    assert accesses == 1


WRONG = {
    "txt_qkv is": lambda a: a["streams"].__setitem__(0, a["streams"][0][:, :, :2]),
    "img_qkv is .* as txt_qkv": lambda a: a["streams"].__setitem__(1, a["streams"][1][..., :16]),
    "img_qkv is torch.float64": lambda a: a["streams"].__setitem__(1, a["streams"][1].double()),
    "txt_qkv has stride": lambda a: a["streams"].__setitem__(0, a["streams"][0].transpose(3, 4).contiguous().mT),
    "txt_qkv has 33 channels": lambda a: a.update(
        streams=[torch.zeros(2, T, 3, 4, 33) for T in (3, 5)], scales=[torch.zeros(33)] * 4
    ),
    "img_k_scale is .*32": lambda a: a["scales"].__setitem__(3, torch.zeros(31)),
    "txt_q_scale is torch.bfloat16": lambda a: a["scales"].__setitem__(0, torch.zeros(32).bfloat16()),
    "cos is .*one row for each token": lambda a: a.update(cos=a["cos"][:, 1:]),
    "sin is .*one row for each token": lambda a: a.update(sin=a["sin"][0]),
    "sin is torch.float64": lambda a: a.update(sin=a["sin"].double()),
    "head_groups is 3": lambda a: a.update(head_groups=3),
}


@pytest.mark.parametrize("message", WRONG)
def test_the_envelope_names_the_argument(message):
    streams, scales, cos, sin = inputs(SIZES["joint"], torch.float32)
    arguments = dict(streams=streams, scales=scales, cos=cos, sin=sin)
    WRONG[message](arguments)
    with pytest.raises(ValueError, match=message):
        ours(**arguments)


def test_one_launch_for_each_stream_without_reading_data():
    def meta(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    pairs = [(meta(128), meta(128))] * 2
    cos = meta(512 + 8448, 64, dtype=torch.float32)
    streams = [meta(3, T, 3, 24, 128) for T in (512, 8448)]
    with op.launch.recorded() as launches:
        q, k, v = op.triton_forward(streams, pairs, cos, cos)
        op.triton_backward(q, k, v, streams, pairs, cos, cos)
    names = [launch.kernel.__name__ for launch in launches]
    assert names == ["_forward_kernel"] * 2 + ["_backward_kernel", "_sum_kernel"] * 2
    assert all(len(launch.grid) == 1 and launch.grid[0] < 2**31 for launch in launches)


@pytest.mark.parametrize("with_v", [True, False], ids=["joint", "single"])
def test_cost_counts_every_tensor_once(with_v):
    B, S, H, K = 3, 8960, 24, 128
    streams = 2 if with_v else 1
    cost = {
        mode: op.cost(B, S, H, K, torch.bfloat16, mode, with_v=with_v, table_batch=B, streams=streams)
        for mode in ("forward", "backward")
    }
    tensor, slots = 2 * B * S * H * K, 3 if with_v else 2
    tables, scales = 4 * B * S * K, 2 * streams * 2 * K
    assert cost["forward"].bytes == 2 * slots * tensor + tables + scales
    assert cost["backward"].bytes == (2 * slots + (2 if with_v else 3)) * tensor + tables + 2 * scales
    assert cost["backward"].flops > cost["forward"].flops > 0
