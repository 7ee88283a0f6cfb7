"""The Gluon attention: its own source under an emulator of Hopper's asynchrony, against float64; and on a GPU."""

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from opensora_fast.kernels import attention_gluon, launch
from opensora_fast.kernels.attention_gluon import attention_backward, attention_forward
from opensora_fast.kernels.attention_reference import attention_backward_reference, attention_reference

spec = importlib.util.spec_from_file_location("gluon_emulator", Path(__file__).with_name("gluon_emulator.py"))
gluon_emulator = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gluon_emulator)

K = attention_gluon.HEAD_DIM
SCALE = K**-0.5
BF16, FP16 = torch.bfloat16, torch.float16
FAILURES = (gluon_emulator.Deadlock, gluon_emulator.EmulationError)

pytestmark = pytest.mark.skipif(
    bool(attention_gluon.missing((1, 1, 1, K), BF16, "cuda").startswith("Gluon cannot")), reason="Gluon is missing"
)
by_hopper = pytest.mark.gpu


@pytest.fixture
def emulate(monkeypatch):
    """emulate(seed=, edits=): from now on Gluon kernels run in the emulator, Triton's in its interpreter."""
    if reason := launch.missing("cpu"):
        pytest.skip(reason)
    interpret = launch.launch

    def set_to(seed=0, edits=None):
        def run(kernel, grid, **arguments):
            if hasattr(kernel, "is_gluon"):
                gluon_emulator.launch(kernel, grid, seed=seed, edits=edits, **arguments)
            else:
                interpret(kernel, grid, **arguments)

        monkeypatch.setattr(launch, "launch", run)

    return set_to


@pytest.fixture
def hopper():
    if reason := attention_gluon.missing((1, 1, 1, K), BF16, "cuda"):
        pytest.skip(reason)
    return torch.device("cuda")


def inputs(S, T, dtype=BF16, *, B=1, H=2, device="cpu", strided=False):
    """q, k, v and dout; strided: as slices of one projection, and dout with heads before positions."""
    generator = torch.Generator().manual_seed(S * 1000 + T)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    if strided:
        q, k, v = (random(B, tokens, 3, H, K)[:, :, slot] for slot, tokens in enumerate((S, T, T)))
        return q, k, v, random(B, H, S, K).transpose(1, 2)
    return random(B, S, H, K), random(B, T, H, K), random(B, T, H, K), random(B, S, H, K)


def everything(q, k, v, dout, scale=SCALE, *, dlse=None, wide=False):
    """out, lse, dq, dk, dv by the Gluon kernels."""
    out, lse = attention_forward(q, k, v, scale, wide=wide)
    return out, lse, *attention_backward(dout, q, k, v, out, lse, scale, dlse=dlse, wide=wide)


def exactly(q, k, v, dout, scale=SCALE, dlse=None):
    """The same by the formula in float64."""
    q, k, v = leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    scores = torch.einsum("bshk,bthk->bhst", q, k) * scale
    out, lse = torch.einsum("bhst,bthk->bshk", scores.softmax(dim=-1), v), scores.logsumexp(dim=-1)
    dlse = torch.zeros_like(lse) if dlse is None else dlse.double()
    gradients = torch.autograd.grad((out, lse), leaves, (dout.double(), dlse))
    return [x.detach() for x in (out, lse, *gradients)]


