"""The libraries' adapters, against functions that have the libraries' signatures and are written in plain PyTorch."""

import functools
import importlib
import inspect
import sys
import types

import pytest
import torch
from packaging.version import Version
from torch._subclasses import FakeTensorMode

from opensora_fast.kernels import attention_libraries as libraries
from opensora_fast.kernels.attention_reference import attention_backward_reference, attention_reference

HOPPER = (9, 0)


def inputs(S=9, T=12, K=64, dtype=torch.bfloat16, B=2, H=3):
    """dout, q, k, v, dlse."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    tensors = [random(B, tokens, H, K).to(dtype) for tokens in (S, S, T, T)]
    return *tensors, random(B, H, S)


def exact_gradients(dout, q, k, v, scale, dlse):
    dout, *leaves = (x.double().requires_grad_() for x in (dout, q, k, v))
    scores = torch.einsum("bshk,bthk->bhst", *leaves[:2]) * scale
    outputs = [torch.einsum("bhst,bthk->bshk", scores.softmax(-1), leaves[2])]
    grads = [dout]
    if dlse is not None:
        outputs, grads = [*outputs, scores.logsumexp(-1)], [*grads, dlse.double()]
    return torch.autograd.grad(outputs, leaves, grads)


def as_exact_as_the_reference(gradients, dout, q, k, v, out, lse, scale, dlse):
    """The reference takes the gradient of lse as it is, which in the libraries goes through a channel of q's dtype."""
    same = attention_backward_reference(dout, q, k, v, out, lse, scale, dlse=dlse)
    for ours, theirs, exact in zip(gradients, same, exact_gradients(dout, q, k, v, scale, dlse), strict=True):
        assert ours.dtype == q.dtype
        assert ours.is_contiguous()
        rounding = torch.finfo(q.dtype).eps * exact.abs().max()
        assert (ours.double() - exact).abs().max() <= 2 * (theirs.double() - exact).abs().max() + rounding


@pytest.fixture
def cudnn(monkeypatch):
    """cuDNN's two operators, which refuse what faults on a GPU and answer with the reference."""
    schemas = {
        name: getattr(torch.ops.aten, name).default._schema
        for name in ("_scaled_dot_product_cudnn_attention", "_scaled_dot_product_cudnn_attention_backward")
    }

    def bound(name, args, kwargs):
        arguments = schemas[name].arguments
        values = dict(zip((argument.name for argument in arguments), args, strict=False)) | kwargs
        assert values.keys() <= {argument.name for argument in arguments}
        assert not {a.name for a in arguments if not a.has_default_value()} - values.keys()
        for x in (x for x in values.values() if isinstance(x, torch.Tensor) and x.dtype in libraries.HALF_DTYPES):
            assert not x.data_ptr() % 16
            assert not any(stride % 8 for stride in x.stride()[:3])
            assert x.shape[-1] <= libraries.CUDNN_MAX_HEAD_DIM
            assert x.stride(0) >= x.stride(2) >= x.stride(1) >= x.stride(3) == 1
        assert values["attn_bias"] is None
        assert values["scale"] is not None
        return values

    def forward(*args, **kwargs):
        of = bound("_scaled_dot_product_cudnn_attention", args, kwargs)
        assert of["compute_log_sumexp"] is True
        q, k, v = (of[name].transpose(1, 2) for name in ("query", "key", "value"))
        out, lse = attention_reference(q, k, v, of["scale"])
        return out.transpose(1, 2), lse[..., None], None, None, q.shape[1], k.shape[1], None, None, None

    def backward(*args, **kwargs):
        of = bound("_scaled_dot_product_cudnn_attention_backward", args, kwargs)
        names = ("grad_out", "query", "key", "value", "out")
        tensors = [of[name].transpose(1, 2) for name in names]
        assert tensors[0].stride() == tensors[4].stride()
        assert (of["max_q"], of["max_k"]) == (tensors[1].shape[1], tensors[2].shape[1])
        assert of["logsumexp"].shape == (*of["query"].shape[:3], 1)
        return [x.transpose(1, 2) for x in attention_backward_reference(*tensors, of["logsumexp"][..., 0], of["scale"])]

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", forward)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention_backward", backward)


