"""The blocks against their eager forms: the same numbers, and the bytes and kernels that they cost."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from opensora_fast.config import MMDIT_PRESETS, MMDiTConfig
from opensora_fast.profiling.block import KINDS, block_call, saved_bytes, traffic

TINY = MMDiTConfig(
    in_channels=8,
    vec_in_dim=12,
    context_in_dim=10,
    hidden_size=36,
    num_heads=2,
    depth=1,
    depth_single_blocks=1,
    axes_dim=(6, 6, 6),
)


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_is_its_eager_form(kind):
    torch.manual_seed(0)
    call = block_call(kind, TINY, batch=2, text=3, video=7, dtype=torch.float32)
    leaves = [*call.inputs, *call.block.parameters()]
    results = []
    for forward in (call.fused, call.eager):
        outputs = forward()
        grads = [torch.sin(torch.arange(out.numel()).view_as(out).float()) for out in outputs]
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, grads)])
    for ours, eager in zip(*results, strict=True):
        assert relative(ours.detach(), eager.detach()) < 1e-5


@pytest.fixture(scope="module", params=KINDS)
def full_size(request):
    """A block of the 11.9B model on 3 clips of 256px and 129 frames, without data."""
    with FakeTensorMode():
        config = MMDIT_PRESETS["open-sora-v2"]
        yield block_call(request.param, config, batch=3, text=512, video=8448, dtype=torch.bfloat16)


def test_saved_for_backward_is_what_the_docstrings_list(full_size):
    tensors = {"double": 11, "single": 10}[full_size.kind]
    saved = saved_bytes(full_size, full_size.fused) / full_size.unit
    # beyond the whole tensors: fp32 statistics of the norms and of attention, and the modulation
    assert tensors < saved < tensors + 0.03
    assert saved < saved_bytes(full_size, full_size.eager) / full_size.unit / 2.5


def test_the_fused_form_moves_and_launches_less(full_size):
    fused, eager = traffic(full_size.fused), traffic(full_size.eager)
    assert fused.bytes < eager.bytes / 2
    assert fused.kernels < eager.kernels / 2
    assert fused.seconds < eager.seconds
