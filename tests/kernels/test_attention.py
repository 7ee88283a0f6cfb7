"""Attention, plain and with norm and rotation: every candidate against the formula, gradients, and what is kept."""

import functools
import subprocess
import sys
import types
import warnings

import pytest
import torch
import torch.nn.functional as F
from packaging.version import Version

from opensora_fast.kernels import attention, attention_libraries, attention_reference, backend, launch
from opensora_fast.kernels.attention import rope_attention, single_rope_attention, split_rope_attention

H, K = 2, 36
CANDIDATES = ["cpu-reference", "cpu-cpu_flash", "cpu-triton"]
GPU_CANDIDATES = ["cuda-reference", "cuda-cudnn", "cuda-triton"]  # the others' tests are in their own files


@pytest.fixture(params=[*CANDIDATES, *(pytest.param(name, marks=pytest.mark.gpu) for name in GPU_CANDIDATES)])
def candidate(request):
    """(name, device) of one that runs here, forced."""
    device, name = request.param.split("-")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    with backend.forced({"attention": name}):
        yield name, torch.device(device)


def skip_where_missing(candidate, shape, dtype):
    name, device = candidate
    if reason := attention.missing_backends(shape, dtype, device.type)[name]:
        pytest.skip(reason)


def with_each_candidate(name, cases, few, of_gpu=None):
    """Every candidate with each of `cases`; in the interpreter with `few`: `attention_triton`'s own tests have more."""
    params = [(candidate, case) for candidate in CANDIDATES for case in (few if "triton" in candidate else cases)]
    gpu = [pytest.param(x, case, marks=pytest.mark.gpu) for x in GPU_CANDIDATES for case in of_gpu or cases]
    return pytest.mark.parametrize(("candidate", name), [*params, *gpu], indirect=["candidate"], ids=str)


# Plain attention.


def qkv(S, T, K, dtype, *, kind="normal", B=1, H=2, device="cpu"):
    """q, k, v of `dtype`, of one of the kinds that attention has been seen to fail on."""
    generator = torch.Generator().manual_seed(S * T + K)
    q, k, v = (torch.randn(B, tokens, H, K, generator=generator, dtype=torch.float64) for tokens in (S, T, T))
    if kind == "large logits":
        q, k = q * 8, k * 8
    elif kind == "equal rows":
        q, k = q[:, :1].expand_as(q), k[:, :1].expand_as(k)
    elif kind.startswith("lse"):  # every score is moved by so much
        q[..., 0], k[..., 0] = 16, float(kind.split()[1]) / 16 * K**0.5
    return [x.to(dtype).contiguous().to(device).requires_grad_() for x in (q, k, v)]


def formula(q, k, v, scale):
    """(out, lse, scores) in the dtype of q, lse in float32 or float64."""
    scores_BHST = torch.einsum("bshk,bthk->bhst", q, k) * scale
    lse = scores_BHST.to(torch.promote_types(q.dtype, torch.float32)).logsumexp(dim=-1)
    return torch.einsum("bhst,bthk->bshk", scores_BHST.softmax(dim=-1), v), lse, scores_BHST


