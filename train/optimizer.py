"""AdamW on fp32 masters, with an exponential moving average that is kept in fp32 (`opensora_fast.kernels.adamw`).

A bf16 parameter cannot follow a step below 2^-8 of itself, and neither can a bf16 average: both live in fp32 here, and
the model's bf16 weights are rounded copies of the masters. An fp32 parameter is its own master.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from opensora_fast.kernels.adamw import adamw_step
from opensora_fast.train.config import OptimizerSection


def learning_rate(config: OptimizerSection, step: int) -> float:
    """Learning rate of `step` (1 is the first): the schedule's value, reached linearly over `warmup_steps`."""
    value = [lr for first, lr in config.lr if first < step][-1]
    return value * min(1.0, step / config.warmup_steps) if config.warmup_steps else value


class MasterAdamW:
    """AdamW over the trainable parameters of an fp32 model, which it turns into `dtype`; state goes by their names.

    State per parameter: master, first and second moment in fp32 (12 bytes; 16 with the moving average), and the number
    of its updates, in fp32 on the device, where a step that is not taken leaves it as it is.
    """

    def __init__(self, model: nn.Module, config: OptimizerSection, dtype: torch.dtype = torch.float32) -> None:
        self.config = config
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.masters: dict[str, Tensor] = dict(self.parameters)
        if dtype != torch.float32:  # copied before the weights are rounded
            self.masters = {name: p.detach().clone() for name, p in self.parameters.items()}
            model.to(dtype)
        self.first_moments = {name: torch.zeros_like(master) for name, master in self._values()}
        self.second_moments = {name: torch.zeros_like(master) for name, master in self._values()}
        self.updates = torch.zeros(len(self.masters), device=next(iter(self.masters.values())).device)
        self.ema = None
        if config.ema_decay is not None:
            self.ema = {name: master.clone() for name, master in self._values()}

    def gradient_norm(self) -> Tensor:
        """Global L2 norm of the gradients, fp32, on their device."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        if not gradients:
            return torch.zeros((), device=self.updates.device)
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, torch.float32)))

    def step(self, lr: float, gradient_norm: Tensor) -> None:
        """Clip to `config.gradient_clip`, update masters, weights and the moving average; nothing waits for the device.

        Where `gradient_norm` (fp32, on the device) is not finite, nothing changes.
        """
        beta1, beta2 = self.config.betas
        adamw_step(
            list(self.masters.values()),
            list(self.parameters.values()),
            [parameter.grad for parameter in self.parameters.values()],
            list(self.first_moments.values()),
            list(self.second_moments.values()),
            [] if self.ema is None else list(self.ema.values()),
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=self.config.eps,
            weight_decay=self.config.weight_decay,
            step=self.updates,
            gradient_norm=gradient_norm,
            max_norm=self.config.gradient_clip,
            ema_decay=self.config.ema_decay,
        )

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
        for parameter in self.parameters.values():
            parameter.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """Flat: `model.NAME` (master), `first_moment.NAME`, `second_moment.NAME`, `updates.NAME`; `ema.NAME`."""
        state: dict[str, Tensor] = {}
        for (name, master), updates in zip(self._values(), self.updates.unbind(), strict=True):
            state[f"model.{name}"] = master
            state[f"first_moment.{name}"] = self.first_moments[name]
            state[f"second_moment.{name}"] = self.second_moments[name]
            state[f"updates.{name}"] = updates
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

    def _values(self) -> Iterator[tuple[str, Tensor]]:
        """The masters by name, without their history."""
        return ((name, master.detach()) for name, master in self.masters.items())