def in_the_same_dtype(q, k, v, dout, scale=SCALE, dlse=None):
    """The same by PyTorch in the dtype of the inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    heads_first = [x.transpose(1, 2) for x in leaves]
    lse = (heads_first[0] @ heads_first[1].mT * scale).float().logsumexp(dim=-1)
    out = F.scaled_dot_product_attention(*heads_first, scale=scale).transpose(1, 2)
    both = ((out,), (dout,)) if dlse is None else ((out, lse), (dout, dlse))
    return [x.detach() for x in (out, lse, *torch.autograd.grad(*both[:1], leaves, both[1]))]


def check(assert_as_exact, ours, same, exact):
    for name, *results in zip(("out", "lse", "dq", "dk", "dv"), ours, same, exact, strict=True):
        assert_as_exact(name, *results)


# Numbers.

# S % 128 and T % 128 in 0, 1, 64, 127; one to four tiles, of two stages each, in either direction.
LENGTHS = [(128, 128), (1, 257), (257, 1), (64, 191), (127, 64), (191, 512), (384, 127)]


@pytest.mark.parametrize(("S", "T"), LENGTHS, ids=str)
def test_forward_and_gradients(S, T, emulate, assert_as_exact):
    emulate(seed=S)
    of = inputs(S, T)
    check(assert_as_exact, everything(*of), in_the_same_dtype(*of), exactly(*of))


def test_float16_strided_and_with_a_gradient_of_lse(emulate, assert_as_exact):
    emulate()
    of = inputs(65, 130, FP16, B=2, strided=True)
    dlse = torch.randn(2, 2, 65, generator=torch.Generator().manual_seed(1))
    ours = everything(*of, dlse=dlse)
    check(assert_as_exact, ours, in_the_same_dtype(*of, dlse=dlse), exactly(*of, dlse=dlse))
    assert all(x.is_contiguous() for x in ours)


def test_wide_results_are_rounded_once_less(emulate):
    emulate()
    of = inputs(70, 140)
    for name, wide, narrow, exact in zip(
        ("out", "lse", "dq", "dk", "dv"), everything(*of, wide=True), everything(*of), exactly(*of), strict=True
    ):
        assert wide.dtype == torch.float32
        assert (wide - exact).norm() < (narrow - exact).norm() or name == "lse", name


def test_a_block_of_a_longer_row_of_keys_gives_its_share(emulate):
    """As a ring does it: with the lse and out of all keys, the shares in dq add up, and dk and dv are the block's."""
    emulate()
    q, k, v, dout = inputs(100, 300)
    out, lse = attention_reference(q, k, v, SCALE, wide=True)
    parts = [slice(0, 130), slice(130, 300)]
    ours = [attention_backward(dout, q, k[:, at], v[:, at], out, lse, SCALE, wide=True) for at in parts]
    expected = attention_backward_reference(dout, q, k, v, out, lse, SCALE, wide=True)
    dq, dk, dv = sum(one[0] for one in ours), *(torch.cat([one[i] for one in ours], dim=1) for i in (1, 2))
    for one, other in zip((dq, dk, dv), expected, strict=True):
        assert (one - other).abs().max() < 2**-7 * other.abs().max()


def test_keys_past_the_end_do_not_overflow(emulate, assert_as_exact):
    """Rows whose lse is below -88: exp(-lse) of a key that does not exist, times its 0, would be NaN."""
    emulate()
    q, k, v, dout = inputs(64, 65)
    q, k = torch.full_like(q, 4), torch.full_like(k, -4) + 0.125 * k
    of = q, k, v, dout
    exact = exactly(*of)
    assert exact[1].max() < -150
    check(assert_as_exact, everything(*of), in_the_same_dtype(*of), exact)


def test_a_row_without_keys_has_no_gradient(emulate):
    """As a rank has it whose keys are not all of a row's: lse is -inf and there are keys all the same."""
    emulate()
    q, k, v, dout = inputs(3, 20)
    out, lse = attention_reference(q, k, v, SCALE)
    lse[..., 1], out[:, 1] = -math.inf, 0
    ours = attention_backward(dout, q, k, v, out, lse, SCALE, wide=True)
    assert not ours[0][:, 1].any()
    for one, other in zip(ours, attention_backward_reference(dout, q, k, v, out, lse, SCALE, wide=True), strict=True):
        assert (one - other).abs().max() < 2**-7 * other.abs().max()


@pytest.mark.parametrize("factor", [0.0, 30.0], ids=["equal-rows", "large-logits"])
def test_extreme_rows(factor, emulate, assert_as_exact):
    emulate()
    q, k, v, dout = inputs(66, 260)
    of = q * factor, k, v, dout
    check(assert_as_exact, everything(*of), in_the_same_dtype(*of), exactly(*of))


