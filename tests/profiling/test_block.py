"""The blocks against their eager forms: the same numbers, and the bytes and kernels that they cost."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from opensora_fast.config import MMDIT_PRESETS, MMDiTConfig
from opensora_fast.profiling.block import KINDS, block_call, saved_bytes, traffic
from opensora_fast.profiling.hardware import H200

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


# clips of 129 frames at 256px, and images of 256px: (batch, text tokens, video tokens)
CLIPS, IMAGES = (3, 512, 8448), (45, 512, 256)


def full_size(kind, batch, text, video):
    """A block of the 11.9B model without data; for use under FakeTensorMode."""
    config = MMDIT_PRESETS["open-sora-v2"]
    return block_call(kind, config, batch=batch, text=text, video=video, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("kind", "shape", "tensors"),
    [
        ("double", CLIPS, (8448 * 10 + 512 * 11) / 8960),  # the text is short
        ("double", IMAGES, 11),
        ("single", CLIPS, 9),
        ("single", IMAGES, 10),
    ],
)
def test_saved_for_backward_is_what_the_docstrings_list(kind, shape, tensors):
    with FakeTensorMode():
        call = full_size(kind, *shape)
        saved = saved_bytes(call, call.fused) / call.unit
        # beyond the whole tensors: fp32 statistics of the norms and of attention, and the modulation
        assert tensors < saved < tensors + 0.04
        assert saved < saved_bytes(call, call.eager) / call.unit / 2.5


@pytest.mark.parametrize("shape", [CLIPS, IMAGES], ids=["clips", "images"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_fused_form_moves_and_launches_less(kind, shape):
    with FakeTensorMode():
        call = full_size(kind, *shape)
        fused, eager = traffic(call.fused), traffic(call.eager)
    assert fused.bytes < eager.bytes / 2
    assert fused.kernels < eager.kernels / 2
    assert fused.seconds < eager.seconds


def test_a_product_counts_whether_in_place_or_not():
    with FakeTensorMode():
        a, b, c = (torch.empty(4096, 4096, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        apart, in_place = (traffic(forward) for forward in (lambda: [c.addmm(a, b)], lambda: [(c * 1).addmm_(a, b)]))
    products = 3 * 2 * 4096**3 / H200.matmul_flops
    assert in_place.seconds > apart.seconds > products