@pytest.mark.parametrize(
    ("K", "with_dlse", "dtype"),
    [
        (64, False, torch.bfloat16),
        (64, False, torch.float16),
        (64, True, torch.bfloat16),
        (120, True, torch.bfloat16),
        (128, False, torch.bfloat16),
    ],
)
def test_cudnn(cudnn, K, with_dlse, dtype):
    dout, q, k, v, dlse = inputs(K=K, dtype=dtype)
    dlse = dlse if with_dlse else None
    out, lse = libraries.cudnn_forward(q, k, v, 0.2)
    for ours, expected in zip((out, lse), attention_reference(q, k, v, 0.2), strict=True):
        assert torch.equal(ours, expected)
        assert ours.is_contiguous()
    gradients = libraries.cudnn_backward(dout, q, k, v, out, lse, 0.2, dlse=dlse)
    as_exact_as_the_reference(gradients, dout, q, k, v, out, lse, 0.2, dlse)


def wide_projection(x, extra):
    return torch.cat((x.flatten(2), x.new_zeros(*x.shape[:2], extra)), -1)[..., :-extra].unflatten(-1, x.shape[2:])


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x[:, :, :, ::2].repeat_interleave(2, -1).expand_as(x),
        lambda x: x[:1].expand_as(x),
        lambda x: wide_projection(x, 5),
        lambda x: wide_projection(x, 8),
        lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view_as(x),
    ],
    ids=["heads first", "tokens first", "copied", "expanded", "odd stride", "even stride", "odd offset"],
)
def test_cudnn_is_given_what_it_can_read(cudnn, change):
    dout, q, k, v, _ = map(change, (*inputs()[:4], torch.zeros(2, 12, 3, 64)))
    expected = libraries.cudnn_forward(*(x.contiguous() for x in (q, k, v)), 0.2)
    out, lse = libraries.cudnn_forward(q, k, v, 0.2)
    assert all(map(torch.equal, (out, lse), expected))
    gradients = libraries.cudnn_backward(dout, q, k, v, out, lse, 0.2)
    clean = (x.contiguous() for x in (dout, q, k, v, out))
    assert all(map(torch.equal, gradients, libraries.cudnn_backward(*clean, lse, 0.2)))


def test_cudnn_copies_nothing_that_it_can_read():
    qkv = torch.zeros(2, 9, 3, 4, 64, dtype=torch.bfloat16)
    for x in (*qkv.unbind(2), qkv[:, :, 0].contiguous(), wide_projection(qkv[:, :, 0], 8)):
        assert libraries._laid_out(x).data_ptr() == x.data_ptr()


def test_cudnn_operators_take_these_arguments():
    """PyTorch's own shape functions: of the version that is installed, without a GPU."""
    dout, q, k, v, dlse = (x.to("meta") for x in inputs())
    out, lse = libraries.cudnn_forward(q, k, v, 0.2)
    assert (out.shape, lse.shape) == (q.shape, (2, 3, 9))
    for given in (None, dlse):
        shapes = [x.shape for x in libraries.cudnn_backward(dout, q, k, v, out, lse, 0.2, dlse=given)]
        assert shapes == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize(
    ("variable", "shape", "dtype", "device", "named"),
    [
        ("0", (1, 8, 2, 128), torch.bfloat16, HOPPER, ""),
        ("0", (1, 8, 2, 128), torch.bfloat16, None, ""),
        ("1", (1, 8, 2, 128), torch.bfloat16, HOPPER, "unset it"),
        ("0", (1, 8, 2, 136), torch.bfloat16, HOPPER, "136"),
        ("0", (1, 8, 2, 36), torch.bfloat16, HOPPER, "36"),
        ("0", (1, 8, 2, 64), torch.float32, HOPPER, "float32"),
        ("0", (1, 8, 2, 64), torch.float16, (7, 5), "sm_75"),
    ],
)
def test_cudnn_says_what_it_lacks(monkeypatch, variable, shape, dtype, device, named):
    monkeypatch.setenv(libraries.CUDNN_RAGGED, variable)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    reason = libraries.missing_cudnn(shape, dtype, device)
    assert (named in reason) if named else not reason
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    assert "no cuDNN" in libraries.missing_cudnn(shape, dtype, device)


# The gradient of lse in padded channels.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_pieces_add_up_to_what_was_cut(dtype):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(torch.promote_types(dtype, torch.float32))
    pieces = libraries._pieces(x, dtype)
    assert {piece.dtype for piece in pieces} == {dtype}
    rest = (sum(piece.double() for piece in pieces) - x.double()).abs().max()
    assert rest <= (0 if dtype != torch.float16 else torch.finfo(torch.float16).smallest_normal / 1024)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("K", [8, 36, 64])