@pytest.mark.parametrize(
    "change",
    [
        lambda x: F.pad(x, (1, 7))[..., 1 : K + 1],  # starts between multiples of 16 bytes
        lambda x: F.pad(x, (0, 4))[..., :K],  # strides between them
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),  # channels apart
    ],
    ids=["start", "strides", "channels"],
)
def test_what_tma_cannot_take_is_copied(change, emulate):
    emulate()
    of = inputs(66, 67)
    for one, other in zip(everything(*map(change, of)), everything(*of), strict=True):
        assert torch.equal(one, other)


def test_rows_that_repeat_are_copied(emulate):
    emulate()
    q, k, v, dout = inputs(66, 67)
    repeated = [x[:, :, :1].expand(-1, -1, 2, -1) for x in (q, k, v, dout)]
    for one, other in zip(everything(*repeated), everything(*(x.contiguous() for x in repeated)), strict=True):
        assert torch.equal(one, other)


def test_nothing_in_gives_nothing_out(emulate):
    emulate()
    q, k, v, dout = inputs(3, 0)
    out, lse, dq, dk, dv = everything(q, k, v, dout)
    assert not out.any()
    assert not dq.any()
    assert (lse == -math.inf).all()
    assert dk.shape == dv.shape == (1, 0, 2, K)
    out, lse, dq, dk, dv = everything(*inputs(0, 3))
    assert out.shape == dq.shape == (1, 0, 2, K)
    assert lse.shape == (1, 2, 0)
    assert not dk.any()
    assert not dv.any()


# Schedules: five tiles in two stages, so that every barrier is used for a third time.


@pytest.fixture
def forward_call():
    """Five tiles of keys for one of queries."""
    q, k, v, _ = inputs(128, 5 * attention_gluon.FORWARD_KEYS, H=1)
    return lambda: attention_forward(q, k, v, SCALE)


@pytest.fixture
def backward_call():
    """Five tiles of queries for one of keys."""
    q, k, v, dout = inputs(5 * attention_gluon.BACKWARD_QUERIES, 128, H=1)
    out, lse = attention_reference(q, k, v, SCALE)
    return lambda: attention_backward(dout, q, k, v, out, lse, SCALE)


