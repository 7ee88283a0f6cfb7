"""The loop, on a task small enough to see through."""

import errno
import gc
import json
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from opensora_fast.errors import UserError
from opensora_fast.kernels import extension, finite_watch
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
from opensora_fast.train.loop import step_generator, train
from opensora_fast.train.metrics import read_metrics
from opensora_fast.train.optimizer import MasterAdamW


class CountingLoader:
    """Batches numbered from 0; the state is the next number."""

    def __init__(self) -> None:
        self.next = 0
        self.skipped: dict[str, str] = {"clip-7.mp4": "no video stream"}

    def __iter__(self) -> Iterator[SimpleNamespace]:
        while True:
            self.next += 1
            yield SimpleNamespace(
                value=self.next - 1, paths=[f"clip-{self.next - 1}.mp4"], plan=SimpleNamespace(bucket="b")
            )

    def state_dict(self) -> dict:
        return {"next": self.next}

    def load_state_dict(self, state: dict) -> None:
        self.next = state["next"]

    def close(self) -> None:
        return


class Regression:
    """Loss is |w - noise - batch number|^2; `spoil` makes the batches of those numbers non-finite."""

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, spoil: Iterable[int] = (), stop_at: int | None = None) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = nn.Linear(4, 3)
        self.spoil = set(spoil)
        self.stop_at = stop_at

    def architecture(self, recipe: dict) -> dict:
        return {}

    def loss(self, batch: SimpleNamespace, generator: torch.Generator) -> tuple[Tensor, int]:
        if batch.value == self.stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        x = torch.randn(8, 4, generator=generator)
        loss = (self.model(x) - batch.value / 10).square().mean()
        return (loss * float("nan") if batch.value in self.spoil else loss), 8

    def evaluate(self, batches: Iterable) -> dict[str, float]:
        return {"loss": self.model.weight.square().sum().item()}


def _recipe(steps: int = 9, **loop: int) -> AutoencoderRecipe:
    return AutoencoderRecipe(
        name="test",
        autoencoder=AutoencoderSection(),
        data=DataSection(),
        optimizer=OptimizerSection(lr=((0, 0.05),), ema_decay=0.9, nonfinite_limit=3),
        loop=LoopSection(steps=steps, **loop),
        checkpoint=CheckpointSection(every=2),
        validation=ValidationSection(every=4),
    )


def _train(folder: Path, task: Regression, recipe: AutoencoderRecipe | None = None) -> bool:
    recipe = recipe or _recipe()
    with closing(RunFolder(folder, keep=3)) as run:
        return train(task, recipe, run, CountingLoader(), [])


def _losses(folder: Path) -> list[tuple[str, int, float]]:
    return [(row["kind"], row["step"], row["loss"]) for row in read_metrics(folder)]


def _state(folder: Path) -> dict[str, Tensor]:
    """The newest checkpoint's tensors."""
    state = MasterAdamW(Regression().model, _recipe().optimizer).state_dict()
    with closing(RunFolder(folder, keep=3)) as run:
        assert run.restore(state, {}, lambda recipe: {})
    return state


# before the first checkpoint, right after one, one step past one, and in the last step
@pytest.mark.parametrize("killed_in_step", [2, 5, 6, 9])
def test_a_run_cut_anywhere_has_the_losses_of_one_that_was_not(tmp_path: Path, killed_in_step: int) -> None:
    assert _train(tmp_path / "whole", Regression())
    expected = _losses(tmp_path / "whole")
    assert [step for kind, step, _ in expected if kind == "heldout"] == [0, 4, 8, 9]

    class Killed(RuntimeError):
        pass

    class Doomed(Regression):
        def loss(self, batch: SimpleNamespace, generator: torch.Generator) -> tuple[Tensor, int]:
            if batch.value == killed_in_step - 1:
                raise Killed
            return super().loss(batch, generator)

    with pytest.raises(Killed):
        _train(tmp_path / "cut", Doomed())
    assert _train(tmp_path / "cut", Regression())
    assert _losses(tmp_path / "cut") == expected


class FullAtFirst:
    """A file system on which the first checkpoint's data find no room."""

    def __init__(self) -> None:
        self.files = extension.load().module.FileSystem()
        self.saves = 0

    def __getattr__(self, name: str) -> Callable:
        return getattr(self.files, name)

    def write_images(self, *args: object, **options: object) -> object:
        self.saves += 1
        if self.saves == 1:
            raise OSError(errno.ENOSPC, "No space left on device", "rank-0-1.bin")
        return self.files.write_images(*args, **options)


def test_a_checkpoint_that_fails_stops_the_run(tmp_path: Path) -> None:
    refused = pytest.raises(UserError, match="step-2: not saved .No space left on device")
    with closing(RunFolder(tmp_path, keep=3, files=FullAtFirst())) as run, refused:
        train(Regression(), _recipe(), run, CountingLoader(), [])
    assert not list(tmp_path.glob("step-2*"))
    assert _train(tmp_path, Regression())
    _train(tmp_path / "whole", Regression())
    assert _losses(tmp_path) == _losses(tmp_path / "whole")


def test_a_run_may_go_on_without_a_checkpoint(tmp_path: Path) -> None:
    said: list[str] = []
    with closing(RunFolder(tmp_path, 3, on_failure="go_on", files=FullAtFirst(), say=said.append)) as run:
        assert train(Regression(), _recipe(), run, CountingLoader(), [])
    assert ["No space left on device" in line for line in said if "not saved" in line] == [True]
    assert (tmp_path / "LATEST").read_text() == "step-9"