def seeded(shape, dtype, device, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def check_numerics(candidate, leaves, *, scale=None, dlse=True):
    """out, lse and the gradients of q, k, v, of both results or of out alone.

    They err at most twice as much as the formula in the dtype of q, plus what is lost by rounding the result once and
    by scores that are float32.
    """
    skip_where_missing(candidate, leaves[0].shape, leaves[0].dtype)
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    scale = scale or leaves[0].shape[-1] ** -0.5
    results = {}
    for key, function, of in (
        ("ours", lambda *x: attention.attention(*x, scale=scale), leaves),
        ("same", lambda *x: formula(*x, scale)[:2], leaves),
        ("exact", lambda *x: formula(*x, scale)[:2], exact_leaves),
    ):
        out, lse = function(*of)
        gradients = [seeded(out.shape, leaves[0].dtype, out.device).to(out.dtype)]
        gradients.append(seeded(lse.shape, torch.float32, out.device, 2).to(lse.dtype))
        outputs = (out, lse) if dlse else (out,)
        results[key] = (out, lse, *torch.autograd.grad(outputs, of, gradients[: len(outputs)]))
    scores = formula(*exact_leaves, scale)[2].detach().abs().max()
    for name, *tensors in zip(("out", "lse", "dq", "dk", "dv"), *results.values(), strict=True):
        ours, same, exact = (tensor.detach() for tensor in tensors)
        assert ours.dtype == same.dtype, name
        roundings = torch.finfo(ours.dtype).eps + torch.finfo(torch.float32).eps * scores
        allowed = 2 * (same.double() - exact).abs().max() + roundings * exact.abs().max()
        error = (ours.double() - exact).abs().max()
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16", "float16"])


# Query tokens of 0, 1, 64 and 127 more than whole tiles of 128; keys as many, fewer and more; every width of a head.
SHAPES = [(128, 128, 64), (129, 65, 96), (192, 255, 128), (255, 192, 64), (64, 31, 128), (1, 127, 96)]


@each_dtype
@with_each_candidate("shape", SHAPES, few=[(129, 65, 96)])
def test_is_exact(candidate, shape, dtype):
    check_numerics(candidate, qkv(*shape, dtype, device=candidate[1]))


# NumPy, in the interpreter, says that rows overflow which no result holds.
@pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")
@each_dtype
@with_each_candidate(
    "kind", ["large logits", "equal rows", "lse 88.5", "lse -88.5", "lse 3000", "lse -3000"], few=["lse -88.5"]
)
def test_is_exact_on_hard_inputs(candidate, kind, dtype):
    """Neither count of tokens is one of whole tiles: what a tile holds beyond them must not reach a result."""
    check_numerics(candidate, qkv(65, 70, 64, dtype, kind=kind, device=candidate[1]))


@pytest.mark.parametrize("scale", [0.02, 1.0])
def test_takes_another_scale(candidate, scale):
    check_numerics(candidate, qkv(33, 40, 64, torch.bfloat16, device=candidate[1]), scale=scale, dlse=False)


def test_a_single_key_is_copied_and_has_no_say(candidate):
    name, device = candidate
    q, k, v = qkv(5, 1, 64, torch.bfloat16, device=device)
    skip_where_missing(candidate, q.shape, torch.bfloat16)
    out, lse = attention.attention(q, k, v)
    assert torch.equal(out, v.expand_as(out))
    torch.testing.assert_close(lse, (q.float() * k.float()).sum(-1).mT / 8)
    dout = seeded(out.shape, torch.bfloat16, device)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
    assert max(dq.abs().max(), dk.abs().max()) < 1e-4 * dout.abs().max()  # what dP - D leaves: they are equal
    torch.testing.assert_close(dv, dout.float().sum(1, keepdim=True).bfloat16())


@pytest.mark.parametrize("name", ["reference", "cpu_flash"])  # Triton's own tests do it with fewer numbers
def test_gradients_in_float64(name):
    with backend.forced({"attention": name}):
        assert torch.autograd.gradcheck(attention.attention, qkv(3, 4, 12, torch.float64))


@pytest.mark.parametrize("layout", ["heads first", "slices of a projection", "one gradient for all"])
def test_takes_any_layout_of_tokens_and_heads(candidate, layout):
    _, device = candidate
    leaves = qkv(65, 65, 64, torch.bfloat16, B=2, device=device)
    skip_where_missing(candidate, leaves[0].shape, torch.bfloat16)
    dout = seeded(leaves[0].shape, torch.bfloat16, device)
    if layout == "one gradient for all":
        dout = dout[:1, :1].expand_as(dout)
    others = leaves
    if layout == "slices of a projection":
        others = [x.detach() for x in torch.stack([leaf.detach() for leaf in leaves], dim=2).unbind(2)]
    if layout == "heads first":
        dout, *others = (x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in (dout, *leaves))
    results = []
    for inputs, gradient in ((leaves, dout.contiguous()), (others, dout)):
        inputs = [x.detach().requires_grad_() for x in inputs]
        out, lse = attention.attention(*inputs)
        assert out.is_contiguous()
        assert lse.is_contiguous()
        results.append((out, lse, *torch.autograd.grad(out, inputs, gradient)))
    exactly = candidate[0] != "cudnn"  # whose backward has no fixed order
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other) if exactly else torch.allclose(one, other, rtol=2e-2, atol=2e-2)


# Every forward, and every backward but cuDNN's.
def test_is_bitwise_repeatable(candidate):
    name, device = candidate
    leaves = qkv(140, 70, 64, torch.bfloat16, device=device)
    skip_where_missing(candidate, leaves[0].shape, torch.bfloat16)
    runs = []
    for _ in range(2):
        out, lse = attention.attention(*leaves)
        gradients = torch.autograd.grad((out, lse), leaves, (torch.ones_like(out), torch.ones_like(lse)))
        runs.append((out, lse, *gradients) if name != "cudnn" else (out, lse))
    assert all(map(torch.equal, *runs))


