import math

import pytest
import torch
from torch import nn

from opensora_fast.train.config import OptimizerSection
from opensora_fast.train.optimizer import MasterAdamW, learning_rate


def _step(model: nn.Module, optimizer: MasterAdamW, seed: int, lr: float = 1e-2) -> float:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))
    dtype = next(model.parameters()).dtype
    model(x.to(dtype)).float().square().mean().backward()
    norm = optimizer.gradient_norm()
    optimizer.step(lr, norm)
    optimizer.zero_grad()
    return norm.item()


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def test_fp32_steps_equal_torch_adamw_with_clipping() -> None:
    config = OptimizerSection(gradient_clip=0.05)
    ours, theirs = _model(), _model()
    optimizer = MasterAdamW(ours, config)
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=config.betas, eps=config.eps, weight_decay=0.0)
    for seed in range(3):
        _step(ours, optimizer, seed)
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(seed))
        theirs(x).square().mean().backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), config.gradient_clip)
        reference.step()
        reference.zero_grad()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_bf16_model_follows_steps_that_bf16_would_lose() -> None:
    model = _model()
    optimizer = MasterAdamW(model, OptimizerSection(), torch.bfloat16)
    for name, weight in _model().named_parameters():
        assert torch.equal(optimizer.masters[name], weight), "masters start from unrounded weights"
    before = {name: master.detach().clone() for name, master in optimizer.masters.items()}
    for seed in range(4):
        _step(model, optimizer, seed, lr=1e-6)  # far below bf16's spacing at weights of about 0.3
    for name, master in optimizer.masters.items():
        assert master.dtype == torch.float32
        assert not torch.equal(master, before[name])
        assert torch.equal(optimizer.parameters[name], master.to(torch.bfloat16))


def test_moving_average_is_fp32_and_follows_its_formula() -> None:
    model = _model()
    optimizer = MasterAdamW(model, OptimizerSection(ema_decay=0.999), torch.bfloat16)
    expected = {name: master.detach().double().clone() for name, master in optimizer.masters.items()}
    for seed in range(5):
        _step(model, optimizer, seed)
        for name, master in optimizer.masters.items():
            expected[name] = 0.999 * expected[name] + 0.001 * master.detach().double()
    assert optimizer.ema is not None
    for name, average in optimizer.ema.items():
        assert average.dtype == torch.float32
        torch.testing.assert_close(average.double(), expected[name], rtol=1e-6, atol=1e-7)


def test_averaged_weights_are_lent_and_given_back() -> None:
    model = _model()
    optimizer = MasterAdamW(model, OptimizerSection(ema_decay=0.5))
    _step(model, optimizer, 0)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    with optimizer.averaged_weights():
        assert optimizer.ema is not None
        assert all(torch.equal(p, optimizer.ema[name]) for name, p in model.named_parameters())
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_filled_in_place_continues_bitwise(dtype: torch.dtype) -> None:
    config = OptimizerSection(ema_decay=0.9)
    model = _model()
    optimizer = MasterAdamW(model, config, dtype)
    for seed in range(2):
        _step(model, optimizer, seed)
    saved = {name: value.clone() for name, value in optimizer.state_dict().items()}

    other = _model()
    resumed = MasterAdamW(other, config, dtype)
    for name, value in resumed.state_dict().items():
        value.copy_(saved[name])
    resumed.round_masters()
    assert _step(model, optimizer, 9) == _step(other, resumed, 9)
    for name, value in optimizer.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_is_there_from_the_start_and_a_step_changes_it_in_place(dtype: torch.dtype) -> None:
    model = _model()
    optimizer = MasterAdamW(model, OptimizerSection(ema_decay=0.9), dtype)
    state = optimizer.state_dict()
    names = [name for name, _ in model.named_parameters()]
    kinds = ("model", "first_moment", "second_moment", "updates", "ema")
    assert state.keys() == {f"{kind}.{name}" for kind in kinds for name in names}
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in state.values())
    assert all(not state[f"{kind}.{name}"].any() for kind in kinds[1:4] for name in names)
    before = {name: value.clone() for name, value in state.items()}
    _step(model, optimizer, 0)
    assert all(state[f"updates.{name}"] == 1 for name in names)
    assert all(not torch.equal(value, before[name]) for name, value in state.items())


@pytest.mark.parametrize("norm", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_norm_that_is_not_finite_changes_nothing(norm: float, dtype: torch.dtype) -> None:
    model = _model()
    optimizer = MasterAdamW(model, OptimizerSection(ema_decay=0.9), dtype)
    _step(model, optimizer, 0)
    before = {name: value.clone() for name, value in optimizer.state_dict().items()}
    weights = [p.detach().clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    optimizer.step(1e-2, torch.tensor(norm))
    assert all(torch.equal(value, before[name]) for name, value in optimizer.state_dict().items())
    assert all(torch.equal(p, weight) for p, weight in zip(model.parameters(), weights, strict=True))


def test_a_parameter_without_a_gradient_is_not_updated() -> None:
    model = _model()
    optimizer = MasterAdamW(model, OptimizerSection())
    unused = model[2].bias
    kept = unused.detach().clone()
    model(torch.ones(1, 6)).sum().backward()
    unused.grad = None
    optimizer.step(1e-2, optimizer.gradient_norm())
    assert torch.equal(unused, kept)
    assert {name: count.item() for name, count in optimizer.state_dict().items() if name.startswith("updates.")} == {
        "updates.0.weight": 1,
        "updates.0.bias": 1,
        "updates.2.weight": 1,
        "updates.2.bias": 0,
    }


def test_learning_rate_warms_up_and_changes_at_its_steps() -> None:
    config = OptimizerSection(lr=((0, 1.0), (10, 0.5)), warmup_steps=4)
    assert [learning_rate(config, step) for step in (1, 2, 4, 10, 11)] == [0.25, 0.5, 1.0, 1.0, 0.5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_norm_is_the_global_norm(dtype: torch.dtype) -> None:
    model = _model()
    optimizer = MasterAdamW(model, OptimizerSection(), dtype)
    assert optimizer.gradient_norm() == 0
    model(torch.ones(1, 6, dtype=dtype)).sum().backward()
    expected = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
    norm = optimizer.gradient_norm()
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(expected, rel=1e-6)