def test_ctrl_c_saves_and_the_next_start_goes_on(tmp_path: Path) -> None:
    assert not _train(tmp_path / "cut", Regression(stop_at=4))
    assert (tmp_path / "cut" / "LATEST").read_text() == "step-5"
    assert _train(tmp_path / "cut", Regression())
    _train(tmp_path / "whole", Regression())
    assert _losses(tmp_path / "cut") == _losses(tmp_path / "whole")


def test_a_finished_run_started_again_changes_nothing(tmp_path: Path) -> None:
    _train(tmp_path, Regression())
    before = (tmp_path / "metrics.jsonl").read_text()
    assert _train(tmp_path, Regression())
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_a_non_finite_step_is_skipped_and_its_files_are_recorded(tmp_path: Path) -> None:
    assert _train(tmp_path, Regression(spoil=[3, 4]))
    skipped = [row for row in read_metrics(tmp_path) if row["kind"] == "skipped"]
    assert [(row["step"], row["paths"]) for row in skipped] == [(4, ["clip-3.mp4"]), (5, ["clip-4.mp4"])]
    assert all(row["loss"] == row["loss"] for row in read_metrics(tmp_path) if row["kind"] == "step")


@pytest.mark.parametrize("spoilt", ["loss", "gradient"])
def test_a_spoilt_loss_or_gradient_alone_leaves_all_state_as_it_was(tmp_path: Path, spoilt: str) -> None:
    class Half(torch.autograd.Function):
        """Spoils the value or its derivative, not both."""

        @staticmethod
        def forward(ctx, value: Tensor) -> Tensor:
            return value * float("nan") if spoilt == "loss" else value.clone()

        @staticmethod
        def backward(ctx, gradient: Tensor) -> Tensor:
            return gradient * float("inf") if spoilt == "gradient" else gradient

    class Spoilt(Regression):
        def loss(self, batch: SimpleNamespace, generator: torch.Generator) -> tuple[Tensor, int]:
            loss, tokens = super().loss(batch, generator)
            return (Half.apply(loss) if batch.value == 2 else loss), tokens

    _train(tmp_path / "two", Regression(), _recipe(2))
    _train(tmp_path / "three", Spoilt(), _recipe(3))
    two, three = (_state(tmp_path / name) for name in ("two", "three"))
    assert two["updates.weight"] == 2
    assert all(torch.equal(value, three[name]) for name, value in two.items())
    assert [row["step"] for row in read_metrics(tmp_path / "three") if row["kind"] == "skipped"] == [3]


def test_too_many_non_finite_steps_in_a_row_stop_the_run_and_name_the_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"3 steps in a row.*step 6 on clip-5\.mp4"):
        _train(tmp_path, Regression(spoil=[1, 3, 4, 5]))


def test_an_op_that_gave_nan_is_named_in_the_row_and_in_the_error(tmp_path: Path) -> None:
    class Watched(Regression):
        def loss(self, batch: SimpleNamespace, generator: torch.Generator) -> tuple[Tensor, int]:
            lse = torch.tensor([1.0, float("nan") if batch.value in self.spoil else 2.0])
            finite_watch.observe("attention", "cudnn", "log-sum-exp", lse)
            return super().loss(batch, generator)

    with pytest.raises(UserError, match=r"log-sum-exp of attention on cudnn.*OPENSORA_FAST_BACKEND=attention:triton"):
        _train(tmp_path, Watched(spoil=[1, 3, 4, 5]))
    rows = read_metrics(tmp_path)
    assert all("log-sum-exp" in row["complaint"] for row in rows if row["kind"] == "skipped")
    assert not any("complaint" in row for row in rows if row["kind"] == "step")


def test_skipped_clips_are_said_at_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _train(tmp_path, Regression())
    assert "skipped clip-7.mp4: no video stream" in capsys.readouterr().out


def test_metrics_survive_a_line_cut_in_half(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"kind": "step", "step": 1}) + '\n{"kind": "st')
    assert read_metrics(tmp_path) == [{"kind": "step", "step": 1}]


def test_no_two_ranks_or_steps_share_random_numbers() -> None:
    draws = {torch.rand((), generator=step_generator(42, rank, step)).item() for rank in range(4) for step in range(50)}
    assert len(draws) == 200
    again = torch.rand((), generator=step_generator(42, 3, 49)).item()
    assert again in draws


def test_the_collector_runs_at_fixed_steps_alone_and_the_loader_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []

    class Watching(Regression):
        def loss(self, batch: SimpleNamespace, generator: torch.Generator) -> tuple[Tensor, int]:
            happened.append(f"step {batch.value + 1}, collector {'on' if gc.isenabled() else 'off'}")
            return super().loss(batch, generator)

    class Closing(CountingLoader):
        def close(self) -> None:
            happened.append("closed")

    monkeypatch.setattr(gc, "collect", lambda: happened.append("collected"))
    with closing(RunFolder(tmp_path / "run", keep=3)) as run:
        assert train(Watching(), _recipe(steps=5, collect_every=2), run, Closing(), [])
    steps = [f"step {step}, collector off" for step in range(1, 6)]
    assert happened == ["collected", *steps[:2], "collected", *steps[2:4], "collected", steps[4], "closed"]
    assert gc.isenabled()
