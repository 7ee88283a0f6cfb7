"""The training loop: one for every task.

    batch -> loss -> gradients -> clip -> AdamW on fp32 masters -> moving average -> metrics -> checkpoint

A step's randomness is a function of (seed, rank, step) alone, and the loader's of (seed, epoch, clip), and checkpoints
hold the global generators for whatever else draws: a run that was killed and started again has bitwise the losses of
one that was not. Checkpoints are written in the background; a step waits only for the state to be copied.
"""

from __future__ import annotations

import hashlib
import math
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from types import FrameType
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from opensora_fast.errors import UserError
from opensora_fast.kernels import finite_watch
from opensora_fast.train.checkpoint import RunFolder
from opensora_fast.train.config import AutoencoderRecipe, DiffusionRecipe, recipe_to_dict
from opensora_fast.train.garbage_collection import CollectedEvery
from opensora_fast.train.loader import Batch, Batches
from opensora_fast.train.metrics import Metrics, memory_gib
from opensora_fast.train.optimizer import MasterAdamW, learning_rate

AnyRecipe = TypeVar("AnyRecipe", DiffusionRecipe, AutoencoderRecipe)


class Task(Protocol):
    """What is trained. Implemented by `diffusion.VelocityTask` and `autoencoder_loop.ReconstructionTask`."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def architecture(self, recipe: dict) -> dict: ...
    def loss(self, batch: Batch, generator: torch.Generator) -> tuple[Tensor, int]: ...
    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]: ...


class Interrupt:
    """Turns the first Ctrl-C (or SIGTERM) into a request to save and leave; a second one ends at once."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> Interrupt:
        self._previous = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


