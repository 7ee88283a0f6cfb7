"""The modulation of all steps at once: that of every step by itself, in one product per block."""

import pytest
import torch

from opensora_fast.config import MMDiTConfig
from opensora_fast.errors import UserError
from opensora_fast.mmdit import MMDiT
from opensora_fast.modulation_schedule import ModulationSchedule


def random_model(**changes) -> MMDiT:
    torch.manual_seed(0)
    sizes = {"in_channels": 8, "vec_in_dim": 12, "context_in_dim": 10, "hidden_size": 32, "num_heads": 2}
    model = MMDiT(MMDiTConfig(**sizes, depth=2, depth_single_blocks=2, axes_dim=(4, 6, 6), **changes))
    for parameter in model.requires_grad_(False).parameters():
        parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    return model


TIMES = torch.tensor([1.0, 0.75, 0.2])
VECTORS = torch.randn(2, 12, generator=torch.Generator().manual_seed(1))


def leaves(modulation):
    return [*modulation.img_R6D, *modulation.txt_R6D, *modulation.single_R3D, modulation.final_R2D]


@pytest.mark.parametrize("distilled", [False, True])
def test_a_step_s_rows_are_those_of_the_step_alone(distilled):
    model = random_model(guidance_embed=distilled)
    scale = torch.tensor([4.0, 1.5]) if distilled else None
    schedule = ModulationSchedule.of(model, TIMES, VECTORS, scale)
    index = torch.tensor([1, 0, 1])
    for step, time in enumerate(TIMES):
        alone = model.modulation(time.expand(3), VECTORS[index], None if scale is None else scale[index])
        for got, wanted in zip(leaves(schedule.rows(step, index)), leaves(alone), strict=True):
            assert got.shape == wanted.shape
            torch.testing.assert_close(got, wanted)


def test_each_matrix_is_read_once(monkeypatch):
    model = random_model()
    rows = []
    linears = [module for name, module in model.named_modules() if name.endswith("modulation")]
    for linear in linears:
        linear.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    schedule = ModulationSchedule.of(model, TIMES, VECTORS)
    for step in range(3):
        schedule.rows(step, torch.tensor([0, 1]))
    assert rows == [6] * len(linears)
    assert len(linears) == 2 * 2 + 2 + 1


def test_it_keeps_no_graph():
    model = random_model().requires_grad_(True)
    assert not any(x.requires_grad for x in leaves(ModulationSchedule.of(model, TIMES, VECTORS).modulation))


def test_a_distilled_model_without_its_scale_is_refused():
    with pytest.raises(UserError, match="guidance_embed=True"):
        ModulationSchedule.of(random_model(guidance_embed=True), TIMES, VECTORS)
