"""Shards by their laws, and what ranks do together, on real ranks."""

import functools
import os

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from opensora_fast.errors import UserError
from opensora_fast.kernels.context_parallel import ContextParallelError, context_of
from opensora_fast.sequence_shards import axes, broadcast, gather, joint_lengths, shard, shard_lengths, total
from opensora_fast.train.gradient_reduction import reduce_gradients

FILE = "opensora_fast/test_sequence_shards.py"
MESHES = [(2, 1), (1, 3), (4, 1), (2, 2)]  # (ulysses, ring)
ids = "{0[0]}x{0[1]}".format
context = functools.cache(context_of)  # on a rank: that of (ulysses, ring)


@given(tokens=st.integers(0, 1000), ranks=st.integers(1, 9))
def test_parts_are_whole_and_even(tokens, ranks):
    lengths = shard_lengths(tokens, ranks)
    assert len(lengths) == ranks
    assert sum(lengths) == tokens
    assert max(lengths) - min(lengths) <= 1
    assert list(lengths) == sorted(lengths, reverse=True)


@given(tokens=st.integers(0, 20), ranks=st.integers(1, 7), dim=st.integers(0, 2))
def test_parts_in_the_order_of_ranks_are_the_whole(tokens, ranks, dim):
    shape = [3, 2, 2]
    shape[dim] = tokens
    whole = torch.arange(12 * tokens).view(-1)[: torch.Size(shape).numel()].view(shape)
    parts = [shard(whole, rank, ranks, dim=dim) for rank in range(ranks)]
    assert torch.equal(torch.cat(parts, dim=dim), whole)
    assert tuple(part.shape[dim] for part in parts) == shard_lengths(tokens, ranks)


def test_ranks_hold_text_and_video():
    assert joint_lengths(2, 13, 4) == (1 + 4, 1 + 3, 3, 3)


def gathered_everywhere(ulysses: int, ring: int, tokens: int, dim: int):
    here = context(ulysses, ring)
    shape = [2, 3, 2]
    shape[dim] = tokens
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        whole = torch.arange(torch.Size(shape).numel()).view(shape).to(dtype)
        local = shard(whole, here.rank, here.size, dim=dim)
        assert torch.equal(gather(local, tokens, here, dim=dim), whole)
    assert here.rank == dist.get_rank()


@pytest.mark.parametrize("tokens", [0, 1, 7, 8])
@pytest.mark.parametrize("mesh", MESHES, ids=ids)
def test_gathering_undoes_sharding_on_every_rank(ranks, mesh, tokens):
    for dim in (0, 1):
        ranks(mesh[0] * mesh[1]).run(f"{FILE}:gathered_everywhere", *mesh, tokens, dim)


def refused(ulysses: int, ring: int) -> str:
    here = context(ulysses, ring)
    with pytest.raises(UserError) as refusal:
        gather(torch.zeros(1, 5, 2), 7, here)
    return str(refusal.value)


def test_a_part_of_another_length_is_refused_by_name(ranks):
    first, second = ranks(2).run(f"{FILE}:refused", 2, 1)
    assert first.startswith("rank 0 holds 5 tokens, expected 4 of 7: ")
    assert second.startswith("rank 1 holds 5 tokens, expected 3 of 7: ")


def hears_of_nobody(what: str) -> str:
    dist.barrier()  # the groups have to be made within their timeout
    here = context_of(3, 1, timeout_s=5)
    dist.barrier()
    if here.rank == 1:
        os._exit(3)
    calls = {
        "gather": lambda: gather(torch.zeros(1, 1), 3, here),
        "broadcast": lambda: broadcast(torch.zeros(1), 1, here),
        "total": lambda: total(torch.zeros(1), here),
        "gradients": lambda: reduce_gradients([torch.nn.Parameter(torch.zeros(1))], axes(here)),
    }
    with pytest.raises(ContextParallelError) as failure:
        calls[what]()
    return str(failure.value)


@pytest.mark.parametrize("what", ["gather", "broadcast", "total", "gradients"])
def test_a_rank_that_dies_is_named_by_the_others(ranks, what):
    answers = ranks.disposable(3).run(f"{FILE}:hears_of_nobody", what, limit_s=30)
    for rank in (0, 2):
        assert f"failed on rank {rank} in the group of ranks [0, 1, 2]" in answers[rank]


def heard_and_summed(ulysses: int, ring: int):
    here = context(ulysses, ring)
    heard = []
    for source in range(here.size):
        x = torch.full((3,), float(here.rank))
        broadcast(x, source, here)
        heard.append(x.tolist())
    part = torch.tensor(2.0**here.rank, requires_grad=True)
    value = total(3 * part, here)
    value.backward()
    return heard, value.item(), part.grad.item()


@pytest.mark.parametrize("mesh", MESHES, ids=ids)
def test_every_rank_hears_any_other_and_a_sum_leaves_each_its_own_gradient(ranks, mesh):
    P = mesh[0] * mesh[1]
    for heard, value, gradient in ranks(P).run(f"{FILE}:heard_and_summed", *mesh):
        assert heard == [[float(source)] * 3 for source in range(P)]
        assert value == 3 * (2**P - 1)
        assert gradient == 3
