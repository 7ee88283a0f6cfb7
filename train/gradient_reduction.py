"""The gradient of a step from the parts that the ranks hold: summed over context ranks, averaged over data.

    g = 1/G * sum over the G batches of a step of (sum over the ranks that share the batch of their part)

The loss of a batch is the mean over all of its video tokens. A rank computes the part of its own tokens, weighted by
their number, so the sum over the ranks that share it is exact however text and video were split between them.

FSDP2 takes this over for sharded runs: its reduce-scatter adds over the same ranks, with 1/G as its divide factor.
Until then, and for replicated parameters, this is the whole of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import nn

from opensora_fast.kernels.context_exchange import named_failure

BUCKET_BYTES = 256 << 20


@torch.no_grad()
def reduce_gradients(
    parameters: Iterable[nn.Parameter],
    groups: Sequence[dist.ProcessGroup],
    *,
    batches: int = 1,
    dtype: torch.dtype | None = torch.float32,
    bucket_bytes: int = BUCKET_BYTES,
) -> None:
    """Replace the gradients of `parameters` by g, on all ranks.

    groups: one group of all ranks, or the axes of their mesh, which are then summed over in turn. In turn, ranks may
    round differently: pass one group where replicas must stay alike to the bit.
    batches: G, how many batches the ranks of these groups hold between them.
    dtype: the sums are at least as wide as this; None is each gradient's own dtype. The result is rounded once to that.
    bucket_bytes: gradients of one dtype travel together, up to so many bytes of them.

    A parameter without a gradient on this rank counts as zero, so that all ranks send the same buckets: afterwards
    every parameter that requires a gradient has one. All ranks must pass the same parameters in the same order.
    """
    for bucket in _buckets(parameters, bucket_bytes):
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        wide = parts[0].dtype if dtype is None else torch.promote_types(parts[0].dtype, dtype)
        flat = torch.cat([part.to(wide).flatten() for part in parts])
        for group in groups:
            with named_failure(group, "gradients"):
                dist.all_reduce(flat, group=group)
        flat /= batches
        for parameter, reduced in zip(bucket, flat.split([part.numel() for part in parts]), strict=True):
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            parameter.grad.copy_(reduced.view(parameter.shape))


def _buckets(parameters: Iterable[nn.Parameter], bucket_bytes: int) -> Iterator[list[nn.Parameter]]:
    """The trainable parameters by dtype, in their order, cut where a bucket would exceed `bucket_bytes`."""
    by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.requires_grad:
            by_dtype.setdefault(parameter.dtype, []).append(parameter)
    for alike in by_dtype.values():
        bucket: list[nn.Parameter] = []
        filled = 0
        for parameter in alike:
            if bucket and filled + parameter.nbytes > bucket_bytes:
                yield bucket
                bucket, filled = [], 0
            bucket.append(parameter)
            filled += parameter.nbytes
        yield bucket
