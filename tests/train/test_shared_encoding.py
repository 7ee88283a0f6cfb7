"""Encoders shared by ranks: each item is encoded once, and every rank gets what one process would."""

import functools
import os

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from opensora_fast.errors import UserError
from opensora_fast.kernels.context_parallel import ContextParallelError, context_of
from opensora_fast.train.shared_encoding import (
    FLOPS_PER_PROMPT,
    SharedAutoencoder,
    SharedEncoding,
    Work,
    clips_work,
    deal,
    require_alike,
)

FILE = "train/test_shared_encoding.py"
CPU = torch.device("cpu")
MESHES = [(2, 1), (1, 3), (2, 2)]  # (ulysses, ring)
context = functools.cache(context_of)  # on a rank: that of (ulysses, ring)


def work(count: int, cost: float, encoded: list | None = None) -> Work:
    """Item n becomes three times n, and a row of two in another dtype."""

    def encode(items: slice) -> tuple[torch.Tensor, ...]:
        if encoded is not None:
            encoded.append((items.start, items.stop))
        numbers = torch.arange(items.start, items.stop)
        return numbers[:, None].expand(-1, 3).float() + cost, numbers[:, None].expand(-1, 2)

    return Work(signature=(cost,), count=count, cost=cost, encode=encode)


works = st.lists(st.tuples(st.integers(1, 9), st.floats(0.1, 100)), min_size=1, max_size=4)


@given(sizes=works, ranks=st.integers(1, 8))
def test_every_item_is_dealt_once_and_no_rank_gets_far_more_than_its_share(sizes, ranks):
    dealt = [work(count, cost) for count, cost in sizes]
    items = deal(dealt, ranks)
    for one, of in zip(dealt, items, strict=True):
        assert len(of) == ranks
        assert [n for part in of for n in range(part.start, part.stop)] == list(range(one.count))
    loads = [
        sum(one.cost * (of[rank].stop - of[rank].start) for one, of in zip(dealt, items, strict=True))
        for rank in range(ranks)
    ]
    assert max(loads) <= sum(loads) / ranks + max(one.cost for one in dealt) + 1e-9


def test_one_clip_and_its_prompt_go_to_different_ranks():
    video = torch.empty(1, 3, 129, 256, 256, device="meta")
    clip = clips_work(None, video)
    prompt = Work(signature=("text",), count=1, cost=FLOPS_PER_PROMPT, encode=lambda items: ())
    assert deal([clip, prompt], 4)[0][0] == slice(0, 1)
    assert deal([clip, prompt], 4)[1][1] == slice(0, 1)


def test_a_batch_of_clips_is_spread():
    clip = clips_work(None, torch.empty(3, 3, 129, 256, 256, device="meta"))
    prompts = Work(signature=("text",), count=3, cost=FLOPS_PER_PROMPT, encode=lambda items: ())
    clips, texts = deal([clip, prompts], 4)
    assert [part.stop - part.start for part in clips] == [1, 1, 1, 0]
    assert [part.stop - part.start for part in texts] == [0, 0, 0, 3]


def shared_twice(ulysses: int, ring: int, sizes: list[tuple[int, float]]):
    encoded: list = []
    share = SharedEncoding(context(ulysses, ring), CPU)
    results = [share([work(*size, encoded) for size in sizes]) for _ in range(2)]
    return results, encoded


