"""The cost model of attention over a shared sequence: the published arithmetic, its bounds, and what it chooses."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opensora_fast.kernels.context_plan import (
    BACKWARD_FLOPS_PER_S,
    FORWARD_FLOPS_PER_S,
    INFINIBAND,
    MESSAGE_S,
    NVLINK,
    choose_context_parallel,
    temporary_bytes,
    timeline,
)

TOKENS, HEADS = 76_544, 24
UNIT = TOKENS // 4 * HEADS * 128 * 2  # one tensor of a rank of 4


def exchanged(passes):
    return sum(step.bytes for step in passes.steps if step.kind == "exchange")


def test_the_all_to_all_at_768px_on_four_ranks():
    forward, backward = (timeline(mode, TOKENS, HEADS, 4, 1) for mode in ("forward", "backward"))
    assert exchanged(forward) == 4 * UNIT * 3 // 4
    assert exchanged(backward) == 8 * UNIT * 3 // 4
    assert forward.compute_s == pytest.approx(26.1e-3, rel=0.01)
    assert backward.compute_s == pytest.approx(75.0e-3, rel=0.01)
    assert forward.exposed_s == pytest.approx(0.95e-3, rel=0.03)
    assert (forward.hidden_s, backward.hidden_s) == pytest.approx((0, 0), abs=1e-12)


def test_the_ring_at_768px_on_four_ranks():
    forward, backward = (timeline(mode, TOKENS, HEADS, 1, 4) for mode in ("forward", "backward"))
    assert exchanged(forward) == 3 * 2 * UNIT
    assert exchanged(backward) == 3 * 2 * UNIT + 4 * 4 * UNIT
    assert forward.exposed_s == pytest.approx(0, abs=1e-12)
    assert backward.exposed_s == pytest.approx(4 * UNIT / NVLINK.bytes_per_s + NVLINK.latency_s)
    assert [step.duration_s for step in forward.steps if step.kind == "attention"] == pytest.approx(
        [6.5e-3] * 4, rel=0.01
    )


@given(
    tokens=st.integers(1, 200_000),
    heads=st.integers(1, 48),
    ulysses=st.integers(1, 16),
    ring=st.integers(1, 16),
    mode=st.sampled_from(["forward", "backward"]),
)
def test_lanes_never_overlap_themselves_and_no_time_is_lost(tokens, heads, ulysses, ring, mode):
    passes = timeline(mode, tokens, heads, ulysses, ring)
    for exchange in (True, False):
        steps = [step for step in passes.steps if (step.kind == "exchange") == exchange]
        for one, other in zip(steps, steps[1:], strict=False):
            assert other.start_s >= one.end_s * (1 - 1e-12)
    flops = 4 * tokens**2 * heads * 128 / (ulysses * ring)
    rate = FORWARD_FLOPS_PER_S if mode == "forward" else BACKWARD_FLOPS_PER_S / 2.5
    attention_s = sum(step.duration_s for step in passes.steps if step.kind == "attention")
    assert attention_s == pytest.approx(flops / rate)
    communication_s = sum(step.duration_s for step in passes.steps if step.kind == "exchange")
    assert passes.exposed_s + passes.hidden_s == pytest.approx(communication_s, abs=1e-9)
    assert passes.total_s <= passes.compute_s + communication_s + 1e-9


def test_copies_between_streams_and_groups_of_heads():
    for mesh, streams, copied in (((4, 1), 1, True), ((1, 4), 2, True), ((1, 4), 1, False)):
        for mode, moved in (("forward", 2 * UNIT), ("backward", 4 * UNIT)):
            passes = timeline(mode, TOKENS, HEADS, *mesh, streams=streams)
            assert [step.bytes for step in passes.steps if step.kind == "copy"] == [moved] * copied


def test_messages_show_where_the_host_takes_longer_than_all_else():
    """45 images on 4 ranks: q, k, v, out and lse to and from 3 peers."""
    images = timeline("forward", 768, HEADS, 4, 1, batch=45)
    assert images.total_s == pytest.approx(2 * 3 * 5 * 45 * MESSAGE_S)
    assert images.steps[-1].name == "posting by the host"
    assert all(step.bytes for step in timeline("forward", TOKENS, HEADS, 4, 1).steps if step.kind == "exchange")
    assert choose_context_parallel(768, HEADS, 4, batch=45).ring == 4


def test_the_default_within_a_node():
    for tokens in (8_960, TOKENS):
        plan = choose_context_parallel(tokens, HEADS, 4, NVLINK)
        assert (plan.ulysses, plan.ring) == (4, 1)
        assert "default" in plan.reason
        assert len(plan.rejected) == 2
    assert {choose_context_parallel(TOKENS, HEADS, 8).ulysses} == {8}


def test_a_ring_where_heads_do_not_divide():
    plan = choose_context_parallel(TOKENS, HEADS, 5)
    assert (plan.ulysses, plan.ring) == (1, 5)
    assert "24 heads do not divide by 5" in plan.reason
    plan = choose_context_parallel(TOKENS, HEADS, 16)
    assert (plan.ulysses, plan.ring) == (8, 2)


def test_a_ring_over_slow_links():
    plan = choose_context_parallel(TOKENS, 16, 16)
    assert (plan.ulysses, plan.ring) == (8, 2)
    assert INFINIBAND.name in plan.reason
    fast_everywhere = replace(NVLINK, beyond=None)
    assert choose_context_parallel(TOKENS, 16, 16, fast_everywhere).ring == 1


def test_memory_excludes_meshes():
    needed = temporary_bytes(TOKENS, HEADS, 4, 1)
    assert needed == 10 * UNIT
    assert choose_context_parallel(TOKENS, HEADS, 4, memory=needed).ulysses == 4
    with pytest.raises(ValueError, match=r"ranks=4.*GiB needed"):
        choose_context_parallel(TOKENS, HEADS, 4, memory=needed - 1)
    with pytest.raises(ValueError, match="ranks=0"):
        choose_context_parallel(TOKENS, HEADS, 0)


def test_one_rank_exchanges_nothing():
    plan = choose_context_parallel(TOKENS, HEADS, 1)
    assert (plan.ulysses, plan.ring) == (1, 1)
    assert exchanged(plan.forward) == exchanged(plan.backward) == 0
    assert plan.total_s == pytest.approx(4 * 101.1e-3, rel=0.01)
