"""Tensors of more than 2^31 elements: the last rows are those of a small tensor with the same values."""

import pytest
import torch

from opensora_fast.kernels.gated_residual import gated_residual
from opensora_fast.kernels.gelu import gelu_tanh
from opensora_fast.kernels.modulated_norm import modulated_norm
from opensora_fast.kernels.qk_norm_rope import qk_norm_rope

D, H, K = 3072, 24, 128
TOKENS = 2**31 // D + 100
CALLS = {
    "modulated_norm": lambda x, vector: modulated_norm(x, vector, vector),
    "gated_residual": lambda x, vector: gated_residual(x, x, vector),
    "gelu_tanh": lambda x, vector: gelu_tanh(x),
}


@pytest.fixture
def rows():
    """x [1, TOKENS, D] bfloat16; needs 20 GiB with what is made of it."""
    if not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("no CUDA device with 20 GiB free")
    return torch.randn(1, TOKENS, D, device="cuda", dtype=torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CALLS)
def test_rows(name, rows):
    vector = torch.randn(1, D, device="cuda", dtype=torch.bfloat16)
    large, small = CALLS[name](rows, vector)[:, -50:], CALLS[name](rows[:, -50:], vector)
    assert torch.equal(large, small)


@pytest.mark.gpu
def test_a_wide_projection(rows):
    """q and k as a slice of rows of the single blocks' width, whose last rows lie beyond 2^31 elements."""
    tokens = rows.numel() // (7 * D)
    qkv = rows.view(-1)[: tokens * 7 * D].view(1, tokens, 7 * D)[..., : 3 * D].unflatten(-1, (3, H, K))
    scale = torch.ones(K, device="cuda", dtype=torch.bfloat16)
    table = torch.randn(tokens, K // 2, device="cuda")
    large = qk_norm_rope(qkv, scale, scale, table, table)
    small = qk_norm_rope(qkv[:, -50:], scale, scale, table[-50:], table[-50:])
    assert all(torch.equal(one[:, -50:], other) for one, other in zip(large, small, strict=True))