def test_the_cpu_takes_a_gradient_of_lse(dtype, K):
    dout, q, k, v, dlse = inputs(K=K, dtype=dtype)
    dlse = 100 * dlse.to(torch.promote_types(dtype, torch.float32))
    out, lse = libraries.cpu_flash_forward(q, k, v, 0.3)
    gradients = libraries.cpu_flash_backward(dout, q, k, v, out, lse, 0.3, dlse=dlse)
    as_exact_as_the_reference(gradients, dout, q, k, v, out, lse, 0.3, dlse)


def test_the_cpu_takes_a_gradient_of_lse_beyond_float16():
    dout, q, k, v, dlse = inputs(dtype=torch.float16)
    out, lse = libraries.cpu_flash_forward(q, k, v, 0.01)
    gradients = libraries.cpu_flash_backward(dout, q, k, v, out, lse, 0.01, dlse=1e5 * dlse)
    as_exact_as_the_reference(gradients, dout, q, k, v, out, lse, 0.01, 1e5 * dlse)


def test_no_gradient_of_lse_pads_nothing(monkeypatch):
    dout, q, k, v, _ = inputs()
    out, lse = libraries.cpu_flash_forward(q, k, v, 0.3)
    monkeypatch.setattr(torch.nn.functional, "pad", None)
    libraries.cpu_flash_backward(dout, q, k, v, out, lse, 0.3)


@pytest.mark.parametrize(
    ("name", "K", "dtype", "installed", "named"),
    [
        ("cudnn", 120, torch.bfloat16, "", ""),
        ("cudnn", 128, torch.bfloat16, "", "a head has 128"),
        ("cudnn", 64, torch.float16, "", "float16"),
        ("flash", 248, torch.bfloat16, "flash-attn", ""),
        ("flash", 256, torch.bfloat16, "flash-attn", "a head has 256"),
        ("flash", 64, torch.float16, "flash-attn-3", "float16"),
        ("flash", 256, torch.float16, "flash-attn-4", ""),
        ("cpu_flash", 256, torch.float16, "", ""),
        ("triton", 128, torch.float16, "", ""),
    ],
)
def test_room_for_the_gradient_of_lse(monkeypatch, name, K, dtype, installed, named):
    monkeypatch.setattr(libraries, "installed_version", {installed: Version("9")}.get)
    reason = libraries.missing_dlse(name, K, dtype, HOPPER)
    assert (named in reason) if named else not reason


# FlashAttention. Each stand-in has the parameters of the function that it stands for.


def flash_4():
    module = types.ModuleType("flash_attn.cute.interface")

    def _flash_attn_fwd(q, k, v, qv=None, cu_seqlens_q=None, softmax_scale=None, causal=False, return_lse=False):
        assert return_lse
        return *attention_reference(q, k, v, softmax_scale), None, None, None

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, deterministic=False, dlse=None
    ):
        module.deterministic = deterministic
        return attention_backward_reference(dout, q, k, v, out, lse, softmax_scale, dlse=dlse)

    module._flash_attn_fwd, module._flash_attn_bwd = _flash_attn_fwd, _flash_attn_bwd
    return module


def written(gradients, into):
    for found, place in zip(gradients, into, strict=True):
        place.copy_(found)


def flash_3():
    module = types.ModuleType("flash_attn_interface")

    def _flash_attn_forward(q, k, v, k_new=None, v_new=None, qv=None, out_=None, softmax_scale=None, causal=False):
        return *attention_reference(q, k, v, softmax_scale), torch.empty(0), torch.empty(0)

    def _flash_attn_backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        sequed_q=None,
        sequed_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        dq=None,
        dk=None,
        dv=None,
        softmax_scale=None,
        is_causal=False,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        deterministic=False,
        sm_margin=0,
    ):
        module.deterministic = deterministic
        written(attention_backward_reference(dout, q, k, v, out, softmax_lse, softmax_scale), (dq, dk, dv))

    module._flash_attn_forward, module._flash_attn_backward = _flash_attn_forward, _flash_attn_backward
    return module