def test_of_nothing_is_nothing(candidate):
    name, device = candidate
    for S, T in ((0, 3), (3, 0), (0, 0)):
        leaves = qkv(S, T, 64, torch.float16, device=device)
        skip_where_missing(candidate, leaves[0].shape, torch.float16)
        out, lse = attention.attention(*leaves)
        assert out.shape == (1, S, 2, 64)
        assert not out.any()
        assert lse.shape == (1, 2, S)
        assert torch.isneginf(lse).all()
        for gradient in torch.autograd.grad(out.sum(), leaves):
            assert not gradient.any()


def test_parts_of_the_keys_add_up_to_the_whole(candidate):
    """With the lse and out of all keys, the backward of a part of them is that part's share."""
    name, device = candidate
    q, k, v = (x.detach() for x in qkv(65, 96, 64, torch.float32, device=device))
    if attention.missing_backends(q.shape, torch.float32, device.type)[name]:
        q, k, v = q.half(), k.half(), v.half()
    skip_where_missing(candidate, q.shape, q.dtype)
    scale, dout = 64**-0.5, seeded(q.shape, q.dtype, device)
    out, lse = attention.forward(q, k, v, scale)
    whole = attention.backward(dout, q, k, v, out, lse, scale)
    parts = [
        attention.backward(dout, q, k[:, keys], v[:, keys], out, lse, scale)
        for keys in (slice(None, 31), slice(31, None))
    ]
    dq, dk, dv = parts[0][0] + parts[1][0], *(torch.cat(both, dim=1) for both in list(zip(*parts, strict=True))[1:])
    tolerance = 4 * torch.finfo(q.dtype).eps
    for ours, expected in zip((dq, dk, dv), whole, strict=True):
        assert (ours - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("name", ["reference", "cpu_flash", "triton"])
def test_wide_results_are_not_rounded(name):
    q, k, v = (x.detach() for x in qkv(40, 50, 64, torch.bfloat16))
    skip_where_missing((name, q.device), q.shape, q.dtype)
    dout = seeded(q.shape, torch.bfloat16, "cpu")
    exact_leaves = [x.double().requires_grad_() for x in (q, k, v)]
    exact_out, *_ = formula(*exact_leaves, 0.125)
    exact = [exact_out.detach(), *torch.autograd.grad(exact_out, exact_leaves, dout.double())]
    errors = {}
    with backend.forced({"attention": name}):
        for wide in (False, True):
            out, lse = attention.forward(q, k, v, 0.125, wide=wide)
            results = [out, *attention.backward(dout, q, k, v, out, lse, 0.125, wide=wide)]
            assert {x.dtype for x in results} == {torch.float32 if wide else torch.bfloat16}
            errors[wide] = [float((x - y).norm()) for x, y in zip(results, exact, strict=True)]
    assert all(wide < narrow for wide, narrow in zip(errors[True], errors[False], strict=True))


def test_without_a_gradient_of_lse_there_is_none_to_work_on(monkeypatch):
    seen = []
    original = attention.backward
    monkeypatch.setattr(
        attention, "backward", lambda *args, dlse, **kw: seen.append(dlse) or original(*args, dlse=dlse, **kw)
    )
    leaves = qkv(5, 6, 16, torch.float32)
    compiled = torch.compile(lambda *x: attention.attention(*x)[0], fullgraph=True, backend="aot_eager")
    for function in (lambda *x: attention.attention(*x)[0], compiled):
        out = function(*leaves)
        torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert seen == [None, None]
    _, lse = attention.attention(*leaves)
    torch.autograd.grad(lse, leaves, torch.ones_like(lse))
    assert seen[2].shape == lse.shape


def test_opcheck_of_plain_attention():
    for dlse in (None, torch.randn(1, 2, 5)):
        q, k, v = qkv(5, 6, 16, torch.float32)
        torch.library.opcheck(attention._attention, (q, k, v, 0.25))
        out, lse = attention.forward(q.detach(), k.detach(), v.detach(), 0.25)
        saved = (torch.randn_like(out), q.detach(), k.detach(), v.detach(), out, lse, 0.25, dlse)
        torch.library.opcheck(attention._attention_backward, saved)


def test_shapes_are_known_without_data():
    q, k, v = (x.detach().to("meta") for x in qkv(5, 6, 16, torch.bfloat16))
    out, lse = attention.attention(q, k, v)
    assert (out.shape, out.dtype) == (q.shape, torch.bfloat16)
    assert (lse.shape, lse.dtype) == ((1, 2, 5), torch.float32)


def test_plain_attention_compiles_into_one_node():
    leaves = qkv(5, 6, 16, torch.float32)
    compiled = torch.compile(attention.attention, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(compiled(*leaves), attention.attention(*leaves), strict=True):
        assert torch.equal(ours, expected)
    ours = torch.autograd.grad(sum(x.sum() for x in compiled(*leaves)), leaves)
    expected = torch.autograd.grad(sum(x.sum() for x in attention.attention(*leaves)), leaves)
    assert all(map(torch.equal, ours, expected))


@pytest.mark.parametrize("scale", [None, 0.3])
def test_compiles_for_any_number_of_tokens_and_channels(scale):
    function = functools.partial(attention.attention, scale=scale)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for S, T, K in ((5, 6, 16), (7, 6, 16), (9, 4, 24)):
        leaves = qkv(S, T, K, torch.float32)
        both = []
        for attend in (compiled, function):
            results = attend(*leaves)
            both.append((*results, *torch.autograd.grad(results, leaves, [torch.ones_like(x) for x in results])))
        assert all(map(torch.equal, *both))


def test_lse_is_what_a_shifted_softmax_says():
    """Adding c to every score adds c to lse and leaves out as it is."""
    q, k, v = (x.detach() for x in qkv(5, 6, 16, torch.float64))
    q[..., 0], k[..., 0] = 1, 0
    out, lse = attention.attention(q, k, v, scale=0.5)
    k[..., 0] = 6
    moved_out, moved_lse = attention.attention(q, k, v, scale=0.5)
    torch.testing.assert_close(moved_out, out)
    torch.testing.assert_close(moved_lse, lse + 3)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"q": torch.zeros(2, 3, 4)}, "q is"),
        ({"k": torch.zeros(1, 6, 2, 8)}, "k is"),
        ({"k": torch.zeros(1, 6, 3, 16)}, "k is"),
        ({"v": torch.zeros(1, 5, 2, 16)}, "v is"),
        ({"v": torch.zeros(1, 6, 2, 16, dtype=torch.float64)}, "v is torch.float64"),
        ({"q": torch.zeros(1, 5, 2, 16, dtype=torch.int64)}, "q is torch.int64"),
        ({"k": torch.zeros(1, 6, 16, 2).transpose(2, 3)}, "k has stride"),
        ({"scale": 0.0}, "scale is 0.0"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"scale": float("inf")}, "scale is inf"),
        ({"scale": torch.tensor(0.5)}, "scale is a tensor"),
        (dict.fromkeys("qkv", torch.zeros(1, 5, 2, 257)), "257 channels"),
    ],
)
def test_names_what_is_outside_of_the_envelope(change, named):
    arguments = {"q": torch.zeros(1, 5, 2, 16), "k": torch.zeros(1, 6, 2, 16), "v": torch.zeros(1, 6, 2, 16)} | change
    scale = arguments.pop("scale", None)
    with pytest.raises(ValueError, match=named):
        attention.attention(*arguments.values(), scale=scale)


