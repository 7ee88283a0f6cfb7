"""The reference attention where PyTorch's own operations would give other numbers."""

import pytest
import torch

from opensora_fast.kernels.attention_reference import attention_backward_reference, attention_reference


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture
def tensors():
    """q, k, v and dout."""
    return random(2, 5, 3, 16), random(2, 7, 3, 16), random(2, 7, 3, 17)[..., :16], random(2, 5, 3, 18)[..., :16]


def test_autocast_changes_nothing(tensors) -> None:
    def run():
        q, k, v, dout = tensors
        out, lse = attention_reference(q, k, v)
        return out, lse, *attention_backward_reference(dout, q, k, v, out, lse)

    expected = run()
    with torch.autocast("cpu", torch.bfloat16):
        ours = run()
    assert all(map(torch.equal, ours, expected))


def test_a_row_without_keys_has_no_gradient(tensors) -> None:
    """As a rank has it whose keys are not all of a row's: lse is -inf and there are keys all the same."""
    q, k, v, dout = tensors
    out, lse = attention_reference(q, k, v)
    lse[..., 1], out[:, 1] = -torch.inf, 0
    dq, dk, dv = attention_backward_reference(dout, q, k, v, out, lse)
    assert not dq[:, 1].any()
    rest = [0, 2, 3, 4]
    expected = attention_backward_reference(dout[:, rest], q[:, rest], k, v, out[:, rest], lse[..., rest])
    for ours, other in zip((dq[:, rest], dk, dv), expected, strict=True):
        torch.testing.assert_close(ours, other)
