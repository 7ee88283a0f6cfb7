"""Gradients over ranks: summed, averaged over batches, zero where a rank has none, alike on all ranks."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from opensora_fast.train.gradient_reduction import reduce_gradients

FILE = "train/test_gradient_reduction.py"


def parameters() -> list[nn.Parameter]:
    """Of two dtypes, one frozen, one whose gradient has other strides."""
    shapes = {"a": (3, 4), "b": (5,), "c": (2, 2), "frozen": (2,), "scalar": ()}
    made = [nn.Parameter(torch.zeros(shape), requires_grad=name != "frozen") for name, shape in shapes.items()]
    return [*made, nn.Parameter(torch.zeros(6, dtype=torch.bfloat16)), nn.Parameter(torch.zeros(2, dtype=torch.double))]


def part(rank: int, parameter: nn.Parameter) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def reduced(batches: int, dtype: torch.dtype | None, bucket_bytes: int) -> list[torch.Tensor | None]:
    rank, leaves = dist.get_rank(), parameters()
    for number, leaf in enumerate(leaves):
        if leaf.requires_grad and (rank, number) != (1, 1):  # rank 1 has no gradient of b
            leaf.grad = part(rank, leaf)
    leaves[0].grad = leaves[0].grad.t().contiguous().t()
    reduce_gradients(leaves, [dist.group.WORLD], batches=batches, dtype=dtype, bucket_bytes=bucket_bytes)
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("bucket_bytes", [1, 70, 1 << 20])
@pytest.mark.parametrize("batches", [1, 3])
def test_the_gradient_is_the_mean_over_batches_of_the_sum_over_ranks(ranks, batches, bucket_bytes):
    results = ranks(3).run(f"{FILE}:reduced", batches, torch.float32, bucket_bytes)
    for number, leaf in enumerate(parameters()):
        if not leaf.requires_grad:
            assert all(of[number] is None for of in results)
            continue
        parts = [part(rank, leaf).double() for rank in range(3) if (rank, number) != (1, 1)]
        expected = (sum(parts) / batches).to(leaf.dtype)
        for of in results:
            assert of[number].dtype == leaf.dtype
            assert torch.equal(of[number], results[0][number])
        # bfloat16 is summed in float32 and rounded once; the others round in each of the two additions
        floor = 0.0 if leaf.dtype == torch.bfloat16 else 8 * torch.finfo(leaf.dtype).eps
        torch.testing.assert_close(results[0][number], expected, rtol=0, atol=floor)


def test_sums_can_be_left_in_the_gradients_dtype(ranks):
    wide, narrow = (ranks(3).run(f"{FILE}:reduced", 1, dtype, 1 << 20)[0] for dtype in (torch.float32, None))
    bfloat16 = [leaf.dtype for leaf in parameters()].index(torch.bfloat16)
    for number, (one, other) in enumerate(zip(wide, narrow, strict=True)):
        if number == bfloat16:
            assert not torch.equal(one, other)
            torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)
        elif one is not None:
            assert torch.equal(one, other)


def over_axes() -> list[torch.Tensor]:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2))
    results = []
    for groups in ([dist.group.WORLD], [mesh.get_group(0), mesh.get_group(1)]):
        (leaf,) = [nn.Parameter(torch.zeros(4))]
        leaf.grad = torch.full((4,), 2.0 ** dist.get_rank())
        reduce_gradients([leaf], groups, batches=2)
        results.append(leaf.grad)
    return results


def test_axes_of_a_mesh_in_turn_are_one_group_of_all(ranks):
    for results in ranks(4).run(f"{FILE}:over_axes"):
        for gradient in results:
            assert gradient.tolist() == [7.5] * 4


def test_one_rank_keeps_its_gradients():
    leaf = nn.Parameter(torch.zeros(3))
    leaf.grad = torch.tensor([1.0, 2.0, 4.0])
    reduce_gradients([leaf], [], batches=2)
    assert leaf.grad.tolist() == [0.5, 1.0, 2.0]
