"""Training runs small enough to be killed at every step: the loop, its optimiser and its checkpoints are the real ones.

The task draws from every generator there is, and the state of the loader counts batches, so that whatever is not saved,
or not restored, changes the losses.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter  # noqa: F401 - imported before the processes are forked

from opensora_fast import cli
from opensora_fast.checkpoint_reader import CheckpointReader
from opensora_fast.kernels import extension
from opensora_fast.train import launch, loop  # noqa: F401 - imported before the processes are forked
from opensora_fast.train.checkpoint import RunFolder
from opensora_fast.train.config import (
    AutoencoderRecipe,
    AutoencoderSection,
    CheckpointSection,
    DataSection,
    LoopSection,
    OptimizerSection,
    ValidationSection,
)

C = extension.load().module
STEPS, EVERY = 9, 2


class NumberedBatches:
    """Batches numbered from 0; the state is the next number."""

    def __init__(self) -> None:
        self.next = 0
        self.skipped: dict[str, str] = {}

    def __iter__(self) -> Iterator[SimpleNamespace]:
        while True:
            self.next += 1
            yield SimpleNamespace(value=self.next - 1, paths=["clip"], plan=SimpleNamespace(bucket="b"))

    def state_dict(self) -> dict:
        return {"next": self.next}

    def load_state_dict(self, state: dict) -> None:
        self.next = state["next"]

    def close(self) -> None:
        pass


class NoisyRegression:
    """Dies by SIGKILL in the loss of batch `die_at`, counted from 0."""

    device = torch.device("cpu")

    def __init__(self, dtype: torch.dtype, die_at: int | None) -> None:
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        self.dtype = dtype
        self.model: nn.Module = nn.Sequential(nn.Linear(40, 30), nn.Dropout(0.5), nn.Linear(30, 3))
        self.die_at = die_at

    def architecture(self, recipe: dict) -> dict:
        return {}

    def loss(self, batch: SimpleNamespace, generator: torch.Generator) -> tuple[Tensor, int]:
        if batch.value == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        x = torch.randn(8, 40, generator=generator) + torch.randn(8, 40)
        x = x + float(np.random.standard_normal()) + random.random()
        return (self.model(x.to(self.dtype)).float() - batch.value / 10).square().mean(), 8

    def evaluate(self, batches: Iterable) -> dict[str, float]:
        return {"loss": sum(parameter.float().square().sum().item() for parameter in self.model.parameters())}


def run_training(
    run: str, dtype: str = "float32", die_at: int | None = None, script: dict | None = None, on_failure: str = "stop"
) -> int:
    """Train the run to its end, from its newest checkpoint if it has one; gives the number of its files' calls."""
    recipe = AutoencoderRecipe(
        name="tiny",
        autoencoder=AutoencoderSection(),
        data=DataSection(),
        optimizer=OptimizerSection(lr=((0, 0.05),), ema_decay=0.9),
        loop=LoopSection(steps=STEPS),
        checkpoint=CheckpointSection(every=EVERY, keep=2),
        validation=ValidationSection(every=4),
    )
    calls = C.CallScript(**(script or {}))
    folder = RunFolder(Path(run), 2, files=C.FileSystem(calls), chunk_bytes=4096, on_failure=on_failure)
    assert loop.train(NoisyRegression(getattr(torch, dtype), die_at), recipe, folder, NumberedBatches(), [])
    folder.close()
    return calls.count


def final_state(run: Path, step: int = STEPS) -> dict[str, Tensor]:
    """All tensors of the last step's checkpoint."""
    reader = CheckpointReader(run / f"step-{step}")
    state = {name: torch.empty(record.shape, dtype=record.dtype) for name, record in reader.manifest.tensors.items()}
    reader.read(state)
    return state


def run_recipe(words: list[str], die_at: int | None = None) -> None:
    """`opensora-fast train` with these words; dies by SIGKILL in step `die_at`."""

    def step_generator(seed: int, rank: int, step: int) -> torch.Generator:
        if step == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(seed, rank, step)

    original, loop.step_generator = loop.step_generator, step_generator
    np.random.seed(0)  # nothing draws from these, and their states are compared
    random.seed(0)
    assert cli.main(["train", *words]) == 0
