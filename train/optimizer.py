"""AdamW on fp32 masters, with an exponential moving average that is kept in fp32.

m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  w = w - lr (m^ / (sqrt(v^) + eps) + weight_decay w);  ema = decay ema
+ (1 - decay) w A bf16 parameter cannot follow a step below 2^-8 of itself, and neither can a bf16 average: both live in
fp32 here, and the model's bf16 weights are rounded copies of the masters. An fp32 parameter is its own master.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from opensora_fast.train.config import OptimizerSection


def learning_rate(config: OptimizerSection, step: int) -> float:
    """Learning rate of `step` (1 is the first): the schedule's value, reached linearly over `warmup_steps`."""
    value = [lr for first, lr in config.lr if first < step][-1]
    return value * min(1.0, step / config.warmup_steps) if config.warmup_steps else value


class MasterAdamW:
    """AdamW over the trainable parameters of an fp32 model, which it turns into `dtype`; state goes by their names.

    State per parameter: master, first and second moment in fp32 (12 bytes; 16 with the moving average).
    """

    def __init__(self, model: nn.Module, config: OptimizerSection, dtype: torch.dtype = torch.float32) -> None:
        self.config = config
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.masters = self.parameters
        if dtype != torch.float32:  # copied before the weights are rounded
            self.masters = {name: nn.Parameter(p.detach().clone()) for name, p in self.parameters.items()}
            model.to(dtype)
        self.ema = None
        if config.ema_decay is not None:
            self.ema = {name: master.detach().clone() for name, master in self.masters.items()}
        self._adamw = torch.optim.AdamW(
            list(self.masters.values()),
            lr=0.0,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def gradient_norm(self) -> Tensor:
        """Global L2 norm of the gradients, fp32, on their device; moves the gradients to the masters."""
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if master is not parameter and parameter.grad is not None:
                master.grad = parameter.grad.float()
                parameter.grad = None
        gradients = [m.grad for m in self.masters.values() if m.grad is not None]
        return torch.nn.utils.get_total_norm(gradients).float()

    def step(self, lr: float, gradient_norm: Tensor) -> None:
        """Clip to `config.gradient_clip`, update masters, weights and the moving average."""
        masters: list[Tensor] = list(self.masters.values())
        torch.nn.utils.clip_grads_with_norm_(masters, self.config.gradient_clip, gradient_norm)
        self._adamw.param_groups[0]["lr"] = lr
        self._adamw.step()
        self.round_masters()
        if self.ema is not None:
            assert self.config.ema_decay is not None
            with torch.no_grad():
                torch._foreach_lerp_(list(self.ema.values()), masters, 1 - self.config.ema_decay)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The model with its moving average for weights, to evaluate; without an average, the model as it is."""
        if self.ema is None:
            yield
            return
        kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        try:
            self._fill(self.ema)
            yield
        finally:
            self._fill(kept)

    def zero_grad(self) -> None:
        for parameter in (*self.parameters.values(), *self.masters.values()):
            parameter.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """Flat: `model.NAME` (master), `first_moment.NAME`, `second_moment.NAME`, `updates.NAME`; `ema.NAME`."""
        state: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            moments = self._moments(master)
            state[f"model.{name}"] = master.detach()
            state[f"first_moment.{name}"] = moments["exp_avg"]
            state[f"second_moment.{name}"] = moments["exp_avg_sq"]
            state[f"updates.{name}"] = moments["step"]
            if self.ema is not None:
                state[f"ema.{name}"] = self.ema[name]
        return state

    def round_masters(self) -> None:
        """Make the model's weights the rounded masters: after a step, or after `state_dict()` was filled in place."""
        self._fill({name: master for name, master in self.masters.items() if master is not self.parameters[name]})

    @torch.no_grad()
    def _fill(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.parameters[name].copy_(value)

    def _moments(self, master: Tensor) -> dict[str, Tensor]:
        moments = self._adamw.state[master]
        if not moments:  # as torch.optim.AdamW makes them at its first step
            moments["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
            moments["exp_avg"] = torch.zeros_like(master)
            moments["exp_avg_sq"] = torch.zeros_like(master)
        return moments