@pytest.mark.parametrize("mesh", MESHES, ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("sizes", [[(1, 5.0), (1, 2.0)], [(5, 3.0), (2, 4.0)]], ids=str)
def test_ranks_get_the_results_of_one_process_and_each_item_is_encoded_once(ranks, mesh, sizes):
    alone = SharedEncoding(None, CPU)([work(*size) for size in sizes])
    answers = ranks(mesh[0] * mesh[1]).run(f"{FILE}:shared_twice", *mesh, sizes)
    for results, _ in answers:
        for once in results:
            for ours, expected in zip(once, alone, strict=True):
                for tensor, other in zip(ours, expected, strict=True):
                    assert tensor.dtype == other.dtype
                    assert torch.equal(tensor, other)
    items = sum(stop - start for _, encoded in answers for start, stop in encoded)
    assert items == 2 * sum(count for count, _ in sizes)


def test_a_work_of_no_items_is_refused_by_name():
    with pytest.raises(ValueError, match=r"the work \(2.0,\) has count=0"):
        work(0, 2.0)


def one_dies_in_its_encoder() -> str:
    dist.barrier()  # the groups have to be made within their timeout
    here = context_of(3, 1, timeout_s=5)
    dist.barrier()

    def encode(items: slice) -> tuple[torch.Tensor, ...]:
        if here.rank == 1:
            os._exit(3)
        return (torch.zeros(1),)

    with pytest.raises(ContextParallelError) as failure:
        SharedEncoding(here, CPU)([Work(signature=("clip",), count=3, cost=1.0, encode=encode)])
    return str(failure.value)


def test_a_rank_that_dies_in_its_encoder_is_named_by_the_others(ranks):
    answers = ranks.disposable(3).run(f"{FILE}:one_dies_in_its_encoder", limit_s=30)
    assert repr(answers[1]) == "DIED"
    for rank in (0, 2):
        assert f"failed on rank {rank} in the group of ranks [0, 1, 2]" in answers[rank]
        assert "has probably died, left" in answers[rank]


class Blur:
    """An autoencoder for tests: its latent is the mean of each frame; counts its calls."""

    latent_channels, compression, causal = 3, (1, 8, 8), True

    def __init__(self) -> None:
        self.calls: list[tuple[int, ...]] = []

    def encode(self, video_BCTHW: torch.Tensor) -> torch.Tensor:
        self.calls.append(tuple(video_BCTHW.shape))
        return video_BCTHW.mean(dim=(3, 4), keepdim=True)

    def decode(self, latent_BCTHW: torch.Tensor) -> torch.Tensor:
        return latent_BCTHW.repeat_interleave(8, 3).repeat_interleave(8, 4)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        return frames, 1, 1

    def frames_of(self, latent_frames: int) -> int:
        return latent_frames


def shared_clips(frames: list[int]):
    own = Blur()
    autoencoder = SharedAutoencoder(own, SharedEncoding(context(2, 1), CPU))
    assert (autoencoder.latent_channels, autoencoder.compression, autoencoder.causal) == (3, (1, 8, 8), True)
    assert autoencoder.latent_shape(5, 8, 8) == (5, 1, 1)
    assert autoencoder.frames_of(5) == 5
    videos = [torch.rand(3, 3, count, 8, 8, generator=torch.Generator().manual_seed(count)) for count in frames]
    for video in videos:
        assert torch.equal(autoencoder.encode(video), Blur().encode(video))
    assert torch.equal(autoencoder.decode(videos[0]), own.decode(videos[0]))
    return own.calls


def test_clips_of_any_length_are_encoded_by_both_ranks_together(ranks):
    first, second = ranks(2).run(f"{FILE}:shared_clips", [4, 1, 4])
    assert first == [(2, 3, count, 8, 8) for count in (4, 1, 4)]
    assert second == [(1, 3, count, 8, 8) for count in (4, 1, 4)]


def alike(values: list[str]) -> str:
    here = context(1, 3)
    try:
        require_alike("batch", values[here.rank], here, CPU)
    except UserError as refusal:
        return str(refusal)
    return ""


def test_ranks_with_another_batch_are_named_on_every_rank(ranks):
    assert ranks(3).run(f"{FILE}:alike", ["a", "a", "a"]) == ["", "", ""]
    for complaint in ranks(3).run(f"{FILE}:alike", ["a", "a", "b"]):
        assert complaint.startswith("rank 2 of a context-parallel group has another batch than rank 0")