MEMORY = """
import resource, sys, torch
from opensora_fast.kernels import attention_reference as reference
tokens, heads, reference.BLOCK_ELEMENTS = map(int, sys.argv[1:])
torch.set_num_threads(1)
small = torch.randn(1, 8, heads, 128)
def run(q):
    out, lse = reference.attention_reference(q, q, q)
    reference.attention_backward_reference(out, q, q, q, out, lse)
run(small)
q = torch.randn(1, tokens, heads, 128)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(q)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize(
    ("tokens", "heads", "block", "limit_mib"),
    [
        (3000, 2, 1 << 20, 64),  # all scores at once: 69 MiB, and the backward has three such
        pytest.param(20000, 4, attention_reference.BLOCK_ELEMENTS, 2048, marks=pytest.mark.slow),
    ],
)
def test_the_reference_holds_a_block_of_scores_at_a_time(tokens, heads, block, limit_mib):
    arguments = [sys.executable, "-c", MEMORY, str(tokens), str(heads), str(block)]
    kib = int(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout)
    assert kib < limit_mib * 1024


# With norm and rotation.


def inputs(lengths, dtype, B=2, strided=False, K=K, device="cpu"):
    """qkv of every stream, (q, k) scales of every stream, cos, sin."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    wide = torch.promote_types(dtype, torch.float32)
    if strided:  # as the single blocks' projection gives it
        streams = [random(B, T, 3 * H * K + 5)[..., : 3 * H * K].unflatten(-1, (3, H, K)) for T in lengths]
    else:
        streams = [random(B, T, 3, H, K) for T in lengths]
    scales = [random(K).abs() + 0.5 for _ in range(2 * len(lengths))]
    leaves = [x.to(device, dtype).requires_grad_() for x in (*streams, *scales)]
    angle = random(B, sum(lengths), K // 2)
    return leaves, (angle.cos().to(device, wide), angle.sin().to(device, wide))


def fused(leaves, tables):
    if len(leaves) == 3:
        return single_rope_attention(*leaves, *tables)
    return rope_attention(*leaves, *tables)


def composite(leaves, tables):
    """The formula, in the dtype of the inputs."""
    num_streams = len(leaves) // 3
    streams, scales = leaves[:num_streams], leaves[num_streams:]
    cos, sin = (table[:, :, None].to(leaves[0].dtype) for table in tables)
    parts = []
    for stream, q_scale, k_scale in zip(streams, scales[::2], scales[1::2], strict=True):
        q, k, v = stream.unbind(2)
        q, k = (x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * s for x, s in ((q, q_scale), (k, k_scale)))
        parts.append((q, k, v))
    q, k, v = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))

    def turned(x):
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    if leaves[0].dtype != torch.float64:  # what PyTorch makes of it
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (turned(q), turned(k), v))).transpose(1, 2)
    weights = torch.einsum("bqhk,bshk->bhqs", turned(q), turned(k)).div(K**0.5).softmax(dim=-1)
    return torch.einsum("bhqs,bshk->bqhk", weights, v)