def flash_2():
    module = types.ModuleType("flash_attn.flash_attn_interface")

    def _flash_attn_forward(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        return_softmax,
    ):
        assert (dropout_p, causal, window_size_left, window_size_right, softcap) == (0, False, -1, -1, 0)
        return *attention_reference(q, k, v, softmax_scale), None, None

    def _flash_attn_backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        deterministic,
        rng_state=None,
    ):
        assert (dropout_p, causal, window_size_left, window_size_right, softcap) == (0, False, -1, -1, 0)
        module.deterministic = deterministic
        written(attention_backward_reference(dout, q, k, v, out, softmax_lse, softmax_scale), (dq, dk, dv))

    module._flash_attn_forward, module._flash_attn_backward = _flash_attn_forward, _flash_attn_backward
    return module


@pytest.fixture
def install(monkeypatch):
    """install(distribution, module) as if with pip."""
    versions = {}
    monkeypatch.setattr(libraries, "installed_version", versions.get)

    def installed(distribution, module, version="9.9"):
        versions[distribution] = Version(version)
        for depth in range(1, module.__name__.count(".") + 1):
            package = module.__name__.rsplit(".", depth)[0]
            monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return module

    return installed


FLASHES = [("flash-attn-4", flash_4), ("flash-attn-3", flash_3), ("flash-attn", flash_2)]


@pytest.mark.parametrize("with_dlse", [False, True], ids=["out", "out and lse"])
@pytest.mark.parametrize(("distribution", "make"), FLASHES)
def test_flash(install, distribution, make, with_dlse):
    install(distribution, make())
    dout, q, k, v, dlse = inputs()
    dlse = dlse if with_dlse else None
    out, lse = libraries.flash_forward(q, k, v, 0.2)
    for ours, expected in zip((out, lse), attention_reference(q, k, v, 0.2), strict=True):
        assert torch.equal(ours, expected)
    gradients = libraries.flash_backward(dout, q, k, v, out, lse, 0.2, dlse=dlse)
    as_exact_as_the_reference(gradients, dout, q, k, v, out, lse, 0.2, dlse)


@pytest.mark.parametrize(("distribution", "make"), FLASHES)
def test_flash_keeps_an_order_where_one_is_asked_for(install, distribution, make):
    module = install(distribution, make())
    dout, q, k, v, _ = inputs()
    out, lse = libraries.flash_forward(q, k, v, 0.2)
    for ordered in (True, False):
        torch.use_deterministic_algorithms(ordered)
        try:
            libraries.flash_backward(dout, q, k, v, out, lse, 0.2)
        finally:
            torch.use_deterministic_algorithms(False)
        assert module.deterministic is ordered


def test_flash_takes_the_newest_that_the_device_runs(install):
    install("flash-attn", flash_2())
    install("flash-attn-3", flash_3())
    for device, name in (((8, 0), "flash-attn 9.9"), (HOPPER, "flash-attn-3 9.9"), ((10, 0), "flash-attn 9.9")):
        assert libraries.flash_name(device) == name
    install("flash-attn-4", flash_4(), "4.0.0b35")
    assert libraries.flash_name(HOPPER) == "flash-attn-3 9.9"
    install("flash-attn-4", flash_4(), "4.0.0b36")
    assert libraries.flash_name((10, 0)) == libraries.flash_name(HOPPER) == "flash-attn-4 4.0.0b36"


def test_flash_that_is_too_old_is_none(install):
    install("flash-attn-4", flash_4(), "4.0.0b9")
    assert "from 4.0.0b36 on" in libraries.missing_flash((1, 8, 2, 64), torch.bfloat16, HOPPER)