@pytest.mark.parametrize("count", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_no_order_of_the_threads_hangs_or_changes_a_bit(count, forward_call, backward_call, emulate):
    first = None
    for seed in range(count):
        emulate(seed)
        results = *forward_call(), *backward_call()
        first = first or results
        assert all(map(torch.equal, results, first)), seed


# What must not be left out: function, text, what stands there instead.
FORWARD_MISTAKES = {
    "K is overwritten": ("_forward_producer", "mbarrier.wait(k_empty.index(stage), parity ^ 1)", "pass"),
    "V is overwritten": ("_forward_producer", "mbarrier.wait(v_empty.index(stage), parity ^ 1)", "pass"),
    "the parity stands still": ("_forward_producer", "parity = step // stages & 1", "parity = 0"),
    "K is read early": ("_forward_consumer", "pred=step + 1 < steps", "pred=False"),
    "V is read early": (
        "_forward_consumer",
        "mbarrier.wait(v_full.index(v_stage), (step - 1) // stages & 1)",
        "pass",
    ),
    "V is given back early": (
        "_forward_consumer",
        "out = warpgroup_mma_wait(0, deps=[out])\n        mbarrier.arrive(v_empty.index(v_stage))",
        "mbarrier.arrive(v_empty.index(v_stage))\n        out = warpgroup_mma_wait(0, deps=[out])",
    ),
    "K is not given back": ("_forward_consumer", "mbarrier.arrive(k_empty.index(stage))", "pass"),
    "out is read in flight": ("_forward_consumer", "out = warpgroup_mma_wait(0,", "out = warpgroup_mma_wait(1,"),
    "nobody has the first turn": ("_forward_consumer", "(step ^ who) & 1", "(step ^ 1) & 1"),
    "the turn is kept": ("_forward_consumer", "mbarrier.arrive(turn.index(1 - who))", "pass"),
    "too few bytes": ("_forward_producer", "k_desc.block_type.nbytes", "k_desc.block_type.nbytes // 2"),
}
BACKWARD_MISTAKES = {
    "Q is overwritten": ("_backward_producer", "mbarrier.wait(empty.index(stage), (step // stages & 1) ^ 1)", "pass"),
    "Q is read early": ("_backward_consumer", "mbarrier.wait(full.index(stage), parity)", "pass"),
    "Q is given back early": (
        "_backward_consumer",
        "dv, dk = warpgroup_mma_wait(1, deps=[dv, dk])\n        mbarrier.arrive(empty.index(stage))",
        "mbarrier.arrive(empty.index(stage))\n        dv, dk = warpgroup_mma_wait(1, deps=[dv, dk])",
    ),
    "dS is read early": ("_backward_consumer", "mbarrier.wait(ds_full.index(stage), parity)", "pass"),
    "dS has one buffer": ("_backward_consumer", "ds_smem.index(stage)", "ds_smem.index(0)"),
    "dS is not fenced": (
        "_backward_consumer",
        "fence_async_shared()\n        mbarrier.arrive(ds_full",
        "mbarrier.arrive(ds_full",
    ),
    "dq is overwritten": ("_backward_consumer", "        tma.store_wait(0)\n        dq =", "        dq ="),
    "dq is read after the end": ("_backward_consumer", "    tma.store_wait(0)\n    _store_rows", "    _store_rows"),
    "dk is read in flight": ("_backward_consumer", "wait(1, deps=[dv, dk])", "wait(2, deps=[dv, dk])"),
}


def is_caught(emulate, mistake, call):
    """Whether one of some orders of the threads fails, or gives other numbers than the kernel as it is."""
    function, old, new = mistake
    emulate()
    expected = call()
    for seed in range(8):
        emulate(seed, {function: (old, new)})
        try:
            results = call()
        except FAILURES:
            return True
        if not all(map(torch.equal, results, expected)):
            return True
    return False


@pytest.mark.parametrize("name", FORWARD_MISTAKES)
def test_mistakes_in_the_forward_are_caught(name, forward_call, emulate):
    assert is_caught(emulate, FORWARD_MISTAKES[name], forward_call)


@pytest.mark.parametrize("name", BACKWARD_MISTAKES)
def test_mistakes_in_the_backward_are_caught(name, backward_call, emulate):
    assert is_caught(emulate, BACKWARD_MISTAKES[name], backward_call)


def test_a_deadlock_says_who_waits_for_what(forward_call, emulate):
    emulate(edits={"_forward_consumer": ("mbarrier.arrive(v_empty.index(v_stage))", "pass")})
    told = r"_forward_producer waits for parity 0 of v_empty\[0\] \(phase 0: 0 of 2 arrivals, 0 bytes due\)"
    with pytest.raises(gluon_emulator.Deadlock, match=told):
        forward_call()


# Where it runs, and what it refuses.


def test_says_why_it_cannot_run():
    shape = (1, 5, 2, K)
    assert "float32" in attention_gluon.missing(shape, torch.float32, "cuda")
    assert "not 64" in attention_gluon.missing((1, 5, 2, 64), BF16, "cuda")
    for B, H in ((65536, 1), (1, 65536)):
        told = f"up to 65535 samples and heads, not {B} and {H}"
        assert told in attention_gluon.missing((B, 5, H, K), BF16, "cuda")
    assert "no interpreter" in attention_gluon.missing(shape, BF16, "cpu")
    assert "no meta device" in attention_gluon.missing(shape, BF16, "meta")
    with launch.recorded():
        assert attention_gluon.missing(shape, FP16, "meta") == ""


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)], ids=str)
def test_wants_hopper(capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    reason = attention_gluon.missing((1, 5, 2, K), BF16, "cuda")
    assert ("needs compute capability 9.x" in reason) == (capability[0] != 9)


def test_refuses_where_sums_must_have_an_order(monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    with launch.recorded():
        assert "sums dq in any order" in attention_gluon.missing((1, 5, 2, K), BF16, "meta")


def test_imports_without_triton():
    code = "import sys; sys.modules['triton'] = None; from opensora_fast.kernels import attention_gluon as op; "
    code += "import torch; print(op.missing((1, 5, 2, 128), torch.bfloat16, 'cuda'))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert "Gluon cannot be imported" in done.stdout


def test_refuses_by_name(emulate):
    q, k, v, _ = inputs(3, 4)
    with pytest.raises(ValueError, match="scale is 0"):
        attention_forward(q, k, v, 0)
    with pytest.raises(ValueError, match="all must be bfloat16"):
        attention_forward(q, k.half(), v, SCALE)
    with pytest.raises(ValueError, match="128 channels"):
        attention_forward(q[..., :64], k[..., :64], v[..., :64], SCALE)


def test_launches_on_meta_tensors_are_recorded():
    q, k, v, dout = (x.to("meta") for x in inputs(300, 130, B=2, H=3))
    with launch.recorded() as launches:
        results = everything(q, k, v, dout)
    assert [x.shape for x in results] == [q.shape, (2, 3, 300), q.shape, k.shape, k.shape]
    names = ["_forward_kernel", "_row_terms_kernel", "_backward_kernel"]
    assert [of.kernel.fn.__name__ for of in launches] == names
    assert [of.grid for of in launches] == [(3, 3, 2), (2 * 3 * 5,), (2, 3, 2)]


COMPILE = """
import torch
from opensora_fast.kernels import attention_gluon as op, launch
from opensora_fast.profiling import aot
with launch.recorded() as launches:
    q = torch.empty(1, 300, 2, 128, dtype=torch.{dtype}, device="meta")
    out, lse = op.attention_forward(q, q, q, 0.1, wide={wide})
    op.attention_backward(out, q, q, q, out, lse, 0.1, dlse=lse, wide={wide})
with aot._own_cache() as folder:
    found = {{}}
    for kernel in map(aot.kernel_of, launches):
        compiled = aot.compile_kernel(kernel)
        programs = aot.find_ptxas().items()
        found[kernel.label] = [aot.assemble(kernel, compiled, *of, folder, disassembled=True) for of in programs]
print(*aot.failures(found, {{label: aot.budget_of(results) for label, results in found.items()}}), sep="\\n")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "wide"),
    [("bfloat16", True), ("float16", False), ("float16", True)],
    ids=["bf16-wide", "fp16", "fp16-wide"],
)
def test_compiles_for_hopper_without_a_spill(dtype, wide):
    """The presets' cases compile the narrow bfloat16 alone."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", "-c", COMPILE.format(dtype=dtype, wide=wide)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stdout + done.stderr[-2000:]


# On a GPU.


@by_hopper
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize(("S", "T"), [*LENGTHS, (1024, 1024), (2047, 1153)], ids=str)
def test_hopper_forward_and_gradients(S, T, dtype, hopper, assert_as_exact):
    of = inputs(S, T, dtype, B=2, H=3, device=hopper, strided=True)
    check(assert_as_exact, everything(*of), in_the_same_dtype(*of), exactly(*of))


@by_hopper
def test_hopper_is_repeatable_but_for_dq(hopper):
    of = inputs(777, 1500, device=hopper)
    first, second = everything(*of), everything(*of)
    for name, one, other in zip(("out", "lse", "dq", "dk", "dv"), first, second, strict=True):
        assert name == "dq" or torch.equal(one, other), name


@by_hopper
def test_hopper_keys_past_the_end_do_not_overflow(hopper, assert_as_exact):
    q, k, v, dout = inputs(64, 65, device=hopper)
    of = torch.full_like(q, 4), torch.full_like(k, -4) + 0.125 * k, v, dout
    check(assert_as_exact, everything(*of), in_the_same_dtype(*of), exactly(*of))


@by_hopper
def test_hopper_strides_beyond_32_bits(hopper):
    """Slices of a tensor with more than 2^31 elements, which TMA reads in place."""
    q = torch.randn(1, 128, 520, K, device=hopper, dtype=BF16).repeat(1, 256, 1, 1)[:, :, -2:]
    out, lse = attention_forward(q, q, q, SCALE)
    expected, expected_lse = attention_forward(*[q.contiguous()] * 3, SCALE)
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)
