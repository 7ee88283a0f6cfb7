"""Attention of ranks that share a sequence, over gloo: output and gradients are those of one process."""

import contextlib
import functools
import gc
import itertools
import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from opensora_fast.kernels import (
    attention,
    backend,
    context_exchange,
    context_parallel,
    context_plan,
    launch,
    qk_norm_rope,
)
from opensora_fast.kernels.context_parallel import (
    ContextParallel,
    agree_lengths,
    context_of,
    hybrid_attention,
    ring_attention,
    single_rope_attention,
    split_rope_attention,
    ulysses_attention,
)

HERE = "kernels/test_context_parallel.py"


# What runs on the ranks. A mesh is (ulysses, ring).


context = functools.cache(context_of)


def make(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def qkv_of(B, lengths, H, K, seed=0):
    """q, k, v and the gradient of out, of all ranks' tokens."""
    return [make(B, sum(lengths), H, K, seed=4 * seed + i) for i in range(4)]


def shard(x, lengths, dtype=torch.float32, device="cpu"):
    start = sum(lengths[: dist.get_rank()])
    return x[:, start : start + lengths[dist.get_rank()]].to(device, dtype)


def attend(here, leaves, lengths, scale=None):
    if here.ring is None:
        return ulysses_attention(*leaves, here.ulysses, scale=scale, lengths=lengths)
    if here.ulysses is None:
        return ring_attention(*leaves, here.ring, scale=scale, lengths=lengths)
    return hybrid_attention(*leaves, here.ulysses, here.ring, scale=scale, lengths=lengths)


def on_rank(
    mesh, B, lengths, H, K, *, dtype=torch.float32, agreed=False, scale=None, compiled="", name=None, device="cpu"
):
    """(out, dq, dk, dv) of this rank's tokens."""
    *qkv, grad = (shard(x, lengths, dtype, device) for x in qkv_of(B, lengths, H, K))
    leaves = [x.requires_grad_() for x in qkv]
    with backend.forced({"attention": name} if name else {}):
        run = functools.partial(attend, context(*mesh), lengths=lengths if agreed else None, scale=scale)
        if compiled:
            run = torch.compile(run, fullgraph=True, backend=compiled)
        out = run(leaves)
        return [x.detach().cpu() for x in (out, *torch.autograd.grad(out, leaves, grad))]


def rope_inputs(B, lengths_of_streams, H, K):
    """(streams, scales, angles of each stream, gradients of outs) of all ranks' tokens."""
    tokens = [sum(lengths) for lengths in lengths_of_streams]
    streams = [make(B, T, 3, H, K, seed=i) for i, T in enumerate(tokens)]
    scales = [make(K, seed=10 + i).abs() + 0.5 for i in range(2 * len(tokens))]
    angles = [make(B, T, K // 2, seed=20 + i) for i, T in enumerate(tokens)]
    grads = [make(B, T, H, K, seed=30 + i) for i, T in enumerate(tokens)]
    return streams, scales, angles, grads


def rope_on_rank(mesh, B, lengths_of_streams, H, K, *, agreed=False, compiled="", dtype=torch.float32):
    """outs, gradients of streams, gradients of scales, of this rank."""
    streams, scales, angles, grads = rope_inputs(B, lengths_of_streams, H, K)
    streams, angles, grads = (
        [shard(x, lengths, dtype) for x, lengths in zip(tensors, lengths_of_streams, strict=True)]
        for tensors in (streams, angles, grads)
    )
    leaves = [x.to(dtype).requires_grad_() for x in (*streams, *scales)]
    here = context(*mesh)
    lengths = [sum(of_rank) for of_rank in zip(*lengths_of_streams, strict=True)]
    assert (here.size, here.rank) == (len(lengths), dist.get_rank())
    angle = torch.cat(angles, dim=1).to(torch.promote_types(dtype, torch.float32))
    function = split_rope_attention if len(streams) > 1 else single_rope_attention

    def run(*leaves):
        outs = function(*leaves, angle.cos(), angle.sin(), context=here.with_lengths(lengths) if agreed else here)
        return outs if isinstance(outs, tuple) else (outs,)

    outs = (torch.compile(run, fullgraph=True, backend=compiled) if compiled else run)(*leaves)
    assert all(out.is_contiguous() for out in outs)
    return [*(out.detach() for out in outs), *torch.autograd.grad(outs, leaves, grads)]


# One process.


def formula(q, k, v, scale=None):
    weights = torch.einsum("bqhk,bthk->bhqt", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return torch.einsum("bhqt,bthk->bqhk", weights.softmax(dim=-1), v)


def one_process(B, lengths, H, K, scale=None):
    *qkv, grad = qkv_of(B, lengths, H, K)
    leaves = [x.requires_grad_() for x in qkv]
    out = formula(*leaves, scale)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def rope_in_one_process(B, lengths_of_streams, H, K):
    streams, scales, angles, grads = rope_inputs(B, lengths_of_streams, H, K)
    leaves = [x.requires_grad_() for x in (*streams, *scales)]
    angle = torch.cat(angles, dim=1)
    if len(streams) > 1:
        outs = attention.split_rope_attention(*leaves, angle.cos(), angle.sin())
    else:
        outs = (attention.single_rope_attention(*leaves, angle.cos(), angle.sin()),)
    return [*(out.detach() for out in outs), *torch.autograd.grad(outs, leaves, grads)]


def assert_close(ours, exact, sizes):
    """Each within 1e-5 of its size."""
    for number, (x, e, size) in enumerate(zip(ours, exact, sizes, strict=True)):
        assert x.shape == e.shape, number
        if x.numel():
            error = (x.double() - e).abs().max()
            assert error <= 1e-5 * size, f"result {number}: {error:.3g} of {size:.3g}"


def own_sizes(exact):
    return [x.abs().max() if x.numel() else 0 for x in exact]


def common_size(exact):
    """The largest of all results: on its own a gradient may cancel to nothing, as that of one key alone."""
    return [max(1e-3, *own_sizes(exact))] * len(exact)


def check(ranks, mesh, B, lengths, H, K, sizes=own_sizes, **how):
    exact = one_process(B, lengths, H, K, how.get("scale"))
    ours = ranks(len(lengths)).run(f"{HERE}:call", "on_rank", (mesh, B, lengths, H, K), how)
    assert_close([torch.cat(parts, dim=1) for parts in zip(*ours, strict=True)], exact, sizes(exact))


def check_rope(ranks, mesh, B, lengths_of_streams, H, K, sizes=own_sizes, **how):
    exact = rope_in_one_process(B, lengths_of_streams, H, K)
    arguments = (mesh, B, lengths_of_streams, H, K)
    ours = ranks(len(lengths_of_streams[0])).run(f"{HERE}:call", "rope_on_rank", arguments, how)
    num_of_tokens = 2 * len(lengths_of_streams)  # outs and gradients of streams; of scales every rank has a part
    whole = [
        torch.cat(parts, dim=1) if number < num_of_tokens else torch.stack(parts).sum(0)
        for number, parts in enumerate(zip(*ours, strict=True))
    ]
    assert_close(whole, exact, sizes(exact))


def call(name, args, kwargs):
    """On a rank: so that what nobody writes shows, memory that is allocated holds NaN (beside what compiles)."""
    with contextlib.ExitStack() as stack:
        for owner, attribute in ((torch, "empty"), (torch.Tensor, "new_empty"), (torch, "empty_like")):
            if not kwargs.get("compiled"):
                stack.enter_context(mock.patch.object(owner, attribute, poisoned(getattr(owner, attribute))))
        return globals()[name](*args, **kwargs)


def poisoned(allocate):
    def run(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    return run


# Properties. Meshes of 2, 3 and 4 ranks; heads that the all-to-all can share out; any lengths, 0 among them.

MESHES = [(2, 1), (1, 2), (3, 1), (1, 3), (4, 1), (1, 4), (2, 2)]


@st.composite
def problems(draw, streams=None):
    ulysses, ring = draw(st.sampled_from(MESHES))
    counts = st.lists(st.integers(0, 5), min_size=ulysses * ring, max_size=ulysses * ring)
    lengths = draw(counts) if streams is None else [draw(counts) for _ in range(streams)]
    H = ulysses * draw(st.integers(1, 2))
    return (ulysses, ring), draw(st.integers(1, 2)), lengths, H, 2 * draw(st.integers(1, 3))


# A failure ends the world of ranks: it is shown as it was found, for every step of shrinking would start another.
phases = (Phase.explicit, Phase.reuse, Phase.generate)
few = settings(max_examples=20, phases=phases)
many = settings(max_examples=300, phases=phases)
any_shards = given(problem=problems(), agreed=st.booleans())
any_streams = given(problem=st.integers(1, 2).flatmap(problems), agreed=st.booleans())


@few
@any_shards
def test_any_shards(ranks, problem, agreed):
    check(ranks, *problem, sizes=common_size, agreed=agreed)


@few
@any_streams
def test_any_streams(ranks, problem, agreed):
    check_rope(ranks, *problem, sizes=common_size, agreed=agreed)


@pytest.mark.slow
@many
@any_shards
def test_any_shards_at_length(ranks, problem, agreed):
    check(ranks, *problem, sizes=common_size, agreed=agreed)


@pytest.mark.slow
@many
@any_streams
def test_any_streams_at_length(ranks, problem, agreed):
    check_rope(ranks, *problem, sizes=common_size, agreed=agreed)


# The same on chosen cases: uneven, even, a rank with nothing, nobody with anything; text shorter than the group.

each_mesh = pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: f"ulysses{mesh[0]}-ring{mesh[1]}")


def uneven(mesh):
    return [7, 6, 3, 9][: mesh[0] * mesh[1]]


@each_mesh
@pytest.mark.parametrize("case", ["uneven", "a rank has none", "one has all", "nobody has any"])
def test_output_and_gradients(ranks, mesh, case):
    lengths = uneven(mesh)
    if case == "a rank has none":
        lengths[0] = 0
    elif case != "uneven":
        lengths = [0] * (len(lengths) - 1) + [5 if case == "one has all" else 0]
    check(ranks, mesh, 2, lengths, 12, 16)


@each_mesh
@pytest.mark.parametrize("name", ["reference", "cpu_flash"])
def test_either_backend_and_any_scale(ranks, mesh, name):
    check(ranks, mesh, 1, uneven(mesh), 12, 16, name=name, scale=0.1)


@each_mesh
def test_text_shorter_than_the_group(ranks, mesh):
    lengths = uneven(mesh)
    check_rope(ranks, mesh, 2, [[1] + [0] * (len(lengths) - 1), lengths], 12, 16)


@each_mesh
def test_tokens_of_one_projection(ranks, mesh):
    check_rope(ranks, mesh, 2, [uneven(mesh)], 12, 16)


@pytest.mark.parametrize("mesh", [(2, 1), (1, 2), (2, 2)], ids=str)
@pytest.mark.parametrize("agreed", [False, True], ids=["gathered", "agreed"])
def test_compiled_into_one_node(ranks, mesh, agreed):
    lengths = uneven(mesh)
    check(ranks, mesh, 2, lengths, 4, 8, compiled="aot_eager", agreed=agreed)
    check_rope(ranks, mesh, 2, [[2, 1, 0, 3][: len(lengths)], lengths], 4, 8, compiled="aot_eager", agreed=agreed)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(2, 1), (1, 2)], ids=str)
def test_compiled_by_inductor(ranks, mesh):
    check(ranks, mesh, 2, uneven(mesh), 4, 8, compiled="inductor")
    check_rope(ranks, mesh, 2, [[2, 1], uneven(mesh)], 4, 8, compiled="inductor")


def kept_on_rank(mesh, lengths):
    """Shapes of what is kept for the backward that is no input and no output."""
    streams, scales, angles, _ = rope_inputs(2, [lengths], 4, 8)
    leaves = [shard(streams[0], lengths), *(x.float() for x in scales)]
    angle = shard(angles[0], lengths)
    leaves = [x.contiguous().requires_grad_() for x in leaves]
    tables, kept = (angle.cos(), angle.sin()), {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        out = single_rope_attention(*leaves, *tables, context=context(*mesh))
    known = {t.data_ptr() for t in (*leaves, *tables, out)}
    return [tuple(t.shape) for pointer, t in kept.items() if pointer not in known]


@pytest.mark.parametrize("mesh", [(2, 1), (1, 2), (2, 2)], ids=str)
def test_keeps_nothing_of_other_ranks(ranks, mesh):
    lengths = uneven(mesh)
    for kept, T in zip(ranks(len(lengths)).run(f"{HERE}:kept_on_rank", mesh, lengths), lengths, strict=True):
        assert kept == [(2, T, 4), (len(lengths),)], "the log-sum-exp, and the tokens of every rank"


def events_on_rank(mesh, lengths, H, K):
    """What this rank does, in order: (direction, event, bytes that it sends beside the log-sum-exps)."""
    events, direction = [], ["forward"]

    def logged(name, function):
        def run(*arguments, **how):
            sent = 0
            if name == "post":
                _, _, sends, _ = arguments
                sent = sum(x.numel() * x.element_size() for _, x in sends if x.shape[-1] == K)
            events.append((direction[0], name, sent))
            return function(*arguments, **how)

        return run

    *qkv, grad = (shard(x, lengths, torch.bfloat16) for x in qkv_of(1, lengths, H, K))
    leaves = [x.requires_grad_() for x in qkv]
    mine, common = context_parallel, context_exchange
    places = [(mine, "exchange", "post"), (common, "exchange", "post"), (common.Pending, "wait", "wait")]
    places += [(attention, "forward", "attend"), (attention, "backward", "attend")]
    with contextlib.ExitStack() as stack:
        for owner, attribute, name in places:
            stack.enter_context(mock.patch.object(owner, attribute, logged(name, getattr(owner, attribute))))
        out = attend(context(*mesh), leaves, lengths)
        direction[0] = "backward"
        torch.autograd.grad(out, leaves, grad)
    return events


@pytest.mark.parametrize("mesh", [(4, 1), (1, 4), (2, 2)], ids=str)
def test_sends_what_the_model_says_and_attends_while_blocks_travel(ranks, mesh):
    lengths, H, K = [6] * 4, 4, 8
    for events in ranks(4).run(f"{HERE}:events_on_rank", mesh, lengths, H, K):
        for direction in ("forward", "backward"):
            model = context_plan.timeline(direction, sum(lengths), H, *mesh, channels=K)
            sent = [size for where, name, size in events if where == direction and name == "post" and size]
            assert sent == [step.bytes for step in model.steps if step.kind == "exchange" and step.bytes]
            names = [name for where, name, _ in events if where == direction]
            around = ["post", "wait"] if mesh[0] > 1 else []
            last = ["post", "wait"] if direction == "backward" and mesh[1] > 1 else []
            steps = ["post", "attend", "wait"] * mesh[1] if mesh[1] > 1 else ["attend"]
            assert names == [*around, *steps, *last, *around]


def results_of_two_runs(mesh, lengths):
    ours = [on_rank(mesh, 2, lengths, 12, 16), on_rank(mesh, 2, lengths, 12, 16)]
    streams = [[2, 1, 0, 3][: len(lengths)], lengths]
    return ours, [rope_on_rank(mesh, 2, streams, 12, 16), rope_on_rank(mesh, 2, streams, 12, 16)]


@pytest.mark.parametrize("mesh", [(3, 1), (1, 3), (2, 2)], ids=str)
def test_two_runs_are_bitwise_equal(ranks, mesh):
    for of_rank in ranks(mesh[0] * mesh[1]).run(f"{HERE}:results_of_two_runs", mesh, uneven(mesh)):
        for one, other in of_rank:
            assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


# Memory.


def stand_in_streams(streams, scales, cos, sin, eps, groups, *, with_v):
    B, _, _, H, K = streams[0].shape
    shape = (B, sum(stream.shape[1] for stream in streams), H // groups, K)
    return [streams[0].new_zeros(shape if groups == 1 else (groups, *shape)) for _ in range(3)]


def stand_in_gradients(dq, dk, dv, streams, *_):
    return streams, []


def stand_in_forward(q, k, v, scale, *, wide=False):
    """Results of attention's sizes, and no temporaries."""
    dtype = torch.float32 if wide else q.dtype
    return torch.zeros(q.shape, dtype=dtype), torch.zeros(q.shape[0], q.shape[2], q.shape[1])


def stand_in_backward(dout, q, k, v, out, lse, scale, *, wide=False):
    return tuple(torch.zeros(x.shape, dtype=torch.float32 if wide else x.dtype) for x in (q, k, v))


def most_held_in_the_backward(mesh, T, H, K):
    """The most bytes of tensors at once, less those from before."""
    here = context(*mesh)
    here = here.with_lengths([T] * here.size)
    streams = [torch.ones(1, tokens, 3, H, K, dtype=torch.bfloat16) for tokens in (T // 4, T - T // 4)]
    scales = [torch.ones(K, dtype=torch.bfloat16) for _ in range(4)]
    tables = torch.ones(T, K // 2), torch.zeros(T, K // 2)
    names = context_parallel._names(here)
    backward = context_parallel._context_rope_attention_backward._init_fn
    with (
        mock.patch.object(attention, "forward", stand_in_forward),
        mock.patch.object(attention, "backward", stand_in_backward),
        mock.patch.object(qk_norm_rope, "forward_streams", stand_in_streams),
        mock.patch.object(qk_norm_rope, "backward_streams", stand_in_gradients),
    ):
        *outs, lse, lengths_P = context_parallel._context_rope_attention(
            streams, scales, *tables, 1e-6, *names, list(here.lengths)
        )
        douts = [torch.ones_like(out) for out in outs]
        gc.collect()  # what earlier tests left is not to be freed meanwhile
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            backward(douts, streams, scales, *tables, outs, lse, lengths_P, 1e-6, *names)
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in changes))


@pytest.mark.parametrize("mesh", [(2, 1), (4, 1), (1, 2), (1, 3), (1, 4), (2, 2)], ids=str)
def test_holds_what_the_model_says(ranks, mesh):
    T, H, K = 128, 4, 128
    size = mesh[0] * mesh[1]
    stated = context_plan.temporary_bytes(size * T, H, *mesh, channels=K)
    for held in ranks(size).run(f"{HERE}:most_held_in_the_backward", mesh, T, H, K):
        assert held == pytest.approx(stated, rel=0.05)


# Numerics of 16 bits.


def on_one_rank(q, k, v, grad):
    """(out, dq, dk, dv)."""
    out, lse = attention.forward(q, k, v, q.shape[-1] ** -0.5)
    return [out, *attention.backward(grad, q, k, v, out, lse, q.shape[-1] ** -0.5)]


def by_steps_of_a_ring(q, k, v, grad, ranks):
    """The same by what the ranks of a ring would do, each with its part of the queries."""
    scale = q.shape[-1] ** -0.5
    blocks = list(zip(k.chunk(ranks, dim=1), v.chunk(ranks, dim=1), strict=True))
    outs, dqs = [], []
    dks, dvs = ([torch.zeros_like(block, dtype=torch.float32) for block in of] for of in zip(*blocks, strict=True))
    for q_s, dout_s in zip(q.chunk(ranks, dim=1), grad.chunk(ranks, dim=1), strict=True):
        total = None
        for block in blocks:
            total = context_parallel.merge_block(total, q_s, *block, scale)
        out_s, lse_s = total[0].to(q.dtype), total[1]
        dq = torch.zeros_like(q_s, dtype=torch.float32)
        for block, dk, dv in zip(blocks, dks, dvs, strict=True):
            parts = attention.backward(dout_s, q_s, *block, out_s, lse_s, scale, wide=True)
            for sums, part in zip((dq, dk, dv), parts, strict=True):
                sums += part
        outs.append(out_s)
        dqs.append(dq)
    return [torch.cat(parts, dim=1).to(q.dtype) for parts in (outs, dqs, dks, dvs)]


def errors(ours, exact):
    """Relative to the exact ones."""
    return torch.tensor([(x.double() - e).norm() / e.norm() for x, e in zip(ours, exact, strict=True)])


def inputs_in_bfloat16(lengths, H=4, K=64):
    """q, k, v and the gradient of out, then the exact results."""
    inputs = [x.bfloat16() for x in qkv_of(1, lengths, H, K)]
    leaves = [x.double().requires_grad_() for x in inputs[:3]]
    out = formula(*leaves)
    return inputs, [out.detach(), *torch.autograd.grad(out, leaves, inputs[3].double())]


@pytest.mark.parametrize("name", ["reference", "cpu_flash", "none with wide results"])
def test_error_in_bfloat16_does_not_grow_with_the_ring(name, monkeypatch):
    inputs, exact = inputs_in_bfloat16([512])
    if name.startswith("none"):
        for function in (attention.forward, attention.backward):
            narrow = lambda *tensors, wide=False, run=function: run(*tensors)  # noqa: E731
            monkeypatch.setattr(attention, function.__name__, narrow)
    with backend.forced({"attention": name} if " " not in name else {}):
        alone = errors(on_one_rank(*inputs), exact)
        of_rings = {ranks: errors(by_steps_of_a_ring(*inputs, ranks), exact) for ranks in (2, 4, 8)}
    for ranks, of_ring in of_rings.items():
        assert (of_ring <= 1.5 * alone).all(), (ranks, of_ring, alone)
    assert (of_rings[8] <= 1.1 * of_rings[2]).all(), of_rings


def test_steps_of_a_ring_by_triton_kernels():
    if reason := launch.missing("cpu"):
        pytest.skip(reason)
    inputs, exact = inputs_in_bfloat16([24], H=2, K=64)
    with backend.forced({"attention": "triton", "lse_merge": "triton"}):
        alone = errors(on_one_rank(*inputs), exact)
        of_ring = errors(by_steps_of_a_ring(*inputs, 3), exact)
    assert (of_ring <= 1.5 * alone).all(), (of_ring, alone)


@pytest.mark.parametrize("mesh", [(4, 1), (1, 4), (2, 2)], ids=str)
def test_error_in_bfloat16_on_ranks(ranks, mesh):
    lengths = [64, 60, 70, 62]
    inputs, exact = inputs_in_bfloat16(lengths)
    ours = ranks(4).run(f"{HERE}:call", "on_rank", (mesh, 1, lengths, 4, 64), {"dtype": torch.bfloat16})
    ours = [torch.cat(parts, dim=1) for parts in zip(*ours, strict=True)]
    assert all(x.dtype == torch.bfloat16 for x in ours)
    assert (errors(ours, exact) <= 1.5 * errors(on_one_rank(*inputs), exact)).all()


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(8, 1), (4, 2), (2, 4), (1, 8)], ids=str)
def test_eight_ranks(ranks, mesh):
    lengths = [33, 32, 30, 0, 40, 25, 34, 31]
    arguments = mesh, 1, lengths, 24, 32
    world = ranks(8)
    ours = world.run(f"{HERE}:call", "on_rank", arguments, {})
    exact = one_process(*arguments[1:])
    assert_close([torch.cat(parts, dim=1) for parts in zip(*ours, strict=True)], exact, own_sizes(exact))
    inputs, exact = inputs_in_bfloat16(lengths, H=24, K=32)
    ours = world.run(f"{HERE}:call", "on_rank", arguments, {"dtype": torch.bfloat16})
    ours = [torch.cat(parts, dim=1) for parts in zip(*ours, strict=True)]
    assert (errors(ours, exact) <= 1.5 * errors(on_one_rank(*inputs), exact)).all()


@pytest.mark.multi_gpu
@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
@pytest.mark.parametrize("mesh", [(2, 1), (1, 2)], ids=str)
def test_on_gpus(ranks, mesh):
    lengths = [320, 192]
    inputs, exact = inputs_in_bfloat16(lengths)
    how = {"dtype": torch.bfloat16, "device": "cuda"}
    world = ranks.disposable(2, timeout_s=60, backend="nccl")
    ours = world.run(f"{HERE}:call", "on_rank", (mesh, 1, lengths, 4, 64), how)
    ours = [torch.cat(parts, dim=1) for parts in zip(*ours, strict=True)]
    with backend.forced({"attention": "reference"}):
        alone = errors(on_one_rank(*inputs), exact)
    assert (errors(ours, exact) <= 2 * alone).all()


# Ranks that disagree, die or leave. Whatever a call ends with, it ends within 30 seconds.


def error_of(function, *arguments, **how):
    try:
        result = function(*arguments, **how)
    except (context_parallel.ContextParallelError, ValueError) as error:
        return type(error).__name__, str(error)
    return "", "" if isinstance(result, torch.Tensor | None) else result


def with_another_shape(mesh, odd_rank, shape, dtype):
    mine = dist.get_rank() == odd_rank
    q = torch.zeros(*(shape if mine else (2, 3, 12, 4)), dtype=dtype if mine else torch.float32)
    return error_of(attend, context(*mesh), (q, q, q), None)


@pytest.mark.parametrize("mesh", [(3, 1), (1, 3), (2, 2)], ids=str)
@pytest.mark.parametrize("odd_rank", [0, 2])
@pytest.mark.parametrize(
    ("shape", "dtype", "named"),
    [
        ((3, 3, 12, 4), torch.float32, "batch items 3; most hold 2"),
        ((2, 3, 24, 4), torch.float32, "heads 24; most hold 12"),
        ((2, 3, 12, 8), torch.float32, "channels in a head 8; most hold 4"),
        ((2, 3, 12, 4), torch.bfloat16, "dtype torch.bfloat16; most hold torch.float32"),
    ],
    ids=["batch", "heads", "channels", "dtype"],
)
def test_every_rank_hears_of_another_shape(ranks, mesh, odd_rank, shape, dtype, named):
    size = mesh[0] * mesh[1]
    results = ranks(size).run(f"{HERE}:with_another_shape", mesh, odd_rank, shape, dtype, limit_s=30)
    for rank, (kind, message) in enumerate(results):
        assert kind == "ContextParallelError"
        assert message.startswith(f"rank {odd_rank} of the {size}")
        assert named in message
        assert f"this is rank {rank}" in message


def test_without_a_majority_every_rank_is_listed(ranks):
    for kind, message in ranks(2).run(f"{HERE}:with_another_shape", (2, 1), 0, (3, 3, 12, 4), torch.float32):
        assert kind == "ContextParallelError"
        assert message.startswith("the 2 ranks that share a sequence hold different batch items: rank 0 3, rank 1 2: ")


def agreed_lengths(mesh, shapes, dtypes):
    here, rank = context(*mesh), dist.get_rank()
    return error_of(lambda: agree_lengths(here, shapes[rank], dtypes[rank], torch.device("cpu")).lengths)


@pytest.mark.parametrize("mesh", [(3, 1), (1, 3)], ids=str)
def test_lengths_are_agreed_on_once_for_all_calls(ranks, mesh):
    shapes, dtypes = [(2, T, 6, 4) for T in (5, 0, 3)], [torch.float32] * 3
    assert ranks(3).run(f"{HERE}:agreed_lengths", mesh, shapes, dtypes) == [("", (5, 0, 3))] * 3
    for kind, said in ranks(3).run(f"{HERE}:agreed_lengths", mesh, [shapes[0], (2, 5, 12, 4), shapes[2]], dtypes):
        assert kind == "ContextParallelError"
        assert said.startswith("rank 1 of the 3 that share a sequence holds heads 12; most hold 6: ")
    for kind, said in ranks(3).run(f"{HERE}:agreed_lengths", mesh, shapes, [*dtypes[1:], torch.bfloat16]):
        assert kind == "ContextParallelError"
        assert said.startswith("rank 2 of the 3 that share a sequence holds dtype torch.bfloat16; most hold ")


def test_heads_are_agreed_on_with_lengths(ranks):
    for kind, said in ranks(3).run(f"{HERE}:agreed_lengths", (3, 1), [(1, 2, 4, 4)] * 3, [torch.float32] * 3):
        assert kind == "ValueError"
        assert "4 heads cannot be shared out to 3 ranks" in said


def places(mesh):
    here = context(*mesh)
    members = [None if group is None else dist.get_process_group_ranks(group) for group in (here.ulysses, here.ring)]
    return here.size, here.rank, *members


@pytest.mark.parametrize(
    ("mesh", "of_rank_1", "of_rank_2"),
    [
        ((4, 1), (4, 1, [0, 1, 2, 3], None), (4, 2, [0, 1, 2, 3], None)),
        ((2, 2), (4, 1, [0, 1], [1, 3]), (4, 2, [2, 3], [0, 2])),
        ((2, 1), (2, 1, [0, 1], None), (2, 0, [2, 3], None)),
        ((1, 2), (2, 1, None, [0, 1]), (2, 0, None, [2, 3])),
        ((1, 1), (1, 0, None, None), (1, 0, None, None)),
    ],
    ids=str,
)
def test_consecutive_ranks_share_a_sequence(ranks, mesh, of_rank_1, of_rank_2):
    answers = ranks(4).run(f"{HERE}:places", mesh)
    assert answers[1:3] == [of_rank_1, of_rank_2]


def refused_groups():
    with pytest.raises(ValueError, match="ulysses=2 x ring=1 does not divide the world of 3 ranks"):
        context_of(2, 1)
    others = dist.new_group([0, 1])
    q = torch.zeros(1, 3, 2, 4)
    refused = [None] if dist.get_rank() < 2 else [None, others]
    for group in refused:
        for function in (ulysses_attention, ring_attention):
            with pytest.raises(ValueError, match=f"group is {group}; it must be a process group of this rank's"):
                function(q, q, q, group)
        with pytest.raises(ValueError, match="ulysses_group is"):
            hybrid_attention(q, q, q, group, dist.group.WORLD)
        with pytest.raises(ValueError, match="ring_group is"):
            hybrid_attention(q, q, q, dist.group.WORLD, group)
    if len(refused) > 1:
        with pytest.raises(ValueError, match="ring is "):
            ContextParallel(None, others)


def test_a_group_that_a_rank_is_not_in_is_refused(ranks):
    ranks(3).run(f"{HERE}:refused_groups")


def with_heads(mesh, heads):
    q = torch.zeros(1, 3, heads, 4)
    return error_of(attend, context(*mesh), (q, q, q), None)


def test_heads_that_cannot_be_shared_out_are_refused_everywhere(ranks):
    for kind, message in ranks(3).run(f"{HERE}:with_heads", (3, 1), 4):
        assert kind == "ValueError"
        assert "4 heads cannot be shared out to 3 ranks" in message
        assert "ring_attention" in message
    assert ranks(3).run(f"{HERE}:with_heads", (1, 3), 4) == [("", "")] * 3


def dies(mesh, when):
    """What the calls of the ranks that live end with, when rank 1 dies or leaves."""
    dist.barrier()  # the groups have to be made within their timeout
    here = context_of(*mesh, timeout_s=5)
    dist.barrier()  # nobody dies while others still make the groups
    q = torch.zeros(1, 3, 12, 4, requires_grad=True)
    lengths = [3] * dist.get_world_size()
    mine = dist.get_rank() == 1
    if mine and when in ("before", "leaves"):
        return os._exit(3) if when == "before" else ("", "")
    if mine:
        name, last = when.removeprefix("in the "), min(2, mesh[1])
        original, calls = getattr(attention, name), []

        def last_words(*arguments, **how):
            calls.append(arguments)
            if len(calls) == last:
                os._exit(3)
            return original(*arguments, **how)

        setattr(attention, name, last_words)

    def step():
        attend(here, (q, q, q), lengths if when.startswith("in") else None).sum().backward()

    return error_of(step)


@pytest.mark.parametrize(
    ("mesh", "when"),
    [
        ((3, 1), "before"),
        ((3, 1), "leaves"),
        ((3, 1), "in the forward"),
        ((3, 1), "in the backward"),
        ((1, 3), "before"),
        ((1, 3), "in the forward"),
        ((1, 3), "in the backward"),
        ((2, 2), "in the forward"),
    ],
    ids=str,
)
def test_ranks_that_live_end_with_a_named_error(ranks, mesh, when):
    size = mesh[0] * mesh[1]
    results = ranks.disposable(size).run(f"{HERE}:dies", mesh, when, limit_s=30)
    assert repr(results[1]) == ("('', '')" if when == "leaves" else "DIED")
    for rank in (rank for rank in range(size) if rank != 1):
        kind, message = results[rank]
        assert kind == "ContextParallelError", (rank, kind, message)
        assert f"failed on rank {rank} in the group of ranks [" in message
        assert "has probably died, left" in message
        assert message.startswith("the exchange of sizes" if when in ("before", "leaves") else "the exchange of ")


@pytest.mark.parametrize(
    ("lengths", "named"),
    [
        ([4], "rank 0 of the 1 that share a sequence holds 5 tokens; lengths expects 4"),
        ([5, 5], "has 2 entries; 1 ranks"),
    ],
)
def test_lengths_that_do_not_suit(alone, lengths, named):
    q = torch.zeros(1, 5, 2, 4)
    with pytest.raises(context_parallel.ContextParallelError, match=named):
        ulysses_attention(q, q, q, alone, lengths=lengths)


def test_other_errors_during_an_exchange_pass_as_they_are(alone):
    with pytest.raises(RuntimeError) as error, context_exchange.named_failure(alone, "q"):
        torch.zeros(2, 3) @ torch.zeros(2, 3)
    assert type(error.value) is RuntimeError
    named = pytest.raises(
        context_parallel.ContextParallelError, match="the exchange of q failed on rank 0 in the group"
    )
    with named, context_exchange.named_failure(alone, "q"):
        raise dist.DistBackendError("lost")


# One rank, in this process.


@pytest.fixture
def alone(tmp_path):
    """A group of one rank as the default group."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("axis", ["ulysses", "ring"])
def test_opcheck(alone, axis):
    names = (alone.group_name, "") if axis == "ulysses" else ("", alone.group_name)
    q, k, v = (make(2, 5, 2, 4, seed=i).float().requires_grad_() for i in range(3))
    for lengths in (None, [5]):
        torch.library.opcheck(context_parallel._context_attention, (q, k, v, *names, 0.5, lengths))
    qkv, scale, angle = make(2, 5, 3, 2, 4, seed=0).float(), make(4, seed=1).float(), make(5, 2, seed=2).float()
    leaves = [qkv.requires_grad_()], [scale.requires_grad_(), scale.detach().clone().requires_grad_()]
    arguments = (*leaves, angle.cos(), angle.sin(), 1e-6, *names, [5])
    torch.library.opcheck(context_parallel._context_rope_attention, arguments)


def test_one_rank_is_attention(alone):
    q, k, v = (make(2, 5, 2, 4, seed=i).float() for i in range(3))
    expected = formula(q, k, v)
    for context in ((alone, None), (None, alone), (None, None)):
        assert ContextParallel(*context).size == 1
    torch.testing.assert_close(ulysses_attention(q, k, v, alone), expected)
    torch.testing.assert_close(ring_attention(q, k, v, alone), expected)
    torch.testing.assert_close(hybrid_attention(q, k, v, alone, alone), expected)


def test_no_group_at_all():
    streams, scales, angles, _ = rope_inputs(2, [[5]], 2, 4)
    tables = angles[0].cos(), angles[0].sin()
    ours = single_rope_attention(streams[0], *scales, *tables, context=ContextParallel(None, None))
    torch.testing.assert_close(ours, attention.single_rope_attention(streams[0], *scales, *tables))


def test_gradients_in_float64(alone):
    leaves = [make(1, 3, 2, 4, seed=i).requires_grad_() for i in range(3)]
    assert torch.autograd.gradcheck(lambda *leaves: hybrid_attention(*leaves, alone, alone), leaves)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"q": torch.zeros(2, 5, 8)}, "q is"),
        ({"k": torch.zeros(2, 4, 2, 4)}, "k is"),
        ({"v": torch.ones(2, 5, 2, 4).long()}, "v is"),
        ({"k": torch.zeros(2, 5, 4, 2).transpose(2, 3)}, "k has stride 2 between channels"),
        ({name: torch.zeros(2, 5, 2, 300) for name in "qkv"}, "q has 300 channels"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"scale": -1.0}, "scale is -1.0"),
        ({"scale": 0.0}, "scale is 0.0"),
    ],
)
def test_errors_name_the_argument(alone, changed, named):
    arguments = {name: torch.zeros(2, 5, 2, 4) for name in "qkv"} | {"scale": None} | changed
    q, k, v, scale = arguments.values()
    with pytest.raises(ValueError, match=named):
        ring_attention(q, k, v, alone, scale=scale)