def test_flash_runs_on_the_device_of_its_tensors(install, monkeypatch):
    asked, current = [], []
    with FakeTensorMode():
        x = torch.empty(1, 8, 2, 64, dtype=torch.bfloat16, device="cuda:0")

    class Current:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            current.append(self.device)

        def __exit__(self, *_):
            current.pop()

    def forward(q, k, v, **_):
        assert current == [q.device]
        return q, q

    def backward(q, *_, **__):
        assert current == [q.device]
        return q, q, q

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", Current)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: asked.append(index) or (9, index))
    monkeypatch.setattr(libraries, "_capability", functools.cache(libraries._capability.__wrapped__))
    module = install("flash-attn-4", flash_4())
    module._flash_attn_fwd, module._flash_attn_bwd = forward, backward
    for _ in range(2):
        libraries.flash_forward(x, x, x, 0.2)
        libraries.flash_backward(x, x, x, x, x, x, 0.2)
    assert libraries.capability(torch.device("cuda", 1)) == (9, 1)
    assert asked == [0, 1]
    assert libraries.capability(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("shape", "dtype", "device", "named"),
    [
        ((1, 8, 2, 256), torch.bfloat16, HOPPER, ""),
        ((1, 8, 2, 256), torch.bfloat16, (10, 0), "up to 128"),
        ((1, 8, 2, 36), torch.bfloat16, HOPPER, "36"),
        ((1, 8, 2, 64), torch.float32, HOPPER, "float32"),
        ((1, 8, 2, 64), torch.bfloat16, (8, 0), "no FlashAttention for sm_80"),
    ],
)
def test_flash_says_what_it_lacks(install, shape, dtype, device, named):
    if named != "no FlashAttention for sm_80":  # a remedy that would not help is not told
        assert ("pip install" in libraries.missing_flash(shape, dtype, device)) is (not named)
    install("flash-attn-4", flash_4())
    reason = libraries.missing_flash(shape, dtype, device)
    assert (named in reason) if named else not reason


def test_flash_that_cannot_be_imported_says_what_to_do(install, monkeypatch):
    install("flash-attn-3", flash_3())
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    with pytest.raises(ValueError, match="flash-attn-3 is installed and cannot be imported"):
        libraries.flash_forward(*inputs()[1:4], 0.2)


def test_every_library_has_the_same_two_functions():
    for name in ("cpu_flash", "cudnn", "flash"):
        forward, backward = (inspect.signature(getattr(libraries, f"{name}_{way}")) for way in ("forward", "backward"))
        assert len(forward.parameters) == 4
        assert list(backward.parameters) == ["dout", "q", "k", "v", "out", "lse", "scale", "dlse"]


# What is installed, where it is.


each_generation = pytest.mark.parametrize("generation", libraries.FLASH_GENERATIONS, ids=lambda of: of.distribution)


def installed_module(generation):
    if (version := libraries.installed_version(generation.distribution)) is None or version < generation.oldest:
        pytest.skip(f"{generation.distribution} {generation.oldest} is not installed")
    return importlib.import_module(generation.module)


@each_generation
def test_the_installed_flash_takes_these_arguments(generation):
    module, bound = installed_module(generation), []

    class Signatures:
        def __getattr__(self, name):
            function = getattr(module, name)
            signature = inspect.signature(getattr(function, "_init_fn", function))  # behind a custom op

            def call(*args, **kwargs):
                signature.bind(*args, **kwargs)
                bound.append(name)
                return (torch.empty(0),) * 3

            return call

    x = torch.empty(1, 8, 2, 64, dtype=torch.bfloat16)
    generation.forward(Signatures(), x, x, x, 0.2)
    generation.backward(Signatures(), x, x, x, x, x, x, 0.2, *[x] * generation.takes_dlse)
    assert len(bound) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@each_generation
@pytest.mark.parametrize("with_dlse", [False, True], ids=["out", "out and lse"])
@pytest.mark.parametrize(("S", "T", "K"), [(128, 128, 64), (129, 255, 128), (1, 65, 96)])
def test_flash_on_the_gpu(generation, S, T, K, with_dlse, monkeypatch):
    installed_module(generation)
    monkeypatch.setattr(libraries, "FLASH_GENERATIONS", (generation,))
    dout, q, k, v, dlse = (x.cuda() for x in inputs(S, T, K))
    if reason := libraries.missing_flash(q.shape, q.dtype, libraries.capability(q.device)):
        pytest.skip(reason)
    out, lse = libraries.flash_forward(q, k, v, 0.2)
    exact_out, exact_lse = attention_reference(q.double(), k.double(), v.double(), 0.2)
    assert (out - exact_out).abs().max() <= 2 * torch.finfo(q.dtype).eps * exact_out.abs().max()
    torch.testing.assert_close(lse, exact_lse.float(), rtol=1e-4, atol=2e-4)  # version 4 approximates some of exp
    gradients = libraries.flash_backward(dout, q, k, v, out, lse, 0.2, dlse=dlse if with_dlse else None)
    as_exact_as_the_reference(gradients, dout, q, k, v, out, lse, 0.2, dlse if with_dlse else None)
