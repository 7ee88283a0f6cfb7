"""Compiled blocks: one compilation for each class and shape, whatever the depth; the result of eager blocks."""

import pytest
import torch
import torch._dynamo

from opensora_fast.compiled_blocks import SHAPES, compile_blocks
from opensora_fast.config import MMDiTConfig
from opensora_fast.flow import sampling_schedule
from opensora_fast.mmdit import MMDiT
from opensora_fast.sampling import denoise

STEPS = 14  # the last four take two passes and one in turn


@pytest.fixture
def compiled_graphs():
    """A backend that runs graphs as they are, and the list of those it was given."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    yield backend, graphs
    torch._dynamo.reset()


def random_model(depth: int) -> MMDiT:
    torch.manual_seed(0)
    sizes = {"in_channels": 16, "vec_in_dim": 12, "context_in_dim": 10, "hidden_size": 32, "num_heads": 2}
    model = MMDiT(MMDiTConfig(**sizes, depth=depth, depth_single_blocks=depth + 1, axes_dim=(4, 6, 6)))
    for parameter in model.requires_grad_(False).parameters():
        parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    return model


def denoised(model: MMDiT, frames: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    mask = torch.zeros(1, 1, frames, 4, 6)
    mask[:, :, 0] = 1
    return denoise(
        model,
        torch.randn(1, 4, frames, 4, 6, generator=generator),
        timesteps=sampling_schedule(STEPS, 6, frames),
        txt=torch.randn(1, 5, 10, generator=generator),
        vec=torch.randn(1, 12, generator=generator),
        null_txt=torch.randn(1, 5, 10, generator=generator),
        null_vec=torch.randn(1, 12, generator=generator),
        mask=mask,
        reference=mask.expand(-1, 4, -1, -1, -1),
        guidance_txt=3.0,
        guidance_img=2.0,
        oscillate_txt=True,
        oscillate_img=True,
        dynamic_img_guidance=True,
    )


@pytest.mark.parametrize("depth", [1, 3])
def test_one_compilation_for_each_class_and_shape(compiled_graphs, depth):
    backend, graphs = compiled_graphs
    model = random_model(depth)
    expected = denoised(model)
    compile_blocks(model, backend=backend)
    torch.testing.assert_close(denoised(model), expected)
    assert len(graphs) == 2 * 2  # a double and a single block; three passes and one
    denoised(model)
    assert len(graphs) == 4  # the next video of this size compiles nothing
    denoised(model, frames=2)
    assert len(graphs) == 8


def test_a_second_model_of_the_same_sizes_compiles_nothing_new(compiled_graphs):
    backend, graphs = compiled_graphs
    for _ in range(2):
        model = random_model(1)
        compile_blocks(model, backend=backend)
        denoised(model)
    assert len(graphs) == 4


def test_hooks_of_a_block_still_run(compiled_graphs):
    backend, _ = compiled_graphs
    model, met = random_model(2), []
    compile_blocks(model, backend=backend)
    for block in (*model.double_blocks, *model.single_blocks):
        block.register_forward_pre_hook(lambda block, _: met.append(type(block).__name__))
    model(
        torch.randn(1, 6, 16),
        torch.zeros(1, 6, 3),
        torch.randn(1, 4, 10),
        torch.zeros(1, 4, 3),
        torch.ones(1),
        torch.randn(1, 12),
    )
    assert met == ["DoubleBlock"] * 2 + ["SingleBlock"] * 3


def test_weights_that_are_exchanged_are_the_ones_that_are_used(compiled_graphs):
    """As a ring of device slots does: the same shapes in other memory."""
    backend, graphs = compiled_graphs
    model, other = random_model(1), random_model(1)
    for parameter in other.parameters():
        parameter.mul_(0.5)
    expected = denoised(other)
    compile_blocks(model, backend=backend)
    denoised(model)
    for parameter, replacement in zip(model.parameters(), other.parameters(), strict=True):
        parameter.data = replacement.data
    torch.testing.assert_close(denoised(model), expected)
    assert len(graphs) == 4


def test_more_shapes_than_the_limit_fail_aloud(compiled_graphs, monkeypatch):
    backend, _ = compiled_graphs
    monkeypatch.setattr("opensora_fast.compiled_blocks.SHAPES", 2)
    with torch._dynamo.config.patch(recompile_limit=2):
        model = random_model(1)
        compile_blocks(model, backend=backend)
        denoised(model, frames=2)
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            denoised(model, frames=3)


def test_many_shapes_are_allowed():
    with torch._dynamo.config.patch(recompile_limit=8):
        compile_blocks(random_model(1))
        assert torch._dynamo.config.recompile_limit == SHAPES


@pytest.mark.slow
def test_inductor_agrees_with_eager():
    torch._dynamo.reset()
    model = random_model(2)
    expected = denoised(model)
    compile_blocks(model)
    torch.testing.assert_close(denoised(model), expected, rtol=1e-4, atol=1e-4)
