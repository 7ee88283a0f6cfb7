"""The process groups that tests run on: results by rank, failures that name the rank, and a new world after one."""

import os
import threading

import pytest
import torch
import torch.distributed as dist


def sum_of_ranks(scale):
    total = torch.tensor(scale * dist.get_rank())
    dist.all_reduce(total)
    return float(total)


def last_one_fails():
    if dist.get_rank() == dist.get_world_size() - 1:
        raise ValueError("the last rank's own words")
    dist.barrier()


def last_one_dies():
    if dist.get_rank() == dist.get_world_size() - 1:
        print("last words", flush=True)
        os._exit(3)
    return dist.get_rank()


def never_returns():
    while dist.get_rank() == 1:
        pass


def pid():
    return os.getpid()


def dies_after_its_answer():
    if dist.get_rank() == 1:
        threading.Thread(target=lambda: (threading.Event().wait(0.2), os._exit(3))).start()


HERE = "test_ranks.py"


@pytest.mark.parametrize("size", [2, 3])
def test_every_rank_answers_and_the_world_is_kept(ranks, size):
    first = ranks(size).run(f"{HERE}:pid")
    assert ranks(size).run(f"{HERE}:sum_of_ranks", 2.0) == [2.0 * sum(range(size))] * size
    assert ranks(size).run(f"{HERE}:pid") == first
    assert len({os.getpid(), *first}) == size + 1


@pytest.mark.parametrize(
    ("function", "words", "limit_s"),
    [
        ("last_one_fails", "rank 1 of 2: .*the last rank's own words", 30),
        ("last_one_dies", "rank 1 of 2: died.*last words", 30),
        ("never_returns", "rank 1 of 2: no answer within 1 s", 1),
    ],
)
def test_a_failure_names_the_rank_and_the_next_test_gets_a_new_world(ranks, function, words, limit_s):
    before = ranks(2).run(f"{HERE}:pid")
    with pytest.raises(AssertionError, match=f"(?s){words}"):
        ranks(2).run(f"{HERE}:{function}", limit_s=limit_s)
    assert not set(before) & set(ranks(2).run(f"{HERE}:pid"))


def test_a_rank_that_dies_between_calls_is_named(ranks):
    world = ranks(2)
    world.run(f"{HERE}:dies_after_its_answer")

    def call_until_it_has():
        while True:
            world.run(f"{HERE}:pid")

    with pytest.raises(AssertionError, match="rank 1 of 2: died"):
        call_until_it_has()
    assert len(ranks(2).run(f"{HERE}:pid")) == 2


def test_ranks_of_a_disposable_world_may_die(ranks):
    results = ranks.disposable(3, timeout_s=2).run(f"{HERE}:last_one_dies")
    assert results[:2] == [0, 1]
    assert repr(results[2]) == "DIED"