FORMS = {
    "single": single_rope_attention,
    "joint": rope_attention,
    "split": lambda *arguments: torch.cat(split_rope_attention(*arguments), dim=1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
@with_each_candidate(
    "form_lengths",
    [("single", (5,)), ("joint", (3, 7)), ("joint", (1, 4)), ("split", (3, 7))],
    few=[("single", (5,)), ("split", (1, 4))],
    of_gpu=[("single", (256,)), ("joint", (128, 384)), ("split", (128, 384))],
)
def test_forward_and_gradients(candidate, form_lengths, dtype, strided, assert_as_exact):
    form, lengths = form_lengths
    device = candidate[1]
    leaves, tables = inputs(lengths, dtype, strided=strided, K=36 if device.type == "cpu" else 128, device=device)
    skip_where_missing(candidate, leaves[0][:, :, 0].shape, dtype)
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = composite(exact_leaves, [table.double() for table in tables])
    same = composite(leaves, tables)
    out = FORMS[form](*leaves, *tables)
    grad = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    results = [(out, *torch.autograd.grad(out, leaves, grad)), (same, *torch.autograd.grad(same, leaves, grad))]
    results.append((exact, *torch.autograd.grad(exact, exact_leaves, grad.double())))
    for number, tensors in enumerate(zip(*results, strict=True)):
        assert_as_exact(f"result {number}", *(tensor.detach() for tensor in tensors))


@pytest.mark.parametrize("lengths", [(5,), (3, 7)], ids=str)
def test_norm_and_rotation_in_the_kernel_are_those_of_the_pass_before_it(monkeypatch, lengths):
    leaves, tables = inputs(lengths, torch.float32)
    if reason := launch.missing("cpu"):
        pytest.skip(reason)
    results = {}
    for fused_form in (True, False):
        monkeypatch.setattr(attention.attention_triton, "favours_fusion", lambda *of, form=fused_form: form)
        with backend.forced({"attention": "triton"}):
            out = fused(leaves, tables)
            results[fused_form] = out, *torch.autograd.grad(out, leaves, torch.ones_like(out))
    for one, other in zip(results[True], results[False], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fused_form", [True, False], ids=["fused", "pre-pass"])
def test_launches_are_recorded_without_data(monkeypatch, fused_form):
    """What is compiled ahead of time, and counted: the same code path on tensors that hold nothing."""
    monkeypatch.setattr(attention.attention_triton, "favours_fusion", lambda *of: fused_form)
    streams = [torch.empty(1, T, 3, 2, 64, dtype=torch.bfloat16, device="meta") for T in (3, 7)]
    scales = [(torch.empty(64, dtype=torch.bfloat16, device="meta"),) * 2 for _ in streams]
    table = torch.empty(10, 32, device="meta")
    with launch.recorded() as launches, backend.forced({"attention": "triton", "qk_norm_rope": "triton"}):
        if reason := launch.missing("meta"):
            pytest.skip(reason)
        out, lse = attention.forward_streams(streams, scales, table, table, 1e-6)
        forward = len(launches)
        d_streams, _ = attention.backward_streams(out, streams, scales, table, table, out, lse, 1e-6)
    assert (out.shape, lse.shape) == ((1, 10, 2, 64), (1, 2, 10))
    assert [d.shape for d in d_streams] == [stream.shape for stream in streams]
    assert forward == (1 if fused_form else 3)
    assert len(launches) > forward


@pytest.mark.parametrize("name", ["reference", "cpu_flash"])  # Triton's own test has fewer numbers to vary
def test_gradients_with_norm_and_rotation_in_float64(name):
    leaves, tables = inputs((1, 2), torch.float64, B=1, K=8)
    with backend.forced({"attention": name}):
        assert torch.autograd.gradcheck(lambda *leaves: fused(leaves, tables), leaves)


def test_opcheck():
    leaves, tables = inputs((2, 3), torch.float32)
    for split in (False, True):
        torch.library.opcheck(attention._rope_attention, (leaves[:2], leaves[2:], *tables, 1e-6, split))
        streams, scales = ([leaf.detach() for leaf in part] for part in (leaves[:2], leaves[2:]))
        *outs, lse = attention._rope_attention(streams, scales, *tables, 1e-6, split)
        saved = ([torch.randn_like(out) for out in outs], streams, scales, *tables, outs, lse, 1e-6)
        torch.library.opcheck(attention._rope_attention_backward, saved)


def test_compiles_into_one_node():
    leaves, tables = inputs((2, 3), torch.float32)
    compiled = torch.compile(lambda *leaves: fused(leaves, tables), fullgraph=True, backend="aot_eager")
    out, expected = compiled(*leaves), fused(leaves, tables)
    assert torch.equal(out, expected)
    grad = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_keeps_the_projections_and_its_output_alone():
    leaves, tables = inputs((3, 7), torch.float32)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        out = fused(leaves, tables)
    allowed = {t.data_ptr() for t in (*leaves, *tables, out)}
    others = [tensor for pointer, tensor in kept.items() if pointer not in allowed]
    assert [tuple(tensor.shape) for tensor in others] == [(2, H, 10)], "the log-sum-exp"


def test_a_part_that_nothing_depends_on_has_no_gradient():
    leaves, tables = inputs((3, 7), torch.float32)
    joint, (txt, _) = fused(leaves, tables), split_rope_attention(*leaves, *tables)
    expected = torch.autograd.grad(joint[:, :3].sum(), leaves)
    assert all(map(torch.equal, torch.autograd.grad(txt.sum(), leaves), expected))


def test_split_is_the_joint_result_in_parts_that_are_kept_once():
    leaves, tables = inputs((3, 7), torch.float32)
    joint = fused(leaves, tables)
    parts = split_rope_attention(*leaves, *tables)
    assert torch.equal(torch.cat(parts, dim=1), joint)
    grad = torch.randn_like(joint)
    ours = torch.autograd.grad(parts, leaves, [part.contiguous() for part in grad.split((3, 7), dim=1)])
    for one, other in zip(ours, torch.autograd.grad(joint, leaves, grad), strict=True):
        assert torch.equal(one, other)
    assert all(part.is_contiguous() for part in parts)


def test_order_of_keys_does_not_matter():
    (qkv, q_scale, k_scale), tables = inputs((6,), torch.float64)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(3))
    out = single_rope_attention(qkv, q_scale, k_scale, *tables)
    shuffled = single_rope_attention(qkv[:, order], q_scale, k_scale, *(table[:, order] for table in tables))
    torch.testing.assert_close(shuffled, out[:, order])


@pytest.mark.parametrize("shape", [(2, 0), (0, 5)], ids=["no-tokens", "no-items"])
def test_nothing_in_gives_nothing_out(shape):
    qkv = torch.zeros(*shape, 3, H, K, requires_grad=True)
    scale, table = torch.ones(K, requires_grad=True), torch.zeros(*shape, K // 2)
    out = single_rope_attention(qkv, scale, scale, table, table)
    assert out.shape == (*shape, H, K)
    out.sum().backward()
    assert not scale.grad.any()


def test_gradients_of_any_layout_are_taken():
    leaves, tables = inputs((3, 7), torch.float32)
    out = fused(leaves, tables)
    grad = torch.randn(out.shape)
    transposed = grad.transpose(1, 2).contiguous().transpose(1, 2)
    both = [torch.autograd.grad(out, leaves, one, retain_graph=True) for one in (grad, transposed)]
    assert all(map(torch.equal, *both))


WIDE_HEAD, NARROW_HEAD = (1, 8, 2, 128), (1, 8, 2, 64)


@pytest.fixture
def hopper(monkeypatch):
    """hopper(flash version or "") makes the choice believe in a CUDA device of that architecture."""

    def pretend(flash="", capability=(9, 0)):
        monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
        monkeypatch.setattr(attention_libraries, "capability", lambda device: capability)
        versions = {"flash-attn-4": Version(flash)} if flash else {}
        monkeypatch.setattr(attention_libraries, "installed_version", versions.get)

    return pretend


def test_choose_on_the_cpu():
    assert attention.selected(WIDE_HEAD, torch.bfloat16, "cpu")[0] == "cpu_flash"
    assert attention.selected(WIDE_HEAD, torch.bfloat16, "mps") == (
        "reference",
        "there is no attention kernel for mps tensors",
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [WIDE_HEAD, NARROW_HEAD, (1, 8, 2, 96)])
def test_choose_takes_cudnn_where_it_can(hopper, shape, dtype):
    hopper(flash="4.0.0")
    name, reason = attention.selected(shape, dtype, "cuda")
    assert (name, "not yet measured" in reason) == ("cudnn", True)


@pytest.mark.parametrize(
    ("shape", "dtype", "flash", "chosen", "named"),
    [
        ((1, 8, 2, 256), torch.bfloat16, "4.0.0b36", "flash", "flash-attn-4 4.0.0b36"),
        ((1, 8, 2, 36), torch.bfloat16, "4.0.0b36", "triton", "multiple of 8 channels"),
        ((1, 8, 2, 96), torch.bfloat16, "4.0.0b35", "cudnn", "published"),
        (WIDE_HEAD, torch.float32, "", "triton", "not torch.float32"),
        ((1, 8, 2, 256), torch.float32, "", "reference", "256"),
        ((1, 8, 2, 256), torch.bfloat16, "4.0.0b35", "reference", "pip install -e '.[flash]'"),
        (WIDE_HEAD, torch.float64, "", "reference", "float64"),
    ],
)
def test_choose_passes_on_what_cudnn_refuses(hopper, shape, dtype, flash, chosen, named):
    if chosen == "triton" and (reason := launch.missing("cuda")):
        pytest.skip(reason)
    hopper(flash)
    name, reason = attention.selected(shape, dtype, "cuda")
    assert name == chosen
    assert named in reason


def test_choose_never_takes_gluon_of_itself():
    missing = dict.fromkeys(("reference", "cudnn", "flash", "triton", "gluon"), "")
    for away in ((), ("cudnn",), ("cudnn", "flash"), ("cudnn", "flash", "triton")):
        known = missing | dict.fromkeys(away, "away")
        assert attention.choose(WIDE_HEAD, torch.bfloat16, "cuda", known)[0] != "gluon"
    assert "gluon by name alone" in attention.choose(WIDE_HEAD, torch.bfloat16, "cuda", missing)[1]


def test_choose_passes_over_what_has_no_order_where_order_is_asked_for(hopper):
    hopper()
    torch.use_deterministic_algorithms(True)
    try:
        missing = attention.missing_backends(WIDE_HEAD, torch.bfloat16, "cuda")
    finally:
        torch.use_deterministic_algorithms(False)
    assert "use_deterministic_algorithms" in missing["cudnn"]


@pytest.fixture
def called(monkeypatch):
    """What runs, in order, where cuDNN is chosen: the CPU's library and the reference stand in for GPU kernels."""
    names = []

    def stand_in(name, function):
        def run(*args, wide=False, **kwargs):
            names.append(name)
            return function(*args, **kwargs)

        return run

    missing = dict.fromkeys(("reference", "cudnn", "flash", "triton"), "")
    monkeypatch.setattr(attention, "missing_backends", lambda *of: missing)
    monkeypatch.setattr(attention, "choose", lambda *of: ("cudnn", ""))
    for way in ("forward", "backward"):
        on_cpu = getattr(attention_libraries, f"cpu_flash_{way}")
        monkeypatch.setattr(attention_libraries, f"cudnn_{way}", stand_in("cudnn", on_cpu))
        monkeypatch.setattr(attention.attention_triton, f"attention_{way}", stand_in("triton", on_cpu))
    for function in (attention_reference.attention_reference, attention_reference.attention_backward_reference):
        monkeypatch.setattr(attention, function.__name__, stand_in("reference", function))
    backend.warn_once.cache_clear()
    yield names
    backend.warn_once.cache_clear()


@pytest.mark.parametrize(("why_not_triton", "instead"), [("", "triton"), ("no wheel", "reference")])
@pytest.mark.parametrize("tokens", [(1, 5), (5, 1)], ids=["one query", "one key"])
def test_cudnn_is_not_asked_for_lone_tokens(called, tokens, why_not_triton, instead):
    attention.missing_backends()["triton"] = why_not_triton
    leaves = qkv(*tokens, 64, torch.bfloat16)
    with pytest.warns(RuntimeWarning) as told:
        attention.attention(*leaves)[0].sum().backward()
    assert called == [instead] * 2
    (message,) = (str(warning.message) for warning in told)
    assert message.startswith(f"attention runs {instead}, not cudnn: cuDNN refuses a lone query or key")
    assert message.endswith(why_not_triton)


@pytest.mark.parametrize(
    ("K", "dtype", "of_lse", "why"),
    [
        (128, torch.bfloat16, "triton", "a head has 128"),
        (120, torch.bfloat16, "cudnn", ""),
        (120, torch.float16, "triton", "float16"),
    ],
)
def test_the_gradient_of_lse_that_does_not_fit_is_run_by_triton(called, K, dtype, of_lse, why):
    leaves = qkv(5, 6, K, dtype)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for outputs in (1, 2, 2):
            results = attention.attention(*leaves)[:outputs]
            torch.autograd.grad(results, leaves, [torch.ones_like(x) for x in results])
    assert called == ["cudnn", "cudnn", *("cudnn", of_lse) * 2]
    assert len(told) == (of_lse != "cudnn")
    assert all(
        "attention runs triton, not cudnn: cudnn takes" in str(w.message) and why in str(w.message) for w in told
    )


def test_a_call_is_selected_for_once(monkeypatch):
    found = []
    original = attention.missing_backends
    monkeypatch.setattr(attention, "missing_backends", lambda *of: found.append(of) or original(*of))
    leaves, tables = inputs((3, 7), torch.float32)
    for function, of in ((attention.attention, qkv(5, 6, 16, torch.float32)), (lambda *x: [fused(x, tables)], leaves)):
        found.clear()
        out = function(*of)[0]
        assert len(found) == 1
        out.sum().backward()
        assert len(found) == 2


def test_what_a_slow_reference_lacks_is_told_once_with_every_remedy(hopper, monkeypatch):
    hopper()
    monkeypatch.setattr(attention.attention_triton, "missing", lambda *of: "`pip install 'triton>=3.6'` adds Triton")
    backend.warn_once.cache_clear()
    x = types.SimpleNamespace(dtype=torch.bfloat16, device=torch.device("cuda", 1))
    with pytest.warns(RuntimeWarning) as told:
        assert {attention._select((1, 8, 2, 256), x).name for _ in range(2)} == {"reference"}
    backend.warn_once.cache_clear()
    (message,) = (str(warning.message) for warning in told)
    for part in ("slow reference", "up to 128, not 256", "pip install -e '.[flash]'", "pip install 'triton>=3.6'"):
        assert part in message


def test_choose_passes_over_an_older_gpu(hopper):
    hopper(capability=(7, 5))
    assert "sm_75" in attention.missing_backends(WIDE_HEAD, torch.bfloat16, "cuda")["cudnn"]


def test_the_choice_says_where_a_gradient_of_lse_goes_and_asks_nothing(monkeypatch):
    for name in ("capability", "installed_version"):
        monkeypatch.setattr(attention_libraries, name, None)
    missing = dict.fromkeys(("reference", "cudnn", "flash", "triton", "gluon"), "")
    assert "a gradient of lse is triton's" in attention.choose(WIDE_HEAD, torch.bfloat16, "cuda", missing)[1]
    assert "a gradient of lse is triton's" in attention.choose(NARROW_HEAD, torch.float16, "cuda", missing)[1]
    assert "gradient of lse" not in attention.choose(NARROW_HEAD, torch.bfloat16, "cuda", missing)[1]
    without = missing | {"triton": "away"}
    assert "a gradient of lse is reference's" in attention.choose(WIDE_HEAD, torch.bfloat16, "cuda", without)[1]
    without = missing | {"cudnn": "away"}
    assert attention.choose(WIDE_HEAD, torch.bfloat16, "cuda", without, "flash 9") == ("flash", "flash 9; away")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_opcheck_on_the_gpu():
    K = 64
    qkv, scale = torch.randn(1, 128, 3, 2, K), torch.ones(K)
    tensors = [x.to("cuda", torch.bfloat16).requires_grad_() for x in (qkv, scale, scale)]
    table = torch.zeros(1, 128, K // 2, device="cuda")
    torch.library.opcheck(attention._rope_attention, (tensors[:1], tensors[1:], table, table, 1e-6, False))


@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_cost_counts_every_tensor_once(mode):
    for keys in (10, 4):
        cost = attention.cost(2, 10, H, K, torch.bfloat16, mode, key_tokens=keys)
        queries, lse = 2 * 10 * H * K * 2, 2 * H * 10 * 4
        assert cost.bytes == (2 if mode == "forward" else 4) * (queries + queries * keys // 10) + lse
        assert cost.flops == (2 if mode == "forward" else 5) * 2 * 2 * H * 10 * keys * K
    assert attention.cost(2, 10, H, K, torch.bfloat16, mode) == attention.cost(
        2, 10, H, K, torch.bfloat16, mode, key_tokens=10
    )
