"""The watch over what is not finite: nothing is lost, nothing is kept twice, and the complaint helps."""

import pytest
import torch

from opensora_fast.kernels import attention, backend, finite_watch

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def watched(monkeypatch):
    """The CPU's candidates are watched as well, from a clean start."""
    monkeypatch.setattr(finite_watch, "WATCHED", frozenset({"cpu_flash"}))
    finite_watch.take(CPU)
    yield
    finite_watch.take(CPU)


def told():
    names, magnitudes = finite_watch.take(CPU)
    return finite_watch.complaint(names, magnitudes.tolist())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_bad_element_of_many_calls_is_told(value, dtype):
    x = torch.randn(3, 50).to(dtype)
    finite_watch.observe("attention", "cpu_flash", "log-sum-exp", x)
    bad = x.clone()
    bad[1, 7] = value
    finite_watch.observe("attention", "cpu_flash", "log-sum-exp", x, bad, x)
    finite_watch.observe("attention", "cpu_flash", "gradients", x)
    finite_watch.observe("attention", "cpu_flash", "log-sum-exp", x)
    message = told()
    assert "log-sum-exp of attention on cpu_flash" in message
    assert "gradients" not in message
    assert "OPENSORA_FAST_BACKEND=attention:triton" in message


def test_large_but_finite_is_no_complaint():
    finite_watch.observe("attention", "cpu_flash", "log-sum-exp", torch.full((1000,), 3e38), torch.full((9,), -3e38))
    assert told() == ""


def test_every_reading_starts_anew():
    finite_watch.observe("attention", "cpu_flash", "log-sum-exp", torch.tensor([float("nan")]))
    assert told() != ""
    finite_watch.observe("attention", "cpu_flash", "log-sum-exp", torch.ones(2))
    assert told() == ""
    names, magnitudes = finite_watch.take(CPU)
    assert (names, magnitudes.shape) == ([], (0,))


def test_what_is_not_watched_costs_nothing(monkeypatch):
    monkeypatch.setattr(torch.linalg, "vector_norm", None)
    finite_watch.observe("attention", "triton", "log-sum-exp", torch.ones(2))
    assert finite_watch.take(CPU)[0] == []


def qkv_and_tables(bad):
    qkv = torch.randn(1, 6, 3, 2, 16, generator=torch.Generator().manual_seed(0))
    qkv[0, 2, 1, 0, 3] = float("nan") if bad else 1
    return qkv.requires_grad_(), torch.ones(16, requires_grad=True), torch.ones(6, 8), torch.zeros(6, 8)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_attention_is_watched_forward_and_backward(compiled):
    function = attention.single_rope_attention
    if compiled:
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    for bad in (False, True):
        qkv, scale, cos, sin = qkv_and_tables(bad)
        out = function(qkv, scale, scale, cos, sin)
        names, magnitudes = finite_watch.take(CPU)
        assert [name.what for name in names] == ["log-sum-exp"]
        assert bool(magnitudes.isfinite().all()) is not bad
        out.backward(torch.ones_like(out))
        names, magnitudes = finite_watch.take(CPU)
        assert [name.what for name in names] == ["gradients of q and k"]
        assert bool(magnitudes.isfinite().all()) is not bad


def test_a_gradient_that_only_the_library_broke_is_told(monkeypatch):
    """NaN in one row of dq, which is what cuDNN has been seen to do, with a finite forward."""
    original = attention.libraries.cpu_flash_backward

    def broken(*args, **kwargs):
        dq, dk, dv = original(*args, **kwargs)
        dq[0, 3] = float("nan")
        return dq, dk, dv

    monkeypatch.setattr(attention.libraries, "cpu_flash_backward", broken)
    qkv, scale, cos, sin = qkv_and_tables(bad=False)
    out = attention.single_rope_attention(qkv, scale, scale, cos, sin)
    assert told() == ""
    out.backward(torch.ones_like(out))
    assert "gradients of q and k of attention on cpu_flash" in told()


def test_gluon_is_watched_until_it_is_proved(monkeypatch):
    monkeypatch.undo()
    assert "gluon" in finite_watch.WATCHED
    monkeypatch.setattr(finite_watch, "WATCHED", frozenset({"gluon"}))
    monkeypatch.setattr(attention, "missing_backends", lambda *of: {"gluon": "", "triton": ""})
    monkeypatch.setattr(
        attention.attention_gluon, "attention_forward", lambda q, *_, **__: (q, q.new_full((), torch.nan))
    )
    with backend.forced({"attention": "gluon"}):
        attention.forward(*(torch.randn(1, 4, 2, 8) for _ in "qkv"), 0.5)
    assert "log-sum-exp of attention on gluon" in told()


def test_the_reference_is_not_watched():
    with backend.forced({"attention": "reference"}):
        attention.attention(*(torch.randn(1, 4, 2, 8) for _ in "qkv"))
    assert finite_watch.take(CPU)[0] == []