def step_generator(seed: int, rank: int, step: int) -> torch.Generator:
    """The CPU generator of one step on one rank: no two ranks or steps share a stream.

    Ranks count batches here: those that share a sequence pass one number, and make the same draws.
    """
    digest = hashlib.blake2b(f"{seed}/{rank}/{step}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest) >> 1)


def train(
    task: Task,
    recipe: AnyRecipe,
    run: RunFolder,
    loader: Batches,
    heldout: Iterable[Batch],
    *,
    rank: int = 0,
    finish: Callable[[AnyRecipe], AnyRecipe] = lambda recipe: recipe,
    sample: Callable[[int], None] | None = None,
) -> bool:
    """Train `task.model` (fp32) to `recipe.loop.steps`, from the newest checkpoint of `run` when there is one.

    `heldout` is passed over at the first and last step and every `validation.every`; `sample` is called every
    `validation.sample_every`; `finish` turns the recipe into the one stored with the last checkpoint. All three see the
    moving average, where one is kept. `loader` is closed at the end. Returns False when interrupted (state saved).
    Raises UserError when `nonfinite_limit` steps in a row had a non-finite loss or gradient, or when a checkpoint
    cannot be saved.
    """
    optimizer = MasterAdamW(task.model, recipe.optimizer, task.dtype)
    state = optimizer.state_dict()
    progress: dict = {"step": 0, "loader": loader.state_dict(), "skipped_in_a_row": 0, "finished": False}
    restored = run.restore(state, recipe_to_dict(recipe), task.architecture)
    if restored:
        optimizer.round_masters()
        progress = restored.progress
        loader.load_state_dict(progress["loader"])
    run.write_recipe(recipe_to_dict(recipe))
    run.prepare(state)
    step = saved = progress["step"]
    total, log_every = recipe.loop.steps, recipe.loop.log_every
    metrics = Metrics(run.path, first_step=step, total_steps=total, log_every=log_every, title=recipe.name)

    def evaluate() -> None:
        with optimizer.averaged_weights():
            values = task.evaluate(heldout)
        if values:
            metrics.row("heldout", step, values)
            figures = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
            metrics.say(f"held-out at step {step}: {figures}")

    collector = CollectedEvery(recipe.loop.collect_every)
    with Interrupt() as interrupt, metrics, closing(loader), collector:
        batches = iter(loader)
        if restored:
            metrics.say(f"resumed {restored.folder}" + "".join(f"\npassed over {line}" for line in restored.damaged))
        else:
            evaluate()
        while step < total and not interrupt.requested:
            run.check()
            begun = time.perf_counter()
            batch = next(batches)
            data_seconds = time.perf_counter() - begun
            step += 1
            generator = step_generator(recipe.loop.seed, rank, step)
            values = _optimise(task, optimizer, batch, step, generator, run.order_update)
            seconds = time.perf_counter() - begun
            values |= {"step_seconds": seconds, "data_seconds": data_seconds}
            values |= {"tokens_per_second": values["tokens"] / seconds}
            _report_step(metrics, step, batch, values, progress, recipe.optimizer.nonfinite_limit)
            progress |= {"step": step, "loader": loader.state_dict(), "finished": False}
            if recipe.validation.every and step % recipe.validation.every == 0 and step < total:
                evaluate()
            if sample and recipe.validation.sample_every and step % recipe.validation.sample_every == 0:
                with optimizer.averaged_weights():
                    sample(step)
            if step % recipe.checkpoint.every == 0 and step < total:
                run.save(step, state, progress, recipe_to_dict(recipe))
                saved = step
            collector.step(step)
        if step >= total and not progress["finished"]:
            evaluate()
            with optimizer.averaged_weights():
                recipe = finish(recipe)
            progress["finished"] = True
            saved = -1
        if saved != step:
            run.save(step, state, progress, recipe_to_dict(recipe))
            metrics.say(f"saved {run.wait()}")
        run.wait()
        for path, reason in loader.skipped.items():
            metrics.say(f"skipped {path}: {reason}")
        return step >= total and not interrupt.requested


def _optimise(
    task: Task,
    optimizer: MasterAdamW,
    batch: Batch,
    step: int,
    generator: torch.Generator,
    before_update: Callable[[], None],
) -> dict:
    """One step and its figures; a non-finite loss or gradient leaves the weights untouched."""
    lr = learning_rate(optimizer.config, step)
    loss, tokens = task.loss(batch, generator)
    loss.backward()
    loss, gradient_norm = loss.detach().float(), optimizer.gradient_norm()
    before_update()
    optimizer.step(lr, torch.where(loss.isfinite(), gradient_norm, torch.nan))
    optimizer.zero_grad()
    names, magnitudes = finite_watch.take(task.device)
    figures = torch.cat([torch.stack([loss, gradient_norm]), magnitudes])
    loss_value, norm_value, *watched = figures.tolist()  # the only wait for the device
    values = {"loss": loss_value, "grad_norm": norm_value, "lr": lr, "tokens": tokens}
    return values | {"memory_gib": memory_gib(task.device), "complaint": finite_watch.complaint(names, watched)}


def _report_step(metrics: Metrics, step: int, batch: Batch, values: dict, progress: dict, nonfinite_limit: int) -> None:
    """A row for the step. Raises UserError naming the clips when `nonfinite_limit` steps in a row were skipped."""
    complaint = values.pop("complaint")
    if math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"]):
        progress["skipped_in_a_row"] = 0
        metrics.step(step, values | {"bucket": str(batch.plan.bucket)})
        return
    progress["skipped_in_a_row"] += 1
    figures = {name: str(values[name]) for name in ("loss", "grad_norm")}
    metrics.row("skipped", step, figures | {"paths": batch.paths} | ({"complaint": complaint} if complaint else {}))
    if progress["skipped_in_a_row"] >= nonfinite_limit:
        raise UserError(
            f"{nonfinite_limit} steps in a row had a non-finite loss or gradient, the last step {step} on "
            f"{', '.join(batch.paths)}: look at these clips, or lower --optimizer.lr"
            + (f"; {complaint}" if complaint else "")
        )
